"""torchao: weights as the package makes, flattens and dequantizes them, bit for bit; and parts that someone damaged."""

from __future__ import annotations

import json
import math
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qkernels import QTensor
from qkernels.formats import torchao as reading
from qkernels.formats.reader import Reader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Int4Tensor,
        Int4TilePackedTo4dTensor,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8StaticActivationInt8WeightConfig,
        Int8Tensor,
        Int8WeightOnlyConfig,
        IntxUnpackedToInt8Tensor,
        IntxWeightOnlyConfig,
        MappingType,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

Parts = dict[str, torch.Tensor]
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
CONFIG = {"quant_method": "torchao"}


def _flat(weight: torch.Tensor) -> tuple[Parts, dict[str, str]]:
    """What torchao would write of a layer with this weight."""
    return flatten_tensor_state_dict({"m.weight": weight, "m.bias": torch.zeros(3)})


def _old(weight: torch.Tensor) -> tuple[Parts, dict[str, str]]:
    """What torchao 0.14 would have written: other names, and metadata without those of tensors."""
    parts, metadata = _flat(weight)
    parts = {name.replace("m._weight_", "m.weight:").replace("m.bias", "m.bias:_data"): t for name, t in parts.items()}
    entry = json.loads(metadata["m.weight"])
    del entry["_tensor_data_names"]
    return parts, {**metadata, "m.weight": json.dumps(entry)}


def _own(reader: Reader, tensors: Parts) -> Parts:
    parts = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    assert set(parts) - {reader.marker, *reader.parts} == {"bias" + reader.suffix}
    return {name: tensor for name, tensor in parts.items() if name != "bias" + reader.suffix}


def _read(weight: torch.Tensor, flatten: Any = _flat) -> QTensor:
    tensors, metadata = flatten(weight)
    reader = reading.reader(CONFIG, metadata)
    return reader.decode("m", _own(reader, tensors))


def _quantized(config: Any, dtype: torch.dtype, shape: tuple[int, int] = (5, 96)) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, config)
    return model[0].weight


@pytest.mark.parametrize("flatten", [_flat, _old])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("granularity", "scheme"), [(PerRow(), "w8cs"), (PerGroup(32), "w8g32s"), (PerTensor(), "w8ts")], ids=str
)
def test_bytes(granularity: Any, scheme: str, dtype: torch.dtype, flatten: Any) -> None:
    weight = _quantized(Int8WeightOnlyConfig(granularity=granularity), dtype)
    q = _read(weight, flatten)
    assert str(q.scheme) == f"{scheme}-fp32"
    for wanted in DTYPES:
        assert torch.equal(q.dequantize(wanted), weight.dequantize(wanted))


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 16), (1, 96), (6, 96)])
def test_bytes_with_zeros(size: tuple[int, int], scale_dtype: torch.dtype) -> None:
    """Every code and zero, scales of every dtype."""
    generator = torch.Generator().manual_seed(0)
    shape = (6 // size[0], 96 // size[1])
    zero = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    zero.view(-1)[0] = -128
    zero.view(-1)[-1] = 127
    weight = Int8Tensor(
        torch.arange(6 * 96).reshape(6, 96).to(torch.int8),
        torch.randn(shape, generator=generator).to(scale_dtype),
        list(size),
        torch.bfloat16,
        zero_point=zero,
    )
    q = _read(weight)
    assert q.scheme.value_map == "affine"
    for wanted in DTYPES:
        assert torch.equal(q.dequantize(wanted), weight.dequantize(wanted))


def test_bytes_without_zeros() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).reshape(2, 128)
    weight = Int8Tensor(codes, torch.ones(2, 1), [1, 128], torch.float32)
    q = _read(weight)
    assert str(q.scheme) == "w8cs-fp32"
    assert torch.equal(q.dequantize(), codes.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_fewer_bits_in_bytes(bits: int, dtype: torch.dtype) -> None:
    for granularity in (PerGroup(32), PerAxis(0)):
        for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
            config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, mapping)
            weight = _quantized(config, dtype)
            assert isinstance(weight, IntxUnpackedToInt8Tensor)
            q = _read(weight)
            assert q.scheme.bits == bits
            assert torch.equal(q.dequantize(dtype), weight.dequantize())


def _mslk(w: torch.Tensor, group_size: int) -> Any:
    """An Int4Tensor of w, as mslk's quantizer and from_hp choose its codes, scales and zeros."""
    runs = w.float().split(group_size, dim=1)
    least = torch.stack([run.amin(1) for run in runs])
    scale = (torch.stack([run.amax(1) for run in runs]) - least).clamp(min=1e-6) / 15
    q = [((run - m[:, None]) / s[:, None]).round() - 8 for run, m, s in zip(runs, least, scale, strict=True)]
    return _int4(torch.cat(q, dim=1).clamp(-8, 7).to(torch.int8), scale.to(w.dtype), (least + scale * 8).to(w.dtype))


def _int4(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int = 0, **options: Any) -> Any:
    size = [1, group_size or -(-q.shape[1] // scale.shape[0])]
    return Int4Tensor((q[:, ::2] & 15) | (q[:, 1::2] << 4), scale, zero, size, q.shape, **options)


def _exact(weight: Any) -> torch.Tensor:
    """Each s q + z in float64, then float32, from the bytes, one at a time."""
    rows, half = weight.qdata.shape
    scale, zero = weight.scale.double().numpy(), weight.zero_point.double().numpy()
    octets = weight.qdata.numpy().view(np.uint8)
    found = np.empty((rows, 2 * half))
    for n in range(rows):
        for k in range(2 * half):
            q = int(octets[n, k // 2]) >> 4 * (k % 2) & 15
            g = k // weight.block_size[1]
            found[n, k] = scale[g, n] * (q - 16 if q > 7 else q) + zero[g, n]
    return torch.from_numpy(found).float()


@pytest.mark.parametrize("flatten", [_flat, _old])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "group_size"), [((5, 96), 32), ((3, 80), 80), ((1, 256), 16), ((7, 64), 64)])
def test_half_bytes(shape: tuple[int, int], group_size: int, dtype: torch.dtype, flatten: Any) -> None:
    weight = _mslk((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype), group_size)
    for octets in (weight.qdata, weight.qdata.view(torch.uint8)):
        weight.qdata = octets
        q = _read(weight, flatten)
        assert str(q.scheme) == f"w4g{group_size}f-fp32"
        assert torch.equal(q.dequantize(), _exact(weight))
        assert torch.equal(q.dequantize(dtype), _exact(weight).to(dtype))


def test_half_bytes_with_a_shorter_last_group() -> None:
    weight = _int4(
        torch.randint(-8, 8, (3, 40), dtype=torch.int8), torch.rand(2, 3).half(), torch.ones(2, 3).half(), 32
    )
    q = _read(weight)
    assert q.scale.shape == (2, 3)
    assert torch.equal(q.dequantize(), _exact(weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_no_model_of_16_bits_is_refused(dtype: torch.dtype) -> None:
    """A zero computed from 16-bit weights is never so small that z - 8 s would be rounded."""
    w = (torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    w[0] = torch.linspace(-8, 7, 4096) / 128  # whose zeros are nought, or as near as rounding leaves it
    for group_size in (32, 128):
        assert str(_read(_mslk(w, group_size)).scheme) == f"w4g{group_size}f-fp32"


def test_half_bytes_without_zeros() -> None:
    q = torch.randint(-8, 8, (3, 64), dtype=torch.int8)
    for dtype in DTYPES:
        weight = _int4(q, torch.rand(2, 3).to(dtype), torch.zeros(2, 3).to(dtype))
        assert _read(weight).scheme.value_map == "symmetric"
        assert torch.equal(_read(weight).dequantize(), _exact(weight))
    weight = _int4(q, torch.ones(2, 3).half(), torch.tensor([[0.0] * 3, [0, 0, 1]]).half())
    assert _read(weight).scheme.value_map == "offset"
    assert torch.equal(_read(weight).dequantize(), _exact(weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_zeros_of_any_size_are_exact_or_refused(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 1)
    read = 0
    for exponent in range(-24, 15):
        scale, zero = (torch.randn(1, 1, generator=generator) for _ in range(2))
        weight = _int4(q, scale.to(dtype), (zero * 2.0**exponent).to(dtype))
        try:
            found = _read(weight).dequantize()
        except ValueError as error:
            assert "zero_point - 8 scale, of group 0, row 0, is not exact" in str(error)  # noqa: PT017
            continue
        read += 1
        assert torch.equal(found, _exact(weight))
    assert 25 <= read < 39
    # Lost in float64 already, on either side.
    for s, z in ((1.0, 1e-30), (1e-30, 1.0), (3e37, 3e37)):  # and 15 s beyond float32, where 8 s is not
        with pytest.raises(ValueError, match="is not exact in float32"):
            _read(_int4(q, torch.tensor([[s]]).bfloat16(), torch.tensor([[z]]).bfloat16()))


def test_a_file(tmp_path: pathlib.Path) -> None:
    weight = _quantized(Int8WeightOnlyConfig(granularity=PerGroup(32)), torch.bfloat16)
    tensors, metadata = _flat(weight)
    save_file(tensors, tmp_path / "f.safetensors", {**metadata, "format": "pt", "a.b": "someone else's"})
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        reader = reading.reader(CONFIG, file.metadata())
        parts = _own(reader, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        assert torch.equal(reader.decode("m", parts).dequantize(), weight.dequantize(torch.float32))


def test_other_classes_are_refused_by_name() -> None:
    octets = torch.zeros(1, 1, 32, 4, dtype=torch.int32)
    tiles = Int4TilePackedTo4dTensor(octets, torch.zeros(1, 8, 2), [1, 128], (8, 128))
    with pytest.raises(ValueError, match="class Int4TilePackedTo4dTensor are not read; those that are: Int4Tensor, I"):
        _read(tiles)
    q, ones = torch.zeros(3, 32, dtype=torch.int8), torch.ones(1, 3).half()
    with pytest.raises(ValueError, match=r"activation_dtype must be None or .*float8_e4m3fn"):
        _read(_int4(q, ones, ones, activation_dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="Int4Tensor with act_pre_scale is not read"):
        _read(_int4(q, ones, ones, act_pre_scale=ones))
    with pytest.raises(TypeError, match="scale must be float16, bfloat16, got float32"):
        _read(_int4(q, ones.float(), ones.float()))
    tensors, metadata = _flat(_int4(q, ones, ones))
    with pytest.raises(ValueError, match=r"experts\.up is quantized \(Int4Tensor\); only tensors called M\.weight"):
        reading.reader(CONFIG, {**metadata, "experts.up": metadata["m.weight"]})
    with pytest.raises(ValueError, match="metadata has no 'tensor_names'"):
        reading.reader(CONFIG, {"format": "pt"})
    with pytest.raises(ValueError, match="quant_method must be one of 'torchao', got 'hqq'"):
        reading.reader({"quant_method": "hqq"}, metadata)
    with pytest.raises(ValueError, match="some entries of the metadata have '_tensor_data_names'"):
        reading.reader(CONFIG, {**metadata, "n.weight": '{"_type": "Int8Tensor"}'})
    with pytest.raises(ValueError, match=r"the files' metadata has no entry 'other\.weight'"):
        reading.reader(CONFIG, metadata).decode("other", {})


def _made(kind: str) -> tuple[Parts, dict[str, Any]]:
    if kind == "dynamic":
        weight = _quantized(Int8DynamicActivationInt8WeightConfig(), torch.float32, (4, 64))
    elif kind == "static":
        static = (torch.tensor([[0.03]]), torch.tensor([[-5]], dtype=torch.int8), PerTensor(), MappingType.ASYMMETRIC)
        weight = _quantized(Int8StaticActivationInt8WeightConfig(*static), torch.float32, (4, 64))
    elif kind == "intx":
        config = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
        weight = _quantized(config, torch.float32, (4, 64))
    elif kind == "Int4Tensor":
        weight = _mslk(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half(), 32)
    elif kind == "Int8Tensor":
        weight = _quantized(Int8WeightOnlyConfig(granularity=PerGroup(32)), torch.float32, (4, 64))
    else:
        weight = _quantized(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), torch.float32, (4, 64))
    tensors, metadata = _flat(weight)
    parts = {name.removeprefix("m._weight_"): t for name, t in tensors.items() if name != "m.bias"}
    return parts, json.loads(metadata["m.weight"])


KINDS = ("Int4Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
INPUTS = ("dynamic", "static", "intx")  # of the last two, with quantized inputs
WHOLE = {kind: _made(kind) for kind in KINDS + INPUTS}


def _decode(parts: Parts, entry: Any) -> QTensor:
    metadata = {"tensor_names": "[]", "m.weight": json.dumps(entry)}
    return reading.reader(CONFIG, metadata).decode("m", {f"_weight_{name}": t for name, t in parts.items()})


@pytest.mark.parametrize(
    ("kind", "parts", "data", "message"),
    [
        (0, {"qdata": torch.zeros(4, 32)}, {}, "qdata must be int8, uint8, got float32"),
        (0, {"qdata": torch.zeros(4, 4, 8, dtype=torch.int8)}, {}, r"qdata must be 2-D, got shape \(4, 4, 8\)"),
        (
            0,
            {"qdata": torch.zeros(4, 16, dtype=torch.int8)},
            {},
            r"shape must be \[4, 32\], as qdata says",
        ),
        (0, {}, {"shape": None}, r"shape must be \[4, 64\], as qdata says, got None"),
        (0, {}, {"block_size": [1, 16]}, r"scale must have shape \(4, 4\), got \(2, 4\)"),
        (0, {}, {"block_size": [4, 64]}, r"block_size must be \[1, size of a group\], got \[4, 64\]"),
        (0, {}, {"block_size": [1, True]}, "block_size must be two positive whole numbers"),
        (0, {}, {"block_size": [1, 0]}, r"block_size must be two positive whole numbers, got \[1, 0\]"),
        (0, {}, {"block_size": [1, 32.0]}, "block_size must be two positive whole numbers"),
        (0, {}, {"block_size": None}, "block_size must be two positive whole numbers, got None"),
        (0, {"scale": None}, {}, "there is no tensor 'scale'"),
        (0, {"zero_point": None}, {}, "there is no tensor 'zero_point'"),
        (0, {"zero_point": torch.zeros(2, 4)}, {}, "zero_point must be float16, got float32"),
        (0, {"zero_point": torch.full((2, 4), math.nan).half()}, {}, "the zero_point of group 0, row 0 is NaN"),
        (0, {"scale": torch.full((2, 4), math.inf).half()}, {}, "the scale of group 0, row 0 is NaN or infinite"),
        (1, {"qdata": torch.zeros(4, 64, dtype=torch.uint8)}, {}, "qdata must be int8, got uint8"),
        (1, {"qdata": torch.zeros(0, 64, dtype=torch.int8)}, {}, "qdata must not be empty"),
        (1, {"scale": torch.zeros(2, 4)}, {}, r"scale must have shape \(4, 2\), got \(2, 4\)"),
        (1, {"scale": torch.zeros(4, 2).double()}, {}, "scale must be float16, bfloat16, float32, got float64"),
        (1, {"scale": torch.full((4, 2), math.nan)}, {}, "the scale of group 0, row 0 is NaN or infinite"),
        (1, {"zero_point": torch.zeros(4, 2)}, {}, "zero_point must be int8, uint8, .*, got float32"),
        (1, {"zero_point": torch.full((4, 2), 128)}, {}, "zero_point must be from -128 to 127, got 128 to 128"),
        (0, {"act_quant_scale": torch.ones(1)}, {}, "Int4Tensor with act_quant_scale is not read"),
        (1, {"act_pre_scale": torch.ones(1)}, {}, "Int8Tensor with act_pre_scale is not read"),
        (1, {"act_quant_scale": torch.ones(1)}, {}, "there is 'act_quant_scale', and the configuration has no static"),
        (1, {"act_quant_zero_point": torch.ones(1)}, {}, "there is 'act_quant_zero_point', and the configuration has"),
        (2, {"act_quant_scale": torch.ones(1)}, {}, "IntxUnpackedToInt8Tensor with act_quant_scale is not read"),
        (
            1,
            {},
            {"block_size": [2, 32]},
            r"block_size must be .* or \[N, K\], got \[2, 32\] for \(4, 64\)",
        ),
        (1, {}, {"block_size": [1, 48]}, r"block_size must be \[1, a divisor of K\]"),
        (
            1,
            {},
            {"act_quant_kwargs": {}},
            r"act_quant_kwargs must be None or of class QuantizeTensorToInt8.*, got \{\}",
        ),
        (
            1,
            {},
            {"act_quant_kwargs": [1]},
            r"act_quant_kwargs must be None or of class QuantizeTensorToInt8.*, got \[1\]",
        ),
        (2, {}, {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}}, "target_dtype must be int1 to int8"),
        (2, {}, {"target_dtype": "int4"}, "target_dtype must be int1 to int8, got 'int4'"),
        (2, {}, {"target_dtype": {"_data": "int4\n"}}, "target_dtype must be int1 to int8"),
        (
            2,
            {},
            {"activation_quantization": "int8_sym_per_token"},
            "activation_quantization must be None or int8_asym_p",
        ),
        (
            2,
            {},
            {"activation_quantization": True},
            "activation_quantization must be None or int8_asym_per_token, got Tr",
        ),
        (2, {"qdata": torch.full((4, 64), 8, dtype=torch.int8)}, {}, "qdata must be from -8 to 7, got 8 to 8"),
        (2, {"zero_point": None}, {}, "there is no tensor 'zero_point'"),
        (2, {"zero_point": torch.full((4, 2), -9)}, {}, "zero_point must be from -8 to 7, got -9 to -9"),
    ],
)
def test_what_is_wrong_is_named(kind: int, parts: dict[str, Any], data: dict[str, Any], message: str) -> None:
    whole, entry = WHOLE[KINDS[kind]]
    changed = {name: tensor for name, tensor in {**whole, **parts}.items() if tensor is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        _decode(changed, {**entry, "_data": {**entry["_data"], **data}})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"_type": 3}', "[" * 10**5, "9" * 10**5])
def test_metadata_of_no_use(text: str) -> None:
    with pytest.raises(ValueError, match=r"no entry 'm\.weight' that says what it is"):
        reading.reader(CONFIG, {"tensor_names": "[]", "m.weight": text}).decode("m", {})
    with pytest.raises(ValueError, match="_data in the metadata must be an object, got 7"):
        _decode({}, {"_type": "Int8Tensor", "_data": 7, "_tensor_data_names": []})


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS + INPUTS))
    parts, entry = dict(WHOLE[kind][0]), json.loads(json.dumps(WHOLE[kind][1]))
    dtypes = st.sampled_from([*DTYPES, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64])
    small = st.integers(-3, 80) | st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
    for _ in range(data.draw(st.integers(1, 3))):
        names = ["qdata", "scale", "zero_point", "act_pre_scale", "act_quant_scale", "act_quant_zero_point"]
        name = data.draw(st.sampled_from(names))
        how = data.draw(st.sampled_from(["drop", "new", "cast", "octet", "reshape", "field"]))
        if how == "field":
            said = entry["_data"]
            for _ in range(data.draw(st.integers(0, 3))):  # down into act_quant_kwargs
                deeper = [value for _, value in sorted(said.items()) if isinstance(value, dict) and value]
                said = data.draw(st.sampled_from(deeper)) if deeper else said
            said[data.draw(st.sampled_from(sorted(said)))] = data.draw(
                small | st.lists(small, max_size=3) | st.dictionaries(st.text(), small)
            )
        elif how == "new" or name not in parts:
            shape = data.draw(st.lists(st.integers(0, 64), max_size=2))
            parts[name] = torch.zeros(shape).to(data.draw(dtypes))
        elif how == "drop":
            parts.pop(name)
        elif how == "cast":
            parts[name] = parts[name].to(data.draw(dtypes))
        elif how == "reshape":
            parts[name] = parts[name].reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])))
        else:
            raw = parts[name].contiguous().reshape(-1).clone()
            octets = raw.view(torch.uint8)
            if octets.numel():
                octets[data.draw(st.integers(0, octets.numel() - 1))] = data.draw(st.integers(0, 255))
            parts[name] = raw.reshape(parts[name].shape)
    try:
        q = _decode(parts, entry)
    except (ValueError, TypeError):
        return
    assert isinstance(q, QTensor)
    assert not q.dequantize().isnan().any()
    own = entry["_data"]
    how = own.get("act_quant_kwargs") if entry["_type"] == "Int8Tensor" else own.get("activation_quantization")
    assert (q.scheme.activations is None) == (how is None)
    assert (q.activation is None) == ("act_quant_scale" not in parts)
    assert (torch.ones(2, q.shape[1]) @ q.T).shape == (2, q.shape[0])
