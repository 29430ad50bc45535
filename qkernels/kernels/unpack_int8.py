"""Shared device code: packed weights of 4 or 8 bits as int8, the left operand of an integer product.

A block of packed weights is 64 bytes of a row, and they are the columns of an operand as they come: whole bytes (8
bits), or their lower and then their upper halves (4 bits). Activations lie in the same order (packing.py), so no byte
of either ever moves. Four codes in a register become four int8 at once: 8 bits by one instruction (xor), 4 bits
symmetric by 1.5 (as 16 * (code - 8), the upper half of a byte), 4 bits affine by 3.5.

With PTX = True by inline assembly, else in plain Triton: any backend, and the interpreter.
"""

import math

import triton
import triton.language as tl

# What products of such int8 are counted in, by bits and value map.
UNIT = {(8, "symmetric"): 1.0, (8, "affine"): 1.0, (4, "symmetric"): 1 / 16, (4, "affine"): 1.0}

# w & 0xF0 ^ 0x80 of each byte: 16 * (code - 8) of the upper halves; of the lower ones once they are moved up.
_UPPER = tl.constexpr("lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;")
_LOWER = tl.constexpr("{.reg .b32 up;\nshl.b32 up, $1, 4;\nlop3.b32 $0, up, 0xF0F0F0F0, 0x80808080, 0x6A;}")
_WHOLE = tl.constexpr("xor.b32 $0, $1, 0x80808080;")
# code - zero of each byte: 128 + code never borrows from the next byte, and the 128 goes again.
_SUBTRACT = tl.constexpr("lop3.b32 t, t, 0x0F0F0F0F, 0x80808080, 0xEA;\nsub.u32 t, t, $2;\nxor.b32 $0, t, 0x80808080;")
_LOWER_ZERO = tl.constexpr("{.reg .b32 t;\nmov.b32 t, $1;\n" + _SUBTRACT.value + "}")
_UPPER_ZERO = tl.constexpr("{.reg .b32 t;\nshr.u32 t, $1, 4;\n" + _SUBTRACT.value + "}")


@triton.jit
def _packed(
    asm: tl.constexpr,
    byte,  # (BLOCK_N, 64) int8
):
    return tl.inline_asm_elementwise(asm, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _packed_zero(
    asm: tl.constexpr,
    byte,  # (BLOCK_N, 64) int8
    zero,  # (BLOCK_N, 1) int8
):
    return tl.inline_asm_elementwise(asm, "=r,r,r", [byte, zero], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def weights_of(
    byte,  # (BLOCK_N, 64) int8, of a packed block
    zero,  # (BLOCK_N, 1) int8, of 4-bit affine weights
    HALF: tl.constexpr,  # 0, or 1 for the upper half of each byte
    BITS: tl.constexpr,
    AFFINE: tl.constexpr,
    PTX: tl.constexpr,
):
    """w of 64 columns, int8; of 4-bit symmetric weights 16 times that."""
    if BITS == 8:
        return _packed(_WHOLE, byte) if PTX else byte ^ -128
    elif AFFINE and PTX:
        return _packed_zero(_UPPER_ZERO if HALF else _LOWER_ZERO, byte, zero)
    elif AFFINE:
        return ((byte.to(tl.int32) >> (4 * HALF)) & 15).to(tl.int8) - zero
    elif PTX:
        return _packed(_UPPER if HALF else _LOWER, byte)
    else:
        return ((byte.to(tl.int32) << (0 if HALF else 4)) & 0xF0).to(tl.int8) ^ -128


@triton.constexpr_function
def most_groups(COLUMNS, GROUP):
    """Most groups that a block of so many k has a part in."""
    if GROUP == 0 or GROUP % COLUMNS == 0:
        return 1
    latest = GROUP - math.gcd(GROUP, COLUMNS)  # where in a group a block may begin
    return (latest + COLUMNS - 1) // GROUP + 1


@triton.jit
def columns_of(
    block,
    group,  # unused where GROUP is 0
    K,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Which of 64 columns are of a group, and not past K: (1, 64) int8, -1 or 0."""
    column = tl.arange(0, 64)
    k = block * (512 // BITS) + column % 4 * (128 // BITS) + HALF * 16 + column // 4
    inside = k < K
    if GROUP != 0:
        inside &= k // GROUP == group
    return tl.where(inside, -1, 0).to(tl.int8)[None, :]


@triton.jit
def keep_columns(
    w,  # int8
    keep,  # int8: -1 where w stays, else 0
    PTX: tl.constexpr,
):
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [w, keep], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return w & keep
