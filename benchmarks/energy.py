"""What a token costs in energy, decoded or of a prompt: the board's own counter around a loop of steps.

    python -m benchmarks.energy                                  # bfloat16 and w4g128, siblings apart and merged
    python -m benchmarks.energy --schemes w4g128 w8g128 --seconds 20
    python -m benchmarks.energy --schemes w8a8 w4a8 --prefill    # prompts of 1024 tokens instead of decode steps

The counter is NVML's nvmlDeviceGetTotalEnergyConsumption: millijoules of the whole board, memory and losses included,
since the driver was loaded. It is read when the GPU is idle and waited for: around at least 10 s of steps, each a
replay of one CUDA graph, and around some seconds of doing nothing. Two figures follow: joules per token, and joules per
token above what the board would have taken idling for as long. The host is not in it. A loop that is faster than the
machine can be is refused. Results go to benchmarks/results/<gpu>/<date>-energy.json, or -energy-prefill.json.

Without a GPU the loop is only checked. Without the package nvidia-ml-py, or on a GPU that does not count, the benchmark
says so and is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import harness, model
from benchmarks.decode import Decoder, Phase, Variant, build
from benchmarks.floors import Ceilings
from benchmarks.harness import Record
from benchmarks.products import Work
from qkernels import tables

Counter = Callable[[], int]  # millijoules so far


class UnavailableError(RuntimeError):
    """There is nothing to measure energy with; the message says why."""


@dataclasses.dataclass(frozen=True)
class Energy:
    """What a loop took.

    Attributes:
        joules: of the board.
        seconds: that the loop ran.
        tokens: that it decoded.
        idle_watts: of the board when it does nothing.
    """

    joules: float
    seconds: float
    tokens: int
    idle_watts: float

    @property
    def watts(self) -> float:
        """Average over the loop."""
        return self.joules / self.seconds

    @property
    def joules_per_token(self) -> float:
        """All that the board took."""
        return self.joules / self.tokens

    @property
    def joules_per_token_above_idle(self) -> float:
        """Less what it would have taken idling for as long."""
        return (self.joules - self.idle_watts * self.seconds) / self.tokens


def idle_watts(
    counter: Counter,
    seconds: float,
    settle: float = 5.0,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Power of a board that does nothing, after `settle` seconds in which its clocks fall.

    Raises:
        UnavailableError: the counter stands still.
    """
    sleep(settle)
    joules, start = counter(), now()
    sleep(seconds)
    return _since(counter, joules) / (now() - start)


def measure(
    steps: Callable[[], None],
    tokens: int,
    counter: Counter,
    idle: float,
    seconds: float = 10.0,
    now: Callable[[], float] = time.monotonic,
) -> Energy:
    """Energy of a loop.

    Args:
        steps: some steps, after which the GPU is waited for; called once before counting begins.
        tokens: that one call decodes.
        counter: of millijoules.
        idle: power of the idle board, in watts.
        seconds: that the loop runs at least; a counter that is updated every tenth of a second is then right to 1 %.
        now: a clock, in seconds.

    Raises:
        UnavailableError: the counter stands still.
    """
    steps()
    before, start, calls = counter(), now(), 0
    while now() - start < seconds:
        steps()
        calls += 1
    taken = now() - start
    return Energy(_since(counter, before), taken, calls * tokens, idle)


def _since(counter: Counter, before: int) -> float:
    """Joules since the counter was read."""
    millijoules = counter() - before
    if millijoules <= 0:
        raise UnavailableError(f"the energy counter stands still, or went back: {millijoules} mJ")
    return millijoules / 1e3


def nvml_counter() -> Counter:
    """The counter of the current GPU.

    Raises:
        UnavailableError: there is no package nvidia-ml-py, or the GPU does not count.
    """
    try:
        import pynvml
    except ImportError:
        raise UnavailableError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        read: Any = functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        read()
    except pynvml.NVMLError as error:
        raise UnavailableError(f"nvmlDeviceGetTotalEnergyConsumption does not work here: {error}") from None
    return lambda: int(read())


def figures(variant: Variant, energy: Energy, tokens: int, work: Work, ceilings: Ceilings) -> Record:
    """What is recorded of a variant whose step has so much to do for so many tokens.

    With it come `eta`, the floor of such a step over its time, or `contaminated`, why all figures are refused.
    """
    step_us = energy.seconds / energy.tokens * tokens * 1e6
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        **dataclasses.asdict(energy),
        "watts": energy.watts,
        "joules_per_token": energy.joules_per_token,
        "joules_per_token_above_idle": energy.joules_per_token_above_idle,
        **harness.against_floor(step_us, work, ceilings),
    }


def result_table(record: Record) -> str:
    """The variants of a result file."""
    rows = [
        (
            v["name"], joules(v["joules_per_token"]), joules(v["joules_per_token_above_idle"]), f"{v['watts']:.0f}",
            f"{v['tokens'] / v['seconds']:.0f}", f"{v['seconds']:.1f}", f"{v['eta']:.0%}" if "eta" in v else "refused",
        )
        for v in record["variants"]
    ]  # fmt: skip
    columns = ("weights", "J/token", "above idle", "watts", "tokens/s", "seconds", "floor / time")
    title = f"{model.setting(record)}, which idles at {record['idle_watts']:.0f} W: {record['phase']}"
    return tables.text(title, columns, rows)


def joules(value: float) -> str:
    """A token of a prompt takes a thousandth of what a decoded one does.

    >>> joules(4.6875), joules(0.0123456)
    ('4.688', '0.01235')
    """
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4g}"


def run(
    record: Record,
    path: pathlib.Path,
    size: str,
    variants: Sequence[Variant],
    counter: Counter,
    seconds: float,
    device: str = "cuda",
    now: Callable[[], float] = time.monotonic,
    phase: type[Phase] = Decoder,
) -> Record:
    """Measure variants one by one, each alone in memory, and write the record after each; returns it.

    The record must hold `ceilings`, `context`, `batch` and `idle_watts`; it gets what `harness.run` gives it.
    """
    context, batch, ceilings = record["context"], record["batch"], Ceilings(**record["ceilings"])

    def measured(variant: Variant) -> Record:
        loop = phase(build(size, variant, device, torch.bfloat16, context), context, batch)
        steps = 64 if device == "cuda" else 1
        repeated = _steps(loop.runner(), steps)
        energy = measure(repeated, steps * loop.tokens, counter, record["idle_watts"], seconds, now)
        found = figures(variant, energy, loop.tokens, loop.work, ceilings)
        del loop, repeated
        gc.collect()
        torch.cuda.empty_cache()
        return found

    return harness.run(path, record, variants, math.inf, measured, entries="variants")


def main(arguments: list[str] | None = None) -> int:
    """Check the loop, then measure each variant on its own; the exit status is 1 if a time was refused."""
    parser = model.parser(__doc__, "energy")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each variant runs; at least 10")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="that idle power is measured for")
    options = parser.parse_args(arguments)
    if options.seconds < 10 or options.idle_seconds < 5:
        parser.error("--seconds must be at least 10 and --idle-seconds at least 5: the counter is coarse")
    record, path = model.checked(options, "energy")
    if path is None:
        return 0
    try:
        counter = nvml_counter()
        torch.cuda.synchronize()
        record["idle_watts"] = idle_watts(counter, options.idle_seconds)
        variants, phase = model.variants_of(options.schemes), model.phase_of(options)
        record = run(record, path, model.SIZE, variants, counter, options.seconds, phase=phase)
    except UnavailableError as reason:
        print(f"energy: skipped: {reason}")
        return 0
    bad = model.refused(record)
    print("\n".join([result_table(record), str(path), *bad]))
    return 1 if bad else 0


def _steps(step: Callable[[], object], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return steps


if __name__ == "__main__":
    sys.exit(main())
