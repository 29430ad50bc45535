"""`qkernels.plan`: more bits where errors cost more, fewer elsewhere, within so many bytes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import Batch
from qkernels.calibrate.linears import method_for
from qkernels.calibrate.probe import importances
from qkernels.merge import SIBLINGS, check_groups
from qkernels.model import batches_of, check_method
from qkernels.planning import fisher, knapsack, trial
from qkernels.planning.result import Plan, PlannedLayer, Uniform
from qkernels.replace import linears_for_conv1d
from qkernels.scheme import Scheme, as_scheme
from qkernels.selection import DEFAULT_SKIP, check_quantizable, select
from qkernels.tensor import QTensor, quantize, stored_bytes

# Needs of layers differ by less than whole bits: between them lie groups of other sizes, which cost no more for a bit.
CANDIDATES = ("w2g64", "w3g128", "w3g64", "w4g128", "w4g64", "w5g128", "w6g128", "w8g128")
# Costs are raised by so many times the weight's relative square error, some 0.04 at three bits and 0.14 at two. On a
# small language model 4 did best, and 0 no better than one scheme for all; how it is for others, a trial tells.
_DISTRUST = (0.0, 4.0, 16.0)


@dataclasses.dataclass
class _Measured:
    """What each candidate does to one layer: cost (None where it is not known), and the weight's relative error."""

    costs: list[float] | None
    errors: list[float]
    measure: str


def plan(
    model: nn.Module,
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    calibration: Iterable[Batch] | Literal["random", "written"] | None = None,
    candidates: Sequence[str | Scheme] = CANDIDATES,
    skip: Sequence[str] = DEFAULT_SKIP,
    siblings: Sequence[Sequence[str]] = SIBLINGS,
    try_out: bool = True,
    progress: bool = True,
) -> Plan:
    """Choose a scheme for each nn.Linear, so that all take at most so many bytes and the model predicts best.

    The model is run forward and backward, on batches and with labels drawn from its own predictions; it is the same
    afterwards. What the codes of each candidate would lose in each layer, by the method that quantize_model takes by
    default, is weighed along these gradients: to second order, that is the KL divergence which this error costs (or,
    for models without logits, the squared error of the output). `quantize_model(model, plan)` carries the plan out,
    with the same `calibration` if you gave one.

    Memory: the model, one batch's activations, up to 2 GiB (or what one batch brings, if that is more) of inputs and
    gradients, and two float32 copies of the largest weight; then the codes of the plans that are tried, seldom more
    than two for a layer. Time: a search of codes for each candidate, as quantize_model does one, and for those that are
    tried once more, and some ten forwards and backwards.

    Args:
        model: any module; weights float16, bfloat16 or float32, on CPU or GPU.
        target_bits: the most bits per weight, on average over the Linears that are planned: codes, scales, zeros and
            padding. Or else:
        target_bytes: the most bytes for them.
        calibration: batches, as quantize_model takes them; many short sequences tell more than few long ones. Or
            "random" or "written", as there. By default a little text that the model writes itself, if it is one of
            transformers' that can generate, else random tokens, if it reads tokens alone; else costs are the errors of
            weights, relative to the weights, which the plan's `measure` then says.
        candidates: schemes to choose from; their activations are the same, and not static.
        skip: patterns (as of fnmatch) of module names to leave alone.
        siblings: names of layers of one parent that get one scheme, as merging asks for; () plans each by itself, which
            is cheaper at the same bytes, above all where values need more bits than queries and keys do.
        try_out: whether a few finished plans that trust large errors more or less, and the best single scheme, are
            run on the batches, and the one that does best is returned. Where they are not, or cannot be, it is the one
            of least cost.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: not exactly one target, or one that the smallest candidate exceeds; no candidates, or
            one that is no scheme; a model that quantize_model would not take; batches that are empty or that the model
            fails on; outputs, inputs or gradients that are not finite. Layers and batches are named.

    >>> import torch, qkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    >>> plan = qkernels.plan(model, target_bits=4.5, calibration=[torch.randn(32, 64)], progress=False)
    >>> report = qkernels.quantize_model(model, plan, progress=False)
    >>> report.nbytes == plan.nbytes <= plan.target_bytes
    True
    """
    schemes = _candidates(candidates)
    check_method(None, calibration)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # it is gone through more than once
    with linears_for_conv1d(model):
        linears = {name: linear for name, (linear, _) in select(model, schemes[0], skip, {}).linears.items()}
        for name, linear in linears.items():
            check_quantizable(name, linear, schemes[0])
        groups = _groups(linears, list(check_groups(siblings)))
        sizes = {name: [stored_bytes(s, *_shape(linear)) for s in schemes] for name, linear in linears.items()}
        budget = _budget(target_bits, target_bytes, linears, schemes, groups, sizes)
        batches = batches_of(model, calibration)
        known = {} if batches is None else importances(model, linears, batches)
        measured = dict(_measure(model, linears, schemes, known, batches, progress))
        costs, measure = _costs(measured)
        options = [
            [
                knapsack.Option(sum(sizes[n][i] for n in names), sum(costs[n][i] for n in names))
                for i in range(len(schemes))
            ]
            for names in groups
        ]
        uniform = [
            Uniform(scheme, sum(o[i].nbytes for o in options), sum(o[i].cost for o in options))
            for i, scheme in enumerate(schemes)
        ]
        choices = _choices(groups, options, budget, costs, {name: m.errors for name, m in measured.items()}, uniform)
        found: list[float] = []
        if try_out and batches is not None and measure != "weight error":
            found = _found(model, linears, schemes, known, choices, batches, progress)
        best = min(range(len(choices)), key=found.__getitem__) if found else 0
        chosen = choices[best]
        return Plan(
            layers=tuple(
                PlannedLayer(
                    name, schemes[chosen[name]], _shape(linear), sizes[name][chosen[name]], costs[name][chosen[name]],
                    _sensitivity(costs[name], measured[name].errors),
                )
                for name, linear in linears.items()
            ),
            target_bytes=budget,
            measure=measure,
            uniform=tuple(sorted(uniform, key=lambda u: u.nbytes)),
            measured=found[best] if found else None,
            measured_uniform=found[-1] if found and any(alike.nbytes <= budget for alike in uniform) else None,
        )  # fmt: skip


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _candidates(given: Sequence[str | Scheme]) -> list[Scheme]:
    if isinstance(given, (str, Scheme)):
        raise TypeError(f"candidates must be a sequence of schemes, got {given!r}; write candidates=[{str(given)!r}]")
    schemes = list(dict.fromkeys(as_scheme(scheme) for scheme in given))
    if not schemes:
        raise ValueError("candidates must hold at least one scheme, got none")
    if static := [str(scheme) for scheme in schemes if scheme.is_static]:
        raise ValueError(f"candidates cannot have static activations, whose scale calibration finds, got {static[0]!r}")
    if len({scheme.activations for scheme in schemes}) > 1:
        names = ", ".join(map(str, schemes))
        raise ValueError(
            f"candidates must all quantize activations alike, or not at all: costs are those of weights; got {names}"
        )
    return schemes


def _groups(linears: Mapping[str, nn.Linear], siblings: Sequence[Sequence[str]]) -> list[list[str]]:
    """Names of layers that get one scheme.

    Siblings of different schemes cannot be multiplied in one launch, which costs more time for each token than their
    different needs save in bits: they read one input, so their needs differ little.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        family = next((i for i, names in enumerate(siblings) if child in names), None)
        key = (name,) if family is None else (parent, family, linear.in_features)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _budget(
    target_bits: float | None,
    target_bytes: int | None,
    linears: Mapping[str, nn.Linear],
    schemes: Sequence[Scheme],
    groups: Sequence[Sequence[str]],
    sizes: Mapping[str, Sequence[int]],
) -> int:
    """Bytes that the plan may take."""
    if (target_bits is None) == (target_bytes is None):
        raise ValueError(f"give either target_bits or target_bytes, got {target_bits!r} and {target_bytes!r}")
    weights = sum(math.prod(_shape(linear)) for linear in linears.values())
    what, given = ("target_bits", target_bits) if target_bytes is None else ("target_bytes", target_bytes)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < math.inf:
        raise ValueError(f"{what} must be a positive number, got {given!r}")
    budget = math.floor(given * weights / 8 if what == "target_bits" else given)
    least = sum(min(sum(sizes[name][i] for name in names) for i in range(len(schemes))) for names in groups)
    if budget < least:
        raise ValueError(
            f"{what} {given} is too small: with candidates {', '.join(map(str, schemes))} these {len(linears)} layers "
            f"take at least {least} bytes, {math.ceil(8e4 * least / weights) / 1e4:.4f} bits per weight"
        )
    return budget


def _measure(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    schemes: Sequence[Scheme],
    known: Mapping[str, Tensor],
    batches: Iterable[Batch] | None,
    progress: bool,
) -> Iterator[tuple[str, _Measured]]:
    """(name, what the candidates do) for each layer."""
    from tqdm import tqdm

    traces: Iterable[tuple[str, fisher.Trace | None]] = ((name, None) for name in linears)
    if batches is not None:
        traces = fisher.traces(model, linears, batches)
    for name, trace in tqdm(traces, desc="planning", unit="layer", total=len(linears), disable=not progress):
        yield name, _try(name, linears[name], schemes, known.get(name), trace)


def _choices(
    groups: Sequence[Sequence[str]],
    options: Sequence[Sequence[knapsack.Option]],
    budget: int,
    costs: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    uniform: Sequence[Uniform],
) -> list[dict[str, int]]:
    """Plans worth a trial, as {name: candidate}: the cheapest first, the best single scheme, if one fits, last."""
    fitting = [i for i, alike in enumerate(uniform) if alike.nbytes <= budget]
    alike = min(fitting, key=lambda i: uniform[i].cost, default=None)
    choices: list[tuple[float, list[int]]] = []
    for distrust in _DISTRUST:
        wary = [
            [
                knapsack.Option(o.nbytes, sum(costs[n][i] * (1 + distrust * errors[n][i]) for n in names))
                for i, o in enumerate(some)
            ]
            for names, some in zip(groups, options, strict=True)
        ]
        taken = knapsack.choose(wary, budget)
        cost = sum(o[i].cost for o, i in zip(options, taken, strict=True))
        # The knapsack's choice is nearly the best, not always.
        if (alike is None or cost < uniform[alike].cost) and all(taken != other for _, other in choices):
            choices.append((cost, taken))
    choices.sort(key=lambda choice: choice[0])
    if alike is not None:
        choices.append((uniform[alike].cost, [alike] * len(groups)))
    return [{n: i for names, i in zip(groups, taken, strict=True) for n in names} for _, taken in choices]


@torch.no_grad()
def _found(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    schemes: Sequence[Scheme],
    known: Mapping[str, Tensor],
    choices: Sequence[Mapping[str, int]],
    batches: Iterable[Batch],
    progress: bool,
) -> list[float]:
    """What each choice costs in earnest, on the batches that gave the gradients."""
    from tqdm import tqdm

    codes: dict[tuple[str, int], QTensor] = {}
    for name in tqdm(linears, desc="trying plans", unit="layer", disable=not progress):
        for i in {choice[name] for choice in choices}:
            codes[name, i] = _quantized(name, linears[name], schemes[i], known.get(name))
    return trial.costs(model, [{name: codes[name, i] for name, i in choice.items()} for choice in choices], batches)


def _quantized(name: str, linear: nn.Linear, scheme: Scheme, importance: Tensor | None) -> QTensor:
    """The codes that quantize_model would choose by default."""
    method, _ = method_for(None, scheme, importance is not None)
    try:
        return quantize(linear.weight.detach(), scheme, method=method, importance=importance)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None


@torch.no_grad()
def _try(
    name: str, linear: nn.Linear, schemes: Sequence[Scheme], importance: Tensor | None, trace: fisher.Trace | None
) -> _Measured:
    """One layer under every candidate."""
    original = linear.weight.detach().float()
    energy = original.square().sum(dtype=torch.float64).item()
    reached = trace is not None and trace.reached
    costs, errors = [], []
    for scheme in schemes:
        change = _quantized(name, linear, scheme, importance).dequantize().sub_(original)
        noise = change.square().sum(dtype=torch.float64).item()
        errors.append(noise / energy if energy else 0.0)
        costs.append(trace.cost(change) if trace is not None and reached else 0.0)
    return _Measured(
        costs if reached else None, errors, trace.kind if trace is not None and reached else "weight error"
    )


def _costs(measured: Mapping[str, _Measured]) -> tuple[dict[str, list[float]], str]:
    """({name: the cost of each candidate}, what costs are). Layers that no gradient reaches count as a typical one."""
    known = {name: m.costs for name, m in measured.items() if m.costs is not None}
    if not known:
        return {name: m.errors for name, m in measured.items()}, "weight error"
    typical = statistics.median(_sensitivity(costs, measured[name].errors) for name, costs in known.items())
    costs = {name: known.get(name) or [typical * error for error in m.errors] for name, m in measured.items()}
    return costs, next(measured[name].measure for name in known)


def _sensitivity(costs: Sequence[float], errors: Sequence[float]) -> float:
    return sum(costs) / sum(errors) if sum(errors) else 0.0
