"""bitsandbytes' 8-bit weights: how far from its own dequantizing, counted, and files that someone has damaged."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import QTensor
from qkernels.formats.bitsandbytes import reader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from bitsandbytes import functional
    from bitsandbytes.utils import LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

# as transformers writes it
CONFIG: dict[str, Any] = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": False,
    "load_in_8bit": True,
    "quant_method": "bitsandbytes",
}
ALL_Q = torch.arange(-127, 128, dtype=torch.int8)


def _parts(q: Tensor, largest: Tensor) -> dict[str, Tensor]:
    return {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _decode(parts: dict[str, Tensor], config: dict[str, Any] = CONFIG) -> QTensor:
    return reader(config, {}).decode("model.layer", parts)


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """How many float32 numbers from x to y, of the same sign."""
    return (x.view(torch.int32).to(torch.int64) - y.view(torch.int32)).abs()


def _both(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(read here, dequantized by bitsandbytes) of all 255 q with each SCB."""
    q = ALL_Q.expand(len(largest), -1).contiguous()
    return _decode(_parts(q, largest)).dequantize(), functional.int8_vectorwise_dequant(q, largest)


def test_a_layer_that_bitsandbytes_saved() -> None:
    layer = bnb.nn.Linear8bitLt(40, 24, bias=True, has_fp16_weights=False)
    full = layer.weight.data.clone()
    layer.weight = bnb.nn.Int8Params(full, requires_grad=False)._quantize("cpu")
    state = layer.state_dict()
    assert sorted(state) == ["SCB", "bias", "weight", "weight_format"]
    made = reader(CONFIG, {"format": "pt"})
    assert made.marker == "SCB"
    assert set(state) == {made.marker, *made.parts, "bias"}
    q = made.decode("layer", {part: state[part] for part in (made.marker, *made.parts)})
    assert str(q.scheme) == "w8cs-fp32"
    assert q.shape == (24, 40)
    wanted = functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    assert int(_apart(q.dequantize(), wanted).max()) <= 1
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(q.dequantize(dtype), wanted.to(dtype))
    assert (q.dequantize() - full).abs().max() < full.abs().max() / 127


@pytest.mark.parametrize("seed", range(4))
def test_at_most_two_float32_apart(seed: int) -> None:
    """Any SCB, from far below the float16 ones to far above."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint((127 - 119) << 23, (127 + 121) << 23, (20_000,), generator=generator, dtype=torch.int32)
    found, wanted = _both(bits.view(torch.float32))
    apart = _apart(found, wanted)
    assert int(apart.max()) == 2
    share = [(apart == n).double().mean().item() for n in range(3)]
    assert share == pytest.approx([0.675, 0.324, 0.00145], rel=0.05)
    for dtype, most in ((torch.bfloat16, 20e-6), (torch.float16, 66e-6)):
        normal = (wanted.abs() >= torch.finfo(dtype).smallest_normal) & (wanted.abs() < torch.finfo(dtype).max)
        assert (found.to(dtype) != wanted.to(dtype))[normal].double().mean() <= most


def test_every_float16_scb() -> None:
    """All that bitsandbytes can have written."""
    largest = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    assert largest.isfinite().all()
    found, wanted = _both(largest)
    apart = _apart(found, wanted)
    assert int(apart.max()) == 1
    assert (apart == 0).double().mean().item() == pytest.approx(0.756, abs=0.003)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found.to(dtype), wanted.to(dtype))


def test_exact_where_scb_is_127_times_a_power_of_two() -> None:
    powers = 2.0 ** torch.arange(-100, 100, dtype=torch.float32)
    found, wanted = _both(127 * powers)
    assert torch.equal(found, ALL_Q * powers[:, None])
    assert torch.equal(found, wanted)


def test_as_bitsandbytes_embeds() -> None:
    """Its embedding divides SCB first, as is done here: the same bits, -128 and rows of zeros too."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (300, 48), generator=generator, dtype=torch.int8)
    largest = torch.rand(300, generator=generator)
    largest[7] = 0
    layer = bnb.nn.Embedding8bit(300, 48)
    layer.weight = bnb.nn.Int8Params(q, requires_grad=False, SCB=largest)
    assert torch.equal(layer(torch.arange(300)), _decode(_parts(q, largest)).dequantize())


def test_any_size() -> None:
    for shape in ((1, 1), (3, 17), (5, 16), (1, 257)):
        q = torch.ones(shape, dtype=torch.int8)
        found = _decode({"weight": q, "SCB": torch.full(shape[:1], 127.0)})
        assert found.shape == shape
        assert torch.equal(found.dequantize(), torch.ones(shape))
    turned = torch.arange(-20, 20, dtype=torch.int8).reshape(8, 5).T
    assert torch.equal(_decode(_parts(turned, torch.full((5,), 127.0))).dequantize(), turned.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "load_in_4bit is true.*'nf4'"),
        ({"_load_in_4bit": True}, "load_in_4bit is true: 4-bit weights .*table"),
        ({"load_in_8bit": False}, "load_in_8bit must be one of True, got False"),
        ({"load_in_8bit": 1}, "load_in_8bit must be one of True, got 1"),
        ({"load_in_8bit": None}, "load_in_8bit must be"),
        ({"_load_in_8bit": False}, "_load_in_8bit must be"),
        ({"load_in_4bit": "no"}, "load_in_4bit must be one of True, False, got 'no'"),
        ({"quant_method": "gptq"}, "quant_method must be one of 'bitsandbytes', got 'gptq'"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight must be one of False"),
        ({"blocks": 3}, "has 'blocks', which is not known"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader({**CONFIG, **change}, {})


def test_only_what_says_8_bits_is_needed() -> None:
    reader({"quant_method": "bitsandbytes", "load_in_8bit": True}, {})
    with pytest.raises(ValueError, match="no 'load_in_8bit'"):
        reader({"quant_method": "bitsandbytes"}, {})


def _byte(value: int, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, "there is no tensor 'weight'"),
        ({"weight": torch.zeros(3, 8)}, TypeError, "weight must be int8, got float32"),
        ({"weight": torch.zeros(24, 1, dtype=torch.uint8)}, TypeError, "weight must be int8, got uint8"),
        ({"weight": torch.zeros(24, dtype=torch.int8)}, ValueError, r"weight must be \(N, K\), .* got \(24,\)"),
        ({"weight": torch.zeros(3, 0, dtype=torch.int8)}, ValueError, r"at least one row and column, got \(3, 0\)"),
        ({"SCB": torch.ones(4)}, ValueError, r"SCB must have shape \(3,\), got \(4,\)"),
        ({"SCB": torch.ones(3, 1)}, ValueError, "SCB must have shape"),
        ({"SCB": torch.ones(3).half()}, TypeError, "SCB must be float32, got float16"),
        ({"SCB": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "scale of group 0, row 1 is NaN or infinite"),
        ({"SCB": torch.tensor([torch.nan, 1.0, 1.0])}, ValueError, "row 0 is NaN or infinite"),
        ({"weight_format": _byte(1)}, ValueError, "weight_format must be 0, for 'row', got 1, which is 'col32'"),
        ({"weight_format": _byte(3)}, ValueError, "got 3, which is 'col_ampere'"),
        ({"weight_format": _byte(4)}, ValueError, "got 4, which is not known"),
        ({"weight_format": _byte(0, (2,))}, ValueError, "weight_format must be one number"),
        ({"weight_format": torch.tensor(0.0)}, TypeError, "weight_format must be uint8, got float32"),
    ],
)
def test_tensors_that_are_refused(change: dict[str, Tensor | None], error: type[Exception], message: str) -> None:
    parts = {**_parts(torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)), **change}
    with pytest.raises(error, match=message):
        _decode({name: tensor for name, tensor in parts.items() if tensor is not None})


def test_the_table_of_weight_formats() -> None:
    for kind, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items():
        parts = {**_parts(torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)), "weight_format": _byte(number)}
        with contextlib.nullcontext() if kind == "row" else pytest.raises(ValueError, match=f"which is '{kind}'"):
            _decode(parts)


VALUES = st.sampled_from([None, True, False, 0, 1, -1, 2.5, "", "row", [], {}, ["a"], 10**30])
DTYPES = st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.float16, torch.float32, torch.bool])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*CONFIG, "other"]), VALUES, max_size=2),
    st.dictionaries(
        st.sampled_from(["weight", "SCB", "weight_format"]),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), DTYPES, st.integers(0, 255)),
        max_size=2,
    ),
)
def test_damage_is_named_or_harmless(
    change: dict[str, Any], tensors: dict[str, tuple[list[int], torch.dtype, int]]
) -> None:
    parts = _parts(torch.zeros(3, 5, dtype=torch.int8), torch.ones(3))
    for name, (shape, dtype, value) in tensors.items():
        parts[name] = torch.full(shape, value, dtype=torch.uint8).to(dtype)
    with contextlib.suppress(ValueError, TypeError):
        q = _decode(parts, {**CONFIG, **change})
        assert q.shape == parts["weight"].shape
        assert q.dequantize().isfinite().all()
