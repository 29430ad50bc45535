"""Quantized activations on a CPU: schemes, the ops and their fronts, and what bad arguments get."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import Activations, QTensor, Scheme, checks, ops, ops_int8, packing, reference_int8
from qkernels.activations import QuantizedActivations
from tests import bounds, truth
from tests.helpers import Weight, random_weight

SCHEMES = ("w8cs-a8s", "w4g32-a8", "w8g64-a8ts", "w4ts-a8t")


def _static(scheme: Scheme) -> Tensor | None:
    how = scheme.activations
    assert how is not None
    return torch.tensor([0.02, 0.0 if how.symmetric else -11.0]) if how.static else None


@pytest.fixture(params=SCHEMES)
def weight(request: pytest.FixtureRequest) -> Weight:
    return random_weight(request.param, 12, 96)


def _args(weight: Weight, bias: Tensor | None = None) -> tuple[Any, ...]:
    """What matmul takes after x."""
    return weight.packed, weight.scale, weight.zero, bias, str(weight.scheme), 96, _static(weight.scheme)


def _fake(x: Tensor, scheme: Scheme) -> Tensor:
    """x as its codes have it, float32."""
    assert scheme.activations is not None
    codes = reference_int8.quantize_activations(x.reshape(-1, x.shape[-1]), scheme.activations, _static(scheme))
    return reference_int8.dequantize_activations(*codes).reshape(x.shape)


# ---- schemes ----


def test_names_of_schemes() -> None:
    assert Scheme.parse("w8a8") == Scheme(8, "channel", "symmetric", activations=Activations())
    assert Scheme.parse("w4a8") == Scheme(4, 128, "affine", activations=Activations(symmetric=True))
    for text in ("w8cs-a8s", "w8cs-a8", "w8cs-a8t", "w8cs-a8ts", "w4g64-bf16-a8ts", "w8t-a8s"):
        scheme = Scheme.parse(text)
        assert str(scheme) == text
        assert pickle.loads(pickle.dumps(scheme)) == scheme
        assert str(scheme.weight_only) == text[: text.rindex("-")]
        assert scheme != scheme.weight_only
    assert len({Scheme.parse(f"w8cs{how}") for how in ("", "-a8", "-a8s", "-a8t", "-a8ts")}) == 5
    plain = Scheme.parse("w4g128")
    assert plain.weight_only is plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w3g64-a8s", "weights of 4 or 8 bits"),
        ("w8cf-a8s", "weights of 4 or 8 bits that are symmetric or have integer zeros, got 8 bits, offset"),
        ("w8cs-a4", "is not a scheme; accepted"),
        ("w8cs-a8st", "is not a scheme"),
        ("w8cs-a8s-bf16", "is not a scheme"),
    ],
)
def test_schemes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


def test_activations_must_be_activations() -> None:
    with pytest.raises(TypeError, match=r"activations must be qkernels\.Activations or None, got 'a8'"):
        Scheme(8, "channel", "symmetric", activations="a8")  # type: ignore[arg-type]


# ---- matmul ----


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_passes_opcheck(weight: Weight, grad: bool, bias: bool) -> None:
    x = torch.randn(3, 96, requires_grad=grad)
    b = torch.randn(12, requires_grad=grad) if bias else None
    torch.library.opcheck(torch.ops.qkernels.matmul.default, (x, *_args(weight, b)))


def test_the_product_is_that_of_what_codes_stand_for(weight: Weight) -> None:
    """In float64, to the bound of a product of codes."""
    for dtype in checks.DTYPES:
        x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(12).to(dtype)
        x64 = truth.as_array(_fake(x, weight.scheme)).reshape(6, 96)
        # What codes stand for is rounded to float32, which the product does not do: by at most 2^-24 of each.
        exact = x64 @ weight.values.T + truth.as_array(bias)
        size = np.abs(x64) @ np.abs(weight.values).T + np.abs(truth.as_array(bias))
        for function in (ops.matmul, torch.ops.qkernels.matmul):
            y = truth.as_array(function(x, *_args(weight, bias)).reshape(6, 12))
            allowed = bounds.codes(exact, size, weight.groups, dtype) + 2.0**-23 * size
            assert (np.abs(y - exact) <= allowed).all()


def test_gradients_go_straight_through(weight: Weight) -> None:
    dense = torch.from_numpy(weight.values).float()
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(12, requires_grad=True)
    out = torch.randn(2, 3, 12)
    for function in (ops.matmul, torch.ops.qkernels.matmul):
        found = torch.autograd.grad(function(x, *_args(weight, bias)), (x, bias), out)
        wanted = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), out)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(weight: Weight, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, b: torch.relu(ops.matmul(x, *_args(weight, b))) + 1,
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for tokens in (3, 5, 1, 8):
        x, bias = torch.randn(tokens, 96), torch.randn(12)
        assert torch.equal(compiled(x, bias), torch.relu(ops.matmul(x, *_args(weight, bias))) + 1)


def test_autocast_quantizes_what_it_has_cast(weight: Weight) -> None:
    x = torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.matmul(x, *_args(weight))
    assert torch.equal(y, ops.matmul(x.bfloat16(), *_args(weight)))


def test_static_activations_are_there_exactly_where_they_must_be(weight: Weight) -> None:
    *args, static = _args(weight)
    x = torch.randn(3, 96)
    wrong = torch.tensor([0.1, 0.0]) if static is None else None
    message = "needs activation" if static is not None else "activation must be None"
    with pytest.raises(ValueError, match=message):
        ops.matmul(x, *args, wrong)
    if static is not None:
        for bad in (static.double(), static[:1], static[None]):
            with pytest.raises(ValueError, match=r"activation must be \(2,\) float32"):
                ops.matmul(x, *args, bad)
        with pytest.raises(ValueError, match="activation is on meta but packed is on cpu"):
            ops.matmul(x, *args, static.to("meta"))


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("w8cs-a8ts", [0.0, 0.0]),
        ("w8cs-a8ts", [-1.0, 0.0]),
        ("w8cs-a8ts", [float("nan"), 0.0]),
        ("w8cs-a8ts", [float("inf"), 0.0]),
        ("w8cs-a8ts", [1e-37, 0.0]),
        ("w8cs-a8ts", [1.0, 1.0]),
        ("w8cs-a8t", [1.0, 128.0]),
        ("w8cs-a8t", [1.0, 0.5]),
        ("w8cs-a8t", [1.0, float("nan")]),
    ],
)
def test_a_qtensor_refuses_scales_and_zeros_that_are_none(text: str, bad: list[float]) -> None:
    with pytest.raises(ValueError, match="activation must be a scale from 2\\^-119 to 2\\^119 and a zero from"):
        qkernels.quantize(torch.randn(4, 64), text, activation=torch.tensor(bad))


def test_sums_that_might_not_fit_an_int32_are_refused() -> None:
    """255 * 255 * 33026 does not fit; symmetric codes are smaller, and groups shorter."""
    w = torch.zeros(1, 33026)
    with pytest.raises(ValueError, match=r"groups of 33026 codes are too long for sums in int32 .* 33025 at most"):
        qkernels.quantize(w, "w8c-a8")
    for text in ("w8cs-a8s", "w8g128-a8", "w4c-a8"):
        qkernels.quantize(w, text)
    assert qkernels.quantize(w[:, 1:], "w8c-a8").shape == (1, 33025)


def test_the_longest_sums_are_right() -> None:
    """Codes of one sign at the end of their range, so that sums come as near to 2^31 as they may."""
    K = 33025
    q = qkernels.quantize(torch.full((2, K), 1.0), "w8c-a8")
    assert (packing.unpack(q.packed, 8, K) - q.zero.T.int() == 255).all()  # type: ignore[union-attr]
    codes = qkernels.quantize_activations(torch.full((1, K), 2.0), "w8c-a8")
    total = torch.tensor(255 * 255 * K, dtype=torch.int32)
    y = torch.nn.functional.linear(codes, q)  # type: ignore[arg-type]
    assert torch.equal(y, total.float() * q.scale.float() * codes.scale)


def test_rows_are_multiplied_some_at_a_time(weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    x, args = torch.randn(3, 96), _args(weight, torch.randn(12))
    whole = ops.matmul(x, *args)
    monkeypatch.setattr(reference_int8, "_CHUNK_WEIGHTS", 5 * 96)
    assert torch.equal(ops.matmul(x, *args), whole)


# ---- the two steps ----


@pytest.mark.parametrize("norm", [False, True])
def test_the_steps_pass_opcheck(weight: Weight, norm: bool) -> None:
    x, n = torch.randn(2, 3, 96), torch.rand(96) if norm else None
    scheme = str(weight.scheme)
    op = torch.ops.qkernels.quantize_activations.default
    torch.library.opcheck(op, (x, scheme, _static(weight.scheme), n, 1e-6))
    codes = ops_int8.quantize_activations(x, scheme, _static(weight.scheme), n, 1e-6)
    args = (*codes, weight.packed, weight.scale, weight.zero, torch.randn(12), scheme, 96, torch.float16)
    torch.library.opcheck(torch.ops.qkernels.matmul_codes.default, args)


def test_two_steps_are_the_whole(weight: Weight) -> None:
    q = QTensor(weight.packed, weight.scale, weight.zero, weight.scheme, 96, activation=_static(weight.scheme))
    layer = qkernels.QuantLinear(q, torch.randn(12))
    for dtype in checks.DTYPES:
        x = torch.randn(2, 3, 96).to(dtype)
        codes = qkernels.quantize_activations(x, weight.scheme, activation=_static(weight.scheme))
        assert codes.shape == x.shape
        assert torch.equal(codes.dequantize(), _fake(x, weight.scheme).to(dtype))
        y = torch.nn.functional.linear(codes, q, layer.bias)  # type: ignore[arg-type]
        assert y.dtype is dtype
        assert torch.equal(y, torch.nn.functional.linear(x, q, layer.bias))
        assert torch.equal(layer(codes), layer(x))
    assert "QuantizedActivations(shape=(2, 3, 96), 'a8" in repr(codes)


def test_the_steps_are_compiled_and_cast_as_the_whole_is(weight: Weight) -> None:
    q = QTensor(weight.packed, weight.scale, weight.zero, weight.scheme, 96, activation=_static(weight.scheme))
    layer, x = qkernels.QuantLinear(q, torch.randn(12)), torch.randn(3, 96)

    def steps(x: Tensor) -> Tensor:
        codes = qkernels.quantize_activations(x, str(weight.scheme), activation=layer.weight_activation)
        return layer(codes)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(steps, fullgraph=True, backend="aot_eager")(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = steps(x)
            assert y.dtype is torch.bfloat16
            assert torch.equal(y, layer(x))


def test_without_input_features_there_is_the_bias(weight: Weight) -> None:
    q = qkernels.quantize(torch.randn(12, 0), weight.scheme, activation=_static(weight.scheme))
    bias = torch.randn(12)
    assert torch.equal(torch.nn.functional.linear(torch.randn(2, 3, 0), q, bias), bias.expand(2, 3, 12))  # type: ignore[arg-type]


def test_a_norm_is_quantized_as_if_it_were_written() -> None:
    x, norm = torch.randn(4, 96), torch.rand(96)
    normed = torch.nn.functional.rms_norm(x, (96,), norm, 1e-5)
    found = qkernels.quantize_activations(x, "w8a8", norm=norm, eps=1e-5)
    wanted = qkernels.quantize_activations(normed, "w8a8")
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-6, atol=0)
    assert ((found.dequantize() - wanted.dequantize()).abs() <= 1.001 * wanted.scale[:, None]).all()
    assert (found.dequantize() != wanted.dequantize()).float().mean() < 0.6  # scales that differ in a last bit do
    unscaled = qkernels.quantize_activations(x, "w8a8")
    assert not torch.allclose(found.scale, unscaled.scale)


def test_codes_lie_as_packing_says() -> None:
    for bits, in_features in ((8, 1), (8, 64), (8, 200), (4, 128), (4, 130), (4, 33)):
        code = torch.randint(-128, 128, (3, in_features), dtype=torch.int8)
        packed = packing.pack_activations(code, bits)
        assert packed.shape == (3, packing.activation_words(bits, in_features))
        assert np.array_equal(truth.unpack_activations(packed.numpy(), bits, in_features), code.numpy())
        assert torch.equal(packing.unpack_activations(packed, bits, in_features), code)
    # The bytes of 8-bit weights have the same order: what torch's own int8 products of packed weights rest on.
    code = torch.randint(0, 256, (3, 192), dtype=torch.uint8)
    assert torch.equal(packing.pack(code, 8), packing.pack_activations(code.view(torch.int8), 8))


def test_codes_meet_only_weights_that_they_are_for() -> None:
    codes = qkernels.quantize_activations(torch.randn(3, 96), "w8a8")
    for text in ("w4cs-a8s", "w8cs-a8", "w8cs"):
        with pytest.raises(ValueError, match="cannot meet a weight of scheme"):
            torch.nn.functional.linear(codes, qkernels.quantize(torch.randn(4, 96), text))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K = 80"):
        torch.nn.functional.linear(codes, qkernels.quantize(torch.randn(4, 80), "w8a8"))  # type: ignore[arg-type]
    q = qkernels.quantize(torch.randn(4, 96), "w8a8")
    ordered = dataclasses.replace(q, order=torch.arange(96).flip(0).int())
    with pytest.raises(ValueError, match="order of inputs"):
        torch.nn.functional.linear(codes, ordered)  # type: ignore[arg-type]
    for other in (torch.randn(4, 96), q.T):
        with pytest.raises(TypeError):
            torch.nn.functional.linear(codes, other)  # type: ignore[arg-type]


def test_an_order_of_inputs_comes_before_the_codes() -> None:
    q = qkernels.quantize(torch.randn(4, 96), "w8a8")
    order = torch.randperm(96)
    ordered = dataclasses.replace(q, order=order.int())
    x = torch.randn(3, 96)
    assert torch.equal(torch.nn.functional.linear(x, ordered), torch.nn.functional.linear(x[:, order], q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "got a scalar"),
        ({"x": torch.ones(2, 96, dtype=torch.int32)}, "x must be float16"),
        ({"scheme": "w8cs"}, "has no quantized activations"),
        ({"norm": torch.ones(95)}, r"norm must be \(96,\) floating, got \(95,\)"),
        ({"norm": torch.ones(96).long()}, "norm must be"),
        ({"norm": torch.ones(96, device="meta")}, "norm is on meta but x is on cpu"),
        ({"activation": torch.tensor([1.0, 0.0])}, "activation must be None"),
    ],
)
def test_bad_activations(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"x": torch.randn(2, 96), "scheme": "w8cs-a8s", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        ops_int8.quantize_activations(**args)
    with pytest.raises((ValueError, TypeError), match=message):
        qkernels.quantize_activations(args.pop("x"), args.pop("scheme"), **args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 31, dtype=torch.int32)}, r"codes must be \(..., 32\) int32"),
        ({0: torch.zeros(2, 3, 32)}, r"codes must be \(..., 32\) int32"),
        ({1: torch.zeros(3)}, r"x_scale must be \(2, 3\) float32"),
        ({1: torch.zeros(2, 3).half()}, r"x_scale must be \(2, 3\) float32"),
        ({2: None}, "x_zero must be"),
        ({2: torch.zeros(2, 3)}, "x_zero must be"),
        ({2: torch.zeros(6, dtype=torch.int8)}, "x_zero must be"),
        ({3: torch.zeros(12, 5, dtype=torch.int32)}, "packed must be"),
        ({6: torch.zeros(11)}, "bias must be"),
        ({7: "w8c"}, "has no quantized activations"),
        ({7: "w8c-a8s"}, "x_zero must be None"),
        ({8: 97}, "must be"),
        ({9: torch.float64}, "dtype must be"),
        ({1: torch.zeros(2, 3, device="meta")}, "x_scale is on meta but codes are on cpu"),
    ],
)
def test_bad_codes(change: dict[int, Any], message: str) -> None:
    weight = random_weight("w8c-a8", 12, 96)
    codes = ops_int8.quantize_activations(torch.randn(2, 3, 96), "w8c-a8")
    args = [*codes, weight.packed, weight.scale, weight.zero, torch.zeros(12), "w8c-a8", 96, torch.float32]
    for i, value in change.items():
        args[i] = value
    with pytest.raises((ValueError, TypeError), match=message):
        ops_int8.matmul(*args)  # type: ignore[arg-type]


def test_codes_are_a_value_of_their_own() -> None:
    codes = qkernels.quantize_activations(torch.randn(2, 64), "w8a8")
    assert isinstance(codes, QuantizedActivations)
    assert not codes.scale.requires_grad
    x = torch.randn(2, 64, requires_grad=True)
    assert not qkernels.quantize_activations(x, "w8a8").scale.requires_grad
