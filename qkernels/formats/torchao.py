"""torchao weights in safetensors, as its flatten_tensor_state_dict and transformers write them, read exactly.

The weight of a module M is several tensors, and an entry M.weight in the files' metadata, JSON:

    {"_type": "Int4Tensor", "_data": {"block_size": [1, 128], "shape": [N, K], ...}, "_tensor_data_names": [...]}

    torchao 0.15 and later     M._weight_qdata, M._weight_scale, ...; other tensors as they are called
    torchao 0.14               M.weight:qdata, M.weight:scale, ..., no "_tensor_data_names"; others are NAME:_data

q are signed codes, s scales, z zeros, g the size of a group along K:

    Int4Tensor                  qdata (N, K / 2), even k in the low half of a byte; s, z (ceil(K / g), N), floats
                                w = s q + z
    Int8Tensor                  qdata (N, K) int8; s, z (N, K / g), or (1, 1) for all; z whole numbers, or none
                                w = s (q - z)
    IntxUnpackedToInt8Tensor    the same with codes of 1 to 8 bits, each in a byte

What the values are. Int8Tensor and IntxUnpackedToInt8Tensor: those of torchao's dequantize, bit for bit in each dtype:
q - z is exact in all of them, and the product is rounded to float32 and then to the dtype. Int4Tensor has no
dequantize, its kernels take it for what mslk's quantizer means: codes of (w - min) / s, less 8, z = min + 8 s. With
u = q + 8 that is s u + (z - 8 s), in float32: s and z are 16-bit floats, so s u is exact, z - 8 s is demanded to be
exact, and the sum is rounded once: the real value, correctly rounded. z - 8 s is exact unless z is thousands of times
smaller than 8 s, or the other way round. The quantizer makes no such z of 16-bit weights: of 18 million random groups
none was refused. Where all z are zero, w = s q.

Inputs are quantized, too, where the entry of a weight says so; schemes then end in -a8 and the like (scheme.py):

    Int8Tensor                  act_quant_kwargs, of class QuantizeTensorToInt8Kwargs: PerRow, symmetric (-a8s) or
                                affine (-a8); with act_quant_scale, one number, PerTensor (-a8ts), and with
                                act_quant_zero_point, one whole number, too (-a8t). Weights of one scale per row or in
                                all, without zeros, as torchao's product leaves those out
    IntxUnpackedToInt8Tensor    activation_quantization "int8_asym_per_token" (-a8), with weights of 4 or 8 bits

Inputs are quantized here as reference_int8.py says, which is what torchao does but for this:

    -a8s       torchao's scale is absmax / 127.5 and its codes are from -128 to 127, so that the largest magnitude lies
               half a step from its code; here it is absmax / 127, from -127 to 127
    -a8ts      what lies 127.5 steps or more below zero gets -128 there, -127 here
    -a8, -a8t  scales, zeros and codes are the same where torchao computes in float32, which it does not for 16-bit
               inputs. A value within 2^-15 of a step of the middle between two codes may get the other
    all        torchao's scales of inputs of an Int8Tensor are at least 2^-23: tokens of less than 127 times that get
               finer codes here

Refused are other classes, such as those of codes in an order of some kernel, inputs that are quantized in another way
(one scale for all that comes in a call, reduced ranges) or scaled, and quantized tensors that are not called M.weight.

Source    the package torchao, 0.14 to 0.18: prototype/safetensors, and quantization/quantize_/workflows.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import DTYPES
from qkernels.formats.reader import Reader, activation_of, field, part, weight
from qkernels.scheme import ACTIVATION_BITS, Activations, GroupSize, ValueMap
from qkernels.tensor import QTensor

Entry = Mapping[str, Any]  # of a weight in the metadata
_PARTS = (
    "qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "scale_and_zero",
    "per_tensor_scale", "act_per_tensor_scale",
)  # fmt: skip
_STATIC = _PARTS[3:5]  # of the inputs of an Int8Tensor
_ZEROS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """How the weights are read of which the metadata tells; the configuration says nothing more.

    Raises:
        ValueError: config's quant_method is not "torchao", or the metadata is not torchao's, or has quantized tensors
            that are not the weight of a module.
    """
    field(config, "quant_method", ("torchao",), "torchao")
    entries = _entries(metadata)
    named = {"_tensor_data_names" in entry for entry in entries.values()}
    if len(named) == 2:
        raise ValueError("some entries of the metadata have '_tensor_data_names' and some have not")
    prefix, suffix = ("weight:", ":_data") if named == {False} else ("_weight_", "")
    return Reader(
        prefix + "qdata",
        tuple(prefix + name for name in _PARTS[1:]),
        functools.partial(_decode, entries, prefix),
        suffix,
    )


def _entries(metadata: Mapping[str, str]) -> dict[str, Entry]:
    """{name of a quantized tensor: its entry}."""
    if "tensor_names" not in metadata:
        raise ValueError("the files' metadata has no 'tensor_names', so it is not torchao's")
    entries: dict[str, Entry] = {}
    for name, text in metadata.items():
        if "." not in name:  # of the file, or of a tensor that belongs to no module
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
            continue  # someone else's
        if entry["_type"] == "Tensor":
            continue
        if not name.endswith(".weight"):
            raise ValueError(f"{name} is quantized ({entry['_type']}); only tensors called M.weight are read")
        entries[name] = entry
    return entries


def _decode(entries: Mapping[str, Entry], prefix: str, module: str, parts: Mapping[str, Tensor]) -> QTensor:
    name = f"{module}.weight"
    if name not in entries:
        raise ValueError(f"the files' metadata has no entry {name!r} that says what it is")
    kind, data = entries[name]["_type"], entries[name].get("_data")
    if kind not in _KINDS:
        raise ValueError(f"weights of class {kind} are not read; those that are: {', '.join(_KINDS)}")
    if not isinstance(data, dict):
        raise ValueError(f"_data in the metadata must be an object, got {data!r:.100}")
    own = {part.removeprefix(prefix): tensor for part, tensor in parts.items()}
    for what in _PARTS[5:] if kind == "Int8Tensor" else _PARTS[3:]:
        if what in own:
            raise ValueError(f"{kind} with {what} is not read")
    return _KINDS[kind](own, data)


def _int4(parts: Mapping[str, Tensor], data: Entry) -> QTensor:
    _only(data, "activation_dtype", (None, {"_type": "torch.dtype", "_data": "bfloat16"}))
    octets = _matrix(parts, (torch.int8, torch.uint8)).view(torch.uint8)
    out_features, in_features = octets.shape[0], 2 * octets.shape[1]
    if (shape := data.get("shape")) != [out_features, in_features]:
        raise ValueError(f"shape must be [{out_features}, {in_features}], as qdata says, got {shape!r:.100}")
    rows, group_size = _block_size(data)
    if rows != 1:
        raise ValueError(f"block_size must be [1, size of a group], got {data['block_size']}")
    shape = (-(-in_features // group_size), out_features)
    scale = part(parts, "scale", shape, DTYPES)
    zero: Tensor | None = part(parts, "zero_point", shape, (scale.dtype,))
    value_map: ValueMap = "symmetric"
    if zero is not None and zero.any():
        value_map = "offset"
        scale, zero = _offsets(scale, zero)
    else:
        zero = None
    code = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2) ^ 8  # q + 8, of two's complement
    return weight(code, scale, zero, bits=4, group_size=group_size, value_map=value_map)


def _offsets(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(s, z - 8 s) float32, if s u + (z - 8 s) is then rounded once."""
    part({"scale": scale}, "scale", dtypes=(torch.float16, torch.bfloat16))
    for what, values in (("scale", scale), ("zero_point", zero)):
        if not torch.isfinite(values).all():
            raise ValueError(f"the {what} of {_where(~torch.isfinite(values))} is NaN or infinite")
    least, wide = -8 * scale.double(), zero.double()
    exact = least + wide
    offset = exact.float()
    # The sum lost nothing in float64 if each of its terms comes back, and nothing in float32 if it does.
    good = (exact - least == wide) & (exact - wide == least) & (offset.double() == exact)
    good &= torch.isfinite(15 * scale.float())
    if not good.all():
        raise ValueError(f"zero_point - 8 scale, of {_where(~good)}, is not exact in float32, so s q + z would not be")
    return scale.float(), offset


def _int8(parts: Mapping[str, Tensor], data: Entry) -> QTensor:
    how = _int8_activations(data.get("act_quant_kwargs"), static=_STATIC[0] in parts)
    found = _bytes(parts, data, 8, how, activation_of(parts, *_STATIC, how, _ZEROS))
    # What torchao's product of codes cannot do, or leaves out.
    if how is not None and isinstance(found.scheme.group_size, int):
        raise ValueError(f"block_size must be [1, K] or [N, K] where inputs are quantized, got {data['block_size']}")
    if how is not None and found.zero is not None:
        raise ValueError("zero_point must be 0 throughout where inputs are quantized")
    return found


def _int8_activations(given: Any, *, static: bool) -> Activations | None:
    """What act_quant_kwargs says of inputs; static: whether their scale is in the file."""
    if given is None:
        return None
    kind, said = (given.get("_type"), given.get("_data")) if isinstance(given, dict) else (None, None)
    if kind != "QuantizeTensorToInt8Kwargs" or not isinstance(said, dict):
        raise ValueError(f"act_quant_kwargs must be None or of class QuantizeTensorToInt8Kwargs, got {given!r:.200}")
    if unknown := said.keys() - {"granularity", "mapping_type", "reduce_range"}:
        raise ValueError(f"act_quant_kwargs has {min(unknown)!r:.100}, which is not known")
    wanted = f"PerTensor where there is {_STATIC[0]!r}" if static else f"PerRow where there is no {_STATIC[0]!r}"
    own: list[Any] = [{"_type": "PerTensor", "_data": {}}] if static else [{"_type": "PerRow", "_data": {"dim": -1}}]
    if said.get("granularity") not in own:
        raise ValueError(f"the granularity of inputs must be {wanted}, got {said.get('granularity')!r:.200}")
    _only(said, "reduce_range", (None, False))  # to 7 bits
    mapping = {name: {"_type": "MappingType", "_data": name} for name in ("SYMMETRIC", "ASYMMETRIC")}
    _only(said, "mapping_type", (None, *mapping.values()))
    return Activations(static, said.get("mapping_type") != mapping["ASYMMETRIC"])


def _intx(parts: Mapping[str, Tensor], data: Entry) -> QTensor:
    _only(data, "activation_quantization", (None, "int8_asym_per_token"))
    dtype = data.get("target_dtype")
    text = dtype.get("_data") if isinstance(dtype, dict) else None
    if not isinstance(text, str) or not re.fullmatch("int[1-8]", text):
        raise ValueError(f"target_dtype must be int1 to int8, got {dtype!r:.100}")
    bits, how = int(text[3:]), None
    if data.get("activation_quantization") is not None:
        how = Activations(static=False, symmetric=False)
        if bits not in ACTIVATION_BITS:
            raise ValueError(f"target_dtype must be int4 or int8 where inputs are quantized, got {text}")
    part(parts, "zero_point")
    return _bytes(parts, data, bits, how)


def _bytes(
    parts: Mapping[str, Tensor],
    data: Entry,
    bits: int,
    activations: Activations | None,
    activation: Tensor | None = None,
) -> QTensor:
    """A weight whose codes are bytes of their own: s (q - z); activation is as of QTensor."""
    center = 2 ** (bits - 1)
    q = _matrix(parts, (torch.int8,))
    rows, columns = _block_size(data)
    group_size: GroupSize = columns
    if rows == 1 and q.shape[1] % columns == 0:
        group_size = "channel" if columns == q.shape[1] else columns
        shape = (q.shape[0], q.shape[1] // columns)
    elif (rows, columns) == tuple(q.shape):
        group_size, shape = "tensor", (1, 1)
    else:
        found = f"got {data['block_size']} for {tuple(q.shape)}"
        raise ValueError(f"block_size must be [1, a divisor of K] or [N, K], {found}")
    if q.numel() and (int(q.min()) < -center or int(q.max()) >= center):
        raise ValueError(f"qdata must be from {-center} to {center - 1}, got {int(q.min())} to {int(q.max())}")
    code = (q.view(torch.uint8) + center) & 255  # two's complement: modulo 256 it is q + center
    scale = part(parts, "scale", shape, DTYPES).T
    value_map: ValueMap = "symmetric"
    zero = None
    if "zero_point" in parts:
        zero = part(parts, "zero_point", shape, _ZEROS).to(torch.int64).T
        if not zero.any() and bits > 1:
            zero = None
        elif int(zero.min()) < -center or int(zero.max()) >= center:
            raise ValueError(f"zero_point must be from {-center} to {center - 1}, got {zero.min()} to {zero.max()}")
        else:
            value_map, zero = "affine", zero + center
    return weight(
        code,
        scale,
        zero,
        bits=bits,
        group_size=group_size,
        value_map=value_map,
        activations=activations,
        activation=activation,
    )


_KINDS = {"Int4Tensor": _int4, "Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx}


def _matrix(parts: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    qdata = part(parts, "qdata", dtypes=dtypes)
    if qdata.ndim != 2:
        raise ValueError(f"qdata must be 2-D, got shape {tuple(qdata.shape)}")
    if not qdata.numel():
        raise ValueError(f"qdata must not be empty, got shape {tuple(qdata.shape)}")
    return qdata.contiguous()


def _block_size(data: Entry) -> tuple[int, int]:
    value = data.get("block_size")
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size >= 1 for size in value):
        raise ValueError(f"block_size must be two positive whole numbers, got {value!r:.100}")
    return value[0], value[1]


def _only(data: Entry, name: str, accepted: tuple[Any, ...]) -> None:
    """Raise ValueError unless the attribute is missing or one of these."""
    if (value := data.get(name)) not in accepted:
        raise ValueError(f"{name} must be {' or '.join(map(str, accepted))}, got {value!r:.200}")


def _where(bad: Tensor) -> str:
    group, row = torch.nonzero(bad)[0].tolist()
    return f"group {group}, row {row}"
