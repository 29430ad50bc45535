"""Walking a model block by block, with the inputs that each Linear gets: the original's, and the quantized model's.

A block is a module of the model's longest list of layers. Hidden states of one block are held at a time, twice: those
of the original model and those that the quantized blocks before it give.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import CalibrationError, Call, listening, rows, run_batch
from qkernels.quality import floating_output


@dataclasses.dataclass
class Block:
    """One stage of the walk.

    Attributes:
        name: of the module, "" for the whole model.
        module: the block of the original model.
        calls: one for each batch.
    """

    name: str
    module: nn.Module
    calls: list[Call]


class _Reached(Exception):  # noqa: N818 - no error
    """Enough of a forward has run."""


def find_blocks(model: nn.Module, linears: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the blocks: of the ModuleList that holds most of the Linears, or the model itself."""
    wanted = set(linears)
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            count = sum(m in wanted for m in module.modules())
            if count > best[0]:  # the outermost of equals
                best = (count, name, module)
    if best[2] is None:
        return [("", model)]
    return [(f"{best[1]}.{i}", block) for i, block in enumerate(best[2])]


@torch.no_grad()
def record(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], calls: Sequence[Call]
) -> tuple[list[Block], list[Tensor | None]]:
    """Blocks with what each batch calls them with, and the hidden states that the first gets.

    Raises:
        CalibrationError: the model fails on a batch, or does not hand the hidden states from block to block.
    """
    if blocks[0][1] is model:
        return [Block("", model, list(calls))], [None] * len(calls)
    stages = [Block(name, module, []) for name, module in blocks]
    first: list[Tensor | None] = []
    for i, call in enumerate(calls):
        _record_one(model, stages, call, first, i)
    return stages, first


def _record_one(model: nn.Module, stages: list[Block], call: Call, first: list[Tensor | None], i: int) -> None:
    reached: list[int] = []
    last: list[Any] = [None]

    def before(stage: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            hidden = args[0] if args else kwargs.get("hidden_states")
            if len(reached) != stage or not isinstance(hidden, Tensor) or (stage and hidden is not last[0]):
                raise CalibrationError(
                    f"calibration needs blocks that pass their hidden states on, one after the other; "
                    f"{stages[stage].name} is not called so"
                )
            reached.append(stage)
            if stage == 0:
                first.append(hidden.clone())
            # A cache would grow with every run of the block.
            rest = {k: None if k in ("past_key_values", "past_key_value", "layer_past") else v for k, v in rest.items()}
            rest = {k: False if k == "use_cache" else v for k, v in rest.items()}
            stages[stage].calls.append(Call(args[1:], rest, call.mask))

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last[0] = floating_output(output)

    handles = []
    for stage, block in enumerate(stages):
        handles.append(block.module.register_forward_pre_hook(before(stage), with_kwargs=True))
        handles.append(block.module.register_forward_hook(after))
    try:
        run_batch(model, call, i)
    finally:
        for handle in handles:
            handle.remove()
    if len(reached) != len(stages):
        raise CalibrationError(f"calibration batch {i} never reaches {stages[len(reached)].name}")


@dataclasses.dataclass
class Observed:
    """What goes through a block, over all batches.

    Attributes:
        inputs: {path of a Linear: (tokens, K) float32} for each batch; it lacks those that are not reached.
        steps: paths of Linears that read one input together, in order.
        returned: what the block gives, for each batch.
    """

    inputs: list[dict[str, Tensor]]
    steps: list[list[str]]
    returned: list[Any]

    @property
    def outputs(self) -> list[Any]:
        """The block's hidden states, for each batch."""
        return [floating_output(output) for output in self.returned]


def observe(block: Block, linears: Mapping[str, nn.Module], hidden: Sequence[Tensor | None]) -> Observed:
    """Run a block over all batches and watch some of its Linears, {path in the block: Linear}."""
    found = Observed([], [], [])
    for i, (call, states) in enumerate(zip(block.calls, hidden, strict=True)):
        inputs, groups, output = inputs_of(block.module, linears, call, states, i)
        found.inputs.append(inputs)
        found.returned.append(output)
        known = {path for step in found.steps for path in step}
        found.steps += [fresh for group in groups if (fresh := [path for path in group if path not in known])]
    return found


def inputs_of(
    module: nn.Module, linears: Mapping[str, nn.Module], call: Call, hidden: Tensor | None, batch: int
) -> tuple[dict[str, Tensor], list[list[str]], Any]:
    """Inputs (tokens, K) of a block's Linears in one call, those that share an input together, and the output."""
    inputs: dict[str, Tensor] = {}
    shared: list[tuple[Tensor, list[str]]] = []

    def hear(name: str, x: Tensor) -> None:
        own = rows(x.detach(), call.mask)
        inputs[name] = torch.cat([inputs[name], own]) if name in inputs else own
        names = next((names for known, names in shared if known is x), None)
        if names is None:
            shared.append((x, [name]))
        elif name not in names:
            names.append(name)

    with listening(linears, hear):
        output = run_batch(module, call, batch) if hidden is None else call.run(module, hidden)
    seen: set[str] = set()
    groups = []
    for _, names in shared:
        fresh = [name for name in names if name not in seen]
        seen.update(fresh)
        if fresh:
            groups.append(fresh)
    return inputs, groups, output


def input_until(module: nn.Module, linear: nn.Module, call: Call, hidden: Tensor | None) -> Iterator[Tensor]:
    """The input (tokens, K) of one Linear in a call, which then goes no further."""
    found: list[Tensor] = []

    def hear(_: str, x: Tensor) -> None:
        found.append(rows(x.detach(), call.mask))
        raise _Reached

    with contextlib.suppress(_Reached), listening({"": linear}, hear):
        call.run(module, hidden)
    return iter(found)
