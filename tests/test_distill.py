"""Scales set together: gradients against autograd, the model as its own teacher, and within quantize_model."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Scheme, reference
from qkernels.calibrate import distill as module
from qkernels.calibrate.batches import CalibrationError
from qkernels.calibrate.distill import distill
from qkernels.tensor import QTensor, quantize
from tests.tiny_model import TOKENS, TinyModel, save_tiny_llama


@pytest.mark.parametrize("text", ["w4g32", "w3g48", "w2g32s", "w4c", "w3g32f", "w4ts", "w4t", "w8tf"])
def test_gradients_are_those_of_autograd(text: str) -> None:
    scheme = Scheme.parse(text)
    w = torch.randn(6, 80)
    code = reference.encode(w, *(found := reference.scale_and_zero(*reference.group_range(w, scheme), scheme)), scheme)
    scale, zero = found[0].float().requires_grad_(), found[1]
    if scheme.value_map == "offset":
        assert zero is not None
        zero = zero.float().requires_grad_()
    leaves = [scale] + ([zero] if zero is not None and zero.requires_grad else [])
    direction = torch.randn(6, 80)
    # by plain indexing, a formula of its own
    level = code.float()
    groups = torch.arange(80) // max(1, scheme.group_length(80))
    spread = (t if t is None else t.float()[groups].T.expand(6, 80) for t in (scale, zero))
    step, base = spread
    plain = (
        code * step + base
        if scheme.value_map == "offset"
        else (level - (scheme.center if base is None else base)) * step
    )
    wanted = torch.autograd.grad((plain * direction).sum(), leaves)
    found_weight = module._Decode.apply(scale, zero, code, scheme, torch.float32)
    torch.testing.assert_close(found_weight, plain.detach())
    for found_gradient, gradient in zip(
        torch.autograd.grad((found_weight * direction).sum(), leaves), wanted, strict=True
    ):
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-5)


def _weights(model: nn.Module, scheme: str) -> dict[str, tuple[nn.Linear, QTensor]]:
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    return {name: (linear, quantize(linear.weight.detach(), scheme)) for name, linear in linears.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder: pathlib.Path = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _divergence(model: nn.Module, weights: dict[str, QTensor], tokens: Tensor) -> float:
    twin = copy.deepcopy(model)
    for name, weight in weights.items():
        twin.get_submodule(name).weight.data = weight.dequantize(torch.float32)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(tokens).logits.double(), -1) for m in (model, twin))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("scheme", ["w3g32", "w2g64s", "w3g32f"])
def test_the_model_predicts_more_as_before(llama: nn.Module, scheme: str) -> None:
    batches = [torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    weights = _weights(llama, scheme)
    before = {name: t.clone() for name, t in llama.state_dict().items()}
    gradients = {name: p.requires_grad for name, p in llama.named_parameters()}
    made = distill(llama, weights, batches, epochs=4, progress=False)
    assert list(made) == list(weights)
    for name, (_, weight) in weights.items():
        assert torch.equal(made[name].packed, weight.packed)
        assert made[name].scale.dtype == weight.scale.dtype
        assert made[name].scheme == weight.scheme
        if weight.scheme.value_map != "offset" and weight.zero is not None:
            assert torch.equal(made[name].zero, weight.zero)
    start = {name: weight for name, (_, weight) in weights.items()}
    seen = torch.cat(batches)
    assert _divergence(llama, made, seen) < 0.99 * _divergence(llama, start, seen)
    assert all(torch.equal(t, before[name]) for name, t in llama.state_dict().items())
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == gradients
    assert all(p.grad is None for p in llama.parameters())


def test_never_worse_on_the_batches(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RATE", 3.0)  # throws scales about
    weights = _weights(llama, "w4g32")
    made = distill(llama, weights, [torch.arange(20)[None]], epochs=3, progress=False)
    assert all(made[name] is weight for name, (_, weight) in weights.items())


def test_padding_does_not_count(llama: nn.Module) -> None:
    weights = _weights(llama, "w3g32")
    tokens = torch.arange(1, 17)[None]
    mask = torch.ones_like(tokens)
    mask[0, 10:] = 0
    batch, other = ({"input_ids": t, "attention_mask": mask} for t in (tokens, torch.where(mask.bool(), tokens, 7)))
    first, second = (distill(llama, weights, [b], epochs=2, progress=False) for b in (batch, other))
    assert all(torch.equal(first[name].scale, second[name].scale) for name in weights)


def test_a_model_without_logits_keeps_its_output() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    model.again = nn.Identity()
    batches = [TOKENS, TOKENS.flip(0)]
    weights = _weights(model, "w2g32")
    made = distill(model, weights, batches, epochs=20, progress=False)

    def miss(found: dict[str, QTensor]) -> float:
        twin = copy.deepcopy(model)
        for name, weight in found.items():
            twin.get_submodule(name).weight.data = weight.dequantize(torch.float32)
        return (twin(TOKENS) - model(TOKENS)).square().mean().item()

    assert miss(made) < 0.7 * miss({name: weight for name, (_, weight) in weights.items()})


def test_errors_name_the_batch_and_leave_the_model(llama: nn.Module) -> None:
    weights = _weights(llama, "w4g32")
    gradients = {name: p.requires_grad for name, p in llama.named_parameters()}
    with pytest.raises(CalibrationError, match="no batches"):
        distill(llama, weights, [], epochs=1, progress=False)
    with pytest.raises(CalibrationError, match="without a floating tensor on calibration batch 0"):
        distill(_Counts(), _weights(_Counts(), "w4g32"), [torch.zeros(1, 64)], epochs=1, progress=False)
    broken = copy.deepcopy(llama)
    broken.get_submodule("model.norm").weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="output is not finite on calibration batch 0"):
        distill(broken, _weights(broken, "w4g32"), [torch.arange(9)[None]], epochs=1, progress=False)
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == gradients


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).argmax(-1)


@pytest.mark.parametrize("method", ["rtn", None, "gptq"])
def test_quantize_model_distills_whatever_the_method(llama: nn.Module, method: str | None) -> None:
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    plain, distilled = copy.deepcopy(llama), copy.deepcopy(llama)
    options = dict(method=method, progress=False)
    calibration = None if method == "rtn" else list(tokens.split(1))
    qkernels.quantize_model(plain, "w3g64", calibration=calibration, **options)
    report = qkernels.quantize_model(distilled, "w3g64", calibration=iter(tokens.split(1)), distill=6, **options)
    assert {layer.method for layer in report.layers} == {f"{method or 'search'}, distilled"}
    with torch.no_grad():
        p, q, r = (torch.log_softmax(m(tokens).logits.double(), -1) for m in (llama, plain, distilled))
    losses = [float((p.exp() * (p - found)).sum()) for found in (q, r)]
    assert losses[1] < 0.97 * losses[0]


def test_quantize_model_refuses_what_distilling_cannot_use(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="distill needs calibration"):
        qkernels.quantize_model(llama, "w4g64", distill=1)
    with pytest.raises(ValueError, match="0 or more, got 0 and -1"):
        qkernels.quantize_model(llama, "w4g64", distill=-1, calibration="random")
    assert type(llama.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
