"""One option for each group, the cheapest set of them that fits into so many bytes.

Method    the lower convex hull of each group's options, cost over bytes: its steps save less and less for a byte. Taken
          in order of saving for a byte, over all groups, until one does not fit, they are optimal for the bytes that
          they fill (Sinha and Zoltners, The multiple-choice knapsack problem, 1979). What is left over goes to whatever
          option fits and saves most.
Bound     the cost is at most the best possible plus what the first step that did not fit would have saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Option:
    """What one group may be.

    Attributes:
        nbytes: that it takes.
        cost: any finite number.
    """

    nbytes: int
    cost: float


@dataclasses.dataclass(frozen=True)
class _Step:
    """From one option of a group to the next on its hull: more bytes, less cost."""

    group: int
    start: int
    stop: int
    nbytes: int
    saving: float


def choose(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of each group's option.

    Args:
        groups: at least one option in each.
        budget: bytes for all of them together.

    Raises:
        ValueError: the smallest options take more; the message says how much.
    """
    taken = [_smallest(options) for options in groups]
    rest = budget - sum(options[i].nbytes for options, i in zip(groups, taken, strict=True))
    if rest < 0:
        raise ValueError(f"the smallest options take {budget - rest} bytes, more than {budget}")
    steps = [step for group, options in enumerate(groups) for step in _hull(group, options)]
    for step in sorted(steps, key=lambda step: step.saving / step.nbytes, reverse=True):
        if step.nbytes <= rest and taken[step.group] == step.start:
            taken[step.group] = step.stop
            rest -= step.nbytes
    while better := max(_fitting(groups, taken, rest), key=lambda step: step.saving, default=None):
        taken[better.group] = better.stop
        rest -= better.nbytes
    return taken


def _smallest(options: Sequence[Option]) -> int:
    return min(range(len(options)), key=lambda i: (options[i].nbytes, options[i].cost))


def _hull(group: int, options: Sequence[Option]) -> Iterator[_Step]:
    """Steps along the lower convex hull, from the smallest option on."""
    start = _smallest(options)
    while True:
        steps = [
            _Step(group, start, stop, option.nbytes - options[start].nbytes, options[start].cost - option.cost)
            for stop, option in enumerate(options)
            if option.nbytes > options[start].nbytes and option.cost < options[start].cost
        ]
        if not steps:
            return
        steepest = max(steps, key=lambda step: (step.saving / step.nbytes, step.nbytes))
        yield steepest
        start = steepest.stop


def _fitting(groups: Sequence[Sequence[Option]], taken: Sequence[int], rest: int) -> Iterator[_Step]:
    """Every move of one group that lowers the cost and fits."""
    for group, options in enumerate(groups):
        now = options[taken[group]]
        for stop, option in enumerate(options):
            if option.nbytes - now.nbytes <= rest and option.cost < now.cost:
                yield _Step(group, taken[group], stop, option.nbytes - now.nbytes, now.cost - option.cost)
