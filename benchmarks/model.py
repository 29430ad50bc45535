"""How fast a whole model decodes: a step of a Llama-3-8B shape in a CUDA graph, with dense and with quantized weights.

    python -m benchmarks.model                                   # bfloat16, w4g128, and w4g128 with merged siblings
    python -m benchmarks.model --schemes w4g128 w8g128 --context 4096 --batch 8
    python -m benchmarks.model --tiny                            # only the check, on a CPU too

Weights are random; lm_head stays bfloat16. Every step reads all weights and the whole cache: these bytes over the
bandwidth of a copy, measured in the same process, are the floor, and a step that is faster than memory can be read is
refused. Variants take turns in a random order. Then the times of single layers, each with cold weights, are added up
over the layers of Llama-3-8B and 70B: what a step spends in products of its Linears, without attention, norms and
lm_head. Results go to benchmarks/results/<gpu>/<date>-model.json.

Before that, and alone where there is no GPU, the loop is checked on a tiny model: the quantized one must agree with one
whose Linears hold the dequantized weights, a merged one with one that is not, and a step with a forward pass over the
whole sequence without a cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import floors, harness
from benchmarks.decode import Decoder, Variant, build, dense_twin, random_weight
from benchmarks.floors import Ceilings
from benchmarks.harness import Record
from qkernels import QTensor, Scheme, ops, tables
from qkernels.tuning import problems, timing
from qkernels.tuning.problems import Layer

SIZE = "Llama-3-8B"  # what is decoded
TOTALS = ("Llama-3-8B", "Llama-3-70B")  # of these the layers' times are added up
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


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Average of calls in a row, by events on the current stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def figures(
    variant: Variant, seconds: Sequence[float], batch: int, weight_bytes: int, cache_bytes: int, ceilings: Ceilings
) -> Record:
    """What is recorded of a variant, from the seconds of its steps in several rounds.

    Its floor is that of memory alone; with it come `eta`, floor / time, or `contaminated`, why the time is refused.
    """
    step = statistics.median(seconds)
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        "step_ms": step * 1e3,
        "step_ms_lowest": min(seconds) * 1e3,
        "step_ms_highest": max(seconds) * 1e3,
        "tokens_per_s": batch / step,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        **harness.against_floor(step * 1e6, weight_bytes + cache_bytes, 0, ceilings),
    }


def add_speed_ups(variants: Sequence[Record]) -> None:
    """Give every variant with an honest time its speed-up over the dense one, if that has one too."""
    dense = next((v["step_ms"] for v in variants if v.get("scheme") is None and "eta" in v), None)
    for variant in variants:
        if dense is not None and "eta" in variant:
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
    ceilings: Ceilings,
    device: str = "cuda",
    seconds_per_call: Callable[[Callable[[], object], int], float] = seconds_per_call,
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
        figures(variant, seconds[variant.name], batch, decoder.weight_bytes, decoder.cache_bytes, ceilings)
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
            v["name"], f"{v['step_ms']:.2f}", f"{v['tokens_per_s']:.0f}", f"{v['floor_us'] / 1e3:.2f}",
            f"{v['eta']:.0%}" if "eta" in v else "refused", f"{v['speed_up']:.2f}" if "speed_up" in v else "",
            tables.size(v["weight_bytes"]),
        )
        for v in record["variants"]
        if "step_ms" in v
    ]  # fmt: skip
    columns = ("weights", "ms per step", "tokens/s", "floor ms", "floor / time", "speed-up", "weights read")
    notes = [f"skipped: {v['name']}: {v['skipped']}" for v in record["variants"] if "skipped" in v]
    return "\n".join([tables.text(f"{setting(record)}: decoding", columns, rows), *notes])


def setting(record: Record) -> str:
    """What was decoded, and where."""
    return f"{record['model']}, context {record['context']}, batch {record['batch']}, on {record['machine']['device']}"


def refused(record: Record) -> list[str]:
    """A line for each time of a result file that is below what the machine can do."""
    entries = {v["name"]: v for v in record["variants"]}
    for total in record.get("totals", ()):
        for layer, entry in total["layers"].items():
            entries[f"{total['model']} {layer} {total['scheme'] or 'dense'}"] = entry
    return [f"{name}: contaminated: {e['contaminated']}" for name, e in entries.items() if "contaminated" in e]


# ---- sums over layers ----


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
            moved = floors.traffic_bytes(tokens, layer.N, layer.K, _parsed(scheme))
            judged = harness.against_floor(cold.median_us, moved, 2 * tokens * layer.weights, ceilings)
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
    return tables.text(f"Linears alone, {record['batch']} tokens", columns, rows, text_columns=2)


# ---- command ----


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
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
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
    """(how a result file begins, where it goes); no path where only the loop's check was wanted or is possible.

    A check that fails raises.
    """
    on_gpu = torch.cuda.is_available()
    found = check(options.schemes, "cuda" if on_gpu else "cpu")
    for scheme, by_name in found.items():
        differences = ", ".join(f"{what} {difference:.2g}" for what, difference in by_name.items())
        print(f"tiny model, {scheme}: logits differ from {differences}")
    if not on_gpu:
        print("There is no GPU here: nothing is timed, only the loop was checked.")
    measured = on_gpu and not options.tiny
    suite = kind if measured else f"{kind}-check"
    record = harness.header(kind, suite, harness.machine(options.commit), harness.ceilings() if measured else None)
    record["check"] = found
    path = harness.result_path(options.out or harness.RESULTS, record["machine"]["device"], record["date"], suite)
    if measured:
        return record | {"model": SIZE, "context": options.context, "batch": options.batch}, path
    if options.out is not None:
        harness.write(path, record)
    return record, None


def main(arguments: list[str] | None = None) -> int:
    """Check, then measure; the exit status is 1 if nothing was measured where something could be, or a time refused."""
    options_parser = parser(__doc__, "model")
    options_parser.add_argument("--rounds", type=_at_least(1), default=9, help="turns of each variant")
    options_parser.add_argument("--steps", type=_at_least(1), default=64, help="steps in a turn")
    options_parser.add_argument("--no-totals", action="store_true", help="leave out the sums over single layers")
    options = options_parser.parse_args(arguments)
    start = time.monotonic()
    record, path = checked(options, "model")
    if path is None:
        return 0
    ceilings, variants = Ceilings(**record["ceilings"]), variants_of(options.schemes)
    record |= {"rounds": options.rounds, "steps": options.steps, "planned": len(variants), "finished": False}

    def write() -> None:
        harness.write(path, record | {"seconds": round(time.monotonic() - start, 1)})

    record["variants"] = measure(
        SIZE, variants, options.context, options.batch, options.rounds, options.steps, ceilings
    )  # fmt: skip
    write()
    print(result_table(record), flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    if not options.no_totals:
        record["totals"] = []
        for model in TOTALS:
            with torch.no_grad():
                record["totals"] += layer_totals(model, (None, *options.schemes), options.batch, ceilings)
            write()
        print("\n" + totals_table(record))
    record["finished"] = True
    write()
    bad = refused(record)
    print("\n".join([str(path), *bad]))
    return 0 if not bad and any("step_ms" in v for v in record["variants"]) else 1


if __name__ == "__main__":
    sys.exit(main())
