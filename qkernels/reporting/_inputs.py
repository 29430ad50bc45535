"""What is summed up over the inputs of layers, without keeping any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import rows
from qkernels.tensor import QTensor, QuantizationError


class _Watched:
    """Layers whose inputs are counted.

    Args:
        layers: {name: layer}, each with in_features.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self.layers = layers
        self.mask: Tensor | None = None

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Count what the layers read meanwhile, and leave no hook behind.

        Args:
            mask: (batch, tokens), zero for padding, which is left out of inputs (batch, tokens, K); None to count all.
        """
        hooks = []
        self.mask = mask
        try:
            for name, layer in self.layers.items():
                hooks.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.mask = None
            self._forget()

    def _hook(self, name: str) -> Any:
        def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                self._add(name, args[0] if args else kwargs["input"])

        return count

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """x as (tokens, K) float32, without padding; it must be finite."""
        found = rows(x.detach(), self.mask)
        if not torch.isfinite(found).all():
            raise ValueError(f"the input of {name} in the reference model holds NaN or infinity")
        return found

    def _add(self, name: str, x: Tensor) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        """Nothing more comes for now."""


class SecondMoments(_Watched):
    """H = X^T X (K, K) float32 of each layer, summed over its calls, so that tr(E H E^T) is ||X E^T||^2.

    Layers that always read the very same tensor (q_proj, k_proj, v_proj) hold one H between them: a call replaces a
    layer's H by a new sum, and a layer with the same old H that reads the same x takes the sum that is there.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        super().__init__(layers)
        self.moments: dict[str, Tensor] = {}
        self.last: tuple[Tensor, int, dict[Tensor | None, Tensor]] | None = None

    def _add(self, name: str, x: Tensor) -> None:
        old = self.moments.get(name)
        version = -1 if x.is_inference() else x._version
        if self.last is None or self.last[0] is not x or self.last[1] != version or version < 0:
            self.last = (x, version, {})
        sums = self.last[2]
        if old not in sums:
            found = self._rows(name, x)
            if not found.numel():
                return
            sums[old] = torch.addmm(found.new_zeros(()) if old is None else old, found.T, found)
        self.moments[name] = sums[old]

    def _forget(self) -> None:
        self.last = None


class ProductErrors(_Watched):
    """How far the products of layers, without bias, are from those of their quantized weights, summed over calls.

    For layers whose inputs are quantized, too: no moment of the inputs tells what that does.

    Args:
        layers: {name: layer}.
        weights: {name: quantized weight}.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], weights: Mapping[str, QTensor]):
        super().__init__(layers)
        self.weights = weights
        self.errors: dict[str, QuantizationError] = {}

    def _add(self, name: str, x: Tensor) -> None:
        found, weight = self._rows(name, x), self.weights[name]
        if not found.numel():
            return
        found = found.to(weight.device)
        wanted = found @ self.layers[name].weight.detach().to(weight.device).float().T
        got = torch.nn.functional.linear(found, weight)  # type: ignore[arg-type]
        error = QuantizationError.between(wanted, got)
        self.errors[name] = self.errors[name] + error if name in self.errors else error
