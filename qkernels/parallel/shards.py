"""Equal parts of a quantized weight, cut from its codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels import packing
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor


def check_split(scheme: Scheme, out_features: int, in_features: int, dim: int, ranks: int, ordered: bool) -> None:
    """Raise ValueError unless a weight can be cut into equal parts; arguments as of `sharded`.

    ordered: whether it has an order of inputs.
    """
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 (rows, out_features) or 1 (columns, in_features), got {dim!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be 1 or more, got {ranks}")
    what, size = ("out_features", out_features) if dim == 0 else ("in_features", in_features)
    if size % ranks:
        raise ValueError(f"{what} = {size} cannot be cut into {ranks} equal parts")
    if dim == 0:
        return
    if ordered:
        raise ValueError("a weight with an order of inputs (act-order) cannot be cut by columns: groups are not runs")
    groups, group = scheme.scale_shape(out_features, in_features)[0], scheme.group_length(in_features)
    if groups > 1 and (size // ranks) % group:
        raise ValueError(
            f"in_features = {size} over {ranks} processes is {size // ranks} each, not whole groups of {group} "
            f"({scheme})"
        )


def sharded(weight: QTensor, dim: int, rank: int, ranks: int) -> QTensor:
    """One of equal parts of a weight (N, K); it dequantizes to the same values, and shares no memory with the whole.

    Args:
        weight: to be cut, on any device but meta.
        dim: 0 cuts rows: N must be a multiple of ranks. 1 cuts columns: K / ranks must be whole groups; where a row has
            one scale alone, any part of it will do.
        rank: which part, from 0.
        ranks: how many parts.

    Activations that are quantized as they come, and meet columns, get a scale for each part: results differ from those
    of the whole weight, by no more than quantizing them loses.

    Raises:
        ValueError: it cannot be cut so; the sizes are named.
    """
    out_features, in_features = weight.shape
    check_split(weight.scheme, out_features, in_features, dim, ranks, weight.order is not None)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to {ranks - 1}, got {rank}")
    if weight.packed.is_meta:
        raise ValueError("weight is on the meta device, where there are no codes to cut: load it first")
    if dim == 0:
        rows = out_features // ranks
        part = weight.rows(torch.arange(rank * rows, (rank + 1) * rows, device=weight.device))
        return dataclasses.replace(part, order=_copy(weight.order), activation=_copy(weight.activation))
    columns = in_features // ranks
    code = packing.unpack(weight.packed, weight.scheme.bits, in_features)
    packed = packing.pack(code[:, rank * columns : (rank + 1) * columns], weight.scheme.bits)
    scale, zero = weight.scale, weight.zero
    if scale.shape[0] > 1:
        groups = scale.shape[0] // ranks
        own = slice(rank * groups, (rank + 1) * groups)
        scale, zero = scale[own].clone(), None if zero is None else zero[own].clone()
    return QTensor(packed, scale, zero, weight.scheme, columns, activation=_copy(weight.activation))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def joined(parts: Sequence[QTensor], dim: int) -> QTensor:
    """The weight whose parts, in order, these are: the inverse of `sharded`."""
    first = parts[0]
    scheme, in_features = first.scheme, sum(part.in_features for part in parts) if dim else first.in_features
    if dim == 0:
        packed = torch.cat([part.packed for part in parts])
        one_scale = scheme.group_size == "tensor"
    else:
        code = [packing.unpack(part.packed, scheme.bits, part.in_features) for part in parts]
        packed = packing.pack(torch.cat(code, dim=1), scheme.bits)
        one_scale = scheme.scale_shape(first.shape[0], in_features)[0] <= 1

    def beside(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if one_scale else torch.cat(tensors, dim=1 - dim)

    zeros = [part.zero for part in parts if part.zero is not None]
    return dataclasses.replace(
        first,
        packed=packed,
        scale=beside([part.scale for part in parts]),
        zero=beside(zeros) if zeros else None,
        in_features=in_features,
    )
