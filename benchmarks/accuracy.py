"""What each method loses at each scheme, on real models and texts; with other packages in the same run.

python -m benchmarks.accuracy                                   # everything
python -m benchmarks.accuracy --schemes w4g128 --methods rtn default gptq

One result file holds one entry per model, scheme and method, and is written after each. The same command, run again,
measures only what is missing; --again measures what it is told to, whatever there is. Commands for other entries may
run side by side into one file, each on one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import harness, peers
from benchmarks.subjects import SUBJECTS, Encoder, LanguageModel, Subject
from qkernels import tables
from qkernels.calibrate.probe import writes
from qkernels.model import quantize_model
from qkernels.nn import QuantLinear
from qkernels.planning.plan import plan
from qkernels.planning.result import Plan
from qkernels.replace import places
from qkernels.scheme import Scheme
from qkernels.selection import DEFAULT_SKIP, select
from qkernels.tensor import QuantizationError, stored_bytes

RESULT = harness.RESULTS / "accuracy/accuracy.json"
SCHEMES = ("w4g128", "w4g64", "w3g64", "w2g64", "w8g128", "w4g32", "w3g128", "w2g32", "w4g32f")

LOSSLESS = 1e-6  # a score below is what rounding of float32 comes to


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to choose codes.

    Attributes:
        what: for people.
        options: of quantize_model.
        on_text: whether it learns from the calibration text.
        planned: whether layers get schemes of their own, within the bytes of the one that is asked for.
        writes: whether only a model that writes text can be quantized so.
    """

    what: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_text: bool = False
    planned: bool = False
    writes: bool = False


OURS: Mapping[str, Method] = {
    "rtn": Method("round to nearest", {"method": "rtn"}),
    "default": Method("search, weighted by the inputs on text that the model writes, or on random tokens"),
    "hqq": Method("half-quadratic zeros, weighted likewise", {"method": "hqq"}),
    "plan": Method("a scheme for each layer, codes by default", planned=True),
    "awq": Method("AWQ's scaling, then search", {"method": "search", "smooth": "awq"}, on_text=True),
    "gptq": Method("GPTQ and descent", {"method": "gptq"}, on_text=True),
    "awq, gptq": Method("AWQ's scaling, then GPTQ", {"method": "gptq", "smooth": "awq"}, on_text=True),
    "gptq, written": Method(
        "GPTQ and descent, on text that the model writes", {"method": "gptq", "calibration": "written"}, writes=True
    ),
    "awq, gptq, written, distilled": Method(
        "AWQ's scaling, then GPTQ, then scales of all layers together, on text that the model writes",
        {"method": "gptq", "calibration": "written", "smooth": "awq", "distill": 2},
        writes=True,
    ),
    "gptq, rounded": Method(
        "GPTQ, then 200 steps of SignRound in each block", {"method": "gptq", "rounding": 200}, on_text=True
    ),
    "gptq, distilled": Method(
        "GPTQ, then scales of all layers together", {"method": "gptq", "distill": 2}, on_text=True
    ),
    "gptq, rounded, distilled": Method(
        "GPTQ, then 200 steps of SignRound in each block, then scales of all layers together",
        {"method": "gptq", "rounding": 200, "distill": 2},
        on_text=True,
    ),
}
METHODS = (*OURS, *peers.PEERS)


@dataclasses.dataclass
class Made:
    """A quantized copy, as plain Linears that hold what its codes stand for."""

    model: nn.Module
    bits: float
    layers: int
    error: QuantizationError


def quantized(subject: Subject, scheme: Scheme, method: str) -> Made:
    """A copy of the subject's model, quantized.

    Linears hold the dequantized weights: what QuantLinear multiplies by on a CPU, without unpacking for each window.
    """
    model = copy.deepcopy(subject.model)
    if method in peers.PEERS:
        return _by_peer(model, scheme, method)
    options = dict(OURS[method].options)
    if OURS[method].on_text:
        options["calibration"] = subject.calibration
    planned: Scheme | Plan = scheme
    if OURS[method].planned:
        target = sum(stored_bytes(scheme, linear.out_features, linear.in_features) for linear in _linears(model))
        planned = plan(model, target_bytes=target, progress=False)
    report = quantize_model(model, planned, progress=False, **options)
    where = places(model)
    for module in [m for m in model.modules() if isinstance(m, QuantLinear)]:
        weight = module.qweight.dequantize(torch.float32)
        linear = nn.Linear(module.in_features, module.out_features, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", module.bias)
        for parent, name in where[module]:
            setattr(parent, name, linear)
    return Made(model, report.bits_per_weight, len(report.layers), report.error)


def _by_peer(model: nn.Module, scheme: Scheme, peer: str) -> Made:
    bits, weights, layers, error = 0.0, 0, 0, QuantizationError(0.0, 0.0, 0.0)
    for linear in _linears(model):
        original = linear.weight.detach()
        found, taken = peers.quantized(peer, original, scheme)
        error += QuantizationError.between(original, found)
        linear.weight = nn.Parameter(found, requires_grad=False)
        bits, weights, layers = bits + taken, weights + original.numel(), layers + 1
    return Made(model, bits / weights, layers, error)


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Those that quantize_model takes by default."""
    return [linear for linear, _ in select(model, Scheme.parse("w8c"), DEFAULT_SKIP, {}).linears.values()]


def refusal(subject: Subject, scheme: Scheme, method: str) -> str | None:
    """Why a method does not take part, or None."""
    if method not in peers.PEERS:
        return "the model writes no text" if OURS[method].writes and not writes(subject.model) else None
    reasons = (peers.refusal(method, scheme, linear.in_features) for linear in _linears(subject.model))
    return next((reason for reason in reasons if reason), None)


def measure(subject: Subject, scheme: Scheme, method: str, memory: Callable[[], int | None]) -> harness.Record:
    """Quantize a copy, and score it."""
    if reason := refusal(subject, scheme, method):
        return {"skipped": reason}
    memory()
    start = time.perf_counter()
    made = quantized(subject, scheme, method)
    seconds = time.perf_counter() - start
    peak = memory()
    return {
        "seconds": round(seconds, 1), "peak_bytes": peak, "layers": made.layers, "bits_per_weight": made.bits,
        "snr_db": min(made.error.snr_db, 999.0), **subject.score(made.model),
    }  # fmt: skip


def peak_memory() -> int | None:
    """Most bytes of memory this process has held since the last call; None where the system does not say."""
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        reset.write_text("5")
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def machine() -> harness.Record:
    """What it ran on, and with what."""
    return {
        **harness.machine(),
        **{name: harness.version(name) for name in peers.PACKAGES},
    }


def run(
    path: pathlib.Path, found: Sequence[Subject], schemes: Sequence[str], methods: Sequence[str], again: bool = False
) -> harness.Record:
    """Measure what is missing in the file, scheme by scheme, and write it after each; returns the record.

    Raises:
        ValueError: the file holds scores over other windows or sentences, which do not compare.
    """
    record = _read(path)
    for subject in found:
        known = record["models"].get(subject.name)
        if known is not None and known["about"] != subject.about:
            raise ValueError(
                f"{path} holds {subject.name} over {known['about']}, not {subject.about}: name another file"
            )
        if known is None:
            scores = subject.score(subject.model)
            weights = sum(linear.weight.numel() for linear in _linears(subject.model))
            record["models"][subject.name] = {"about": subject.about, "weights": weights, **scores}
    for scheme in schemes:
        for subject in found:
            for method in methods:
                key = {"model": subject.name, "scheme": scheme, "method": method}
                if not again and any(key.items() <= e.items() for e in record["entries"]):
                    continue
                entry = {**key, **measure(subject, Scheme.parse(scheme), method, peak_memory)}
                entry |= {"threads": torch.get_num_threads(), "date": harness.today(), "commit": harness.commit()}
                models, record = record["models"], _read(path)  # others may have added to it meanwhile
                record["models"] |= models
                record["entries"] = [e for e in record["entries"] if not key.items() <= e.items()] + [entry]
                record |= {"date": harness.today(), "machine": machine()}
                harness.write(path, record)
                print(line(subject, entry), flush=True)
    return record


def _read(path: pathlib.Path) -> harness.Record:
    """The record in a result file, or a new one."""
    record = json.loads(path.read_text()) if path.exists() else harness.header("accuracy", "all", machine(), None)
    return {"models": {}, "entries": [], **record}


def line(subject: Subject, entry: harness.Record) -> str:
    """One entry for a terminal."""
    start = f"{entry['model']} {entry['scheme']} {entry['method']}: "
    if "skipped" in entry:
        return start + entry["skipped"]
    figures = (f"{heading} {entry[key]:.4g}" for key, heading in subject.metrics.items())
    took = f"{entry['seconds']} s on {entry['threads']} threads"
    return f"{start}{', '.join(figures)}; {entry['bits_per_weight']:.2f} bits, {took}"


def table(record: harness.Record, model: str) -> str:
    """All entries of a model, for a terminal."""
    metrics = SUBJECTS[model].metrics
    rows = [
        (
            entry["scheme"], entry["method"], f"{entry['bits_per_weight']:.2f}", f"{entry['snr_db']:.1f}",
            *(with_error(entry, key) for key in metrics), f"{entry['seconds']:.0f}", str(entry["threads"]),
            tables.size(entry["peak_bytes"] or 0),
        )
        for entry in record["entries"]
        if entry["model"] == model and "skipped" not in entry
    ]  # fmt: skip
    columns = ("scheme", "method", "bits/weight", "SNR dB", *metrics.values(), "seconds", "threads", "peak memory")
    return tables.text(f"{model}: {record['models'][model]['about']}", columns, rows, text_columns=2)


def with_error(entry: harness.Record, key: str) -> str:
    """A score and its standard error, to as many digits as that warrants."""
    value, error = entry[key], entry.get(f"{key}_error")
    if not error or error != error:
        return f"{value:.3f}"
    digits = max(0, min(5, 1 - int(f"{error:e}".partition("e")[2])))
    return f"{value:.{digits}f} ± {error:.{digits}f}" if value < 1e5 else f"{value:.2g}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--windows", type=int, default=40, help="of the language model's text")
    parser.add_argument("--sentences", type=int, default=600, help="of the encoder's text")
    parser.add_argument("--again", action="store_true", help="measure also what the file holds")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, help="the result file")
    options = parser.parse_args(arguments)
    try:
        schemes = [str(Scheme.parse(scheme)) for scheme in options.schemes]
    except ValueError as error:
        parser.error(str(error))
    counts = {LanguageModel.name: options.windows, Encoder.name: options.sentences}
    found = [SUBJECTS[name](counts[name]) for name in options.models]
    try:
        record = run(options.out, found, schemes, options.methods, options.again)
    except ValueError as error:
        parser.error(str(error))
    for subject in found:
        print(table(record, subject.name))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
