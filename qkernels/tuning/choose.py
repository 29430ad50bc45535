"""Which configuration a launch gets: pure functions of the problem, no state, no measurement.

The tests compile a selection of problems for each supported compute capability, with what is returned here: shared
memory must be within its limit, and only the largest bodies of matmul may spill, 32 bytes at most.
"""

import dataclasses

import torch

from qkernels.packing import PLANES, activation_words, block_columns
from qkernels.scheme import Scheme
from qkernels.tuning import tables
from qkernels.tuning.configs import ActivationConfig, DenseConfig, DequantizeConfig, MatmulConfig, QuantizeConfig
from qkernels.tuning.devices import Device

WORKSPACE_BYTES = 1 << 28  # of dequantized weights at a time

# What a launch more, and a load from memory, take on recent GPUs: about.
_REDUCE_US = 1.5
_LATENCY_US = 1.0

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


def activations(scheme: Scheme, in_features: int) -> ActivationConfig:
    """For the kernel of activations.py: 8 words of codes, 32 values of x, for each of at most 512 threads."""
    words = min(4096, _power_of_two(activation_words(scheme.bits, in_features)))
    return ActivationConfig(words=words, num_warps=min(16, max(1, words // 256)))


def matmul(
    tokens: int, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype, device: Device
) -> MatmulConfig | DenseConfig:
    """How to multiply (tokens, in_features) by a weight: as a table measured on this GPU says, else by `heuristic`."""
    tuned = tables.lookup(tokens, out_features, in_features, scheme, dtype, device)
    return tuned or heuristic(tokens, out_features, in_features, scheme, dtype, device)


def heuristic(
    tokens: int, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype, device: Device
) -> MatmulConfig | DenseConfig:
    """Sane on any GPU: from what is known of it, and from what its machine code costs; measured on none.

    Few tokens are a matter of reading weights: the fused kernel, its K split until the GPU is full. Many are a matter
    of arithmetic, at which cuBLAS is best: from about where dequantizing costs less than what it gains. Quantized
    activations stay with the fused kernel: cuBLAS's int32 sums, written and read, and its copy of the weights cost
    about what it can gain. Which is faster, only a table knows.
    """
    if scheme.activations is None and tokens > most_fused_tokens(scheme, dtype, device):
        return dense(out_features, in_features, dtype)
    return fused(tokens, out_features, in_features, scheme, dtype, device)


def fused(
    tokens: int, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype, device: Device
) -> MatmulConfig:
    """The fused kernel's configuration, by the heuristic, for any number of tokens."""
    tile = (
        _tile(tokens, scheme, dtype) if scheme.activations is None else _tile_int8(tokens, out_features, scheme, device)
    )
    splits = _splits(tile, tokens, out_features, in_features, scheme, device)
    if splits > 1 and scheme.activations is not None:
        tile = dataclasses.replace(tile, max_registers=255)  # integer sums, written as they are, take more at the end
    return dataclasses.replace(tile, splits=splits)


def dense(out_features: int, in_features: int, dtype: torch.dtype) -> DenseConfig:
    """As few passes as the workspace allows, of equal size: whole tiles of cuBLAS where that adds but little."""
    passes = -(-out_features * in_features * dtype.itemsize // WORKSPACE_BYTES)
    rows = -(-out_features // max(1, passes))
    multiple = next((multiple for multiple in (256, 16) if rows >= 4 * multiple), 1)
    return DenseConfig(rows=min(out_features, -(-rows // multiple) * multiple))


def most_fused_tokens(scheme: Scheme, dtype: torch.dtype, device: Device) -> int:
    """How many tokens the fused kernel serves sooner than dequantizing and cuBLAS, were both at their rates.

    Dequantizing a weight moves about 2.5 bytes, and 2 are read again. The fused kernel does 2 operations for each token
    and weight at a lower rate than cuBLAS, and unpacks a weight, by about 4 instructions, for each tile of tokens.
    """
    if dtype is torch.float32:
        return 32  # without tensor cores the fused kernel has no chance
    rates = device.rates
    unpacking = 4 / _tile(1 << 20, scheme, dtype).block_m / rates.issue
    lost = max(2 / (rates.fused * rates.tensor), unpacking) - 2 / rates.tensor  # seconds for a token and weight
    return round(4.5 / rates.bandwidth / lost / 16) * 16


def _tile(tokens: int, scheme: Scheme, dtype: torch.dtype) -> MatmulConfig:
    """Tile and warps by what compiled code costs; see `python -m benchmarks.static_cost`.

    One warp of 64 rows takes fewest instructions, and warps on their own never wait for each other. Codes of several
    planes, short groups and more tokens need more registers, so two warps share the rows.
    """
    if dtype is torch.float32:
        return MatmulConfig(16, 64, blocks=1, splits=1, num_warps=4, num_stages=3, max_registers=255)
    step = block_columns(scheme.bits)
    group, offset, long_step = scheme.group_size, scheme.value_map == "offset", step == 256
    # Each group that ends inside a step takes registers for a sum, a scale and a zero of its own.
    odd = isinstance(group, int) and (group == 16 or group != _power_of_two(group))
    short = odd or group in range(64)
    half = group in range(128)
    light = len(PLANES[scheme.bits]) == 1 and not short
    block_m = 8 if tokens <= 8 else 16
    if tokens > 16 and not odd and short + offset + long_step <= 1 and not (long_step and half):
        block_m = 32
    if tokens > 32 and not long_step and light and not offset and not half:
        block_m = 64
    num_warps = 1 if light and (block_m == 8 or (block_m == 16 and not long_step and not offset)) else 2
    # Left to itself, ptxas aims at a step of occupancy, and often spills a register or two to reach it.
    max_registers = 255
    if light and block_m == 8 and not long_step:
        max_registers = 184 if scheme.bits == 8 else 168  # for 11 or 12 programs on a multiprocessor
    return MatmulConfig(block_m, 64, 1, splits=1, num_warps=num_warps, num_stages=3, max_registers=max_registers)


def _tile_int8(tokens: int, out_features: int, scheme: Scheme, device: Device) -> MatmulConfig:
    """Tile and warps of products of codes, by what compiled code costs.

    Up to 16 tokens one warp of 64 rows, as of 16-bit products. More tokens are a matter of arithmetic: as large a tile
    as registers can hold the sums of. Affine codes have sums of their own beside them (see matmul_int8.py), groups
    float32 ones, and short groups several at a time.
    """
    assert scheme.activations is not None
    columns, group = block_columns(scheme.bits), scheme.group_size
    grouped = isinstance(group, int)
    short = isinstance(group, int) and group % columns != 0
    sums = 1 + (not scheme.activations.symmetric) + (scheme.bits == 8 and scheme.value_map == "affine")
    many = short and (sums > 2 or group not in (columns // 2, columns + columns // 2))  # sums in a block
    stages, max_registers = 3, 255
    if many:
        block_m, block_n, num_warps = 8 if tokens <= 8 or not scheme.activations.symmetric else 16, 64, 2
    elif tokens <= 16:
        block_m, block_n, num_warps = 8 if tokens <= 8 else 16, 64, 1
    elif tokens <= 32 or short:
        block_m, block_n, num_warps = 16 if short and sums > 1 else 32, 64, 2
    elif tokens <= 64 or (grouped and sums > 1):
        block_m, block_n, num_warps = 64, 64, 4
    elif sums > 1:
        block_m, block_n, num_warps = 64, 128, 8
    elif grouped or device.capability != 90 or -(-tokens // 256) * -(-out_features // 128) < device.multiprocessors:
        block_m, block_n, num_warps = 128, 128, 8
        if not grouped and (device.capability == 90 or scheme.bits == 8):
            max_registers = 128  # two programs on a multiprocessor: one multiplies while the other waits
    else:
        block_m, block_n, num_warps, stages = 256, 128, 8, 4
    return MatmulConfig(block_m, block_n, 1, 1, num_warps, stages, max_registers)


def _splits(
    tile: MatmulConfig, tokens: int, out_features: int, in_features: int, scheme: Scheme, device: Device
) -> int:
    """The splits of K that a model of the time likes best.

    Every multiprocessor has its share of the bandwidth, of which few programs, each with only num_stages - 1 steps
    under way, leave some unused. The partial sums are written and read, and adding them up is one more launch.
    """
    step = tile.blocks * block_columns(scheme.bits)
    steps = max(1, in_features // step)
    step_us = tile.block_n * step * scheme.bits / 8 / (device.rates.bandwidth * 1e-6 / device.multiprocessors)
    enough = _LATENCY_US / (step_us * (tile.num_stages - 1))  # programs that keep a multiprocessor's share busy
    blocks = -(-out_features // tile.block_n) * -(-tokens // tile.block_m)

    def time_us(splits: int) -> float:
        split_steps = -(-steps // splits)
        programs = -(-blocks * -(-steps // split_steps) // device.multiprocessors)  # on the busiest
        time = max(programs, enough) * split_steps * step_us
        if splits > 1:
            time += _REDUCE_US + 8 * splits * tokens * out_features / (device.rates.bandwidth * 1e-6)
        return time

    return min((1, 2, 3, 4, 6, 8, 12, 16), key=time_us)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
