"""QuantizedActivations: inputs of layers as codes, quantized once for all layers that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels import ops_int8, packing, reference_int8
from qkernels.scheme import Activations, Scheme, as_scheme


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedActivations:
    """Codes of activations: what `quantize_activations` returns, and what F.linear and a QuantLinear take for x.

    Attributes:
        codes: (..., words) int32, laid out as packing.py says.
        scale: (...) float32, one for each token.
        zero: (...) int8, or None where they are symmetric.
        how: they were quantized.
        weight_bits: of the weights that they can meet.
        in_features: K.
        dtype: of what they stand for, and of products.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    how: Activations
    weight_bits: int
    in_features: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(..., K) of what they stand for."""
        return torch.Size((*self.scale.shape, self.in_features))

    def __repr__(self) -> str:
        return (
            f"QuantizedActivations(shape={tuple(self.shape)}, '{self.how}' for {self.weight_bits}-bit weights, "
            f"dtype={self.dtype}, device='{self.codes.device}')"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not cls for kind in types):
            return NotImplemented  # F.linear(x, q) is a QTensor's business
        raise TypeError(
            f"QuantizedActivations do not support {getattr(func, '__name__', func)}; a QuantLinear and F.linear(x, q) "
            "with a QTensor take them, and x.dequantize() is a plain tensor"
        )

    def dequantize(self) -> Tensor:
        """(..., K) in `dtype`: scale * (code - zero)."""
        flat = self.codes.reshape(self.scale.numel(), self.codes.shape[-1])
        code = packing.unpack_activations(flat, self.weight_bits, self.in_features)
        zero = None if self.zero is None else self.zero.reshape(-1)
        value = reference_int8.dequantize_activations(code, self.scale.reshape(-1), zero)
        return value.reshape(self.shape).to(self.dtype)

    @staticmethod
    def check_order(order: Tensor | None) -> None:
        """Raise ValueError if a weight has an order of inputs of its own: codes cannot be brought into it."""
        if order is not None:
            raise ValueError(
                "quantized activations cannot meet a weight with an order of inputs of its own (act-order)"
            )

    def linear(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        scheme: Scheme,
        in_features: int,
    ) -> Tensor:
        """y (..., N) of a weight without an order of inputs.

        Raises:
            ValueError: the weight's scheme or K are not those that these codes are for.
        """
        if (scheme.activations, scheme.bits, in_features) != (self.how, self.weight_bits, self.in_features):
            raise ValueError(f"{self!r} cannot meet a weight of scheme {str(scheme)!r} with K = {in_features}")
        return ops_int8.matmul(
            self.codes, self.scale, self.zero, packed, scale, zero, bias, str(scheme), in_features, self.dtype
        )


def quantize_activations(
    x: Tensor,
    scheme: str | Scheme,
    *,
    activation: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> QuantizedActivations:
    """Quantize the inputs of layers once, for all layers that read them. Products with them have no gradients.

    Under autocast x is cast first, as layers would.

    Args:
        x: (..., K), float16, bfloat16 or float32.
        scheme: of the layers, such as "w8a8".
        activation: (2,) float32, scale and zero of all tokens, where activations are static: a layer's
            `weight_activation`.
        norm: (K,) weight of an RMSNorm that comes before the layers: its output, in float32, is quantized in one go,
            and never written.
        eps: of that norm.

    Raises:
        ValueError, TypeError: a tensor has another shape or dtype, or the scheme has no quantized activations.

    >>> import torch, qkernels
    >>> q, k = (qkernels.quantize(torch.randn(n, 128), "w8a8") for n in (128, 32))
    >>> x = qkernels.quantize_activations(torch.randn(5, 128), "w8a8", norm=torch.ones(128), eps=1e-6)
    >>> [tuple(torch.nn.functional.linear(x, weight).shape) for weight in (q, k)]
    [(5, 128), (5, 32)]
    """
    parsed = as_scheme(scheme)
    text = scheme if isinstance(scheme, str) else str(scheme)  # torch.compile cannot write one that it has parsed
    codes, scale, zero = ops_int8.quantize_activations(x, text, activation, norm, eps)
    assert parsed.activations is not None
    return QuantizedActivations(codes, scale, zero, parsed.activations, parsed.bits, x.shape[-1], x.dtype)
