"""Real models on which accuracy is measured: what they are calibrated with, and how far a quantized copy is off.

Figures are means over windows or sentences of one text, with the standard error of that mean; what a method may learn
from is taken from other texts. All in float32 on the CPU.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkernels.demo import fetch, language_model
from qkernels.quality import PredictionScore

Scores = dict[str, float]


class Subject(Protocol):
    """A model to quantize copies of.

    Attributes:
        name: of the model.
        model: unquantized.
        calibration: batches from other texts than the one that scores are taken on.
        metrics: {key of a score: its heading}, the telling one first.
        about: what the scores are means over, for people.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    metrics: Mapping[str, str]
    about: str

    def score(self, model: nn.Module) -> Scores:
        """Scores of a model against the unquantized one, each with its standard error under `key + "_error"`."""


class LanguageModel:
    """SmolLM2-135M-Instruct, scored by the divergence of its predictions on lcet10 from the unquantized model's.

    Args:
        count: windows of 512 tokens of lcet10, from its start.
        calibration: windows of the other texts, evenly spread over each.
    """

    name = fetch.SMOLLM2.name
    metrics: Mapping[str, str] = {"kl": "KL", "perplexity": "perplexity"}

    def __init__(self, count: int = 40, calibration: int = 24):
        self.model, tokenizer = language_model.load(fetch.fetch(fetch.SMOLLM2), "cpu")
        self.windows = language_model.windows(_text(fetch.fetch(fetch.LCET10)), tokenizer, count)
        found = [language_model.windows(text, tokenizer, 10**6) for text in _other_texts()]
        self.calibration = list(torch.cat([_spread(w, calibration // len(found)) for w in found]).split(1))
        self.about = (
            f"{len(self.windows)} windows of {self.windows.shape[1]} tokens of lcet10; calibrated on "
            f"{len(self.calibration)} windows of alice29, asyoulik and plrabn12"
        )
        with torch.no_grad():
            self._hidden = [self._last_hidden(self.model, window) for window in self.windows]

    @staticmethod
    def _last_hidden(model: Any, window: Tensor) -> Tensor:
        return model.get_decoder()(window[None], use_cache=False).last_hidden_state[0, :-1]

    @torch.no_grad()
    def score(self, model: nn.Module) -> Scores:
        """Perplexity, and KL(unquantized || model) in nats per prediction."""
        head = self.model.get_output_embeddings()
        each = []
        for window, hidden in zip(self.windows, self._hidden, strict=True):
            score = PredictionScore()
            score.add(*self._predict(model, window), self._log_probabilities(head, hidden))
            each.append(score)
        kl, kl_error = _mean([s.kl for s in each])
        loss, loss_error = _mean([s.negative_log_likelihood / s.predictions for s in each])
        perplexity = math.exp(loss)
        return {
            "kl": kl, "kl_error": kl_error, "perplexity": perplexity, "perplexity_error": perplexity * loss_error,
        }  # fmt: skip

    def _predict(self, model: Any, window: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self._last_hidden(model, window)
        return self._log_probabilities(model.get_output_embeddings(), hidden), window[1:]

    @staticmethod
    def _log_probabilities(head: Any, hidden: Tensor) -> Tensor:
        return torch.log_softmax(head(hidden).float(), -1)


class Encoder:
    """all-MiniLM-L6-v2, scored by how far the embeddings of sentences turn.

    Args:
        count: sentences of lcet10, from its start.
        calibration: sentences of the other texts, evenly spread over each.
    """

    name = fetch.MINILM.name
    metrics: Mapping[str, str] = {"cosine_loss": "1 - cosine", "spearman": "Spearman"}

    def __init__(self, count: int = 600, calibration: int = 1920):
        from transformers import AutoModel, AutoTokenizer

        folder = fetch.fetch(fetch.MINILM)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.batches = _batches(tokenizer, _sentences(_text(fetch.fetch(fetch.LCET10)))[:count])
        texts = [_sentences(text) for text in _other_texts()]
        chosen = [t[i] for t in texts for i in _places(len(t), calibration // len(texts))]
        self.calibration = _batches(tokenizer, chosen)
        self.about = (
            f"{sum(len(b['input_ids']) for b in self.batches)} sentences of lcet10; calibrated on {len(chosen)} "
            "sentences of alice29, asyoulik and plrabn12"
        )
        self._embeddings = self._embed(self.model)
        self._ranks = _ranks(_similarities(self._embeddings))

    @torch.no_grad()
    def _embed(self, model: nn.Module) -> Tensor:
        """(sentences, features), of length 1: the mean over tokens, as this model is meant to be used."""
        found = [model(**batch).last_hidden_state.mean(1) for batch in self.batches]  # batches hold no padding
        return nn.functional.normalize(torch.cat(found), dim=-1)

    def score(self, model: nn.Module) -> Scores:
        """1 - the cosine to the unquantized embedding; rank correlation of the similarities of all pairs."""
        embeddings = self._embed(model)
        loss, error = _mean((1 - (embeddings * self._embeddings).sum(-1).double()).tolist())
        ranks = torch.stack([self._ranks, _ranks(_similarities(embeddings))])
        return {"cosine_loss": loss, "cosine_loss_error": error, "spearman": float(ranks.corrcoef()[0, 1])}


SUBJECTS: Mapping[str, type[LanguageModel] | type[Encoder]] = {s.name: s for s in (LanguageModel, Encoder)}


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="latin-1")  # no byte fails, and each is a character


def _other_texts() -> Iterator[str]:
    return (_text(path) for path in sorted(fetch.fetch(fetch.OTHER_TEXTS).glob("*.txt")))


def _places(length: int, count: int) -> list[int]:
    return [i * length // count for i in range(count)]


def _spread(windows: Tensor, count: int) -> Tensor:
    return windows[_places(len(windows), count)]


def _sentences(text: str) -> list[str]:
    """Those of 5 to 60 words."""
    found = re.split(r"(?<=[.!?;])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 5 <= len(sentence.split()) <= 60]


def _batches(tokenizer: Any, sentences: Sequence[str], limit: int = 32) -> list[dict[str, Tensor]]:
    """Sentences of one length in tokens together: no padding, which would count as input."""
    by_length: dict[int, list[list[int]]] = {}
    for tokens in tokenizer(list(sentences)).input_ids:
        by_length.setdefault(len(tokens), []).append(tokens)
    return [{"input_ids": part} for _, rows in sorted(by_length.items()) for part in torch.tensor(rows).split(limit)]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _similarities(embeddings: Tensor) -> Tensor:
    """Of all pairs."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return (embeddings @ embeddings.T)[first, second]


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()
