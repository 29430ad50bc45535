"""Quantized layers over two processes give what one gives; shards of a weight are its very values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, parallel
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import qkernels
from qkernels import QTensor, QuantLinear
from qkernels.nn import QuantModule
from qkernels.parallel import ColwiseParallel, RowwiseParallel, sharded
from qkernels.parallel.shards import joined
from tests.processes import Processes
from tests.tiny_model import TOKENS, TinyModel

SCHEMES = [
    f"w{bits}{group}{value_map}"
    for bits in range(1, 9)
    for group in ("g16", "g48", "c", "t")
    for value_map in ("", "s", "f")
    if (bits, value_map) != (1, "s")
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.stop()


# ---- shards ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_are_the_very_values_of_the_whole(scheme: str) -> None:
    q = qkernels.quantize(torch.randn(6, 288), scheme)
    whole = q.dequantize()
    for ranks in (1, 2, 3, 6):
        rows = [sharded(q, 0, rank, ranks) for rank in range(ranks)]
        columns = [sharded(q, 1, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.dequantize() for part in rows]), whole)
        assert torch.equal(torch.cat([part.dequantize() for part in columns], dim=1), whole)
        assert {part.shape for part in rows} == {(6 // ranks, 288)}
        assert {part.shape for part in columns} == {(6, 288 // ranks)}
        assert all(part.scheme == q.scheme for part in rows + columns)
        assert all(t.is_contiguous() for part in rows + columns for t in part.tensors)
        for again in (joined(rows, 0), joined(columns, 1)):
            assert again.shape == q.shape
            assert all(torch.equal(*pair) for pair in zip(again.tensors, q.tensors, strict=True))
        if ranks > 1:
            assert all(part.packed.untyped_storage().nbytes() < q.packed.nbytes for part in rows + columns)


def test_shards_of_empty_and_odd_weights() -> None:
    for shape, dim, ranks in (((0, 32), 0, 2), ((4, 0), 1, 2), ((4, 0), 0, 2), ((0, 32), 1, 2)):
        for scheme in ("w3g16", "w4c", "w4ts"):
            parts = [sharded(qkernels.quantize(torch.randn(shape), scheme), dim, r, ranks) for r in range(ranks)]
            wanted = (shape[0] // 2, shape[1]) if dim == 0 else (shape[0], shape[1] // 2)
            assert all(part.shape == wanted for part in parts)
    # a row that has one group alone may be cut anywhere; a short last group is one of a row's last part
    short = qkernels.quantize(torch.randn(4, 50), "w3g64f")
    again = joined([sharded(short, 1, r, 2) for r in (0, 1)], 1)
    assert all(torch.equal(*pair) for pair in zip(again.tensors, short.tensors, strict=True))
    assert torch.equal(torch.cat([sharded(short, 1, r, 2).dequantize() for r in (0, 1)], dim=1), short.dequantize())
    odd = qkernels.quantize(torch.randn(4, 42), "w5c")
    assert torch.equal(torch.cat([sharded(odd, 1, r, 2).dequantize() for r in (0, 1)], dim=1), odd.dequantize())


def test_scales_of_other_dtypes_and_orders_of_inputs() -> None:
    for scheme in ("w4g32-bf16", "w4g32f-fp32"):
        q = qkernels.quantize(torch.randn(4, 64), scheme)
        for dim in (0, 1):
            part = sharded(q, dim, 1, 2)
            assert [t.dtype for t in part.tensors] == [t.dtype for t in q.tensors]
    q = qkernels.quantize(torch.randn(4, 64), "w4g32")
    ordered = QTensor(q.packed, q.scale, q.zero, q.scheme, 64, torch.randperm(64).int())
    rows = torch.cat([sharded(ordered, 0, rank, 2).dequantize() for rank in (0, 1)])
    assert torch.equal(rows, ordered.dequantize())


@pytest.mark.parametrize(
    ("scheme", "shape", "dim", "rank", "ranks", "message"),
    [
        ("w4g32", (6, 64), 0, 0, 4, "out_features = 6 cannot be cut into 4 equal parts"),
        ("w4c", (6, 50), 1, 0, 4, "in_features = 50 cannot be cut into 4 equal parts"),
        ("w4g32", (4, 96), 1, 0, 2, r"in_features = 96 over 2 processes is 48 each, not whole groups of 32 \(w4g32\)"),
        ("w4g32", (4, 80), 1, 0, 2, "is 40 each, not whole groups of 32"),
        ("w4g32", (4, 64), 2, 0, 2, "dim must be 0 .* or 1 .*, got 2"),
        ("w4g32", (4, 64), 0, 2, 2, "rank must be from 0 to 1, got 2"),
        ("w4g32", (4, 64), 0, -1, 2, "rank must be from 0 to 1, got -1"),
        ("w4g32", (4, 64), 0, 0, 0, "ranks must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_cut_is_said(
    scheme: str, shape: tuple[int, int], dim: int, rank: int, ranks: int, message: str
) -> None:
    q = qkernels.quantize(torch.randn(shape), scheme)
    with pytest.raises(ValueError, match=message):
        sharded(q, dim, rank, ranks)


def test_orders_and_weights_without_values_are_refused() -> None:
    q = qkernels.quantize(torch.randn(4, 64), "w4g32")
    ordered = QTensor(q.packed, q.scale, q.zero, q.scheme, 64, torch.arange(64).int())
    with pytest.raises(ValueError, match="order of inputs"):
        sharded(ordered, 1, 0, 2)
    for dim in (0, 1):
        with pytest.raises(ValueError, match="meta device"):
            sharded(q.to("meta"), dim, 0, 2)


# ---- styles ----


class Block(nn.Module):
    """What a transformer's block does, with a float layer among quantized ones."""

    def __init__(self, scheme: str, ordered: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64), nn.Linear(64, 10)]
        self.gate, self.up, self.down, self.head = (QuantLinear.from_linear(layer, scheme) for layer in layers)
        self.float_up, self.float_down = nn.Linear(64, 32), nn.Linear(32, 64)
        if ordered:
            q = self.up.qweight
            self.up = QuantLinear(QTensor(q.packed, q.scale, q.zero, q.scheme, 64, torch.randperm(64).int()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.gate(x)) * self.up(x)) + x
        return self.head(x + self.float_down(torch.tanh(self.float_up(x))))


def mesh() -> Any:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


PLAN: dict[str, Any] = {
    "gate": ColwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
    "float_up": ColwiseParallel(),
    "float_down": parallel.RowwiseParallel(),
}


def block_in_two(scheme: str, shape: tuple[int, ...], ordered: bool, plan: dict[str, Any]) -> tuple[Any, ...]:
    """Output and gradients over two processes, and what every process finds alone."""
    whole = Block(scheme, ordered)
    part = parallelize_module(copy.deepcopy(whole), mesh(), plan)
    found = []
    for model in (whole, part):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        (y * torch.linspace(-1, 1, 10)).sum().backward()
        grads = [p.grad for p in (model.gate.bias, model.down.bias, model.head.bias)]
        with torch.inference_mode():
            again = model(x)
        found.append((y.detach(), again.clone(), x.grad, *grads))
    shapes = {n: (tuple(m.weight.shape), m.out_features, m.in_features) for n, m in part.named_children()}
    return *found, shapes, repr(part.down)


@pytest.mark.parametrize("scheme", ["w4g16", "w3g48f", "w8cs", "w5ts", "w2t"])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_block_over_two_processes(scheme: str, ordered: bool, processes: Processes) -> None:
    answers = processes.run(block_in_two, scheme, (2, 3, 64), ordered, PLAN)
    for rank, (whole, part, shapes, text) in enumerate(answers):
        own = slice(rank * 48, (rank + 1) * 48)
        wanted = [*whole[:3], whole[3][own], whole[4], whole[5][rank * 5 : rank * 5 + 5]]
        for got, expected in zip(part, wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert shapes["gate"][1:] == (48, 64)
        assert shapes["down"][1:] == (64, 48)
        assert f"columns of process {rank} of 2" in text
    for got, expected in zip(answers[0][1][:3], answers[1][1][:3], strict=True):
        assert torch.equal(got, expected)


def whole_inputs_to_rowwise(bias_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    layer = QuantLinear(qkernels.quantize(torch.randn(8, 64), "w4g16"), torch.randn(8).to(bias_dtype))
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    wanted = layer(x)
    (wanted_grad,) = torch.autograd.grad(wanted.float().square().sum(), x)
    part = parallelize_module(layer, mesh(), RowwiseParallel(input_layouts=Replicate()))
    y = part(x)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., K\) with K = 64, got \(3, 32\)"):
        part(x[:, :32])
    return y.detach(), wanted.detach(), grad, wanted_grad


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rowwise_layer_that_takes_its_part(bias_dtype: torch.dtype, dtype: torch.dtype, processes: Processes) -> None:
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.3, "rtol": 0.05}
    for y, wanted, grad, wanted_grad in processes.run(whole_inputs_to_rowwise, bias_dtype, dtype):
        assert y.dtype is grad.dtype is dtype
        torch.testing.assert_close(y, wanted, **close)
        torch.testing.assert_close(grad, wanted_grad, **close)


def colwise_bits(shape: tuple[int, ...]) -> Any:
    layer = QuantLinear(qkernels.quantize(torch.randn(8, 64), "w4g16"), torch.randn(8))
    x = torch.randn(shape)
    wanted = layer(x)
    apart = parallelize_module(copy.deepcopy(layer), mesh(), ColwiseParallel())
    together = parallelize_module(layer, mesh(), ColwiseParallel(output_layouts=Replicate()))
    again = copy.deepcopy(apart)
    again.load_state_dict(apart.state_dict())
    return wanted, apart(x), together(x), again(x)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64)])
def test_colwise_parts_are_the_bits_of_the_whole(shape: tuple[int, ...], processes: Processes) -> None:
    answers = processes.run(colwise_bits, shape)
    for rank, (wanted, apart, together, again) in enumerate(answers):
        torch.testing.assert_close(apart, wanted[..., 4 * rank : 4 * rank + 4], atol=1e-5, rtol=1e-5)
        assert torch.equal(again, apart)
        assert torch.equal(together, torch.cat([answer[1] for answer in answers], dim=-1))


def compiled_block() -> Any:
    part = parallelize_module(Block("w4g16"), mesh(), {n: s for n, s in PLAN.items() if not n.startswith("float")})
    found = []
    for model in (part, torch.compile(part, fullgraph=True, backend="aot_eager")):
        x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            low = model(x)
        found.append((y.detach(), x.grad, low))
    return found


def test_compiled_whole_and_under_autocast(processes: Processes) -> None:
    for eager, compiled in processes.run(compiled_block):
        assert eager[2].dtype is torch.bfloat16
        for got, wanted in zip(compiled, eager, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4 if got.dtype is torch.float32 else 0.1, rtol=1e-2)


def refusals() -> list[str]:
    q = qkernels.quantize(torch.randn(8, 96), "w4g32")
    merged = nn.Module()
    merged.gate_proj, merged.up_proj = QuantLinear(q), QuantLinear(q)
    qkernels.merge_siblings(merged)
    cut = parallelize_module(QuantLinear(q), mesh(), ColwiseParallel())
    found = []
    for layer, style in (
        (QuantLinear(q), RowwiseParallel()),
        (merged.gate_proj, ColwiseParallel()),
        (cut, ColwiseParallel()),
        (QuantLinear(q.to("meta")), ColwiseParallel()),
        (QuantLinear(q), ColwiseParallel(output_layouts=Shard(0))),
        (QuantLinear(q), ColwiseParallel(input_layouts=Shard(0))),
        (QuantLinear(q), ColwiseParallel(use_local_output=False)),
        (QuantLinear(q), RowwiseParallel(output_layouts=Shard(1))),
        (QuantLinear(q), RowwiseParallel(input_layouts=Shard(0))),
    ):
        before = {n: p.clone() for n, p in layer.state_dict().items() if not p.is_meta}
        with pytest.raises(ValueError, match=r"a|c") as caught:
            parallelize_module(layer, mesh(), style)
        found.append(str(caught.value))
        assert all(torch.equal(layer.state_dict()[n], p) for n, p in before.items())
    with pytest.raises(ValueError, match="a mesh of one dimension is needed, got 2"):
        parallelize_module(
            QuantLinear(q), init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")), ColwiseParallel()
        )
    return found


def test_what_styles_refuse(processes: Processes) -> None:
    for said in processes.run(refusals):
        for message, expected in zip(
            said,
            (
                "in_features = 96 over 2 processes is 48 each, not whole groups of 32",
                "gate_proj, up_proj are merged into one weight",
                "rows of process",
                "meta device",
                "cannot be cut as ColwiseParallel",
                "cannot be cut as ColwiseParallel",
                "cannot be cut as ColwiseParallel",
                "cannot be cut as RowwiseParallel",
                "cannot be cut as RowwiseParallel",
            ),
            strict=True,
        ):
            assert expected in message


# ---- DTensor ----


def distributed_product(scheme: str, bias: bool, placements: tuple[Any, Any]) -> Any:
    """Product and gradient of qkernels::matmul where rows of x, or of the weight, are apart."""
    q = qkernels.quantize(torch.randn(8, 64), scheme)
    x, b = torch.randn(2, 4, 64), torch.randn(8) if bias else None
    wanted_x = x.clone().requires_grad_()
    wanted = torch.ops.qkernels.matmul(wanted_x, q.packed, q.scale, q.zero, b, scheme, 64)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), wanted_x)
    where, of_x = mesh(), placements[0]
    rows = placements[1]
    beside = Shard(1) if rows.is_shard() and q.scale.numel() > 1 else Replicate()
    dx = distribute_tensor(x, where, [of_x]).requires_grad_()
    parts = [
        None if t is None else distribute_tensor(t, where, [p])
        for t, p in ((q.packed, rows), (q.scale, beside), (q.zero, beside), (b, rows))
    ]
    with CommDebugMode() as collectives:
        y = torch.ops.qkernels.matmul(dx, *parts, scheme, 64)
    (grad,) = torch.autograd.grad(y.square().sum(), dx)
    return (
        wanted.detach(),
        y.full_tensor().detach(),
        str(y.placements),
        wanted_grad,
        grad.full_tensor(),
        dict(collectives.get_comm_counts()),
    )


@pytest.mark.parametrize("scheme", ["w4g16", "w8cs", "w3t", "w2ts"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("placements", "result"),
    [
        ((Shard(0), Replicate()), Shard(0)),
        ((Shard(1), Replicate()), Shard(1)),
        ((Replicate(), Shard(0)), Shard(2)),
        ((Replicate(), Replicate()), Replicate()),
    ],
)
def test_distributed_tensors(
    scheme: str, bias: bool, placements: tuple[Any, Any], result: Any, processes: Processes
) -> None:
    for wanted, y, placed, wanted_grad, grad, collectives in processes.run(
        distributed_product, scheme, bias, placements
    ):
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad, wanted_grad, atol=1e-4, rtol=1e-4)
        assert placed == str((result,))
        assert not collectives


# ---- FSDP ----


def fully_sharded(scheme: str, dtype: torch.dtype, low: bool) -> Any:
    """A small model over two processes by FSDP2: outputs, gradients, and its state_dict, before and after a round trip.

    low: whether with a policy of mixed precision; then quantized layers have a group of their own, without it.
    """
    whole = TinyModel()
    qkernels.quantize_model(whole, scheme, method="rtn", embeddings=scheme, progress=False)
    whole = whole.to(dtype)
    model, where = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
    if low:
        whole.norm.to(torch.bfloat16), whole.embed.to(torch.bfloat16)
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if low else {}
    if low:
        for block in model.blocks:
            fully_shard([m for m in block.modules() if isinstance(m, QuantModule)], mesh=where)
        fully_shard([model.embed, model.lm_head], mesh=where)
    for block in model.blocks:
        fully_shard(block, mesh=where, **policy)
    fully_shard(model, mesh=where, reshard_after_forward=True, **policy)
    found = []
    for one in (whole, model):
        y = one(TOKENS)
        y.float().square().sum().backward()
        found.append((y.detach(), one.norm.weight.grad))
    gradient = found[1][1].full_tensor()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    parts = {n: t.clone() for n, t in model.state_dict().items()}
    for p in model.parameters():
        p.data.to_local().zero_()
    model.load_state_dict(parts)
    with torch.no_grad():
        again = model(TOKENS)
    sizes = {n: p.to_local().nbytes for n, p in model.named_parameters() if n.endswith("up.weight")}
    return found[0], (found[1][0], gradient), again, full, whole.state_dict(), sizes, y.dtype


@pytest.mark.parametrize("scheme", ["w4g16", "w8ts", "w3cf", "w5g48f-bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_sharded(scheme: str, dtype: torch.dtype, processes: Processes) -> None:
    answers = processes.run(fully_sharded, scheme, dtype, False)
    for whole, part, again, full, stored, sizes, _ in answers:
        assert torch.equal(part[0], whole[0])
        assert torch.equal(again, whole[0])
        # each process has the gradient of the same batch; FSDP gives their mean
        torch.testing.assert_close(part[1], whole[1], atol=1e-4, rtol=1e-2)
        assert full.keys() == stored.keys()
        assert all(torch.equal(full[n], t) and full[n].dtype is t.dtype for n, t in stored.items())
        assert sizes == {n: stored[n].nbytes // 2 for n in sizes}


def test_fully_sharded_in_mixed_precision_with_groups_of_quantized_layers(processes: Processes) -> None:
    for whole, part, again, *_, dtype in processes.run(fully_sharded, "w4g16", torch.float32, True):
        assert dtype is torch.bfloat16
        assert torch.equal(part[0], whole[0])  # with scales as they are; biases are in the groups, too
        assert torch.equal(again, part[0])
