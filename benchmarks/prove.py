"""Everything that needs a GPU, in one command: tests, stress, memory checkers, tuning, benchmarks with peers, plots.

    python -m benchmarks.prove --out DIR                        # all stages, about an hour
    python -m benchmarks.prove --out DIR --stages tests stress  # some, each within its share of --minutes
    python -m benchmarks.prove --out DIR --list                 # only say what would run

Most important first. Each stage is a process of its own with a time limit; what it prints goes to DIR/<stage>.log, and
DIR/summary.json is rewritten after each, so that a run that is cut off still tells. A stage that fails does not stop
the next ones, but once a test has failed nothing is tuned or timed: a wrong kernel has no speed. The exit status is 1
if a stage failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import harness
from qkernels.tuning.devices import Device


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of the stage and its log.
        command: to run in the repository's root.
        weight: share of the time.
        proof: later stages depend on it.
        environment: on top of this process's own.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    proof: bool = False
    environment: tuple[tuple[str, str], ...] = ()


# Warnings are errors for us, but other versions of torch than ours may warn of something.
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
# The caching allocator would hide accesses past the end of a tensor; a fresh process compiles before it is watched.
_WATCHED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
# What proves kernels needs torch, numpy and pytest; what uses them, transformers and matplotlib too.
_KERNEL_TESTS = ("gpu", "gpu_int8", "kernels", "kernels_int8", "rounding", "tune")
_LAYER_TESTS = ("merge", "gpu_models", "benchmarks", "benchmarks_int8", "model_benchmark")
_EXACT = "is_exact or codes_are_exact or one_hot or around"
_LARGE = ("tests/test_gpu.py", "tests/test_gpu_int8.py", "-k", "exact or equal or gives_the")
_SMALL = ("tests/test_kernels.py", "tests/test_kernels_int8.py", "-k", _EXACT)


def stages(out: pathlib.Path, seconds: float, device: Device) -> list[Stage]:
    """All of them, most important first; seconds is the time for all, which some are told."""
    python = sys.executable

    def module(name: str, *arguments: object) -> tuple[str, ...]:
        return (python, "-m", name, *map(str, arguments))

    def share(weight: float) -> float:
        return round(0.9 * seconds * weight, 1)

    def sanitizer(tool: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_PYTEST, "-x", *_SMALL)

    def decoder(name: str, *arguments: object) -> tuple[str, ...]:
        schemes = ("w4g128", "w8a8", "w4a8")
        return module(f"benchmarks.{name}", "--schemes", *schemes, *arguments, "--out", out / "results")

    table = out / "tuning" / f"{device.slug}.json"
    tuned = (("QKERNELS_CACHE", str(out)),)  # where tables.user_path looks for it

    def suite(name: str, weight: float) -> Stage:
        command = module(
            "benchmarks.matmul", "--suite", name, "--seconds", share(weight), "--out", out / "results"
        )  # fmt: skip
        return Stage(name, command, weight, environment=tuned)

    def tune(name: str, weight: float, *schemes: str) -> Stage:
        command = module(
            "qkernels.cli", "tune", "--schemes", *schemes, "--minutes", share(weight - 0.01) / 60, "--out", table
        )  # fmt: skip
        return Stage(name, command, weight, environment=tuned)

    return [
        Stage("exact", (*_PYTEST, *_LARGE), 0.05, proof=True),
        Stage(
            "stress", module("benchmarks.stress", "--seconds", share(0.04), "--out", out / "stress.json"), 0.05,
            proof=True,
        ),
        Stage("tests", (*_PYTEST, *(f"tests/test_{name}.py" for name in _KERNEL_TESTS)), 0.1, proof=True),
        Stage("quick", module("benchmarks.matmul", "--suite", "quick", "--out", out / "results"), 0.04),
        tune("tune", 0.11, "w4g128"),
        tune("tune-int8", 0.12, "w8a8", "w4a8"),
        suite("w8a8", 0.07),
        suite("w4a8", 0.05),
        Stage("memcheck", sanitizer("memcheck"), 0.04, environment=_WATCHED),
        Stage("racecheck", sanitizer("racecheck"), 0.04, environment=_WATCHED),
        suite("full", 0.1),
        Stage("layers", (*_PYTEST, "-m", "gpu", *(f"tests/test_{name}.py" for name in _LAYER_TESTS)), 0.03),
        Stage("quantize", module("benchmarks.quantize", "--out", out / "results"), 0.02),
        Stage("activations", module("benchmarks.activations", "--out", out / "results"), 0.02),
        Stage("model", decoder("model"), 0.07, environment=tuned),
        Stage("prefill", decoder("model", "--prefill", "--steps", 8, "--no-totals"), 0.03, environment=tuned),
        Stage("energy", decoder("energy"), 0.035, environment=tuned),
        Stage("energy-prefill", decoder("energy", "--prefill"), 0.035, environment=tuned),
        Stage(
            "gluon",
            module("benchmarks.gluon_matmul", "--seconds", share(0.015), "--limit", 45, "--out", out / "results"), 0.02,
        ),
        Stage("plots", module("benchmarks.plot", out / "results"), 0.01),
    ]  # fmt: skip


def run(chosen: Sequence[Stage], out: pathlib.Path, seconds: float) -> int:
    """Run stages one after the other; the number of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    total = sum(stage.weight for stage in chosen)
    records: list[harness.Record] = []
    unproved = False
    for stage in chosen:
        limit = seconds * stage.weight / total
        start = time.perf_counter()
        status: int | str
        if unproved and not stage.proof:
            status = "not run: a proof failed"
        elif shutil.which(stage.command[0]) is None:
            status = f"not run: no {stage.command[0]}"
        else:
            status = _process(stage, out / f"{stage.name}.log", limit)
        unproved |= stage.proof and status != 0
        records.append(
            {
                "stage": stage.name,
                "status": status,
                "seconds": round(time.perf_counter() - start, 1),
                "limit": round(limit),
                "command": shlex.join(stage.command),
            }
        )
        harness.write(out / "summary.json", {"commit": harness.commit(), "stages": records})
        log = out / f"{stage.name}.log"
        tail = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
        print(f"{stage.name}: {status} in {records[-1]['seconds']} s", *tail, sep="\n    ", flush=True)
    return sum(record["status"] != 0 for record in records)


def _process(stage: Stage, log: pathlib.Path, limit: float) -> int | str:
    """Exit status, or what happened instead; output goes to the log as it comes."""
    root = pathlib.Path(__file__).parent.parent
    with open(log, "w") as file:
        process = subprocess.Popen(
            stage.command, cwd=root, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(stage.environment)
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # suites write as they go: what is there stays
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return f"stopped after {limit:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen stages; the exit status is 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for logs and results")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="some of those that --list names")
    parser.add_argument("--minutes", type=float, default=60, help="for all chosen stages together")
    parser.add_argument("--list", action="store_true", help="print the stages and their commands")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not options.list:
        print("no NVIDIA GPU here; --list shows what would run, and plain `pytest` proves what can be without one")
        return 2
    from qkernels.tuning.devices import H200, device_of

    device = device_of(torch.cuda.current_device()) if gpu else H200
    out, seconds = options.out.resolve(), options.minutes * 60
    weights = {stage.name: stage.weight for stage in stages(out, seconds, device)}
    for name in options.stages or ():
        if name not in weights:
            parser.error(f"--stages {name!r} is not one of {', '.join(weights)}")
    names = options.stages or list(weights)
    total = sum(weights[name] for name in names)
    # Some share the whole time among them.
    chosen = [stage for stage in stages(out, seconds / total, device) if stage.name in names]
    if options.list:
        for stage in chosen:
            print(f"{stage.name} ({seconds * stage.weight / total:.0f} s): {shlex.join(stage.command)}")
        return 0
    return 1 if run(chosen, out, seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
