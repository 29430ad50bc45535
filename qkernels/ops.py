"""The torch.library ops: schema, fake, CPU, CUDA, autocast and autograd of each, in one place.

    qkernels::quantize    w (N, K)                     -> packed, scale, zero
    qkernels::dequantize  packed, scale, zero          -> w (N, K)
    qkernels::matmul      x (..., K), packed, ...      -> y (..., N) = x @ w.T + bias

A scheme with quantized activations makes matmul quantize x first: ops_int8.py has the two steps as ops of their own.

CPU is the oracle of reference.py and reference_int8.py; CUDA is Triton. A scheme travels as its string. `zero` holds
integer zeros or float offsets; symmetric schemes have none: None as an argument, an empty tensor as a result.

The ops are defined with torch.library.Library and have an autograd kernel of their own, because host time per call is
part of a decode step: torch.library.custom_op and register_autograd each add several microseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkernels import dispatch, packing, reference, reference_int8
from qkernels.checks import DTYPES, check_activation, check_dequantize, check_quantize, check_static, check_weight
from qkernels.scheme import as_scheme
from qkernels.tuning import choose

_library = torch.library.Library("qkernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("quantize(Tensor w, str scheme) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    "dequantize(Tensor packed, Tensor scale, Tensor? zero, str scheme, SymInt in_features, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, str scheme, SymInt in_features,"
    " Tensor? activation=None) -> Tensor",
    tags=_TAGS,
)
_quantize_op = torch.ops.qkernels.quantize.default
_dequantize_op = torch.ops.qkernels.dequantize.default
_matmul_op = torch.ops.qkernels.matmul.default


# ---- quantize ----


def _quantize_cpu(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    return _no_none(*reference.quantize(w, check_quantize(w, scheme)))


def _quantize_cuda(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = check_quantize(w, scheme)
    if w.numel() == 0:
        return _no_none(*reference.quantize(w, parsed))
    from qkernels.kernels import quantize as kernel

    w = w if w.stride(-1) == 1 else w.contiguous()
    config = choose.quantize(parsed, w.shape[1])
    if choose.group_fits_tile(parsed, w.shape[1]):
        packed, scale, zero = kernel.quantize(w, parsed, config)
        if not torch.isfinite(scale).all():
            reference.group_range(w, parsed)  # raises for NaN and infinity in w
            if parsed.value_map == "offset" and zero is not None:
                reference.check_fits("offset", zero, parsed)
            reference.check_fits("scale", scale, parsed)
    else:
        scale, zero = reference.scale_and_zero(*reference.group_range(w, parsed), parsed)
        packed = kernel.encode(w, scale, zero, parsed, config)
    return _no_none(packed, scale, zero)


def _quantize_fake(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = check_quantize(w, scheme)
    out_features, in_features = w.shape
    packed = w.new_empty((out_features, packing.packed_words(parsed.bits, in_features)), dtype=torch.int32)
    scale = w.new_empty(parsed.scale_shape(out_features, in_features), dtype=parsed.scale_dtype)
    zero = None if parsed.zero_dtype is None else torch.empty_like(scale, dtype=parsed.zero_dtype)
    return _no_none(packed, scale, zero)


def _no_none(packed: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An op cannot return None."""
    return packed, scale, packed.new_empty(0, dtype=torch.uint8) if zero is None else zero


# ---- dequantize ----


def _dequantize_cpu(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed = check_dequantize(packed, scale, zero, scheme, in_features, dtype)
    return reference.dequantize(packed, scale, zero, parsed, in_features, dtype)


def _dequantize_cuda(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed = check_dequantize(packed, scale, zero, scheme, in_features, dtype)
    if packed.shape[0] == 0 or in_features == 0:
        return packed.new_empty((packed.shape[0], in_features), dtype=dtype)
    from qkernels.kernels import dequantize as kernel

    packed, scale, zero = packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    return kernel.dequantize(packed, scale, zero, parsed, in_features, dtype, choose.dequantize(dtype))


def _dequantize_fake(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((packed.shape[0], in_features), dtype=dtype)


# ---- matmul ----


def matmul_cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    activation: Tensor | None = None,
) -> Tensor:
    """The op on a CPU."""
    parsed = check_weight(packed, scale, zero, scheme, in_features)
    check_activation(x, packed, bias, in_features)
    check_static(activation, parsed, packed.device)
    if parsed.activations is None:
        return reference.matmul(x, packed, scale, zero, bias, parsed)
    tokens = x.reshape(x.shape[:-1].numel(), in_features)
    codes = reference_int8.quantize_activations(tokens, parsed.activations, activation)
    y = reference_int8.matmul(*codes, packed, scale, zero, bias, parsed, x.dtype)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def _matmul_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    activation: Tensor | None = None,
) -> Tensor:
    check_activation(x, packed, bias, in_features)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class _MatmulFunction(torch.autograd.Function):
    """Gradients for x and bias; codes, scales and zeros are constants, and so is what rounds x (straight-through)."""

    @staticmethod
    def forward(x, packed, scale, zero, bias, scheme, in_features, activation=None):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return _matmul_op(x, packed, scale, zero, bias, scheme, in_features, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, packed, scale, zero, bias, ctx.scheme, ctx.in_features = inputs[:7]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, scale, zero)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ _dequantize_op(*ctx.saved_tensors, ctx.scheme, ctx.in_features, grad.dtype)
        if ctx.needs_input_grad[4]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return x_grad, None, None, None, bias_grad, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        raise NotImplementedError("qkernels::matmul has no forward-mode derivative; use reverse mode")


# ---- registration ----


def _direct_matmul(x: Tensor) -> Callable[..., Tensor] | None:
    """What the dispatcher, below autograd, would end up calling for x; None where a mode or a subclass has a say."""
    if type(x) is Tensor and not _dispatch_modes() and _functorch_level() is None:
        if x.is_cpu:
            return matmul_cpu
        if x.is_cuda:
            return dispatch.matmul
    return None


_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack


def _needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # then x may have a tangent, whether or not gradients are recorded
        return True
    return _grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


_grad_enabled = torch.is_grad_enabled


def _matmul_autograd(*args: Any) -> Tensor:
    x, bias = args[0], args[4]
    if _needs_gradient(x, bias):
        return _MatmulFunction.apply(*args)
    if direct := _direct_matmul(x):
        return direct(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _matmul_op(*args)


def constant_autograd(op: Any) -> Any:
    """Autograd kernel of an op whose results have no gradient."""

    def no_gradient(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return no_gradient


def without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """Ops inside are those outside of autocast: what is float32 in the oracle stays it."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def as_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as linear takes it; what is no activation is left to be refused."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in DTYPES else x


def _matmul_autocast(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    """x and bias in autocast's dtype; scales and offsets keep theirs."""
    with without_autocast(x.device.type):
        return _matmul_op(as_autocast(x), packed, scale, zero, None if bias is None else as_autocast(bias), *rest)


def _register() -> None:
    for name, cpu, cuda, fake in (
        ("quantize", _quantize_cpu, _quantize_cuda, _quantize_fake),
        ("dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
        ("matmul", matmul_cpu, dispatch.matmul, _matmul_fake),
    ):
        _library.impl(name, cpu, "CPU")
        _library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"qkernels::{name}", fake, lib=_library)
    _library.impl("quantize", constant_autograd(_quantize_op), "Autograd")
    _library.impl("dequantize", constant_autograd(_dequantize_op), "Autograd")
    _library.impl("matmul", _matmul_autograd, "Autograd")
    _library.impl("matmul", _matmul_autocast, "AutocastCPU")
    _library.impl("matmul", _matmul_autocast, "AutocastCUDA")


_register()


# ---- Python fronts ----


def quantize(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scale, zero) of round-to-nearest quantization; zero is None for symmetric schemes.

    Args:
        w: (N, K) float16, bfloat16 or float32, finite.
        scheme: such as "w4g128".
    Returns:
        packed (N, words) int32, laid out as packing.py says; scale (groups, N), (1, 1) per tensor, in the scheme's
        scale dtype; zero like scale: uint8 zeros, float offsets, or None.
    Raises:
        ValueError, TypeError: w is not such a tensor, holds NaN or infinity, or a scale overflows its dtype.
    """
    packed, scale, zero = _quantize_op(w, scheme)
    return packed, scale, zero if zero.numel() or as_scheme(scheme).zero_dtype is not None else None


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weights (N, K) that the codes stand for: float32 arithmetic, rounded once to dtype."""
    return _dequantize_op(packed, scale, zero, scheme, in_features, dtype)


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    activation: Tensor | None = None,
) -> Tensor:
    """y (..., N) = x (..., K) @ dequantize(...).T + bias, in x's dtype; x float16, bfloat16 or float32.

    Where the scheme quantizes activations x is what its codes stand for; `activation` (2,) float32 is their scale and
    zero, where these are static. NaN or infinity in a token then makes NaN of all its outputs.

    The same as torch.ops.qkernels.matmul, but where nothing is watching (no gradient, tracing, autocast or mode) it
    calls the implementation directly, which saves a few microseconds.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than the others and the scheme ask for. That
            integer zeros are codes, at most 2**bits - 1, is not checked here, but where a QTensor is made.
    """
    if not torch.compiler.is_compiling() and not _needs_gradient(x, bias) and not _any_autocast():
        direct = _direct_matmul(x)
        if direct is not None:
            return direct(x, packed, scale, zero, bias, scheme, in_features, activation)
    return _matmul_op(x, packed, scale, zero, bias, scheme, in_features, activation)


_any_autocast = torch._C._is_any_autocast_enabled


def rows(
    packed: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, *, per_tensor: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """packed, scale and zero of rows of a weight, in the order of a (rows,) integer index.

    per_tensor: whether the scale is one for all rows. (A scheme's string tells, but torch.compile cannot parse it.)
    """
    if not per_tensor:
        scale = scale.index_select(1, index)
        zero = None if zero is None else zero.index_select(1, index)
    return packed.index_select(0, index), scale, zero
