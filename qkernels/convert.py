"""Checkpoints of other packages as native ones: nothing is quantized again, codes and scales only move.

A folder becomes a folder: native files, each readable by itself, of at most so many bytes; where there are several, an
index of the tensors stored in them; config.json with our quantization_config; and the other files, a tokenizer's or a
licence, but for weights, pickles, hidden files and old configurations. A file becomes a native file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from qkernels import formats
from qkernels.formats import layout, native
from qkernels.formats.folder import Checkpoint
from qkernels.formats.native import FormatError, Path
from qkernels.tensor import QTensor

SHARD_BYTES = 2 * 10**9
LARGEST_COPY = 2**27  # bytes of a file that is copied
# Files of weights, and of states of training: whatever is in them is in the tensors, or of no use to them.
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin.index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".npz", ".npy", ".tflite", ".ot", ".mlmodel", ".pte", ".nemo", *layout.PICKLES,
)  # fmt: skip
_PICKLED = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\3\4")  # bare, and in torch's archives


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` did.

    Attributes:
        tensors: how many there are, by name.
        quantized: how many of them are quantized weights.
        bytes_before, bytes_after: of the files with tensors, on disk.
        left: other files of a folder that were not copied, because they are large or hold pickles.
    """

    tensors: int
    quantized: int
    bytes_before: int
    bytes_after: int
    left: tuple[str, ...] = ()


def convert(source: Path, target: Path, max_shard_bytes: int = SHARD_BYTES, progress: bool = True) -> Converted:
    """Write a checkpoint as a native one, which appears whole or not at all.

    Args:
        source: a folder in Hugging Face's layout, or a file, GGUF or safetensors; whatever `formats.stream` reads.
        target: of a folder a folder, which does not exist or is empty; of a file a file.
        max_shard_bytes: of the tensors in a file of a folder; a larger tensor has a file of its own. So much is in
            memory at once. A file is in memory as a whole.
        progress: whether to show a progress bar.

    Raises:
        FormatError: what `formats.stream` raises, or two tensors would be stored under one name.
        ValueError: no weight of source is quantized, or target is, or is in, source.
        OSError: a file cannot be read or written.
    """
    source, target = pathlib.Path(source), pathlib.Path(os.path.realpath(target))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if source.is_dir():
        return _folder(source, target, max_shard_bytes, progress)
    native.check_writable(target)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input itself: choose another name")
    before = source.stat().st_size
    tensors = dict(_shown(formats.stream(source), None, progress))
    quantized = sum(isinstance(tensor, QTensor) for tensor in tensors.values())
    if not quantized:
        raise _nothing_quantized(source)
    _write(target, tensors)
    return Converted(len(tensors), quantized, before, target.stat().st_size)


def _folder(source: pathlib.Path, target: pathlib.Path, max_shard_bytes: int, progress: bool) -> Converted:
    _check_new(source, target)
    checkpoint = Checkpoint(source)
    if not checkpoint.quantized:
        raise _nothing_quantized(source)
    others, left = _others(source)
    with _new_folder(target) as folder:
        stream = _shown(checkpoint.tensors(), len(checkpoint.names), progress)
        headers = _write_shards(folder, stream, max_shard_bytes)
        weights = {name: entry for header in headers.values() for name, entry in header.weights.items()}
        _write_config(folder, checkpoint, native.quantization_config(weights))
        for path in others:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        after = sum((folder / name).stat().st_size for name in headers)
    before = sum(path.stat().st_size for path in checkpoint.files)
    return Converted(len(checkpoint.names), len(checkpoint.quantized), before, after, tuple(left))


def _nothing_quantized(source: pathlib.Path) -> ValueError:
    return ValueError(f"{source} holds no quantized weights to convert; `qkernels quantize` quantizes weights")


def _shown(
    stream: Iterator[tuple[str, Tensor | QTensor]], total: int | None, progress: bool
) -> Iterator[tuple[str, Tensor | QTensor]]:
    """The same stream, with a progress bar."""
    from tqdm import tqdm

    return iter(tqdm(stream, total=total, desc="converting", unit="tensor", leave=False, disable=not progress))


def _write(path: pathlib.Path, tensors: dict[str, Any]) -> None:
    try:
        native.write(path, tensors)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path.name}: {error}") from None


def _check_new(source: pathlib.Path, target: pathlib.Path) -> None:
    """Raise ValueError or OSError unless a folder can be made there, apart from the source."""
    if source.resolve() in [target, *target.parents]:
        raise ValueError(f"{target} is in the input itself: choose another place")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: a folder becomes a folder")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")


@contextlib.contextmanager
def _new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, beside the target: it takes its place at the end, and is gone after an error."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()  # raises where it has filled meanwhile
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    folder: pathlib.Path, stream: Iterator[tuple[str, Tensor | QTensor]], max_shard_bytes: int
) -> dict[str, native.Header]:
    """{name of a file: what it says of itself}; with an index if there are several."""
    written: list[native.Header] = []
    shard: dict[str, Tensor | QTensor] = {}
    size = total = 0

    def write() -> None:
        path = folder / f"{len(written)}.safetensors"
        _write(path, shard)
        written.append(native.header(path))
        shard.clear()

    for name, tensor in stream:
        more = 0 if any(tensor is other for other in shard.values()) else tensor.nbytes  # an alias is not stored again
        if shard and more and size + more > max_shard_bytes:
            write()
            size = 0
        shard[name] = tensor
        size, total = size + more, total + more
    write()
    count = len(written)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    headers = dict(zip(names, written, strict=True))
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": _places(headers)}
        _write_json(folder / "model.safetensors.index.json", index)
    return headers


def _places(headers: Mapping[str, native.Header]) -> dict[str, str]:
    """{name of a stored tensor: its file}."""
    places: dict[str, str] = {}
    for file, header in headers.items():
        for name in sorted(header.stored):
            if name in places:
                raise FormatError(f"two tensors would be stored as {name!r}")
            places[name] = file
    return places


def _write_config(folder: pathlib.Path, checkpoint: Checkpoint, quantization: dict[str, Any]) -> None:
    """config.json as it was, but for how weights are quantized."""
    config = {**checkpoint.config, "quantization_config": quantization}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    try:
        _write_json(folder / "config.json", config)
    except RecursionError:
        raise FormatError(f"{checkpoint.folder / 'config.json'} is nested too deeply") from None


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _others(source: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """The files of a folder, and of folders in it, that are copied; and the names of those that are left."""
    copied, left = [], []
    for where, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = pathlib.Path(where).relative_to(source)
        for name in sorted(files):
            if name.startswith(".") or name.lower().endswith(WEIGHTS) or name in layout.OLD_CONFIGS:
                continue
            path = layout.member(source, str(inside / name))
            if path is None or inside / name == pathlib.Path("config.json"):
                continue
            with open(path, "rb") as file:
                pickled = file.read(4).startswith(_PICKLED)
            if pickled or path.stat().st_size > LARGEST_COPY:
                left.append(str(inside / name))
            else:
                copied.append(path)
    return copied, left
