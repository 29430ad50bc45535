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


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """How the inputs of a Linear are quantized.

    Attributes:
        scheme: of the Linear, weight and all.
        activation: (2,) float32, scale and zero of inputs where they are static; else None.
        note: what to add to the method's name in the report.
        error: as Chosen.activation_error.
    """

    scheme: Scheme
    activation: Tensor | None = None
    note: str = ""
    error: float | None = None


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
    inputs = _inputs(model, plan, batches, ranges, choice.fallback)
    for name, weight, method in _weights(model, plan, batches, importance, choice):
        own = inputs[name]
        activation = None if own.activation is None else own.activation.to(weight.device)
        weight = dataclasses.replace(weight, scheme=own.scheme, activation=activation)
        yield name, Chosen(weight, method + own.note, own.error)


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


def _inputs(
    model: nn.Module,
    plan: LinearPlan,
    batches: Iterable[Batch] | None,
    ranges: Mapping[str, Tensor],
    fallback: float | None,
) -> dict[str, _Inputs]:
    """How inputs of each layer are quantized, so that they lose no more than `fallback`: static, dynamic or not at all.

    Without fallback what static ranges lose is measured all the same.
    """
    found = {}
    for name, (_, scheme) in plan.items():
        own = _Inputs(scheme, ranges.get(name))
        if scheme.is_static and own.activation is None:
            own = _Inputs(scheme.dynamic, note=" (inputs never seen, or zero: dynamic)")
        found[name] = own
    if not any(scheme.is_static or (fallback is not None and scheme.activations) for _, scheme in plan.values()):
        return found
    assert batches is not None
    most = math.inf if fallback is None else fallback

    def measured(layers: Mapping[str, _Inputs]) -> dict[str, _Inputs]:
        errors = activation_errors(model, {n: (plan[n][0], i.scheme, i.activation) for n, i in layers.items()}, batches)
        return {name: dataclasses.replace(own, error=errors.get(name)) for name, own in layers.items()}

    def lossy(own: _Inputs) -> bool:
        return own.error is not None and own.error > most

    found = measured(found)
    static = [name for name, own in found.items() if own.scheme.is_static and lossy(own)]
    if static:
        found |= measured({name: _Inputs(plan[name][1].dynamic, note=" (inputs dynamic)") for name in static})
    for name, own in found.items():
        if lossy(own):
            found[name] = _Inputs(plan[name][1].weight_only, note=" (inputs not quantized)", error=own.error)
    return found


def activation_errors(
    model: nn.Module, layers: Mapping[str, tuple[nn.Linear, Scheme, Tensor | None]], batches: Iterable[Batch]
) -> dict[str, float]:
    """{name: what a token's output loses} of layers whose inputs x become x^; weights W are not quantized yet.

    The root mean square, over tokens, of ||(x^ - x) W^T|| / ||x W^T||, which counts as 1 where it is more. Each token
    for itself: with one sum over all, a few tokens that are far larger than the others would hide what those lose.
    x is what layers read in the model as it is, float. Layers that no batch reaches are missing. No inputs are kept.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, or inputs of a layer are not finite.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        linear, scheme, activation = layers[name]
        assert scheme.activations is not None
        w = linear.weight.detach().float()
        x = x.to(w.device)
        activation = None if activation is None else activation.to(w.device)
        code = reference_int8.quantize_activations(x, scheme.activations, activation)
        lost = reference_int8.dequantize_activations(*code) - x
        signal, noise = ((each @ w.T).double().square().sum(1) for each in (x, lost))
        share = torch.where(noise < signal, noise / signal, (noise > 0).double())
        share = torch.where(torch.isfinite(signal), share, float("nan"))
        found = torch.stack([share.sum(), share.new_tensor(len(share))])
        sums[name] = sums[name] + found if name in sums else found

    watched = {name: linear for name, (linear, scheme, _) in layers.items() if scheme.activations is not None}
    watch(model, watched, batches, [see])
    errors = {}
    for name, found in sums.items():
        total, tokens = found.tolist()
        if math.isnan(total):
            raise inputs_not_finite(name)
        errors[name] = math.sqrt(total / tokens)
    return errors
