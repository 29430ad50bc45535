"""An experiment, outside the package: is a matmul of many tokens worth writing by hand for Hopper, in Gluon?

    python -m benchmarks.gluon_matmul                    # sm_90: prove, then time; elsewhere: compile and count
    python -m benchmarks.gluon_matmul --prove cross-128x256

    y[m, n] = sum_k x[m, k] * bf16((code[n, k] - zero[k // 128, n]) * scale[k // 128, n])

x (M, K) bfloat16; packed (N, K / 8), scale and zero (K / 128, N) of scheme w4g128-bf16; K a multiple of 128, N of 16;
M at least 1; sm_90 only. Weights are rounded to bfloat16 as dequantize does, sums are float32, y is rounded once.

The package multiplies many tokens by weights that it has dequantized, with cuBLAS: its own fused kernel comes through
Triton's pipeline, which waits for each wgmma (Hopper's asynchronous tensor-core instruction) before the weights of the
next are unpacked. This kernel (benchmarks/gluon_kernel.py) says itself who does what: a warp copies by TMA, two groups
of four unpack in registers and multiply from there, one wgmma behind. Variants are named after the output features and
tokens of a program: `cross` keeps a wgmma in flight from each step of 128 k to the next, `drain` ends it with the step.

It is not in the package because Gluon does not run in Triton's interpreter, where the package proves its kernels
without a GPU. It has been compiled, with Triton 3.6 and 3.7, and has never run. From the machine code is known that
`cross` waits only for the wgmma before the last, that nothing spills, and that each release of a buffer is behind a
barrier of the warps that have read it; without a GPU the command compiles and prints the figures. Not known is whether
results are right, barriers never wait forever, or any of it is faster.

On a GPU each variant first has to give the exact bits of products without rounding, in a process of its own with a
time limit, as a barrier that waits for the wrong phase waits forever. What hangs or is wrong is reported and not timed.
Times are cold, next to cuBLAS with bfloat16 weights, dequantizing with cuBLAS after it, and the package's fused kernel.
It belongs into the package if it beats dequantizing with cuBLAS. Results go to
benchmarks/results/<gpu>/<date>-gluon.json. The exit status is 1 if a variant hangs or is wrong, or nothing was timed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import floors, harness, static_cost
from benchmarks.compile_only import SHARED_MEMORY_BYTES, Launch, compile_only, touched_in_flight
from qkernels import ops, tables, tune
from qkernels.checks import check_activation, check_weight
from qkernels.scheme import Scheme
from qkernels.tune import Operands
from qkernels.tuning import choose, timing
from qkernels.tuning.candidates import Config, Problem
from qkernels.tuning.configs import MatmulConfig

SCHEME = str(Scheme.parse("w4g128-bf16"))
CAPABILITY = 90
FUSED = MatmulConfig(128, 128, blocks=1, splits=1, num_warps=4, num_stages=3, max_registers=255, scale_weights=True)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Of gluon_kernel.

    Attributes:
        rows: output features of each of the two consumers of a program: 64 or 128.
        block_m: tokens of a program.
        stages: steps of 128 k that are in shared memory at a time.
        across: a wgmma stays in flight from step to step.
    """

    rows: int
    block_m: int
    stages: int
    across: bool


VARIANTS = {
    "cross-128x256": Variant(rows=64, block_m=256, stages=3, across=True),
    "cross-256x128": Variant(rows=128, block_m=128, stages=4, across=True),
    "drain-128x256": Variant(rows=64, block_m=256, stages=3, across=False),
}


def multiply(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, variant: Variant) -> Tensor:
    """y (M, N) as the module says.

    Raises:
        ValueError, TypeError: an argument is not as the module asks for; or the GPU is not of sm_90.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"x must be 2-D (M, K) with at least one token, got shape {tuple(x.shape)}")
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"x must be bfloat16, got {x.dtype}")
    (_, K), N = x.shape, packed.shape[0] if packed.ndim else 0
    if K == 0 or K % 128:
        raise ValueError(f"K must be a multiple of 128, got {K}")
    if N == 0 or N % 16:
        raise ValueError(f"N must be a multiple of 16, got {N}")
    check_weight(packed, scale, zero, SCHEME, K)
    check_activation(x, packed, None, K)
    if scale.dtype is not torch.bfloat16:
        raise TypeError(f"scale must be bfloat16, got {scale.dtype}")
    for name, tensor in (("x", x), ("packed", packed), ("scale", scale), ("zero", zero)):
        if not tensor.is_contiguous() or (not tensor.is_meta and tensor.data_ptr() % 16):
            raise ValueError(f"{name} must be contiguous and start at a multiple of 16 bytes, as TMA reads it")
    if not x.is_meta and not (x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)):
        raise ValueError(f"x must be on a GPU of sm_90, got {x.device}")
    from benchmarks import gluon_kernel

    y: Tensor = gluon_kernel.matmul(
        x, packed, scale, zero, variant.rows, variant.block_m, variant.stages, variant.across
    )
    return y


def product(operands: Operands, variant: Variant) -> Tensor:
    """Of the operands that tuning makes."""
    assert operands.zero is not None, "the scheme is affine"
    return multiply(operands.x, operands.packed, operands.scale, operands.zero, variant)


# ---- without a GPU: compile and count ----


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the machine code tells; of main loops where there are several, each in a list."""

    registers: int  # per thread, at the launch: consumers get more, and the producer fewer
    loop_registers: int  # the highest that a main loop names
    stack_bytes: int
    shared_bytes: int
    instructions_per_weight: float  # of the longest main loop
    hgmma: list[int]
    waits: list[collections.Counter[int]]  # for wgmmas, by how many may stay in flight
    touched: list[int]  # instructions that touch registers of a wgmma that may be in flight
    unguarded_releases: int  # of all main loops


def compiled(name: str) -> Figures:
    """Compile a variant, or "fused", for sm_90; not in a process where Triton interprets."""
    problem = Problem(4096, 4096, 4096, SCHEME, "bfloat16")
    x = torch.empty(problem.tokens, problem.in_features, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(problem.out_features, problem.in_features // 8, dtype=torch.int32, device="meta")
    scale = torch.empty(problem.in_features // 128, problem.out_features, dtype=torch.bfloat16, device="meta")
    operands = Operands(x, packed, scale, torch.empty_like(scale, dtype=torch.uint8))
    with compile_only(CAPABILITY) as launches:
        if name == "fused":
            tune.product(operands, problem, FUSED)
        else:
            product(operands, VARIANTS[name])
    # 128 threads unpack a step of 128 k of so many output features.
    return _figures(launches[0], FUSED.block_n if name == "fused" else VARIANTS[name].rows)


def _figures(launch: Launch, rows: int) -> Figures:
    sass = launch.sass
    names = [int(n) for loop in sass.loops for text in loop for n in re.findall(r"\bR(\d+)", text)]
    return Figures(
        registers=sass.registers,
        loop_registers=max(names, default=-1) + 1,
        stack_bytes=sass.stack_bytes,
        shared_bytes=launch.shared_bytes,
        instructions_per_weight=sass.loop_instructions / rows,
        hgmma=[sum("HGMMA" in text for text in loop) for loop in sass.loops],
        waits=[
            collections.Counter(int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", "\n".join(loop)))
            for loop in sass.loops
        ],
        touched=[len(touched_in_flight(loop)) for loop in sass.loops],
        unguarded_releases=sum(map(unguarded_releases, sass.loops)),
    )


def unguarded_releases(loop: Sequence[str]) -> int:
    """Arrivals at a barrier in shared memory that may overtake another warp's reads.

    One thread arrives for all four warps: between their last load or wait for a wgmma and it they have to meet.
    """
    count, met = 0, False
    for text in loop:
        if re.search(r"\bBAR\.SYNC", text):
            met = True
        elif re.search(r"\bLDSM?\b|WARPGROUP\.DEPBAR", text):
            met = False
        elif "SYNCS.ARRIVE" in text:
            count += not met
    return count


def static_table(found: Mapping[str, Figures]) -> str:
    """Figures, a row for each kernel."""
    rows = [
        (
            name, f"{f.registers}, {f.loop_registers}", str(f.stack_bytes), str(f.shared_bytes),
            f"{f.instructions_per_weight:.2f}", *(" and ".join(map(str, each)) for each in (
                f.hgmma, [w[0] for w in f.waits], [w[1] for w in f.waits], f.touched,
            )),
        )
        for name, f in found.items()
    ]  # fmt: skip
    title = (
        f"{SCHEME} x bfloat16, compiled for sm_{CAPABILITY}, which gives a program "
        f"{SHARED_MEMORY_BYTES[CAPABILITY]} bytes of shared memory; of main loops, one for each consumer:"
    )
    columns = (
        "kernel", "registers at launch, in loop", "stack B", "shared B", "instr/weight", "HGMMA", "waits for all",
        "waits for all but 1", "touched in flight",
    )  # fmt: skip
    return tables.text(title, columns, rows)


# ---- proof ----

TOKENS = (2048, 512, 8192, 256)  # most telling first: the run may be cut short
WEIGHTS = ((4096, 4096), (4096, 14336), (28672, 4096))  # (N, K)
# (M, N, K): whole tiles and edges; then one step, which is peeled off the loop, and fewer steps than stages.
PROOFS = (
    *((M, N, 4096) for M in (256, 300, 4096) for N in (4096, 4112)),
    (256, 4096, 128),
    (300, 4112, 256),
)
REPEATS = 20


def prove(variant: Variant) -> str | None:
    """What is wrong with a variant, or None: all bits of exact products, many times over, on the current GPU."""
    for M, N, K in PROOFS:
        problem = Problem(M, N, K, SCHEME, "bfloat16")
        operands = tune.exact_operands(problem, harness.DEVICE)
        wanted = tune.truth(operands, problem)
        for repeat in range(REPEATS):
            wrong = int((product(operands, variant) != wanted).sum())
            if wrong:
                return f"M {M}, N {N}, K {K}, run {repeat}: {wrong} of {wanted.numel()} results are wrong"
    return None


def proved(command: Sequence[str], seconds: float) -> str:
    """ "exact", or what a proof in a process of its own came to: its last line, or that it hangs."""
    process = subprocess.Popen(
        command, cwd=harness.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            return f"hangs: no answer in {seconds:.0f} s, and its process does not end"
        return f"hangs: no answer in {seconds:.0f} s"
    if process.returncode == 0:
        return "exact"
    return (printed.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:500]


# ---- time ----


def measure(problem: Problem, variants: Sequence[str], ceilings: floors.Ceilings, replays: int) -> harness.Record:
    """Cold times of one product; a candidate that fails has an entry that says so, and no time."""
    M, N, K = problem.tokens, problem.out_features, problem.in_features
    moved = {name: floors.traffic_bytes(M, N, K, problem.parsed) for name in (*variants, "fused", "dequantize")}
    moved["cublas"] = floors.traffic_bytes(M, N, K, None)
    count = timing.weight_sets(min(moved.values()), timing.l2_bytes())
    sets = [tune.timed_operands(problem, harness.DEVICE, seed) for seed in range(count)]
    calls: dict[str, list[timing.Call]] = {
        name: [functools.partial(product, each, VARIANTS[name]) for each in sets] for name in variants
    }
    configs: dict[str, Config] = {"fused": FUSED, "dequantize": choose.dense(N, K, torch.bfloat16)}
    for name, config in configs.items():
        calls[name] = [functools.partial(tune.product, each, problem, config) for each in sets]
    dense = [ops.dequantize(s.packed, s.scale, s.zero, SCHEME, K, torch.bfloat16) for s in sets]
    calls["cublas"] = [
        functools.partial(torch.nn.functional.linear, each.x, w) for each, w in zip(sets, dense, strict=True)
    ]
    entries: dict[str, harness.Record] = {}
    for name in list(calls):
        if (reason := _failure(calls[name])) is not None:
            entries[name] = {"failed": reason}
            del calls[name]
    for name, found in timing.cold(calls, replays).items():
        floor_us, limit_us = (
            floors.bound_us(moved[name], 2 * M * N * K, bound) for bound in (ceilings, ceilings.fastest)
        )
        entries[name] = {"cold": dataclasses.asdict(found), "floor_us": floor_us}
        entries[name] |= harness.judge(found.median_us, floor_us, limit_us)
    return {**dataclasses.asdict(problem), "candidates": entries}


def _failure(calls: Sequence[timing.Call]) -> str | None:
    """Why calls cannot be timed, found out alone; None if they can."""
    try:
        timing.warm_up(calls)
        timing.capture(calls)
    except Exception as error:
        torch.cuda.synchronize()  # raises if the device itself has failed: then nothing more can be measured
        return f"{type(error).__name__}: {error}"[:500]
    return None


def result_table(record: harness.Record) -> str:
    """Microseconds of a result file; for each problem also the fastest variant beside dequantizing with cuBLAS."""
    names = [*VARIANTS, "fused", "dequantize", "cublas"]
    rows = []
    for found in record["problems"]:
        entries = found["candidates"]
        honest = {name: entry["cold"]["median_us"] for name, entry in entries.items() if "eta" in entry}
        cells = [
            f"{honest[name]:.1f}" if name in honest
            else "refused" if "contaminated" in entries.get(name, {})
            else "failed" if name in entries else "not proved"
            for name in names
        ]  # fmt: skip
        best = min((us for name, us in honest.items() if name in VARIANTS), default=None)
        gain = f"{honest['dequantize'] / best:.2f}x" if best and "dequantize" in honest else ""
        rows.append((*(str(found[size]) for size in ("tokens", "out_features", "in_features")), *cells, gain))
    title = f"{record['machine']['device']}, {record['date']}: cold microseconds of {SCHEME} x bfloat16"
    return tables.text(title, ("M", "N", "K", *names, "best over dequantize"), rows, text_columns=0)


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    """Prove and time on sm_90, compile elsewhere; the exit status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gluon_matmul",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prove", choices=VARIANTS, metavar="VARIANT", help=f"only that; of {', '.join(VARIANTS)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no more products after so many seconds")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a proof counts as hanging")
    parser.add_argument("--replays", type=int, default=20, help="timed replays of each graph")
    parser.add_argument("--out", type=pathlib.Path, default=harness.RESULTS, help="folder of the result files")
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (CAPABILITY // 10, CAPABILITY % 10)
    if options.prove:
        if not hopper:
            parser.error("--prove needs a GPU of sm_90")
        signal.alarm(int(options.limit) + 30)  # ends a hang even where whoever started this is gone
        reason = prove(VARIANTS[options.prove])
        print(reason or "exact")
        return 1 if reason else 0
    if not hopper:
        print("There is no GPU of sm_90 here, so nothing is proved or timed. What follows is known without one.\n")
        names = [*VARIANTS, "fused"]
        with static_cost.compiler(2) as pool:
            print(static_table(dict(zip(names, pool.map(compiled, names), strict=True))))
        return 0

    module = (sys.executable, "-m", "benchmarks.gluon_matmul", "--limit", str(options.limit), "--prove")
    with concurrent.futures.ThreadPoolExecutor(len(VARIANTS)) as pool:  # most of it is compiling
        found = pool.map(lambda name: proved((*module, name), options.limit), VARIANTS)
        proofs = dict(zip(VARIANTS, found, strict=True))
    for name, outcome in proofs.items():
        print(f"{name}: {outcome}", flush=True)
    right = [name for name, outcome in proofs.items() if outcome == "exact"]
    machine, ceilings = harness.machine(options.commit), harness.ceilings()
    record: harness.Record = {
        "kind": "gluon",
        "suite": "gluon",
        "date": harness.today(),
        "machine": machine,
        "ceilings": dataclasses.asdict(ceilings),
        "proofs": proofs,
    }
    problems = [Problem(M, N, K, SCHEME, "bfloat16") for M in TOKENS for N, K in WEIGHTS]
    record = harness.run(
        harness.result_path(options.out, machine["device"], harness.today(), "gluon"),
        record,
        problems,
        options.seconds - (time.monotonic() - start),
        functools.partial(measure, variants=right, ceilings=ceilings, replays=options.replays),
    )
    print(result_table(record))
    return 0 if len(right) == len(VARIANTS) and record["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
