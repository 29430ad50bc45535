"""Files: from checkpoints to QTensors and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkernels.formats.native import Path
    from qkernels.tensor import QTensor


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor | QTensor]:
    """Every tensor in a file, quantized weights as QTensors: what qkernels wrote, or GGUF, told by its first bytes.

    Nothing is quantized again: values are the format's own, bit for bit.

    Args:
        path: of the file.
        device: for the tensors.

    Raises:
        FormatError: the file is damaged, hostile, of another format, or holds what is not read; the message names it.
        ImportError: it is a GGUF file, and the package gguf is not installed.
        OSError: the file cannot be read.
    """
    from qkernels.formats import gguf, native

    with open(path, "rb") as file:
        magic = file.read(4)
    return gguf.read(path, device) if magic == gguf.MAGIC else native.read(path, device)
