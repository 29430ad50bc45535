from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import packing
from tests import truth
from tests.helpers import ALL_BITS

# One, a lane, a slot, a byte, a block of each plane, and the neighbours of each; SmolLM2's 576; a prime.
COLUMNS = (1, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257, 576, 1009)


def _codes(bits: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_come_back_and_lie_where_the_layout_says(bits: int) -> None:
    for columns in COLUMNS:
        code = _codes(bits, 3, columns)
        packed = packing.pack(code, bits)
        assert packed.dtype is torch.int32
        assert packed.shape == (3, packing.packed_words(bits, columns))
        assert torch.equal(packing.unpack(packed, bits, columns), code)
        np.testing.assert_array_equal(truth.unpack(packed.numpy(), bits, columns), code.numpy())


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 700), seed=st.integers(0, 2**32))
def test_round_trip_of_any_shape(bits: int, rows: int, columns: int, seed: int) -> None:
    code = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(code, bits)
    assert packed.shape == (rows, packing.packed_words(bits, columns))
    assert torch.equal(packing.unpack(packed, bits, columns), code)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_width_costs_its_bits(bits: int) -> None:
    assert packing.packed_words(bits, 4096) * 32 == bits * 4096
    planes = [b for b in (8, 4, 2, 1) if bits & b]
    for columns in COLUMNS:
        padded = sum(-(-columns * b // 128) * 16 for b in planes)
        assert packing.packed_words(bits, columns) * 4 == padded


@pytest.mark.parametrize("bits", ALL_BITS)
def test_padding_is_zero(bits: int) -> None:
    full = torch.full((2, 577), 2**bits - 1, dtype=torch.uint8)
    ones = sum(bin(int(word) & 0xFFFFFFFF).count("1") for word in packing.pack(full, bits).flatten())
    assert ones == 2 * 577 * bits


# Worked out by hand from the layout's description: a file from today must still read tomorrow.
def test_golden_vectors() -> None:
    # 4 bits, K = 128: nibble t of word j is k = 16 t + j; codes count 0, 1, .. 15 in every slot
    counting = (torch.arange(128) % 16).to(torch.uint8)[None]
    assert _hex(packing.pack(counting, 4)) == [f"{j:x}" * 8 for j in range(16)]
    # each slot its own value: every word is 0x76543210
    slots = (torch.arange(128) // 16).to(torch.uint8)[None]
    assert _hex(packing.pack(slots, 4)) == ["76543210"] * 16
    # 8 bits, K = 64: byte t of word j is k = 16 t + j
    assert _hex(packing.pack(torch.arange(64, dtype=torch.uint8)[None], 8)) == [
        f"{48 + j:02x}{32 + j:02x}{16 + j:02x}{j:02x}" for j in range(16)
    ]
    # 2 bits, K = 128: lanes of 16 bits, two to a word; the slots count 0, 1, 2, 3, 0, 1, 2, 3
    four = (torch.arange(128) // 16 % 4).to(torch.uint8)[None]
    assert _hex(packing.pack(four, 2)) == ["e4e4e4e4"] * 8
    # only k = 35, which is slot 2 of lane 3: the high half of word 1, bits 4 and 5
    one = torch.zeros(1, 128, dtype=torch.uint8)
    one[0, 35] = 3
    assert _hex(packing.pack(one, 2)) == ["00000000", "00300000"] + ["00000000"] * 6
    # 1 bit, K = 256: k = 35 is bit 2 of lane 3
    assert _hex(packing.pack(torch.cat([one // 3, one // 3], dim=1), 1)) == ["00000000", "04040000"] + ["00000000"] * 6
    # 1 bit, K = 128 of a whole block's 256: lanes of one byte, four to a word; lane 3 is the top byte of word 0
    assert _hex(packing.pack(one // 3, 1)) == ["04000000", "00000000", "00000000", "00000000"]
    # 4 bits, K = 32 of a whole block's 128: lanes of one byte
    assert _hex(packing.pack((torch.arange(32) // 16 + 1).to(torch.uint8)[None], 4)) == ["21212121"] * 4
    # 4 bits, K = 160: a whole block, then lanes of one byte
    tail = torch.zeros(1, 160, dtype=torch.uint8)
    tail[0, 128:144], tail[0, 144:] = 5, 10
    assert _hex(packing.pack(tail, 4)) == ["00000000"] * 16 + ["a5a5a5a5"] * 4
    # 3 bits, K = 64: the low two bits in lanes of one byte, then the high bit in lanes of one byte
    three = torch.full((1, 64), 0b101, dtype=torch.uint8)
    assert _hex(packing.pack(three, 3)) == ["55555555"] * 4 + ["0f0f0f0f"] * 4
    # 7 bits, K = 16: planes of 4, 2 and 1 bits, one slot each
    assert _hex(packing.pack(torch.full((1, 16), 0b1_10_1001, dtype=torch.uint8), 7)) == (
        ["09090909"] * 4 + ["02020202"] * 4 + ["01010101"] * 4
    )


def _hex(packed: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in packed[0].tolist()]


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match=r"below 2\*\*bits = 8, got 9"):
        packing.pack(torch.full((1, 4), 9, dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match=r"2-D uint8 tensor, got 2-D torch\.int64"):
        packing.pack(torch.zeros(1, 4, dtype=torch.int64), 3)
    with pytest.raises(TypeError, match="got 1-D"):
        packing.pack(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="bits must be from 1 to 8, got 9"):
        packing.pack(torch.zeros(1, 4, dtype=torch.uint8), 9)
