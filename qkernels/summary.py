"""What quantize_model did to each layer, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from qkernels import tables
from qkernels.merge import Merged
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, QuantizationError


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: of the module.
        scheme: as a string.
        shape: (out_features, in_features).
        original_bytes: of the float weight.
        nbytes: of codes, scales and zeros, padding included.
        error: of the weight.
        method: that chose the codes; with what stood in where it could not be used.
        activation_error: what quantizing its inputs loses at its output, relative to a token's, root mean square over
            tokens; None where not measured. The scheme says whether they are.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    original_bytes: int
    nbytes: int
    error: QuantizationError
    method: str
    activation_error: float | None = None

    @classmethod
    def of(
        cls, name: str, quantized: QTensor, weight: Tensor, method: str, activation_error: float | None = None
    ) -> LayerReport:
        """The report of a layer whose float weight became `quantized`."""
        return cls(
            name=name,
            scheme=str(quantized.scheme),
            shape=(quantized.shape[0], quantized.shape[1]),
            original_bytes=weight.nbytes,
            nbytes=quantized.nbytes,
            error=quantized.error(weight),
            method=method,
            activation_error=activation_error,
        )

    @property
    def inputs_quantized(self) -> bool:
        """Whether its inputs are quantized, too."""
        return Scheme.parse(self.scheme).activations is not None

    @property
    def inputs_left(self) -> bool:
        """Whether its inputs stay as they are since quantizing them would lose too much."""
        return self.activation_error is not None and not self.inputs_quantized

    @property
    def weights(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What quantize_model did; `print` it for a table.

    Attributes:
        layers: the quantized ones, in the model's order.
        skipped: names of the Linears, and the like, that were left alone.
        seconds: that it took.
        merged: groups of layers that are multiplied in one launch, and siblings that are not, with the reason.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...]
    seconds: float
    merged: Merged | None = None

    @property
    def original_bytes(self) -> int:
        """Of the float weights that were quantized."""
        return sum(layer.original_bytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Of their codes, scales and zeros."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes over the number of quantized weights."""
        return 8 * self.nbytes / max(1, sum(layer.weights for layer in self.layers))

    @property
    def error(self) -> QuantizationError:
        """Of all quantized weights together."""
        return sum((layer.error for layer in self.layers), QuantizationError(0.0, 0.0, 0.0))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                layer.name,
                layer.scheme,
                layer.method,
                f"{layer.shape[0]} x {layer.shape[1]}",
                tables.size(layer.nbytes),
                f"{8 * layer.nbytes / max(1, layer.weights):.2f}",
                f"{layer.error.snr_db:.1f}",
            )
            for layer in self.layers
        ]
        columns: tuple[str, ...] = ("layer", "scheme", "method", "shape", "size", "bits/weight", "SNR dB")
        if any(layer.activation_error is not None for layer in self.layers):
            columns = (*columns, "input error")
            errors = (layer.activation_error for layer in self.layers)
            rows = [(*row, "" if e is None else f"{100 * e:.3g} %") for row, e in zip(rows, errors, strict=True)]
        text_columns = 3
        title = (
            f"{len(self.layers)} layers: {tables.size(self.original_bytes)} -> {tables.size(self.nbytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight, SNR {self.error.snr_db:.1f} dB, {self.seconds:.1f} s; "
            f"left alone: {', '.join(self.skipped) or 'none'}"
        )
        if count := sum(layer.inputs_left for layer in self.layers):
            title += f"; inputs of {count} not quantized"
        coded = [layer for layer in self.layers if layer.inputs_quantized]
        measured = {layer.name: layer.activation_error for layer in coded if layer.activation_error is not None}
        if measured:
            worst = max(measured, key=lambda name: measured[name])
            title += f"; quantized inputs lose {100 * measured[worst]:.3g} % of outputs at most, at {worst}"
            if unknown := len(coded) - len(measured):
                title += f"; inputs of {unknown} quantized, and not measured"
        if self.merged is not None:
            launch = {name: _together(names) for names in self.merged.groups for name in names}
            rows = [(*row[:3], launch.get(row[0], ""), *row[3:]) for row in rows]
            columns, text_columns = (*columns[:3], "one launch", *columns[3:]), 4
            title += f"; {len(self.merged.groups)} groups multiplied in one launch"
            if count := len(self.merged.not_proved):
                title += f", {count} of them not in inference mode nor under torch.compile"
            for names, reason in self.merged.apart:
                title += f"; not all of {_together(names)} of {names[0].rpartition('.')[0] or 'the model'}: {reason}"
        return tables.text(title, columns, rows, text_columns=text_columns)


def _together(names: Sequence[str]) -> str:
    """Siblings without what their names share: q_proj + k_proj + v_proj."""
    return " + ".join(name.rpartition(".")[2] for name in names)
