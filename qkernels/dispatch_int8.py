"""Products of codes on a GPU: activations are quantized, then multiplied, each by the launch that its shapes call for.

What only metadata decides is decided once for each kind of call, then remembered, as in dispatch.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qkernels import packing, reference_int8
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import DenseConfig, MatmulConfig

Quantized = tuple[Tensor, Tensor, "Tensor | None"]  # codes (..., words), scale (...), zero (...)
# x, static scale and zero, weight of a norm -> codes, scale, zero
Quantizer = Callable[[Tensor, "Tensor | None", "Tensor | None"], Quantized]
# codes, their scale and zero, packed, scale, zero, bias -> y
Product = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]

_KINDS = 4096


def quantize_activations(
    x: Tensor, scheme: Scheme, static: Tensor | None, norm: Tensor | None = None, eps: float = 0.0
) -> Quantized:
    """Of tokens x (..., K) on a GPU, none of them checked; see ops_int8.quantize_activations."""
    if x.numel() == 0:
        return packed_oracle(x, scheme, static, norm, eps)
    norm = None if norm is None else norm.contiguous()
    return quantizer(x, scheme, norm, eps)(x, static, norm)


def quantizer(x: Tensor, scheme: Scheme, norm: Tensor | None = None, eps: float = 0.0) -> Quantizer:
    """What quantizes x, and tokens like them in shape, strides, dtype and GPU, none empty."""
    regular, dtypes = regular_tokens(x), (x.dtype, None if norm is None else norm.dtype)
    quantize = _quantizer(regular.shape, regular.stride(), dtypes, x.get_device(), scheme, eps)
    return quantize if regular is x else lambda x, static, norm: quantize(regular_tokens(x), static, norm)


def forget() -> None:
    """Decide again; for tests."""
    _quantizer.cache_clear()
    _fused.cache_clear()


def packed_oracle(x: Tensor, scheme: Scheme, static: Tensor | None, norm: Tensor | None, eps: float) -> Quantized:
    """The oracle, with codes as ops have them."""
    assert scheme.activations is not None
    shape = x.shape[:-1]
    flat = x.reshape(shape.numel(), x.shape[-1])
    code, scale, zero = reference_int8.quantize_activations(flat, scheme.activations, static, norm, eps)
    codes = packing.pack_activations(code, scheme.bits)
    return codes.reshape(*shape, codes.shape[1]), scale.reshape(shape), None if zero is None else zero.reshape(shape)


def multiplied_oracle(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Likewise, of the product."""
    code = packing.unpack_activations(codes.reshape(x_scale.numel(), codes.shape[-1]), scheme.bits, in_features)
    flat_zero = None if x_zero is None else x_zero.reshape(-1)
    y = reference_int8.matmul(code, x_scale.reshape(-1), flat_zero, packed, scale, zero, bias, scheme, dtype)
    return y.reshape(*x_scale.shape, packed.shape[0])


def regular_tokens(x: Tensor) -> Tensor:
    """As kernels take tokens: contiguous, but for rows with gaps."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=_KINDS)
def _quantizer(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],  # of x and of a norm
    device: int,
    scheme: Scheme,
    eps: float,
) -> Quantizer:
    """For tokens of one kind: launches remember what they compiled, for one set of dtypes."""
    from qkernels.kernels import activations

    return activations.prepare(shape, stride, scheme, dtypes[1] is not None, eps, choose.activations(scheme, shape[-1]))


def product(
    codes: torch.Size,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    in_features: int,
    dtype: torch.dtype,
    config: MatmulConfig | DenseConfig,
) -> Product:
    """The product as a configuration says, for codes of a shape (..., words) and weights like these; y in dtype.

    Weights are as the kernels take them: packed and bias contiguous, rows of scale and zero dense.
    """
    if isinstance(config, DenseConfig):
        return functools.partial(_dense, dtype=dtype, config=config)
    weight = (packed.shape[0], packed.stride(0), scale.shape, scale.stride(), packed.get_device())
    dtypes = dtype, scale.dtype, None if bias is None else bias.dtype
    return _fused(codes, *weight, dtypes, scheme, in_features, config)


@functools.lru_cache(maxsize=_KINDS)
def _fused(
    codes: torch.Size,
    out_features: int,
    stride: int,
    scale_shape: torch.Size,
    scale_stride: tuple[int, ...],
    device: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],  # of y, scale and bias
    scheme: Scheme,
    in_features: int,
    config: MatmulConfig,
) -> Product:
    """For operands of one kind: launches remember what they compiled, for one set of dtypes."""
    from qkernels.kernels import matmul_int8 as kernel

    scale = scale_shape, scale_stride
    return kernel.prepare(codes, out_features, stride, *scale, dtypes, scheme, in_features, config)


def _dense(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: DenseConfig,
) -> Tensor:
    """Some rows of 8-bit symmetric weights at a time, as int8 in a workspace, by cuBLAS: see tables.fits.

    Packed bytes lie in the order of activations already. cuBLAS wants multiples of 8 rows: what is in those that fill
    the workspace up is never read.
    """
    from qkernels.kernels.scale_sums import scale_sums

    value = codes.reshape(-1, codes.shape[-1]).view(torch.int8)
    weights = packed.view(torch.int8)
    out_features = packed.shape[0]
    most = min(config.rows, out_features)
    workspace = weights.new_empty((-(-most // 8) * 8, weights.shape[1]))
    y = codes.new_empty((value.shape[0], out_features), dtype=dtype)
    for start in range(0, out_features, most):
        rows = slice(start, min(start + most, out_features))
        count = rows.stop - rows.start
        torch.bitwise_xor(weights[rows], -128, out=workspace[:count])
        sums = torch._int_mm(value, workspace[: -(-count // 8) * 8].T)
        own = scale if scale.shape[1] == 1 else scale[:, rows]
        scale_sums(sums, x_scale.reshape(-1), own, None if bias is None else bias[rows], y[:, rows])
    return y.view(*codes.shape[:-1], out_features)
