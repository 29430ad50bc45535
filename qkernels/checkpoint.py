"""Save models and named tensors to a file, and load them: what formats/native.py stores, put into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import formats
from qkernels.formats import native
from qkernels.formats.native import FormatError, Path
from qkernels.merge import merge_siblings
from qkernels.nn import QuantModule
from qkernels.pretrained import describe
from qkernels.replace import Slot, places, slot, tie, weight_shape
from qkernels.siblings import MergedLinear
from qkernels.tensor import QTensor


def save(source: nn.Module | Mapping[str, Tensor | QTensor], path: Path) -> None:
    """Write a model, or named tensors, to one safetensors file with the schemes in its metadata.

    The file appears whole or not at all. Layout: formats/native.py.

    Args:
        source: a module (its parameters and persistent buffers; quantized layers as quantized weights) or a mapping.
        path: of the file.

    Raises:
        TypeError, ValueError: source is neither, or holds only a process's part of a layer.
        OSError: the file cannot be written.
    """
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(f"source must be a module or a mapping of names to tensors, got {type(source).__name__}")
    if not isinstance(source, nn.Module):
        native.write(path, source)
        return
    tensors: dict[str, Tensor | QTensor] = dict(source.state_dict(keep_vars=False))
    for name, layer in _quantized_weights(source).items():
        if layer.is_part:
            raise ValueError(f"{name} is a part of a weight, of one of several processes: save_pretrained gathers them")
        for suffix in native.parts_of(layer.qweight):
            tensors.pop(name + suffix, None)
        tensors[name] = layer.qweight
    native.write(path, tensors)


def load(path: Path, model: nn.Module | None = None, device: torch.device | str = "cpu") -> Any:
    """The tensors of a checkpoint, or the model that they were put into: as qkernels.load says."""
    if model is not None and weight_shape(model) is not None:
        raise TypeError(
            "model is itself a linear layer or an embedding; QuantLinear(qkernels.load(path)['weight']) makes one"
        )
    if model is not None:
        _check_buffers(model)
    tensors = formats.read(path, device if model is None else "cpu")
    if model is None:
        return tensors
    quantized = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    where = places(model)
    ties = _ties(model)
    layers = _check_fits_model(path, model, quantized, plain, ties)
    merged = {found.module.shared.names for found in layers if isinstance(found.module, MergedLinear)}
    made: dict[int, QuantModule] = {}  # by weight, which a tied output layer shares with an embedding
    for found, tensor in layers.items():
        old = found.old
        layer = found.put(tensor.to("cpu" if old.is_meta else old.device), where.get(found.module, ()))
        tie(layer, made.setdefault(id(tensor), layer))
    on_meta = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.load_state_dict(plain, strict=False, assign=on_meta)
    _tie_again(model, ties, tensors)
    if merged:
        merge_siblings(model, sorted(merged))
    describe(model)
    return model


def _check_buffers(model: nn.Module) -> None:
    """Raise ValueError for buffers that no file holds and that have no values yet."""
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in stored:
            raise ValueError(f"{name} of the model is on the meta device and is not stored in files: make it on cpu")


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, each group of at least two."""
    groups: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _tie_again(model: nn.Module, ties: Sequence[Sequence[str]], tensors: Mapping[str, Tensor | QTensor]) -> None:
    """Make one parameter of names that were one, unless the file has something else under one of them."""
    for group in ties:
        first = next((name for name in group if isinstance(tensors.get(name), Tensor)), None)
        for name in group:
            if first is not None and name != first and tensors.get(name, tensors[first]) is tensors[first]:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, model.get_parameter(first))


def _quantized_weights(model: nn.Module) -> dict[str, QuantModule]:
    """{name of the packed parameter: layer}, under every name that a layer has."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantModule)
    }


def _with_tied(
    model: nn.Module, quantized: Mapping[str, QTensor], plain: Mapping[str, Tensor], ties: Sequence[Sequence[str]]
) -> dict[str, QTensor]:
    """The quantized weights, also under names that are tied to theirs in the model and that the file leaves out."""
    found = dict(quantized)
    for group in ties:
        first = next((name for name in group if name in quantized), None)
        for name in group:
            if first is not None and name not in found and name not in plain and slot(model, name) is not None:
                found[name] = quantized[first]
    return found


def _check_fits_model(
    path: Path,
    model: nn.Module,
    quantized: Mapping[str, QTensor],
    plain: Mapping[str, Tensor],
    ties: Sequence[Sequence[str]],
) -> dict[Slot, QTensor]:
    """{where a weight goes: the weight}, if the file holds just what the model wants."""
    wanted = dict(model.state_dict())
    layers = {}
    for name, tensor in _with_tied(model, quantized, plain, ties).items():
        found = slot(model, name)
        if found is None:
            raise FormatError(f"{path}: {name} is quantized, but the model has no layer for it of that name")
        if found.shape != tensor.shape:
            raise FormatError(f"{path}: {name} is {tuple(tensor.shape)}, but the model's layer is {found.shape}")
        if why_not := found.why_not(tensor.scheme, tensor.order is not None):
            raise FormatError(f"{path}: {name} {why_not}")
        layers[found] = tensor
        wanted.pop(found.float_name, None)
        for suffix in native.SUFFIXES:
            wanted.pop(name + suffix, None)
    if unexpected := plain.keys() - wanted.keys():
        raise FormatError(f"{path}: {min(unexpected)} is not in the model ({len(unexpected)} such tensors)")
    tied = {name for group in ties if any(name in plain for name in group) for name in group}
    if missing := wanted.keys() - plain.keys() - tied:
        raise FormatError(f"{path}: {min(missing)}, which the model wants, is missing ({len(missing)} such tensors)")
    for name, value in plain.items():
        if value.shape != wanted[name].shape:
            raise FormatError(f"{path}: {name} is {tuple(value.shape)}, but the model's is {tuple(wanted[name].shape)}")
    return layers
