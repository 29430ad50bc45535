"""THE single statement of how codes lie in memory, with pack and unpack in plain torch.

A b-bit code is split into planes of 8, 4, 2 or 1 bits, low bits first, so that every width costs exactly b bits:

    1 = 1    2 = 2    3 = 2+1    4 = 4    5 = 4+1    6 = 4+2    7 = 4+2+1    8 = 8

Each plane of a row is a run of blocks. A block is 16 lanes; a lane is a little-endian word, of 32 bits in planes of 8
and 4 bits and of 16 bits in planes of 2 and 1. A word holds fields of b bits, low bits first: the slots. Slot t of the
16 words is 16 *consecutive* k, and the slots follow each other. So in a 4-bit plane, k = 128 block + 16 t + lane:

                      bits 31..28  27..24         7..4       3..0
                     +-----------+---------+   +---------+---------+
    word of lane 0   |  k = 112  |  k = 96 |...|  k = 16 |  k = 0  |   bytes 0 to 3
    word of lane 1   |  k = 113  |  k = 97 |...|  k = 17 |  k = 1  |   bytes 4 to 7
         ...         |           |         |   |         |         |
    word of lane 15  |  k = 127  | k = 111 |...|  k = 31 |  k = 15 |   bytes 60 to 63
                     +-----------+---------+   +---------+---------+
                        slot 7      slot 6        slot 1    slot 0

and `(word >> 4 * t) & 15` over the 16 words is one 16-wide step of a matrix product, against a contiguous slice of x,
whatever the architecture: no lane ever trades data with another. Blocks cover 64, 128, 128 and 256 values of k in
planes of 8, 4, 2 and 1 bits.

The last block of a row is shorter where its codes need fewer bytes: its lanes have as many bytes as they need, so a
plane takes 16 * ceil(K * b / 128) bytes of each row. Fields past K are zero. The planes of a row follow each other,
widest first, and rows are stored as int32: packed is (N, packed_words(bits, K)).
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # also the values of k in a slot

# bits of a code -> bits of its planes, widest (and least significant) first
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


# bits of a plane -> bytes of a lane in a whole block
LANE_BYTES = {8: 4, 4: 4, 2: 2, 1: 2}


def plane_bytes(plane_bits: int, in_features: int) -> int:
    """Bytes that one plane of one row takes: whole lanes of whole bytes."""
    return LANES * -(-in_features * plane_bits // (8 * LANES))


def packed_words(bits: int, in_features: int) -> int:
    """int32 words in a packed row, padding included."""
    return sum(plane_bytes(plane, in_features) for plane in PLANES[bits]) // 4


def block_columns(bits: int) -> int:
    """Values of k that are whole blocks in every plane: 64, 128 or 256."""
    return max(8 * LANE_BYTES[plane] // plane * LANES for plane in PLANES[bits])


def pack(code: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        code: (N, K) uint8, each below 2**bits.
        bits: 1 to 8.
    Returns:
        (N, packed_words(bits, K)) int32.
    Raises:
        ValueError, TypeError: code is not a 2-D uint8 tensor, or holds a value of 2**bits or more.
    """
    if code.dtype is not torch.uint8 or code.ndim != 2:
        raise TypeError(f"code must be a 2-D uint8 tensor, got {code.ndim}-D {code.dtype}")
    if bits not in PLANES:
        raise ValueError(f"bits must be from 1 to 8, got {bits!r}")
    if code.numel() and (largest := int(code.max())) >= 2**bits:
        raise ValueError(f"code must be below 2**bits = {2**bits}, got {largest}")

    rows, in_features = code.shape
    if in_features == 0:
        return code.new_empty((rows, 0), dtype=torch.int32)
    pieces, shift = [], 0
    for plane in PLANES[bits]:
        field = (code >> shift) & (2**plane - 1)
        used = plane_bytes(plane, in_features)
        field = torch.nn.functional.pad(field, (0, used * 8 // plane - in_features))
        for columns, lane_bytes in _blocks(used, plane):
            pieces.append(_pack_lanes(field[:, columns], plane, lane_bytes))
        shift += plane
    return torch.cat(pieces, dim=1).view(torch.int32)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) uint8 of a packed (N, packed_words(bits, K)) int32 tensor; the inverse of `pack`."""
    if in_features == 0:
        return packed.new_empty((packed.shape[0], 0), dtype=torch.uint8)
    row_bytes = packed.contiguous().view(torch.uint8)
    code, shift, start = None, 0, 0
    for plane in PLANES[bits]:
        used = plane_bytes(plane, in_features)
        pieces = []
        for columns, lane_bytes in _blocks(used, plane):
            first = start + columns.start * plane // 8
            block = row_bytes[:, first : start + columns.stop * plane // 8]
            pieces.append(_unpack_lanes(block, plane, lane_bytes))
        field = (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0])[:, :in_features]
        code = field if code is None else code | (field << shift)
        shift += plane
        start += used
    assert code is not None
    return code


def _blocks(used_bytes: int, plane_bits: int) -> list[tuple[slice, int]]:
    """(columns of k, bytes per lane): of the whole blocks of a row together, then of its shorter last block."""
    block_bytes = LANES * LANE_BYTES[plane_bits]
    per_byte = 8 // plane_bits
    whole = used_bytes // block_bytes * block_bytes
    found = [(slice(0, whole * per_byte), LANE_BYTES[plane_bits])] if whole else []
    if used_bytes > whole:
        found.append((slice(whole * per_byte, used_bytes * per_byte), (used_bytes - whole) // LANES))
    return found


def _pack_lanes(field: Tensor, plane_bits: int, lane_bytes: int) -> Tensor:
    """(N, k) fields of whole blocks -> (N, bytes): byte p of a lane holds slots p * 8/b and up, low bits first."""
    per_byte = 8 // plane_bits
    rows, columns = field.shape
    slots = field.reshape(rows, columns // (lane_bytes * per_byte * LANES), lane_bytes, per_byte, LANES)
    byte = slots[:, :, :, 0]
    for i in range(1, per_byte):
        byte = byte | (slots[:, :, :, i] << (plane_bits * i))
    return byte.transpose(-1, -2).flatten(1)  # (N, block, byte of lane, lane) -> lane by lane


def _unpack_lanes(block: Tensor, plane_bits: int, lane_bytes: int) -> Tensor:
    """(N, bytes) of whole blocks -> (N, k) fields."""
    rows, block_bytes = block.shape
    byte = block.reshape(rows, block_bytes // (LANES * lane_bytes), LANES, lane_bytes).transpose(-1, -2)
    if plane_bits == 8:
        return byte.flatten(1)
    mask = 2**plane_bits - 1
    return torch.stack([(byte >> i) & mask for i in range(0, 8, plane_bits)], dim=-2).flatten(1)


# ---- activations ----
#
# Codes of activations are bytes (int8), in the order in which a tensor core meets them beside packed weights: byte c of
# a block of weights holds k = L * (c % 4) + c // 4, and L more in its upper half where two codes share a byte. So words
# of activations, for blocks of as many k as a block of weights has, hold four k that lie L apart:
#
#     word i of a block    k = i,  L + i,  2 L + i,  3 L + i    (low byte first)    L = 16 beside 8 bits, 32 beside 4
#
# and no byte of either operand ever has to move. The last block is filled up with zeros, which add nothing to a
# product.


def activation_words(bits: int, in_features: int) -> int:
    """int32 words of a token's activations, beside weights of `bits` bits: of whole blocks."""
    return -(-in_features // block_columns(bits)) * block_columns(bits) // 4


def pack_activations(code: Tensor, bits: int) -> Tensor:
    """Codes (M, K) int8 -> (M, activation_words) int32, for weights of 4 or 8 bits."""
    tokens, in_features = code.shape
    block = block_columns(bits)
    padded = torch.nn.functional.pad(code, (0, 4 * activation_words(bits, in_features) - in_features))
    words = padded.reshape(tokens, padded.shape[1] // block, 4, block // 4).transpose(-1, -2)
    return words.reshape(tokens, padded.shape[1]).view(torch.int32)


def unpack_activations(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse: (M, activation_words) int32 -> (M, K) int8."""
    code, block = packed.contiguous().view(torch.int8), block_columns(bits)
    words = code.reshape(packed.shape[0], code.shape[1] // block, block // 4, 4).transpose(-1, -2)
    return words.reshape(code.shape)[:, :in_features].contiguous()
