"""What a transformers model says of its quantized weights: so save_pretrained writes what from_pretrained reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from qkernels.formats.native import Entry, quantization_config
from qkernels.nn import QuantModule


def describe(model: nn.Module) -> None:
    """Put the entries of quantized weights into the configuration of a model, if it is one of transformers'."""
    utils = sys.modules.get("transformers.modeling_utils")  # a model that is one has imported it
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return
    own: Any = model
    own.config.quantization_config = quantization_config(entries(model))
    # Weights are stored as the model has them, under its names, which are those of its configuration: a conversion of
    # float weights cannot be undone on codes.
    own._weight_conversions = []


def entries(model: nn.Module) -> dict[str, Entry]:
    """{name of a quantized weight: its entry}; what is tied is named once, as files hold it."""
    layers = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuantModule)
    }
    tied = getattr(model, "all_tied_weights_keys", {})
    return {
        f"{name}.weight": Entry.of(layer.qweight)
        for name, layer in layers.items()
        if not _is_stored_elsewhere(layers, tied, name)
    }


def _is_stored_elsewhere(layers: Mapping[str, QuantModule], tied: Mapping[str, str], name: str) -> bool:
    """Whether the weight of a layer is tied to another's, under whose name save_pretrained stores it."""
    source = tied.get(f"{name}.weight", "").removesuffix(".weight")
    return source != name and source in layers and layers[source].weight is layers[name].weight
