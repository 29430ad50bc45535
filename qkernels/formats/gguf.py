"""GGUF files, read exactly: codes stay the codes that they are, and values are the format's own, bit for bit.

A row of a weight is cut into blocks along K. d and m are float16 numbers of a block, u its codes, sc and mn whole
numbers of its parts:

    type   block   value                        scheme           stored beside the codes
    Q4_0   32      d (u - 8)                    w4g32s           d
    Q4_1   32      d u + m                      w4g32f           d, m
    Q5_0   32      d (u - 16)                   w5g32s           d
    Q5_1   32      d u + m                      w5g32f           d, m
    Q8_0   32      d (u - 128), u = q + 128     w8g32s           d
    Q4_K   256     (d sc) u - (m mn)            w4g32f-fp32      d sc and -m mn, eight of each, exact in float32
    Q5_K   256     (d sc) u - (m mn)            w5g32f-fp32      likewise
    Q6_K   256     (d sc) (u - 32)              w6g16s-fp32      d sc, sixteen of them
    Q2_K   256     (d sc) u - (m mn)            w2g16f-fp32      d sc and -m mn, sixteen of each
    Q3_K   256     (d (sc - 32)) (u - 4)        w3g16s-fp32      d (sc - 32), sixteen of them

Other types of quantized tensors are refused. Names and rows are those of the file: rows of llama's query and key
weights stand in an order of its own there.

Source    the GGUF specification and its tables of block layouts, as the package gguf reads and dequantizes them.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels import packing
from qkernels.formats.native import FormatError, Path
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

Decoded = tuple[Tensor, Tensor, Tensor | None]  # codes (N, K) uint8, scales and offsets (N, groups)
MAGIC = b"GGUF"
_PLAIN = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor | QTensor]:
    """Every tensor in a GGUF file, quantized ones as QTensors; shapes are (N, K), as in torch.

    Raises:
        FormatError: the file is damaged, hostile or no GGUF file, or holds a tensor of a type that is not read; it is
            named.
        ImportError: the package gguf is not installed.
        OSError: the file cannot be read.
    """
    return dict(stream(path, device))


def stream(path: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor | QTensor]]:
    """What `read` gives, one tensor at a time."""
    device = torch.device(device)
    for info in open_file(path).tensors:
        yield str(info.name), decode(path, info).to(device)


def open_file(path: Path) -> Any:
    """A gguf.GGUFReader, whose tensors are views of the file: they do not overlap, and their names differ.

    Raises:
        FormatError, ImportError, OSError: as read.
    """
    reader = _open(path)
    if (total := sum(int(info.n_bytes) for info in reader.tensors)) > (size := os.path.getsize(path)):
        raise FormatError(f"{path}: its tensors overlap: they take {total} bytes, and the file has {size}")
    names = [str(info.name) for info in reader.tensors]
    if twice := next((name for name, count in collections.Counter(names).items() if count > 1), None):
        raise FormatError(f"{path}: there are two tensors called {twice!r}")
    return reader


def decode(path: Path, info: Any) -> Tensor | QTensor:
    """One of a reader's tensors, in memory of its own; (N, K), as in torch.

    Raises:
        FormatError: it is of a type that is not read, or holds what is no number.
    """
    kind = info.tensor_type.name
    try:
        return _tensor(info, kind)
    except (ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: {info.name} ({kind}): {error}") from None


def _open(path: Path) -> Any:
    """A reader, whose tensors are views of the file."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need gguf: pip install gguf") from None
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise FormatError(f"{path}: not a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # whatever it stumbles over in a damaged file
        raise FormatError(f"{path}: not a whole GGUF file: {type(error).__name__}: {error}") from None


def _tensor(info: Any, kind: str) -> Tensor | QTensor:
    """One tensor of a file."""
    shape = tuple(int(size) for size in reversed(info.shape))
    data = torch.from_numpy(info.data.copy())  # the file is only mapped
    if kind in _PLAIN:
        return (data.view(torch.bfloat16) if kind == "BF16" else data).reshape(shape)
    if kind not in _TYPES:
        raise ValueError(f"this type is not read; those that are: {', '.join([*_TYPES, *sorted(_PLAIN)])}")
    if len(shape) != 2:
        raise ValueError(f"a quantized tensor must be 2-D, got shape {shape}")
    text, block_bytes, weights, decode = _TYPES[kind]
    rows, in_features = shape
    if in_features % weights:
        raise ValueError(f"rows of {in_features} are not whole blocks of {weights}")
    scheme = Scheme.parse(text)
    blocks = data.view(torch.uint8).reshape(rows, in_features // weights, block_bytes)
    code, scale, offset = decode(blocks)
    for what, values in (("scale", scale), ("minimum", offset)):
        if values is not None and not torch.isfinite(values).all():
            block = torch.nonzero(~torch.isfinite(values))[0].tolist()
            raise ValueError(f"a {what} is NaN or infinite, in row {block[0]}, group {block[1]}")
    packed = packing.pack(code.reshape(rows, in_features), scheme.bits)
    zero = None if offset is None else offset.T.contiguous()
    return QTensor(packed, scale.T.contiguous(), zero, scheme, in_features)


# ---- blocks (N, blocks, bytes) uint8 of each type ----


def _half(blocks: Tensor, start: int) -> Tensor:
    """(N, blocks) float16 at a byte of each block."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(data: Tensor, run: int) -> Tensor:
    """Codes (..., 2 x bytes) of bytes (..., bytes): of each run of bytes the low halves, then the high ones."""
    runs = data.unflatten(-1, (-1, run))
    return torch.stack([runs & 15, runs >> 4], dim=-2).flatten(-3)


def _bits(data: Tensor) -> Tensor:
    """(..., 8 x bytes): each byte's bits, low ones first."""
    return ((data[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def _4_bits(offsets: bool) -> Callable[[Tensor], Decoded]:
    def decode(blocks: Tensor) -> Decoded:
        return _nibbles(blocks[..., -16:], 16), _half(blocks, 0), _half(blocks, 2) if offsets else None

    return decode


def _5_bits(offsets: bool) -> Callable[[Tensor], Decoded]:
    def decode(blocks: Tensor) -> Decoded:
        code = _nibbles(blocks[..., -16:], 16) | _bits(blocks[..., -20:-16]) << 4
        return code, _half(blocks, 0), _half(blocks, 2) if offsets else None

    return decode


def _q8_0(blocks: Tensor) -> Decoded:
    return blocks[..., 2:] ^ 128, _half(blocks, 0), None  # int8 q + 128, as bits


def _six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """(sc, mn), each (N, blocks, 8) uint8, of 12 bytes: of the first four the low 6 bits of bytes 0 to 3 and 4 to 7.

    The last four have their low halves in bytes 8 to 11, and their two high bits above the others.
    """
    first, second, third = data[..., 0:4], data[..., 4:8], data[..., 8:12]
    sc = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=-1)
    mn = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=-1)
    return sc, mn


def _scaled_pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(d sc, -m mn), each (N, groups) float32."""
    sc, mn = _six_bit_pairs(blocks[..., 4:16])
    d, m = (_half(blocks, start).float()[..., None] for start in (0, 2))
    return (d * sc).flatten(1), -(m * mn).flatten(1)


def _q4_k(blocks: Tensor) -> Decoded:
    return _nibbles(blocks[..., 16:], 32), *_scaled_pairs(blocks)


def _q5_k(blocks: Tensor) -> Decoded:
    # Bit i of 32 bytes belongs to the 32 weights of group i.
    high = ((blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1).flatten(-2)
    return _nibbles(blocks[..., 48:], 32) | high << 4, *_scaled_pairs(blocks)


def _q6_k(blocks: Tensor) -> Decoded:
    # Both halves of 128 weights: four times 32, whose high bits lie in the same 32 bytes.
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3
    code = _nibbles(blocks[..., :128], 64) | high.flatten(-3) << 4
    sc = blocks[..., 192:208].contiguous().view(torch.int8)
    return code, (_half(blocks, 208).float()[..., None] * sc).flatten(1), None


def _pairs(blocks: Tensor) -> Tensor:
    """Codes (N, blocks, 256) of 64 bytes: of each run of 32 bytes the low two bits, then the next two, and so on."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((blocks.unflatten(-1, (2, 1, 32)) >> shifts) & 3).flatten(-3)


def _q2_k(blocks: Tensor) -> Decoded:
    d, m = (_half(blocks, start).float()[..., None] for start in (80, 82))
    sc, mn = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return _pairs(blocks[..., 16:80]), (d * sc).flatten(1), -(m * mn).flatten(1)


def _q3_k(blocks: Tensor) -> Decoded:
    # A third bit that is set adds 4 to codes that begin at -4. Bit i of 32 bytes is of weights 32 i to 32 i + 31.
    high = ((blocks[..., None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1).flatten(-2)
    # Sixteen scales of 6 bits: the low halves of 8 bytes, then their high ones; two more bits each in the last 4 bytes.
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    top = ((blocks[..., None, 104:108] >> shifts) & 3).flatten(-2)
    sc = (_nibbles(blocks[..., 96:104], 8) | top << 4).to(torch.int8) - 32
    return _pairs(blocks[..., 32:96]) | high << 2, (_half(blocks, 108).float()[..., None] * sc).flatten(1), None


# type -> (scheme, bytes of a block, its weights, what reads it)
_TYPES: Mapping[str, tuple[str, int, int, Callable[[Tensor], Decoded]]] = {
    "Q4_0": ("w4g32s", 18, 32, _4_bits(offsets=False)),
    "Q4_1": ("w4g32f", 20, 32, _4_bits(offsets=True)),
    "Q5_0": ("w5g32s", 22, 32, _5_bits(offsets=False)),
    "Q5_1": ("w5g32f", 24, 32, _5_bits(offsets=True)),
    "Q8_0": ("w8g32s", 34, 32, _q8_0),
    "Q4_K": ("w4g32f-fp32", 144, 256, _q4_k),
    "Q5_K": ("w5g32f-fp32", 176, 256, _q5_k),
    "Q6_K": ("w6g16s-fp32", 210, 256, _q6_k),
    "Q2_K": ("w2g16f-fp32", 84, 256, _q2_k),
    "Q3_K": ("w3g16s-fp32", 110, 256, _q3_k),
}
