"""Embeddings and experts on packed codes, and what every quantized layer keeps: bits, dtypes, names."""

from __future__ import annotations

import copy
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels
from qkernels import QuantEmbedding, QuantExperts, QuantLinear, ops_experts
from qkernels.nn import QuantModule

SCHEMES = ("w4g32", "w3cs", "w2g16f-bf16", "w8t")


def _weight(rows: int, columns: int = 80, scheme: str = "w4g32", seed: int = 0) -> qkernels.QTensor:
    return qkernels.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_embedding_gives_the_rows_of_its_weight(scheme: str) -> None:
    q = _weight(30, scheme=scheme)
    layer = QuantEmbedding(q)
    ids = torch.tensor([[3, 29, 3], [0, 7, 11]])
    assert torch.equal(layer(ids), q.dequantize()[ids])
    assert torch.equal(layer(ids.int()), q.dequantize()[ids])
    assert layer(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 80)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(copy.deepcopy(layer).to(dtype)(ids), q.dequantize(dtype)[ids])
    assert torch.equal(torch.compile(layer, fullgraph=True)(ids), layer(ids))
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.tensor([30]))


def test_an_embedding_cannot_be_everything() -> None:
    order = torch.randperm(80).to(torch.int32)
    q = _weight(4)
    ordered = qkernels.QTensor(q.packed, q.scale, q.zero, q.scheme, 80, order)
    with pytest.raises(ValueError, match="cannot have an order"):
        QuantEmbedding(ordered)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch\.int32"):
        QuantEmbedding(q, torch.int32)
    model = nn.Sequential(nn.Embedding(5, 64, max_norm=1.0), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="0 has a max_norm"):
        qkernels.quantize_model(model, "w4g32", embeddings="w8c", progress=False)
    assert type(model[1]) is nn.Linear
    model = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 64), nn.Linear(64, 5, bias=False))
    model[2].weight = model[0].weight
    for hooked, name in ((0, "0"), (2, "an output layer tied to 0")):
        handle = model[hooked].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=f"^{name} has hooks"):
            qkernels.quantize_model(model, "w4g32", embeddings="w8c", skip=["2"], progress=False)
        assert [type(layer) for layer in model] == [nn.Embedding, nn.Linear, nn.Linear]
        handle.remove()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_multiply_rows_by_their_own_weights(scheme: str) -> None:
    q = _weight(5 * 24, scheme=scheme)
    layer, dense = QuantExperts(q, 5), q.dequantize().unflatten(0, (5, 24))
    expert = torch.tensor([4, 0, 0, 7, 2, 4, 5])  # 3 has none; 5 and 7 are another process's
    x = torch.randn(7, 80)
    y = layer(x, expert)
    for i, e in enumerate(expert.tolist()):
        wanted = F.linear(x[i], dense[e]) if e < 5 else torch.zeros(24)
        torch.testing.assert_close(y[i], wanted)
    for e in range(5):
        assert torch.equal(layer[e].dequantize(), dense[e])
        assert torch.equal(F.linear(x, layer[torch.tensor(e)]), F.linear(x, layer[e]))
    assert layer(x[:0], expert[:0]).shape == (0, 24)
    with pytest.raises(IndexError, match="expert must be from 0 to 4, got 5"):
        layer[5]


def test_experts_have_gradients_for_x() -> None:
    q = _weight(3 * 16, 64)
    layer, dense = QuantExperts(q, 3), q.dequantize().unflatten(0, (3, 16))
    expert = torch.tensor([2, 0, 2, 9])
    x = torch.randn(4, 64, requires_grad=True)
    out = torch.randn(4, 16)
    for run in (layer, torch.compile(layer, fullgraph=True)):
        (grad,) = torch.autograd.grad(run(x, expert), x, out)
        own = torch.stack([out[0] @ dense[2], out[1] @ dense[0], out[2] @ dense[2], torch.zeros(64)])
        torch.testing.assert_close(grad, own)


def test_the_op_of_experts_is_a_good_citizen() -> None:
    q = _weight(3 * 16, 64, "w3g32")
    args = (torch.randn(6, 64), torch.tensor([0, 2, 2, 1, 5, 0]), *q.tensors, "w3g32", 64, 3)
    torch.library.opcheck(torch.ops.qkernels.matmul_experts.default, args)
    torch.library.opcheck(torch.ops.qkernels.matmul_experts_backward.default, (torch.randn(6, 16), *args[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        assert QuantExperts(q, 3)(args[0], args[1]).dtype is torch.bfloat16


def test_what_experts_cannot_take_is_named() -> None:
    q = _weight(6 * 8)
    rest = (*q.tensors, "w4g32", 80)
    x, expert = torch.randn(4, 80), torch.zeros(4, dtype=torch.long)
    for given, message in (
        ((x[:, :79], expert, *rest, 6), r"x must be \(S, 80\), got \(4, 79\)"),
        ((x.int(), expert, *rest, 6), r"x must be float16.* got torch\.int32"),
        ((x, expert[:3], *rest, 6), r"expert must be \(4,\) integer, got \(3,\)"),
        ((x, expert.float(), *rest, 6), r"expert must be \(4,\) integer, got \(4,\) torch\.float32"),
        ((x, expert, *rest, 5), "packed must hold the rows of 5 experts, got 48"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops_experts.matmul(*given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="48 rows are not those of 7 experts"):
        QuantExperts(q, 7)


def _layers() -> list[tuple[QuantModule, tuple[Tensor, ...]]]:
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    q = _weight(16)
    ordered = qkernels.QTensor(q.packed, q.scale, q.zero, q.scheme, 80, order)
    x = torch.randn(3, 80)
    return [
        (QuantLinear(q, torch.randn(16)), (x,)),
        (QuantLinear(ordered), (x,)),
        (QuantEmbedding(q), (torch.tensor([1, 15, 0]),)),
        (QuantExperts(q, 2), (x, torch.tensor([0, 1, 1]))),
    ]


@pytest.mark.parametrize("index", range(4))
def test_copies_pickles_and_state_dicts(index: int) -> None:
    layer, arguments = _layers()[index]
    fresh = copy.deepcopy(layer)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, layer.to("cpu")):
        assert torch.equal(twin(*arguments), layer(*arguments))
        assert repr(twin) == repr(layer)
    stored = {name: t.dtype for name, t in layer.state_dict().items() if name != "bias"}
    assert {name: t.dtype for name, t in layer.half().state_dict().items() if name != "bias"} == stored
    wrong = {name: t.float() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight of a w4g32 layer must be torch\.int32, got torch\.float32"):
        layer.load_state_dict(wrong)


def test_a_layer_with_an_order_of_inputs() -> None:
    layer, (x,) = _layers()[1]
    torch.testing.assert_close(layer(x), F.linear(x, layer.qweight.dequantize()))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.qweight.dequantize().sum(0).expand(3, -1))
    model = nn.ModuleDict({"q_proj": layer, "k_proj": copy.deepcopy(layer), "v_proj": copy.deepcopy(layer)})
    merged = qkernels.merge_siblings(nn.Sequential(model))
    assert merged.apart == ((("0.q_proj", "0.k_proj", "0.v_proj"), "an order of inputs of its own"),)


def test_loading_into_quantized_layers_keeps_dtype_and_mode(tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 32)).to(torch.bfloat16).train()
    model[1].eval()
    qkernels.quantize_model(model, "w4g32", embeddings="w8g32", progress=False)
    qkernels.save(model, tmp_path / "model.safetensors")
    for _ in range(2):
        assert model[0](torch.tensor([3])).dtype is torch.bfloat16
        assert (model[0].training, model[1].training) == (True, False)
        qkernels.load(tmp_path / "model.safetensors", model)
