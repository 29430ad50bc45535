"""Experts of a checkpoint, each a weight of its own, as the fused projections that transformers' models have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels.formats.native import FormatError
from qkernels.tensor import QTensor, stacked_rows


def fuse_experts(kind: Any, config: Any, tensors: dict[str, Tensor | QTensor]) -> dict[str, Tensor | QTensor]:
    """The tensors, with quantized weights of single experts stacked: NAME.weight of a projection of all of them.

    Which weights make a projection, and in which order, is what transformers says of the model: a conversion that
    merges a list of modules and then puts lists beside each other. Rows stay whole, so nothing is quantized again.

    Raises:
        FormatError: experts of a projection have different schemes, or some are missing.
    """
    if not any(re.search(r"\.experts\.\d+\.", name) for name, t in tensors.items() if isinstance(t, QTensor)):
        return tensors
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    with torch.device("meta"):
        model = kind(config)
    rename = renaming(model)
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter) and _stacks(entry)]
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            renamed = rename(name)
            for converter in converters:
                for place, pattern in enumerate(_patterns(converter, "source")):
                    if match := re.fullmatch(r"(.*?)" + _expert(pattern), renamed):
                        target = match[1] + _patterns(converter, "target")[0]
                        found.setdefault(f"{target}.weight", {})[int(match["expert"]), place] = name
    rest = dict(tensors)
    for target, members in found.items():
        experts, places = (1 + max(key[i] for key in members) for i in (0, 1))
        wanted = [(expert, place) for expert in range(experts) for place in range(places)]
        if missing := [key for key in wanted if key not in members]:
            raise FormatError(f"{target}: there is no quantized weight {missing[0][1]} of expert {missing[0][0]}")
        try:
            rest[target] = stacked_rows([rest.pop(members[key]) for key in wanted])  # type: ignore[misc]
        except ValueError as error:
            raise FormatError(f"{target}: experts cannot be stacked: {error}") from None
    return rest


def renaming(model: Any) -> Callable[[str], str]:
    """What gives the model's own name of a weight for the one that a checkpoint has, as transformers renames it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    entries = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def rename(name: str) -> str:
        for entry in entries:
            name, _ = entry.rename_source_key(name)
        return name

    return rename


def _patterns(converter: Any, end: str) -> list[str]:
    """The "source" or "target" patterns of a conversion as they were written; transformers 5.0 keeps no others."""
    patterns: list[str] = getattr(converter, f"_original_{end}_patterns", None) or getattr(converter, f"{end}_patterns")
    return patterns


def _stacks(converter: Any) -> bool:
    """Whether a conversion only stacks the weights of experts, and those of several lists beside each other."""
    names = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    merge, concatenate = ("MergeModulelist", 0), ("Concatenate", 1)
    return names in ([merge], [merge, concatenate])


def _expert(pattern: str) -> str:
    """A regular expression for a pattern of transformers', where a star stands for the number of an expert."""
    return re.escape(pattern.lstrip("^").rstrip("$")).replace(r"\*", r"(?P<expert>\d+)", 1)
