"""What tests/interpreter.py adds to Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import HAS_GPU
from tests.interpreter import fma_f32

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the interpreter's turn is without a GPU")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, start, loaded, stored, BLOCK: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < loaded)
    tl.store(y_ptr + i, x, mask=i < stored)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_a_launch_touches_its_tensors_alone(dtype: torch.dtype) -> None:
    """Neighbours in memory too: both are the middle of something larger."""
    x, y = torch.arange(30).to(dtype), torch.zeros(30, dtype=dtype)
    _copy_kernel[(1,)](x[10:20], y[10:20], 0, 10, 10, BLOCK=16)
    assert torch.equal(y, torch.where((x >= 10) & (x < 20), x, 0))
    for start, loaded, stored, message in (
        (0, 11, 10, "load: 1 of 11 pointers outside of the tensors of the launch"),
        (0, 10, 13, "store: 3 of 13 pointers"),
        (-2, 10, 0, "load: 2 of 12 pointers"),
    ):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
            _copy_kernel[(1,)](x[10:20], y[10:20], start, loaded, stored, BLOCK=16)
    assert not y[20:].any()
    _copy_kernel[(1,)](x[10:20], x[12:22], 0, 12, 10, BLOCK=16)  # views of one tensor overlap


def test_multiply_adds_are_rounded_once() -> None:
    """2^30 + 1 = 812825 * 1321 and 2^30 - 1 = 21483 * 49981: products that differ from a tie by what float64 loses."""
    x, y = np.float32([812825, 21483]), np.float32([1321 * 2.0**-54, 49981 * 2.0**-54])
    z = np.float32([1, 1 + 2.0**-23])
    assert fma_f32(x, y, z).tolist() == [1 + 2.0**-23, 1 + 2.0**-23]
    assert fma_f32(-x, y, -z).tolist() == [-1 - 2.0**-23, -1 - 2.0**-23]
    twice = (x.astype(np.float64) * y + z).astype(np.float32)
    assert twice.tolist() == [1, 1 + 2.0**-22]  # what rounding twice would give
