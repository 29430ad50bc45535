"""Shared device code: from packed words to exact 16-bit values of `code - zero`. The layout is stated in packing.py.

Two ways to the same bits, chosen by the constexpr PTX:

    PTX = True   two neighbouring words at a time, by inline assembly: `prmt` pairs their halves once per block, then a
                 shift where one is needed, an and-or (lop3) that also sets the exponent of a "magic" float, and one
                 packed addition or multiply-add that takes magic + zero away. Per pair of weights 2 to 3 instructions,
                 no conversion, no shuffle.
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
_MAGIC = tl.constexpr({"fp16": 0x6400, "bf16": 0x4300})  # 2^10, 2^7: the unit of the last place is 1


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


# add.bf16x2 needs sm_90; a multiply-add by one gives the same bits from sm_80 on.
_ADD = tl.constexpr({"fp16": "add.f16x2 {}, {}, {}", "bf16": "mov.b32 one, 0x3F803F80;\nfma.rn.bf16x2 {}, {}, one, {}"})

_MULTIPLY = tl.constexpr(
    {
        name: f"{{.reg .b32 minus;\nmov.b32 minus, 0x80008000;\nfma.rn.{pair} $0, $1, $2, minus;}}"
        for name, pair in (("fp16", "f16x2"), ("bf16", "bf16x2"))
    }
)

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
    halves = []  # of each plane: the register that holds the slot's codes, and their lowest bit in each half of it
    for i, bits in enumerate(_PLANES.value[BITS]):
        half, bit = divmod(bits * SLOT % (8 * _LANE_BYTES.value[bits]), 16)
        halves.append((f"${_slot_registers(BITS)[i] + half}", bit))
    zero = f"${_slot_registers(BITS)[3]}"
    if BITS == 8 and DTYPE == "bf16":
        lines = _wide_asm(*halves[0], zero, ZERO)
    else:
        lines = _narrow_asm(BITS, halves, DTYPE, zero, ZERO)
    return "\n".join(["{", ".reg .b32 code, part, lo, hi, zero, factor, one;", *lines, "}"])


@triton.constexpr_function
def _wide_asm(source, bit, zero, ZERO):
    """8 bits do not fit bfloat16's 7: through float32, where they do; the difference fits again."""
    byte = bit // 8
    add_lo, add_hi = (zero, f"${int(zero[1:]) + 1}") if ZERO is None else [f"0f{0xCB000000 | ZERO:08X}"] * 2
    return [
        f"prmt.b32 lo, {source}, 0x4B000000, {0x7540 + byte:#x};",  # bytes 4B 00 00 code: 2^23 + code
        f"prmt.b32 hi, {source}, 0x4B000000, {0x7542 + byte:#x};",
        f"add.f32 lo, lo, {add_lo};",
        f"add.f32 hi, hi, {add_hi};",
        "prmt.b32 $0, lo, hi, 0x7632;",  # upper halves: the lower ones are zero
    ]


@triton.constexpr_function
def _narrow_asm(BITS, halves, DTYPE, zero, ZERO):
    """A code may stay `at` bits above the lowest of the mantissa: the magic float is then magic + code * 2^at.

    So one shift serves all the codes that fit the mantissa together; a multiply-add takes 2^at away with the zero.
    """
    planes = _PLANES.value[BITS]
    mantissa = 10 if DTYPE == "fp16" else 7
    reach = ((mantissa - BITS) // planes[0] + 1) * planes[0]  # bits of a half that one shift serves
    at = halves[0][1] % reach
    lines = []
    merged, place = f"{_MAGIC.value[DTYPE] * 0x10001:#x}", at
    for i, bits in enumerate(planes):
        source, bit = halves[i]
        part = "part"
        if bit > place:
            lines.append(f"shr.b32 part, {source}, {bit - place};")
        elif bit < place:
            lines.append(f"shl.b32 part, {source}, {place - bit};")
        else:
            part = source
        mask = (2**bits - 1 << place) * 0x10001
        lines.append(f"lop3.b32 code, {part}, {mask:#x}, {merged}, 0xEA;")  # (part & mask) | merged
        merged = "code"
        place += bits
    # -(magic / 2^at + zero); in a register it comes as -(magic + zero)
    if ZERO is not None:
        lines.append(f"mov.b32 zero, {_pair(DTYPE, -(2**mantissa / 2**at) - ZERO):#x};")
        zero = "zero"
    elif at > 0:
        lines.append(f"mov.b32 factor, {_pair(DTYPE, 2**mantissa - 2**mantissa / 2**at):#x};")
        lines.append(f"{_ADD.value[DTYPE].format('zero', zero, 'factor')};")
        zero = "zero"
    if at > 0:
        lines.append(f"mov.b32 factor, {_pair(DTYPE, 2**-at):#x};")
        lines.append(f"fma.rn.{'f16x2' if DTYPE == 'fp16' else 'bf16x2'} $0, code, factor, {zero};")
    else:
        lines.append(f"{_ADD.value[DTYPE].format('$0', 'code', zero)};")
    return lines


@triton.constexpr_function
def _pair(DTYPE, value):
    """Bits of two equal 16-bit floats; value, not 0, has few enough bits to be one exactly."""
    mantissa, bias = (10, 15) if DTYPE == "fp16" else (7, 127)
    fraction, exponent = math.frexp(abs(value))  # fraction from 1/2 to 1
    bits = ((exponent - 2 + bias) << mantissa) + int(fraction * 2 ** (mantissa + 1)) + (0x8000 if value < 0 else 0)
    return bits * 0x10001


@triton.constexpr_function
def _slot_constraints(BITS, DTYPE, ZERO):
    zeros = 0 if ZERO is not None else 2 if DTYPE == "bf16" and BITS == 8 else 1
    return ",".join(["=r"] + ["r"] * (_slot_registers(BITS)[3] - 1 + zeros))


@triton.jit
def load_words(
    row_ptr,  # (rows, 1) int32 pointers to the first word of a plane of each row, or of a step of the main loop
    slot,  # counted from there
    mask,  # of the rows, or None
    bits: tl.constexpr,  # of the plane
    PTX: tl.constexpr,
):
    """The words of the block that holds a slot, (rows, 16) int32 or int16, ready for unpack_slot."""
    index = slot * bits // lane_bits(bits) * 16 + tl.arange(0, 16)[None, :]
    if lane_bits(bits) == 16:
        pointer = row_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index
    else:
        pointer = row_ptr + index
    if mask is None:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=mask, other=0)
    if PTX and lane_bits(bits) == 32:
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
def scaled(
    w,  # (rows, 16) float16 or bfloat16, from unpack_slot
    scale,  # (rows, 1) of the same dtype
    PTX: tl.constexpr,
):
    """w * scale, rounded once to their dtype."""
    if PTX:
        # Plus -0, which changes no bit: bfloat16 has no multiplication of pairs before sm_90.
        return tl.inline_asm_elementwise(
            _MULTIPLY.value[w.dtype.name], "=r,r,r", [w, scale], dtype=w.dtype, is_pure=True, pack=2
        )
    else:
        return w * scale


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
