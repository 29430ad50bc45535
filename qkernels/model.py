"""Whole models: quantize the Linears in place, save and load them."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference, tables
from qkernels.checks import DTYPES
from qkernels.formats import native
from qkernels.formats.native import FormatError, Path
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme, as_scheme
from qkernels.tensor import QTensor, QuantizationError

# The output layer is often tied to the embedding, and always the one whose error the logits see undiluted.
DEFAULT_SKIP = ("lm_head", "*.lm_head")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: of the module.
        scheme: as a string.
        shape: (out_features, in_features).
        original_bytes: of the float weight.
        nbytes: of codes, scales and zeros, padding included.
        error: of the weight.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    original_bytes: int
    nbytes: int
    error: QuantizationError

    @property
    def weights(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What quantize_model did; `print` it for a table.

    Attributes:
        layers: the quantized ones, in the model's order.
        skipped: names of the Linears that were left alone.
        seconds: that it took.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...]
    seconds: float

    @property
    def original_bytes(self) -> int:
        """Of the float weights that were quantized."""
        return sum(layer.original_bytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Of their codes, scales and zeros."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes over the number of quantized weights."""
        return 8 * self.nbytes / max(1, sum(layer.weights for layer in self.layers))

    @property
    def error(self) -> QuantizationError:
        """Of all quantized weights together."""
        return sum((layer.error for layer in self.layers), QuantizationError(0.0, 0.0, 0.0))

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.scheme,
                f"{layer.shape[0]} x {layer.shape[1]}",
                tables.size(layer.nbytes),
                f"{8 * layer.nbytes / max(1, layer.weights):.2f}",
                f"{layer.error.snr_db:.1f}",
            )
            for layer in self.layers
        ]
        title = (
            f"{len(self.layers)} layers: {tables.size(self.original_bytes)} -> {tables.size(self.nbytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight, SNR {self.error.snr_db:.1f} dB, {self.seconds:.1f} s; "
            f"left alone: {', '.join(self.skipped) or 'none'}"
        )
        columns = ("layer", "scheme", "shape", "size", "bits/weight", "SNR dB")
        return tables.as_text(tables.table(title, columns, rows, text_columns=2))


def quantize_model(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    skip: Sequence[str] = DEFAULT_SKIP,
    schemes: Mapping[str, str | Scheme | None] | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Replace every nn.Linear by a QuantLinear, in place, one at a time: peak memory is the model plus one layer.

    Args:
        model: any module; weights float16, bfloat16 or float32, on CPU or GPU.
        scheme: such as "w4g128", for layers that no pattern names.
        skip: patterns (as of fnmatch) of module names to leave alone.
        schemes: {pattern: scheme} for some layers, None to leave them alone; the first pattern that fits counts.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: there is nothing to quantize, a pattern of yours fits no Linear, or a layer cannot be
            quantized (NaN, infinity, overflow, meta device, hooks); the layer is named and the model unchanged.

    >>> import torch, qkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    >>> report = qkernels.quantize_model(model, "w4g64", schemes={"2": "w8c"}, progress=False)
    >>> model[2]
    QuantLinear(in_features=128, out_features=10, bias=True, scheme='w8c')
    """
    from tqdm import tqdm

    start = time.perf_counter()
    plan, skipped = _plan(model, as_scheme(scheme), skip, schemes or {})
    places = _places(model)
    for name, (linear, chosen) in plan.items():
        _check_quantizable(name, linear, chosen, len(places[linear]))
    layers = []
    bar = tqdm(list(plan), desc="quantizing", unit="layer", disable=not progress)
    for name in bar:
        linear, chosen = plan.pop(name)
        quantized = QuantLinear.from_linear(linear, chosen)
        weight = linear.weight.detach()
        layers.append(
            LayerReport(
                name=name,
                scheme=str(chosen),
                shape=(linear.out_features, linear.in_features),
                original_bytes=weight.nbytes,
                nbytes=quantized.qweight.nbytes,
                error=quantized.qweight.error(weight),
            )
        )
        for parent, child in places.pop(linear):
            setattr(parent, child, quantized)
        del linear, weight  # the float weight goes before the next layer comes
    return QuantizationReport(tuple(layers), tuple(skipped), time.perf_counter() - start)


def _plan(
    model: nn.Module, default: Scheme, skip: Sequence[str], schemes: Mapping[str, str | Scheme | None]
) -> tuple[dict[str, tuple[nn.Linear, Scheme]], list[str]]:
    """({name: (layer, scheme)}, names left alone)."""
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}; write skip=[{skip!r}]")
    parsed = {pattern: None if s is None else as_scheme(s) for pattern, s in schemes.items()}
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if "" in linears:
        raise ValueError("model is itself an nn.Linear, which cannot be replaced in place; use QuantLinear.from_linear")
    if not linears:
        raise ValueError(f"model ({type(model).__name__}) holds no nn.Linear to quantize")
    for pattern in [*(skip if skip is not DEFAULT_SKIP else ()), *parsed]:
        if not fnmatch.filter(linears, pattern):
            raise ValueError(
                f"pattern {pattern!r} fits no nn.Linear of the model; names are like {next(iter(linears))!r}"
            )
    plan: dict[str, tuple[nn.Linear, Scheme]] = {}
    skipped = []
    for name, linear in linears.items():
        chosen = next((s for pattern, s in parsed.items() if fnmatch.fnmatchcase(name, pattern)), default)
        if chosen is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            skipped.append(name)
        else:
            plan[name] = linear, chosen
    return plan, skipped


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every (parent, attribute) at which a module sits; a shared module sits at several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(module, []).append((parent, child))
    return places


def _check_quantizable(name: str, linear: nn.Linear, scheme: Scheme, places: int) -> None:
    weight = linear.weight.detach()
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}.weight must be float16, bfloat16 or float32, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load the weights first")
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        raise ValueError(f"{name} has hooks, which would be lost: remove them first")
    try:
        reference.scale_and_zero(*reference.group_range(weight, scheme), scheme)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None


def save(source: nn.Module | Mapping[str, Tensor | QTensor], path: Path) -> None:
    """Write a model, or named tensors, to one safetensors file with the schemes in its metadata.

    The file appears whole or not at all. Layout: formats/native.py.

    Args:
        source: a module (its parameters and persistent buffers; QuantLinears as quantized weights) or a mapping.
        path: of the file.
    """
    if not isinstance(source, nn.Module):
        native.write(path, source)
        return
    tensors: dict[str, Tensor | QTensor] = dict(source.state_dict(keep_vars=False))
    for name, layer in _quantized_weights(source).items():
        for suffix in ("_scale", "_zero"):
            tensors.pop(name + suffix, None)
        tensors[name] = layer.qweight
    native.write(path, tensors)


def load(path: Path, model: nn.Module | None = None, device: torch.device | str = "cpu") -> Any:
    """Read what `save` wrote.

    Args:
        path: of the file.
        model: where to put it: the architecture that was saved, quantized or not, on any device, meta too. Its Linears
            become QuantLinears where the file has quantized weights.
        device: for the tensors, where no model is given.
    Returns:
        The model if there is one, else {name: Tensor or QTensor}.
    Raises:
        FormatError: the file is damaged, hostile or of another format, or does not fit the model, which is unchanged.
        OSError: the file cannot be read.
    """
    tensors = native.read(path, device if model is None else "cpu")
    if model is None:
        return tensors
    quantized = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QTensor)}
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    places = _places(model)
    layers = _check_fits_model(path, model, quantized, plain)
    for module, tensor in layers.items():
        old = module.weight
        target = "cpu" if old.is_meta else old.device
        layer = QuantLinear(tensor.to(target), module.bias).train(module.training)
        for parent, child in places[module]:
            setattr(parent, child, layer)
    on_meta = any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.load_state_dict(plain, strict=False, assign=on_meta)
    return model


def _quantized_weights(model: nn.Module) -> dict[str, QuantLinear]:
    """{name of the packed parameter: layer}, under every name that a layer has."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear)
    }


def _check_fits_model(
    path: Path, model: nn.Module, quantized: Mapping[str, QTensor], plain: Mapping[str, Tensor]
) -> dict[Any, QTensor]:
    """{layer to replace: its new weight}, if the file holds just what the model wants."""
    wanted = dict(model.state_dict())
    layers = {}
    for name, tensor in quantized.items():
        module_name, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(module_name)
        except AttributeError:
            module = None
        if attribute != "weight" or not (type(module) is nn.Linear or isinstance(module, QuantLinear)):
            raise FormatError(f"{path}: {name} is quantized, but the model has no Linear of that name")
        if (module.out_features, module.in_features) != tensor.shape:
            shape = (module.out_features, module.in_features)
            raise FormatError(f"{path}: {name} is {tuple(tensor.shape)}, but the model's layer is {shape}")
        layers[module] = tensor
        for suffix in ("", "_scale", "_zero"):
            wanted.pop(name + suffix, None)
    if unexpected := plain.keys() - wanted.keys():
        raise FormatError(f"{path}: {min(unexpected)} is not in the model ({len(unexpected)} such tensors)")
    if missing := wanted.keys() - plain.keys():
        raise FormatError(f"{path}: {min(missing)}, which the model wants, is missing ({len(missing)} such tensors)")
    for name, value in plain.items():
        if value.shape != wanted[name].shape:
            raise FormatError(f"{path}: {name} is {tuple(value.shape)}, but the model's is {tuple(wanted[name].shape)}")
    return layers
