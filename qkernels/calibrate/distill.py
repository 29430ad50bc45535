"""Scales of all layers together, so that the quantized model answers as the original did. Codes stay as they are.

Objective the divergence KL(original || quantized) of the predictions where the model gives logits, in nats per token;
          else the squared error of its first output, relative to the original's own size.
Method    Adam on the scales (and offsets), through codes that do not move.
Source    Chen et al., EfficientQAT, 2024, which trains scales end to end so; the original model as the teacher, and not
          the text, lets few tokens do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import packing, reference
from qkernels.calibrate.batches import Batch, Call, as_calls, evaluating, frozen, predictions, run_batch
from qkernels.fit import store_scale
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

_RATE, _BETAS, _WARM_UP = 3e-3, (0.9, 0.99), 5  # of relative changes of scales; steps to reach the rate


class _Decode(torch.autograd.Function):
    """Weights of codes, in `dtype`, with gradients for scales and offsets; only the codes are kept."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero: Tensor | None, code: Tensor, scheme: Scheme, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(code, zero)
        ctx.scheme, ctx.shape = scheme, scale.shape
        return reference.decode(code, scale, zero, scheme).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        code, zero = ctx.saved_tensors
        scheme = ctx.scheme
        gradient = gradients[0].float().contiguous()
        by_scale, by_zero = (gradient.new_zeros(max(ctx.shape[0], 1), gradient.shape[0]) for _ in range(2))
        for (g, groups), (level, _) in zip(
            reference.by_group(gradient, scheme), reference.by_group(code, scheme), strict=True
        ):
            signed = level.float()
            if scheme.value_map == "offset":
                by_zero[groups] = g.sum(-1).T
            else:
                signed = signed - (scheme.center if zero is None else reference.per_group(zero, groups))
            by_scale[groups] = (g * signed).sum(-1).T
        if ctx.shape != by_scale.shape:  # one scale for the tensor
            by_scale, by_zero = by_scale.sum().reshape(1, 1), by_zero.sum().reshape(1, 1)
        return by_scale, by_zero if ctx.needs_input_grad[1] else None, None, None, None


class _Layer:
    """What of one quantized weight may change: the change of its scales, and of its offsets in steps."""

    def __init__(self, weight: QTensor, dtype: torch.dtype):
        self.weight, self.dtype = weight, dtype
        self.code = packing.unpack(weight.packed, weight.scheme.bits, weight.shape[1])
        self.change = torch.zeros_like(weight.scale, dtype=torch.float32).requires_grad_()
        self.shift = torch.zeros_like(self.change).requires_grad_() if self.has_offsets else None

    @property
    def has_offsets(self) -> bool:
        return self.weight.scheme.value_map == "offset"

    @property
    def parameters(self) -> list[Tensor]:
        return [self.change] if self.shift is None else [self.change, self.shift]

    def meta(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) as they are now, in float32 what may change."""
        original, zero = self.weight.scale.float(), self.weight.zero
        if self.shift is not None and zero is not None:
            zero = zero.float() + self.shift * original
        return original * (1 + self.change), zero

    def decoded(self) -> Tensor:
        weight: Tensor = _Decode.apply(*self.meta(), self.code, self.weight.scheme, self.dtype)
        return weight

    def stored(self) -> QTensor:
        """The weight with the scales of now, rounded to their storage dtype."""
        with torch.no_grad():
            scale, zero = self.meta()
            scheme = self.weight.scheme
            if self.has_offsets and zero is not None and self.weight.zero is not None:
                offset = zero.to(scheme.scale_dtype)
                zero = torch.where(torch.isfinite(offset), offset, self.weight.zero)
            return dataclasses.replace(self.weight, scale=store_scale(scale, self.weight.scale, scheme), zero=zero)


def distill(
    model: nn.Module,
    weights: Mapping[str, tuple[nn.Linear, QTensor]],
    batches: Iterable[Batch],
    *,
    epochs: int,
    progress: bool = True,
) -> dict[str, QTensor]:
    """{name: weight with scales that suit all the others}; the model, which is not changed, is the teacher.

    Memory beside the model: a second set of weights in its dtype, codes in a byte each, and what a backward pass
    over one batch keeps. The result is never worse than what came, on the batches.

    Args:
        model: with its float weights.
        weights: {name: (Linear of the model, its quantized weight)}.
        batches: tensors, mappings of keyword arguments or sequences of positional ones, to call the model with.
        epochs: how often to go through the batches.
        progress: whether to show a bar.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one or gives no floating output, or its output
            is not finite.
    """
    from tqdm import tqdm

    calls = as_calls(batches, model)
    layers = {name: _Layer(weight, linear.weight.dtype) for name, (linear, weight) in weights.items()}
    names = {linear: name for name, (linear, _) in weights.items()}
    places = {f"{path}.weight": names[module] for path, module in model.named_modules() if module in names}
    optimizer = torch.optim.Adam([p for layer in layers.values() for p in layer.parameters], lr=_RATE, betas=_BETAS)
    steps = epochs * len(calls)
    order = torch.Generator().manual_seed(0)
    bar = tqdm(total=steps, desc="distilling", unit="batch", disable=not progress)
    with evaluating(model), frozen(model), bar:
        before = _mean_loss(model, calls, {place: weights[name][1] for place, name in places.items()})
        for step in range(steps):
            if step % len(calls) == 0:
                shuffled = torch.randperm(len(calls), generator=order).tolist()
            share = min(1.0, (step + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * share
            i = shuffled[step % len(calls)]
            with torch.enable_grad():
                decoded = {name: layer.decoded() for name, layer in layers.items()}
                loss = _loss(model, calls[i], i, {place: decoded[name] for place, name in places.items()})
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
        stored = {name: layer.stored() for name, layer in layers.items()}
        after = _mean_loss(model, calls, {place: stored[name] for place, name in places.items()})
    return stored if after < before else {name: weight for name, (_, weight) in weights.items()}


@torch.no_grad()
def _mean_loss(model: nn.Module, calls: list[Call], weights: Mapping[str, QTensor]) -> float:
    found = {place: weight.dequantize(model.get_parameter(place).dtype) for place, weight in weights.items()}
    return sum(float(_loss(model, call, i, found)) for i, call in enumerate(calls)) / len(calls)


def _loss(model: nn.Module, call: Call, i: int, weights: Mapping[str, Tensor]) -> Tensor:
    """How far the model with these weights is from the model, on one batch."""
    with torch.no_grad():
        target, are_logits = predictions(run_batch(model, call, i), call, i)
    output = torch.func.functional_call(model, dict(weights), call.args, call.kwargs, tie_weights=False)
    found, _ = predictions(output, call, i)
    if not are_logits:
        return nn.functional.mse_loss(found, target) / target.square().mean()
    target, found = torch.log_softmax(target, -1), torch.log_softmax(found, -1)
    return nn.functional.kl_div(found, target, reduction="batchmean", log_target=True)
