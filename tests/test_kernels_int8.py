"""Kernels of quantized activations: on a GPU, or in the interpreter without one, as test_kernels.py."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qkernels import dispatch, dispatch_int8, packing, reference_int8
from qkernels.kernels import matmul_int8
from qkernels.scheme import Scheme
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from tests import bounds, truth
from tests.conftest import HAS_GPU
from tests.helpers import Weight, exact_weight, random_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WEIGHTS = [(bits, suffix) for bits in (4, 8) for suffix in ("", "s")]
# Groups of a whole block (64 or 128), of several, of a part, of parts that do not divide a block, and one in all.
GROUPS = ("g64", "g128", "g256", "g16", "g32", "g48", "g80", "g192", "c", "t")
COLUMNS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192, 257, 320, 576)
TOKENS = (1, 3, 16, 17)
FEATURES = (1, 5, 33, 64)
CONFIG = MatmulConfig(block_m=16, block_n=32, blocks=1, splits=1, num_warps=1, num_stages=3, max_registers=255)

Array = npt.NDArray[np.int64]


@pytest.fixture(params=["ptx", "plain"] if not HAS_GPU else ["gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    dispatch_int8.forget()
    if not HAS_GPU:
        monkeypatch.setattr(matmul_int8, "has_ptx", lambda: request.param == "ptx")
    return str(request.param)


@dataclasses.dataclass
class Codes:
    """Activations as codes, with what they are."""

    code: Array  # (M, K)
    scale: Tensor  # (M,)
    zero: Tensor | None

    def packed(self, bits: int) -> Tensor:
        return packing.pack_activations(torch.from_numpy(self.code.astype(np.int8)), bits)

    @property
    def integers(self) -> Array:
        """(M, K) code - zero."""
        return self.code if self.zero is None else self.code - truth.as_array(self.zero)[:, None]


def _codes(tokens: int, in_features: int, affine: bool, size: int = 128, seed: int = 0) -> Codes:
    """Random codes of up to `size`, scales that are powers of two, zeros of any value."""
    rng = np.random.default_rng([seed, tokens, in_features])
    code = rng.integers(-size, min(size, 127) + 1, (tokens, in_features))
    scale = torch.from_numpy(2.0 ** rng.integers(-6, 3, tokens)).float()
    zero = torch.from_numpy(rng.integers(-min(size, 128), min(size, 127) + 1, tokens)).to(torch.int8)
    return Codes(code, scale, zero if affine else None)


def _product(
    codes: Codes,
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: MatmulConfig | DenseConfig,
    device: str,
) -> Tensor:
    packed = codes.packed(weight.scheme.bits).to(device)
    zero = None if codes.zero is None else codes.zero.to(device)
    args = (*weight.args(device), None if bias is None else bias.to(device))
    product = dispatch_int8.product(packed.shape, *args, weight.scheme, weight.in_features, dtype, config)
    return product(packed, codes.scale.to(device), zero, *args).cpu()


def _float32(codes: Codes, weight: Weight, bias: Tensor | None) -> Array:
    """What the definition gives where nothing rounds but an int32 that becomes a float32, in float64."""
    length = weight.scheme.group_length(weight.in_features)
    integer = np.round(weight.values / truth.per_weight(truth.as_array(weight.scale), *_shape(weight)))
    y = np.zeros((len(codes.code), len(weight.code)))
    for start in range(0, weight.in_features, length):
        k = slice(start, start + length)
        total = codes.integers[:, k] @ integer[:, k].astype(np.int64).T
        scale = truth.per_weight(truth.as_array(weight.scale), *_shape(weight))[:, start]
        y += total.astype(np.float32).astype(np.float64) * scale
    y *= truth.as_array(codes.scale)[:, None]
    return y if bias is None else y + truth.as_array(bias)  # type: ignore[no-any-return]


def _shape(weight: Weight) -> tuple[int, int, int]:
    return weight.in_features, weight.scheme.group_length(weight.in_features), len(weight.code)


@pytest.mark.parametrize("how", ["a8s", "a8"])
@pytest.mark.parametrize(("bits", "suffix"), WEIGHTS)
def test_products_of_codes_are_exact(bits: int, suffix: str, how: str, device: str, path: str) -> None:
    """Zero tolerance: scales are powers of two, each group its own, and sums of groups exact float32 numbers.

    So any order, split, tile or unit must give the same bits, and a code, zero, scale or k out of its place others.
    """
    columns, tokens, features = itertools.cycle(COLUMNS), itertools.cycle(TOKENS), itertools.cycle(FEATURES)
    for i, group in enumerate(GROUPS * 2):
        in_features, M, N = next(columns), next(tokens), next(features)
        next(features)  # so that sizes meet in new pairs
        dtype = DTYPES[i % 3]
        weight = exact_weight(f"w{bits}{group}{suffix}-{('fp16', 'bf16', 'fp32')[i % 2]}-{how}", N, in_features, seed=i)
        # With groups sums are added up: small codes, so that they stay below 2^24 in units of 1/8.
        size = 128 if weight.groups == 1 else 1 if bits == 8 else 8
        codes = _codes(M, in_features, how == "a8", size, seed=i)
        bias = torch.randint(-8, 9, (N,)).to(dtype) if i % 3 == 1 and dtype is not torch.float32 else None
        exact = _float32(codes, weight, None)
        exact = exact if bias is None else (exact + truth.as_array(bias)).astype(np.float32).astype(np.float64)
        splits = (1, 3)[i % 2]
        y = _product(codes, weight, bias, dtype, dataclasses.replace(CONFIG, splits=splits), device)
        assert y.dtype is dtype
        assert torch.equal(y, truth.rounded(exact, dtype)), f"{weight.scheme} M={M} N={N} K={in_features} {dtype}"


@pytest.mark.parametrize("text", ["w8cs-a8s", "w8c-a8", "w4g64-a8s", "w4g48s-a8", "w8g16-a8s"])
def test_one_hot_tokens_read_back_the_weight(text: str, device: str, path: str) -> None:
    weight = exact_weight(text, 6, 144)
    codes = Codes(np.eye(144, dtype=np.int64), torch.ones(144), None)
    if "-a8s" not in text:
        codes = Codes(codes.code - 3, codes.scale, torch.full((144,), -3, dtype=torch.int8))
    y = _product(codes, weight, None, torch.float32, CONFIG, device)
    assert torch.equal(y, truth.rounded(weight.values.T, torch.float32))


@pytest.mark.parametrize(
    "change",
    [{"block_m": 8}, {"block_m": 32}, {"blocks": 2}, {"splits": 3}, {"blocks": 4, "splits": 2}, {"block_n": 64}],
)
@pytest.mark.parametrize("text", ["w8cs-a8s", "w8c-a8", "w4c-a8s", "w4ts-a8", "w8t-a8"])
def test_one_group_gives_the_bits_of_the_oracle(text: str, change: dict[str, int], device: str, path: str) -> None:
    """With any scales and codes, tiles and splits: only integers are added up."""
    config = dataclasses.replace(CONFIG, **change)
    weight = random_weight(text, 40, 660)
    for dtype in DTYPES:
        x, bias = (torch.randn(20, 660) * torch.rand(20, 1).exp()).to(dtype), torch.randn(40).to(dtype)
        how = weight.scheme.activations
        assert how is not None
        code, scale, zero = reference_int8.quantize_activations(x, how)
        codes = Codes(truth.as_array(code), scale, zero)
        wanted = reference_int8.matmul(code, scale, zero, *weight.args("cpu"), bias, weight.scheme, dtype)
        assert torch.equal(_product(codes, weight, bias, dtype, config, device), wanted), dtype


@pytest.mark.parametrize("text", ["w4g128-a8s", "w8g64-a8", "w4g32s-a8s", "w4g96-a8", "w8g48s-a8s"])
@pytest.mark.parametrize("splits", [1, 3])
def test_groups_hold_their_bound(text: str, splits: int, device: str, path: str) -> None:
    """A rounding for each group's int32, for its product with the scale, and for each sum; none for K."""
    weight = random_weight(text, 24, 530)
    codes = _codes(5, 530, text.endswith("-a8"), seed=3)
    codes.scale = torch.rand(5) * 0.01 + 0.001
    bias = torch.randn(24)
    x = codes.integers * truth.as_array(codes.scale)[:, None]
    exact = x @ weight.values.T + truth.as_array(bias)
    length = weight.scheme.group_length(530)
    size = sum(
        np.abs(x[:, k : k + length] @ weight.values[:, k : k + length].T) for k in range(0, 530, length)
    ) + np.abs(truth.as_array(bias))
    for dtype in DTYPES:
        y = _product(codes, weight, bias.to(dtype), dtype, dataclasses.replace(CONFIG, splits=splits), device)
        truth_of = exact - truth.as_array(bias) + truth.as_array(bias.to(dtype))
        assert (
            np.abs(truth.as_array(y) - truth_of) <= bounds.codes(truth_of, size, weight.groups, dtype, splits)
        ).all()


@pytest.mark.parametrize("text", ["w8cs-a8s", "w8ts-a8s"])
@pytest.mark.parametrize("rows", [16, 40, 64])
def test_products_of_torch_give_the_same_bits(text: str, rows: int, device: str) -> None:
    """torch._int_mm with the scales applied after it; output features that are no multiple of 8, in several passes."""
    weight = random_weight(text, 43, 128)
    codes, bias = _codes(17, 128, False), torch.randn(43).bfloat16()
    for dtype in DTYPES:
        found = _product(codes, weight, bias, dtype, DenseConfig(rows), device)
        assert torch.equal(found, _product(codes, weight, bias, dtype, CONFIG, device))


# ---- activations ----


def _assert_same_bits(found: dispatch_int8.Quantized, wanted: dispatch_int8.Quantized, what: object) -> None:
    for name, a, b in zip(("codes", "scale", "zero"), found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype is b.dtype
            same = torch.equal(a.cpu().nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)) if name == "scale" else None
            assert torch.equal(a.cpu(), b) if same is None else same, f"{name} of {what}"


@pytest.mark.parametrize("how", ["a8s", "a8", "a8ts", "a8t"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_equals_the_oracle_bit_for_bit(bits: int, how: str, device: str) -> None:
    scheme = Scheme.parse(f"w{bits}cs-{how}")
    static = torch.tensor([0.013, 0.0 if how == "a8ts" else -17.0]) if "t" in how else None
    for i, (in_features, tokens) in enumerate(zip(COLUMNS, itertools.cycle(TOKENS), strict=False)):
        x = (torch.randn(tokens, in_features) * torch.randn(tokens, 1).exp() + i % 3).to(DTYPES[i % 3])
        there = None if static is None else static.to(device)
        found = dispatch_int8.quantize_activations(x.to(device), scheme, there)
        _assert_same_bits(found, dispatch_int8.packed_oracle(x, scheme, static, None, 0.0), (in_features, tokens))


@pytest.mark.parametrize("how", ["a8s", "a8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_oracle_is_what_numpy_says(bits: int, how: str) -> None:
    scheme = Scheme.parse(f"w{bits}c-{how}")
    for in_features in (1, 63, 130, 700):
        x = torch.randn(9, in_features) * torch.randn(9, 1).exp() + 0.3
        x[0], x[1, 0], x[2] = 0.0, 1e30, -x[2].abs()
        codes, scale, zero = dispatch_int8.packed_oracle(x, scheme, None, None, 0.0)
        wanted = truth.quantize_activations(truth.as_array(x), how == "a8s")
        assert np.array_equal(truth.unpack_activations(codes.numpy(), bits, in_features), wanted[0])
        assert np.array_equal(scale.numpy(), wanted[1])
        assert zero is None or np.array_equal(truth.as_array(zero), wanted[2])
        back = reference_int8.dequantize_activations(packing.unpack_activations(codes, bits, in_features), scale, zero)
        assert ((back - x).abs() <= scale[:, None] * (0.5 + 2.0**-14)).all()


HOSTILE = {
    "zero": [0.0] * 70,
    "minus zero": [-0.0] * 70,
    "one outlier": [1e-3] * 69 + [1e30],
    "one negative outlier": [-1e30] + [1e-3] * 69,
    "subnormal": [2.0**-140] * 69 + [-(2.0**-141)],
    "smallest": [2.0**-149] * 70,
    "below the smallest range": [2.0**-120] * 70,
    "large": [3.3e38, -3.3e38] * 35,
    "positive": [float(i) for i in range(1, 71)],
    "negative": [-float(i) for i in range(1, 71)],
    "halfway": [i / 2 for i in range(-35, 34)] + [127.0],
    "halfway below": [-0.5] + [0.0] * 68 + [254.5],  # where an affine range begins is a tie
    "halfway above": [-1.5] + [0.0] * 68 + [253.5],
    "nan": [1.0] * 35 + [float("nan")] + [1.0] * 34,
    "infinity": [float("inf")] + [1.0] * 69,
    "minus infinity": [1.0] * 69 + [float("-inf")],
}


@pytest.mark.parametrize("how", ["a8s", "a8", "a8ts", "a8t"])
@pytest.mark.parametrize("words", [4096, 16])
def test_hostile_tokens(how: str, words: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the oracle, in one tile or in several; and what the oracle says of them is what it promises."""
    from qkernels.tuning import choose

    configured = choose.activations(Scheme.parse("w8cs-a8s"), 70)
    monkeypatch.setattr(choose, "activations", lambda *_: dataclasses.replace(configured, words=words))
    dispatch_int8.forget()
    scheme = Scheme.parse(f"w8cs-{how}")
    static = torch.tensor([0.5, 0.0 if how == "a8ts" else 100.0]) if "t" in how else None
    x = torch.tensor(list(HOSTILE.values()))
    there = None if static is None else static.to(device)
    codes, scale, zero = wanted = dispatch_int8.packed_oracle(x, scheme, static, None, 0.0)
    _assert_same_bits(dispatch_int8.quantize_activations(x.to(device), scheme, there), wanted, how)
    dispatch_int8.forget()
    code = packing.unpack_activations(codes, 8, 70)
    values = reference_int8.dequantize_activations(code, scale, zero)
    names = list(HOSTILE)
    for i, name in enumerate(names):
        if name in ("nan", "infinity", "minus infinity"):
            assert torch.isnan(values[i]).all()
            assert not code[i].any()
        else:
            assert torch.isfinite(values[i]).all()
            if "zero" in name:
                assert not values[i].any()
            if not scheme.activations.static:  # type: ignore[union-attr]
                assert ((values[i] - x[i]).abs() <= scale[i] * (0.5 + 2.0**-14)).all(), name


@pytest.mark.parametrize("words", [4096, 32])
@pytest.mark.parametrize("how", ["a8s", "a8"])
def test_a_norm_comes_first(how: str, words: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of squares have another order than the oracle's: scales within 2^-20, codes within one.

    Of 48 words of codes 32 are a tile, so that the last is a part of one.
    """
    from qkernels.tuning import choose

    configured = choose.activations(Scheme.parse("w8cs-a8s"), 180)
    monkeypatch.setattr(choose, "activations", lambda *_: dataclasses.replace(configured, words=words))
    dispatch_int8.forget()
    x, norm = torch.randn(4, 180) * 5 + 1, torch.rand(180) + 0.5
    scheme = Scheme.parse(f"w8cs-{how}")
    for dtype in DTYPES:
        args = x.to(dtype), scheme, None, norm.to(dtype)
        found = dispatch_int8.quantize_activations(args[0].to(device), scheme, None, args[3].to(device), 1e-3)
        codes, scale, _ = dispatch_int8.packed_oracle(*args, 1e-3)
        assert ((found[1].cpu() - scale).abs() <= scale * 2.0**-20).all()
        a, b = (packing.unpack_activations(c.cpu(), 8, 180).int() for c in (found[0], codes))
        assert (a - b).abs().max() <= 1
        normed = torch.nn.functional.rms_norm(x.to(dtype).float(), (180,), norm.to(dtype).float(), 1e-3)
        direct = dispatch_int8.packed_oracle(normed, scheme, None, None, 0.0)
        assert (packing.unpack_activations(direct[0], 8, 180).int() - b).abs().max() <= 1
    dispatch_int8.forget()


# ---- the whole ----


@pytest.mark.parametrize("text", ["w8cs-a8s", "w8c-a8", "w4cs-a8ts", "w8ts-a8t"])
def test_the_op_gives_the_bits_of_the_oracle(text: str, device: str, path: str) -> None:
    """Rows with gaps, transposed and misaligned views, three dimensions, scales of some rows of a larger weight."""
    dispatch.forget()
    weight = random_weight(text, 48, 200)
    scheme = weight.scheme
    static = torch.tensor([0.05, 0.0 if text.endswith("s") else 9.0]) if "t" in text[-3:] else None
    packed, scale, zero = weight.args(device)
    bias = torch.randn(48).to(device)
    for x in (
        torch.randn(2, 3, 200),
        torch.randn(5, 240)[:, 17:217],
        torch.randn(200, 4).T,
        torch.randn(3, 400)[:, ::2],
        torch.randn(200),
        torch.randn(1, 200).expand(3, 200),
        torch.randn(1, 4, 200).transpose(0, 1),  # contiguous, and its rows are not stride(-2) apart
    ):
        for rows in (slice(None), slice(5, 29)):
            beside = slice(None) if scheme.group_size == "tensor" else rows
            own = (packed[rows], scale[:, beside], None if zero is None else zero[:, beside], bias[rows])
            there = None if static is None else static.to(device)
            found = dispatch.matmul(x.to(device), *own, str(scheme), 200, there).cpu()
            flat = x.reshape(-1, 200)
            codes = reference_int8.quantize_activations(flat, scheme.activations, static)  # type: ignore[arg-type]
            mine = [None if t is None else t.cpu() for t in own]
            wanted = reference_int8.matmul(*codes, *mine, scheme, x.dtype)  # type: ignore[arg-type]
            assert torch.equal(found, wanted.reshape(found.shape))
    dispatch.forget()


@pytest.mark.parametrize("text", ["w8cs-a8s", "w8c-a8", "w4ts-a8s", "w4g64-a8"])
def test_codes_that_layers_share_give_the_same_bits(text: str, device: str, path: str) -> None:
    """Codes with gaps too, and rows of a larger weight; each kind of call is decided once, and checked."""
    dispatch.forget()
    weight = random_weight(text, 48, 200)
    packed, scale, zero = weight.args(device)
    bias = torch.randn(48).to(device)
    x = torch.randn(2, 3, 200).to(device)
    codes = dispatch_int8.quantize_activations(x, weight.scheme, None)
    gaps = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in codes]
    for rows in (slice(None), slice(5, 29)):
        beside = slice(None) if weight.scheme.group_size == "tensor" else rows
        own = (packed[rows], scale[:, beside], None if zero is None else zero[:, beside], bias[rows])
        wanted = dispatch.matmul(x, *own, text, 200)
        for given in (codes, gaps):
            for known in (0, 1):
                kinds = len(dispatch._calls)
                assert torch.equal(dispatch.matmul_codes(*given, *own, text, 200, torch.float32), wanted)  # type: ignore[arg-type]
                assert len(dispatch._calls) == kinds + (not known)
        half = dispatch.matmul_codes(*codes, *own, text, 200, torch.float16)
        assert half.dtype is torch.float16
        assert torch.equal(half, wanted.half())
        with pytest.raises(ValueError, match=r"x_scale must be \(2, 3\) float32"):
            dispatch.matmul_codes(codes[0], codes[1][0], codes[2], *own, text, 200, torch.float32)
    none = tuple(None if t is None else t[:0] for t in codes)
    assert dispatch.matmul_codes(*none, packed, scale, zero, bias, text, 200, torch.float32).shape == (0, 3, 48)  # type: ignore[arg-type]
    dispatch.forget()


def test_a_static_scale_and_zero_may_lie_apart(device: str) -> None:
    scheme, x = Scheme.parse("w8cs-a8t"), torch.randn(3, 70)
    pairs = torch.tensor([[0.02, 3.0], [5.0, 7.0]])
    wanted = dispatch_int8.packed_oracle(x, scheme, pairs[:, 0], None, 0.0)
    _assert_same_bits(dispatch_int8.quantize_activations(x.to(device), scheme, pairs.to(device)[:, 0]), wanted, "apart")


def test_what_is_around_codes_and_results_stays(device: str, path: str) -> None:
    """Operands inside larger tensors full of NaN; a row of NaN makes NaN of its own outputs alone."""
    dispatch.forget()
    weight = random_weight("w8cs-a8s", 20, 96)
    canvas = torch.full((9, 160), float("nan"), device=device)
    x = canvas[2:7, 16:112]
    x.copy_(torch.randn(5, 96))
    wanted = dispatch.matmul(x.contiguous(), *weight.args(device), None, "w8cs-a8s", 96)
    assert torch.equal(dispatch.matmul(x, *weight.args(device), None, "w8cs-a8s", 96), wanted)
    assert torch.isfinite(wanted).all()
    x[3, 5] = float("nan")
    y = dispatch.matmul(x, *weight.args(device), None, "w8cs-a8s", 96)
    assert torch.isnan(y[3]).all()
    assert torch.equal(y[[0, 1, 2, 4]], wanted[[0, 1, 2, 4]])
    dispatch.forget()


def test_launches_are_remembered_for_one_set_of_dtypes(device: str) -> None:
    """What a launch has compiled, it runs on whatever comes: so for other dtypes there must be another one."""
    from qkernels.kernels import scale_sums

    dispatch_int8.forget()
    scale_sums._launch.cache_clear()
    weight = random_weight("w8cs-a8s", 20, 640)
    packed, scale, zero = weight.args(device)
    config, kinds = dataclasses.replace(CONFIG, splits=2), 0
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 640).to(device, dtype)
        codes, x_scale, _ = dispatch_int8.quantize_activations(x, weight.scheme, None)
        for scales, bias in ((scale, None), (scale.float(), None), (scale, x[0, :20]), (scale, x[0, :20].float())):
            args = (packed, scales, zero, bias)
            product = dispatch_int8.product(codes.shape, *args, weight.scheme, 640, dtype, config)
            product(codes, x_scale, None, *args)
            kinds += 1
    assert dispatch_int8._quantizer.cache_info().misses == 2
    assert dispatch_int8._fused.cache_info().misses == kinds
    assert scale_sums._launch.cache_info().misses == kinds
    dispatch_int8.forget()


def test_empty_products(device: str) -> None:
    for M, N, K in ((0, 4, 64), (3, 0, 64), (3, 4, 0)):
        weight = exact_weight("w8c-a8", N, K)
        bias = torch.arange(N).half().to(device)
        y = dispatch.matmul(torch.ones(M, K).half().to(device), *weight.args(device), bias, "w8c-a8", K).cpu()
        assert y.shape == (M, N)
        if K == 0:
            assert torch.equal(y, bias.cpu().expand(M, N))
