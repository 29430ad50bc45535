"""Second moments H = X^T X of what layers read, so that tr(E H E^T) is ||X E^T||^2 without keeping any X."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import listening, rows


class SecondMoments:
    """H (K, K) float32 of each layer, summed over its calls.

    Layers that always read the very same tensor (q_proj, k_proj, v_proj) hold one H between them: a call replaces a
    layer's H by a new sum, and a layer with the same old H that reads the same x takes the sum that is there.

    Args:
        layers: {name: layer}, each with in_features.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = layers
        self.moments: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, int, dict[Tensor | None, Tensor]] | None = None

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Count what the layers read meanwhile, and leave no hook behind.

        Args:
            mask: (batch, tokens), zero for padding, which is left out of inputs (batch, tokens, K); None to count all.
        """
        self.mask = mask
        try:
            with listening(self.layers, self._add):
                yield
        finally:
            self.mask = self.last = None

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        old = self.moments.get(name)
        version = -1 if x.is_inference() else x._version
        if self.last is None or self.last[0] is not x or self.last[1] != version or version < 0:
            self.last = (x, version, {})
        sums = self.last[2]
        if old not in sums:
            found = rows(x.detach(), self.mask)
            if not found.numel():
                return
            if not torch.isfinite(found).all():
                raise ValueError(f"the input of {name} in the reference model holds NaN or infinity")
            sums[old] = torch.addmm(found.new_zeros(()) if old is None else old, found.T, found)
        self.moments[name] = sums[old]
