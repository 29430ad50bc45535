"""The least time a product can take: to move its bytes once, or to multiply, whichever is longer.

bytes = packed codes + scales + zeros + 2 M K + 2 M N          x and y have 16 bits
floor = max(bytes / copy bandwidth, 2 M N K / matmul rate)
"""

from __future__ import annotations

import dataclasses

from qkernels import packing
from qkernels.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU can do.

    Attributes:
        device: its name.
        copy: bytes per second, read and written.
        matmul: bfloat16 operations per second, dense, accumulated in float32; two for each product added.
        source: "measured", or "datasheet", which no program reaches: floors from it are too low.
        read: bytes per second where little is written; 0 if not measured.
    """

    device: str
    copy: float
    matmul: float
    source: str
    read: float = 0.0

    @property
    def fastest(self) -> Ceilings:
        """With the faster of copying and reading: what no honest time can be below."""
        return dataclasses.replace(self, copy=max(self.copy, self.read))


GPUS = {
    "H200": Ceilings("H200", 4.3e12, 790e12, "measured"),
    "H100": Ceilings("H100 SXM", 3.35e12, 989e12, "datasheet"),
    "B200": Ceilings("B200", 8.0e12, 2250e12, "datasheet"),
    "A100": Ceilings("A100 SXM 80 GB", 2.039e12, 312e12, "datasheet"),
    "L4": Ceilings("L4", 0.3e12, 121e12, "datasheet"),
    "RTX 4090": Ceilings("RTX 4090", 1.008e12, 165.2e12, "datasheet"),
}


def weight_bytes(N: int, K: int, scheme: Scheme | None) -> int:
    """Bytes of a stored weight (N, K), padding included; of bfloat16 where scheme is None."""
    if scheme is None:
        return 2 * N * K
    groups, columns = scheme.scale_shape(N, K)
    per_group = scheme.scale_dtype.itemsize + (0 if scheme.zero_dtype is None else scheme.zero_dtype.itemsize)
    return 4 * N * packing.packed_words(scheme.bits, K) + groups * columns * per_group


def traffic_bytes(M: int, N: int, K: int, scheme: Scheme | None) -> int:
    """Bytes that y = x @ w.T must move: the weight, x (M, K) and y (M, N) in 16 bits."""
    return weight_bytes(N, K, scheme) + 2 * M * K + 2 * M * N


def floor_us(M: int, N: int, K: int, scheme: Scheme | None, ceilings: Ceilings) -> float:
    """The floor of y = x @ w.T in microseconds; of bfloat16 where scheme is None."""
    return bound_us(traffic_bytes(M, N, K, scheme), 2 * M * N * K, ceilings)


def bound_us(moved_bytes: int, operations: int, ceilings: Ceilings) -> float:
    """Microseconds to move bytes, or to carry out operations, whichever is longer."""
    return max(moved_bytes / ceilings.copy, operations / ceilings.matmul) * 1e6
