"""Codes times codes on integer tensor cores, without ever writing unpacked weights.

    y[m, n] = x_scale[m] * sum_g scale[g, n] * T(m, n, g) + bias[n]
    T = sum_{k in g} (v[m, k] - x_zero[m]) * (code[n, k] - zero[g, n])        an int32, exact
      = P + d X - x_zero (W + d count),    P = sum v w,  X = sum v,  W = sum w,  w = code - zero - d

d is 0, but for 8-bit affine weights, whose code - zero does not fit int8: there w = code - 128 and d = 128 - zero. What
a scheme does not need, of X and W, is not worked out; each is a product with ones, so already where T wants it.

Where a group is no whole number of blocks, each of its blocks is multiplied once for every group in it, with the codes
of the others set to zero: exact, and slower, most of all where groups do not divide a block either.

Shapes    codes (M, words) int32, x_scale (M,) float32, x_zero (M,) int8, packed (N, words) int32, scale and zero
          (groups, N), bias (N), y (M, N); M, N, K >= 1.
Numerics  as the oracle, one operation after the other. With one group for all of K equal to it bit for bit, splits or
          not; with several, sums of groups are float32 multiply-adds in any order, each rounded once.
Oracle    qkernels.reference_int8.matmul      Tuning  qkernels.tuning.choose
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels import scale_sums
from qkernels.kernels.launch import Launch, has_ptx, program_of
from qkernels.kernels.unpack_int8 import (
    UNIT,
    bytes_of_group,
    groups_in_block,
    ones_of,
    past_end,
    slots_of_group,
    weights_of,
)
from qkernels.scheme import Scheme
from qkernels.tuning.configs import MatmulConfig


@triton.jit
def _add_half(
    p,  # (BLOCK_N, BLOCK_M) int32: the sums P, X and W
    x_sum,
    w_sum,
    byte,
    v_row,
    zero,
    block,
    group,
    K,
    HALF: tl.constexpr,
    MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    X_SUM: tl.constexpr,
    W_SUM: tl.constexpr,
    TAIL: tl.constexpr,
    PTX: tl.constexpr,
):
    """_add_block of the 64 columns of one operand."""
    if MASK != 0:
        v = tl.load(v_row + (block * (8 // BITS) + HALF) * 64)
        mask = slots_of_group(block, group, HALF, BITS, GROUP) if MASK is None else None
        w = weights_of(byte, zero, mask, HALF, BITS, AFFINE, MASK, PTX)
        if TAIL and W_SUM:  # activations past K are 0, but weights are not
            w &= past_end(block, K, HALF, BITS)
        p = tl.dot(w, v, p, out_dtype=tl.int32)
        if X_SUM:
            x_sum = tl.dot(ones_of(w, mask, MASK, PTX), v, x_sum, out_dtype=tl.int32)
        if W_SUM:
            w_sum = tl.dot(w, tl.full(v.shape, 1, tl.int8), w_sum, out_dtype=tl.int32)
    return p, x_sum, w_sum


@triton.jit
def _total(
    p,
    x_sum,
    w_sum,
    count,  # of k that were added
    x_zero,  # (1, BLOCK_M) int32
    zero_ptr,  # (BLOCK_N,) pointers into a group's zeros
    X_SUM: tl.constexpr,
    W_SUM: tl.constexpr,
):
    """T of the formula, int32."""
    if X_SUM:
        d = 128 - tl.load(zero_ptr).to(tl.int32)[:, None]
        p += d * x_sum
        if W_SUM:
            w_sum += d * count
    if W_SUM:
        p -= x_zero * w_sum
    return p


@triton.jit
def _add_block(
    p,
    x_sum,
    w_sum,
    byte,  # (BLOCK_N, 64) int8
    v_row,  # (64, BLOCK_M) pointers to tokens
    zero,  # (BLOCK_N, 1) int8
    block,
    group,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,  # which group of the block
    AFFINE: tl.constexpr,
    X_SUM: tl.constexpr,
    W_SUM: tl.constexpr,
    TAIL: tl.constexpr,  # whether k past K are in the block
    PTX: tl.constexpr,
):
    """The sums of those k of a block that are of a group."""
    for half in tl.static_range(8 // BITS):
        p, x_sum, w_sum = _add_half(
            p, x_sum, w_sum, byte, v_row, zero, block, group, K,
            half, bytes_of_group(BITS, GROUP, PART, half), BITS, GROUP, AFFINE, X_SUM, W_SUM, TAIL, PTX,
        )  # fmt: skip
    return p, x_sum, w_sum


@triton.jit
def _add_group(
    acc,  # (BLOCK_N, BLOCK_M) float32
    byte,  # (BLOCK_N, 64) int8
    v_row,
    x_zero,
    scale_col,
    zero_col,
    group_stride,
    block,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    AFFINE: tl.constexpr,
    X_SUM: tl.constexpr,
    W_SUM: tl.constexpr,
    TAIL: tl.constexpr,
    PTX: tl.constexpr,
):
    """acc + scale * T, of those k of a block that are of a group."""
    COLUMNS: tl.constexpr = 512 // BITS
    none = tl.zeros(acc.shape, tl.int32)
    group = block * COLUMNS // GROUP + PART
    # A block may have fewer groups than others: what then comes after the last has no k, and adds 0.
    beside = tl.minimum(group, (K - 1) // GROUP) * group_stride
    zero = tl.zeros((1, 1), tl.int8)
    if AFFINE and BITS == 4:
        zero = tl.load(zero_col + beside).to(tl.int8)[:, None]
    p, x_sum, w_sum = _add_block(
        none, none, none, byte, v_row, zero, block, group, K, BITS, GROUP, PART, AFFINE, X_SUM, W_SUM, TAIL, PTX
    )
    end = tl.minimum(tl.minimum((block + 1) * COLUMNS, (group + 1) * GROUP), K)
    count = tl.maximum(end - tl.maximum(block * COLUMNS, group * GROUP), 0)
    total = _total(p, x_sum, w_sum, count, x_zero, zero_col + beside, X_SUM, W_SUM)
    return acc + total.to(tl.float32) * tl.load(scale_col + beside).to(tl.float32)[:, None]


@triton.jit
def matmul_int8_kernel(
    codes_ptr,  # (M, words) int32
    x_scale_ptr,  # (M,) float32
    x_zero_ptr,  # (M,) int8, or unused
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N) uint8, or unused
    bias_ptr,  # (N,) floating, or unused
    y_ptr,  # (M, N) floating; (splits, M, N) int32, or float32 where there are groups, where SPLIT
    M,
    N,
    K,
    split_steps,  # steps of the main loop for each split of K
    stride_codes_m,  # in words; the inner strides are 1
    stride_packed_n,
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all of K does
    UNIT: tl.constexpr,  # a power of two that products of codes are counted in
    AFFINE: tl.constexpr,  # weights
    X_AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of steps
    SPLIT: tl.constexpr,  # K is split: partial sums for scale_sums.py
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # packed blocks that one step of the main loop multiplies
):
    COLUMNS: tl.constexpr = 512 // BITS  # values of k in a block
    X_SUM: tl.constexpr = BITS == 8 and AFFINE
    W_SUM: tl.constexpr = X_AFFINE
    PARTS: tl.constexpr = groups_in_block(BITS, GROUP)

    n_block, rest = program_of(N, BLOCK_N)
    m_blocks = tl.cdiv(M, BLOCK_M)
    m_block, split = rest % m_blocks, rest // m_blocks
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 64)

    # Rows and tokens past the end read the last one instead: loads need no masks, and what they give is not stored.
    n64 = tl.minimum(n, N - 1).to(tl.int64)
    m64 = tl.minimum(m, M - 1).to(tl.int64)
    w_row = packed_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (n64 * stride_packed_n * 4)[:, None]
    v_row = codes_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (m64 * stride_codes_m * 4)[None, :] + column[:, None]
    scale_col = scale_ptr + n64 * stride_scale_n
    zero_col = zero_ptr + n64 * stride_scale_n
    group_stride = tl.full((1,), stride_scale_g, tl.int64)
    x_zero = tl.zeros((1, 1), tl.int32)
    if X_AFFINE:
        x_zero = tl.load(x_zero_ptr + m64).to(tl.int32)[None, :]

    none = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    p, x_sum, w_sum = none, none, none
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.zeros((1, 1), tl.int8)
    if GROUP == 0 and AFFINE and BITS == 4:
        zero = tl.load(zero_col).to(tl.int8)[:, None]

    steps = K // (COLUMNS * BLOCKS)
    first = split * split_steps
    last = tl.minimum(first + split_steps, steps)
    for step in range(first, last):
        for b in tl.static_range(BLOCKS):
            block = step * BLOCKS + b
            byte = tl.load(w_row + column[None, :] + block * 64)
            if GROUP == 0:
                p, x_sum, w_sum = _add_block(
                    p, x_sum, w_sum, byte, v_row, zero, block, 0, K, BITS, 0, 0, AFFINE, X_SUM, W_SUM, False, PTX
                )
            else:
                for part in tl.static_range(PARTS):
                    acc = _add_group(
                        acc, byte, v_row, x_zero, scale_col, zero_col, group_stride, block, K,
                        BITS, GROUP, part, AFFINE, X_SUM, W_SUM, False, PTX,
                    )  # fmt: skip

    if HAS_TAIL:
        # Blocks that are no whole step; the last may be short: of its lanes some bytes are missing, and some codes.
        tail_end = tl.where(first + split_steps >= steps, tl.cdiv(K, COLUMNS), 0)  # only the last split has them
        row_lane_bytes = tl.cdiv(K * BITS, 128)
        for block in range(steps * BLOCKS, tail_end):
            lane_bytes = tl.minimum(row_lane_bytes - block * 4, 4)
            offset = block * 64 + column // 4 * lane_bytes + column % 4
            byte = tl.load(w_row + offset[None, :], mask=(column % 4 < lane_bytes)[None, :], other=0)
            if GROUP == 0:
                p, x_sum, w_sum = _add_block(
                    p, x_sum, w_sum, byte, v_row, zero, block, 0, K, BITS, 0, 0, AFFINE, X_SUM, W_SUM, True, PTX
                )
            else:
                for part in tl.static_range(PARTS):
                    acc = _add_group(
                        acc, byte, v_row, x_zero, scale_col, zero_col, group_stride, block, K,
                        BITS, GROUP, part, AFFINE, X_SUM, W_SUM, True, PTX,
                    )  # fmt: skip

    row = m.to(tl.int64) + (split.to(tl.int64) * M if SPLIT else 0)
    y_row = y_ptr + (row * N)[:, None] + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if GROUP == 0:
        end = tl.where(first + split_steps >= steps, K, last * (COLUMNS * BLOCKS))
        count = end - first * (COLUMNS * BLOCKS)
        p = _total(p, x_sum, w_sum, count, x_zero, zero_col, X_SUM, W_SUM)
    if SPLIT:
        tl.store(y_row, tl.trans(p if GROUP == 0 else acc * UNIT), mask=mask)
    else:
        if GROUP == 0:
            acc = p.to(tl.float32) * UNIT * tl.load(scale_col).to(tl.float32)[:, None]
        else:
            acc = acc * UNIT
        acc = acc * tl.load(x_scale_ptr + m64)[None, :]
        if HAS_BIAS:
            acc = acc + tl.load(bias_ptr + n64).to(tl.float32)[:, None]
        tl.store(y_row, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=mask)


# codes, x_scale, x_zero, packed, scale, zero, bias -> y
Call = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def prepare(
    codes: torch.Size,
    out_features: int,
    stride: int,
    scale_shape: torch.Size,
    scale_stride: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    scheme: Scheme,
    in_features: int,
    config: MatmulConfig,
) -> Call:
    """The launch for codes (..., words) of this shape and such weights; dtypes of y, scale and bias, if there is one.

    codes and bias are contiguous, rows of packed `stride` words apart; rows of scale and zero are dense, one after the
    other or, in both, with equal gaps. None is empty.
    """
    assert scheme.activations is not None
    N, K, M = out_features, in_features, codes[:-1].numel()
    step = config.blocks * packing.block_columns(scheme.bits)
    steps = K // step
    split_steps = max(1, -(-steps // config.splits))
    splits = max(1, -(-steps // split_steps))  # none is empty
    one_group = scale_shape[0] == 1
    stride_scale_n = scale_stride[1] if scale_shape[1] > 1 else 0
    numbers = (M, N, K, split_steps, codes[-1], stride, scale_stride[0], stride_scale_n)
    constants = {
        "BITS": scheme.bits,
        "GROUP": 0 if one_group else scheme.group_length(K),
        "UNIT": UNIT[scheme.bits, scheme.value_map],
        "AFFINE": scheme.value_map == "affine",
        "X_AFFINE": not scheme.activations.symmetric,
        "HAS_BIAS": dtypes[2] is not None and splits == 1,
        "HAS_TAIL": K % step != 0,
        "SPLIT": splits > 1,
        "PTX": has_ptx(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCKS": config.blocks,
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": not one_group,
    }
    programs = -(-N // config.block_n) * -(-M // config.block_m) * splits
    launch = Launch(matmul_int8_kernel, programs, numbers, constants, options)
    shape = (*codes[:-1], N)
    parts = (splits, *shape)
    unit = UNIT[scheme.bits, scheme.value_map] if one_group else None
    add_up = scale_sums.prepare(parts, stride_scale_n, unit, dtypes)

    # Where there is no zero or bias, any tensor stands in for it.
    def whole(
        codes: Tensor, x_scale: Tensor, x_zero: Tensor | None,
        packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y = codes.new_empty(shape, dtype=dtypes[0])
        beside = (scale if zero is None else zero, scale if bias is None else bias)
        launch(codes, x_scale, codes if x_zero is None else x_zero, packed, scale, *beside, y)
        return y

    def split(
        codes: Tensor, x_scale: Tensor, x_zero: Tensor | None,
        packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        part = codes.new_empty(parts, dtype=torch.int32 if one_group else torch.float32)
        beside = (scale if zero is None else zero, scale)
        launch(codes, x_scale, codes if x_zero is None else x_zero, packed, scale, *beside, part)
        return add_up(part, x_scale, scale, bias)

    return whole if splits == 1 else split
