"""Shared device code: from packed words to exact 16-bit values of `code - zero`. The layout is stated in packing.py.

Two ways to the same bits, chosen by the constexpr PTX:

    PTX = True   two neighbouring words at a time, by inline assembly: `prmt` pairs their halves once per block, then a
                 shift, an and-or (lop3) that also sets the exponent of a "magic" float, and one packed subtraction
                 that takes magic + zero away. Per pair of weights about 3 instructions, no conversion, no shuffle.
    PTX = False  plain Triton: any backend, and the interpreter.

A float16 with exponent bits 0x6400 is 1024 + its low 10 bits, a bfloat16 with 0x4300 is 128 + its low 7 bits, and a
float32 with 0x4B000000 is 2^23 + its low 23 bits; so or-ing a code into the low bits makes a float without a
conversion, and code - zero is exact because both are integers below 2^8.
"""

import math

import triton
import triton.language as tl

from qkernels import packing

# constexpr, so that Triton's cache keys depend on their values
_PLANES = tl.constexpr(packing.PLANES)
_LANE_BYTES = tl.constexpr(packing.LANE_BYTES)
_MAGIC = tl.constexpr({"fp16": 0x6400, "bf16": 0x4300})


@triton.constexpr_function
def block_slots(BITS):
    """Slots that are whole blocks in every plane."""
    return max(8 * _LANE_BYTES.value[bits] // bits for bits in _PLANES.value[BITS])


@triton.constexpr_function
def plane_count(BITS):
    return len(_PLANES.value[BITS])


@triton.constexpr_function
def plane_bits(BITS, i):
    return _PLANES.value[BITS][i]


@triton.constexpr_function
def lane_bits(bits):
    """Bits of a lane in a whole block of a plane: of a word."""
    return 8 * _LANE_BYTES.value[bits]


@triton.constexpr_function
def plane_shift(BITS, i):
    """Which bit of the code is the lowest of plane i."""
    return sum(_PLANES.value[BITS][:i])


# $2 and $3 are neighbouring words: $0 takes their low halves, $1 their high halves.
_PAIR_HALVES = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410;\nprmt.b32 $1, $2, $3, 0x7632;")


@triton.constexpr_function
def _slot_registers(BITS):
    """First register of each of the three planes in a slot's assembly, then of the zero operand; $0 is the result.

    A pair of int32 words is two registers, low halves and high halves; a pair of int16 words is one. Planes that a
    width does not have repeat the first.
    """
    first = [1]
    for i in range(3):
        bits = _PLANES.value[BITS][i if i < len(_PLANES.value[BITS]) else 0]
        first.append(first[-1] + _LANE_BYTES.value[bits] // 2)
    return first


@triton.constexpr_function
def _slot_asm(BITS, SLOT, DTYPE, ZERO):
    """Assembly for slot SLOT of a block; ZERO is the zero of all weights, or None where it comes in a register."""
    lines, at = [".reg .b32 code, part, lo, hi, zero, one;"], 0
    register = _slot_registers(BITS)
    wide = DTYPE == "bf16" and BITS == 8  # 8 bits do not fit bfloat16's 7: through float32, where they do
    merged = "0" if wide else f"{_MAGIC.value[DTYPE] * 0x10001:#x}"
    for i, bits in enumerate(_PLANES.value[BITS]):
        half, bit = divmod(bits * SLOT % (8 * _LANE_BYTES.value[bits]), 16)
        source = f"${register[i] + half}"
        if bit > at:
            lines.append(f"shr.b32 part, {source}, {bit - at};")
        elif bit < at:
            lines.append(f"shl.b32 part, {source}, {at - bit};")
        else:
            lines.append(f"mov.b32 part, {source};")
        mask = (2**bits - 1 << at) * 0x10001
        lines.append(f"lop3.b32 code, part, {mask:#x}, {merged}, 0xEA;")  # (part & mask) | merged
        merged = "code"
        at += bits
    if wide:
        lines += [
            "prmt.b32 lo, code, 0x4B000000, 0x7540;",  # bytes 4B 00 00 code: 2^23 + code
            "prmt.b32 hi, code, 0x4B000000, 0x7542;",
            f"add.f32 lo, lo, {f'${register[3]}' if ZERO is None else f'0f{0xCB000000 | ZERO:08X}'};",
            f"add.f32 hi, hi, {f'${register[3] + 1}' if ZERO is None else f'0f{0xCB000000 | ZERO:08X}'};",
            "cvt.rn.bf16x2.f32 $0, hi, lo;",
        ]
        return "\n".join(["{", *lines, "}"])
    zero = f"${register[3]}" if ZERO is None else f"{((0x8000 | _MAGIC.value[DTYPE]) + ZERO) * 0x10001:#x}"
    lines.append(f"mov.b32 zero, {zero};")
    if DTYPE == "bf16":
        # add.bf16x2 needs sm_90; a multiply-add by one gives the same bits from sm_80 on.
        lines += ["mov.b32 one, 0x3F803F80;", "fma.rn.bf16x2 $0, code, one, zero;"]
    else:
        lines.append("add.f16x2 $0, code, zero;")
    return "\n".join(["{", *lines, "}"])


@triton.constexpr_function
def _slot_constraints(BITS, DTYPE, ZERO):
    zeros = 0 if ZERO is not None else 2 if DTYPE == "bf16" and BITS == 8 else 1
    return ",".join(["=r"] + ["r"] * (_slot_registers(BITS)[3] - 1 + zeros))


@triton.jit
def load_words(
    row_ptr,  # (rows, 1) int32 pointers to the first word of a plane of each row
    slot,
    mask,
    bits: tl.constexpr,  # of the plane
    PTX: tl.constexpr,
):
    """The words of the block that holds a slot, (rows, 16) int32 or int16, ready for unpack_slot."""
    index = slot * bits // lane_bits(bits) * 16 + tl.arange(0, 16)[None, :]
    if lane_bits(bits) == 16:
        return tl.load(row_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index, mask=mask, other=0)
    else:
        word = tl.load(row_ptr + index, mask=mask, other=0)
        if PTX:
            word = tl.inline_asm_elementwise(_PAIR_HALVES, "=&r,=&r,r,r", [word], dtype=tl.int32, is_pure=True, pack=2)
        return word


@triton.jit
def zero_operand(
    zero,  # int32, 0 to 255
    x_ptr,  # tells the dtype
    BITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """The zero as unpack_slot wants it: -(magic + zero) beside the assembly, the integer itself without."""
    if not PTX:
        return zero
    elif x_ptr.dtype.element_ty == tl.float16:
        return (zero | 0xE400).to(tl.uint16).to(tl.float16, bitcast=True)
    elif BITS == 8:
        return (zero | -0x35000000).to(tl.float32, bitcast=True)  # 0xCB000000 | zero
    else:
        return (zero | 0xC300).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def unpack_slot(
    plane0,  # (rows, 16) each, from load_words; plane1 and plane2 repeat plane0 where BITS has fewer planes
    plane1,
    plane2,
    zero,  # (rows, 1), from zero_operand; unused where ZERO is given
    x_ptr,  # tells the dtype of the values
    SLOT: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,  # the zero of all weights, or None
    PTX: tl.constexpr,
):
    """code - zero of 16 consecutive k, (rows, 16), exact in x's dtype: float16, bfloat16 or (PTX = False) float32."""
    dtype = x_ptr.dtype.element_ty
    if PTX:
        name: tl.constexpr = "fp16" if dtype == tl.float16 else "bf16"
        asm: tl.constexpr = _slot_asm(BITS, SLOT, name, ZERO)
        constraints: tl.constexpr = _slot_constraints(BITS, name, ZERO)
        if ZERO is None:
            return tl.inline_asm_elementwise(
                asm, constraints, [plane0, plane1, plane2, zero], dtype=dtype, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                asm, constraints, [plane0, plane1, plane2], dtype=dtype, is_pure=True, pack=2
            )
    else:
        b0: tl.constexpr = plane_bits(BITS, 0)
        code = (plane0.to(tl.int32) >> (b0 * SLOT % lane_bits(b0))) & (2**b0 - 1)
        if plane_count(BITS) > 1:
            b1: tl.constexpr = plane_bits(BITS, 1)
            code |= ((plane1.to(tl.int32) >> (b1 * SLOT % lane_bits(b1))) & (2**b1 - 1)) << plane_shift(BITS, 1)
        if plane_count(BITS) > 2:
            b2: tl.constexpr = plane_bits(BITS, 2)
            code |= ((plane2.to(tl.int32) >> (b2 * SLOT % lane_bits(b2))) & (2**b2 - 1)) << plane_shift(BITS, 2)
        return (code - (zero if ZERO is None else ZERO)).to(dtype)


@triton.jit
def _load_plane(
    plane_ptr,  # uint8 pointers to the start of a plane of each row
    slot,
    lane,
    K,
    mask,
    bits: tl.constexpr,  # of the plane
):
    row_lane_bytes = tl.cdiv(K * bits, 128)  # of a lane, in all blocks of a row
    bit = slot * bits  # of a lane, from the start of the row
    block = bit // lane_bits(bits)
    lane_bytes = tl.minimum(row_lane_bytes - block * (lane_bits(bits) // 8), lane_bits(bits) // 8)
    offset = block * (2 * lane_bits(bits)) + lane * lane_bytes + bit % lane_bits(bits) // 8
    byte = tl.load(plane_ptr + offset, mask=mask, other=0).to(tl.int32)
    return (byte >> (bit % 8)) & (2**bits - 1)


@triton.jit
def load_codes(
    row_ptr,  # uint8 pointers to the first byte of each row
    slot,  # int32: which 16 of a row's k
    lane,  # int32: which of the 16
    K,
    mask,
    BITS: tl.constexpr,
):
    """Codes by their byte addresses, int32: any slot of a row, the shorter last block too. Shapes broadcast."""
    code = _load_plane(row_ptr, slot, lane, K, mask, plane_bits(BITS, 0))
    for i in tl.static_range(1, plane_count(BITS)):
        row_ptr += tl.cdiv(K * plane_bits(BITS, i - 1), 128) * 16
        code |= _load_plane(row_ptr, slot, lane, K, mask, plane_bits(BITS, i)) << plane_shift(BITS, i)
    return code


@triton.constexpr_function
def _field_place(BITS, SLOT):
    """(bits that plane 0's word is shifted down, lowest bit of the code after that): the code below bit 23."""
    bits = _PLANES.value[BITS][0]
    place = bits * SLOT % (8 * _LANE_BYTES.value[bits])
    return (0, place) if place + BITS <= 23 else (16, place - 16)


@triton.constexpr_function
def magic_of_slot(BITS, SLOT):
    """What code_float adds to the codes of a slot: the float32 whose last place is at the lowest bit of the code."""
    return 2.0 ** (23 - _field_place(BITS, SLOT)[1])


@triton.jit
def code_float(
    plane0,  # int32, from load_words without PTX; plane1 and plane2 repeat plane0 where BITS has fewer planes
    plane1,
    plane2,
    SLOT: tl.constexpr,
    BITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """code + magic_of_slot, exact float32: the code is or-ed into the mantissa where it lies in the word.

    So a slot of one plane costs one instruction (lop3), and another for the few slots that lie too high in a word.
    """
    down: tl.constexpr = _field_place(BITS, SLOT)[0]
    place: tl.constexpr = _field_place(BITS, SLOT)[1]
    exponent: tl.constexpr = 150 - place << 23  # 23 - place, biased by 127
    bits = _merge(exponent, plane0 >> down, plane_bits(BITS, 0), place, PTX)
    if plane_count(BITS) > 1:
        b1: tl.constexpr = plane_bits(BITS, 1)
        place1: tl.constexpr = place + plane_shift(BITS, 1)
        bits = _merge(bits, _moved(plane1, place1 - b1 * SLOT % lane_bits(b1)), b1, place1, PTX)
    if plane_count(BITS) > 2:
        b2: tl.constexpr = plane_bits(BITS, 2)
        place2: tl.constexpr = place + plane_shift(BITS, 2)
        bits = _merge(bits, _moved(plane2, place2 - b2 * SLOT % lane_bits(b2)), b2, place2, PTX)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _merge(
    bits,  # int32, or a number
    word,  # int32
    width: tl.constexpr,
    place: tl.constexpr,
    PTX: tl.constexpr,
):
    """bits, with `width` bits of word or-ed into it where they are, at `place`."""
    mask: tl.constexpr = 2**width - 1 << place
    if not PTX:
        return (word & mask) | bits
    elif isinstance(bits, tl.constexpr):
        # ptxas makes two instructions of `and` and `or` where both have an immediate operand.
        constant: tl.constexpr = _and_or_asm(mask, bits)
        return tl.inline_asm_elementwise(constant, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        variable: tl.constexpr = _and_or_asm(mask, "$2")
        return tl.inline_asm_elementwise(variable, "=r,r,r", [word, bits], dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _and_or_asm(mask, bits):
    return f"lop3.b32 $0, $1, {mask:#x}, {bits if isinstance(bits, str) else hex(bits)}, 0xEA;"


@triton.jit
def _moved(word, up: tl.constexpr):
    """word, shifted up by so many bits, or down."""
    return word << up if up >= 0 else word >> -up


@triton.constexpr_function
def chunk_slots(SLOTS, GROUP):
    """The longest run of slots that divides a block and never crosses a group; GROUP 0 is one group for all of K."""
    return math.gcd(SLOTS, GROUP // 16)
