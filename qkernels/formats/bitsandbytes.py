"""bitsandbytes' 8-bit checkpoints (LLM.int8): one scale per row, that row's largest magnitude over 127.

    part           holds
    weight         (N, K) int8, q from -128 to 127; bitsandbytes itself writes -127 to 127
    SCB            (N,) float32, the largest magnitude of each row
    weight_format  0, for rows as they are: bitsandbytes' table says row 0, col32 1, col_turing 2, col_ampere 3. May be
                   absent. The others are layouts of old GPU kernels, which bitsandbytes no longer reads either

w = q SCB / 127. Here it is scale x q with the float32 scale that is nearest to SCB / 127: scheme w8cs-fp32.
bitsandbytes has more than one way to round this: its embeddings multiply q by SCB / 127, as here, bit for bit, and
`int8_vectorwise_dequant` works out (q SCB) c, with c the float32 that is nearest to 1 / 127. Two float32 products in
another order, so these may differ in the last places. Over every float32 SCB and every q from -127 to 127, as long as
nothing overflows and SCB / 127 is a normal number (SCB from 2^-119 to below 2^121), and counted:

    float32    equal in 67.5 %, one float32 apart in 32.3 %, two apart in 0.14 %, never more
    bfloat16   once rounded to it, different in 4 of a million
    float16    once rounded to it, different in 33 of a million

bitsandbytes takes SCB from weights in float16. For each of those 31743 values float32 is equal in 75.6 % and one apart
in the rest, and bfloat16 and float16 are equal in all.

`llm_int8_threshold` and its like say what is done with activations as the model runs: weights are the same, and a
product here does not quantize activations. The 4-bit types (nf4, fp4) look values up in a table, which is not affine:
refused.

Source    bitsandbytes 0.50: its modules, their loading of weight_format, and its ops, as transformers saves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.formats.reader import Reader, field, part, weight
from qkernels.tensor import QTensor

_WEIGHT_FORMATS = ("row", "col32", "col_turing", "col_ampere")

# Fields that do not change what 8-bit weights are.
_IGNORED = {
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "modules_to_not_convert",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
}


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """A reader of the 8-bit weights; a module without SCB is not quantized.

    Raises:
        ValueError: the configuration is not of 8-bit weights, or has a field that is not known.
    """
    field(config, "quant_method", ("bitsandbytes",))
    for name in ("load_in_4bit", "_load_in_4bit"):
        if field(config, name, (True, False), False):
            kind = config.get("bnb_4bit_quant_type", "fp4")
            raise ValueError(
                f"quantization_config's {name} is true: 4-bit weights ({kind!r:.20}) are looked up in a table, which "
                "is not affine; only load_in_8bit is read"
            )
    field(config, "load_in_8bit", (True,))
    field(config, "_load_in_8bit", (True,), True)
    field(config, "llm_int8_has_fp16_weight", (False,), False)
    known = {"quant_method", "load_in_8bit", "_load_in_8bit", "load_in_4bit", "_load_in_4bit"}
    if unknown := sorted(map(str, config.keys() - known - _IGNORED - {"llm_int8_has_fp16_weight"})):
        raise ValueError(f"quantization_config has {unknown[0]!r:.100}, which is not known of bitsandbytes")
    return Reader("SCB", ("weight", "weight_format"), _decode)


def _decode(name: str, parts: Mapping[str, Tensor]) -> QTensor:
    """The weight of a module."""
    q = part(parts, "weight", dtypes=(torch.int8,))
    if q.ndim != 2 or not q.numel():
        raise ValueError(f"weight must be (N, K), of at least one row and column, got {tuple(q.shape)}")
    largest = part(parts, "SCB", (q.shape[0],), (torch.float32,))
    if "weight_format" in parts:
        stored = part(parts, "weight_format", dtypes=(torch.uint8,))
        if stored.numel() != 1:
            raise ValueError(f"weight_format must be one number, got {tuple(stored.shape)}")
        if kind := int(stored):
            known = f"{_WEIGHT_FORMATS[kind]!r}" if kind < len(_WEIGHT_FORMATS) else "not known"
            raise ValueError(f"weight_format must be 0, for 'row', got {kind}, which is {known}")
    code = q.contiguous().view(torch.uint8) ^ 128  # q + 128
    return weight(code, (largest / 127)[None], None, bits=8, group_size="channel", value_map="symmetric")
