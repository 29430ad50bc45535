"""Layers that quantize their inputs over two processes: rows are exact; columns meet codes of their own part of x."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import qkernels
from qkernels import QTensor, QuantLinear, Scheme
from qkernels import reference_int8 as oracle
from qkernels.nn import QuantModule
from qkernels.parallel import ColwiseParallel, RowwiseParallel, sharded
from qkernels.parallel.shards import joined
from tests import models
from tests.helpers import quantized
from tests.processes import Processes
from tests.test_a8_models import make_static
from tests.test_tensor_parallel import INPUTS, imported, in_a_process, loaded, needs_styles, saved, seen, seen_in_two

SCHEMES = ("w8cs-a8s", "w4g32-a8", "w8ts-a8", "w8cs-a8ts", "w4g32-a8t")
STATIC = ("w8cs-a8ts", "w4g32-a8t")
X = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
X[..., :64] *= 4  # so that halves have ranges of their own


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    found.run(imported)
    yield found
    found.stop()


def weight(scheme: str) -> QTensor:
    return quantized(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), scheme, X)


def fake(x: Tensor, scheme: str, activation: Tensor | None) -> Tensor:
    """x as its codes have it."""
    how = Scheme.parse(scheme).activations
    assert how is not None
    codes = oracle.quantize_activations(x.reshape(-1, x.shape[-1]), how, activation)
    return oracle.dequantize_activations(*codes).reshape(x.shape)


def mesh() -> Any:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


# ---- shards ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_keep_activations(scheme: str) -> None:
    q = weight(scheme)
    for ranks in (1, 2, 4):
        for dim in (0, 1):
            parts = [sharded(q, dim, rank, ranks) for rank in range(ranks)]
            assert torch.equal(torch.cat([part.dequantize() for part in parts], dim=dim), q.dequantize())
            for part in parts:
                assert part.scheme == q.scheme
                assert (part.activation is None) == (q.activation is None)
                if part.activation is not None and q.activation is not None:
                    assert torch.equal(part.activation, q.activation)
                    assert part.activation.data_ptr() != q.activation.data_ptr()
            again = joined(parts, dim)
            assert all(torch.equal(*pair) for pair in zip(again.tensors, q.tensors, strict=True))


# ---- styles ----


def in_two(scheme: str) -> tuple[Any, ...]:
    """(whole, rows apart, rows gathered, columns of a whole x, columns of a part of x), each y and gradient of x."""
    layer = QuantLinear(weight(scheme), torch.linspace(-1, 1, 8))
    rank = mesh().get_local_rank()

    def run(style: Any, x: Tensor) -> tuple[Tensor, ...]:
        own = copy.deepcopy(layer) if style is None else parallelize_module(copy.deepcopy(layer), mesh(), style)
        with torch.inference_mode():
            quiet = own(x).clone()
        x = x.clone().requires_grad_()
        y = own(x)
        y.square().sum().backward()
        assert torch.equal(y.detach(), quiet)
        if style is not None:
            assert own.weight_activation is None or torch.equal(own.weight_activation, layer.weight_activation)
            again = copy.deepcopy(own)
            again.load_state_dict(own.state_dict())
            assert torch.equal(again(x), y)
        return y.detach(), x.grad

    return (
        run(None, X),
        run(ColwiseParallel(), X),
        run(ColwiseParallel(output_layouts=Replicate()), X),
        run(RowwiseParallel(input_layouts=Replicate()), X),
        run(RowwiseParallel(), X[..., 64 * rank : 64 * rank + 64]),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_over_two_processes(scheme: str, processes: Processes) -> None:
    q, answers = weight(scheme), processes.run(in_two, scheme)
    dense, bias = q.dequantize(), torch.linspace(-1, 1, 8)
    halves = [fake(X[..., :64], scheme, q.activation), fake(X[..., 64:], scheme, q.activation)]
    split = F.linear(torch.cat(halves, dim=-1), dense, bias)  # each process quantizes its own part of a token
    together = F.linear(fake(X, scheme, q.activation), dense, bias)
    if scheme in STATIC:
        assert torch.equal(halves[1], fake(X, scheme, q.activation)[..., 64:])
    else:
        assert not torch.allclose(split, together, atol=1e-2)
    for rank, (whole, apart, gathered, rows, part) in enumerate(answers):
        torch.testing.assert_close(whole[0], together, atol=1e-4, rtol=1e-4)
        assert torch.equal(apart[0], whole[0][..., 4 * rank : 4 * rank + 4])
        assert torch.equal(gathered[0], whole[0])
        torch.testing.assert_close(gathered[1], whole[1], atol=1e-3, rtol=1e-4)
        for found in (rows, part):
            torch.testing.assert_close(found[0], split, atol=1e-4, rtol=1e-4)
        assert torch.equal(rows[0], part[0])
        straight = 2 * split @ dense
        torch.testing.assert_close(rows[1], straight, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(part[1], straight[..., 64 * rank : 64 * rank + 64], atol=1e-3, rtol=1e-4)
    assert torch.equal(answers[0][3][0], answers[1][3][0])


def codes_in_two(scheme: str) -> tuple[Tensor, Tensor, str]:
    layer = QuantLinear(weight(scheme), torch.linspace(-1, 1, 8))
    codes = qkernels.quantize_activations(X, scheme, activation=layer.weight_activation)
    wanted = layer(codes)
    rowwise = parallelize_module(copy.deepcopy(layer), mesh(), RowwiseParallel())
    with pytest.raises(TypeError) as caught:
        rowwise(codes)
    together = parallelize_module(layer, mesh(), ColwiseParallel(output_layouts=Replicate()))
    return wanted, together(codes), str(caught.value)


@pytest.mark.parametrize("scheme", ["w4g32-a8", "w8cs-a8ts"])
def test_codes_meet_rows_and_no_columns(scheme: str, processes: Processes) -> None:
    for wanted, found, said in processes.run(codes_in_two, scheme):
        assert torch.equal(found, wanted)
        assert "a row-parallel layer quantizes its part of x itself, got QuantizedActivations" in said


# ---- DTensor ----


def distributed_product(scheme: str, placements: tuple[Any, Any], explicit: bool) -> Any:
    """Product and gradient of the op where tokens, or rows of the weight, are apart.

    explicit: whether `activation` is given where it is None.
    """
    q, b = weight(scheme), torch.linspace(-1, 1, 8)
    more = (q.activation,) if explicit or q.activation is not None else ()
    wanted_x = X.clone().requires_grad_()
    wanted = torch.ops.qkernels.matmul(wanted_x, q.packed, q.scale, q.zero, b, scheme, 128, *more)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), wanted_x)
    where, (of_x, rows) = mesh(), placements
    beside = Shard(1) if rows.is_shard() and q.scale.numel() > 1 else Replicate()
    dx = distribute_tensor(X, where, [of_x]).requires_grad_()
    parts = [
        None if t is None else distribute_tensor(t, where, [p])
        for t, p in ((q.packed, rows), (q.scale, beside), (q.zero, beside), (b, rows))
    ]
    static = [None if t is None else distribute_tensor(t, where, [Replicate()]) for t in more]
    with CommDebugMode() as collectives:
        y = torch.ops.qkernels.matmul(dx, *parts, scheme, 128, *static)
    (grad,) = torch.autograd.grad(y.square().sum(), dx)
    with torch.no_grad():
        quiet = torch.ops.qkernels.matmul(dx, *parts, scheme, 128, *static)
    assert torch.equal(quiet.to_local(), y.to_local())
    counts = dict(collectives.get_comm_counts())
    return wanted.detach(), y.full_tensor().detach(), str(y.placements), wanted_grad, grad.full_tensor(), counts


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g32-a8", "w8ts-a8", "w8cs-a8ts", "w4g32-a8t"])
@pytest.mark.parametrize(
    ("placements", "result"),
    [
        ((Shard(0), Replicate()), Shard(0)),
        ((Shard(1), Replicate()), Shard(1)),
        ((Replicate(), Shard(0)), Shard(2)),
        ((Replicate(), Replicate()), Replicate()),
    ],
)
def test_distributed_tensors(scheme: str, placements: tuple[Any, Any], result: Any, processes: Processes) -> None:
    answers = [
        a for explicit in (False, True) for a in processes.run(distributed_product, scheme, placements, explicit)
    ]
    for wanted, y, placed, wanted_grad, grad, collectives in answers:
        assert torch.equal(y, wanted)
        torch.testing.assert_close(grad, wanted_grad, atol=1e-3, rtol=1e-4)
        assert placed == str((result,))
        assert not collectives


def columns_apart(scheme: str) -> tuple[Tensor, Tensor]:
    """Where the columns of x are apart DTensor must gather them: a token has one scale."""
    q, where = weight(scheme), mesh()
    parts = [
        None if t is None else distribute_tensor(t, where, [Replicate()])
        for t in (q.packed, q.scale, q.zero, torch.linspace(-1, 1, 8))
    ]
    static = [] if q.activation is None else [distribute_tensor(q.activation, where, [Replicate()])]
    y = torch.ops.qkernels.matmul(distribute_tensor(X, where, [Shard(2)]), *parts, scheme, 128, *static)
    return y.full_tensor(), F.linear(X, q, torch.linspace(-1, 1, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w4g32-a8", "w8cs-a8ts"])
def test_columns_that_are_apart_are_gathered(scheme: str, processes: Processes) -> None:
    for found, wanted in processes.run(columns_apart, scheme):
        assert torch.equal(found, wanted)


# ---- FSDP ----


def fully_sharded(scheme: str) -> Any:
    """Output over two processes by FSDP2, its state_dict, and what a policy says that rounds parameters."""
    torch.manual_seed(3)
    layers = [QuantLinear(weight(scheme), torch.ones(8)), torch.nn.Linear(8, 4)]
    whole = torch.nn.Sequential(*layers)
    model, low = copy.deepcopy(whole), copy.deepcopy(whole)
    where = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=where)
    found = model(X)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    fully_shard(low, mesh=where, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    said = ""
    try:
        low(X)
    except ValueError as error:
        said = str(error)
    return found.detach(), whole(X).detach(), full, whole.state_dict(), said


@pytest.mark.parametrize("scheme", ["w4g32-a8", "w8cs-a8ts"])
def test_fully_sharded(scheme: str, processes: Processes) -> None:
    for found, wanted, full, stored, said in processes.run(fully_sharded, scheme):
        assert torch.equal(found, wanted)
        assert full.keys() == stored.keys()
        assert all(torch.equal(full[n], t) and full[n].dtype is t.dtype for n, t in stored.items())
        if scheme in STATIC:  # a range is not rounded without a word
            assert "activation must be (2,) float32, got (2,) torch.bfloat16" in said


# ---- transformers ----


@needs_styles
def test_dynamic_activations_where_no_columns_are_cut(tmp_path: pathlib.Path, processes: Processes) -> None:
    """Every layer that is cut by rows has the bits of the whole."""
    folder = saved("llama", tmp_path / "float")
    plan = {f"model.layers.*.self_attn.{p}_proj": "colwise_gather_output" for p in "qkv"}
    plan |= {f"model.layers.*.mlp.{p}_proj": "colwise_gather_output" for p in ("gate", "up")}
    plan |= {"model.layers.*.self_attn.o_proj": "replicate", "model.layers.*.mlp.down_proj": "replicate"}
    for scheme in ("w8a8", "w4g32-a8"):
        wanted = seen(loaded(folder, {"scheme": scheme}, None))
        for answer in processes.run(seen_in_two, folder, {"scheme": scheme}, {"tp_size": 2, "tp_plan": plan}):
            assert torch.equal(answer["logits"], wanted["logits"])
            assert torch.equal(answer["tokens"], wanted["tokens"])
            kinds = {n: kind.__name__ for n, (kind, _) in answer["layers"].items()}
            assert kinds["model.layers.0.mlp.up_proj"] == "ColwiseLinear"


def layers_in_two(folder: pathlib.Path, target: pathlib.Path | None) -> dict[str, Any]:
    """What each quantized layer of a model reads and gives, and its static range."""
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        in_a_process(monkeypatch)
        model = loaded(folder, None, {"tp_plan": "auto"})
        found: dict[str, Any] = {}
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantModule)}
        handles = [
            layer.register_forward_hook(lambda m, args, y, n=n: found.update({n: (type(m).__name__, args[0], y)}))
            for n, layer in layers.items()
        ]
        logits = model(**INPUTS).logits
        for handle in handles:
            handle.remove()
        tokens = model.generate(**INPUTS, max_new_tokens=4, do_sample=False, pad_token_id=0, disable_compile=True)
        if target is not None:
            model.save_pretrained(target)
        ranges = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_activation")}
        return {"layers": found, "logits": logits, "tokens": tokens, "ranges": ranges}


@needs_styles
@pytest.mark.parametrize("scheme", ["w8cs-a8ts", "w4g16-a8t", "w8cs-a8s"])
def test_a_plan_cuts_layers_and_keeps_their_ranges(scheme: str, tmp_path: pathlib.Path, processes: Processes) -> None:
    static = Scheme.parse(scheme).is_static
    model = make_static("llama", scheme) if static else models.make("llama")
    if not static:
        qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    model.save_pretrained(tmp_path / "one")
    answers = processes.run(layers_in_two, tmp_path / "one", tmp_path / "two")
    weights = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    with torch.no_grad():
        wanted = model(**INPUTS).logits
    for rank, answer in enumerate(answers):
        assert torch.equal(answer["logits"], answers[0]["logits"])
        assert torch.equal(answer["tokens"], answers[0]["tokens"])
        noise = float((answer["logits"] - wanted).norm() / wanted.norm())
        assert noise < (1e-2 if static else 0.1)
        assert answer["ranges"].keys() == {f"{n}.weight_activation" for n in (weights if static else ())}
        for n, own in answer["ranges"].items():
            assert torch.equal(own, model.get_parameter(n))
            assert own.dtype is torch.float32
        for n, (kind, x, y) in answer["layers"].items():
            layer = weights[n]
            dense, activation = layer.qweight.dequantize(), layer.weight_activation
            assert kind == ("RowwiseLinear" if n.endswith(("o_proj", "down_proj")) else "ColwiseLinear")
            if kind == "ColwiseLinear":
                rows = slice(rank * len(dense) // 2, (rank + 1) * len(dense) // 2)
                assert torch.equal(y, layer(x)[..., rows])
            else:
                halves = [fake(a["layers"][n][1], scheme, activation) for a in answers]
                torch.testing.assert_close(y, F.linear(torch.cat(halves, -1), dense), atol=1e-4, rtol=1e-4)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[n], t) and two[n].dtype is t.dtype for n, t in one.items())
    configs = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("one", "two")]
    assert configs[0] == configs[1]
