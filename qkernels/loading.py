"""qkernels.load: tensors, what goes into a model that is there, or a whole model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from qkernels import checkpoint
from qkernels.formats.native import Path, is_native


def load(path: Path, model: nn.Module | None = None, device: Any = "cpu", **options: Any) -> Any:
    """Load a quantized checkpoint; nothing is quantized again.

    Args:
        path: of a folder in Hugging Face's layout, or of a GGUF or safetensors file: GPTQ, AWQ, compressed-tensors,
            HQQ, torchao, bitsandbytes int8, GGUF, or what qkernels wrote. README lists what is read of each.
        model: where to put it: see below.
        device: for the tensors; with a whole model also what transformers takes for a device_map, such as "auto".
        options: of a whole model: `dtype` of what is not quantized, and further arguments of from_pretrained.
    Returns:
        The model, if there is one. Else, of a file that `save` wrote, {name: Tensor or QTensor}. Else a transformers
        model, in evaluation mode, that config.json or the GGUF file describes.

    A model that is given must have the architecture of the checkpoint, quantized or not, on any device, meta too. Its
    layers become quantized ones where the checkpoint has quantized weights. Merged layers stay merged where the schemes
    let them; files do not know about merging, and `merge_siblings` merges a model that was loaded.

    Raises:
        FormatError: a file is damaged, hostile or of another format, or does not fit the model, which is unchanged.
        ValueError, TypeError: the model has buffers on the meta device that no file holds, or is itself a layer.
        ImportError: transformers is not installed, for a whole model, or gguf, for a GGUF file.
        OSError: a file cannot be read.
    """
    if model is None and (os.path.isdir(path) or not is_native(path)):
        from qkernels.integrations.loading import load_model

        return load_model(path, device, **options)
    if options:
        raise TypeError(f"load takes {next(iter(options))!r} only for a whole model of transformers")
    return checkpoint.load(path, model, torch.device(device))
