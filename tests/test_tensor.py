from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import qkernels
from qkernels import QTensor, QuantizationError, QuantLinear, Scheme, reference


@pytest.fixture
def w() -> torch.Tensor:
    return torch.randn(24, 96)


@pytest.mark.parametrize("scheme", ["w4g32", "w8cs", "w2tf", "w3g64f-bf16"])
def test_a_quantized_weight_stands_in_for_the_weight(w: torch.Tensor, scheme: str) -> None:
    q = qkernels.quantize(w, scheme)
    x, bias = torch.randn(2, 5, 96), torch.randn(24)
    dense = q.dequantize()
    torch.testing.assert_close(F.linear(x, q), F.linear(x, dense))
    torch.testing.assert_close(F.linear(x, q, bias), F.linear(x, dense, bias))
    torch.testing.assert_close(F.linear(input=x, weight=q, bias=bias), F.linear(x, dense, bias))
    for product in (x @ q.T, torch.matmul(x, q.T), x.matmul(q.T)):
        torch.testing.assert_close(product, x @ dense.T)
    assert q.T.shape == (96, 24)
    assert q.T.T is q


def test_what_it_tells_about_itself(w: torch.Tensor) -> None:
    q = qkernels.quantize(w, Scheme(4, 32))
    assert q.shape == (24, 96)
    assert q.scheme == Scheme.parse("w4g32")
    # 96 * 4 bits are 48 bytes a row; 3 groups of 2 + 1 bytes
    assert q.nbytes == 24 * (48 + 3 * 3)
    assert q.bits_per_weight == pytest.approx(8 * q.nbytes / (24 * 96))
    assert repr(q) == "QTensor(shape=(24, 96), scheme='w4g32', 1,368 bytes, 4.75 bits per weight, device='cpu')"
    assert math.isnan(qkernels.quantize(torch.empty(0, 32), "w4g32").bits_per_weight)


def test_padding_counts_in_the_bytes() -> None:
    q = qkernels.quantize(torch.randn(2, 129), "w1c")
    assert q.packed.nbytes == 2 * 32  # 129 bits in units of 128
    assert q.nbytes == 2 * 32 + 2 * 2 + 2


def test_error_figures(w: torch.Tensor) -> None:
    q = qkernels.quantize(w, "w4g32")
    difference = (w - q.dequantize()).double()
    error = q.error(w)
    assert error.snr_db == pytest.approx(10 * math.log10(w.double().square().sum() / difference.square().sum()))
    assert error.relative == pytest.approx((difference.norm() / w.double().norm()).item())
    assert error.largest == pytest.approx(difference.abs().max().item())
    both = error + QuantizationError(1.0, 2.0, 100.0)
    assert (both.signal, both.noise, both.largest) == (error.signal + 1, error.noise + 2, 100.0)
    lossless = qkernels.quantize(torch.zeros(2, 32), "w4g32").error(torch.zeros(2, 32))
    assert (lossless.snr_db, lossless.relative) == (math.inf, 0.0)
    assert QuantizationError(0.0, 1.0, 1.0).snr_db == -math.inf
    with pytest.raises(ValueError, match=r"w must have shape \(24, 96\), got \(96, 24\)"):
        q.error(w.T)


def test_dequantize_in_each_dtype(w: torch.Tensor) -> None:
    q = qkernels.quantize(w.half(), "w4g32")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))


def test_other_functions_say_what_is_supported(w: torch.Tensor) -> None:
    q = qkernels.quantize(w, "w4g32")
    with pytest.raises(TypeError, match=r"does not support add; it supports F\.linear\(x, q, bias\) and x @ q\.T"):
        torch.add(w, q)
    with pytest.raises(TypeError, match="does not support matmul"):
        torch.matmul(w, q)
    with pytest.raises(TypeError, match=r"QTensor\.T does not support matmul; it supports x @ q\.T"):
        torch.matmul(q.T, w)
    with pytest.raises(TypeError):
        w @ q
    with pytest.raises(TypeError, match="takes a Tensor and a QTensor, got QTensor and Tensor"):
        F.linear(q, w)
    assert torch.equal(torch.matmul(w, other=q.T), w @ q.T)
    with pytest.raises(TypeError, match=r"q\.dequantize\(torch\.float16\) gives a tensor"):
        q.to(torch.float16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"w must be a torch\.Tensor, got list"):
        qkernels.quantize([[1.0]], "w4g32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be .* K = 96, got \(2, 95\)"):
        F.linear(torch.randn(2, 95), q)


def test_parts_that_do_not_fit_are_refused(w: torch.Tensor) -> None:
    q = qkernels.quantize(w, "w4g32")
    with pytest.raises(ValueError, match="scale must be"):
        QTensor(q.packed, q.scale.T, q.zero, q.scheme, 96)
    with pytest.raises(ValueError, match="packed must be"):
        QTensor(q.packed, q.scale, q.zero, q.scheme, 200)
    assert q.zero is not None
    with pytest.raises(ValueError, match="zero must be at most 15 for scheme 'w4g32', got 16"):
        QTensor(q.packed, q.scale, torch.full_like(q.zero, 16), q.scheme, 96)


def test_copies_and_pickles(w: torch.Tensor) -> None:
    q = qkernels.quantize(w, "w4g32")
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert repr(twin) == repr(q)
        assert torch.equal(twin.dequantize(), q.dequantize())


def test_in_compiled_code_and_inference_mode(w: torch.Tensor) -> None:
    torch._dynamo.reset()
    q, x = qkernels.quantize(w, "w4g32"), torch.randn(3, 96)
    wanted = F.linear(x, q)
    for dynamic in (False, True):
        function = torch.compile(lambda x: F.linear(x, q), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(function(x), wanted)
    product = torch.compile(lambda x: x @ q.T, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(product(x), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(F.linear(x, q), wanted)


# ---- QuantLinear ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["w4g32", "w8cs", "w3g64f"])
def test_quant_linear_takes_the_place_of_linear(scheme: str, bias: bool) -> None:
    linear = torch.nn.Linear(96, 24, bias=bias)
    layer = QuantLinear.from_linear(linear, scheme)
    x = torch.randn(2, 3, 96)
    torch.testing.assert_close(layer(x), F.linear(x, layer.qweight.dequantize(), linear.bias))
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (96, 24)
    assert f"bias={bias}, scheme='{scheme}'" in repr(layer)
    assert torch.equal(layer.qweight.packed, qkernels.quantize(linear.weight.detach(), scheme).packed)
    with pytest.raises(ValueError, match=r"K = 96, got \(2, 90\)"):
        layer(torch.randn(2, 90))


def test_quant_linear_keeps_its_mode() -> None:
    assert not QuantLinear.from_linear(torch.nn.Linear(32, 4).eval(), "w4g32").training
    assert QuantLinear.from_linear(torch.nn.Linear(32, 4), "w4g32").training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_of_a_module_leaves_codes_and_scales(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32f")
    before = [t.clone() for t in layer.qweight.tensors]
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(24)).to(dtype)
    assert layer.bias is not None
    assert model[1].weight.dtype is dtype
    assert layer.bias.dtype is (dtype if dtype is not torch.float64 else torch.float32)  # which x cannot be
    for old, new in zip(before, layer.qweight.tensors, strict=True):
        assert old.dtype is new.dtype
        assert torch.equal(old, new)


def test_moving_a_module_moves_all_of_it() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32").to("meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer.weight_scale.dtype is torch.float16


def test_state_dict_deepcopy_and_pickle() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32")
    x = torch.randn(3, 96)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "weight_zero", "bias"}
    other = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32")
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    symmetric = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32s")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_zero"'):
        symmetric.load_state_dict(layer.state_dict())


def test_trainable_parameters_are_the_bias_alone() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 24), "w4g32")
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_oracle_and_layer_agree_in_half_precision() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 24).half(), "w4g32")
    x = torch.randn(3, 96).half()
    q = layer.qweight
    assert torch.equal(layer(x), reference.matmul(x, q.packed, q.scale, q.zero, layer.bias, q.scheme))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    q = qkernels.quantize(torch.randn(4, 32), "w4g32")
    for bias in (torch.ones(3), torch.ones(4).double()):
        with pytest.raises(ValueError, match=r"bias must be \(4,\) floating"):
            QuantLinear(q, bias)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_errors_of_very_small_and_large_weights(size: float) -> None:
    w = torch.randn(8, 64)
    plain = qkernels.quantize(w, "w3g32-fp32").error(w)
    assert qkernels.quantize(w * size, "w3g32-fp32").error(w * size).snr_db == pytest.approx(plain.snr_db, abs=0.01)


def test_an_order_of_inputs(w: torch.Tensor) -> None:
    """Codes in another order of columns are the same weight, wherever it is used."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    q = qkernels.quantize(w[:, order], "w4g32")
    ordered = dataclasses.replace(q, order=order.to(torch.int32))
    wanted = torch.empty_like(w)
    wanted[:, order] = q.dequantize()
    assert torch.equal(ordered.dequantize(), wanted)
    assert ordered.error(w) == q.error(w[:, order])
    assert ordered.nbytes == q.nbytes + 4 * 96
    x = torch.randn(2, 3, 96)
    assert torch.equal(F.linear(x, ordered), F.linear(x[..., order], q))
    assert torch.equal(x @ ordered.to("cpu").T, F.linear(x[..., order], q))
    torch.testing.assert_close(F.linear(x, ordered), F.linear(x, wanted))
    with pytest.raises(ValueError, match=r"x must be .* K = 96, got \(2, 97\)"):
        F.linear(torch.randn(2, 97), ordered)
    for bad in (order, order[:95].int(), torch.zeros(96, dtype=torch.int32), order.int() + 1):
        with pytest.raises(ValueError, match="order must"):
            dataclasses.replace(q, order=bad)


@pytest.mark.parametrize("scheme", ["w4g32", "w3cs", "w8t", "w2g16f"])
def test_rows(w: torch.Tensor, scheme: str) -> None:
    q, index = qkernels.quantize(w, scheme), torch.tensor([3, 0, 3, 23])
    assert torch.equal(q.rows(index).dequantize(), q.dequantize()[index])
