from __future__ import annotations

import gc
import math
import pathlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import FormatError, QTensor, QuantLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class TinyModel(nn.Module):
    """Tied output layer, shared block, a buffer, a norm, a convolution: what a walk over a model meets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = self.blocks[0]
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in [*self.blocks, self.again]:
            x = block(x)
        return self.lm_head(self.norm(x))


@pytest.fixture
def model() -> TinyModel:
    return TinyModel().eval()


TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def _fake_quantized(model: TinyModel, scheme: str) -> TinyModel:
    """The same architecture with dense weights that went through the oracle."""
    from qkernels import reference

    twin = TinyModel().eval()
    twin.load_state_dict(model.state_dict())
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            parsed = qkernels.Scheme.parse(scheme)
            w = module.weight.data
            module.weight.data = reference.dequantize(*reference.quantize(w, parsed), parsed, w.shape[1], torch.float32)
    return twin


@pytest.mark.parametrize("scheme", ["w4g32", "w8cs", "w3g64f"])
def test_a_quantized_model_computes_what_the_oracle_says(model: TinyModel, scheme: str) -> None:
    twin = _fake_quantized(model, scheme)
    report = qkernels.quantize_model(model, scheme, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), twin(TOKENS), atol=1e-5, rtol=1e-5)
    assert [layer.name for layer in report.layers] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert report.skipped == ("lm_head",)
    assert isinstance(model.blocks[0].up, QuantLinear)
    assert model.again.up is model.blocks[0].up
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight


def test_the_report_adds_up(model: TinyModel) -> None:
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if type(m) is nn.Linear}
    report = qkernels.quantize_model(model, "w4g32", progress=False)
    first = report.layers[0]
    layer = model.get_submodule(first.name)
    assert isinstance(layer, QuantLinear)
    assert first.nbytes == layer.qweight.nbytes
    assert first.error == layer.qweight.error(weights[first.name])
    assert (first.scheme, first.shape, first.original_bytes) == ("w4g32", (128, 64), 4 * 128 * 64)
    assert report.nbytes == sum(one.nbytes for one in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / (4 * 128 * 64))
    noise = sum(one.error.noise for one in report.layers)
    assert report.error.snr_db == pytest.approx(10 * math.log10(sum(one.error.signal for one in report.layers) / noise))
    text = str(report)
    assert "4 layers: 131.1 kB -> 19.5 kB, 4.75 bits per weight" in text
    assert "left alone: lm_head" in text
    assert text.count("\n") >= 6


def test_patterns_choose_schemes_and_layers(model: TinyModel) -> None:
    embedding = model.embed.weight.detach().clone()
    report = qkernels.quantize_model(
        model,
        "w4g32",
        skip=["blocks.1.up"],
        schemes={"blocks.*.down": "w8cs", "lm_head": "w4c", "blocks.0.*": None},
        progress=False,
    )
    assert {layer.name: layer.scheme for layer in report.layers} == {
        "blocks.0.down": "w8cs",
        "blocks.1.down": "w8cs",
        "lm_head": "w4c",
    }
    assert report.skipped == ("blocks.0.up", "blocks.1.up")
    assert torch.equal(model.embed.weight, embedding)  # which lm_head was tied to


def test_only_one_float_weight_is_alive_beside_its_codes(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is the model plus one layer: a float weight is gone before the next layer is quantized."""
    float_weights = [weakref.ref(m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    alive: list[int] = []
    original = QuantLinear.from_linear.__func__

    def counted(cls: Any, linear: nn.Linear, scheme: Any) -> QuantLinear:
        gc.collect()
        alive.append(sum(ref() is not None for ref in float_weights))
        return original(cls, linear, scheme)

    monkeypatch.setattr(QuantLinear, "from_linear", classmethod(counted))
    qkernels.quantize_model(model, "w4g32", progress=False)
    assert alive == [4, 3, 2, 1]


def test_nothing_changes_when_a_layer_cannot_be_quantized(model: TinyModel) -> None:
    before = dict(model.named_modules())
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight: w must be finite, got nan at index \(3, 5\)"):
        qkernels.quantize_model(model, "w4g32", progress=False)
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = 1e9
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight: scale of group 0, row 3 does not fit"):
        qkernels.quantize_model(model, "w4g32", progress=False)
    assert dict(model.named_modules()) == before


def test_bad_arguments_are_named(model: TinyModel) -> None:
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {"scheme": "int4"}, ValueError, "not a scheme"),
        (model, {"skip": "lm_head"}, TypeError, "skip must be a sequence"),
        (model, {"skip": ["blocks.7.up"]}, ValueError, r"'blocks\.7\.up' fits no nn\.Linear.*like 'blocks\.0\.up'"),
        (model, {"schemes": {"*.gate": "w4c"}}, ValueError, r"'\*\.gate' fits no nn\.Linear"),
        (model, {"schemes": {"*.up": "w4"}}, ValueError, "not a scheme"),
        (nn.Linear(4, 4), {}, ValueError, "is itself an nn.Linear"),
        (nn.LayerNorm(4), {}, ValueError, r"model \(LayerNorm\) holds no nn.Linear"),
        (nn.Sequential(nn.Linear(32, 4, device="meta")), {}, ValueError, "0.weight is on the meta device"),
        (nn.Sequential(nn.Linear(32, 4, dtype=torch.float64)), {}, TypeError, "0.weight must be float16, bfloat16"),
    ]  # fmt: skip
    for target, change, error, message in cases:
        arguments = {"scheme": "w4g32", "progress": False, **change}
        with pytest.raises(error, match=message):
            qkernels.quantize_model(target, **arguments)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    model.blocks[0].up.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks\.0\.up has hooks"):
        qkernels.quantize_model(model, "w4g32", progress=False)


def test_a_progress_bar_is_shown(model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    qkernels.quantize_model(model, "w4g32")
    assert "quantizing" in capsys.readouterr().err


# ---- save and load ----


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
        ({**state, "blocks.9.up.weight": other}, r"blocks\.9\.up\.weight is quantized, but the model has no Linear"),
        ({**state, "norm.weight": other}, r"norm\.weight is quantized, but the model has no Linear"),
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
