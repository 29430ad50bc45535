"""Whole models: quantize the Linears in place, by a method that suits them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from torch import nn

from qkernels import fit
from qkernels.calibrate import ranges as static_ranges
from qkernels.calibrate.batches import Batch, CalibrationError
from qkernels.calibrate.linears import Choice, Chosen, LinearPlan, method_for, quantized_linears
from qkernels.calibrate.probe import random_batches, written_batches
from qkernels.calibrate.smooth import METHODS as SMOOTHINGS
from qkernels.calibrate.smooth import smoothed
from qkernels.merge import SIBLINGS, check_groups, merge_siblings
from qkernels.planning.result import Plan
from qkernels.pretrained import describe
from qkernels.replace import counterpart, linears_for_conv1d, places, put
from qkernels.scheme import Scheme, as_scheme
from qkernels.selection import DEFAULT_SKIP, Extra, check_extra, check_quantizable, check_weight, select
from qkernels.summary import LayerReport, QuantizationReport
from qkernels.tensor import quantize

METHODS = (*fit.METHODS, "gptq")
SOURCES = ("random", "written")  # of calibration, where a user has no batches
_WRITTEN = 48, 256  # sequences and their tokens, of the model's own: second moments need more than the size of inputs


def quantize_model(
    model: nn.Module,
    scheme: str | Scheme | Plan,
    *,
    method: str | None = None,
    calibration: Iterable[Batch] | Literal["random", "written"] | None = None,
    smooth: str | None = None,
    rounding: int = 0,
    distill: int = 0,
    resume: str | os.PathLike[str] | None = None,
    ranges: str = "mse",
    fallback: float | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    schemes: Mapping[str, str | Scheme | None] | None = None,
    embeddings: str | Scheme | None = None,
    merge: bool | Sequence[Sequence[str]] = False,
    progress: bool = True,
) -> QuantizationReport:
    """Replace every nn.Linear by a QuantLinear, in place, one at a time: peak memory is the model plus one layer, or
    with `smooth` or `distill` plus all codes.

    So are transformers' Conv1D (GPT-2) and, by a method that looks at each weight alone, the projections of fused
    experts: they become QuantExperts. Subclasses of nn.Linear, and output layers called lm_head unless you say
    otherwise, are left alone; so are layers whose weight the code of the model reads itself (`wo` of T5), which would
    take codes for floats, unless `schemes` names them. A weight that another module shares stays there, and the Linear
    gets codes of its own. A transformers model keeps it all with save_pretrained.

    Args:
        model: any module; weights float16, bfloat16 or float32, on CPU or GPU.
        scheme: such as "w4g128", for layers that no pattern names; or a Plan, which leaves layers that it does not name
            alone.
        method: how codes are chosen. "rtn" rounds to nearest; "search" tries ranges and zeros for each group, "hqq"
            moves its zeros; "gptq" works block by block, each layer making up for the errors before it. By default
            "search" where the size of the inputs is known; else "rtn" down to 4 bits, and "search" below.
        calibration: batches to call the model with (tensors, mappings of keyword arguments, or sequences of positional
            ones); or "random": tokens drawn at random, for a model that reads tokens alone; or "written": text that a
            language model writes itself. "gptq" needs one of them. Padding counts nowhere, if an attention_mask (batch,
            tokens) among the keyword arguments tells what it is.
            To "search" and "hqq" they tell how large each input of a layer is, so which weights matter; their default
            is a little written text, else "random", where that is possible.
        smooth: "awq" or "smoothquant", before any method: columns of weights are multiplied by powers of two, and what
            gives these inputs (a norm or another Linear, which shows itself when the model runs) is divided by them, so
            that the unquantized model keeps every bit. "awq" makes codes finest where inputs are large; "smoothquant"
            shares outliers between inputs and weights, which pays where inputs are quantized, too. The report says
            which layers were scaled. By default the batches are those of "search". The codes of all layers are made
            before the first takes its place. A Linear that is left alone may be divided.
        rounding: steps, after "gptq", of moving all codes of a block together down the gradient of its output's error;
            200 are usual. Each takes a backward pass of the block for a batch.
        distill: how many times to go through the calibration batches once codes are chosen, with the model as the
            teacher, to set the scales of all layers together so that its output comes out as before. Takes a backward
            pass of the whole model for each batch, and a second set of weights.
        resume: a folder, for "gptq", where each finished block is kept; the same call, after it was cut off, goes on
            from there. It is yours to remove.
        ranges: how static ranges of inputs, of schemes such as "w8cs-a8ts", are found, from batches as for "search":
            "minmax" covers all that comes, "percentile" 99.99 % of what is not 0, "mse" has the least squared error.
            Codes of weights do not depend on it (with "smoothquant" other columns of them may be scaled). Layers that
            see no batch, and experts, are dynamic instead; the report says so.
        fallback: the most, say 0.05, that quantized inputs may lose at a layer's output, on such batches: relative to a
            token's output, root mean square over tokens. A static range that loses more gives way to a scale for each
            token; where that loses more, too, the layer's inputs stay as they are. The report says where. Experts, and
            layers that see no batch, keep their schemes; the report counts what was not measured. None: nowhere; what
            static ranges lose is in the report all the same.
        skip: patterns (as of fnmatch) of module names to leave alone.
        schemes: {pattern: scheme} for some layers, None to leave them alone; the first pattern that fits counts. It
            beats the default of `skip`, but not a `skip` of yours; and it beats a Plan.
        embeddings: a scheme for every nn.Embedding that no pattern of `skip` or `schemes` names otherwise; they become
            QuantEmbeddings, and an output layer that shares the weight of one, and is not quantized by itself, shares
            its codes. By default they are left alone.
        merge: whether siblings that read one input are multiplied in one launch, with the same weights: q_proj, k_proj
            and v_proj of one parent, and gate_proj and up_proj; or the names of siblings, such as [("w1", "w3")]. Those
            that cannot be merged (one scale per tensor, different schemes) stay apart; the report says why.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: there is nothing to quantize, a pattern of yours fits no Linear, or a layer cannot be
            quantized (NaN, infinity, overflow, meta device, hooks, inputs that are not finite or, for "gptq",
            singular); the layer is named and the model unchanged. Or the method or calibration is not as above.

    >>> import torch, qkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    >>> report = qkernels.quantize_model(model, "w4g64", schemes={"2": "w8c"}, progress=False)
    >>> model[2]
    QuantLinear(in_features=128, out_features=10, bias=True, scheme='w8c')
    """
    start = time.perf_counter()
    default = None if isinstance(scheme, Plan) else as_scheme(scheme)
    patterns = dict(schemes or {})
    if isinstance(scheme, Plan):
        for pattern, planned in scheme.schemes.items():
            patterns.setdefault(pattern, planned)
    check_method(method, calibration, resume, rounding, distill, smooth)
    check_activations([default, *patterns.values()], method, calibration, ranges, fallback, bool(distill or smooth))
    groups = list(check_groups(SIBLINGS if merge is True else merge or ()))
    choice = Choice(method, rounding, distill, resume, ranges, fallback, progress)
    layers: list[LayerReport] = []
    with linears_for_conv1d(model):
        chosen = select(model, default, skip, patterns, None if embeddings is None else as_scheme(embeddings))
        plan = chosen.linears
        if isinstance(scheme, Plan):
            scheme.check({name: (linear.out_features, linear.in_features) for name, (linear, _) in plan.items()})
        for name, (linear, own) in plan.items():
            check_quantizable(name, linear, own)
        for name, extra in chosen.extras.items():
            check_extra(name, extra)
        where = places(model)
        batches = _batches(model, plan, choice, calibration, smooth)
        with _smoothing(model, plan, batches, smooth, progress) as scaled:
            found: Iterable[tuple[str, Chosen]] = quantized_linears(model, plan, batches, choice)
            if scaled:  # what fails before the last layer has its codes undoes the scaling
                found = list(found)
        for name, codes in found:
            linear, _ = plan.pop(name)
            codes = dataclasses.replace(codes, method=f"{smooth}, {codes.method}") if name in scaled else codes
            layers.append(
                LayerReport.of(name, codes.weight, linear.weight.detach(), codes.method, codes.activation_error)
            )
            put(counterpart(linear, codes.weight), where.pop(linear))
            del linear  # the float weight goes before the next layer comes
        layers += quantize_extras(chosen.extras, method)
    merged = merge_siblings(model, groups) if groups else None
    describe(model)
    return QuantizationReport(tuple(layers), chosen.skipped, time.perf_counter() - start, merged)


def quantize_extras(extras: Mapping[str, Extra], method: str | None) -> list[LayerReport]:
    """Quantize experts and embeddings, in place, one at a time, by a method that looks at each alone."""
    layers = []
    for name, extra in extras.items():
        weight = extra.weight()
        check_weight(name, weight, extra.scheme)
        used, note = method_for(None if method == "gptq" else method, extra.scheme, weighted=False)
        quantized = quantize(weight, extra.scheme, method=used)
        layers.append(LayerReport.of(name, quantized, weight, used + note))
        extra.put(quantized)
        del weight
    return layers


def check_method(
    method: str | None,
    calibration: Iterable[Batch] | str | None,
    resume: str | os.PathLike[str] | None = None,
    rounding: int = 0,
    distill: int = 0,
    smooth: str | None = None,
) -> None:
    """Raise ValueError unless a method is known and has the calibration that it needs."""
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if isinstance(calibration, str) and calibration not in SOURCES:
        raise ValueError(f"calibration must be batches, 'random' or 'written', got {calibration!r}")
    if method == "gptq" and calibration is None:
        raise ValueError("method 'gptq' needs calibration: batches to call the model with, 'written' or 'random'")
    if method != "gptq" and resume is not None:
        raise ValueError(f"resume is for method 'gptq', which takes long; got method={method!r}")
    if rounding < 0 or distill < 0:
        raise ValueError(f"rounding (steps) and distill (epochs) must be 0 or more, got {rounding} and {distill}")
    if rounding and method != "gptq":
        raise ValueError(f"rounding is for method 'gptq', which works block by block; got method={method!r}")
    if distill and calibration is None:
        raise ValueError("distill needs calibration: batches to call the model with, 'written' or 'random'")
    if smooth is not None and smooth not in SMOOTHINGS:
        raise ValueError(f"smooth must be one of {', '.join(map(repr, SMOOTHINGS))}, got {smooth!r}")


def check_activations(
    schemes: Iterable[str | Scheme | None],
    method: str | None,
    calibration: Iterable[Batch] | str | None,
    ranges: str = "mse",
    fallback: float | None = None,
    calibrated: bool = False,
) -> None:
    """Raise ValueError unless arguments fit schemes, of which some may have quantized activations, and the method.

    `calibrated` says whether something beside these uses calibration.
    """
    activations = [s.activations for s in (as_scheme(s) for s in schemes if s is not None) if s.activations is not None]
    if ranges not in static_ranges.METHODS:
        raise ValueError(f"ranges must be one of {', '.join(map(repr, static_ranges.METHODS))}, got {ranges!r}")
    if fallback is not None:
        if isinstance(fallback, bool) or not isinstance(fallback, (int, float)) or not fallback >= 0:
            raise ValueError(f"fallback must be a relative error of 0 or more, such as 0.05, or None, got {fallback!r}")
        if not activations:
            raise ValueError("fallback is for schemes with quantized activations, such as 'w8a8': none is given")
    used = calibrated or fallback is not None or any(how.static for how in activations)
    if method == "rtn" and calibration is not None and not used:
        raise ValueError("method 'rtn' takes no calibration: rounding to nearest does not use it")


def _smoothing(
    model: nn.Module, plan: LinearPlan, batches: Iterable[Batch] | None, smooth: str | None, progress: bool
) -> contextlib.AbstractContextManager[set[str]]:
    """Gives the names of the Linears whose columns were scaled; what its body raises undoes that."""
    if smooth is None:
        return contextlib.nullcontext(set())
    if not plan:
        raise ValueError(f"smooth={smooth!r} is for Linears: none is left to quantize")
    if batches is None:
        raise ValueError(f"smooth={smooth!r} needs calibration: batches to call the model with")
    return smoothed(model, plan, batches, smooth, progress)


def _batches(
    model: nn.Module,
    plan: LinearPlan,
    choice: Choice,
    calibration: Iterable[Batch] | str | None,
    smooth: str | None,
) -> Iterable[Batch] | None:
    """The batches that the plan is carried out with; None where nothing asks for them, or a model reads no tokens.

    Raises:
        ValueError: there are none, but what is asked for cannot do without.
    """
    static = next((s for _, s in plan.values() if s.is_static), None)
    activations = any(s.activations is not None for _, s in plan.values())
    needs = None
    if activations and choice.fallback is not None:
        needs = f"fallback={choice.fallback}"
    elif static is not None:
        needs = f"scheme '{static}' has static activations: it"
    if not plan or (choice.method == "rtn" and not smooth and not choice.distill and needs is None):
        return None
    batches = batches_of(model, calibration)
    if batches is None and needs is not None:
        instead = "" if static is None else f"; '{static.dynamic}' needs none"
        raise ValueError(f"{needs} needs calibration: batches to call the model with{instead}")
    return list(batches) if isinstance(batches, Iterator) else batches  # they may be gone through again


def batches_of(model: nn.Module, calibration: Iterable[Batch] | str | None) -> Iterable[Batch] | None:
    """The batches that `calibration` means.

    By default a little text that the model writes itself, or random tokens where it cannot, or None where it reads
    something else than tokens.
    """
    if calibration is not None and not isinstance(calibration, str):
        return calibration
    batches: Iterable[Batch] | None = None
    if calibration is None:
        try:
            batches = written_batches(model)
        except CalibrationError as error:
            warnings.warn(f"{error}; random tokens are used instead", stacklevel=3)
    if calibration == "written":
        batches, needed = written_batches(model, *_WRITTEN), "that writes text (transformers' generate)"
    elif batches is None:
        batches, needed = random_batches(model), "that reads tokens alone"
    if batches is None and calibration is not None:
        raise ValueError(f"calibration {calibration!r} needs a model {needed}, got {type(model).__name__}")
    return batches
