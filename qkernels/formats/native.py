"""The native file: safetensors, with the schemes in its metadata. Nothing in it is ever executed or unpickled.

A quantized weight called NAME is stored as the tensors NAME (packed, int32), NAME_scale, unless its scheme is symmetric
NAME_zero, and NAME_order where its columns have an order of their own: the names that QuantLinear gives its parameters.
Everything else is stored as it is. Metadata:

    "format"            "pt"
    "qkernels_version"  "1"
    "qkernels"          JSON: {"weights": {NAME: {"scheme": "w4g128", "shape": [N, K]}}, "aliases": {NAME: OTHER NAME}}

and, in the entry of a weight with an order, "ordered": true.

Aliases are tensors that share memory, such as an output layer tied to the embedding; they are stored once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import LARGEST_IN_FEATURES
from qkernels.files import replacing
from qkernels.packing import packed_words
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

VERSION = "1"
SUFFIXES = ("", "_scale", "_zero", "_order")  # of the tensors of a weight
Path = str | os.PathLike[str]


class FormatError(ValueError):
    """A file is not what it should be; the message names the file and the tensor or field."""


def write(path: Path, tensors: Mapping[str, Tensor | QTensor]) -> None:
    """Write tensors to a file, which appears whole or not at all.

    Raises:
        ValueError, TypeError: two tensors would get the same name in the file, or a value is no tensor.
        OSError: the file cannot be written; what was there before is still there.
    """
    from safetensors.torch import save_file

    path = pathlib.Path(path)
    check_writable(path)
    stored: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"a tensor's name must be a str other than '__metadata__', got {name!r}")
        parts = parts_of(tensor) if isinstance(tensor, QTensor) else {"": tensor}
        for suffix, part in parts.items():
            if not isinstance(part, Tensor):
                raise TypeError(f"{name!r} must be a Tensor or a QTensor, got {type(part).__name__}")
            parts[suffix] = part.detach().resolve_conj().resolve_neg()  # lazy views, which memory does not show
            if name + suffix in stored or name + suffix in aliases:
                raise ValueError(f"two tensors would be stored as {name + suffix!r}")
        memory = tuple(_memory(part) for part in parts.values())
        if memory in seen:
            aliases[name] = seen[memory]
            continue
        seen[memory] = name
        for suffix, part in parts.items():
            stored[name + suffix] = _own_memory(part, taken)
        if isinstance(tensor, QTensor):
            weights[name] = Entry.of(tensor).json()

    metadata = {
        "format": "pt",
        "qkernels_version": VERSION,
        "qkernels": json.dumps({"weights": weights, "aliases": aliases}),
    }
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def parts_of(weight: QTensor) -> dict[str, Tensor]:
    """{what is added to a weight's name: tensor} of what is stored of it."""
    own = zip(SUFFIXES, (weight.packed, weight.scale, weight.zero, weight.order), strict=True)
    return {suffix: tensor for suffix, tensor in own if tensor is not None}


def check_writable(path: pathlib.Path) -> None:
    """Raise OSError, naming the path, if a file could not be put there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are the same; empty ones are only ever themselves."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _own_memory(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor, contiguous and alone in its storage, as safetensors wants it; taken are the storages so far."""
    storage = tensor.untyped_storage()
    if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.numel():
        taken.add(storage.data_ptr())
    return tensor


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor | QTensor]:
    """Everything in a native file, quantized weights as QTensors.

    Raises:
        FormatError: the file is not a native file, is damaged, or a tensor in it does not agree with its scheme.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    torch.device(device)  # RuntimeError for what is none
    with open(path, "rb"):  # OSError rather than a message of safetensors'
        pass
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            weights, aliases = _read_header(path, file.metadata(), names)
            tensors: dict[str, Tensor | QTensor] = {}
            for name, entry in weights.items():
                tensors[name] = _read_weight(path, file, name, entry)
                names -= entry.parts(name)
            for name in sorted(names):
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from None
    for name, target in aliases.items():
        tensors[name] = tensors[target]
    return tensors


def _read_header(
    path: Path, metadata: dict[str, str] | None, names: set[str]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Schemes and shapes of the quantized weights, and aliases, each checked against the tensors that are there."""
    if not metadata or "qkernels" not in metadata:
        raise FormatError(f"{path}: not a qkernels file: its metadata has no 'qkernels' entry")
    if metadata.get("qkernels_version") != VERSION:
        found = metadata.get("qkernels_version")
        raise FormatError(f"{path}: qkernels_version must be {VERSION!r}, got {found!r}")
    try:
        header = json.loads(metadata["qkernels"])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata 'qkernels' is not JSON: {error}") from None
    if not isinstance(header, dict) or set(header) != {"weights", "aliases"}:
        raise FormatError(f"{path}: metadata 'qkernels' must hold 'weights' and 'aliases'")
    if not isinstance(header["weights"], dict) or not isinstance(header["aliases"], dict):
        raise FormatError(f"{path}: 'weights' and 'aliases' must be objects")

    weights: dict[str, Entry] = {}
    claimed: set[str] = set()
    for name, value in header["weights"].items():
        entry = read_entry(path, name, value)
        parts = entry.parts(name)
        if missing := parts - names:
            raise FormatError(f"{path}: {name}: the file has no tensor {min(missing)!r}")
        if entry.scheme.zero_dtype is None and f"{name}_zero" in names:
            raise FormatError(f"{path}: {name}: a {entry.scheme} weight has no zeros, but the file has {name}_zero")
        if shared := parts & claimed:
            raise FormatError(f"{path}: {min(shared)} belongs to two weights")
        claimed |= parts
        weights[name] = entry
    for name, target in header["aliases"].items():
        known = isinstance(target, str) and (target in weights or target in names - claimed)
        if name in names or not known:
            raise FormatError(f"{path}: alias {name!r} must be a new name for a tensor in the file, got {target!r}")
    return weights, header["aliases"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What metadata, and configurations of models, say of a quantized weight.

    Attributes:
        scheme: of its codes.
        shape: (N, K).
        ordered: whether its columns have an order of their own.
    """

    scheme: Scheme
    shape: tuple[int, int]
    ordered: bool = False

    @staticmethod
    def of(weight: QTensor) -> Entry:
        """The entry of a weight."""
        return Entry(weight.scheme, (weight.shape[0], weight.shape[1]), weight.order is not None)

    def json(self) -> dict[str, Any]:
        """What is stored."""
        ordered = {"ordered": True} if self.ordered else {}
        return {"scheme": str(self.scheme), "shape": list(self.shape), **ordered}

    def parts(self, name: str) -> set[str]:
        """Names of the tensors that are the weight called `name`."""
        zero = {f"{name}_zero"} if self.scheme.zero_dtype is not None else set()
        return {name, f"{name}_scale", *zero} | ({f"{name}_order"} if self.ordered else set())

    def on_meta(self) -> QTensor:
        """A weight of these shapes and dtypes without values."""
        rows, in_features = self.shape
        groups = self.scheme.scale_shape(rows, in_features)
        with torch.device("meta"):
            return QTensor(
                torch.empty(rows, packed_words(self.scheme.bits, in_features), dtype=torch.int32),
                torch.empty(groups, dtype=self.scheme.scale_dtype),
                None if self.scheme.zero_dtype is None else torch.empty(groups, dtype=self.scheme.zero_dtype),
                self.scheme,
                in_features,
                torch.empty(in_features, dtype=torch.int32) if self.ordered else None,
            )


def quantization_config(weights: Mapping[str, Entry]) -> dict[str, Any]:
    """What a model's config.json says of weights stored as above: {name of each: its entry}."""
    entries = {name: entry.json() for name, entry in weights.items()}
    return {"quant_method": "qkernels", "version": VERSION, "weights": entries}


def read_entry(path: object, name: str, entry: Any) -> Entry:
    """An entry, if that is what it is; else FormatError, which begins with the path."""
    if not isinstance(entry, dict) or set(entry) - {"ordered"} != {"scheme", "shape"}:
        raise FormatError(f"{path}: {name}: metadata must hold 'scheme' and 'shape', got {entry!r:.100}")
    try:
        scheme = Scheme.parse(entry["scheme"])
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {name}: {error}") from None
    shape = entry["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 <= size <= LARGEST_IN_FEATURES for size in shape)
    ):
        raise FormatError(
            f"{path}: {name}: shape must be two sizes from 0 to {LARGEST_IN_FEATURES}, got {shape!r:.100}"
        )
    ordered = entry.get("ordered", False)
    if not isinstance(ordered, bool):
        raise FormatError(f"{path}: {name}: 'ordered' must be true or false, got {ordered!r:.100}")
    return Entry(scheme, (shape[0], shape[1]), ordered)


def _read_weight(path: Path, file: Any, name: str, entry: Entry) -> QTensor:
    scheme, shape = entry.scheme, entry.shape
    packed, scale = file.get_tensor(name), file.get_tensor(f"{name}_scale")
    zero = None if scheme.zero_dtype is None else file.get_tensor(f"{name}_zero")
    order = file.get_tensor(f"{name}_order") if entry.ordered else None
    try:
        weight = QTensor(packed, scale, zero, scheme, shape[1], order)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {name}: {error}") from None
    if weight.shape != shape:
        raise FormatError(f"{path}: {name}: metadata says {shape[0]} rows, the packed tensor has {weight.shape[0]}")
    if not torch.isfinite(scale).all():
        raise FormatError(f"{path}: {name}_scale holds NaN or infinity")
    if zero is None or not zero.numel():
        return weight
    if not torch.isfinite(zero).all():
        raise FormatError(f"{path}: {name}_zero holds NaN or infinity")
    return weight
