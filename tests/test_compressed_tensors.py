"""compressed-tensors: every width and strategy as the package decompresses it, bit for bit; old layouts; damage."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import QTensor
from qkernels.formats.compressed_tensors import reader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils import match_targets

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "naive-quantized")
STRATEGIES: dict[str, dict[str, Any]] = {
    "group": {"strategy": "group", "group_size": 32},
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
}
INPUTS: dict[
    str, dict[str, Any]
] = {  # what a scheme's string ends in -> input_activations; their tensors are _static's
    "a8s": {"strategy": "token", "dynamic": True, "symmetric": True},
    "a8": {"strategy": "token", "dynamic": True, "symmetric": False},
    "a8ts": {"strategy": "tensor", "dynamic": False, "symmetric": True},
    "a8t": {"strategy": "tensor", "dynamic": False, "symmetric": False},
}


def _config(format: str = PACKED, **weights: Any) -> dict[str, Any]:  # noqa: A002 - the field's name
    """As the package writes it."""
    args = {"num_bits": 4, "symmetric": True, **weights}
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))},
        format=format,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json")
    return {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}, **config}


def _with_inputs(config: dict[str, Any], kind: str, group: str = "group_0", **changes: Any) -> dict[str, Any]:
    """The configuration with input_activations, as the package writes them."""
    args = QuantizationArgs(num_bits=8, **INPUTS[kind]).model_dump(mode="json")
    entry = {**config["config_groups"][group], "input_activations": {**args, **changes}}
    return {**config, "config_groups": {**config["config_groups"], group: entry}}


def _static(kind: str, scale: float = 0.03, zero: int = -5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of static inputs as the package stores them."""
    if "t" not in kind:
        return {}
    held = {"input_scale": torch.tensor([scale]).to(dtype)}
    return held if kind.endswith("s") else {**held, "input_zero_point": torch.tensor([zero], dtype=torch.int8)}


def _scheme(config: dict[str, Any]) -> Any:
    return QuantizationScheme(**copy.deepcopy(config["config_groups"]["group_0"]))


def _stored(
    config: dict[str, Any], rows: int, in_features: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """A module's tensors as the package compresses them: all codes, all zeros, scales of any size."""
    generator = torch.Generator().manual_seed(seed)
    args = _scheme(config).weights
    groups = -(-in_features // args.group_size) if args.strategy == "group" else 1
    shape = (1,) if args.strategy == "tensor" else (rows, groups)
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
    exponents = torch.randint(-6, 3, shape, generator=generator)
    scale = ((1 + torch.rand(shape, generator=generator)) * 2.0**exponents).to(dtype)
    scale = torch.where(torch.rand(shape, generator=generator) < 0.1, -scale, scale)
    state = {"weight_scale": scale}
    z = torch.zeros(shape)
    if not args.symmetric:
        z = torch.randint(low, high, shape, generator=generator).float()
        state["weight_zero_point"] = z.to(torch.int8)
    q = torch.randint(low, high, (rows, in_features), generator=generator)
    spread = [
        t.float().expand(rows, 1) if t.ndim == 1 else t.float().repeat_interleave(in_features // groups, 1)
        for t in (scale, z)
    ]
    full = spread[0] * (q - spread[1])  # exact enough for the package to find q again
    return BaseCompressor.get_value_from_registry(config["format"]).compress({"weight": full, **state}, _scheme(config))


def _wanted(config: dict[str, Any], stored: dict[str, Tensor]) -> Tensor:
    """As the package decompresses it, in the dtype of the scale."""
    return BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, _scheme(config))["weight"]


def _decode(config: dict[str, Any], stored: dict[str, Tensor], name: str = "model.layer") -> QTensor:
    return reader(config, {"format": "pt"}).decode(name, stored)


def _assert_same(found: QTensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    values = found.dequantize(wanted.dtype)
    integers = torch.int32 if wanted.dtype is torch.float32 else torch.int16
    assert torch.equal(values.view(integers), wanted.contiguous().view(integers))  # bits: 0 and -0 differ


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_read_bit_for_bit(format: str, strategy: str, symmetric: bool, bits: int) -> None:  # noqa: A002
    config = _config(format, num_bits=bits, symmetric=symmetric, **STRATEGIES[strategy])
    for dtype in DTYPES:
        for rows, in_features in ((37, 160), (64, 96), (1, 32), (170, 192)):
            stored = _stored(config, rows, in_features, dtype, seed=bits)
            found = _decode(config, stored)
            _assert_same(found, _wanted(config, stored))
            assert found.scheme.scale_dtype is dtype
            assert (found.scheme.value_map == "symmetric") == (symmetric and bits > 1)
            assert found.scheme.group_size == STRATEGIES[strategy].get("group_size", strategy)
            assert found.scheme.bits == bits


def test_all_codes_and_zeros_are_in_these_tests() -> None:
    for bits in range(1, 9):
        config = _config(num_bits=bits, symmetric=False, **STRATEGIES["group"])
        found = _decode(config, _stored(config, 1000, 192, torch.float32))
        assert found.zero is not None
        assert len(found.zero.unique()) == 2**bits
        one = _config("int-quantized", num_bits=bits, **STRATEGIES["channel"])
        assert len(_stored(one, 37, 160, torch.float32)["weight"].unique()) == 2**bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("in_features", [1, 5, 11, 33, 100, 257])
def test_rows_of_any_length_in_channels(bits: int, in_features: int) -> None:
    """Rows whose last word is not full; zeros too, as N is not whole words either."""
    config = _config(num_bits=bits, symmetric=False, **STRATEGIES["channel"])
    stored = _stored(config, 21, in_features, torch.bfloat16)
    _assert_same(_decode(config, stored), _wanted(config, stored))


def test_a_product() -> None:
    config = _config(symmetric=False, **STRATEGIES["group"])
    stored = _stored(config, 37, 160, torch.float32)
    x = torch.randn(3, 160)
    torch.testing.assert_close(x @ _decode(config, stored).T, x @ _wanted(config, stored).T, rtol=1e-4, atol=1e-3)


# ---- layouts of older versions ----


def _whole_codes(code: Tensor, bits: int) -> Tensor:
    """(rows, words) int32 with floor(32 / bits) codes in each, as up to 0.17."""
    each = 32 // bits
    rows = []
    for row in code.tolist():
        words = [sum(u << bits * i for i, u in enumerate(row[at : at + each])) for at in range(0, len(row), each)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def _as_of_0_17(config: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weight, packed in the older way."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    args = _scheme(config).weights
    shape = stored["weight_shape"].tolist()
    old = dict(stored)
    center = 2 ** (args.num_bits - 1)
    q = unpack_from_int32(stored["weight_packed"], args.num_bits, torch.Size(shape))
    old["weight_packed"] = _whole_codes(q.int() + center, args.num_bits)
    if stored.get("weight_zero_point", torch.empty(0)).dtype is torch.int32:
        size = torch.Size((shape[0], stored["weight_scale"].shape[1]))
        z = unpack_from_int32(stored["weight_zero_point"], args.num_bits, size, packed_dim=0)
        old["weight_zero_point"] = _whole_codes(z.T.int() + center, args.num_bits).T.contiguous()
    return old


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_codes_in_words(strategy: str, symmetric: bool, bits: int) -> None:
    config = _config(num_bits=bits, symmetric=symmetric, **STRATEGIES[strategy])
    del config["version"]
    for rows, in_features in ((37, 192), (203, 128), (80, 64)):
        stored = _stored(config, rows, in_features, torch.bfloat16)
        old = _as_of_0_17(config, stored)
        assert (old["weight_packed"].shape == stored["weight_packed"].shape) == (32 % bits == 0)
        _assert_same(_decode(config, old), _wanted(config, stored))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_version_tells_where_shapes_do_not(bits: int) -> None:
    config = _config(num_bits=bits, symmetric=False, **STRATEGIES["channel"])
    each, unclear = 32 // bits, 0
    for in_features in (*range(1, 64, 3), *range(64, 170, 8)):
        new = _stored(config, 15, in_features, torch.float32)
        old, wanted = _as_of_0_17(config, new), _wanted(config, new)
        same = all(new[name].shape == old[name].shape for name in ("weight_packed", "weight_zero_point"))
        for version, stored in (("0.18.0", new), ("0.20.0.1", new), ("1.0", new), ("0.17.1", old), ("0.9.4", old)):
            _assert_same(_decode({**config, "version": version}, stored), wanted)
        for version in (None, "0.18.0.a20260101", "0.17.2.dev3", "x", "", 18, "0." + "1" * 5000):
            if same:
                with pytest.raises(ValueError, match=f"a stream of {bits}-bit codes or {each} in each word.* version"):
                    _decode({**config, "version": version}, new)
            else:
                _assert_same(_decode({**config, "version": version}, old), wanted)
                _assert_same(_decode({**config, "version": version}, new), wanted)
        assert not (same and (in_features in (64, 128) or in_features > 150))
        unclear += same
    assert unclear > 5


def test_zeros_tell_where_weights_do_not() -> None:
    """And where shapes say one thing, a version that says another is not asked."""
    config = _config(num_bits=3, symmetric=False, **STRATEGIES["channel"])
    new = _stored(config, 64, 80, torch.float32)
    old = _as_of_0_17(config, new)
    assert new["weight_packed"].shape == old["weight_packed"].shape
    for version in ("0.9.0", "0.20.0", None):
        for stored in (new, old):
            _assert_same(_decode({**config, "version": version}, stored), _wanted(config, new))
    wide = _stored(config, 64, 128, torch.float32)
    mixed = {**wide, "weight_zero_point": _as_of_0_17(config, wide)["weight_zero_point"]}
    with pytest.raises(ValueError, match="hold codes in two different ways"):
        _decode(config, mixed)


def test_codes_in_one_word_are_the_same_in_both_layouts() -> None:
    config = _config(num_bits=5, **STRATEGIES["channel"])
    del config["version"]
    stored = _stored(config, 37, 6, torch.float32)
    assert torch.equal(_as_of_0_17(config, stored)["weight_packed"], stored["weight_packed"])
    _assert_same(_decode(config, stored), _wanted(config, stored))


def test_zeros_that_are_not_packed() -> None:
    """As 0.5 stored them: int8, of the shape of the scales."""
    config = _config(symmetric=False, **STRATEGIES["group"])
    stored = _stored(config, 37, 160, torch.float16)
    plain = _stored({**config, "format": "int-quantized"}, 37, 160, torch.float16)
    assert plain["weight_zero_point"].dtype is torch.int8
    old = {**stored, "weight_zero_point": plain["weight_zero_point"]}
    _assert_same(_decode(config, old), _wanted(config, stored))


def test_zeros_of_symmetric_weights_may_only_be_zero() -> None:
    config = _config(**STRATEGIES["group"])
    stored = _stored(config, 3, 64, torch.float16)
    zeros = torch.zeros(3, 2, dtype=torch.int8)
    _assert_same(_decode(config, {**stored, "weight_zero_point": zeros}), _wanted(config, stored))
    zeros[1, 1] = 1
    with pytest.raises(ValueError, match="weight_zero_point must be 0 throughout"):
        _decode(config, {**stored, "weight_zero_point": zeros})


# ---- order of input features ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_input_features_in_groups_of_their_own(format: str, symmetric: bool, actorder: Any) -> None:  # noqa: A002
    """w[n, k] = s[n, g_idx[k]] (q - z): as up to 0.18. The package today reads the weight whose groups are runs."""
    config = _config(format, symmetric=symmetric, **STRATEGIES["group"])
    runs = _stored(config, 37, 160, torch.bfloat16)
    g_idx = (torch.arange(160) // 32)[torch.randperm(160)]
    place = torch.argsort(torch.argsort(g_idx, stable=True))  # of each feature among the sorted ones
    stored = dict(runs)
    if format == PACKED:
        from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

        q = unpack_from_int32(runs["weight_packed"], 4, torch.Size((37, 160)))
        stored["weight_packed"] = pack_to_int32(q[:, place].contiguous(), 4)
    else:
        stored["weight"] = runs["weight"][:, place]
    config["config_groups"]["group_0"]["weights"]["actorder"] = actorder
    runs_config = _config(format, symmetric=symmetric, **STRATEGIES["group"])
    for dtype in (torch.int32, torch.int64):
        stored["weight_g_idx"] = g_idx.to(dtype)
        found = _decode(config, stored)
        _assert_same(found, _wanted(runs_config, runs)[:, place])
        assert found.order is not None
    x = torch.randn(3, 160)
    torch.testing.assert_close(x @ found.T, x @ found.dequantize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("actorder", [None, False, "weight", "static", "group", "dynamic"])
def test_input_features_that_stay_where_they_are(actorder: Any) -> None:
    config = _config(**STRATEGIES["group"])
    stored = _stored(config, 37, 160, torch.float32)
    wanted = _wanted(config, stored)
    config["config_groups"]["group_0"]["weights"]["actorder"] = actorder
    runs = torch.arange(160, dtype=torch.int32) // 32
    for parts in (stored, {**stored, "weight_g_idx": runs}, {**stored, "weight_g_idx": torch.full_like(runs, -1)}):
        found = _decode(config, parts)
        _assert_same(found, wanted)
        assert found.order is None
    if actorder in ("group", "dynamic"):
        return
    with pytest.raises(ValueError, match="weight_g_idx reorders input features, and actorder says"):
        _decode(config, {**stored, "weight_g_idx": runs.flip(0).contiguous()})


def test_orders_that_are_refused() -> None:
    config = _config(**STRATEGIES["group"])
    stored = _stored(config, 3, 64, torch.float32)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    for g_idx, message in (
        (torch.tensor([0, 2] * 32), "g_idx must be from 0 to 1, got 2"),
        (torch.tensor([0, -1] * 32), "g_idx must be from 0 to 1, got -1"),
        (torch.tensor([0] * 33 + [1] * 31), "gives group 0 33 features"),
        (torch.zeros(63, dtype=torch.int32), r"weight_g_idx must have shape \(64,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _decode(config, {**stored, "weight_g_idx": g_idx})
    with pytest.raises(TypeError, match="weight_g_idx must be int32, int64, got float32"):
        _decode(config, {**stored, "weight_g_idx": torch.zeros(64)})
    channel = _config(**STRATEGIES["channel"])
    stored = _stored(channel, 3, 64, torch.float32)
    with pytest.raises(ValueError, match="g_idx must be from 0 to 0, got 1"):
        _decode(channel, {**stored, "weight_g_idx": torch.arange(64) // 32})


# ---- sizes of groups ----


def test_one_group_that_is_longer_than_a_row() -> None:
    """As version 0.9 still reads it: then it is one scale for a row."""
    channel = _config(**STRATEGIES["channel"])
    for size, in_features in ((128, 96), (128, 33), (50, 33), (50, 50)):
        stored = _stored(channel, 3, in_features, torch.float32)
        found = _decode(_config(strategy="group", group_size=size), stored)
        _assert_same(found, _wanted(channel, stored))


def test_groups_that_are_refused() -> None:
    config = _config(**STRATEGIES["channel"])
    stored = _stored(config, 3, 96, torch.float32)
    with pytest.raises(ValueError, match="group_size must divide K = 96, got 64"):
        _decode(_config(strategy="group", group_size=64), {**stored, "weight_scale": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="group_size must be a positive multiple of 16, got 24"):
        _decode(_config(strategy="group", group_size=24), {**stored, "weight_scale": torch.ones(3, 4)})


# ---- configurations ----


def _changed(change: dict[str, Any], weights: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    config = {**_config(**STRATEGIES["group"]), **change}
    if "config_groups" not in change:
        entry = config["config_groups"]["group_0"]
        entry.update(group)
        entry["weights"] = {**entry["weights"], **(weights or {})}
    return config


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_changed({"quant_method": "gptq"}), "quant_method must be one of 'compressed-tensors', got 'gptq'"),
        (_changed({"kv_cache_scheme": ACTIVATIONS}), "has 'kv_cache_scheme'.*not supported"),
        (_changed({"kv_cache_scheme": {}}), "has 'kv_cache_scheme'"),
        (_changed({"sparsity_config": {"format": "sparse-24-bitmask"}}), "has 'sparsity_config'.*sparse-24-bitmask"),
        (_changed({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}), "has 'transform_config'"),
        (_changed({"moe_sparsity_config": {"method": "prune"}}), "has 'moe_sparsity_config'"),
        (_changed({"config_groups": {}}), "config_groups must be an object of groups"),
        (_changed({"config_groups": {"W4A16": ["Linear"]}}), "config_groups 'W4A16': a group must be an object"),
        (_changed({"config_groups": [1]}), "config_groups must be an object"),
        (_changed({}, output_activations=ACTIVATIONS), "it has 'output_activations'"),
        (_changed({}, input_activations={}), "input_activations: quantization_config has no 'num_bits'"),
        (_changed({}, targets=[]), "targets must be a list of strings"),
        (_changed({}, targets="Linear"), "targets must be a list of strings"),
        (_changed({}, targets=[3]), "targets must be a list of strings"),
        ({**_changed({}), "config_groups": {"a": {"targets": ["Linear"]}}}, "weights must be an object, got None"),
        (_changed({"format": "float-quantized"}), "format must be one of 'pack-quantized', .* got 'float-quantized'"),
        (_changed({"format": None}), "format must be one of"),
        (_changed({}, format="marlin-24"), "format must be one of .* got 'marlin-24'"),
        (_changed({}, {"type": "float"}), "type must be one of 'int', got 'float'"),
        (_changed({}, {"num_bits": 9}), "num_bits must be one of 1, .*8, got 9"),
        (_changed({}, {"num_bits": 0}), "num_bits must be"),
        (_changed({}, {"num_bits": True}), "num_bits must be"),
        (_changed({}, {"num_bits": 4.0}), "num_bits must be"),
        (_changed({}, {"symmetric": 1}), "symmetric must be one of True, False, got 1"),
        (_changed({}, {"strategy": "tensor_group"}), "strategy must be one of .*, got 'tensor_group'"),
        (_changed({}, {"strategy": "block"}), "strategy must be one of .*, got 'block'"),
        (_changed({}, {"strategy": "token"}), "strategy must be one of .*, got 'token'"),
        (_changed({}, {"strategy": "channel"}), "group_size 32 does not go with strategy 'channel'"),
        (_changed({}, {"group_size": None}), "group_size None does not go with strategy 'group'"),
        (_changed({}, {"group_size": -1}), "group_size -1 does not go with strategy 'group'"),
        (_changed({}, {"group_size": 0}), "group_size must be a number of weights"),
        (_changed({}, {"group_size": -2}), "group_size must be a number of weights"),
        (_changed({}, {"group_size": True}), "group_size must be a number of weights"),
        (_changed({}, {"group_size": 32.0}), "group_size must be a number of weights"),
        (_changed({}, {"dynamic": True}), "dynamic must be one of False, got True"),
        (_changed({}, {"block_structure": [128, 128]}), "weights has 'block_structure'"),
        (_changed({}, {"actorder": "random"}), "actorder must be one of"),
        (_changed({}, {"extra": 1}), "weights has 'extra'"),
        (_changed({"extra": 1}), "quantization_config has 'extra'"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader(config, {})


def test_formats_are_those_of_the_package() -> None:
    for kind in CompressionFormat:
        with contextlib.nullcontext() if kind.value in FORMATS else pytest.raises(ValueError, match="format must be"):
            reader(_changed({"format": kind.value}), {})


def test_fields_that_do_not_matter() -> None:
    config = _changed(
        {
            "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
            "transform_config": {"config_groups": {}},
            "quantization_status": "frozen",
            "global_compression_ratio": 1.5,
            "run_compressed": True,
            "ignore": ["re:(a|a)*b"],
            "kv_cache_scheme": None,
        },
        {"observer": "mse", "observer_kwargs": {}, "zp_dtype": "torch.int8", "block_structure": None},
        input_activations=None,
        targets=["re:(a|a)*b"],  # one group is every module's
    )
    stored = _stored(_changed({}), 3, 64, torch.float32)
    made = reader(config, {})
    assert made.marker == "weight_scale"
    assert set(stored) <= {made.marker, *made.parts}
    _assert_same(made.decode("b" * 1000, stored), _wanted(_changed({}), stored))


@pytest.mark.parametrize(("size", "strategy"), [(None, "tensor"), (-1, "channel"), (32, "group")])
def test_a_strategy_that_the_size_implies(size: int | None, strategy: str) -> None:
    config = _config(**STRATEGIES[strategy])
    stored = _stored(config, 3, 64, torch.float32)
    wanted = _wanted(config, stored)
    config["config_groups"]["group_0"]["weights"].update(strategy=None, group_size=size)
    _assert_same(_decode(config, stored), wanted)


# ---- several groups ----


def _mixed(targets: dict[int, list[str]]) -> dict[str, Any]:
    """Groups of so many bits for these targets; each with a format of its own."""
    groups = {}
    for bits, names in targets.items():
        own = _config(num_bits=bits, **STRATEGIES["channel"])["config_groups"]["group_0"]
        groups[f"group_{bits}"] = {**own, "targets": names, "format": PACKED if bits < 8 else "int-quantized"}
    return {**_config(), "config_groups": groups, "format": "mixed-precision"}


TARGETS = {
    2: ["Linear", "re:.*experts.*"],
    3: [r"re:.*\.(q|k)_proj$", "model.layers.0.mlp.up_proj"],
    4: [r"re:.*experts\.0\..*", "re:^lm_head"],
    6: ["model.layers.1.self_attn.q_proj", r"re:model\.layers\.\d{2,}\..*"],
    8: ["re:.*down_proj", "lm_head"],
}
MODULES = [
    "lm_head",
    "lm_head2",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.up_proj2",
    "model.layers.0.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.2.mlp.experts.0.down_proj",
    "model.layers.2.mlp.experts.1.down_proj",
]


def test_a_module_is_of_the_group_that_the_package_chooses() -> None:
    config = _mixed(TARGETS)
    made = reader(config, {})
    seen = set()
    for name in MODULES:
        of = {target: bits for bits, targets in TARGETS.items() for target in targets}
        bits = of[match_targets(name, torch.nn.Linear(1, 1), of)[0]]
        own = _config(PACKED if bits < 8 else "int-quantized", num_bits=bits, **STRATEGIES["channel"])
        stored = _stored(own, 3, 192, torch.float32)
        found = made.decode(name, stored)
        assert found.scheme.bits == bits, name
        _assert_same(found, _wanted(own, stored))
        seen.add(bits)
    assert seen == set(TARGETS)


def test_targets_that_are_classes() -> None:
    own = _config(num_bits=3, **STRATEGIES["channel"])
    stored = _stored(own, 3, 192, torch.float32)

    def bits(targets: dict[int, list[str]]) -> int:
        return _decode(_mixed(targets), stored).scheme.bits

    assert bits({2: ["Embedding"], 3: ["Linear"]}) == 3
    assert bits({2: ["lm_head"], 3: ["Experts"]}) == 3
    assert bits({3: ["Linear"], 2: ["lm_head"]}) == 3
    with pytest.raises(ValueError, match="no target is for this module; there are lm_head, other"):
        bits({2: ["lm_head"], 3: ["other"]})
    with pytest.raises(ValueError, match="no target is for this module"):
        bits({2: ["Embedding"], 3: ["Experts"]})
    with pytest.raises(ValueError, match="weight_packed must have 12 words for 192 codes of 2 bits, got 18"):
        bits({3: ["Embedding"], 2: ["Linear"]})


def test_patterns_are_bounded() -> None:
    for pattern in ("(?<=a)b", "(a", "[", "a" * 1001):
        with pytest.raises(ValueError, match="pattern"):
            reader(_mixed({2: ["Linear"], 3: [f"re:{pattern}"]}), {})
    with pytest.raises(ValueError, match="patterns have 4223 characters, more than 4096"):
        reader(_mixed({2: ["Linear"], 3: [f"re:{n:03}{'a' * 97}" for n in range(41)]}), {})
    start = time.perf_counter()  # Python's own matcher would not come to an end
    with pytest.raises(ValueError, match="there is no tensor"):
        reader(_mixed({2: ["Linear"], 3: ["re:(a|a)*b"]}), {}).decode("a" * 300, {})
    assert time.perf_counter() - start < 5


# ---- damage ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_packed": None}, ValueError, "there is no tensor 'weight_packed'"),
        ({"weight_shape": None}, ValueError, "there is no tensor 'weight_shape'"),
        ({"weight_scale": None}, ValueError, "there is no tensor 'weight_scale'"),
        ({"weight_zero_point": None}, ValueError, "there is no tensor 'weight_zero_point'"),
        ({"weight": torch.zeros(5, 64)}, ValueError, "there is 'weight', which weights of this format do not have"),
        ({"weight_packed": torch.zeros(5, 8)}, TypeError, "weight_packed must be int32, got float32"),
        ({"weight_packed": torch.zeros(5, 9).int()}, ValueError, "must have 8 words for 64 codes of 4 bits, got 9"),
        ({"weight_packed": torch.zeros(4, 8).int()}, ValueError, r"weight_shape and .* \[5, 64\] and \(4, 8\)"),
        ({"weight_packed": torch.zeros(40).int()}, ValueError, "weight_shape and weight_packed must be"),
        ({"weight_shape": torch.tensor([5, 2**62])}, ValueError, "weight_packed must have 5764.* words"),
        ({"weight_shape": torch.tensor([5, -64])}, ValueError, "weight_shape and weight_packed must be"),
        ({"weight_shape": torch.tensor([5, 0])}, ValueError, "weight_shape and weight_packed must be"),
        ({"weight_shape": torch.tensor([5, 64, 1])}, ValueError, r"weight_shape must have shape \(2,\)"),
        ({"weight_shape": torch.tensor([5.0, 64.0])}, TypeError, "weight_shape must be int32, int64"),
        ({"weight_scale": torch.ones(5, 1)}, ValueError, r"weight_scale must have shape \(5, 2\), got \(5, 1\)"),
        ({"weight_scale": torch.ones(5)}, ValueError, "weight_scale must have shape"),
        ({"weight_scale": torch.ones(5, 2).double()}, TypeError, "scales must be float16"),
        ({"weight_scale": torch.ones(5, 2).to(torch.float8_e4m3fn)}, TypeError, "scales must be float16"),
        ({"weight_scale": torch.tensor([[1, torch.inf]] * 5)}, ValueError, "scale of group 1, row 0 is NaN or inf"),
        ({"weight_zero_point": torch.zeros(1, 1).int()}, ValueError, r"must be \(words, 2\), got \(1, 1\)"),
        ({"weight_zero_point": torch.zeros(2, 2).int()}, ValueError, "weight_zero_point must have 1 words for 5 codes"),
        ({"weight_zero_point": torch.zeros(5).int()}, ValueError, r"must be \(words, groups\), got \(5,\)"),
        ({"weight_zero_point": torch.zeros(1, 2)}, TypeError, "weight_zero_point must be int32, int8, got float32"),
        ({"weight_zero_point": torch.zeros(1, 2).to(torch.int8)}, ValueError, r"must have shape \(5, 2\)"),
        ({"weight_zero_point": torch.full((5, 2), 8, dtype=torch.int8)}, ValueError, "from 0 to 15, got 16"),
        ({"weight_zero_point": torch.full((5, 2), -9, dtype=torch.int8)}, ValueError, "from 0 to 15, got -1"),
    ],
)
def test_packed_tensors_that_are_refused(
    change: dict[str, Tensor | None], error: type[Exception], message: str
) -> None:
    config = _config(symmetric=False, **STRATEGIES["group"])
    parts = {**_stored(config, 5, 64, torch.float32), **change}
    with pytest.raises(error, match=message):
        _decode(config, {name: tensor for name, tensor in parts.items() if tensor is not None})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, "there is no tensor 'weight'"),
        ({"weight": torch.zeros(5, 64)}, TypeError, "weight must be int8, got float32"),
        ({"weight": torch.zeros(64).to(torch.int8)}, ValueError, r"weight must be \(N, K\)"),
        ({"weight": torch.zeros(5, 0).to(torch.int8)}, ValueError, "at least one row and column"),
        ({"weight": torch.full((5, 64), 8).to(torch.int8)}, ValueError, "from -8 to 7 for 4 bits, got 8"),
        ({"weight": torch.full((5, 64), -9).to(torch.int8)}, ValueError, "from -8 to 7 for 4 bits, got -9"),
        ({"weight_packed": torch.zeros(5, 8).int()}, ValueError, "there is 'weight_packed', which"),
        ({"weight_scale": torch.ones(2, 1)}, ValueError, "weight_scale must be one number, got shape"),
        ({"weight_zero_point": torch.zeros(1).int()}, TypeError, "weight_zero_point must be int8, got int32"),
        ({"weight_zero_point": torch.zeros(2).to(torch.int8)}, ValueError, "weight_zero_point must be one number"),
    ],
)
def test_plain_tensors_that_are_refused(change: dict[str, Tensor | None], error: type[Exception], message: str) -> None:
    config = _config("int-quantized", symmetric=False, **STRATEGIES["tensor"])
    parts = {**_stored(config, 5, 64, torch.float32), **change}
    with pytest.raises(error, match=message):
        _decode(config, {name: tensor for name, tensor in parts.items() if tensor is not None})


def test_one_number_of_any_shape() -> None:
    config = _config(symmetric=False, **STRATEGIES["tensor"])
    stored = _stored(config, 5, 64, torch.float32)
    for shape in ((), (1,), (1, 1)):
        own = {name: stored[name].reshape(shape) for name in ("weight_scale", "weight_zero_point")}
        _assert_same(_decode(config, {**stored, **own}), _wanted(config, stored))


_VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 3, 4, -1, 16, 2.5, "", "group", "tensor", "channel", "int", "0.17.0"]),
    st.sampled_from([*FORMATS, [], {}, ["Linear"], ["re:(a|a)*b"], {"format": "dense"}, {"x": {}}, 10**30]),
)
_PART = st.tuples(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool]),
    st.integers(-(2**31), 2**31 - 1),
)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([*STRATEGIES]),
    st.booleans(),
    st.integers(1, 8),
    st.none() | st.sampled_from([*INPUTS]),
    st.lists(
        st.tuples(
            st.sampled_from(
                ["version", "format", "config_groups", "sparsity_config", "transform_config", "kv_cache_scheme", "x"]
            )
            | st.tuples(st.sampled_from(["targets", "format", "weights", "input_activations"]))
            | st.tuples(
                st.just("weights"),
                st.sampled_from(["num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"]),
            )
            | st.tuples(
                st.just("input_activations"),
                st.sampled_from(["num_bits", "type", "symmetric", "strategy", "dynamic", "zp_dtype", "x"]),
            ),
            _VALUES,
        ),
        max_size=2,
    ),
    st.dictionaries(
        st.sampled_from(
            ["weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"]
            + ["input_scale", "input_zero_point"] * 2
        ),
        st.none() | _PART,
        max_size=2,
    ),
)
def test_damage_is_named_or_harmless(
    format: str,  # noqa: A002
    strategy: str,
    symmetric: bool,
    bits: int,
    inputs: str | None,
    changes: list[tuple[Any, Any]],
    tensors: dict[str, Any],
) -> None:
    if inputs is not None:
        bits = 4 if bits < 5 else 8  # which they meet
    config = _config(format, num_bits=bits, symmetric=symmetric, **STRATEGIES[strategy])
    parts = _stored(config, 6, 64, torch.float32)
    if inputs is not None:
        config, parts = _with_inputs(config, inputs), {**parts, **_static(inputs)}
    for path, value in changes:
        place: Any = config
        steps = [path] if isinstance(path, str) else ["config_groups", "group_0", *path]
        for step in steps[:-1]:
            place = place.get(step) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[steps[-1]] = value
    for name, made in tensors.items():
        parts.pop(name, None)
        if made is not None:
            parts[name] = torch.full(made[0], made[2]).to(made[1])
    with contextlib.suppress(ValueError, TypeError):
        found = _decode(config, parts)
        assert found.dequantize().isfinite().all()
        given = config["config_groups"]["group_0"].get("input_activations")
        assert (found.scheme.activations is None) == (given is None)
        assert (found.activation is not None) == (given is not None and not given["dynamic"])
        if found.activation is not None:
            assert found.activation[0].double() == parts["input_scale"].double()
            assert found.activation[1] == parts.get("input_zero_point", torch.zeros(1))
        assert (torch.ones(2, found.shape[1]) @ found.T).shape == (2, found.shape[0])
        wanted = parts["weight"].shape if "weight" in parts else parts["weight_shape"].tolist()
        assert list(found.shape) == list(wanted)
