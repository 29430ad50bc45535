"""Ranges of static activations and what quantizing inputs loses, against definitions and against what layers read."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import QuantLinear, Scheme, reference_int8
from qkernels.calibrate import linears as linears_module
from qkernels.calibrate import ranges as ranges_module
from qkernels.calibrate.batches import CalibrationError
from qkernels.calibrate.linears import activation_errors
from qkernels.calibrate.ranges import METHODS, Histogram, Ranges, squared_errors, static_activation
from qkernels.calibrate.smooth import smoothed
from qkernels.scheme import Activations
from tests import models

SYMMETRIC, AFFINE = Activations(static=True, symmetric=True), Activations(static=True, symmetric=False)
BOTH = pytest.mark.parametrize("how", [SYMMETRIC, AFFINE], ids=str)


def _lost(x: Tensor, how: Activations, activation: Tensor) -> float:
    """The squared error of x, quantized by the oracle."""
    code = reference_int8.quantize_activations(x, how, activation)
    return float((reference_int8.dequantize_activations(*code) - x).double().square().sum())


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "normal": lambda: _normal(300, 500),
    "positive": lambda: _normal(300, 500).relu() * 7,
    "moved": lambda: _normal(300, 500) * 0.01 + 0.03,
    "heavy tails": lambda: _normal(300, 500) / _normal(300, 500, seed=1).abs().clamp(min=0.01),
    "negative": lambda: -_normal(300, 500).abs().exp() * 1e-6,
    "an outlier": lambda: _normal(300, 500).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(-90.0)),
}
INPUTS = pytest.mark.parametrize("kind", list(KINDS))


# ---- histograms ----


def test_every_value_is_counted_in_its_bin() -> None:
    x = torch.cat([
        _normal(3000) * 10.0 ** torch.randint(-30, 30, (3000,), generator=torch.Generator().manual_seed(1)).float(),
        torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, 1.03125, -2.0, 3.4028234663852886e38, -3.4028234663852886e38]),
    ])  # fmt: skip
    seen = Histogram.of(x)
    starts, ends = ranges_module._edges()
    for negative, counts in enumerate(seen.counts):
        own = x[torch.signbit(x) == bool(negative)].abs().double()
        wanted = ((own >= starts[:, None]) & (own < ends[:, None])).sum(1)
        assert torch.equal(counts[: len(starts)], wanted)
    assert int(seen.counts.sum()) == len(x)
    assert (float(seen.low), float(seen.high)) == (float(x.min()), float(x.max()))
    wide = starts >= 2.0**-126
    assert float((ends / starts)[wide].max()) == 1 + 1 / 32


def test_how_batches_are_cut_makes_no_difference_and_memory_stays_the_same() -> None:
    x = KINDS["heavy tails"]()
    whole = Histogram.of(x)
    parts = [Histogram.of(part) for part in (x[:7], x[7:100].T, 1.0 * x[100:])]
    for order in itertools.permutations(parts):
        found = order[0] + order[1] + order[2]
        assert torch.equal(found.counts, whole.counts)
        assert (found.low, found.high) == (whole.low, whole.high)
    assert whole.counts.shape == Histogram.of(x * 1e20).counts.shape == Histogram.of(x[:1, :1]).counts.shape


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    x = _normal(20, 30)
    assert Histogram.of(x).finite
    x[3, 4] = value
    assert not (Histogram.of(_normal(20, 30)) + Histogram.of(x)).finite
    ranges = Ranges({"a.layer": SYMMETRIC}, "mse")
    ranges.see("a.layer", x)
    with pytest.raises(CalibrationError, match=r"a\.layer: its inputs are not finite on the calibration batches"):
        ranges.result()


# ---- ranges ----


def test_minmax_by_hand() -> None:
    seen = Histogram.of(torch.tensor([[-3.0, 2.0], [0.5, 1.0]]))
    assert static_activation(seen, SYMMETRIC, "minmax").tolist() == [torch.tensor(3.0).div(127).item(), 0.0]
    seen = Histogram.of(torch.tensor([[-1.0, 2.0], [0.5, 3.0]]))
    # half of the range is 2, in 127.5 steps; zero lies 1 * 127.5 / 2 = 63.75 steps above the lowest code, -128
    assert static_activation(seen, AFFINE, "minmax").tolist() == [torch.tensor(2.0).div(127.5).item(), -64.0]
    seen = Histogram.of(torch.tensor([[4.0, 2.0]]))  # 0 is in every range
    assert static_activation(seen, AFFINE, "minmax").tolist() == [torch.tensor(2.0).div(127.5).item(), -128.0]


@BOTH
@INPUTS
def test_percentiles_are_those_of_the_values(how: Activations, kind: str) -> None:
    x = KINDS[kind]()
    scale, zero = static_activation(Histogram.of(x), how, "percentile").tolist()
    ordered = x.flatten().double().sort().values
    beyond = round(1e-4 * int((x != 0).sum()))
    if how.symmetric:
        assert 127 * scale == pytest.approx(float(ordered.abs().sort().values[-1 - beyond]), rel=1 / 32)
        return
    low, high = min(0.0, float(ordered[beyond])), max(0.0, float(ordered[-1 - beyond]))
    assert 255 * scale == pytest.approx(high - low, rel=1 / 16)
    assert scale * (-128 - zero) == pytest.approx(low, abs=scale + abs(low) / 16)


@BOTH
def test_a_percentile_is_not_one_of_zeros(how: Activations) -> None:
    """One-hot rows are zeros but for one value in 20,000."""
    x = 3 * torch.eye(20000)[:5]
    scale, _ = static_activation(Histogram.of(x), how, "percentile").tolist()
    assert scale * (127 if how.symmetric else 255) == pytest.approx(3, rel=1 / 16)


@BOTH
@INPUTS
def test_errors_of_ranges_are_those_of_the_oracle(how: Activations, kind: str) -> None:
    x = KINDS[kind]()
    ends = torch.stack(torch.aminmax(x)) * torch.tensor([1.0, 0.5, 0.2, 0.03])[:, None]
    scale, zero = ranges_module._stored(ends, how)
    found = squared_errors(Histogram.of(x).counts[:, :8160], scale, zero, how)
    wanted = [_lost(x, how, torch.stack(pair)) for pair in zip(scale, zero, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0.05, atol=0)


@BOTH
@INPUTS
def test_mse_loses_least(how: Activations, kind: str) -> None:
    x = KINDS[kind]()
    found = _lost(x, how, static_activation(Histogram.of(x), how, "mse"))
    factors = 2.0 ** (-torch.arange(0, 33) / 4)
    low, high = torch.aminmax(x)
    tried = torch.stack([low * factors, high * factors], 1)
    if not how.symmetric:
        tried = torch.cartesian_prod(low.clamp(max=0) * factors, high.clamp(min=0) * factors)[::5]
    least = min(_lost(x, how, torch.cat(ranges_module._stored(ends[None], how))) for ends in tried)
    assert found < 1.02 * least


@BOTH
def test_one_outlier_in_a_million_does_not_set_the_range(how: Activations) -> None:
    x = 100 * _normal(1000, 1000)
    x[123, 456] = 1e4
    lost = {method: _lost(x, how, static_activation(Histogram.of(x), how, method)) for method in METHODS}
    assert lost["percentile"] < 0.7 * lost["minmax"]
    assert lost["mse"] < 0.6 * lost["minmax"]
    assert lost["mse"] < lost["percentile"]


@BOTH
@pytest.mark.parametrize("size", [1e-45, 1e-38, 3.4e38])
@pytest.mark.parametrize("method", METHODS)
def test_extreme_values_have_ranges_that_can_be_stored(how: Activations, size: float, method: str) -> None:
    x = torch.tensor([[size, -size, 0.0, size / 2]])
    activation = static_activation(Histogram.of(x), how, method)
    q = qkernels.quantize(torch.randn(3, 4), f"w8cs-{how}", activation=activation)
    assert torch.isfinite(torch.nn.functional.linear(x, q)).all() or size > 1e38


# ---- whole models ----


class _Attention(nn.Module):
    """Siblings that read one input; what comes after them has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n, bias=False) for n in (64, 32, 32))
        self.out, self.spare = nn.Linear(128, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return x + self.out(torch.cat(parts, -1))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(_Attention(), _Attention()).eval()


def _inputs(model: nn.Module, batches: list[Any], name: str) -> Tensor:
    """All that a layer reads, padding aside."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def _layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


BATCHES = [_normal(2, 9, 64, seed=i) * (1 + 3 * i) for i in range(3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["w8cs-a8ts", "w8g32-a8t", "w4g32-a8ts"])
def test_ranges_are_those_of_what_layers_read(method: str, scheme: str) -> None:
    model, original = _model(), _model()
    report = qkernels.quantize_model(
        model, scheme, skip=["*.spare"], calibration=iter(BATCHES), ranges=method, merge=True, progress=False
    )
    how = Scheme.parse(scheme).activations
    assert how is not None
    for name, layer in _layers(model).items():
        wanted = static_activation(Histogram.of(_inputs(original, BATCHES, name)), how, method)
        assert layer.weight_activation is not None
        assert torch.equal(layer.weight_activation, wanted), name
        assert str(layer.scheme) == scheme
    assert report.merged is not None
    assert [len(names) for names in report.merged.groups] == [3, 3]
    assert {layer.scheme for layer in report.layers} == {scheme}


def test_padding_counts_nowhere() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = _model()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.blocks(x)
            return found

    batch = BATCHES[0].clone()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    batch[1, 4:] = math.inf
    model = Padded()
    report = qkernels.quantize_model(
        model, "w8cs-a8ts", skip=["*.spare"], calibration=[{"x": batch, "attention_mask": mask}], ranges="minmax",
        fallback=1.0, progress=False,
    )  # fmt: skip
    layer = model.get_submodule("blocks.0.q_proj")
    assert layer.weight_activation.tolist()[0] * 127 == pytest.approx(float(batch[mask.bool()].abs().max()))
    assert all(one.activation_error is not None and one.activation_error < 0.1 for one in report.layers)


@pytest.mark.parametrize("zeros", [False, True])
def test_layers_whose_inputs_are_never_seen_are_dynamic(zeros: bool) -> None:
    model = _model()
    if zeros:
        original = _Attention.forward
        for block in model:
            block.forward = lambda x, own=block: original(own, x) + own.spare(0 * x)  # type: ignore[misc]
    report = qkernels.quantize_model(model, "w8cs-a8ts", calibration=BATCHES, progress=False)
    schemes = {layer.name: (layer.scheme, layer.method) for layer in report.layers}
    used = "search" if zeros else "rtn"
    assert (
        schemes.pop("0.spare")
        == schemes.pop("1.spare")
        == ("w8cs-a8s", f"{used} (inputs never seen, or zero: dynamic)")
    )
    assert {scheme for scheme, _ in schemes.values()} == {"w8cs-a8ts"}
    assert model[0].spare.weight_activation is None
    assert "inputs never seen" in str(report)


@pytest.mark.parametrize(
    ("options", "scheme", "smooth"),
    [
        ({"method": "rtn"}, "w4g32-a8s", None),
        ({"method": "rtn"}, "w4g32-a8t", None),
        ({}, "w4g32-a8ts", "awq"),
        ({"method": "hqq"}, "w4g32-a8", None),
        ({"method": "gptq"}, "w4g32-a8t", "awq"),
        ({"method": "gptq", "rounding": 2}, "w4g32-a8s", None),
        ({"method": "gptq", "distill": 1}, "w4g32-a8t", None),
    ],
)
def test_weights_get_the_codes_that_they_would_get_anyway(options: Any, scheme: str, smooth: str | None) -> None:
    original = models.make("llama")
    parsed = Scheme.parse(scheme)
    batches = [models.inputs("llama")["input_ids"], torch.arange(40).reshape(2, 20)]
    twins = [copy.deepcopy(original) for _ in range(2)]
    for twin, own in zip(twins, (parsed, parsed.weight_only), strict=True):
        needed = options != {"method": "rtn"} or smooth is not None or own.dynamic != own
        calibration = batches if needed else None
        qkernels.quantize_model(twin, own, calibration=calibration, smooth=smooth, progress=False, **options)
    found, wanted = (_layers(twin) for twin in twins)
    for name, layer in found.items():
        assert layer.scheme == parsed
        assert all(
            torch.equal(a, b) for a, b in zip(layer.qweight.tensors[:3], wanted[name].qweight.tensors, strict=False)
        )
    rest = [{n: t for n, t in twin.state_dict().items() if "_proj" not in n} for twin in twins]
    assert all(torch.equal(t, rest[1][n]) for n, t in rest[0].items())


def test_ranges_are_those_after_smoothing() -> None:
    original = models.make("llama")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "layernorm" in name:
                parameter.copy_(_normal(64, seed=2).mul(2).exp2())
    model, batches = copy.deepcopy(original), [torch.randint(0, 99, (2, 30))]
    qkernels.quantize_model(model, "w8cs-a8ts", smooth="smoothquant", calibration=iter(batches), progress=False)
    plan = {
        n: (m, Scheme.parse("w8cs-a8ts"))
        for n, m in original.named_modules()
        if type(m) is nn.Linear and n != "lm_head"
    }
    before = {name: Histogram.of(_inputs(original, batches, name)) for name in plan}
    with smoothed(original, plan, batches, "smoothquant", progress=False):
        after = {name: Histogram.of(_inputs(original, batches, name)) for name in plan}
    for name, layer in _layers(model).items():
        assert layer.weight_activation is not None
        assert torch.equal(layer.weight_activation, static_activation(after[name], SYMMETRIC, "mse"))
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(static_activation(before[name], SYMMETRIC, "mse"), _layers(model)[name].weight_activation)


def test_no_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    known: list[weakref.ref[Tensor]] = []
    original = Ranges.see

    def see(self: Ranges, name: str, x: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in known))
        known.append(weakref.ref(x))
        original(self, name, x)

    monkeypatch.setattr(Ranges, "see", see)
    model = _model()
    qkernels.quantize_model(model, "w8cs-a8ts", skip=["*.spare"], calibration=BATCHES, fallback=1.0, progress=False)
    assert len(alive) == 8 * len(BATCHES)
    assert max(alive) == 0


# ---- fallback ----


def _spoiled() -> nn.Sequential:
    """A model with one layer whose inputs have an outlier in each token, which its weights do not see."""
    model = _model()
    with torch.no_grad():
        model[0].v_proj.weight[5] *= 3e4
        model[0].out.weight[:, 64 + 32 + 5] = 0
    return model


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w8cs-a8", "w8cs-a8ts"])
def test_only_the_layer_that_was_made_bad_keeps_its_inputs(scheme: str) -> None:
    model, original = _spoiled(), _spoiled()
    report = qkernels.quantize_model(
        model, scheme, skip=["*.spare"], calibration=iter(BATCHES), ranges="minmax", fallback=0.5, progress=False
    )
    for layer in report.layers:
        quantized = model.get_submodule(layer.name)
        assert isinstance(quantized, QuantLinear)
        bad = layer.name == "0.out"
        assert layer.scheme == str(quantized.scheme) == ("w8cs" if bad else scheme)
        assert layer.inputs_left == bad
        assert layer.method == ("search (inputs not quantized)" if bad else "search")
        assert (quantized.weight_activation is not None) == (not bad and "t" in scheme)
        x, w = _inputs(original, BATCHES, layer.name), original.get_submodule(layer.name).weight.detach()
        how = Scheme.parse(scheme).activations if not bad else Scheme.parse(scheme).dynamic.activations  # tried last
        assert how is not None
        activation = static_activation(Histogram.of(x), how, "minmax") if how.static else None
        lost = reference_int8.dequantize_activations(*reference_int8.quantize_activations(x, how, activation)) - x
        wanted = float(((lost @ w.T).norm(dim=1) / (x @ w.T).norm(dim=1)).clamp(max=1).square().mean().sqrt())
        assert layer.activation_error == pytest.approx(wanted, rel=1e-4)
        assert (wanted > 0.5) == bad
        bias = original.get_submodule(layer.name).bias
        assert (quantized.bias is None and bias is None) or torch.equal(quantized.bias, bias)  # type: ignore[arg-type]
    text = str(report)
    assert "; inputs of 1 not quantized" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["0.out"])
    error = next(layer.activation_error for layer in report.layers if layer.inputs_left)
    assert error is not None
    assert row.split()[-2:] == [f"{100 * error:.3g}", "%"]


def test_a_static_range_that_loses_too_much_gives_way_to_a_scale_for_each_token() -> None:
    batches = [batch.clone() for batch in BATCHES]
    batches[0][0, 0, 5] = 1e3  # one token takes the range from all others, by a feature that no weight looks at
    model, original = _model(), _model()
    with torch.no_grad():
        for m in (*model, *original):
            for linear in (m.q_proj, m.k_proj, m.v_proj):
                linear.weight[:, 5] = 0
    report = qkernels.quantize_model(
        model, "w8cs-a8ts", skip=["*.spare"], calibration=batches, ranges="minmax", fallback=0.2, progress=False
    )
    assert not any(layer.inputs_left for layer in report.layers)
    for layer in report.layers:
        quantized, linear = model.get_submodule(layer.name), original.get_submodule(layer.name)
        assert isinstance(quantized, QuantLinear)
        assert isinstance(linear, nn.Linear)
        changed = not layer.name.endswith("out")
        assert layer.scheme == str(quantized.scheme) == ("w8cs-a8s" if changed else "w8cs-a8ts")
        assert layer.method == ("search (inputs dynamic)" if changed else "search")
        assert (quantized.weight_activation is None) == changed
        kept = activation_errors(
            original, {layer.name: (linear, quantized.scheme, quantized.weight_activation)}, batches
        )[layer.name]
        assert layer.activation_error == pytest.approx(kept, rel=1e-6)
        assert kept < 0.2
        activation = static_activation(Histogram.of(_inputs(original, batches, layer.name)), SYMMETRIC, "minmax")
        lost = activation_errors(original, {layer.name: (linear, Scheme.parse("w8cs-a8ts"), activation)}, batches)
        assert (lost[layer.name] > 0.2) == changed


def test_fallback_that_no_layer_asks_for() -> None:
    """The first pattern that fits counts: no layer has quantized inputs."""
    schemes = {"*.q_proj": "w8cs", "*_proj": "w8a8"}
    skip = ["*.k_proj", "*.v_proj", "*.out", "*.spare"]
    report = qkernels.quantize_model(_model(), "w8cs", schemes=schemes, skip=skip, fallback=0.1, progress=False)
    assert [layer.scheme for layer in report.layers] == ["w8cs"] * 2
    assert "not measured" not in str(report)


def test_what_static_ranges_lose_is_told_all_the_same() -> None:
    report = qkernels.quantize_model(_model(), "w8cs-a8ts", skip=["*.spare"], calibration=BATCHES, progress=False)
    errors = {layer.name: layer.activation_error for layer in report.layers}
    assert {layer.scheme for layer in report.layers} == {"w8cs-a8ts"}
    worst = max(errors, key=lambda name: errors[name] or 0)
    assert f"; quantized inputs lose {100 * errors[worst]:.3g} % of outputs at most, at {worst}\n" in str(report)  # type: ignore[operator]
    assert len(set(errors.values())) == len(errors)


def test_smoothing_where_no_linear_is_left() -> None:
    model = nn.Sequential(nn.Embedding(8, 64), _Attention())
    with pytest.raises(ValueError, match="smooth='smoothquant' is for Linears: none is left to quantize"):
        qkernels.quantize_model(
            model, "w8a8", skip=["1.*"], embeddings="w8cs", smooth="smoothquant",
            calibration=[torch.tensor([1])], progress=False,
        )  # fmt: skip


def test_layers_that_are_not_measured_are_counted() -> None:
    report = qkernels.quantize_model(_model(), "w8a8", calibration=BATCHES, fallback=math.inf, progress=False)
    assert sum(layer.activation_error is None for layer in report.layers) == 2  # spare ones
    assert "; inputs of 2 quantized, and not measured" in str(report)
    report = qkernels.quantize_model(_model(), "w8a8", progress=False)
    assert "not measured" not in str(report)


def test_a_loud_token_does_not_hide_what_others_lose() -> None:
    model, loud = _model(), BATCHES[0].clone()
    loud[0, 0] *= 1e6
    activation = torch.tensor([float(loud.abs().max()) / 127, 0.0])  # of which all others become 0
    layers = {"0.q_proj": (model[0].q_proj, Scheme.parse("w8cs-a8ts"), activation)}
    found = activation_errors(model, layers, [loud])["0.q_proj"]
    assert found == pytest.approx(math.sqrt(17 / 18), rel=1e-4)
    nothing = torch.zeros(1, 3, 64)  # loses nothing, and is no division by 0
    found = activation_errors(model, layers, [loud, nothing])["0.q_proj"]
    assert found == pytest.approx(math.sqrt(17 / 21), rel=1e-4)


def test_no_token_loses_more_than_all() -> None:
    model = _model()
    with torch.no_grad():
        model[0].q_proj.weight.fill_(1.0)
    x = torch.tensor([0.77, 0.77, 0.7601, -2.3]).repeat(16)[None, None]  # nearly cancels, as its codes do not
    layers = {"0.q_proj": (model[0].q_proj, Scheme.parse("w8a8"), None)}
    assert activation_errors(model, layers, [x])["0.q_proj"] == 1


def test_errors_add_up_over_batches() -> None:
    model, scheme = _model(), Scheme.parse("w8a8")
    layers = {"0.q_proj": (model[0].q_proj, scheme, None)}
    whole = activation_errors(model, layers, [torch.cat(BATCHES)])
    assert activation_errors(model, layers, BATCHES)["0.q_proj"] == pytest.approx(whole["0.q_proj"], rel=1e-6)
    weight_only = (model[0].k_proj, scheme.weight_only, None)
    assert set(activation_errors(model, {**layers, "0.k_proj": weight_only}, BATCHES)) == {"0.q_proj"}
    unseen = (model[0].spare, scheme, None)
    assert set(activation_errors(model, {**layers, "0.spare": unseen}, BATCHES)) == {"0.q_proj"}


def test_zero_is_the_strictest_and_infinity_only_measures() -> None:
    reports = [
        qkernels.quantize_model(_model(), "w8a8", calibration=BATCHES, fallback=most, progress=False)
        for most in (0, math.inf)
    ]
    assert [{layer.scheme for layer in r.layers if "spare" not in layer.name} for r in reports] == [
        {"w8cs"},
        {"w8cs-a8s"},
    ]
    errors = [[layer.activation_error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1]
    assert [layer.scheme for layer in reports[0].layers if "spare" in layer.name] == ["w8cs-a8s"] * 2  # never seen


def test_without_it_nothing_is_measured() -> None:
    report = qkernels.quantize_model(_model(), "w8a8", calibration=BATCHES, progress=False)
    assert all(layer.activation_error is None for layer in report.layers)
    assert "input error" not in str(report)


# ---- what needs batches, and what does not ----


def test_dynamic_schemes_need_no_batches() -> None:
    model, arguments = models.make("vit"), models.inputs("vit")
    wanted = models.output(model, arguments)
    qkernels.quantize_model(model, "w8a8", progress=False)
    assert _layers(model)
    error = (models.output(model, arguments) - wanted).norm() / wanted.norm()
    assert 1e-4 < float(error) < 0.05


@pytest.mark.parametrize("method", [None, "rtn"])
@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w8cs-a8ts", {}, r"scheme 'w8cs-a8ts' has static activations: it needs calibration: .*'w8cs-a8s' needs none"),
        ("w8a8", {"fallback": 0.1}, r"fallback=0\.1 needs calibration: batches to call the model with"),
    ],
)
def test_models_that_read_no_tokens_need_batches(method: Any, scheme: str, options: Any, message: str) -> None:
    model = models.make("vit")
    with pytest.raises(ValueError, match=message):
        qkernels.quantize_model(model, scheme, method=method, progress=False, **options)
    assert not _layers(model)


def test_models_that_read_tokens_have_batches_of_their_own() -> None:
    model = models.make("bert")
    qkernels.quantize_model(model, "w8cs-a8ts", method="rtn", progress=False)
    assert all(layer.weight_activation is not None for name, layer in _layers(model).items() if "pooler" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": "entropy"}, "ranges must be one of 'minmax', 'percentile', 'mse', got 'entropy'"),
        ({"fallback": -0.1}, r"fallback must be a relative error of 0 or more, such as 0\.05, or None, got -0\.1"),
        ({"fallback": math.nan}, "fallback must be a relative error of 0 or more"),
        ({"fallback": True}, "fallback must be a relative error of 0 or more"),
        ({"fallback": "5 %"}, "fallback must be a relative error of 0 or more"),
        ({"scheme": "w8cs", "fallback": 0.1}, "fallback is for schemes with quantized activations, such as 'w8a8'"),
        ({"scheme": "w8a8", "method": "rtn", "calibration": BATCHES}, "method 'rtn' takes no calibration"),
        ({"calibration": []}, "calibration holds no batches"),
        ({"calibration": [torch.zeros(0, 9, 64)]}, "calibration batch 0 is empty"),
        ({"calibration": [torch.zeros(2, 9, 63)]}, "the model fails on calibration batch 0"),
        ({"calibration": [BATCHES[0], BATCHES[0].index_fill(1, torch.tensor(3), math.nan)], "method": "rtn"},
         r"0\.q_proj: its inputs are not finite"),
        ({"calibration": [1e38 * BATCHES[0]], "method": "rtn", "scheme": "w8a8", "fallback": 1.0},
         r"its inputs are not finite"),
    ],
)  # fmt: skip
def test_bad_requests_change_nothing(options: Any, message: str) -> None:
    model = _model()
    before = dict(model.named_modules())
    arguments: Any = {"scheme": "w8cs-a8ts", "progress": False, "calibration": BATCHES, **options}
    with pytest.raises(ValueError, match=message):
        qkernels.quantize_model(model, **arguments)
    assert dict(model.named_modules()) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_sums_that_do_not_fit_are_found_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8), nn.Linear(40000, 1, bias=False))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"2\.weight: groups of 40000 codes are too long"):
        qkernels.quantize_model(model, "w8c-a8", progress=False)
    assert dict(model.named_modules()) == before


# ---- experts, embeddings, plans ----


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w8cs-a8ts"])
def test_experts_are_dynamic(scheme: str) -> None:
    model, arguments = models.make("mixtral"), models.inputs("mixtral")
    wanted = models.output(model, arguments)
    report = qkernels.quantize_model(model, scheme, calibration=[arguments], progress=False)
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert {s for n, s in schemes.items() if "experts" in n} == {"w8cs-a8s"}
    assert {s for n, s in schemes.items() if "self_attn" in n} == {scheme}
    error = (models.output(model, arguments) - wanted).norm() / wanted.norm()
    assert float(error) < 0.1


@pytest.mark.parametrize("options", [{"embeddings": "w8g32-a8"}, {"schemes": {"*embed_tokens": "w8g32-a8"},
                                                                  "embeddings": "w8g32"}])  # fmt: skip
def test_embeddings_have_no_inputs_to_quantize(options: Any) -> None:
    model = models.make("llama")
    with pytest.raises(ValueError, match=r"embed_tokens is an embedding, which has no inputs .*'w8g32' is for it"):
        qkernels.quantize_model(model, "w8a8", progress=False, **options)
    assert not _layers(model)


def test_some_layers_may_have_quantized_activations() -> None:
    model = _model()
    report = qkernels.quantize_model(
        model, "w4g32", schemes={"*.out": "w8cs-a8ts", "*.v_proj": "w8a8"}, skip=["*.spare"], calibration=BATCHES,
        fallback=1.0, progress=False,
    )  # fmt: skip
    found = {layer.name: (layer.scheme, layer.activation_error is None) for layer in report.layers[:4]}
    assert found == {
        "0.q_proj": ("w4g32", True),
        "0.k_proj": ("w4g32", True),
        "0.v_proj": ("w8cs-a8s", False),
        "0.out": ("w8cs-a8ts", False),
    }
    assert not any(layer.inputs_left for layer in report.layers)
    assert linears_module.method_for(None, Scheme.parse("w8a8"), weighted=False) == ("rtn", "")
