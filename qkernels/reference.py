"""The oracle: quantize, dequantize and matmul in plain torch. It defines what every op means, and is the CPU path.

Shapes    w (N, K) floating; scale (groups, N), or (1, 1) per tensor; zero like scale; x (..., K); y (..., N).
Numerics  float32 throughout, one rounding at the end. In exact arithmetic |w - w^| <= scale / 2 for every weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qkernels import packing
from qkernels.scheme import Scheme

# matmul dequantizes this many weights at a time: few enough to stay in a CPU's cache, and never the whole matrix.
_CHUNK_WEIGHTS = 2**20


def quantize(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed, scale, zero) of round-to-nearest quantization; zero holds offsets for "offset", None for "symmetric".

    Raises:
        ValueError: w holds NaN or infinity, or a scale or an offset does not fit scheme.scale_dtype.
    """
    low, high = group_range(w, scheme)
    scale, zero = scale_and_zero(low, high, scheme)
    return packing.pack(encode(w, scale, zero, scheme), scheme.bits), scale, zero


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weights (N, K) that the codes stand for, worked out in float32 and rounded once to dtype."""
    return decode(packing.unpack(packed, scheme.bits, in_features), scale, zero, scheme).to(dtype)


def matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: Scheme
) -> Tensor:
    """y = x @ dequantize(...).T + bias, accumulated in float32 and rounded once to x.dtype."""
    rows, in_features = packed.shape[0], x.shape[-1]
    x32 = x.float()
    step = max(1, _CHUNK_WEIGHTS // max(1, in_features))
    outputs = []
    for start in range(0, rows, step):
        stop = start + step
        per_row = slice(start, stop) if scheme.group_size != "tensor" else slice(None)
        w = dequantize(
            packed[start:stop],
            scale[:, per_row],
            None if zero is None else zero[:, per_row],
            scheme,
            in_features,
            torch.float32,
        )
        outputs.append(torch.nn.functional.linear(x32, w, None if bias is None else bias[start:stop].float()))
    y = torch.cat(outputs, dim=-1) if outputs else x32.new_empty((*x.shape[:-1], 0))
    return y.to(x.dtype)


# The steps, each a rule that kernels, calibration and tests share.


def group_range(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(lowest, highest) weight of each group, float32, shaped like the scales.

    Raises:
        ValueError: w holds NaN or infinity; the first index is named.
    """
    rows, in_features = w.shape
    shape = scheme.scale_shape(rows, in_features)
    if w.numel() == 0:
        return w.new_zeros(shape, dtype=torch.float32), w.new_zeros(shape, dtype=torch.float32)
    if scheme.group_size == "tensor":
        low, high = (bound.reshape(1, 1) for bound in torch.aminmax(w))
    else:
        bounds = [torch.aminmax(view, dim=-1) for view, _ in by_group(w, scheme)]
        low = torch.cat([bound.min for bound in bounds], dim=1).T
        high = torch.cat([bound.max for bound in bounds], dim=1).T
    low, high = low.float().contiguous(), high.float().contiguous()
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise non_finite_error(w)
    return low, high


def non_finite_error(w: Tensor) -> ValueError:
    """The error for weights that hold NaN or infinity, naming the first."""
    index = tuple(torch.nonzero(~torch.isfinite(w))[0].tolist())
    return ValueError(f"w must be finite, got {w[index].item()} at index {index}")


def scale_and_zero(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros or offsets, for groups that reach from low to high (float32, shaped like the scales).

    Scales are rounded *up* to their storage dtype, and offsets down, so that no weight is clipped.

    Raises:
        ValueError: a scale or an offset does not fit scheme.scale_dtype.
    """
    dtype = scheme.scale_dtype
    if scheme.value_map == "symmetric":
        high = torch.maximum(-low, high)
        low, steps = torch.zeros_like(high), scheme.center - 1
    elif scheme.value_map == "affine":
        low, high, steps = low.clamp(max=0.0), high.clamp(min=0.0), scheme.code_max  # zero is a code, exactly
    else:
        stored = _round_toward(low, dtype, up=False)
        check_fits("offset", stored, scheme)
        low, steps = stored.float(), scheme.code_max
    # Halves, because high - low may overflow. A tensor of steps, because torch multiplies by the reciprocal of a number
    # on CUDA, which rounds twice.
    exact = (high * 0.5 - low * 0.5) / torch.full_like(high, steps) * 2.0
    scale = torch.maximum(_round_toward(exact, dtype, up=True), _smallest_positive(dtype, exact))
    scale = torch.where(high > low, scale, torch.ones_like(scale))
    check_fits("scale", scale, scheme)
    if scheme.value_map == "symmetric":
        return scale, None
    if scheme.value_map == "affine":
        return scale, torch.round(-low / scale.float()).clamp(0, scheme.code_max).to(torch.uint8)
    return scale, stored


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes (N, K) uint8: for each weight the nearest level of its group; halfway goes to the even step."""
    code = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for (view, groups), (out, _) in zip(by_group(w, scheme), by_group(code, scheme), strict=True):
        out.copy_(nearest(view.float(), per_group(scale, groups), _base(zero, groups, scheme), scheme))
    return code


def decode(code: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Weights (N, K) float32 of codes: scale * (code - zero), or scale * code + offset with two roundings."""
    w = code.float()
    for view, groups in by_group(w, scheme):
        value_(view, per_group(scale, groups), _base(zero, groups, scheme), scheme)
    return w


def nearest(w: Tensor, step: Tensor, base: Tensor | int, scheme: Scheme) -> Tensor:
    """Nearest codes, as float32, of float32 weights that share steps (scales) and bases (zeros or offsets)."""
    level = (w - base).div_(step).round_() if scheme.value_map == "offset" else w.div(step).round_().add_(base)
    return level.clamp_(scheme.code_min, scheme.code_max)


def value_(code: Tensor, step: Tensor, base: Tensor | int, scheme: Scheme) -> Tensor:
    """The weights of float32 codes, in place; steps and bases as of `nearest`."""
    return code.mul_(step).add_(base) if scheme.value_map == "offset" else code.sub_(base).mul_(step)


def by_group(matrix: Tensor, scheme: Scheme) -> Iterator[tuple[Tensor, slice]]:
    """Views (N, groups, group length) of a contiguous (N, K), with the groups they are: whole ones, a shorter last."""
    in_features = matrix.shape[1]
    length = max(1, scheme.group_length(in_features))
    whole = in_features // length
    if whole:
        yield matrix[:, : whole * length].unflatten(1, (whole, length)), slice(0, whole)
    if in_features > whole * length:
        yield matrix[:, whole * length :].unsqueeze(1), slice(whole, whole + 1)


def per_group(values: Tensor, groups: slice) -> Tensor:
    """Rows `groups` of a (groups, N) tensor as float32 (N, groups, 1), to meet the views of by_group."""
    return values[groups].T.float().unsqueeze(-1)


def _base(zero: Tensor | None, groups: slice, scheme: Scheme) -> Tensor | int:
    """Zeros or offsets of groups, like per_group; the one zero of a symmetric scheme."""
    return scheme.center if zero is None else per_group(zero, groups)


def _round_toward(value: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """float32 -> the nearest dtype value that is not below (up) or not above (down) it."""
    if dtype is torch.float32:
        return value
    rounded = value.to(dtype)
    missed = rounded.float() < value if up else rounded.float() > value
    # Stepping the bit pattern by one steps the value by one place: away from zero if +1, toward zero if -1.
    bits = rounded.view(torch.int16)
    away = (bits >= 0) if up else (bits < 0)
    return torch.where(missed, bits + torch.where(away, 1, -1).to(torch.int16), bits).view(dtype)


def _smallest_positive(dtype: torch.dtype, like: Tensor) -> Tensor:
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    return torch.ones((), dtype=bits, device=like.device).view(dtype)


def check_fits(what: str, values: Tensor, scheme: Scheme) -> None:
    """Raise ValueError, naming the first, if values of groups (scales or offsets) overflowed their dtype."""
    if not torch.isfinite(values).all():
        group, row = torch.nonzero(~torch.isfinite(values))[0].tolist()
        raise ValueError(
            f"{what} of group {group}, row {row} does not fit {scheme.scale_dtype} "
            f"(largest {torch.finfo(scheme.scale_dtype).max:g}); choose -bf16 or -fp32 in scheme {str(scheme)!r}"
        )
