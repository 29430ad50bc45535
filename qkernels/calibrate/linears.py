"""Codes of all Linears of a model, by any method, and how their inputs are quantized. The model is not changed.

Weights get the codes that they would get if inputs stayed as they are; what is known of inputs is put beside them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qkernels import reference_int8
from qkernels.calibrate.batches import Batch, inputs_not_finite
from qkernels.calibrate.blocks import calibrate
from qkernels.calibrate.distill import distill
from qkernels.calibrate.probe import Importances, watch
from qkernels.calibrate.ranges import Ranges
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize

# Where nothing is known of the inputs, a search that lowers the error of weights pays at the output only here.
_BLIND_SEARCH_BITS = 3

LinearPlan = Mapping[str, tuple[nn.Linear, Scheme]]  # by name


@dataclasses.dataclass(frozen=True)
class Choice:
    """How codes are chosen: arguments of quantize_model, where they are explained."""

    method: str | None
    rounding: int
    distill: int
    resume: str | os.PathLike[str] | None
    ranges: str
    fallback: float | None
    progress: bool


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The codes of a Linear.

    Attributes:
        weight: quantized, with static ranges of its inputs where the scheme has them.
        method: that chose the codes; with what stood in where it could not be used.
        activation_error: what quantizing inputs loses at the output, as of activation_errors; None where it was not
            measured.
    """

    weight: QTensor
    method: str
    activation_error: float | None = None


def method_for(method: str | None, scheme: Scheme, weighted: bool) -> tuple[str, str]:
    """(method, what to add to its name in the report) for one layer."""
    blind = "" if weighted else " (inputs unknown)"
    if method is None:
        method = "search" if weighted or scheme.bits <= _BLIND_SEARCH_BITS else "rtn"
    return method, "" if method == "rtn" else blind


def quantized_linears(
    model: nn.Module, plan: LinearPlan, batches: Iterable[Batch] | None, choice: Choice
) -> Iterator[tuple[str, Chosen]]:
    """(name, codes) of each layer of the plan; all that may fail on a batch has run before the first comes.

    Args:
        model: with its weights; on any device.
        plan: {name: (Linear of the model, scheme)}; a layer may leave it once it has its codes.
        batches: to call the model with, several times; None where nothing needs them.
        choice: of codes.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, or inputs of a layer are not finite.
    """
    importance, ranges = _observed(model, plan, batches, choice)
    found = _attached(plan, _weights(model, plan, batches, importance, choice), ranges)
    schemes = [scheme for _, scheme in plan.values()]
    if any(scheme.is_static for scheme in schemes):
        most = math.inf if choice.fallback is None else choice.fallback  # what static ranges lose is always told
    elif choice.fallback is not None and any(scheme.activations is not None for scheme in schemes):
        most = choice.fallback
    else:
        yield from found
        return
    assert batches is not None
    yield from _within(most, model, plan, dict(found), batches)


def _observed(
    model: nn.Module, plan: LinearPlan, batches: Iterable[Batch] | None, choice: Choice
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """({name: how large inputs are}, {name: scale and zero of inputs}) as far as they are needed, in one pass."""
    static = {
        name: s.activations for name, (_, s) in plan.items() if s.activations is not None and s.activations.static
    }
    importances, ranges = Importances(), Ranges(static, choice.ranges)
    see: list[Callable[[str, Tensor], None]] = []
    linears = {name: plan[name][0] for name in static}
    if batches is not None and choice.method not in ("rtn", "gptq"):
        see, linears = [importances.see], {name: linear for name, (linear, _) in plan.items()}
    if static:
        see.append(ranges.see)
    if see:
        assert batches is not None
        watch(model, linears, batches, see)
    return importances.result(), ranges.result()


def _weights(
    model: nn.Module,
    plan: LinearPlan,
    batches: Iterable[Batch] | None,
    importance: Mapping[str, Tensor],
    choice: Choice,
) -> Iterator[tuple[str, QTensor, str]]:
    """(name, weight, method) of each layer, as if its inputs were not quantized."""
    if choice.method == "gptq":
        assert batches is not None
        done = calibrate(
            model,
            {name: (linear, scheme.weight_only) for name, (linear, scheme) in plan.items()},
            batches,
            rounding=choice.rounding,
            folder=choice.resume,
            progress=choice.progress,
        )
        found = iter([(name, *done.pop(name)) for name in plan])
    else:
        found = _each(plan, importance, choice)
    if not choice.distill:
        yield from found
        return
    assert batches is not None
    chosen = {name: (weight, used) for name, weight, used in found}
    weights = {name: (plan[name][0], weight) for name, (weight, _) in chosen.items()}
    distilled = distill(model, weights, batches, epochs=choice.distill, progress=choice.progress)
    del weights
    for name, weight in distilled.items():
        yield name, weight, f"{chosen[name][1]}, distilled"


def _each(plan: LinearPlan, importance: Mapping[str, Tensor], choice: Choice) -> Iterator[tuple[str, QTensor, str]]:
    """One layer after the other, by a method that looks at each by itself."""
    from tqdm import tqdm

    for name in tqdm(list(plan), desc="quantizing", unit="layer", disable=not choice.progress):
        linear, scheme = plan[name]
        used, note = method_for(choice.method, scheme, name in importance)
        weight = quantize(linear.weight.detach(), scheme.weight_only, method=used, importance=importance.get(name))
        yield name, weight, used + note
        del linear


def _attached(
    plan: LinearPlan, weights: Iterable[tuple[str, QTensor, str]], ranges: Mapping[str, Tensor]
) -> Iterator[tuple[str, Chosen]]:
    """Weights with the whole schemes of their layers: dynamic where no range was found."""
    for name, weight, method in weights:
        scheme, activation = plan[name][1], ranges.get(name)
        if activation is None and scheme.is_static:
            scheme, method = scheme.dynamic, f"{method} (inputs never seen, or zero: dynamic)"
        activation = None if activation is None else activation.to(weight.device)
        yield name, Chosen(dataclasses.replace(weight, scheme=scheme, activation=activation), method)


def _within(
    most: float, model: nn.Module, plan: LinearPlan, found: Mapping[str, Chosen], batches: Iterable[Batch]
) -> Iterator[tuple[str, Chosen]]:
    """The same, with inputs that lose at most so much: static ones that lose more become dynamic, if that will do."""

    def measured(layers: Mapping[str, Chosen]) -> dict[str, float]:
        return activation_errors(model, {name: (plan[name][0], one.weight) for name, one in layers.items()}, batches)

    errors = measured(found)
    lossy = {name: one for name, one in found.items() if one.weight.scheme.is_static and errors.get(name, 0.0) > most}
    dynamic = {name: _with_inputs(one, one.weight.scheme.dynamic, "dynamic") for name, one in lossy.items()}
    if dynamic:
        errors |= measured(dynamic)
    for name, one in found.items():
        error = errors.get(name)
        if error is not None and error > most:
            chosen = _with_inputs(one, one.weight.scheme.weight_only, "not quantized")
        else:
            chosen = dynamic.get(name, one)
        yield name, dataclasses.replace(chosen, activation_error=error)


def _with_inputs(one: Chosen, scheme: Scheme, what: str) -> Chosen:
    """The same codes, and another scheme for inputs, without a static range."""
    weight = dataclasses.replace(one.weight, scheme=scheme, activation=None)
    return dataclasses.replace(one, weight=weight, method=f"{one.method} (inputs {what})")


def activation_errors(
    model: nn.Module, layers: Mapping[str, tuple[nn.Linear, QTensor]], batches: Iterable[Batch]
) -> dict[str, float]:
    """{name: what a token's output loses} of layers whose inputs x become x^, with W the quantized weight.

    The root mean square, over tokens, of ||(x^ - x) W^T|| / ||x W^T||, which counts as 1 where it is more. Each token
    for itself: with one sum over all, a few tokens that are far larger than the others would hide what those lose.
    x is what layers read in the model as it is, float. Layers that no batch reaches are missing. No inputs are kept.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, or inputs of a layer are not finite.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        _, q = layers[name]
        assert q.scheme.activations is not None
        x, w = x.to(q.device), q.dequantize()
        code = reference_int8.quantize_activations(x, q.scheme.activations, q.activation)
        lost = reference_int8.dequantize_activations(*code) - x
        signal, noise = ((each @ w.T).double().square().sum(1) for each in (x, lost))
        share = torch.where(noise < signal, noise / signal, (noise > 0).double())
        share = torch.where(torch.isfinite(signal), share, float("nan"))
        found = torch.stack([share.sum(), share.new_tensor(len(share))])
        sums[name] = sums[name] + found if name in sums else found

    watched = {name: linear for name, (linear, q) in layers.items() if q.scheme.activations is not None}
    watch(model, watched, batches, [see])
    errors = {}
    for name, found in sums.items():
        total, tokens = found.tolist()
        if math.isnan(total):
            raise inputs_not_finite(name)
        errors[name] = math.sqrt(total / tokens)
    return errors
