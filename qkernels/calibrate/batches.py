"""Batches that a user gives: what they call a model with, what of them counts, and what the model returns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.quality import field, floating_output

Batch = Tensor | Mapping[str, Any] | Sequence[Any]


class CalibrationError(ValueError):
    """Batches, or the model on them, cannot serve for calibration; the message names the batch or the layer."""


@dataclasses.dataclass
class Call:
    """What a module is called with, but for the hidden states that come first.

    Attributes:
        args: positional.
        kwargs: by name.
        mask: (batch, tokens), zero for padding, which counts nowhere; None if there is none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    def run(self, module: nn.Module, hidden: Tensor | None) -> Any:
        """The module's output; without hidden states the arguments are whole."""
        return module(*self.args, **self.kwargs) if hidden is None else module(hidden, *self.args, **self.kwargs)


def as_calls(batches: Iterable[Batch], model: nn.Module) -> list[Call]:
    """Batches as calls of the model.

    Raises:
        CalibrationError: there are none, or one is empty, all padding, or no tensor, mapping or sequence.
    """
    if isinstance(batches, (Tensor, str, Mapping)):
        raise CalibrationError(f"calibration must be an iterable of batches, got one {type(batches).__name__}")
    calls = []
    for i, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            call = Call((batch,), {})
        elif isinstance(batch, Mapping):
            call = Call((), dict(batch))
        elif isinstance(batch, (tuple, list)):
            call = Call(tuple(batch), {})
        else:
            raise CalibrationError(
                f"calibration batch {i} must be a Tensor, a mapping of keyword arguments or a sequence of positional "
                f"ones, got {type(batch).__name__}"
            )
        tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
        if not tensors or any(t.numel() == 0 for t in tensors):
            raise CalibrationError(f"calibration batch {i} is empty")
        if (mask := padding(call.kwargs)) is not None and not mask.any():
            raise CalibrationError(f"calibration batch {i} is all padding: its attention_mask is zero everywhere")
        calls.append(call)
    if not calls:
        raise CalibrationError("calibration holds no batches")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [_moved(call, device) for call in calls]


def _moved(call: Call, device: torch.device) -> Call:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    kwargs = {k: move(v) for k, v in call.kwargs.items()}
    return Call(tuple(map(move, call.args)), kwargs, padding(kwargs))


def padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention_mask (batch, tokens) in what a model is called with, if there is such a one; zero is padding.

    One of floating numbers, none above zero, is meant to be added, with zero for what counts: it is no such mask.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (mask.is_floating_point() and not (mask > 0).any()):
        return None
    return mask


def run_batch(model: nn.Module, call: Call, i: int) -> Any:
    """The model's output on batch i; CalibrationError, naming the batch, if it fails."""
    try:
        return call.run(model, None)
    except CalibrationError:  # a hook's
        raise
    except Exception as error:
        raise CalibrationError(f"the model fails on calibration batch {i}: {type(error).__name__}: {error}") from error


def inputs_not_finite(name: str) -> CalibrationError:
    """The error for a layer whose inputs hold NaN or infinity."""
    return CalibrationError(f"{name}: its inputs are not finite on the calibration batches")


def predictions(output: Any, call: Call, batch: int) -> tuple[Tensor, bool]:
    """(the output (rows, features) float32 without padding, whether they are logits).

    Raises:
        CalibrationError: there is no floating tensor in the output, or it is not finite.
    """
    found = floating_output(output)
    if found is None:
        raise CalibrationError(
            f"the model returned a {type(output).__name__} without a floating tensor on calibration batch {batch}"
        )
    y = found.float()
    if not torch.isfinite(y).all():
        raise CalibrationError(f"the model's output is not finite on calibration batch {batch}")
    return rows(y, call.mask), field(output, "logits") is not None and y.shape[-1] > 1


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., K) as (tokens, K) float32, without padding."""
    return unpadded(x, mask).float()


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., K) as (tokens, K), without those that a mask (batch, tokens) of its leading sizes calls padding.

    Inputs of other leading sizes, as those of experts, hold nobody knows whose tokens: all of them count.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None or mask.shape != x.shape[:-1] else flat[mask.reshape(-1).to(x.device).bool()]


@contextlib.contextmanager
def listening(layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile `hear` is called with (name, input) whenever one of these layers is; no hook is left behind."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hear(name, args[0] if args else kwargs["input"])

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode and, if it is one of transformers', keeps no keys and values."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile parameters get no gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_()
