"""Blockwise quantize: the range, scale, zero and codes of each group, packed, in one pass over the weights.

    affine      low = min(w, 0), high = max(w, 0), scale = (high - low) / code_max, zero = rint(-low / scale)
    symmetric   scale = max|w| / (2**(BITS - 1) - 1)
    offset      offset = low, scale = (high - offset) / code_max
    code        = clamp(rint(w / scale) + zero), or clamp(rint((w - offset) / scale))

Shapes    w (N, K), packed (N, words) int32, scale and zero (groups, N); N and K at least 1.
Numerics  float32, scales rounded up and offsets down to their storage dtype, IEEE division, ties to even, no fused
          multiply-add: scales, zeros and codes equal the oracle's bit for bit. A group that holds NaN or infinity gets
          a NaN scale, for the caller to find.
Oracle    qkernels.reference.quantize      Tuning  qkernels.tuning.choose
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels.launch import group_strides, on_device, program_of
from qkernels.kernels.unpack import lane_bits, plane_bits, plane_count, plane_shift
from qkernels.scheme import Scheme
from qkernels.tuning.configs import QuantizeConfig


@triton.jit
def _round_half_even(x):
    """rint of |x| <= 2**22: past 1.5 * 2**23 a float32 has no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_toward(
    value,  # float32
    dtype: tl.constexpr,
    UP: tl.constexpr,
):
    """float32 value of the nearest number in dtype that is not below (UP), or not above, value."""
    if dtype == tl.float32:
        return value
    elif dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        away = ((bits & 0xFFFF) != 0) & ((bits >= 0) if UP else (bits < 0))
        return ((bits & -0x10000) + tl.where(away, 0x10000, 0)).to(tl.float32, bitcast=True)
    else:
        near = value.to(tl.float16)
        bits = near.to(tl.int16, bitcast=True)
        missed = (near.to(tl.float32) < value) if UP else (near.to(tl.float32) > value)
        # One step of the bit pattern is one place: away from zero if +1.
        step = tl.where((bits >= 0) if UP else (bits < 0), 1, -1)
        return (bits + tl.where(missed, step, 0)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def _smallest_positive_bits(dtype):
    """Smallest positive number of dtype, as the bits of a float32."""
    return {"fp16": (127 - 24) << 23, "bf16": 1 << 16, "fp32": 1}[str(dtype)]


@triton.jit
def _scale_and_zero(
    low,  # float32: range of each group
    high,
    dtype: tl.constexpr,  # of the scales
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    """(scale, zero or offset), float32: what reference.scale_and_zero does."""
    CODE_MAX: tl.constexpr = 2**BITS - 1
    STEPS: tl.constexpr = 2 ** (BITS - 1) - 1 if VALUE_MAP == "symmetric" else CODE_MAX
    if VALUE_MAP == "symmetric":
        high = tl.maximum(-low, high)
        low = tl.zeros_like(high)
    elif VALUE_MAP == "affine":
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
    else:
        low = _round_toward(low, dtype, False)
    # Halves, because high - low may overflow.
    exact = tl.div_rn(high * 0.5 - low * 0.5, tl.full(low.shape, STEPS, tl.float32)) * 2.0
    smallest = tl.full((1,), _smallest_positive_bits(dtype), tl.int32).to(tl.float32, bitcast=True)
    scale = tl.where(high > low, tl.maximum(_round_toward(exact, dtype, True), smallest), 1.0)
    if VALUE_MAP == "affine":
        zero = tl.minimum(tl.maximum(_round_half_even(tl.div_rn(-low, scale)), 0.0), CODE_MAX)
        return scale, zero
    else:
        return scale, low


@triton.jit
def _encode(
    w,  # float32
    scale,  # float32, broadcastable to w, as is zero
    zero,
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    """Nearest codes, int32: what reference.encode does."""
    CODE_MIN: tl.constexpr = 1 if VALUE_MAP == "symmetric" else 0
    CODE_MAX: tl.constexpr = 2**BITS - 1
    if VALUE_MAP == "offset":
        w -= zero
    step = tl.minimum(tl.maximum(tl.div_rn(w, scale), -1024.0), 1024.0)  # so that rounding is exact
    level = _round_half_even(step)
    if VALUE_MAP == "symmetric":
        level += 2 ** (BITS - 1)
    elif VALUE_MAP == "affine":
        level += zero
    return tl.minimum(tl.maximum(level, CODE_MIN), CODE_MAX).to(tl.int32)


@triton.jit
def _store_plane(
    plane_ptr,  # (BLOCK_N, 1, 1) int32 pointers to the start of a plane of each row
    field,  # (BLOCK_N, TILE) int32
    k_start,
    n_mask,
    K,
    bits: tl.constexpr,  # of the plane
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    slots: tl.constexpr = lane_bits(bits) // bits
    blocks: tl.constexpr = TILE // (16 * slots)
    lane_bytes: tl.constexpr = lane_bits(bits) // 8
    place = (tl.arange(0, slots) * bits)[None, None, :, None]
    # The fields of a word do not overlap, so their sum is the word.
    word = tl.sum(tl.reshape(field, (BLOCK_N, blocks, slots, 16)) << place, axis=2)  # (BLOCK_N, blocks, 16)

    lane = tl.arange(0, 16)[None, None, :]
    block = k_start // (16 * slots) + tl.arange(0, blocks)[None, :, None]
    last_bytes = tl.cdiv(K * bits, 128) - block * lane_bytes  # that a lane of this block needs, if below lane_bytes
    mask = n_mask[:, None, None]
    if lane_bits(bits) == 32:
        tl.store(plane_ptr + block * 16 + lane, word, mask=mask & (last_bytes >= lane_bytes))
    else:
        short_ptr = plane_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(short_ptr + block * 16 + lane, word.to(tl.int16), mask=mask & (last_bytes >= lane_bytes))
    if k_start + TILE > K:
        byte_ptr = plane_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        byte_ptr += block * (16 * lane_bytes) + lane * last_bytes
        for i in tl.static_range(lane_bytes - 1):
            byte = ((word >> (8 * i)) & 255).to(tl.uint8)
            tl.store(byte_ptr + i, byte, mask=mask & (last_bytes < lane_bytes) & (i < last_bytes))


@triton.jit
def _store_packed(
    row_ptr,  # (BLOCK_N,) int32 pointers to the first word of each row
    code,  # (BLOCK_N, TILE) int32, zero past K
    k_start,  # a multiple of TILE
    n_mask,
    K,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,  # along K: whole blocks of every plane
):
    plane_ptr = row_ptr[:, None, None]
    for i in tl.static_range(plane_count(BITS)):
        field = (code >> plane_shift(BITS, i)) & (2 ** plane_bits(BITS, i) - 1)
        _store_plane(plane_ptr, field, k_start, n_mask, K, plane_bits(BITS, i), BLOCK_N, TILE)
        plane_ptr += tl.cdiv(K * plane_bits(BITS, i), 128) * 4


@triton.jit
def quantize_kernel(
    w_ptr,  # (N, K) floating
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    N,
    K,
    stride_w_n,  # in elements; the inner strides of w and packed are 1
    stride_packed_n,
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale: a power of two
    VALUE_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,  # along K: whole groups and whole blocks of every plane
):
    GROUPS: tl.constexpr = TILE // GROUP
    dtype = scale_ptr.dtype.element_ty
    n_block, k_block = program_of(N, BLOCK_N)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_start = k_block * TILE
    k = k_start + tl.arange(0, TILE)
    n_mask = n < N
    mask = n_mask[:, None] & (k < K)[None, :]
    n64 = n.to(tl.int64)  # n * stride overflows int32 on large weights

    w = tl.load(w_ptr + (n64 * stride_w_n)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.reshape(w, (BLOCK_N, GROUPS, GROUP))
    inside = tl.reshape(mask, (BLOCK_N, GROUPS, GROUP))
    low = tl.min(tl.where(inside, w, float("inf")), axis=2)
    high = tl.max(tl.where(inside, w, float("-inf")), axis=2)
    outside = low > high  # groups past K
    low = tl.where(outside, 0.0, low)
    high = tl.where(outside, 0.0, high)
    finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), axis=2)
    scale, zero = _scale_and_zero(low, high, dtype, BITS, VALUE_MAP)  # (BLOCK_N, GROUPS)

    group = k_start // GROUP + tl.arange(0, GROUPS)
    group_mask = n_mask[:, None] & (group * GROUP < K)[None, :]
    group_offset = group.to(tl.int64)[None, :] * stride_scale_g + (n64 * stride_scale_n)[:, None]
    tl.store(scale_ptr + group_offset, tl.where(finite == 1, scale, float("nan")).to(dtype), mask=group_mask)
    if VALUE_MAP != "symmetric":
        tl.store(zero_ptr + group_offset, zero.to(zero_ptr.dtype.element_ty), mask=group_mask)

    code = _encode(w, scale[:, :, None], zero[:, :, None], BITS, VALUE_MAP)
    code = tl.reshape(tl.where(inside, code, 0), (BLOCK_N, TILE))
    packed_row = packed_ptr + n64 * stride_packed_n
    _store_packed(packed_row, code, k_start, n_mask, K, BITS, BLOCK_N, TILE)


@triton.jit
def encode_kernel(
    w_ptr,  # (N, K) floating
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    N,
    K,
    group_length,  # weights along K that share a scale: any
    stride_w_n,  # in elements; the inner strides of w and packed are 1
    stride_packed_n,
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,  # along K: whole blocks of every plane
):
    """Codes for scales and zeros that are already there: for groups that do not fit a tile."""
    n_block, k_block = program_of(N, BLOCK_N)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_start = k_block * TILE
    k = k_start + tl.arange(0, TILE)
    n_mask = n < N
    mask = n_mask[:, None] & (k < K)[None, :]
    n64 = n.to(tl.int64)

    w = tl.load(w_ptr + (n64 * stride_w_n)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    group_offset = (k // group_length).to(tl.int64)[None, :] * stride_scale_g + (n64 * stride_scale_n)[:, None]
    scale = tl.load(scale_ptr + group_offset, mask=mask, other=1.0).to(tl.float32)
    zero = scale
    if VALUE_MAP != "symmetric":
        zero = tl.load(zero_ptr + group_offset, mask=mask, other=0).to(tl.float32)
    code = tl.where(mask, _encode(w, scale, zero, BITS, VALUE_MAP), 0)
    packed_row = packed_ptr + n64 * stride_packed_n
    _store_packed(packed_row, code, k_start, n_mask, K, BITS, BLOCK_N, TILE)


def quantize(w: Tensor, scheme: Scheme, config: QuantizeConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch only: (packed, scale, zero) of w with inner stride 1, where choose.group_fits_tile."""
    N, K = w.shape
    packed = w.new_empty((N, packing.packed_words(scheme.bits, K)), dtype=torch.int32)
    scale = w.new_empty(scheme.scale_shape(N, K), dtype=scheme.scale_dtype)
    zero = None if scheme.zero_dtype is None else torch.empty_like(scale, dtype=scheme.zero_dtype)
    group = triton.next_power_of_2(scheme.group_length(K))
    with on_device(w):
        quantize_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(K, config.tile),)](
            w, packed, scale, scale if zero is None else zero,
            N, K,
            w.stride(0), packed.stride(0), *group_strides(scale),
            BITS=scheme.bits, GROUP=group, VALUE_MAP=scheme.value_map, BLOCK_N=config.block_n, TILE=config.tile,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, scale, zero


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, config: QuantizeConfig) -> Tensor:
    """Launch only: packed codes of w with inner stride 1, for scales and zeros of any group length."""
    N, K = w.shape
    packed = w.new_empty((N, packing.packed_words(scheme.bits, K)), dtype=torch.int32)
    with on_device(w):
        encode_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(K, config.tile),)](
            w, packed, scale, scale if zero is None else zero,
            N, K, scheme.group_length(K),
            w.stride(0), packed.stride(0), *group_strides(scale),
            BITS=scheme.bits, VALUE_MAP=scheme.value_map, BLOCK_N=config.block_n, TILE=config.tile,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return packed
