"""Quotients by shared divisors are those of IEEE division: at every tie, next to it, and at the ends of the range."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl

from qkernels.kernels.rounding import in_range, quotient
from tests.conftest import HAS_GPU

Floats = npt.NDArray[np.float32]


@triton.jit
def _quotient_kernel(w_ptr, divisor_ptr, reciprocal_ptr, out_ptr, n, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < n, other=0.0)
    divisor = tl.load(divisor_ptr + i, mask=i < n, other=1.0)
    reciprocal = tl.load(reciprocal_ptr + i, mask=i < n, other=1.0)
    tl.store(out_ptr + i, quotient(w, divisor, reciprocal, SHORT), mask=i < n)


@triton.jit
def _in_range_kernel(scale_ptr, out_ptr, n, dtype: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + i, mask=i < n, other=1.0)
    tl.store(out_ptr + i, in_range(scale, dtype), mask=i < n)


def _quotient(w: Floats, divisor: Floats, reciprocal: Floats, short: bool, device: str) -> Floats:
    w, divisor, reciprocal = (np.ascontiguousarray(a).ravel() for a in np.broadcast_arrays(w, divisor, reciprocal))
    operands = [torch.from_numpy(a).to(device) for a in (w, divisor, reciprocal)]
    out = torch.empty_like(operands[0])
    block = 1024 if HAS_GPU else 2**18
    grid = (triton.cdiv(w.size, block),)
    _quotient_kernel[grid](*operands, out, w.size, SHORT=short, BLOCK=block, enable_fp_fusion=False)
    return out.cpu().numpy()


def _places(x: Floats, places: npt.NDArray[np.int64]) -> Floats:
    """x, so many representable numbers away from zero."""
    return (x.view(np.int32) + places.astype(np.int32)).view(np.float32)


def _near_ties(divisor: Floats, rng: np.random.Generator, count: int) -> Floats:
    """(divisors, count) numerators whose quotients are halfway between integers, but for a few places."""
    level = rng.integers(0, 256, (divisor.size, count)) + 0.5
    w = (divisor[:, None].astype(np.float64) * level).astype(np.float32)
    w = _places(w, rng.integers(-3, 4, w.shape))
    return w * rng.choice(np.float32([-1, 1]), w.shape)


@pytest.mark.parametrize("exponent", [-60, -24, -3, 0, 15, 40])
def test_quotients_by_eleven_bits(exponent: int, device: str) -> None:
    """Every divisor of 11 bits; reciprocals that are wrong by up to two places do not matter."""
    rng = np.random.default_rng(exponent + 100)
    divisor = (np.arange(1024, 2048) * 2.0 ** (exponent - 10)).astype(np.float32)
    w = np.concatenate([_near_ties(divisor, rng, 160), (rng.normal(0, 50, (1024, 64)) * divisor[:, None])], axis=1)
    w = w.astype(np.float32)
    reciprocal = np.broadcast_to(np.float32(1) / divisor[:, None], w.shape)
    reciprocal = _places(np.ascontiguousarray(reciprocal), rng.integers(-2, 3, w.shape))
    found = _quotient(w, divisor[:, None], reciprocal, True, device)
    wanted = (w / divisor[:, None]).ravel()
    ties = (np.abs(wanted) % 1 == 0.5).sum()
    assert ties > 10_000  # so the numerators are what they are meant to be
    assert (found == wanted)[np.abs(wanted) >= 0.25].all()
    assert (np.abs(found) < 0.5)[np.abs(wanted) < 0.5].all()


def _hardest(rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """(w, divisor) of 24 bits whose quotients are as near to halfway between two float32s as any: by 1 / divisor."""
    pairs = []
    while len(pairs) < count:
        divisor = int(rng.integers(2**22, 2**23)) * 2 + 1
        # w * 2**bits = +-1 modulo divisor, so w * 2**bits / divisor is next to an odd integer of 25 bits.
        for bits, sign in ((24, 1), (24, -1), (25, 1), (25, -1)):
            w = sign * pow(2, -bits, divisor) % divisor
            w += divisor if bits == 24 else 0
            if 2**23 <= w < 2**24:
                pairs.append((w, divisor))
    w, divisor = np.array(pairs).T.astype(np.float32)
    return w, divisor


def test_the_hardest_quotients(device: str) -> None:
    w, divisor = _hardest(np.random.default_rng(0), 20_000)
    reciprocal = np.float32(1) / divisor
    assert np.array_equal(_quotient(w, divisor, reciprocal, False, device), w / divisor)
    off = _places(reciprocal, np.ones(w.size, np.int64))
    assert (_quotient(w, divisor, off, False, device) != w / divisor).any()  # hard enough to see one place of it


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_quotients_by_any_float32(exponent: int, device: str) -> None:
    rng = np.random.default_rng(exponent + 100)
    mantissa = np.concatenate(
        [rng.integers(2**23, 2**24, 4000), 2**24 - 1 - np.arange(500), 2**23 + np.arange(500)]  # hardest at the ends
    )
    divisor = (mantissa * 2.0 ** (exponent - 23)).astype(np.float32)
    w = np.concatenate([_near_ties(divisor, rng, 64), (rng.normal(0, 50, (5000, 64)) * divisor[:, None])], axis=1)
    w = w.astype(np.float32)
    found = _quotient(w, divisor[:, None], np.float32(1) / divisor[:, None], False, device)
    wanted = (w / divisor[:, None]).ravel()
    assert (found == wanted)[np.abs(wanted) >= 0.25].all()
    assert (np.abs(found) < 0.5)[np.abs(wanted) < 0.5].all()


def test_quotients_by_a_number_of_steps(device: str) -> None:
    """Scales: every odd number below 256, subnormal numerators and quotients too."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, 256, 2).astype(np.float32)[:, None]
    bits = np.concatenate([rng.integers(0, 0x7F800000, 3000), np.arange(3000), 2**23 + np.arange(-500, 500)])
    w = bits.astype(np.int32).view(np.float32)[None, :]
    found = _quotient(w, steps, (1 / steps.astype(np.float64)).astype(np.float32), True, device)
    assert np.array_equal(found, (w / steps).ravel())


@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float32])
def test_every_scale_is_brought_to_where_quotients_are_right(dtype: tl.dtype, device: str) -> None:
    bits = np.linspace(1, 0x7F7FFFFF, 3000).astype(np.int32)
    scale = np.concatenate([bits.view(np.float32), (2.0 ** np.arange(-149, 128)).astype(np.float32)])
    there = torch.from_numpy(scale).to(device)
    factor = torch.empty_like(there)
    _in_range_kernel[(1,)](there, factor, scale.size, dtype=dtype, BLOCK=4096)
    factors = factor.cpu().numpy().astype(np.float64)
    assert (np.frexp(factors)[0] == 0.5).all()  # powers of two
    assert ((scale * factors >= 2.0**-60) & (scale * factors <= 2.0**64)).all()
