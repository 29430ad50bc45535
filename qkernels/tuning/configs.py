"""How a kernel is launched: one frozen dataclass per kernel. What is launched is the scheme's business.

Blocks are powers of two: block_n output features (rows of the weight), block_m tokens, block_k input features.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Of quantize_kernel and encode_kernel."""

    block_n: int
    line: int  # along K, of one line of a tile, which at most two threads share: whole blocks of every plane
    tile: int  # along K: whole lines and, in quantize_kernel, whole groups
    num_warps: int


@dataclasses.dataclass(frozen=True)
class DequantizeConfig:
    """Of dequantize_kernel."""

    block_n: int
    block_k: int
    num_warps: int
    max_registers: int | None  # that a thread may have; None is as many as ptxas likes


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Of matmul_kernel."""

    block_m: int  # at least 16
    block_n: int
    blocks: int  # whole packed blocks (packing.block_columns values of k) that a step of the main loop unpacks
    num_warps: int
    num_stages: int
    max_registers: int  # that a thread may have
