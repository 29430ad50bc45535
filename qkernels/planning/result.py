"""Plan: which scheme each layer gets, what that takes and is expected to cost; printed, and kept as JSON."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qkernels import tables
from qkernels.files import replacing
from qkernels.formats.native import FormatError
from qkernels.scheme import Scheme
from qkernels.tensor import stored_bytes

MEASURES = {
    "KL": "predicted KL in nats per prediction",
    "output error": "predicted squared error of the output, relative to its square",
    "weight error": "squared error of weights, relative to their squares",
}
_FORMAT = "qkernels plan 1"


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        name: of the module.
        scheme: that it gets.
        shape: (out_features, in_features).
        nbytes: of its codes, scales and zeros, padding included.
        cost: what its error is expected to cost, in the plan's measure.
        sensitivity: cost for each unit of the weight's squared error relative to its square, over all candidates.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    nbytes: int
    cost: float
    sensitivity: float


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The alternative to a plan: one scheme for all layers; nbytes and cost as in the plan."""

    scheme: Scheme
    nbytes: int
    cost: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A scheme for each layer; `print` it for a table, and give it to quantize_model in place of a scheme.

    Attributes:
        layers: in the model's order.
        target_bytes: that the layers may take.
        measure: what costs are: "KL", "output error" or "weight error".
        uniform: what every candidate would take and cost, were it the scheme of all layers; the smallest first.
        measured: what the whole plan was found to cost on the batches, in the same measure, if it was tried.
        measured_uniform: what best_uniform was found to cost there.
    """

    layers: tuple[PlannedLayer, ...]
    target_bytes: int
    measure: str
    uniform: tuple[Uniform, ...]
    measured: float | None = None
    measured_uniform: float | None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        """{pattern: scheme} for quantize_model: names, with what a pattern would take for wildcards escaped."""
        return {glob.escape(layer.name): layer.scheme for layer in self.layers}

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zeros of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def weights(self) -> int:
        """How many the layers have."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes over the number of weights."""
        return 8 * self.nbytes / max(1, self.weights)

    @property
    def cost(self) -> float:
        """The sum over layers: to second order, and as if their errors did not meet."""
        return sum(layer.cost for layer in self.layers)

    @property
    def best_uniform(self) -> Uniform | None:
        """The cheapest single scheme within target_bytes, if one fits."""
        fitting = [uniform for uniform in self.uniform if uniform.nbytes <= self.target_bytes]
        return min(fitting, key=lambda uniform: uniform.cost, default=None)

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError if a layer has another shape in a model than here; shapes is {name: (N, K)}."""
        for layer in self.layers:
            if (found := shapes.get(layer.name, layer.shape)) != layer.shape:
                raise ValueError(f"{layer.name} is {found} in the model, but {layer.shape} in the plan")

    def __str__(self) -> str:
        best = self.best_uniform
        title = (
            f"{len(self.layers)} layers: {tables.size(self.nbytes)} of at most {tables.size(self.target_bytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight; {MEASURES[self.measure]} {self.cost:.4g}, "
            + (f"with {best.scheme} alone {best.cost:.4g}" if best else "and no candidate alone is so small")
        )
        if self.measured is not None:
            title += f"; measured {self.measured:.4g}"
            title += f", with {best.scheme} alone {self.measured_uniform:.4g}" if best and self.measured_uniform else ""
        rows = [
            (
                layer.name,
                str(layer.scheme),
                f"{layer.shape[0]} x {layer.shape[1]}",
                tables.size(layer.nbytes),
                f"{8 * layer.nbytes / max(1, math.prod(layer.shape)):.2f}",
                f"{layer.sensitivity:.3g}",
                f"{layer.cost:.3g}",
            )
            for layer in self.layers
        ]
        rows += [
            (
                "every layer alike",
                str(uniform.scheme),
                "",
                tables.size(uniform.nbytes),
                f"{8 * uniform.nbytes / max(1, self.weights):.2f}",
                "",
                f"{uniform.cost:.3g}",
            )
            for uniform in self.uniform
        ]
        columns = ("layer", "scheme", "shape", "size", "bits/weight", "sensitivity", "cost")
        return tables.text(title, columns, rows, text_columns=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file of JSON, one layer to a line; it appears whole or not at all."""
        record = {
            "format": _FORMAT,
            "measure": self.measure,
            "target_bytes": self.target_bytes,
            "measured": self.measured,
            "measured_uniform": self.measured_uniform,
            "uniform": [_fields(uniform) for uniform in self.uniform],
            "layers": [_fields(layer) for layer in self.layers],
        }
        lines = []
        for key, value in record.items():
            text = json.dumps(value, allow_nan=False)
            if isinstance(value, list):
                text = "[\n" + ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in value) + "\n ]"
            lines.append(f" {json.dumps(key)}: {text}")
        with replacing(pathlib.Path(path)) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            FormatError: the file is no plan, or one that contradicts itself; the message says where.
            OSError: the file cannot be read.
        """
        try:
            record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("format") != _FORMAT:
                raise ValueError(f"'format' must be {_FORMAT!r}")
            plan = cls(
                layers=tuple(_layer(i, fields) for i, fields in enumerate(record["layers"])),
                target_bytes=_count(record["target_bytes"], "target_bytes"),
                measure=record["measure"],
                uniform=tuple(
                    Uniform(Scheme.parse(u["scheme"]), _count(u["nbytes"], "nbytes"), _cost(u["cost"], "cost"))
                    for u in record["uniform"]
                ),
                **{
                    key: None if record[key] is None else _cost(record[key], key)
                    for key in ("measured", "measured_uniform")
                },
            )
            if plan.measure not in MEASURES:
                raise ValueError(f"'measure' must be one of {', '.join(MEASURES)}, got {plan.measure!r}")
            if not plan.layers or len({layer.name for layer in plan.layers}) < len(plan.layers):
                raise ValueError("'layers' must be some, each of another name")
        except (ValueError, TypeError, KeyError) as error:  # JSON that does not parse is a ValueError
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FormatError(f"{path}: not a plan: {what}") from None
        return plan


def _fields(item: PlannedLayer | Uniform) -> dict[str, Any]:
    return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)} | {"scheme": str(item.scheme)}


def _layer(index: int, fields: dict[str, Any]) -> PlannedLayer:
    name, scheme = fields["name"], Scheme.parse(fields["scheme"])
    if not isinstance(name, str):
        raise ValueError(f"the name of layer {index} must be a string, got {name!r}")
    rows, columns = (_count(side, f"shape of {name}") for side in fields["shape"])
    nbytes = _count(fields["nbytes"], f"nbytes of {name}")
    if nbytes != stored_bytes(scheme, rows, columns):
        raise ValueError(
            f"{name}, {rows} x {columns} in {scheme}, takes {stored_bytes(scheme, rows, columns)} bytes, not {nbytes}"
        )
    cost, sensitivity = (_cost(fields[key], f"{key} of {name}") for key in ("cost", "sensitivity"))
    return PlannedLayer(name, scheme, (rows, columns), nbytes, cost, sensitivity)


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} must be a whole number, got {value!r}")
    return value


def _cost(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{what} must be a finite number, not negative, got {value!r}")
    return float(value)
