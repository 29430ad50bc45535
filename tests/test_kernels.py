"""The Triton kernels, through the very functions that the CUDA ops call: on a GPU, or in the interpreter without one.

On a GPU inline assembly is always used. In the interpreter both ways are tested: PTX, emulated, and plain Triton.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from qkernels import dispatch, ops, packing, reference
from qkernels.kernels import dequantize as dequantize_kernel
from qkernels.kernels import matmul as matmul_kernel
from qkernels.kernels import quantize as quantize_kernel
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from tests import bounds, truth
from tests.conftest import HAS_GPU
from tests.helpers import ALL_MAPS, Weight, exact_weight, random_weight, signs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = ("g16", "g32", "g48", "g64", "g96", "g128", "g256", "c", "t")
# Around a slot (16), a step of the main loop (64 to 256 values of k), a tile of tokens (16) and of features (64).
COLUMNS = (1, 15, 16, 17, 64, 65, 127, 128, 129, 192, 255, 256, 257, 320, 576)
TOKENS = (1, 3, 16, 17, 33)
FEATURES = (1, 5, 63, 64, 65)


@pytest.fixture(params=["ptx", "plain"] if not HAS_GPU else ["gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not HAS_GPU:
        for module in (matmul_kernel, dequantize_kernel):
            monkeypatch.setattr(module, "has_ptx", lambda: request.param == "ptx")
    return str(request.param)


def _matmul(x: Tensor, weight: Weight, bias: Tensor | None, device: str) -> Tensor:
    packed, scale, zero = weight.args(device)
    bias = None if bias is None else bias.to(device)
    return dispatch.matmul(x.to(device), packed, scale, zero, bias, str(weight.scheme), weight.in_features).cpu()


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_matmul_is_exact(bits: int, suffix: str, device: str, path: str) -> None:
    """Zero tolerance: every partial sum is an exact float32, so any order, tile or unit must give the same bits."""
    columns = itertools.cycle(COLUMNS)
    tokens, features = itertools.cycle(TOKENS), itertools.cycle(FEATURES)
    for i, group in enumerate(GROUPS * 2):
        in_features, M, N = next(columns), next(tokens), next(features)
        next(features)  # so that sizes meet in new pairs
        dtype = DTYPES[i % 3]
        weight = exact_weight(f"w{bits}{group}{suffix}-{('fp16', 'bf16', 'fp32')[i % 2]}", N, in_features, seed=i)
        x = signs(M, in_features, dtype, seed=i)
        bias = signs(1, N, dtype)[0] if i % 3 == 1 else None
        exact = truth.as_array(x) @ weight.values.T + (0 if bias is None else truth.as_array(bias))
        y = _matmul(x, weight, bias, device)
        assert y.dtype is dtype
        assert torch.equal(y, truth.rounded(exact, dtype)), f"{weight.scheme} M={M} N={N} K={in_features} {dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["w4g128", "w8g64s", "w3g32f", "w7g48", "w1g16f", "w8c"])
def test_one_hot_tokens_read_back_the_weight(text: str, dtype: torch.dtype, device: str, path: str) -> None:
    """x = identity: y is the decoded weight, transposed. Scales here have few bits, so that nothing rounds."""
    weight = exact_weight(text, 6, 80)
    y = _matmul(torch.eye(80, dtype=dtype), weight, None, device)
    assert torch.equal(y, truth.rounded(weight.values.T, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["w4g128", "w8g64", "w8cs", "w3g32f", "w5g16f", "w2ts", "w6g96"])
def test_matmul_holds_its_bound(text: str, dtype: torch.dtype, device: str, path: str) -> None:
    weight = random_weight(text, 40, 530)
    for positive in (False, True):  # all-positive data is where truncating units err in one direction
        x = torch.randn(5, 530).to(dtype)
        x = x.abs() if positive else x
        bias = torch.randn(40).to(dtype)
        x64, b64 = truth.as_array(x), truth.as_array(bias)
        exact = x64 @ weight.values.T + b64
        magnitude = bounds.matmul_magnitude(x64, weight.values, b64, weight.offset_terms())
        allowed = bounds.matmul(exact, magnitude, 530, weight.groups, dtype)
        error = np.abs(truth.as_array(_matmul(x, weight, bias, device)) - exact)
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the bound"


CONFIG = MatmulConfig(block_m=16, block_n=32, blocks=1, splits=1, num_warps=1, num_stages=3, max_registers=255)


def _run(x: Tensor, weight: Weight, bias: Tensor | None, config: MatmulConfig, device: str) -> Tensor:
    tensors = [None if t is None else t.to(device) for t in (x, *weight.args("cpu"), bias)]
    return matmul_kernel.matmul(*tensors, weight.scheme, config).cpu()


@pytest.mark.parametrize(("text", "splits"), [("w4g128", 2), ("w4g256", 3), ("w8g64s", 16), ("w3g48f", 2), ("w2c", 5)])
def test_split_sums_are_exact(text: str, splits: int, device: str, path: str) -> None:
    """Any number of splits, also more than there are steps, and steps that do not divide by it; tails; bias once."""
    for in_features, tokens, dtype in ((620, 17, torch.bfloat16), (640, 1, torch.float16), (50, 1, torch.float16)):
        weight, x = exact_weight(text, 20, in_features), signs(tokens, in_features, dtype)
        bias = signs(1, 20, dtype)[0]
        exact = truth.as_array(x) @ weight.values.T + truth.as_array(bias)
        y = _run(x, weight, bias, dataclasses.replace(CONFIG, splits=splits), device)
        assert torch.equal(y, truth.rounded(exact, dtype)), (in_features, tokens)


@pytest.mark.parametrize(
    "change", [{"block_m": 8}, {"block_m": 32}, {"blocks": 2}, {"blocks": 4, "splits": 2}, {"block_n": 64}]
)
def test_every_tile_is_exact(change: dict[str, int], device: str, path: str) -> None:
    config = dataclasses.replace(CONFIG, **change)
    for text, in_features, dtype in (
        ("w4g128", 660, torch.float16), ("w2g64", 512, torch.bfloat16), ("w5g96f", 300, torch.float16)
    ):  # fmt: skip
        weight, x = exact_weight(text, 40, in_features), signs(20, in_features, dtype)
        y = _run(x, weight, None, config, device)
        assert torch.equal(y, truth.rounded(truth.as_array(x) @ weight.values.T, dtype)), text


@pytest.mark.parametrize("text", ["w4g128", "w8g32", "w4g64s", "w3g96"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_weights(text: str, dtype: torch.dtype, device: str, path: str) -> None:
    """Exact where scales are powers of two; else as if weights were rounded to x's dtype."""
    text += {torch.float16: "", torch.bfloat16: "-bf16"}[dtype]
    config = dataclasses.replace(CONFIG, scale_weights=True, splits=2)
    for in_features in (300, 32):  # of 32 there is one group
        weight, x = exact_weight(text, 20, in_features), signs(5, in_features, dtype)
        y = _run(x, weight, None, config, device)
        assert torch.equal(y, truth.rounded(truth.as_array(x) @ weight.values.T, dtype))
    weight, x = random_weight(text, 20, 300), torch.randn(5, 300).to(dtype)
    exact = truth.as_array(x) @ weight.values.T
    magnitude = bounds.matmul_magnitude(truth.as_array(x), weight.values, None)
    allowed = bounds.matmul(exact, magnitude, 300, weight.groups, dtype, splits=2, rounded_weights=True)
    assert (np.abs(truth.as_array(_run(x, weight, None, config, device)) - exact) <= allowed).all()


@pytest.mark.parametrize("text", ["w4g128", "w8ts", "w3g48f", "w2c"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_product_in_passes(text: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens: the weight is dequantized some rows at a time, each pass into the same workspace."""
    monkeypatch.setattr(dispatch.choose, "matmul", lambda *_: DenseConfig(rows=16))
    monkeypatch.setattr(dispatch, "_calls", {})
    weight, x, bias = exact_weight(text, 37, 300), signs(50, 300, dtype), signs(1, 37, dtype)[0]
    w = truth.as_array(truth.rounded(weight.values, dtype))
    for b in (None, bias):
        exact = truth.as_array(x) @ w.T + (0 if b is None else truth.as_array(b))
        y = truth.as_array(_matmul(x, weight, b, device))
        magnitude = bounds.matmul_magnitude(truth.as_array(x), w, None if b is None else truth.as_array(b))
        # torch's own product on a CPU may round partial sums to dtype.
        allowed = bounds.matmul(exact, magnitude, 300, 1, dtype) + 2 * bounds.UNIT[dtype] * magnitude
        assert (np.abs(y - exact) <= allowed).all()


def test_a_row_of_a_batch_equals_the_row_alone(device: str) -> None:
    weight, x = random_weight("w4g64", 40, 300), torch.randn(37, 300).half()
    batch = truth.as_array(_matmul(x, weight, None, device))
    exact = truth.as_array(x) @ weight.values.T
    allowed = bounds.matmul(
        exact, bounds.matmul_magnitude(truth.as_array(x), weight.values, None), 300, weight.groups, torch.float16
    )
    for row in (0, 16, 36):
        alone = truth.as_array(_matmul(x[row : row + 1], weight, None, device))[0]
        assert (np.abs(alone - batch[row]) <= 2 * allowed[row]).all()


def test_activations_that_are_not_finite_spoil_their_own_row_only(device: str) -> None:
    weight, x = exact_weight("w4g32", 8, 64), signs(4, 64, torch.float16)
    clean = _matmul(x, weight, None, device)
    x[1, 5], x[3, 9] = float("inf"), float("nan")
    y = _matmul(x, weight, None, device)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    zero_weight = torch.from_numpy(weight.values[:, 5] == 0)
    assert torch.isnan(y[1][zero_weight]).all()  # 0 * inf
    assert not torch.isfinite(y[1]).any()
    assert torch.isnan(y[3]).all()


def test_memory_around_the_operands_is_neither_read_nor_written(device: str) -> None:
    """Operands inside buffers of NaN (or of ones bits), the output inside a canary."""
    weight, x = exact_weight("w3g32f", 37, 205), signs(5, 205, torch.float16)
    expected = _matmul(x, weight, None, device)

    def surrounded(t: Tensor, poison: float, rows_before: int) -> Tensor:
        whole = torch.full((t.shape[0] + rows_before + 3, t.shape[1]), poison, dtype=t.dtype, device=device)
        whole[rows_before : rows_before + t.shape[0]] = t.to(device)
        return whole[rows_before : rows_before + t.shape[0]]

    assert weight.zero is not None
    y = dispatch.matmul(
        surrounded(x, float("nan"), 1),  # 205 odd: misaligned
        surrounded(weight.packed, -1, 1),
        surrounded(weight.scale, float("nan"), 1),
        surrounded(weight.zero, float("nan"), 1),
        None,
        "w3g32f",
        205,
    )
    assert torch.equal(y.cpu(), expected)


def test_views_of_activations(device: str) -> None:
    weight = exact_weight("w4g64", 9, 96)
    x = signs(8, 96, torch.float16)
    expected = truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16)
    x = x.to(device)  # before it is sliced: copies to a GPU are dense
    wide = torch.full((8, 200), float("nan"), dtype=torch.float16, device=device)
    wide[:, 3:99] = x
    for view in (
        x.T.contiguous().T,  # transposed
        wide[:, 3:99],  # sliced, misaligned
        torch.cat([x[:1], x])[1:],
        x.reshape(2, 2, 2, 96),
        x[None].transpose(0, 1),  # contiguous, and its rows are not stride(-2) apart
    ):
        y = _matmul(view, weight, None, device)
        assert y.shape == (*view.shape[:-1], 9)
        assert torch.equal(y.reshape(8, 9), expected)
    expanded = x[:1].expand(4, 96)
    assert torch.equal(_matmul(expanded, weight, None, device), expected[:1].expand(4, 9))


@pytest.mark.parametrize("text", ["w4g64", "w4g64s", "w3g32f", "w8c", "w4t"])
@pytest.mark.parametrize("tokens", [3, 500])
def test_a_range_of_rows(text: str, tokens: int, device: str) -> None:
    """Rows of a larger weight: scales and zeros with gaps; fused, and dequantized first."""
    weight, x = exact_weight(text, 40, 128), signs(tokens, 128, torch.float16)
    expected = truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16)
    packed, scale, zero = weight.args(device)
    if scale.shape[1] > 1:
        scale, zero = scale[:, 8:24], None if zero is None else zero[:, 8:24]
    for offsets in (zero, None if zero is None else zero.contiguous()):  # with gaps like the scales', or without
        y = dispatch.matmul(x.to(device), packed[8:24], scale, offsets, None, text, 128)
        assert torch.equal(y.cpu(), expected[:, 8:24])


@pytest.mark.parametrize("shape", [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_products(shape: tuple[int, int, int], device: str) -> None:
    M, N, K = shape
    weight = exact_weight("w4g32", N, K)
    x, bias = signs(M, K, torch.float16), torch.arange(N).half()
    for operands in ((x, bias), (x, None)):
        y = _matmul(operands[0], weight, operands[1], device)
        assert y.shape == (M, N)
        if K == 0:
            assert torch.equal(y, (torch.zeros(N).half() if operands[1] is None else bias).expand(M, N))
    assert _matmul(torch.empty(2, 0, 5, K).half(), weight, None, device).shape == (2, 0, 5, N)


# ---- quantize and dequantize ----


def _quantize(w: Tensor, scheme: str, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    packed, scale, zero = (t.cpu() for t in ops._quantize_cuda(w.to(device), scheme))
    return packed, scale, zero if Scheme.parse(scheme).zero_dtype is not None else None


def _assert_same_bits(found: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...], what: str) -> None:
    for name, a, b in zip(("packed", "scale", "zero"), found, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            assert a is not None
            assert a.dtype is b.dtype
            assert a.shape == b.shape
            # as bytes, so that -0 is not 0
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"{name} of {what}"


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_quantize_equals_the_oracle_bit_for_bit(bits: int, suffix: str, device: str) -> None:
    columns = itertools.cycle(COLUMNS)
    for i, group in enumerate(GROUPS):
        dtype = DTYPES[i % 3]
        scheme = f"w{bits}{group}{suffix}-{('fp16', 'bf16', 'fp32')[i // 3 % 3]}"
        w = (torch.randn(7, next(columns)) * 3 + i % 4).to(dtype)
        expected = reference.quantize(w, Scheme.parse(scheme))
        _assert_same_bits(_quantize(w, scheme, device), expected, f"{scheme} {tuple(w.shape)} {dtype}")


@pytest.mark.parametrize("suffix", ["", "s", "f"])
@pytest.mark.parametrize("group", ["g32", "c", "t"])
def test_quantize_equals_the_oracle_on_hostile_values(group: str, suffix: str, device: str) -> None:
    rows = {
        "constant": torch.full((64,), 0.3),
        "zero": torch.zeros(64),
        "minus zero": torch.full((64,), -0.0),
        "one-hot": torch.eye(64)[3],
        "outlier": torch.cat([torch.full((63,), 1e-3), torch.tensor([1e30])]),
        "subnormal": torch.linspace(-(2.0**-140), 2.0**-139, 64),
        "smallest": torch.full((64,), 2.0**-149),
        "far from zero": 50 + torch.rand(64),
        "halfway": (torch.arange(64) - 32) / 2.0,
        "large": torch.linspace(-1, 1, 64) * 3e38,
    }
    w = torch.stack(list(rows.values()))
    for dtype in ("bf16", "fp32"):
        scheme = f"w4{group}{suffix}-{dtype}"
        _assert_same_bits(_quantize(w, scheme, device), reference.quantize(w, Scheme.parse(scheme)), scheme)


@pytest.mark.parametrize("scheme", ["w4g32", "w8cs", "w4tf", "w3g48"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_refuses_what_the_oracle_refuses(scheme: str, bad: float, device: str) -> None:
    w = torch.randn(3, 70)
    w[1, 66] = bad
    with pytest.raises(ValueError, match=rf"w must be finite, got {bad} at index \(1, 66\)"):
        _quantize(w, scheme, device)
    with pytest.raises(ValueError, match=r"does not fit torch\.float16"):
        _quantize(torch.full((3, 70), -1e8), scheme, device)


@pytest.mark.parametrize("text", ["w4g48", "w8g16s", "w3g128f", "w4g32-bf16", "w2g32f-fp32", "w7cs"])
def test_encode_clamps_what_given_scales_do_not_reach(text: str, device: str) -> None:
    """Scales that were not found from the range of the weights: some clip, by a little or by far."""
    scheme = Scheme.parse(text)
    w = torch.randn(9, 300) * 3
    w[2, 50:60] = torch.tensor([1e38, -1e38, 3e38, -3e38, 700.0, -700.0, 1e-40, -1e-40, 0.0, -0.0])
    shape = scheme.scale_shape(9, 300)
    scale = (torch.rand(shape) * 4 / scheme.code_max + 0.01).to(scheme.scale_dtype)
    zero = None
    if scheme.value_map == "affine":
        zero = torch.randint(0, scheme.code_max + 1, shape, dtype=torch.uint8)
    elif scheme.value_map == "offset":
        zero = torch.randn(shape).to(scheme.scale_dtype)
    code = reference.encode(w, scale, zero, scheme)
    assert len({int(code.min()), int(code.max())} & {scheme.code_min, scheme.code_max}) == 2
    operands = (w.to(device), scale.to(device), None if zero is None else zero.to(device))
    found = quantize_kernel.encode(*operands, scheme, choose.quantize(scheme, 300))
    assert torch.equal(found.cpu(), packing.pack(code, scheme.bits))


def test_quantize_takes_any_view(device: str) -> None:
    w = torch.randn(48, 90).to(device)  # before it is sliced: copies to a GPU are dense
    for view in (w.T, w[:, 3:], w[::2], w[1:, ::3], w[:1].expand(5, 90)):
        _assert_same_bits(
            _quantize(view, "w4g32", device), reference.quantize(view.cpu().contiguous(), Scheme.parse("w4g32")), "view"
        )


@pytest.mark.parametrize(("bits", "suffix"), ALL_MAPS)
def test_dequantize_equals_the_oracle_bit_for_bit(bits: int, suffix: str, device: str, path: str) -> None:
    columns = itertools.cycle(COLUMNS)
    for i, group in enumerate(GROUPS):
        weight = random_weight(f"w{bits}{group}{suffix}-{('fp16', 'bf16', 'fp32')[i % 3]}", 9, next(columns), seed=i)
        dtype = DTYPES[i // 3 % 3]
        args = (str(weight.scheme), weight.in_features, dtype)
        found = ops._dequantize_cuda(*weight.args(device), *args).cpu()
        expected = reference.dequantize(
            weight.packed, weight.scale, weight.zero, weight.scheme, weight.in_features, dtype
        )
        assert torch.equal(found, expected), f"{weight.scheme} {tuple(expected.shape)} {dtype}"


@pytest.mark.parametrize("text", ["w4g128", "w8g64f", "w3g48", "w4cs", "w4t"])
def test_dequantize_a_range_of_rows_into_a_given_tensor(text: str, device: str, path: str) -> None:
    """Several programs along both dimensions; views of the operands; nothing around the output is touched."""
    weight = random_weight(text, 40, 2192)
    packed, scale, zero = weight.args(device)
    canvas = torch.full((40, 2208), float("nan"), dtype=torch.float16, device=device)
    rows, per_row = slice(3, 37), slice(0, 1) if text == "w4t" else slice(3, 37)
    out = canvas[rows, 8:2200]
    found = dequantize_kernel.dequantize(
        packed[rows],
        scale[:, per_row],
        None if zero is None else zero[:, per_row],
        weight.scheme,
        2192,
        torch.float16,
        choose.dequantize(torch.float16),
        out=out,
    )
    assert found is out
    whole = reference.dequantize(weight.packed, weight.scale, weight.zero, weight.scheme, 2192, torch.float16)
    assert torch.equal(out.cpu(), whole[rows])
    assert int(torch.isnan(canvas).sum()) == canvas.numel() - out.numel()


def test_dequantize_refuses_rows_that_do_not_begin_a_run_of_words(device: str) -> None:
    weight = random_weight("w4cs", 4, 128)
    apart = torch.zeros(4, 18, dtype=torch.int32, device=device)[:, :16]
    with pytest.raises(ValueError, match="multiple of 4 words apart, got 18"):
        dequantize_kernel.dequantize(
            apart, weight.scale.to(device), None, weight.scheme, 128, torch.float16, choose.dequantize(torch.float16)
        )


def test_offsets_of_another_dtype_than_the_scales(device: str) -> None:
    """Formats store them so: float32 offsets beside float16 scales."""
    weight = exact_weight("w4g32f", 9, 96)
    assert weight.zero is not None
    zero = weight.zero.float()
    x = signs(3, 96, torch.float16)
    y = dispatch.matmul(
        x.to(device), weight.packed.to(device), weight.scale.to(device), zero.to(device), None, "w4g32f", 96
    )
    assert torch.equal(y.cpu(), truth.rounded(truth.as_array(x) @ weight.values.T, torch.float16))


def test_empty_weights(device: str) -> None:
    for shape in ((0, 64), (3, 0)):
        for scheme in ("w4g32", "w4cs", "w4tf"):
            parsed = Scheme.parse(scheme)
            found = _quantize(torch.empty(shape), scheme, device)
            _assert_same_bits(found, reference.quantize(torch.empty(shape), parsed), scheme)
            args = [None if t is None else t.to(device) for t in found]
            assert ops._dequantize_cuda(*args, scheme, shape[1], torch.float16).shape == shape
