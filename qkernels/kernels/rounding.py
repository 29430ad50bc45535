"""Shared device code: quotients and scales rounded as IEEE arithmetic says, in few instructions.

A correctly rounded division is a dozen instructions; by a divisor that many numerators share it is three.
"""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """rint of |x| <= 2**22: past 1.5 * 2**23 a float32 has no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_toward(
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
def quotient(
    w,  # float32
    divisor,  # float32 or a number, as is reciprocal: about 1 / divisor
    reciprocal,
    SHORT: tl.constexpr,  # whether the divisor has at most 11 significant bits
):
    """w / divisor as IEEE division rounds it, for quotients of 0.25 to 2**20 and divisors of 2**-60 to 2**64.

    Smaller quotients come out small. The product with the reciprocal is off by 5 places at most, and the remainder is
    exact, so what a step along it leaves is below 2**-19 of a place. A quotient by 11 bits is never nearer than 2**-12
    of a place to where rounding turns. By 24 bits it may be; but from a quotient that is off by one place at most, a
    second step, with a correctly rounded reciprocal, ends right by Markstein's theorem.
    """
    q = w * reciprocal
    q = tl.fma(tl.fma(-divisor, q, w), reciprocal, q)
    if not SHORT:
        q = tl.fma(tl.fma(-divisor, q, w), reciprocal, q)
    return q


@triton.jit
def reciprocal_of(
    scale,  # float32
    SHORT: tl.constexpr,
):
    """1 / scale as quotient wants it: correctly rounded, or within two places."""
    return 1.0 / scale if SHORT else tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def in_range(
    scale,  # float32, positive
    dtype: tl.constexpr,  # it was rounded to
):
    """A power of two that brings scale to where quotient works; it is 1 for all of float16."""
    if dtype == tl.float16:
        return tl.full(scale.shape, 1.0, tl.float32)
    else:
        return tl.where(scale < 2.0**-60, 2.0**100, tl.where(scale > 2.0**60, 2.0**-64, 1.0))


@triton.jit
def scale_of(
    low,  # float32: range of each group, with zero in it but for "offset"
    high,
    dtype: tl.constexpr,  # of the scales
    STEPS: tl.constexpr,  # from low to high: at most 255, and odd
):
    """The scale, float32: what reference.scale_and_zero does."""
    # Halves, because high - low may overflow. By an odd number no quotient is halfway: subnormal ones are right too.
    half = high * 0.5 - low * 0.5
    exact = tl.where(half < float("inf"), quotient(half, STEPS, 1.0 / STEPS, True), half) * 2.0
    smallest = tl.full((1,), _smallest_positive_bits(dtype), tl.int32).to(tl.float32, bitcast=True)
    return tl.where(high > low, tl.maximum(round_toward(exact, dtype, True), smallest), 1.0)
