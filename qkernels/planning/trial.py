"""What finished plans really cost: the model's outputs with their codes, against its own.

A sum of second-order costs knows nothing of errors so large that they change what later errors do: two bits cost more
than it says, and how much more differs from model to model. So a few plans that trust it more or less are tried.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import Batch, CalibrationError, Call, as_calls, evaluating, predictions, run_batch
from qkernels.tensor import QTensor


@torch.no_grad()
def costs(model: nn.Module, trials: Sequence[Mapping[str, QTensor]], batches: Iterable[Batch]) -> list[float]:
    """What each trial costs: KL in nats per prediction, or the output's relative square error; inf if not finite.

    Args:
        model: unquantized; it is not changed.
        trials: {name of a Linear: its codes}.
        batches: as for calibration; each is run once, and once more for every trial.
    """
    losses, unit = [0.0] * len(trials), 0.0
    linears = dict(model.named_modules())
    with evaluating(model):
        for i, call in enumerate(as_calls(batches, model)):
            wanted, are_logits = predictions(run_batch(model, call, i), call, i)
            if are_logits:
                wanted = torch.log_softmax(wanted, dim=-1)
            unit += wanted.shape[0] if are_logits else wanted.square().sum().item()
            for t, trial in enumerate(trials):
                with _multiplying({linears[name]: weight for name, weight in trial.items()}):
                    losses[t] += _loss(model, call, i, wanted, are_logits)
    return [loss / unit if unit else 0.0 for loss in losses]


def _loss(model: nn.Module, call: Call, batch: int, wanted: Tensor, are_logits: bool) -> float:
    output = run_batch(model, call, batch)
    try:
        found, _ = predictions(output, call, batch)
    except CalibrationError:  # the quantized model overflows
        return math.inf
    if not are_logits:
        return (found - wanted).square().sum().item()
    log_probabilities = torch.log_softmax(found, dim=-1)
    return torch.nn.functional.kl_div(log_probabilities, wanted, reduction="sum", log_target=True).item()


@contextlib.contextmanager
def _multiplying(weights: Mapping[nn.Module, QTensor]) -> Iterator[None]:
    """Meanwhile these Linears multiply by other weights."""

    def hook_of(weight: QTensor) -> Callable[..., Tensor]:
        def hook(linear: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.nn.functional.linear(args[0], weight, linear.bias)  # type: ignore[arg-type]

        return hook

    handles = [linear.register_forward_hook(hook_of(weight)) for linear, weight in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
