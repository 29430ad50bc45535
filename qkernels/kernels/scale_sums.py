"""The end of a product of codes: y[m, n] = x_scale[m] * scale[n] * sum_s part[s, m, n] (+ bias[n]).

For splits of K of matmul_int8.py, and for products of other libraries, that are integers. Where weights have several
groups their scales are in the parts already.

Shapes    part (splits, ..., N) int32 or float32, x_scale (...,) float32, scale (1, N) or (1, 1), bias (N,), y (..., N).
Numerics  sums of int32 are exact, those of float32 are in order; then float32, one operation after the other, as the
          oracle. One rounding to y's dtype, at the end.
Oracle    qkernels.reference_int8.matmul      Tuning  none: bound by memory
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.kernels.launch import Launch, group_strides


@triton.jit
def scale_sums_kernel(
    part_ptr,  # (splits, M, stride) int32 or float32
    x_scale_ptr,  # (M,) float32
    scale_ptr,  # (N,) floating, or unused
    bias_ptr,  # (N,) floating, or unused
    y_ptr,  # (M, N) floating, rows stride_y_m apart
    splits,
    M,
    N,
    stride_part_m,
    stride_scale_n,
    stride_y_m,
    UNIT: tl.constexpr,  # a power of two that int32 sums are counted in; None: scale is in the parts
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    m, n = (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    size = tl.full((1,), stride_part_m, tl.int64) * M
    part = part_ptr + m * stride_part_m + n
    total = tl.load(part, mask=mask, other=0)
    for _ in range(1, splits):
        part += size
        total += tl.load(part, mask=mask, other=0)
    y = total.to(tl.float32)
    if UNIT is not None:
        y = y * UNIT * tl.load(scale_ptr + n * stride_scale_n, mask=mask, other=0.0).to(tl.float32)
    y = y * tl.load(x_scale_ptr + m)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * stride_y_m + n, y.to(y_ptr.dtype.element_ty), mask=mask)


_BLOCK = 1024

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]  # of y, scale and bias
# part, x_scale, scale, bias -> y
Call = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def prepare(shape: tuple[int, ...], stride_scale_n: int, unit: float | None, dtypes: Dtypes) -> Call:
    """The launch for parts of this shape (splits, ..., N), contiguous and not empty.

    unit: a power of two that int32 sums are counted in; None where parts have been multiplied by scale and unit.
    """
    splits, *outer = shape
    M, N = math.prod(outer[:-1]), outer[-1]
    launch = _launch((splits, M, N, N, stride_scale_n, N), unit, dtypes)

    def add_up(part: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        y = part.new_empty(outer, dtype=dtypes[0])
        launch(part, x_scale, scale, scale if bias is None else bias, y)
        return y

    return add_up


def scale_sums(part: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Launch only: out (M, N), whose rows may have gaps, of the first M rows and N columns of one part, int32."""
    (M, N), stride = out.shape, group_strides(scale)[1]
    dtypes = out.dtype, scale.dtype, None if bias is None else bias.dtype
    launch = _launch((1, M, N, part.stride(0), stride, out.stride(0)), 1.0, dtypes)
    launch(part, x_scale, scale, scale if bias is None else bias, out)


@functools.lru_cache(maxsize=1024)
def _launch(numbers: tuple[int, ...], unit: float | None, dtypes: Dtypes) -> Launch:
    """numbers: splits, M, N, and strides of parts along M, of scale along N and of y along M."""
    _, M, N, *_ = numbers
    block = min(_BLOCK, triton.next_power_of_2(N))
    constants = {"UNIT": unit, "HAS_BIAS": dtypes[2] is not None, "BLOCK": block}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return Launch(scale_sums_kernel, M * -(-N // block), numbers, constants, options)
