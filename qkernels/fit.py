"""Which scale and zero each group gets: round to nearest, a search of ranges, or half-quadratic zeros.

Shapes    w (N, K); importance (K,); scale and zero as of reference.py. Any device; nothing of size (N, K) is kept.
Objective each method lowers an error of its own, group by group, starting from round to nearest, so that no group ends
          worse than there: sum_k h_k |w - w^|^r over the group's weights, with the importance h of input k.
Sources   search: ranges that clip, as in GPTQ's and AWQ's code, and closed-form scales; hqq: Badri and Shaji, Half-
          Quadratic Quantization, 2023, in float32, each round's zeros kept only where they are better.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qkernels import reference
from qkernels.scheme import Scheme

METHODS = ("rtn", "search", "hqq")

_CHUNK_WEIGHTS = 2**17  # at a time: what a CPU's cache holds
_SHRINKS = tuple(1 - 0.04 * i for i in range(1, 16))
_REFITS = 3
# Squares where importance says what an error costs at the output; without it, large errors count more.
_POWER_BLIND, _POWER_WEIGHTED = 2.4, 2.0

_HQQ_POWER, _HQQ_BETA, _HQQ_GROWTH, _HQQ_ROUNDS = 0.7, 10.0, 1.01, 20
_HQQ_SHRINKS = (1.0, 0.9, 0.8)


def fit(
    w: Tensor, scheme: Scheme, method: str = "search", importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) of each group; `reference.encode` then gives the codes.

    Args:
        w: (N, K) floating, finite.
        scheme: how it will be stored.
        method: "rtn" covers the range of each group; "search" also tries ranges that clip, zeros one step aside, and
            the best scale for the codes found; "hqq" moves zeros so that most weights are met closely and
            few not at all.
        importance: (K,) float32, not negative: what an error of a weight of input k costs, such as the mean square of
            that input. Without it all cost the same. "rtn" needs none.

    Raises:
        ValueError: w holds NaN or infinity, a scale or offset does not fit its dtype, importance is not such a tensor,
            the method is unknown, or it is "hqq" with a symmetric scheme, which has no zeros to move.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method == "hqq" and scheme.value_map == "symmetric":
        raise ValueError(f"method 'hqq' moves zeros, and scheme {str(scheme)!r} has none; choose 'search' or 'rtn'")
    if importance is not None:
        check_importance(importance, w.shape[1])
    low, high = reference.group_range(w, scheme)
    scale, zero = reference.scale_and_zero(low, high, scheme)
    if method == "rtn" or w.numel() == 0:
        return scale, zero
    if scheme.group_size == "tensor":  # one row of one group
        importance = None if importance is None else importance.expand(w.shape).reshape(-1)
        w, scheme = w.reshape(1, -1), dataclasses.replace(scheme, group_size="channel")
    scale, zero = scale.clone(), None if zero is None else zero.clone()
    step = max(1, _CHUNK_WEIGHTS // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        chunk = w[rows].float()
        weighted = chunk if importance is None else importance.float().expand(chunk.shape).contiguous()
        views = zip(reference.by_group(chunk, scheme), reference.by_group(weighted, scheme), strict=True)
        for (view, groups), (h, _) in views:
            known = None if importance is None else h
            best = _Best(view, known, scheme, method, scale[groups, rows], None if zero is None else zero[groups, rows])
            (_search if method == "search" else _half_quadratic)(best, low[groups, rows], high[groups, rows])
            scale[groups, rows] = best.scale
            if zero is not None and best.zero is not None:
                zero[groups, rows] = best.zero
    return scale, zero


def check_importance(importance: Tensor, in_features: int) -> None:
    """Raise ValueError unless importance is (K,), finite and not negative."""
    if importance.shape != (in_features,) or not importance.is_floating_point():
        raise ValueError(
            f"importance must be floating ({in_features},), got {importance.dtype} {tuple(importance.shape)}"
        )
    if not (torch.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and not negative")


class _Best:
    """The best scales and zeros so far of groups (rows, groups, length), and the error that decides."""

    def __init__(self, w: Tensor, h: Tensor | None, scheme: Scheme, method: str, scale: Tensor, zero: Tensor | None):
        self.w, self.h, self.scheme = w, h, scheme
        self.power = _HQQ_POWER if method == "hqq" else _POWER_BLIND if h is None else _POWER_WEIGHTED
        self.scale, self.zero = scale.clone(), None if zero is None else zero.clone()
        self.error = self.cost(scale, zero)

    def spread(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Scales and zeros (groups, rows) as float32 that meets w."""
        everything = slice(None)
        base = self.scheme.center if zero is None else reference.per_group(zero, everything)
        return reference.per_group(scale, everything), base

    def codes(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        return reference.nearest(self.w, *self.spread(scale, zero), self.scheme)

    def miss(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """w - w^ of the nearest codes."""
        step, base = self.spread(scale, zero)
        return reference.value_(reference.nearest(self.w, step, base, self.scheme), step, base, self.scheme).sub_(
            self.w
        )

    def cost(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(groups, rows): the error of each group."""
        miss = self.miss(scale, zero)
        each = miss.square_() if self.power == 2.0 else miss.abs_().pow_(self.power)
        return (each if self.h is None else each.mul_(self.h)).sum(-1).T

    def consider(self, scale: Tensor, zero: Tensor | None) -> None:
        """Take these where they are better."""
        error = self.cost(scale, zero)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _search(best: _Best, low: Tensor, high: Tensor) -> None:
    ends = ((True, True),) if best.scheme.value_map == "symmetric" else ((True, True), (True, False), (False, True))
    for shrink in _SHRINKS:
        for at_low, at_high in ends:
            scale, zero = _shrunk(low, high, shrink if at_low else 1.0, shrink if at_high else 1.0, best.scheme)
            best.consider(scale, zero)
    for _ in range(_REFITS):
        if best.scheme.value_map == "affine":
            for moved in _neighbours(best.zero, best.scheme):
                best.consider(best.scale, moved)
        best.consider(*_refit(best))


def _shrunk(low: Tensor, high: Tensor, at_low: float, at_high: float, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of smaller ranges: toward zero, or toward their middle where they need not hold zero."""
    if scheme.value_map == "offset":
        middle = low * 0.5 + high * 0.5
        return reference.scale_and_zero(middle.lerp(low, at_low), middle.lerp(high, at_high), scheme)
    return reference.scale_and_zero(low * at_low, high * at_high, scheme)


def _neighbours(zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Zeros one step aside, where there is one."""
    assert zero is not None
    signed = zero.to(torch.int16)
    return (signed - 1).clamp_(min=0).to(torch.uint8), (signed + 1).clamp_(max=scheme.code_max).to(torch.uint8)


def _refit(best: _Best) -> tuple[Tensor, Tensor | None]:
    """The scales (and offsets) that suit the codes best: weighted least squares, |e|^r as e^2 |e|^(r-2)."""
    w, scheme = best.w, best.scheme
    step, base = best.spread(best.scale, best.zero)
    code = best.codes(best.scale, best.zero)
    h = torch.ones_like(w) if best.h is None else best.h
    if best.power != 2.0:
        h = h * best.miss(best.scale, best.zero).abs_().clamp_(min=torch.finfo(torch.float32).tiny).pow_(best.power - 2)
    if scheme.value_map == "offset":
        # About the weighted means, where the sums do not cancel.
        total = h.sum(-1, keepdim=True)
        mean_code, mean_w = (h * code).sum(-1, keepdim=True) / total, (h * w).sum(-1, keepdim=True) / total
        centred = code - mean_code
        exact = (h * centred * (w - mean_w)).sum(-1, keepdim=True) / (h * centred.square()).sum(-1, keepdim=True)
        scale = store_scale(exact, step, scheme)
        offset = mean_w - scale.float() * mean_code
        zero = torch.where(torch.isfinite(offset), offset, reference.per_group(_known(best.zero), slice(None)))
        return scale[..., 0].T, zero.to(scheme.scale_dtype)[..., 0].T
    signed = code - base
    exact = (h * signed * w).sum(-1, keepdim=True) / (h * signed.square()).sum(-1, keepdim=True)
    return store_scale(exact, step, scheme)[..., 0].T, best.zero


def store_scale(exact: Tensor, otherwise: Tensor, scheme: Scheme) -> Tensor:
    """Scales rounded to their storage dtype; `otherwise` where they are not positive, finite or storable."""
    stored = exact.to(scheme.scale_dtype)
    return torch.where(torch.isfinite(stored) & (stored > 0), stored, otherwise.to(scheme.scale_dtype))


def _known(zero: Tensor | None) -> Tensor:
    assert zero is not None
    return zero


def _half_quadratic(best: _Best, low: Tensor, high: Tensor) -> None:
    scheme, w = best.scheme, best.w
    for shrink in _HQQ_SHRINKS:
        scale, zero = _shrunk(low, high, shrink, shrink, scheme)
        best.consider(scale, zero)
        beta = _HQQ_BETA
        for _ in range(_HQQ_ROUNDS):
            step, base = best.spread(scale, zero)
            code = reference.nearest(w, step, base, scheme)
            miss = w - reference.value_(code.clone(), step, base, scheme)
            size = miss.abs()
            # The proximal step of |e|^p: small misses are taken for none, large ones for outliers to leave alone.
            outlier = miss.sign() * (size - size.clamp(min=1e-30).pow(_HQQ_POWER - 1) / beta).clamp_(min=0)
            offset = _mean((w - outlier) - step * code, best.h)
            if scheme.value_map == "offset":
                zero = offset.to(scheme.scale_dtype)[..., 0].T
            else:
                zero = (-offset / step).round_().clamp_(0, scheme.code_max).to(torch.uint8)[..., 0].T
            best.consider(scale, zero)
            beta *= _HQQ_GROWTH


def _mean(values: Tensor, h: Tensor | None) -> Tensor:
    if h is None:
        return values.mean(-1, keepdim=True)
    return (values * h).sum(-1, keepdim=True) / h.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
