"""Write the README's tables: the demo's, from `qkernels demo --out benchmarks/results/demo`, and that of speed.

python -m benchmarks.readme            # rewrite what stands between the markers
python -m benchmarks.readme --check    # only say whether it would change

Speed is that of the newest result file of benchmarks.matmul. While there is none, the floors stand there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import floors, harness, matmul, providers
from qkernels.demo.story import COLUMNS, rows

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/demo/demo.json"
MODEL, SCHEME = "Llama-3-8B", "w4g128"  # of the README's table of speed
OURS = "qkernels"


def with_table(readme: str, record: dict[str, Any]) -> str:
    """The README with the table of the demo's result file between its markers."""
    return _between(readme, "demo", demo_table(record))


def with_speed(readme: str, path: pathlib.Path | None) -> str:
    """The README with the table of a result file of benchmarks.matmul between its markers; floors if path is None."""
    return _between(readme, "speed", floor_block() if path is None else speed_block(path))


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


def floor_block() -> str:
    """What is known without a measurement."""
    schemes = (SCHEME, "w8cs", "w2g64")
    ceilings = floors.GPUS["H200"]
    table = markdown(
        ("layer", "N", "K", "M", *schemes, "bfloat16"), matmul.floor_rows(MODEL, schemes, (1, 64, 512), ceilings)
    )
    return (
        f"No result file from a GPU yet. These are floors, in microseconds: no product of M tokens with a layer of "
        f"{MODEL} can take less on an {ceilings.device} ({ceilings.copy / 1e12:.1f} TB/s copied, "
        f"{ceilings.matmul / 1e12:.0f} TFLOP/s bfloat16).\n\n{table}"
    )


def speed_block(path: pathlib.Path) -> str:
    """What a result file of benchmarks.matmul says of one model and scheme."""
    record = json.loads(path.read_text())
    measured = [
        problem
        for problem in record["problems"]
        if (problem["model"], problem["scheme"]) == (MODEL, SCHEME) and problem["M"] in matmul.FIRST_TOKENS
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
    machine, found = record["machine"], record["ceilings"]
    commit = re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", machine["commit"])
    return (
        f"{table}\n{MODEL}, {SCHEME}, weights not in L2, in CUDA graphs. The speed-up of {OURS} is over "
        f"{providers.BASELINE} with a bfloat16 weight; its share of the floor is that time against the least that "
        f"{found['copy'] / 1e12:.2f} TB/s copied and {found['matmul'] / 1e12:.0f} TFLOP/s bfloat16 allow, "
        f"measured in the same run. {machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton "
        f"{machine['triton']}, commit {commit}, {record['date']}: {len(record['problems'])} of "
        f"{record['planned']} problems of suite {record['suite']}.\n" + _pictures(path)
    )


def _cold(entry: dict[str, Any]) -> str:
    if "contaminated" in entry:
        return "refused"
    return f"{entry['cold']['median_us']:.1f}" if "cold" in entry else ""


def _figure(problem: dict[str, Any], key: str, form: str) -> str:
    entry = problem["providers"].get(OURS, {})
    return form.format(entry[key]) if key in entry else ""


def _pictures(path: pathlib.Path) -> str:
    """Links to the pictures that benchmarks.plot has drawn of what the table shows."""
    found = sorted(path.parent.glob(f"{path.stem}-{MODEL}-{SCHEME}-*.png"))
    shown = [picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture for picture in found]
    return "".join(f"\n![{picture.stem}]({picture.as_posix()})\n" for picture in shown)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite README.md, or with --check only compare; the exit status is 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    readme = path.read_text()
    wanted = with_speed(with_table(readme, json.loads(RESULT.read_text())), harness.newest("matmul"))
    if options.check:
        print(
            "README.md is up to date" if readme == wanted else "README.md is out of date: python -m benchmarks.readme"
        )
        return int(readme != wanted)
    harness.replace_text(path, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
