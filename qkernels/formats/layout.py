"""Which files of a checkpoint's folder are read: Hugging Face's layout, and what packages wrote before there was one.

    config.json                     the model; as quantization_config, perhaps under text_config, how it is quantized
    quantize_config.json            the latter, of older GPTQ checkpoints; quant_config.json of older AWQ ones
    model.safetensors               the tensors; or the one *.safetensors file that there is;
    model.safetensors.index.json    or files that this names: {"weight_map": {tensor: file}}

Links may point to files of the same folder, and, in Hugging Face's cache, to its blobs; to others, files of the user's
that no checkpoint has to do with, they may not.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qkernels.formats.native import FormatError

LARGEST_JSON = 2**27  # bytes; the largest indexes have some ten million
OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # what they mean where they do not say it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def member(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file of this name, plain or with folders before it; None where there is none.

    Raises:
        FormatError: it is a link out of the folder.
    """
    path = folder / name
    if not path.is_file():  # nor a pipe or a device, reading which may never end
        return None
    root, real = folder.resolve(), path.resolve()
    if real.is_relative_to(root):
        return path
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    if snapshots is not None and real.is_relative_to(snapshots.parent / "blobs"):
        return path
    raise FormatError(f"{path} is a link out of its folder, to {real}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise FormatError(f"{path} has {size} bytes; at most {LARGEST_JSON} are read")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json; {} if there is none."""
    path = member(folder, "config.json")
    return {} if path is None else read_json(path)


def quantization_of(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[pathlib.Path, dict[str, Any] | None]:
    """(the file that says how the folder's weights are quantized, what it says; None where nothing says it)."""
    path = folder / "config.json"
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, dict) else {}):
        found = fields.get("quantization_config")
        if found is not None and not isinstance(found, dict):
            raise FormatError(f"{path}: quantization_config must be an object, got {type(found).__name__}")
        if found is not None:
            return path, found
    for name, method in OLD_CONFIGS.items():
        old = member(folder, name)
        if old is not None:
            found = read_json(old)
            return old, {**found, "quant_method": method} if found.get("quant_method") is None else found
    return path, None


def find_shards(folder: pathlib.Path) -> dict[pathlib.Path, frozenset[str]]:
    """{file with tensors: names that an index says are in it}, as the folder has them.

    Raises:
        FormatError: it has none, or several and no index, or the index is none, names other things than files of the
            folder, or files that are not there.
    """
    if (path := member(folder, "model.safetensors")) is not None:
        return {path: frozenset()}
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    standard = "model.safetensors.index.json"
    indexes = [standard] if standard in names else [n for n in names if n.endswith(".safetensors.index.json")]
    if len(indexes) == 1 and (index := member(folder, indexes[0])) is not None:
        return _indexed(folder, index)
    files = [path for name in names if name.endswith(".safetensors") and (path := member(folder, name)) is not None]
    if len(files) == 1:
        return {files[0]: frozenset()}
    if files:
        some = ", ".join(path.name for path in files[:3])
        raise FormatError(f"{folder} holds {len(files)} safetensors files ({some}, ...) and no index: name one of them")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise FormatError(f"{folder} holds only pickles ({pickles[0]}), which are never read: convert to safetensors")
    if others := [name for name in names if name.endswith(".gguf")]:
        raise FormatError(f"{folder} holds no safetensors file; a GGUF file ({others[0]}) is read by its own path")
    raise FormatError(f"{folder} holds no safetensors file")


def _indexed(folder: pathlib.Path, index: pathlib.Path) -> dict[pathlib.Path, frozenset[str]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index}: must hold a 'weight_map' that names tensors")
    named: dict[str, set[str]] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise FormatError(
                f"{index}: {tensor!r:.100}: must name a .safetensors file in the folder, got {name!r:.100}"
            )
        named.setdefault(name, set()).add(tensor)
    shards = {}
    for name in sorted(named):
        if (path := member(folder, name)) is None:
            raise FormatError(f"{index} names {name!r:.100}, which is not there")
        shards[path] = frozenset(named[name])
    return shards


def _is_plain(name: str) -> bool:
    """Whether this is the name of a file in a folder, and nothing else, on any system."""
    return name.endswith(".safetensors") and not any(c in name for c in "/\\:\0") and len(name) <= 255
