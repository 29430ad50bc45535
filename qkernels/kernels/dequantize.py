"""Dequantize: w[n, k] = (code[n, k] - zero[g, n]) * scale[g, n], or code * scale + offset, with g = k // group length.

A program takes BLOCK_N rows and BLOCKS whole packed blocks of each. Its tiles have one line for each row and block, and
16 columns, the lanes: a thread loads 16 bytes of neighbouring words, and of every slot in them it writes as many
neighbouring k. No data moves between threads, scales are loaded once a group, and a weight of one plane costs a lop3, a
subtraction and a multiplication, and its share of a conversion and a store. Values of k past the last whole block are
left to programs of their own.

Shapes    packed (N, words) int32, scale and zero (groups, N), w (N, K); N and K at least 1.
Numerics  float32 arithmetic without fused multiply-add, one rounding to w's dtype: equals the oracle bit for bit.
Oracle    qkernels.reference.dequantize      Tuning  qkernels.tuning.choose
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels.launch import Launch, group_strides, has_ptx, short_program_of
from qkernels.kernels.unpack import (
    block_slots,
    chunk_slots,
    code_float,
    lane_bits,
    load_codes,
    load_words,
    magic_of_slot,
    plane_bits,
    plane_count,
)
from qkernels.scheme import Scheme
from qkernels.tuning.configs import DequantizeConfig


@triton.jit
def _load_scale_and_zero(
    scale_ptr,  # pointers, as is zero_ptr
    zero_ptr,
    mask,
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    """(scale, zero or offset), float32, shaped like the pointers."""
    scale = tl.load(scale_ptr, mask=mask, other=0.0).to(tl.float32)
    if VALUE_MAP == "symmetric":
        return scale, tl.full(scale.shape, 2 ** (BITS - 1), tl.float32)
    else:
        return scale, tl.load(zero_ptr, mask=mask, other=0).to(tl.float32)


@triton.jit
def _weight(
    code,  # float32: code + MAGIC, exact
    scale,  # float32, broadcastable to code, as is zero
    zero,
    MAGIC: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    if VALUE_MAP == "offset":
        return (code - MAGIC) * scale + zero
    else:
        return (code - (zero + MAGIC)) * scale


@triton.jit
def _dequantize_blocks(
    packed_ptr,  # as dequantize_kernel has them
    scale_ptr,
    zero_ptr,
    w_ptr,
    n_start,  # first row
    first,  # first packed block
    N,
    K,
    stride_packed_n16,
    stride_scale_g,
    stride_scale_n,
    stride_zero_g,
    stride_zero_n,
    stride_w_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_MAP: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS whole blocks of each of BLOCK_N rows."""
    SLOTS: tl.constexpr = block_slots(BITS)
    CHUNK: tl.constexpr = chunk_slots(SLOTS, GROUP)
    line = tl.arange(0, BLOCK_N * BLOCKS)[:, None]
    block = first + line % BLOCKS
    n = n_start + line // BLOCKS
    mask = (n < N) & (block < K // (16 * SLOTS))
    n64 = n.to(tl.int64)  # n * stride overflows int32 on large weights

    row = packed_ptr + n64 * stride_packed_n16 * 4
    plane0 = row + block * (SLOTS * plane_bits(BITS, 0) // 2)
    if plane_count(BITS) > 1:
        row += tl.cdiv(K * plane_bits(BITS, 0), 128) * 4
        plane1 = row + block * (SLOTS * plane_bits(BITS, 1) // 2)
    if plane_count(BITS) > 2:
        row += tl.cdiv(K * plane_bits(BITS, 1), 128) * 4
        plane2 = row + block * (SLOTS * plane_bits(BITS, 2) // 2)
    scale_row = scale_ptr + n64 * stride_scale_n
    zero_row = zero_ptr + n64 * stride_zero_n
    w_row = w_ptr + n64 * stride_w_n + block * (16 * SLOTS) + tl.arange(0, 16)[None, :]
    if GROUP == 0:
        scale, zero = _load_scale_and_zero(scale_row, zero_row, mask, BITS, VALUE_MAP)

    for t in tl.static_range(SLOTS):
        if t * plane_bits(BITS, 0) % lane_bits(plane_bits(BITS, 0)) == 0:
            words0 = load_words(plane0, t, mask, plane_bits(BITS, 0), False).to(tl.int32)
            if plane_count(BITS) < 2:
                words1 = words0
            if plane_count(BITS) < 3:
                words2 = words0
        if plane_count(BITS) > 1:
            if t * plane_bits(BITS, 1) % lane_bits(plane_bits(BITS, 1)) == 0:
                words1 = load_words(plane1, t, mask, plane_bits(BITS, 1), False).to(tl.int32)
        if plane_count(BITS) > 2:
            if t * plane_bits(BITS, 2) % lane_bits(plane_bits(BITS, 2)) == 0:
                words2 = load_words(plane2, t, mask, plane_bits(BITS, 2), False).to(tl.int32)
        if GROUP != 0:
            if t % CHUNK == 0:
                group = ((block * SLOTS + t) // (GROUP // 16)).to(tl.int64)
                scale, zero = _load_scale_and_zero(
                    scale_row + group * stride_scale_g, zero_row + group * stride_zero_g, mask, BITS, VALUE_MAP
                )
        code = code_float(words0, words1, words2, t, BITS, PTX)
        w = _weight(code, scale, zero, magic_of_slot(BITS, t), VALUE_MAP)
        tl.store(w_row + 16 * t, w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_tail(
    packed_ptr,  # as dequantize_kernel has them
    scale_ptr,
    zero_ptr,
    w_ptr,
    n_start,  # first row
    N,
    K,
    stride_packed_n16,
    stride_scale_g,
    stride_scale_n,
    stride_zero_g,
    stride_zero_n,
    stride_w_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is past the last whole block of BLOCK_N rows, slot by slot."""
    n = n_start + tl.arange(0, BLOCK_N)[:, None]
    lane = tl.arange(0, 16)[None, :]
    n_mask = n < N
    n64 = n.to(tl.int64)
    row_bytes = (packed_ptr + n64 * stride_packed_n16 * 4).to(tl.pointer_type(tl.uint8), bitcast=True)
    for slot in range(K // (16 * block_slots(BITS)) * block_slots(BITS), tl.cdiv(K, 16)):
        group = tl.full((1, 1), 0 if GROUP == 0 else slot // (GROUP // 16), tl.int64)
        scale, zero = _load_scale_and_zero(
            scale_ptr + n64 * stride_scale_n + group * stride_scale_g,
            zero_ptr + n64 * stride_zero_n + group * stride_zero_g,
            n_mask,
            BITS,
            VALUE_MAP,
        )
        mask = n_mask & (slot * 16 + lane < K)
        code = load_codes(row_bytes, slot, lane, K, mask, BITS).to(tl.float32)
        w = _weight(code, scale, zero, 0.0, VALUE_MAP)
        tl.store(w_ptr + n64 * stride_w_n + slot * 16 + lane, w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    w_ptr,  # (N, K) floating
    N,
    K,
    stride_packed_n16,  # of 16 bytes: every plane of a row is whole runs of 16 bytes
    stride_scale_g,  # in elements; the inner strides of packed and w are 1
    stride_scale_n,
    stride_zero_g,
    stride_zero_n,
    stride_w_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all of K does
    VALUE_MAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of blocks
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # packed blocks of a row that a program takes
    STEP: tl.constexpr,  # and how many of them at a time
):
    n_block, k_block = short_program_of(N, BLOCK_N)
    n_start = n_block * BLOCK_N
    first = k_block * BLOCKS
    if not HAS_TAIL or first < K // (16 * block_slots(BITS)):
        for i in tl.static_range(0, BLOCKS, STEP):
            _dequantize_blocks(
                packed_ptr, scale_ptr, zero_ptr, w_ptr, n_start, first + i, N, K,
                stride_packed_n16, stride_scale_g, stride_scale_n, stride_zero_g, stride_zero_n, stride_w_n,
                BITS, GROUP, VALUE_MAP, PTX, BLOCK_N, STEP,
            )  # fmt: skip
    else:
        _dequantize_tail(
            packed_ptr, scale_ptr, zero_ptr, w_ptr, n_start, N, K,
            stride_packed_n16, stride_scale_g, stride_scale_n, stride_zero_g, stride_zero_n, stride_w_n,
            BITS, GROUP, VALUE_MAP, BLOCK_N,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _prepare(
    N: int,
    K: int,
    strides: tuple[int, ...],
    groups: int,
    dtypes: tuple[torch.dtype | None, ...],  # of scale, zero and w
    scheme: Scheme,
    config: DequantizeConfig,
) -> Launch:
    columns = packing.block_columns(scheme.bits)
    tiles = triton.cdiv(K // columns, config.block_k // columns) + (K % columns != 0)
    constants = {
        "BITS": scheme.bits,
        "GROUP": 0 if groups == 1 else scheme.group_length(K),
        "VALUE_MAP": scheme.value_map,
        "HAS_TAIL": K % columns != 0,
        "PTX": has_ptx(),
        "BLOCK_N": config.block_n,
        "BLOCKS": config.block_k // columns,
        # A tile of half as many lines as threads: 8 lanes for a thread, and Triton lets each load its own scale.
        "STEP": max(1, 16 * config.num_warps // config.block_n),
    }
    options = {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": False}
    return Launch(dequantize_kernel, triton.cdiv(N, config.block_n) * tiles, (N, K, *strides), constants, options)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    in_features: int,
    dtype: torch.dtype,
    config: DequantizeConfig,
    out: Tensor | None = None,
) -> Tensor:
    """Launch only: w (N, K) in dtype, N and K at least 1; written into out where it is given.

    The rows of packed and out are dense, one after the other or with gaps; scale and zero may have any strides, so that
    a range of rows is packed[a:b], scale[:, a:b] and zero[:, a:b].

    Raises:
        ValueError: the rows of packed are not whole runs of 16 bytes apart, as packing.py makes them.
    """
    N, K = packed.shape[0], in_features
    if N > 1 and packed.stride(0) % 4:
        raise ValueError(f"rows of packed must be a multiple of 4 words apart, got {packed.stride(0)}")
    w = packed.new_empty((N, K), dtype=dtype) if out is None else out
    offsets = scale if zero is None else zero
    strides = packed.stride(0) // 4, *group_strides(scale), *group_strides(offsets), w.stride(0)
    dtypes = scale.dtype, None if zero is None else zero.dtype, w.dtype
    _prepare(N, K, strides, scale.shape[0], dtypes, scheme, config)(packed, scale, offsets, w)
    return w
