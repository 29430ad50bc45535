"""Weights multiplied by powers of two, what gives their input divided by them, and the proof that no output changes.

Which module may take the division shows itself, without a table of architectures: with powers of two drawn at random a
block must give the same bits as before, and without the division it must not. What is then done is proved likewise, on
all batches; of code that no batch reaches nothing is known.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import Call, unpadded
from qkernels.calibrate.walk import Block


@dataclasses.dataclass
class Fold:
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
        return all(bool(scaled(p, by).isfinite().all()) for p, by in self.moves)

    def apply(self) -> None:
        """Change the weights in place."""
        for parameter, by in self.moves:
            new = scaled(parameter, by)
            original = None if torch.equal(scaled(new, -by), parameter) else parameter.clone()
            parameter.data.copy_(new)
            self.moved.append((parameter, by, original))

    def undo(self) -> None:
        """Change them back, to the bit."""
        for parameter, by, original in reversed(self.moved):
            if original is None:
                parameter.data.mul_(_power(-by))
            else:
                parameter.data.copy_(original)


class Proof:
    """Whether a block would return the same bits with other weights. What is float16 computes in float32 here.

    Args:
        block: with what it is called with.
        hidden: states that it gets.
        returned: by it, for each batch.
    """

    def __init__(self, block: Block, hidden: Sequence[Tensor | None], returned: Sequence[Any]):
        self.block, self.module, self.calls, self.hidden = block, block.module, block.calls, hidden
        self.paths = {id(p): path for path, p in block.module.named_parameters()}
        if has_half(block.module):
            self.module = copy.deepcopy(block.module).float()
            self.calls = [dataclasses.replace(c, args=_widened(c.args), kwargs=_widened(c.kwargs)) for c in block.calls]
            self.hidden = _widened(list(hidden))
            returned = [call.run(self.module, h) for call, h in zip(self.calls, self.hidden, strict=True)]
        self.wanted = [tensors(output, call) for output, call in zip(returned, self.calls, strict=True)]
        self.parameters = dict(self.module.named_parameters())

    def same(self, folds: Iterable[Fold], batches: Iterable[int] | None = None) -> bool:
        """Whether all bits are the same with these, on some batches or on all."""
        changed: dict[str, Tensor] = {}
        for fold in folds:
            for parameter, by in fold.moves:
                path = self.paths[id(parameter)]
                changed[path] = scaled(changed.get(path, self.parameters[path]), by)
        for i in range(len(self.calls)) if batches is None else batches:
            call, states = self.calls[i], self.hidden[i]
            args = call.args if states is None else (states, *call.args)
            found = torch.func.functional_call(self.module, changed, args, call.kwargs, tie_weights=False)
            if not equal(tensors(found, call), self.wanted[i]):
                return False
        return True


def provider_of(
    proof: Proof, linears: Mapping[str, nn.Linear], uses: Mapping[int, int], batch: int, hidden: Tensor | None
) -> nn.Module | None:
    """The module whose outputs these Linears read, and nothing else does, as a batch shows; None without one."""
    first = next(iter(linears.values()))
    if any(uses[linear.weight.data_ptr()] > 1 for linear in linears.values()):
        return None
    # No channel keeps its size, and a clamp would show.
    drawn = torch.randint(0, 4, (first.in_features,), generator=torch.Generator().manual_seed(0))
    nobody = Fold(linears, nn.Module(), torch.tensor([-2, -1, 1, 2])[drawn].to(first.weight.device))
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


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x 2^by, in x's dtype."""
    return (x * _power(by)).to(x.dtype)


def _power(by: Tensor) -> Tensor:
    """float32 2^by, for by from -126 to 127: its bits, as a GPU's pow, and so torch.ldexp, need not be exact."""
    return ((by.to(torch.int32) + 127) << 23).view(torch.float32)


def has_half(module: nn.Module) -> bool:
    """Whether any of its parameters is float16."""
    return any(p.dtype == torch.float16 for p in module.parameters())


def _widened(value: Any) -> Any:
    """float16 tensors, also those in tuples, lists and mappings, as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float16 else value
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return type(value)(map(_widened, value)) if type(value) in (tuple, list) else value


def tensors(output: Any, call: Call) -> list[Tensor]:
    """Floating tensors in what a module returned, without padding."""
    if isinstance(output, Tensor):
        return [unpadded(output, call.mask) if output.ndim else output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item, call)]


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all bits are; none at all show nothing."""
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))
