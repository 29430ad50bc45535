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

from qkernels.quality import field, floating_output

Batch = Tensor | Mapping[str, Any] | Sequence[Any]


class CalibrationError(ValueError):
    """Batches, or the model on them, cannot serve for calibration; the message names the batch or the layer."""


@dataclasses.dataclass
class Call:
    """What a module is called with, but for the hidden states that come first.

    Attributes:
        args: positional.
        kwargs: by name.
        mask: (batch, tokens), zero for padding, which counts nowhere; None if there is none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    def run(self, module: nn.Module, hidden: Tensor | None) -> Any:
        """The module's output; without hidden states the arguments are whole."""
        return module(*self.args, **self.kwargs) if hidden is None else module(hidden, *self.args, **self.kwargs)


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


def as_calls(batches: Iterable[Batch], model: nn.Module) -> list[Call]:
    """Batches as calls of the model.

    Raises:
        CalibrationError: there are none, or one is empty or no tensor, mapping or sequence.
    """
    if isinstance(batches, (Tensor, str, Mapping)):
        raise CalibrationError(f"calibration must be an iterable of batches, got one {type(batches).__name__}")
    calls = []
    for i, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            call = Call((batch,), {})
        elif isinstance(batch, Mapping):
            call = Call((), dict(batch))
        elif isinstance(batch, (tuple, list)):
            call = Call(tuple(batch), {})
        else:
            raise CalibrationError(
                f"calibration batch {i} must be a Tensor, a mapping of keyword arguments or a sequence of positional "
                f"ones, got {type(batch).__name__}"
            )
        tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
        if not tensors or any(t.numel() == 0 for t in tensors):
            raise CalibrationError(f"calibration batch {i} is empty")
        if (mask := padding(call.kwargs)) is not None and not mask.any():
            raise CalibrationError(f"calibration batch {i} is all padding: its attention_mask is zero everywhere")
        calls.append(call)
    if not calls:
        raise CalibrationError("calibration holds no batches")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [_moved(call, device) for call in calls]


def _moved(call: Call, device: torch.device) -> Call:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    kwargs = {k: move(v) for k, v in call.kwargs.items()}
    return Call(tuple(map(move, call.args)), kwargs, padding(kwargs))


def padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention_mask (batch, tokens) in what a model is called with, if there is such a one; zero is padding.

    One of floating numbers may be meant to be added, with zero for what counts: it is not taken for such a mask.
    """
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() else None


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


def run_batch(model: nn.Module, call: Call, i: int) -> Any:
    """The model's output on batch i; CalibrationError, naming the batch, if it fails."""
    try:
        return call.run(model, None)
    except CalibrationError:  # a hook's
        raise
    except Exception as error:
        raise CalibrationError(f"the model fails on calibration batch {i}: {type(error).__name__}: {error}") from error


def predictions(output: Any, call: Call, batch: int) -> tuple[Tensor, bool]:
    """(the output (rows, features) float32 without padding, whether they are logits).

    Raises:
        CalibrationError: there is no floating tensor in the output, or it is not finite.
    """
    found = floating_output(output)
    if found is None:
        raise CalibrationError(
            f"the model returned a {type(output).__name__} without a floating tensor on calibration batch {batch}"
        )
    y = found.float()
    if not torch.isfinite(y).all():
        raise CalibrationError(f"the model's output is not finite on calibration batch {batch}")
    return rows(y, call.mask), field(output, "logits") is not None and y.shape[-1] > 1


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode and, if it is one of transformers', keeps no keys and values."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile parameters get no gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_()


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

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            own = rows(x.detach(), call.mask)
            inputs[name] = torch.cat([inputs[name], own]) if name in inputs else own
            names = next((names for known, names in shared if known is x), None)
            if names is None:
                shared.append((x, [name]))
            elif name not in names:
                names.append(name)

        return hook

    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        output = run_batch(module, call, batch) if hidden is None else call.run(module, hidden)
    finally:
        for handle in handles:
            handle.remove()
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

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(rows(args[0].detach(), call.mask))
        raise _Reached

    handle = linear.register_forward_pre_hook(hook)
    try:
        call.run(module, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return iter(found)


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., K) as (tokens, K) float32, without those that a mask (batch, tokens) of its leading sizes calls padding.

    Inputs of other leading sizes, as those of experts, hold nobody knows whose tokens: all of them count.
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    return flat if mask is None or mask.shape != x.shape[:-1] else flat[mask.reshape(-1).to(x.device).bool()]
