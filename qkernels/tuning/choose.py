"""Which configuration a launch gets: pure functions of the problem, no state, no measurement.

The tests compile a selection of problems for each supported compute capability, with what is returned here: shared
memory must be within its limit, and only the largest bodies of matmul may spill, 32 bytes at most.
"""

import torch

from qkernels.packing import PLANES, block_columns
from qkernels.scheme import Scheme
from qkernels.tuning.configs import DequantizeConfig, MatmulConfig, QuantizeConfig

_LARGEST_TILE = 8192  # weights of one row that a quantizing program holds in registers


def group_fits_tile(scheme: Scheme, in_features: int) -> bool:
    """Whether quantize can find ranges and codes in one pass: a tile holds whole groups.

    Tiles are powers of two: so must groups be, unless one group is a whole row.
    """
    if scheme.group_size == "tensor":
        return False
    length = scheme.group_length(in_features)
    return (length & (length - 1) == 0 or length >= in_features) and _power_of_two(length) <= _LARGEST_TILE


def quantize(scheme: Scheme, in_features: int) -> QuantizeConfig:
    """For the kernels of quantize.py: 128 threads for 64 lines of 128 or 256 weights, or for one row.

    A thread keeps 64 weights, or 128 where lines are of 256; then groups longer than 128, all of whose weights are
    float32 values at a time, get half as many lines.
    """
    line = max(128, block_columns(scheme.bits))
    tile = max(line, min(4 * line, _power_of_two(in_features)))
    lines = 64
    if group_fits_tile(scheme, in_features):
        group = _power_of_two(scheme.group_length(in_features))
        tile = max(tile, group)
        lines = 32 if group > 128 and line > 128 else 64
    return QuantizeConfig(block_n=max(1, lines * line // tile), line=line, tile=tile, num_warps=4)


def dequantize(dtype: torch.dtype) -> DequantizeConfig:
    """For the kernel of dequantize.py and weights of that dtype. The scales of 16 rows fill a sector of 32 bytes.

    Left to itself, ptxas spills a register of some float32 kernels for the sake of occupancy; but where it need not
    care for that, it takes twice the registers that 16-bit ones need.
    """
    max_registers = 128 if dtype is torch.float32 else None
    return DequantizeConfig(block_n=16, block_k=1024, num_warps=4, max_registers=max_registers)


def matmul(tokens: int, scheme: Scheme, dtype: torch.dtype) -> MatmulConfig:
    """For the kernel of matmul.py and x of so many tokens."""
    # Planes of 1 bit make a step of 256 k, and float32 has no tensor cores: no registers are left for more tokens.
    without_mma = dtype is torch.float32
    wide = tokens > 16 and block_columns(scheme.bits) < 256 and not without_mma
    # Left to itself, ptxas aims at a step of occupancy, and often spills a register or two to reach it.
    group = scheme.group_size
    short_chunks = isinstance(group, int) and (group < 128 or group != _power_of_two(group))
    large = len(PLANES[scheme.bits]) > 1 or scheme.value_map == "offset" or short_chunks or without_mma
    return MatmulConfig(
        block_m=32 if wide else 16,
        block_n=32 if wide else 64,
        blocks=1,
        num_warps=4 if without_mma else 2,
        num_stages=3,
        max_registers=255 if large else 128,
    )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
