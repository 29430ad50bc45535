"""What is known of one quantized layer, and of the whole model: the rows of a report."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qkernels.tensor import QuantizationError

OUTLIER = 6.0  # a weight is an outlier if it is larger than so many times the root mean square of its row


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """One quantized layer, against the weight w it came from.

    Attributes:
        name: of the layer.
        scheme: as a string.
        shape: (out_features, in_features) = (N, K).
        snr_db: 10 log10(sum of w^2 / sum of (w - w^)^2); infinite where nothing was lost.
        max_error_steps: the largest |w - w^| in scales of its group. Rounding to nearest gives 0.5 at most, but for the
            last bit of float32; a clipped weight is further away.
        outlier_share: share of the weights with |w| > OUTLIER times the root mean square of their row, from 0 to 1.
        output_error: ||x w - x^ w^|| / ||x w|| over all x that the batches brought, without bias; x^ is x, or what its
            codes stand for if the scheme quantizes activations. None without batches.
        nbytes: of codes, scales and zeros, padding included.
        bits_per_weight: 8 nbytes / (N K).
        error: sums that snr_db is made of.
        blocks: (cells, cells) float32 on CPU: mean squared error of blocks of the weight, rows by columns.
        block_shape: (rows, columns) of the weight in one cell of `blocks`.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    snr_db: float
    max_error_steps: float
    outlier_share: float
    output_error: float | None
    nbytes: int
    bits_per_weight: float
    error: QuantizationError = dataclasses.field(repr=False)
    blocks: Tensor = dataclasses.field(repr=False, compare=False)
    block_shape: tuple[int, int] = dataclasses.field(repr=False)

    @property
    def worst_first(self) -> float:
        """Output error if it was measured, else the relative error of the weight."""
        return self.error.relative if self.output_error is None else self.output_error


# What a report shows as columns: all but what pictures and sums are made of.
COLUMNS = tuple(
    field.name for field in dataclasses.fields(LayerQuality) if field.name not in ("error", "blocks", "block_shape")
)


@dataclasses.dataclass(frozen=True)
class ModelQuality:
    """The quantized model's outputs, against those of the unquantized one on the same batches.

    Language models have the first three figures, all others the last two; the rest is None.

    Attributes:
        batches: how many.
        predictions: of a next token; 0 if the model is no language model.
        perplexity: of the quantized model.
        reference_perplexity: of the unquantized one.
        kl: mean KL(unquantized || quantized), in nats per prediction.
        output_error: ||y - y^|| / ||y|| over all outputs.
        cosine_distance: mean of 1 - cos(y, y^) over vectors along the last dimension.
    """

    batches: int
    predictions: int = 0
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    output_error: float | None = None
    cosine_distance: float | None = None

    def __str__(self) -> str:
        if self.perplexity is not None:
            return (
                f"perplexity {figure(self.perplexity)} (unquantized {figure(self.reference_perplexity)}), "
                f"KL {figure(self.kl)} over {self.predictions:,} predictions"
            )
        return (
            f"output error {share(self.output_error)}, 1 - cosine {figure(self.cosine_distance)} "
            f"over {self.batches} {'batch' if self.batches == 1 else 'batches'}"
        )


def figure(value: float | None) -> str:
    """Four significant digits, without an exponent below a million; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1e4 <= value < 1e6 else f"{value:.4g}"


def share(value: float | None) -> str:
    """In per cent, to three digits; nothing for None."""
    return "" if value is None else f"{100 * value:.3g} %"
