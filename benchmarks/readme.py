"""Write the README's table from the result file of `qkernels demo --out benchmarks/results/demo`.

python -m benchmarks.readme            # rewrite what stands between the markers
python -m benchmarks.readme --check    # only say whether it would change
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

from qkernels.demo.story import COLUMNS, rows

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/demo/demo.json"


def with_table(readme: str, record: dict[str, Any]) -> str:
    """The README with the table of a result file between its markers."""
    found = re.sub(
        r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)",
        lambda match: match[1] + demo_table(record) + match[2],
        readme,
        flags=re.DOTALL,
    )
    if "<!-- demo:begin -->\n| " not in found:
        raise ValueError("README.md has no line <!-- demo:begin --> with a line <!-- demo:end --> below it")
    return found


def demo_table(record: dict[str, Any]) -> str:
    """The demo's table as Markdown, with a line on what was measured."""
    lines = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *rows(record)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    windows, length = record["windows"]
    return (
        f"{table}\n{record['model']}: {record['layers']} linear layers with {record['weights'] / 1e6:.1f} M weights, "
        f"rounded to nearest; perplexity and KL (nats per token, from the unquantized model) over {windows} windows of "
        f"{length} tokens of {record['text']}; seconds to quantize, check and predict on {record['threads']} threads "
        f"of {record['device']}. Measured {record['date']} with torch {record['torch']}.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Rewrite README.md, or with --check only compare; the exit status is 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    readme = path.read_text()
    wanted = with_table(readme, json.loads(RESULT.read_text()))
    if options.check:
        print(
            "README.md is up to date" if readme == wanted else "README.md is out of date: python -m benchmarks.readme"
        )
        return int(readme != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
