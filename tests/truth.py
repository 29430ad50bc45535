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


def unpack_activations(codes: Array, bits: int, in_features: int) -> Array:
    """(M, words) int32 -> (M, K) int64, one k at a time: byte b of word i of a block holds k = (128 / bits) b + i."""
    rows = np.ascontiguousarray(codes).view(np.int8)
    block, apart = 512 // bits, 128 // bits
    assert rows.shape[1] == -(-in_features // block) * block
    code = np.zeros((codes.shape[0], in_features), np.int64)
    for k in range(in_features):
        inside = k % block
        code[:, k] = rows[:, k - inside + 4 * (inside % apart) + inside // apart]
    return code


def quantize_activations(x: Array, symmetric: bool) -> tuple[Array, Array, Array]:
    """(code int64, scale float32, zero int64) of finite tokens x (M, K) that float32 holds, in numpy's float32."""
    x = x.astype(np.float32)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    size = np.maximum(np.maximum(-low, high) if symmetric else high / 2 - low / 2, np.float32(2.0**-119))
    steps = np.float32(127 if symmetric else 127.5)
    zero = np.zeros_like(size) if symmetric else np.clip(np.rint(-low * (steps / size)) - 128, -128, 127)
    code = np.rint(x * (steps / size)[:, None]) + zero[:, None]
    return np.clip(code, -127 if symmetric else -128, 127).astype(np.int64), size / steps, zero.astype(np.int64)
