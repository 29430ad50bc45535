"""QualityReport: rows that behave like a small table, in a terminal, in Jupyter and in files."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any, overload

from qkernels import tables
from qkernels.files import replacing
from qkernels.reporting import pictures
from qkernels.reporting.rows import COLUMNS, LayerQuality, ModelQuality, share
from qkernels.tensor import QuantizationError

_HEADINGS = (
    "layer", "scheme", "shape", "SNR dB", "max error, steps", "outliers", "output error", "size", "bits/weight",
)  # fmt: skip
_STYLE = """
.qkernels-report { font: 13px/1.4 system-ui, sans-serif; }
.qkernels-report div { max-height: 32em; overflow: auto; }
.qkernels-report table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.qkernels-report th, .qkernels-report td { padding: 2px 10px; text-align: right; white-space: nowrap; }
.qkernels-report th { position: sticky; top: 0; background: #fff; color: #222; border-bottom: 1px solid #9a9a9a; }
.qkernels-report th:nth-child(-n+3), .qkernels-report td:nth-child(-n+3) { text-align: left; }
"""


@dataclasses.dataclass(frozen=True, repr=False)
class QualityReport:
    """What quantizing cost; `print` it, show it in Jupyter, or use it as a table of LayerQuality.

    `len(report)`, `for row in report`, `report[0]` and `report["snr_db"]` do what one expects.

    Attributes:
        layers: a row for each, in the model's order unless sorted.
        model: of the whole model, where batches were given.
    """

    layers: tuple[LayerQuality, ...]
    model: ModelQuality | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerQuality]:
        return iter(self.layers)

    @overload
    def __getitem__(self, key: int) -> LayerQuality: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | str) -> LayerQuality | list[Any]:
        return [getattr(row, _column(key)) for row in self.layers] if isinstance(key, str) else self.layers[key]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that report[...] and sort take: attributes of LayerQuality, where their units are explained."""
        return COLUMNS

    @property
    def nbytes(self) -> int:
        """Of all quantized layers."""
        return sum(row.nbytes for row in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes over the number of quantized weights."""
        return 8 * self.nbytes / max(1, sum(row.shape[0] * row.shape[1] for row in self.layers))

    @property
    def error(self) -> QuantizationError:
        """Of all quantized weights together."""
        return sum((row.error for row in self.layers), QuantizationError(0.0, 0.0, 0.0))

    def sort(self, column: str, descending: bool = False) -> QualityReport:
        """The same report in another order of rows; equal ones stay as they were."""
        values = self[_column(column)]
        if None in values:
            raise ValueError(f"{column} was not measured: give batches to qkernels.report")
        order = sorted(range(len(self)), key=values.__getitem__, reverse=descending)
        return dataclasses.replace(self, layers=tuple(self.layers[i] for i in order))

    def worst(self, count: int = 5) -> QualityReport:
        """Of the layers that lost most, the worst first: by output error if it was measured, else by SNR."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        order = sorted(self.layers, key=lambda row: row.worst_first, reverse=True)
        return dataclasses.replace(self, layers=tuple(order[:count]))

    def to_dicts(self) -> list[dict[str, Any]]:
        """A {column: value} for each layer."""
        return [{column: getattr(row, column) for column in COLUMNS} for row in self.layers]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame, a row for each layer; ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas; to_dicts does without") from None
        return pandas.DataFrame(self.to_dicts(), columns=list(COLUMNS))

    def plot(self, kind: str = "layers", layer: str | None = None) -> Any:
        """A matplotlib Figure, which Jupyter shows.

        Args:
            kind: "layers": all, sorted by error; "bits": error against bits per weight; "heatmap": where in a weight
                the error is.
            layer: whose heat map; the worst one's unless given.
        """
        if kind not in pictures.KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, pictures.KINDS))}, got {kind!r}")
        if not self.layers:
            raise ValueError("the report has no layers to draw")
        if kind != "heatmap":
            if layer is not None:
                raise ValueError(f"layer is for kind='heatmap', got kind={kind!r}")
            return pictures.layers(self.layers) if kind == "layers" else pictures.bits(self.layers)
        chosen = self.worst(1).layers[0] if layer is None else next((r for r in self.layers if r.name == layer), None)
        if chosen is None:
            raise ValueError(f"the report has no layer {layer!r}; names are like {self.layers[0].name!r}")
        return pictures.heatmap(chosen)

    def save(self, folder: str | os.PathLike[str]) -> tuple[pathlib.Path, ...]:
        """Write report.csv, report.html (one file, pictures inside) and layers.png, bits.png and heatmap.png.

        Each appears whole or not at all; the folder is made if need be. Returns the paths.
        """
        folder = pathlib.Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        pngs = {kind: pictures.png(self.plot(kind)) for kind in pictures.KINDS}
        contents = {"report.csv": self._csv().encode(), "report.html": self._page(pngs).encode()}
        contents |= {f"{kind}.png": png for kind, png in pngs.items()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        return tuple(folder / name for name in contents)

    # ---- as text ----

    def _title(self) -> str:
        snr = "lossless" if not self.error.noise else f"SNR {self.error.snr_db:.1f} dB"
        count = f"{len(self)} {'layer' if len(self) == 1 else 'layers'}"
        title = f"{count}: {tables.size(self.nbytes)}, {self.bits_per_weight:.2f} bits per weight, {snr}"
        return title if self.model is None else f"{title}; whole model: {self.model}"

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """(headings, rows), without output errors where none were measured."""
        rows = [
            (
                row.name,
                row.scheme,
                f"{row.shape[0]} x {row.shape[1]}",
                "lossless" if not row.error.noise else f"{row.snr_db:.1f}",
                f"{row.max_error_steps:.2f}",
                f"{1e6 * row.outlier_share:.0f} ppm",
                share(row.output_error),
                tables.size(row.nbytes),
                f"{row.bits_per_weight:.2f}",
            )
            for row in self.layers
        ]
        shown = [i for i, h in enumerate(_HEADINGS) if h != "output error" or any(row[i] for row in rows)]
        return tuple(_HEADINGS[i] for i in shown), [tuple(row[i] for i in shown) for row in rows]

    def __str__(self) -> str:
        headings, rows = self._cells()
        return tables.text(self._title(), headings, rows, text_columns=2)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What Jupyter shows."""
        headings, rows = self._cells()
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return (
            f"<div class='qkernels-report'><style>{_STYLE}</style><p>{html.escape(self._title())}</p><div><table>"
            f"<thead><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in headings)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div></div>"
        )

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.to_dicts():
            writer.writerow(row | {"shape": f"{row['shape'][0]}x{row['shape'][1]}"})
        return out.getvalue()

    def _page(self, pngs: dict[str, bytes]) -> str:
        sources = {kind: f"data:image/png;base64,{base64.b64encode(png).decode()}" for kind, png in pngs.items()}
        images = "\n".join(
            f"<p><img alt='{kind}' style='max-width: 100%' src='{source}'></p>" for kind, source in sources.items()
        )
        return (
            "<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>\n<title>Quality report</title>\n"
            "<body style='max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; "
            f"font-family: system-ui, sans-serif'>\n<h1>Quality report</h1>\n{images}\n{self._repr_html_()}\n"
            "</body>\n</html>\n"
        )


def _column(name: str) -> str:
    if name not in COLUMNS:
        raise KeyError(f"{name!r} is not a column; columns are {', '.join(COLUMNS)}")
    return name
