"""How fast a whole model decodes: a step of a Llama-3-8B shape in a CUDA graph, with dense and with quantized weights.

    python -m benchmarks.model                                   # bfloat16, w4g128, and w4g128 with merged siblings
    python -m benchmarks.model --schemes w4g128 w8g128 --context 4096 --batch 8
    python -m benchmarks.model --schemes w8a8 w4a8 --prefill     # prompts of 1024 tokens instead of decode steps
    python -m benchmarks.model --tiny                            # only the check, on a CPU too

Weights are random; lm_head stays bfloat16. Every step reads all weights and the whole cache: these bytes over the
bandwidth of a copy, measured in the same process, are the floor, and a step that is faster than memory can be read is
refused. The floor of a prompt is that of its products (floors.py says at which rates). Variants take turns in a random
order. Then the times of single layers, each with cold weights, are added up over the layers of Llama-3-8B and 70B: what
a step spends in products of its Linears, without attention, norms and lm_head. Results go to
benchmarks/results/<gpu>/<date>-model.json, or -model-prefill.json.

Before that, and alone where there is no GPU, the loop is checked on a tiny model: the quantized one must agree with one
whose Linears hold the dequantized weights (and round their inputs, where codes meet codes), a merged one with one that
is not, and a step with a forward pass over the whole sequence without a cache.
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

import torch

from benchmarks import floors, harness, totals
from benchmarks.decode import Decoder, Phase, Prefill, Variant, build, dense_twin
from benchmarks.floors import Ceilings
from benchmarks.harness import Record
from benchmarks.products import Work
from qkernels import Scheme, tables

SIZE = "Llama-3-8B"  # what is decoded
TOTALS = ("Llama-3-8B", "Llama-3-70B")  # of these the layers' times are added up
# Logits of the tiny model are about 1; products of length 256 to 384 in float32 differ by their order of additions.
_CHECK_TOLERANCE = 1e-4
# Sequences of the check. Where inputs are rounded to codes, one that lies between two of them may become the other by
# another order of additions, and move the logits of its sequence by as much as rounding does: so of many sequences the
# one in the middle counts. What is wrong is so in all of them.
_SEQUENCES, _ROUNDED_SEQUENCES = 2, 9


# ---- the check ----


def check(schemes: Sequence[str], device: str) -> Record:
    """{scheme: largest difference of logits of the tiny model from what they must be}, in float32.

    Raises:
        RuntimeError: a difference is larger than the order of additions explains.
    """
    found: Record = {}
    for scheme in schemes:
        rounds = floors.is_int8(Scheme.parse(scheme))
        context, batch = 16, _ROUNDED_SEQUENCES if rounds else _SEQUENCES
        differ = functools.partial(_difference, middle=rounds)
        make = functools.partial(build, "tiny", device=device, dtype=torch.float32, context=context)
        quantized, merged = make(variant=Variant(scheme)), make(variant=Variant(scheme, merged=True))
        twin = dense_twin(quantized, context)
        decoder = Decoder(quantized, context, batch)
        sequence = torch.cat([decoder.prompt, decoder.token], dim=1)
        logits = decoder.step()
        with torch.no_grad():
            whole = twin(sequence, use_cache=False, logits_to_keep=1).logits[:, -1]
        found[scheme] = {
            "dense": differ(logits, Decoder(twin, context, batch).step()),
            "merged": differ(logits, Decoder(merged, context, batch).step()),
            "without cache": differ(logits, whole),
        }
        allowed = {"dense": _CHECK_TOLERANCE, "without cache": _CHECK_TOLERANCE}
        allowed["merged"] = 0.0 if device == "cpu" else _CHECK_TOLERANCE
        for what, difference in found[scheme].items():
            if not difference <= allowed[what]:  # NaN is wrong too
                raise RuntimeError(f"{scheme}: logits differ by {difference:g} from {what}; allowed {allowed[what]:g}")
    return found


def _difference(a: torch.Tensor, b: torch.Tensor, middle: bool) -> float:
    """Largest of logits (batch, vocabulary); of the sequence in the middle, or of all."""
    largest = (a - b).abs().amax(dim=1)
    return (largest.median() if middle else largest.max()).item()


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
    variant: Variant,
    seconds: Sequence[float],
    tokens: int,
    weight_bytes: int,
    cache_bytes: int,
    ceilings: Ceilings,
    work: Work | None = None,
) -> Record:
    """What is recorded of a variant, from the seconds of its steps, of so many tokens, in several rounds.

    With the floor of its work, by default to read these bytes, come `eta`, floor / time, or `contaminated`, why the
    time is refused.
    """
    step = statistics.median(seconds)
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        "step_ms": step * 1e3,
        "step_ms_lowest": min(seconds) * 1e3,
        "step_ms_highest": max(seconds) * 1e3,
        "tokens_per_s": tokens / step,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        **harness.against_floor(step * 1e6, work or Work(weight_bytes + cache_bytes, 0), ceilings),
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
    phase: type[Phase] = Decoder,
) -> list[Record]:
    """A record of each variant, in a phase on a device; one that does not fit has a `skipped` instead."""
    loops: dict[Variant, Phase] = {}
    runners: dict[str, Callable[[], object]] = {}
    skipped: list[Record] = []
    for variant in variants:
        made = _loop(size, variant, context, batch, device, phase)
        if isinstance(made, str):
            skipped.append({"name": variant.name, **dataclasses.asdict(variant), "skipped": made})
        else:
            loops[variant], runners[variant.name] = made
    seconds = take_turns(runners, rounds, steps, seconds_per_call)
    found = [
        figures(variant, seconds[variant.name], loop.tokens, loop.weight_bytes, loop.cache_bytes, ceilings, loop.work)
        for variant, loop in loops.items()
    ]
    add_speed_ups(found)
    return found + skipped


def _loop(
    size: str, variant: Variant, context: int, batch: int, device: str, phase: type[Phase]
) -> tuple[Phase, Callable[[], object]] | str:
    """What a phase repeats, with what runs a step of it; or why there is none."""
    try:
        loop = phase(build(size, variant, device, torch.bfloat16, context), context, batch)
        return loop, loop.runner()
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
    return "\n".join([tables.text(f"{setting(record)}: {record['phase']}", columns, rows), *notes])


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
    parser.add_argument("--prefill", action="store_true", help="prompts of so many tokens in one pass, not steps")
    parser.add_argument("--tiny", action="store_true", help="only check the loop, on a tiny model")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the result files; benchmarks/results")
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
    return parser


def _scheme(text: str) -> str:
    parsed = Scheme.parse(text)
    if parsed.activations is not None and parsed.activations.static:
        raise argparse.ArgumentTypeError(f"{text} has static activations, which need calibration")
    return str(parsed)


def phase_of(options: argparse.Namespace) -> type[Phase]:
    """What is repeated: steps, or prompts."""
    return Prefill if options.prefill else Decoder


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
    kind = f"{kind}-prefill" if options.prefill else kind
    suite = kind if measured else f"{kind}-check"
    record = harness.header(kind, suite, harness.machine(options.commit), harness.ceilings() if measured else None)
    record["check"] = found
    path = harness.result_path(options.out or harness.RESULTS, record["machine"]["device"], record["date"], suite)
    if measured:
        setting = {"model": SIZE, "context": options.context, "batch": options.batch}
        return record | setting | {"phase": phase_of(options).phase}, path
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
        SIZE, variants, options.context, options.batch, options.rounds, options.steps, ceilings, phase=phase_of(options)
    )  # fmt: skip
    write()
    print(result_table(record), flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    if not options.no_totals:
        tokens = options.batch * (options.context if options.prefill else 1)
        record |= {"totals": [], "tokens": tokens}
        for model in TOTALS:
            with torch.no_grad():
                record["totals"] += totals.layer_totals(model, (None, *options.schemes), tokens, ceilings)
            write()
        print("\n" + totals.totals_table(record))
    record["finished"] = True
    write()
    bad = refused(record)
    print("\n".join([str(path), *bad]))
    return 0 if not bad and any("step_ms" in v for v in record["variants"]) else 1


if __name__ == "__main__":
    sys.exit(main())
