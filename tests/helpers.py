"""What several test files need: operands whose values are known exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkernels import packing, reference_int8
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize
from tests import truth

Array = npt.NDArray[Any]

ALL_BITS = tuple(range(1, 9))
VALUE_MAPS = {"": "affine", "s": "symmetric", "f": "offset"}
# (bits, suffix) of every width and value map
ALL_MAPS = [(bits, suffix) for bits in ALL_BITS for suffix in VALUE_MAPS if not (bits == 1 and suffix == "s")]


@dataclasses.dataclass
class Weight:
    """A quantized weight with its float64 values."""

    scheme: Scheme
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    code: Array  # (N, K) int64
    values: Array  # (N, K) float64, exact

    @property
    def in_features(self) -> int:
        return self.code.shape[1]

    @property
    def groups(self) -> int:
        return self.scale.shape[0]

    def args(self, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed.to(device), self.scale.to(device), None if self.zero is None else self.zero.to(device)

    def offset_terms(self) -> tuple[Array, Array] | None:
        """scale * (code - c) and offset + c * scale, spread over the weights: what an offset kernel adds up."""
        if self.scheme.value_map != "offset":
            return None
        assert self.zero is not None
        rows, in_features = self.code.shape
        length = self.scheme.group_length(in_features)
        s, m = (truth.per_weight(truth.as_array(t), in_features, length, rows) for t in (self.scale, self.zero))
        center = self.scheme.center
        return s * (self.code - center), m + center * s


def exact_weight(scheme: str, rows: int, in_features: int, seed: int = 0) -> Weight:
    """Random codes, with scales that are powers of two and offsets that are their small multiples.

    A different scale in every group is what catches wrong group indexing; sums with x in {-1, 0, 1} are exact.
    """
    parsed = Scheme.parse(scheme)
    rng = np.random.default_rng([seed, rows, in_features, parsed.bits])
    code = rng.integers(parsed.code_min, parsed.code_max + 1, (rows, in_features))
    shape = parsed.scale_shape(rows, in_features)
    scale = torch.from_numpy(2.0 ** rng.integers(-3, 4, shape)).to(parsed.scale_dtype)
    zero = None
    if parsed.value_map == "affine":
        zero = torch.from_numpy(rng.integers(0, parsed.code_max + 1, shape)).to(torch.uint8)
    elif parsed.value_map == "offset":
        zero = torch.from_numpy(rng.integers(-24, 25, shape) / 8.0).to(parsed.scale_dtype)
    return _weight(parsed, code, scale, zero)


def random_weight(scheme: str, rows: int, in_features: int, seed: int = 0) -> Weight:
    """Random codes with scales, zeros and offsets of any value."""
    parsed = Scheme.parse(scheme)
    rng = np.random.default_rng([seed, rows, in_features, parsed.bits])
    code = rng.integers(parsed.code_min, parsed.code_max + 1, (rows, in_features))
    shape = parsed.scale_shape(rows, in_features)
    scale = torch.from_numpy(rng.uniform(0.01, 0.2, shape)).to(parsed.scale_dtype)
    zero = None
    if parsed.value_map == "affine":
        zero = torch.from_numpy(rng.integers(0, parsed.code_max + 1, shape)).to(torch.uint8)
    elif parsed.value_map == "offset":
        zero = torch.from_numpy(rng.normal(0, 2, shape)).to(parsed.scale_dtype)
    return _weight(parsed, code, scale, zero)


def _weight(scheme: Scheme, code: Array, scale: Tensor, zero: Tensor | None) -> Weight:
    values = truth.dequantize(
        code,
        truth.as_array(scale),
        None if zero is None else truth.as_array(zero),
        scheme.bits,
        scheme.value_map == "offset",
        scheme.group_length(code.shape[1]),
    )
    packed = packing.pack(torch.from_numpy(code.astype(np.uint8)), scheme.bits)
    return Weight(scheme, packed, scale, zero, code, values)


def signs(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values in {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(dtype)


def quantized(w: Tensor, scheme: str, inputs: Tensor | None = None) -> QTensor:
    """A weight by rounding to nearest; where activations are static, for inputs whose range is that of `inputs`."""
    how = Scheme.parse(scheme).activations
    if how is None or not how.static:
        return quantize(w, scheme)
    inputs = torch.linspace(-2.0, 3.0, 9) if inputs is None else inputs
    scale, _, zero = reference_int8.dynamic_range(inputs.detach().float().reshape(1, -1), how)
    return quantize(w, scheme, activation=torch.cat([scale, zero]))
