"""Codes of all Linears of a block together: which way each weight is rounded, by what that does to the block's output.

Objective sum over batches of |block(x~) with quantized weights - block(x) of the original|^2, x~ being what the
          quantized blocks before give.
Method    a code is rint(t + v), with t the weight in steps, no further than half a step from the code that came, and v
          in [-1/2, 1/2]; v and the scales go down the sign of their gradient, straight through the rounding.
Source    Cheng et al., Optimize Weight Rounding via Signed Gradient Descent (SignRound), 2023; it starts from rounding
          to nearest, and tunes both ends of each range. Here it starts from the codes of any method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import packing, reference
from qkernels.calibrate.batches import CalibrationError, Call, rows
from qkernels.calibrate.gptq import Grid
from qkernels.fit import store_scale
from qkernels.quality import floating_output
from qkernels.tensor import QTensor

_TRAVEL = 0.05  # of scales, relative, at most


class _Layer:
    """One quantized weight, and what of it moves."""

    def __init__(self, original: Tensor, weight: QTensor):
        self.weight, self.dtype = weight, original.dtype
        scheme, shape = weight.scheme, original.shape
        code = packing.unpack(weight.packed, scheme.bits, shape[1]).float()
        self.grid = Grid(scheme, weight.scale, weight.zero, shape[1])
        step, base = self._steps(self.grid)
        target = original.detach().float()
        exact = (target - base) / step if scheme.value_map == "offset" else target / step + base
        # Ties may go either way: a weight on the verge is a hair inside of its own code.
        self.position = code + (exact - code).clamp_(-0.499, 0.499)
        self.shift = torch.zeros_like(self.position).requires_grad_()
        self.change = torch.zeros_like(weight.scale, dtype=torch.float32).requires_grad_()

    def _steps(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(step, base) of every weight, (N, K) float32; bases are zeros or offsets."""
        step, base = grid.steps(self.weight.shape[0])
        return step.T, base.T

    def codes(self) -> Tensor:
        """float32 codes, through whose rounding gradients pass; not where they are clipped."""
        scheme = self.weight.scheme
        moved = (self.position + self.shift).clamp(scheme.code_min, scheme.code_max)
        return moved + (moved.detach().round() - moved.detach())

    def scale(self) -> Tensor:
        return self.weight.scale.float() * (1 + self.change)

    def decoded(self) -> Tensor:
        step, base = self._steps(dataclasses.replace(self.grid, scale=self.scale()))
        return reference.value_(self.codes(), step, base, self.weight.scheme).to(self.dtype)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step; both parameters stay in their bounds."""
        for parameter, share, limit in ((self.shift, 1.0, 0.5), (self.change, _TRAVEL, _TRAVEL)):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=rate * share).clamp_(-limit, limit)
                parameter.grad = None

    @torch.no_grad()
    def stored(self) -> QTensor:
        """The weight as it is now, scales rounded to their storage dtype."""
        scheme = self.weight.scheme
        code = self.codes().to(torch.uint8).contiguous()
        scale = store_scale(self.scale(), self.weight.scale, scheme)
        return dataclasses.replace(self.weight, packed=packing.pack(code, scheme.bits), scale=scale)


def round_together(
    block: nn.Module,
    weights: Mapping[str, tuple[Tensor, QTensor]],
    calls: Sequence[Call],
    hidden: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    steps: int,
) -> dict[str, QTensor]:
    """{path: weight with other codes and scales}; never worse over all batches than what came.

    Args:
        block: as it is called; its Linears' weights are not used, nor changed.
        weights: {path of a Linear in it: (original weight (N, K), quantized weight)}.
        calls: what it is called with, for each batch.
        hidden: the hidden states that it gets; None where calls hold everything.
        wanted: the output of the original block.
        steps: one batch each; 200 is usual.

    Raises:
        CalibrationError: the block gives no floating tensor.
    """
    layers = {path: _Layer(original, weight) for path, (original, weight) in weights.items()}
    before = _total(block, {path: weight for path, (_, weight) in weights.items()}, weights, calls, hidden, wanted)
    for step in range(steps):
        i = step % len(calls)
        with torch.enable_grad():
            found = _output(block, {path: layer.decoded() for path, layer in layers.items()}, calls[i], hidden[i])
            loss = nn.functional.mse_loss(rows(found, calls[i].mask), rows(wanted[i], calls[i].mask))
            loss.backward()
        for layer in layers.values():
            layer.descend((1 - step / steps) / steps)
    stored = {path: layer.stored() for path, layer in layers.items()}
    after = _total(block, stored, weights, calls, hidden, wanted)
    return stored if after < before else {path: weight for path, (_, weight) in weights.items()}


@torch.no_grad()
def _total(
    block: nn.Module,
    chosen: Mapping[str, QTensor],
    weights: Mapping[str, tuple[Tensor, QTensor]],
    calls: Sequence[Call],
    hidden: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
) -> float:
    decoded = {path: weight.dequantize(weights[path][0].dtype) for path, weight in chosen.items()}
    misses = (
        (rows(_output(block, decoded, call, x), call.mask) - rows(y, call.mask)).square().sum(dtype=torch.float64)
        for call, x, y in zip(calls, hidden, wanted, strict=True)
    )
    return float(sum(misses))


def _output(block: nn.Module, weights: Mapping[str, Tensor], call: Call, hidden: Tensor | None) -> Tensor:
    args: tuple[Any, ...] = call.args if hidden is None else (hidden, *call.args)
    named = {f"{path}.weight": weight for path, weight in weights.items()}
    found = floating_output(torch.func.functional_call(block, named, args, call.kwargs, tie_weights=False))
    if found is None:
        raise CalibrationError("a block gives no floating tensor, so codes cannot be rounded by its output")
    return found
