"""QTensor: a quantized weight as one value. Packed codes, scales, zeros or offsets, and the scheme that reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import checks, fit, ops, packing, reference
from qkernels.activations import QuantizedActivations
from qkernels.scheme import Scheme, as_scheme


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """What quantizing lost, against the original weight w.

    Attributes:
        signal: sum of w^2.
        noise: sum of (w - w^)^2.
        largest: the largest |w - w^|.
    """

    signal: float
    noise: float
    largest: float

    @staticmethod
    def between(original: Tensor, found: Tensor) -> QuantizationError:
        """Of `found`, which stands for `original`; float32 both."""
        difference = original - found
        return QuantizationError(
            # squares in float64: those of tiny weights vanish in float32
            signal=original.double().square().sum().item(),
            noise=difference.double().square().sum().item(),
            largest=difference.abs().max().item() if original.numel() else 0.0,
        )

    @property
    def snr_db(self) -> float:
        """Signal to noise, 10 log10(signal / noise), in decibels; infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def relative(self) -> float:
        """Relative error, sqrt(noise / signal)."""
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    def __add__(self, other: QuantizationError) -> QuantizationError:
        """The error of two weights together."""
        return QuantizationError(self.signal + other.signal, self.noise + other.noise, max(self.largest, other.largest))

    def __repr__(self) -> str:
        return f"QuantizationError(snr_db={self.snr_db:.2f}, relative={self.relative:.4g}, largest={self.largest:.4g})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized (out_features, in_features) weight: what `quantize` returns.

    It is not a torch.Tensor, but stands for one in `F.linear(x, q, bias)` and `x @ q.T`, which run on the packed codes.

    Args:
        packed: (N, words) int32, laid out as packing.py says.
        scale: (groups, N), or (1, 1) per tensor; floating.
        zero: like scale: uint8 zeros, floating offsets, or None for symmetric schemes.
        scheme: how codes are read.
        in_features: K, which packed, being padded, does not tell.
        order: (K,) int32, a permutation: codes of column j belong to input feature order[j]. None: in their own order.
            Act-order GPTQ groups input features by their size, not by their place; on x, permuted, groups are runs.
        activation: (2,) float32, scale and zero of all inputs, where the scheme has static activations.

    Raises:
        ValueError: a tensor has another shape, dtype or device than the scheme asks for, a zero is no code, order is no
            permutation, or activation is no scale and zero.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    in_features: int
    order: Tensor | None = None
    activation: Tensor | None = None

    def __post_init__(self) -> None:
        checks.check_weight(self.packed, self.scale, self.zero, str(self.scheme), self.in_features)
        checks.check_zeros(self.zero, self.scheme)
        checks.check_order(self.order, self.packed, self.in_features)
        checks.check_static(self.activation, self.scheme, self.packed.device)
        checks.check_static_values(self.activation, self.scheme)

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features) = (N, K)."""
        return torch.Size((self.packed.shape[0], self.in_features))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: packed, scale, and zero, order and activation, those that there are."""
        all_five = (self.packed, self.scale, self.zero, self.order, self.activation)
        return tuple(t for t in all_five if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes with their padding, scales, zeros or offsets, an order, static activations."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (N K); nan for an empty weight."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else math.nan

    @property
    def T(self) -> TransposedQTensor:  # noqa: N802 - as in torch
        """For `x @ q.T`; nothing moves."""
        return TransposedQTensor(self)

    def __repr__(self) -> str:
        return (
            f"QTensor(shape=({self.shape[0]}, {self.shape[1]}), scheme='{self.scheme}', {self.nbytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight, device='{self.device}')"
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that the codes stand for, in float32, float16 or bfloat16."""
        w = ops.dequantize(self.packed, self.scale, self.zero, str(self.scheme), self.in_features, dtype)
        return w if self.order is None else w.index_select(1, torch.argsort(self.order))

    def rows(self, index: Tensor) -> QTensor:
        """Rows of the weight, in the order of a (rows,) integer index: codes and scales are gathered, nothing else."""
        one_scale = self.scheme.group_size == "tensor"
        packed, scale, zero = ops.rows(self.packed, self.scale, self.zero, index, per_tensor=one_scale)
        return dataclasses.replace(self, packed=packed, scale=scale, zero=zero)

    def error(self, w: Tensor) -> QuantizationError:
        """How far this is from the original weight w (N, K)."""
        if w.shape != self.shape:
            raise ValueError(f"w must have shape {tuple(self.shape)}, got {tuple(w.shape)}")
        return QuantizationError.between(w.detach().float(), self.dequantize())

    def to(self, device: torch.device | str) -> QTensor:
        """The same codes and scales on another device. Dtypes stay: another scale would be another weight."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"QTensor.to changes the device alone, got {device}; q.dequantize({device}) gives a tensor")
        others = (self.zero, self.order, self.activation)
        zero, order, activation = (None if t is None else t.to(device) for t in others)
        packed, scale = self.packed.to(device), self.scale.to(device)
        return QTensor(packed, scale, zero, self.scheme, self.in_features, order, activation)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        raise TypeError(
            f"QTensor does not support {getattr(func, '__name__', func)}; it supports F.linear(x, q, bias) and "
            "x @ q.T, and q.dequantize() is a plain tensor"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TransposedQTensor:
    """q.T: the right-hand side of `x @ q.T`."""

    source: QTensor

    @property
    def shape(self) -> torch.Size:
        """(in_features, out_features) = (K, N)."""
        return torch.Size(reversed(self.source.shape))

    @property
    def T(self) -> QTensor:  # noqa: N802 - as in torch
        """The QTensor that this is the transpose of."""
        return self.source

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = [*args, *(kwargs or {}).values()]
        products = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if func in products and len(operands) == 2 and isinstance(operands[1], cls):
            return _linear(operands[0], operands[1].source)
        raise TypeError(f"QTensor.T does not support {getattr(func, '__name__', func)}; it supports x @ q.T")


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - F.linear's name
    if isinstance(input, QuantizedActivations) and isinstance(weight, QTensor):
        input.check_order(weight.order)
        return input.linear(weight.packed, weight.scale, weight.zero, bias, weight.scheme, weight.in_features)
    if not isinstance(weight, QTensor) or not isinstance(input, Tensor):
        raise TypeError(
            f"F.linear(x, q) takes a Tensor and a QTensor, got {type(input).__name__} and {type(weight).__name__}"
        )
    x = input if weight.order is None else reordered(input, weight.order)
    beside = (bias, str(weight.scheme), weight.in_features, weight.activation)
    return ops.matmul(x, weight.packed, weight.scale, weight.zero, *beside)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (..., K) with its features in the order of the columns of codes."""
    if not x.ndim or x.shape[-1] != order.numel():
        raise ValueError(f"x must be (..., K) with K = {order.numel()}, got {tuple(x.shape)}")
    return x.index_select(-1, order)


def stacked_rows(weights: Sequence[QTensor]) -> QTensor:
    """One weight of the rows of several, in this order; codes, scales and zeros only move.

    Raises:
        ValueError: they differ in scheme, in_features or dtypes, or have one scale for a whole tensor or an order of
            inputs: then rows of different weights cannot share a QTensor.
    """
    first = weights[0]
    for other in weights:
        if (other.scheme, other.in_features) != (first.scheme, first.in_features):
            raise ValueError(
                f"{other.scheme} of {other.in_features} inputs beside {first.scheme} of {first.in_features}"
            )
        if other.scheme.group_size == "tensor" or other.order is not None:
            raise ValueError("one scale for a whole tensor, or an order of inputs of its own")
        if [t.dtype for t in other.tensors] != [t.dtype for t in first.tensors]:
            raise ValueError("scales of different dtypes")
        given = (first.activation, other.activation)
        if given[0] is not None and given[1] is not None and not torch.equal(given[0], given[1]):
            raise ValueError("static activations of different scales")
    zeros = [weight.zero for weight in weights if weight.zero is not None]
    return dataclasses.replace(
        first,
        packed=torch.cat([weight.packed for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights], dim=1),
        zero=torch.cat(zeros, dim=1) if zeros else None,
    )


def quantize(
    w: Tensor,
    scheme: str | Scheme,
    *,
    method: str = "rtn",
    importance: Tensor | None = None,
    activation: Tensor | None = None,
) -> QTensor:
    """Quantize a weight.

    Args:
        w: (N, K) = (out_features, in_features), float16, bfloat16 or float32, finite; on CPU or GPU.
        scheme: such as "w4g128"; see `Scheme`.
        method: "rtn" rounds to nearest, in one kernel on a GPU; "search" tries ranges, zeros and scales for each group;
            "hqq" moves its zeros. See `qkernels.fit`.
        importance: (K,) what an error in a weight of input k costs, such as the mean square of that input; for "search"
            and "hqq".
        activation: (2,) float32, scale and zero of all inputs, where the scheme has static activations.

    Raises:
        ValueError, TypeError: w is not such a tensor, the scheme or the method is not one, importance is given to "rtn"
            or is not such a tensor, or a scale overflows its dtype.

    >>> import torch, qkernels
    >>> q = qkernels.quantize(torch.ones(256, 512), "w4g128")
    >>> q
    QTensor(shape=(256, 512), scheme='w4g128', 68,608 bytes, 4.19 bits per weight, device='cpu')
    >>> torch.nn.functional.linear(torch.ones(3, 512), q).shape
    torch.Size([3, 256])
    """
    parsed = as_scheme(scheme)
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a torch.Tensor, got {type(w).__name__}")
    if method == "rtn":
        if importance is not None:
            raise ValueError("method 'rtn' takes no importance: rounding to nearest does not use it")
        packed, scale, zero = ops.quantize(w, str(parsed))
    else:
        checks.check_quantize(w, str(parsed))
        scale, zero = fit.fit(w, parsed, method, importance)
        packed = packing.pack(reference.encode(w, scale, zero, parsed), parsed.bits)
    return QTensor(packed, scale, zero, parsed, w.shape[1], activation=activation)


def stored_bytes(scheme: str | Scheme, out_features: int, in_features: int) -> int:
    """QTensor.nbytes of a weight (out_features, in_features), before there is one."""
    parsed = as_scheme(scheme)
    beside = parsed.scale_dtype.itemsize + (parsed.zero_dtype.itemsize if parsed.zero_dtype is not None else 0)
    groups, rows = parsed.scale_shape(out_features, in_features)
    static = 8 if parsed.is_static else 0  # their scale and zero
    return 4 * out_features * packing.packed_words(parsed.bits, in_features) + groups * rows * beside + static
