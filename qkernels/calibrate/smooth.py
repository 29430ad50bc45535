"""Scales of input channels moved into the layer before, so that codes are finest where inputs are large.

Shapes    x (tokens, K) what Linears that share an input read, W (N, K) of each, s (K,) positive.
Theory    x W^T = (x / s) (W s)^T: columns of the weights are multiplied by s, and the norm or the Linear that gives x
          is divided by it. Nothing is left to do at run time.
Exactness s is rounded to powers of two, which change exponents alone: the smoothed model computes what it did before,
          bit for bit (float16 has so few exponents that numbers near to zero may lose bits). proof.py shows how the
          module that may take the division is found.
Sources   Lin et al., AWQ, 2023: s_k = mean |x_k|^a, with the a of least error at the output. The output is the Linears'
          own here, by second moments, and not the block's. Xiao et al., SmoothQuant, 2022: s_k = max |x_k|^1/2 over
          max |W_k|^1/2, which shares outliers between inputs and weights, where both are quantized.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference, reference_int8
from qkernels.calibrate.batches import Batch, CalibrationError, Call, as_calls, evaluating, inputs_not_finite, run_batch
from qkernels.calibrate.proof import Fold, Proof, equal, has_half, provider_of, scaled, tensors
from qkernels.calibrate.ranges import Histogram, static_activation
from qkernels.calibrate.walk import find_blocks, observe, record
from qkernels.fit import fit
from qkernels.scheme import Activations, Scheme

METHODS = ("awq", "smoothquant")

_AWQ_POWERS = tuple(i / 20 for i in range(20))  # AWQ's a
_SHARE = 0.5  # of the outliers of inputs, which SmoothQuant lets the weights take over
_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # that are tried where inputs are quantized
_TOKENS = 512  # that tell which is best
_LEAST = 1e-4  # sizes of channels, relative to the largest: those that never come are not blown up without end


@contextlib.contextmanager
@torch.no_grad()
def smoothed(
    model: nn.Module,
    plan: Mapping[str, tuple[nn.Linear, Scheme]],
    batches: Iterable[Batch],
    method: str,
    progress: bool = True,
) -> Iterator[set[str]]:
    """Smooth a model's weights in place; gives the names of the Linears whose columns were scaled.

    They stay so, unless the body of the `with` raises: then every weight is what it was.

    Args:
        model: with its weights; on any device.
        plan: {name: (Linear of the model, scheme)}; columns of only these are scaled, but any norm or Linear divided.
        batches: tensors, mappings of keyword arguments or sequences of positional ones, to call the model with.
        method: "awq" or "smoothquant".
        progress: whether to show a bar.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, inputs of a layer are not finite, no Linear
            of the plan reads what a norm or another Linear of its block gives to it alone, or the model's output
            changes although no block's does, since blocks hand each other more than they return.
    """
    done: list[Fold] = []
    calls = as_calls(batches, model)
    try:
        with evaluating(model):
            before = tensors(run_batch(model, calls[0], 0), calls[0])
            for fold in _folds(model, plan, calls, method, progress):
                done.append(fold)
                fold.apply()
            if not done:
                raise CalibrationError(
                    f"smooth={method!r} has nothing to scale in {type(model).__name__}: no Linear reads what a norm or "
                    "another Linear of its block gives to it alone"
                )
            after = tensors(run_batch(model, calls[0], 0), calls[0])
        if not equal(before, after) and not has_half(model):
            raise CalibrationError(
                f"smooth={method!r} would change what {type(model).__name__} returns, though no block's output: its "
                "blocks hand each other more than they return"
            )
        yield {name for fold in done if fold.exponents.any() for name in fold.linears}
    except BaseException:
        for fold in reversed(done):
            fold.undo()
        raise


def _folds(
    model: nn.Module, plan: Mapping[str, tuple[nn.Linear, Scheme]], calls: list[Call], method: str, progress: bool
) -> Iterator[Fold]:
    """What may be moved, if only by 2^0."""
    from tqdm import tqdm

    named: dict[nn.Module, str] = {linear: name for name, (linear, _) in plan.items()}
    uses = collections.Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    stages, hidden = record(model, find_blocks(model, named), calls)
    for block in tqdm(stages, desc="smoothing", unit="block", disable=not progress):
        inside = {path: m for path, m in block.module.named_modules() if m in named}
        seen = observe(block, inside, hidden)
        proof = Proof(block, hidden, seen.returned)
        folds = []
        for step in seen.steps:
            linears: dict[str, Any] = {named[inside[path]]: inside[path] for path in step}
            x = torch.cat([inputs[step[0]] for inputs in seen.inputs if step[0] in inputs])
            if not torch.isfinite(x).all():
                raise inputs_not_finite(next(iter(linears)))
            reached = next(i for i, inputs in enumerate(seen.inputs) if step[0] in inputs)
            provider = provider_of(proof, linears, uses, reached, hidden[reached])
            if provider is not None and x.numel():
                weights = [(linear.weight.detach().float(), plan[name][1]) for name, linear in linears.items()]
                folds.append(Fold(linears, provider, (_awq if method == "awq" else _smoothquant)(x, weights)))
        whole = proof.same(folds)
        for fold in folds:
            proved = fold.finite and (whole or proof.same([fold]))
            yield fold if proved else dataclasses.replace(fold, exponents=torch.zeros_like(fold.exponents))
        if hidden[0] is not None:
            hidden = seen.outputs


def _awq(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of the scales that lose least at the output, rounded to nearest."""
    hessian = x.T @ x
    size = x.abs().mean(0)
    best, least = torch.zeros_like(size, dtype=torch.int32), float("inf")
    for share in _AWQ_POWERS:
        exponents = _whole(share * _log2(size))
        loss = 0.0
        for weight, scheme in weights:
            try:
                miss = scaled(_rounded(scaled(weight, exponents), scheme), -exponents) - weight
            except ValueError:
                loss = float("inf")
                break
            loss += float(((miss @ hessian) * miss).sum())
        if loss < least:
            best, least = exponents, loss
    return best


def _smoothquant(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of scales that share outliers between inputs and weights.

    Where inputs are quantized, of several shares, and none, the one that loses least at the output.
    """
    largest = _log2(torch.stack([weight.abs().amax(0) for weight, _ in weights]).amax(0))
    size = _log2(x.abs().amax(0))
    if all(scheme.activations is None for _, scheme in weights):
        return _whole(_SHARE * size - (1 - _SHARE) * largest)
    tried = [torch.zeros_like(size, dtype=torch.int32)]
    tried += [_whole(share * size - (1 - share) * largest) for share in _SHARES]
    return min(tried, key=lambda exponents: _output_error(x, weights, exponents))


def _output_error(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]], exponents: Tensor) -> float:
    """The squared error of outputs on some of the tokens x, inputs and weights quantized after scaling.

    Infinite where a scale cannot be stored.
    """
    some = x[:: max(1, x.shape[0] // _TOKENS)]
    read: dict[Activations | None, Tensor] = {}  # by how they are quantized: layers that share inputs mostly agree
    lost = 0.0
    for weight, scheme in weights:
        try:
            w = _rounded(scaled(weight, exponents), scheme)
        except ValueError:
            return float("inf")
        if scheme.activations not in read:
            read[scheme.activations] = _as_read(x, some, exponents, scheme.activations)
        lost += float((read[scheme.activations] @ w.T - some @ weight.T).double().square().sum())
    return lost


def _as_read(x: Tensor, some: Tensor, exponents: Tensor, how: Activations | None) -> Tensor:
    """Some of the tokens x, scaled, as their codes have them; static ranges are those of all of x."""
    own = scaled(some, -exponents)
    if how is None:
        return own
    static = static_activation(Histogram.of(scaled(x, -exponents)), how, "mse") if how.static else None
    return reference_int8.dequantize_activations(*reference_int8.quantize_activations(own, how, static))


def _rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """What the nearest codes stand for, float32; ValueError where a scale cannot be stored."""
    scale, zero = fit(weight, scheme, "rtn")
    return reference.decode(reference.encode(weight, scale, zero, scheme), scale, zero, scheme).float()


def _log2(size: Tensor) -> Tensor:
    return size.clamp(min=max(_LEAST * float(size.max()), torch.finfo(torch.float32).tiny)).log2()


def _whole(exact: Tensor) -> Tensor:
    """Whole exponents, as many up as down: a factor for all channels would change nothing."""
    return (exact - (exact.max() + exact.min()) / 2).round().to(torch.int32)
