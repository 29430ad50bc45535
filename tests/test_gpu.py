"""What only a GPU shows: tensor cores, streams, graphs, several devices, large offsets. test_kernels.py runs there too.

The first tests are exact: any wrong address, mask, synchronization or layout changes bits.
"""

from __future__ import annotations

import concurrent.futures
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import ops, reference
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import DenseConfig
from qkernels.tuning.devices import device_of
from tests import bounds, truth
from tests.helpers import ALL_MAPS, Weight, exact_weight, random_weight, signs

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _matmul(x: Tensor, weight: Weight, device: str = "cuda") -> Tensor:
    return ops.matmul(x, *weight.args(device), None, str(weight.scheme), weight.in_features)


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_large_products_are_exact(bits: int, suffix: str) -> None:
    """Many programs at once, many steps each: races and pipelining errors show here and not in small products."""
    for group, dtype, tokens in zip(
        ("g128", "g64", "g32", "g16", "c", "t"), itertools.cycle(DTYPES), (1, 16, 17, 128, 255, 8), strict=False
    ):
        # Scales are at most 8, codes 255 and a third of x is 0: sums over K stay below 2^24 in units of 1/8.
        weight = exact_weight(f"w{bits}{group}{suffix}", 777, 1024 + 80, seed=bits)
        x = signs(tokens, weight.in_features, dtype, seed=tokens)
        y = _matmul(x.cuda(), weight)
        assert torch.equal(y.cpu(), truth.rounded(truth.as_array(x) @ weight.values.T, dtype)), (group, dtype, tokens)


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_quantize_and_dequantize_equal_the_oracle(bits: int, suffix: str) -> None:
    for group, dtype in itertools.product(("g16", "g48", "g128", "c", "t"), DTYPES):
        scheme = Scheme.parse(f"w{bits}{group}{suffix}")
        w = (torch.randn(300, 1500) * torch.rand(300, 1).exp2()).to(dtype)
        wanted = reference.quantize(w, scheme)
        found = ops.quantize(w.cuda(), str(scheme))
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a.cpu(), b), (group, dtype)
        for out in DTYPES:
            there = ops.dequantize(*found, str(scheme), 1500, out).cpu()
            assert torch.equal(there, reference.dequantize(*wanted, scheme, 1500, out)), (group, dtype, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["w4g128", "w8cs", "w3g64f", "w2g32", "w8g128f"])
def test_bound_on_tensor_cores(text: str, dtype: torch.dtype) -> None:
    weight = random_weight(text, 512, 4096)
    for positive in (False, True):  # tensor cores truncate, which all-positive sums add up
        x = torch.randn(64, 4096).to(dtype)
        x = x.abs() if positive else x
        x64 = truth.as_array(x)
        exact = x64 @ weight.values.T
        magnitude = bounds.matmul_magnitude(x64, weight.values, None, weight.offset_terms())
        error = np.abs(truth.as_array(_matmul(x.cuda(), weight)) - exact)
        assert (error <= bounds.matmul(exact, magnitude, 4096, weight.groups, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["w4g128", "w8cs", "w3g64f", "w4tf"])
def test_many_tokens_hold_their_bound(text: str, dtype: torch.dtype) -> None:
    """Past the fused kernel: weights are rounded to x's dtype, and cuBLAS multiplies."""
    device = device_of(torch.cuda.current_device())
    tokens = choose.most_fused_tokens(Scheme.parse(text), dtype, device) + 40
    assert isinstance(choose.matmul(tokens, 300, 1000, Scheme.parse(text), dtype, device), DenseConfig)
    weight, x = random_weight(text, 300, 1000), torch.randn(tokens, 1000).to(dtype)
    bias = torch.randn(300).to(dtype)
    x64, b64 = truth.as_array(x), truth.as_array(bias)
    exact = x64 @ weight.values.T + b64
    magnitude = bounds.matmul_magnitude(x64, weight.values, b64)
    args = weight.args("cuda")
    y = ops.matmul(x.cuda(), *args, bias.cuda(), text, 1000)
    # cuBLAS may add up partial sums of K in x's dtype.
    allowed = bounds.matmul(exact, magnitude, 1000, 1, dtype, rounded_weights=True) + 2 * bounds.UNIT[dtype] * magnitude
    assert (np.abs(truth.as_array(y) - exact) <= allowed).all()


@pytest.mark.parametrize("tokens", [7, 100, 1000])
def test_a_thousand_runs_have_the_same_bits(tokens: int) -> None:
    weight, x = random_weight("w4g64", 1024, 2048), torch.randn(tokens, 2048, dtype=torch.float16, device="cuda")
    tensors = weight.args("cuda")
    first = ops.matmul(x, *tensors, None, "w4g64", 2048)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (ops.matmul(x, *tensors, None, "w4g64", 2048) != first).sum()
    assert different.item() == 0


def test_side_stream() -> None:
    """Work is queued behind what the current stream is doing, and not on another stream."""
    weight, x = exact_weight("w4g64", 64, 256), signs(5, 256, torch.float16)
    expected = truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16)
    tensors = weight.args("cuda")
    buffer = torch.zeros(5, 256, dtype=torch.float16, device="cuda")
    source = x.cuda()
    ops.matmul(source, *tensors, None, "w4g64", 256)  # compiled before the race
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        buffer.copy_(source)
        y = ops.matmul(buffer, *tensors, None, "w4g64", 256)
    stream.synchronize()
    assert torch.equal(y.cpu(), expected)


def test_graph_replays_with_changed_inputs() -> None:
    weight = exact_weight("w3g64f", 96, 512)
    layer = qkernels.QuantLinear(qkernels.QTensor(*weight.args("cuda"), weight.scheme, 512))
    x = torch.zeros(3, 512, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        layer(x)  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            fresh = signs(3, 512, torch.bfloat16, seed)
            x.copy_(fresh)
            graph.replay()
            assert torch.equal(y.cpu(), truth.rounded(truth.as_array(fresh) @ weight.values.T, torch.bfloat16))


def test_first_call_inside_a_graph_capture() -> None:
    """Kernels of a scheme that nothing else here uses are compiled, loaded and prepared during the capture."""
    for tokens in (3, 1000):
        weight, x = exact_weight("w6g80", 72, 400), signs(tokens, 400, torch.float16)
        tensors, source = weight.args("cuda"), x.cuda()
        torch.mm(source, source.T)  # cuBLAS wants to be loaded before
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            y = ops.matmul(source, *tensors, None, "w6g80", 400)
        graph.replay()
        assert torch.equal(y.cpu(), truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16))


def test_other_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight, x = exact_weight("w4g64", 64, 256), signs(5, 256, torch.float16)
    y = _matmul(x.to("cuda:1"), weight, "cuda:1")
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16))
    with pytest.raises(ValueError, match="cuda:0"):
        _matmul(x.to("cuda:0"), weight, "cuda:1")


def test_threads() -> None:
    weight = exact_weight("w5g32", 64, 256)
    tensors = weight.args("cuda")

    def run(seed: int) -> bool:
        x = signs(1 + seed % 40, 256, torch.float16, seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            y = ops.matmul(x.cuda(), *tensors, None, "w5g32", 256).cpu()
        return torch.equal(y, truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(80)))


def test_compiled_and_autocast_layers_agree_with_eager() -> None:
    linear = torch.nn.Linear(256, 96)
    layer = qkernels.QuantLinear.from_linear(linear, "w4g64").cuda()
    x = torch.randn(4, 7, 256, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, ops.matmul(x.bfloat16(), *layer.qweight.tensors, layer.bias.bfloat16(), "w4g64", 256))


def test_gradients_agree_with_the_oracle() -> None:
    layer = qkernels.QuantLinear.from_linear(torch.nn.Linear(256, 96), "w4g64").cuda()
    x = torch.randn(5, 256, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    w, bias = layer.qweight.dequantize(), layer.bias
    wanted = 2 * (x @ w.T + bias) @ w
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


# ---- offsets beyond 2^31 elements ----


def _needs_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def test_packed_beyond_int32() -> None:
    _needs_memory(16)
    rows, K = 2**20 + 64, 8192  # 2048 words each
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, K // 4), dtype=torch.int32, device="cuda")
    scale = torch.ones(1, rows, dtype=torch.float16, device="cuda")
    x = signs(2, K, torch.float16).cuda()
    y = ops.matmul(x, packed, scale, None, None, "w8cs", K)
    tail = ops.matmul(x, packed[-64:].clone(), scale[:, -64:], None, None, "w8cs", K)
    assert torch.equal(y[:, -64:], tail)
    w = ops.dequantize(packed[: 2**18 + 64], scale[:, : 2**18 + 64], None, "w8cs", K, torch.float16)
    assert torch.equal(w[-64:], ops.dequantize(packed[2**18 : 2**18 + 64], scale[:, :64], None, "w8cs", K, w.dtype))


def test_activations_and_weights_beyond_int32() -> None:
    _needs_memory(16)
    x = torch.randn(2**18 + 64, 8192, dtype=torch.float16, device="cuda")
    weight = random_weight("w4g128", 64, 8192)
    assert torch.equal(_matmul(x, weight)[-64:], _matmul(x[-64:].clone(), weight))
    for scheme in ("w8g128", "w8g96"):
        whole, tail = ops.quantize(x, scheme), ops.quantize(x[-64:].clone(), scheme)
        assert torch.equal(whole[0][-64:], tail[0])
        assert torch.equal(whole[1][:, -64:], tail[1])


def test_more_blocks_than_a_second_grid_dimension_holds() -> None:
    weight, x = exact_weight("w3g16", 5, 16), signs(2**21 + 3, 16, torch.float16)
    assert torch.equal(_matmul(x.cuda(), weight).cpu(), truth.rounded(truth.as_array(x) @ weight.values.T, x.dtype))
    w = torch.randn(1, 2**26, device="cuda")
    found = ops.quantize(w, "w4g16")
    for a, b in zip(found, reference.quantize(w.cpu(), Scheme.parse("w4g16")), strict=True):
        assert a is not None
        assert torch.equal(a.cpu(), b)


def test_gpu_model_from_quantize_to_answer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).cuda().bfloat16()
    x = torch.randn(9, 256, device="cuda", dtype=torch.bfloat16)
    wanted = model(x)
    report = qkernels.quantize_model(model, "w8g64", progress=False)
    assert report.error.snr_db > 40
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.02)
