"""Styles for torch's parallelize_module, which cut quantized layers and leave others to torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, parallel
from torch.distributed.tensor.placement_types import Placement

from qkernels.nn import QuantLinear
from qkernels.parallel.layers import Group, cut_colwise, cut_rowwise


class ColwiseParallel(parallel.ColwiseParallel):
    """Each process keeps some rows of a layer; arguments as of torch's style, which nn.Linear and nn.Embedding get.

    A QuantLinear takes an input that is the same in all processes, and gives its part of the last dimension or, with
    output_layouts=Replicate(), all of it; plain tensors both.

    Raises:
        ValueError: when it is applied: other layouts are asked of a QuantLinear, or it cannot be cut so.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        _check_layouts(self, self.input_layouts, (Replicate(),))
        _check_layouts(self, self.output_layouts, (Shard(-1), Replicate()))
        return cut_colwise(module, Group.of(device_mesh), gather=self.output_layouts == (Replicate(),))


class RowwiseParallel(parallel.RowwiseParallel):
    """Each process keeps some columns of a layer; arguments as of torch's style, which nn.Linear and nn.Embedding get.

    A QuantLinear takes its part of the last dimension of the input or, with input_layouts=Replicate(), all of it, and
    gives an output that is the same in all processes; plain tensors both.

    Raises:
        ValueError: when it is applied: other layouts are asked of a QuantLinear, or it cannot be cut so.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        _check_layouts(self, self.input_layouts, (Shard(-1), Replicate()))
        _check_layouts(self, self.output_layouts, (Replicate(),))
        return cut_rowwise(module, Group.of(device_mesh), split=self.input_layouts == (Replicate(),))


def _check_layouts(style: Any, given: tuple[Placement, ...], accepted: tuple[Placement, ...]) -> None:
    if given[0] not in accepted or not style.use_local_output:
        raise ValueError(f"a QuantLinear cannot be cut as {style!r}: see {type(style).__name__}")
