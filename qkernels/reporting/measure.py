"""`qkernels.report`: a quantized model against the one it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.nn import QuantLinear
from qkernels.replace import linears_for_conv1d
from qkernels.reporting import outputs
from qkernels.reporting.outputs import Batch
from qkernels.reporting.rows import OUTLIER, LayerQuality
from qkernels.reporting.table import QualityReport
from qkernels.tensor import QTensor, QuantizationError

_CELLS = 200  # of a heat map, each way, at most
_WIDE_GROUP = 128  # columns in a cell where a scale covers a whole row


def report(
    model: nn.Module | Mapping[str, Any],
    reference: nn.Module | Mapping[str, Any],
    batches: Iterable[Batch] | None = None,
) -> QualityReport:
    """What quantizing cost, layer by layer, and with batches on real activations and for the whole model.

    Every QuantLinear of the model is compared with the nn.Linear of the same name in the reference. With batches, both
    models run over them once, in evaluation mode: inputs of layers are those in the reference, quantized where a scheme
    says so, no activations are kept (but a K x K float32 matrix for each distinct input that is not quantized), and
    padding that a dict's attention_mask of (batch, tokens) marks is left out. Outputs that have `logits` for every
    token of integer (batch, tokens) input are taken for predictions of the next token; of others the first floating
    tensor is compared.

    Args:
        model: with QuantLinears, as quantize_model leaves it; or {name: QTensor}, as qkernels.load gives, to compare
            weights alone.
        reference: the unquantized model, of the same structure; or {name: Tensor}.
        batches: an iterable of Tensors (token ids, or the one argument of the model), of dicts of keyword arguments, or
            of tuples of positional arguments. None compares weights only.

    Raises:
        ValueError: nothing is quantized, names or shapes do not match, a weight or an activation in the reference is
            NaN or infinite, batches is empty or reaches not every quantized layer; the layer is named.
        TypeError: an argument is of another type, or outputs hold no tensor to compare.

    >>> import copy, torch, qkernels
    >>> reference = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    >>> model = copy.deepcopy(reference)
    >>> _ = qkernels.quantize_model(model, "w4g64", progress=False)
    >>> report = qkernels.report(model, reference, batches=[torch.randn(32, 64)])
    >>> report["name"], report["scheme"]
    (['0', '2'], ['w4g64', 'w4g64'])
    """
    if isinstance(model, Mapping) or isinstance(reference, Mapping):
        if not (isinstance(model, Mapping) and isinstance(reference, Mapping)):
            raise TypeError(
                "model and reference must both be modules or both mappings of names to tensors, got "
                f"{type(model).__name__} and {type(reference).__name__}"
            )
        if batches is not None:
            raise TypeError("batches need models to run through; model and reference are mappings of tensors")
        return QualityReport(tuple(_layer(*pair) for pair in _tensor_pairs(model, reference)))
    for who, given in (("model", model), ("reference", reference)):
        if not isinstance(given, nn.Module):
            raise TypeError(f"{who} must be a torch.nn.Module or a mapping of tensors, got {type(given).__name__}")
    with linears_for_conv1d(reference):
        pairs = dict(_layer_pairs(model, reference))
        moments: Mapping[str, Tensor] = {}
        errors: Mapping[str, float] = {}
        quality = None
        if batches is not None:
            moments, errors, quality = outputs.run(model, reference, pairs, batches)
        rows = tuple(
            _layer(name, layer.qweight, linear.weight, moments.get(name), errors.get(name))
            for name, (layer, linear) in pairs.items()
        )
    return QualityReport(rows, quality)


def _layer_pairs(model: nn.Module, reference: nn.Module) -> Iterator[tuple[str, tuple[QuantLinear, nn.Linear]]]:
    """(name, (quantized, unquantized)) layers; a shared one once, under its first name."""
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not quantized:
        raise ValueError(f"model ({type(model).__name__}) holds no QuantLinear: quantize it first, with quantize_model")
    others = dict(reference.named_modules(remove_duplicate=False))
    missing = [name for name in quantized if name not in others]
    if missing:
        example = next((n for n, module in others.items() if isinstance(module, nn.Linear)), "none")
        raise ValueError(
            f"reference ({type(reference).__name__}) has no layer {missing[0]!r}, which is quantized in model "
            f"({len(missing)} of {len(quantized)} such layers); its Linears have names like {example!r}"
        )
    for name, layer in quantized.items():
        linear = others[name]
        if isinstance(linear, QuantLinear):
            raise ValueError(
                f"{name} is quantized in reference, too: reference must be the unquantized model. quantize_model works "
                "in place: keep a copy.deepcopy of the model, or load it again"
            )
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} in reference must be an nn.Linear, got {type(linear).__name__}")
        yield name, (layer, linear)


def _tensor_pairs(model: Mapping[str, Any], reference: Mapping[str, Any]) -> Iterator[tuple[str, QTensor, Tensor]]:
    """(name without its .weight, quantized, unquantized)."""
    quantized = {name: tensor for name, tensor in model.items() if isinstance(tensor, QTensor)}
    if not quantized:
        raise ValueError(f"model holds no QTensor among its {len(model)} tensors: nothing is quantized")
    missing = [name for name in quantized if name not in reference]
    if missing:
        raise ValueError(
            f"reference has no tensor {missing[0]!r}, which is quantized in model ({len(missing)} of {len(quantized)} "
            f"such tensors); its names are like {next(iter(reference), 'none')!r}"
        )
    for name, tensor in quantized.items():
        original = reference[name]
        if not isinstance(original, Tensor) or not original.is_floating_point():
            what = original.dtype if isinstance(original, Tensor) else type(original).__name__
            raise ValueError(f"{name} in reference must be a floating Tensor, got {what}")
        yield name.removesuffix(".weight"), tensor, original


@torch.no_grad()
def _layer(
    name: str, q: QTensor, weight: Tensor, moment: Tensor | None = None, output_error: float | None = None
) -> LayerQuality:
    """One row.

    Args:
        name: of the layer.
        q: quantized (N, K).
        weight: (N, K) floating, what it came from.
        moment: (K, K) float32, sum of x^T x over inputs x, which tell the error of the output.
        output_error: if it is known.
    """
    if weight.shape != q.shape:
        raise ValueError(f"{name} is {tuple(q.shape)} in model, but {tuple(weight.shape)} in reference")
    if weight.is_meta:
        raise ValueError(f"{name} in reference is on the meta device: load the weights first")
    original = weight.detach().to(q.device).float()
    if not torch.isfinite(original).all():
        raise ValueError(f"{name} in reference holds NaN or infinity")
    difference = original - q.dequantize()
    error = QuantizationError(
        signal=original.double().square().sum().item(),
        noise=difference.double().square().sum().item(),
        largest=difference.abs().max().item() if difference.numel() else 0.0,
    )
    blocks, block_shape = _blocks(difference, q)
    return LayerQuality(
        name=name,
        scheme=str(q.scheme),
        shape=(q.shape[0], q.shape[1]),
        snr_db=error.snr_db,
        max_error_steps=_largest_in_steps(difference, q),
        outlier_share=_outlier_share(original),
        output_error=output_error if moment is None else _output_error(original, difference, moment),
        nbytes=q.nbytes,
        bits_per_weight=q.bits_per_weight,
        error=error,
        blocks=blocks,
        block_shape=block_shape,
    )


def _largest_in_steps(difference: Tensor, q: QTensor) -> float:
    if not difference.numel():
        return 0.0
    scale = q.scale.float()
    if q.scheme.group_size != "tensor":
        scale = scale.T.repeat_interleave(q.scheme.group_length(q.in_features), 1)[:, : q.in_features]
    return (difference.abs() / scale).max().item()


def _outlier_share(weight: Tensor) -> float:
    if not weight.numel():
        return 0.0
    limit = OUTLIER * weight.double().square().mean(1, keepdim=True).sqrt()
    return (weight.abs() > limit).double().mean().item()


def _output_error(weight: Tensor, difference: Tensor, moment: Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T))."""
    signal, noise = (
        ((m.to(moment.device) @ moment).double() * m.to(moment.device)).sum().clamp(min=0).item()
        for m in (weight, difference)
    )
    return QuantizationError(signal, noise, 0.0).relative


def _blocks(difference: Tensor, q: QTensor) -> tuple[Tensor, tuple[int, int]]:
    """Mean squared error of cells that are some rows high and some groups wide, and their (rows, columns)."""
    rows, columns = difference.shape
    group = q.scheme.group_size if isinstance(q.scheme.group_size, int) else _WIDE_GROUP
    group = max(1, min(group, columns))
    height = max(1, -(-rows // _CELLS))
    width = group * max(1, -(-columns // (group * _CELLS)))
    if not difference.numel():
        return torch.zeros(0, 0), (height, width)
    cells = torch.nn.functional.avg_pool2d(
        difference.square()[None], (height, width), ceil_mode=True, count_include_pad=False
    )
    return cells[0].cpu(), (height, width)
