"""How fast the fused product is, next to cuBLAS and to what others offer, and how far from the machine's limits.

    python -m benchmarks.matmul --suite quick                 # two minutes on an H200
    python -m benchmarks.matmul --suite full --seconds 1500   # all weight-only schemes, the most telling first
    python -m benchmarks.matmul --suite w8a8                  # activations of 8 bits, too, with 8-bit weights; or w4a8
    python -m benchmarks.matmul --models Llama-3-8B --schemes w4g64 w2g64 --tokens 1 16 --providers cublas qkernels

Three times of each product, in microseconds: cold (no weight in L2: a CUDA graph over many), warm (one weight, over and
over), eager (from Python, with launches). eta is floor / cold (floors.py), and the speed-up is over cuBLAS with a
bfloat16 weight, cold. Quantizing activations to 8 bits is part of the product; parts of it are timed apart, too, and
the table at the end says which targets of targets.py were met. Results go to
benchmarks/results/<gpu>/<date>-<suite>.json. Without a GPU nothing is timed: the floors of the suite and the static
cost of its kernels are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import torch

from benchmarks import floors, harness, targets
from benchmarks.products import Problem
from benchmarks.providers import PROVIDERS, WEIGHT_PROVIDERS
from qkernels import tables
from qkernels.cli import positive_int
from qkernels.scheme import Scheme
from qkernels.tuning import problems

FIRST_TOKENS = (1, 16, 128, 2048)  # one of each regime
INT8_TOKENS = (1, 16, 64, 1024, 4096)
QUICK_PROVIDERS = ("cublas", "qkernels", "qkernels-dequantize", "tinygemm", "int_mm")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a suite runs unless told otherwise."""

    models: tuple[str, ...]
    schemes: tuple[str, ...]
    tokens: tuple[int, ...]
    providers: tuple[str, ...]
    seconds: float
    first: tuple[int, ...] = FIRST_TOKENS  # tokens that are measured before others
    kind: str = "matmul"  # of its result files


_PARTS = ("cublas", "qkernels", "qkernels-codes", "qkernels-quantize", "qkernels-a16", "int_mm")
_PEERS = (
    "int_mm-dynamic", "int_mm-compiled", "torchao-int8", "torchao-compiled", "gemlite-int8", "llm.int8", "llm.int8-6",
)  # fmt: skip
SUITES = {
    "quick": Suite(("Llama-3-8B",), ("w4g128", "w8cs"), FIRST_TOKENS, QUICK_PROVIDERS, 110.0),
    "full": Suite(
        tuple(problems.MODELS),
        ("w4g128", "w8cs", "w2g64", "w4g64", "w3g128", "w4g32f", "w8g128", "w4g128s"),
        problems.TOKENS,
        (*WEIGHT_PROVIDERS, "int_mm"),
        3600.0,
    ),
    # No peer multiplies int8 by groups of 4 bits: there the parts, and what x costs that is not quantized, tell.
    "w8a8": Suite(
        ("Llama-3-8B", "Llama-3-70B"),
        ("w8a8",),
        problems.TOKENS,
        (*_PARTS, *_PEERS),
        1200.0,
        INT8_TOKENS,
        "matmul-w8a8",
    ),
    "w4a8": Suite(
        ("Llama-3-8B", "Llama-3-70B"),
        ("w4a8", "w4g128-a8"),
        problems.TOKENS,
        _PARTS,
        900.0,
        INT8_TOKENS,
        "matmul-w4a8",
    ),
}
# GPU -> compute capability that its kernels are compiled for
CAPABILITIES = {"H200": 90, "H100": 90, "B200": 100, "A100": 80, "L4": 89, "RTX 4090": 89}


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; the exit status is 1 if a provider gave a wrong product, failed, or was contaminated."""
    options = _parser().parse_args(arguments)
    suite = SUITES[options.suite]
    chosen = Suite(
        tuple(options.models or suite.models),
        tuple(str(Scheme.parse(scheme)) for scheme in options.schemes or suite.schemes),
        tuple(options.tokens or suite.tokens),
        tuple(options.providers or suite.providers),
        options.seconds or suite.seconds,
        suite.first,
        suite.kind,
    )
    planned = harness.most_informative_first(chosen.models, chosen.schemes, chosen.tokens, chosen.first)
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing is timed. What follows is known without one.\n")
        print(floor_tables(chosen, options.gpu))
        if not options.no_compile:
            print("\n" + static_table(chosen, options.gpu))
        return 0
    return _on_gpu(options, chosen, planned)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matmul", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--models", nargs="+", choices=problems.MODELS)
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME")
    parser.add_argument("--tokens", nargs="+", type=positive_int, metavar="M")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--seconds", type=float, help="stop before this many seconds have passed")
    parser.add_argument("--replays", type=positive_int, default=30, help="timed replays, cold; a third warm and eager")
    parser.add_argument("--out", type=pathlib.Path, default=harness.RESULTS, help="folder of the result files")
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
    parser.add_argument("--gpu", choices=floors.GPUS, default="H200", help="without a GPU: whose figures to print")
    parser.add_argument("--no-compile", action="store_true", help="without a GPU: floors alone, no static cost")
    return parser


# ---- with a GPU ----


def _on_gpu(options: argparse.Namespace, chosen: Suite, planned: Sequence[Problem]) -> int:
    machine, ceilings = harness.machine(options.commit), harness.ceilings()
    print(
        f"{machine['device']}: {ceilings.copy / 1e12:.2f} TB/s copied, {ceilings.read / 1e12:.2f} TB/s read, "
        f"{ceilings.matmul / 1e12:.0f} TFLOP/s bfloat16{_int8(ceilings)}",
        flush=True,
    )
    sets, providers = harness.WeightSets(), [PROVIDERS[name] for name in chosen.providers]
    path = harness.result_path(options.out, machine["device"], harness.today(), options.suite)
    record = harness.header(chosen.kind, options.suite, machine, ceilings)
    record["providers"] = {provider.name: provider.what for provider in providers}

    def measure(problem: Problem) -> harness.Record:
        with torch.no_grad():
            found = harness.measure(problem, providers, ceilings, sets, options.replays)
        print(line(found), flush=True)
        return found

    record = harness.run(path, record, planned, chosen.seconds, measure)
    print(f"\n{len(record['problems'])} of {len(planned)} problems in {record['seconds']:.0f} s")
    if record["problems"]:
        print(f"{path}\n\n{result_tables(record)}\n\n{targets.table(record)}".rstrip())
    bad = [
        f"M={entry['M']} N={entry['N']} K={entry['K']} {entry['scheme']} {name}: {kind}: {found[kind]}"
        for entry in record["problems"]
        for name, found in entry["providers"].items()
        for kind in ("wrong", "failed", "contaminated")
        if kind in found
    ]
    print("\n".join(bad))
    return 1 if bad or not record["problems"] else 0


def _int8(ceilings: floors.Ceilings) -> str:
    """What is said of the rate of int8."""
    return f", {ceilings.int8 / 1e12:.0f} TOP/s int8 by its datasheet" if ceilings.int8 else ""


def line(found: harness.Record) -> str:
    """One measured problem in one line."""
    parts = []
    for name, entry in found["providers"].items():
        if "cold" in entry:
            mark = "!" if "contaminated" in entry else ""
            parts.append(f"{name} {entry['cold']['median_us']:.1f}{mark}")
        elif "eager" in entry:
            parts.append(f"{name} {entry['eager']['median_us']:.1f} eager")
        elif "skipped" not in entry:
            parts.append(f"{name} {'WRONG' if 'wrong' in entry else 'FAILED'}")
    return f"{found['model']} {found['layer']} {found['scheme']} M={found['M']}: " + ", ".join(parts) + " us"


def result_tables(record: harness.Record) -> str:
    """A table for each model and scheme of a result file."""
    columns = ("layer", "provider", "M", "cold us", "+-", "warm us", "eager us", "floor us", "eta", "speed-up")
    by_title: dict[str, list[tuple[str, ...]]] = {}
    for found in record["problems"]:
        rows = by_title.setdefault(f"{found['model']}, {found['scheme']}", [])
        for name, entry in found["providers"].items():
            if "eager" in entry:
                rows.append((found["layer"], name, str(found["M"]), *_figures(entry)))
    texts = [tables.text(title, columns, rows, text_columns=2) for title, rows in by_title.items() if rows]
    skipped = {
        (name, entry["skipped"])
        for found in record["problems"]
        for name, entry in found["providers"].items()
        if "skipped" in entry
    }
    return "\n\n".join([*texts, "\n".join(f"skipped: {name}: {reason}" for name, reason in sorted(skipped))])


def _figures(entry: harness.Record) -> tuple[str, ...]:
    """Of one provider; blank where a graph cannot hold it."""
    eager = f"{entry['eager']['median_us']:.1f}"
    if "cold" not in entry:
        return "", "", "", eager, "", "", ""
    cold = entry["cold"]
    return (
        f"{cold['median_us']:.1f}", f"{(cold['high_us'] - cold['low_us']) / 2:.1f}",
        f"{entry['warm']['median_us']:.1f}", eager, f"{entry['floor_us']:.1f}",
        "refused" if "contaminated" in entry else f"{entry['eta']:.0%}",
        f"{entry['speed_up']:.2f}" if "speed_up" in entry else "",
    )  # fmt: skip


# ---- without ----


def floor_tables(chosen: Suite, gpu: str) -> str:
    """A table of floors for each model: microseconds per layer, for the schemes and bfloat16."""
    ceilings = floors.GPUS[gpu]
    header = (
        f"Floors in microseconds: {ceilings.device}, {ceilings.copy / 1e12:.2f} TB/s and "
        f"{ceilings.matmul / 1e12:.0f} TFLOP/s bfloat16 ({ceilings.source})"
        f"{_int8(ceilings) if any(Scheme.parse(scheme).activations for scheme in chosen.schemes) else ''}"
    )
    columns = ("layer", "N", "K", "M", *chosen.schemes, "bfloat16")
    parts = [header]
    for model in chosen.models:
        rows = floor_rows(model, chosen.schemes, chosen.tokens, ceilings)
        parts.append(tables.text(model, columns, rows))
    return "\n\n".join(parts)


def floor_rows(
    model: str, schemes: Sequence[str], tokens: Sequence[int], ceilings: floors.Ceilings
) -> list[tuple[str, ...]]:
    """(layer, N, K, M, floor of each scheme, of bfloat16), and for M = 1 the sum over a model's layers."""
    kinds: list[Scheme | None] = [*(Scheme.parse(scheme) for scheme in schemes), None]
    layers = problems.MODELS[model]
    rows = []
    for M in tokens:
        found = [[floors.floor_us(M, layer.N, layer.K, kind, ceilings) for kind in kinds] for layer in layers]
        rows += [
            (layer.name, str(layer.N), str(layer.K), str(M), *(f"{value:.1f}" for value in values))
            for layer, values in zip(layers, found, strict=True)
        ]
        if M == 1 and model != "squares":
            totals = (
                sum(layer.count * value for layer, value in zip(layers, column, strict=True))
                for column in zip(*found, strict=True)
            )
            rows.append(("all of a token's", "", "", "1", *(f"{total:.0f}" for total in totals)))
    return rows


def static_table(chosen: Suite, gpu: str) -> str:
    """Registers, shared memory and instructions per weight of the suite's kernels, compiled for a GPU."""
    from benchmarks import static_cost

    tokens = [M for M in chosen.tokens if M in (1, 64)] or [chosen.tokens[0]]
    wanted = [
        static_cost.Problem("matmul", scheme, CAPABILITIES[gpu], "bfloat16", M)
        for scheme in chosen.schemes
        for M in tokens
    ]
    with static_cost.compiler(min(2, len(wanted))) as pool:
        found = list(pool.map(static_cost.cost, wanted))
    rows = [
        (problem.scheme, str(problem.tokens), str(cost.registers), f"{cost.shared_bytes / 1024:.1f} KiB",
         f"{cost.instructions_per_weight:.2f}")
        for problem, cost in zip(wanted, found, strict=True)
    ]  # fmt: skip
    columns = ("scheme", "M", "registers", "shared", "instr/weight")
    return tables.text(f"Machine code for sm_{CAPABILITIES[gpu]}, bfloat16", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
