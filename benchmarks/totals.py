"""Times of single layers, added up over a model: what a step of it spends in products of its Linears.

Part of what benchmarks.model measures. Weights are random, and none is found in L2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import floors, harness
from benchmarks.decode import random_weight
from benchmarks.floors import Ceilings
from benchmarks.harness import Record
from benchmarks.products import product_work
from qkernels import QTensor, Scheme, ops, tables
from qkernels.tuning import problems, timing
from qkernels.tuning.problems import Layer


def layer_totals(
    model: str, schemes: Sequence[str | None], tokens: int, ceilings: Ceilings, device: str = "cuda"
) -> list[Record]:
    """For each scheme, None for dense, times of a model's layers on the current GPU, cold; and what a token takes.

    A layer is timed with all schemes at once, so that they take turns. `total_us` is left out where a layer's time is
    refused.
    """
    layers = problems.MODELS[model]
    found: dict[str | None, dict[str, Record]] = {scheme: {} for scheme in schemes}
    for layer in layers:
        calls = {scheme or "dense": layer_calls(layer, scheme, tokens, device) for scheme in schemes}
        timings = timing.cold(calls)
        for scheme in schemes:
            cold = timings[scheme or "dense"]
            work = product_work(tokens, layer.N, layer.K, _parsed(scheme))
            judged = harness.against_floor(cold.median_us, work, ceilings)
            found[scheme][layer.name] = {"cold": dataclasses.asdict(cold), **judged}
    return [{"model": model, "scheme": scheme, **total(found[scheme], layers)} for scheme in schemes]


def total(entries: Mapping[str, Record], layers: Sequence[Layer]) -> Record:
    """Entries of layers under `layers`, and what a token spends in all of them: `floor_us`, `total_us` if honest."""
    found: Record = {
        "layers": dict(entries),
        "floor_us": sum(layer.count * entries[layer.name]["floor_us"] for layer in layers),
    }
    if all("eta" in entry for entry in entries.values()):
        found["total_us"] = sum(layer.count * entries[layer.name]["cold"]["median_us"] for layer in layers)
    return found


def layer_calls(layer: Layer, scheme: str | None, tokens: int, device: str) -> list[timing.Call]:
    """Products with a layer's shape in bfloat16, with so many different weights that none is found in L2."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, layer.K, dtype=torch.bfloat16, device=device, generator=generator)
    weight_bytes = floors.weight_bytes(layer.N, layer.K, _parsed(scheme))
    calls: list[timing.Call] = []
    for _ in range(timing.weight_sets(weight_bytes, timing.l2_bytes())):
        if scheme is None:
            w = torch.randn(layer.N, layer.K, dtype=torch.bfloat16, device=device, generator=generator)
            calls.append(functools.partial(torch.nn.functional.linear, x.clone(), w))
        else:
            q = random_weight(layer.N, layer.K, scheme, generator)
            calls.append(functools.partial(ops.matmul, x.clone(), *_arguments(q)))
    return calls


def _parsed(scheme: str | None) -> Scheme | None:
    return None if scheme is None else Scheme.parse(scheme)


def _arguments(q: QTensor) -> tuple[Any, ...]:
    return q.packed, q.scale, q.zero, None, str(q.scheme), q.in_features


def totals_table(record: Record) -> str:
    """Sums over layers, of a result file."""
    dense = {t["model"]: t["total_us"] for t in record["totals"] if t["scheme"] is None and "total_us" in t}
    rows = [
        (
            t["model"],
            t["scheme"] or "dense",
            *(f"{e['cold']['median_us']:.1f}{'!' if 'contaminated' in e else ''}" for e in t["layers"].values()),
            f"{t['total_us'] / 1e3:.2f}" if "total_us" in t else "refused",
            f"{t['floor_us'] / t['total_us']:.0%}" if "total_us" in t else "",
            f"{dense[t['model']] / t['total_us']:.2f}" if "total_us" in t and t["model"] in dense else "",
        )
        for t in record["totals"]
    ]
    names = (f"{name} us" for name in record["totals"][0]["layers"])
    columns = ("model", "weights", *names, "all ms", "floor / time", "speed-up")
    return tables.text(f"Linears alone, {record['tokens']} tokens", columns, rows, text_columns=2)
