"""Pictures of a report, in the look of qkernels.plots: matplotlib Figures that Jupyter shows."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

from qkernels import plots
from qkernels.plots import _BLUE, _GREY, _INK, _RED
from qkernels.reporting.rows import LayerQuality

KINDS = ("layers", "bits", "heatmap")

_NAMED = 40  # layers that a picture can name, each with a line of its own
_COLORS = (_BLUE, _RED, "#4b9b57", "#8a5fb0", "#c79a1e", "#3aa6a6", "#b0568f", _GREY)


def layers(rows: Sequence[LayerQuality]) -> Any:
    """Every layer, the worst first: with its name if they are few, else as a curve that tells kinds of layers apart."""
    ordered = sorted(rows, key=lambda row: row.worst_first, reverse=True)
    errors = [100 * row.worst_first for row in ordered]
    few = len(rows) <= _NAMED
    figure, (axes,) = _figure(1, (7.0, 1.2 + 0.2 * len(rows)) if few else (8.0, 4.8))
    if few:
        positions = list(range(len(rows)))
        axes.barh(positions, errors, height=0.6, color=_BLUE)
        axes.set_yticks(positions, [_short(row.name, 60) for row in ordered])
        axes.invert_yaxis()
        axes.set_xlabel(_error_label(rows))
        axes.set_xlim(0, max(1e-9, max(errors)) * 1.12)
        for position, error in enumerate(errors):
            axes.text(error, position, f" {error:.3g}", va="center", ha="left", fontsize=8, color=_INK)
    else:
        kinds = _kinds(rows)
        for color, kind in zip(_COLORS, kinds, strict=False):
            chosen = [i for i, row in enumerate(ordered) if _kind(row, kinds) == kind]
            axes.plot(chosen, [errors[i] for i in chosen], "o", color=color, markersize=3.5, label=kind)
        for i, row in enumerate(ordered[:5]):
            axes.annotate(
                _short(row.name, 50), (i, errors[i]), xytext=(len(rows) * 0.1, errors[0] * (1 - 0.05 * i)),
                fontsize=8, color=_INK, va="center",
                arrowprops={
                    "arrowstyle": "-", "color": _GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5),
                },
            )  # fmt: skip
        axes.set_ylim(0, max(1e-9, max(errors)) * 1.06)
        axes.set_xlabel("layers, the worst first")
        axes.set_ylabel(_error_label(rows))
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_title(f"{len(rows)} {'layer' if len(rows) == 1 else 'layers'}, sorted by error", loc="left", fontsize=11)
    return figure


def bits(rows: Sequence[LayerQuality]) -> Any:
    """Error over bits per weight, a dot for each layer."""
    figure, (axes,) = _figure(1, (7.0, 4.8))
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    for i, scheme in enumerate(schemes):
        chosen = [row for row in rows if row.scheme == scheme]
        axes.plot(
            [row.bits_per_weight for row in chosen], [100 * row.worst_first for row in chosen], "o",
            color=_COLORS[i % len(_COLORS)], markersize=5, alpha=0.6, markeredgewidth=0, label=scheme,
        )  # fmt: skip
    sizes = [row.bits_per_weight for row in rows]
    room = max(0.25, 0.08 * (max(sizes) - min(sizes)))
    axes.set_xlim(min(sizes) - room, max(sizes) + room)
    errors = [100 * row.worst_first for row in rows]
    if min(errors) > 0 and max(errors) > 5 * min(errors):
        axes.set_yscale("log")
        ticks = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5)]
        axes.set_yticks([t for t in ticks if min(errors) / 2 <= t <= max(errors) * 2])
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(errors) / 1.3, max(errors) * 1.3)
    else:
        axes.set_ylim(0, max(1e-9, *errors) * 1.06)
    axes.set_xlabel("bits per weight, scales and padding included")
    axes.set_ylabel(_error_label(rows))
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.set_title("Error against size, a dot for each layer", loc="left", fontsize=11)
    return figure


def heatmap(row: LayerQuality) -> Any:
    """Mean squared error of the blocks of one weight, against the mean square of all its weights, in decibels."""
    import torch
    from matplotlib.colors import LinearSegmentedColormap

    figure, (axes,) = _figure(1, (7.0, 5.2))
    axes.set_title(f"{_short(row.name, 50)}, {row.scheme}: where the error is", loc="left", fontsize=11)
    axes.set_xlabel(f"input feature k, {_times(row.block_shape[1], 'column')} a cell")
    axes.set_ylabel(f"output feature, {_times(row.block_shape[0], 'row')} a cell")
    if not row.error.noise or not row.error.signal:
        axes.text(0.5, 0.5, "lossless", transform=axes.transAxes, ha="center", color=_GREY)
        return figure
    mean_square = row.error.signal / (row.shape[0] * row.shape[1])
    decibels = 10 * torch.log10(row.blocks.double().clamp(min=1e-300) / mean_square)
    shown = decibels[row.blocks > 0]
    colors = LinearSegmentedColormap.from_list("error", ["#f4f7fa", "#9cc3e0", _BLUE, "#0d2538"])
    # Edges, because the last row and the last column of cells may be narrower than the others.
    down, across = (
        [min(i * step, size) for i in range(count + 1)]
        for count, step, size in zip(row.blocks.shape, row.block_shape, row.shape, strict=True)
    )
    image = axes.pcolormesh(
        across, down, decibels.numpy(), cmap=colors, vmin=float(shown.quantile(0.02)), vmax=float(shown.max())
    )
    axes.invert_yaxis()
    bar = figure.colorbar(image, ax=axes, label="mean squared error / mean squared weight, dB")
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a file."""
    out = io.BytesIO()
    plots._save(figure, out)  # type: ignore[arg-type]  # what matplotlib takes, too
    return out.getvalue()


def _figure(panels: int, inches: tuple[float, float]) -> tuple[Any, list[Any]]:
    try:
        figure, axes = plots._figure(panels, inches)
    except ImportError as error:
        raise ImportError(f"pictures need {error.name}: pip install matplotlib") from None
    figure._repr_png_ = functools.partial(png, figure)  # Jupyter shows it without pyplot and its global state
    return figure, axes


def _error_label(rows: Sequence[LayerQuality]) -> str:
    measured = all(row.output_error is not None for row in rows)
    return "relative error of the output, %" if measured else "relative error of the weight, %"


def _kinds(rows: Sequence[LayerQuality]) -> list[str]:
    """Last parts of the layers' names, the most frequent first; what there is no colour for is "others"."""
    counts: dict[str, int] = {}
    for row in rows:
        last = row.name.rpartition(".")[2]
        counts[last] = counts.get(last, 0) + 1
    kinds = sorted(counts, key=lambda kind: -counts[kind])
    return kinds if len(kinds) <= len(_COLORS) else [*kinds[: len(_COLORS) - 1], "others"]


def _kind(row: LayerQuality, kinds: Sequence[str]) -> str:
    last = row.name.rpartition(".")[2]
    return last if last in kinds else "others"


def _short(name: str, length: int) -> str:
    """The end of a name, which tells layers apart; dollars would be formulas."""
    name = name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[1 - length :]
    return name.replace("$", r"\$")


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
