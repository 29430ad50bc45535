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
    figure, (axes,) = _figure(1, (7.0, 4.6))
    axes.axhline(original[1], color=_GREY, linewidth=1, linestyle="--", zorder=0)
    sizes = [size / 1e6 for _, size, _ in points]
    axes.text(
        max(sizes), original[1], f"unquantized: {original[1]:.1f} at {original[0] / 1e6:.0f} MB",
        ha="right", va="bottom", color=_GREY, fontsize=9,
    )  # fmt: skip
    axes.scatter(sizes, [perplexity for _, _, perplexity in points], color=_BLUE, s=28, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(bottom=original[1] * 0.7)
    axes.margins(x=0.12)
    for (scheme, size, perplexity), offset in zip(points, _label_offsets(axes, points), strict=True):
        axes.annotate(
            scheme, (size / 1e6, perplexity), xytext=offset, textcoords="offset points",
            ha="left", va="center", fontsize=9, color=_INK,
        )  # fmt: skip
    axes.set_xlabel("size of the linear layers, MB")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def _label_offsets(axes: Any, points: Sequence[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """Where to put each label, in points from its dot: to the right, moved up until it is clear of earlier ones."""
    placed: list[tuple[float, float]] = []
    offsets = []
    for _, size, perplexity in points:
        x, y = axes.transData.transform((size / 1e6, perplexity)) * 72 / axes.figure.dpi
        dy = 0.0
        while any(abs(x - px) < 48 and abs(y + dy - py) < 11 for px, py in placed):
            dy += 3.0
        placed.append((x, y + dy))
        offsets.append((6.0, dy))
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
    figure, panels = _figure(2, (9.0, 5.6), sharex=True)
    schemes = ((f"w{bits}ts", "one scale for the whole tensor"), (f"w{bits}g{group}s", f"one scale per {group} weights"))
    for axes, (scheme, meaning) in zip(panels, schemes, strict=True):
        quantized = quantize(weight, scheme)
        error = quantized.error(weight)
        back = quantized.dequantize()[row, columns]
        axes.plot(columns, weight[row, columns], color=_GREY, linewidth=1, label="weight", zorder=1)
        axes.plot(columns, back, ".", color=_BLUE, markersize=3.5, label="quantized", zorder=3)
        if scheme.startswith(f"w{bits}g"):
            for boundary in range(start, int(columns[-1]) + 2, group):
                axes.axvline(boundary - 0.5, color=_RED, linewidth=0.6, linestyle=":", zorder=0)
        step = quantized.scale.float().max() if scheme.endswith("ts") else quantized.scale[:, row].float().median()
        axes.set_title(
            f"{scheme}: {meaning}. Step {step:.3g}; SNR of the layer {error.snr_db:.1f} dB", loc="left", fontsize=10
        )
        axes.set_ylabel("value")
    panels[0].legend(loc="upper right", frameon=False, fontsize=9)
    panels[1].set_xlabel(f"input feature k of {layer}, row {row}")
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
