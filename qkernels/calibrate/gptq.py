"""GPTQ: codes of one weight that lose least at its output, then exact descent from there.

Shapes    w (N, K); hessian (K, K) = X^T X of the inputs X (tokens, K); codes (N, K); scales, zeros as of reference.py.
Objective tr(E H E^T) with E = w - w^, which is the squared error of the outputs, row by row.
Sources   Frantar et al., GPTQ, 2023: a column's rounding error is spread over the columns still to come. Grids
          belong to the groups of the original order, so that columns may be taken by falling H (act-order) and a kernel
          need not know. Then coordinate descent over codes (Behdin et al., QuantEase, 2023) and closed-form
          scales in turn.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qkernels import reference
from qkernels.fit import fit, store_scale
from qkernels.scheme import Scheme

DAMPING = 0.01
_BLOCK = 64  # columns between two updates of all the others; what they leave in between stays in a CPU's cache
_ROUNDS = 6  # of scales and codes in turn


class SingularHessianError(ValueError):
    """The second moments of a layer's inputs have no Cholesky factor, in spite of damping."""


@dataclasses.dataclass
class Grid:
    """Scales and zeros spread over columns: what a code of (n, k) means."""

    scheme: Scheme
    scale: Tensor  # (groups, N) as stored
    zero: Tensor | None
    in_features: int

    def __post_init__(self) -> None:
        length = max(1, self.scheme.group_length(self.in_features))
        self.group = torch.arange(self.in_features, device=self.scale.device) // length

    def steps(self, rows: int) -> tuple[Tensor, Tensor]:
        """(step, base), both (K, N) float32."""
        shape = (self.in_features, rows)
        step = self.scale.float()[self.group].expand(shape)
        if self.zero is None:
            return step, torch.full_like(step, self.scheme.center)
        return step, self.zero.float()[self.group].expand(shape)


def gptq(
    w: Tensor, hessian: Tensor, scheme: Scheme, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero) of a weight, given what its inputs are like.

    Args:
        w: (N, K) floating, finite.
        hessian: (K, K) floating, X^T X or a multiple of it. Inputs that never differ from zero cost nothing; their
            weights are rounded to nearest.
        scheme: how it will be stored.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises:
        SingularHessianError: hessian is not positive definite even so.
        ValueError: w or hessian is not finite, or a scale does not fit.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moments of the inputs must be finite")
    h = damped(hessian, damping)
    scale, zero = fit(w, scheme, "search", importance=h.diagonal())
    target = w.float().T.contiguous()  # (K, N): a column of w is a row in memory
    grid = Grid(scheme, scale, zero, w.shape[1])
    code = _spread_errors(target, h, grid)
    code, scale = _descend(target, h, grid, code)
    return code.T.to(torch.uint8).contiguous(), scale, zero


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian in float32, its mean diagonal 1, with damping; dead inputs get a diagonal of their own."""
    h = hessian.float()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return torch.eye(h.shape[0], device=h.device)
    h = h / mean
    dead = diagonal <= 0
    return h + torch.diag(torch.where(dead, 1.0, damping).to(h))


def _spread_errors(target: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """Codes (K, N) float32 by GPTQ, columns of large H first."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    factor, failed = torch.linalg.cholesky_ex(h[order][:, order])
    if failed:
        raise SingularHessianError("the second moments of the inputs are singular; more batches or more damping help")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    rest = target[order]
    step, base = (t[order] for t in grid.steps(target.shape[1]))
    code = torch.empty_like(rest)
    columns = rest.shape[0]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        miss = torch.empty_like(rest[start:stop])
        for k in range(start, stop):
            code[k] = reference.nearest(rest[k], step[k], base[k], grid.scheme)
            value = reference.value_(code[k].clone(), step[k], base[k], grid.scheme)
            miss[k - start] = (rest[k] - value) / upper[k, k]
            rest[k + 1 : stop].addr_(upper[k, k + 1 : stop], miss[k - start], alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, miss, alpha=-1)
    unsorted = torch.empty_like(code)
    unsorted[order] = code
    return unsorted


def _descend(target: Tensor, h: Tensor, grid: Grid, code: Tensor) -> tuple[Tensor, Tensor]:
    """Better (codes, scales) from these, each row of w for itself: scales for the codes, codes for the scales."""
    best_code, best_scale = code.clone(), grid.scale.clone()
    per_row = grid.scheme.group_size != "tensor"
    best = _loss(target, h, grid, code)
    for _ in range(_ROUNDS):
        if per_row:
            grid = dataclasses.replace(grid, scale=_best_scales(target, h, grid, code))
        code = _sweep(target, h, grid, code)
        loss = _loss(target, h, grid, code)
        if per_row:
            better = loss < best
            best = torch.where(better, loss, best)
            best_code = torch.where(better, code, best_code)
            best_scale = torch.where(better, grid.scale, best_scale)
        elif loss.sum() < best.sum():
            best, best_code = loss, code.clone()
    return best_code, best_scale


def _values(code: Tensor, grid: Grid) -> Tensor:
    step, base = grid.steps(code.shape[1])
    return reference.value_(code.clone(), step, base, grid.scheme)


def _loss(target: Tensor, h: Tensor, grid: Grid, code: Tensor) -> Tensor:
    """(N,): e H e^T of each row of w."""
    miss = target - _values(code, grid)
    return (miss * (h @ miss)).sum(0)


def _best_scales(target: Tensor, h: Tensor, grid: Grid, code: Tensor) -> Tensor:
    """(groups, N) scales that suit the codes best at the output, all groups of a row together: least squares."""
    _, base = grid.steps(code.shape[1])
    offset = grid.scheme.value_map == "offset"
    signed = code if offset else code - base
    wanted = target - base if offset else target
    groups, rows = grid.scale.shape
    normal = signed.new_empty(rows, groups, groups)
    lengths = torch.bincount(grid.group, minlength=groups).tolist()
    start = 0
    by_group = signed.new_zeros(groups, rows)
    index = grid.group[:, None].expand_as(signed)
    for g, length in enumerate(lengths):
        own = slice(start, start + length)
        spread = h[:, own] @ signed[own]  # (K, N): what group g's codes do everywhere
        normal[:, :, g] = by_group.clone().scatter_add_(0, index, spread * signed).T
        start += length
    right = by_group.scatter_add_(0, index, (h @ wanted) * signed).T
    # Groups whose codes are all zero have no say; a little damping keeps them where they are.
    current = grid.scale.float().T
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    solved, failed = torch.linalg.solve_ex(normal, (right + ridge[:, None] * current)[..., None])
    exact = torch.where((failed == 0)[:, None], solved[..., 0], current).T
    return store_scale(exact, grid.scale, grid.scheme)


def _sweep(target: Tensor, h: Tensor, grid: Grid, code: Tensor) -> Tensor:
    """Each column's codes in turn: the nearest to what the others leave for it. No step raises the loss."""
    code = code.clone()
    step, base = grid.steps(code.shape[1])
    value = reference.value_(code.clone(), step, base, grid.scheme)
    pull = h @ (target - value)  # (K, N): minus half the gradient
    columns = code.shape[0]
    diagonal = h.diagonal().tolist()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        moved = torch.empty_like(code[start:stop])
        for k in range(start, stop):
            best = reference.nearest(value[k] + pull[k] / diagonal[k], step[k], base[k], grid.scheme)
            new = reference.value_(best.clone(), step[k], base[k], grid.scheme)
            moved[k - start] = new - value[k]
            code[k], value[k] = best, new
            pull[k:stop].addr_(h[k, k:stop], moved[k - start], alpha=-1)
        # Columns of earlier blocks are not read again in this sweep.
        pull[stop:].addmm_(h[stop:, start:stop], moved, alpha=-1)
    return code
