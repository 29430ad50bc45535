"""Searched scales and zeros: never worse than rounding to nearest, and as good as they can be where that is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels
from qkernels import Scheme, reference
from qkernels.fit import fit

SCHEMES = ["w4g32", "w4g32s", "w4g32f", "w2g16", "w3c", "w1g16", "w1g16f", "w4t", "w8cs", "w3g48-bf16", "w2g64f-fp32"]
POWERS = {("search", False): 2.4, ("search", True): 2.0, ("hqq", False): 0.7, ("hqq", True): 0.7}


def _costs(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, h: Tensor | None, power: float) -> Tensor:
    """(groups, N) float64: what the method minimises, worked out group by group."""
    rebuilt = reference.decode(reference.encode(w, scale, zero, scheme), scale, zero, scheme)
    each = (w.double() - rebuilt.double()).abs() ** power * (1.0 if h is None else h.double())
    if scheme.group_size == "tensor":
        return each.sum().reshape(1, 1)
    length = scheme.group_length(w.shape[1])
    return torch.stack([part.sum(1) for part in each.split(length, dim=1)])


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(SCHEMES),
    method=st.sampled_from(["search", "hqq"]),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
    shift=st.sampled_from([0.0, 3.0, -50.0]),
    features=st.sampled_from([16, 40, 96]),
)
def test_no_group_is_worse_than_rounded_to_nearest(
    text: str, method: str, weighted: bool, seed: int, shift: float, features: int
) -> None:
    scheme = Scheme.parse(text)
    if method == "hqq" and scheme.value_map == "symmetric":
        return
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, features, generator=generator) + shift
    w[0, 3], w[1] = 40.0, 0.0  # an outlier, a row of zeros
    h = torch.rand(features, generator=generator) ** 4 if weighted else None
    if h is not None:
        h[:5] = 0.0  # inputs that are never there
    power = POWERS[method, weighted]
    nearest = _costs(w, *fit(w, scheme, "rtn"), scheme, h, power)
    found = _costs(w, *fit(w, scheme, method, h), scheme, h, power)
    assert (found <= nearest * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("method", ["search", "hqq"])
def test_weights_on_a_grid_stay_exact(method: str) -> None:
    scheme = Scheme.parse("w4g32")
    code = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    code[:, ::32], code[:, 1::32] = 0, 15
    scale, zero = torch.full((2, 8), 0.25, dtype=torch.float16), torch.full((2, 8), 5, dtype=torch.uint8)
    w = reference.decode(code, scale, zero, scheme)
    found = fit(w, scheme, method)
    assert torch.equal(reference.decode(reference.encode(w, *found, scheme), *found, scheme), w)


def test_an_outlier_that_costs_nothing_is_clipped_away() -> None:
    """Importance decides: the range forgets a weight whose input never comes."""
    scheme = Scheme.parse("w4g32")
    code = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    code[:, 1], code[:, 2] = 0, 15
    scale, zero = torch.full((1, 4), 0.5, dtype=torch.float16), torch.full((1, 4), 8, dtype=torch.uint8)
    w = reference.decode(code, scale, zero, scheme)
    w[:, 0] = 6.0
    h = torch.ones(32)
    h[0] = 0.0
    found = fit(w, scheme, "search", h)
    rebuilt = reference.decode(reference.encode(w, *found, scheme), *found, scheme)
    blind = _costs(w, *fit(w, scheme, "rtn"), scheme, h, 2.0)
    assert (_costs(w, *found, scheme, h, 2.0) < 0.05 * blind).all()
    assert (rebuilt[:, 0] < 5.0).all()


@pytest.mark.parametrize("text", ["w2g16", "w2g16s", "w2g16f", "w3g16"])
def test_the_search_is_close_to_the_best_grid_there_is(text: str) -> None:
    """Against all scales (and offsets) of a fine lattice."""
    scheme = Scheme.parse(text)
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    h = torch.rand(16, generator=torch.Generator().manual_seed(5))
    found = _costs(w, *fit(w, scheme, "search", h), scheme, h, 2.0)[0]
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.1, 2.5, 160):
        scale = torch.full((1, 6), float(step), dtype=torch.float16)
        bases: list[Tensor | None]
        if scheme.value_map == "symmetric":
            bases = [None]
        elif scheme.value_map == "affine":
            bases = [torch.full((1, 6), z, dtype=torch.uint8) for z in range(scheme.code_max + 1)]
        else:
            bases = [torch.full((1, 6), float(m), dtype=torch.float16) for m in torch.linspace(-3, 1, 80)]
        for base in bases:
            best = torch.minimum(best, _costs(w, scale, base, scheme, h, 2.0)[0])
    assert (found <= 1.25 * best).all()
    assert found.sum() <= 1.08 * best.sum()


def test_half_quadratic_zeros_meet_most_weights_and_leave_outliers() -> None:
    """With an outlier, the many are met more closely than by least squares."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[:, 7] = 9.0
    scheme = Scheme.parse("w4g64f")
    nearest, found = (_costs(w, *fit(w, scheme, method), scheme, None, 0.7).sum() for method in ("rtn", "hqq"))
    assert found < 0.93 * nearest


def test_quantize_takes_methods_and_packs_what_they_found() -> None:
    w, h = torch.randn(8, 96), torch.rand(96)
    scheme = Scheme.parse("w3g32")
    q = qkernels.quantize(w, scheme, method="search", importance=h)
    scale, zero = fit(w, scheme, "search", h)
    assert zero is not None
    assert q.zero is not None
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.zero, zero)
    assert torch.equal(q.dequantize(), reference.decode(reference.encode(w, scale, zero, scheme), scale, zero, scheme))
    empty = qkernels.quantize(torch.empty(0, 32), "w4g32", method="search")
    assert empty.shape == (0, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, r"method must be one of 'rtn', 'search', 'hqq', got 'best'"),
        ({"method": "rtn", "importance": torch.ones(32)}, "'rtn' takes no importance"),
        ({"method": "search", "importance": torch.ones(31)}, r"importance must be floating \(32,\)"),
        ({"method": "search", "importance": -torch.ones(32)}, "not negative"),
        ({"method": "search", "importance": torch.full((32,), torch.nan)}, "finite"),
        ({"method": "hqq", "scheme": "w4g32s"}, "has none; choose 'search' or 'rtn'"),
    ],
)
def test_bad_requests_say_what_is_accepted(options: dict, message: str) -> None:
    scheme = options.pop("scheme", "w4g32")
    with pytest.raises(ValueError, match=message):
        qkernels.quantize(torch.randn(4, 32), scheme, **options)


@pytest.mark.parametrize("method", ["search", "hqq"])
def test_weights_that_are_not_finite_are_refused(method: str) -> None:
    w = torch.randn(4, 32)
    w[2, 7] = torch.inf
    with pytest.raises(ValueError, match=r"got inf at index \(2, 7\)"):
        qkernels.quantize(w, "w4g32", method=method)
