"""Layers of which each process has a part, and what the processes tell each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qkernels import ops
from qkernels.activations import QuantizedActivations
from qkernels.nn import PARTS, QuantLinear
from qkernels.parallel.shards import joined, sharded
from qkernels.siblings import MergedLinear
from qkernels.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes that share a layer.

    Attributes:
        name: of the process group, which collectives take.
        rank: of this process in it.
        ranks: how many there are.
    """

    name: str
    rank: int
    ranks: int

    @staticmethod
    def of(mesh: DeviceMesh) -> Group:
        """Of a mesh of one dimension."""
        if mesh.ndim != 1:
            raise ValueError(f"a mesh of one dimension is needed, got {mesh.ndim}: take one by name, as in mesh['tp']")
        return Group(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor that each process has, without gradient."""
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.name))

    def gather(self, x: Tensor) -> list[Tensor]:
        """What each process has, without gradient."""
        functional = torch.ops._c10d_functional
        found = functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), self.ranks, self.name))
        return list(found.view(self.ranks, *x.shape).unbind(0))

    def own(self, x: Tensor) -> Tensor:
        """This process's part of the last dimension: a view."""
        size = x.shape[-1] // self.ranks
        return x.narrow(-1, self.rank * size, size)


class _Replicated(torch.autograd.Function):
    """x, which all processes have; each knows a part of its gradient, and the sum is all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.group.sum(grads[0]), None


class _Summed(torch.autograd.Function):
    """The sum of x over processes; all of them have the gradient of the sum, which is that of each x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Gathered(torch.autograd.Function):
    """x of all processes side by side; all of them have the gradient of that, and each takes its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.cat(group.gather(x), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.group.own(grads[0]), None


class ColwiseLinear(QuantLinear):
    """A process's rows of a QuantLinear: x, the same in all processes, -> the outputs of these rows, or of all.

    in_features and out_features are those of the part; so is a state_dict.
    """

    is_part = True
    group: Group
    gather: bool  # whether outputs of all rows are wanted

    def forward(self, x: Tensor | QuantizedActivations) -> Tensor:
        """x (..., K) -> (..., N / ranks), or (..., N) of all."""
        y = super().forward(_Replicated.apply(x, self.group) if isinstance(x, Tensor) and x.requires_grad else x)
        return _Gathered.apply(y, self.group) if self.gather else y

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return f"{super().extra_repr()}, rows of process {self.group.rank} of {self.group.ranks}"


class RowwiseLinear(QuantLinear):
    """A process's columns of a QuantLinear: its part of x, or x, -> the whole output, the same in all processes.

    in_features is that of the part; so is a state_dict, but for the bias, which is whole and added once.
    """

    is_part = True
    group: Group
    split: bool  # whether x comes whole

    def forward(self, x: Tensor | QuantizedActivations) -> Tensor:
        """x (..., K / ranks), or (..., K) if it comes whole -> (..., N)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"a row-parallel layer quantizes its part of x itself, got {type(x).__name__}")
        if self.split:
            whole = self.in_features * self.group.ranks
            if not x.ndim or x.shape[-1] != whole:
                raise ValueError(f"x must be (..., K) with K = {whole}, got {tuple(x.shape)}")
            x = self.group.own(_Replicated.apply(x, self.group) if x.requires_grad else x)
        own = self._parameters
        y = ops.matmul(
            x,
            own["weight"],  # type: ignore[arg-type]
            own["weight_scale"],  # type: ignore[arg-type]
            own["weight_zero"],
            None,
            self._scheme,
            self.in_features,
            own["weight_activation"],
        )
        y = _Summed.apply(y, self.group)
        bias = own["bias"]
        return y if bias is None else (y + bias).to(y.dtype)

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return f"{super().extra_repr()}, columns of process {self.group.rank} of {self.group.ranks}"


def cut_colwise(layer: QuantLinear, group: Group, gather: bool = False) -> ColwiseLinear:
    """Keep a process's rows of a layer, in place."""
    _keep(layer, 0, group)
    layer.__class__ = ColwiseLinear
    assert isinstance(layer, ColwiseLinear)
    layer.group, layer.gather = group, gather
    return layer


def cut_rowwise(layer: QuantLinear, group: Group, split: bool = False) -> RowwiseLinear:
    """Keep a process's columns of a layer, in place."""
    _keep(layer, 1, group)
    layer.__class__ = RowwiseLinear
    assert isinstance(layer, RowwiseLinear)
    layer.group, layer.split = group, split
    return layer


def whole(layer: ColwiseLinear | RowwiseLinear) -> tuple[QTensor, Tensor | None]:
    """The weight and the bias that a layer was cut from; all processes must ask together."""
    part, group = layer.qweight, layer.group
    packed, scale = group.gather(part.packed), group.gather(part.scale)
    zero = [None] * group.ranks if part.zero is None else group.gather(part.zero)
    parts = [dataclasses.replace(part, packed=p, scale=s, zero=z) for p, s, z in zip(packed, scale, zero, strict=True)]
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, RowwiseLinear):
        return joined(parts, 1), bias
    return joined(parts, 0), None if bias is None else torch.cat(group.gather(bias))


def _keep(layer: QuantLinear, dim: int, group: Group) -> None:
    if isinstance(layer, MergedLinear):
        names = ", ".join(layer.shared.names)
        raise ValueError(f"{names} are merged into one weight, which is not cut: leave them apart, without merge")
    if type(layer) is not QuantLinear:
        raise ValueError(f"{type(layer).__name__}({layer.extra_repr()}) is not a whole QuantLinear")
    part = sharded(layer.qweight, dim, group.rank, group.ranks)
    for name, attribute in PARTS.items():
        tensor = getattr(part, attribute)
        layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    if dim == 0 and layer.bias is not None:
        bias = group.own(layer.bias.detach()).clone()
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=layer.bias.requires_grad))
    layer.out_features, layer.in_features = part.shape
