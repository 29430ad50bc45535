"""Fused dequantize-matmul: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]), without ever writing w.

    affine, symmetric   y = sum_g scale[g, n] * sum_{k in g} x[m, k] * (code[n, k] - zero[g, n])
    offset              y = sum_g scale[g, n] * sum_{k in g} x[m, k] * (code[n, k] - c)
                            + (offset[g, n] + c * scale[g, n]) * sum_{k in g} x[m, k],     c = 2**(BITS - 1)

Shapes    x (M, K), packed (N, words) int32, scale and zero (groups, N), bias (N), y (M, N); M, N, K >= 1.
Numerics  code - zero is an exact integer in x's dtype, so products are exact and accumulate in float32; scales
          multiply the float32 sums, of each group or, where there is one group, at the end. One rounding, at the end.
          Offsets are centered on c, so that the two terms hardly cancel. float32 x multiplies in IEEE float32, without
          tensor cores. With SCALE_WEIGHTS weights are scaled before they are multiplied, and rounded to x's dtype, as
          dequantize does.
Oracle    qkernels.reference.matmul      Tuning  qkernels.tuning.choose
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels import reduce
from qkernels.kernels.launch import Launch, group_strides, has_ptx, program_of, token_stride
from qkernels.kernels.unpack import (
    block_slots,
    lane_bits,
    load_codes,
    load_words,
    plane_bits,
    plane_count,
    scaled,
    unpack_slot,
    zero_operand,
)
from qkernels.scheme import Scheme
from qkernels.tuning.configs import MatmulConfig


@triton.constexpr_function
def _chunk_slots(STEP, GROUP):
    """The longest run of slots that divides a step and never crosses a group; GROUP 0 is one group for all of K."""
    return math.gcd(STEP, GROUP // 16)


@triton.jit
def _load_zero(
    zero_ptr,  # (BLOCK_N,) pointers into a group's zeros
    ZERO: tl.constexpr,
):
    """The zeros of a group, (BLOCK_N, 1) int32; or ZERO, where all weights have the same."""
    if ZERO is None:
        return tl.load(zero_ptr).to(tl.int32)[:, None]
    else:
        return tl.full((1, 1), ZERO, tl.int32)


@triton.jit
def _add_slot(
    part,  # (BLOCK_N, BLOCK_M) float32, as is x_sum: sums of x * (code - zero), and of x (offset only)
    x_sum,
    w,  # (BLOCK_N, 16), code - zero in x's dtype
    x,  # (16, BLOCK_M)
    VALUE_MAP: tl.constexpr,
):
    part = tl.dot(w, x, part, input_precision="ieee")
    if VALUE_MAP == "offset":
        # In every row: already where the accumulator wants it.
        x_sum = tl.dot(tl.full(w.shape, 1.0, w.dtype), x, x_sum, input_precision="ieee")
    return part, x_sum


@triton.jit
def _add_group(
    acc,  # (BLOCK_N, BLOCK_M) float32
    part,  # the group's sum of x * (code - zero)
    x_sum,  # the group's sum of x (offset only)
    scale_ptr,  # (BLOCK_N,) pointers into a group's scales
    zero_ptr,
    CENTER: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    acc += scale[:, None] * part
    if VALUE_MAP == "offset":
        offset = tl.load(zero_ptr).to(tl.float32)
        acc += (offset + CENTER * scale)[:, None] * x_sum
    return acc


@triton.jit
def matmul_kernel(
    x_ptr,  # (M, K) float16, bfloat16 or float32
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    bias_ptr,  # (N,) floating, or unused
    y_ptr,  # (M, N) like x; (splits, M, N) float32 where SPLIT
    M,
    N,
    K,
    split_steps,  # steps of the main loop for each split of K
    stride_x_m,  # in elements; the inner strides of x, packed and y are 1
    stride_packed_n,
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all of K does
    VALUE_MAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of steps
    SPLIT: tl.constexpr,  # K is split: partial sums for reduce.py, without bias
    SCALE_WEIGHTS: tl.constexpr,  # in x's dtype, with one more rounding, instead of each group's sum
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # packed blocks that one step of the main loop unpacks
):
    dtype = x_ptr.dtype.element_ty
    STEP: tl.constexpr = block_slots(BITS) * BLOCKS  # in slots of 16 k, as is CHUNK
    CHUNK: tl.constexpr = _chunk_slots(STEP, GROUP)
    CENTER: tl.constexpr = 2 ** (BITS - 1)
    ZERO: tl.constexpr = None if VALUE_MAP == "affine" else CENTER

    n_block, rest = program_of(N, BLOCK_N)
    m_blocks = tl.cdiv(M, BLOCK_M)
    m_block, split = rest % m_blocks, rest // m_blocks
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 16)

    # Rows and tokens past the end read the last one instead: loads need no masks, and what they give is not stored.
    # int64: row * stride overflows int32 on large weights and activations.
    n64 = tl.minimum(n, N - 1).to(tl.int64)
    plane0 = packed_ptr + (n64 * stride_packed_n)[:, None]
    plane1 = plane0 + tl.cdiv(K * plane_bits(BITS, 0), 128) * 4
    plane2 = plane1
    if plane_count(BITS) == 3:
        plane2 += tl.cdiv(K * plane_bits(BITS, 1), 128) * 4
    x_row = x_ptr + (tl.minimum(m, M - 1).to(tl.int64) * stride_x_m)[None, :] + lane[:, None]  # (16, BLOCK_M)
    scale_col = scale_ptr + n64 * stride_scale_n
    zero_col = zero_ptr + n64 * stride_scale_n
    group_stride = tl.full((1,), stride_scale_g, tl.int64)

    # The weights are the left operand and tokens its columns: x is read transposed, y written transposed.
    no_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = no_sum
    if GROUP == 0:
        part = no_sum
        x_sum = no_sum
        zero = _load_zero(zero_col, ZERO)
        zero_op = zero_operand(zero, x_ptr, BITS, PTX)

    steps = K // (16 * STEP)
    for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, steps)):
        step0 = plane0 + step * (STEP * plane_bits(BITS, 0) // 2)
        if plane_count(BITS) > 1:
            step1 = plane1 + step * (STEP * plane_bits(BITS, 1) // 2)
        if plane_count(BITS) > 2:
            step2 = plane2 + step * (STEP * plane_bits(BITS, 2) // 2)
        x_step = x_row + step * (STEP * 16)
        for t in tl.static_range(STEP):
            if t * plane_bits(BITS, 0) % lane_bits(plane_bits(BITS, 0)) == 0:
                words0 = load_words(step0, t, None, plane_bits(BITS, 0), PTX)
                if plane_count(BITS) < 2:
                    words1 = words0
                if plane_count(BITS) < 3:
                    words2 = words0
            if plane_count(BITS) > 1:
                if t * plane_bits(BITS, 1) % lane_bits(plane_bits(BITS, 1)) == 0:
                    words1 = load_words(step1, t, None, plane_bits(BITS, 1), PTX)
            if plane_count(BITS) > 2:
                if t * plane_bits(BITS, 2) % lane_bits(plane_bits(BITS, 2)) == 0:
                    words2 = load_words(step2, t, None, plane_bits(BITS, 2), PTX)
            if GROUP != 0:
                if t % CHUNK == 0:
                    group = (step * STEP + t) * 16 // GROUP * group_stride
                    zero_op = zero_operand(_load_zero(zero_col + group, ZERO), x_ptr, BITS, PTX)
                    if SCALE_WEIGHTS:
                        scale = tl.load(scale_col + group)[:, None]
                    else:
                        part = no_sum
                        x_sum = no_sum
            w = unpack_slot(words0, words1, words2, zero_op, x_ptr, t, BITS, ZERO, PTX)
            x = tl.load(x_step + t * 16)
            if SCALE_WEIGHTS:
                acc = tl.dot(scaled(w, scale, PTX), x, acc)
            else:
                part, x_sum = _add_slot(part, x_sum, w, x, VALUE_MAP)
            if GROUP != 0 and not SCALE_WEIGHTS:
                if t % CHUNK == CHUNK - 1:
                    acc = _add_group(acc, part, x_sum, scale_col + group, zero_col + group, CENTER, VALUE_MAP)

    if HAS_TAIL:
        row_bytes = plane0.to(tl.pointer_type(tl.uint8), bitcast=True)
        tail_end = tl.where((split + 1) * split_steps >= steps, tl.cdiv(K, 16), 0)  # only the last split has one
        for slot in range(steps * STEP, tail_end):
            k_mask = slot * 16 + lane < K
            code = load_codes(row_bytes, slot, lane[None, :], K, k_mask[None, :], BITS)
            x = tl.load(x_row + slot * 16, mask=k_mask[:, None], other=0.0)
            if GROUP != 0:
                group = slot * 16 // GROUP * group_stride
                zero = _load_zero(zero_col + group, ZERO)
                part, x_sum = _add_slot(no_sum, no_sum, (code - zero).to(dtype), x, VALUE_MAP)
                acc = _add_group(acc, part, x_sum, scale_col + group, zero_col + group, CENTER, VALUE_MAP)
            else:
                part, x_sum = _add_slot(part, x_sum, (code - zero).to(dtype), x, VALUE_MAP)

    if GROUP == 0:
        acc = _add_group(acc, part, x_sum, scale_col, zero_col, CENTER, VALUE_MAP)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n64).to(tl.float32)[:, None]
    row = m.to(tl.int64) + (split.to(tl.int64) * M if SPLIT else 0)
    y_row = y_ptr + (row * N)[:, None] + n[None, :]
    tl.store(y_row, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def prepare(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: MatmulConfig,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """The launch for these tensors, and for all that are like them in shape, strides, dtype and GPU.

    x (..., K) is contiguous, or 2-D with inner stride 1; packed and bias are contiguous; rows of scale and zero are
    dense, one after the other or, in both, with equal gaps. None is empty.
    """
    N, K, M = packed.shape[0], x.shape[-1], x.shape[:-1].numel()
    step = config.blocks * packing.block_columns(scheme.bits)
    steps = K // step
    split_steps = max(1, -(-steps // config.splits))
    splits = max(1, -(-steps // split_steps))  # none is empty
    numbers = (M, N, K, split_steps, token_stride(x.shape, x.stride()), packed.stride(0), *group_strides(scale))
    constants = {
        "BITS": scheme.bits,
        "GROUP": 0 if scale.shape[0] == 1 else scheme.group_length(K),
        "VALUE_MAP": scheme.value_map,
        "HAS_BIAS": bias is not None and splits == 1,
        "HAS_TAIL": K % step != 0,
        "SPLIT": splits > 1,
        "SCALE_WEIGHTS": config.scale_weights and scale.shape[0] > 1,
        "PTX": has_ptx() and x.dtype != torch.float32,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCKS": config.blocks,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    programs = -(-N // config.block_n) * -(-M // config.block_m) * splits
    launch = Launch(matmul_kernel, programs, numbers, constants, options)
    shape = (*x.shape[:-1], N)
    parts = (splits, *shape)
    add_up = reduce.prepare(parts, bias is not None, x.dtype)

    # Where there is no zero or bias, any tensor stands in for it.
    def whole(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        launch(x, packed, scale, scale if zero is None else zero, scale if bias is None else bias, y)
        return y

    def split(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        part = x.new_empty(parts, dtype=torch.float32)
        launch(x, packed, scale, scale if zero is None else zero, scale, part)
        return add_up(part, bias)

    return whole if splits == 1 else split


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: MatmulConfig,
) -> Tensor:
    """Launch only, without preparation; see `prepare`."""
    return prepare(x, packed, scale, zero, bias, scheme, config)(x, packed, scale, zero, bias)
