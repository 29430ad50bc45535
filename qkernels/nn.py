"""Layers on packed codes, which take the places of float ones: QuantLinear, QuantEmbedding, QuantExperts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels import ops, ops_experts
from qkernels.activations import QuantizedActivations
from qkernels.checks import DTYPES, check_static_values
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize, reordered

# names of the parameters of a quantized layer -> what QTensor calls them
PARTS = {
    "weight": "packed",
    "weight_scale": "scale",
    "weight_zero": "zero",
    "weight_order": "order",
    "weight_activation": "activation",
}


class QuantModule(nn.Module):
    """What quantized layers share: a weight, whose parts are parameters without gradient, and whose dtypes stay.

    They are parameters because sharding, offloading and tensor-parallel tools move parameters only: `weight` (packed,
    int32), `weight_scale`, unless the scheme is symmetric `weight_zero` (uint8 zeros or float offsets), where the
    weight has an order of inputs of its own `weight_order` (int32), and where activations are static
    `weight_activation` (float32). `.half()`, `.to(dtype)` and the like convert none of them: another scale would be
    another weight.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    weight_order: nn.Parameter | None
    weight_activation: nn.Parameter | None
    is_part = False  # whether it has only the rows or columns of one of several processes
    _converted = "bias"  # the one parameter whose dtype changes with the model's

    def __init__(self, weight: QTensor):
        super().__init__()
        self.in_features = weight.in_features
        self.scheme: Scheme = weight.scheme
        self._scheme = str(weight.scheme)  # what ops take
        for name, part in PARTS.items():
            tensor = getattr(weight, part)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def qweight(self) -> QTensor:
        """The weight as a QTensor that shares this layer's memory."""
        others = (self.weight_zero, self.weight_order, self.weight_activation)
        zero, order, activation = (None if p is None else p.data for p in others)
        return QTensor(self.weight.data, self.weight_scale.data, zero, self.scheme, self.in_features, order, activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_dtypes(fn, self._parameters.get(self._converted)), recurse)

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
        own, given = self._parameters["weight_activation"], state_dict.get(prefix + "weight_activation")
        if own is not None and given is not None and given.shape == own.shape and given.dtype is own.dtype:
            try:  # two numbers: another scheme's zero, or what is no scale, shows in no shape
                check_static_values(given, self.scheme)
            except ValueError as error:
                errors.append(f"{prefix}weight_activation: {error}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class QuantLinear(QuantModule):
    """y = x @ w.T + bias with a quantized w; takes the place of an nn.Linear.

    `.half()`, `.to(dtype)` and the like convert the bias alone. x may be float16, bfloat16 or float32, and y has its
    dtype.

    Args:
        weight: the quantized weight (out_features, in_features).
        bias: (out_features,), float16, bfloat16 or float32, or None.

    Raises:
        ValueError: bias is not such a tensor.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QTensor, bias: Tensor | None = None):
        super().__init__(weight)
        self.out_features = weight.shape[0]
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

    def forward(self, x: Tensor | QuantizedActivations) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        own = self._parameters  # a plain dict: attributes of a module cost a microsecond each
        if type(x) is QuantizedActivations:
            x.check_order(own["weight_order"])
            weight = (own["weight"], own["weight_scale"], own["weight_zero"], own["bias"])
            return x.linear(*weight, self.scheme, self.in_features)  # type: ignore[arg-type]
        assert isinstance(x, Tensor)
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
            own["weight_activation"],
        )

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme='{self.scheme}'"
        )


class QuantEmbedding(QuantModule):
    """Rows of a quantized weight, dequantized as they are looked up; takes the place of an nn.Embedding.

    Args:
        weight: (num_embeddings, embedding_dim), quantized; without an order of inputs.
        dtype: of the output: float16, bfloat16 or float32. `.half()`, `.to(dtype)` and the like change it.

    Raises:
        ValueError, TypeError: the weight has an order of inputs, or dtype is not one of these.

    >>> import torch, qkernels
    >>> layer = qkernels.QuantEmbedding(qkernels.quantize(torch.eye(100, 64), "w8g64"))
    >>> layer(torch.tensor([[3, 99], [0, 1]])).shape
    torch.Size([2, 2, 64])
    """

    _converted = "like"

    def __init__(self, weight: QTensor, dtype: torch.dtype = torch.float32):
        super().__init__(weight)
        if weight.order is not None:
            raise ValueError("the weight of a QuantEmbedding cannot have an order of inputs")
        if weight.scheme.activations is not None:
            raise ValueError(f"a QuantEmbedding has no activations to quantize, got scheme '{weight.scheme}'")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        self.num_embeddings, self.embedding_dim = weight.shape
        # Empty, never stored, and first: transformers takes the dtype of a model's first floating parameter for that of
        # its activations, and an embedding is what it meets first.
        device = torch.device("cpu") if weight.packed.is_meta else weight.device  # it has no values to wait for
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self._parameters = {"like": self._parameters.pop("like"), **self._parameters}

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.like.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as of nn.Embedding
        """Integer indices (...) -> (..., embedding_dim)."""
        flat = input.reshape(-1)
        one_scale = self.scheme.group_size == "tensor"
        packed, scale, zero = ops.rows(self.weight, self.weight_scale, self.weight_zero, flat, per_tensor=one_scale)
        found = ops.dequantize(packed, scale, zero, self._scheme, self.in_features, self.dtype)
        return found.reshape(*input.shape, self.in_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}like"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}like": self.like}, prefix, *rest)

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme='{self.scheme}'"


class QuantExperts(QuantModule):
    """A stack of weights of one shape, such as a projection of all experts of a layer, quantized as one.

    `experts[i]` is the weight of one of them, for F.linear; calling it multiplies each row of x by the weight of the
    row's own expert.

    Args:
        weight: (experts * out_features, in_features): their rows, one expert after the other.
        experts: how many.

    Raises:
        ValueError: rows are not a multiple of experts, or the weight has an order of inputs.

    >>> import torch, qkernels
    >>> layer = qkernels.QuantExperts(qkernels.quantize(torch.randn(8 * 32, 64), "w4g64"), experts=8)
    >>> layer(torch.randn(3, 64), torch.tensor([7, 0, 7])).shape
    torch.Size([3, 32])
    """

    unpickled: ClassVar[list[Callable[[], None]]] = []  # what a model needs that comes with such layers

    def __init__(self, weight: QTensor, experts: int):
        super().__init__(weight)
        if weight.order is not None or weight.activation is not None:
            raise ValueError("the weight of QuantExperts cannot have an order of inputs, nor static activations")
        if experts < 1 or weight.shape[0] % experts:
            raise ValueError(f"{weight.shape[0]} rows are not those of {experts} experts")
        self.num_experts, self.out_features = experts, weight.shape[0] // experts

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for prepare in self.unpickled:
            prepare()

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x (rows, in_features), expert (rows,) -> (rows, out_features); zeros where expert is num_experts or more."""
        return ops_experts.matmul(
            x,
            expert,
            self.weight,
            self.weight_scale,
            self.weight_zero,
            self._scheme,
            self.in_features,
            self.num_experts,
        )

    def __getitem__(self, index: int | Tensor) -> QTensor:
        i = operator.index(index)  # a tensor of one integer has one, too
        if not 0 <= i < self.num_experts:
            raise IndexError(f"expert must be from 0 to {self.num_experts - 1}, got {i}")
        rows = slice(i * self.out_features, (i + 1) * self.out_features)
        # Not by way of qweight, which would check the zeros of all experts for each of them.
        scale, zero = self.weight_scale.data, None if self.weight_zero is None else self.weight_zero.data
        if self.scheme.group_size != "tensor":
            scale, zero = scale[:, rows], None if zero is None else zero[:, rows]
        return QTensor(self.weight.data[rows], scale, zero, self.scheme, self.in_features)

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return (
            f"{self.num_experts} experts, in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme='{self.scheme}'"
        )


def keep_dtypes(fn: Callable[[Tensor], Tensor], converted: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What nn.Module._apply may do to a quantized layer: everything but change a dtype, other than of `converted`."""

    def careful(t: Tensor) -> Tensor:
        moved = fn(t)
        if moved.dtype != t.dtype and (t is not converted or moved.dtype not in DTYPES):
            return t.to(moved.device)
        return moved

    return careful
