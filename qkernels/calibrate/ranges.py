"""Static ranges of activations: one scale for all inputs of a layer, found from what calibration shows of them.

Histogram  Values are counted by their sign, exponent and first bits of the mantissa, which are bits of a float32: bins
           are 1/32 of a power of two wide, wherever values lie, so nothing is ever scaled again, memory is the same
           whatever comes, and batches, however they are cut, give the same counts.
Methods    minmax       from the least value to the largest.
           percentile   as far as 99.99 % of all |x| > 0 lie; where activations have a zero, of each end by itself.
           mse          the range of least squared error of x, rounding and clipping together.
Error      Of values that spread evenly over a bin from a to b, quantized with scale s to integers of at most n, the
           mean squared error is s^3 (F(b / s) - F(a / s)) / (b - a) with F(t) = r / 12 + (t - r)^3 / 3, the integral
           of (t - r)^2, and r = min(rint(t), n): rounding and clipping alike. Scale and zero are those that are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels.calibrate.batches import inputs_not_finite
from qkernels.reference_int8 import SMALLEST_RANGE, dynamic_range
from qkernels.scheme import Activations

METHODS = ("minmax", "percentile", "mse")

_MANTISSA = 5  # bits of it that tell bins apart
_SHIFT = 23 - _MANTISSA
_BINS = 1 << (8 + _MANTISSA)  # of each sign
_NOT_FINITE = 255 << _MANTISSA  # from this bin on
_BEYOND = 1e-4  # share of values outside of a percentile's range
_STEPS, _OCTAVES = 4, 16  # trial ranges: so many to a power of two, down to 2^-16 of the largest
_FINER = 8  # times as many, once a good one is known


@dataclasses.dataclass
class Histogram:
    """Counts of values, and their ends.

    Attributes:
        counts: (2, 8192) int64, on the values' device: of values from zero on, and of negative ones by their size.
        low, high: the least and the largest value, float32.
    """

    counts: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(x: Tensor) -> Histogram:
        """Of a tensor that is not empty, float32."""
        bits = (x.reshape(-1).view(torch.int32) >> _SHIFT) & (2 * _BINS - 1)
        return Histogram(torch.bincount(bits, minlength=2 * _BINS).reshape(2, _BINS), *torch.aminmax(x))

    def __add__(self, other: Histogram) -> Histogram:
        """Of both together."""
        ends = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Histogram(self.counts + other.counts, *ends)

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return not self.counts[:, _NOT_FINITE:].any()


class Ranges:
    """Static ranges of layers, found as their inputs are seen. Layers that read the same find the same.

    Args:
        layers: {name: how its inputs are quantized}; others are not heard.
        method: one of METHODS.
    """

    def __init__(self, layers: Mapping[str, Activations], method: str):
        self.layers, self.method = layers, method
        self._seen: dict[str, Histogram] = {}

    def see(self, name: str, x: Tensor) -> None:
        """More inputs (tokens, K) float32 of a layer."""
        if name in self.layers:
            found = Histogram.of(x)
            self._seen[name] = self._seen[name] + found if name in self._seen else found

    def result(self) -> dict[str, Tensor]:
        """{name: (2,) float32, scale and zero of its inputs}. Layers that saw nothing, or zeros alone, are missing.

        Raises:
            CalibrationError: inputs of a layer are not finite.
        """
        found = {}
        for name, seen in self._seen.items():
            if not seen.finite:
                raise inputs_not_finite(name)
            if seen.low or seen.high:
                found[name] = static_activation(seen, self.layers[name], self.method)
        return found


def static_activation(seen: Histogram, how: Activations, method: str) -> Tensor:
    """(2,) float32 on the device of the counts: the scale and the zero of all values."""
    ends = torch.stack([seen.low, seen.high]).cpu()
    if method != "minmax":
        counts = seen.counts[:, :_NOT_FINITE].cpu()
        ends = _percentile(counts, ends, how) if method == "percentile" else _least_error(counts, ends, how)
    scale, zero = _stored(ends[None], how)
    return torch.cat([scale, zero]).to(seen.counts.device)


def _stored(ends: Tensor, how: Activations) -> tuple[Tensor, Tensor]:
    """(scale, zero) float32 (ranges,) of ranges (ranges, 2) float32."""
    scale, _, zero = dynamic_range(ends, how)
    return scale.clamp(SMALLEST_RANGE, 1 / SMALLEST_RANGE), zero


def _edges() -> tuple[Tensor, Tensor]:
    """Where bins of finite sizes begin and end, float64."""
    edges = (torch.arange(_NOT_FINITE + 1, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    edges[-1] = 2.0**128
    return edges[:-1], edges[1:]


def _percentile(counts: Tensor, ends: Tensor, how: Activations) -> Tensor:
    beyond = _BEYOND * float(counts[:, 1:].sum())  # zeros aside, as after a ReLU: else they might be all there is
    if how.symmetric:
        high = min(_size_of_all_but(beyond, counts.sum(0)), float(ends.abs().max()))
        return torch.tensor([-high, high])
    high, low = (_size_of_all_but(beyond, count) for count in counts)
    return torch.tensor([max(-low, float(ends[0])), min(high, float(ends[1]))])


def _size_of_all_but(beyond: float, counts: Tensor) -> float:
    """The size that so many values exceed, spread evenly over their bin; 0 where no more are there."""
    from_here_on = counts.flip(0).cumsum(0).flip(0).double()
    bins = int((from_here_on > beyond).sum())
    if not bins:
        return 0.0
    start, end = (float(edges[bins - 1]) for edges in _edges())
    return start + (end - start) * float((from_here_on[bins - 1] - beyond) / counts[bins - 1])


def _least_error(counts: Tensor, ends: Tensor, how: Activations) -> Tensor:
    """Ends (2,) of the best range that was tried: first both drawn in alike, then each by itself, coarse and fine."""
    ends = torch.stack([ends[0].clamp(max=0.0), ends[1].clamp(min=0.0)])
    if how.symmetric:
        ends = ends.abs().max() * torch.tensor([-1.0, 1.0])
    coarse = 2.0 ** (-torch.arange(_STEPS * _OCTAVES + 1) / _STEPS)
    fine = 2.0 ** (torch.arange(-_FINER, _FINER + 1) / (_STEPS * _FINER))
    both, low, high = torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    best = ends
    for factors in (coarse, fine):
        for move in (both,) if how.symmetric else (both, low, high, low, high):
            tried = best * factors[:, None] ** move
            tried = torch.maximum(torch.minimum(tried, ends.clamp(min=0.0)), ends.clamp(max=0.0))
            best = tried[int(squared_errors(counts, *_stored(tried, how), how).argmin())]
    return best


def squared_errors(counts: Tensor, scale: Tensor, zero: Tensor, how: Activations) -> Tensor:
    """(ranges,) float64: the sum of (x - x^)^2 over all values, for each scale and zero (ranges,).

    Args:
        counts: (2, bins) int64 of finite values, as of Histogram.
        scale, zero: float32, as they are stored.
        how: values are quantized.
    """
    starts, ends = _edges()
    total = torch.zeros(len(scale), dtype=torch.float64)
    lowest = -127.0 if how.symmetric else -128.0
    for count, most in zip(counts, (127.0 - zero.double(), zero.double() - lowest), strict=True):
        filled = count.nonzero()[:, 0]
        s, n = scale.double()[:, None], most[:, None]
        start, end = starts[filled], ends[filled]
        integral = _integral(end / s, n) - _integral(start / s, n)
        total += (integral * s**3 / (end - start)) @ count[filled].double()
    return total


def _integral(t: Tensor, most: Tensor) -> Tensor:
    """Of (u - min(rint(u), most))^2, u from 0 to t."""
    nearest = torch.minimum(torch.round(t), most)
    return nearest / 12 + (t - nearest) ** 3 / 3
