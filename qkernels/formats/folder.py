"""Checkpoints of other packages, and of this one: a folder or a safetensors file, read one weight at a time.

A module M that has the tensor M.<marker> of the format that config.json names gives one QTensor, M.weight; its other
parts may lie in other files of the folder. All other tensors are given as they are. A file whose metadata says that it
is a native one is read as such, whatever config.json says.

Before the first tensor is given, names are checked: all of the index are there, none is in two files, and none is given
twice. Nothing in a file is executed or unpickled, and names of files lead to no others than those of the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkernels.formats import layout, native
from qkernels.formats.native import FormatError, Path
from qkernels.formats.reader import Reader
from qkernels.tensor import QTensor

# quant_method -> the module whose reader(quantization_config, metadata) reads it
READERS = {
    "awq": "qkernels.formats.awq",
    "bitsandbytes": "qkernels.formats.bitsandbytes",
    "compressed-tensors": "qkernels.formats.compressed_tensors",
    "gptq": "qkernels.formats.gptq",
    "hqq": "qkernels.formats.hqq",
    "qkernels": "qkernels.formats.native",
    "torchao": "qkernels.formats.torchao",
}
_OPEN_FILES = 4  # at once
AnyTensor = TypeVar("AnyTensor", Tensor, QTensor)


@dataclasses.dataclass(frozen=True)
class _Module:
    """A quantized weight of another format: the module's name, and {part: the tensor's name}."""

    name: str
    parts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A safetensors file and what it holds; header is that of a native one."""

    path: pathlib.Path
    stored: frozenset[str]
    metadata: Mapping[str, str]
    header: native.Header | None


class Checkpoint:
    """A folder in Hugging Face's layout (see formats/layout.py), or one safetensors file.

    Beside a file config.json is looked for, too, unless it is a native one, which needs none.

    Attributes:
        config: what config.json holds; {} if there is none.
        quantization: how weights are quantized, as the configuration says; None where it does not.
        files: those with tensors.
        names: of what `tensors` gives, in that order.
        quantized: those of them that are QTensors.

    Raises:
        FormatError: a file is damaged, hostile or not what it should be, or the format is none of READERS.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path):
        given = pathlib.Path(path)
        alone = not given.is_dir()
        self.folder = given.parent if alone else given
        shards: dict[pathlib.Path, frozenset[str]] = {given: frozenset()} if alone else layout.find_shards(self.folder)
        self.files: Sequence[pathlib.Path] = tuple(shards)
        self._shards = [_open_shard(path, named) for path, named in shards.items()]
        self.config: dict[str, Any] = {}
        self.quantization: dict[str, Any] | None = None
        self._said_by = self.folder
        if not alone or self._shards[0].header is None:
            self.config = layout.read_config(self.folder)
            self._said_by, self.quantization = layout.quantization_of(self.folder, self.config)
        self._places: dict[str, pathlib.Path] = {}
        for shard in self._shards:
            for name in shard.stored:
                if (other := self._places.setdefault(name, shard.path)) != shard.path:
                    raise FormatError(f"{shard.path}: {name!r:.100} is in {other.name}, too")
        self._reader = self._make_reader()
        self._given = self._plan()
        self.names: Sequence[str] = tuple(name for given in self._given.values() for name in given)
        self.quantized = frozenset(
            name for given in self._given.values() for name, what in given.items() if isinstance(what, _Module)
        )
        if not alone and self._reader is not None and self.quantization is not None:
            self._check_all_are_there(self.quantization)

    def _check_all_are_there(self, quantization: Mapping[str, Any]) -> None:
        """Our own configuration names the weights: raise FormatError for one that the tensors are not there of."""
        if quantization.get("quant_method") != "qkernels":
            return
        if missing := quantization["weights"].keys() - self.quantized:
            raise FormatError(f"{self._said_by} names the weight {min(missing)!r:.100}, but no file has its scales")

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor | QTensor]]:
        """Every tensor with its name, quantized weights as QTensors; none is held once the next is asked for.

        Raises:
            FormatError: a quantized weight is not what its format and configuration say.
        """
        device = torch.device(device)
        opened = functools.lru_cache(maxsize=_OPEN_FILES)(_open)
        for shard in self._shards:
            if shard.header is not None:
                yield from native.stream(shard.path, device)
                continue
            for name, what in self._given[shard.path].items():
                if isinstance(what, str):
                    yield name, _on(device, _read(opened, shard.path, what))
                else:
                    yield name, _on(device, self._decoded(opened, shard.path, what))

    def _make_reader(self) -> Reader | None:
        """That of the format; None where there is nothing that is not plain or native."""
        metadata: dict[str, str] = {}
        foreign = [shard for shard in self._shards if shard.header is None]
        for shard in foreign:
            metadata = {**shard.metadata, **metadata}
        if self.quantization is None or not foreign:
            return None
        method = self.quantization.get("quant_method")
        if method is None and any(self.quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8)):
            method = "bitsandbytes"  # as it was written before there were others
        if not isinstance(method, str) or method not in READERS:
            accepted = ", ".join(READERS)
            raise FormatError(f"{self._said_by}: quant_method must be one of {accepted}, got {method!r:.100}")
        make = importlib.import_module(READERS[method]).reader
        try:
            reader: Reader = make(self.quantization, metadata)
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{self._said_by}: {error}") from None
        return reader

    def _plan(self) -> dict[pathlib.Path, dict[str, _Module | str]]:
        """{file: {name that is given: the module whose weight it is, or the name of the tensor in the file}}."""
        modules = {} if self._reader is None else self._modules(self._reader)
        parts = {part for module in modules.values() for part in module.parts.values()}
        suffix = "" if self._reader is None else self._reader.suffix
        plan: dict[pathlib.Path, dict[str, _Module | str]] = {}
        taken: set[str] = set()
        for shard in self._shards:
            given: list[tuple[str, _Module | str]] = []
            if shard.header is not None:
                given += _native_names(shard.header)
            else:
                for name in sorted(shard.stored):
                    if name in modules:
                        given.append((_join(modules[name].name, "weight"), modules[name]))
                    elif name not in parts:
                        given.append((name.removesuffix(suffix), name))
            for name, _ in given:
                if name in taken:
                    raise FormatError(f"{shard.path}: {name!r:.100} would be given twice, quantized or plain")
                taken.add(name)
            plan[shard.path] = dict(given)
        return plan

    def _modules(self, reader: Reader) -> dict[str, _Module]:
        """{name of the marker: its module} of all files that are not native."""
        stored = {name: shard.path for shard in self._shards if shard.header is None for name in shard.stored}
        modules: dict[str, _Module] = {}
        owners: dict[str, str] = {}
        for marker in sorted(stored):
            if marker != reader.marker and not marker.endswith(f".{reader.marker}"):
                continue
            module = marker[: -len(reader.marker)].removesuffix(".")
            names = {part: _join(module, part) for part in (reader.marker, *reader.parts)}
            parts = {part: name for part, name in names.items() if name in stored}
            for name in parts.values():
                if owners.setdefault(name, module) != module:
                    raise FormatError(f"{stored[name]}: {name!r:.100} belongs to two modules")
            modules[marker] = _Module(module, parts)
        return modules

    def _decoded(self, opened: Any, path: pathlib.Path, module: _Module) -> QTensor:
        assert self._reader is not None
        parts = {part: _read(opened, self._places[name], name) for part, name in module.parts.items()}
        try:
            return self._reader.decode(module.name, parts)
        except (ValueError, TypeError, RuntimeError) as error:
            raise FormatError(f"{path}: {_join(module.name, 'weight')}: {error}") from None


def _native_names(header: native.Header) -> Iterator[tuple[str, _Module | str]]:
    """What a native file gives; it is read by itself, so that parts are not asked for."""
    for name, others in header.given.items():
        for each in (name, *others):
            yield each, _Module(each, {}) if name in header.weights else each


def _on(device: torch.device, tensor: AnyTensor) -> AnyTensor:
    """On a device; QTensor.to would check again even what stays where it is."""
    return tensor if tensor.device == device else tensor.to(device)


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def _open_shard(path: pathlib.Path, named: frozenset[str]) -> _Shard:
    """A file, if it has the tensors that an index says it has."""
    file = _open(path)
    stored, metadata = frozenset(file.keys()), file.metadata() or {}
    if missing := named - stored:
        raise FormatError(f"{path}: it has no tensor {min(missing)!r:.100}, which the index says it has")
    return _Shard(path, stored, metadata, native.header(path) if "qkernels" in metadata else None)


def _open(path: pathlib.Path) -> Any:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # OSError rather than a message of safetensors'
        pass
    try:
        return safe_open(path, framework="pt").__enter__()  # closed when it is forgotten
    except SafetensorError as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from None


def _read(opened: Any, path: pathlib.Path, name: str) -> Tensor:
    from safetensors import SafetensorError

    try:
        return opened(path).get_tensor(name)
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:  # dtypes that torch lacks
        raise FormatError(f"{path}: {name!r} cannot be read: {error}") from None
