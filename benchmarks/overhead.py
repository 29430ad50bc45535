"""What one call costs before any arithmetic: dispatch of the ops, the launch of a kernel, the import of the package.

    python -m benchmarks.overhead

For dispatch the implementation is replaced by one that returns a ready result, so what is left is the way to it and
back: argument checks are part of the CPU's implementation and are timed apart. For launches a stand-in takes the place
of Triton's driver: kernels are compiled for an H200 and everything is done but the driver's own launch, and memory for
results comes from the CPU's allocator. Times are of this machine; only their ratios carry over.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import qkernels
from qkernels import checks, dispatch, ops, packing, tables
from qkernels.scheme import as_scheme


def call_microseconds(call: Callable[[], Any], repeats: int = 15, number: int = 20_000) -> float:
    """The best of several averages, less what an empty call takes."""
    empty = min(timeit.repeat(lambda: None, repeat=repeats, number=number))
    return (min(timeit.repeat(call, repeat=repeats, number=number)) - empty) / number * 1e6


def calls() -> dict[str, float]:
    """{what: microseconds} of a matmul with x (1, 64) and a w4g32 weight (32, 64)."""
    q = qkernels.quantize(torch.randn(32, 64), "w4g32")
    layer = qkernels.QuantLinear(q)
    x, y = torch.randn(1, 64), torch.randn(1, 32)
    arguments = (x, q.packed, q.scale, q.zero, None, "w4g32", 64)
    op = torch.ops.qkernels.matmul.default
    found = {}

    def stub(*_: Any) -> torch.Tensor:
        return y

    with mock.patch.object(ops, "_matmul_cpu", stub), torch.no_grad():
        found["torch.ops.qkernels.matmul, no_grad"] = call_microseconds(lambda: op(*arguments))
        with torch.enable_grad():
            found["torch.ops.qkernels.matmul, grad mode"] = call_microseconds(lambda: op(*arguments))
        found["ops.matmul (direct), no_grad"] = call_microseconds(lambda: ops.matmul(*arguments))
        found["F.linear(x, q), no_grad"] = call_microseconds(lambda: torch.nn.functional.linear(x, q))  # type: ignore[arg-type]
        found["QuantLinear, no_grad"] = call_microseconds(lambda: layer(x))

    def check() -> None:
        checks.check_weight(q.packed, q.scale, q.zero, "w4g32", 64)
        checks.check_activation(x, q.packed, None, 64)

    found["argument checks"] = call_microseconds(check)
    return found


def launches() -> dict[str, float]:
    """{what: microseconds} of one token times a w4g128 weight, checks included, to the driver's launch."""
    from benchmarks.compile_only import compile_only
    from qkernels.kernels import matmul as kernel
    from qkernels.kernels.launch import Launch
    from qkernels.tuning import choose
    from qkernels.tuning.devices import device_of

    found = {}
    x, packed, scale, zero = operands()
    N, K = packed.shape[0], x.shape[1]
    with compile_only(90, record=False), torch.inference_mode():
        chosen = choose.fused(1, N, K, as_scheme("w4g128"), x.dtype, device_of(-1))
        whole = dataclasses.replace(chosen, splits=1)
        for what, config in (("one launch", whole), ("K split: two launches", chosen)):
            dispatch.forget()
            with mock.patch.object(choose, "matmul", lambda *_, config=config: config):
                found[f"matmul of one token, {what}"] = call_microseconds(
                    lambda: dispatch.matmul(x, packed, scale, zero, None, "w4g128", K)
                )
        with mock.patch.object(kernel, "Launch", wraps=Launch) as made:
            kernel.prepare(x, packed, scale, zero, None, as_scheme("w4g128"), whole)
        launch, y = Launch(*made.call_args.args), torch.empty(1, N, dtype=x.dtype)
        tensors = x, packed, scale, zero, scale, y
        found["one launch alone"] = call_microseconds(lambda: launch(*tensors))
        jit = launch.kernel[(launch.programs,)]
        found["one launch alone, as Triton does it"] = call_microseconds(
            lambda: jit(*tensors, *launch.numbers, **launch.named), number=2_000
        )
    return found


_FIRST = """
import time, torch, qkernels
from benchmarks import overhead
from benchmarks.compile_only import compile_only
from qkernels import dispatch
from qkernels.kernels import reduce
with compile_only(90, record=False), torch.inference_mode():
    x, *weight = overhead.operands()
    start = time.perf_counter()
    reduce.prepare((2, 1, 64), False, torch.float16)(torch.zeros(2, 1, 64), None)
    small = time.perf_counter()
    dispatch.matmul(x, *weight, None, "w4g128", x.shape[1])
    print(small - start, time.perf_counter() - small)
"""


def first_milliseconds(repeats: int = 5) -> tuple[float, float]:
    """Median times, in new processes, of the first launch of a small kernel, and of the first matmul after it.

    Triton's cache on disk is warm. The first launch of any kernel has Triton hash its own files, among other things.
    """
    run = [sys.executable, "-c", _FIRST]
    subprocess.run(run, capture_output=True, text=True, check=True)
    times = [
        [float(t) for t in subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()]
        for _ in range(repeats)
    ]
    small, matmul = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    return small, matmul


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x of one token, and a w4g128 weight (4096, 4096): packed, scale, zero."""
    N, K = 4096, 4096
    return (
        torch.randn(1, K, dtype=torch.float16),
        torch.zeros(N, packing.packed_words(4, K), dtype=torch.int32),
        torch.ones(K // 128, N, dtype=torch.float16),
        torch.zeros(K // 128, N, dtype=torch.uint8),
    )


def import_milliseconds(repeats: int = 9) -> float:
    """Median time that `import qkernels` takes where torch is already imported, each in a new process."""
    code = "import time, torch; t = time.perf_counter(); import qkernels; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    times = [float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)]
    return statistics.median(times) * 1e3


def main(arguments: list[str] | None = None) -> int:
    """Print the times as a table, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    microseconds = calls() | launches()
    small, matmul = first_milliseconds()
    milliseconds = {
        "import qkernels, after torch": import_milliseconds(),
        "first launch of a small kernel in a process": small,
        "first matmul after it": matmul,
    }
    rows = [(what, f"{value:.1f} us") for what, value in microseconds.items()]
    rows += [(what, f"{value:.0f} ms") for what, value in milliseconds.items()]
    print(tables.text("host time", ("call", "time"), rows))
    if options.json:
        record = {"torch": torch.__version__, "microseconds": microseconds, "milliseconds": milliseconds}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
