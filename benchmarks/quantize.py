"""How fast weights are quantized and dequantized, as a share of what copying the same bytes takes.

    python -m benchmarks.quantize --schemes w4g128 w8cs --seconds 60

Quantizing reads a bfloat16 weight and writes codes, scales and zeros; dequantizing does the reverse. Both are bound by
memory: share is (bytes moved / copy bandwidth) / cold time of the kernel. `eager` is the op from Python, which for
quantizing waits for a check that all scales are finite. Results go to benchmarks/results/<gpu>/<date>-quantize.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys

import torch
from torch import Tensor

from benchmarks import floors, harness, products
from benchmarks.products import Problem
from qkernels import ops, reference, tables
from qkernels.scheme import Scheme
from qkernels.tuning import choose, problems, timing

SCHEMES = ("w4g128", "w8cs", "w2g64", "w3g128", "w4g32f", "w8g128")
_CHECKED_ROWS = 64


def main(arguments: list[str] | None = None) -> int:
    """Time the kernels on a GPU; the exit status is 1 if one differs from the oracle or nothing was timed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=problems.MODELS, default=["Llama-3-8B"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--seconds", type=float, default=60.0, help="stop before this many seconds have passed")
    parser.add_argument("--out", type=pathlib.Path, default=harness.RESULTS, help="folder of the result files")
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
    parser.add_argument("--gpu", choices=floors.GPUS, default="H200", help="without a GPU: whose figures to print")
    options = parser.parse_args(arguments)
    if any(Scheme.parse(scheme).group_size == "tensor" for scheme in options.schemes):
        parser.error("a scheme with one scale per tensor cannot be checked row by row")
    planned = harness.most_informative_first(options.models, options.schemes, [1], [1])
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing is timed. What follows is known without one.\n")
        print(floor_table(planned, floors.GPUS[options.gpu]))
        return 0
    machine, ceilings = harness.machine(options.commit), harness.ceilings()
    path = harness.result_path(options.out, machine["device"], harness.today(), "quantize")
    record = harness.header("quantize", "quantize", machine, ceilings)
    record = harness.run(path, record, planned, options.seconds, functools.partial(measure, ceilings=ceilings))
    print(result_table(record))
    wrong = [entry for found in record["problems"] for entry in found["kernels"].values() if "wrong" in entry]
    return 1 if wrong or not record["problems"] else 0


def moved_bytes(problem: Problem) -> int:
    """Bytes that quantizing or dequantizing a bfloat16 weight must move."""
    return 2 * problem.N * problem.K + floors.weight_bytes(problem.N, problem.K, problem.parsed)


def floor_table(planned: list[Problem], ceilings: floors.Ceilings) -> str:
    """Floors in microseconds of problems."""
    rows = [
        (
            problem.layer, str(problem.N), str(problem.K), problem.scheme,
            f"{floors.bound_us(moved_bytes(problem), 0, ceilings):.1f}",
        )
        for problem in planned
    ]  # fmt: skip
    title = f"Floors in microseconds: {ceilings.device}, {ceilings.copy / 1e12:.2f} TB/s ({ceilings.source})"
    return tables.text(title, ("layer", "N", "K", "scheme", "floor"), rows)


def measure(problem: Problem, ceilings: floors.Ceilings) -> harness.Record:
    """Check both kernels against the oracle on the first and last rows, then time them.

    Where quantizing takes more than one kernel, there is no cold time: between them the op asks the GPU whether the
    scales are finite, which a graph cannot hold.
    """
    moved = moved_bytes(problem)
    floor_us, limit_us = (floors.bound_us(moved, 0, found) for found in (ceilings, ceilings.fastest))
    scheme, text = problem.parsed, problem.scheme
    weights = [
        products.float_weight(problem, seed, "cuda") for seed in range(timing.weight_sets(moved, timing.l2_bytes()))
    ]
    stored = [ops.quantize(w, text) for w in weights]
    if (reason := difference(weights[0], stored[0], scheme)) is not None:
        return {**dataclasses.asdict(problem), "kernels": {"quantize": {"wrong": reason}}}
    dequantize: list[timing.Call] = [
        functools.partial(ops.dequantize, *each, text, problem.K, products.DTYPE) for each in stored
    ]
    cold: dict[str, list[timing.Call]] = {"dequantize": dequantize}
    if choose.group_fits_tile(scheme, problem.K):
        from qkernels.kernels import quantize as kernel

        config = choose.quantize(scheme, problem.K)
        cold["quantize"] = [functools.partial(kernel.quantize, w, scheme, config) for w in weights]
    eager: dict[str, list[timing.Call]] = {
        "quantize": [functools.partial(ops.quantize, w, text) for w in weights],
        "dequantize": dequantize,
    }
    timings = {"cold": timing.cold(cold), "eager": timing.eager(eager, replays=10)}
    entries: dict[str, harness.Record] = {}
    for name in eager:
        entries[name] = {kind: dataclasses.asdict(found[name]) for kind, found in timings.items() if name in found}
        entries[name] |= {"moved_bytes": moved, "floor_us": floor_us}
        if name in cold:
            entries[name] |= harness.judge(timings["cold"][name].median_us, floor_us, limit_us)
    return {**dataclasses.asdict(problem), "kernels": entries}


def difference(w: Tensor, stored: tuple[Tensor, Tensor, Tensor | None], scheme: Scheme) -> str | None:
    """What differs from the oracle in the first and last rows, or None."""
    packed, scale, zero = stored
    N = w.shape[0]
    for rows in (slice(0, min(_CHECKED_ROWS, N)), slice(max(0, N - _CHECKED_ROWS), N)):
        wanted = reference.quantize(w[rows].cpu(), scheme)
        found = (packed[rows], scale[:, rows], None if zero is None else zero[:, rows])
        for name, a, b in zip(("packed", "scale", "zero"), wanted, found, strict=True):
            if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b.cpu())):
                return f"{name} of rows {rows.start} to {rows.stop} is not what the oracle gives"
        dense = ops.dequantize(packed[rows], found[1], found[2], str(scheme), w.shape[1], products.DTYPE)
        if not torch.equal(dense.cpu(), reference.dequantize(*wanted, scheme, w.shape[1], products.DTYPE)):
            return f"dequantized rows {rows.start} to {rows.stop} are not what the oracle gives"
    return None


def result_table(record: harness.Record) -> str:
    """A result file as a table."""
    rows = []
    for found in record["problems"]:
        for name, entry in found["kernels"].items():
            if "wrong" in entry:
                rows.append((found["layer"], found["scheme"], name, "WRONG", "", "", entry["wrong"]))
                continue
            times = (f"{entry[kind]['median_us']:.1f}" if kind in entry else "" for kind in ("cold", "eager"))
            share = "refused" if "contaminated" in entry else f"{entry['eta']:.0%}" if "eta" in entry else ""
            rows.append((found["layer"], found["scheme"], name, *times, f"{entry['floor_us']:.1f}", share))
    title = (
        f"{record['machine']['device']}, {record['date']}: {len(record['problems'])} of {record['planned']} problems"
    )
    columns = ("layer", "scheme", "kernel", "cold us", "eager us", "floor us", "share")
    return tables.text(title, columns, rows, text_columns=3)


if __name__ == "__main__":
    sys.exit(main())
