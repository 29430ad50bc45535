"""Codes of a block moved together: where they may go, what it gains, and within a calibration."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Scheme, packing
from qkernels.calibrate import signround as module
from qkernels.calibrate.batches import CalibrationError, Call
from qkernels.calibrate.blocks import calibrate
from qkernels.calibrate.signround import round_together
from qkernels.tensor import QTensor, quantize
from tests.tiny_model import Block, save_tiny_llama

SCHEMES = ["w2g32", "w3g48", "w2g32s", "w3c", "w2g32f", "w3t"]


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 64, generator=generator)
    return [torch.randn(40, 16, generator=generator) @ mix for _ in range(4)]


def _weights(block: nn.Module, scheme: str) -> dict[str, tuple[Tensor, QTensor]]:
    linears = {path: m for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    return {path: (m.weight.detach(), quantize(m.weight.detach(), scheme)) for path, m in linears.items()}


def _miss(block: nn.Module, weights: dict[str, QTensor], inputs: list[Tensor]) -> float:
    twin = copy.deepcopy(block)
    for path, weight in weights.items():
        twin.get_submodule(path).weight.data = weight.dequantize(torch.float32)
    return sum((twin(x) - block(x)).square().sum().item() for x in inputs)


@pytest.mark.parametrize("text", SCHEMES)
def test_the_block_comes_out_nearer_and_codes_go_one_step_at_most(block: nn.Module, text: str) -> None:
    inputs, weights = _inputs(), _weights(block, text)
    calls = [Call((), {})] * len(inputs)
    wanted = [block(x) for x in inputs]
    before = {name: t.clone() for name, t in block.state_dict().items()}
    made = round_together(block, weights, calls, inputs, wanted, steps=60)
    start = {path: weight for path, (_, weight) in weights.items()}
    assert _miss(block, made, inputs) < 0.8 * _miss(block, start, inputs)
    scheme = Scheme.parse(text)
    changed = 0
    for path, (original, old) in weights.items():
        new = made[path]
        codes = [packing.unpack(w.packed, scheme.bits, original.shape[1]).int() for w in (old, new)]
        moved = (codes[1] - codes[0]).abs()
        changed += int(moved.sum())
        assert int(moved.max()) <= 1
        assert int(codes[1].min()) >= scheme.code_min
        assert int(codes[1].max()) <= scheme.code_max
        ratio = new.scale.float() / old.scale.float()
        assert bool(((ratio - 1).abs() < module._TRAVEL + 1e-3).all())
        assert (new.zero is None) == (old.zero is None)
        assert new.zero is None or torch.equal(new.zero, old.zero)
    assert changed
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


@pytest.mark.parametrize("text", SCHEMES)
def test_it_begins_with_the_codes_that_came(block: nn.Module, text: str) -> None:
    for original, weight in _weights(block, text).values():
        for start in (weight, quantize(original * 1.3, text)):  # the second's codes are not the nearest
            layer = module._Layer(original, start)
            assert torch.equal(layer.stored().packed, start.packed)
            torch.testing.assert_close(layer.decoded().detach(), start.dequantize(), rtol=1e-5, atol=1e-6)


def test_never_worse(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Layer, "descend", lambda layer, rate: layer.shift.data.fill_(0.5))
    inputs, weights = _inputs(), _weights(block, "w4g32")
    wanted = [block(x) for x in inputs]
    made = round_together(block, weights, [Call((), {})] * 4, inputs, wanted, steps=2)
    assert all(made[path] is weight for path, (_, weight) in weights.items())


def test_a_block_without_a_tensor_is_refused(block: nn.Module) -> None:
    class Silent(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    silent = Silent()
    with pytest.raises(CalibrationError, match="no floating tensor"):
        round_together(silent, _weights(silent, "w4g32"), [Call((), {})], _inputs()[:1], _inputs()[:1], steps=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("m") / "tiny-llama")).eval()


def test_quantize_model_rounds_by_block_and_resumes(llama: nn.Module, tmp_path: pathlib.Path) -> None:
    tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    options = dict(method="gptq", calibration=list(tokens.split(2)), progress=False)
    plain, rounded, resumed = (copy.deepcopy(llama) for _ in range(3))
    qkernels.quantize_model(plain, "w2g32", **options)
    first = qkernels.quantize_model(rounded, "w2g32", rounding=40, resume=tmp_path, **options)
    again = qkernels.quantize_model(resumed, "w2g32", rounding=40, resume=tmp_path, **options)
    for report in (first, again):
        assert {layer.method for layer in report.layers} == {"gptq, rounded by block"}
    with torch.no_grad():
        p, q, r, s = (torch.log_softmax(m(tokens).logits.double(), -1) for m in (llama, plain, rounded, resumed))
    assert torch.equal(r, s)
    assert float((p.exp() * (p - r)).sum()) < float((p.exp() * (p - q)).sum())


def test_a_model_without_blocks_is_one(block: nn.Module) -> None:
    linears = {path: (m, Scheme.parse("w2g32")) for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    inputs = list(torch.randn(8, 40, 64, generator=torch.Generator().manual_seed(2)))
    plain, rounded = (calibrate(block, linears, inputs, rounding=steps, progress=False) for steps in (0, 160))
    misses = [_miss(block, {path: weight for path, (weight, _) in made.items()}, inputs) for made in (plain, rounded)]
    assert misses[1] < misses[0]


def test_quantize_model_refuses_rounding_without_blocks(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="rounding is for method 'gptq'"):
        qkernels.quantize_model(llama, "w4g32", rounding=10)
    with pytest.raises(ValueError, match="got -1 and 0"):
        qkernels.quantize_model(llama, "w4g32", method="gptq", calibration="random", rounding=-1)
