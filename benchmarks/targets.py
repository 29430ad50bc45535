"""What products of codes are meant to reach on an H100 or H200, and whether a result file of benchmarks.matmul does.

A target is a ratio of two cold times of one problem in one run: that of another provider over that of qkernels, which
quantizes x, too. It is met where every problem that it is about meets it. What was refused, or not measured, counts for
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from qkernels import tables
from qkernels.scheme import Scheme

OURS = "qkernels"


@dataclasses.dataclass(frozen=True)
class Target:
    """For layers of one model, one scheme, and a range of tokens.

    Attributes:
        scheme: as one writes it.
        than: the provider that is compared with.
        ratio: of its time to ours, at least.
        fewest, most: tokens.
        what: in words.
    """

    scheme: str
    than: str
    ratio: float
    fewest: int
    most: int
    what: str


MODEL = "Llama-3-8B"
TARGETS = (
    Target("w8a8", "cublas", 1.5, 1024, 8192, "faster than bfloat16 cuBLAS"),
    Target("w8a8", "int_mm", 0.7, 1024, 8192, "of the rate of torch._int_mm alone"),
    Target("w4a8", "cublas", 1.3, 1024, 8192, "faster than bfloat16 cuBLAS"),
    Target("w4a8", "qkernels-a16", 1.0, 1, 16, "as fast as with x not quantized"),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """One problem, measured.

    Attributes:
        ratio: of the other provider's time to ours.
        where: layer and tokens.
    """

    ratio: float
    where: str


def found(record: dict[str, Any], target: Target) -> Iterator[Found]:
    """The problems of a result file that a target is about, where both times are honest."""
    scheme = str(Scheme.parse(target.scheme))
    for problem in record["problems"]:
        if (problem["model"], problem["scheme"]) != (MODEL, scheme):
            continue
        pair = [problem["providers"].get(name, {}) for name in (target.than, OURS)]
        if target.fewest <= problem["M"] <= target.most and all("eta" in entry for entry in pair):
            other, ours = (entry["cold"]["median_us"] for entry in pair)
            yield Found(other / ours, f"{problem['layer']}, M = {problem['M']}")


def table(record: dict[str, Any]) -> str:
    """Targets that a result file says something of; empty if none."""
    rows = []
    for target in TARGETS:
        problems = list(found(record, target))
        if problems:
            lowest = min(problems, key=lambda one: one.ratio)
            met = sum(one.ratio >= target.ratio for one in problems)
            tokens = f"{target.fewest} to {target.most} tokens"
            rows.append(
                (
                    target.scheme, target.what, tokens, "met" if met == len(problems) else "MISSED",
                    f"{target.ratio:.2f}", f"{lowest.ratio:.2f}", f"{met} of {len(problems)}", lowest.where,
                )
            )  # fmt: skip
    columns = ("scheme", "what", "with", "target", "at least", "lowest", "meet it", "lowest at")
    title = f"Targets, for layers of {MODEL}, cold"
    return tables.text(title, columns, rows, text_columns=4) if rows else ""
