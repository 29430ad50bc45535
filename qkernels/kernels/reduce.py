"""The end of a matrix product whose K was split: y[m, n] = sum_s part[s, m, n] (+ bias[n]).

Shapes    part (splits, ..., N) float32, bias (N,), y (..., N).
Numerics  float32, splits added in order: the same bits in every run. One rounding, at the end.
Oracle    torch.sum      Tuning  none: the data of a decode step fits in a corner of L2
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.kernels.launch import Launch


@triton.jit
def reduce_kernel(
    part_ptr,  # (splits, M, N) float32, contiguous
    bias_ptr,  # (N,) floating, or unused
    y_ptr,  # (M, N) floating, contiguous
    splits,
    size,  # M * N
    N,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    part = part_ptr + i
    for _ in range(splits):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=mask)


_BLOCK = 256


def prepare(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The launch for partial sums of this shape (splits, ..., N), not empty: (part, bias) -> y (..., N) in dtype."""
    splits, *outer = shape
    size = math.prod(outer)
    constants = {"HAS_BIAS": has_bias, "BLOCK": _BLOCK}
    launch = Launch(reduce_kernel, -(-size // _BLOCK), (splits, size, outer[-1]), constants, {"num_warps": 2})

    def reduce(part: Tensor, bias: Tensor | None) -> Tensor:
        y = part.new_empty(outer, dtype=dtype)
        launch(part, part if bias is None else bias, y)
        return y

    return reduce
