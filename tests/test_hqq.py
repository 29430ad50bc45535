"""HQQ: weights as the package makes, stores and dequantizes them, bit for bit; and parts that someone has damaged."""

from __future__ import annotations

import math
import pathlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qkernels import QTensor
from qkernels.formats import hqq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
    from hqq.core.utils import encode_safetensor_type

Parts = dict[str, torch.Tensor]
HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def _layer(
    nbits: float = 4,
    dtype: torch.dtype = torch.float16,
    shape: tuple[int, int] = (5, 512),
    group_size: int | None = 64,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=options.pop("axis", 1))
    config["weight_quant_params"].update(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def _parts(layer: Any) -> Parts:
    parts = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    parts.pop("bias")
    return parts


def _read(parts: Parts) -> QTensor:
    return hqq.reader({"quant_method": "hqq"}, {}).decode("layer", parts)


def _wanted(layer: Any, parts: Parts | None = None) -> torch.Tensor:
    """hqq's own values in float32, of the scales and zeros as they are stored."""
    parts = _parts(layer) if parts is None else parts
    own = {"scale": parts["scale"].float(), "zero": parts["zero"].float(), "compute_dtype": torch.float32}
    return Quantizer.dequantize(parts["W_q"], layer.meta | own)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("nbits", WIDTHS)
def test_every_width_has_the_bits_of_hqq(nbits: float, dtype: torch.dtype, as_float: bool) -> None:
    layer = _layer(nbits, dtype, view_as_float=as_float)
    q = _read(_parts(layer))
    assert str(q.scheme) == f"w{math.ceil(nbits)}g64f-fp32"
    assert _same_bits(q.dequantize(), _wanted(layer))
    # In 16 bits hqq rounds u - zero, then the product, and this the product alone.
    torch.testing.assert_close(q.dequantize(dtype), layer.dequantize(), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("shape", "group_size"), [((5, 192), 64), ((7, 96), 32), ((1, 16), 16), ((10, 48), 48)])
def test_padded_rows_of_three_bits(shape: tuple[int, int], group_size: int) -> None:
    layer = _layer(3, shape=shape, group_size=group_size)
    assert _same_bits(_read(_parts(layer)).dequantize(), _wanted(layer))


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_whole_zeros_are_stored_as_such(nbits: int, dtype: torch.dtype) -> None:
    """Then hqq's values are these in whatever dtype it computes."""
    layer = _layer(nbits, dtype, round_zero=True, optimize=False)
    q = _read(_parts(layer))
    assert q.scheme.value_map == "affine"
    assert q.scale.dtype is dtype
    assert torch.equal(q.dequantize(dtype), layer.dequantize())
    assert _same_bits(q.dequantize(), _wanted(layer))


def test_whole_zeros_that_are_no_codes_become_offsets() -> None:
    layer = _layer(4, round_zero=True, optimize=False)
    for zero in (-3.0, 16.0, 40.0):
        parts = _parts(layer)
        parts["zero"][2] = zero
        q = _read(parts)
        assert q.scheme.value_map == "offset"
        assert _same_bits(q.dequantize(), _wanted(layer, parts))


def test_one_group_per_row_and_one_scale_for_all() -> None:
    layer = _layer(4, shape=(6, 40), group_size=None)
    q = _read(_parts(layer))
    assert str(q.scheme) == "w4cf-fp32"
    assert _same_bits(q.dequantize(), _wanted(layer))
    for axis in (0, 1):  # means nothing then
        layer = _layer(8, shape=(6, 40), group_size=None, channel_wise=False, axis=axis)
        q = _read(_parts(layer))
        assert str(q.scheme) == "w8tf-fp32"
        assert _same_bits(q.dequantize(), _wanted(layer))


@pytest.mark.parametrize("dtype", HALVES)
def test_any_16_bit_scales_and_zeros_are_correctly_rounded(dtype: torch.dtype) -> None:
    """Zeros from tiny to huge, of both signs: float64 is exact for them."""
    layer = _layer(4, dtype, shape=(64, 512), group_size=16)
    parts = _parts(layer)
    generator = torch.Generator().manual_seed(1)
    shape = parts["scale"].shape
    for name, low, high in (("scale", -14, 0), ("zero", -14, 14)):
        exponent = torch.randint(low, high, shape, generator=generator).double()
        parts[name] = (torch.randn(shape, generator=generator).double() * 2**exponent).to(dtype)
    u = Quantizer.unpack["4bit_u8"](parts["W_q"]).double()
    exact = ((u - parts["zero"].double()) * parts["scale"].double()).float().reshape(64, 512)
    assert torch.equal(_read(parts).dequantize(), exact)


def test_where_hqq_rounds_in_float32_and_this_does_not() -> None:
    """u - zero needs more than 24 bits if zero is tiny."""
    layer = _layer(4)
    parts = _parts(layer)
    parts["zero"].fill_(3 * 2.0**-24)
    parts["scale"].fill_(1 + 2.0**-10)
    u = Quantizer.unpack["4bit_u8"](parts["W_q"]).double().reshape(5, 512)
    ours = _read(parts).dequantize()
    assert torch.equal(ours, ((u - 3 * 2.0**-24) * (1 + 2.0**-10)).float())
    torch.testing.assert_close(ours, _wanted(layer, parts), rtol=2**-23, atol=0)
    assert not torch.equal(ours, _wanted(layer, parts))


def test_float32_scales_are_read_where_nothing_is_lost() -> None:
    layer = _layer(4, torch.float32, optimize=False, round_zero=False)
    parts = _parts(layer)
    with pytest.raises(ValueError, match=r"scale and zero must be float16 or bfloat16, .*: code \d+ of group \d, row"):
        _read(parts)
    parts["scale"] = torch.full_like(parts["scale"], 2.0**-7)
    parts["zero"] = torch.round(parts["zero"] * 8) / 8
    q = _read(parts)
    assert q.scheme.value_map == "offset"
    assert _same_bits(q.dequantize(), _wanted(layer, parts))
    parts["scale"][7] = 1 / 3  # the last of its row: K / g = 8
    parts["zero"][7] = 0.1
    with pytest.raises(ValueError, match=r"of group 7, row 0 is"):
        _read(parts)


def test_a_file(tmp_path: pathlib.Path) -> None:
    layer = _layer(3)
    save_file({f"m.{name}": t.contiguous() for name, t in layer.state_dict().items()}, tmp_path / "f.safetensors")
    tensors = {name.removeprefix("m."): t for name, t in load_file(tmp_path / "f.safetensors").items()}
    reader = hqq.reader({}, {})
    own = {name: t for name, t in tensors.items() if name in (reader.marker, *reader.parts)}
    assert set(tensors) - set(own) == {"bias"}
    assert _same_bits(reader.decode("m", own).dequantize(), _wanted(layer))


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nbits": torch.tensor(7)}, r"nbits must be one of 8, 6, 5, 4, 3, 2, 1 or 1\.58, got 7"),
        ({"nbits": None}, "there is no tensor 'nbits'"),
        ({"nbits": torch.tensor([4, 4])}, r"nbits must be one number, got shape \(2,\)"),
        ({"nbits": torch.tensor(math.nan)}, "nbits must be a finite number, got nan"),
        ({"packing": _text("2bit_u8")}, "packing must be one of '4bit_u8', got '2bit_u8'"),
        ({"packing": _text("__import__('os').abort()")}, "packing must be one of '4bit_u8', got"),
        ({"packing": _text("x" * 10**6)}, "packing must be a short text"),
        ({"packing": torch.tensor([255, 0], dtype=torch.uint8)}, r"got '\\\\xff\\x00'"),
        ({"packing": torch.tensor([52.0])}, "packing must be uint8, got float32"),
        ({"compute_dtype": _text("exit()")}, r"compute_dtype must be one of 'torch.float16', .*, got 'exit\(\)'"),
        ({"compute_dtype": _text("torch.bfloat16")}, "scale must be bfloat16, got float16"),
        ({"unpack_view_dtype": _text("torch.int32")}, "unpack_view_dtype must be one of 'torch.uint8'"),
        ({"axis": torch.tensor(0)}, "axis must be 1: the groups of axis 0 do not lie along K"),
        ({"axis": torch.tensor(2)}, "axis must be 1: got 2"),
        ({"group_size": torch.tensor(96)}, "group_size must divide the 512 input features, got 96"),
        ({"group_size": torch.tensor(0)}, "group_size must divide the 512 input features, got 0"),
        ({"group_size": torch.tensor(1.5)}, r"group_size must divide the 512 input features, got 1\.5"),
        ({"group_size": torch.tensor(1024)}, "group_size must divide"),
        ({"group_size": torch.tensor(32)}, r"W_q must have shape \(40, 32\), got \(20, 64\)"),
        ({"shape": torch.tensor([5, 2**60])}, r"W_q must have shape \(45035996273704960, 64\), got"),
        ({"shape": torch.tensor([-5, -512])}, r"shape must be two positive sizes, got \(-5, -512\)"),
        ({"shape": torch.tensor([5])}, r"shape must have shape \(2,\)"),
        ({"shape": torch.tensor([5.0, 512.0])}, "shape must be int64, int32, got float32"),
        ({"shape": torch.tensor([5, 64])}, r"5 rows of codes, which are not 2 equal planes"),
        ({"view_as_float": torch.tensor(1)}, "W_q must be float16, bfloat16, float32, got uint8"),
        ({"view_as_float": torch.tensor(2)}, "view_as_float must be 0 or 1, got 2"),
        ({"view_as_float": torch.tensor(1.0)}, "view_as_float must be uint8, .*, got float32"),
        ({"quant_scale": torch.tensor(1)}, "quant_scale must be 0"),
        ({"quant_zero": torch.tensor(1)}, "quant_zero must be 0"),
        ({"offload_meta": torch.tensor(1)}, "offload_meta must be 0"),
        ({"channel_wise": torch.tensor(0)}, r"W_q must have shape \(3, 512\)|not 2 equal planes"),
        ({"scale": None}, "there is no tensor 'scale'"),
        ({"zero": None}, "there is no tensor 'zero'"),
        ({"scale": torch.ones(40)}, r"scale must have shape \(40, 1\), got \(40,\)"),
        ({"zero": torch.ones(40, 1)}, "zero must be float16, got float32"),
        ({"scale": torch.full((40, 1), math.inf).half()}, "the scale of group 0, row 0 is NaN or infinite"),
        ({"zero": torch.full((40, 1), math.nan).half()}, "the zero of group 0, row 0 is NaN or infinite"),
        ({"W_q": torch.zeros(20, 64)}, "W_q must be uint8, got float32"),
        ({"W_q": torch.zeros(64, dtype=torch.uint8)}, r"W_q must have shape \(20, 64\), got \(64,\)"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, torch.Tensor | None], message: str) -> None:
    parts: dict[str, Any] = {**_parts(_layer()), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        _read({name: tensor for name, tensor in parts.items() if tensor is not None})


def test_more_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="quantization_config's quant_method must be one of 'hqq', got 'gptq'"):
        hqq.reader({"quant_method": "gptq"}, {})
    with pytest.raises(ValueError, match="group_size must be a positive multiple of 16, got 8"):
        _read(_parts(_layer(group_size=8)))
    with pytest.raises(ValueError, match="axis must be 1"):
        _read(_parts(_layer(axis=0)))
    parts = _parts(_layer(5))
    parts["W_q"][0, 0] = 32
    with pytest.raises(ValueError, match="code must be below 2\\*\\*bits = 32, got 32"):
        _read(parts)
    parts = _parts(_layer(view_as_float=True))
    parts["W_q"] = parts["W_q"][:, 1:]
    with pytest.raises(ValueError, match=r"W_q must have rows of 64 bytes, got \(20, 31\) float16"):
        _read(parts)
    parts = _parts(_layer(dtype=torch.bfloat16))
    parts["scale"].fill_(3e38)
    for zero in (7.3, 0.5):  # 15 scale leaves float32, even where zero scale does not
        parts["zero"].fill_(zero)
        with pytest.raises(ValueError, match="scale times zero, or scale times the largest code, of group 0, row 0 l"):
            _read(parts)
    with pytest.raises(ValueError, match="group_size must divide the 96 input features, got 64"):
        _read(_parts(_layer(shape=(4, 96))))


def test_defaults_of_older_files() -> None:
    layer = _layer()
    parts = _parts(layer)
    kept = {"W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing"}
    assert torch.equal(_read({name: parts[name] for name in kept}).dequantize(), _wanted(layer))


WHOLE = [_parts(_layer(nbits, dtype, view_as_float=f)) for nbits in (5, 4, 3, 1) for dtype in HALVES for f in (0, 1)]
DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    parts = dict(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted((*hqq.reader({}, {}).parts, "W_q"))))
        how = data.draw(st.sampled_from(["drop", "new", "number", "cast", "octet", "reshape"]))
        if how == "new" or name not in parts:
            shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
            parts[name] = torch.zeros(shape[:2] + [1] * len(shape[2:])).to(data.draw(st.sampled_from(DTYPES)))
        elif how == "drop":
            parts.pop(name)
        elif how == "number":
            parts[name] = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 600) | st.floats()))
        elif how == "cast":
            parts[name] = parts[name].to(data.draw(st.sampled_from(DTYPES)))
        elif how == "reshape":
            parts[name] = parts[name].reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])))
        else:
            raw = parts[name].contiguous().reshape(-1).clone()
            octets = raw.view(torch.uint8)
            if octets.numel():
                octets[data.draw(st.integers(0, octets.numel() - 1))] = data.draw(st.integers(0, 255))
            parts[name] = raw.reshape(parts[name].shape)
    try:
        q = _read(parts)
    except (ValueError, TypeError):
        return
    assert isinstance(q, QTensor)
    assert torch.isfinite(q.dequantize()).all() or q.scheme.value_map == "affine"


def test_texts_are_those_that_hqq_encodes() -> None:
    assert torch.equal(encode_safetensor_type("4bit_u8"), _text("4bit_u8"))
    assert torch.equal(encode_safetensor_type(torch.float16), _text("torch.float16"))
