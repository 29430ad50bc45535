"""The oracle of quantized activations: 8-bit codes of x, and their product with codes of weights, in plain torch.

    symmetric   x = scale[m] * code            code from -127 to 127
    affine      x = scale[m] * (code - zero[m])    code and zero from -128 to 127, and 0 is a code, exactly

    y[m, n] = x_scale[m] * sum_g scale[g, n] * T(m, n, g) + bias[n]
    T(m, n, g) = sum_{k in g} (code[m, k] - x_zero[m]) * (code[n, k] - zero[g, n])

Shapes    x (M, K) floating; code (M, K) int8; x_scale (M,) float32; x_zero (M,) int8; weights as in reference.py.
Numerics  T is an integer, and exact. The rest is float32, one operation after the other as they stand, the
          groups in order, and one rounding at the end: so where a row of weights has one scale, kernels that round as
          IEEE says give these very bits. A code is x * (levels / range) rounded to nearest, a tie to the even one; it
          is the nearest code to x within 2^-16 of a step (2^-15 if affine).
Hostile   A token that holds NaN or infinity has scale NaN and codes 0: its outputs are NaN, those of other tokens what
          they were. Tokens of zeros have codes 0. Ranges below 2^-119 are taken for that, so nothing is divided by 0.
          What a static scale does not reach gets the last code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import packing, reference
from qkernels.scheme import Activations, Scheme

SMALLEST_RANGE = 2.0**-119  # its reciprocal, times 127.5, and its 127.5th part are normal float32 numbers

# Products of 255 * 255 at most add up exactly in float32 while they are at most so many.
_EXACT_TERMS = 256
_CHUNK_WEIGHTS = 2**20


def quantize_activations(
    x: Tensor, how: Activations, static: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(code, scale, zero) of tokens x (M, K); zero is None where `how` is symmetric.

    static: (2,) float32, scale and zero of all tokens, where `how` is static. norm: (K,) weight of an RMSNorm, whose
    output, in float32, is quantized instead of x: x * rsqrt(mean(x^2) + eps) * norm.
    """
    x = x.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * norm.float()
    finite = torch.isfinite(x).all(1)
    x = torch.where(finite[:, None], x, 0.0)
    if how.static:
        assert static is not None
        scale, zero = static[0].expand(x.shape[0]), static[1].expand(x.shape[0])
        reciprocal = torch.ones_like(scale) / scale
    else:
        scale, reciprocal, zero = dynamic_range(x, how)
    code = torch.round(x * reciprocal[:, None])
    code = code if how.symmetric else code + zero[:, None]
    code = code.clamp(-127.0 if how.symmetric else -128.0, 127.0).to(torch.int8)
    # The codes of a token that is not finite, already 0 if symmetric.
    code = code if how.symmetric else torch.where(finite[:, None], code, 0)
    scale = torch.where(finite, scale, float("nan"))
    return code, scale, None if how.symmetric else zero.to(torch.int8)


def dynamic_range(x: Tensor, how: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, 1 / scale, zero) of rows of x (M, K) float32, finite, each (M,) float32; zeros where symmetric."""
    zeros = x.new_zeros(x.shape[0])
    low, high = torch.aminmax(x, dim=1) if x.shape[1] else (zeros, zeros)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # half of a range, so that it does not overflow
    size = torch.maximum(-low, high) if how.symmetric else high * 0.5 - low * 0.5
    size = size.clamp(min=SMALLEST_RANGE)
    levels = torch.full_like(size, how.levels)  # a tensor: torch multiplies by the reciprocal of a number on CUDA
    reciprocal = levels / size
    zero = zeros if how.symmetric else (torch.round(-low * reciprocal) - 128.0).clamp(-128.0, 127.0)
    return size / levels, reciprocal, zero


def dequantize_activations(code: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The tokens (M, K) float32 that codes stand for."""
    value = code.float()
    return (value if zero is None else value - zero[:, None].float()) * scale[:, None]


def matmul(
    code: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) in dtype, of activations (M, K) int8 and a packed weight (N, K)."""
    rows, in_features = packed.shape[0], code.shape[1]
    value = code.float() if x_zero is None else code.float() - x_zero[:, None].float()
    step = max(1, _CHUNK_WEIGHTS // max(1, in_features))
    outputs = []
    for start in range(0, rows, step):
        own = slice(start, start + step)
        beside = slice(None) if scheme.group_size == "tensor" else own
        w = packing.unpack(packed[own], scheme.bits, in_features).float()
        group_zero = None if zero is None else zero[:, beside]
        y = value.new_zeros((code.shape[0], w.shape[0]))
        column = 0
        for view, groups in reference.by_group(w, scheme):
            view.sub_(scheme.center if group_zero is None else reference.per_group(group_zero, groups))
            for group in range(groups.start, groups.stop):
                stop = column + view.shape[2]
                y += _integer_product(value[:, column:stop], w[:, column:stop]).float() * scale[group, beside].float()
                column = stop
        y *= x_scale[:, None]
        outputs.append(y if bias is None else y + bias[own].float())
    y = torch.cat(outputs, dim=-1) if outputs else value.new_zeros((code.shape[0], 0))
    return y.to(dtype)


def _integer_product(value: Tensor, w: Tensor) -> Tensor:
    """value @ w.T, int32, of matrices of small integers in float32."""
    total = value.new_zeros((value.shape[0], w.shape[0]), dtype=torch.int32)
    for start in range(0, value.shape[1], _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        total += (value[:, part] @ w[:, part].T).to(torch.int32)
    return total
