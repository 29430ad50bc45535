"""Quantize activations: codes int8, in the order of packing.py, with a scale, and a zero if affine, for each token.

    symmetric   size = max |x|                 L = 127      code = rint(x * (L / size))           scale = size / L
    affine      size = (max x - min x) / 2     L = 127.5    code = rint(x * (L / size)) + zero    zero = rint(-min x ..)

Shapes    x (M, K), norm (K,), codes (M, words) int32, scale (M,) float32, zero (M,) int8.
Numerics  float32; equals the oracle bit for bit. With `norm` x is x * rsqrt(mean(x^2) + eps) * norm first: sums in
          another order than the oracle's, so a code may differ by one where it is almost halfway.
Oracle    qkernels.reference_int8.quantize_activations      Tuning  qkernels.tuning.choose
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels import packing
from qkernels.kernels.launch import Launch, token_stride
from qkernels.kernels.rounding import round_half_even
from qkernels.reference_int8 import SMALLEST_RANGE
from qkernels.scheme import Scheme
from qkernels.tuning.configs import ActivationConfig

_SMALLEST_RANGE = tl.constexpr(SMALLEST_RANGE)


@triton.jit
def _index(word, B: tl.constexpr, LANES: tl.constexpr):
    """k of one byte of words of codes."""
    return word // LANES * (4 * LANES) + B * LANES + word % LANES


@triton.jit
def _load(
    pointer,  # to a token or to the weight of a norm
    word,  # (WORDS,) indices of words of codes
    B: tl.constexpr,  # which byte of them
    K,
    LANES: tl.constexpr,
):
    """Values of one byte of each word, float32; 0 past K."""
    k = _index(word, B, LANES)
    return tl.load(pointer + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _load_normed(x_row, norm_ptr, rstd, word, B: tl.constexpr, K, LANES: tl.constexpr, HAS_NORM: tl.constexpr):
    x = _load(x_row, word, B, K, LANES)
    return x * rstd * _load(norm_ptr, word, B, K, LANES) if HAS_NORM else x


@triton.jit
def _reach(x, largest, low, high, RANGE: tl.constexpr):
    """Bits of the largest |x| so far (in their order infinity and NaN come last), and the range with 0 in it."""
    largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if RANGE:
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    return largest, low, high


@triton.jit
def _code(
    x,
    reciprocal,
    zero,
    word,
    B: tl.constexpr,
    K,
    LANES: tl.constexpr,
    AFFINE: tl.constexpr,
    STATIC: tl.constexpr,
    PADDED: tl.constexpr,  # whether there are words, or bytes of words, past K
):
    """Codes, at their byte of an int32.

    1.5 * 2^23 + code has the code, in two's complement, in its low bits, and no room for a fraction.
    """
    MAGIC: tl.constexpr = 12582912.0
    code = x * reciprocal
    if STATIC:  # nothing reaches farther than a dynamic scale does
        code = tl.clamp(code, -512.0 if AFFINE else -127.0, 512.0 if AFFINE else 127.0)
    code += MAGIC
    if AFFINE:
        code = tl.clamp(code + zero, MAGIC - 128.0, MAGIC + 127.0)
    bits = code.to(tl.int32, bitcast=True) & 0xFF
    if AFFINE and PADDED:
        bits = tl.where(_index(word, B, LANES) < K, bits, 0)
    return bits << (8 * B)


@triton.jit
def activations_kernel(
    x_ptr,  # (M, K) float16, bfloat16 or float32
    static_ptr,  # (2,) float32: scale and zero, or unused
    norm_ptr,  # (K,) floating, or unused
    codes_ptr,  # (M, words) int32
    scale_ptr,  # (M,) float32
    zero_ptr,  # (M,) int8, or unused
    K,
    words,
    stride_x_m,  # in elements; the inner strides are 1
    eps,
    LANES: tl.constexpr,  # words in a block, and how far the four k of a word lie apart
    LEVELS: tl.constexpr,  # 127, or 127.5 for affine codes
    STATIC: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PADDED: tl.constexpr,  # K is not a whole number of blocks
    WHOLE: tl.constexpr,  # a tile holds all of a token: it is read once
    WORDS: tl.constexpr,  # in a tile
):
    AFFINE: tl.constexpr = LEVELS > 127.0
    RANGE: tl.constexpr = AFFINE and not STATIC
    m = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + m * stride_x_m
    column = tl.arange(0, WORDS)
    largest = tl.zeros((WORDS,), tl.int32)
    low = tl.zeros((WORDS,), tl.float32)
    high = low
    squares = low
    rstd = 1.0

    if WHOLE:
        x0 = _load(x_row, column, 0, K, LANES)
        x1 = _load(x_row, column, 1, K, LANES)
        x2 = _load(x_row, column, 2, K, LANES)
        x3 = _load(x_row, column, 3, K, LANES)
        if HAS_NORM:
            rstd = 1.0 / tl.sqrt_rn(tl.sum(x0 * x0 + x1 * x1 + (x2 * x2 + x3 * x3), 0) / K + eps)
            x0 = x0 * rstd * _load(norm_ptr, column, 0, K, LANES)
            x1 = x1 * rstd * _load(norm_ptr, column, 1, K, LANES)
            x2 = x2 * rstd * _load(norm_ptr, column, 2, K, LANES)
            x3 = x3 * rstd * _load(norm_ptr, column, 3, K, LANES)
        largest, low, high = _reach(x0, largest, low, high, RANGE)
        largest, low, high = _reach(x1, largest, low, high, RANGE)
        largest, low, high = _reach(x2, largest, low, high, RANGE)
        largest, low, high = _reach(x3, largest, low, high, RANGE)
    else:
        if HAS_NORM:
            for start in range(0, words, WORDS):
                for b in tl.static_range(4):
                    x = _load(x_row, start + column, b, K, LANES)
                    squares += x * x
            rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / K + eps)
        for start in range(0, words, WORDS):
            for b in tl.static_range(4):
                x = _load_normed(x_row, norm_ptr, rstd, start + column, b, K, LANES, HAS_NORM)
                largest, low, high = _reach(x, largest, low, high, RANGE)
    absmax = tl.max(largest, 0)
    finite = absmax < 0x7F800000

    if STATIC:
        scale = tl.load(static_ptr)
        reciprocal = tl.div_rn(1.0, scale)
        zero = tl.load(static_ptr + 1)
    else:
        lowest = tl.min(low, 0)
        size = tl.max(high, 0) * 0.5 - lowest * 0.5 if AFFINE else absmax.to(tl.float32, bitcast=True)
        size = tl.where(finite, tl.maximum(size, _SMALLEST_RANGE), 1.0)
        scale = tl.div_rn(size, LEVELS)
        reciprocal = tl.div_rn(LEVELS, size)
        zero = 0.0
        if AFFINE:
            zero = tl.clamp(round_half_even(-lowest * reciprocal) - 128.0, -128.0, 127.0)
            zero = tl.where(finite, zero, -128.0)

    row = codes_ptr + m * words
    if WHOLE:
        packed = _code(x0, reciprocal, zero, column, 0, K, LANES, AFFINE, STATIC, PADDED)
        packed |= _code(x1, reciprocal, zero, column, 1, K, LANES, AFFINE, STATIC, PADDED)
        packed |= _code(x2, reciprocal, zero, column, 2, K, LANES, AFFINE, STATIC, PADDED)
        packed |= _code(x3, reciprocal, zero, column, 3, K, LANES, AFFINE, STATIC, PADDED)
        tl.store(row + column, tl.where(finite, packed, 0), mask=column < words)
    else:
        for start in range(0, words, WORDS):
            word = start + column
            packed = tl.zeros((WORDS,), tl.int32)
            for b in tl.static_range(4):
                x = _load_normed(x_row, norm_ptr, rstd, word, b, K, LANES, HAS_NORM)
                packed |= _code(x, reciprocal, zero, word, b, K, LANES, AFFINE, STATIC, PADDED)
            tl.store(row + word, tl.where(finite, packed, 0), mask=word < words)
    tl.store(scale_ptr + m, tl.where(finite, scale, float("nan")))
    if AFFINE:
        tl.store(zero_ptr + m, zero.to(tl.int8))


# x, static, norm -> codes (..., words), scale (...,), zero (...,)
Quantized = tuple[Tensor, Tensor, Tensor | None]


def prepare(
    shape: torch.Size, stride: tuple[int, ...], scheme: Scheme, has_norm: bool, eps: float, config: ActivationConfig
) -> Callable[[Tensor, Tensor | None, Tensor | None], Quantized]:
    """The launch for tokens (..., K) of this shape, not empty, and stride, all of one dtype and GPU.

    They are contiguous, or 2-D with inner stride 1; norm is contiguous.
    """
    how = scheme.activations
    assert how is not None
    *outer, K = shape
    words = packing.activation_words(scheme.bits, K)
    numbers: tuple[float, ...] = (K, words, token_stride(shape, stride), eps)
    constants = {
        "LANES": packing.block_columns(scheme.bits) // 4,
        "LEVELS": how.levels,
        "STATIC": how.static,
        "HAS_NORM": has_norm,
        "PADDED": K % packing.block_columns(scheme.bits) != 0,
        "WHOLE": words <= config.words,
        "WORDS": min(config.words, triton.next_power_of_2(words)),
    }
    # The oracle's bits: one rounding for each operation.
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    launch = Launch(activations_kernel, math.prod(outer), numbers, constants, options)

    def quantize(x: Tensor, static: Tensor | None, norm: Tensor | None) -> Quantized:
        codes = x.new_empty((*outer, words), dtype=torch.int32)
        scale = x.new_empty(outer, dtype=torch.float32)
        zero = None if how.symmetric else x.new_empty(outer, dtype=torch.int8)
        # What is not there is stood in for by any tensor.
        standing = (scale if static is None else static.contiguous(), scale if norm is None else norm)
        launch(x, *standing, codes, scale, codes if zero is None else zero)
        return codes, scale, zero

    return quantize
