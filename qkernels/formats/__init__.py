"""Files: from checkpoints to QTensors and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkernels.formats.native import Path
    from qkernels.tensor import QTensor


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor | QTensor]:
    """Every tensor of a checkpoint, quantized weights as QTensors: see `stream`, which holds one at a time."""
    return dict(stream(path, device))


def stream(path: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor | QTensor]]:
    """Every tensor of a checkpoint with its name, one at a time, quantized weights as QTensors.

    Nothing is quantized again: values are the format's own, bit for bit.

    Args:
        path: of a file, what qkernels wrote, GGUF, or safetensors of another package with its config.json beside it; or
            of a folder in Hugging Face's layout. See formats/folder.py.
        device: for the tensors.

    Raises:
        FormatError: a file is damaged, hostile, of another format, or holds what is not read; the message names it.
        ImportError: it is a GGUF file, and the package gguf is not installed.
        OSError: a file cannot be read.
    """
    from qkernels.formats import folder, gguf

    if not os.path.isdir(path):
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == gguf.MAGIC:
            return gguf.stream(path, device)
    return folder.Checkpoint(path).tensors(device)
