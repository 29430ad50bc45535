"""Pictures, drawn with matplotlib and saved as files; no window, no global state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.tensor import quantize

Path = str | os.PathLike[str]

_INK, _GREY, _BLUE, _RED = "#222222", "#9a9a9a", "#1f6fb2", "#c8452c"


def perplexity_against_size(
    path: Path, title: str, original: tuple[float, float], points: Sequence[tuple[str, float, float]]
) -> None:
    """Perplexity, on a logarithmic axis, over the size of the quantized layers.

    Args:
        path: of the PNG.
        title: above the picture.
        original: (bytes, perplexity) unquantized.
        points: (scheme, bytes, perplexity) each.
    """
    figure, (axes,) = _figure(1, (7.0, 4.8))
    ceiling = 10 * original[1]  # beyond it a model is broken, and by how much does not matter
    axes.axhline(original[1], color=_GREY, linewidth=1, linestyle="--", zorder=0)
    axes.text(
        0.01, original[1] * 0.98, f"unquantized: {original[1]:.1f} at {original[0] / 1e6:.0f} MB",
        transform=axes.get_yaxis_transform(), ha="left", va="top", color=_GREY, fontsize=9,
    )  # fmt: skip
    labelled = []
    for scheme, size, perplexity in points:
        broken = perplexity > ceiling
        label = f"{scheme} ({perplexity:.2g})" if broken else scheme
        labelled.append((label, size / 1e6, min(perplexity, ceiling)))
        marker, color = ("^", _RED) if broken else ("o", _BLUE)
        axes.plot(size / 1e6, min(perplexity, ceiling), marker, color=color, markersize=5.5, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(original[1] * 0.8, ceiling * 1.15)
    axes.set_xlim(min(x for _, x, _ in labelled) * 0.85, max(x for _, x, _ in labelled) * 1.15)
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-2, 9) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    for (label, x, y), offset in _label_offsets(axes, labelled, original[1]):
        axes.annotate(
            label, (x, y), xytext=offset, textcoords="offset points", ha="left", va="center", fontsize=9, color=_INK,
            arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
    axes.set_xlabel("size of the linear layers, MB")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def _label_offsets(
    axes: Any, labelled: Sequence[tuple[str, float, float]], line: float
) -> list[tuple[tuple[str, float, float], tuple[float, float]]]:
    """Each label with its offset from the dot, in points: to its right, clear of the line and of other labels."""
    placed: list[tuple[float, float]] = []
    offsets = []
    for label, x, y in sorted(labelled, key=lambda item: item[2]):
        at_x, at_y = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        line_y = axes.transData.transform((x, line))[1] * 72 / axes.figure.dpi
        below = [line_y - 4, *(py for px, py in placed if abs(at_x - px) < 55)]
        raised = max([at_y, *(py + 12 for py in below)])
        placed.append((at_x, raised))
        offsets.append(((label, x, y), (10.0, raised - at_y)))
    return offsets


def row_with_largest_outlier(model: nn.Module) -> tuple[str, int]:
    """(layer, row) of the weight that is largest against the root mean square of its row, among a model's Linears."""
    best = (0.0, "", 0)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            weight = module.weight.detach().float()
            ratio = weight.abs().amax(1) / weight.square().mean(1).sqrt().clamp(min=1e-12)
            row = int(ratio.argmax())
            best = max(best, (float(ratio[row]), name, row))
    return best[1], best[2]


def outlier_row(path: Path, layer: str, weight: Tensor, row: int, bits: int = 4, group: int = 64) -> None:
    """One row of a weight around its largest value: under one scale for the tensor, and under a scale per group.

    Args:
        path: of the PNG.
        layer: its name, for the title.
        weight: (N, K).
        row: which of the N.
        bits: of both quantizations.
        group: weights per scale of the second.
    """
    weight = weight.detach().float().cpu()
    peak = int(weight[row].abs().argmax())
    start = max(0, min(peak // group * group - group, weight.shape[1] - 4 * group))
    columns = torch.arange(start, min(start + 4 * group, weight.shape[1]))
    shown = weight[row, columns]
    limit = 3 * float(shown.abs().quantile(0.95))  # so that the many are seen; the few beyond are written out
    figure, panels = _figure(2, (9.0, 5.6), sharex=True, sharey=True)
    schemes = (
        (f"w{bits}ts", "one scale for the whole tensor"),
        (f"w{bits}g{group}s", f"one scale per {group} weights"),
    )
    for axes, (scheme, meaning) in zip(panels, schemes, strict=True):
        quantized = quantize(weight, scheme)
        axes.plot(columns, shown, color=_GREY, linewidth=1, label="weight", zorder=1)
        axes.plot(columns, quantized.dequantize()[row, columns], ".", color=_BLUE, markersize=4, label="quantized")
        axes.set_title(
            f"{scheme}: {meaning}; {quantized.error(weight).snr_db:.1f} dB over the layer", loc="left", fontsize=10
        )
        axes.set_ylabel("value")
        for k in columns[shown.abs() > limit].tolist():
            value = float(weight[row, k])
            axes.annotate(
                f"{value:.2g}", (k, limit if value > 0 else -limit), xytext=(4, -4 if value > 0 else 4),
                textcoords="offset points", va="top" if value > 0 else "bottom", fontsize=8, color=_RED,
            )  # fmt: skip
    for boundary in range(start, start + len(columns) + 1, group):
        panels[1].axvline(boundary - 0.5, color=_RED, linewidth=0.6, linestyle=":", zorder=0)
    panels[0].set_ylim(-limit, limit)
    panels[0].legend(loc="upper right", frameon=False, fontsize=9)
    panels[1].set_xlabel(f"input feature k of {layer}, row {row}; dotted: where a group ends")
    _save(figure, path)


def _figure(rows: int, inches: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, list(panels)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})  # the same picture is the same file
