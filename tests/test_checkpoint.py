"""Models saved and loaded: the same bits, in whatever the model is; or an error, and nothing changed."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from torch import nn

import qkernels
from qkernels import FormatError, QTensor, QuantLinear
from tests.tiny_model import TOKENS, TinyModel


@pytest.fixture
def model() -> TinyModel:
    return TinyModel().eval()


@pytest.mark.parametrize("scheme", ["w4g32", "w8cs", "w3g64f-bf16", "w2t"])
def test_a_saved_model_loads_into_a_fresh_one(model: TinyModel, scheme: str, tmp_path: pathlib.Path) -> None:
    qkernels.quantize_model(model, scheme, progress=False)
    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    fresh = TinyModel().eval()
    assert qkernels.load(path, fresh) is fresh
    for again in (fresh, qkernels.load(path, qkernels.load(path, TinyModel().eval()))):
        with torch.no_grad():
            assert torch.equal(again(TOKENS), model(TOKENS))
        assert again.lm_head.weight is again.embed.weight
        assert again.again is again.blocks[0]
    assert not fresh.blocks[0].up.training


def test_a_saved_model_loads_into_a_meta_model(model: TinyModel, tmp_path: pathlib.Path) -> None:
    qkernels.quantize_model(model, "w4g32", progress=False)
    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    with torch.device("meta"):
        fresh = TinyModel().eval()
    qkernels.load(path, fresh)
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert fresh.lm_head.weight is fresh.embed.weight


def test_the_file_is_as_small_as_its_report(model: TinyModel, tmp_path: pathlib.Path) -> None:
    report = qkernels.quantize_model(model, "w4g32", progress=False)
    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    plain = 4 * (50 * 64 + 2 * 128 + 2 * 64) + 3 * 8  # embedding once although tied, biases, norm, buffer
    assert report.nbytes + plain < path.stat().st_size < report.nbytes + plain + 4000


def test_tensors_load_without_a_model(model: TinyModel, tmp_path: pathlib.Path) -> None:
    weight = model.blocks[0].up.weight.detach().clone()
    qkernels.quantize_model(model, "w4g32", progress=False)
    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    tensors = qkernels.load(path)
    q = tensors["blocks.0.up.weight"]
    assert isinstance(q, QTensor)
    assert torch.equal(q.dequantize(), qkernels.quantize(weight, "w4g32").dequantize())
    assert set(tensors) == set(TinyModel().state_dict())
    qkernels.save({"only": q, "plain": torch.arange(3)}, tmp_path / "some.safetensors")
    some = qkernels.load(tmp_path / "some.safetensors")
    assert torch.equal(some["only"].dequantize(), q.dequantize())
    assert torch.equal(some["plain"], torch.arange(3))


def test_a_file_that_does_not_fit_the_model_changes_nothing(model: TinyModel, tmp_path: pathlib.Path) -> None:
    qkernels.quantize_model(model, "w4g32", progress=False)
    state = dict(qkernels.load(_saved(model, tmp_path)))
    fresh = TinyModel()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    other = qkernels.quantize(torch.randn(128, 96), "w4g32")
    cases: list[tuple[dict[str, Any], str]] = [
        ({**state, "blocks.0.up.weight": other}, r"up\.weight is \(128, 96\), but the model's layer is \(128, 64\)"),
        ({**state, "blocks.9.up.weight": other}, r"blocks\.9\.up\.weight is quantized, but the model has no layer"),
        ({**state, "norm.weight": other}, r"norm\.weight is quantized, but the model has no layer"),
        ({**state, "extra": torch.zeros(1)}, r"extra is not in the model \(1 such"),
        ({n: t for n, t in state.items() if n != "norm.bias"}, r"norm\.bias, which the model wants, is missing"),
        ({**state, "norm.bias": torch.zeros(9)}, r"norm\.bias is \(9,\), but the model's is \(64,\)"),
    ]  # fmt: skip
    for tensors, message in cases:
        path = tmp_path / "changed.safetensors"
        qkernels.save(tensors, path)
        with pytest.raises(FormatError, match=message):
            qkernels.load(path, fresh)
        assert not any(isinstance(m, QuantLinear) for m in fresh.modules())
        assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())


def _saved(model: nn.Module, folder: pathlib.Path) -> pathlib.Path:
    path = folder / "saved.safetensors"
    qkernels.save(model, path)
    return path


def test_a_tied_name_need_not_be_stored(model: TinyModel, tmp_path: pathlib.Path) -> None:
    qkernels.quantize_model(model, "w4g32", progress=False)
    path = tmp_path / "file"
    qkernels.save({n: t for n, t in qkernels.load(_saved(model, tmp_path)).items() if n != "lm_head.weight"}, path)
    fresh = qkernels.load(path, TinyModel().eval())
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_quantized_output_layer_is_untied(model: TinyModel, place: str, tmp_path: pathlib.Path) -> None:
    qkernels.quantize_model(model, "w4g32", schemes={"lm_head": "w8c"}, progress=False)
    with torch.device(place):
        fresh = TinyModel().eval()
    qkernels.load(_saved(model, tmp_path), fresh)
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_meta_buffers_that_no_file_holds_are_named(model: TinyModel, tmp_path: pathlib.Path) -> None:
    path = _saved(model, tmp_path)
    with torch.device("meta"):
        fresh = TinyModel()
        fresh.blocks[0].register_buffer("angles", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.angles of the model is on the meta device"):
        qkernels.load(path, fresh)


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path: pathlib.Path) -> None:
    layer = QuantLinear.from_linear(nn.Linear(32, 4), "w4g32")
    path = _saved(layer, tmp_path)
    with pytest.raises(TypeError, match="model is itself a linear layer or an embedding"):
        qkernels.load(path, layer)
    again = QuantLinear(qkernels.load(path)["weight"], qkernels.load(path)["bias"])
    assert torch.equal(again(torch.ones(32)), layer(torch.ones(32)))
    with pytest.raises(TypeError, match=r"source must be a module or a mapping .* got QTensor"):
        qkernels.save(layer.qweight, path)
    with pytest.raises(RuntimeError, match="nope"):
        qkernels.load(path, device="nope")


def test_a_state_dict_of_another_scheme_is_refused() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8)
    made = {s: QuantLinear.from_linear(linear, s) for s in ("w4g32", "w4g32f", "w4g32-bf16", "w4g64", "w4g32s")}
    for one, other in (("w4g32", "w4g32f"), ("w4g32f", "w4g32"), ("w4g32", "w4g32-bf16"), ("w4g32", "w4g64")):
        before = {n: t.clone() for n, t in made[one].state_dict().items()}
        with pytest.raises(RuntimeError, match=r"weight_(zero|scale)"):
            made[one].load_state_dict(made[other].state_dict())
        assert all(torch.equal(t, before[n]) for n, t in made[one].state_dict().items() if n != "weight")
    with pytest.raises(RuntimeError, match="weight_zero"):
        made["w4g32"].load_state_dict(made["w4g32s"].state_dict())


def test_a_part_of_a_layer_is_not_taken_for_the_layer(tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(QuantLinear(qkernels.quantize(torch.randn(8, 64), "w4g32")))
    model[0].is_part = True  # as of layers that are cut for several processes
    with pytest.raises(ValueError, match=r"0\.weight is a part of a weight"):
        qkernels.save(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()
