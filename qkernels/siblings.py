"""Sibling layers that read one input (q_proj, k_proj and v_proj; gate_proj and up_proj), multiplied in one launch.

Rows of a quantized weight do not know each other, so the codes, scales and zeros of several layers stacked are exactly
their weights; only one scale for a whole tensor cannot be stacked. The wider product may add up in another
order (on a GPU, K may be split elsewhere): results agree within the bound of either. The siblings stay where their
parent looks for them, each a `MergedLinear`, and own a `MergedWeight` together. A state_dict shows each with its own
rows, under the names it always had: files do not know about merging. merge.py puts them into a model.

The parent's forward stays as it is and calls its siblings one by one. The first call multiplies all rows and the others
take theirs, under conditions that leave no room for a stale or foreign product:

- Only during a call of the parent, in its thread: hooks of the parent open a scope and close it, and what was not
  taken is dropped then. A sibling called from anywhere else multiplies its own rows.
- Only for the very same tensor, with the same version, on the same stream, under the same autocast; and each sibling
  takes its rows once. The version is what autograd goes by, too: it counts changes in place, but not through `.data`.
- Only where no gradient is recorded, since rows of one result count changes in place together, and autograd would
  refuse what it accepts from separate layers; and never for subclasses, dispatch modes or function transforms.
- Where torch counts no versions (inference mode, and torch.compile, which sees a graph of pure functions), only if the
  source of the parent's forward shows that nothing between the calls can change the input: source.py.

Everywhere else a sibling multiplies its own rows, with launches as before. Siblings that three times in a
row leave rows untaken do not read one input after all: they stop being multiplied together, with a warning.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.activations import QuantizedActivations
from qkernels.nn import QuantLinear, keep_dtypes
from qkernels.tensor import QTensor, stacked_rows

_PATIENCE = 3  # calls of the parent in a row that leave rows untaken


class MergedWeight(nn.Module):
    """The rows of several layers, stacked. Each of these layers holds it as `shared`.

    Args:
        layers: at least two, of one scheme and K, all with a bias or all without.
        names: of the layers in their parent.
        forward: of their parent, if its source shows that they read one unchanging input.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    weight_activation: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[QuantLinear], names: Sequence[str], forward: Callable[..., Any] | None):
        super().__init__()
        weights = [layer.qweight for layer in layers]
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self.scheme, self.in_features = weights[0].scheme, weights[0].in_features
        self.names, self.forward_of_parent = tuple(names), forward
        self.rows: list[tuple[int, int]] = []
        for weight in weights:
            start = self.rows[-1][1] if self.rows else 0
            self.rows.append((start, start + weight.shape[0]))
        whole = stacked_rows(weights)
        self.weight = nn.Parameter(whole.packed, requires_grad=False)
        self.weight_scale = nn.Parameter(whole.scale, requires_grad=False)
        self.register_parameter(
            "weight_zero", None if whole.zero is None else nn.Parameter(whole.zero, requires_grad=False)
        )
        self.register_parameter(
            "weight_activation",
            None if whole.activation is None else nn.Parameter(whole.activation, requires_grad=False),
        )
        trained = any(layer.bias is not None and layer.bias.requires_grad for layer in layers)
        self.register_parameter("bias", nn.Parameter(torch.cat(biases), requires_grad=trained) if biases else None)
        self.untaken = 0  # calls of the parent in a row
        self.compiling_parent = False  # seen by torch.compile only, as is:
        self.traced: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # x, its product, who took rows

    def product(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., rows of all)."""
        own = self._parameters
        return ops.matmul(
            x,
            own["weight"],  # type: ignore[arg-type]
            own["weight_scale"],  # type: ignore[arg-type]
            own["weight_zero"],
            own["bias"],
            str(self.scheme),
            self.in_features,
            own["weight_activation"],
        )

    def tensors(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scales, zeros and bias of one layer: views."""
        start, stop = self.rows[index]
        own = self._parameters
        zero, bias = own["weight_zero"], own["bias"]
        return (
            own["weight"][start:stop],  # type: ignore[index]
            own["weight_scale"][:, start:stop],  # type: ignore[index]
            None if zero is None else zero[:, start:stop],
            None if bias is None else bias[start:stop],
        )

    def take_compiled(self, x: Tensor, index: int, hooked: bool) -> Tensor | None:
        """Rows of the product, in a graph that torch.compile is making of the parent; None if they cannot be shared."""
        if not self.compiling_parent or self.untaken >= _PATIENCE:
            return None
        if hooked:
            self.traced = None
            return None
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return None
        found = self.traced
        if found is None or found[0] is not x or index in found[2]:
            found = (x, self.product(x), ())
        taken = (*found[2], index)
        self.traced = (found[0], found[1], taken) if len(taken) < len(self.rows) else None
        start, stop = self.rows[index]
        return found[1][..., start:stop]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_dtypes(fn, self.bias), recurse)

    # The layers store and load their rows.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def extra_repr(self) -> str:
        """What repr shows between the parentheses."""
        return f"{' + '.join(self.names)}, in_features={self.in_features}, out_features={self.rows[-1][1]}"


class MergedLinear(QuantLinear):
    """A QuantLinear whose rows are part of a MergedWeight; `weight`, `bias` and the others are views of it.

    Args:
        shared: what holds the rows.
        index: which of its layers this is.
    """

    shared: MergedWeight

    def __init__(self, shared: MergedWeight, index: int):
        nn.Module.__init__(self)
        self.index = index
        start, stop = shared.rows[index]
        self.out_features, self.in_features = stop - start, shared.in_features
        self.scheme = shared.scheme
        self._scheme = str(shared.scheme)
        self.shared = shared

    weight = property(lambda self: self.apart().weight, doc="Packed codes, a view.")
    weight_scale = property(lambda self: self.apart().weight_scale, doc="Scales, a view.")
    weight_zero = property(
        lambda self: self.apart().weight_zero, doc="Zeros or offsets, a view; None for symmetric schemes."
    )
    weight_order = property(lambda self: None, doc="None: layers with an order of inputs are not merged.")
    weight_activation = property(
        lambda self: self.apart().weight_activation, doc="Scale and zero of static activations, shared by all; or None."
    )
    bias = property(lambda self: self.apart().bias, doc="A view; None if there is none.")

    @property
    def qweight(self) -> QTensor:
        """The weight as a QTensor that shares this layer's memory."""
        packed, scale, zero, _ = self.shared.tensors(self.index)
        zero, activation = (None if t is None else t.data for t in (zero, self.shared.weight_activation))
        return QTensor(packed.data, scale.data, zero, self.scheme, self.in_features, activation=activation)

    def apart(self) -> QuantLinear:
        """A plain QuantLinear over the same memory."""
        bias = self.shared.tensors(self.index)[3]
        if bias is not None and self.shared.bias is not None:
            bias = nn.Parameter(bias.detach(), requires_grad=self.shared.bias.requires_grad)
        return QuantLinear(self.qweight, bias).train(self.training)

    def forward(self, x: Tensor | QuantizedActivations) -> Tensor:
        """x (..., in_features) -> (..., out_features), possibly a view of a wider product."""
        if type(x) is QuantizedActivations:
            return x.linear(*self.shared.tensors(self.index), self.scheme, self.in_features)
        assert isinstance(x, Tensor)
        shared = self._modules["shared"]
        assert isinstance(shared, MergedWeight)
        hooked = bool(self._forward_pre_hooks or self._forward_hooks)  # they get x, and may change it
        if torch.compiler.is_compiling():
            rows = None if torch.compiler.is_exporting() else shared.take_compiled(x, self.index, hooked)
            if rows is not None:
                return rows
        elif _threads.scopes:
            scope = _threads.scopes[-1]
            rows = scope.take(x, shared, self.index, _state(x, shared, scope, hooked))
            if rows is not None:
                return rows
        activation = shared._parameters["weight_activation"]
        return ops.matmul(x, *shared.tensors(self.index), self._scheme, self.in_features, activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # what must keep its dtype is `shared`'s business

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.apart()._save_to_state_dict(destination, prefix, keep_vars)
        scales = [name for name in (f"{prefix}weight_scale", f"{prefix}weight_zero") if name in destination]
        for name in scales:  # columns of a wider tensor: what writes files wants them on their own
            destination[name] = destination[name].contiguous()
        if (name := f"{prefix}weight_activation") in destination:  # and not one tensor under several names
            destination[name] = destination[name].clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        if self.shared.weight.is_meta:
            errors.append(f"{prefix}weight is part of a merged weight on the meta device: use qkernels.load")
            return
        own, given = self.shared.weight_activation, state_dict.get(f"{prefix}weight_activation")
        if own is not None and given is not None and not torch.equal(own.cpu(), given.cpu()):
            errors.append(
                f"{prefix}weight_activation belongs to {len(self.shared.rows)} merged layers, and cannot change for "
                "one of them: use qkernels.load"
            )
            return
        copying = {k: v for k, v in local_metadata.items() if k != "assign_to_params_buffers"}
        self.apart()._load_from_state_dict(state_dict, prefix, copying, strict, missing, unexpected, errors)


# ---- handing rows over, in eager mode ----


@dataclasses.dataclass
class _Product:
    """What was multiplied for one x."""

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]
    y: Tensor
    waiting: set[int]  # layers that have yet to take their rows


class _Scope:
    """One call of a parent that is under way."""

    def __init__(self, parent: nn.Module):
        self.parent = parent
        self.forward = getattr(parent.forward, "__func__", None)
        # None where a layer did not find its rows: then all of them multiply their own until the call is over.
        self.products: dict[MergedWeight, _Product | None] = {}

    def take(self, x: Tensor, shared: MergedWeight, index: int, state: tuple[Any, ...] | None) -> Tensor | None:
        """A layer's rows of the product, which the first one that asks multiplies; None if it must do so itself."""
        if shared not in self.products and state is not None:
            self.products[shared] = _Product(weakref.ref(x), state, shared.product(x), set(range(len(shared.rows))))
        found = self.products.get(shared)
        if found is None or found.x() is not x or found.state != state or index not in found.waiting:
            if found is not None:
                self.products[shared] = None
            return None
        found.waiting.remove(index)
        if not found.waiting:
            del self.products[shared]
            shared.untaken = 0
        start, stop = shared.rows[index]
        return found.y[..., start:stop]

    def close(self) -> None:
        """Count the products that some layer had no use for."""
        for shared in self.products:
            shared.untaken += 1
            if shared.untaken == _PATIENCE:
                warnings.warn(
                    f"merged layers {', '.join(shared.names)} (in_features={shared.in_features}) do not read the same "
                    "input: from now on each multiplies its own rows",
                    stacklevel=2,
                )


class _Threads(threading.local):
    def __init__(self) -> None:
        self.scopes: list[_Scope] = []


_threads = _Threads()


def _state(x: Tensor, shared: MergedWeight, scope: _Scope, hooked: bool) -> tuple[Any, ...] | None:
    """What must not have changed when the next layer takes its rows; None if they cannot be shared at all."""
    if shared.untaken >= _PATIENCE or ops._needs_gradient(x, shared.bias) or ops._direct_matmul(x) is None:
        return None
    version = None
    if not x.is_inference():
        version = x._version
    elif hooked or shared.forward_of_parent is None or shared.forward_of_parent is not scope.forward:
        return None
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type != "cuda":
        return version, autocast
    return version, autocast, torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def open_scope(parent: nn.Module, args: Any) -> None:
    """Forward pre-hook of a parent."""
    if not torch.compiler.is_compiling():
        _threads.scopes.append(_Scope(parent))
        return
    if not torch.compiler.is_exporting():
        for child in parent.children():
            if isinstance(child, MergedLinear):
                proved = child.shared.forward_of_parent
                child.shared.traced = None
                child.shared.compiling_parent = "forward" not in vars(parent) and type(parent).forward is proved


def close_scope(parent: nn.Module, args: Any, result: Any) -> None:
    """Forward hook of a parent, also called when its forward raises."""
    if torch.compiler.is_compiling():
        for child in parent.children():
            if isinstance(child, MergedLinear) and child.shared.compiling_parent:
                child.shared.traced = None
                child.shared.compiling_parent = False
    elif _threads.scopes and _threads.scopes[-1].parent is parent:
        _threads.scopes.pop().close()
