"""A stand-in for a GPU: what happens to times is seen without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import floors, harness
from qkernels.tuning import timing

CEILINGS = floors.Ceilings("stand-in", copy=1e11, matmul=1e15, source="measured", read=2e11)


class FakeClock:
    """Time that passes only when a stand-in says so; what happened is in `log`."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.log: list[str] = []

    def work(self, name: str, us: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now_us += us

        return run

    def hold(self) -> None:
        self.log.append("hold")

    def mark(self) -> float:
        self.log.append("mark")
        return self.now_us

    def elapsed_us(self, start: float, stop: float) -> float:
        return stop - start

    def wait(self) -> None:
        self.log.append("wait")


class FakeGpu(FakeClock):
    """Graphs take 3 us to start, and as long for each call as `call_us` says; calls run when captured."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[tuple[int, int]] = []  # (calls, times)
        self.call_us: Callable[[Any], float] = lambda call: 4.0

    def capture(self, calls: list[timing.Call], times: int = 1) -> Any:
        for call in calls:
            call()
        self.captured.append((len(calls), times))
        us = 3.0 + times * sum(self.call_us(call) for call in calls)

        class Graph:
            replay = staticmethod(self.work("replay", us))

        return Graph()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """In place of the GPU, and of the measuring of its times."""
    fake = FakeGpu()
    monkeypatch.setattr(timing, "capture", fake.capture)
    monkeypatch.setattr(timing, "warm_up", lambda calls: [call() for call in calls])
    monkeypatch.setattr(timing, "CudaClock", lambda: fake)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 100_000)
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    return fake


def machine() -> harness.Record:
    """What a result file says of the machine."""
    return {
        "device": "NVIDIA Imaginary", "driver": "1.2", "torch": "9.9", "triton": "8.8", "commit": "0123456789abcdef+",
    }  # fmt: skip
