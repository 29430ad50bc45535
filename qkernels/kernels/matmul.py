"""Fused dequantize-matmul: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]), without ever writing w.

    affine, symmetric   y = sum_g scale[g, n] * sum_{k in g} x[m, k] * (code[n, k] - zero[g, n])
    offset              y = sum_g scale[g, n] * sum_{k in g} x[m, k] * (code[n, k] - c)
                            + (offset[g, n] + c * scale[g, n]) * sum_{k in g} x[m, k],     c = 2**(BITS - 1)

Shapes    x (M, K), packed (N, words) int32, scale and zero (groups, N), bias (N), y (M, N); M, N, K >= 1.
Numerics  code - zero is an exact integer in x's dtype, so products are exact and accumulate in float32; scales multiply
          the float32 sums. One rounding, at the end. Offsets are centered on c, so that the two terms hardly cancel.
          float32 x multiplies in IEEE float32, without tensor cores.
Oracle    qkernels.reference.matmul      Tuning  qkernels.tuning.choose
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels.launch import group_strides, has_ptx, on_device, program_of
from qkernels.kernels.unpack import (
    block_slots,
    lane_bits,
    load_codes,
    load_words,
    plane_bits,
    plane_count,
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
    mask,
    ZERO: tl.constexpr,
):
    """The zeros of a group, (BLOCK_N, 1) int32; or ZERO, where all weights have the same."""
    if ZERO is None:
        return tl.load(zero_ptr, mask=mask, other=0).to(tl.int32)[:, None]
    else:
        return tl.full((1, 1), ZERO, tl.int32)


@triton.jit
def _add_group(
    acc,  # (BLOCK_N, BLOCK_M) float32
    part,  # the group's sum of x * (code - zero)
    x_sum,  # the group's sum of x (offset only)
    scale_ptr,  # (BLOCK_N,) pointers into a group's scales
    zero_ptr,
    mask,
    CENTER: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    scale = tl.load(scale_ptr, mask=mask, other=0.0).to(tl.float32)
    acc += scale[:, None] * part
    if VALUE_MAP == "offset":
        offset = tl.load(zero_ptr, mask=mask, other=0.0).to(tl.float32)
        acc += (offset + CENTER * scale)[:, None] * x_sum
    return acc


@triton.jit
def matmul_kernel(
    x_ptr,  # (M, K) float16, bfloat16 or float32
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    bias_ptr,  # (N,) floating, or unused
    y_ptr,  # (M, N) like x
    M,
    N,
    K,
    stride_x_m,  # in elements; the inner strides of x, packed and y are 1
    stride_packed_n,
    stride_scale_g,
    stride_scale_n,
    stride_y_m,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all of K does
    VALUE_MAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of steps
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

    n_block, m_block = program_of(N, BLOCK_N)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 16)
    n_mask = n < N
    m_mask = (m < M)[None, :]
    row_mask = n_mask[:, None]

    # int64: row * stride overflows int32 on large weights and activations
    n64 = n.to(tl.int64)
    plane0 = packed_ptr + (n64 * stride_packed_n)[:, None]
    plane1 = plane0 + tl.cdiv(K * plane_bits(BITS, 0), 128) * 4
    plane2 = plane1
    if plane_count(BITS) == 3:
        plane2 += tl.cdiv(K * plane_bits(BITS, 1), 128) * 4
    x_row = x_ptr + (m.to(tl.int64) * stride_x_m)[None, :] + lane[:, None]  # (16, BLOCK_M)
    scale_col = scale_ptr + n64 * stride_scale_n
    zero_col = zero_ptr + n64 * stride_scale_n
    group_stride = tl.full((1,), stride_scale_g, tl.int64)

    # The weights are the left operand and tokens its columns: x is read transposed, y written transposed.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ones = tl.full((BLOCK_N, 16), 1.0, dtype)
    if GROUP == 0:
        part = acc
        x_sum = acc
        zero = _load_zero(zero_col, n_mask, ZERO)
        zero_op = zero_operand(zero, x_ptr, BITS, PTX)

    for step in range(K // (16 * STEP)):
        for t in tl.static_range(STEP):
            slot = step * STEP + t
            if t * plane_bits(BITS, 0) % lane_bits(plane_bits(BITS, 0)) == 0:
                words0 = load_words(plane0, slot, row_mask, plane_bits(BITS, 0), PTX)
                if plane_count(BITS) < 2:
                    words1 = words0
                if plane_count(BITS) < 3:
                    words2 = words0
            if plane_count(BITS) > 1:
                if t * plane_bits(BITS, 1) % lane_bits(plane_bits(BITS, 1)) == 0:
                    words1 = load_words(plane1, slot, row_mask, plane_bits(BITS, 1), PTX)
            if plane_count(BITS) > 2:
                if t * plane_bits(BITS, 2) % lane_bits(plane_bits(BITS, 2)) == 0:
                    words2 = load_words(plane2, slot, row_mask, plane_bits(BITS, 2), PTX)
            if GROUP != 0:
                if t % CHUNK == 0:
                    group = slot * 16 // GROUP * group_stride
                    zero_op = zero_operand(_load_zero(zero_col + group, n_mask, ZERO), x_ptr, BITS, PTX)
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    x_sum = part
            w = unpack_slot(words0, words1, words2, zero_op, x_ptr, t, BITS, ZERO, PTX)
            x = tl.load(x_row + slot * 16, mask=m_mask, other=0.0)
            part = tl.dot(w, x, part, input_precision="ieee")
            if VALUE_MAP == "offset":
                x_sum = tl.dot(ones, x, x_sum, input_precision="ieee")  # in every row: already where acc wants it
            if GROUP != 0:
                if t % CHUNK == CHUNK - 1:
                    acc = _add_group(acc, part, x_sum, scale_col + group, zero_col + group, n_mask, CENTER, VALUE_MAP)

    if HAS_TAIL:
        row_bytes = plane0.to(tl.pointer_type(tl.uint8), bitcast=True)
        for slot in range(K // (16 * STEP) * STEP, tl.cdiv(K, 16)):
            code = load_codes(row_bytes, slot, lane[None, :], K, row_mask, BITS)
            k_mask = (slot * 16 + lane < K)[:, None]
            x = tl.load(x_row + slot * 16, mask=m_mask & k_mask, other=0.0)
            if GROUP != 0:
                group = slot * 16 // GROUP * group_stride
                zero = _load_zero(zero_col + group, n_mask, ZERO)
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                x_sum = part
            part = tl.dot((code - zero).to(dtype), x, part, input_precision="ieee")
            if VALUE_MAP == "offset":
                x_sum = tl.dot(ones, x, x_sum, input_precision="ieee")
            if GROUP != 0:
                acc = _add_group(acc, part, x_sum, scale_col + group, zero_col + group, n_mask, CENTER, VALUE_MAP)

    if GROUP == 0:
        acc = _add_group(acc, part, x_sum, scale_col, zero_col, n_mask, CENTER, VALUE_MAP)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    y_row = y_ptr + (m.to(tl.int64) * stride_y_m)[:, None] + n[None, :]
    tl.store(y_row, tl.trans(acc).to(dtype), mask=(m < M)[:, None] & n_mask[None, :])


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: MatmulConfig,
) -> Tensor:
    """Launch only: x (M, K) with inner stride 1, everything else contiguous, M, N and K at least 1."""
    (M, K), N = x.shape, packed.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    stride_scale_g, stride_scale_n = group_strides(scale)
    grid = (triton.cdiv(N, config.block_n) * triton.cdiv(M, config.block_m),)
    with on_device(x):
        matmul_kernel[grid](
            x, packed, scale, scale if zero is None else zero, x if bias is None else bias, y,
            M, N, K,
            x.stride(0), packed.stride(0), stride_scale_g, stride_scale_n, y.stride(0),
            BITS=scheme.bits,
            GROUP=0 if scale.shape[0] == 1 else scheme.group_length(K),
            VALUE_MAP=scheme.value_map,
            HAS_BIAS=bias is not None,
            HAS_TAIL=K % (config.blocks * packing.block_columns(scheme.bits)) != 0,
            PTX=has_ptx() and x.dtype != torch.float32,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCKS=config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip
    return y
