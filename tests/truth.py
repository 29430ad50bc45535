"""The truth that oracle and kernels are held to: numpy in float64 and int64, with an unpacker of its own.

Nothing here imports qkernels: what the layout, the value maps and the rounding rules mean is written down again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def unpack(packed: Array, bits: int, in_features: int) -> Array:
    """(N, words) int32 -> (N, K) int64 codes, one k at a time, by byte and bit address."""
    rows = np.ascontiguousarray(packed).view(np.uint8).astype(np.int64)
    code = np.zeros((packed.shape[0], in_features), np.int64)
    start = low_bit = 0
    for b in (b for b in (8, 4, 2, 1) if bits & b):
        lane_bytes_in_row = -(-in_features * b // 128)
        lane_bytes = {8: 4, 4: 4, 2: 2, 1: 2}[b]
        for k in range(in_features):
            slot, lane = divmod(k, 16)
            bit_in_lane = slot * b
            block, bit = divmod(bit_in_lane, 8 * lane_bytes)
            width = min(lane_bytes, lane_bytes_in_row - block * lane_bytes)
            address = start + block * 16 * lane_bytes + lane * width + bit // 8
            code[:, k] |= (rows[:, address] >> (bit % 8) & (2**b - 1)) << low_bit
        start += 16 * lane_bytes_in_row
        low_bit += b
    assert packed.shape[1] * 4 == start
    return code


def group_of(in_features: int, group_length: int) -> Array:
    """The group of each k."""
    return np.arange(in_features) // max(1, group_length)


def per_weight(values: Array, in_features: int, group_length: int, rows: int) -> Array:
    """(groups, N) or (1, 1) -> (N, K)."""
    return np.broadcast_to(values, (values.shape[0], rows)).T[:, group_of(in_features, group_length)]


def dequantize(code: Array, scale: Array, zero: Array | None, bits: int, offset: bool, group_length: int) -> Array:
    """(N, K) float64, exact: scale * (code - zero), or scale * code + offset. zero None is 2**(bits - 1)."""
    rows, in_features = code.shape
    s = per_weight(scale.astype(np.float64), in_features, group_length, rows)
    if zero is None:
        return s * (code - 2 ** (bits - 1))
    z = per_weight(zero.astype(np.float64), in_features, group_length, rows)
    return s * code + z if offset else s * (code - z)


def as_array(tensor: Tensor) -> Array:
    """A tensor of any dtype as numpy; floating ones as float64, exactly."""
    tensor = tensor.detach().cpu()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def rounded(exact: Array, dtype: torch.dtype) -> Tensor:
    """float64 -> dtype in one rounding, to nearest even."""
    if dtype is torch.bfloat16:
        # to odd in float32 first, so that the second rounding sees what the first one dropped
        near = exact.astype(np.float32)
        bits = near.view(np.int32)
        toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(exact), bits - 1, bits)
        inexact = near.astype(np.float64) != exact
        odd = np.where(inexact, toward_zero | 1, bits).astype(np.int32).view(np.float32)
        return torch.from_numpy(odd).to(torch.bfloat16)
    with np.errstate(over="ignore"):  # to infinity, as it should
        return torch.from_numpy(exact.astype(np.float16 if dtype is torch.float16 else np.float32))
