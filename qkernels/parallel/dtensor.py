"""How DTensor can shard qkernels::matmul and qkernels::dequantize; importing this module tells it."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from qkernels import ops
from qkernels.scheme import as_scheme

_Placements: TypeAlias = list[Placement | None]
_Shardings: TypeAlias = list[tuple[_Placements, _Placements]]  # of results, of arguments


def _matmul(
    x: Any, packed: Any, scale: Any, zero: Any, bias: Any, scheme: str, in_features: int, activation: Any = None
) -> _Shardings:
    """What the op can do without a word between processes: rows of x apart, or rows of the weight.

    Not columns of the weight: in_features is an argument of the op, and a part of the codes would need another one.
    RowwiseParallel does that. Activations are quantized token by token, so codes are those of one process; the scale of
    static ones is the same everywhere.
    """
    rest: _Placements = [None, None]  # scheme, in_features
    if activation is not None:
        rest.append(Replicate())
    whole = [*_weight(Replicate(), scale, zero, scheme), None if bias is None else Replicate(), *rest]
    columns = [*_weight(Shard(0), scale, zero, scheme), None if bias is None else Shard(0), *rest]
    found: _Shardings = [([Replicate()], [Replicate(), *whole]), ([Shard(x.ndim - 1)], [Replicate(), *columns])]
    for dim in range(x.ndim - 1):
        found.append(([Shard(dim)], [Shard(dim), *whole]))
    return found


def _dequantize(packed: Any, scale: Any, zero: Any, scheme: str, in_features: int, dtype: torch.dtype) -> _Shardings:
    """Rows of the weight apart; the gradient of a product with such a weight needs it."""
    rest = [None, None, None]  # scheme, in_features, dtype
    return [([rows], [*_weight(rows, scale, zero, scheme), *rest]) for rows in (Replicate(), Shard(0))]


def _weight(rows: Placement, scale: Any, zero: Any, scheme: str) -> _Placements:
    """Of packed, scale and zero, as the rows of a weight are placed."""
    beside = rows
    if rows.is_shard():
        beside = Replicate() if as_scheme(scheme).group_size == "tensor" else Shard(1)
    return [rows, beside, None if zero is None else beside]


register_sharding(ops._matmul_op)(_matmul)
register_sharding(ops._dequantize_op)(_dequantize)
