"""Merging the layers of a model: which siblings can be multiplied in one launch, and putting them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from qkernels import source
from qkernels.nn import QuantLinear
from qkernels.replace import places, put
from qkernels.siblings import MergedLinear, MergedWeight, close_scope, open_scope

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclasses.dataclass(frozen=True)
class Merged:
    """What merge_siblings did.

    Attributes:
        groups: names of layers that share a launch now.
        apart: (names of siblings, why they, or some of them, do not).
        not_proved: those of the groups whose parent's source does not show that they read one unchanging input: in
            inference mode and under torch.compile they do not share a launch.
    """

    groups: tuple[tuple[str, ...], ...]
    apart: tuple[tuple[tuple[str, ...], str], ...]
    not_proved: tuple[tuple[str, ...], ...]


def merge_siblings(model: nn.Module, groups: Sequence[Sequence[str]] = SIBLINGS) -> Merged:
    """Let sibling QuantLinears that read one input be multiplied in one launch, in place; weights keep every bit.

    Args:
        model: a quantized model.
        groups: attribute names of siblings in one parent, such as ("q_proj", "k_proj", "v_proj").

    Siblings of different schemes, input sizes or devices, with and without bias, or that sit in several places, stay
    apart, and so do those with one scale for the whole tensor, with an order of inputs of their own (act-order GPTQ),
    or with static activations of different scales: the result says why. Merged ones stay as they are.
    """
    merged, apart, not_proved = [], [], []
    where = places(model)
    for parent_name, parent in model.named_modules():
        for names in check_groups(groups):
            found = {n: getattr(parent, n) for n in names if type(parent._modules.get(n)) is QuantLinear}
            if len(found) < 2:
                continue
            full = {n: f"{parent_name}.{n}" if parent_name else n for n in found}
            sets: dict[Any, list[str]] = {}
            for name, layer in found.items():
                sets.setdefault(name if _alone(layer, where) else _must_agree(layer), []).append(name)
            for together in sets.values():
                if len(together) > 1:
                    merged.append(tuple(full[n] for n in together))
                    if not _merge(parent, together, where):
                        not_proved.append(merged[-1])
            if len(sets) > 1:
                apart.append((tuple(full.values()), _why_apart(list(found.values()), where)))
    return Merged(tuple(merged), tuple(apart), tuple(not_proved))


def check_groups(groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """The groups, if they are what merge_siblings takes; else TypeError or ValueError."""
    if isinstance(groups, str) or any(isinstance(names, str) for names in groups):
        raise TypeError(f"groups must be a sequence of sequences of names, got {groups!r}")
    for names in groups:
        if len(set(names)) < 2 or len(set(names)) < len(names) or any("." in name for name in names):
            raise ValueError(f"a group must be two or more attribute names of one parent, got {tuple(names)!r}")
        yield tuple(names)


def _must_agree(layer: QuantLinear) -> tuple[Any, ...]:
    """Equal for layers whose rows can be stacked."""
    zero, bias = layer.weight_zero, layer.bias
    return (
        str(layer.scheme),
        layer.in_features,
        layer.weight.device,
        layer.weight_scale.dtype,
        None if zero is None else zero.dtype,
        None if bias is None else (bias.dtype, bias.requires_grad),
        None if layer.weight_activation is None else tuple(layer.weight_activation.tolist()),
    )


def _alone(layer: QuantLinear, where: dict[nn.Module, list[tuple[nn.Module, str]]]) -> str | None:
    """Why a layer cannot be merged with any other; None if it can."""
    if layer.scheme.group_size == "tensor":
        return "one scale for a whole tensor"
    if layer.weight_order is not None:
        return "an order of inputs of its own"
    if layer.weight_activation is not None and layer.weight_activation.is_meta:
        return "static activations without values"
    if len(where[layer]) > 1:
        return "a layer in several places"
    return "hooks or a forward of its own" if _is_hooked(layer) else None


def _why_apart(layers: Sequence[QuantLinear], where: dict[nn.Module, list[tuple[nn.Module, str]]]) -> str:
    if reason := next(filter(None, (_alone(layer, where) for layer in layers)), None):
        return reason
    keys = [_must_agree(layer) for layer in layers]
    what = ("scheme", "in_features", "device", "dtype of scales", "dtype of zeros", "bias", "static activations")
    return "different " + ", ".join(
        w for w, values in zip(what, zip(*keys, strict=True), strict=True) if len({*values}) > 1
    )


def _is_hooked(layer: nn.Module) -> bool:
    return "forward" in vars(layer) or any(
        (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    )


def _merge(parent: nn.Module, names: Sequence[str], where: dict[nn.Module, list[tuple[nn.Module, str]]]) -> bool:
    """Merge layers of a parent; whether the parent's source proves that they read one unchanging input."""
    layers = [parent._modules[name] for name in names]
    forward = None if "forward" in vars(parent) else type(parent).forward
    proved = forward if forward is not None and source.shows_one_input(forward, names) else None
    shared = MergedWeight(layers, names, proved)  # type: ignore[arg-type]
    for index, layer in enumerate(layers):
        assert layer is not None
        put(MergedLinear(shared, index).train(layer.training), where[layer])
    if open_scope not in parent._forward_pre_hooks.values():
        parent.register_forward_pre_hook(open_scope)
        parent.register_forward_hook(close_scope, always_call=True)
    return proved is not None
