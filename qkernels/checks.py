"""What every op demands of its arguments, checked before anything is allocated: which one, what it is, what it must be.

Host time is part of every matmul, so on the way through each attribute of a tensor is read once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qkernels import packing
from qkernels.reference_int8 import SMALLEST_RANGE
from qkernels.scheme import Activations, Scheme, as_scheme

LARGEST_IN_FEATURES = 2**28 - 16  # kernels count the bits of a row, rounded up to lanes, in int32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of weights, activations, scales and offsets


class _Layout(NamedTuple):
    """What the tensors of a quantized (N, K) weight must look like."""

    scheme: Scheme
    packed: tuple[int, int]
    scale: tuple[int, int]
    zero_dtypes: tuple[torch.dtype, ...]  # empty for symmetric schemes


@functools.lru_cache(maxsize=4096)
def _layout(scheme: str, out_features: int, in_features: int) -> _Layout:
    parsed = as_scheme(scheme)
    _check_in_features(in_features)
    check_sums(parsed, in_features)
    return _Layout(
        parsed,
        (out_features, packing.packed_words(parsed.bits, in_features)),
        parsed.scale_shape(out_features, in_features),
        {"symmetric": (), "affine": (torch.uint8,), "offset": DTYPES}[parsed.value_map],
    )


def check_sums(scheme: Scheme, in_features: int) -> None:
    """Raise ValueError if the sum of the products of codes of one group might not fit an int32."""
    if scheme.activations is None:
        return
    largest = 128 if scheme.value_map == "symmetric" else scheme.code_max  # 4-bit symmetric ones count as 16 times that
    most = (2**31 - 1) // (largest * (127 if scheme.activations.symmetric else 255))
    if (length := min(in_features, scheme.group_length(in_features))) > most:
        raise ValueError(
            f"groups of {length} codes are too long for sums in int32 of scheme {str(scheme)!r}: {most} at most; "
            "choose groups, or symmetric weights and activations"
        )


def check_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int) -> Scheme:
    """The parsed scheme, if the tensors are a quantized weight with in_features input features.

    Raises:
        ValueError: a tensor has another shape, dtype or device than the scheme asks for.
    """
    shape = packed.shape
    layout = _layout(scheme, shape[0] if shape else 0, in_features)
    if shape != layout.packed or packed.dtype is not torch.int32:
        raise _weight_error("packed", f"{layout.packed} int32", scheme, in_features, packed)
    if scale.shape != layout.scale or scale.dtype not in DTYPES:
        raise _weight_error("scale", f"{layout.scale} floating", scheme, in_features, scale)
    if zero is None:
        if layout.zero_dtypes:
            raise _weight_error("zero", f"{layout.scale}", scheme, in_features, zero)
    elif not layout.zero_dtypes:
        raise _weight_error("zero", "None", scheme, in_features, zero)
    elif zero.shape != layout.scale or zero.dtype not in layout.zero_dtypes:
        dtype = "uint8" if layout.zero_dtypes == (torch.uint8,) else "floating"
        raise _weight_error("zero", f"{layout.scale} {dtype}", scheme, in_features, zero)
    device = packed.get_device()
    if scale.get_device() != device or (zero is not None and zero.get_device() != device):
        found = ", ".join(str(t.device) for t in (packed, scale, zero) if t is not None)
        raise ValueError(f"packed, scale and zero must be on one device, got {found}")
    return layout.scheme


def _weight_error(name: str, wanted: str, scheme: str, in_features: int, got: Tensor | None) -> ValueError:
    found = "None" if got is None else f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')}"
    return ValueError(f"{name} must be {wanted} for scheme {scheme!r} with K = {in_features}, got {found}")


def check_zeros(zero: Tensor | None, scheme: Scheme) -> None:
    """Raise ValueError for integer zeros that are no code. It waits for a GPU: not for every call."""
    if scheme.value_map != "affine" or zero is None or not zero.numel() or zero.is_meta:
        return
    if torch.compiler.is_compiling() or type(zero) not in (Tensor, torch.nn.Parameter):
        return  # no values to look at
    if (largest := int(zero.max())) > scheme.code_max:
        raise ValueError(f"zero must be at most {scheme.code_max} for scheme {str(scheme)!r}, got {largest}")


def check_order(order: Tensor | None, packed: Tensor, in_features: int) -> None:
    """Raise ValueError unless order is a permutation of the input features. It waits for a GPU: not for every call."""
    if order is None:
        return
    if order.shape != (in_features,) or order.dtype is not torch.int32:
        raise ValueError(f"order must be ({in_features},) int32, got {tuple(order.shape)} {order.dtype}")
    if order.device != packed.device:
        raise ValueError(f"order is on {order.device} but packed is on {packed.device}")
    if order.is_meta or torch.compiler.is_compiling() or type(order) not in (Tensor, torch.nn.Parameter):
        return  # no values to look at
    if not torch.equal(order.sort().values, torch.arange(in_features, dtype=order.dtype, device=order.device)):
        raise ValueError(f"order must hold each of 0 to {in_features - 1} once")


def check_activation(x: Tensor, packed: Tensor, bias: Tensor | None, in_features: int) -> None:
    """Raise TypeError or ValueError unless x, and bias if any, can meet the weight."""
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise ValueError(f"x must be (..., K) with K = {in_features}, got {tuple(shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.get_device() != packed.get_device() or x.is_meta != packed.is_meta:
        raise ValueError(f"x is on {x.device} but packed is on {packed.device}")
    if bias is not None:
        if bias.shape != packed.shape[:1] or bias.dtype not in DTYPES:
            found = f"{tuple(bias.shape)} {str(bias.dtype).removeprefix('torch.')}"
            raise ValueError(f"bias must be ({packed.shape[0]},) floating, got {found}")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device} but x is on {x.device}")


def activations_of(scheme: Scheme) -> Activations:
    """How activations are quantized; ValueError if they are not."""
    if scheme.activations is None:
        raise ValueError(f"scheme {str(scheme)!r} has no quantized activations; with them it ends in -a8s, for example")
    return scheme.activations


def check_codes(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    in_features: int,
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless codes, their scale and zero, and bias if any, can meet the weight."""
    how = activations_of(scheme)
    words, shape = packing.activation_words(scheme.bits, in_features), codes.shape[:-1]
    if not codes.ndim or codes.shape[-1] != words or codes.dtype is not torch.int32:
        raise ValueError(
            f"codes must be (..., {words}) int32 beside scheme {str(scheme)!r} with K = {in_features}, got "
            f"{tuple(codes.shape)} {codes.dtype}"
        )
    if x_scale.shape != shape or x_scale.dtype is not torch.float32:
        raise ValueError(f"x_scale must be {tuple(shape)} float32, got {tuple(x_scale.shape)} {x_scale.dtype}")
    if how.symmetric != (x_zero is None):
        raise ValueError(
            f"x_zero must be {'None' if how.symmetric else f'{tuple(shape)} int8'} for scheme {str(scheme)!r}"
        )
    if x_zero is not None and (x_zero.shape != shape or x_zero.dtype is not torch.int8):
        raise ValueError(f"x_zero must be {tuple(shape)} int8, got {tuple(x_zero.shape)} {x_zero.dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if bias is not None and (bias.shape != packed.shape[:1] or bias.dtype not in DTYPES):
        raise ValueError(f"bias must be ({packed.shape[0]},) floating, got {tuple(bias.shape)} {bias.dtype}")
    for name, tensor in (("x_scale", x_scale), ("x_zero", x_zero), ("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(f"{name} is on {tensor.device} but codes are on {codes.device}")


def check_static(activation: Tensor | None, scheme: Scheme, device: torch.device) -> None:
    """Raise ValueError unless there is a static range of activations exactly where a scheme has one."""
    if activation is None:
        if scheme.is_static:
            raise ValueError(
                f"scheme {str(scheme)!r} needs activation, the scale and zero of its inputs, which calibration finds"
            )
        return
    if not scheme.is_static:
        raise ValueError(f"activation must be None for scheme {str(scheme)!r}, whose activations are not static")
    if activation.shape != (2,) or activation.dtype is not torch.float32:
        raise ValueError(f"activation must be (2,) float32, got {tuple(activation.shape)} {activation.dtype}")
    if activation.device != device:
        raise ValueError(f"activation is on {activation.device} but packed is on {device}")


def check_static_values(activation: Tensor | None, scheme: Scheme) -> None:
    """Raise ValueError for a static scale or zero that is none. It waits for a GPU: not for every call."""
    if activation is None or activation.is_meta or torch.compiler.is_compiling():
        return
    if type(activation) not in (Tensor, torch.nn.Parameter):
        return  # no values to look at
    assert scheme.activations is not None
    scale, zero = activation.tolist()
    zeros = range(1) if scheme.activations.symmetric else range(-128, 128)
    if not (SMALLEST_RANGE <= scale <= 1 / SMALLEST_RANGE) or zero not in zeros:
        raise ValueError(
            f"activation must be a scale from 2^-119 to 2^119 and a zero from {zeros[0]} to {zeros[-1]}, got {scale:g} "
            f"and {zero:g}"
        )


def check_quantize(w: Tensor, scheme: str) -> Scheme:
    """The parsed scheme, if w can be quantized at all; NaN and infinity are found on the way."""
    parsed = as_scheme(scheme)
    if w.ndim != 2:
        raise ValueError(f"w must be 2-D (out_features, in_features), got shape {tuple(w.shape)}")
    if w.dtype not in DTYPES:
        raise TypeError(f"w must be float16, bfloat16 or float32, got {w.dtype}")
    _check_in_features(w.shape[1])
    return parsed


def _check_in_features(in_features: int) -> None:
    if not 0 <= in_features <= LARGEST_IN_FEATURES:
        raise ValueError(f"in_features must be from 0 to {LARGEST_IN_FEATURES}, got {in_features}")


def check_dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Scheme:
    """The parsed scheme, if the tensors are a quantized weight and dtype is one of weights."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    return check_weight(packed, scale, zero, scheme, in_features)
