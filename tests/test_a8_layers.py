"""Layers whose inputs are quantized: what every quantized layer can, codes given by hand, siblings, experts."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels
from qkernels import QTensor, QuantEmbedding, QuantExperts, QuantizedActivations, QuantLinear, Scheme, ops, ops_experts
from qkernels import reference_int8 as oracle
from qkernels.tensor import stacked_rows, stored_bytes
from tests.helpers import quantized

SCHEMES = ("w8cs-a8s", "w4g32-a8", "w8ts-a8s", "w4g48s-bf16-a8", "w8cs-a8ts", "w4g32-a8t")
STATIC = ("w8cs-a8ts", "w4g32-a8t")
X = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1))


def _weight(scheme: str, rows: int = 24, seed: int = 0) -> QTensor:
    return quantized(torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed)), scheme, X)


def _layer(scheme: str, bias: bool = True) -> QuantLinear:
    return QuantLinear(_weight(scheme), torch.linspace(-1, 1, 24) if bias else None)


def _seen(q: QTensor, x: Tensor) -> Tensor:
    """What the codes of x stand for, float32."""
    how = q.scheme.activations
    assert how is not None
    flat = oracle.quantize_activations(x.reshape(-1, x.shape[-1]), how, q.activation)
    return oracle.dequantize_activations(*flat).reshape(x.shape)


# ---- one layer ----


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_multiplies_what_codes_stand_for(scheme: str, dtype: torch.dtype) -> None:
    layer, x = _layer(scheme), X.to(dtype)
    assert layer.bias is not None
    wanted = F.linear(_seen(layer.qweight, x), layer.qweight.dequantize(), layer.bias)
    assert layer(x).dtype is dtype
    torch.testing.assert_close(layer(x), wanted.to(dtype), atol=1e-4 if dtype is torch.float32 else 2e-2, rtol=1e-2)
    assert not torch.allclose(layer(x).float(), F.linear(x.float(), layer.qweight.dequantize(), layer.bias), atol=1e-3)
    for same in (F.linear(x, layer.qweight, layer.bias), x @ layer.qweight.T + 0):
        assert same.shape == layer(x).shape
    assert torch.equal(F.linear(x, layer.qweight, layer.bias), layer(x))
    assert torch.equal(layer(x.reshape(6, 96)), layer(x).reshape(6, 24))
    assert torch.equal(layer(x[0, 0]), layer(x)[0, 0])
    assert layer(x[:, :0]).shape == (2, 0, 24)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_modes_of_torch_give_the_same_bits(scheme: str) -> None:
    layer = _layer(scheme)
    wanted = layer(X)
    with torch.inference_mode():
        assert torch.equal(layer(X), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (1, 2, 3):
        assert torch.equal(compiled(X[:, :tokens]), wanted[:, :tokens])
    program = torch.export.export(layer, (X,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=64)},))
    assert torch.equal(program.module()(X[:, :2]), wanted[:, :2])
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(X)
        assert torch.equal(compiled(X), low)
    assert low.dtype is torch.bfloat16
    assert torch.equal(low, layer.bfloat16()(X.bfloat16()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_go_straight_through(scheme: str) -> None:
    layer = _layer(scheme)
    layer.bias = nn.Parameter(torch.zeros(24))
    grad = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    dense = layer.qweight.dequantize()
    torch._dynamo.reset()

    def gradients(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = X.clone().requires_grad_()
        return torch.autograd.grad(run(x), (x, layer.bias), grad)

    wanted = grad @ dense, grad.sum((0, 1))
    for run in (layer, torch.compile(layer, fullgraph=True)):
        for found, expected in zip(gradients(run), wanted, strict=True):
            torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(layer, (X,), (X,))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_op_is_a_good_citizen(scheme: str) -> None:
    q = _weight(scheme)
    for x in (X, X.clone().requires_grad_()):
        args = (x, q.packed, q.scale, q.zero, torch.ones(24), scheme, 96, q.activation)
        torch.library.opcheck(torch.ops.qkernels.matmul.default, args)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_pickles_and_state_dicts(scheme: str) -> None:
    layer = _layer(scheme)
    wanted, stored = layer(X), {name: t.dtype for name, t in layer.state_dict().items() if name != "bias"}
    assert ("weight_activation" in stored) == (scheme in STATIC)
    fresh = copy.deepcopy(layer)
    for parameter in fresh.parameters():
        parameter.data.fill_(1)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, layer.to("cpu")):
        assert torch.equal(twin(X), wanted)
        assert twin.qweight.scheme == layer.scheme
        assert f"scheme='{scheme}'" in repr(twin)
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        low = convert(copy.deepcopy(layer))  # type: ignore[operator]
        assert {name: t.dtype for name, t in low.state_dict().items() if name != "bias"} == stored
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")


def test_what_state_dicts_cannot_be_loaded() -> None:
    dynamic, static, affine = _layer("w4g32-a8"), _layer("w4g32-a8ts"), _layer("w4g32-a8t")
    assert affine.weight_activation is not None
    assert float(affine.weight_activation[1]) != 0
    for layer, other, message in (
        (static, dynamic, "Missing key.*weight_activation"),
        (dynamic, static, "Unexpected key.*weight_activation"),
        (static, affine, "weight_activation: activation must be a scale .* and a zero from 0 to 0"),
        (_layer("w8cs-a8s"), _layer("w4cs-a8s"), "size mismatch for weight"),
        (static, _layer("w4g32s-a8ts"), "Missing key.*weight_zero"),
    ):
        before = {n: t.clone() for n, t in layer.state_dict().items() if n.endswith("_activation")}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(other.state_dict())
        assert all(torch.equal(layer.state_dict()[n], t) for n, t in before.items())
    for bad, message in (
        (torch.ones(2).double(), r"weight_activation of a w4g32-a8ts layer must be torch\.float32, got torch\.float64"),
        (torch.ones(3), "size mismatch for weight_activation"),
        (torch.tensor([float("nan"), 0.0]), "got nan and 0"),
        (torch.tensor([-1.0, 0.0]), "got -1 and 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            static.load_state_dict({**static.state_dict(), "weight_activation": bad})


# ---- codes given by hand ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_serve_for_x(scheme: str) -> None:
    layer = _layer(scheme)
    for x in (X, X[0], X[0, 0], X[:, :0], X.bfloat16()):
        codes = qkernels.quantize_activations(x, scheme, activation=layer.weight_activation)
        for found in (layer(codes), F.linear(codes, layer.qweight, layer.bias)):  # type: ignore[arg-type]
            assert found.dtype is x.dtype
            assert torch.equal(found, layer(x))
    with torch.inference_mode():
        assert torch.equal(layer(codes), layer(x))


def test_codes_that_a_weight_cannot_meet() -> None:
    x = qkernels.quantize_activations(X, "w8a8")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()
    merged = _merged("w4cs-a8s")
    for weight, message in (
        (dataclasses.replace(_weight("w8cs-a8s"), order=order), "order of inputs of its own"),
        (_weight("w8cs"), "cannot meet a weight of scheme 'w8cs' with K = 96"),
        (_weight("w8cs-a8"), "cannot meet a weight of scheme 'w8cs-a8'"),
        (_weight("w8cs-a8ts"), "cannot meet a weight of scheme 'w8cs-a8ts'"),
        (_weight("w4cs-a8s"), "cannot meet a weight of scheme 'w4cs-a8s'"),
        (qkernels.quantize(torch.randn(24, 64), "w8a8"), "cannot meet a weight of scheme 'w8cs-a8s' with K = 64"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantLinear(weight)(x)
        with pytest.raises(ValueError, match=message):
            F.linear(x, weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot meet a weight of scheme 'w4cs-a8s'"):
        merged.q_proj(x)
    for other in (torch.randn(24, 96), X):
        with pytest.raises(TypeError, match="QuantizedActivations do not support linear"):
            F.linear(x, other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="QuantizedActivations do not support relu"):
        torch.relu(x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Tensor and a QTensor"):
        F.linear(_weight("w8a8"), _weight("w8a8"))  # type: ignore[arg-type]


def test_codes_of_one_weight_are_for_others_of_its_bits_and_activations() -> None:
    """Whatever groups, scales and zeros of weights are."""
    x = qkernels.quantize_activations(X, "w8a8")
    for scheme in ("w8g16-a8s", "w8c-fp32-a8s", "w8ts-a8s"):
        q = _weight(scheme)
        assert torch.equal(F.linear(x, q), F.linear(X, q))  # type: ignore[arg-type]


def test_an_order_of_inputs() -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()
    for scheme in SCHEMES:
        q = dataclasses.replace(_weight(scheme), order=order)
        wanted = F.linear(_seen(q, X), q.dequantize())
        torch.testing.assert_close(QuantLinear(q)(X), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(F.linear(X, q), wanted, atol=1e-4, rtol=1e-4)


# ---- QTensor ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_keeps_its_activations(scheme: str) -> None:
    q, w = _weight(scheme), torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    some = q.rows(torch.tensor([5, 0]))
    assert torch.equal(F.linear(X, some), F.linear(X, q)[..., [5, 0]])
    assert q.to("cpu").activation is q.activation
    moved = q.to("meta")
    assert (moved.activation is None) == (q.activation is None)
    assert moved.activation is None or moved.activation.is_meta
    alone = quantized(w, str(q.scheme.weight_only))
    assert q.error(w) == alone.error(w)
    assert torch.equal(q.dequantize(), alone.dequantize())
    assert q.nbytes == alone.nbytes + (8 if scheme in STATIC else 0) == stored_bytes(scheme, 24, 96)
    assert f"scheme='{scheme}'" in repr(q)
    both = stacked_rows([q, _weight(scheme, 8, seed=1)]) if "t" not in scheme.split("-")[0] else None
    if both is not None:
        assert torch.equal(F.linear(X, both)[..., 24:], F.linear(X, _weight(scheme, 8, seed=1)))
        assert (both.activation is None) == (q.activation is None)


def test_weights_of_different_static_activations_are_not_stacked() -> None:
    q = _weight("w8cs-a8ts")
    other = dataclasses.replace(q, activation=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="static activations of different scales"):
        stacked_rows([q, q, other])
    with pytest.raises(ValueError, match="w8cs-a8s of 96 inputs beside w8cs-a8ts"):
        stacked_rows([q, _weight("w8cs-a8s")])


# ---- siblings ----


class _Parent(nn.Module):
    """Source that proves that its layers read one unchanging input."""

    def __init__(self, layers: dict[str, QuantLinear]) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


def _siblings(scheme: str, bias: bool = True) -> Any:
    weights = {name: _weight(scheme, rows, rows) for name, rows in (("q_proj", 24), ("k_proj", 8), ("v_proj", 16))}
    layers = {n: QuantLinear(q, torch.linspace(-1, 1, q.shape[0]) if bias else None) for n, q in weights.items()}
    return _Parent(layers).eval()


def _merged(scheme: str, bias: bool = True) -> Any:
    model = _siblings(scheme, bias)
    found = qkernels.merge_siblings(model)
    assert found.groups == (("q_proj", "k_proj", "v_proj"),)
    assert found.apart == found.not_proved == ()
    return model


def _all_equal(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.startswith("w8ts")])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_siblings_have_the_bits_of_siblings_apart(
    scheme: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[int] = []
    original = ops.matmul_cpu

    def counted(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        launches.append(packed.shape[0])
        return original(x, packed, *rest)

    apart, merged = _siblings(scheme, bias), _merged(scheme, bias)
    wanted = apart(X)
    monkeypatch.setattr(ops, "matmul_cpu", counted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            launches.clear()
            assert _all_equal(merged(X), wanted)
            assert launches == [48]
    monkeypatch.undo()
    assert _all_equal(merged(X), wanted)  # gradients recorded
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert _all_equal(torch.compile(merged, fullgraph=True, backend=backend)(X), wanted)
        assert sum(torch.ops.qkernels.matmul in (n.target, getattr(n.target, "overloadpacket", None))
                   for n in graphs[0].graph.nodes) == 1  # fmt: skip
        assert _all_equal(torch.compile(merged, fullgraph=True)(X), wanted)
    codes = qkernels.quantize_activations(X, scheme, activation=apart.q_proj.weight_activation)
    assert _all_equal(merged(codes), wanted)
    assert _all_equal([merged.k_proj(X)], wanted[1:2])  # not in a call of the parent
    for name in ("q_proj", "k_proj", "v_proj"):
        one, other = getattr(merged, name).qweight, getattr(apart, name).qweight
        assert _all_equal(one.tensors, other.tensors)
    x = X.clone().requires_grad_()
    y = X.clone().requires_grad_()
    torch.cat(merged(x), -1).square().sum().backward()
    torch.cat(apart(y), -1).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("scheme", STATIC)
def test_siblings_of_different_static_activations_stay_apart(scheme: str) -> None:
    model = _siblings(scheme)
    q = model.v_proj.qweight
    assert q.activation is not None
    other = dataclasses.replace(q, activation=q.activation * torch.tensor([2.0, 1.0]))
    model.v_proj = QuantLinear(other, model.v_proj.bias).eval()
    wanted = model(X)
    found = qkernels.merge_siblings(model)
    assert found.groups == (("q_proj", "k_proj"),)
    assert found.apart == ((("q_proj", "k_proj", "v_proj"), "different static activations"),)
    with torch.no_grad():
        assert _all_equal(model(X), wanted)


def test_siblings_without_values_stay_apart() -> None:
    model = _siblings("w8cs-a8ts").to("meta")
    assert qkernels.merge_siblings(model).apart[0][1] == "static activations without values"
    assert qkernels.merge_siblings(_siblings("w8cs-a8s").to("meta")).groups


@pytest.mark.parametrize("scheme", STATIC)
def test_merged_siblings_in_state_dicts_and_files(scheme: str, tmp_path: pathlib.Path) -> None:
    apart, merged = _siblings(scheme), _merged(scheme)
    stored = merged.state_dict()
    assert list(stored) == list(apart.state_dict())
    assert _all_equal(stored.values(), apart.state_dict().values())
    # each its own: what writes files would take one tensor under several names for tied weights
    assert len({stored[f"{n}_proj.weight_activation"].data_ptr() for n in "qkv"}) == 3
    fresh = _siblings(scheme)
    for parameter in fresh.parameters():
        parameter.data.fill_(1)
    fresh.load_state_dict(stored)
    assert _all_equal(fresh(X), apart(X))
    merged.load_state_dict(apart.state_dict())
    changed = {**stored, "k_proj.weight_activation": stored["k_proj.weight_activation"] * torch.tensor([2.0, 1.0])}
    with pytest.raises(RuntimeError, match=r"k_proj\.weight_activation belongs to 3 merged layers"):
        merged.load_state_dict(changed)
    assert _all_equal(merged(X), apart(X))
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged)), copy.deepcopy(merged).half().float()):
        with torch.no_grad():
            assert copied.q_proj.shared.weight_activation.dtype is torch.float32
            torch.testing.assert_close(copied(X)[0], apart(X)[0], atol=1e-3, rtol=1e-3)
    path = tmp_path / "model.safetensors"
    qkernels.save(merged, path)
    for target in (_siblings(scheme), merged):
        with torch.no_grad():
            again = qkernels.load(path, target)
            assert _all_equal(again(X), apart(X))
    assert isinstance(merged.q_proj, qkernels.MergedLinear)
    k = apart.k_proj.qweight
    assert k.activation is not None
    apart.k_proj = QuantLinear(
        dataclasses.replace(k, activation=k.activation * torch.tensor([2.0, 1.0])), apart.k_proj.bias
    )
    qkernels.save(apart, path)
    with torch.no_grad():
        assert _all_equal(qkernels.load(path, merged)(X), apart(X))  # merged as far as that goes
    assert [type(getattr(merged, f"{n}_proj")) for n in "qkv"] == [
        qkernels.MergedLinear, QuantLinear, qkernels.MergedLinear,
    ]  # fmt: skip


# ---- experts and embeddings ----


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in STATIC])
def test_experts_are_a_loop_over_experts(scheme: str) -> None:
    layer = QuantExperts(_weight(scheme, 5 * 16), 5)
    x, expert = X.reshape(6, 96), torch.tensor([4, 0, 0, 7, 2, 4])  # 1 and 3 have none; 7 is another process's
    y = layer(x, expert)
    for i, e in enumerate(expert.tolist()):
        wanted = F.linear(x[i : i + 1], layer[e])[0] if e < 5 else torch.zeros(16)
        assert torch.equal(y[i], wanted)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, expert), y)
    args = (x, expert, layer.weight, layer.weight_scale, layer.weight_zero, scheme, 96, 5)
    torch.library.opcheck(torch.ops.qkernels.matmul_experts.default, args)
    x = x.clone().requires_grad_()
    dense, out = layer.qweight.dequantize().unflatten(0, (5, 16)), torch.randn(6, 16)
    (grad,) = torch.autograd.grad(layer(x, expert), x, out)
    own = torch.stack([out[i] @ dense[e] if e < 5 else torch.zeros(96) for i, e in enumerate(expert.tolist())])
    torch.testing.assert_close(grad, own)


def test_experts_have_no_static_activations() -> None:
    q = _weight("w8cs-a8ts")
    with pytest.raises(ValueError, match="nor static activations"):
        QuantExperts(q, 2)
    for rows in (2, 0):
        with pytest.raises(ValueError, match="experts cannot have static activations, got scheme 'w8cs-a8ts'"):
            ops_experts.matmul(
                X[0, :rows], torch.zeros(rows, dtype=torch.long), q.packed, q.scale, q.zero, "w8cs-a8ts", 96, 2
            )


def test_embeddings_have_no_activations() -> None:
    for scheme in ("w8cs-a8s", "w8cs-a8ts"):
        with pytest.raises(ValueError, match=f"no activations to quantize, got scheme '{scheme}'"):
            QuantEmbedding(_weight(scheme))
    model = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 3))
    for choices in ({"embeddings": "w8a8"}, {"embeddings": "w8c", "schemes": {"0": "w8a8"}}):
        with pytest.raises(
            ValueError, match="0 is an embedding, which has no inputs to quantize: scheme 'w8cs' is for it"
        ):
            qkernels.quantize_model(model, "w4g32", progress=False, **choices)  # type: ignore[arg-type]
        assert [type(layer) for layer in model] == [nn.Embedding, nn.Linear]


def test_what_codes_say_of_themselves() -> None:
    codes = qkernels.quantize_activations(X, "w8a8")
    assert isinstance(codes, QuantizedActivations)
    assert "'a8s' for 8-bit weights" in repr(codes)
    assert Scheme.parse("w8cs-a8ts").is_static
    assert not any(Scheme.parse(s).is_static for s in ("w8cs", "w8a8", "w4g128-a8"))
