"""How far outputs of layers are off whose inputs are quantized, too: second moments of inputs do not tell it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import listening, rows
from qkernels.tensor import QTensor, QuantizationError


class OutputErrors:
    """Sums of ||x W^T||^2 and ||x W^T - y||^2 for each layer, where y is what the quantized weight makes of x, float32.

    Args:
        layers: {name: (layer of the reference, its quantized weight)}.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Linear, QTensor]]):
        self.layers = layers
        self.sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Count what the layers read meanwhile, without padding: where mask (batch, tokens) is zero."""

        def hear(name: str, x: Tensor) -> None:
            self._add(name, rows(x.detach(), mask))

        with listening({name: linear for name, (linear, _) in self.layers.items()}, hear):
            yield

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        if not x.numel():
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"the input of {name} in the reference model holds NaN or infinity")
        linear, q = self.layers[name]
        weight: Any = q  # stands for a Tensor
        y = x @ linear.weight.detach().float().T
        lost = y - nn.functional.linear(x.to(q.device), weight).to(y.device)
        found = torch.stack([each.double().square().sum() for each in (y, lost)])
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def result(self) -> dict[str, float]:
        """{name: the relative error} of layers that were reached."""
        sums = {name: found.tolist() for name, found in self.sums.items()}
        return {name: QuantizationError(signal, noise, 0.0).relative for name, (signal, noise) in sums.items()}
