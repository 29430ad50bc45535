"""Which Linears of a model are quantized, each by which scheme, and whether they can be."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from qkernels import reference
from qkernels.checks import DTYPES
from qkernels.scheme import Scheme, as_scheme

# The output layer is often tied to the embedding, and always the one whose error the logits see undiluted.
DEFAULT_SKIP = ("lm_head", "*.lm_head")


def select(
    model: nn.Module, default: Scheme | None, skip: Sequence[str], schemes: Mapping[str, str | Scheme | None]
) -> tuple[dict[str, tuple[nn.Linear, Scheme]], list[str]]:
    """({name: (layer, scheme)}, names left alone)."""
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}; write skip=[{skip!r}]")
    parsed = {pattern: None if s is None else as_scheme(s) for pattern, s in schemes.items()}
    names: dict[nn.Module, list[str]] = {}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)
    if any("" in found for found in names.values()):
        raise ValueError("model is itself an nn.Linear, which cannot be replaced in place; use QuantLinear.from_linear")
    for pattern in [*skip, *parsed]:
        if pattern not in DEFAULT_SKIP and not any(_fits(pattern, found) for found in names.values()):
            example = next(iter(names.values()), ["none"])[0]
            raise ValueError(f"pattern {pattern!r} fits no nn.Linear of the model; names are like {example!r}")
    plan: dict[str, tuple[nn.Linear, Scheme]] = {}
    skipped = []
    for module, found in names.items():
        named = next((pattern for pattern in parsed if _fits(pattern, found)), None)
        chosen = default if named is None else parsed[named]
        spared = any(_fits(pattern, found) for pattern in skip) and not (named is not None and skip is DEFAULT_SKIP)
        if chosen is None or spared or type(module) is not nn.Linear:
            skipped.append(found[0])
        else:
            plan[found[0]] = module, chosen
    if not plan:
        left = f"only {', '.join(skipped)}, left alone" if skipped else "none"
        raise ValueError(f"model ({type(model).__name__}) holds no nn.Linear to quantize: {left}")
    return plan, skipped


def _fits(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check_quantizable(name: str, linear: nn.Linear, scheme: Scheme) -> None:
    """Raise ValueError or TypeError, naming the layer, unless it can be replaced by a quantized one."""
    weight = linear.weight.detach()
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}.weight must be float16, bfloat16 or float32, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load the weights first")
    if (
        "forward" in vars(linear)
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    ):
        raise ValueError(f"{name} has hooks or a forward of its own, which would be lost: remove them first")
    try:
        reference.scale_and_zero(*reference.group_range(weight, scheme), scheme)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None
