"""A GGUF file as what a transformers model needs: its configuration, and its tensors under the model's names.

Names, and what happens to a tensor on its way into a model (llama's query and key rows are put back in order, gemma's
norms lose one, ...), are transformers' own: no table of architectures here. What it does to a quantized weight is found
out by doing it to row numbers and to column numbers. Where that only moves whole rows or whole columns, so do the
codes, and nothing is quantized again; where it does more, the tensor is refused.

transformers has two ways, told apart here by what it has: processors of numpy arrays, for most architectures; and, from
5.17 on, conversions of tensors for a few.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from qkernels.checks import DTYPES
from qkernels.formats import gguf
from qkernels.formats.native import FormatError, Path
from qkernels.tensor import QTensor

# GGUF name, tensor, where results go under the model's names (a model may lack the tensor: then none does).
_Convert = Callable[[str, Tensor, MutableMapping[str, Tensor]], None]
_LAYERS = {"num_hidden_layers", "num_layers", "n_layer"}  # their number, in configurations


def model_state(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor | QTensor]]:
    """(transformers' configuration, {parameter's name: tensor}) of the model in a GGUF file.

    Tensors that the file quantizes are QTensors, embeddings too; dequantized they are, bit for bit, what transformers
    loads in float32. A QTensor is always (N, K); the parameter of transformers' Conv1D, as in GPT-2, is (K, N). An
    output layer that the file does not hold is tied to the embedding, and is not among the tensors. Tensors that the
    model has no place for are left out.

    Args:
        path: of the file.
        dtype: of the tensors that are not quantized.

    Raises:
        FormatError: the file is damaged or hostile; or transformers knows no such model; or a quantized tensor would
            not stay whole, or is of a type that is not read; or a parameter is missing or has another shape.
        ImportError: the package gguf or transformers is not installed.
        OSError: the file cannot be read.
        TypeError: dtype is another than float16, bfloat16 and float32.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    reader = gguf.open_file(path)
    field = reader.fields.get("general.architecture")
    with _refusing(path, "general.architecture"):  # its bytes may be no text
        architecture = field.contents() if field else None
    if not isinstance(architecture, str):
        raise FormatError(f"{path}: general.architecture must be a string, got {architecture!r:.100}")
    with _refusing(path, f"transformers makes no model of architecture {architecture!r}"):
        config, convert, model = _recipe(path, architecture, len(reader.tensors))
    state: dict[str, Tensor | QTensor] = {}
    plain: dict[str, Tensor] = {}
    for info in reader.tensors:
        name = str(info.name)
        tensor = gguf.decode(path, info)
        with _refusing(path, f"{name} of architecture {architecture!r}"):
            if isinstance(tensor, QTensor):
                found = _quantized(name, tensor, convert, model)
                if twice := found.keys() & state.keys():
                    raise ValueError(f"there is another tensor for {twice.pop()}")
                state |= found
            elif not tensor.is_floating_point():
                raise ValueError(f"a tensor that is not quantized must be floating, got {tensor.dtype}")
            else:
                convert(name, tensor, plain)
    if twice := plain.keys() & state.keys():
        raise FormatError(f"{path}: there are two tensors for {twice.pop()}")
    state |= {name: tensor.to(dtype).contiguous() for name, tensor in plain.items()}
    _check(path, state, model)
    return config, state


def skeleton(config: Any) -> torch.nn.Module:
    """The model of a configuration, without memory for its parameters."""
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def model_class(config: Any) -> Any:
    """The class of a configuration's model: the one that it names, else one that writes text, else any.

    Raises:
        ValueError: transformers has none.
    """
    import transformers

    if named := getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None):
        return named
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(f"transformers has no model of configuration {type(config).__name__}")


@contextlib.contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Whatever transformers stumbles over, or we do, as one kind of error."""
    try:
        yield
    except (ImportError, MemoryError, FormatError):
        raise
    except Exception as error:
        raise FormatError(f"{path}: {what}: {type(error).__name__}: {error}") from error


def _recipe(path: Path, architecture: str, tensors: int) -> tuple[Any, _Convert, torch.nn.Module]:
    """(configuration, what is done to a tensor, model without memory), in transformers' newer way if it has one."""
    from transformers import CONFIG_MAPPING
    from transformers import modeling_gguf_pytorch_utils as processors

    try:
        from transformers.integrations.gguf import gguf_config_mapping, reader, utils
    except ImportError:  # before 5.17
        newer = False
    else:
        newer = architecture in gguf_config_mapping.GGUF_CONFIG_ARCHS and utils.is_gguf_arch_supported(architecture)
    if newer:
        values = gguf_config_mapping.get_gguf_config(*reader.read_gguf_metadata(os.fspath(path)))
    else:
        values = processors.load_gguf_checkpoint(os.fspath(path), return_tensors=False)["config"]
    for name in _LAYERS & values.keys():  # before a hostile number of them is made
        if type(values[name]) is not int or not 0 <= values[name] <= tensors:
            raise ValueError(f"{name} must be from 0 to {tensors}, the number of tensors, got {values[name]!r:.100}")
    config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    model = skeleton(config)
    if newer:
        return config, _by_conversions(utils.get_gguf_conversion_mapping(architecture, model.config), model), model
    kind = processors.TENSOR_PROCESSORS.get(architecture, processors.TensorProcessor)
    return config, _by_processor(kind(config=values), model), model


def _by_processor(processor: Any, model: torch.nn.Module) -> _Convert:
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names = get_gguf_hf_weights_map(model, processor)

    def convert(name: str, tensor: Tensor, results: MutableMapping[str, Tensor]) -> None:
        values = tensor if tensor.dtype is torch.float64 else tensor.float()
        # A processor may put what it makes, such as experts from several tensors, among the results itself.
        done = processor.process(
            weights=values.numpy(), name=name, tensor_key_mapping=names, parsed_parameters={"tensors": results}
        )
        if done.name in names:
            _put(results, names[done.name], torch.from_numpy(done.weights))

    return convert


def _by_conversions(mapping: list[Any], model: torch.nn.Module) -> _Convert:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict().keys()

    def convert(name: str, tensor: Tensor, results: MutableMapping[str, Tensor]) -> None:
        target = name
        for renaming in renamings:
            target, _ = renaming.rename_source_key(target)
        for converter in converters:
            renamed, pattern = converter.rename_source_key(target)
            if pattern is not None:
                if len(converter.source_patterns) > 1:
                    raise ValueError("it is one of several tensors that make a parameter, which is not supported")
                target = renamed
                for operation in converter.operations:
                    made = operation.convert(
                        {pattern: tensor}, source_patterns=converter.source_patterns, target_patterns=[target]
                    )
                    (tensor,) = made.values()
                break
        if target in known:
            _put(results, target, tensor)

    return convert


def _put(results: MutableMapping[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in results:
        raise ValueError(f"there is another tensor for {name}")
    results[name] = tensor


# ---- quantized weights ----


@dataclasses.dataclass(frozen=True)
class _Move:
    """Rows and columns of a weight, in this order; None where they stay."""

    rows: Tensor | None
    columns: Tensor | None


def _quantized(name: str, q: QTensor, convert: _Convert, model: torch.nn.Module) -> dict[str, QTensor]:
    """{parameter's name: q, with its rows and columns moved as the model wants them}; empty if it has no place."""
    from transformers.pytorch_utils import Conv1D

    # Not stored in full: where nothing is done to them they stay as small as they are.
    numbers = [
        torch.arange(q.shape[0], dtype=torch.float64)[:, None].expand(q.shape),
        torch.arange(q.shape[1], dtype=torch.float64).expand(q.shape),
    ]
    found: list[dict[str, Tensor]] = [{}, {}]
    for probe, results in zip(numbers, found, strict=True):
        convert(name, probe, results)
    if not any(found):
        return {}
    if len(found[0]) != 1 or found[0].keys() != found[1].keys():
        raise ValueError("a quantized tensor must become one parameter")
    (target,) = found[0]
    rows, columns = (results[target] for results in found)
    if isinstance(model.get_submodule(target.rpartition(".")[0]), Conv1D):
        rows, columns = rows.T, columns.T  # the module's parameter is (K, N)
    move = _move(rows, columns, *numbers)
    return {target: _moved(q, move)}


def _move(rows: Tensor, columns: Tensor, row_numbers: Tensor, column_numbers: Tensor) -> _Move:
    """What was done to a weight, from what was done to its row numbers and to its column numbers."""
    whole = (
        rows.shape == row_numbers.shape == columns.shape
        and (_same(rows, row_numbers) or torch.equal(rows, rows[:, :1].expand(rows.shape)))
        and (_same(columns, column_numbers) or torch.equal(columns, columns[:1].expand(columns.shape)))
    )
    orders = [(rows[:, :1], row_numbers[:, :1]), (columns[:1], column_numbers[:1])]
    if not whole or not all(torch.equal(found.flatten().sort().values, all_.flatten()) for found, all_ in orders):
        raise ValueError("transformers does more to it than move whole rows and columns, which no code survives")
    indices = [None if torch.equal(found, all_) else found.flatten().long() for found, all_ in orders]
    return _Move(*indices)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether it is the other tensor's memory, seen in the same way."""
    return tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()


def _moved(q: QTensor, move: _Move) -> QTensor:
    if move.rows is not None:
        q = q.rows(move.rows)
    if move.columns is not None:  # codes stay where their group is, and belong to other input features
        order = torch.argsort(move.columns)
        q = dataclasses.replace(q, order=order.to(torch.int32))
    return q


def _check(path: Path, state: dict[str, Tensor | QTensor], model: torch.nn.Module) -> None:
    """Raise FormatError if a parameter is missing, or has another shape than the model's."""
    from transformers.pytorch_utils import Conv1D

    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})  # {parameter: the one whose values it has}
    there = {tied.get(name, name) for name in state}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in state:
            if tied.get(name, name) not in there:
                raise FormatError(f"{path}: there is no tensor for {name}")
            continue
        found, wanted = state[name], tuple(parameter.shape)
        if isinstance(found, QTensor) and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            wanted = wanted[::-1]
        if tuple(found.shape) != wanted:
            raise FormatError(f"{path}: the tensor for {name} must have shape {wanted}, got {tuple(found.shape)}")
