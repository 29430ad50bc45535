"""The op of a mixture of experts: each row of x meets the weight of its own expert.

    qkernels::matmul_experts  x (S, K), expert (S,), packed (E * N, words), ...  -> y (S, N)

y[s] = x[s] @ w[expert[s]].T, where the weights of E experts are stacked along their rows. A row whose expert is E or
more (one that another process has) gives zeros. Activations may be quantized, each row by itself,
but not by a static scale. The definition is the loop below over the experts that rows have, each a product of
qkernels::matmul, on a CPU and on a GPU: one launch for each. How many rows an expert has is known to the host only
after a wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels import dispatch, ops
from qkernels.checks import DTYPES, check_weight

_library = torch.library.Library("qkernels", "FRAGMENT")
_TENSORS = "Tensor expert, Tensor packed, Tensor scale, Tensor? zero, str scheme, SymInt in_features, int experts"
_library.define(f"matmul_experts(Tensor x, {_TENSORS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"matmul_experts_backward(Tensor grad, {_TENSORS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_matmul_op = torch.ops.qkernels.matmul_experts.default
_backward_op = torch.ops.qkernels.matmul_experts_backward.default


def matmul(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: str,
    in_features: int,
    experts: int,
) -> Tensor:
    """y (S, N) = x[s] @ w[expert[s]].T in x's dtype, for x (S, K) float16, bfloat16 or float32.

    Args:
        x: one row for each choice of an expert.
        expert: (S,) integer, 0 or more.
        packed, scale, zero: of the stacked weights (experts * N, K).
        scheme, in_features: as of ops.matmul.
        experts: how many.

    Raises:
        ValueError, TypeError: a tensor has another shape or dtype than the others and the scheme ask for, or an expert
            is negative.
    """
    return _matmul_op(x, expert, packed, scale, zero, scheme, in_features, experts)


def _check(x: Tensor, columns: int, expert: Tensor, packed: Tensor, experts: int) -> None:
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x must be (S, {columns}), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if expert.shape != x.shape[:1] or expert.is_floating_point():
        raise ValueError(f"expert must be ({x.shape[0]},) integer, got {tuple(expert.shape)} {expert.dtype}")
    if experts < 1 or packed.shape[0] % experts:
        raise ValueError(f"packed must hold the rows of {experts} experts, got {packed.shape[0]}")


def _by_expert(
    x: Tensor,
    columns: int,
    expert: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    experts: int,
    shared_scale: bool,
    product: Callable[[Tensor, tuple[Tensor, Tensor, Tensor | None]], Tensor],
) -> Tensor:
    """product(rows of x, weight of their expert) for every expert that rows have, put where they belong."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    packed, scale, zero = weight
    height = packed.shape[0] // experts
    grouped, start = x[order], 0
    results = x.new_zeros((x.shape[0], columns))
    for i, count in enumerate(counts):
        if not count:
            continue
        rows = slice(i * height, (i + 1) * height)
        beside = (t if t is None or shared_scale else t[:, rows] for t in (scale, zero))
        own = (packed[rows], *beside)
        results[start : start + count] = product(grouped[start : start + count], own)  # type: ignore[arg-type]
        start += count
    return torch.empty_like(results).index_copy_(0, order, results)


def _matmul(one: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op by products of single weights, `one`."""

    def matmul_experts(
        x: Tensor,
        expert: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: str,
        in_features: int,
        experts: int,
    ) -> Tensor:
        parsed = check_weight(packed, scale, zero, scheme, in_features)
        _check(x, in_features, expert, packed, experts)
        if parsed.is_static:
            raise ValueError(f"experts cannot have static activations, got scheme {scheme!r}")
        return _by_expert(
            x,
            packed.shape[0] // experts,
            expert,
            (packed, scale, zero),
            experts,
            parsed.group_size == "tensor",
            lambda rows, own: one(rows, *own, None, scheme, in_features),
        )

    return matmul_experts


def _backward(
    grad: Tensor,
    expert: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: str,
    in_features: int,
    experts: int,
) -> Tensor:
    """Gradient of x, (S, K), from that of y, (S, N)."""
    parsed = check_weight(packed, scale, zero, scheme, in_features)
    _check(grad, packed.shape[0] // experts, expert, packed, experts)
    return _by_expert(
        grad,
        in_features,
        expert,
        (packed, scale, zero),
        experts,
        parsed.group_size == "tensor",
        lambda rows, own: rows @ ops.dequantize(*own, scheme, in_features, grad.dtype),
    )


def _matmul_fake(
    x: Tensor,
    expert: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: str,
    in_features: int,
    experts: int,
) -> Tensor:
    _check(x, in_features, expert, packed, experts)
    return x.new_empty((x.shape[0], packed.shape[0] // experts))


def _backward_fake(
    grad: Tensor,
    expert: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: str,
    in_features: int,
    experts: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


class _MatmulFunction(torch.autograd.Function):
    """Gradients for x; codes, scales and zeros are constants."""

    @staticmethod
    def forward(x, *rest):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return _matmul_op(x, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, expert, packed, scale, zero, *ctx.rest = inputs
        ctx.save_for_backward(expert, packed, scale, zero)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        return _backward_op(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


def _autograd(*args: Any) -> Tensor:
    if torch.is_grad_enabled() and args[0].requires_grad:
        return _MatmulFunction.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _matmul_op(*args)


def _autocast(x: Tensor, *rest: Any) -> Tensor:
    """x in autocast's dtype, as linear does."""
    with ops.without_autocast(x.device.type):
        return _matmul_op(ops.as_autocast(x), *rest)


def _register() -> None:
    _library.impl("matmul_experts", _matmul(ops.matmul_cpu), "CPU")
    _library.impl("matmul_experts", _matmul(dispatch.matmul), "CUDA")
    _library.impl("matmul_experts_backward", _backward, "CPU")
    _library.impl("matmul_experts_backward", _backward, "CUDA")
    torch.library.register_fake("qkernels::matmul_experts", _matmul_fake, lib=_library)
    torch.library.register_fake("qkernels::matmul_experts_backward", _backward_fake, lib=_library)
    _library.impl("matmul_experts", _autograd, "Autograd")
    _library.impl("matmul_experts_backward", ops.constant_autograd(_backward_op), "Autograd")
    _library.impl("matmul_experts", _autocast, "AutocastCPU")
    _library.impl("matmul_experts", _autocast, "AutocastCUDA")


_register()
