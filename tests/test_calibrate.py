"""GPTQ against a plain implementation, its descent against algebra, and the walk over a model against hooks."""

from __future__ import annotations

import copy
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import Scheme, reference
from qkernels.calibrate import blocks as blocks_module
from qkernels.calibrate import gptq as gptq_module
from qkernels.calibrate.batches import CalibrationError, Call, padding
from qkernels.calibrate.blocks import _made_up, _Moments, calibrate
from qkernels.calibrate.gptq import SingularHessianError, damped, gptq
from qkernels.calibrate.probe import importances, random_batches
from qkernels.calibrate.resume import ResumeError
from qkernels.calibrate.walk import input_until, inputs_of
from qkernels.fit import fit


def _inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, features // 4, generator=generator) @ torch.randn(
        features // 4, features, generator=generator
    )
    x = few + 0.3 * torch.randn(tokens, features, generator=generator)
    return x * torch.rand(features, generator=generator) ** 2


def _loss(w: Tensor, code: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, h: Tensor) -> Tensor:
    miss = (w - reference.decode(code, scale, zero, scheme)).double()
    return ((miss @ h.double()) * miss).sum(1)


SCHEMES = ["w4g32", "w3g48", "w2g32s", "w4c", "w3g32f", "w4ts"]


@pytest.mark.parametrize("text", SCHEMES)
def test_each_step_loses_less_at_the_output(text: str) -> None:
    scheme, w, x = Scheme.parse(text), torch.randn(24, 80), _inputs(300, 80)
    h = damped(x.T @ x, gptq_module.DAMPING)
    nearest, searched = (fit(w, scheme, method, importance) for method, importance in
                         (("rtn", None), ("search", h.diagonal())))  # fmt: skip
    losses = [_loss(w, reference.encode(w, *found, scheme), *found, scheme, h).sum() for found in (nearest, searched)]
    grid = gptq_module.Grid(scheme, *searched, 80)
    spread = gptq_module._spread_errors(w.T.contiguous(), h, grid).T.to(torch.uint8).contiguous()
    losses.append(_loss(w, spread, *searched, scheme, h).sum())
    code, scale, zero = gptq(w, x.T @ x, scheme)
    assert int(code.min()) >= scheme.code_min
    assert int(code.max()) <= scheme.code_max
    losses.append(_loss(w, code, scale, zero, scheme, h).sum())
    for before, after, gain in zip(losses, losses[1:], (1.0, 0.7, 1.0), strict=False):
        assert after < gain * before


@pytest.mark.parametrize("text", ["w4g32", "w3g48f", "w2c"])
def test_errors_spread_as_in_a_plain_implementation(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimal brain quantization with an explicit inverse, one column at a time, float64; small blocks meet borders."""
    monkeypatch.setattr(gptq_module, "_BLOCK", 32)
    scheme, w, x = Scheme.parse(text), torch.randn(6, 80), _inputs(200, 80)
    h = damped(x.T @ x, 0.01)
    scale, zero = fit(w, scheme, "search", h.diagonal())
    code = gptq_module._spread_errors(w.T.contiguous(), h, gptq_module.Grid(scheme, scale, zero, 80)).T
    order = torch.argsort(h.diagonal(), descending=True, stable=True).numpy()
    inverse = np.linalg.inv(h.double().numpy())
    rest, length = w.double().numpy().copy(), scheme.group_length(80)
    wanted, left = np.zeros_like(rest), list(order)
    for k in order:
        group = k // length
        s = scale[group].double().numpy()
        base = 0.0 if zero is None else zero[group].double().numpy()
        if scheme.value_map == "offset":
            q = np.clip(np.rint((rest[:, k] - base) / s), 0, scheme.code_max)
            value = s * q + base
        else:
            q = np.clip(np.rint(rest[:, k] / s) + base, 0, scheme.code_max)
            value = s * (q - base)
        wanted[:, k] = q
        error = (rest[:, k] - value) / inverse[k, k]
        left.remove(k)
        rest[:, left] -= np.outer(error, inverse[k, left])
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    # Float32 may break a near tie the other way, and what follows in that row with it.
    same_rows = (torch.from_numpy(wanted) == code.double()).all(1)
    assert same_rows.float().mean() >= 5 / 6


def test_scales_are_the_least_squares_solution() -> None:
    """Against a dense least-squares problem for one row."""
    scheme, x = Scheme.parse("w3g32-fp32"), _inputs(400, 80)
    w = torch.randn(3, 80)
    h = x.T @ x / 400
    scale, zero = fit(w, scheme)
    code = reference.encode(w, scale, zero, scheme)
    found = gptq_module._best_scales(
        w.T.contiguous(), h, gptq_module.Grid(scheme, scale, zero, 80), code.T.float().contiguous()
    )
    assert zero is not None
    for row in range(3):
        columns = []
        for group, start in enumerate(range(0, 80, 32)):
            part = torch.zeros(80, dtype=torch.float64)
            part[start : start + 32] = code[row, start : start + 32].double() - zero[group, row]
            columns.append(x.double() @ part)
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), x.double() @ w[row].double()).solution
        torch.testing.assert_close(found[:, row].double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_sweep_never_loses() -> None:
    scheme, w, x = Scheme.parse("w2g32"), torch.randn(16, 80), _inputs(200, 80)
    h = damped(x.T @ x, 0.01)
    grid = gptq_module.Grid(scheme, *fit(w, scheme), 80)
    code = reference.encode(w, grid.scale, grid.zero, scheme).T.float().contiguous()
    losses = []
    for _ in range(4):
        losses.append(_loss(w, code.T.to(torch.uint8).contiguous(), grid.scale, grid.zero, scheme, h))
        code = gptq_module._sweep(w.T.contiguous(), h, grid, code)
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(losses))
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_inputs_that_never_come_do_not_matter_and_are_rounded() -> None:
    scheme, w, x = Scheme.parse("w4g32"), torch.randn(8, 64), _inputs(200, 64)
    x[:, 5] = 0.0
    code, scale, zero = gptq(w, x.T @ x, scheme)
    rebuilt = reference.decode(code, scale, zero, scheme)
    assert ((rebuilt - w)[:, 5].abs() <= 0.51 * scale[0].float()).float().mean() > 0.6  # unless clipped
    none = gptq(w, torch.zeros(64, 64), scheme)
    assert (w - reference.decode(*none, scheme)).abs().max() < 1.0


def test_what_a_hessian_must_be() -> None:
    w = torch.randn(4, 32)
    with pytest.raises(ValueError, match="must be finite"):
        gptq(w, torch.full((32, 32), torch.nan), Scheme.parse("w4g32"))
    indefinite = torch.ones(32, 32) * 5 + torch.eye(32) * -4
    with pytest.raises(SingularHessianError, match="singular"):
        gptq(w, indefinite, Scheme.parse("w4g32"))


def test_weights_make_up_for_other_inputs() -> None:
    """The best weight on inputs that are off is that of ridge regression; on equal inputs nothing moves, exactly."""
    x, w = _inputs(500, 48), torch.randn(5, 48)
    off = x + 0.2 * torch.randn_like(x)
    moments = _Moments.zeros(48, x.device, crossed=True)
    moments.add(off, x)
    ridge = 0.01 * moments.hessian.diagonal().mean() * torch.eye(48)
    gram = (off.T @ off + ridge).double()
    wanted = torch.linalg.solve(gram, (off.T @ x + ridge).double() @ w.T.double()).T
    torch.testing.assert_close(_made_up(w, moments, 1.0).double(), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(_made_up(w, moments, 0.5).double(), (wanted + w) / 2, rtol=1e-3, atol=1e-4)
    same = _Moments.zeros(48, x.device, crossed=True)
    same.add(x, x)
    assert torch.equal(_made_up(w, same, 1.0), w)


# ---- models ----


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _tokens(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(0, 97, (count, 48), generator=torch.Generator().manual_seed(seed)).split(1))


def _plan(model: nn.Module, text: str) -> dict[str, tuple[nn.Linear, Scheme]]:
    scheme = Scheme.parse(text)
    return {n: (m, scheme) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}


def test_each_layer_sees_what_the_quantized_layers_before_it_give() -> None:
    """The down projection of the second block, from hooks on a model whose earlier Linears hold quantized weights."""
    model, batches = _llama(), _tokens(6)
    done = calibrate(model, _plan(model, "w3g32"), batches, mismatch=0.0, progress=False)
    assert [method for _, method in done.values()] == ["gptq"] * 21
    name = "model.layers.1.mlp.down_proj"
    earlier, wanted = copy.deepcopy(model), model.get_submodule(name).weight.detach()
    for path, module in earlier.named_modules():
        if path == name:
            break
        if path in done:
            module.weight.data = done[path][0].dequantize()
    seen: list[Tensor] = []
    earlier.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            earlier(batch)
    x = torch.cat(seen)
    code, scale, zero = gptq(wanted, x.T @ x, Scheme.parse("w3g32"))
    found = done[name][0]
    h = damped(x.T @ x, 0.01)
    both = [wanted - w for w in (found.dequantize(), reference.decode(code, scale, zero, found.scheme))]
    losses = [((miss @ h) * miss).sum().item() for miss in both]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert (both[0] == both[1]).float().mean() > 0.98


@pytest.mark.parametrize("calibration", ["batches", "random"])
def test_calibrated_models_are_closer_to_the_original(calibration: str) -> None:
    model, evaluation = _llama(), torch.cat(_tokens(4, seed=9))
    errors = {}
    with torch.no_grad():
        wanted = model(evaluation).logits
        for method in ("rtn", "search", "gptq"):
            twin = copy.deepcopy(model)
            given: Any = {"rtn": None, "search": None}.get(
                method, _tokens(16) if calibration == "batches" else "random"
            )
            report = qkernels.quantize_model(twin, "w2g32", method=method, calibration=given, progress=False)
            assert {layer.method for layer in report.layers} == {method}
            assert method in str(report)
            errors[method] = (twin(evaluation).logits - wanted).square().mean().item()
    assert errors["search"] < 0.9 * errors["rtn"]
    assert errors["gptq"] < 0.75 * errors["search"]


def test_the_default_knows_inputs_where_it_can() -> None:
    from tests.tiny_model import TinyModel

    model = _llama()
    report = qkernels.quantize_model(copy.deepcopy(model), "w4g32", progress=False)
    assert {layer.method for layer in report.layers} == {"search"}
    assert random_batches(TinyModel()) is None
    blind = qkernels.quantize_model(TinyModel(), "w4g32", schemes={"*.up": "w3g32"}, progress=False)
    assert {layer.name: layer.method for layer in blind.layers} == {
        "blocks.0.up": "search (inputs unknown)", "blocks.0.down": "rtn",
        "blocks.1.up": "search (inputs unknown)", "blocks.1.down": "rtn",
    }  # fmt: skip
    batches = random_batches(model)
    assert batches is not None
    assert all(torch.equal(a, b) for a, b in zip(batches, random_batches(model) or [], strict=True))
    name = "model.layers.2.mlp.down_proj"
    linear = model.get_submodule(name)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    torch.testing.assert_close(importances(model, {name: linear}, batches)[name], torch.cat(seen).square().mean(0))


class Routed(nn.Module):
    """A block with a layer that no input reaches, and one that works on the sum of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.first(x)))


def test_a_layer_that_is_never_reached_is_searched_and_the_report_says_so() -> None:
    model = nn.Sequential(Routed(), Routed())
    batches = [torch.randn(8, 32) for _ in range(8)]
    report = qkernels.quantize_model(model, "w4g32", method="gptq", calibration=batches, progress=False)
    methods = {layer.name: layer.method for layer in report.layers}
    assert methods["0.unused"] == "search (not reached by calibration)"
    assert methods["1.last"] == "gptq"


def _broken_batches() -> list[tuple[Any, str]]:
    return [
        ([], "holds no batches"),
        (torch.zeros(1, 4, dtype=torch.long), "iterable of batches, got one Tensor"),
        ([torch.zeros(1, 0, dtype=torch.long)], "batch 0 is empty"),
        ([*_tokens(1), torch.zeros(2, 3, 4, 5, dtype=torch.long)], "fails on calibration batch 1"),
        ([*_tokens(1), 3], "batch 1 must be a Tensor"),
    ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("method", ["gptq", "search"])
def test_broken_batches_change_nothing(case: int, method: str) -> None:
    batches, message = _broken_batches()[case]
    _fails_unchanged(_llama().train(), method, batches, message)


@pytest.mark.parametrize("method", ["gptq", "search"])
def test_activations_that_are_not_finite_name_the_layer(method: str) -> None:
    model = _llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    _fails_unchanged(model, method, _tokens(2), r"model\.layers\.1\.mlp\.gate_proj: its inputs are not finite")


def _fails_unchanged(model: Any, method: str, batches: Any, message: str) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules, training = list(model.named_modules()), [m.training for m in model.modules()]
    with pytest.raises(CalibrationError, match=message):
        qkernels.quantize_model(model, "w4g32", method=method, calibration=batches, progress=False)
    assert list(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awesome"}, "method must be one of 'rtn', 'search', 'hqq', 'gptq', got 'awesome'"),
        ({"method": "gptq"}, "'gptq' needs calibration"),
        ({"method": "rtn", "calibration": "random"}, "'rtn' takes no calibration"),
        ({"calibration": "wikitext"}, "must be batches, 'random' or 'written', got 'wikitext'"),
        ({"method": "gptq", "calibration": "random"}, "needs a model that reads tokens alone, got Sequential"),
    ],
)
def test_bad_requests_say_what_is_accepted(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qkernels.quantize_model(nn.Sequential(nn.Linear(32, 32)), "w4g32", progress=False, **options)


def test_blocks_that_do_not_pass_their_states_on_are_refused() -> None:
    from tests.tiny_model import TOKENS, TinyModel

    with pytest.raises(CalibrationError, match=r"pass their hidden states on.*blocks\.0 is not called so"):
        qkernels.quantize_model(TinyModel(), "w4g32", method="gptq", calibration=[TOKENS], progress=False)


# ---- going on after a cut ----


class _CutError(Exception):
    pass


def _cut_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Let a calibration die in the block after these."""
    original, seen = blocks_module._block, []

    def cut(*args: Any) -> Any:
        seen.append(args)
        if len(seen) > blocks:
            raise _CutError
        return original(*args)

    monkeypatch.setattr(blocks_module, "_block", cut)


def test_a_calibration_goes_on_from_its_last_block(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = _llama(), _tokens(4)
    whole = calibrate(model, _plan(model, "w3g32"), batches, progress=False)
    options: Any = dict(method="gptq", calibration=batches, resume=tmp_path / "run", progress=False)
    with monkeypatch.context() as patch:
        _cut_after(patch, 2)
        with pytest.raises(_CutError):
            qkernels.quantize_model(model, "w3g32", **options)
    assert all(type(m) is not qkernels.QuantLinear for m in model.modules())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "block-0000.safetensors", "block-0001.safetensors", "state.safetensors",
    ]  # fmt: skip
    with pytest.raises(ResumeError, match="another model, with other schemes, batches or settings"):
        qkernels.quantize_model(model, "w3g64", **options)
    with pytest.raises(ResumeError, match="another model"):
        qkernels.quantize_model(model, "w3g32", **{**options, "calibration": _tokens(4, seed=1)})
    (tmp_path / "run" / "block-0000.safetensors").rename(tmp_path / "aside")
    with pytest.raises(ResumeError, match=r"block-0000\.safetensors is missing"):
        qkernels.quantize_model(model, "w3g32", **options)
    (tmp_path / "aside").rename(tmp_path / "run" / "block-0000.safetensors")
    with monkeypatch.context() as patch:
        _cut_after(patch, 1)  # only the third block is left
        qkernels.quantize_model(model, "w3g32", **options)
    for name, (weight, _) in whole.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, qkernels.QuantLinear)
        assert all(torch.equal(a, b) for a, b in zip(layer.qweight.tensors, weight.tensors, strict=True)), name


def test_resume_is_for_what_takes_long() -> None:
    with pytest.raises(ValueError, match="resume is for method 'gptq'"):
        qkernels.quantize_model(_llama(), "w4g32", resume="folder", progress=False)


# ---- padding ----


@pytest.mark.parametrize("options", [{"method": "search"}, {"method": "gptq", "rounding": 4}, {"smooth": "awq"}])
def test_padding_counts_nowhere(options: Any) -> None:
    """What stands where attention_mask says that nothing does must not matter, however large."""
    model, tokens = _llama(), torch.cat(_tokens(8)).view(8, 48)
    mask = torch.ones_like(tokens)
    mask[::2, 30:] = 0
    found = []
    for token in (1, 2):
        with torch.no_grad():  # the second one's hidden states are huge
            model.model.embed_tokens.weight[token] = 100.0 * token
        batches = [{"input_ids": torch.where(mask.bool(), tokens.clamp(min=3), token), "attention_mask": mask}]
        twin = copy.deepcopy(model)
        qkernels.quantize_model(twin, "w3g32", calibration=batches, progress=False, **options)
        found.append([m.qweight.dequantize() for m in twin.modules() if isinstance(m, qkernels.QuantLinear)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mask_that_leaves_nothing_is_refused_and_one_to_add_is_none() -> None:
    tokens = _tokens(1)[0]
    batch = {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)}
    _fails_unchanged(_llama(), "gptq", [batch], "batch 0 is all padding: its attention_mask is zero everywhere")
    assert padding({"attention_mask": torch.zeros(1, 48)}) is None
    assert padding({"attention_mask": torch.tensor([[0.0, -torch.inf]])}) is None
    assert padding({"attention_mask": torch.tensor([[1.0, 0.0]])}) is not None
    assert padding({"attention_mask": torch.ones(1, 1, 48, 48, dtype=torch.bool)}) is None


def test_inputs_of_the_quantized_model_lack_the_same_padding() -> None:
    block, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 2:] = 0
    call = Call((), {}, mask)
    found, _, _ = inputs_of(block, {"2": block[2]}, call, x, 0)
    (until,) = input_until(block, block[2], call, x)
    assert torch.equal(until, found["2"])
    assert torch.equal(until, torch.relu(block[0](x))[mask.bool()])
