"""Calibrated codes for a model's Linears: blocks in order, each on what the quantized blocks before it give.

Source    the input mismatch: with X~ the inputs that the quantized model gives and X the original's, the best weight is
          W* = (X~^T X~ + l I)^-1 (X~^T X + l I) W, and what codes lose against it is measured by X~^T X~ alone.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import packing, reference
from qkernels.calibrate.batches import Batch, as_calls, evaluating, inputs_not_finite
from qkernels.calibrate.gptq import DAMPING, SingularHessianError, gptq
from qkernels.calibrate.resume import Folder, digest
from qkernels.calibrate.signround import round_together
from qkernels.calibrate.walk import Block, find_blocks, input_until, observe, record
from qkernels.fit import fit
from qkernels.quality import floating_output
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

_GPTQ, _ROUNDED = "gptq", "gptq, rounded by block"  # methods, as reports name them


@dataclasses.dataclass
class _Moments:
    """Sums over tokens for Linears that share an input: X~^T X~ and, if the mismatch matters, X~^T X."""

    hessian: Tensor
    cross: Tensor | None

    @staticmethod
    def zeros(features: int, device: torch.device, crossed: bool) -> _Moments:
        hessian = torch.zeros(features, features, device=device)
        return _Moments(hessian, torch.zeros_like(hessian) if crossed else None)

    def add(self, quantized: Tensor, original: Tensor) -> None:
        self.hessian.addmm_(quantized.T, quantized)
        if self.cross is not None:
            self.cross.addmm_(quantized.T, original)

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(m).all()) for m in (self.hessian, self.cross) if m is not None)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    plan: Mapping[str, tuple[nn.Linear, Scheme]],
    batches: Iterable[Batch],
    *,
    mismatch: float = 0.0,
    rounding: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, tuple[QTensor, str]]:
    """{name: (quantized weight, method)} by GPTQ for the Linears of plan; the model is not changed.

    Linears outside the blocks, or that no batch reaches, get the data-free search; their method says so.

    Args:
        model: with its weights; on any device.
        plan: {name: (Linear of the model, scheme)}.
        batches: tensors, mappings of keyword arguments or sequences of positional ones, to call the model with.
        mismatch: how far weights are moved to make up for the error of the layers before, 0 to 1. On a small language
            model with 6,000 tokens it neither helped nor hurt beyond noise.
        rounding: steps, after that, in which all codes of a block are moved together by what it does to its output.
        folder: where finished blocks are kept; the same call goes on from the last of them.
        progress: whether to show a bar.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, or inputs of a layer are not finite.
        SingularHessianError: naming the layer.
        ResumeError: folder holds another calibration.
    """
    from tqdm import tqdm

    calls = as_calls(batches, model)
    named: dict[nn.Module, str] = {linear: name for name, (linear, _) in plan.items()}
    with evaluating(model):
        stages, original = record(model, find_blocks(model, named), calls)
        quantized = list(original)
        done: dict[str, tuple[QTensor, str]] = {}
        kept = None if folder is None else Folder(folder, digest(model, plan, calls, mismatch, rounding))
        finished = 0
        if kept is not None and (found := kept.load(len(calls), next(model.parameters()).device)):
            finished, weights, original, quantized = found
            done = {name: (weight, _ROUNDED if rounding else _GPTQ) for name, weight in weights.items()}
        with tqdm(total=len(stages), initial=finished, desc="calibrating", unit="block", disable=not progress) as bar:
            for index in range(finished, len(stages)):
                before = set(done)
                original, quantized = _block(stages[index], named, plan, original, quantized, mismatch, rounding, done)
                if kept is not None:
                    kept.save(index, {n: q for n, (q, _) in done.items() if n not in before}, original, quantized)
                bar.update()
    for name, (linear, scheme) in plan.items():
        if name not in done:
            scale, zero = fit(linear.weight.detach(), scheme)
            code = reference.encode(linear.weight.detach(), scale, zero, scheme)
            done[name] = _qtensor(code, scale, zero, scheme), "search (not reached by calibration)"
    return done


def _block(
    block: Block,
    named: Mapping[nn.Module, str],
    plan: Mapping[str, tuple[nn.Linear, Scheme]],
    original: list[Tensor | None],
    quantized: list[Tensor | None],
    mismatch: float,
    rounding: int,
    done: dict[str, tuple[QTensor, str]],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Quantize a block's Linears into done; the hidden states after it, (original, quantized)."""
    inside = {path: m for path, m in block.module.named_modules() if m in named}
    twin = copy.deepcopy(block.module)  # its weights become the quantized ones, step by step
    twins = {path: twin.get_submodule(path) for path in inside}
    seen = observe(block, inside, original)
    for step in seen.steps:
        _step(block, step, inside, named, plan, twin, twins, seen.inputs, quantized, mismatch, done)
    if rounding:
        _round(block, inside, named, twin, twins, quantized, seen.outputs, rounding, done)
    if original[0] is None:  # the whole model was one block
        return original, quantized
    after = [floating_output(call.run(twin, hidden)) for call, hidden in zip(block.calls, quantized, strict=True)]
    return seen.outputs, after


def _round(
    block: Block,
    inside: Mapping[str, nn.Module],
    named: Mapping[nn.Module, str],
    twin: nn.Module,
    twins: Mapping[str, nn.Module],
    quantized: list[Tensor | None],
    outputs: list[Any],
    steps: int,
    done: dict[str, tuple[QTensor, str]],
) -> None:
    """Move the codes of a block's Linears together."""
    originals: dict[str, Any] = {path: inside[path] for path in inside if named[inside[path]] in done}
    weights = {path: (linear.weight.detach(), done[named[linear]][0]) for path, linear in originals.items()}
    twin.requires_grad_(False)
    for path, weight in round_together(twin, weights, block.calls, quantized, outputs, steps).items():
        done[named[inside[path]]] = weight, _ROUNDED
        target: Any = twins[path]
        target.weight.data = weight.dequantize(target.weight.dtype)


def _step(
    block: Block,
    step: list[str],
    inside: Mapping[str, nn.Module],
    named: Mapping[nn.Module, str],
    plan: Mapping[str, tuple[nn.Linear, Scheme]],
    twin: nn.Module,
    twins: Mapping[str, nn.Module],
    inputs: list[dict[str, Tensor]],
    quantized: list[Tensor | None],
    mismatch: float,
    done: dict[str, tuple[QTensor, str]],
) -> None:
    """Quantize the Linears that share one input."""
    first: Any = inside[step[0]]
    moments = _Moments.zeros(first.in_features, first.weight.device, crossed=mismatch != 0)
    for call, hidden, found in zip(block.calls, quantized, inputs, strict=True):
        if step[0] in found:
            for x in input_until(twin, twins[step[0]], call, hidden):
                if x.shape == found[step[0]].shape:
                    moments.add(x, found[step[0]])
                else:  # routed elsewhere by the quantized layers before: no pairs
                    moments.add(found[step[0]], found[step[0]])
    if not moments.finite:
        raise inputs_not_finite(named[inside[step[0]]])
    for paths in _alike(step, [plan[named[inside[path]]][1] for path in step]):
        linears = [plan[named[inside[path]]][0] for path in paths]
        scheme = plan[named[inside[paths[0]]]][1]
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        try:
            code, scale, zero = gptq(_made_up(weight, moments, mismatch), moments.hessian, scheme)
        except SingularHessianError as error:
            raise SingularHessianError(f"{', '.join(named[inside[path]] for path in paths)}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{', '.join(named[inside[path]] for path in paths)}: weight: {error}") from None
        ends = itertools.accumulate(linear.out_features for linear in linears)
        for path, linear, end in zip(paths, linears, ends, strict=True):
            rows = slice(end - linear.out_features, end)
            own = code[rows], scale[:, rows].contiguous(), None if zero is None else zero[:, rows].contiguous()
            done[named[inside[path]]] = _qtensor(*own, scheme), _GPTQ
            target: Any = twins[path]
            target.weight.data = reference.decode(*own, scheme).to(linear.weight.dtype)


def _alike(step: list[str], schemes: list[Scheme]) -> list[list[str]]:
    """Linears that one GPTQ serves, rows beside rows: of one scheme, unless that has one scale for the tensor."""
    found: dict[Any, list[str]] = {}
    for path, scheme in zip(step, schemes, strict=True):
        found.setdefault((scheme, path if scheme.group_size == "tensor" else ""), []).append(path)
    return list(found.values())


def _made_up(weight: Tensor, moments: _Moments, mismatch: float) -> Tensor:
    """The weight (N, K) float32 that makes up for the error of the inputs: W + mismatch (W* - W)."""
    mean = moments.hessian.diagonal().mean()
    if moments.cross is None or mean <= 0:
        return weight
    ridge = DAMPING * mean * torch.eye(weight.shape[1], device=weight.device)
    # W* - W = (X~^T X~ + l I)^-1 (X~^T X - X~^T X~) W: where the inputs agree, exactly nothing.
    factor, failed = torch.linalg.cholesky_ex(moments.hessian + ridge)
    if failed:
        raise SingularHessianError("the second moments of the inputs are singular; more batches help")
    return weight + mismatch * torch.cholesky_solve((moments.cross - moments.hessian) @ weight.T, factor).T


def _qtensor(code: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> QTensor:
    return QTensor(packing.pack(code, scheme.bits), scale, zero, scheme, code.shape[1])
