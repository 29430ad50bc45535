"""Quantized activations on a GPU: integer tensor cores, graphs, large offsets. test_kernels_int8.py runs there too.

Nearly everything here is exact: where a row of weights has one scale the oracle's bits are demanded.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import dispatch_int8, ops, ops_int8, reference_int8
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import device_of
from tests import truth
from tests.helpers import Weight, exact_weight, random_weight, signs

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS = (1, 8, 9, 17, 40, 65, 130, 300, 1024)  # each tile that choose.py has, whole and not
WEIGHTS = [(bits, suffix) for bits in (4, 8) for suffix in ("", "s")]


def _static(scheme: Scheme) -> Tensor | None:
    how = scheme.activations
    assert how is not None
    return torch.tensor([0.03, 0.0 if how.symmetric else 21.0]) if how.static else None


def _oracle(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    assert weight.scheme.activations is not None
    codes = reference_int8.quantize_activations(x, weight.scheme.activations, _static(weight.scheme))
    return reference_int8.matmul(*codes, *weight.args("cpu"), bias, weight.scheme, x.dtype)


def _there(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    static = _static(weight.scheme)
    return ops.matmul(
        x.cuda(),
        *weight.args("cuda"),
        None if bias is None else bias.cuda(),
        str(weight.scheme),
        weight.in_features,
        None if static is None else static.cuda(),
    ).cpu()


@pytest.mark.parametrize("how", ["a8s", "a8", "a8ts", "a8t"])
@pytest.mark.parametrize(("bits", "suffix"), WEIGHTS)
def test_one_scale_for_a_row_gives_the_bits_of_the_oracle(bits: int, suffix: str, how: str) -> None:
    for unit, in_features, tokens, dtype in zip(
        itertools.cycle("ct"), itertools.cycle((1104, 2048, 1000)), TOKENS, itertools.cycle(DTYPES), strict=False
    ):
        weight = random_weight(f"w{bits}{unit}{suffix}-{how}", 777, in_features, seed=tokens)
        x, bias = (torch.randn(tokens, in_features) * torch.randn(tokens, 1).exp()).to(dtype), torch.randn(777)
        assert torch.equal(_there(x, weight, bias), _oracle(x, weight, bias)), (unit, in_features, tokens, dtype)


@pytest.mark.parametrize("how", ["a8s", "a8"])
@pytest.mark.parametrize(("bits", "suffix"), WEIGHTS)
def test_groups_are_exact(bits: int, suffix: str, how: str) -> None:
    """x of -1, 0 and 1, in tokens where both come: codes 127 or 255 apart, scales and zeros that are exact in float32.

    So sums of groups are multiples of a power of two below 2^24 of them, but for the scale 1 / 127, which comes last.
    """
    groups = ("g128", "g64", "g32", "g16", "g48", "g256", "g96")
    for group, tokens, dtype in zip(itertools.cycle(groups), TOKENS, itertools.cycle(DTYPES), strict=False):
        weight = exact_weight(f"w{bits}{group}{suffix}-{how}", 333, 1024 + 80, seed=tokens)
        code = torch.randint(-2, 3, (tokens, weight.in_features), dtype=torch.int8)
        scale = torch.randint(-3, 4, (tokens,)).float().exp2()
        zero = torch.randint(-2, 3, (tokens,), dtype=torch.int8) if how == "a8" else None
        packed = qkernels.packing.pack_activations(code, bits).cuda()
        beside = scale.cuda(), None if zero is None else zero.cuda()
        args = (*weight.args("cuda"), None, str(weight.scheme), weight.in_features, dtype)
        y = ops_int8.matmul(packed, *beside, *args).cpu()
        integers = truth.as_array(code) - (0 if zero is None else truth.as_array(zero)[:, None])
        exact = integers @ weight.values.T * truth.as_array(scale)[:, None]
        assert torch.equal(y, truth.rounded(exact, dtype)), (group, tokens, dtype)


@pytest.mark.parametrize("how", ["a8s", "a8", "a8ts", "a8t"])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_equal_the_oracle(bits: int, how: str) -> None:
    scheme = Scheme.parse(f"w{bits}c-{how}")
    static = _static(scheme)
    for dtype, (tokens, in_features) in itertools.product(DTYPES, ((1, 4096), (300, 1000), (33, 28672), (7, 20001))):
        x = (torch.randn(tokens, in_features) * torch.randn(tokens, 1).exp()).to(dtype)
        x[0, 0] = float("nan") if tokens > 1 else 3.0
        there = None if static is None else static.cuda()
        found = dispatch_int8.quantize_activations(x.cuda(), scheme, there)
        wanted = dispatch_int8.packed_oracle(x, scheme, static, None, 0.0)
        assert torch.equal(found[0].cpu(), wanted[0])
        assert torch.equal(found[1].cpu().nan_to_num(-1), wanted[1].nan_to_num(-1))
        assert (found[2] is None) == (wanted[2] is None)
        assert found[2] is None or wanted[2] is None or torch.equal(found[2].cpu(), wanted[2])


def test_a_norm_is_within_a_code_of_the_oracle() -> None:
    x, norm = torch.randn(50, 14336), torch.rand(14336) + 0.5
    scheme = Scheme.parse("w8cs-a8s")
    codes, scale, _ = dispatch_int8.quantize_activations(x.cuda(), scheme, None, norm.cuda(), 1e-5)
    wanted = dispatch_int8.packed_oracle(x, scheme, None, norm, 1e-5)
    torch.testing.assert_close(scale.cpu(), wanted[1], rtol=2.0**-18, atol=0)
    apart = codes.cpu().view(torch.int8).int() - wanted[0].view(torch.int8).int()
    assert apart.abs().max() <= 1


@pytest.mark.parametrize("tokens", [17, 300, 2048])
def test_products_of_torch_have_the_same_bits(tokens: int) -> None:
    weight, x = random_weight("w8cs-a8s", 1003, 2048), torch.randn(tokens, 2048).bfloat16()
    wanted = _oracle(x, weight)
    codes, scale, _ = dispatch_int8.quantize_activations(x.cuda(), weight.scheme, None)
    args = (*weight.args("cuda"), None)
    for config in (DenseConfig(1003), DenseConfig(256)):
        product = dispatch_int8.product(codes.shape, *args, weight.scheme, 2048, torch.bfloat16, config)
        assert torch.equal(product(codes, scale, None, *args).cpu(), wanted), config


@pytest.mark.parametrize(
    ("block_m", "block_n", "warps", "stages"),
    [
        (16, 64, 1, 3),
        (32, 64, 2, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 4),
        (128, 128, 8, 3),
        (256, 128, 8, 4),
        (128, 64, 4, 2),
    ],
)
@pytest.mark.parametrize("text", ["w8cs-a8s", "w8c-a8", "w4cs-a8", "w4c-a8s"])
def test_every_tile_gives_the_same_bits(text: str, block_m: int, block_n: int, warps: int, stages: int) -> None:
    """What mma.sync and wgmma make of it, with splits and without, again and again: races show here."""
    weight, x = random_weight(text, 700, 4096 + 64), torch.randn(260, 4096 + 64).bfloat16()
    wanted = _oracle(x, weight)
    codes, scale, zero = dispatch_int8.quantize_activations(x.cuda(), weight.scheme, None)
    args = (*weight.args("cuda"), None)
    for blocks, splits in ((1, 1), (2, 1), (1, 3)):
        config = MatmulConfig(block_m, block_n, blocks, splits, warps, stages, 255)
        product = dispatch_int8.product(codes.shape, *args, weight.scheme, 4096 + 64, torch.bfloat16, config)
        for _ in range(20):
            assert torch.equal(product(codes, scale, zero, *args).cpu(), wanted), config


@pytest.mark.parametrize("text", ["w8cs-a8s", "w4g128-a8s"])
def test_a_thousand_runs_have_the_same_bits(text: str) -> None:
    for tokens in (7, 100, 1000):
        weight, x = random_weight(text, 1024, 2048), torch.randn(tokens, 2048, dtype=torch.float16, device="cuda")
        args = (*weight.args("cuda"), None, text, 2048)
        first = ops.matmul(x, *args)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            different += (ops.matmul(x, *args) != first).sum()
        assert different.item() == 0


def test_first_call_inside_a_graph_capture_and_replays_with_changed_inputs() -> None:
    for text, tokens in (("w8ts-a8", 3), ("w4g80-a8s", 200)):
        weight = random_weight(text, 72, 400)
        args, x = weight.args("cuda"), torch.zeros(tokens, 400, dtype=torch.float16, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            y = ops.matmul(x, *args, None, text, 400)
        for seed in range(3):
            fresh = signs(tokens, 400, torch.float16, seed) * (seed + 1)
            x.copy_(fresh)
            graph.replay()
            torch.testing.assert_close(y.cpu(), _oracle(fresh, weight), rtol=2e-3, atol=2e-3)


def test_compiled_and_two_step_layers_agree_with_eager() -> None:
    layer = qkernels.QuantLinear.from_linear(torch.nn.Linear(256, 96), "w8a8").cuda()
    x = torch.randn(4, 7, 256, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    assert torch.equal(layer(qkernels.quantize_activations(x, "w8a8")), layer(x))


def test_offsets_beyond_int32() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(2**18 + 64, 8192, dtype=torch.float16, device="cuda")
    weight = random_weight("w8cs-a8s", 64, 8192)
    args = (*weight.args("cuda"), None, "w8cs-a8s", 8192)
    assert torch.equal(ops.matmul(x, *args)[-64:], ops.matmul(x[-64:].clone(), *args))
    rows = 2**18 + 64
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, 8192 // 4), dtype=torch.int32, device="cuda")
    scale = torch.ones(1, rows, dtype=torch.float16, device="cuda")
    y = ops.matmul(x[:2], packed, scale, None, None, "w8cs-a8s", 8192)
    assert torch.equal(
        y[:, -64:], ops.matmul(x[:2], packed[-64:].clone(), scale[:, -64:], None, None, "w8cs-a8s", 8192)
    )


def test_tokens_decide_the_tile() -> None:
    """That TOKENS above reach each tile on this GPU."""
    device, scheme = device_of(torch.cuda.current_device()), Scheme.parse("w8cs-a8s")
    tiles = {choose.heuristic(t, 777, 1104, scheme, torch.bfloat16, device) for t in TOKENS}
    assert len({tile.block_m for tile in tiles if isinstance(tile, MatmulConfig)}) >= 5
