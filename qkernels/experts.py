"""Mixtures of experts in transformers: projections of all experts in one 3-D parameter, quantized as one weight.

transformers keeps the projections of a layer's experts in parameters (experts, out_features, in_features), or
transposed, of one module, and lets an implementation be registered that its forward calls. Ours, "qkernels", gives
each row to the weight of its own expert by the op of ops_experts.py.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from qkernels.nn import QuantExperts
from qkernels.tensor import QTensor

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("config", "has_bias", "is_transposed")  # what transformers' decorator of such modules adds to each


def projections(module: Any) -> dict[str, tuple[int, int, int]]:
    """{attribute: (experts, out_features, in_features)} of a module's projections; {} unless it is such a module."""
    if not all(hasattr(module, mark) for mark in _MARKS) or getattr(module, "has_post_expert_norm", False):
        return {}
    found = {}
    for name in _PROJECTIONS:
        value = module._parameters.get(name, module._modules.get(name))
        if isinstance(value, QuantExperts):
            found[name] = value.num_experts, value.out_features, value.in_features
        elif value is not None and value.ndim == 3:
            experts, *sizes = value.shape
            out_features, in_features = reversed(sizes) if module.is_transposed else sizes
            found[name] = experts, out_features, in_features
    return found if "down_proj" in found and len(found) == 2 else {}


def stacked(module: Any, name: str) -> Tensor:
    """A float projection as the rows of all experts, (experts * out_features, in_features)."""
    weight = getattr(module, name).detach()
    return (weight.transpose(1, 2) if module.is_transposed else weight).flatten(0, 1)


def put_experts(module: Any, name: str, weight: QTensor) -> QuantExperts:
    """Put a quantized projection in the place of a parameter (or of a quantized one)."""
    experts = projections(module)[name][0]
    module._parameters.pop(name, None)
    module._modules.pop(name, None)
    layer = QuantExperts(weight, experts).train(module.training)
    setattr(module, name, layer)
    register()
    module.config._experts_implementation = "qkernels"
    return layer


def register() -> None:
    """Tell transformers of the implementation "qkernels"; once is enough."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("qkernels", experts_forward)


def _register_if_there() -> None:
    if "transformers" in sys.modules:
        register()


QuantExperts.unpickled.append(
    _register_if_there
)  # a pickled model names "qkernels", in a process that does not know it


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module: hidden_states (tokens, H), choices and their weights (tokens, k) -> (tokens, H).

    Some models give the weights of all experts, (tokens, experts).
    """
    # A layer that was left alone; and of some files, one projection is quantized and not the other.
    if sum(isinstance(self._modules.get(name), QuantExperts) for name in _PROJECTIONS) != 2:
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    tokens, choices = top_k_index.shape
    expert = top_k_index.reshape(-1)
    gated = "gate_up_proj" in self._modules
    x = _project(self, "gate_up_proj" if gated else "up_proj", hidden_states.repeat_interleave(choices, dim=0), expert)
    x = self._apply_gate(x) if gated else self.act_fn(x)
    y = _project(self, "down_proj", x, expert)
    own = (expert < self.down_proj.num_experts).unsqueeze(-1)  # others are experts of another process
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index)
    y = torch.where(own, y * top_k_weights.reshape(-1, 1), 0)
    return y.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


def _project(module: Any, name: str, x: Tensor, expert: Tensor) -> Tensor:
    projection = cast(nn.Module, module._modules[name])
    y = projection(x, expert)
    if module.has_bias:
        bias = getattr(module, f"{name}_bias")
        y = y + bias[expert.clamp(max=bias.shape[0] - 1)]
    return y
