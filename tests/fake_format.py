"""A small format of another package that does not exist, and checkpoints in it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from qkernels import QTensor
from qkernels.formats import folder
from qkernels.formats.reader import Reader, field, part, weight

GROUP = 32
CONFIG = {"quant_method": "fake", "bits": 4}


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    bits = field(config, "bits", (2, 4))
    if metadata.get("fake") == "bad":
        raise ValueError("the metadata's fake is bad")

    def decode(module: str, parts: Mapping[str, Tensor]) -> QTensor:
        code = part(parts, "codes", dtypes=(torch.uint8,))
        if code.ndim != 2 or (code.numel() and int(code.max()) >= 2**bits):
            raise ValueError(f"codes must be (N, K) from 0 to {2**bits - 1}")
        groups = -(-code.shape[1] // GROUP)
        scale = part(parts, "steps", (code.shape[0], groups), (torch.float16,))
        zero = part(parts, "zeros", (code.shape[0], groups), (torch.uint8,)).T if "zeros" in parts else None
        value_map = "symmetric" if zero is None else "affine"
        return weight(code, scale.T, zero, bits=bits, group_size=GROUP, value_map=value_map)

    return Reader("codes", ("steps", "zeros"), decode, metadata.get("suffix", ""))


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder.READERS, "fake", "tests.fake_format")


def tensors(module: str = "a", rows: int = 6, in_features: int = 80, zeros: bool = True) -> dict[str, Tensor]:
    """The tensors of a module."""
    generator = torch.Generator().manual_seed(len(module) + rows)
    groups = -(-in_features // GROUP)
    before = f"{module}." if module else ""
    made = {
        f"{before}codes": torch.randint(0, 16, (rows, in_features), generator=generator).to(torch.uint8),
        f"{before}steps": torch.rand(rows, groups, generator=generator).half(),
    }
    if zeros:
        made[f"{before}zeros"] = torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8)
    return made


def values(stored: Mapping[str, Tensor], module: str = "a") -> Tensor:
    """What the format says that these are: s (u - z), z = 8 where there is none."""
    code, scale = stored[f"{module}.codes"].float(), stored[f"{module}.steps"].float()
    zero = stored[f"{module}.zeros"].float() if f"{module}.zeros" in stored else torch.full_like(scale, 8)
    of = torch.arange(code.shape[1]) // GROUP
    return scale[:, of] * (code - zero[:, of])


def write(
    folder: pathlib.Path,
    files: Mapping[str, Mapping[str, Tensor]],
    config: Any = ...,
    index: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """A folder with these files; several get an index, unless another is given."""
    folder.mkdir(exist_ok=True)
    for name, held in files.items():
        safetensors.torch.save_file(dict(held), folder / name, {"format": "pt", **(metadata or {})})
    if len(files) > 1 and index is None:
        index = {"weight_map": {tensor: name for name, held in files.items() for tensor in held}}
    if index is not None:
        write_json(folder / "model.safetensors.index.json", index)
    if config is not None:
        write_json(folder / "config.json", {"quantization_config": CONFIG} if config is ... else config)
    return folder


def write_json(path: pathlib.Path, content: Any) -> None:
    """Strings are written as they are."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
