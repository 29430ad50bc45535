"""Layers of a model and their quantized counterparts: which can take whose place, and putting them there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from qkernels.experts import projections, put_experts
from qkernels.nn import PARTS, QuantEmbedding, QuantLinear, QuantModule
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor


def places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every (parent, attribute) at which a module sits; a shared module sits at several."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, child))
    return found


def put(layer: nn.Module, where: Iterable[tuple[nn.Module, str]]) -> None:
    """Set the layer at places of a model."""
    for parent, child in where:
        hook = getattr(parent._modules[child], "_hf_hook", None)
        setattr(parent, child, layer)
        if hook is not None and isinstance(layer, QuantModule) and not hasattr(layer, "_hf_hook"):
            # accelerate's, which moves what the layer gets to its device
            importlib.import_module("accelerate.hooks").add_hook_to_module(layer, hook)
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(layer, QuantModule):
            parent.activation_relu_or_gelu = 0  # else its fused path takes the packed codes for a float weight


def is_conv1d(module: Any) -> bool:
    """Whether it is transformers' Conv1D: GPT-2's linear layer, whose weight is (in_features, out_features)."""
    utils = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    return utils is not None and type(module) is utils.Conv1D


def weight_shape(module: Any) -> tuple[int, int] | None:
    """Shape of the quantized weight that a layer has or could have; None for a layer that has no counterpart."""
    if isinstance(module, (QuantLinear, QuantEmbedding)):
        return module.weight.shape[0], module.in_features
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.num_embeddings, module.embedding_dim
    return None


def counterpart(module: Any, weight: QTensor) -> QuantLinear | QuantEmbedding:
    """The quantized layer that takes a layer's place; a bias is shared."""
    layer: QuantLinear | QuantEmbedding
    if isinstance(module, QuantEmbedding):
        layer = QuantEmbedding(weight, module.dtype)
    elif isinstance(module, nn.Embedding):
        layer = QuantEmbedding(weight, module.weight.dtype)
    else:
        layer = QuantLinear(weight, module.bias)
    return layer.train(module.training)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where in a model a quantized weight belongs: a layer, or a projection of all experts of a module.

    Attributes:
        module: the layer, or the module of the experts.
        projection: of the experts, an attribute of the module; None for a layer.
        shape: that the weight must have.
        float_name: of the parameter that the weight stands for.
    """

    module: Any
    projection: str | None
    shape: tuple[int, int]
    float_name: str

    def why_not(self, scheme: Scheme, ordered: bool) -> str | None:
        """What of a weight that has the right shape cannot be here; None if it can.

        ordered: whether it has an order of inputs.
        """
        embedding = isinstance(self.module, (nn.Embedding, QuantEmbedding))
        if ordered and (embedding or self.projection is not None):
            return "has an order of inputs, which an embedding or experts cannot have"
        if embedding and scheme.activations is not None:
            return f"is {scheme}, but an embedding has no activations to quantize"
        if self.projection is not None and scheme.is_static:
            return f"is {scheme}, but experts cannot have static activations"
        return None

    @property
    def old(self) -> Tensor:
        """The parameter that is there now, float or packed."""
        found = self.module if self.projection is None else getattr(self.module, self.projection)
        return found if isinstance(found, Tensor) else found.weight

    def put(self, weight: QTensor, where: Iterable[tuple[nn.Module, str]]) -> QuantModule:
        """Put the quantized layer there; `where` are the places of a layer."""
        if self.projection is not None:
            return put_experts(self.module, self.projection, weight)
        layer = counterpart(self.module, weight)
        put(layer, where)
        return layer


def slot(model: nn.Module, name: str) -> Slot | None:
    """The slot of a weight called NAME.weight; None if the model has none of that name."""
    path, _, attribute = name.rpartition(".")
    if attribute != "weight":
        return None
    parent, _, child = path.rpartition(".")
    try:
        holder = model.get_submodule(parent)
    except AttributeError:
        return None
    if child in (stacks := projections(holder)):
        experts, out_features, in_features = stacks[child]
        return Slot(holder, child, (experts * out_features, in_features), path)
    module = holder._modules.get(child) if child else model
    shape = weight_shape(module)
    return None if shape is None else Slot(module, None, shape, name)


def tie(layer: QuantModule, to: QuantModule) -> QuantModule:
    """The layer, whose weight is now the very parameters of another: an output layer tied to an embedding."""
    for name in PARTS:
        layer.register_parameter(name, to._parameters[name])
    return layer


@contextlib.contextmanager
def linears_for_conv1d(model: nn.Module) -> Iterator[None]:
    """Within it, Conv1D layers of a model are nn.Linear over the same memory; those still there go back at the end."""
    stand_ins: dict[nn.Linear, tuple[nn.Module, list[tuple[nn.Module, str]]]] = {}
    for module, where in places(model).items():
        if is_conv1d(module):
            stand_ins[_as_linear(module)] = module, where
    for linear, (_, where) in stand_ins.items():
        put(linear, where)
    try:
        yield
    finally:
        for linear, (module, where) in stand_ins.items():
            put(module, [(parent, child) for parent, child in where if parent._modules[child] is linear])


def _as_linear(conv: Any) -> nn.Linear:
    """An nn.Linear over the memory of a Conv1D, with its hooks, so that what looks for them finds them."""
    in_features, out_features = conv.weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta").train(conv.training)
    linear.weight = nn.Parameter(conv.weight.detach().T, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(linear, hooks, getattr(conv, hooks))
    return linear
