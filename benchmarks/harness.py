"""What benchmarks on a GPU share: the record of the machine, result files, a time budget, one measured problem.

A result file is a JSON object: `kind`, `suite`, `date`, `machine`, `ceilings`, `problems` (one entry per problem, in
the order they were measured) or, where whole models are measured, `variants`, then `planned`, `finished` and `seconds`.
It is rewritten whole after every entry, through a temporary file, so that what stands there is always a whole file.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from benchmarks import floors, products, providers
from benchmarks.floors import Ceilings
from benchmarks.products import Prepared, Problem, Provider, Work
from qkernels.files import replacing
from qkernels.scheme import Scheme
from qkernels.tuning import problems, timing

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
Record = dict[str, Any]
Item = TypeVar("Item")
DEVICE = "cuda"

# Ceilings are measurements too: a time is refused only where it is below its floor by more than this.
TOLERANCE = 0.03
_MEMORY_SHARE = 0.3  # of the GPU's memory, that the weight sets of one provider may take


# ---- the machine ----


def machine(code: str | None = None) -> Record:
    """The GPU, its driver and clocks, and the versions of what runs on it; code names the commit if git does not.

    Without a GPU the device is "cpu", and nothing else is said of it.
    """
    return {
        **(_gpu() if torch.cuda.is_available() else {"device": "cpu", "driver": None}),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", "transformers", "gemlite", "bitsandbytes", "torchao")},
        "commit": code or commit(),
    }


def _gpu() -> Record:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": timing.l2_bytes(),
        **driver_and_clocks(str(getattr(properties, "uuid", ""))),
    }


_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}


def driver_and_clocks(uuid: str) -> dict[str, str | None]:
    """What nvidia-smi says of one GPU; None for each figure where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    if uuid:
        command += ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_SMI_FIELDS)
    values = [value.strip() for value in (printed.splitlines() or [""])[0].split(",")]
    return (
        dict(zip(_SMI_FIELDS, values, strict=True)) if len(values) == len(_SMI_FIELDS) else dict.fromkeys(_SMI_FIELDS)
    )


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout; with "+" where files differ from it, "unknown" where it is none."""
    try:
        git = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=ROOT)
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
        return git(["git", "rev-parse", "HEAD"]).stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def ceilings() -> Ceilings:
    """Measured on the current device, in a second or two; but the rate of int8, which is the datasheet's."""
    size = min(2**31, int(torch.cuda.mem_get_info()[0] * 0.2))
    return Ceilings(
        device=torch.cuda.get_device_name(),
        copy=timing.copy_bandwidth(size),
        matmul=timing.matmul_rate(),
        source="measured",
        read=timing.read_bandwidth(size),
        int8=floors.int8_rate(torch.cuda.get_device_name()),
    )


# ---- result files ----


def header(kind: str, suite: str, found: Record, measured: Ceilings | None) -> Record:
    """How every result file begins; `found` is that of `machine`, and `measured` that of `ceilings`, if it was."""
    return {
        "kind": kind,
        "suite": suite,
        "date": today(),
        "machine": found,
        "ceilings": measured and dataclasses.asdict(measured),
    }


def result_path(folder: pathlib.Path, device: str, date: str, suite: str) -> pathlib.Path:
    """folder/<gpu>/<date>-<suite>.json; with a number after it where a file of that name is there already."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = folder / slug / f"{date}-{suite}.json"
    number = 2
    while path.exists():
        path = folder / slug / f"{date}-{suite}-{number}.json"
        number += 1
    return path


def write(path: pathlib.Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def newest(kind: str, folder: pathlib.Path = RESULTS) -> pathlib.Path | None:
    """The result file of a kind with the latest date, with most entries among those; None if there is none.

    Entries are `problems`, `variants` or `entries`; a file without any counts for nothing.
    """
    found = []
    for path in folder.glob("*/*.json"):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.get("kind") == kind:
            entries = record.get("problems") or record.get("variants") or record.get("entries")
            if entries:
                found.append((record["date"], len(entries), path))
    return max(found)[-1] if found else None


# ---- suites ----


def most_informative_first(
    models: Sequence[str], schemes: Sequence[str], tokens: Sequence[int], first: Sequence[int]
) -> list[Problem]:
    """Every problem of the product, in stages, so that a run that is cut short has seen the most telling ones.

    Stage 0 is the first model and scheme at the tokens in `first`; stage i adds the model and the scheme at place i of
    their lists, and stage 1 all other tokens. Within a stage, problems with the same weight follow each other.

    Raises:
        ValueError: a model is not in problems.MODELS, or a scheme is none or has static activations; it is named.
    """
    for model in models:
        if model not in problems.MODELS:
            raise ValueError(f"model {model!r} is not known; models: {', '.join(problems.MODELS)}")
    found = []
    texts = [str(Scheme.parse(scheme)) for scheme in schemes]
    for text in texts:
        activations = Scheme.parse(text).activations
        if activations is not None and activations.static:
            raise ValueError(f"scheme {text!r} has static activations, which need calibration: not compared")
    for model_place, model in enumerate(models):
        for scheme_place, scheme in enumerate(texts):
            for layer in problems.MODELS[model]:
                for M in tokens:
                    stage = max(model_place, scheme_place, int(bool(first) and M not in first))
                    found.append((stage, Problem(M, layer.N, layer.K, scheme, model, layer.name)))
    found.sort(key=lambda item: item[0])  # stable
    return [problem for _, problem in found]


def run(
    path: pathlib.Path,
    record: Record,
    items: Sequence[Item],
    seconds: float,
    measure: Callable[[Item], Record],
    now: Callable[[], float] = time.monotonic,
    entries: str = "problems",
) -> Record:
    """Measure items in order until the budget is spent, and write the record after each; returns it.

    An item is started only if the longest so far would still fit. The record gets `planned`, `finished`, `seconds`, and
    what was measured under the name `entries`.
    """
    start, longest = now(), 0.0
    record = {**record, entries: [], "planned": len(items), "finished": False, "seconds": 0.0}
    for item in items:
        began = now()
        if began - start + longest > seconds:
            break
        record[entries].append(measure(item))
        longest = max(longest, now() - began)
        record["finished"] = len(record[entries]) == len(items)
        record["seconds"] = round(now() - start, 1)
        write(path, record)
    return record


def today() -> str:
    """The date, ISO."""
    return datetime.date.today().isoformat()


# ---- one problem ----


class WeightSets:
    """Prepared weights of one (N, K, scheme), kept while problems with the same weight follow each other."""

    def __init__(self) -> None:
        self._weight: tuple[int, int, str] | None = None
        self._sets: dict[str, list[Prepared]] = {}

    def get(self, provider: Provider, problem: Problem, count: int) -> list[Prepared]:
        """`count` sets of a provider, each from a float weight of its own; the same for all providers."""
        weight = (problem.N, problem.K, problem.scheme)
        if weight != self._weight:
            self._sets, self._weight = {}, weight
        sets = self._sets.setdefault(provider.name, [])
        while len(sets) < count:
            sets.append(provider.prepare(problem, len(sets), DEVICE))
        return sets[:count]

    def drop(self, provider: Provider) -> None:
        """Free the sets of a provider that turned out not to work."""
        self._sets.pop(provider.name, None)


def measure(
    problem: Problem, chosen: Iterable[Provider], found_ceilings: Ceilings, sets: WeightSets, replays: int = 30
) -> Record:
    """Check, then time a problem with every provider: cold, warm and eager.

    A provider that does not support it, fails or is wrong has an entry that says so, under `skipped`, `failed` or
    `wrong`, and no times. What a CUDA graph cannot hold has an eager time alone.
    """
    entries: dict[str, Record] = {}
    calls: dict[str, list[timing.Call]] = {}
    by_name = {provider.name: provider for provider in chosen}
    x = products.activations(problem, DEVICE)
    for name, provider in by_name.items():
        if (reason := provider.supports(problem)) is not None:
            entries[name] = {"skipped": reason}
            continue
        try:
            entries[name], ready = _ready(provider, problem, x, sets)
        except Exception as error:
            torch.cuda.synchronize()  # raises if the device itself has failed: then nothing more can be measured
            entries[name], ready = {"failed": f"{type(error).__name__}: {error}"[:500]}, []
        if ready:
            calls[name] = ready
        else:
            sets.drop(provider)
    few = max(5, replays // 3)
    captured = {name: ready for name, ready in calls.items() if by_name[name].captured}
    try:
        timings = {
            "cold": timing.cold(captured, replays),
            "warm": timing.warm({name: ready[0] for name, ready in captured.items()}, few),
            "eager": timing.eager(calls, few),
        }
    except torch.cuda.OutOfMemoryError as error:  # each fits alone, all graphs together do not: go on with the others
        failed = {"failed": f"with all providers at once: {type(error).__name__}: {error}"[:500]}
        return {**dataclasses.asdict(problem), "providers": entries | dict.fromkeys(calls, failed)}
    for name in calls:
        entries[name] |= {kind: dataclasses.asdict(found[name]) for kind, found in timings.items() if name in found}
        if name in captured:
            work = by_name[name].work(problem, entries[name]["weight_bytes"])
            entries[name] |= against_floor(timings["cold"][name].median_us, work, found_ceilings)
    add_speed_ups(entries)
    return {**dataclasses.asdict(problem), "providers": entries}


def _ready(provider: Provider, problem: Problem, x: torch.Tensor, sets: WeightSets) -> tuple[Record, list[timing.Call]]:
    """A provider's entry, and its calls, one for each weight set with activations of its own; none if it is wrong."""
    (prepared,) = sets.get(provider, problem, 1)
    if (reason := products.check(prepared, x)) is not None:
        return {"wrong": reason}, []
    # What a set takes, whichever part of it a call uses: a part of a product finds the rest as the product would.
    held = prepared.nbytes + 2 * problem.M * (problem.K + problem.N)
    memory_bytes = int(torch.cuda.mem_get_info()[1] * _MEMORY_SHARE)
    count = timing.weight_sets(held, timing.l2_bytes(), memory_bytes)
    calls: list[timing.Call] = [
        functools.partial(each.call, each.enter(x.clone())) for each in sets.get(provider, problem, count)
    ]
    timing.warm_up(calls)
    if provider.captured:
        timing.capture(calls)  # here, so that one that cannot be captured is found alone
    moved = provider.work(problem, prepared.nbytes).moved_bytes
    return {"what": provider.what, "weight_bytes": prepared.nbytes, "moved_bytes": moved}, calls


def against_floor(cold_us: float, work: Work, measured: Ceilings) -> Record:
    """{"floor_us": of so much work}, and what `judge` says of a time."""
    arithmetic = work.operations, work.int8_operations
    floor_us = floors.bound_us(work.moved_bytes, arithmetic[0], measured, arithmetic[1])
    limit_us = floors.bound_us(work.moved_bytes - work.cached_bytes, arithmetic[0], measured.fastest, arithmetic[1])
    return {"floor_us": floor_us, **judge(cold_us, floor_us, limit_us)}


def judge(cold_us: float, floor_us: float, limit_us: float) -> Record:
    """{"eta": floor / time}; or {"contaminated": why} for a time below what the machine can do.

    limit_us is the floor with the fastest that memory was seen to be, read or copied.
    """
    if cold_us < limit_us * (1 - TOLERANCE):
        return {"contaminated": f"{cold_us:.2f} us is below the {limit_us:.2f} us that the machine needs: refused"}
    return {"eta": floor_us / cold_us}


def add_speed_ups(entries: dict[str, Record]) -> None:
    """Give every honest entry its speed-up over the baseline, where that is honest too."""
    baseline = entries.get(providers.BASELINE, {})
    for entry in entries.values():
        if "eta" in entry and "eta" in baseline:
            entry["speed_up"] = baseline["cold"]["median_us"] / entry["cold"]["median_us"]
