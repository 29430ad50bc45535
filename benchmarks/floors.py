"""The least time a product can take: to move its bytes once, or to multiply, whichever is longer.

bytes = packed codes + scales + zeros + 2 M K + 2 M N          x and y have 16 bits
floor = max(bytes / copy bandwidth, 2 M N K / matmul rate)

Where activations are quantized their codes are written once and read once, too, and the rate is that of int8: see
`Ceilings.int8`.
"""

from __future__ import annotations

import dataclasses
import re

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
        int8: int8 operations per second, dense, accumulated in int32; 0 if not known. Always the datasheet's, also
            beside what was measured: floors that it decides are lower than what a program can reach.
    """

    device: str
    copy: float
    matmul: float
    source: str
    read: float = 0.0
    int8: float = 0.0

    @property
    def fastest(self) -> Ceilings:
        """With the faster of copying and reading: what no honest time can be below."""
        return dataclasses.replace(self, copy=max(self.copy, self.read))


GPUS = {
    "H200": Ceilings("H200", 4.3e12, 790e12, "measured", int8=1979e12),
    "H100": Ceilings("H100 SXM", 3.35e12, 989e12, "datasheet", int8=1979e12),
    "B200": Ceilings("B200", 8.0e12, 2250e12, "datasheet", int8=4500e12),
    "A100": Ceilings("A100 SXM 80 GB", 2.039e12, 312e12, "datasheet", int8=624e12),
    "L4": Ceilings("L4", 0.3e12, 121e12, "datasheet", int8=242e12),
    "RTX 4090": Ceilings("RTX 4090", 1.008e12, 165.2e12, "datasheet", int8=660.6e12),
}


def int8_rate(device: str) -> float:
    """int8 operations per second of a GPU, by the name that its driver gives it: the datasheet's; 0 if not known.

    >>> int8_rate("NVIDIA H100 80GB HBM3") / 1e12, int8_rate("NVIDIA L40S")
    (1979.0, 0.0)
    """
    return next((found.int8 for name, found in GPUS.items() if re.search(rf"\b{name}\b", device)), 0.0)


def weight_bytes(N: int, K: int, scheme: Scheme | None) -> int:
    """Bytes of a stored weight (N, K), padding included; of bfloat16 where scheme is None."""
    if scheme is None:
        return 2 * N * K
    groups, columns = scheme.scale_shape(N, K)
    per_group = scheme.scale_dtype.itemsize + (0 if scheme.zero_dtype is None else scheme.zero_dtype.itemsize)
    return 4 * N * packing.packed_words(scheme.bits, K) + groups * columns * per_group


def codes_bytes(M: int, K: int, scheme: Scheme) -> int:
    """Bytes of the codes of x (M, K), with their scales and zeros; 0 where the scheme leaves x as it is."""
    if scheme.activations is None:
        return 0
    beside = 4 if scheme.activations.symmetric else 5  # a float32 scale and an int8 zero for each token
    return M * (4 * packing.activation_words(scheme.bits, K) + beside)


def traffic_bytes(M: int, N: int, K: int, scheme: Scheme | None) -> int:
    """Bytes that y = x @ w.T must move: the weight, x (M, K) and y (M, N) in 16 bits, codes of x twice."""
    codes = 0 if scheme is None else codes_bytes(M, K, scheme)
    return weight_bytes(N, K, scheme) + 2 * M * K + 2 * M * N + 2 * codes


def floor_us(M: int, N: int, K: int, scheme: Scheme | None, ceilings: Ceilings) -> float:
    """The floor of y = x @ w.T in microseconds; of bfloat16 where scheme is None."""
    moved, operations = traffic_bytes(M, N, K, scheme), 2 * M * N * K
    return bound_us(moved, 0, ceilings, operations) if is_int8(scheme) else bound_us(moved, operations, ceilings)


def is_int8(scheme: Scheme | None) -> bool:
    """Whether codes are multiplied by codes."""
    return scheme is not None and scheme.activations is not None


def bound_us(moved_bytes: int, operations: int, ceilings: Ceilings, int8_operations: int = 0) -> float:
    """Microseconds to move bytes, or to carry out operations of bfloat16 and then of int8, whichever is longer.

    Those of int8 count for nothing where their rate is not known.
    """
    int8 = int8_operations / ceilings.int8 if ceilings.int8 else 0.0
    return max(moved_bytes / ceilings.copy, operations / ceilings.matmul + int8) * 1e6
