"""QuantLinear: nn.Linear on packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qkernels import ops
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize


class QuantLinear(nn.Module):
    """y = x @ w.T + bias with a quantized w; takes the place of an nn.Linear.

    The codes and what goes with them are parameters without gradient, because sharding, offloading and
    tensor-parallel tools move parameters only: `weight` (packed, int32), `weight_scale` and, unless the scheme is
    symmetric, `weight_zero` (uint8 zeros or float offsets). `.half()`, `.to(dtype)` and the like convert the bias
    alone: another scale would be another weight. x may be float16, bfloat16 or float32, and y has its dtype.

    Args:
        weight: the quantized weight (out_features, in_features).
        bias: (out_features,) or None.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: QTensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme: Scheme = weight.scheme
        self._scheme = str(weight.scheme)  # what the op takes
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.scale, requires_grad=False)
        self.register_parameter(
            "weight_zero", None if weight.zero is None else nn.Parameter(weight.zero, requires_grad=False)
        )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str | Scheme) -> QuantLinear:
        """Quantize an nn.Linear by rounding to nearest; the bias is shared, not copied."""
        layer = cls(quantize(linear.weight.detach(), scheme), linear.bias)
        return layer.train(linear.training)

    @property
    def qweight(self) -> QTensor:
        """The weight as a QTensor that shares this layer's memory."""
        zero = None if self.weight_zero is None else self.weight_zero.data
        return QTensor(self.weight.data, self.weight_scale.data, zero, self.scheme, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        own = self._parameters  # a plain dict: attributes of a module cost a microsecond each
        return ops.matmul(
            x,
            own["weight"],  # type: ignore[arg-type]
            own["weight_scale"],  # type: ignore[arg-type]
            own["weight_zero"],
            own["bias"],
            self._scheme,
            self.in_features,
        )

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme='{self.scheme}'"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = [p for name, p in self._parameters.items() if name != "bias" and p is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype != t.dtype and any(t is p for p in kept):
                return t.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)
