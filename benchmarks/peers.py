"""Other packages that quantize on a CPU, for comparison of accuracy: what each makes of a weight.

    pip install termcolor einops ninja; DISABLE_CUDA=1 pip install --no-deps hqq optimum-quanto

Each is called as its own linear layer would call it, in float32. Bits per weight count its scales and zeros as 16 bits
each, as on a GPU. A peer that is not installed, or cannot store a scheme, says so.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.scheme import Scheme

_METADATA_BITS = 32  # of each group: scale and zero


def _hqq(weight: Tensor, scheme: Scheme) -> Tensor:
    """Half-quadratic quantization, axis 1: groups run over the flattened weight."""
    from hqq.core.quantize import Quantizer

    found = Quantizer.quantize(
        weight, nbits=scheme.bits, group_size=scheme.group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(*found)


def _quanto(weight: Tensor, scheme: Scheme) -> Tensor:
    """Range by minimum and maximum, as its QLinear does by default."""
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    kind = {2: qint2, 4: qint4}[scheme.bits]
    scale, shift = MaxOptimizer()(weight, qtype=kind, axis=0, group_size=scheme.group_size)
    return quantize_weight(weight, kind, 0, scale, shift, group_size=scheme.group_size, optimized=False).dequantize()


def _hqq_stores(scheme: Scheme, in_features: int) -> str | None:
    return None if scheme.bits in (1, 2, 3, 4, 8) else f"no {scheme.bits} bits"


def _quanto_stores(scheme: Scheme, in_features: int) -> str | None:
    if scheme.bits not in (2, 4):
        return f"no groups with {scheme.bits} bits"
    length = scheme.group_length(in_features)
    return f"{in_features} inputs are not whole groups of {length}" if in_features % length else None


# name -> (module, quantize and dequantize, why not)
PEERS: Mapping[str, tuple[str, Callable[[Tensor, Scheme], Tensor], Callable[[Scheme, int], str | None]]] = {
    "hqq package": ("hqq", _hqq, _hqq_stores),
    "quanto": ("optimum.quanto", _quanto, _quanto_stores),
}
PACKAGES = ("hqq", "optimum-quanto")


def refusal(peer: str, scheme: Scheme, in_features: int) -> str | None:
    """Why a peer cannot store a weight so, or None."""
    module, _, stores = PEERS[peer]
    if not isinstance(scheme.group_size, int) or scheme.value_map != "affine":
        return "compared on schemes of groups with integer zeros only"
    try:
        if importlib.util.find_spec(module) is None:
            return "not installed"
    except ModuleNotFoundError:  # the package that holds the module
        return "not installed"
    return stores(scheme, in_features)


def quantized(peer: str, weight: Tensor, scheme: Scheme) -> tuple[Tensor, float]:
    """(the weight (N, K) float32 as a peer's codes stand for it, bits of all of it with scales and zeros)."""
    group: Any = scheme.group_size
    found = PEERS[peer][1](weight.float(), scheme).reshape(weight.shape).float()
    return found, weight.numel() * scheme.bits + math.ceil(weight.numel() / group) * _METADATA_BITS
