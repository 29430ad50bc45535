"""How long GPU work takes: candidates in CUDA graphs, interleaved, cold or warm; and eagerly, with their host time.

    timing.cold({"mine": [lambda: f(w) for w in mine], "theirs": [lambda: g(w) for w in theirs]})["mine"].median_us

A candidate is a list of calls without arguments, one for each distinct set of weights, on the current device. What
they do is their own business. `cold` goes over all of a candidate's sets before it meets one again, so that with
`weight_sets` of them no call finds its weights in the L2 cache. Candidates take turns in a random order, so that a
drift of the clocks hits all of them alike.

Nothing but torch is needed, and a GPU only by what measures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], object]

L2_BYTES = 60_000_000  # of an H200, and a good guess where the device does not say
_GRAPH_US = 400.0  # a replay starts with some microseconds of idling: at this length they are lost in it
_HOLD_CYCLES = 1_000_000  # about half a millisecond: the host has queued a round before the GPU starts on it


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median_us: median over replays of (time of a replay / calls in it).
        low_us, high_us: the middle 95 % of medians of bootstrap resamples.
        replays: how many were timed.
        sets: distinct weight sets that the calls went over.
    """

    median_us: float
    low_us: float
    high_us: float
    replays: int
    sets: int


# ---- pure parts ----


def weight_sets(call_bytes: int, l2_bytes: int = L2_BYTES, memory_bytes: int | None = None) -> int:
    """How many distinct sets a call must go over to find none of them in L2: ceil(3 * l2_bytes / call_bytes).

    Args:
        call_bytes: that one call moves: its weights, and its activations where sets have their own.
        l2_bytes: of the device; see `l2_bytes`.
        memory_bytes: that all sets together may take; None for no limit.

    Raises:
        ValueError: so many sets do not fit into memory_bytes; fewer would be timed half warm.
    """
    if call_bytes < 1:
        raise ValueError(f"call_bytes must be at least 1, got {call_bytes}")
    sets = -(-3 * l2_bytes // call_bytes)
    if memory_bytes is not None and sets * call_bytes > memory_bytes:
        raise ValueError(
            f"{sets} sets of {call_bytes} bytes are needed to keep an L2 of {l2_bytes} bytes cold; "
            f"memory_bytes is {memory_bytes}"
        )
    return sets


def passes(pass_us: float) -> int:
    """How often a graph goes over its sets, so that starting it, some microseconds, hardly counts: 1 to 100."""
    return max(1, min(100, math.ceil(_GRAPH_US / max(pass_us, 1e-3))))


def turns(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """For each round, every name once, in a random order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [[names[i] for i in torch.randperm(len(names), generator=generator)] for _ in range(rounds)]


def median_interval(
    samples: Sequence[float], confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high): a percentile bootstrap interval of the median.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    values = torch.tensor(samples, dtype=torch.float64)
    if values.numel() == 0 or not torch.isfinite(values).all():
        raise ValueError(f"samples must be finite and at least one, got {list(samples)}")
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(samples), (resamples, len(samples)), generator=generator)
    medians = torch.quantile(values[picked], 0.5, dim=1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(medians, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return torch.quantile(values, 0.5).item(), low, high


class Clock(Protocol):
    """What timestamps are taken with; `CudaClock`, or a stand-in in tests."""

    def hold(self) -> None:
        """Keep the device waiting for a moment, so that what is queued next runs without gaps."""

    def mark(self) -> Any:
        """Queue a timestamp."""

    def elapsed_us(self, start: Any, stop: Any) -> float:
        """Between two timestamps, once both have passed."""

    def wait(self) -> None:
        """Until the device is done."""


def interleave(
    replays: Mapping[str, Call], clock: Clock, rounds: int, seed: int, unmeasured: int = 0, apart: bool = False
) -> dict[str, list[float]]:
    """{name: microseconds of each of its replays}, one replay of each candidate per round, in a random order.

    Args:
        replays: what to time.
        clock: what with.
        rounds: timed replays of each candidate.
        seed: of the order.
        unmeasured: replays of the same candidate right before a timed one, to bring its data into the cache.
        apart: start each on an idle device instead of queueing a round at once, so that the host's time shows.
    """
    found: dict[str, list[float]] = {name: [] for name in replays}
    for order in turns(list(replays), rounds, seed):
        marks = []
        if not apart:
            clock.hold()
        for name in order:
            for _ in range(unmeasured):
                replays[name]()
            if apart:
                clock.wait()
            start = clock.mark()
            replays[name]()
            marks.append((name, start, clock.mark()))
        clock.wait()
        for name, start, stop in marks:
            found[name].append(clock.elapsed_us(start, stop))
    return found


def _timing(samples_us: Sequence[float], calls: int, sets: int) -> Timing:
    median, low, high = median_interval([sample / calls for sample in samples_us])
    return Timing(median, low, high, len(samples_us), sets)


# ---- on a GPU ----


class CudaClock:
    """CUDA events on the current stream."""

    def hold(self) -> None:
        """Have the GPU spin for half a millisecond."""
        torch.cuda._sleep(_HOLD_CYCLES)

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Between two events."""
        return start.elapsed_time(stop) * 1e3

    def wait(self) -> None:
        """Synchronize."""
        torch.cuda.synchronize()


def l2_bytes() -> int:
    """L2 cache of the current device."""
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)) or L2_BYTES


def warm_up(calls: Sequence[Call]) -> None:
    """Run every call once on a side stream, where capture wants first runs to be: kernels compile, libraries load."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(calls: Sequence[Call], times: int = 1) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls in order, `times` over. They must have run before; see `warm_up`.

    The results of one pass stay alive until its end, so that each call writes to memory of its own.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            results = [call() for call in calls]
            del results
    return graph


def cold(candidates: Mapping[str, Sequence[Call]], replays: int = 30, seed: int = 0) -> dict[str, Timing]:
    """Time of a call that finds nothing in L2, without launch overhead: a graph touches every set before one again.

    Args:
        candidates: {name: calls, one for each distinct weight set}; `weight_sets` says how many they must be.
        replays: of each graph, timed.
        seed: of the order in which candidates take turns.

    Raises:
        ValueError: a candidate has no calls.
    """
    graphs, calls = _graphs(candidates)
    samples = interleave({name: graph.replay for name, graph in graphs.items()}, CudaClock(), replays, seed)
    return {name: _timing(times, calls[name], len(candidates[name])) for name, times in samples.items()}


def warm(candidates: Mapping[str, Call], replays: int = 30, seed: int = 0) -> dict[str, Timing]:
    """Time of a call that has just run with the same weight, without launch overhead: L2 holds what fits into it.

    Args:
        candidates: {name: call with one weight set}.
        replays: of a graph of many such calls, timed; one more goes before each.
        seed: of the order in which candidates take turns.
    """
    graphs, calls = _graphs({name: [call] for name, call in candidates.items()})
    samples = interleave({name: graph.replay for name, graph in graphs.items()}, CudaClock(), replays, seed, 1)
    return {name: _timing(times, calls[name], 1) for name, times in samples.items()}


def eager(candidates: Mapping[str, Sequence[Call]], replays: int = 30, seed: int = 0) -> dict[str, Timing]:
    """Time of a call as Python makes it: dispatch and launch included, wherever they are not hidden behind the GPU.

    Args:
        candidates: as for `cold`.
        replays: loops over all calls, timed; of short ones at least 20 calls.
        seed: of the order in which candidates take turns.
    """
    loops: dict[str, Call] = {}
    counts = {}
    for name, calls in candidates.items():
        _check_calls(name, calls)
        warm_up(calls)
        (pass_us,) = interleave({name: _loop(calls)}, CudaClock(), rounds=1, seed=0, apart=True)[name]
        # Long calls hide the host's time anyhow.
        loop = list(calls) * min(passes(pass_us), -(-20 // len(calls)))
        counts[name] = len(loop)
        loops[name] = _loop(loop)
    samples = interleave(loops, CudaClock(), replays, seed, apart=True)
    return {name: _timing(times, counts[name], len(candidates[name])) for name, times in samples.items()}


def _loop(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _check_calls(name: str, calls: Sequence[Call]) -> None:
    if not calls:
        raise ValueError(f"candidate {name!r} has no calls")


def _graphs(candidates: Mapping[str, Sequence[Call]]) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, int]]:
    """{name: graph}, each long enough to be timed, and {name: calls in it}."""
    graphs, counts = {}, {}
    for name, calls in candidates.items():
        _check_calls(name, calls)
        warm_up(calls)
        graph = capture(calls)
        graph.replay()  # the first replay of a graph uploads it
        (pass_us,) = interleave({name: graph.replay}, CudaClock(), rounds=1, seed=0)[name]
        times = passes(pass_us)
        graphs[name] = graph if times == 1 else capture(calls, times)
        counts[name] = len(calls) * times
        graphs[name].replay()
    return graphs, counts


# ---- what the machine can do ----


def copy_bandwidth(size_bytes: int = 2**31) -> float:
    """Bytes per second, read and written, of the fastest way torch has to copy size_bytes on the current device."""
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    timings = cold(
        {"copy": [lambda: target.copy_(source)], "negate": [lambda: torch.neg(source, out=target)]}, replays=20
    )
    return 2 * source.nbytes / min(t.median_us for t in timings.values()) * 1e6


def read_bandwidth(size_bytes: int = 2**31) -> float:
    """Bytes per second of a sum over size_bytes on the current device: what memory gives where little is written."""
    source = torch.ones(size_bytes // 4, dtype=torch.float32, device="cuda")
    return source.nbytes / cold({"sum": [lambda: source.sum()]}, replays=20)["sum"].median_us * 1e6


def matmul_rate(sizes: Sequence[int] = (4096, 8192)) -> float:
    """Operations per second, two for each product added, of the best bfloat16 square product among sizes."""
    best = 0.0
    for size in sizes:
        generator = torch.Generator("cuda").manual_seed(size)
        x, w = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(2))

        def call(x: torch.Tensor = x, w: torch.Tensor = w) -> torch.Tensor:
            return torch.nn.functional.linear(x, w)

        best = max(best, 2 * size**3 / cold({"matmul": [call]}, replays=20)["matmul"].median_us * 1e6)
    return best
