"""Pictures of result files, beside them: speed-up and share of the floor against M, joules per token, accuracy.

    python -m benchmarks.plot                                            # the newest result file of each kind
    python -m benchmarks.plot benchmarks/results/nvidia-h200/*-full.json

Each model and scheme of a file of benchmarks.matmul gives two PNGs, with a panel per layer and a line per provider; a
file of benchmarks.energy gives one, with a bar per variant, and one of benchmarks.accuracy one, with a line per method.
What was refused is left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import energy, harness, providers
from benchmarks.accuracy import LOSSLESS
from benchmarks.subjects import SUBJECTS

# provider -> color; the baseline is grey
COLORS = {
    "cublas": "#9a9a9a",
    "qkernels": "#1f6fb2",
    "qkernels-dequantize": "#7fb2d9",
    "tinygemm": "#c8452c",
    "gemlite": "#4a8f4a",
    "bitsandbytes": "#8a5aa5",
    "torchao": "#d98a3d",
    "int_mm": "#b0a030",
    "qkernels-codes": "#123f66",
    "qkernels-quantize": "#5fb0a0",
    "qkernels-a16": "#7fb2d9",
    "int_mm-dynamic": "#c8452c",
    "int_mm-compiled": "#7a1f12",
    "torchao-int8": "#f0b98a",
    "torchao-compiled": "#d98a3d",
    "gemlite-int8": "#4a8f4a",
    "llm.int8": "#8a5aa5",
    "llm.int8-6": "#c3a5d6",
}
# figure -> (key of an entry, label of the axis, whether the axis is logarithmic)
FIGURES = {
    "speed-up": ("speed_up", "speed-up over bfloat16 cuBLAS, cold", True),
    "floor": ("eta", "floor / cold time", False),
}
_MOST_BITS = 6  # per weight, in pictures of accuracy
# method of benchmarks.accuracy -> (color, marker, line): what is calibrated in full lines, other packages dotted
METHOD_STYLES = {
    "rtn": ("#9a9a9a", "o", "--"),
    "default": ("#1f6fb2", "o", "--"),
    "hqq": ("#7fb2d9", "v", "--"),
    "plan": ("#4a8f4a", "D", "--"),
    "awq": ("#5fb0a0", "^", "-"),
    "gptq": ("#c8452c", "o", "-"),
    "awq, gptq": ("#e08a7a", "D", "-"),
    "gptq, written": ("#d98a3d", "s", "-"),
    "awq, gptq, written, distilled": ("#5a1208", "*", "-"),
    "gptq, rounded": ("#c2577f", "P", "-"),
    "gptq, distilled": ("#7a1f12", "^", "-"),
    "gptq, rounded, distilled": ("#7a2f6a", "P", "-"),
    "hqq package": ("#8a5aa5", "v", ":"),
    "quanto": ("#b0a030", "s", ":"),
}
BASELINE_COLOR, OUR_COLOR, IDLE_COLOR = COLORS["cublas"], COLORS["qkernels"], "#e2e2e2"
Lines = dict[str, dict[str, list[tuple[int, float]]]]


def lines(record: harness.Record, model: str, scheme: str, key: str) -> Lines:
    """{layer: {provider: [(M, value)]}} of a result file, M ascending; no lines where there are no values."""
    found: Lines = {}
    for problem in record["problems"]:
        if (problem["model"], problem["scheme"]) == (model, scheme):
            for name, entry in problem["providers"].items():
                if key in entry:
                    by_name = found.setdefault(problem["layer"], {})
                    by_name.setdefault(name, []).append((problem["M"], entry[key]))
    for by_name in found.values():
        for points in by_name.values():
            points.sort()
    return found


def draw(record: harness.Record, path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draw a result file; path is that of the file, and gives the pictures their names. Yields each picture's path."""
    seen = dict.fromkeys((problem["model"], problem["scheme"]) for problem in record["problems"])
    for model, scheme in seen:
        for figure, (key, label, logarithmic) in FIGURES.items():
            found = lines(record, model, scheme, key)
            if found:
                machine = record["machine"]
                title = f"{model}, {scheme}: {machine['device']}, {record['date']}, torch {machine['torch']}"
                picture = path.with_name(f"{path.stem}-{model}-{scheme}-{figure}.png")
                _draw(picture, title, found, label, logarithmic)
                yield picture


def _draw(path: pathlib.Path, title: str, found: Lines, label: str, logarithmic: bool) -> None:
    from matplotlib.figure import Figure

    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure: Any = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.8), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    top = max(value for by_name in found.values() for points in by_name.values() for _, value in points)
    handles: dict[str, Any] = {}
    for axes, (layer, by_name) in zip(panels.flat, found.items(), strict=False):
        axes.axhline(1.0, color="#cccccc", linewidth=1, zorder=0)
        for name, points in by_name.items():
            (handles[name],) = axes.plot(
                *zip(*points, strict=True), marker="o", markersize=3, linewidth=1.3,
                color=COLORS[name], linestyle="--" if providers.PROVIDERS[name].other else "-",
            )  # fmt: skip
        axes.set_title(layer, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        ticks = sorted({M for points in by_name.values() for M, _ in points})
        axes.set_xticks(ticks, [str(M) for M in ticks], rotation=60)
        axes.set_xticks([], minor=True)
        if logarithmic:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.05 * max(1.0, top))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("tokens M", fontsize=9)
    figure.supylabel(label, fontsize=9)
    labels = [f"{name} (another function)" if providers.PROVIDERS[name].other else name for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})  # the same picture is the same file


def bars(record: harness.Record) -> dict[str, tuple[float, float]]:
    """{variant: (joules per token above idle, of idling)} of a result file of benchmarks.energy."""
    return {
        v["name"]: (v["joules_per_token_above_idle"], v["joules_per_token"] - v["joules_per_token_above_idle"])
        for v in record["variants"]
        if "eta" in v
    }


def draw_energy(record: harness.Record, path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draw a result file of benchmarks.energy, as `draw` does one of products; nothing if all of it was refused."""
    from matplotlib.figure import Figure

    found = bars(record)
    if not found:
        return
    figure: Any = Figure(figsize=(6.4, 0.42 * len(found) + 1.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    names, (above, idle) = list(found), zip(*found.values(), strict=True)
    dense = [v["name"] for v in record["variants"] if v["scheme"] is None]
    colors = [BASELINE_COLOR if name in dense else OUR_COLOR for name in names]
    axes.barh(names, above, height=0.6, color=colors)
    rest = axes.barh(names, idle, left=above, height=0.6, color=IDLE_COLOR, label="what the board takes idling")
    axes.bar_label(rest, [energy.joules(sum(pair)) for pair in found.values()], padding=4, fontsize=8)
    axes.invert_yaxis()  # the first on top
    axes.margins(x=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, left=False)
    axes.set_xlabel("joules per token, whole board", fontsize=9)
    machine = record["machine"]
    figure.suptitle(
        f"{record['model']}, {record['phase']}, context {record['context']}, batch {record['batch']}: "
        f"{machine['device']}, {record['date']}, torch {machine['torch']}", x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    figure.legend(handles=[rest], loc="outside lower right", frameon=False, fontsize=8)
    picture = path.with_name(f"{path.stem}-joules.png")
    figure.savefig(picture, metadata={"Software": None})
    yield picture


def curves(record: harness.Record, model: str) -> dict[str, list[tuple[float, float]]]:
    """{method: [(bits per weight, first score of the model)]} of a result file of benchmarks.accuracy, by bits.

    Without what loses nothing, and what takes so many bits that little is lost: they would leave no room for the rest.
    """
    key = next(iter(SUBJECTS[model].metrics))
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in record["entries"]:
        if entry["model"] != model or "skipped" in entry:
            continue
        if entry["bits_per_weight"] <= _MOST_BITS and entry[key] >= LOSSLESS:
            found.setdefault(entry["method"], []).append((entry["bits_per_weight"], entry[key]))
    return {method: sorted(points) for method, points in found.items()}


def draw_accuracy(record: harness.Record, path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draw a result file of benchmarks.accuracy: a panel for each model, a line for each method; less is better."""
    from matplotlib.figure import Figure

    models = list(record["models"])
    figure: Any = Figure(figsize=(4.6 * len(models), 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, model in zip(panels, models, strict=True):
        for method, points in curves(record, model).items():
            color, marker, style = METHOD_STYLES.get(method, ("#555555", "x", ":"))
            (handles[method],) = axes.plot(
                *zip(*points, strict=True), color=color, marker=marker, linestyle=style, markersize=5, linewidth=1.2
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("bits per weight, scales and zeros counted", fontsize=9)
        axes.set_ylabel(f"{next(iter(SUBJECTS[model].metrics.values()))} (lower is better)", fontsize=9)
        axes.set_title(model, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    picture = path.with_name(f"{path.stem}-bits.png")
    figure.savefig(picture, metadata={"Software": None})
    yield picture


# kind of a result file -> what draws it
DRAWERS = {
    "matmul": draw,
    "energy": draw_energy,
    "accuracy": draw_accuracy,
    "matmul-w8a8": draw,
    "matmul-w4a8": draw,
    "energy-prefill": draw_energy,
}


def main(arguments: list[str] | None = None) -> int:
    """Draw files; the exit status is 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="result files, or folders")
    options = parser.parse_args(arguments)
    paths = options.files or [harness.RESULTS]
    files: list[pathlib.Path] = []
    for path in paths:
        newest = (harness.newest(kind, path) for kind in DRAWERS)
        files += [file for file in newest if file] if path.is_dir() else [path]
    drawn = 0
    for path in files:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("kind") not in DRAWERS:
            names = dict.fromkeys(f"benchmarks.{kind.split('-')[0]}" for kind in DRAWERS)
            parser.error(f"{path} is no result file of {' or '.join(names)}")
        for picture in DRAWERS[record["kind"]](record, path):
            print(picture)
            drawn += 1
    if not drawn:
        print("No times to draw: python -m benchmarks.matmul, on a machine with a GPU, makes a result file.")
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
