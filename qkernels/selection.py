"""Which weights of a model are quantized, each by which scheme, and whether they can be."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from qkernels import reference
from qkernels.checks import DTYPES, check_sums
from qkernels.experts import projections, put_experts, stacked
from qkernels.replace import counterpart, places, put, tie
from qkernels.scheme import Scheme, as_scheme
from qkernels.source import weights_read
from qkernels.tensor import QTensor

# The output layer is often tied to the embedding, and always the one whose error the logits see undiluted.
DEFAULT_SKIP = ("lm_head", "*.lm_head")


@dataclasses.dataclass(frozen=True)
class Extra:
    """A weight that is not a Linear's and is quantized on its own: a projection of all experts, or an embedding.

    Attributes:
        weight: gives it as a float matrix, detached; rows are what a scale per channel belongs to.
        scheme: to quantize it by.
        put: puts what it became in its place.
        replaced: gives the layers that go: the embedding, and output layers that are tied to it.
    """

    weight: Callable[[], Tensor]
    scheme: Scheme
    put: Callable[[QTensor], None]
    replaced: Callable[[], Sequence[nn.Module]] = lambda: ()


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a model is quantized.

    Attributes:
        linears: {name: (layer, scheme)}.
        extras: {name: another weight}.
        skipped: names of Linears and projections of experts that are left alone, and of embeddings that have to be.
    """

    linears: dict[str, tuple[nn.Linear, Scheme]]
    extras: dict[str, Extra]
    skipped: tuple[str, ...]


def select(
    model: nn.Module,
    default: Scheme | None,
    skip: Sequence[str],
    schemes: Mapping[str, str | Scheme | None],
    embeddings: Scheme | None = None,
) -> Selection:
    """What of a model is quantized; arguments as of quantize_model.

    Raises:
        TypeError, ValueError: a pattern of the user's fits nothing, or there is nothing to quantize.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}; write skip=[{skip!r}]")
    parsed = {pattern: None if s is None else as_scheme(s) for pattern, s in schemes.items()}
    names = _candidates(model, embeddings is not None)
    known = [
        found if not p else [f"{path}.{p}" for path in found]
        for m, found in names.items()
        for p in projections(m) or [""]
    ]
    for pattern in [*skip, *parsed]:
        if pattern not in DEFAULT_SKIP and not any(_fits(pattern, found) for found in known):
            example = next(iter(known), ["none"])[0]
            raise ValueError(f"pattern {pattern!r} fits no nn.Linear of the model; names are like {example!r}")

    read = _read_by_their_parents(model, names)

    def chosen(found: Sequence[str], otherwise: Scheme | None, module: nn.Module | None = None) -> Scheme | None:
        named = next((pattern for pattern in parsed if _fits(pattern, found)), None)
        if any(_fits(pattern, found) for pattern in skip) and not (named is not None and skip is DEFAULT_SKIP):
            return None
        if named is None:
            return None if module in read else otherwise
        return parsed[named]

    linears: dict[str, tuple[nn.Linear, Scheme]] = {}
    extras: dict[str, Extra] = {}
    alone: dict[str, nn.Module] = {}
    for module, found in names.items():
        if isinstance(module, nn.Linear):
            scheme = chosen(found, default, module)
            if scheme is None or type(module) is not nn.Linear:
                alone[found[0]] = module
            else:
                linears[found[0]] = module, scheme
        elif not isinstance(module, nn.Embedding):
            own = {p: chosen([f"{path}.{p}" for path in found], default) for p in projections(module)}
            for p, scheme in own.items():
                if scheme is None or None in own.values():  # a layer's experts are quantized together
                    alone[f"{found[0]}.{p}"] = module
                else:
                    extras[f"{found[0]}.{p}"] = _projection(module, p, scheme)
    for module, found in names.items():
        if isinstance(module, nn.Embedding):
            scheme = chosen(found, embeddings, module)
            if scheme is not None:
                alone = {n: m for n, m in alone.items() if not _is_tied(m, module)}
                extras[found[0]] = _embedding(model, found[0], module, scheme)
            elif module in read:
                alone[found[0]] = module
    if not linears and not extras:
        left = f"only {', '.join(alone)}, left alone" if alone else "none"
        raise ValueError(f"model ({type(model).__name__}) holds no nn.Linear to quantize: {left}")
    return Selection(linears, extras, tuple(alone))


def _candidates(model: nn.Module, embeddings: bool) -> dict[nn.Module, list[str]]:
    """{layer: its names} of Linears, modules that hold projections of experts and, if wanted, embeddings."""
    names: dict[nn.Module, list[str]] = {}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or projections(module) or (embeddings and type(module) is nn.Embedding):
            names.setdefault(module, []).append(name)
    if any("" in found for found in names.values()):
        raise ValueError(
            f"model is itself an nn.{type(model).__name__}, which cannot be replaced in place; use "
            "QuantLinear.from_linear, or put it into a module"
        )
    return names


def _read_by_their_parents(model: nn.Module, names: Mapping[nn.Module, Sequence[str]]) -> set[nn.Module]:
    """Layers whose weight the code of a parent uses itself, as T5's feed-forward does: it would take codes for floats.

    And the embeddings that such an output layer is tied to, or will be once transformers has loaded the weights.
    """
    read = {
        module
        for module, where in places(model).items()
        if module in names and any(child in weights_read(cast(Any, type(parent))) for parent, child in where)
    }
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sources = {tied[f"{name}.weight"] for module in read for name in names[module] if f"{name}.weight" in tied}
    return read | {
        module
        for module, found in names.items()
        if isinstance(module, nn.Embedding)
        and (any(_is_tied(output, module) for output in read) or any(f"{name}.weight" in sources for name in found))
    }


def _projection(module: nn.Module, name: str, scheme: Scheme) -> Extra:
    def place(weight: QTensor) -> None:
        put_experts(module, name, weight)

    return Extra(lambda: stacked(module, name), scheme.dynamic, place)  # few batches reach every expert


def _embedding(model: nn.Module, name: str, module: nn.Embedding, scheme: Scheme) -> Extra:
    if module.max_norm is not None:
        raise ValueError(f"{name} has a max_norm, which changes its weight in use: it cannot be quantized")
    if scheme.activations is not None:
        raise ValueError(
            f"{name} is an embedding, which has no inputs to quantize: scheme '{scheme.weight_only}' is for it, got "
            f"'{scheme}'"
        )

    def outputs() -> list[nn.Module]:
        return [output for output in places(model) if _is_tied(output, module)]

    def place(weight: QTensor) -> None:
        where = places(model)
        layer = counterpart(module, weight)
        for output in outputs():
            put(tie(counterpart(output, weight), layer), where[output])
        put(layer, where[module])

    # not bound: a loader may replace the weight
    return Extra(lambda: module.weight.detach(), scheme, place, lambda: [module, *outputs()])


def _is_tied(module: nn.Module, to: nn.Embedding) -> bool:
    """Whether it is an output layer that shares the weight of an embedding."""
    return type(module) is nn.Linear and module.weight is to.weight


def _fits(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check_quantizable(name: str, linear: nn.Linear, scheme: Scheme) -> None:
    """Raise ValueError or TypeError, naming the layer, unless it can be replaced by a quantized one."""
    check_weight(name, linear.weight.detach(), scheme)
    _check_hooks(name, linear)


def check_extra(name: str, extra: Extra) -> None:
    """Likewise for another weight."""
    check_weight(name, extra.weight(), extra.scheme)
    for layer in extra.replaced():
        _check_hooks(name if isinstance(layer, nn.Embedding) else f"an output layer tied to {name}", layer)


def _check_hooks(name: str, layer: nn.Module) -> None:
    """Raise ValueError if a layer that is to be replaced has what would go with it."""
    if (
        "forward" in vars(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        raise ValueError(f"{name} has hooks or a forward of its own, which would be lost: remove them first")


def check_weight(name: str, weight: Tensor, scheme: Scheme) -> None:
    """Raise ValueError or TypeError, naming the layer, unless its weight can be quantized."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}.weight must be float16, bfloat16 or float32, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load the weights first")
    try:
        reference.scale_and_zero(*reference.group_range(weight, scheme), scheme)
        check_sums(scheme, weight.shape[1])
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None
