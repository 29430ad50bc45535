"""The end of a matrix product whose K was split: y[m, n] = sum_s part[s, m, n] (+ bias[n]).

Shapes    part (splits, ..., N) float32, bias (N,), y (..., N).
Numerics  float32, splits added in order: the same bits in every run. One rounding, at the end.
Oracle    torch.sum      Tuning  none: the data of a decode step fits in a corner of L2
"""

import functools

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


@functools.lru_cache(maxsize=4096)
def _prepare(splits: int, size: int, N: int, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> Launch:
    constants = {"HAS_BIAS": bias_dtype is not None, "BLOCK": _BLOCK}
    return Launch(reduce_kernel, -(-size // _BLOCK), (splits, size, N), constants, {"num_warps": 2})


def reduce(part: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Launch only: part (splits, ..., N), not empty; y (..., N) in dtype."""
    y = part.new_empty(part.shape[1:], dtype=dtype)
    launch = _prepare(part.shape[0], y.numel(), part.shape[-1], dtype, None if bias is None else bias.dtype)
    launch(part, part if bias is None else bias, y)
    return y
