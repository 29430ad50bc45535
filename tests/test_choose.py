"""Which configuration a problem gets: a table, so that a change of policy is seen."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from qkernels.scheme import Scheme
from qkernels.tuning import choose, tables
from qkernels.tuning.configs import DenseConfig, MatmulConfig, QuantizeConfig
from qkernels.tuning.devices import H200, Device
from tests.helpers import ALL_MAPS

DECODE = MatmulConfig(8, 64, blocks=1, splits=1, num_warps=1, num_stages=3, max_registers=168)
FEW = dataclasses.replace(DECODE, block_m=16, max_registers=255)
PLANES = dataclasses.replace(DECODE, num_warps=2, max_registers=255)
BATCH = dataclasses.replace(PLANES, block_m=32)
FLOAT32 = dataclasses.replace(FEW, num_warps=4)
A100 = Device("NVIDIA A100-SXM4-80GB", 80, 108)
L4 = Device("NVIDIA L4", 89, 58)
B200 = Device("NVIDIA B200", 100, 148)


@pytest.mark.parametrize(
    ("tokens", "scheme", "dtype", "wanted"),
    [
        (1, "w4g128", torch.float16, DECODE),
        (8, "w4g64", torch.bfloat16, DECODE),
        (1, "w8cs", torch.bfloat16, dataclasses.replace(DECODE, max_registers=184)),
        (1, "w2g128f", torch.float16, DECODE),
        (1, "w1g128", torch.float16, dataclasses.replace(DECODE, max_registers=255)),
        (9, "w4g128", torch.float16, FEW),
        (16, "w4g128f", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (1, "w3g128", torch.float16, PLANES),
        (8, "w4g32", torch.bfloat16, PLANES),
        (8, "w4g192", torch.bfloat16, PLANES),
        (16, "w4g32", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (17, "w4g128", torch.float16, BATCH),
        (33, "w4g128f", torch.float16, BATCH),
        (33, "w6ts", torch.bfloat16, BATCH),
        (33, "w7ts", torch.bfloat16, BATCH),
        (33, "w1g128", torch.bfloat16, BATCH),
        (33, "w3g128f", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (33, "w3g32", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (33, "w7g64", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (33, "w4g16", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (33, "w4g48", torch.bfloat16, dataclasses.replace(PLANES, block_m=16)),
        (33, "w4g32", torch.bfloat16, BATCH),
        (33, "w4g128", torch.bfloat16, dataclasses.replace(BATCH, block_m=64)),
        (33, "w4g64", torch.bfloat16, BATCH),
        (33, "w6g32f", torch.bfloat16, dataclasses.replace(BATCH, block_m=16)),
        (1, "w4g128", torch.float32, FLOAT32),
        (32, "w4g128", torch.float32, FLOAT32),
    ],
)
def test_tiles(tokens: int, scheme: str, dtype: torch.dtype, wanted: MatmulConfig) -> None:
    found = choose.matmul(tokens, 4096, 4096, Scheme.parse(scheme), dtype, H200)
    assert isinstance(found, MatmulConfig)
    assert dataclasses.replace(found, splits=1) == wanted


@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens", "device", "splits"),
    [
        (4096, 4096, 1, H200, 16),  # 64 blocks of rows would leave half of the GPU idle
        (6144, 4096, 1, H200, 8),
        (28672, 4096, 1, H200, 2),
        (57344, 8192, 1, H200, 1),
        (4096, 4096, 64, H200, 8),
        (28672, 4096, 64, H200, 1),  # partial sums would be half as large as the weights
        (4096, 4096, 256, H200, 2),
        (4096, 128, 1, H200, 1),  # nothing to split
        (4096, 4096, 1, L4, 8),
        (28672, 4096, 1, L4, 1),
    ],
)
def test_splits(out_features: int, in_features: int, tokens: int, device: Device, splits: int) -> None:
    found = choose.matmul(tokens, out_features, in_features, Scheme.parse("w4g128"), torch.bfloat16, device)
    assert isinstance(found, MatmulConfig)
    assert found.splits == splits


@pytest.mark.parametrize(
    ("text", "device", "dtype", "most"),
    [
        ("w4g128", H200, torch.bfloat16, 464),
        ("w4g64", H200, torch.bfloat16, 464),
        ("w4g16", H200, torch.bfloat16, 176),  # tiles of 16 tokens: unpacking takes longer than multiplying
        ("w4g128", A100, torch.float16, 800),
        ("w4g128", L4, torch.float16, 864),
        ("w4g128", B200, torch.bfloat16, 208),
        ("w4g128", Device("of 2030", 150, 200), torch.bfloat16, 608),  # as the newest that is known
        ("w4g128", Device("of 2018", 75, 40), torch.float16, 800),  # as the oldest
        ("w4g128", H200, torch.float32, 32),
    ],
)
def test_many_tokens_are_left_to_cublas(text: str, device: Device, dtype: torch.dtype, most: int) -> None:
    scheme = Scheme.parse(text)
    assert choose.most_fused_tokens(scheme, dtype, device) == most
    assert isinstance(choose.matmul(most, 4096, 4096, scheme, dtype, device), MatmulConfig)
    assert isinstance(choose.matmul(most + 1, 4096, 4096, scheme, dtype, device), DenseConfig)


def test_the_workspace_is_bounded_and_passes_are_even() -> None:
    assert choose.dense(4096, 4096, torch.bfloat16) == DenseConfig(rows=4096)
    assert choose.dense(57344, 8192, torch.bfloat16) == DenseConfig(rows=14336)
    assert choose.dense(5, 0, torch.bfloat16) == DenseConfig(rows=5)
    assert choose.dense(3, 2**28 - 16, torch.float32) == DenseConfig(rows=1)  # a row may be larger than the workspace
    assert choose.dense(128256, 4096, torch.float16) == DenseConfig(rows=32256)  # 4 passes; 8 MB above the bound
    assert choose.dense(999, 100_000, torch.float16) == DenseConfig(rows=999)
    assert choose.dense(100, 2**22, torch.float16) == DenseConfig(rows=25)


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
def test_what_is_chosen_is_possible(bits: int, suffix: str, group: str) -> None:
    scheme = Scheme.parse(f"w{bits}{group}{suffix}")
    for tokens, device in itertools.product((1, 15, 16, 17, 400, 100_000), (H200, A100, L4, B200)):
        for dtype in (torch.float16, torch.float32):
            tables.check(choose.matmul(tokens, 333, 777, scheme, dtype, device))


@pytest.mark.parametrize(
    ("scheme", "tokens", "tile"),
    [
        ("w8a8", 1, (8, 64, 1)),
        ("w8a8", 9, (16, 64, 1)),
        ("w8a8", 17, (32, 64, 2)),
        ("w8a8", 33, (64, 64, 4)),
        ("w8a8", 65, (128, 128, 8)),
        ("w8a8", 1024, (128, 128, 8)),  # larger tiles would leave multiprocessors without one
        ("w8a8", 2048, (256, 128, 8)),
        ("w4a8", 2048, (128, 128, 8)),  # sums of groups are float32, too
        ("w8c-a8s", 2048, (64, 128, 8)),  # affine codes have sums beside the product's
        ("w8g128-a8s", 2048, (64, 64, 4)),
        ("w4g64-a8s", 2048, (32, 64, 2)),  # two groups in a block
        ("w4g64-a8", 2048, (16, 64, 2)),
        ("w4g16-a8s", 2048, (16, 64, 2)),
        ("w4g16-a8", 2048, (8, 64, 2)),
    ],
)
def test_tiles_of_products_of_codes(scheme: str, tokens: int, tile: tuple[int, int, int]) -> None:
    config = choose.heuristic(tokens, 4096, 4096, Scheme.parse(scheme), torch.bfloat16, H200)
    assert isinstance(config, MatmulConfig)  # never torch._int_mm, unless a table says so
    assert (config.block_m, config.block_n, config.num_warps) == tile
    if tokens > 1024:
        assert config.splits == 1
    assert (config.max_registers == 128) == (tile == (128, 128, 8) and scheme == "w8a8" and config.splits == 1)


def test_activations_fit_a_program() -> None:
    for in_features, words, warps in ((1, 16, 1), (4096, 1024, 4), (14336, 4096, 16), (53248, 4096, 16)):
        found = choose.activations(Scheme.parse("w8a8"), in_features)
        assert (found.words, found.num_warps) == (words, warps)
