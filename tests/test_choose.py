"""Which configuration a problem gets: a table, so that a change of policy is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qkernels import packing
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import MatmulConfig, QuantizeConfig
from tests.helpers import ALL_MAPS

DECODE = MatmulConfig(block_m=16, block_n=64, blocks=1, num_warps=2, num_stages=3, max_registers=128)
FLOAT32 = dataclasses.replace(DECODE, num_warps=4)
BATCH = MatmulConfig(block_m=32, block_n=32, blocks=1, num_warps=2, num_stages=3, max_registers=128)


@pytest.mark.parametrize(
    ("tokens", "scheme", "dtype", "wanted", "large"),
    [
        (1, "w4g128", torch.float16, DECODE, False),
        (16, "w4g128", torch.bfloat16, DECODE, False),
        (17, "w4g128", torch.float16, BATCH, False),
        (8192, "w8cs", torch.float16, BATCH, False),
        (1, "w4g128", torch.float32, FLOAT32, True),
        (64, "w4g128", torch.float32, FLOAT32, True),
        (1, "w4g128f", torch.float16, DECODE, True),
        (1, "w3g128", torch.float16, DECODE, True),
        (1, "w4g48", torch.float16, DECODE, True),
        (1, "w4g192", torch.float16, DECODE, True),
        (1, "w4g64", torch.float16, DECODE, True),
        (64, "w6ts", torch.bfloat16, BATCH, True),
        (64, "w7ts", torch.bfloat16, DECODE, True),
        (64, "w1g256", torch.bfloat16, DECODE, False),
    ],
)
def test_matmul(tokens: int, scheme: str, dtype: torch.dtype, wanted: MatmulConfig, large: bool) -> None:
    found = choose.matmul(tokens, Scheme.parse(scheme), dtype)
    assert found == dataclasses.replace(wanted, max_registers=255 if large else 128)


@pytest.mark.parametrize(
    ("scheme", "in_features", "fits", "wanted"),
    [
        ("w4g128", 4096, True, QuantizeConfig(block_n=16, line=128, tile=512, num_warps=4)),
        ("w8g16", 4096, True, QuantizeConfig(block_n=16, line=128, tile=512, num_warps=4)),
        ("w3g128", 4096, True, QuantizeConfig(block_n=16, line=256, tile=1024, num_warps=4)),
        ("w3g256", 4096, True, QuantizeConfig(block_n=8, line=256, tile=1024, num_warps=4)),  # fewer: long groups
        ("w4g1024", 4096, True, QuantizeConfig(block_n=8, line=128, tile=1024, num_warps=4)),
        ("w4g128", 100, True, QuantizeConfig(block_n=64, line=128, tile=128, num_warps=4)),
        ("w4g48", 4096, False, QuantizeConfig(block_n=16, line=128, tile=512, num_warps=4)),
        ("w4g48", 48, True, QuantizeConfig(block_n=64, line=128, tile=128, num_warps=4)),  # one group is a whole row
        ("w4c", 8192, True, QuantizeConfig(block_n=1, line=128, tile=8192, num_warps=4)),
        ("w1cf", 8192, True, QuantizeConfig(block_n=1, line=256, tile=8192, num_warps=4)),
        ("w4c", 8193, False, QuantizeConfig(block_n=16, line=128, tile=512, num_warps=4)),
        ("w4t", 64, False, QuantizeConfig(block_n=64, line=128, tile=128, num_warps=4)),
    ],
)
def test_quantize(scheme: str, in_features: int, fits: bool, wanted: QuantizeConfig) -> None:
    parsed = Scheme.parse(scheme)
    assert choose.group_fits_tile(parsed, in_features) is fits
    assert choose.quantize(parsed, in_features) == wanted


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
@pytest.mark.parametrize("group", ["g16", "g48", "c"])
def test_blocks_are_powers_of_two(bits: int, suffix: str, group: str) -> None:
    scheme = Scheme.parse(f"w{bits}{group}{suffix}")
    for tokens in (1, 15, 16, 17, 100_000):
        config = choose.matmul(tokens, scheme, torch.float16)
        block_k = config.blocks * packing.block_columns(bits)
        for size in (config.block_m, config.block_n, block_k, config.num_warps):
            assert size & (size - 1) == 0
        assert config.block_m >= 16
