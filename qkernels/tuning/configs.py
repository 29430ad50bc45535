"""How a kernel is launched: one frozen dataclass per kernel. What is launched is the scheme's business.

Blocks are powers of two: block_n output features (rows of the weight), block_m tokens, block_k input features.
"""

import dataclasses
import functools


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
    """Of matmul_kernel: unpacks and multiplies in one."""

    block_m: int  # at least 8
    block_n: int
    blocks: int  # whole packed blocks (packing.block_columns values of k) that a step of the main loop unpacks
    splits: int  # of K: each sums its part, and reduce.py adds them in order; fewer where K has not so many steps
    num_warps: int  # 4 and more use Hopper's wgmma
    num_stages: int
    max_registers: int  # that a thread may have
    # Scale each weight, rounding it to x's dtype, instead of each group's sum: fewer registers and, with many tokens,
    # fewer instructions. Where all of K is one group it is scaled at the end, whatever stands here.
    scale_weights: bool = False

    @functools.cached_property
    def _hash(self) -> int:
        return hash(dataclasses.astuple(self))

    def __hash__(self) -> int:
        return self._hash  # every matmul looks up its launch


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Dequantizes to x's dtype, some rows at a time into one workspace, and leaves the product to cuBLAS."""

    rows: int  # output features at a time


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """Of activations_kernel: a program for each token."""

    words: int  # of codes, four each, that a program holds in registers; longer tokens are read twice
    num_warps: int
