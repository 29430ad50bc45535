"""What a change of each Linear's weight does to a model's predictions: the Fisher information along that change.

Shapes    x (tokens, K) inputs, g (tokens, N) gradients at the outputs, change (N, K) of the weight.
Theory    Labels are drawn from the model's own predictions, and g is the gradient of their negative log-likelihood. The
          score of a sequence is the sum over its tokens of g . (change x). Half the mean of its square is, to second
          order, the divergence KL(model || changed model), summed over the sequence's predictions.
          Tokens are summed before they are squared: what moves all tokens of a sequence the same way (values, which
          attention averages) costs several times what squares of single tokens add up to.
          Models without logits have no likelihood. There g is the gradient of r . y with r drawn from a normal
          distribution, and the mean square of the score is the squared change of the output y.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import (
    Batch,
    CalibrationError,
    Call,
    as_calls,
    evaluating,
    frozen,
    predictions,
    run_batch,
)

# A mean of squares of so many scores is within a fifth of its expectation two times out of three.
_SCORES = 64
_MOST_DRAWS = 8
_KEPT_BYTES = 2**31  # of inputs and gradients at a time


@dataclasses.dataclass
class _Use:
    """One call of a Linear."""

    batch: int
    x: Tensor  # (tokens, K)
    sequences: int  # that the tokens come from, each as many
    gradients: list[Tensor]  # (tokens, N) for each draw of labels

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + sum(g.nbytes for g in self.gradients)


@dataclasses.dataclass
class _Totals:
    """Of one run over all batches.

    Attributes:
        kind: "KL" or "output error".
        unit: what costs are divided by: predictions, or the squares of the outputs.
    """

    kind: str = ""
    unit: float = 0.0


class Trace:
    """Inputs and gradients of one Linear, over all batches."""

    def __init__(self, totals: _Totals) -> None:
        self.totals = totals
        self.uses: list[_Use] = []

    @property
    def kind(self) -> str:
        """What `cost` is: "KL", in nats per prediction, or "output error", the square relative to the output's."""
        return self.totals.kind

    @property
    def nbytes(self) -> int:
        """Kept so far."""
        return sum(use.nbytes for use in self.uses)

    @property
    def reached(self) -> bool:
        """Whether any gradient came: else nothing is known of the layer."""
        return any(use.gradients for use in self.uses)

    def cost(self, change: Tensor) -> float:
        """What the predictions lose if the weight moves by change (N, K) float32, to second order."""
        uses = [use for use in self.uses if use.gradients]
        width = max(use.sequences for use in uses)
        draws = len(uses[0].gradients)
        batches = 1 + max(use.batch for use in uses)
        scores = torch.zeros(draws, batches * width, dtype=torch.float64, device=change.device)
        for use in uses:
            moved = use.x.to(change) @ change.T
            first = use.batch * width
            for draw, g in enumerate(use.gradients):
                each = (g.to(change) * moved).sum(1, dtype=torch.float64)
                scores[draw, first : first + use.sequences] += each.view(use.sequences, -1).sum(1)
        half = 0.5 if self.kind == "KL" else 1.0
        return half * scores.square().sum().item() / draws / self.totals.unit

    def check(self, name: str) -> None:
        """Raise CalibrationError, naming the layer, unless all is finite."""
        for use in self.uses:
            if not torch.isfinite(use.x).all():
                raise CalibrationError(f"{name}: its inputs are not finite on calibration batch {use.batch}")
            if not all(torch.isfinite(g).all() for g in use.gradients):
                raise CalibrationError(f"{name}: its gradients are not finite on calibration batch {use.batch}")


def traces(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Batch], kept_bytes: int = _KEPT_BYTES
) -> Iterator[tuple[str, Trace]]:
    """(name, trace) of each Linear; the model is as before between them, and after an error.

    Inputs and gradients of all Linears in one batch are kept, or, if that is more, kept_bytes of those of
    some Linears in all batches: the batches are run once for each such set of Linears. Few sequences are run through
    with several draws of labels. One batch's graph of activations comes on top; weights get no gradients.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one or lets no gradient through, or inputs,
            gradients or the output are not finite.
    """
    calls = [_detached(call) for call in as_calls(batches, model)]
    sequences = sum(_sequences(call) for call in calls)
    draws = min(_MOST_DRAWS, -(-_SCORES // sequences))
    pending = dict(linears)
    while pending:
        found = _run(model, pending, calls, draws, kept_bytes)
        for name in list(found):
            trace = found.pop(name)
            trace.check(name)
            del pending[name]
            yield name, trace


def _run(
    model: nn.Module, linears: Mapping[str, nn.Linear], calls: list[Call], draws: int, kept_bytes: int
) -> dict[str, Trace]:
    """Traces of as many of the Linears as may be kept, at least one."""
    totals = _Totals()
    found = {name: Trace(totals) for name in linears}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with (
        _watching(model, linears, found) as watch,
        evaluating(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen(model),
    ):
        for i, call in enumerate(calls):
            watch.batch, watch.sequences, watch.roots, watch.last = i, _sequences(call), [], None
            output = run_batch(model, call, i)
            for draw in range(draws):
                loss = _loss(output, call, i, generator, totals if draw == 0 else _Totals())
                if not (watch.roots and loss.requires_grad):
                    raise CalibrationError(
                        f"no gradient reaches the Linears on calibration batch {i}: the output does not depend on "
                        "them, or the model's forward turns gradients off"
                    )
                torch.autograd.grad(loss, watch.roots, retain_graph=draw + 1 < draws, allow_unused=True)
            del output, loss
            if i == 0:
                for name in _too_many(found, kept_bytes // len(calls)):
                    del found[name]
    return found


def _too_many(found: Mapping[str, Trace], kept_bytes: int) -> list[str]:
    """Names from the one on with which more would be kept of each batch."""
    total = 0
    for i, (_, trace) in enumerate(found.items()):
        total += trace.nbytes
        if total > kept_bytes and i:
            return list(found)[i:]
    return []


def _loss(output: Any, call: Call, batch: int, generator: torch.Generator, totals: _Totals) -> Tensor:
    """A scalar whose gradient is that of labels drawn from the predictions, or of a random projection."""
    y, are_logits = predictions(output, call, batch)
    generator = generator if generator.device == y.device else torch.Generator(y.device).manual_seed(batch)
    if are_logits:
        totals.kind = "KL"
        totals.unit += y.shape[0]
        log_probabilities = torch.log_softmax(y, dim=-1)
        labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        return -log_probabilities.gather(1, labels).sum()
    totals.kind = "output error"
    totals.unit += y.detach().square().sum().item()
    return (y * torch.randn(y.shape, generator=generator, device=y.device)).sum()


class _Watch:
    """What hooks need to know of the batch that is under way."""

    batch = 0
    sequences = 1
    last: tuple[Tensor, int, Tensor] | None = None  # an input, its version, and our copy of it

    def __init__(self) -> None:
        self.roots: list[Tensor] = []  # outputs where the graph begins

    def kept(self, x: Tensor) -> Tensor:
        """x (..., K) as (tokens, K), a copy, since x may change in place; one for Linears that read the same."""
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            self.last = (x, x._version, x.detach().reshape(-1, x.shape[-1]).clone())
        return self.last[2]


@contextlib.contextmanager
def _watching(model: nn.Module, linears: Mapping[str, nn.Linear], found: Mapping[str, Trace]) -> Iterator[_Watch]:
    """Meanwhile the Linears leave inputs and gradients in what is found, as long as it has a place for them."""
    watch = _Watch()

    def hook_of(name: str) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            root = not output.requires_grad
            if root:  # weights are frozen, and tokens have no gradient: the graph begins here
                watch.roots.append(output.requires_grad_())
            if name in found and output.numel():
                x = args[0]
                apart = x.ndim > 2 or x.shape[0] == watch.sequences  # else, as for experts, tokens of who knows which
                use = _Use(watch.batch, watch.kept(x), x.shape[0] if apart else 1, [])
                found[name].uses.append(use)
                output.register_hook(lambda g: use.gradients.append(g.detach().reshape(-1, g.shape[-1])))
            return output.clone() if root else None  # a leaf must not be changed in place, but a copy may

        return hook

    handles = [linear.register_forward_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _sequences(call: Call) -> int:
    first = next(t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor))
    return first.shape[0] if first.ndim > 1 else 1


def _detached(call: Call) -> Call:
    def plain(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    kwargs = {k: plain(v) for k, v in call.kwargs.items()}
    return dataclasses.replace(call, args=tuple(map(plain, call.args)), kwargs=kwargs)
