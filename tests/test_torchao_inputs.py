"""torchao with quantized inputs: codes and products beside those of its own linear, on a CPU."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import qkernels
from qkernels import QTensor, packing
from tests.test_torchao import WHOLE, _decode, _quantized, _read

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8StaticActivationInt8WeightConfig,
        Int8Tensor,
        MappingType,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

SYMMETRIC, AFFINE = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
NEAR_A_TIE = 2.0**-15  # of a step


def _inputs(*shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * spread


def _static(mapping: Any, zero: int = -11, granularity: Any = None) -> Any:
    """A configuration of static inputs of three dimensions, 0.04 a step."""
    zeros = None if mapping is SYMMETRIC else torch.tensor([[[zero]]], dtype=torch.int8)
    return Int8StaticActivationInt8WeightConfig(
        torch.tensor([[[0.04]]]), zeros, granularity or [PerTensor(), PerRow()], mapping
    )


def _codes(x: Tensor, q: QTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    found = qkernels.quantize_activations(x, q.scheme, activation=q.activation)
    flat = found.codes.reshape(found.scale.numel(), -1)
    code = packing.unpack_activations(flat, q.scheme.bits, x.shape[-1]).reshape(x.shape)
    return code.float(), found.scale, found.zero, found.dequantize()


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (Int8DynamicActivationInt8WeightConfig(act_mapping_type=AFFINE), "w8cs-fp32-a8"),
        (
            Int8DynamicActivationInt8WeightConfig(act_mapping_type=AFFINE, granularity=[PerRow(), PerTensor()]),
            "w8ts-fp32-a8",
        ),
        (_static(SYMMETRIC), "w8cs-fp32-a8ts"),
        (_static(AFFINE), "w8cs-fp32-a8t"),
        (_static(AFFINE, granularity=PerTensor()), "w8ts-fp32-a8t"),
        *(
            (Int8DynamicActivationIntxWeightConfig(dtype, granularity, mapping), f"w{bits}{unit}{suffix}-fp32-a8")
            for bits, dtype in ((4, torch.int4), (8, torch.int8))
            for unit, granularity in (("g32", PerGroup(32)), ("c", PerAxis(0)))
            for suffix, mapping in (("s", SYMMETRIC), ("", AFFINE))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_products_are_torchao_s(config: Any, scheme: str) -> None:
    weight = _quantized(config, torch.float32, (7, 96))
    q = _read(weight)
    assert str(q.scheme) == scheme
    assert torch.equal(q.dequantize(), weight.dequantize())
    x = _inputs(3, 5, 96)
    wanted = linear(x, weight)
    assert not torch.allclose(wanted, x @ weight.dequantize().T, atol=1e-4)
    torch.testing.assert_close(linear(x, q), wanted, rtol=1e-5, atol=2e-6)
    if q.activation is not None:
        assert q.activation.tolist() == [torch.tensor(0.04).item(), -11 if scheme.endswith("t") else 0]


@pytest.mark.parametrize(("granularity", "unit"), [(PerRow(), "c"), ([PerRow(), PerTensor()], "t")])
def test_dynamic_symmetric_inputs(granularity: Any, unit: str) -> None:
    """Scales are absmax / 127 and not torchao's absmax / 127.5; no product is further off than half a step lets it."""
    weight = _quantized(Int8DynamicActivationInt8WeightConfig(granularity=granularity), torch.float32, (7, 96))
    q = _read(weight)
    assert str(q.scheme) == f"w8{unit}s-fp32-a8s"
    assert torch.equal(q.dequantize(), weight.dequantize())
    x = _inputs(3, 50, 96)
    theirs = Int8Tensor.from_hp(x, PerRow())
    assert torch.equal(theirs.scale[..., 0], x.abs().amax(2) / 127.5)
    assert theirs.qdata.min() == -128
    code, scale, _, values = _codes(x, q)
    assert torch.equal(scale, x.abs().amax(2) / 127)
    assert (code.min(), code.max()) == (-127, 127)
    assert ((values - x).abs() <= scale[..., None] * (0.5 + NEAR_A_TIE)).all()
    w = q.dequantize()
    torch.testing.assert_close(linear(x, q), values @ w.T, rtol=1e-5, atol=2e-6)
    bound = x.abs().amax(2, keepdim=True) / 254 * w.abs().sum(1) * 1.001
    for product in (linear(x, q), linear(x, weight)):
        assert ((product - x @ w.T).abs() <= bound).all()


@pytest.mark.parametrize("config", [Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig])
def test_dynamic_affine_codes_are_torchao_s(config: Any) -> None:
    """Scales, zeros and codes, in float32; but for tokens below the least scale of an Int8Tensor."""
    is_intx = config is Int8DynamicActivationIntxWeightConfig
    q = _read(_quantized(config(act_mapping_type=AFFINE), torch.float32, (7, 96)))
    x = _inputs(100, 96) * torch.logspace(-4, 6, 100)[:, None]
    x[::7] += 3 * x[::7].amax(1, keepdim=True)  # of one sign
    code, scale, zero, values = _codes(x, q)
    theirs = Int8Tensor.from_hp(x, PerRow(), AFFINE)
    assert zero is not None
    assert torch.equal(scale, theirs.scale[:, 0])
    assert torch.equal(zero, theirs.zero_point[:, 0])
    steps = x.double() / scale[:, None]
    same = ((steps - steps.floor()) - 0.5).abs() >= NEAR_A_TIE
    assert same.float().mean() > 0.999
    assert torch.equal(code[same], theirs.qdata.float()[same])
    dequantized = intx._apply_int8_act_asym_per_token_quant_dequant(x) if is_intx else theirs.dequantize()
    assert torch.equal(values[same], dequantized[same])


def test_tokens_of_tiny_values_are_finer_here() -> None:
    q = _read(_quantized(Int8DynamicActivationInt8WeightConfig(), torch.float32))
    x = _inputs(5, 96, spread=1e-7)
    theirs = Int8Tensor.from_hp(x, PerRow())
    assert (theirs.scale == 2.0**-23).all()
    assert theirs.qdata.abs().max() < 10
    code, _, _, values = _codes(x, q)
    assert (code.abs().amax(1) == 127).all()
    assert (values - x).norm() < (theirs.dequantize() - x).norm() / 10


@pytest.mark.parametrize("mapping", [SYMMETRIC, AFFINE])
def test_static_codes_are_torchao_s(mapping: Any) -> None:
    """But for the lowest, -128, of symmetric ones; ties of exact steps go to the code that is even less its zero."""
    q = _read(_quantized(_static(mapping), torch.float32, (7, 96)))
    x = _inputs(3, 50, 96, spread=4.0)
    zero = None if mapping is SYMMETRIC else torch.tensor([[[-11]]], dtype=torch.int8)
    theirs = Int8Tensor.from_hp(x, PerTensor(), mapping, torch.tensor([[[0.04]]]), zero).qdata.float()
    assert theirs.min() == -128
    code = _codes(x, q)[0]
    steps = x.double() / torch.tensor(0.04).double()
    same = ((steps - steps.floor()) - 0.5).abs() >= NEAR_A_TIE
    assert torch.equal(code[same], (theirs.clamp(min=-127.0) if mapping is SYMMETRIC else theirs)[same])


def test_static_ties_are_torchao_s() -> None:
    """Steps of a power of two are exact, and both round before they add the zero, whatever that is."""
    parts, entry = WHOLE["static"]
    x = torch.arange(-32, 32)[None] * 0.125
    scale = torch.tensor([[0.25]])
    for odd_or_even in (-3, 0, 4, 127):
        zero = torch.tensor([[odd_or_even]], dtype=torch.int8)
        theirs = Int8Tensor.from_hp(x, PerTensor(), AFFINE, scale, zero)
        q = _decode({**parts, "act_quant_scale": scale, "act_quant_zero_point": zero}, entry)
        code, _, _, values = _codes(x, q)
        assert torch.equal(code, theirs.qdata.float())
        assert torch.equal(values, theirs.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_static_parts_of_any_dtype_and_shape(dtype: torch.dtype) -> None:
    parts, entry = WHOLE["static"]
    for shape in ((), (1,), (1, 1, 1)):
        for zero_dtype in (torch.int8, torch.int32, torch.int64):
            scale, zero = torch.tensor(0.3).to(dtype), torch.tensor(-128).to(zero_dtype)
            held = {"act_quant_scale": scale.reshape(shape), "act_quant_zero_point": zero.reshape(shape)}
            found = _decode({**parts, **held}, entry).activation
            assert found is not None
            assert found.tolist() == [scale.double().item(), -128]


def _row(**changes: Any) -> dict[str, Any]:
    """act_quant_kwargs of dynamic inputs."""
    said = {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    }
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": {**said, **changes}}


def test_what_is_left_out_is_torchao_s_default() -> None:
    parts, entry = WHOLE["dynamic"]
    kwargs = _row()
    assert entry["_data"]["act_quant_kwargs"] == kwargs
    del kwargs["_data"]["mapping_type"], kwargs["_data"]["reduce_range"]
    found = _decode(parts, {**entry, "_data": {**entry["_data"], "act_quant_kwargs": kwargs}})
    assert str(found.scheme) == "w8cs-fp32-a8s"
    without = {name: part for name, part in parts.items() if name != "zero_point"}
    assert str(_decode(without, entry).scheme) == "w8cs-fp32-a8s"


PER_TENSOR = {"_type": "PerTensor", "_data": {}}


@pytest.mark.parametrize(
    ("kind", "parts", "data", "message"),
    [
        ("dynamic", {}, {"act_quant_kwargs": _row(granularity=PER_TENSOR)}, "must be PerRow where there is no"),
        (
            "dynamic",
            {},
            {"act_quant_kwargs": _row(granularity={"_type": "PerRow", "_data": {"dim": 1}})},
            "inputs must be PerRow where .*'dim': 1",
        ),
        ("dynamic", {}, {"act_quant_kwargs": _row(granularity=None)}, "must be PerRow .* got None"),
        ("dynamic", {}, {"act_quant_kwargs": _row(reduce_range=True)}, "reduce_range must be None or False, got True"),
        (
            "dynamic",
            {},
            {"act_quant_kwargs": _row(mapping_type={"_type": "MappingType", "_data": "SYMMETRIC_NO_CLIPPING_ERR"})},
            "mapping_type must be None or .*, got .*SYMMETRIC_NO_CLIPPING_ERR",
        ),
        ("dynamic", {}, {"act_quant_kwargs": _row(extra=1)}, "act_quant_kwargs has 'extra', which is not known"),
        (
            "dynamic",
            {},
            {"act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {}}},
            "act_quant_kwargs must be None or of class QuantizeTensorToInt8Kwargs, got .*Float8",
        ),
        ("dynamic", {"zero_point": torch.ones(4, 1).to(torch.int8)}, {}, "zero_point must be 0 throughout"),
        (
            "dynamic",
            {"scale": torch.ones(4, 2), "zero_point": None},
            {"block_size": [1, 32]},
            r"block_size must be \[1, K\] or \[N, K\] where inputs are quantized, got \[1, 32\]",
        ),
        ("dynamic", {"act_quant_scale": torch.ones(1, 1)}, {}, "must be PerTensor where there is 'act"),
        ("dynamic", {"act_quant_zero_point": torch.ones(1, 1)}, {}, "there is 'act_quant_zero_point', and"),
        ("dynamic", {"act_pre_scale": torch.ones(1)}, {}, "Int8Tensor with act_pre_scale is not read"),
        ("static", {"act_quant_scale": None}, {}, "must be PerRow where there is no 'act_quant"),
        ("static", {"act_quant_zero_point": None}, {}, "there is no tensor 'act_quant_zero_point'"),
        ("static", {"act_quant_scale": torch.ones(2, 1)}, {}, "act_quant_scale must be one number"),
        ("static", {"act_quant_scale": torch.zeros(1)}, {}, r"act_quant_scale must be from 2\^-119 to 2\^119, got 0"),
        ("static", {"act_quant_scale": torch.tensor([math.nan])}, {}, "act_quant_scale must be from .*, got nan"),
        ("static", {"act_quant_scale": torch.ones(1).double()}, {}, "act_quant_scale must be float16, .* got float64"),
        ("static", {"act_quant_zero_point": torch.tensor([128])}, {}, "must be from -128 to 127, got 128"),
        ("static", {"act_quant_zero_point": torch.tensor([-129])}, {}, "act_quant_zero_point must be from -128 to 127"),
        ("static", {"act_quant_zero_point": torch.ones(1)}, {}, "act_quant_zero_point must be int8, .*, got float32"),
        (
            "static",
            {},
            {"act_quant_kwargs": _row(granularity=PER_TENSOR)},
            "act_quant_zero_point must be 0, or not there, for symmetric activations, got -5",
        ),
        ("intx", {}, {"target_dtype": {"_type": "torch.dtype", "_data": "int5"}}, "must be int4 or int8 .* got int5"),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(kind: str, parts: dict[str, Any], data: dict[str, Any], message: str) -> None:
    whole, entry = WHOLE[kind]
    changed = {name: tensor for name, tensor in {**whole, **parts}.items() if tensor is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        _decode(changed, {**entry, "_data": {**entry["_data"], **data}})


def test_per_tensor_inputs_of_torchao_are_refused() -> None:
    """One scale for all that comes in a call."""
    weight = _quantized(Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()), torch.float32)
    with pytest.raises(ValueError, match=r"the granularity of inputs must be PerRow where there is no .*PerTensor"):
        _read(weight)
    with pytest.raises(ValueError, match="reduce_range must be None or False, got True"):
        _read(_quantized(Int8DynamicActivationInt8WeightConfig(reduce_range=True), torch.float32))
    with pytest.raises(ValueError, match="target_dtype must be int4 or int8 where inputs are quantized, got int3"):
        _read(_quantized(Int8DynamicActivationIntxWeightConfig(torch.int3), torch.float32))
