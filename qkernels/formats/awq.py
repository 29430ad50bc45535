"""AWQ checkpoints of the version "gemm", as AutoAWQ writes them and AutoAWQ, GPTQModel and transformers read them.

    w[n, k] = scales[k // group_size, n] (u[n, k] - z[k // group_size, n])

    part      shape               holds
    qweight   (K, N / 8) int32    codes u of 4 bits, packed along N
    qzeros    (G, N / 8) int32    zeros z, likewise; nothing is added to them
    scales    (G, N) floating     G = ceil(K / group_size)

Bits 4 i to 4 i + 3 of a word in column c belong to row n = 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i] of the weight.

zero_point says how zeros were chosen, not where they are: readers take qzeros in any case, AutoAWQ writes no "gemm"
file without, and GPTQModel stores 8 in each where zero_point is false.

Source    autoawq 0.2.9: WQLinear_GEMM, its packing and its configuration; gptqmodel 7.7.0 for zero_point false.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import DTYPES
from qkernels.formats import reader as base
from qkernels.formats.reader import Reader, field, part, whole
from qkernels.tensor import QTensor

BITS = 4
PER_WORD = 32 // BITS
# Where in a word the code of each of eight rows is: the inverse of the order above.
FIELD_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)
# transformers' names of fields, and AutoAWQ's own
NAMES = {"bits": "w_bit", "group_size": "q_group_size"}


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """How a checkpoint with this configuration, quantization_config or an old quant_config.json, is read.

    Raises:
        ValueError: a field that is needed is missing, or one says what is not supported; it is named.
    """
    for new, old in NAMES.items():
        if new in config and old in config and config[new] != config[old]:
            raise ValueError(f"quantization_config's {new} and {old} differ: {config[new]!r} and {config[old]!r}")
    bits, size = (new if new in config or old not in config else old for new, old in NAMES.items())
    field(config, "quant_method", (None, "awq"), None)
    field(config, bits, (BITS,))
    field(config, "zero_point", (None, True, False), None)
    field(config, "pack_dtype", (None, "int32"), None)
    for name in ("version", "format", "checkpoint_format"):
        value = config.get(name)
        field({name: value.lower() if isinstance(value, str) else value}, name, (None, "gemm"))
    if config.get("backend") == "llm-awq":
        raise ValueError("quantization_config's backend must not be 'llm-awq', which is another layout")
    dynamic = config.get("dynamic")
    if dynamic is not None and not (isinstance(dynamic, Mapping) and all(str(k).startswith("-:") for k in dynamic)):
        raise ValueError(f"quantization_config's dynamic may only exclude modules, got {dynamic!r}")
    group_size = whole(config, size)
    if group_size != -1 and group_size <= 0:
        raise ValueError(f"quantization_config's {size} must be positive or -1, got {group_size}")
    return Reader("qweight", ("qzeros", "scales"), functools.partial(_decode, group_size))


def _decode(group_size: int, module: str, parts: Mapping[str, Tensor]) -> QTensor:
    """The weight of a module."""
    qweight = part(parts, "qweight", dtypes=(torch.int32,))
    if qweight.ndim != 2 or not qweight.numel():
        raise ValueError(f"qweight must be (K, N / {PER_WORD}), got shape {tuple(qweight.shape)}")
    in_features, words = qweight.shape
    size, groups = base.groups_of(group_size, in_features)
    scales = part(parts, "scales", (groups, words * PER_WORD), DTYPES)
    qzeros = part(parts, "qzeros", (groups, words), (torch.int32,))
    code = _unpack(qweight).T.contiguous()
    return base.affine(code, scales, _unpack(qzeros), bits=BITS, group_size=size, order=None)


def _unpack(words: Tensor) -> Tensor:
    """(rows, N) uint8 of (rows, N / 8) words."""
    field_by_field = base.unpack_stream(words, BITS, words.shape[1] * PER_WORD).unflatten(1, (-1, PER_WORD))
    return field_by_field[..., list(FIELD_OF_ROW)].flatten(1)
