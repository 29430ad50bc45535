"""The native file: safetensors, with the schemes in its metadata. Nothing in it is ever executed or unpickled.

A quantized weight called NAME is stored as the tensors NAME (packed, int32), NAME_scale, unless its scheme is symmetric
NAME_zero, NAME_order where its columns have an order of their own, and NAME_activation (float32: scale and zero of all
inputs) where its scheme has static activations: the names that QuantLinear gives its parameters.
Everything else is stored as it is. Metadata:

    "format"            "pt"
    "qkernels_version"  "1"
    "qkernels"          JSON: {"weights": {NAME: {"scheme": "w4g128", "shape": [N, K]}}, "aliases": {NAME: OTHER NAME}}

and, in the entry of a weight with an order, "ordered": true.

Aliases are tensors that share memory, such as an output layer tied to the embedding; they are stored once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import LARGEST_IN_FEATURES
from qkernels.files import replacing
from qkernels.formats import reader as readers
from qkernels.packing import packed_words
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

VERSION = "1"
SUFFIXES = ("", "_scale", "_zero", "_order", "_activation")  # of the tensors of a weight
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
    weights: dict[str, Entry] = {}
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
        known = (memory, str(tensor.scheme) if isinstance(tensor, QTensor) else None)  # one may quantize its inputs
        if known in seen:
            aliases[name] = seen[known]
            continue
        seen[known] = name
        for suffix, part in parts.items():
            stored[name + suffix] = _own_memory(part, taken)
        if isinstance(tensor, QTensor):
            weights[name] = Entry.of(tensor)
    for name, entry in weights.items():
        if stray := entry.stray(name, stored):
            raise ValueError(
                f"{stray!r} would be taken for a part of {name!r}, a {entry.scheme} weight, which has none"
            )

    metadata = {
        "format": "pt",
        "qkernels_version": VERSION,
        "qkernels": json.dumps(
            {"weights": {name: entry.as_json() for name, entry in weights.items()}, "aliases": aliases}
        ),
    }
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def parts_of(weight: QTensor) -> dict[str, Tensor]:
    """{what is added to a weight's name: tensor} of what is stored of it."""
    own = zip(SUFFIXES, (weight.packed, weight.scale, weight.zero, weight.order, weight.activation), strict=True)
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
    return dict(stream(path, device))


def stream(path: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor | QTensor]]:
    """What `read` gives, one tensor at a time; an alias, the same object, comes right after its tensor.

    Everything is checked before the first is given: a file is refused as a whole.
    """
    torch.device(device)  # RuntimeError for what is none
    with _opened(path, "cpu") as file:  # which maps the file: codes are not read to check what belongs to them
        said = _read_header(path, file.metadata(), set(file.keys()))
        for name, entry in said.weights.items():
            _read_weight(path, file, name, entry)
    with _opened(path, str(device)) as file:
        for name, others in said.given.items():
            tensor = (
                _read_weight(path, file, name, said.weights[name]) if name in said.weights else file.get_tensor(name)
            )
            yield name, tensor
            for other in others:
                yield other, tensor
            del tensor  # before the next is there


@contextlib.contextmanager
def _opened(path: Path, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # OSError rather than a message of safetensors'
        pass
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from None


def is_native(path: Path) -> bool:
    """Whether a file's metadata says that it is one of ours; OSError if it cannot be read."""
    try:
        with _opened(path, "cpu") as file:
            return "qkernels" in (file.metadata() or {})
    except FormatError:
        return False


def header(path: Path) -> Header:
    """What a native file says of itself; raises FormatError and OSError like `read`, but reads no tensor."""
    with _opened(path, "cpu") as file:
        return _read_header(path, file.metadata(), set(file.keys()))


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the metadata says of a weight."""

    scheme: Scheme
    shape: tuple[int, int]
    ordered: bool = False

    @staticmethod
    def of(weight: QTensor) -> Entry:
        """That of a weight."""
        rows, in_features = weight.shape
        return Entry(weight.scheme, (rows, in_features), weight.order is not None)

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        written: dict[str, Any] = {"scheme": str(self.scheme), "shape": list(self.shape)}
        return {**written, "ordered": True} if self.ordered else written

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
                torch.empty(2, dtype=torch.float32) if self.scheme.is_static else None,
            )

    def parts(self, name: str) -> set[str]:
        """Names of the tensors that are the weight."""
        found = {name, f"{name}_scale"}
        for suffix, there in (
            ("_zero", self.scheme.zero_dtype is not None),
            ("_order", self.ordered),
            ("_activation", self.scheme.is_static),
        ):
            if there:
                found.add(f"{name}{suffix}")
        return found

    def stray(self, name: str, others: Container[str]) -> str | None:
        """A tensor among others that has the name of a part which this weight does not have."""
        missing = {f"{name}_zero", f"{name}_activation"} - self.parts(name)
        return next((part for part in sorted(missing) if part in others), None)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a native file says that it holds.

    Attributes:
        stored: names of the tensors in the file.
        weights: the quantized ones among what it gives.
        aliases: {another name: the name of what is given}.
    """

    stored: frozenset[str]
    weights: Mapping[str, Entry]
    aliases: Mapping[str, str]

    @property
    def given(self) -> dict[str, list[str]]:
        """{name: its aliases} of everything that the file gives, in that order."""
        parts = {part for name, entry in self.weights.items() for part in entry.parts(name)}
        given: dict[str, list[str]] = {name: [] for name in [*self.weights, *sorted(self.stored - parts)]}
        for alias, name in self.aliases.items():
            given[name].append(alias)
        return given


def quantization_config(weights: Mapping[str, Entry]) -> dict[str, Any]:
    """What config.json of a folder of native files holds as quantization_config: the entries of all files."""
    entries = {name: entry.as_json() for name, entry in weights.items()}
    return {"quant_method": "qkernels", "version": VERSION, "weights": entries}


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> readers.Reader:
    """Reads the same tensors from a file without this metadata, where quantization_config has the entries instead."""
    readers.field(config, "version", (VERSION,))
    entries = config.get("weights")
    if not isinstance(entries, dict):
        raise ValueError(f"quantization_config's weights must be an object, got {type(entries).__name__}")
    weights = {name: parse_entry(name, entry) for name, entry in entries.items()}

    def decode(module: str, parts: Mapping[str, Tensor]) -> QTensor:
        name = f"{module}.weight" if module else "weight"
        if name not in weights:
            raise ValueError("quantization_config's weights do not have it")
        suffixes = {key.removeprefix(name) for key in weights[name].parts(name)}
        if found := parts.keys() - {f"weight{suffix}" for suffix in suffixes}:
            raise ValueError(f"a {weights[name].scheme} weight has no {min(found)}")
        return _weight(name, {suffix: readers.part(parts, f"weight{suffix}") for suffix in suffixes}, weights[name])

    return readers.Reader("weight_scale", ("weight", "weight_zero", "weight_order", "weight_activation"), decode)


def _read_header(path: Path, metadata: dict[str, str] | None, names: set[str]) -> Header:
    """Schemes and shapes of the quantized weights, and aliases, each checked against the tensors that are there."""
    if not metadata or "qkernels" not in metadata:
        raise FormatError(f"{path}: not a qkernels file: its metadata has no 'qkernels' entry")
    if metadata.get("qkernels_version") != VERSION:
        found = metadata.get("qkernels_version")
        raise FormatError(f"{path}: qkernels_version must be {VERSION!r}, got {found!r}")
    try:
        said = json.loads(metadata["qkernels"])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata 'qkernels' is not JSON: {error}") from None
    if not isinstance(said, dict) or set(said) != {"weights", "aliases"}:
        raise FormatError(f"{path}: metadata 'qkernels' must hold 'weights' and 'aliases'")
    if not isinstance(said["weights"], dict) or not isinstance(said["aliases"], dict):
        raise FormatError(f"{path}: 'weights' and 'aliases' must be objects")

    weights: dict[str, Entry] = {}
    claimed: set[str] = set()
    for name, value in said["weights"].items():
        try:
            entry = parse_entry(name, value)
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None
        parts = entry.parts(name)
        if missing := parts - names:
            raise FormatError(f"{path}: {name}: the file has no tensor {min(missing)!r}")
        if stray := entry.stray(name, names):
            what = "zeros" if stray.endswith("_zero") else "static activations"
            raise FormatError(f"{path}: {name}: a {entry.scheme} weight has no {what}, but the file has {stray}")
        if shared := parts & claimed:
            raise FormatError(f"{path}: {min(shared)} belongs to two weights")
        claimed |= parts
        weights[name] = entry
    for name, target in said["aliases"].items():
        known = isinstance(target, str) and (target in weights or target in names - claimed)
        if name in names or not known:
            raise FormatError(f"{path}: alias {name!r} must be a new name for a tensor in the file, got {target!r}")
    return Header(frozenset(names), weights, said["aliases"])


def parse_entry(name: str, entry: Any) -> Entry:
    """An entry of a weight, if it is one; else ValueError, which begins with the name."""
    if not isinstance(entry, dict) or set(entry) - {"ordered"} != {"scheme", "shape"}:
        raise ValueError(f"{name}: metadata must hold 'scheme' and 'shape', got {entry!r:.100}")
    try:
        scheme = Scheme.parse(entry["scheme"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    shape = entry["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 <= size <= LARGEST_IN_FEATURES for size in shape)
    ):
        raise ValueError(f"{name}: shape must be two sizes from 0 to {LARGEST_IN_FEATURES}, got {shape!r:.100}")
    ordered = entry.get("ordered", False)
    if not isinstance(ordered, bool):
        raise ValueError(f"{name}: 'ordered' must be true or false, got {ordered!r:.100}")
    return Entry(scheme, (shape[0], shape[1]), ordered)


def _read_weight(path: Path, file: Any, name: str, entry: Entry) -> QTensor:
    try:
        return _weight(name, {key.removeprefix(name): file.get_tensor(key) for key in entry.parts(name)}, entry)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {name}: {error}") from None


def _weight(name: str, parts: Mapping[str, Tensor], entry: Entry) -> QTensor:
    """The weight whose tensors are called NAME + suffix."""
    packed, scale, zero, order, activation = (parts.get(suffix) for suffix in SUFFIXES)
    assert packed is not None
    assert scale is not None
    weight = QTensor(packed, scale, zero, entry.scheme, entry.shape[1], order, activation)
    if weight.shape != entry.shape:
        raise ValueError(f"metadata says {entry.shape[0]} rows, the packed tensor has {weight.shape[0]}")
    for what, values in (("scale", scale), ("zero", zero)):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(f"{name}_{what} holds NaN or infinity")
    return weight
