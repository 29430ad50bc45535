"""The oracle against float64 truth: every rule of quantizing, and matmul within its bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import packing, reference
from qkernels.scheme import Scheme
from tests import bounds, truth
from tests.helpers import ALL_MAPS, exact_weight, random_weight, signs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = ("g16", "g48", "g64", "g128", "g1024", "c", "t")


def _check_quantized(w: torch.Tensor, scheme: Scheme) -> None:
    """All that numerics promise of one quantized weight, from its codes, scales and zeros alone."""
    packed, scale, zero = reference.quantize(w, scheme)
    rows, in_features = w.shape
    length = scheme.group_length(in_features)
    code = truth.unpack(packed.numpy(), scheme.bits, in_features)
    s = truth.per_weight(truth.as_array(scale), in_features, length, rows)
    z = None if zero is None else truth.per_weight(truth.as_array(zero), in_features, length, rows)
    w64 = truth.as_array(w)

    assert scale.dtype is scheme.scale_dtype
    assert scale.shape == scheme.scale_shape(rows, in_features)
    assert (truth.as_array(scale) > 0).all()
    assert code.min() >= scheme.code_min
    assert code.max() <= scheme.code_max
    if scheme.value_map == "affine":
        assert zero is not None
        assert zero.dtype is torch.uint8
        assert truth.as_array(zero).max() <= scheme.code_max

    levels = np.arange(scheme.code_min, scheme.code_max + 1)
    base = scheme.center if z is None else z

    def value(q: np.ndarray) -> np.ndarray:
        return s * q + base if scheme.value_map == "offset" else s * (q - base)

    # Spread the extremes of each group over its weights.
    groups = truth.group_of(in_features, length)
    extent = np.zeros_like(w64)
    for g in np.unique(groups):
        extent[:, groups == g] = np.abs(w64[:, groups == g]).max(axis=1, keepdims=True)
    if scheme.group_size == "tensor":
        extent[:] = np.abs(w64).max()

    error = np.abs(w64 - value(code))
    assert (error <= bounds.quantize(s, extent, scheme.code_max)).all(), "an error is larger than half a step"
    # Nearest over the stored scale and zero: no other level is closer, but for float32 rounding of the division.
    best = np.min([np.abs(w64 - value(level)) for level in levels], axis=0)
    assert (error <= best + 4 * 2.0**-24 * (extent + s) + 2.0**-148).all(), "a code is not the nearest"


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_every_weight_gets_its_nearest_level(bits: int, suffix: str) -> None:
    for i, group in enumerate(GROUPS):
        scheme = Scheme.parse(f"w{bits}{group}{suffix}-{('fp16', 'bf16', 'fp32')[i % 3]}")
        for dtype, columns in zip(DTYPES, (200, 129, 48), strict=True):
            _check_quantized((torch.randn(5, columns) + i / 4).to(dtype), scheme)


HOSTILE = {
    "constant": torch.full((2, 64), 0.3),
    "negative constant": torch.full((2, 64), -7.0),
    "zero": torch.zeros(2, 64),
    "minus zero": torch.full((2, 64), -0.0),
    "one-hot": torch.eye(64)[:2],
    "huge outlier": torch.cat([torch.full((2, 63), 1e-3), torch.full((2, 1), 1e30)], dim=1),
    "subnormal": torch.linspace(-(2.0**-140), 2.0**-139, 128).reshape(2, 64),
    "smallest": torch.full((2, 64), 2.0**-149),
    "far from zero": 50 + torch.rand(2, 64),
    "largest float32": torch.tensor([[-3.4e38, 3.4e38] * 32] * 2),
    "halfway": (torch.arange(128).reshape(2, 64) - 64) / 2.0,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", ["", "s", "f"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hostile_values_keep_the_promises(name: str, suffix: str, bits: int) -> None:
    w = HOSTILE[name]
    for dtype in ("fp16", "bf16", "fp32"):
        scheme = Scheme.parse(f"w{bits}g32{suffix}-{dtype}")
        largest_step = 2 * w.double().abs().max() / (2 ** (bits - 1) - 1 if suffix == "s" else 2**bits - 1)
        if max(largest_step, w.abs().max()) < torch.finfo(scheme.scale_dtype).max:
            _check_quantized(w, scheme)


def test_zero_weights_stay_zero_exactly() -> None:
    w = torch.randn(4, 256)
    w[:, ::5] = 0
    for text in ("w4g64", "w4g64s", "w8c", "w2ts"):
        scheme = Scheme.parse(text)
        back = reference.dequantize(*reference.quantize(w, scheme), scheme, 256, torch.float32)
        assert (back[:, ::5] == 0).all(), text


def test_an_all_zero_group_has_scale_one() -> None:
    for text in ("w4g64", "w4g64s", "w4g64f", "w4t"):
        scheme = Scheme.parse(text)
        packed, scale, zero = reference.quantize(torch.zeros(2, 128), scheme)
        assert (scale == 1).all()
        assert (reference.dequantize(packed, scale, zero, scheme, 128, torch.float32) == 0).all()


def test_symmetric_reaches_both_extremes() -> None:
    w = torch.tensor([[-1.5, 1.5] + [0.25] * 14])
    scheme = Scheme.parse("w4cs")
    packed, scale, _ = reference.quantize(w, scheme)
    code = packing.unpack(packed, 4, 16)
    assert (code[0, 0], code[0, 1]) == (1, 15)


@pytest.mark.parametrize(("text", "low", "high"), [("w4g16", -5.0, 10.0), ("w4g16s", -7.0, 7.0), ("w4g16f", -6.0, 9.0)])
def test_halfway_goes_to_the_even_step(text: str, low: float, high: float) -> None:
    """The range makes every scale 1, so that levels are integers, and halves lie between two."""
    halves = torch.arange(-4.5, 5.5)
    w = torch.cat([torch.tensor([low, high]), halves])[None]
    scheme = Scheme.parse(text)
    packed, scale, zero = reference.quantize(w, scheme)
    assert scale.item() == 1
    levels = reference.dequantize(packed, scale, zero, scheme, w.shape[1], torch.float32)[0, 2:]
    assert levels.tolist() == [-4, -4, -2, -2, 0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_rounded_up_and_offsets_down(dtype: torch.dtype) -> None:
    values = torch.cat([torch.rand(4000) * 2.0 ** torch.randint(-20, 12, (4000,)), torch.tensor([0.0, 1.0, 2.0**-30])])
    up, down = reference._round_toward(values, dtype, up=True), reference._round_toward(-values, dtype, up=False)
    assert (up.float() >= values).all()
    assert torch.equal(down, -up)
    back = reference._round_toward(values, dtype, up=False)
    assert (back.float() <= values).all()
    # The two neighbours of a value are one place apart, or the value itself.
    if dtype is not torch.float32:
        apart = up.view(torch.int16).int() - back.view(torch.int16).int()
        assert torch.equal(apart, (values.to(dtype).float() != values).int())


def test_weights_on_a_float_offset_grid_come_back_bit_for_bit() -> None:
    scale = (torch.rand(6, 3) / 50).half()
    offset = (-torch.rand(6, 3) / 8).half()
    code = torch.randint(0, 16, (6, 3, 32))
    code[:, :, 0], code[:, :, 1] = 0, 15
    w = (scale[..., None].float() * code + offset[..., None].float()).flatten(1)
    scheme = Scheme.parse("w4g32f")
    packed, s, m = reference.quantize(w, scheme)
    assert torch.equal(reference.dequantize(packed, s, m, scheme, 96, torch.float32), w)
    assert torch.equal(s, scale.T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("text", ["w4g64", "w4cs", "w8tf"])
def test_a_weight_that_is_not_finite_is_named(bad: float, text: str) -> None:
    w = torch.randn(3, 130)
    w[2, 129] = w[1, 7] = bad
    with pytest.raises(ValueError, match=rf"w must be finite, got {bad} at index \(1, 7\)"):
        reference.quantize(w, Scheme.parse(text))


def test_a_scale_that_does_not_fit_is_named() -> None:
    w = torch.zeros(3, 128)
    w[2, 64] = 1e6
    with pytest.raises(ValueError, match=r"scale of group 1, row 2 does not fit torch\.float16 .*'w4g64'"):
        reference.quantize(w, Scheme.parse("w4g64"))
    reference.quantize(w, Scheme.parse("w4g64-bf16"))
    with pytest.raises(ValueError, match=r"offset of group 0, row 0 does not fit"):
        reference.quantize(torch.full((1, 16), -1e6), Scheme.parse("w4cf"))


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_dequantize_is_the_formula_rounded_once(bits: int, suffix: str) -> None:
    for group, columns in (("g48", 200), ("c", 77), ("t", 64)):
        weight = random_weight(f"w{bits}{group}{suffix}", 5, columns)
        for dtype in DTYPES:
            found = reference.dequantize(weight.packed, weight.scale, weight.zero, weight.scheme, columns, dtype)
            if suffix == "f":  # by definition two roundings, of scale * code and of the sum, in float32
                assert weight.zero is not None
                s, m = (
                    truth.per_weight(truth.as_array(t), columns, weight.scheme.group_length(columns), 5)
                    for t in (weight.scale, weight.zero)
                )
                exact = ((s * weight.code).astype(np.float32) + m.astype(np.float32)).astype(np.float64)
            else:
                exact = weight.values.astype(np.float32).astype(np.float64)
            assert torch.equal(found, truth.rounded(exact, dtype))


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_matmul_is_exact_where_it_can_be(bits: int, suffix: str) -> None:
    for group in GROUPS:
        weight = exact_weight(f"w{bits}{group}{suffix}", 5, 200)
        for dtype in DTYPES:
            x = signs(3, 200, dtype)
            y = reference.matmul(x, weight.packed, weight.scale, weight.zero, None, weight.scheme)
            assert torch.equal(y, truth.rounded(truth.as_array(x) @ weight.values.T, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_holds_its_bound(dtype: torch.dtype) -> None:
    for text in ("w4g128", "w8c", "w3g32f", "w2ts"):
        weight = random_weight(text, 33, 700)
        x, bias = torch.randn(2, 3, 700).to(dtype), torch.randn(33).to(dtype)
        y = reference.matmul(x, weight.packed, weight.scale, weight.zero, bias, weight.scheme)
        x64, b64 = truth.as_array(x), truth.as_array(bias)
        exact = x64 @ weight.values.T + b64
        magnitude = bounds.matmul_magnitude(x64, weight.values, b64)
        allowed = bounds.matmul(exact, magnitude, 700, weight.groups, dtype)
        assert (np.abs(truth.as_array(y) - exact) <= allowed).all()


def test_matmul_in_chunks_is_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = exact_weight("w4g64", 37, 128), signs(3, 128, torch.float32)
    whole = reference.matmul(x, weight.packed, weight.scale, weight.zero, torch.ones(37), weight.scheme)
    monkeypatch.setattr(reference, "_CHUNK_WEIGHTS", 5 * 128)
    chunks = reference.matmul(x, weight.packed, weight.scale, weight.zero, torch.ones(37), weight.scheme)
    assert torch.equal(whole, chunks)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 150),
    bits=st.integers(1, 8),
    group=st.sampled_from(["g16", "g32", "c", "t"]),
    suffix=st.sampled_from(["", "s", "f"]),
    exponent=st.integers(-30, 20),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
def test_any_weight_keeps_the_promises(
    rows: int, columns: int, bits: int, group: str, suffix: str, exponent: int, shift: float, seed: int
) -> None:
    if bits == 1 and suffix == "s":
        return
    w = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**exponent
    _check_quantized(w, Scheme.parse(f"w{bits}{group}{suffix}-bf16"))
