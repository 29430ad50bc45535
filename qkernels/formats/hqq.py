"""HQQ weights, as HQQLinear.state_dict stores them, read exactly.

A weight w (N, K) is cut into groups of g along K, its codes are u (N K / g, g), and each group has a float scale and a
float zero:

    w = (u - zero) scale

    W_q     u packed in planes along its rows: the first of the planes is the highest bits of a byte, the last the
            lowest. Packings 8bit_u8, 4bit_u8, 2bit_u8 and 1bit_u8 have 1, 2, 4 and 8 planes; 3bit_32 has ten in each
            int32, rows padded. view_as_float: the same bytes called floats.
    scale, zero          (N K / g, 1) of the compute dtype; (), where channel_wise is false: one for all
    shape                (N, K)
    nbits, group_size, axis, channel_wise, packing, unpack_view_dtype, view_as_float, compute_dtype, quant_scale,
    quant_zero, offload_meta     small tensors: numbers, 0 or 1, and ASCII, which is compared and never evaluated

What the values are:

    every zero is a whole number that is a code      affine, scales as stored: hqq's own values in any compute dtype
    float16 and bfloat16 otherwise                   offset = -zero scale, in float32

A product of two 16-bit floats is exact in float32, and so is u scale: u scale + offset is rounded once and is the real
value of the definition, correctly rounded to float32. hqq has the same values in float32 wherever u - zero is exact
there. Tried for all zeros and codes: in float16 it is for zeros of 2^-10 and more with codes of 4 bits, 2^-6 with 8; in
bfloat16 for zeros below 2^24 of 2^-13 and more with 4 bits, 2^-9 with 8. In 16 bits hqq rounds u - zero, then the
product, where here the float32 value is rounded: they may differ by a rounding of u - zero.

With float32 scales and zeros that are no codes, the products are rounded. Such a weight is read if for each of the 2^b
codes of each group u scale + offset has the bits that hqq gives in float32, which is rare; else it is refused.

Groups of other axes (axis 0), groups that straddle rows, and scales or zeros that are themselves quantized are refused.

Source    the package hqq: core/quantize.py, core/bitpack.py and core/utils.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import DTYPES
from qkernels.formats.reader import Reader, field, part, weight
from qkernels.scheme import GroupSize, ValueMap
from qkernels.tensor import QTensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
_PLANES = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
_LONGEST_TEXT = 32


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """How weights of HQQ are read; everything is in the tensors of each, so neither argument says anything more.

    Raises:
        ValueError: config's quant_method is not "hqq".
    """
    field(config, "quant_method", ("hqq",), "hqq")
    own = (
        "scale", "zero", "shape", "nbits", "group_size", "axis", "channel_wise", "packing", "unpack_view_dtype",
        "view_as_float", "compute_dtype", "quant_scale", "quant_zero", "offload_meta", "optimize", "round_zero",
        "encoded_state_dict", "stores_quant_config", "zero_scale", "scale_q", "zero_q", "meta_scale", "meta_zero",
    )  # fmt: skip
    return Reader("W_q", own, _decode)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a weight's small tensors say."""

    bits: int
    packing: str
    shape: tuple[int, int]  # (N, K)
    group_size: GroupSize
    rows: int  # of u
    columns: int
    as_float: bool


def _decode(name: str, parts: Mapping[str, Tensor]) -> QTensor:
    layout = _layout(parts)
    code = _codes(parts, layout).reshape(layout.shape)
    scale, zero = part(parts, "scale"), part(parts, "zero")
    dtype = scale.dtype
    if "compute_dtype" in parts:
        accepted = tuple(str(dtype) for dtype in DTYPES)
        dtype = DTYPES[accepted.index(_text(parts, "compute_dtype", accepted))]
    if layout.group_size == "tensor":
        shapes: tuple[int, ...] = ()
        groups, out_features = 1, 1
    else:
        shapes = (layout.rows, 1)
        out_features = layout.shape[0]
        groups = layout.rows // out_features
    scale, zero = (
        part(parts, what, shapes, (dtype,)).reshape(out_features, groups).T.contiguous() for what in ("scale", "zero")
    )
    value_map, scale, zero = _values(scale, zero, layout.bits)
    return weight(code, scale, zero, bits=layout.bits, group_size=layout.group_size, value_map=value_map)


def _layout(parts: Mapping[str, Tensor]) -> _Layout:
    for name in ("quant_scale", "quant_zero", "offload_meta"):
        if _flag(parts, name, False):
            raise ValueError(f"{name} must be 0: scales and zeros that are quantized or moved elsewhere are not read")
    nbits = _number(parts, "nbits")
    bits = 2 if abs(nbits - 1.58) < 1e-6 else nbits  # three levels, in two bits
    if bits not in _PACKING:
        raise ValueError(f"nbits must be one of {', '.join(map(str, _PACKING))} or 1.58, got {nbits}")
    bits = int(bits)
    packing = _text(parts, "packing", (_PACKING[bits],))
    if "unpack_view_dtype" in parts:
        _text(parts, "unpack_view_dtype", (str(_word(packing)),))
    out_features, in_features = _shape(parts)
    as_float = _flag(parts, "view_as_float", False)
    if not _flag(parts, "channel_wise", True):
        return _Layout(bits, packing, (out_features, in_features), "tensor", out_features, in_features, as_float)
    axis, group_size = _number(parts, "axis"), _number(parts, "group_size")
    if axis != 1:
        found = "the groups of axis 0 do not lie along K" if axis == 0 else f"got {axis}"
        raise ValueError(f"axis must be 1: {found}")
    if group_size != int(group_size) or group_size < 1 or in_features % int(group_size):
        raise ValueError(f"group_size must divide the {in_features} input features, got {group_size}")
    group_size = int(group_size)
    rows = out_features * (in_features // group_size)
    return _Layout(bits, packing, (out_features, in_features), group_size, rows, group_size, as_float)


def _codes(parts: Mapping[str, Tensor], layout: _Layout) -> Tensor:
    """u (rows, columns) uint8."""
    planes, word = _PLANES[layout.packing], _word(layout.packing)
    packed = part(parts, "W_q", dtypes=DTYPES if layout.as_float else (word,))
    if layout.as_float:
        if packed.ndim != 2 or packed.shape[1] * packed.itemsize != layout.columns * word.itemsize:
            raise ValueError(
                f"W_q must have rows of {layout.columns * word.itemsize} bytes, got {tuple(packed.shape)} "
                f"{str(packed.dtype).removeprefix('torch.')}"
            )
        packed = packed.contiguous().view(word)
    if layout.rows % planes and word is torch.uint8:
        raise ValueError(f"shape and group_size give {layout.rows} rows of codes, which are not {planes} equal planes")
    if tuple(packed.shape) != (shape := (-(-layout.rows // planes), layout.columns)):
        raise ValueError(f"W_q must have shape {shape}, got {tuple(packed.shape)}")
    width = 3 if planes == 10 else 8 // planes
    shifts = range(width * (planes - 1), -1, -width)
    return torch.cat([((packed >> shift) & (2**width - 1)).to(torch.uint8) for shift in shifts])[: layout.rows]


def _values(scale: Tensor, zero: Tensor, bits: int) -> tuple[ValueMap, Tensor, Tensor]:
    """(value map, scales, zeros or offsets), each (groups, N), of the same values as w = (u - zero) scale."""
    for what, values in (("scale", scale), ("zero", zero)):
        if not torch.isfinite(values).all():
            raise ValueError(f"the {what} of {_where(~torch.isfinite(values))} is NaN or infinite")
    if bool(((zero == zero.round()) & (zero >= 0) & (zero <= 2**bits - 1)).all()):
        return "affine", scale, zero
    wide, offset = scale.float(), -(zero.float() * scale.float())
    if scale.dtype is not torch.float32:
        rounded = -(zero.double() * scale.double()) != offset.double()
        if (bad := rounded | ~torch.isfinite(wide * (2**bits - 1))).any():
            raise ValueError(f"scale times zero, or scale times the largest code, of {_where(bad)} leaves float32")
        return "offset", wide, offset
    for u in range(2**bits):
        ours, theirs = wide * u + offset, (u - zero) * scale
        if (bad := ours.view(torch.int32) != theirs.view(torch.int32)).any():
            raise ValueError(
                f"scale and zero must be float16 or bfloat16, or zero a whole number: code {u} of {_where(bad)} is "
                f"{theirs[bad][0].item()!r} in float32, and a float32 scale and offset give {ours[bad][0].item()!r}"
            )
    return "offset", wide, offset


def _where(bad: Tensor) -> str:
    group, row = torch.nonzero(bad)[0].tolist()
    return f"group {group}, row {row}"


def _word(packing: str) -> torch.dtype:
    return torch.int32 if packing == "3bit_32" else torch.uint8


# ---- small tensors ----


def _shape(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    out_features, in_features = part(parts, "shape", (2,), (torch.int64, torch.int32)).tolist()
    if out_features < 1 or in_features < 1:
        raise ValueError(f"shape must be two positive sizes, got ({out_features}, {in_features})")
    return out_features, in_features


def _number(parts: Mapping[str, Tensor], name: str) -> int | float:
    tensor = part(parts, name, dtypes=(*_INTEGERS, torch.float32))
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    number = tensor.item()
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"{name} must be a finite number, got {number}")
    return number


def _flag(parts: Mapping[str, Tensor], name: str, default: bool) -> bool:
    if name not in parts:
        return default
    part(parts, name, dtypes=_INTEGERS)
    if (number := _number(parts, name)) not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, got {number}")
    return bool(number)


def _text(parts: Mapping[str, Tensor], name: str, accepted: tuple[str, ...]) -> str:
    tensor = part(parts, name, dtypes=(torch.uint8,))
    if tensor.ndim != 1 or tensor.numel() > _LONGEST_TEXT:
        raise ValueError(f"{name} must be a short text, got shape {tuple(tensor.shape)}")
    text = bytes(tensor.tolist()).decode("ascii", "backslashreplace")
    if text not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {text!r}")
    return text
