"""What readers of other packages' checkpoints share: which tensors are one weight, and how codes become a QTensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels import packing
from qkernels.checks import DTYPES, LARGEST_IN_FEATURES
from qkernels.reference_int8 import SMALLEST_RANGE
from qkernels.scheme import GROUP_MULTIPLE, Activations, GroupSize, Scheme, ValueMap
from qkernels.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class Reader:
    """How one format stores weights. A module called M has tensors M.<part>; its weight becomes M.weight.

    Attributes:
        marker: the part that every quantized weight has and nothing else, such as "qweight".
        parts: other parts that it may have; those of other names (a bias) are left alone.
        decode: (module's name, {part: tensor}) -> the weight. Raises ValueError or TypeError, naming the part, where
            tensors do not agree with each other or with the configuration.
        suffix: what is added, in the files, to the names of tensors that are not quantized; "" mostly.
    """

    marker: str
    parts: tuple[str, ...]
    decode: Callable[[str, Mapping[str, Tensor]], QTensor]
    suffix: str = ""


# configuration (what config.json calls quantization_config), metadata of the safetensors files -> the reader.
# Raises ValueError, naming the field, for a configuration that is not supported.
MakeReader = Callable[[Mapping[str, Any], Mapping[str, str]], Reader]


def part(
    parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None, dtypes: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """The tensor of a name, if it is there and has this shape and one of these dtypes; else ValueError or TypeError."""
    if name not in parts:
        raise ValueError(f"there is no tensor {name!r}")
    tensor = parts[name]
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if dtypes and tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {accepted}, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def field(config: Mapping[str, Any], name: str, accepted: tuple[Any, ...], default: Any = ...) -> Any:
    """A field of a configuration, if it holds one of the accepted values, of the same type; else ValueError."""
    if name not in config and default is ...:
        raise ValueError(f"quantization_config has no {name!r}")
    value = config.get(name, default)
    if not any(type(value) is type(option) and value == option for option in accepted):
        raise ValueError(f"quantization_config's {name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


def whole(config: Mapping[str, Any], name: str, default: Any = ...) -> int:
    """A field of a configuration that is an int and no bool; else ValueError."""
    if name not in config and default is ...:
        raise ValueError(f"quantization_config has no {name!r}")
    value = config.get(name, default)
    if type(value) is not int:
        raise ValueError(f"quantization_config's {name} must be an int, got {value!r}")
    return value


def groups_of(group_size: int, in_features: int) -> tuple[GroupSize, int]:
    """(Scheme's group_size, how many groups) of rows of in_features; -1, as configurations write it, is a whole row."""
    if group_size == -1 or group_size > in_features:
        return "channel", 1
    return group_size, -(-in_features // group_size)


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (rows, count) uint8 of int32 words (rows, words) that hold them without gaps, low bits first.

    A code of 3, 5, 6 or 7 bits may begin in one word and end in the next.
    """
    rows = words.shape[0]
    if words.shape[1] * 32 < count * bits:
        raise ValueError(f"{words.shape[1]} words of 32 bits are too few for {count} codes of {bits}")
    # Little-endian, as safetensors stores them. contiguous() would leave the stride of an axis of one word as it is.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits in (1, 2, 4, 8):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((octets[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count].contiguous()
    period = -(-count // 8)  # eight codes fill whole octets
    octets = torch.nn.functional.pad(octets, (0, max(0, period * bits - octets.shape[1])))
    octets = octets[:, : period * bits].reshape(rows, period, bits)
    code = torch.empty((rows, period, 8), dtype=torch.uint8)
    for i in range(8):
        octet, shift = divmod(i * bits, 8)
        code[..., i] = octets[..., octet] >> shift
        if shift + bits > 8:
            code[..., i] |= octets[..., octet + 1] << 8 - shift
    return (code & (2**bits - 1)).flatten(1)[:, :count].contiguous()


def order_of(g_idx: Tensor, group_size: int) -> Tensor | None:
    """How input features (K,) with these groups are ordered so that groups are runs; None where they are already.

    Raises:
        ValueError: a group is out of range, or does not have group_size features (the last one those that are left).
    """
    (in_features,) = g_idx.shape
    groups = -(-in_features // group_size)
    runs = torch.arange(in_features) // group_size
    found = g_idx.to(torch.int64)
    if torch.equal(found, runs):
        return None
    if in_features and (low := int(found.min()), high := int(found.max())) and (low < 0 or high >= groups):
        raise ValueError(f"g_idx must be from 0 to {groups - 1}, got {low if low < 0 else high}")
    order = torch.argsort(found, stable=True)
    if not torch.equal(found[order], runs):
        sizes = torch.bincount(found, minlength=groups).tolist()
        bad = next(g for g in range(groups) if sizes[g] != min(group_size, in_features - g * group_size))
        raise ValueError(f"g_idx gives group {bad} {sizes[bad]} features; groups are of {group_size}")
    return order.to(torch.int32)


def activation_of(
    parts: Mapping[str, Tensor],
    scale: str,
    zero: str,
    how: Activations | None,
    zero_dtypes: tuple[torch.dtype, ...] = (torch.int8,),
) -> Tensor | None:
    """Scale and zero of all inputs, (2,) float32, as QTensor has them, of the parts of these names; each one number.

    None where activations are not static: then the parts must not be there.

    Raises:
        ValueError, TypeError: a part is missing, of another dtype, not one number, or is there and means nothing; a
            scale is not from 2^-119 to 2^119, a zero not from -128 to 127, or not 0 where activations are symmetric.
    """
    if how is None or not how.static:
        for name in (scale, zero):
            if name in parts:
                raise ValueError(f"there is {name!r}, and the configuration has no static activations for it")
        return None
    values = [0.0, 0.0]
    for i, (name, dtypes) in enumerate(((scale, DTYPES), (zero, zero_dtypes))):
        if i and how.symmetric and name not in parts:
            continue
        stored = part(parts, name, dtypes=dtypes)
        if stored.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(stored.shape)}")
        values[i] = stored.item()
    if not SMALLEST_RANGE <= values[0] <= 1 / SMALLEST_RANGE:
        raise ValueError(f"{scale} must be from 2^-119 to 2^119, got {values[0]:g}")
    if how.symmetric and values[1] != 0:
        raise ValueError(f"{zero} must be 0, or not there, for symmetric activations, got {values[1]:g}")
    if not -128 <= values[1] <= 127:
        raise ValueError(f"{zero} must be from -128 to 127, got {values[1]:g}")
    return torch.tensor(values)  # exact: 16-bit and 32-bit floats, and small integers, are float32 numbers


def weight(
    code: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: GroupSize,
    value_map: ValueMap,
    order: Tensor | None = None,
    activations: Activations | None = None,
    activation: Tensor | None = None,
) -> QTensor:
    """A QTensor of codes, if they, the scales and the zeros are possible.

    Args:
        code: (N, K) uint8, columns in `order`.
        scale: (groups, N), or (1, 1) for a tensor; float16, bfloat16 or float32.
        zero: like scale: integer zeros of any dtype for "affine"; offsets of scale's dtype for "offset"; or None.
        bits, group_size, value_map, activations: as of Scheme; group_size an int or "channel" or "tensor".
        order, activation: as of QTensor.

    Raises:
        ValueError, TypeError: a tensor has another shape or dtype, a scale or an offset is not finite, a zero is no
            code, or there is no such scheme.
    """
    if scale.dtype not in DTYPES:
        raise TypeError(f"scales must be float16, bfloat16 or float32, got {scale.dtype}")
    if isinstance(group_size, int) and group_size == code.shape[1] and group_size % GROUP_MULTIPLE:
        group_size = "channel"  # one group, whatever its size
    scheme = Scheme(bits, group_size, value_map, scale.dtype, activations)
    if not 0 <= code.shape[1] <= LARGEST_IN_FEATURES:
        raise ValueError(f"in_features must be at most {LARGEST_IN_FEATURES}, got {code.shape[1]}")
    for what, values in (("scale", scale), ("offset", zero)):
        if values is not None and values.is_floating_point() and not torch.isfinite(values).all():
            group, row = torch.nonzero(~torch.isfinite(values))[0].tolist()
            raise ValueError(f"the {what} of group {group}, row {row} is NaN or infinite")
    if value_map == "affine" and zero is not None and zero.numel():
        low, high = int(zero.min()), int(zero.max())
        if low < 0 or high > scheme.code_max:
            raise ValueError(f"zeros must be from 0 to {scheme.code_max}, got {low if low < 0 else high}")
        zero = zero.to(torch.uint8)
    packed = packing.pack(code, bits)
    zero = None if zero is None else zero.contiguous()
    return QTensor(packed, scale.contiguous(), zero, scheme, code.shape[1], order, activation)


def affine(
    code: Tensor, scale: Tensor, zero: Tensor, *, bits: int, group_size: GroupSize, order: Tensor | None
) -> QTensor:
    """`weight` of codes with integer zeros: symmetric, which is the same but smaller, where each is in the middle."""
    if bits > 1 and bool((zero == 2 ** (bits - 1)).all()):
        return weight(code, scale, None, bits=bits, group_size=group_size, value_map="symmetric", order=order)
    return weight(code, scale, zero, bits=bits, group_size=group_size, value_map="affine", order=order)
