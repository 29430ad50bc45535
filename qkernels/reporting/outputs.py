"""Running both models over batches: what the layers read, and how far the outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import evaluating, padding, rows
from qkernels.nn import QuantLinear
from qkernels.quality import PredictionScore, field, floating_output
from qkernels.reporting._output_errors import OutputErrors
from qkernels.reporting._second_moments import SecondMoments
from qkernels.reporting.rows import ModelQuality

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]


class OutputScore:
    """Running sums over the outputs of both models."""

    def __init__(self) -> None:
        self.batches = 0
        self.model, self.reference = PredictionScore(), PredictionScore()
        self.signal = self.noise = self.distance = 0.0
        self.vectors = 0

    def add_predictions(self, y: Tensor, original: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        """Logits (batch, tokens, vocabulary) of both models, sequence by sequence; none are kept."""
        for i, sequence in enumerate(tokens):
            targets = sequence[1:].to(original.device)
            ours, theirs = (torch.log_softmax(z[i, :-1].to(original.device).float(), dim=-1) for z in (y, original))
            if mask is not None:
                real = (mask[i, 1:].bool() & mask[i, :-1].bool()).to(original.device)
                targets, ours, theirs = targets[real], ours[real], theirs[real]
            self.model.add(ours, targets, theirs)
            self.reference.add(theirs, targets)

    def add_vectors(self, y: Tensor, original: Tensor, mask: Tensor | None) -> None:
        """Outputs (..., features) of both models."""
        a, b = (rows(z.to(original.device), mask).double() for z in (original, y))
        self.signal += a.square().sum().item()
        self.noise += (a - b).square().sum().item()
        self.distance += (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).sum().item()
        self.vectors += a.shape[0]

    def result(self) -> ModelQuality:
        """The figures."""
        if self.model.predictions:
            return ModelQuality(
                self.batches,
                self.model.predictions,
                self.model.perplexity,
                self.reference.perplexity,
                self.model.kl,
            )
        if not self.vectors:
            raise ValueError("batches hold no token to predict: each needs two tokens or more, padding aside")
        relative = math.sqrt(self.noise / self.signal) if self.signal else math.inf if self.noise else 0.0
        return ModelQuality(self.batches, output_error=relative, cosine_distance=self.distance / self.vectors)


def run(
    model: nn.Module,
    reference: nn.Module,
    layers: Mapping[str, tuple[QuantLinear, nn.Linear]],
    batches: Iterable[Batch],
) -> tuple[dict[str, Tensor], dict[str, float], ModelQuality]:
    """What layers read in `reference`, and how far the models' outputs are apart.

    The first is {name: H (K, K) float32 of the layer's input}, or, where inputs are quantized, too, the second
    {name: relative error of the layer's output}.

    Both models run in evaluation mode, without gradients; their modes are what they were afterwards.

    Args:
        model: the quantized one.
        reference: the unquantized one.
        layers: {name: (of the model, of the reference)}.
        batches: see qkernels.report; gone through once.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of Tensors, dicts or tuples, got a {type(batches).__name__}; "
            "for a single batch write batches=[batch]"
        )
    float_inputs = {n: linear for n, (layer, linear) in layers.items() if layer.scheme.activations is None}
    others = {n: (linear, layer.qweight) for n, (layer, linear) in layers.items() if n not in float_inputs}
    moments, errors, score = SecondMoments(float_inputs), OutputErrors(others), OutputScore()
    with torch.no_grad(), evaluating(model), evaluating(reference):
        for batch in batches:
            args, kwargs = _arguments(batch, score.batches)
            mask = padding(kwargs)
            with moments.watching(mask), errors.watching(mask):
                original = _call(reference, args, kwargs, score.batches)
            _add(score, _call(model, args, kwargs, score.batches), original, _tokens(reference, args, kwargs), mask)
            score.batches += 1
    if not score.batches:
        raise ValueError("batches is empty: give at least one, or none at all (batches=None) to compare weights only")
    if unreached := [name for name in layers if name not in moments.moments and name not in errors.sums]:
        more = f", and {len(unreached) - 3} more" if len(unreached) > 3 else ""
        raise ValueError(
            f"no batch reaches {', '.join(unreached[:3])}{more} in the reference model: "
            "its output error cannot be measured; give batches that use every quantized layer, or batches=None"
        )
    return moments.moments, errors.result(), score.result()


def _add(score: OutputScore, found: Any, original: Any, tokens: Tensor | None, mask: Tensor | None) -> None:
    y, wanted = (_output(output, who) for output, who in ((found, "model"), (original, "reference")))
    if y.shape != wanted.shape:
        raise ValueError(f"the outputs differ in shape: model {tuple(y.shape)}, reference {tuple(wanted.shape)}")
    if not torch.isfinite(wanted).all():
        raise ValueError(f"the output of the reference model for batch {score.batches} holds NaN or infinity")
    if not wanted.numel():
        return
    if field(original, "logits") is not None and _are_predictions(wanted, tokens):
        assert tokens is not None
        score.add_predictions(y, wanted, tokens, mask)
    else:
        score.add_vectors(y, wanted, mask)


def _are_predictions(logits: Tensor, tokens: Tensor | None) -> bool:
    return (
        tokens is not None
        and logits.ndim == 3
        and logits.shape[:2] == tokens.shape
        and int(tokens.max()) < logits.shape[2]
    )


def _tokens(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ids (batch, tokens) whose successors a model predicts; None for one that is known to predict none."""
    can_generate = getattr(model, "can_generate", None)  # Hugging Face's: not for masked language models
    if callable(can_generate) and not can_generate():
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        return None
    return ids.long()


def _output(output: Any, who: str) -> Tensor:
    found = floating_output(output)
    if found is None:
        raise TypeError(
            f"{who} returned a {type(output).__name__} without a floating tensor, so outputs cannot be compared; "
            "batches=None compares weights only"
        )
    return found


def _arguments(batch: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"batch {index} must be a Tensor, a dict or a tuple of arguments, got a {type(batch).__name__}")


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> Any:
    first = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    try:
        return model(*(moved(value) for value in args), **{name: moved(value) for name, value in kwargs.items()})
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"the model fails on batch {index}: {type(error).__name__}: {error}") from error
