from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels.scheme import Scheme, as_scheme

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    bits = draw(st.integers(1, 8))
    maps = ("affine", "offset") if bits == 1 else ("affine", "symmetric", "offset")
    group_size = draw(st.sampled_from(["channel", "tensor"]) | st.integers(1, 4096).map(lambda n: 16 * n))
    return Scheme(bits, group_size, draw(st.sampled_from(maps)), draw(st.sampled_from(DTYPES)))


@given(schemes())
def test_printed_schemes_parse_back(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert as_scheme(str(scheme)) == as_scheme(scheme) == scheme


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "value_map", "dtype"),
    [
        ("w4g128", 4, 128, "affine", torch.float16),
        ("w8c", 8, "channel", "affine", torch.float16),
        ("w8ts", 8, "tensor", "symmetric", torch.float16),
        ("w4g64s", 4, 64, "symmetric", torch.float16),
        ("w3g48f-bf16", 3, 48, "offset", torch.bfloat16),
        ("w1g16-fp32", 1, 16, "affine", torch.float32),
    ],
)
def test_strings_mean_what_they_say(
    text: str, bits: int, group_size: object, value_map: str, dtype: torch.dtype
) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.bits, scheme.group_size, scheme.value_map, scheme.scale_dtype) == (
        bits,
        group_size,
        value_map,
        dtype,
    )
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    ["", "w4", "4g128", "w4g", "w0g64", "w9g64", "w12c", "w4g8", "w4g100", "w4g0", "w4x", "w4g128sf", "w4g128S",
     "W4G128", " w4g128", "w4g128 ", "w4g128\n", "w4g-16", "w1cs", "w4c-fp8", "w4c-", "w٤g128", "w4g1e3"],
)  # fmt: skip
def test_anything_else_is_refused_with_a_list_of_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a scheme.*w<bits 1\.\.8>.*'w4g128'") as caught:
        Scheme.parse(text)
    assert repr(text) in str(caught.value)


def test_bad_fields_are_named() -> None:
    with pytest.raises(ValueError, match="bits must be from 1 to 8, got 9"):
        Scheme(9, 128)
    with pytest.raises(TypeError, match="bits must be an int"):
        Scheme(4.0, 128)
    with pytest.raises(ValueError, match="multiple of 16, got 20"):
        Scheme(4, 20)
    with pytest.raises(ValueError, match="'channel' or 'tensor', got 'row'"):
        Scheme(4, "row")
    with pytest.raises(TypeError, match=r"group_size must be .* got 64\.0"):
        Scheme(4, 64.0)
    with pytest.raises(ValueError, match=r"value_map must be one of .* got 'log'"):
        Scheme(4, 64, "log")
    with pytest.raises(ValueError, match=r"scale_dtype must be one of .* got torch\.float64"):
        Scheme(4, 64, "affine", torch.float64)
    with pytest.raises(ValueError, match="one bit has no level on both sides of zero"):
        Scheme(1, 64, "symmetric")
    with pytest.raises(TypeError, match="a scheme string is a str, got int"):
        as_scheme(4)


def test_codes_of_a_symmetric_scheme_are_balanced_around_its_center() -> None:
    for bits in range(2, 9):
        scheme = Scheme(bits, 128, "symmetric")
        assert scheme.center - scheme.code_min == scheme.code_max - scheme.center == 2 ** (bits - 1) - 1
    assert (Scheme(4, 128).code_min, Scheme(4, 128).code_max) == (0, 15)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("w4g128", (5, 3)), ("w4g16", (36, 3)), ("w4g1024", (1, 3)), ("w4c", (1, 3)), ("w4t", (1, 1))],
)
def test_scales_are_counted_with_the_shorter_last_group(text: str, shape: tuple[int, int]) -> None:
    assert Scheme.parse(text).scale_shape(3, 576) == shape


def test_no_input_features_means_no_groups() -> None:
    assert Scheme.parse("w4g128").scale_shape(3, 0) == (0, 3)
    assert Scheme.parse("w4c").scale_shape(3, 0) == (0, 3)
    assert Scheme.parse("w4t").scale_shape(3, 0) == (0, 1)
