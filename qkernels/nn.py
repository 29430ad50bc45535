"""QuantLinear: nn.Linear on packed codes; and putting one in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from qkernels import ops
from qkernels.checks import DTYPES
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize, reordered


class QuantLinear(nn.Module):
    """y = x @ w.T + bias with a quantized w; takes the place of an nn.Linear.

    The codes and what goes with them are parameters without gradient, because sharding, offloading and
    tensor-parallel tools move parameters only: `weight` (packed, int32), `weight_scale`, unless the scheme is
    symmetric `weight_zero` (uint8 zeros or float offsets), and where the weight has an order of inputs of its own
    `weight_order` (int32). `.half()`, `.to(dtype)` and the like convert the bias
    alone: another scale would be another weight. x may be float16, bfloat16 or float32, and y has its dtype.

    Args:
        weight: the quantized weight (out_features, in_features).
        bias: (out_features,), float16, bfloat16 or float32, or None.

    Raises:
        ValueError: bias is not such a tensor.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    weight_order: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: QTensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme: Scheme = weight.scheme
        self._scheme = str(weight.scheme)  # what the op takes
        register_weight(self, weight)
        if bias is not None and (bias.shape != (self.out_features,) or bias.dtype not in DTYPES):
            raise ValueError(f"bias must be ({self.out_features},) floating, got {tuple(bias.shape)} {bias.dtype}")
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
        zero, order = (None if p is None else p.data for p in (self.weight_zero, self.weight_order))
        return QTensor(self.weight.data, self.weight_scale.data, zero, self.scheme, self.in_features, order)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        own = self._parameters  # a plain dict: attributes of a module cost a microsecond each
        if (order := own["weight_order"]) is not None:
            x = reordered(x, order)
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
        return super()._apply(keep_dtypes(fn, self._parameters.get("bias")), recurse)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        # Copying between dtypes would turn zeros into offsets, or round scales: codes of another scheme.
        for name in PARTS:
            own, given = self._parameters[name], state_dict.get(prefix + name)
            if own is not None and given is not None and own.dtype != given.dtype:
                errors.append(f"{prefix}{name} of a {self.scheme} layer must be {own.dtype}, got {given.dtype}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


# names of the parameters of a quantized layer -> what QTensor calls them
PARTS = {"weight": "packed", "weight_scale": "scale", "weight_zero": "zero", "weight_order": "order"}


def register_weight(layer: nn.Module, weight: QTensor) -> None:
    """Give a layer the parts of a weight as parameters without gradient; None for those that it has not."""
    for name, part in PARTS.items():
        tensor = getattr(weight, part)
        layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def keep_dtypes(fn: Callable[[Tensor], Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What nn.Module._apply may do to a quantized layer: everything but change a dtype other than the bias's."""

    def careful(t: Tensor) -> Tensor:
        moved = fn(t)
        if moved.dtype != t.dtype and (t is not bias or moved.dtype not in DTYPES):
            return t.to(moved.device)
        return moved

    return careful


# ---- layers in a model ----


def places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every (parent, attribute) at which a module sits; a shared module sits at several."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, child))
    return found


def put(layer: QuantLinear, where: Iterable[tuple[nn.Module, str]]) -> None:
    """Set the layer at places of a model."""
    for parent, child in where:
        setattr(parent, child, layer)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else its fused path takes the packed codes for a float weight
