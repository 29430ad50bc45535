"""compressed-tensors with quantized inputs: schemes, and codes of inputs beside those of the package's own forward."""

from __future__ import annotations

import math
import pathlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import Activations, QTensor, packing
from qkernels.formats.compressed_tensors import reader
from tests import fake_format
from tests.test_compressed_tensors import (
    DTYPES,
    FORMATS,
    INPUTS,
    PACKED,
    STRATEGIES,
    _as_of_0_17,
    _assert_same,
    _config,
    _decode,
    _static,
    _stored,
    _wanted,
    _with_inputs,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStatus,
        initialize_module_for_quantization,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as package_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

NEAR_A_TIE = 2.0**-15  # of a step: where quotients, sums and products in float32 may fall on another side


def _args(kind: str) -> Any:
    return QuantizationArgs(num_bits=8, **INPUTS[kind])


def _weight(kind: str, in_features: int = 64, **static: Any) -> QTensor:
    """A weight that was read, for its scheme and static range."""
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    stored = {**_stored(config, 5, in_features, torch.float32), **_static(kind, **static)}
    return _decode(_with_inputs(config, kind), stored)


def _codes(x: Tensor, q: QTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(code, scale, zero, values that they stand for) of x (..., K), as the weight's scheme has them."""
    found = qkernels.quantize_activations(x, q.scheme, activation=q.activation)
    flat = found.codes.reshape(found.scale.numel(), -1)
    code = packing.unpack_activations(flat, q.scheme.bits, x.shape[-1]).reshape(x.shape)
    return code.float(), found.scale, found.zero, found.dequantize()


def write_folder(folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint in three files: a module with dynamic inputs, and one with static ones and a bias."""
    plain = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    own = plain["config_groups"]["group_0"]
    config = {**plain, "config_groups": {"a": {**own, "targets": ["re:^static$"]}, "b": own}}
    config = _with_inputs(_with_inputs(config, "a8t", "a"), "a8s", "b")
    stored = {"static.bias": torch.ones(6)}
    for module, kind in (("static", "a8t"), ("dynamic", "a8s")):
        parts = {**_stored(plain, 6, 64, torch.float16), **_static(kind, 0.25, dtype=torch.bfloat16)}
        stored |= {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    names = sorted(stored)
    files = {f"model-{i}.safetensors": {name: stored[name] for name in names[i::3]} for i in range(3)}
    return fake_format.write(folder, files, {"quantization_config": config})


# ---- what is read ----


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_what_they_are_without(
    format: str,  # noqa: A002 - the field's name
    bits: int,
    strategy: str,
    symmetric: bool,
    kind: str,
) -> None:
    plain = _config(format, num_bits=bits, symmetric=symmetric, **STRATEGIES[strategy])
    config = _with_inputs(plain, kind)
    for dtype in DTYPES:
        stored = _stored(plain, 37, 160, dtype)
        found = _decode(config, {**stored, **_static(kind, dtype=dtype)})
        _assert_same(found, _wanted(plain, stored))
        assert str(found.scheme) == f"{_decode(plain, stored).scheme}-{kind}"
        assert found.scheme.activations == Activations("t" in kind, kind.endswith("s"))
        if "t" not in kind:
            assert found.activation is None
            continue
        assert found.activation is not None
        scale = torch.tensor(0.03).to(dtype).double().item()
        assert found.activation.dtype is torch.float32
        assert found.activation.double().tolist() == [scale, 0 if kind == "a8ts" else -5]


def test_the_usual_ones() -> None:
    """What llm-compressor's W8A8 and W4A8 write."""
    old = {"actorder": None, "block_structure": None, "group_size": None, "observer": None, "observer_kwargs": {}}
    w8 = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    stored = _stored(w8, 37, 160, torch.bfloat16)
    assert str(_decode(_with_inputs(w8, "a8s", **old), stored).scheme) == "w8cs-bf16-a8s"
    new = {"observer": "memoryless_minmax", "scale_dtype": None, "zp_dtype": None}
    assert str(_decode(_with_inputs(w8, "a8s", **new), stored).scheme) == "w8cs-bf16-a8s"
    w4 = _config(PACKED, num_bits=4, **STRATEGIES["group"])
    assert str(_decode(_with_inputs(w4, "a8s"), _stored(w4, 37, 160, torch.float16)).scheme) == "w4g32s-a8s"
    static = {"observer": "minmax", "scale_dtype": "torch.bfloat16", "zp_dtype": "torch.int8", "strategy": None}
    held = {**stored, **_static("a8t")}
    assert str(_decode(_with_inputs(w8, "a8t", **static), held).scheme) == "w8cs-bf16-a8t"
    dynamic = _with_inputs(w8, "a8", zp_dtype="torch.int8")
    assert str(_decode(dynamic, stored).scheme) == "w8cs-bf16-a8"


def test_the_package_s_presets() -> None:
    for preset, scheme in (("W8A8", "w8cs-a8s"), ("INT8", "w8cs-a8s"), ("W4A8", "w4g128s-a8s")):
        from compressed_tensors.quantization import preset_name_to_scheme

        made = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
        plain = _config("int-quantized")
        plain["config_groups"] = {"group_0": {**made, "input_activations": None}}
        config = {**plain, "config_groups": {"group_0": made}}
        assert str(_decode(config, _stored(plain, 37, 256, torch.float16)).scheme) == scheme


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_one_number_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    stored = {**_stored(config, 5, 64, torch.float16), **_static("a8t", 0.3, 127, dtype)}
    stored |= {name: stored[name].reshape(shape) for name in ("input_scale", "input_zero_point")}
    found = _decode(_with_inputs(config, "a8t"), stored).activation
    assert found is not None
    assert torch.equal(found, torch.tensor([torch.tensor(0.3).to(dtype).float(), 127.0]))


def test_zeros_of_symmetric_inputs_may_be_there_if_they_are_0() -> None:
    config = _with_inputs(_config("int-quantized", num_bits=8, **STRATEGIES["channel"]), "a8ts")
    stored = {**_stored(config, 5, 64, torch.float16), **_static("a8t", zero=0)}
    found = _decode(config, stored).activation
    assert found is not None
    assert found[1] == 0
    with pytest.raises(ValueError, match="input_zero_point must be 0, or not there, for symmetric activations, got 1"):
        _decode(config, {**stored, "input_zero_point": torch.tensor([1], dtype=torch.int8)})


@pytest.mark.parametrize("kind", INPUTS)
def test_input_features_in_groups_of_their_own(kind: str) -> None:
    """With act-order, too: a token's scale is that of all its features, in whatever order."""
    plain = _config("int-quantized", num_bits=8, **STRATEGIES["group"])
    runs = {**_stored(plain, 37, 160, torch.float32), **_static(kind)}
    g_idx = (torch.arange(160) // 32)[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
    place = torch.argsort(torch.argsort(g_idx, stable=True))
    config = _with_inputs(plain, kind)
    ordered = _with_inputs(plain, kind)
    entry = ordered["config_groups"]["group_0"]
    entry["weights"] = {**entry["weights"], "actorder": "group"}
    found = _decode(ordered, {**runs, "weight": runs["weight"][:, place], "weight_g_idx": g_idx})
    assert found.order is not None
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x[:, place] @ found.T, x @ _decode(config, runs).T)


# ---- codes beside the package's ----


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    return x.double() / scale.double()


def _near_a_tie(steps: Tensor) -> Tensor:
    return ((steps - steps.floor()) - 0.5).abs() < NEAR_A_TIE


@pytest.mark.parametrize("kind", ["a8ts", "a8t"])
def test_static_codes_are_the_package_s(kind: str) -> None:
    """In float32. Symmetric ones end at -127, the package's at -128; ties aside, there is no other difference."""
    generator = torch.Generator().manual_seed(0)
    below = 0
    for scale, zero in ((0.03, -5), (0.0123, 0), (0.5, 127), (0.011, -128), (3e-4, 1)):
        q = _weight(kind, scale=scale, zero=zero)
        assert q.activation is not None
        x = torch.randn(2, 200, 64, generator=generator) * scale * 70
        z = torch.tensor([zero if kind == "a8t" else 0], dtype=torch.int8)
        beside = (torch.tensor([scale]), z, _args(kind))
        theirs, values = package_quantize(x, *beside), fake_quantize(x, *beside)
        code, _, _, own = _codes(x, q)
        same = ~_near_a_tie(_steps(x, q.activation[0]))
        assert same.float().mean() > 0.999
        assert torch.equal(code[same], theirs.clamp(min=-127.0)[same] if kind == "a8ts" else theirs[same])
        assert (code - theirs).abs().max() <= 1
        lowest = theirs == -128
        below += int(lowest.sum())
        same &= (code == theirs) | (theirs != -128)
        assert torch.equal(own[same], values[same])
        if kind == "a8ts":
            assert (code[lowest] == -127).all()
    assert below > 100


def test_static_ties() -> None:
    """Steps of a power of two are exact: the middle between two codes goes where the docstring says."""
    x = (torch.arange(-300, 300) / 2).reshape(1, -1)[:, :592] * 0.25
    for kind, zeros in (("a8ts", (0,)), ("a8t", (-128, -3, 0, 1, 50, 127))):
        for zero in zeros:
            q = _weight(kind, 592, scale=0.25, zero=zero)
            code, _, _, own = _codes(x, q)
            beside = (torch.tensor([0.25]), torch.tensor([zero], dtype=torch.int8), _args(kind))
            theirs, values = package_quantize(x, *beside), fake_quantize(x, *beside)
            steps = _steps(x, torch.tensor(0.25))
            assert torch.equal(
                code.double(), (torch.round(steps) + zero).clamp(-127.0 if kind == "a8ts" else -128.0, 127)
            )
            inside = (theirs > -127) & (theirs < 127)
            tie = (steps % 1 == 0.5) & inside
            assert tie.sum() > 100
            if zero % 2 == 0:
                assert torch.equal(code[inside], theirs[inside])
                assert torch.equal(own[inside], values[inside])
            else:  # the package rounds the sum with an odd zero
                assert torch.equal((code - theirs).abs() == 1, tie | ((code != theirs) & ~inside))
            assert (theirs % 2 == 0)[tie].all()
            assert ((code - zero) % 2 == 0)[tie].all()


def test_dynamic_affine_codes_are_the_package_s() -> None:
    """Scales, zeros and codes of tokens, in float32, of inputs of three dimensions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 100, 64, generator=generator) * torch.logspace(-6, 6, 100)[:, None]
    x[0] += 3 * x[0].amax(1, keepdim=True).abs()  # of one sign: 0 is a code all the same
    scale, zero = compute_dynamic_scales_and_zp(x, _args("a8"), torch.nn.Module())
    code, own_scale, own_zero, own = _codes(x, _weight("a8"))
    assert torch.equal(own_scale, scale[..., 0])
    assert own_zero is not None
    assert torch.equal(own_zero, zero[..., 0])
    assert len(own_zero.unique()) > 50
    assert own_zero.min() == -128
    theirs = package_quantize(x, scale, zero, _args("a8"))
    same = ~_near_a_tie(_steps(x, scale))
    assert same.float().mean() > 0.999
    assert torch.equal(code[same], theirs[same])
    assert (code - theirs).abs().max() <= 1
    assert torch.equal(own[same], fake_quantize(x, scale, zero, _args("a8"))[same])


def test_dynamic_symmetric_scales_are_not_the_package_s() -> None:
    """absmax / 127, where the package has absmax / 127.5 and a code more; neither is further off than half a step."""
    x = torch.randn(3, 100, 64, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(2)
    scale, zero = compute_dynamic_scales_and_zp(x, _args("a8s"), torch.nn.Module())
    assert torch.equal(scale[..., 0], largest / 127.5)
    theirs = package_quantize(x, scale, zero, _args("a8s"))
    assert (theirs.min(), theirs.max()) == (-128, 127)
    code, own_scale, own_zero, own = _codes(x, _weight("a8s"))
    assert own_zero is None
    assert torch.equal(own_scale, largest / 127)
    assert (code.min(), code.max()) == (-127, 127)
    assert torch.equal(code, torch.round(x * (127 / largest)[..., None]))
    values = fake_quantize(x, scale, zero, _args("a8s"))
    for found, step in ((own, own_scale), (values, scale[..., 0])):
        assert ((found - x).abs() <= step[..., None] * (0.5 + NEAR_A_TIE)).all()
    assert torch.equal(own.abs().amax(2), largest.div(127).mul(127))


def test_the_package_takes_two_dimensions_for_one_token() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scale, _ = compute_dynamic_scales_and_zp(x, _args("a8s"), torch.nn.Module())
    assert scale.numel() == 1
    assert _codes(x, _weight("a8s"))[1].shape == (5,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["a8ts", "a8t"])
def test_codes_of_16_bit_inputs_are_next_to_the_package_s(kind: str, dtype: torch.dtype) -> None:
    """Which rounds quotients to 16 bits first."""
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = _weight(kind, dtype=dtype)
    zero = torch.tensor([-5 if kind == "a8t" else 0], dtype=torch.int8)
    theirs = package_quantize(x, torch.tensor([0.03]).to(dtype), zero, _args(kind)).float()
    code = _codes(x, q)[0]
    if kind == "a8ts":
        theirs = theirs.clamp(min=-127.0)
    assert (code - theirs).abs().max() == 1
    assert (code != theirs).float().mean() < 0.2


@pytest.mark.parametrize("kind", ["a8ts", "a8t", "a8"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", [PACKED, "int-quantized"])
def test_a_module_s_output_is_the_package_s(form: str, bits: int, kind: str) -> None:
    """A module that the package quantizes, runs and compresses, read as it stores it."""
    torch.manual_seed(0)
    own = {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, symmetric=bits == 8, **own)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=_args(kind), format=form)
    module = torch.nn.Linear(64, 48)
    initialize_module_for_quantization(module, scheme)
    shape = module.weight_scale.shape
    module.weight_scale.data = (torch.rand(shape) + 1) / 2**bits / 4
    if bits == 4:
        module.weight_zero_point.data = torch.randint(-8, 8, shape, dtype=torch.int8)
    if "t" in kind:
        module.input_scale.data.fill_(0.04)  # nothing gets -128
        module.input_zero_point.data.fill_(-17 if kind == "a8t" else 0)
    module.quantization_status = QuantizationStatus.FROZEN
    x = torch.randn(2, 3, 64)
    wanted = module(x)
    plain = torch.nn.functional.linear(x, module.weight, module.bias)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    compress_module(module)
    stored = {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}
    config = {"quant_method": "compressed-tensors", "format": form, "version": "0.20.0"}
    config["config_groups"] = {"group_0": scheme.model_dump(mode="json")}
    made = reader(config, {})
    assert stored.keys() <= {made.marker, *made.parts}
    assert ("input_scale" in stored, "input_zero_point" in stored) == ("t" in kind, kind == "a8t")
    found = torch.nn.functional.linear(x, made.decode("m", stored), module.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---- several groups ----


def test_modules_whose_inputs_differ() -> None:
    """The same weights in each group; what is done to inputs is all that tells them apart."""
    plain = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    own = plain["config_groups"]["group_0"]
    targets = {"a8s": ["re:.*q_proj$"], "a8t": ["lm_head"], "none": ["re:.*down_proj$"], "a8": ["Linear"]}
    config = {**plain, "config_groups": {kind: {**own, "targets": names} for kind, names in targets.items()}}
    for kind in targets.keys() - {"none"}:
        config = _with_inputs(config, kind, kind)
    stored = _stored(plain, 5, 64, torch.float16)
    made = reader(config, {})
    for name, kind in (("0.q_proj", "-a8s"), ("lm_head", "-a8t"), ("1.down_proj", ""), ("up_proj", "-a8")):
        found = made.decode(name, {**stored, **_static(kind)})
        assert str(found.scheme) == f"w8cs{kind}"
        _assert_same(found, _wanted(plain, stored))
    for name in ("0.q_proj", "1.down_proj"):
        with pytest.raises(ValueError, match="there is 'input_scale', and the configuration has no static activations"):
            made.decode(name, {**stored, **_static("a8t")})
    with pytest.raises(ValueError, match="there is no tensor 'input_scale'"):
        made.decode("lm_head", stored)


def test_older_layouts() -> None:
    """Of 4 bits words are the same, and zeros may not be packed."""
    config = _config(num_bits=4, symmetric=False, **STRATEGIES["group"])
    stored = _stored(config, 37, 192, torch.float16)
    found = _decode(_with_inputs(config, "a8s"), _as_of_0_17(config, stored))
    assert str(found.scheme) == "w4g32-a8s"
    _assert_same(found, _wanted(config, stored))


# ---- damage ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": None}, "there is no tensor 'input_scale'"),
        ({"input_zero_point": None}, "there is no tensor 'input_zero_point'"),
        ({"input_scale": torch.ones(2)}, r"input_scale must be one number, got shape \(2,\)"),
        ({"input_scale": torch.ones(0)}, r"input_scale must be one number, got shape \(0,\)"),
        ({"input_scale": torch.ones(1).double()}, "input_scale must be float16, bfloat16, float32, got float64"),
        ({"input_scale": torch.ones(1).int()}, "input_scale must be float16, bfloat16, float32, got int32"),
        ({"input_scale": torch.zeros(1)}, r"input_scale must be from 2\^-119 to 2\^119, got 0"),
        ({"input_scale": -torch.ones(1)}, r"input_scale must be from 2\^-119 to 2\^119, got -1"),
        ({"input_scale": torch.tensor([math.nan])}, r"input_scale must be from 2\^-119 to 2\^119, got nan"),
        ({"input_scale": torch.tensor([math.inf])}, r"input_scale must be from 2\^-119 to 2\^119, got inf"),
        ({"input_scale": torch.tensor([2.0**-120])}, r"input_scale must be from 2\^-119"),
        ({"input_scale": torch.tensor([2.0**120])}, r"input_scale must be from 2\^-119"),
        ({"input_zero_point": torch.zeros(1)}, "input_zero_point must be int8, got float32"),
        ({"input_zero_point": torch.zeros(1).int()}, "input_zero_point must be int8, got int32"),
        ({"input_zero_point": torch.zeros(1, dtype=torch.uint8)}, "input_zero_point must be int8, got uint8"),
        ({"input_zero_point": torch.zeros(2, dtype=torch.int8)}, "input_zero_point must be one number"),
    ],
)
def test_static_parts_that_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    parts = {**_stored(config, 5, 64, torch.float32), **_static("a8t"), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        _decode(_with_inputs(config, "a8t"), {name: part for name, part in parts.items() if part is not None})


def test_the_largest_and_the_smallest_scale() -> None:
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    for scale in (2.0**-119, 2.0**119):
        stored = {**_stored(config, 5, 64, torch.float32), **_static("a8ts", scale)}
        found = _decode(_with_inputs(config, "a8ts"), stored)
        assert found.activation is not None
        assert found.activation[0] == scale
        assert (_codes(torch.full((1, 64), 50 * scale), found)[0] == 50).all()


_READ = r"; read are integers of 8 bits, dynamic with strategy 'token' or static with strategy 'tensor', that meet"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("a8s", {"num_bits": 4}, "num_bits must be one of 8, got 4"),
        ("a8s", {"num_bits": 16}, "num_bits must be one of 8, got 16"),
        ("a8s", {"num_bits": None}, "num_bits must be one of 8, got None"),
        ("a8s", {"type": "float"}, "type must be one of 'int', got 'float'"),
        ("a8s", {"dynamic": "local"}, "dynamic must be one of True, False, got 'local'"),
        ("a8s", {"dynamic": 1}, "dynamic must be one of True, False, got 1"),
        ("a8s", {"symmetric": None}, "symmetric must be one of True, False, got None"),
        ("a8s", {"strategy": "tensor"}, "strategy must be one of 'token', got 'tensor'"),
        ("a8s", {"strategy": None}, "strategy must be one of 'token', got 'tensor'"),
        ("a8s", {"strategy": "group", "group_size": 32}, "strategy must be one of 'token', got 'group'"),
        ("a8s", {"strategy": "tensor_group", "group_size": 16}, "strategy must be one of 'token', got 'tensor_group'"),
        ("a8s", {"strategy": "channel"}, "strategy must be one of 'token', got 'channel'"),
        ("a8s", {"strategy": "block"}, "strategy must be one of 'token', got 'block'"),
        ("a8ts", {"strategy": "token"}, "strategy must be one of 'tensor', got 'token'"),
        ("a8ts", {"strategy": "attn_head"}, "strategy must be one of 'tensor', got 'attn_head'"),
        ("a8s", {"group_size": 32}, "it has 'group_size': 32"),
        ("a8ts", {"block_structure": [1, 2]}, "it has 'block_structure'"),
        ("a8s", {"actorder": "group"}, "it has 'actorder'"),
        ("a8s", {"scale_dtype": "torch.float8_e4m3fn"}, "it has 'scale_dtype'"),
        ("a8", {"zp_dtype": "torch.float32"}, "it has 'zp_dtype'"),
        ("a8s", {"extra": 1}, "it has 'extra'"),
    ],
)
def test_inputs_that_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    with pytest.raises(ValueError, match=f"config_groups 'group_0': input_activations: .*{message}.*{_READ}"):
        reader(_with_inputs(config, kind, **change), {})


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
def test_widths_that_quantized_inputs_do_not_meet(bits: int) -> None:
    config = _config(num_bits=bits, **STRATEGIES["channel"])
    with pytest.raises(
        ValueError, match=f"input_activations: they meet weights of {bits} bits{_READ} weights of 4 or 8"
    ):
        reader(_with_inputs(config, "a8s"), {})


@pytest.mark.parametrize("given", [[], "token", 8, {}, {"dynamic": True, "strategy": "token"}])
def test_what_is_no_description_of_inputs(given: Any) -> None:
    config = _config("int-quantized", num_bits=8, **STRATEGIES["channel"])
    config["config_groups"]["group_0"]["input_activations"] = given
    with pytest.raises(ValueError, match=r"'group_0': input_activations: .*(must be|has no 'num_bits')"):
        reader(config, {})
