"""transformers' tensor parallelism, asked for by tp_plan or a DistributedConfig, for quantized layers.

transformers distributes the parameters of a model before it loads them, and knows how to cut float matrices alone. So
what is quantized, or will be, is marked: styles of a plan do nothing to it but take down what was asked. Every process
loads it whole, and keeps its part afterwards. Embeddings and experts stay whole in each process.

Works with transformers 5.17 and later; before, styles were another interface, and quantized layers are refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qkernels.experts import projections
from qkernels.nn import PARTS, QuantEmbedding, QuantExperts, QuantLinear
from qkernels.parallel.layers import ColwiseLinear, Group, RowwiseLinear, cut_colwise, cut_rowwise, whole
from qkernels.parallel.shards import check_split
from qkernels.replace import weight_shape
from qkernels.scheme import Scheme

_MARK = "_qkernels_held"  # of a module
_GUARDED = "_qkernels_guarded"  # of a style
_COLWISE = {"colwise": False, "colwise_rep": True, "colwise_gather_output": True}  # whether outputs are gathered
_ROWWISE = {"rowwise": False, "rowwise_rep": True, "rowwise_split_input": True}  # whether the input comes whole
_AS_IT_IS = ("replicate", "mla_kv_a_proj")  # the layer stays whole; the latter takes care of a gradient
_LAYER = (*_COLWISE, *_ROWWISE, *_AS_IT_IS)
# Of modules that stay whole: styles whose inputs and outputs are the same in all processes.
_GATHERED = ("colwise_rep", "colwise_gather_output", "replicate")
_EMBEDDING = (*_GATHERED, "embedding_rowwise", "embedding_colwise", "rowwise")
_EXPERTS = ("moe_tp_experts", "replicate")
_PROJECTION = ("packed_colwise", "packed_rowwise", "colwise", "rowwise", "replicate")  # all of them left to the experts


@dataclasses.dataclass
class Held:
    """A module that every process loads whole, whatever a plan says.

    Attributes:
        name: of it.
        module: before it is loaded.
        accepted: styles that a plan may ask for.
        scheme: of a layer that can be cut.
        why_not: why a plan must leave it alone, if it must.
        style: what a plan asks.
        mesh: of the processes.
    """

    name: str
    module: Any
    accepted: tuple[str, ...]
    scheme: Scheme | None = None
    why_not: str = ""
    style: str = ""
    mesh: Any = None

    def ask(self, style: str, mesh: Any) -> None:
        """Take down what a plan asks; ValueError if it cannot be had."""
        self.style, self.mesh = style, mesh
        if self.why_not:
            raise ValueError(f"{self.name}: {self.why_not}")
        if style not in self.accepted:
            raise ValueError(
                f"{self.name} is quantized: a plan cannot ask for {style!r}; accepted: {', '.join(self.accepted)}"
            )
        if self.scheme is not None and style not in _AS_IT_IS:
            shape = weight_shape(self.module)
            assert shape is not None
            dim, ordered = int(style in _ROWWISE), getattr(self.module, "weight_order", None) is not None
            try:
                check_split(self.scheme, *shape, dim, mesh.size(), ordered)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None


# ---- before transformers distributes ----


def hold(model: Any, schemes: Mapping[str, Scheme], others: Container[str], calibrated: bool) -> list[Held]:
    """Mark what a plan must not touch: what is quantized already, and what will be.

    Args:
        model: before its weights are loaded.
        schemes: of layers that will be quantized, by name.
        others: names of embeddings, and of projections of experts, that will be.
        calibrated: whether more will be, which needs the whole model.
    """
    modules = dict(model.named_modules())
    embeddings = {n for n, m in modules.items() if isinstance(m, QuantEmbedding) or n in others}
    ties = {target: source.removesuffix(".weight") for target, source in model.all_tied_weights_keys.items()}
    found = []
    for name, module in modules.items():
        if calibrated and (isinstance(module, (nn.Linear, nn.Embedding)) or projections(module)):
            why_not = "calibration needs the whole model in one process: quantize it there, and load what that saved"
            found.append(Held(name, module, (), why_not=why_not))
        elif name in schemes:
            found.append(Held(name, module, _LAYER, schemes[name]))
        elif ties.get(f"{name}.weight") in embeddings:
            found.append(Held(name, module, _GATHERED))
        elif isinstance(module, QuantLinear):
            found.append(Held(name, module, _LAYER, module.scheme))
        elif name in embeddings:
            found.append(Held(name, module, _EMBEDDING))
        elif any(f"{name}.{p}" in others or f"{name}.{p}" in modules for p in projections(module)):
            found.append(Held(name, module, _EXPERTS))
        elif isinstance(module, QuantExperts):
            found.append(Held(name, module, _PROJECTION))
    for held in found:
        setattr(held.module, _MARK, held)
    _guard_styles()
    return found


def _guard_styles() -> None:
    """Let styles do nothing to modules that are marked."""
    for name, style in _all_styles().items():
        if not hasattr(style, _GUARDED):
            setattr(style, _GUARDED, True)
            for method, instead in _INSTEAD.items():
                if hasattr(style, method):
                    setattr(style, method, _guarded(getattr(style, method), functools.partial(instead, name)))


def _all_styles() -> Any:
    """{name: style}, as transformers has them."""
    try:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
    except ImportError:  # before 5.17
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
    return ALL_PARALLEL_STYLES


def _guarded(original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held = getattr(module, _MARK, None)
        return original(module, *args, **kwargs) if held is None else instead(held, *args, **kwargs)

    return method


def _shard_parameter(style: str, held: Held, *args: Any, **kwargs: Any) -> None:
    if style == "grouped_gemm":
        raise ValueError(f"{held.name} is quantized: its experts stay together, and no plan can give each process some")


def _install(style: str, held: Held, mesh: Any = None, **kwargs: Any) -> Any:
    held.ask(style, mesh)
    return held.module


def _refuse(style: str, held: Held, *args: Any, **kwargs: Any) -> None:
    raise ValueError(f"{held.name} is quantized: tensor parallelism of it needs transformers 5.17 or later")


# methods of a style -> what is done to a marked module
_INSTEAD: dict[str, Callable[..., Any]] = {
    "validate_param": lambda style, held, *args, **kwargs: None,
    "shard_param": _shard_parameter,
    "install_forward": _install,
    "prepare_module_tp": _refuse,  # before 5.17
}


# ---- after the weights are loaded ----


def check_loaded_whole(held: Iterable[Held], tied: Container[str]) -> None:
    """Raise ValueError for what should be quantized but has been spread over processes by other means than a plan."""
    for one in held:
        spread = any(isinstance(p, DTensor) for p in one.module.parameters(recurse=False))
        if spread and f"{one.name}.weight" not in tied:
            raise ValueError(
                f"{one.name} cannot be quantized while it is loaded into several processes, each of which gets a part "
                "(FSDP): quantize and save the model in one process, and load that"
            )


def cut(model: nn.Module, held: Iterable[Held]) -> bool:
    """Keep of each layer what the plan gives this process; whether there was a plan."""
    planned = False
    for one in held:
        vars(one.module).pop(_MARK, None)
        if one.mesh is None:
            continue
        planned = True
        layer = model.get_submodule(one.name)
        try:
            _cut_layer(model, layer, one)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from None
    return planned


def _cut_layer(model: nn.Module, layer: nn.Module, held: Held) -> None:
    if held.style == "mla_kv_a_proj":
        layer.config = held.module.config
        _all_styles()[held.style].install_forward(layer, held.mesh)
    if type(layer) is not QuantLinear or held.style in _AS_IT_IS:
        return
    if held.style in _ROWWISE:
        cut_rowwise(layer, Group.of(held.mesh), split=_ROWWISE[held.style])
        return
    gather = _COLWISE[held.style]
    tied = any(isinstance(m, QuantEmbedding) and m.weight is layer.weight for m in model.modules())
    if not (tied and gather):  # else its weight is there anyway
        cut_colwise(layer, Group.of(held.mesh), gather=gather)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict with whole weights of layers that were cut; all processes must ask together."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, (ColwiseLinear, RowwiseLinear)):
            weight, bias = whole(layer)
            parts = {part: getattr(weight, attribute) for part, attribute in PARTS.items()} | {"bias": bias}
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return state
