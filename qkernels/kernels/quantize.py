"""Blockwise quantize: the range, scale, zero and codes of each group, packed, in one pass over the weights.

    affine      low = min(w, 0), high = max(w, 0), scale = (high - low) / code_max, zero = rint(-low / scale)
    symmetric   scale = max|w| / (2**(BITS - 1) - 1)
    offset      offset = low, scale = (high - offset) / code_max
    code        = clamp(rint(w / scale) + zero), or clamp(rint((w - offset) / scale))

A tile is lines of 128 or 256 neighbouring weights of a row, as 16 columns, the lanes, of 8 or 16 slots. A thread holds
8 lanes of every slot of its line (4 where the weights are float32), so that it finds ranges with a neighbour's help and
packs words alone. Its codes are never integers of their own: 1.5 * 2**23 + rint(w / scale) is a float32 whose bits are
a sum of a constant and the code, and such bits are shifted and summed into words.

Shapes    w (N, K), packed (N, words) int32, scale and zero (groups, N); N and K at least 1.
Numerics  float32, scales rounded up and offsets down to their storage dtype, quotients that equal IEEE division's
          (rounding.py), ties to even, no fused multiply-add but in those: scales, zeros and codes equal the oracle's
          bit for bit. A group that holds NaN or infinity gets a NaN scale, for the caller to find.
Oracle    qkernels.reference.quantize      Tuning  qkernels.tuning.choose
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels.launch import Launch, group_strides, short_program_of
from qkernels.kernels.rounding import in_range, quotient, reciprocal_of, round_half_even, round_toward, scale_of
from qkernels.kernels.unpack import chunk_slots, lane_bits, plane_bits, plane_count, plane_shift
from qkernels.scheme import Scheme
from qkernels.tuning.configs import QuantizeConfig


@triton.jit
def _base(
    zero,  # float32: zeros, or anything where there are none
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
):
    """1.5 * 2**23 - zero, exact float32: what _level gives for code 0. As bits, code + _base is a sum of integers."""
    if VALUE_MAP == "affine":
        return 12582912.0 - zero
    elif VALUE_MAP == "symmetric":
        return tl.full(zero.shape, 12582912.0 - 2 ** (BITS - 1), tl.float32)
    else:
        return tl.full(zero.shape, 12582912.0, tl.float32)


@triton.jit
def _level(
    w,  # float32
    factor,  # float32, broadcastable to w, as are all below: in_range of the scale
    divisor,  # scale * factor
    reciprocal,
    zero,
    base,
    dtype: tl.constexpr,  # of the scales
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
    BOUNDED: tl.constexpr,  # whether scale and zero were found from the range of w
):
    """The nearest code (what reference.encode does) + base, as float32 that has room for no fraction."""
    CODE_MIN: tl.constexpr = 1 if VALUE_MAP == "symmetric" else 0
    CODE_MAX: tl.constexpr = 2**BITS - 1
    if VALUE_MAP == "offset":
        w -= zero  # which may overflow where the offset is no float16
    bounded: tl.constexpr = BOUNDED and (VALUE_MAP != "offset" or dtype == tl.float16)
    if dtype != tl.float16:
        w *= factor
    if not bounded:
        w = tl.minimum(tl.maximum(w, -1024.0 * divisor), 1024.0 * divisor)  # so that rounding is exact
    level = quotient(w, divisor, reciprocal, dtype != tl.float32) + 12582912.0
    # Scales that were rounded up, by more than float32 rounds, leave no code out of range, but that the fractions of
    # an affine group's lowest and highest weight may both have been rounded away from zero.
    if not bounded or dtype == tl.float32:
        level = tl.maximum(level, base + CODE_MIN)
    if not bounded or dtype == tl.float32 or VALUE_MAP == "affine":
        level = tl.minimum(level, base + CODE_MAX)
    return level


@triton.constexpr_function
def _smaller(a, b):
    return min(a, b)


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _over_group(
    bound,  # (lines, 16) float32
    HIGHEST: tl.constexpr,  # or lowest
    LINES: tl.constexpr,  # neighbouring lines that share a group
):
    """The highest or lowest of each line's group, (lines,); NaN where there is one."""
    bound = tl.reduce(bound, 1, _higher) if HIGHEST else tl.reduce(bound, 1, _lower)
    if LINES > 1:
        groups: tl.constexpr = bound.shape[0] // LINES
        bound = tl.reshape(bound, (groups, LINES))
        bound = tl.reduce(bound, 1, _higher) if HIGHEST else tl.reduce(bound, 1, _lower)
        bound = tl.reshape(tl.broadcast_to(bound[:, None], (groups, LINES)), (groups * LINES,))
    return bound


@triton.jit
def _load_line(
    w_row,  # (lines, 16) pointers to the first slot
    k,  # (lines, 16) k of the first slot
    K,
    mask,  # (lines, 1)
    SLOTS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """A tuple of the slots of a line, (lines, 16) each, zero past K."""
    w = ()
    for t in tl.static_range(SLOTS):
        slot = tl.load(w_row + 16 * t, mask=mask & (k + 16 * t < K) if HAS_TAIL else mask, other=0.0)
        w = w + (slot,)
    return w


@triton.jit
def _pack(
    word,  # int32: what the plane has of the slots before
    bias,
    level,  # (lines, 16) int32
    base,  # (lines, 1) int32: codes are level - base
    SLOT: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
):
    """(word, bias) with a slot more: the packed word is word - bias. A slot that comes first in a word begins it."""
    bits: tl.constexpr = plane_bits(BITS, PLANE)
    place: tl.constexpr = bits * SLOT % lane_bits(bits)
    if plane_count(BITS) == 1:
        # Codes do not overlap, so their sum is the word. The bases are taken away all at once.
        field = level << place
        base = base << place
    else:
        field = (((level - base) >> plane_shift(BITS, PLANE)) & (2**bits - 1)) << place
        base = tl.zeros((1, 1), tl.int32)
    if place == 0:
        return field, base
    else:
        return word + field if plane_count(BITS) == 1 else word | field, bias + base


@triton.jit
def _store_words(
    row_ptr,  # (lines, 1) int32 pointers to the plane, in each row
    word,  # (lines, 16) int32
    line_of_row,  # (lines, 1) int32
    K,
    mask,  # (lines, 1)
    SLOT: tl.constexpr,  # the last of the word
    bits: tl.constexpr,  # of the plane
    SLOTS: tl.constexpr,  # of a line
    HAS_TAIL: tl.constexpr,
):
    slots: tl.constexpr = lane_bits(bits) // bits  # of a word
    index = line_of_row * (SLOTS // slots) + SLOT // slots  # of the word, in its lane, from the start of the row
    lane_bytes: tl.constexpr = lane_bits(bits) // 8
    lane = tl.arange(0, 16)[None, :]
    whole = mask
    if HAS_TAIL:
        last_bytes = tl.cdiv(K * bits, 128) - index * lane_bytes  # that a lane needs here, if fewer
        whole = mask & (last_bytes >= lane_bytes)
    if lane_bits(bits) == 32:
        tl.store(row_ptr + index * 16 + lane, word, mask=whole)
    else:
        tl.store(row_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index * 16 + lane, word.to(tl.int16), mask=whole)
    if HAS_TAIL:
        byte_ptr = row_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + index * (16 * lane_bytes) + lane * last_bytes
        for j in tl.static_range(lane_bytes - 1):
            byte = ((word >> (8 * j)) & 255).to(tl.uint8)
            tl.store(byte_ptr + j, byte, mask=mask & (last_bytes < lane_bytes) & (j < last_bytes))


@triton.jit
def _put_slot(
    words,  # a tuple of each plane's word so far, (lines, 16) int32
    biases,  # a tuple like it
    row_ptr,  # (lines, 1) int32 pointers to the first word of each row
    level,  # (lines, 16) int32
    base,  # (lines, 1) int32: codes are level - base
    line_of_row,  # (lines, 1) int32
    K,
    mask,  # (lines, 1)
    SLOT: tl.constexpr,  # of a line: from the first to the last
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """(words, biases) with a slot more; words that are then whole are stored."""
    new_words = ()
    new_biases = ()
    for i in tl.static_range(plane_count(BITS)):
        word, bias = _pack(words[i], biases[i], level, base, SLOT, BITS, i)
        if (SLOT + 1) * plane_bits(BITS, i) % lane_bits(plane_bits(BITS, i)) == 0:
            _store_words(row_ptr, word - bias, line_of_row, K, mask, SLOT, plane_bits(BITS, i), SLOTS, HAS_TAIL)
        row_ptr += tl.cdiv(K * plane_bits(BITS, i), 128) * 4
        new_words = new_words + (word,)
        new_biases = new_biases + (bias,)
    return new_words, new_biases


@triton.jit
def quantize_kernel(
    w_ptr,  # (N, K) floating
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    N,
    K,
    stride_w_n,  # in elements; the inner strides of w and packed are 1
    stride_packed_n16,  # of 16 bytes: every plane of a row is whole runs of 16 bytes
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale: a power of two
    VALUE_MAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of lines
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,  # of a row: whole groups
    SLOTS: tl.constexpr,  # of a line: whole packed blocks
):
    CHUNK: tl.constexpr = _smaller(SLOTS, GROUP // 16)  # slots of a line that share a scale
    dtype = scale_ptr.dtype.element_ty
    n_block, k_block = short_program_of(N, BLOCK_N)
    line = tl.arange(0, BLOCK_N * LINES)
    n = n_block * BLOCK_N + line // LINES
    line = k_block * LINES + line % LINES  # of its row
    k_start = line * (16 * SLOTS)
    mask = (n < N) & (k_start < K)
    n64 = n.to(tl.int64)  # n * stride overflows int32 on large weights
    lane = tl.arange(0, 16)[None, :]
    k = k_start[:, None] + lane

    w = _load_line(w_ptr + (n64 * stride_w_n + k_start)[:, None] + lane, k, K, mask[:, None], SLOTS, HAS_TAIL)
    packed_row = (packed_ptr + n64 * stride_packed_n16 * 4)[:, None]
    zeros = tl.zeros((1, 1), tl.int32)
    words = (zeros, zeros, zeros)
    biases = words
    for c in tl.static_range(0, SLOTS, CHUNK):
        # Zero is in every range but that of an offset.
        low = tl.full((1, 1), float("inf") if VALUE_MAP == "offset" else 0.0, tl.float32)
        high = -low
        for t in tl.static_range(c, c + CHUNK):
            slot = w[t].to(tl.float32)
            if VALUE_MAP == "symmetric":
                high = _higher(high, tl.abs(slot))
            elif HAS_TAIL and VALUE_MAP == "offset":
                low = _lower(low, tl.where(k + 16 * t < K, slot, float("inf")))
                high = _higher(high, tl.where(k + 16 * t < K, slot, float("-inf")))
            else:
                low = _lower(low, slot)
                high = _higher(high, slot)
        high = _over_group(high, True, GROUP // (16 * CHUNK))
        low = tl.zeros_like(high) if VALUE_MAP == "symmetric" else _over_group(low, False, GROUP // (16 * CHUNK))
        finite = (tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))
        if VALUE_MAP == "offset":
            low = round_toward(low, dtype, False)
        scale = scale_of(low, high, dtype, 2 ** (BITS - 1) - 1 if VALUE_MAP == "symmetric" else 2**BITS - 1)
        factor = in_range(scale, dtype)
        divisor = scale * factor
        reciprocal = reciprocal_of(divisor, dtype != tl.float32)
        zero = low
        if VALUE_MAP == "affine":
            zero = round_half_even(quotient(-low * factor, divisor, reciprocal, dtype != tl.float32))
            zero = tl.minimum(tl.maximum(zero, 0.0), 2**BITS - 1)

        first_k = k_start + 16 * c
        group_mask = mask & (first_k % GROUP == 0) & (first_k < K)
        group_offset = (first_k // GROUP).to(tl.int64) * stride_scale_g + n64 * stride_scale_n
        tl.store(scale_ptr + group_offset, tl.where(finite, scale, float("nan")).to(dtype), mask=group_mask)
        if VALUE_MAP != "symmetric":
            tl.store(zero_ptr + group_offset, zero.to(zero_ptr.dtype.element_ty), mask=group_mask)

        base = _base(zero, BITS, VALUE_MAP)
        base_bits = base.to(tl.int32, bitcast=True)[:, None]
        for t in tl.static_range(c, c + CHUNK):
            level = _level(
                w[t].to(tl.float32), factor[:, None], divisor[:, None], reciprocal[:, None], zero[:, None],
                base[:, None], dtype, BITS, VALUE_MAP, True,
            ).to(tl.int32, bitcast=True)  # fmt: skip
            if HAS_TAIL:
                level = tl.where(k + 16 * t < K, level, base_bits)
            words, biases = _put_slot(
                words, biases, packed_row, level, base_bits, line[:, None], K, mask[:, None], t, BITS, SLOTS, HAS_TAIL
            )


@triton.jit
def encode_kernel(
    w_ptr,  # (N, K) floating
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    N,
    K,
    stride_w_n,  # in elements; the inner strides of w and packed are 1
    stride_packed_n16,  # of 16 bytes: every plane of a row is whole runs of 16 bytes
    stride_scale_g,
    stride_scale_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all of K does
    VALUE_MAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # K is not a whole number of lines
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,  # of a row
    SLOTS: tl.constexpr,  # of a line: whole packed blocks
):
    """Codes for scales and zeros that are already there: for groups that do not fit a tile."""
    CHUNK: tl.constexpr = chunk_slots(SLOTS, GROUP)
    dtype = scale_ptr.dtype.element_ty
    n_block, k_block = short_program_of(N, BLOCK_N)
    line = tl.arange(0, BLOCK_N * LINES)
    n = n_block * BLOCK_N + line // LINES
    line = k_block * LINES + line % LINES  # of its row
    k_start = line * (16 * SLOTS)
    mask = (n < N) & (k_start < K)
    n64 = n.to(tl.int64)
    lane = tl.arange(0, 16)[None, :]
    k = k_start[:, None] + lane

    w = _load_line(w_ptr + (n64 * stride_w_n + k_start)[:, None] + lane, k, K, mask[:, None], SLOTS, HAS_TAIL)
    packed_row = (packed_ptr + n64 * stride_packed_n16 * 4)[:, None]
    zeros = tl.zeros((1, 1), tl.int32)
    words = (zeros, zeros, zeros)
    biases = words
    for c in tl.static_range(0, SLOTS, CHUNK):
        first_k = k_start + 16 * c
        group_offset = n64 * stride_scale_n
        if GROUP != 0:
            group_offset += (first_k // GROUP).to(tl.int64) * stride_scale_g
        group_mask = mask & (first_k < K)
        scale = tl.load(scale_ptr + group_offset, mask=group_mask, other=1.0).to(tl.float32)
        zero = scale
        if VALUE_MAP != "symmetric":
            zero = tl.load(zero_ptr + group_offset, mask=group_mask, other=0).to(tl.float32)
        factor = in_range(scale, dtype)
        divisor = scale * factor
        reciprocal = reciprocal_of(divisor, dtype != tl.float32)
        base = _base(zero, BITS, VALUE_MAP)
        base_bits = base.to(tl.int32, bitcast=True)[:, None]
        for t in tl.static_range(c, c + CHUNK):
            level = _level(
                w[t].to(tl.float32), factor[:, None], divisor[:, None], reciprocal[:, None], zero[:, None],
                base[:, None], dtype, BITS, VALUE_MAP, False,
            ).to(tl.int32, bitcast=True)  # fmt: skip
            if HAS_TAIL:
                level = tl.where(k + 16 * t < K, level, base_bits)
            words, biases = _put_slot(
                words, biases, packed_row, level, base_bits, line[:, None], K, mask[:, None], t, BITS, SLOTS, HAS_TAIL
            )


@functools.lru_cache(maxsize=1024)
def _prepare(
    kernel: Any,
    N: int,
    K: int,
    strides: tuple[int, ...],
    group: int,
    dtypes: tuple[torch.dtype | None, ...],  # of w, scale and zero
    scheme: Scheme,
    config: QuantizeConfig,
) -> Launch:
    constants = {
        "BITS": scheme.bits,
        "GROUP": group,
        "VALUE_MAP": scheme.value_map,
        "HAS_TAIL": K % config.line != 0,
        "BLOCK_N": config.block_n,
        "LINES": config.tile // config.line,
        "SLOTS": config.line // 16,
    }
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    programs = triton.cdiv(N, config.block_n) * triton.cdiv(K, config.tile)
    return Launch(kernel, programs, (N, K, *strides), constants, options)


def quantize(w: Tensor, scheme: Scheme, config: QuantizeConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch only: (packed, scale, zero) of w with inner stride 1, where choose.group_fits_tile."""
    N, K = w.shape
    scale = w.new_empty(scheme.scale_shape(N, K), dtype=scheme.scale_dtype)
    zero = None if scheme.zero_dtype is None else torch.empty_like(scale, dtype=scheme.zero_dtype)
    group = triton.next_power_of_2(scheme.group_length(K))
    return _run(quantize_kernel, w, scale, zero, group, scheme, config), scale, zero


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, config: QuantizeConfig) -> Tensor:
    """Launch only: packed codes of w with inner stride 1, for scales and zeros of any group length."""
    group = 0 if scale.shape[0] == 1 else scheme.group_length(w.shape[1])
    return _run(encode_kernel, w, scale, zero, group, scheme, config)


def _run(
    kernel: Any, w: Tensor, scale: Tensor, zero: Tensor | None, group: int, scheme: Scheme, config: QuantizeConfig
) -> Tensor:
    N, K = w.shape
    packed = w.new_empty((N, packing.packed_words(scheme.bits, K)), dtype=torch.int32)
    strides = w.stride(0), packed.stride(0) // 4, *group_strides(scale)
    dtypes = w.dtype, scale.dtype, None if zero is None else zero.dtype
    launch = _prepare(kernel, N, K, strides, group, dtypes, scheme, config)
    launch(w, packed, scale, scale if zero is None else zero)
    return packed
