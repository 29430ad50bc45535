"""How fast a whole model decodes: a step of a Llama-3-8B shape in a CUDA graph, with dense and with quantized weights.

    python -m benchmarks.model                                   # bfloat16, w4g128, and w4g128 with merged siblings
    python -m benchmarks.model --schemes w4g128 w8g128 --context 4096 --batch 8
    python -m benchmarks.model --tiny                            # only the check, on a CPU too

Weights are random; lm_head stays bfloat16. Every step reads all weights and the whole cache: these bytes over the
bandwidth of a copy, measured in the same process, are the floor. Variants take turns in a random order. Then the times
of single layers, each with cold weights, are added up over the layers of Llama-3-8B and 70B: what a step spends in
products of its Linears, without attention, norms and lm_head.

Before that, and alone where there is no GPU, the loop is checked on a tiny model: the quantized one must agree with one
whose Linears hold the dequantized weights, a merged one with one that is not, and a step with a forward pass over the
whole sequence without a cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.decode import Decoder, Variant, build, dense_twin, random_weight
from benchmarks.machine import MODELS, Layer, Record
from qkernels import QTensor, Scheme, ops, tables

# Logits of the tiny model are about 1; products of length 256 to 384 in float32 differ by their order of additions.
_CHECK_TOLERANCE = 1e-4


# ---- the check ----


def check(schemes: Sequence[str], device: str) -> Record:
    """{scheme: largest difference of logits of the tiny model from what they must be}, in float32.

    Raises:
        RuntimeError: a difference is larger than the order of additions explains.
    """
    found: Record = {}
    for scheme in schemes:
        context, batch = 16, 2
        make = functools.partial(build, "tiny", device=device, dtype=torch.float32, context=context)
        quantized, merged = make(variant=Variant(scheme)), make(variant=Variant(scheme, merged=True))
        twin = dense_twin(quantized, context)
        decoder = Decoder(quantized, context, batch)
        sequence = torch.cat([decoder.prompt, decoder.token], dim=1)
        logits = decoder.step()
        with torch.no_grad():
            whole = twin(sequence, use_cache=False, logits_to_keep=1).logits[:, -1]
        found[scheme] = {
            "dense": _difference(logits, Decoder(twin, context, batch).step()),
            "merged": _difference(logits, Decoder(merged, context, batch).step()),
            "without cache": _difference(logits, whole),
        }
        allowed = {"dense": _CHECK_TOLERANCE, "without cache": _CHECK_TOLERANCE}
        allowed["merged"] = 0.0 if device == "cpu" else _CHECK_TOLERANCE
        for what, difference in found[scheme].items():
            if not difference <= allowed[what]:  # NaN is wrong too
                raise RuntimeError(f"{scheme}: logits differ by {difference:g} from {what}; allowed {allowed[what]:g}")
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- the loop ----


def figures(
    variant: Variant, seconds: Sequence[float], batch: int, weight_bytes: int, cache_bytes: int, bandwidth: float
) -> Record:
    """What is recorded of a variant, from the seconds of its steps in several rounds; bandwidth in bytes per second."""
    step, floor = statistics.median(seconds), (weight_bytes + cache_bytes) / bandwidth
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        "step_ms": step * 1e3,
        "step_ms_lowest": min(seconds) * 1e3,
        "step_ms_highest": max(seconds) * 1e3,
        "tokens_per_s": batch / step,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / step,
    }


def add_speed_ups(variants: Sequence[Record]) -> None:
    """Give every variant its speed-up over the dense one, if that was measured."""
    dense = next((v["step_ms"] for v in variants if v.get("scheme") is None and "step_ms" in v), None)
    for variant in variants:
        if dense is not None and "step_ms" in variant:
            variant["speed_up"] = dense / variant["step_ms"]


def take_turns(
    runners: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int,
    seconds_per_call: Callable[[Callable[[], object], int], float],
    seed: int = 0,
) -> dict[str, list[float]]:
    """{name: seconds per step of each round}; in every round each runner makes its steps, in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    names = list(runners)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in torch.randperm(len(names), generator=generator).tolist():
            found[names[i]].append(seconds_per_call(runners[names[i]], steps))
    return found


def measure(
    size: str,
    variants: Sequence[Variant],
    context: int,
    batch: int,
    rounds: int,
    steps: int,
    bandwidth: float,
    device: str = "cuda",
    seconds_per_call: Callable[[Callable[[], object], int], float] = machine.seconds_per_call,
) -> list[Record]:
    """A record of each variant, decoding on a device; one that does not fit has a `skipped` instead."""
    decoders: dict[Variant, Decoder] = {}
    runners: dict[str, Callable[[], object]] = {}
    skipped: list[Record] = []
    for variant in variants:
        made = _decoder(size, variant, context, batch, device)
        if isinstance(made, str):
            skipped.append({"name": variant.name, **dataclasses.asdict(variant), "skipped": made})
        else:
            decoders[variant], runners[variant.name] = made
    seconds = take_turns(runners, rounds, steps, seconds_per_call)
    found = [
        figures(variant, seconds[variant.name], batch, decoder.weight_bytes, decoder.cache_bytes, bandwidth)
        for variant, decoder in decoders.items()
    ]
    add_speed_ups(found)
    return found + skipped


def _decoder(
    size: str, variant: Variant, context: int, batch: int, device: str
) -> tuple[Decoder, Callable[[], object]] | str:
    """A decoder with what runs a step of it; or why there is none."""
    try:
        decoder = Decoder(build(size, variant, device, torch.bfloat16, context), context, batch)
        return decoder, decoder.runner()
    except torch.cuda.OutOfMemoryError as error:
        reason = f"does not fit: {str(error).splitlines()[0]}"
    gc.collect()
    torch.cuda.empty_cache()
    return reason


def result_table(record: Record) -> str:
    """The variants of a result file."""
    rows = [
        (
            v["name"], f"{v['step_ms']:.2f}", f"{v['tokens_per_s']:.0f}", f"{v['floor_ms']:.2f}",
            f"{v['share_of_floor']:.0%}", f"{v['speed_up']:.2f}" if "speed_up" in v else "",
            tables.size(v["weight_bytes"]),
        )
        for v in record["variants"]
        if "step_ms" in v
    ]  # fmt: skip
    title = f"{record['model']}, context {record['context']}, batch {record['batch']}: decoding on {record['device']}"
    columns = ("weights", "ms per step", "tokens/s", "floor ms", "floor / time", "speed-up", "weights read")
    notes = [f"skipped: {v['name']}: {v['skipped']}" for v in record["variants"] if "skipped" in v]
    return "\n".join([tables.text(title, columns, rows), *notes])


# ---- sums over layers ----


def total_us(times_us: Mapping[str, float], layers: Sequence[Layer]) -> float:
    """Microseconds that a token spends in all layers, from the time of one of each name."""
    return sum(layer.count * times_us[layer.name] for layer in layers)


def layer_totals(model: str, scheme: str | None, tokens: int) -> Record:
    """Times of a model's layers on the current GPU, cold, dense or quantized, and their sum over a token's way."""
    times = {layer.name: machine.cold_us(layer_calls(layer, scheme, tokens, "cuda")) for layer in MODELS[model]}
    return {"model": model, "scheme": scheme, "layers_us": times, "total_us": total_us(times, MODELS[model])}


def layer_calls(layer: Layer, scheme: str | None, tokens: int, device: str) -> list[Callable[[], torch.Tensor]]:
    """Products with a layer's shape in bfloat16, with so many different weights that none is found in L2."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, layer.K, dtype=torch.bfloat16, device=device, generator=generator)
    calls: list[Callable[[], torch.Tensor]] = []
    wanted = 1
    while len(calls) < wanted:
        if scheme is None:
            w = torch.randn(layer.N, layer.K, dtype=torch.bfloat16, device=device, generator=generator)
            wanted = machine.weight_sets(w.nbytes)
            calls.append(functools.partial(torch.nn.functional.linear, x, w))
        else:
            q = random_weight(layer.N, layer.K, scheme, generator)
            wanted = machine.weight_sets(q.nbytes)
            calls.append(functools.partial(ops.matmul, x, *_arguments(q)))
    return calls


def _arguments(q: QTensor) -> tuple[Any, ...]:
    return q.packed, q.scale, q.zero, None, str(q.scheme), q.in_features


def totals_table(record: Record) -> str:
    """Sums over layers, of a result file."""
    dense = {t["model"]: t["total_us"] for t in record["totals"] if t["scheme"] is None}
    rows = [
        (
            t["model"],
            t["scheme"] or "dense",
            *(f"{us:.1f}" for us in t["layers_us"].values()),
            f"{t['total_us'] / 1e3:.2f}",
            f"{dense[t['model']] / t['total_us']:.2f}" if t["model"] in dense else "",
        )
        for t in record["totals"]
    ]
    columns = ("model", "weights", *(f"{name} us" for name in record["totals"][0]["layers_us"]), "all ms", "speed-up")
    return tables.text(f"Linears alone, {record['batch']} tokens", columns, rows, text_columns=2)


# ---- command ----


def result_path(folder: pathlib.Path, device: str, date: str, suite: str) -> pathlib.Path:
    """folder/<gpu>/<date>-<suite>.json; with a number after it where a file of that name is there already."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path, number = folder / slug / f"{date}-{suite}.json", 2
    while path.exists():
        path, number = folder / slug / f"{date}-{suite}-{number}.json", number + 1
    return path


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options that benchmarks of a decoding model share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schemes", nargs="+", default=["w4g128"], metavar="SCHEME", type=_scheme)
    parser.add_argument("--context", type=_at_least(2), default=1024, help="tokens that a step attends to")
    parser.add_argument("--batch", type=_at_least(1), default=1, help="sequences")
    parser.add_argument("--tiny", action="store_true", help="only check the loop, on a tiny model")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the result files; benchmarks/results")
    return parser


def _scheme(text: str) -> str:
    return str(Scheme.parse(text))


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {text}")
        return int(text)

    return parse


def variants_of(schemes: Sequence[str]) -> list[Variant]:
    """Dense, and of each scheme with siblings apart and merged."""
    return [Variant(None), *(Variant(scheme, merged) for scheme in schemes for merged in (False, True))]


def checked(options: argparse.Namespace, kind: str) -> tuple[Record, pathlib.Path | None]:
    """(record of the machine with the loop's check, where to write it); None where only the check was wanted or can be.

    A check that fails raises.
    """
    on_gpu = torch.cuda.is_available()
    record = {"kind": kind, "date": datetime.date.today().isoformat(), **machine.machine()}
    record["check"] = check(options.schemes, "cuda" if on_gpu else "cpu")
    for scheme, found in record["check"].items():
        differences = ", ".join(f"{what} {difference:.2g}" for what, difference in found.items())
        print(f"tiny model, {scheme}: logits differ from {differences}")
    if not on_gpu:
        print("There is no GPU here: nothing is timed, only the loop was checked.")
    if not on_gpu or options.tiny:
        if options.out is not None:
            machine.write(result_path(options.out, record["device"], record["date"], f"{kind}-check"), record)
        return record, None
    return record, result_path(
        options.out or machine.ROOT / "benchmarks/results", record["device"], record["date"], kind
    )


def main(arguments: list[str] | None = None) -> int:
    """Check, then measure; the exit status is 1 if nothing was measured where something could be."""
    options_parser = parser(__doc__, "model")
    options_parser.add_argument("--rounds", type=_at_least(1), default=9, help="turns of each variant")
    options_parser.add_argument("--steps", type=_at_least(1), default=64, help="steps in a turn")
    options_parser.add_argument("--no-totals", action="store_true", help="leave out the sums over single layers")
    options = options_parser.parse_args(arguments)
    record, path = checked(options, "model")
    if path is None:
        return 0
    bandwidth = machine.copy_bandwidth()
    record |= {"model": "Llama-3-8B", "context": options.context, "batch": options.batch}
    record |= {"copy_bytes_per_s": bandwidth, "rounds": options.rounds, "steps": options.steps}
    record["variants"] = measure(
        "Llama-3-8B", variants_of(options.schemes), options.context, options.batch, options.rounds, options.steps,
        bandwidth,
    )  # fmt: skip
    machine.write(path, record)
    print(result_table(record), flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    if not options.no_totals:
        record["totals"] = []
        for model in MODELS:
            for scheme in (None, *options.schemes):
                with torch.no_grad():
                    record["totals"].append(layer_totals(model, scheme, options.batch))
                machine.write(path, record)
        print("\n" + totals_table(record))
    print(path)
    return 0 if any("step_ms" in v for v in record["variants"]) else 1


if __name__ == "__main__":
    sys.exit(main())
