"""The two steps of a product with quantized activations as ops of their own: several layers can share the first.

    qkernels::quantize_activations  x (..., K)                            -> codes (..., words), scale (...), zero (...)
    qkernels::matmul_codes          codes, their scale and zero, packed,  -> y (..., N)

CPU is the oracle of reference_int8.py; CUDA is Triton. `zero` of symmetric activations is None as an argument and an
empty tensor as a result. qkernels::matmul is both in one, and has a gradient; these have none. Under autocast they take
and give what it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import dispatch, dispatch_int8, packing
from qkernels.checks import DTYPES, activations_of, check_codes, check_static, check_weight
from qkernels.ops import as_autocast, constant_autograd, without_autocast
from qkernels.scheme import Scheme, as_scheme

_library = torch.library.Library("qkernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "quantize_activations(Tensor x, str scheme, Tensor? activation, Tensor? norm, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "matmul_codes(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor packed, Tensor scale, Tensor? zero,"
    " Tensor? bias, str scheme, SymInt in_features, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_quantize_op = torch.ops.qkernels.quantize_activations.default
_matmul_op = torch.ops.qkernels.matmul_codes.default


# ---- quantize_activations ----


def quantize_activations(
    x: Tensor, scheme: str, activation: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero) of tokens; zero is None where activations are symmetric.

    Args:
        x: (..., K) float16, bfloat16 or float32.
        scheme: of the weights that they will meet, such as "w8cs-a8s".
        activation: (2,) float32, scale and zero of all tokens, where activations are static.
        norm: (K,) floating, weight of an RMSNorm: what is quantized is x * rsqrt(mean(x^2) + eps) * norm, in float32.
        eps: of that norm.
    Returns:
        codes (..., words) int32, laid out as packing.py says; scale (...) float32; zero (...) int8 or None.
    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device, or the scheme has no quantized activations.
    """
    codes, scale, zero = _quantize_op(x, scheme, activation, norm, eps)
    return codes, scale, None if activations_of(as_scheme(scheme)).symmetric else zero


def _check_quantize(x: Tensor, scheme: str, activation: Tensor | None, norm: Tensor | None) -> Scheme:
    parsed = as_scheme(scheme)
    activations_of(parsed)
    if not x.ndim:
        raise ValueError("x must be (..., K), got a scalar")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    check_static(activation, parsed, x.device)
    if norm is not None:
        if norm.shape != x.shape[-1:] or norm.dtype not in DTYPES:
            raise ValueError(f"norm must be ({x.shape[-1]},) floating, got {tuple(norm.shape)} {norm.dtype}")
        if norm.device != x.device:
            raise ValueError(f"norm is on {norm.device} but x is on {x.device}")
    return parsed


def _no_none(found: dispatch_int8.Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """An op cannot return None."""
    codes, scale, zero = found
    return codes, scale, codes.new_empty(0, dtype=torch.int8) if zero is None else zero


def _quantize_cpu(
    x: Tensor, scheme: str, activation: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _check_quantize(x, scheme, activation, norm)
    return _no_none(dispatch_int8.packed_oracle(x, parsed, activation, norm, eps))


def _quantize_cuda(
    x: Tensor, scheme: str, activation: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _check_quantize(x, scheme, activation, norm)
    return _no_none(dispatch_int8.quantize_activations(x, parsed, activation, norm, eps))


def _quantize_fake(
    x: Tensor, scheme: str, activation: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _check_quantize(x, scheme, activation, norm)
    shape = x.shape[:-1]
    codes = x.new_empty((*shape, packing.activation_words(parsed.bits, x.shape[-1])), dtype=torch.int32)
    symmetric = activations_of(parsed).symmetric
    return codes, x.new_empty(shape, dtype=torch.float32), x.new_empty(0 if symmetric else shape, dtype=torch.int8)


# ---- matmul_codes ----


def matmul(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y (..., N) in dtype, of codes (..., words) that quantize_activations gave for the same kind of scheme.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than the others and the scheme ask for.
    """
    return _matmul_op(codes, x_scale, x_zero, packed, scale, zero, bias, scheme, in_features, dtype)


def _matmul_cpu(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    parsed = check_weight(packed, scale, zero, scheme, in_features)
    check_codes(codes, x_scale, x_zero, packed, bias, parsed, in_features, dtype)
    return dispatch_int8.multiplied_oracle(
        codes, x_scale, x_zero, packed, scale, zero, bias, parsed, in_features, dtype
    )


def _matmul_fake(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_codes(codes, x_scale, x_zero, packed, bias, as_scheme(scheme), in_features, dtype)
    return codes.new_empty((*codes.shape[:-1], packed.shape[0]), dtype=dtype)


def _quantize_autocast(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x.device.type):
        return _quantize_op(as_autocast(x), *rest)


def _matmul_autocast(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    dtype, bias = torch.get_autocast_dtype(codes.device.type), None if bias is None else as_autocast(bias)
    with without_autocast(codes.device.type):
        return _matmul_op(codes, x_scale, x_zero, packed, scale, zero, bias, scheme, in_features, dtype)


def _register() -> None:
    for name, autocast in (("quantize_activations", _quantize_autocast), ("matmul_codes", _matmul_autocast)):
        _library.impl(name, autocast, "AutocastCPU")
        _library.impl(name, autocast, "AutocastCUDA")
    for name, cpu, cuda, fake, op in (
        ("quantize_activations", _quantize_cpu, _quantize_cuda, _quantize_fake, _quantize_op),
        ("matmul_codes", _matmul_cpu, dispatch.matmul_codes, _matmul_fake, _matmul_op),
    ):
        _library.impl(name, cpu, "CPU")
        _library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"qkernels::{name}", fake, lib=_library)
        _library.impl(name, constant_autograd(op), "Autograd")


_register()
