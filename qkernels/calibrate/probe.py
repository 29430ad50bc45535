"""How large the inputs of each Linear are, and batches that tell it where a user has none.

Text that a language model writes itself is near to what it was trained on. Random tokens show what decides most: which
channels of the hidden states are always large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import (
    Batch,
    CalibrationError,
    as_calls,
    evaluating,
    inputs_not_finite,
    listening,
    rows,
    run_batch,
)

# Random tokens in short sequences: in long ones, unlike in text, attention blurs what single tokens do.
_RANDOM, _RANDOM_LENGTH = 64, 32
_WRITTEN, _WRITTEN_LENGTH = 32, 64
_TOKENS_AT_ONCE = 512  # of a batch


def random_batches(model: nn.Module) -> list[Tensor] | None:
    """Batches (sequences, tokens) of random tokens, always the same; None unless the model reads tokens alone."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    config = getattr(model, "config", None)
    if get_embeddings is None or getattr(config, "is_encoder_decoder", False):
        return None
    try:
        embedding = get_embeddings()
    except NotImplementedError:  # transformers, for models that read something else
        return None
    if not isinstance(embedding, nn.Embedding):
        return None
    generator = torch.Generator().manual_seed(0)
    shape = _RANDOM, _at_most(_RANDOM_LENGTH, model)
    return _batches(torch.randint(0, embedding.num_embeddings, shape, generator=generator))


def _at_most(length: int, model: nn.Module) -> int:
    """A length of sequences that the model can read."""
    return min(length, int(getattr(getattr(model, "config", None), "max_position_embeddings", length)))


def _batches(tokens: Tensor) -> list[Tensor]:
    return list(tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])))


def writes(model: nn.Module) -> bool:
    """Whether it is one of transformers' models that can generate."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def written_batches(model: nn.Module, sequences: int = _WRITTEN, length: int = _WRITTEN_LENGTH) -> list[Tensor] | None:
    """Batches (some sequences, tokens) of text that the model writes itself, the same each time; None unless it can.

    Each sequence begins with a random token and goes on with draws from the model's own predictions: nearer to what
    people write than random tokens are, at the price of a forward for each of its tokens.

    Raises:
        CalibrationError: the model's `generate` fails.
    """
    batches = random_batches(model)
    if batches is None or not writes(model):
        return None
    length = _at_most(length, model)
    written: Any = model
    device = written.get_input_embeddings().weight.device
    first = torch.cat(batches).reshape(-1, 1)[:sequences].to(device)
    with torch.random.fork_rng(), evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        try:
            tokens = written.generate(
                first, attention_mask=torch.ones_like(first), use_cache=True, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0,
            )  # fmt: skip
        except Exception as error:
            raise CalibrationError(
                f"the model fails to write text: {type(error).__name__}: {error}; calibration='random' does without"
            ) from error
    return _batches(tokens)


@torch.no_grad()
def watch(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Iterable[Batch],
    see: Sequence[Callable[[str, Tensor], None]],
) -> None:
    """Run the model over the batches; each of `see` gets (name, x) with what a Linear reads, (tokens, K) float32.

    Padding is left out; a Linear that no token reaches is not heard of.

    Raises:
        CalibrationError: batches are none or empty, or the model fails on one.
    """
    masks: list[Tensor | None] = []  # of the batches so far

    def hear(name: str, given: Tensor) -> None:
        x = rows(given.detach(), masks[-1])
        for one in see if len(x) else ():
            one(name, x)

    calls = as_calls(batches, model)
    with evaluating(model), listening(linears, hear):
        for i, call in enumerate(calls):
            masks.append(call.mask)
            run_batch(model, call, i)


class Importances:
    """How large the inputs of layers are, found as they are seen."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def see(self, name: str, x: Tensor) -> None:
        """More inputs (tokens, K) float32 of a layer."""
        found = x.square().sum(0)
        self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._counts[name] = self._counts.get(name, 0) + x.shape[0]

    def result(self) -> dict[str, Tensor]:
        """{name: (K,) float32 mean square of each input}; CalibrationError, naming the layer, if it is not finite."""
        for name, found in self._sums.items():
            if not torch.isfinite(found).all():
                raise inputs_not_finite(name)
        return {name: found / self._counts[name] for name, found in self._sums.items()}


def importances(model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """{name: (K,) float32 mean square of each input}; a Linear that no batch reaches is missing.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, or inputs of a layer are not finite.
    """
    found = Importances()
    watch(model, linears, batches, [found.see])
    return found.result()
