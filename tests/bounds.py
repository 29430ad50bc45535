"""How far a result may be from the truth, derived and not tuned. u(dtype) is half a unit in the last place of 1.

matmul, y = sum_k x w^ + bias over K products in float32, in any order, with any rounding toward a neighbour
(tensor cores truncate):

    |y - y*| <= E + u_out (|y*| + E),   E = ((9 K / 8 + S) 2^-23 + (G + 1) 2^-24) A,   A = sum |x| |w^| + |bias|

S counts splits of the sum, and G groups: scales that multiply float32 sums round once per group, and once when added.
A float-offset kernel adds two terms per group, x * (code - c) and x * (offset + c scale), c = 2^(bits - 1), whose sizes
A must count one by one; the second factor is itself rounded, once more 2^-24.

Where weights are rounded to x's dtype before they are multiplied, u(dtype) A is added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def matmul(
    exact: Array,
    magnitude: Array,
    in_features: int,
    groups: int,
    dtype: torch.dtype,
    splits: int = 1,
    rounded_weights: bool = False,
) -> Array:
    """Largest |y - y*|; magnitude is A, from `matmul_magnitude`; rounded_weights where they are of dtype."""
    error = ((9 * in_features / 8 + splits) * 2.0**-23 + (2 * groups + 2) * 2.0**-24) * magnitude
    if rounded_weights:
        error = error + UNIT[dtype] * (1 + UNIT[dtype]) * magnitude
    return error + UNIT[dtype] * (np.abs(exact) + error) + SMALLEST[dtype]


def codes(exact: Array, magnitude: Array, groups: int, dtype: torch.dtype, splits: int = 1) -> Array:
    """Largest |y - y*| of a product of codes of 8 bits; magnitude is sum_g |sum_k of group g| + |bias|.

    Sums of integers are exact. Each becomes a float32, is scaled, and is added: 3 roundings of each group, and one more
    for each group and split that comes after it; then a scale and a bias.
    """
    error = (groups + splits + 4) * 2.0**-24 * magnitude
    return error + UNIT[dtype] * (np.abs(exact) + error) + SMALLEST[dtype]  # type: ignore[no-any-return]


def matmul_magnitude(x: Array, w: Array, bias: Array | None, offset_terms: tuple[Array, Array] | None = None) -> Array:
    """A of the formula; offset_terms are scale * (code - c) and offset + c * scale, both (N, K)."""
    weight = np.abs(w) if offset_terms is None else np.abs(offset_terms[0]) + np.abs(offset_terms[1])
    size = np.abs(x) @ weight.T
    return size if bias is None else size + np.abs(bias)


def quantize(scale: Array, extent: Array, code_max: int) -> Array:
    """Largest |w - w^|: half a step, and what float32 arithmetic adds.

    extent is the largest |weight| of each group, spread over its weights; so is scale. The range, the scale and the
    offset round, each by 2^-24 of itself or, among subnormal numbers, by 2^-150; the scale counts code_max times.
    """
    return scale / 2 + 8 * 2.0**-24 * (extent + scale) + (code_max + 2) * 2.0**-149
