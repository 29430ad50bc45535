"""Write the README's tables: the demo's, from `qkernels demo --out benchmarks/results/demo`, and that of speed.

python -m benchmarks.readme            # rewrite what stands between the markers
python -m benchmarks.readme --check    # only say whether it would change

What kernels cost by their machine code stands in the result file of benchmarks.static_cost. Speed is that of the newest
result file of benchmarks.matmul. While there is none, the floors stand there. Below it is what the newest files of its
suites w8a8 and w4a8, of benchmarks.model and of benchmarks.energy say, where there are any. Accuracy is that of the
file of benchmarks.accuracy.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import accuracy, floors, harness, matmul, peers, providers, quantized_inputs
from benchmarks.static_cost import GPUS
from benchmarks.subjects import SUBJECTS
from qkernels.demo.story import COLUMNS, rows
from qkernels.files import replacing
from qkernels.scheme import Scheme

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks/results/demo/demo.json"
MODEL, SCHEME = "Llama-3-8B", "w4g128"  # of the README's table of speed
OURS = "qkernels"
STATIC = ROOT / "benchmarks/results/static/matmul.json"
STATIC_INT8 = STATIC.with_name("int8.json")
STATIC_SCHEMES = ("w4g128", "w8g128", "w2g64", "w3g128", "w8cs-a8s", "w4g128-a8s")
STATIC_CAPABILITIES = (80, 89, 90)
KINDS = ("matmul", "model", "energy", "matmul-w8a8", "matmul-w4a8")  # of result files that the README shows
_WIDEST = 5  # schemes in a table of accuracy


def with_table(readme: str, record: dict[str, Any]) -> str:
    """The README with the table of the demo's result file between its markers."""
    return _between(readme, "demo", demo_table(record))


def with_speed(
    readme: str,
    products: pathlib.Path | None,
    model: pathlib.Path | None = None,
    energy: pathlib.Path | None = None,
    w8a8: pathlib.Path | None = None,
    w4a8: pathlib.Path | None = None,
) -> str:
    """The README with the tables of result files between its markers, one of each of KINDS.

    Floors stand there if there is no file of products; of the other kinds, nothing.
    """
    blocks = [floor_block() if products is None else speed_block(products)]
    blocks += [speed_block(path, name) for path, name in ((w8a8, "w8a8"), (w4a8, "w4a8")) if path is not None]
    blocks += [] if model is None else [decode_block(model)]
    blocks += [] if energy is None else [energy_block(energy)]
    return _between(readme, "speed", "\n".join(blocks))


def with_static(readme: str, records: Sequence[dict[str, Any]]) -> str:
    """The README with the table of static costs between its markers."""
    return _between(readme, "static", static_table(records))


def with_accuracy(readme: str, path: pathlib.Path | None) -> str:
    """The README with the tables of the result file of benchmarks.accuracy between its markers, if there is one."""
    return _between(readme, "accuracy", "" if path is None else accuracy_block(path))


def with_activations(readme: str, path: pathlib.Path | None) -> str:
    """The README with the table of the result file of benchmarks.quantized_inputs, if there is one."""
    return _between(readme, "activations", "" if path is None else activations_block(path))


def _between(readme: str, name: str, text: str) -> str:
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    found, count = re.subn(pattern, lambda match: match[1] + text + match[2], readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md has no line <!-- {name}:begin --> with a line <!-- {name}:end --> below it")
    return found


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table in Markdown, numbers to the right."""
    rule = [*["---"] * text_columns, *["---:"] * (len(columns) - text_columns)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *lines))


def demo_table(record: dict[str, Any]) -> str:
    """The demo's table as Markdown, with a line on what was measured."""
    table = markdown(COLUMNS, rows(record))
    windows, length = record["windows"]
    return (
        f"{table}\n{record['model']}: {record['layers']} linear layers with {record['weights'] / 1e6:.1f} M weights, "
        f"rounded to nearest; perplexity and KL (nats per token, from the unquantized model) over {windows} windows of "
        f"{length} tokens of {record['text']}; seconds to quantize, check and predict on {record['threads']} threads "
        f"of {record['device']}. Measured {record['date']} with torch {record['torch']}.\n"
    )


def static_table(records: Sequence[dict[str, Any]]) -> str:
    """What the machine code of products of one token tells, for GPUs that people have."""
    columns = ("scheme", "GPU", "registers", "programs/SM", "instr/weight", "shared op/weight", "bound", "of bandwidth")
    shown = [
        record
        for scheme in STATIC_SCHEMES
        for record in records
        if (record["kernel"], record["scheme"], record["dtype"], record["tokens"]) == ("matmul", scheme, "bfloat16", 1)
        and record["capability"] in STATIC_CAPABILITIES
    ]
    lines = [
        (
            record["scheme"],
            f"{GPUS[record['capability']].name} (sm_{record['capability']})",
            str(record["registers"]),
            str(record["programs"]),
            f"{record['instructions_per_weight']:.2f}",
            f"{record['shared_operations_per_weight']:.2f}",
            record["bound"],
            f"{100 * record['memory_share']:.0f} %",
        )
        for record in shown
    ]
    spilled = max(record["stack_bytes"] for record in shown)
    spills = f"Spills: up to {spilled} bytes" if spilled else "None spills"
    return (
        f"{markdown(columns, lines, text_columns=2)}\nOne bfloat16 token, as compiled: instructions and operations on "
        "shared memory of the main loop, for each weight; what bounds a weight at the GPU's rates, and the share of "
        f"memory bandwidth that the bound leaves. {spills}.\n"
    )


def floor_block() -> str:
    """What is known without a measurement."""
    schemes = (SCHEME, "w8cs", "w2g64", "w8a8")
    ceilings = floors.GPUS["H200"]
    table = markdown(
        ("layer", "N", "K", "M", *schemes, "bfloat16"), matmul.floor_rows(MODEL, schemes, (1, 64, 512), ceilings)
    )
    return (
        f"No result file from a GPU yet. These are floors, in microseconds: no product of M tokens with a layer of "
        f"{MODEL} can take less on an {ceilings.device} ({ceilings.copy / 1e12:.1f} TB/s copied, "
        f"{ceilings.matmul / 1e12:.0f} TFLOP/s bfloat16). Codes of w8a8's activations are written to memory and read; "
        f"its rate is the datasheet's {ceilings.int8 / 1e12:.0f} TOP/s int8, which no program reaches.\n\n{table}"
    )


def speed_block(path: pathlib.Path, scheme: str = SCHEME) -> str:
    """What a result file of benchmarks.matmul says of one model and scheme."""
    record, parsed = json.loads(path.read_text()), Scheme.parse(scheme)
    int8 = parsed.activations is not None
    measured = [
        problem
        for problem in record["problems"]
        if (problem["model"], problem["scheme"]) == (MODEL, str(parsed))
        and problem["M"] in (matmul.INT8_TOKENS if int8 else matmul.FIRST_TOKENS)
    ]
    others = [name for name in record["providers"] if name not in (OURS, providers.BASELINE)]
    timed = [name for name in others if any("cold" in problem["providers"].get(name, {}) for problem in measured)]
    names = [OURS, providers.BASELINE, *timed]
    table = markdown(
        ("layer", "N", "K", "M", *(f"{name}, us" for name in names), "share of floor", "speed-up"),
        [
            (
                problem["layer"],
                *(str(problem[size]) for size in "NKM"),
                *(_cold(problem["providers"].get(name, {})) for name in names),
                _figure(problem, "eta", "{:.0%}"),
                _figure(problem, "speed_up", "{:.2f}"),
            )
            for problem in measured
        ],
    )
    found = record["ceilings"]
    return (
        f"{table}\n{MODEL}, {scheme}, weights not in L2, in CUDA graphs. The speed-up of {OURS} is over "
        f"{providers.BASELINE} with a bfloat16 weight; its share of the floor is that time against the least that "
        f"{found['copy'] / 1e12:.2f} TB/s copied and {found['matmul'] / 1e12:.0f} TFLOP/s bfloat16 allow, "
        f"measured in the same run{_int8_rate(found) if int8 else ''}. {_origin(record)}: {len(record['problems'])} of "
        f"{record['planned']} problems of suite {record['suite']}.\n" + _pictures(path, f"{MODEL}-{parsed}-*")
    )


def _int8_rate(ceilings: Mapping[str, Any]) -> str:
    if not ceilings["int8"]:
        return "; the rate of int8 is not known"
    return f"; int8 counts with the {ceilings['int8'] / 1e12:.0f} TOP/s of the datasheet"


def decode_block(path: pathlib.Path) -> str:
    """What a result file of benchmarks.model says of whole steps."""
    record = json.loads(path.read_text())
    lines = []
    for variant in record["variants"]:
        if "skipped" in variant:
            figures = ("does not fit", "", "")
        elif "contaminated" in variant:
            figures = ("refused", "", "")
        else:
            speed_up = f"{variant['speed_up']:.2f}" if "speed_up" in variant else ""
            figures = (f"{variant['tokens_per_s']:.0f}", f"{variant['eta']:.0%}", speed_up)
        lines.append((_weights(variant), *figures))
    return (
        f"{markdown(('weights', 'tokens/s', 'share of floor', 'speed-up'), lines)}\n"
        f"Decoding with a model of {_setting(record)}, each step in a CUDA graph. The floor is what "
        f"reading all weights and the whole cache takes at the {record['ceilings']['copy'] / 1e12:.2f} TB/s of a copy, "
        f"measured in the same run. {_origin(record)}.\n"
    )


def energy_block(path: pathlib.Path) -> str:
    """What a result file of benchmarks.energy says."""
    record = json.loads(path.read_text())
    lines = []
    for variant in record["variants"]:
        keys = ("joules_per_token", "joules_per_token_above_idle")
        figures = [f"{variant[key]:.3f}" for key in keys] if "eta" in variant else ["refused", ""]
        lines.append((_weights(variant), *figures))
    return (
        f"{markdown(('weights', 'joules per token', 'above idle'), lines)}\n"
        f"Energy of the whole board, by its own counter, over at least 10 s of decoding with a model of "
        f"{_setting(record)}; above idle is less the {record['idle_watts']:.0f} W that it "
        f"takes doing nothing. {_origin(record)}.\n" + _pictures(path, "joules")
    )


def accuracy_block(path: pathlib.Path) -> str:
    """What a result file of benchmarks.accuracy says: for each model, methods by schemes."""
    record = json.loads(path.read_text())
    blocks = []
    for model, unquantized in record["models"].items():
        metrics = SUBJECTS[model].metrics
        entries = [e for e in record["entries"] if e["model"] == model and "skipped" not in e]
        ours = sorted((e["bits_per_weight"], e["scheme"]) for e in entries if e["method"] in accuracy.OURS)
        own = {scheme: bits for bits, scheme in ours}  # a plan may take less than the scheme in whose bytes it stays
        schemes = sorted(own, key=lambda scheme: own[scheme], reverse=True)
        width = -(-len(schemes) // -(-len(schemes) // _WIDEST))  # tables as wide as each other
        parts = [schemes[i : i + width] for i in range(0, len(schemes), width)]
        shown = "\n".join(_accuracy_table(entries, part, list(metrics), own) for part in parts)
        first = next(iter(metrics))
        widest = max(e[f"{first}_error"] / e[first] for e in entries if e[first] >= accuracy.LOSSLESS)
        perplexity = f"; unquantized {unquantized['perplexity']:.2f}" if "perplexity" in metrics else ""
        blocks.append(
            f"{model}: {' / '.join(metrics.values())}{perplexity}; {unquantized['about']}.\n\n"
            f"{shown}\nStandard errors of {metrics[first]} are at most {100 * widest:.1f} % of it.\n"
        )
    methods = {e["method"] for e in record["entries"]}
    legend = "; ".join(f"{name}: {method.what}" for name, method in accuracy.OURS.items() if name in methods)
    found_versions = {name: record["machine"].get(name) for name in peers.PACKAGES}
    versions = ", ".join(f"{name} {version}" for name, version in found_versions.items() if version)
    machine = record["machine"]
    return (
        "\n".join(blocks)
        + f"\n{legend}. Bits per weight count scales and zeros; where another package takes more, its cell says so. "
        f"float32 on a CPU, torch {machine['torch']}, "
        f"{versions or 'no other packages'}, {record['date']}.\n" + _pictures(path, "bits")
    )


def _accuracy_table(
    entries: Sequence[dict[str, Any]], schemes: Sequence[str], metrics: Sequence[str], own: Mapping[str, float]
) -> str:
    """Methods by some schemes."""
    lines = []
    for method in accuracy.METHODS:
        found = {e["scheme"]: e for e in entries if e["method"] == method and e["scheme"] in schemes}
        if found:
            cells = (_accuracy_cell(found.get(scheme), metrics, own[scheme]) for scheme in schemes)
            lines.append((method, *cells))
    return markdown(("method", *(f"{scheme}, {own[scheme]:.2f} bits" for scheme in schemes)), lines)


def _accuracy_cell(entry: dict[str, Any] | None, metrics: Sequence[str], own_bits: float) -> str:
    if entry is None:
        return ""
    scores = " / ".join(_score(entry[key]) for key in metrics)
    bits = entry["bits_per_weight"]
    return scores if abs(bits - own_bits) < 0.005 else f"{scores} ({bits:.2f} bits)"


def _score(value: float) -> str:
    if value < accuracy.LOSSLESS:
        return f"< {accuracy.LOSSLESS:g}"
    return f"{value:.2g}" if value >= 1e5 else f"{value:.0f}" if value >= 1e3 else f"{value:.4g}"


def activations_block(path: pathlib.Path) -> str:
    """What a result file of benchmarks.quantized_inputs says: ways to quantize inputs by models."""
    record = json.loads(path.read_text())
    models = record["models"]
    entries = {(e["model"], e["scheme"], e["how"]): e for e in record["entries"]}
    rows = [row for row in quantized_inputs.ROWS if any((model, *row) in entries for model in models)]
    metrics = {model: SUBJECTS[model].metrics for model in models}
    lines = [
        (scheme, how, *(_activations_cell(entries.get((model, scheme, how)), list(metrics[model])) for model in models))
        for scheme, how in rows
    ]
    headings = (f"{model}: {' / '.join(metrics[model].values())}" for model in models)
    about = "; ".join(
        f"{model}: {known['about']}" + (f", unquantized {known['perplexity']:.2f}" if "perplexity" in known else "")
        for model, known in models.items()
    )
    found = record["machine"]
    peer = f", torchao {found['torchao']}" if found["torchao"] else ""
    return (
        f"{markdown(('scheme', 'how', *headings), lines, text_columns=2)}\n{about}. In parentheses: of how many layers "
        "inputs are quantized, where not of all, and how many are static, where some are not. Weights of 8 bits are "
        "rounded to nearest, those of 4 searched. "
        f"float32 on a CPU, torch {found['torch']}{peer}, {record['date']}.\n"
    )


def _activations_cell(entry: dict[str, Any] | None, metrics: Sequence[str]) -> str:
    if entry is None or "skipped" in entry:
        return ""
    scores = " / ".join(_score(entry[key]) for key in metrics)
    inputs, layers, static = entry["quantized_inputs"], entry["layers"], entry.get("static_inputs")
    mixed = f", {static} static" if static not in (None, 0, inputs) else ""
    return f"{scores} ({inputs} of {layers}{mixed})" if mixed or inputs not in (0, layers) else scores


def _weights(variant: dict[str, Any]) -> str:
    return "bfloat16" if variant["scheme"] is None else str(variant["name"])


def _setting(record: dict[str, Any]) -> str:
    batch = record["batch"]
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    return f"{record['model']}'s shape and random weights, {sequences}, context {record['context']}"


def _origin(record: dict[str, Any]) -> str:
    """On what a result file was measured, and when."""
    machine = record["machine"]
    commit = re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", machine["commit"])
    return (
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"commit {commit}, {record['date']}"
    )


def _cold(entry: dict[str, Any]) -> str:
    if "contaminated" in entry:
        return "refused"
    return f"{entry['cold']['median_us']:.1f}" if "cold" in entry else ""


def _figure(problem: dict[str, Any], key: str, form: str) -> str:
    entry = problem["providers"].get(OURS, {})
    return form.format(entry[key]) if key in entry else ""


def _pictures(path: pathlib.Path, names: str) -> str:
    """Links to the pictures that benchmarks.plot has drawn of what the table shows; names is a pattern."""
    found = sorted(path.parent.glob(f"{path.stem}-{names}.png"))
    shown = [picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture for picture in found]
    return "".join(f"\n![{picture.stem}]({picture.as_posix()})\n" for picture in shown)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite README.md, or with --check only compare; the exit status is 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    readme = README.read_text()
    wanted = with_table(readme, json.loads(RESULT.read_text()))
    wanted = with_static(wanted, json.loads(STATIC.read_text()) + json.loads(STATIC_INT8.read_text()))
    wanted = with_speed(wanted, *map(harness.newest, KINDS))
    wanted = with_accuracy(wanted, harness.newest("accuracy"))
    wanted = with_activations(wanted, harness.newest(quantized_inputs.KIND))
    if options.check:
        print(
            "README.md is up to date" if readme == wanted else "README.md is out of date: python -m benchmarks.readme"
        )
        return int(readme != wanted)
    with replacing(README) as temporary:
        temporary.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
