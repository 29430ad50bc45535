"""The torch.library ops on CPU: registration, tracing, gradients, autocast, and what bad arguments get."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkernels import QuantLinear, checks, ops, reference
from qkernels.scheme import Scheme
from tests.helpers import Weight, exact_weight, random_weight, signs

SCHEMES = ("w4g32", "w3cs", "w8g64f", "w2t")


def _args(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.packed, weight.scale, weight.zero


def _reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return reference.matmul(x, *_args(weight), bias, weight.scheme)


@pytest.fixture(params=SCHEMES)
def weight(request: pytest.FixtureRequest) -> Weight:
    return random_weight(request.param, 12, 96)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_passes_opcheck(weight: Weight, grad: bool, bias: bool) -> None:
    x = torch.randn(3, 96, requires_grad=grad)
    b = torch.randn(12, requires_grad=grad) if bias else None
    torch.library.opcheck(torch.ops.qkernels.matmul.default, (x, *_args(weight), b, str(weight.scheme), 96))


def test_quantize_and_dequantize_pass_opcheck(weight: Weight) -> None:
    w = torch.randn(12, 96)
    torch.library.opcheck(torch.ops.qkernels.quantize.default, (w, str(weight.scheme)))
    torch.library.opcheck(
        torch.ops.qkernels.dequantize.default, (*_args(weight), str(weight.scheme), 96, torch.float16)
    )


def test_the_front_and_the_op_are_the_oracle(weight: Weight) -> None:
    for dtype in checks.DTYPES:
        x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(12).to(dtype)
        wanted = _reference(x, weight, bias)
        assert torch.equal(ops.matmul(x, *_args(weight), bias, str(weight.scheme), 96), wanted)
        assert torch.equal(torch.ops.qkernels.matmul(x, *_args(weight), bias, str(weight.scheme), 96), wanted)
    packed, scale, zero = ops.quantize(torch.randn(12, 96), str(weight.scheme))
    assert (zero is None) == (weight.scheme.value_map == "symmetric")
    w = ops.dequantize(packed, scale, zero, str(weight.scheme), 96, torch.float16)
    assert torch.equal(w, reference.dequantize(packed, scale, zero, weight.scheme, 96, torch.float16))


def test_gradients_of_x_and_bias_are_those_of_the_dequantized_weight(weight: Weight) -> None:
    dense = reference.dequantize(*_args(weight), weight.scheme, 96, torch.float32)
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(12, requires_grad=True)
    out = torch.randn(2, 3, 12)
    for function in (ops.matmul, torch.ops.qkernels.matmul):
        found = torch.autograd.grad(function(x, *_args(weight), bias, str(weight.scheme), 96), (x, bias), out)
        wanted = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), out)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_one_token() -> None:
    layer, x = QuantLinear.from_linear(torch.nn.Linear(32, 4), "w4g16"), torch.randn(32, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias is not None
    assert torch.equal(layer.bias.grad, torch.ones(4))
    torch.testing.assert_close(x.grad, layer.qweight.dequantize().sum(0))


def test_forward_mode_raises_rather_than_lose_the_tangent() -> None:
    layer, x = QuantLinear(QuantLinear.from_linear(torch.nn.Linear(32, 4), "w4g16").qweight), torch.randn(3, 32)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(layer, (x,), (x,))
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        layer(forward_ad.make_dual(x, x))


def test_autocast_leaves_what_it_should_not_cast() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(32, 4), "w4g16")
    for x in (torch.ones(2, 32, dtype=torch.int32), torch.ones(2, 32).double()):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be float16"):
            layer(x)


def test_gradient_of_a_frozen_layer_reaches_the_layer_before() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), QuantLinear.from_linear(torch.nn.Linear(32, 4), "w4g16"))
    model(torch.randn(3, 16)).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.abs().sum() > 0
    assert model[1].weight_scale.grad is None


def test_no_grad_and_inference_mode_give_plain_tensors(weight: Weight) -> None:
    x = torch.randn(3, 96, requires_grad=True)
    for function in (ops.matmul, torch.ops.qkernels.matmul):
        with torch.no_grad():
            assert not function(x, *_args(weight), None, str(weight.scheme), 96).requires_grad
        with torch.inference_mode():
            y = function(x.detach(), *_args(weight), None, str(weight.scheme), 96)
            assert y.is_inference()
            assert torch.equal(y, _reference(x.detach(), weight))


def test_results_of_quantize_and_dequantize_have_no_gradient() -> None:
    w = torch.randn(4, 32, requires_grad=True)
    packed, scale, zero = ops.quantize(w, "w4g32")
    assert not scale.requires_grad
    assert not ops.dequantize(packed, scale, zero, "w4g32", 32, torch.float32).requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(weight: Weight, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, b: torch.relu(ops.matmul(x, *_args(weight), b, str(weight.scheme), 96)) + 1,
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for tokens in (3, 5, 1, 8):
        x, bias = torch.randn(tokens, 96), torch.randn(12)
        torch.testing.assert_close(compiled(x, bias), torch.relu(_reference(x, weight, bias)) + 1)


def test_compile_with_gradients_and_inductor() -> None:
    torch._dynamo.reset()
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), "w4g32")
    x = torch.randn(5, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), x)[0]
    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), x)[0]
    torch.testing.assert_close(found, wanted)


def test_export_saves_and_loads(tmp_path: pathlib.Path) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), "w4g32")
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(7, 64)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_bias_eager_and_compiled(weight: Weight, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x, bias = torch.randn(3, 96), torch.randn(12)
    wanted = _reference(x.to(dtype), weight, bias.to(dtype))

    def run(x: Tensor) -> Any:
        return ops.matmul(x, *_args(weight), bias, str(weight.scheme), 96)

    with torch.autocast("cpu", dtype):
        assert torch.equal(run(x), wanted)
        assert torch.equal(torch.ops.qkernels.matmul(x, *_args(weight), bias, str(weight.scheme), 96), wanted)
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), wanted)
        gradient = torch.autograd.grad(run(x.requires_grad_()).sum(), x)[0]
        assert gradient.dtype is torch.float32


def test_fake_tensors_have_the_shapes_of_real_ones(weight: Weight) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        args = [None if t is None else mode.from_tensor(t) for t in _args(weight)]
        x = torch.empty(2, 5, 96, dtype=torch.float16)
        y = ops.matmul(x, *args, None, str(weight.scheme), 96)
        assert (y.shape, y.dtype) == ((2, 5, 12), torch.float16)
        packed, scale, zero = ops.quantize(torch.empty(12, 96), str(weight.scheme))
        for found, wanted in zip((packed, scale, zero), _args(weight), strict=True):
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_from_many_threads() -> None:
    weight, x = exact_weight("w4g32", 24, 96), signs(3, 96, torch.float32)
    wanted, found = _reference(x, weight), []

    def run() -> None:
        found.extend(ops.matmul(x, *_args(weight), None, str(weight.scheme), 96) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    assert all(torch.equal(y, wanted) for y in found)


BAD_MATMUL = {
    "another K": (dict(x=torch.randn(3, 90)), ValueError, r"x must be .* K = 96, got \(3, 90\)"),
    "scalar x": (dict(x=torch.tensor(1.0)), ValueError, r"x must be .* got \(\)"),
    "double x": (dict(x=torch.randn(3, 96).double()), TypeError, r"x must be float16, bfloat16 or float32.*float64"),
    "integer x": (dict(x=torch.ones(3, 96, dtype=torch.int32)), TypeError, "x must be float16, bfloat16 or float32"),
    "another packed dtype": (dict(packed=torch.zeros(12, 12)), ValueError, r"packed must be .* got \(12, 12\) float32"),
    "short packed": (dict(packed=torch.zeros(12, 11).int()), ValueError, r"packed must be \(12, 12\) int32"),
    "1-D packed": (dict(packed=torch.zeros(12).int()), ValueError, r"packed must be"),
    "transposed scale": (
        dict(scale=torch.ones(12, 3)),
        ValueError,
        r"scale must be \(3, 12\) floating .* got \(12, 3\)",
    ),
    "integer scale": (dict(scale=torch.ones(3, 12).int()), ValueError, r"scale must be \(3, 12\) floating"),
    "float zero": (dict(zero=torch.ones(3, 12)), ValueError, r"zero must be \(3, 12\) uint8 .* float32"),
    "zero of another shape": (
        dict(zero=torch.zeros(12, 3, dtype=torch.uint8)),
        ValueError,
        r"zero must be \(3, 12\) uint8 .* got \(12, 3\)",
    ),
    "no zero": (dict(zero=None), ValueError, r"zero must be \(3, 12\).* got None"),
    "zero for symmetric": (dict(scheme="w4g32s"), ValueError, r"zero must be None .* got \(3, 12\) uint8"),
    "uint8 offset": (dict(scheme="w4g32f"), ValueError, r"zero must be \(3, 12\) floating .* got \(3, 12\) uint8"),
    "short bias": (dict(bias=torch.ones(11)), ValueError, r"bias must be \(12,\) floating, got \(11,\)"),
    "integer bias": (dict(bias=torch.ones(12).int()), ValueError, r"bias must be \(12,\) floating"),
    "unknown scheme": (dict(scheme="w4g33"), ValueError, "multiple of 16"),
    "another device": (dict(x=torch.randn(3, 96, device="meta")), ValueError, "x is on meta but packed is on cpu"),
}


@pytest.mark.parametrize("name", BAD_MATMUL)
def test_bad_arguments_of_matmul_are_named(name: str) -> None:
    change, error, message = BAD_MATMUL[name]
    weight = random_weight("w4g32", 12, 96)
    args: dict[str, Any] = dict(
        x=torch.randn(3, 96),
        packed=weight.packed,
        scale=weight.scale,
        zero=weight.zero,
        bias=None,
        scheme="w4g32",
        in_features=96,
    )
    args.update(change)
    with pytest.raises(error, match=message):
        ops.matmul(*args.values())


def test_bad_arguments_of_the_others_are_named() -> None:
    with pytest.raises(ValueError, match=r"w must be 2-D .* got shape \(2, 3, 4\)"):
        ops.quantize(torch.zeros(2, 3, 4), "w4g32")
    with pytest.raises(TypeError, match=r"w must be float16, bfloat16 or float32, got torch\.int8"):
        ops.quantize(torch.zeros(2, 32, dtype=torch.int8), "w4g32")
    with pytest.raises(ValueError, match=r"in_features must be from 0 to 268435440, got 268435441"):
        ops.quantize(torch.zeros(1, 1).expand(1, 2**28 - 15), "w8g8192")
    with pytest.raises(ValueError, match="not a scheme"):
        ops.quantize(torch.zeros(2, 32), "int4")
    weight = random_weight("w4g32", 12, 96)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch\.float64"):
        ops.dequantize(*_args(weight), "w4g32", 96, torch.float64)
    with pytest.raises(ValueError, match=r"packed must be \(12, 8\)"):
        ops.dequantize(*_args(weight), "w4g32", 64, torch.float32)


def test_a_scheme_string_is_parsed_once() -> None:
    checks._layout.cache_clear()
    weight = random_weight("w4g32", 12, 96)
    for _ in range(3):
        ops.matmul(torch.randn(1, 96), *_args(weight), None, "w4g32", 96)
    assert checks._layout.cache_info().misses == 1
    assert checks._layout("w4g32", 12, 96).scheme == Scheme(4, 32)
