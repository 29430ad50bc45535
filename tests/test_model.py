from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import qkernels
from qkernels import QuantLinear
from tests.tiny_model import TOKENS, TinyModel


@pytest.fixture
def model() -> TinyModel:
    return TinyModel().eval()


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
    report = qkernels.quantize_model(model, scheme, method="rtn", progress=False)
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


@pytest.mark.parametrize("scheme", ["w4g32", "w8a8", "w8cs-a8ts"])
def test_only_one_float_weight_is_alive_beside_its_codes(
    model: TinyModel, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory is the model plus one layer: a float weight is gone before the next layer is quantized."""
    float_weights = [weakref.ref(m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    alive: list[int] = []
    original = qkernels.quantize

    def counted(*args: Any, **options: Any) -> qkernels.QTensor:
        gc.collect()
        alive.append(sum(ref() is not None for ref in float_weights))
        return original(*args, **options)

    monkeypatch.setattr("qkernels.calibrate.linears.quantize", counted)
    qkernels.quantize_model(model, scheme, calibration=[TOKENS], progress=False)
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


def test_shared_layers_answer_to_all_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "c": nn.Linear(32, 4)})
    model["b"] = model["a"]
    report = qkernels.quantize_model(model, "w4g32", skip=["b"], progress=False)
    assert report.skipped == ("a",)
    assert isinstance(model["c"], QuantLinear)
    qkernels.quantize_model(model, "w4g32", schemes={"b": "w8c"}, progress=False)
    assert model["a"] is model["b"]
    assert str(model["a"].scheme) == "w8c"


def test_a_scheme_for_the_output_layer_beats_the_default_skip(model: TinyModel) -> None:
    report = qkernels.quantize_model(model, "w4g32", schemes={"lm_head": "w8c"}, progress=False)
    assert str(model.lm_head.scheme) == "w8c"
    assert report.skipped == ()
    other = TinyModel()
    qkernels.quantize_model(other, "w4g32", schemes={"lm_head": "w8c"}, skip=["lm_head"], progress=False)
    assert type(other.lm_head) is nn.Linear


def test_subclasses_are_left_alone_and_reported() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(32, 32), nn.Linear(32, 4))
    assert qkernels.quantize_model(model, "w4g32", progress=False).skipped == ("0",)
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantize: only 0, left alone"):
        qkernels.quantize_model(model, "w4g32", progress=False)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    model[0].forward = lambda x: 0 * x[..., :4]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="0 has hooks or a forward of its own"):
        qkernels.quantize_model(model, "w4g32", progress=False)


def test_transformer_encoder_layers_do_not_take_their_fused_path() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    wanted = model(x)
    qkernels.quantize_model(model, "w8g32", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=0.1, atol=0.1)


def test_names_are_not_markup(model: TinyModel) -> None:
    odd = nn.ModuleDict({"x[/b]": nn.Linear(32, 4), "a very long name " * 20: nn.Linear(32, 4)})
    text = str(qkernels.quantize_model(odd, "w4g32", progress=False))
    assert "x[/b]" in text
    assert "a very long name " * 19 in text
    assert text.splitlines()[0].startswith("2 layers: 1.0 kB -> ")
