"""A whole model from any checkpoint that is read: it becomes a transformers model, with the codes that it has."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qkernels.formats import gguf
from qkernels.formats.folder import Checkpoint
from qkernels.formats.native import Entry, FormatError, Path, parts_of, quantization_config
from qkernels.integrations.experts import fuse_experts
from qkernels.tensor import QTensor


def load_model(path: Path, device: Any = "cpu", dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A transformers model, in evaluation mode, whose quantized layers have the codes of the checkpoint.

    Args:
        path: of a folder in Hugging Face's layout, of a safetensors file with its config.json beside it, or of a GGUF
            file, which needs neither.
        device: where to; or what transformers takes for a device_map, such as "auto".
        dtype: of what is not quantized. By default that of config.json; for GGUF float32 on a CPU, else bfloat16.
        options: further arguments of from_pretrained.

    Raises:
        FormatError: the checkpoint is damaged, hostile, not quantized or of a format that is not read, or what it holds
            is not what the model wants; the tensor is named.
        ImportError: transformers (or gguf, for GGUF files) is not installed.
        OSError: a file cannot be read.
    """
    try:
        from transformers import AutoConfig, GenerationConfig
    except ImportError:
        raise ImportError("whole models need transformers: pip install 'qkernels[hf]'") from None
    from qkernels.integrations import transformers as ours  # tells transformers of the method
    from qkernels.integrations.gguf import model_class, model_state

    folder = None
    tensors: dict[str, Tensor | QTensor]
    if _is_gguf(path):
        if dtype is None:
            dtype = torch.float32 if str(device) == "cpu" else torch.bfloat16
        config, tensors = model_state(path, dtype)
    else:
        checkpoint = Checkpoint(path)
        if not checkpoint.quantized:
            raise FormatError(f"{path} holds no quantized weights: load it with transformers, then use quantize_model")
        folder, tensors = checkpoint.folder, dict(checkpoint.tensors())
        config = AutoConfig.from_pretrained(folder)
        for part in (config, config.get_text_config(decoder=True)):
            vars(part).pop("quantization_config", None)
    kind = model_class(config)
    tensors = fuse_experts(kind, config, tensors)
    entries: dict[str, Entry] = {}
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            entries[name] = Entry.of(tensor)
            flat |= {name + suffix: part for suffix, part in parts_of(tensor).items()}
        else:
            flat[name] = tensor
    del tensors
    config.quantization_config = quantization_config(entries)
    try:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=flat, dtype=dtype or getattr(config, "dtype", None) or torch.float32,
            device_map=device, output_loading_info=True, ignore_mismatched_sizes=True,  # check_all_loaded names them
            **options,
        )  # fmt: skip
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    ours.check_all_loaded(path, model, info)
    if folder is not None and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _is_gguf(path: Path) -> bool:
    if os.path.isdir(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == gguf.MAGIC
