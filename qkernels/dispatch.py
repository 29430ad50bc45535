"""The matmul op on a GPU: what only metadata decides is decided once for each kind of call, then remembered.

A kind is the scheme and, of each tensor, its shape, strides, dtype and GPU. For a kind that is new, arguments are
checked, a configuration is chosen and a launch is prepared; a later call costs a look into a dictionary, the memory of
the result, and the launch. In a decode step the host has a few microseconds for a product, and this is most of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels import dispatch_int8, packing
from qkernels.checks import check_activation, check_codes, check_static, check_weight
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import device_of

# Of a product of codes: codes, their scale and zero, then packed, scale, zero and bias of a weight.
Operands = tuple[Tensor, Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", "Tensor | None"]
# (x, packed, scale, zero, bias) -> y, for tensors of one kind; with static activations, their scale and zero come last
Call = Callable[..., Tensor]

_calls: dict[tuple[Any, ...], Call] = {}
_MOST_CALLS = 8192  # every other number of tokens is a kind of its own; then all are decided again


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
    """y (..., N) = x (..., K) @ dequantize(...).T + bias on a GPU (or in Triton's interpreter); see ops.matmul."""
    kind = (
        scheme, in_features,
        x.shape, x.stride(), x.dtype, x.get_device(),
        packed.shape, packed.stride(), packed.dtype, packed.get_device(),
        scale.shape, scale.stride(), scale.dtype, scale.get_device(),
        None if zero is None else (zero.shape, zero.stride(), zero.dtype, zero.get_device()),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.get_device()),
        None if activation is None else (activation.shape, activation.dtype, activation.get_device()),
    )  # fmt: skip
    call = _calls.get(kind)
    if call is None:
        call = _remember(kind, _decide(x, packed, scale, zero, bias, scheme, in_features, activation))
    if activation is None:
        return call(x, packed, scale, zero, bias)
    return call(x, packed, scale, zero, bias, activation)


def matmul_codes(
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
    """y (..., N) in dtype, of codes (..., words) on a GPU; see ops_int8.matmul."""
    kind = (  # dtype stands where a kind of matmul has a shape
        scheme, in_features, dtype,
        codes.shape, codes.stride(), codes.dtype, codes.get_device(),
        x_scale.shape, x_scale.stride(), x_scale.dtype, x_scale.get_device(),
        None if x_zero is None else (x_zero.shape, x_zero.stride(), x_zero.dtype, x_zero.get_device()),
        packed.shape, packed.stride(), packed.dtype, packed.get_device(),
        scale.shape, scale.stride(), scale.dtype, scale.get_device(),
        None if zero is None else (zero.shape, zero.stride(), zero.dtype, zero.get_device()),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.get_device()),
    )  # fmt: skip
    operands = codes, x_scale, x_zero, packed, scale, zero, bias
    call = _calls.get(kind)
    if call is None:
        call = _remember(kind, _decide_codes(operands, scheme, in_features, dtype))
    return call(*operands)


def _remember(kind: tuple[Any, ...], call: Call) -> Call:
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[kind] = call
    return call


def forget() -> None:
    """Decide again, as after a table of configurations has changed."""
    _calls.clear()


def _decide(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    in_features: int,
    activation: Tensor | None,
) -> Call:
    parsed = check_weight(packed, scale, zero, scheme, in_features)
    check_activation(x, packed, bias, in_features)
    check_static(activation, parsed, packed.device)
    out_features, tokens = packed.shape[0], x.shape[:-1].numel()
    if tokens == 0 or out_features == 0 or in_features == 0:
        return _empty
    config = choose.matmul(tokens, out_features, in_features, parsed, x.dtype, device_of(x.get_device()))
    if parsed.activations is not None:
        return _of_codes(x, packed, scale, zero, bias, parsed, config)
    if isinstance(config, DenseConfig):
        return functools.partial(_dense, scheme=parsed, config=config)
    from qkernels.kernels import matmul as kernel

    given = x, packed, scale, zero, bias
    regular = _regular(*given)
    call = kernel.prepare(*regular, parsed, config)
    if all(a is b for a, b in zip(regular, given, strict=True)):
        return call
    return lambda *tensors: call(*_regular(*tensors))


def _of_codes(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: MatmulConfig | DenseConfig,
) -> Call:
    """Quantizes x, then multiplies codes."""
    codes = torch.Size((*x.shape[:-1], packing.activation_words(scheme.bits, x.shape[-1])))
    given = packed, scale, zero, bias
    regular = regular_weight(*given)
    quantize = dispatch_int8.quantizer(x, scheme)
    product = dispatch_int8.product(codes, *regular, scheme, x.shape[-1], x.dtype, config)
    as_given = all(a is b for a, b in zip(regular, given, strict=True))

    def call(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        activation: Tensor | None = None,
    ) -> Tensor:
        weight = (packed, scale, zero, bias) if as_given else regular_weight(packed, scale, zero, bias)
        codes, x_scale, x_zero = quantize(x, activation, None)
        return product(codes, x_scale, x_zero, *weight)

    return call


def _decide_codes(operands: Operands, scheme: str, in_features: int, dtype: torch.dtype) -> Call:
    codes, x_scale, x_zero, packed, scale, zero, bias = operands
    parsed = check_weight(packed, scale, zero, scheme, in_features)
    check_codes(codes, x_scale, x_zero, packed, bias, parsed, in_features, dtype)
    if codes.numel() == 0 or packed.numel() == 0:
        return functools.partial(dispatch_int8.multiplied_oracle, scheme=parsed, in_features=in_features, dtype=dtype)
    device = device_of(codes.get_device())
    config = choose.matmul(x_scale.numel(), packed.shape[0], in_features, parsed, dtype, device)
    regular = _regular_codes(operands)
    product = dispatch_int8.product(codes.shape, *regular[3:], parsed, in_features, dtype, config)
    if all(a is b for a, b in zip(regular, operands, strict=True)):
        return product
    return lambda *tensors: product(*_regular_codes(tensors))


def _empty(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    activation: Tensor | None = None,
) -> Tensor:
    y = x.new_zeros((*x.shape[:-1], packed.shape[0]))
    return y if bias is None else y + bias.to(x.dtype)


def _regular(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the kernels take them, copied where they are not: x, packed and bias dense, but for rows of x with gaps."""
    return dispatch_int8.regular_tokens(x), *regular_weight(packed, scale, zero, bias)


def _regular_codes(operands: Operands) -> Operands:
    """Likewise, of codes: all dense."""
    codes, x_scale, x_zero = operands[:3]
    tokens = codes.contiguous(), x_scale.contiguous(), None if x_zero is None else x_zero.contiguous()
    return *tokens, *regular_weight(*operands[3:])


def regular_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Likewise. Scales and zeros are dense along N; those of some rows of a larger weight, scale[:, a:b], may stay."""
    dense = scale.is_contiguous() and (zero is None or zero.is_contiguous())
    if not dense and not (scale.stride(1) == 1 and (zero is None or zero.stride() == scale.stride())):
        scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    return packed.contiguous(), scale, zero, None if bias is None else bias.contiguous()


def multiply(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: MatmulConfig | DenseConfig,
) -> Tensor:
    """y as a configuration says: unchecked, nothing remembered, all tensors as `_regular` gives them and none empty."""
    if scheme.activations is not None:
        return _of_codes(x, packed, scale, zero, bias, scheme, config)(x, packed, scale, zero, bias)
    if isinstance(config, DenseConfig):
        return _dense(x, packed, scale, zero, bias, scheme, config)
    from qkernels.kernels import matmul as kernel

    return kernel.matmul(x, packed, scale, zero, bias, scheme, config)


def _dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    config: DenseConfig,
) -> Tensor:
    """Some rows of the weight at a time, dequantized to x's dtype into one workspace, by torch's own product."""
    from qkernels.kernels import dequantize

    in_features, out_features = x.shape[-1], packed.shape[0]
    tokens, packed, scale, zero, bias = _regular(x.reshape(-1, in_features), packed, scale, zero, bias)
    bias = None if bias is None else bias.to(x.dtype)
    workspace = x.new_empty((min(config.rows, out_features), in_features))
    y = x.new_empty((tokens.shape[0], out_features))
    tiles = choose.dequantize(x.dtype)
    for start in range(0, out_features, config.rows):
        rows = slice(start, min(start + config.rows, out_features))
        w = workspace[: rows.stop - rows.start]
        row_scale = scale if scale.shape[1] == 1 else scale[:, rows]
        row_zero = zero if zero is None or zero.shape[1] == 1 else zero[:, rows]
        dequantize.dequantize(packed[rows], row_scale, row_zero, scheme, in_features, x.dtype, tiles, out=w)
        if bias is None:
            torch.mm(tokens, w.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], tokens, w.T, out=y[:, rows])
    return y.view(*x.shape[:-1], out_features)
