"""Shared device code: packed weights of 4 or 8 bits as int8, the left operand of an integer product.

A block of packed weights is 64 bytes of a row, and they are the columns of an operand as they come: whole bytes (8
bits), or their lower and then their upper halves (4 bits). Activations lie in the same order (packing.py), so no byte
of either ever moves. Four codes in a register become four int8 at once: 8 bits by one instruction (lop3), 4 bits
symmetric by 1.5 (as 16 * (code - 8), the upper half of a byte), 4 bits affine by 3.5. Codes of another group become 0
on the way, for nothing, where a group ends between the bytes of a word.

With PTX = True by inline assembly, else in plain Triton: any backend, and the interpreter.
"""

import math

import triton
import triton.language as tl

# What products of such int8 are counted in, by bits and value map.
UNIT = {(8, "symmetric"): 1.0, (8, "affine"): 1.0, (4, "symmetric"): 1 / 16, (4, "affine"): 1.0}

ALL_BYTES = tl.constexpr(0xFFFFFFFF)


@triton.constexpr_function
def groups_in_block(BITS, GROUP):
    """Most groups that a block of packed weights has a part in; GROUP 0 is one for all of K."""
    columns = 512 // BITS
    if GROUP == 0 or GROUP % columns == 0:
        return 1
    latest = GROUP - math.gcd(GROUP, columns)  # where in a group a block may begin
    return (latest + columns - 1) // GROUP + 1


@triton.constexpr_function
def bytes_of_group(BITS, GROUP, PART, HALF):
    """Mask of the bytes of a word that are of a block's group PART; None where GROUP does not divide a block.

    Byte b of a word, or half of it, holds k from (128 / BITS) b + 16 HALF on, 16 of them: never of two groups.
    """
    if GROUP == 0 or GROUP % (512 // BITS) == 0:
        return ALL_BYTES.value
    if 512 // BITS % GROUP:
        return None
    return sum(0xFF << 8 * b for b in range(4) if (128 // BITS * b + 16 * HALF) // GROUP == PART)


@triton.jit
def slots_of_group(block, group, HALF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The same mask for any block, group and GROUP, at run time: (1, 1) int32."""
    mask = tl.full((1, 1), 0, tl.int32)
    for b in tl.static_range(4):
        k = block * (512 // BITS) + (128 // BITS * b + 16 * HALF)
        mask |= tl.where(k // GROUP == group, 0xFF, 0) << 8 * b
    return mask


@triton.constexpr_function
def _asm(BITS, HALF, AFFINE, MASK):
    """Assembly of weights_of: $0 of four bytes $1, then zeros of 4-bit affine ones, then a mask if MASK is None."""
    mask = 0xFFFFFFFF if MASK is None else MASK
    if BITS == 8:
        lines = [f"lop3.b32 t, $1, {mask:#x}, {0x80808080 & mask:#x}, 0x6A;"]  # $1 & mask ^ 80
    elif AFFINE:
        # 128 + code - zero never borrows from the next byte, and the 128 goes again.
        lines = [
            f"shr.u32 t, $1, {4 * HALF};",
            "lop3.b32 t, t, 0x0F0F0F0F, 0x80808080, 0xEA;",
            "sub.u32 t, t, $2;",
            f"lop3.b32 t, t, 0x80808080, {mask:#x}, 0x28;",  # (t ^ 80) & mask
        ]
    else:
        lines = [
            f"shl.b32 t, $1, {0 if HALF else 4};",
            f"lop3.b32 t, t, {0xF0F0F0F0 & mask:#x}, {0x80808080 & mask:#x}, 0x6A;",
        ]
    operand = f"${3 if BITS == 4 and AFFINE else 2}"
    last = "mov.b32 $0, t;" if MASK is not None else f"and.b32 $0, t, {operand};"
    return "\n".join(["{.reg .b32 t;", *lines, last, "}"])


@triton.jit
def weights_of(
    byte,  # (BLOCK_N, 64) int8, of a packed block
    zero,  # (BLOCK_N, 1) int8, of 4-bit affine weights
    mask,  # (1, 1) int32, where MASK is None
    HALF: tl.constexpr,  # 0, or 1 for the upper half of each byte
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,
    MASK: tl.constexpr,  # of the bytes of each four that stay; others become 0
    PTX: tl.constexpr,
):
    """code - zero, int8; of 8-bit weights code - 128, of 4-bit symmetric ones 16 * (code - 8)."""
    if PTX:
        asm: tl.constexpr = _asm(BITS, HALF, AFFINE, MASK)
        # A mask is one register for each of four bytes, all alike.
        if BITS == 4 and AFFINE:
            if MASK is None:
                return tl.inline_asm_elementwise(
                    asm, "=r,r,r,r,r,r,r", [byte, zero, mask], dtype=tl.int8, is_pure=True, pack=4
                )
            else:
                return tl.inline_asm_elementwise(asm, "=r,r,r", [byte, zero], dtype=tl.int8, is_pure=True, pack=4)
        elif MASK is None:
            return tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", [byte, mask], dtype=tl.int8, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(asm, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    else:
        if BITS == 8:
            w = byte ^ -128
        elif AFFINE:
            w = ((byte.to(tl.int32) >> (4 * HALF)) & 15).to(tl.int8) - zero
        else:
            w = ((byte.to(tl.int32) << (0 if HALF else 4)) & 0xF0).to(tl.int8) ^ -128
        if MASK is None:
            bits = mask.to(tl.int64)
        else:
            bits = tl.full((1, 1), MASK, tl.int64)
        stays = (bits >> (8 * (tl.arange(0, 64)[None, :] % 4))) & 1
        return tl.where(stays != 0, w, 0)


@triton.jit
def ones_of(
    w,  # (BLOCK_N, 64) int8, for its shape
    mask,
    MASK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Ones where weights_of leaves weights, else 0; int8."""
    return weights_of(tl.full(w.shape, -127, tl.int8), None, mask, 0, 8, False, MASK, PTX)


@triton.jit
def past_end(block, K, HALF: tl.constexpr, BITS: tl.constexpr):
    """0 for those of 64 columns that are past K, else -1: (1, 64) int8."""
    column = tl.arange(0, 64)
    k = block * (512 // BITS) + column % 4 * (128 // BITS) + HALF * 16 + column // 4
    return tl.where(k < K, -1, 0).to(tl.int8)[None, :]
