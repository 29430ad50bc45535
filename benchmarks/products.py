"""What a product is: x (M, K) with a quantized w (N, K), what computes it, and whether that is right.

Every provider starts from the same float weight and quantizes it its own way. Before anything is timed, `check`
compares a product with the exact one of the very weights that the provider's codes stand for. Where a provider does
not say what those are, the float weight stands in, with a tolerance for quantizing. Providers that compute another
function say so in `what`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors
from qkernels import reference_int8
from qkernels.scheme import Scheme

DTYPE = torch.bfloat16  # of activations and results
_TRUTH_WEIGHTS = 2**26  # float64 weights held at a time while checking
_CHECKED_TOKENS = 32
TOLERANCE = 2.0**-6  # of the size of a sum, for partial sums and weights that are kept in bfloat16
FLOAT_TOLERANCE = 0.2  # against the float weight: 4 bits in groups of 256 give about half of it
_INT8_STEPS = 127  # from 0 to the largest value of a token


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: x (M, K) with a weight (N, K) under a scheme. model and layer say where the shape is from."""

    M: int
    N: int
    K: int
    scheme: str
    model: str = ""
    layer: str = ""

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One weight in a provider's own form.

    Attributes:
        call: what is timed: operand -> result.
        weight: () -> (N, K) float32 that the codes stand for; the float weight itself if not `own`.
        nbytes: of the weight as stored.
        own: whether `weight` is exactly what is multiplied.
        enter: x -> operand, not timed.
        leave: (result, operand) -> y (M, N), not timed.
        seen: operand -> x as it is multiplied.
        tolerance: see `check`.
    """

    call: Callable[[Any], Any]
    weight: Callable[[], Tensor]
    nbytes: int
    own: bool = True
    enter: Callable[[Tensor], Any] = lambda x: x
    leave: Callable[[Any, Any], Tensor] = lambda result, operand: result
    seen: Callable[[Any], Tensor] = lambda operand: operand
    tolerance: float = TOLERANCE


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call has to do at least.

    Attributes:
        moved_bytes: read and written.
        operations: two for each product of bfloat16 that is added.
        int8_operations: likewise, of int8.
        cached_bytes: of those moved, what a cache may hold from one kernel to the next: without them an honest time may
            be below the floor.
    """

    moved_bytes: int
    operations: int
    int8_operations: int = 0
    cached_bytes: int = 0


class Provider:
    """What computes the product.

    Attributes:
        name: short, unique.
        what: what is computed, in words.
        other: whether that is another function than the scheme asks for, or a part of it.
        captured: whether a CUDA graph can hold a call; where not, only its eager time is known.
    """

    name: str
    what: str
    other = False
    captured = True

    def supports(self, problem: Problem) -> str | None:
        """Why not, in words; None if it does."""
        return None

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """The weight of a seed, quantized."""
        raise NotImplementedError

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Of a call with a weight of so many bytes; here of one that leaves x as it is."""
        M, N, K = problem.M, problem.N, problem.K
        return Work(weight_bytes + 2 * M * (K + N), 2 * M * N * K)


class WeightOnly(Provider):
    """One that does not quantize x."""

    def supports(self, problem: Problem) -> str | None:
        """Schemes of weights alone."""
        return None if problem.parsed.activations is None else "weights alone: x is not quantized"


def float_weight(problem: Problem, seed: int, device: str) -> Tensor:
    """(N, K) bfloat16: normal values, off center, whose size changes from row to row and every 16 columns.

    A scale or a zero that is looked up in the wrong place then shows.
    """
    N, K = problem.N, problem.K
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.randn(N, K, generator=generator, device=device).add_(0.5)
    rows = torch.rand(N, 1, generator=generator, device=device).mul_(2).sub_(1).exp2_()
    columns = torch.rand(-(-K // 16), generator=generator, device=device).mul_(2).sub_(1).exp2_()
    return w.mul_(rows).mul_(columns.repeat_interleave(16)[:K]).mul_(K**-0.5).to(DTYPE)


def activations(problem: Problem, device: str = "cuda", seed: int = 0) -> Tensor:
    """(M, K) bfloat16, normal."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(problem.M, problem.K, generator=generator, device=device).to(DTYPE)


def product_work(M: int, N: int, K: int, scheme: Scheme | None, weight_bytes: int | None = None) -> Work:
    """Of the product that a scheme asks for; None for bfloat16. Where x is quantized, its codes are written and read.

    weight_bytes: of the weight, where it is not stored as here.
    """
    moved = floors.traffic_bytes(M, N, K, scheme)
    if weight_bytes is not None:
        moved += weight_bytes - floors.weight_bytes(N, K, scheme)
    operations = 2 * M * N * K
    if scheme is None or scheme.activations is None:
        return Work(moved, operations)
    return Work(moved, 0, operations, cached_bytes=2 * floors.codes_bytes(M, K, scheme))


def quantized(x: Tensor, scheme: Scheme) -> Tensor:
    """x (M, K) as the oracle's codes stand for it, float32; as it is where the scheme leaves it."""
    if scheme.activations is None:
        return x
    return reference_int8.dequantize_activations(*reference_int8.quantize_activations(x, scheme.activations))


def check(prepared: Prepared, x: Tensor) -> str | None:
    """What is wrong with the product of x, or None.

    Up to 32 tokens, the first and the last among them, and all columns are compared with float64. With
    S = sqrt(sum x^2 w^2), the size of a sum of K terms of random sign, each value may be off by
    2^-8 |y| + tolerance * S: rounding of y, and of weights and partial sums that are kept in bfloat16. One wrong scale
    or address in a group of 16 is several times more. Against a float weight, the root mean square of error / S must
    not exceed FLOAT_TOLERANCE.

    x as it is multiplied may be codes: each within half a step of x, where 127 steps are the largest value of a token.
    """
    operand = prepared.enter(x)
    y = prepared.leave(prepared.call(operand), operand)
    w = prepared.weight()
    if y.shape != (x.shape[0], w.shape[0]) or y.dtype is not DTYPE:
        return f"gave {tuple(y.shape)} {y.dtype}, not {(x.shape[0], w.shape[0])} {DTYPE}"
    tokens = torch.linspace(0, x.shape[0] - 1, min(_CHECKED_TOKENS, x.shape[0]), device=x.device).long()
    seen = prepared.seen(operand)[tokens].double()
    if (reason := _is_not(seen, x[tokens].double())) is not None:
        return reason
    worst, at, squares = 0.0, (0, 0), 0.0
    step = max(1, _TRUTH_WEIGHTS // w.shape[1])
    for start in range(0, w.shape[0], step):
        part = w[start : start + step].double()
        exact = seen @ part.T
        size = (seen.square() @ part.square().T).sqrt().clamp(min=1e-30)
        error = (y[tokens, start : start + step].double() - exact).abs()
        if not torch.isfinite(error).all():
            return "gave NaN or infinity"
        squares += (error / size).square().sum().item()
        excess = (error - 2.0**-8 * exact.abs()) / size
        largest = int(excess.argmax())
        if excess.flatten()[largest] > worst:
            row, column = divmod(largest, excess.shape[1])
            worst, at = float(excess.flatten()[largest]), (int(tokens[row]), start + column)
    if prepared.own:
        if worst > prepared.tolerance:
            return f"is off by {worst:.3g} of its size at {at}; {prepared.tolerance:.3g} is allowed"
        return None
    mean = (squares / (len(tokens) * w.shape[0])) ** 0.5
    if mean > FLOAT_TOLERANCE:
        return f"is off by {mean:.3g} of its size on average; {FLOAT_TOLERANCE:.3g} is allowed"
    return None


def _is_not(seen: Tensor, x: Tensor) -> str | None:
    """Why x as it is multiplied does not stand for x; None if it does.

    A scale that is itself rounded to 16 bits moves codes a little further.
    """
    half = x.abs().amax(dim=1, keepdim=True) / (2 * _INT8_STEPS) * (1 + 2.0**-8)
    off = (seen - x).abs() / half.clamp(min=1e-30)
    if not off.max() <= 1:  # NaN is wrong too
        return f"multiplies another x: off by {off.max().item() / 2:.3g} steps of its codes"
    return None


@functools.cache
def missing(package: str) -> str | None:
    """Why a package cannot be imported, or None. Some raise anything at all where there is no GPU."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"import {package}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip()
    return None
