"""What benchmarks of whole models need: a record of the machine, its bandwidth, times on a GPU, result files."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).parent.parent
Record = dict[str, Any]
L2_BYTES = 60_000_000  # where the device does not say


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer (N, K) that a token passes `count` times; q, k and v merged, gate and up merged."""

    name: str
    N: int
    K: int
    count: int


def _dense(layers: int, hidden: int, qkv: int, feed_forward: int) -> tuple[Layer, ...]:
    return (
        Layer("qkv", qkv, hidden, layers),
        Layer("o", hidden, hidden, layers),
        Layer("gate_up", 2 * feed_forward, hidden, layers),
        Layer("down", hidden, feed_forward, layers),
    )


MODELS = {
    "Llama-3-8B": _dense(32, hidden=4096, qkv=6144, feed_forward=14336),
    "Llama-3-70B": _dense(80, hidden=8192, qkv=10240, feed_forward=28672),
}


def machine() -> Record:
    """Device, driver, and versions of what runs on it."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": _printed(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else None,
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the checkout; with "+" where files differ from it, None where it is none."""
    head = _printed(["git", "rev-parse", "HEAD"])
    changed = _printed(["git", "status", "--porcelain", "--untracked-files=no"])
    return head and head + ("+" if changed else "")


def _printed(command: Sequence[str]) -> str | None:
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=30, cwd=ROOT)
        return (run(command).stdout.splitlines() or [""])[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: pathlib.Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- times on a GPU ----


def capture(call: Callable[[], object], warm_ups: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, which runs before, on a side stream: kernels compile then, and libraries load."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    return graph


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Average of calls in a row, by events on the current stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def weight_sets(call_bytes: int, l2_bytes: int = L2_BYTES) -> int:
    """Distinct weights that calls must go over to find none of them in the L2 cache: ceil(3 l2_bytes / call_bytes)."""
    return -(-3 * l2_bytes // call_bytes)


def cold_us(calls: Sequence[Callable[[], object]], replays: int = 30) -> float:
    """Median microseconds of a call, in a CUDA graph of all of them; give it `weight_sets` of them."""
    times = max(1, 100 // len(calls))

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    graph = capture(run, warm_ups=1)
    return statistics.median(seconds_per_call(graph.replay, 1) for _ in range(replays)) / (times * len(calls)) * 1e6


def copy_bandwidth(size_bytes: int = 2**31) -> float:
    """Bytes per second, read and written, of a copy on the current device."""
    source = torch.ones(size_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / cold_us([lambda: target.copy_(source)]) * 1e6
