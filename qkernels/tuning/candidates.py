"""What the search for the best configuration tries, round by round; see tune.py. Pure functions of the problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from qkernels import packing
from qkernels.scheme import Scheme
from qkernels.tuning import choose, tables
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import Device

Config = MatmulConfig | DenseConfig

_TILES = ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (128, 8))  # rows of the weight, warps
_INT8_TILES = ((32, 1), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 8))
_MOST_TOKENS, _MOST_INT8_TOKENS = 128, 256  # in a tile
_CACHED_BYTES = 1 << 24  # of a weight as int8 that stays in L2 between two kernels


@dataclasses.dataclass(frozen=True)
class Problem:
    """(tokens, in_features) times a weight (out_features, in_features); dtype of x, float16 or bfloat16."""

    tokens: int
    out_features: int
    in_features: int
    scheme: str
    dtype: str

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def tiles(best: Config, problem: Problem, device: Device) -> list[Config]:
    """First round: the best so far, tiles that cover the tokens with little to spare, cuBLAS."""
    int8 = problem.parsed.activations is not None
    size = problem.tokens, problem.out_features, problem.in_features
    start = choose.fused(*size, problem.parsed, problem.torch_dtype, device)
    found: list[Config] = [best, start]
    enough = min(_MOST_INT8_TOKENS if int8 else _MOST_TOKENS, max(8, 1 << (problem.tokens - 1).bit_length()))
    for block_m in sorted({max(8, enough // n) for n in (1, 2, 4)}):
        for block_n, num_warps in _INT8_TILES if int8 else _TILES:
            sums = block_m * block_n // (32 * num_warps)  # that a thread keeps
            if (8 if int8 else 16) <= sums <= 128:
                # At least two programs to a multiprocessor, unless sums alone fill half of the registers.
                registers = min(255, (65536 if int8 and sums > 64 else 32768) // (32 * num_warps))
                for scaled in (False, True):
                    tile = MatmulConfig(block_m, block_n, 1, start.splits, num_warps, 3, registers, scaled)
                    found.append(tile)
    return _possible(found + _dense(problem), problem)


def _dense(problem: Problem) -> list[Config]:
    """cuBLAS, from the tokens on at which it may pay; with codes, also by so few rows that they stay in L2."""
    if problem.parsed.activations is None:
        rows = choose.dense(problem.out_features, problem.in_features, problem.torch_dtype)
        return [rows] if problem.tokens >= 32 else []
    few = max(256, _CACHED_BYTES // problem.in_features // 256 * 256)
    whole = choose.dense(problem.out_features, problem.in_features, torch.int8)
    return [whole, DenseConfig(rows=min(problem.out_features, few))]


def splits(best: Config, problem: Problem, device: Device) -> list[Config]:
    """Second round."""
    if isinstance(best, DenseConfig):
        return []
    steps = max(1, problem.in_features // (best.blocks * packing.block_columns(problem.parsed.bits)))
    wanted = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    return [dataclasses.replace(best, splits=n) for n in wanted if n <= steps and n != best.splits]


def pipelines(best: Config, problem: Problem, device: Device) -> list[Config]:
    """Third round: stages, blocks to a step, registers."""
    if isinstance(best, DenseConfig):
        return []
    found: list[Config] = [dataclasses.replace(best, num_stages=n) for n in (2, 4, 5, 6)]
    found += [dataclasses.replace(best, blocks=2 * best.blocks, num_stages=n) for n in (2, 3)]
    found += [
        dataclasses.replace(best, max_registers=n) for n in (96, 128, 168, 255) if n * 32 * best.num_warps <= 65536
    ]
    return _possible(found, problem)


def _possible(found: Iterable[Config], problem: Problem) -> list[Config]:
    """Each once, in order, if it can serve the problem."""
    given = problem.parsed, problem.torch_dtype, problem.tokens, problem.in_features
    return [config for config in dict.fromkeys(found) if tables.fits(config, *given)]
