"""Scales of input channels moved into the layer before, so that codes are finest where inputs are large.

Shapes    x (tokens, K) what Linears that share an input read, W (N, K) of each, s (K,) positive.
Theory    x W^T = (x / s) (W s)^T: columns of the weights are multiplied by s, and the norm or the Linear that gives x
          is divided by it. Nothing is left to do at run time.
Exactness s is rounded to powers of two, which change exponents alone: the smoothed model computes what it did before,
          bit for bit, but for float16 weights so near to zero that their exponents run out.
          Which module may take the division shows itself, without a table of architectures: with powers of two drawn
          at random the block must give the same bits as before, and without the division it must not.
Sources   Lin et al., AWQ, 2023: s_k = mean |x_k|^a, with the a of least error at the output. The output is the Linears'
          own here, by second moments, and not the block's. Xiao et al., SmoothQuant, 2022: s_k = max |x_k|^1/2 over
          max |W_k|^1/2, which shares outliers between inputs and weights, where both are quantized.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference
from qkernels.calibrate.walk import (
    Batch,
    Block,
    CalibrationError,
    Call,
    as_calls,
    evaluating,
    find_blocks,
    observe,
    record,
)
from qkernels.fit import fit
from qkernels.quality import floating_output
from qkernels.scheme import Scheme

METHODS = ("awq", "smoothquant")

_EXPONENTS = tuple(i / 20 for i in range(20))  # AWQ's a
_SHARE = 0.5  # of the outliers of inputs, which SmoothQuant lets the weights take over
_LEAST = 1e-4  # sizes of channels, relative to the largest: those that never come are not blown up without end


@contextlib.contextmanager
@torch.no_grad()
def smoothed(
    model: nn.Module,
    plan: Mapping[str, tuple[nn.Linear, Scheme]],
    batches: Iterable[Batch],
    method: str,
    progress: bool = True,
) -> Iterator[set[str]]:
    """Smooth a model's weights in place; gives the names of the Linears whose columns were scaled.

    They stay so, unless the body of the `with` raises: then every weight is what it was.

    Args:
        model: with its weights; on any device.
        plan: {name: (Linear of the model, scheme)}; columns of only these are scaled.
        batches: tensors, mappings of keyword arguments or sequences of positional ones, to call the model with.
        method: "awq" or "smoothquant".
        progress: whether to show a bar.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, inputs of a layer are not finite, or no
            Linear of the plan reads what a norm or another Linear of its block gives to it alone.
    """
    done: list[_Fold] = []
    try:
        for fold in _folds(model, plan, as_calls(batches, model), method, progress):
            fold.apply()
            done.append(fold)
        if not done:
            raise CalibrationError(
                f"smooth={method!r} has nothing to scale in {type(model).__name__}: no Linear reads what a norm or "
                "another Linear of its block gives to it alone"
            )
        yield {name for fold in done if fold.exponents.any() for name in fold.linears}
    except BaseException:
        for fold in reversed(done):
            fold.undo()
        raise


@dataclasses.dataclass
class _Fold:
    """Linears that read one input, the module that gives it, and what is moved between them.

    Attributes:
        linears: by name in the model.
        provider: whose outputs, channel by channel, are the input.
        exponents: (K,) of two: the Linears' columns are multiplied by these powers, and the provider is divided.
        kept: parameters that do not come back by powers of two, and what they were.
    """

    linears: Mapping[str, nn.Linear]
    provider: nn.Module
    exponents: Tensor
    kept: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)

    @property
    def moves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, exponents that it is multiplied by)."""
        for linear in self.linears.values():
            yield linear.weight, self.exponents
        for parameter in self.provider.parameters():
            yield parameter, -self.exponents.reshape(-1, *[1] * (parameter.ndim - 1))

    @property
    def finite(self) -> bool:
        """Whether no weight overflows."""
        return all(bool(torch.ldexp(p, by).isfinite().all()) for p, by in self.moves)

    def apply(self) -> None:
        """Change the weights in place."""
        for parameter, by in self.moves:
            new = torch.ldexp(parameter, by)
            if not torch.equal(torch.ldexp(new, -by), parameter):
                self.kept.append((parameter, parameter.clone()))
            parameter.data.copy_(new)

    def undo(self) -> None:
        """Change them back, to the bit."""
        for parameter, by in self.moves:
            parameter.data.copy_(torch.ldexp(parameter, -by))
        for parameter, original in self.kept:
            parameter.data.copy_(original)


def _folds(
    model: nn.Module, plan: Mapping[str, tuple[nn.Linear, Scheme]], calls: list[Call], method: str, progress: bool
) -> Iterator[_Fold]:
    """What may be moved, if only by 2^0; each must be applied before the next is asked for."""
    from tqdm import tqdm

    named: dict[nn.Module, str] = {linear: name for name, (linear, _) in plan.items()}
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    with evaluating(model):
        stages, hidden = record(model, find_blocks(model, named), calls)
        for block in tqdm(stages, desc="smoothing", unit="block", disable=not progress):
            inside = {path: m for path, m in block.module.named_modules() if m in named}
            seen = observe(block, inside, hidden)
            for step in seen.steps:
                linears: dict[str, Any] = {named[inside[path]]: inside[path] for path in step}
                x = torch.cat([inputs[step[0]] for inputs in seen.inputs if step[0] in inputs])
                if not torch.isfinite(x).all():
                    name = next(iter(linears))
                    raise CalibrationError(f"{name}: its inputs are not finite on the calibration batches")
                batch = next(i for i, inputs in enumerate(seen.inputs) if step[0] in inputs)
                provider = _provider(block, linears, uses, batch, hidden[batch], seen.outputs[batch])
                if provider is None:
                    continue
                weights = [(linear.weight.detach().float(), plan[name][1]) for name, linear in linears.items()]
                fold = _Fold(linears, provider, (_awq if method == "awq" else _smoothquant)(x, weights))
                yield fold if fold.finite else dataclasses.replace(fold, exponents=torch.zeros_like(fold.exponents))
            if hidden[0] is not None:
                hidden = seen.outputs


def _provider(
    block: Block,
    linears: Mapping[str, nn.Linear],
    uses: Mapping[int, int],
    batch: int,
    hidden: Tensor | None,
    wanted: Tensor,
) -> nn.Module | None:
    """The module whose output, and nothing else's, these Linears read, if nothing else reads it; proved on a batch."""
    features = next(iter(linears.values())).in_features
    call = block.calls[batch]
    if any(uses[id(linear.weight)] > 1 for linear in linears.values()):
        return None
    first = next(iter(linears.values()))
    exponents = torch.randint(-1, 2, (features,), generator=torch.Generator().manual_seed(0)).to(first.weight.device)
    nothing = _Fold(linears, nn.Module(), exponents)
    if _same(block, nothing, call, hidden, wanted):
        return None  # the output does not show what the Linears do
    for candidate in _called_before(block, set(linears.values()), call, hidden):
        own = list(candidate.parameters())
        fits = all(p.is_floating_point() and p.shape[:1] == (features,) and uses[id(p)] == 1 for p in own)
        if fits and _same(block, dataclasses.replace(nothing, provider=candidate), call, hidden, wanted):
            return candidate
    return None


def _same(block: Block, fold: _Fold, call: Call, hidden: Tensor | None, wanted: Tensor) -> bool:
    """Whether the block's output keeps every bit."""
    paths = {id(p): path for path, p in block.module.named_parameters()}
    changed = {paths[id(p)]: torch.ldexp(p, by) for p, by in fold.moves}
    args = call.args if hidden is None else (hidden, *call.args)
    found = floating_output(torch.func.functional_call(block.module, changed, args, call.kwargs, tie_weights=False))
    return found is not None and torch.equal(found, wanted)


def _called_before(block: Block, linears: set[nn.Module], call: Call, hidden: Tensor | None) -> list[nn.Module]:
    """Modules with parameters of their own that run before any of the Linears, the latest first."""
    order: list[nn.Module] = []
    leaves = [m for m in block.module.modules() if not list(m.children()) and list(m.parameters())]
    handles = [leaf.register_forward_pre_hook(lambda module, _: order.append(module)) for leaf in leaves]
    try:
        call.run(block.module, hidden)
    finally:
        for handle in handles:
            handle.remove()
    first = next(i for i, module in enumerate(order) if module in linears)
    return list(dict.fromkeys(reversed(order[:first])))


def _awq(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of the scales that lose least at the output, rounded to nearest."""
    hessian = x.T @ x
    size = x.abs().mean(0)
    best, least = torch.zeros_like(size, dtype=torch.int32), float("inf")
    for share in _EXPONENTS:
        exponents = _powers(share * _log2(size))
        loss = 0.0
        for weight, scheme in weights:
            scaled = torch.ldexp(weight, exponents)
            try:
                scale, zero = fit(scaled, scheme, "rtn")
            except ValueError:  # a scale that cannot be stored
                loss = float("inf")
                break
            code = reference.encode(scaled, scale, zero, scheme)
            miss = torch.ldexp(reference.decode(code, scale, zero, scheme).float(), -exponents) - weight
            loss += float(((miss @ hessian) * miss).sum())
        if loss < least:
            best, least = exponents, loss
    return best


def _smoothquant(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of scales that share outliers between inputs and weights."""
    largest = torch.stack([weight.abs().amax(0) for weight, _ in weights]).amax(0)
    return _powers(_SHARE * _log2(x.abs().amax(0)) - (1 - _SHARE) * _log2(largest))


def _log2(size: Tensor) -> Tensor:
    return size.clamp(min=max(_LEAST * float(size.max()), torch.finfo(torch.float32).tiny)).log2()


def _powers(exact: Tensor) -> Tensor:
    """Whole exponents, as many up as down: a factor for all channels would change nothing."""
    return (exact - (exact.max() + exact.min()) / 2).round().to(torch.int32)
