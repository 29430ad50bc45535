"""Prepared launches, with a stand-in for Triton's driver: what is compiled once, and what is left to Triton.

They run in a process of their own, because this one interprets kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks import static_cost


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with static_cost.compiler() as pool:
        yield pool


def _operands(rows: int = 64, in_features: int = 4096, tokens: int = 1) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(tokens, in_features).half(),
        torch.zeros(rows, in_features // 8, dtype=torch.int32),
        torch.ones(in_features // 128, rows).half(),
        torch.zeros(in_features // 128, rows, dtype=torch.uint8),
    )


def _launches() -> dict[str, Any]:
    """Grids and names of launches, and how often Triton processed arguments itself."""
    from unittest import mock

    import triton

    from benchmarks.compile_only import compile_only
    from qkernels import dispatch
    from qkernels.kernels import matmul as kernel

    found: dict[str, Any] = {}
    run = type(kernel.matmul_kernel).run
    slow: list[str] = []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        slow.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def launches_of(x: torch.Tensor, *weight: torch.Tensor) -> tuple[list[tuple[str, int]], list[str]]:
        driver.clear()
        slow.clear()
        dispatch.matmul(x, *weight, None, "w4g128", 4096)
        return [(launch.name, launch.grid[0]) for launch in driver], list(slow)

    with mock.patch.object(type(kernel.matmul_kernel), "run", counted), compile_only(90) as driver:
        x, *weight = _operands()
        found["first"] = launches_of(x, *weight)
        found["second"] = launches_of(x.clone(), *weight)
        shifted = torch.zeros(4097).half()[1:].view(1, 4096)
        found["misaligned"] = launches_of(shifted, *weight)
        found["misaligned again"] = launches_of(shifted, *weight)
        strided = torch.zeros(4096, 2).half().T[:1]
        found["strided"] = launches_of(strided, *weight)
        found["strided again"] = launches_of(strided, *weight)
        found["aligned after"] = launches_of(x, *weight)
        found["three tokens"] = launches_of(*_operands(tokens=3))
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(print)
        found["watched by a profiler"] = launches_of(x, *weight)[1]
        hooks.remove(print)
    with mock.patch.object(type(kernel.matmul_kernel), "run", counted), compile_only(80) as driver:
        found["another GPU"] = launches_of(x, *weight)
        found["another GPU again"] = launches_of(x, *weight)
    return found


def test_arguments_are_processed_once(pool: ProcessPoolExecutor) -> None:
    found = pool.submit(_launches).result()
    both = [("matmul_kernel", 16), ("reduce_kernel", 1)]  # one block of rows, K in 16 splits
    names = [name for name, _ in both]
    assert found["first"] == (both, names)
    assert found["second"] == (both, [])
    assert found["misaligned"] == found["misaligned again"] == (both, names[:1])
    assert found["strided"] == (both, names)
    assert found["strided again"] == (both, [])
    assert found["aligned after"] == (both, [])
    assert found["three tokens"] == (both, names)
    assert found["watched by a profiler"] == names
    assert found["another GPU"] == (both, names)
    assert found["another GPU again"] == (both, [])


def _arguments() -> list[list[Any]]:
    """What a compiled kernel is given, first by Triton, then by a prepared launch."""
    from unittest import mock

    from triton.compiler import CompiledKernel

    from benchmarks.compile_only import compile_only
    from qkernels.kernels import matmul as kernel
    from qkernels.scheme import Scheme
    from qkernels.tuning.configs import MatmulConfig

    given: list[list[Any]] = []

    def run(*args: Any) -> None:
        given.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args])

    config = MatmulConfig(8, 64, blocks=1, splits=1, num_warps=1, num_stages=3, max_registers=168)
    x, packed, scale, zero = _operands(in_features=1024)
    with compile_only(90), mock.patch.object(CompiledKernel, "run", property(lambda self: run)):
        call = kernel.prepare(x, packed, scale, zero, None, Scheme.parse("w4g128"), config)
        results = [call(x, packed, scale, zero, None) for _ in range(2)]
    for arguments, y in zip(given, results, strict=True):
        arguments[arguments.index(y.data_ptr())] = "y"  # has new memory in each call
    return given


def test_a_prepared_launch_gives_what_triton_gives(pool: ProcessPoolExecutor) -> None:
    by_triton, prepared = pool.submit(_arguments).result()
    assert len(prepared) == len(by_triton) > 30
    assert prepared[:4] == by_triton[:4]  # the grid and the stream
    assert prepared[9:] == by_triton[9:]  # tensors, numbers, constants
