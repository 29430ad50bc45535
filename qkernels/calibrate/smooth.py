"""Scales of input channels moved into the layer before, so that codes are finest where inputs are large.

Shapes    x (tokens, K) what Linears that share an input read, W (N, K) of each, s (K,) positive.
Theory    x W^T = (x / s) (W s)^T: columns of the weights are multiplied by s, and the norm or the Linear that gives x
          is divided by it. Nothing is left to do at run time.
Exactness s is rounded to powers of two, which change exponents alone: the smoothed model computes what it did before,
          bit for bit (float16 has so few exponents that numbers near to zero may lose bits).
          Which module may take the division shows itself, without a table of architectures: with powers of two drawn
          at random the block must give the same bits as before, and without the division it must not. What is then
          done is proved likewise, on all batches; of code that no batch reaches nothing is known.
Sources   Lin et al., AWQ, 2023: s_k = mean |x_k|^a, with the a of least error at the output. The output is the Linears'
          own here, by second moments, and not the block's. Xiao et al., SmoothQuant, 2022: s_k = max |x_k|^1/2 over
          max |W_k|^1/2, which shares outliers between inputs and weights, where both are quantized.
"""

from __future__ import annotations

import collections
import contextlib
import copy
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
    rows,
    run_batch,
)
from qkernels.fit import fit
from qkernels.scheme import Scheme

METHODS = ("awq", "smoothquant")

_AWQ_POWERS = tuple(i / 20 for i in range(20))  # AWQ's a
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
        plan: {name: (Linear of the model, scheme)}; columns of only these are scaled, but any norm or Linear divided.
        batches: tensors, mappings of keyword arguments or sequences of positional ones, to call the model with.
        method: "awq" or "smoothquant".
        progress: whether to show a bar.

    Raises:
        CalibrationError: batches are none or empty, the model fails on one, inputs of a layer are not finite, no Linear
            of the plan reads what a norm or another Linear of its block gives to it alone, or the model's output
            changes although no block's does, since blocks hand each other more than they return.
    """
    done: list[_Fold] = []
    calls = as_calls(batches, model)
    try:
        with evaluating(model):
            before = _tensors(run_batch(model, calls[0], 0), calls[0])
            for fold in _folds(model, plan, calls, method, progress):
                done.append(fold)
                fold.apply()
            if not done:
                raise CalibrationError(
                    f"smooth={method!r} has nothing to scale in {type(model).__name__}: no Linear reads what a norm or "
                    "another Linear of its block gives to it alone"
                )
            after = _tensors(run_batch(model, calls[0], 0), calls[0])
        if not _equal(before, after) and not _has_half(model):
            raise CalibrationError(
                f"smooth={method!r} would change what {type(model).__name__} returns, though no block's output: its "
                "blocks hand each other more than they return"
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
        moved: what was changed so far, and by what; and what it was, where powers of two do not bring it back.
    """

    linears: Mapping[str, nn.Linear]
    provider: nn.Module
    exponents: Tensor
    moved: list[tuple[Tensor, Tensor, Tensor | None]] = dataclasses.field(default_factory=list)

    @property
    def moves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, exponents of two that it is multiplied by)."""
        for linear in self.linears.values():
            yield linear.weight, self.exponents.to(linear.weight.device)
        for p in self.provider.parameters():
            yield p, -self.exponents.reshape(-1, *[1] * (p.ndim - 1)).to(p.device)

    @property
    def finite(self) -> bool:
        """Whether no weight overflows."""
        return all(bool(_scaled(p, by).isfinite().all()) for p, by in self.moves)

    def apply(self) -> None:
        """Change the weights in place."""
        for parameter, by in self.moves:
            new = _scaled(parameter, by)
            original = None if torch.equal(_scaled(new, -by), parameter) else parameter.clone()
            parameter.data.copy_(new)
            self.moved.append((parameter, by, original))

    def undo(self) -> None:
        """Change them back, to the bit."""
        for parameter, by, original in reversed(self.moved):
            if original is None:
                parameter.data.mul_(_power(-by))
            else:
                parameter.data.copy_(original)


class _Proof:
    """Whether a block would return the same bits with other weights. What is float16 computes in float32 here.

    Args:
        block: with what it is called with.
        hidden: states that it gets.
        returned: by it, for each batch.
    """

    def __init__(self, block: Block, hidden: Sequence[Tensor | None], returned: Sequence[Any]):
        self.block, self.module, self.calls, self.hidden = block, block.module, block.calls, hidden
        self.paths = {id(p): path for path, p in block.module.named_parameters()}
        if _has_half(block.module):
            self.module = copy.deepcopy(block.module).float()
            self.calls = [Call(_widened(c.args), _widened(c.kwargs), c.mask) for c in block.calls]
            self.hidden = _widened(list(hidden))
            returned = [call.run(self.module, h) for call, h in zip(self.calls, self.hidden, strict=True)]
        self.wanted = [_tensors(output, call) for output, call in zip(returned, self.calls, strict=True)]
        self.parameters = dict(self.module.named_parameters())

    def same(self, folds: Iterable[_Fold], batches: Iterable[int] | None = None) -> bool:
        """Whether all bits are the same with these, on some batches or on all."""
        changed: dict[str, Tensor] = {}
        for fold in folds:
            for parameter, by in fold.moves:
                path = self.paths[id(parameter)]
                changed[path] = _scaled(changed.get(path, self.parameters[path]), by)
        for i in range(len(self.calls)) if batches is None else batches:
            call, states = self.calls[i], self.hidden[i]
            args = call.args if states is None else (states, *call.args)
            found = torch.func.functional_call(self.module, changed, args, call.kwargs, tie_weights=False)
            if not _equal(_tensors(found, call), self.wanted[i]):
                return False
        return True


def _folds(
    model: nn.Module, plan: Mapping[str, tuple[nn.Linear, Scheme]], calls: list[Call], method: str, progress: bool
) -> Iterator[_Fold]:
    """What may be moved, if only by 2^0."""
    from tqdm import tqdm

    named: dict[nn.Module, str] = {linear: name for name, (linear, _) in plan.items()}
    uses = collections.Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    stages, hidden = record(model, find_blocks(model, named), calls)
    for block in tqdm(stages, desc="smoothing", unit="block", disable=not progress):
        inside = {path: m for path, m in block.module.named_modules() if m in named}
        seen = observe(block, inside, hidden)
        proof = _Proof(block, hidden, seen.returned)
        folds = []
        for step in seen.steps:
            linears: dict[str, Any] = {named[inside[path]]: inside[path] for path in step}
            x = torch.cat([inputs[step[0]] for inputs in seen.inputs if step[0] in inputs])
            if not torch.isfinite(x).all():
                name = next(iter(linears))
                raise CalibrationError(f"{name}: its inputs are not finite on the calibration batches")
            reached = next(i for i, inputs in enumerate(seen.inputs) if step[0] in inputs)
            provider = _provider(proof, linears, uses, reached, hidden[reached])
            if provider is not None and x.numel():
                weights = [(linear.weight.detach().float(), plan[name][1]) for name, linear in linears.items()]
                folds.append(_Fold(linears, provider, (_awq if method == "awq" else _smoothquant)(x, weights)))
        whole = proof.same(folds)
        for fold in folds:
            proved = fold.finite and (whole or proof.same([fold]))
            yield fold if proved else dataclasses.replace(fold, exponents=torch.zeros_like(fold.exponents))
        if hidden[0] is not None:
            hidden = seen.outputs


def _provider(
    proof: _Proof, linears: Mapping[str, nn.Linear], uses: Mapping[int, int], batch: int, hidden: Tensor | None
) -> nn.Module | None:
    """The module whose outputs these Linears read, and nothing else does, as a batch shows; None without one."""
    first = next(iter(linears.values()))
    if any(uses[linear.weight.data_ptr()] > 1 for linear in linears.values()):
        return None
    # No channel keeps its size, and a clamp would show.
    drawn = torch.randint(0, 4, (first.in_features,), generator=torch.Generator().manual_seed(0))
    nobody = _Fold(linears, nn.Module(), torch.tensor([-2, -1, 1, 2])[drawn].to(first.weight.device))
    if proof.same([nobody], [batch]):
        return None  # the output does not show what the Linears do
    for candidate in _called_before(proof.block, set(linears.values()), batch, hidden):
        own = list(candidate.parameters())
        fits = all(
            p.is_floating_point() and p.shape[:1] == (first.in_features,) and uses[p.data_ptr()] == 1 for p in own
        )
        if fits and proof.same([dataclasses.replace(nobody, provider=candidate)], [batch]):
            return candidate
    return None


def _called_before(block: Block, linears: set[nn.Module], batch: int, hidden: Tensor | None) -> list[nn.Module]:
    """Modules of the block with parameters of their own that run before any of the Linears, the latest first."""
    order: list[nn.Module] = []
    leaves = [m for m in block.module.modules() if not list(m.children()) and list(m.parameters())]
    handles = [leaf.register_forward_pre_hook(lambda module, _: order.append(module)) for leaf in leaves]
    try:
        block.calls[batch].run(block.module, hidden)
    finally:
        for handle in handles:
            handle.remove()
    first = next(i for i, module in enumerate(order) if module in linears)
    return list(dict.fromkeys(reversed(order[:first])))


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    """x 2^by, in x's dtype."""
    return (x * _power(by)).to(x.dtype)


def _power(by: Tensor) -> Tensor:
    """float32 2^by, for by from -126 to 127: its bits, as a GPU's pow, and so torch.ldexp, need not be exact."""
    return ((by.to(torch.int32) + 127) << 23).view(torch.float32)


def _has_half(module: nn.Module) -> bool:
    return any(p.dtype == torch.float16 for p in module.parameters())


def _widened(value: Any) -> Any:
    """float16 tensors, also those in tuples, lists and mappings, as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float16 else value
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return type(value)(map(_widened, value)) if type(value) in (tuple, list) else value


def _tensors(output: Any, call: Call) -> list[Tensor]:
    """Floating tensors in what a module returned, without padding."""
    if isinstance(output, Tensor):
        return [rows(output, call.mask) if output.ndim else output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item, call)]


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))


def _awq(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of the scales that lose least at the output, rounded to nearest."""
    hessian = x.T @ x
    size = x.abs().mean(0)
    best, least = torch.zeros_like(size, dtype=torch.int32), float("inf")
    for share in _AWQ_POWERS:
        exponents = _whole(share * _log2(size))
        loss = 0.0
        for weight, scheme in weights:
            scaled = _scaled(weight, exponents)
            try:
                scale, zero = fit(scaled, scheme, "rtn")
            except ValueError:  # a scale that cannot be stored
                loss = float("inf")
                break
            code = reference.encode(scaled, scale, zero, scheme)
            miss = _scaled(reference.decode(code, scale, zero, scheme).float(), -exponents) - weight
            loss += float(((miss @ hessian) * miss).sum())
        if loss < least:
            best, least = exponents, loss
    return best


def _smoothquant(x: Tensor, weights: Sequence[tuple[Tensor, Scheme]]) -> Tensor:
    """Exponents (K,) of two of scales that share outliers between inputs and weights."""
    largest = torch.stack([weight.abs().amax(0) for weight, _ in weights]).amax(0)
    return _whole(_SHARE * _log2(x.abs().amax(0)) - (1 - _SHARE) * _log2(largest))


def _log2(size: Tensor) -> Tensor:
    return size.clamp(min=max(_LEAST * float(size.max()), torch.finfo(torch.float32).tiny)).log2()


def _whole(exact: Tensor) -> Tensor:
    """Whole exponents, as many up as down: a factor for all channels would change nothing."""
    return (exact - (exact.max() + exact.min()) / 2).round().to(torch.int32)
