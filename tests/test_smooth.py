"""Smoothing: no bit of the unquantized model changes, only what may be scaled is, and it pays where inputs differ."""

from __future__ import annotations

import contextlib
import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Scheme, reference
from qkernels.calibrate import blocks as blocks_module
from qkernels.calibrate import linears as linears_module
from qkernels.calibrate import smooth as smooth_module
from qkernels.calibrate.batches import CalibrationError
from qkernels.calibrate.smooth import smoothed
from qkernels.fit import fit


def _llama(kv_heads: int = 2) -> Any:
    """Norms of very different weights, so that inputs differ as they do in trained models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.randn(64).mul(2).exp2())
    return model


def _tokens(count: int = 4, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(0, 97, (count, 48), generator=torch.Generator().manual_seed(seed)).split(1))


def _plan(model: nn.Module, text: str = "w3g32", skip: tuple[str, ...] = ("lm_head",)) -> Any:
    scheme = Scheme.parse(text)
    return {n: (m, scheme) for n, m in model.named_modules() if type(m) is nn.Linear and not any(s in n for s in skip)}


class _StopError(Exception):
    pass


@pytest.mark.parametrize("method", smooth_module.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_changes_and_all_comes_back(method: str, dtype: torch.dtype) -> None:
    model = _llama().to(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    evaluation = torch.cat(_tokens(3, seed=9))
    with torch.no_grad():
        wanted = model(evaluation).logits
        with (
            contextlib.suppress(_StopError),
            smoothed(model, _plan(model), _tokens(), method, progress=False) as names,
        ):
            assert {name.rpartition(".")[2] for name in names} == {
                "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj",
            }  # fmt: skip
            found = model(evaluation).logits
            if dtype == torch.float16:  # weights near to zero may lose bits
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
            else:
                assert torch.equal(found, wanted)
            changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
            assert {f"{name}.weight" for name in names} <= changed
            assert "model.layers.1.input_layernorm.weight" in changed
            assert not any("o_proj" in name or "embed" in name or "lm_head" in name for name in changed)
            raise _StopError
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_values_take_the_division_where_heads_are_as_many() -> None:
    model = _llama(kv_heads=4)
    with torch.no_grad():  # values of different size, which their products with attention keep
        model.model.layers[0].self_attn.v_proj.weight.mul_(torch.randn(64, 1).mul(2).exp2())
    wanted = model(_tokens()[0]).logits
    with smoothed(model, _plan(model), _tokens(), "smoothquant", progress=False) as names:
        assert "model.layers.0.self_attn.o_proj" in names
    assert torch.equal(model(_tokens()[0]).logits, wanted)


class _Block(nn.Module):
    """What a norm gives may go elsewhere, and functions may stand between."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(32).mul(2).exp2())
            self.first.weight.mul_(torch.randn(48, 1).mul(2).exp2())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        between = torch.relu if self.kind == "relu" else torch.nn.functional.gelu
        z = self.second(between(self.first(y)))
        if self.kind == "unseen":
            return x + 0.0 * z
        return (y if self.kind == "post" else x) + z


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("relu", {"first", "second"}), ("gelu", {"first"}), ("post", set()), ("unseen", set())],
)
def test_only_what_nothing_else_reads_is_scaled(kind: str, wanted: set[str]) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(*(_Block(kind) for _ in range(2))), [torch.randn(5, 7, 32)]
    before = copy.deepcopy(model.state_dict())
    if not wanted:
        with pytest.raises(CalibrationError, match=r"has nothing to scale in Sequential: no Linear reads what"):
            qkernels.quantize_model(model, "w4g32", smooth="smoothquant", calibration=batches, progress=False)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        return
    output = model(batches[0])
    with smoothed(model, _plan(model), batches, "smoothquant", progress=False) as names:
        assert {name.rpartition(".")[2] for name in names} == wanted
    assert torch.equal(model(batches[0]), output)


def test_a_linear_that_is_left_alone_holds_its_input() -> None:
    """k_proj is not planned, so its weights may not change: neither may what q_proj and v_proj read."""
    model = _llama()
    with smoothed(model, _plan(model, skip=("lm_head", "k_proj")), _tokens(), "awq", progress=False) as names:
        assert {name.rpartition(".")[2] for name in names} == {"gate_proj", "up_proj", "down_proj"}


def test_parameters_with_two_homes_stay() -> None:
    model = _llama()
    layers = model.model.layers
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    with smoothed(model, _plan(model), _tokens(), "awq", progress=False) as names:
        assert {name.rpartition(".")[2] for name in names} == {"down_proj"}


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 120), (torch.float16, 9)])
def test_weights_that_would_overflow_stay(dtype: torch.dtype, exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*(_Block("gelu") for _ in range(2))).to(dtype), torch.randn(5, 7, 32).to(dtype)
    monkeypatch.setattr(smooth_module, "_awq", lambda x, weights: torch.full((32,), exponent))
    for block in model:
        block.first.weight.data.clamp_(-1, 1)
    model[0].first.weight.data[2, 3] = 300.0
    before = copy.deepcopy(model[0].state_dict())
    with smoothed(model, _plan(model), [x], "awq", progress=False) as names:
        assert names == {"1.first"}
    assert all(torch.equal(t, before[name]) for name, t in model[0].state_dict().items())


def test_each_block_is_measured_on_its_own_inputs() -> None:
    model = _llama()
    mlp = model.model.layers[1].mlp
    seen: list[Tensor] = []
    handle = mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in _tokens():
            model(batch)
    handle.remove()
    before = [(w.detach().clone(), Scheme.parse("w3g32")) for w in (mlp.gate_proj.weight, mlp.up_proj.weight)]
    wanted = smooth_module._smoothquant(torch.cat(seen), before)
    with smoothed(model, _plan(model), _tokens(), "smoothquant", progress=False):
        found = (mlp.gate_proj.weight / before[0][0]).log2()
    assert torch.equal(found.nanmedian(0).values.round().int(), wanted)


# ---- models in which a division would be read where it must not ----


class _Reader(nn.Module):
    """A norm and a Linear, whose neighbours read more than they seem to."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.other = nn.Linear(32, 32)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(32).mul(2).exp2())
            self.first.weight.mul_(torch.randn(48, 1).mul(2).exp2())

    def forward(self, x: Any, task: int = 0) -> Any:
        x, kept = x if isinstance(x, tuple) else (x, None)
        y = self.norm(x)
        if self.kind == "one channel":
            return x + self.second(torch.relu(self.first(y))) * y[..., 4:5]
        if self.kind == "routes" and task:
            return x + self.other(y)
        if self.kind == "clamp":
            return x + self.second(self.first(y).clamp(-64, 64))
        z = x + self.second(torch.relu(self.first(y)))
        return (z, y) if self.kind == "returns" else z if kept is None else z + kept


class _Tasks(nn.Module):
    """Blocks that may be told which way to go."""

    def __init__(self, kind: str):
        super().__init__()
        self.blocks = nn.ModuleList(_Reader(kind) for _ in range(2))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        for block in self.blocks:
            x = block(x, task)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("one channel", {"second"}),  # what a gate reads of the norm must not be divided
        ("routes", {"second"}),  # nor what another way reads, that a later batch goes
        ("clamp", {"first"}),  # small changes pass a clamp, those that outliers ask for do not
        ("returns", {"second"}),  # nor what the block returns beside its hidden states
    ],
)
def test_readers_that_a_division_would_reach(kind: str, wanted: set[str]) -> None:
    torch.manual_seed(0)
    model = _Tasks(kind)
    scheme = Scheme.parse("w4g32")
    plan = {n: (m, scheme) for n, m in model.named_modules() if type(m) is nn.Linear and "other" not in n}
    calls = [(torch.randn(5, 7, 32), task) for task in (0, 1)]
    before = [model(*call) for call in calls]
    with smoothed(model, plan, calls, "smoothquant", progress=False) as names:
        assert {name.rpartition(".")[2] for name in names} == wanted
    assert all(torch.equal(model(*call), y) for call, y in zip(calls, before, strict=True))


class _Leaving(_Block):
    """Leaves what its norm gives where the next block finds it."""

    def __init__(self, left: list[Tensor], leaves: bool):
        super().__init__("relu")
        self.left, self.leaves = left, leaves

    def forward(self, x: Tensor) -> Tensor:
        if self.leaves:
            self.left[:] = [self.norm(x)]
        return super().forward(x) + (0.0 if self.leaves else self.left[0])


def test_what_passes_beside_hidden_states_is_refused() -> None:
    torch.manual_seed(0)
    model, left = _Tasks(""), list[Tensor]()
    model.blocks = nn.ModuleList(_Leaving(left, leaves) for leaves in (True, False))
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))  # type: ignore[method-assign]
    before, x = copy.deepcopy(model.state_dict()), torch.randn(5, 7, 32)
    with (
        pytest.raises(CalibrationError, match="would change what _Tasks returns, though no block's output"),
        smoothed(model, _plan(model), [x], "smoothquant", progress=False),
    ):
        raise AssertionError("smoothed")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_storage_that_is_shared_stays() -> None:
    model = _llama()
    layers = model.model.layers
    layers[1].input_layernorm.weight.data = layers[0].input_layernorm.weight.data
    wanted = model(_tokens()[0]).logits
    with smoothed(model, _plan(model), _tokens(), "awq", progress=False) as names:
        assert not any("q_proj" in name for name in names)
    assert torch.equal(model(_tokens()[0]).logits, wanted)


def test_an_error_amid_a_change_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    before = copy.deepcopy(model.state_dict())
    equal, asked = torch.equal, []

    def fails(a: Tensor, b: Tensor) -> bool:
        if a.shape == (64,) and a.dtype == torch.float32 and b is model.model.layers[1].input_layernorm.weight:
            raise torch.OutOfMemoryError
        asked.append(a)
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", fails)
    with pytest.raises(torch.OutOfMemoryError), smoothed(model, _plan(model), _tokens(), "awq", progress=False):
        raise AssertionError("smoothed")
    monkeypatch.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_padding_that_is_not_a_number_does_not_hide_what_may_be_scaled() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(_Block("relu"), _Block("relu"))})
    model.forward = lambda x, attention_mask: model["blocks"](x)  # type: ignore[method-assign]
    x, mask = torch.randn(5, 7, 32), torch.ones(5, 7, dtype=torch.long)
    mask[2, 3:] = 0
    x[2, 3:] = torch.nan
    batch = {"x": x, "attention_mask": mask}
    with smoothed(model, _plan(model), [batch], "smoothquant", progress=False) as names:
        assert {name.rpartition(".")[2] for name in names} == {"first", "second"}


def test_awq_takes_the_power_of_least_error() -> None:
    torch.manual_seed(0)
    scheme, x = Scheme.parse("w3g32"), torch.randn(300, 64) * torch.randn(64).mul(2).exp2()
    w = torch.randn(24, 64)

    def error(exponents: Tensor) -> float:
        scale, zero = fit(torch.ldexp(w, exponents), scheme, "rtn")
        code = reference.encode(torch.ldexp(w, exponents), scale, zero, scheme)
        found = torch.ldexp(reference.decode(code, scale, zero, scheme).float(), -exponents)
        return float(((found - w) @ x.T).square().sum())

    found = smooth_module._awq(x, [(w, scheme)])
    size = x.abs().mean(0).log2()
    tried = [size * i / 20 for i in range(20)]
    errors = [error((e - (e.max() + e.min()) / 2).round().int()) for e in tried]
    assert error(found) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < 0.7 * errors[0]


def test_smoothquant_shares_outliers() -> None:
    x, w = torch.ones(3, 4), torch.ones(2, 4)
    x[1] = torch.tensor([16.0, 1.0, -64.0, 1.0])
    w[0] = torch.tensor([1.0, 1.0, 4.0, -16.0])
    other = torch.full((5, 4), 0.5)
    other[4, 1] = -64.0
    found = smooth_module._smoothquant(x, [(w, Scheme.parse("w8c")), (other, Scheme.parse("w8c"))])
    # sqrt(16 / 1), sqrt(1 / 64), sqrt(64 / 4), sqrt(1 / 16) = 2^2, 2^-3, 2^2, 2^-2; their middle, 2^-1/2, is taken out
    exact = torch.tensor([2.5, -2.5, 2.5, -1.5])
    assert found.tolist() == exact.round().tolist()
    assert smooth_module._smoothquant(torch.zeros(2, 4), [(w, Scheme.parse("w8c"))]).abs().max() < 10


def test_inputs_that_never_come_are_not_scaled_without_end() -> None:
    x = torch.randn(50, 32)
    x[:, 3] = 0.0
    assert smooth_module._awq(x, [(torch.randn(8, 32), Scheme.parse("w2g32"))]).abs().max() <= 14


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"method": "rtn"}, "rtn"),
        ({}, "search"),
        ({"method": "gptq"}, "gptq"),
        ({"method": "gptq", "rounding": 4, "distill": 1}, "gptq, rounded by block, distilled"),
    ],
)
def test_smoothing_goes_before_any_method(options: Any, used: str) -> None:
    model = _llama()
    twin = copy.deepcopy(model)
    report = qkernels.quantize_model(
        twin, "w3g32", smooth="awq", calibration=iter(_tokens(8)), progress=False, **options
    )
    methods = {layer.name.rpartition(".")[2]: layer.method for layer in report.layers}
    assert {name for name, method in methods.items() if method == f"awq, {used}"} == set(methods) - {"o_proj"}
    assert methods["o_proj"] == used
    with torch.no_grad():
        wanted, found = (m(_tokens(1, seed=9)[0]).logits for m in (model, twin))
    assert (found - wanted).norm() < 0.6 * wanted.norm()  # as for two that have nothing in common: 1.4


def test_outputs_of_layers_are_nearer() -> None:
    model = _llama()
    original, evaluation = copy.deepcopy(model), [torch.cat(_tokens(4, seed=9))]
    with smoothed(model, _plan(model), _tokens(8), "awq", progress=False):
        pass
    errors = []
    for unquantized in (original, model):
        twin = copy.deepcopy(unquantized)
        qkernels.quantize_model(twin, "w3g32", method="rtn", progress=False)
        report = qkernels.report(twin, unquantized, evaluation)
        errors.append(dict(zip(report["name"], report["output_error"], strict=True)))
    for name, before in errors[0].items():
        limit = 0.92 if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj")) else 1.05
        assert errors[1][name] < limit * before, name


def test_what_fails_later_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    model = _llama()
    before = copy.deepcopy(model.state_dict())

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise _StopError

    options: Any = {"smooth": "awq", "calibration": _tokens(), "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "gptq", fail)
        with pytest.raises(_StopError):
            qkernels.quantize_model(model, "w3g32", method="gptq", **options)
    with monkeypatch.context() as patch:
        quantize = linears_module.quantize
        patch.setattr(
            linears_module, "quantize", lambda w, *args, **kw: quantize(w, *args, **kw) if w.shape[0] < 96 else fail()
        )
        with pytest.raises(_StopError):
            qkernels.quantize_model(model, "w3g32", **options)
    assert not any(isinstance(m, qkernels.QuantLinear) for m in model.modules())
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj: its inputs are not finite"):
        qkernels.quantize_model(model, "w3g32", method="rtn", **options)
    model.model.layers[1].post_attention_layernorm.weight.data.copy_(
        before["model.layers.1.post_attention_layernorm.weight"]
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_smoothing_is_the_same_where_a_calibration_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"method": "gptq", "smooth": "awq", "calibration": _tokens(), "resume": tmp_path, "progress": False}
    models = [_llama(), _llama()]
    qkernels.quantize_model(models[0], "w3g32", **options)
    monkeypatch.setattr(blocks_module, "gptq", None)  # all blocks are finished
    qkernels.quantize_model(models[1], "w3g32", **options)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": "spinquant"}, "smooth must be one of 'awq', 'smoothquant', got 'spinquant'"),
        ({"smooth": "awq"}, "smooth='awq' needs calibration: batches to call the model with"),
    ],
)
def test_bad_requests_say_what_is_accepted(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qkernels.quantize_model(nn.Sequential(nn.Linear(32, 32)), "w4g32", progress=False, **options)


@pytest.mark.parametrize("text", ["w8cs-a8s", "w4g32-a8", "w8cs-a8ts"])
def test_smoothquant_takes_the_share_that_loses_least_where_inputs_are_quantized(text: str) -> None:
    """One channel is a hundred times the others: some share helps, and none is better than the one taken."""
    scheme = Scheme.parse(text)
    x = torch.randn(200, 64)
    x[:, 7] *= 100
    weights = [(torch.randn(32, 64), scheme), (torch.randn(16, 64), scheme)]
    found = smooth_module._smoothquant(x, weights)
    assert found[7] > found.float().mean()  # inputs of this channel become smaller, its weights larger
    largest = torch.stack([w.abs().amax(0) for w, _ in weights]).amax(0)
    errors = []
    for share in smooth_module._SHARES:
        exact = share * x.abs().amax(0).log2() - (1 - share) * largest.log2()
        exponents = (exact - (exact.max() + exact.min()) / 2).round().int()
        errors.append(smooth_module._output_error(x, weights, exponents))
    plain = smooth_module._output_error(x, weights, torch.zeros_like(found))
    assert smooth_module._output_error(x, weights, found) == min(errors) < 0.5 * plain
