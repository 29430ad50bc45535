"""The torch.library ops: schema, checks, fake, CPU, CUDA, autocast and autograd of each, in one place.

    qkernels::quantize    w (N, K)                     -> packed, scale, zero
    qkernels::dequantize  packed, scale, zero          -> w (N, K)
    qkernels::matmul      x (..., K), packed, ...      -> y (..., N) = x @ w.T + bias

CPU is the oracle of reference.py; CUDA is Triton. A scheme travels as its string. `zero` holds integer zeros or float
offsets; symmetric schemes have none: None as an argument, an empty tensor as a result.

The ops are defined with torch.library.Library and have an autograd kernel of their own, because host time per call is
part of a decode step: torch.library.custom_op and register_autograd each add several microseconds.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import packing, reference
from qkernels.scheme import Scheme, as_scheme
from qkernels.tuning import choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of weights, activations, scales and offsets

_library = torch.library.Library("qkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("quantize(Tensor w, str scheme) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    "dequantize(Tensor packed, Tensor scale, Tensor? zero, str scheme, SymInt in_features, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, str scheme) -> Tensor", tags=_TAGS
)
_quantize_op = torch.ops.qkernels.quantize.default
_dequantize_op = torch.ops.qkernels.dequantize.default
_matmul_op = torch.ops.qkernels.matmul.default


# ---- checks -----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """What the tensors of a quantized (N, K) weight must look like."""

    packed: tuple[int, int]
    scale: tuple[int, int]
    scheme: Scheme


@functools.lru_cache(maxsize=4096)
def _layout(scheme: str, out_features: int, in_features: int) -> _Layout:
    parsed = as_scheme(scheme)
    words = packing.packed_words(parsed.bits, in_features)
    return _Layout((out_features, words), parsed.scale_shape(out_features, in_features), parsed)


def check_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, what: str = "qkernels"
) -> Scheme:
    """The parsed scheme, if the tensors are a quantized weight with in_features input features.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than the scheme asks for.
    """
    layout = _layout(scheme, packed.shape[0] if packed.ndim else 0, in_features)
    if packed.dtype is not torch.int32 or packed.shape != layout.packed:
        raise _error(what, "packed", f"{layout.packed} int32", scheme, in_features, packed)
    if scale.dtype not in DTYPES or scale.shape != layout.scale:
        raise _error(what, "scale", f"{layout.scale} floating", scheme, in_features, scale)
    value_map = layout.scheme.value_map
    if zero is None:
        if value_map != "symmetric":
            raise _error(what, "zero", f"{layout.scale}", scheme, in_features, zero)
    elif value_map == "symmetric":
        raise _error(what, "zero", "None", scheme, in_features, zero)
    elif zero.shape != layout.scale or (
        zero.dtype not in DTYPES if value_map == "offset" else zero.dtype is not torch.uint8
    ):
        dtype = "floating" if value_map == "offset" else "uint8"
        raise _error(what, "zero", f"{layout.scale} {dtype}", scheme, in_features, zero)
    device = packed.device
    if scale.device != device or (zero is not None and zero.device != device):
        found = [str(t.device) for t in (packed, scale, zero) if t is not None]
        raise ValueError(f"{what}: packed, scale and zero must be on one device, got {', '.join(found)}")
    return layout.scheme


def _error(what: str, name: str, wanted: str, scheme: str, in_features: int, got: Tensor | None) -> Exception:
    found = "None" if got is None else f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')}"
    message = f"{what}: {name} must be {wanted} for scheme {scheme!r} with K = {in_features}, got {found}"
    return ValueError(message)


def _check_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Scheme:
    if x.ndim == 0:
        raise ValueError("matmul: x must be (..., K), got a scalar")
    parsed = check_weight(packed, scale, zero, scheme, x.shape[-1], "matmul")
    check_activation(x, packed, bias)
    return parsed


def check_activation(x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x, and bias if any, can meet the weights; K is check_weight's business."""
    if x.dtype not in DTYPES:
        raise TypeError(f"matmul: x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.device != packed.device:
        raise ValueError(f"matmul: x is on {x.device} but packed is on {packed.device}")
    if bias is not None:
        if bias.shape != packed.shape[:1] or bias.dtype not in DTYPES:
            raise ValueError(
                f"matmul: bias must be ({packed.shape[0]},) floating, got {tuple(bias.shape)} {bias.dtype}"
            )
        if bias.device != x.device:
            raise ValueError(f"matmul: bias is on {bias.device} but x is on {x.device}")


def _check_quantize(w: Tensor, scheme: str) -> Scheme:
    parsed = as_scheme(scheme)
    if w.ndim != 2:
        raise ValueError(f"quantize: w must be 2-D (out_features, in_features), got shape {tuple(w.shape)}")
    if w.dtype not in DTYPES:
        raise TypeError(f"quantize: w must be float16, bfloat16 or float32, got {w.dtype}")
    return parsed


# ---- quantize ---------------------------------------------------------------------------------------------------------


def _quantize_cpu(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    return _no_none(*reference.quantize(w, _check_quantize(w, scheme)))


def _quantize_cuda(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _check_quantize(w, scheme)
    if w.numel() == 0:
        return _no_none(*reference.quantize(w, parsed))
    from qkernels.kernels import quantize as kernel

    w = w if w.stride(-1) == 1 else w.contiguous()
    config = choose.quantize(parsed, w.shape[1])
    if choose.group_fits_tile(parsed, w.shape[1]):
        packed, scale, zero = kernel.quantize(w, parsed, config)
        if not torch.isfinite(scale).all():
            reference.group_range(w, parsed)  # raises for NaN and infinity in w
            reference.check_fits("scale", scale, parsed)
    else:
        scale, zero = reference.scale_and_zero(*reference.group_range(w, parsed), parsed)
        packed = kernel.encode(w, scale, zero, parsed, config)
    return _no_none(packed, scale, zero)


def _quantize_fake(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = _check_quantize(w, scheme)
    out_features, in_features = w.shape
    packed = w.new_empty((out_features, packing.packed_words(parsed.bits, in_features)), dtype=torch.int32)
    scale = w.new_empty(parsed.scale_shape(out_features, in_features), dtype=parsed.scale_dtype)
    zero = None if parsed.zero_dtype is None else torch.empty_like(scale, dtype=parsed.zero_dtype)
    return _no_none(packed, scale, zero)


def _no_none(packed: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An op cannot return None."""
    return packed, scale, packed.new_empty(0, dtype=torch.uint8) if zero is None else zero


# ---- dequantize -------------------------------------------------------------------------------------------------------


def _dequantize_cpu(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed = _check_dequantize(packed, scale, zero, scheme, in_features, dtype)
    return reference.dequantize(packed, scale, zero, parsed, in_features, dtype)


def _dequantize_cuda(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed = _check_dequantize(packed, scale, zero, scheme, in_features, dtype)
    if packed.shape[0] == 0 or in_features == 0:
        return packed.new_empty((packed.shape[0], in_features), dtype=dtype)
    from qkernels.kernels import dequantize as kernel

    packed, scale, zero = packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    return kernel.dequantize(packed, scale, zero, parsed, in_features, dtype, choose.dequantize())


def _dequantize_fake(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((packed.shape[0], in_features), dtype=dtype)


def _check_dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Scheme:
    if dtype not in DTYPES:
        raise TypeError(f"dequantize: dtype must be float16, bfloat16 or float32, got {dtype}")
    return check_weight(packed, scale, zero, scheme, in_features, "dequantize")


# ---- matmul -----------------------------------------------------------------------------------------------------------


def _matmul_cpu(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    return reference.matmul(
        x, packed, scale, zero, bias, _check_matmul(x, packed, scale, zero, bias, scheme)
    )


def _matmul_cuda(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    return launch_matmul(x, packed, scale, zero, bias, _check_matmul(x, packed, scale, zero, bias, scheme))


def launch_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: Scheme
) -> Tensor:
    """matmul on a GPU, for arguments that have been checked."""
    out_features, in_features = packed.shape[0], x.shape[-1]
    tokens = x.reshape(-1, in_features) if in_features else x.new_empty((x.shape[:-1].numel(), 0))
    if tokens.shape[0] == 0 or out_features == 0 or in_features == 0:
        y = x.new_zeros((*x.shape[:-1], out_features))
        return y if bias is None else y + bias.to(x.dtype)
    from qkernels.kernels import matmul as kernel

    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    packed, scale, zero = packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = choose.matmul(tokens.shape[0], scheme, x.dtype)
    y = kernel.matmul(tokens, packed, scale, zero, bias, scheme, config)
    return y.view(*x.shape[:-1], out_features)


def _matmul_fake(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    check_activation(x, packed, bias)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class _MatmulFunction(torch.autograd.Function):
    """Gradients for x and bias; codes, scales and zeros are constants."""

    @staticmethod
    def forward(x, packed, scale, zero, bias, scheme):  # type: ignore[no-untyped-def, override]
        with torch._C._AutoDispatchBelowAutograd():
            return _matmul_op(x, packed, scale, zero, bias, scheme)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def, override]
        x, packed, scale, zero, bias, ctx.scheme = inputs
        ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        ctx.save_for_backward(packed, scale, zero)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ _dequantize_op(*ctx.saved_tensors, ctx.scheme, ctx.in_features, grad.dtype)
        if ctx.needs_input_grad[4]:
            bias_grad = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return x_grad, None, None, None, bias_grad, None


# ---- registration -----------------------------------------------------------------------------------------------------

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


def _matmul_autograd(
    keys: Any, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _MatmulFunction.apply(x, packed, scale, zero, bias, scheme)  # type: ignore[no-any-return]
    below = keys & _BELOW_AUTOGRAD
    # The dispatcher's next stop is known: where it is a device, go there directly.
    implementation = _DEVICE_MATMUL.get(below.highestPriorityTypeId())
    if implementation is not None:
        return implementation(x, packed, scale, zero, bias, scheme)
    return _matmul_op.redispatch(below, x, packed, scale, zero, bias, scheme)  # type: ignore[no-any-return]


_DEVICE_MATMUL = {torch._C.DispatchKey.CPU: _matmul_cpu, torch._C.DispatchKey.CUDA: _matmul_cuda}


def _constant_autograd(op: Any) -> Any:
    """Autograd kernel of an op whose results have no gradient."""

    def no_gradient(keys: Any, *args: Any) -> Any:
        return op.redispatch(keys & _BELOW_AUTOGRAD, *args)

    return no_gradient


def _matmul_autocast(
    keys: Any, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    """x and bias in autocast's dtype, as linear does; scales and offsets keep theirs."""
    device = x.device.type
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        dtype = torch.get_autocast_dtype(device)
        return _matmul_op(  # type: ignore[no-any-return]
            x.to(dtype), packed, scale, zero, None if bias is None else bias.to(dtype), scheme
        )


def _register() -> None:
    for name, cpu, cuda, fake in (
        ("quantize", _quantize_cpu, _quantize_cuda, _quantize_fake),
        ("dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
        ("matmul", _matmul_cpu, _matmul_cuda, _matmul_fake),
    ):
        _library.impl(name, cpu, "CPU")
        _library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"qkernels::{name}", fake, lib=_library)
    _library.impl("quantize", _constant_autograd(_quantize_op), "Autograd", with_keyset=True)
    _library.impl("dequantize", _constant_autograd(_dequantize_op), "Autograd", with_keyset=True)
    _library.impl("matmul", _matmul_autograd, "Autograd", with_keyset=True)
    _library.impl("matmul", _matmul_autocast, "AutocastCPU", with_keyset=True)
    _library.impl("matmul", _matmul_autocast, "AutocastCUDA", with_keyset=True)


_register()


# ---- Python fronts ----------------------------------------------------------------------------------------------------


def quantize(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scale, zero) of round-to-nearest quantization; zero is None for symmetric schemes.

    Args:
        w: (N, K) float16, bfloat16 or float32, finite.
        scheme: such as "w4g128".
    Returns:
        packed (N, words) int32, laid out as packing.py says; scale (groups, N), (1, 1) per tensor, in the scheme's scale
        dtype; zero like scale: uint8 zeros, float offsets, or None.
    Raises:
        ValueError, TypeError: w is not such a tensor, holds NaN or infinity, or a scale overflows its dtype.
    """
    packed, scale, zero = _quantize_op(w, scheme)
    return packed, scale, zero if zero.numel() or as_scheme(scheme).zero_dtype is not None else None


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weights (N, K) that the codes stand for: float32 arithmetic, rounded once to dtype."""
    return _dequantize_op(packed, scale, zero, scheme, in_features, dtype)  # type: ignore[no-any-return]


def matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    """y (..., N) = x (..., K) @ dequantize(...).T + bias, in x's dtype; x float16, bfloat16 or float32.

    The same as torch.ops.qkernels.matmul, but where nothing is watching (no gradient, tracing, autocast or mode) it
    calls the implementation directly, which saves a few microseconds.
    """
    if (
        type(x) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        if x.is_cpu:
            if not torch.is_autocast_enabled("cpu"):
                return _matmul_cpu(x, packed, scale, zero, bias, scheme)
        elif x.is_cuda and not torch.is_autocast_enabled("cuda"):
            return _matmul_cuda(x, packed, scale, zero, bias, scheme)
    return _matmul_op(x, packed, scale, zero, bias, scheme)  # type: ignore[no-any-return]
