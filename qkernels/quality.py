"""How much worse a quantized language model predicts: perplexity, and divergence from the model it came from.

Perplexity alone is noisy and not monotone in the error of the weights; the KL divergence to the unquantized model, over
the same predictions, is the sharper figure. Both are over all positions of fixed windows of text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class PredictionScore:
    """Running sums over predictions of a next token.

    Attributes:
        predictions: how many so far.
        negative_log_likelihood: their sum, in nats.
        divergence: sum of KL(reference || model), in nats.
    """

    predictions: int = 0
    negative_log_likelihood: float = 0.0
    divergence: float = 0.0

    def add(self, log_probabilities: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Count more predictions.

        Args:
            log_probabilities: (predictions, vocabulary) float32, of the model.
            targets: (predictions,) tokens that came.
            reference: like log_probabilities, of the unquantized model; without it the divergence counts as none.
        """
        self.predictions += targets.numel()
        self.negative_log_likelihood -= log_probabilities.gather(-1, targets[:, None]).sum(dtype=torch.float64).item()
        if reference is not None:
            per_token = torch.nn.functional.kl_div(log_probabilities, reference, reduction="none", log_target=True)
            self.divergence += per_token.sum(dtype=torch.float64).item()

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinite where that overflows."""
        if not self.predictions:
            return math.nan
        try:
            return math.exp(self.negative_log_likelihood / self.predictions)
        except OverflowError:
            return math.inf

    @property
    def kl(self) -> float:
        """Mean divergence from the reference, in nats per prediction."""
        return self.divergence / self.predictions if self.predictions else math.nan


# ---- what a model returns ----


def floating_output(output: Any) -> Tensor | None:
    """The floating tensor that a model is for, in what it returned: logits, else the first there is; None without."""
    found = field(output, "logits")
    if found is None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
        candidates = (output, *values, field(output, "last_hidden_state"))
        found = next((v for v in candidates if isinstance(v, Tensor) and v.is_floating_point() and v.ndim), None)
    return found


def field(output: Any, name: str) -> Tensor | None:
    """A tensor in what a model returned, by its name."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None
