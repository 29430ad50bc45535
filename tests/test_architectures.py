"""Models of transformers' architectures: quantized, each runs as its dequantized twin, and comes back from files."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels import QuantEmbedding, QuantExperts, QuantLinear
from tests import models


def dequantized(quantized: Any, original: Any) -> Any:
    """The original, whose weights are now what the codes of its quantized twin stand for: the oracle of the model."""
    twin = copy.deepcopy(original)
    for name, layer in quantized.named_modules(remove_duplicate=False):
        if isinstance(layer, (QuantLinear, QuantEmbedding, QuantExperts)):
            weight = layer.qweight.dequantize()
            parent, _, child = name.rpartition(".")
            there = getattr(twin.get_submodule(parent), child)
            if isinstance(layer, QuantExperts):
                weight = weight.unflatten(0, (layer.num_experts, -1))
                weight = weight.transpose(1, 2) if twin.get_submodule(parent).is_transposed else weight
            elif type(there).__name__ == "Conv1D":
                weight = weight.T
            parameter = nn.Parameter(weight.contiguous())  # a new one: what was tied need not be any more
            if isinstance(there, nn.Module):
                there.weight = parameter
            else:
                setattr(twin.get_submodule(parent), child, parameter)
    return twin


@pytest.mark.parametrize("name", models.MODELS)
def test_every_architecture(name: str, tmp_path: pathlib.Path) -> None:
    original, arguments = models.make(name), models.inputs(name)
    model = copy.deepcopy(original)
    before = model.get_input_embeddings() if name != "vit" else None
    embeddings = "w8g64" if isinstance(before, nn.Embedding) and type(before) is nn.Embedding else None
    report = qkernels.quantize_model(model, "w4g32", method="rtn", embeddings=embeddings, progress=False)
    kinds = {type(module) for module in model.modules()}
    assert QuantLinear in kinds
    assert (QuantEmbedding in kinds) == (embeddings is not None)
    assert (QuantExperts in kinds) == (name in ("mixtral", "gpt_oss"))
    left = [n for n, m in model.named_modules() if type(m) in (nn.Linear,) or type(m).__name__ == "Conv1D"]
    assert set(left) == set(report.skipped)
    # T5 casts what goes into `wo` to the dtype of its weight
    assert all(n.endswith(("lm_head", "proj_out", "DenseReluDense.wo")) for n in left), left
    found = models.output(model, arguments)
    torch.testing.assert_close(found, models.output(dequantized(model, original), arguments), atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found, models.output(original, arguments), atol=1e-3)
    if embeddings and name.endswith("tied"):
        assert model.lm_head.weight is model.model.embed_tokens.weight

    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    for fresh in (models.make(name), copy.deepcopy(model)):
        for parameter in fresh.parameters():
            parameter.data.zero_()
        assert torch.equal(models.output(qkernels.load(path, fresh), arguments), found)


class _Reads(nn.Module):
    """A model that uses weights of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.tokens = nn.Embedding(7, 32), nn.Embedding(50, 32)
        self.up, self.down, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)
        self.head, self.scored = nn.Linear(32, 50, bias=False), nn.Linear(32, 50)
        self.scored.weight = self.tokens.weight
        self.reset_odd()

    def reset_odd(self) -> None:
        self.up.weight.data.mul_(1.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids.to(self.up.weight.device)) + self.positions.weight[: ids.shape[1]]
        x = self.down(self.up(x).to(self.down.weight.dtype))
        return self.head(x @ self.odd.weight) + self.score(x)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(row, weight) for row, weight in ((x, self.scored.weight),)])[0]


def test_layers_whose_weight_the_model_reads_are_left_alone() -> None:
    model, ids = _Reads(), torch.arange(14).reshape(2, 7)
    report = qkernels.quantize_model(model, "w8g32", embeddings="w8g32", progress=False)
    assert report.skipped == ("down", "odd", "scored", "positions", "tokens")
    assert [layer.name for layer in report.layers] == ["up", "head"]
    assert torch.isfinite(model(ids)).all()
    again = qkernels.quantize_model(_Reads(), "w8g32", schemes={"odd": "w4g32"}, progress=False)
    assert "odd" in [layer.name for layer in again.layers]


def test_a_name_of_experts_is_left_alone_with_its_sibling() -> None:
    model = models.make("mixtral")
    report = qkernels.quantize_model(model, "w4g32", skip=["*.0.*.down_proj", "lm_head"], progress=False)
    assert [n for n in report.skipped if "experts" in n] == [
        "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj",
    ]  # fmt: skip
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, QuantExperts)
    twin = models.make("mixtral")
    arguments = models.inputs("mixtral")
    torch.testing.assert_close(
        models.output(model, arguments), models.output(dequantized(model, twin), arguments), atol=2e-3, rtol=2e-3
    )


def test_weights_of_all_experts_and_experts_of_another_process() -> None:
    """Some models give experts (tokens, experts) weights; others an index past the last for what is not theirs."""
    model = models.make("gpt_oss")
    qkernels.quantize_model(model, "w4g32", method="rtn", progress=False)
    experts: Any = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(3, 64), torch.tensor([[2, 0], [1, 3], [3, 0]]), torch.rand(3, 4)
    with torch.no_grad():
        found = experts(x, index, weights.gather(1, index))
        assert torch.equal(experts(x, index, weights), found)
        elsewhere = torch.tensor([[2, 4], [4, 4], [3, 0]])
        part = experts(x, elsewhere, weights.gather(1, index))
        assert torch.equal(part[1], torch.zeros(64))
        torch.testing.assert_close(part[2], found[2])
        alone = experts(x[:1], index[:1], weights[:1].gather(1, index[:1]) * torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(part[0], alone[0])


@pytest.mark.parametrize("other", ["gate_up_proj", "down_proj"])
def test_files_with_one_of_two_projections(other: str, tmp_path: pathlib.Path) -> None:
    """Such a layer of experts runs as transformers has it, one expert after the other."""
    original, arguments = models.make("mixtral"), models.inputs("mixtral")
    model, path = copy.deepcopy(original), tmp_path / "model.safetensors"
    qkernels.quantize_model(model, "w4g32", method="rtn", progress=False)
    qkernels.save(model, path)
    tensors, name = qkernels.load(path), f"model.layers.1.mlp.experts.{other}"
    del tensors[f"{name}.weight"]
    qkernels.save({**tensors, name: original.get_parameter(name).data}, path)
    mixed = qkernels.load(path, models.make("mixtral"))
    wanted = models.output(dequantized(mixed, original), arguments)
    torch.testing.assert_close(models.output(mixed, arguments), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.experts.down_proj"])
def test_an_order_of_inputs_where_there_can_be_none_is_named(name: str, tmp_path: pathlib.Path) -> None:
    model, path = models.make("mixtral"), tmp_path / "model.safetensors"
    qkernels.quantize_model(model, "w4g32", method="rtn", embeddings="w8g32", progress=False)
    qkernels.save(model, path)
    tensors = qkernels.load(path)
    weight = tensors[f"{name}.weight"]
    order = torch.randperm(weight.in_features).to(torch.int32)
    qkernels.save({**tensors, f"{name}.weight": dataclasses.replace(weight, order=order)}, path)
    fresh = models.make("mixtral")
    kinds = [type(module) for module in fresh.modules()]
    with pytest.raises(qkernels.FormatError, match=rf"{name}\.weight has an order of inputs"):
        qkernels.load(path, fresh)
    assert [type(module) for module in fresh.modules()] == kinds


def test_schemes_by_name_reach_experts_and_embeddings() -> None:
    model = models.make("mixtral")
    report = qkernels.quantize_model(
        model, "w4g32", embeddings="w8c", schemes={"*.down_proj": "w8g32", "*.q_proj": None}, progress=False
    )
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert schemes["model.embed_tokens"] == "w8c"
    assert schemes["model.layers.0.mlp.experts.down_proj"] == "w8g32"
    assert schemes["model.layers.0.mlp.experts.gate_up_proj"] == "w4g32"
    assert "model.layers.0.self_attn.q_proj" not in schemes
    # experts are reported by their stacked rows
    assert {layer.shape for layer in report.layers if layer.name.endswith("down_proj")} == {(4 * 64, 96)}


def test_calibration_leaves_conv1d_where_it_was_after_an_error() -> None:
    model = models.make("gpt2")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="pattern 'nowhere' fits no"):
        qkernels.quantize_model(model, "w4g32", skip=["nowhere"], progress=False)
    assert [type(module) for module in model.modules()] == kinds
    report = qkernels.quantize_model(
        model, "w4g32", method="gptq", calibration=[models.inputs("gpt2")["input_ids"]], progress=False,
        schemes={"*.c_proj": None},
    )  # fmt: skip
    assert {layer.method for layer in report.layers} == {"gptq"}
    assert len(report.layers) == 4
    assert type(model.transformer.h[0].mlp.c_proj).__name__ == "Conv1D"
