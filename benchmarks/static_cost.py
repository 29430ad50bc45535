"""What kernels cost by their machine code alone, for any GPU, on a machine that has none.

    python -m benchmarks.static_cost                      # the usual schemes on every supported GPU
    python -m benchmarks.static_cost --targets 90 --schemes w4g128 w3g64f --dtypes float16 --tokens 1 64
    python -m benchmarks.static_cost --all --targets 80   # every width, value map and kind of group there

The exit status is 1 if a kernel spills more than `spill_budget` allows.

What is compiled is what a launch of the ops would compile, with the configuration that choose.py gives it.
Instructions per weight are those of one thread, summed over threads: of the main loop for matmul, of the whole program
for quantize and dequantize, and for `activations`, where they are those of each activation; operations on shared memory
are those among them that load, store or copy there.

The bound is what alone would take longest on a GPU of that capability: moving the bytes, issuing the instructions (one
for each of 4 warps in a cycle) or, of matmul, the tensor cores. `of memory` is the share of its bandwidth that this
leaves: below 100 % a kernel cannot reach the memory floor however well it is scheduled; at 100 % it still may not.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from benchmarks.compile_only import SHARED_MEMORY_BYTES, compile_only, resident_programs, touched_in_flight
from benchmarks.floors import weight_bytes
from qkernels import dispatch_int8, packing
from qkernels.scheme import Scheme
from qkernels.tuning import choose
from qkernels.tuning.configs import MatmulConfig
from qkernels.tuning.devices import Device

TARGETS = tuple(SHARED_MEMORY_BYTES)
# Of 16-bit floats, then of int8: Ampere to consumer Blackwell, Hopper, Blackwell.
MMA_OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA")
# Operations on shared memory: loads, stores, and copies from global memory into it.
SHARED_OPCODES = ("LDS", "LDSM", "STS", "STSM", "LDGSTS")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What bounds are reckoned with.

    Attributes:
        multiprocessors: how many.
        clock: boost, Hz.
        bandwidth: bytes/s.
        mma_flops: of 16-bit tensor-core products with float32 sums, for each multiprocessor and cycle, by the
            instructions that kernels of few tokens use (mma.sync); None where unknown.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    mma_flops: int | None


# Datasheets, except H200: a copy as measured, and mma.sync at 62 % of wgmma (Luo et al., arXiv 2402.13499).
GPUS = {
    80: Gpu("A100 80GB", 108, 1.41e9, 2.04e12, 2048),
    86: Gpu("RTX 3090", 82, 1.70e9, 0.94e12, 512),
    89: Gpu("RTX 4090", 128, 2.52e9, 1.01e12, 512),
    90: Gpu("H200", 132, 1.98e9, 4.3e12, 2540),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, None),
    120: Gpu("RTX 5090", 170, 2.41e9, 1.79e12, 512),
}
DTYPES = ("float16", "bfloat16", "float32")
KERNELS = ("matmul", "quantize", "dequantize", "activations")
OUT_FEATURES = 4096  # N, of every problem
Kernel = Literal["matmul", "quantize", "dequantize", "activations"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch on one GPU.

    Attributes:
        kernel: which; "matmul" of a scheme with quantized activations is that of their codes, and "activations" what
            gives these.
        scheme: as a string.
        capability: of the GPU, such as 90.
        dtype: of x, or of the weights: "float16", "bfloat16" or "float32".
        tokens: M, of matmul.
        in_features: K; the default is a whole number of blocks and groups.
        config: of matmul, instead of the one that it would get.
    """

    kernel: Kernel
    scheme: str
    capability: int
    dtype: str
    tokens: int = 1
    in_features: int = 4096
    config: MatmulConfig | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the machine code of a problem tells."""

    registers: int  # per thread
    stack_bytes: int  # per thread: spills
    shared_bytes: int  # per program
    num_warps: int  # of a program
    programs: int  # on a multiprocessor at a time
    instructions_per_weight: float
    weights_per_thread: float  # of what is counted
    shared_operations_per_weight: float
    seconds: dict[str, float]  # for a weight of the whole problem: of "memory", "issue" and, of matmul, "MMA"
    opcodes: collections.Counter[str]  # of the whole kernel, by stem
    accesses: collections.Counter[str]  # to global memory in the whole kernel, with their width: "LDG.E.128", ...
    touched_in_flight: int  # instructions of main loops that touch registers of a wgmma that may be in flight
    ptx: str = dataclasses.field(repr=False)

    @property
    def mma(self) -> int:
        """Tensor-core instructions in the code."""
        return sum(self.opcodes[name] for name in MMA_OPCODES)

    @property
    def bound(self) -> str:
        """What takes longest: "memory", "issue" or "MMA"."""
        return max(self.seconds, key=lambda what: self.seconds[what])

    @property
    def memory_share(self) -> float:
        """Of the memory's bandwidth that the longest leaves to be used: at most 1."""
        return self.seconds["memory"] / self.seconds[self.bound]


def cost(problem: Problem) -> Cost:
    """Compile a problem; not in a process where Triton interprets.

    Raises:
        RuntimeError: the kernel does not compile for the target, or wants more shared memory than it has.
    """
    scheme = Scheme.parse(problem.scheme)
    try:
        with compile_only(problem.capability) as launches:
            threads_per_weight, block_m = _launch(problem, scheme)
    except Exception as error:
        raise RuntimeError(f"{problem} does not compile: {type(error).__name__}: {error}") from error
    launch = launches[0]  # the others add up partial sums
    sass = launch.sass
    loop = problem.kernel == "matmul"
    opcodes = sass.loop_opcodes if loop else sass.opcodes
    per_weight = (sass.loop_instructions if loop else sass.instructions) * threads_per_weight
    return Cost(
        registers=sass.registers,
        stack_bytes=sass.stack_bytes,
        shared_bytes=launch.shared_bytes,
        num_warps=launch.num_warps,
        programs=resident_programs(problem.capability, sass.registers, launch.shared_bytes, launch.num_warps),
        instructions_per_weight=per_weight,
        weights_per_thread=1 / threads_per_weight,
        shared_operations_per_weight=sum(opcodes[name] for name in SHARED_OPCODES) * threads_per_weight,
        seconds=_seconds(problem, scheme, per_weight, block_m),
        opcodes=sass.opcodes,
        accesses=sass.accesses,
        touched_in_flight=sum(len(touched_in_flight(loop)) for loop in sass.loops),
        ptx=launch.ptx,
    )


def _seconds(problem: Problem, scheme: Scheme, instructions_per_weight: float, block_m: int) -> dict[str, float]:
    """Each bound, divided by the number of weights; every block of tokens unpacks the weights anew.

    Of "activations" it is divided by their number; codes are multiplied at twice the rate of 16-bit floats.
    """
    gpu, N, K = GPUS[problem.capability], OUT_FEATURES, problem.in_features
    dense = getattr(torch, problem.dtype).itemsize
    issue = instructions_per_weight / (gpu.multiprocessors * 128 * gpu.clock)
    if problem.kernel == "activations":
        return {"memory": (dense + 1) / gpu.bandwidth, "issue": issue}
    moved = 0.0 if problem.kernel == "matmul" else dense
    moved += weight_bytes(N, K, scheme) / (N * K)
    m_blocks = -(-problem.tokens // block_m)
    if problem.kernel == "matmul":
        moved += problem.tokens * (N * dense + K * (dense if scheme.activations is None else 1)) / (N * K)
    found = {"memory": moved / gpu.bandwidth, "issue": m_blocks * issue}
    if problem.kernel == "matmul" and gpu.mma_flops and (dense == 2 or scheme.activations is not None):
        rate = gpu.mma_flops * (1 if scheme.activations is None else 2)
        found["MMA"] = 2 * m_blocks * block_m / (gpu.multiprocessors * rate * gpu.clock)
    return found


def _launch(problem: Problem, scheme: Scheme) -> tuple[float, int]:
    """Launch on meta tensors; (threads per weight of what is counted, tokens of a tile)."""
    from qkernels.kernels import dequantize, matmul, quantize

    N, K = OUT_FEATURES, problem.in_features
    dtype: torch.dtype = getattr(torch, problem.dtype)
    w = torch.empty(N, K, dtype=dtype, device="meta")
    if problem.kernel == "quantize":
        quantize_config = choose.quantize(scheme, K)
        if choose.group_fits_tile(scheme, K):
            quantize.quantize(w, scheme, quantize_config)
        else:
            quantize.encode(w, *_scale_and_zero(scheme, N, K), scheme, quantize_config)
        return quantize_config.num_warps * 32 / (quantize_config.block_n * quantize_config.tile), 1
    packed = torch.empty(N, packing.packed_words(scheme.bits, K), dtype=torch.int32, device="meta")
    scale, zero = _scale_and_zero(scheme, N, K)
    if problem.kernel == "dequantize":
        config = choose.dequantize(dtype)
        dequantize.dequantize(packed, scale, zero, scheme, K, dtype, config)
        return config.num_warps * 32 / (config.block_n * config.block_k), 1
    x = torch.empty(problem.tokens, K, dtype=dtype, device="meta")
    if problem.kernel == "activations":
        activations_config = choose.activations(scheme, K)
        static = torch.empty(2, device="meta") if scheme.activations and scheme.activations.static else None
        dispatch_int8.quantize_activations(x, scheme, static)
        return activations_config.num_warps * 32 / min(4 * activations_config.words, K), 1
    gpu = GPUS[problem.capability]
    device = Device(gpu.name, problem.capability, gpu.multiprocessors)
    matmul_config = problem.config or choose.fused(problem.tokens, N, K, scheme, dtype, device)
    # Of one step alone the compiler makes no loop, and there would be nothing to count.
    steps = K // (matmul_config.blocks * packing.block_columns(scheme.bits))
    matmul_config = dataclasses.replace(matmul_config, splits=min(matmul_config.splits, max(1, steps // 2)))
    if scheme.activations is None:
        matmul.matmul(x, packed, scale, zero, None, scheme, matmul_config)
    else:
        codes = torch.empty(problem.tokens, packing.activation_words(scheme.bits, K), dtype=torch.int32, device="meta")
        x_scale = torch.empty(problem.tokens, device="meta")
        x_zero = None if scheme.activations.symmetric else torch.empty_like(x_scale, dtype=torch.int8)
        product = dispatch_int8.product(codes.shape, packed, scale, zero, None, scheme, K, dtype, matmul_config)
        product(codes, x_scale, x_zero, packed, scale, zero, None)
    block_k = matmul_config.blocks * packing.block_columns(scheme.bits)
    return matmul_config.num_warps * 32 / (matmul_config.block_n * block_k), matmul_config.block_m


def _scale_and_zero(scheme: Scheme, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale = torch.empty(scheme.scale_shape(N, K), dtype=scheme.scale_dtype, device="meta")
    return scale, None if scheme.zero_dtype is None else torch.empty_like(scale, dtype=scheme.zero_dtype)


def spill_budget(problem: Problem) -> int:
    """Bytes of stack that a thread may have: 0, but for bodies of some 2000 instructions, where ptxas misses its aim.

    These are products whose steps are 256 k long (widths with a plane of 1 bit), or whose x is float32, and hold groups
    that are short, or not a power of two, or have offsets.
    """
    scheme = Scheme.parse(problem.scheme)
    group = scheme.group_length(problem.in_features)
    many_groups = scheme.value_map == "offset" or group < 64 or group & (group - 1) != 0
    long_step = packing.block_columns(scheme.bits) == 256
    large = many_groups and (long_step or problem.dtype == "float32")
    return 32 if problem.kernel == "matmul" and large else 0


def compiler(workers: int = 1) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that compile even where this one interprets: `compiler().submit(cost, problem)`."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        # Processes start with the first jobs, and keep the environment of that moment.
        concurrent.futures.wait([pool.submit(os.getpid) for _ in range(workers)])
        return pool
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def every_problem(targets: Iterable[int] = TARGETS) -> Iterator[Problem]:
    """Every width, value map, kind of group and dtype that choose.py can meet."""
    maps = [(bits, suffix) for bits in range(1, 9) for suffix in ("", "s", "f") if (bits, suffix) != (1, "s")]
    # Groups of one, two, four and more slots, of a slot that is not a power of two, and one group in all.
    groups = ("g16", "g32", "g48", "g64", "g128", "c")
    for target, group, (bits, suffix) in itertools.product(targets, groups, maps):
        scheme = f"w{bits}{group}{suffix}"
        for dtype in DTYPES:
            for tokens in (1, 9, 17, 33):  # each has a tile of its own
                yield Problem("matmul", scheme, target, dtype, tokens)
            yield Problem("quantize", scheme, target, dtype)
            yield Problem("dequantize", scheme, target, dtype)
    for target, scheme in itertools.product(targets, with_activations()):
        for tokens in (1, 9, 17, 33, 65, 129):
            yield Problem("matmul", scheme, target, "bfloat16", tokens)
        for dtype in DTYPES:
            yield Problem("activations", scheme, target, dtype)


def with_activations() -> Iterator[str]:
    """Every kind of scheme with quantized activations; static ones differ in a load from the dynamic ones."""
    groups = ("c", "g16", "g32", "g48", "g64", "g96", "g128", "g256")
    for group, bits, suffix, how in itertools.product(groups, (4, 8), ("", "s"), ("a8", "a8s", "a8ts")):
        yield f"w{bits}{group}{suffix}-{how}"


def main(arguments: list[str] | None = None) -> int:
    """Print costs as a table, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=[80, 86, 89, 90, 100, 120])
    parser.add_argument("--schemes", nargs="+", default=["w8g128", "w4g128", "w4g128s", "w4g32f", "w3g128", "w2g64"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--kernels", nargs="+", default=["matmul"], choices=KERNELS)
    parser.add_argument("--all", action="store_true", help="every scheme there is; prints only what spills")
    parser.add_argument("--json", type=pathlib.Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    problems = list(_chosen(options))

    from tqdm import tqdm

    from qkernels import tables

    rows, records, over_budget = [], [], 0
    with compiler(os.cpu_count() or 1) as pool:
        for problem, found in tqdm(
            zip(problems, pool.map(cost, problems, chunksize=4), strict=True), total=len(problems), unit="kernel"
        ):
            over_budget += found.stack_bytes > spill_budget(problem)
            if not options.all or found.stack_bytes:
                rows.append(_row(problem, found))
            record = dataclasses.asdict(problem)
            del record["config"]
            for field in ("registers", "stack_bytes", "shared_bytes", "num_warps", "programs", "mma", "bound"):
                record[field] = getattr(found, field)
            for field in ("instructions_per_weight", "shared_operations_per_weight", "memory_share"):
                record[field] = round(getattr(found, field), 3)
            records.append(record)
    print(
        tables.text(
            f"{len(problems)} kernels, {over_budget} spill more than their budget", COLUMNS, rows, text_columns=4
        )
    )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if over_budget else 0


def _chosen(options: argparse.Namespace) -> Iterator[Problem]:
    if options.all:
        for problem in every_problem(options.targets):
            if problem.kernel in options.kernels and problem.dtype in options.dtypes:
                yield problem
        return
    for kernel, scheme, target, dtype in itertools.product(
        options.kernels, options.schemes, options.targets, options.dtypes
    ):
        parsed = Scheme.parse(scheme)
        if kernel == "activations" and parsed.activations is None:
            continue
        for tokens in options.tokens if kernel == "matmul" else (1,):
            yield Problem(kernel, str(parsed), target, dtype, tokens)


COLUMNS = (
    "target", "kernel", "scheme", "dtype", "tokens", "warps", "registers", "stack", "shared", "resident", "mma",
    "instr/weight", "shared op/weight", "bound", "of memory",
)  # fmt: skip


def _row(problem: Problem, found: Cost) -> tuple[str, ...]:
    tokens = str(problem.tokens) if problem.kernel == "matmul" else ""
    return (
        f"sm_{problem.capability}", problem.kernel, problem.scheme, problem.dtype, tokens, str(found.num_warps),
        str(found.registers), f"{found.stack_bytes} B", f"{found.shared_bytes / 1024:.1f} KiB", str(found.programs),
        str(found.mma), f"{found.instructions_per_weight:.2f}", f"{found.shared_operations_per_weight:.2f}",
        found.bound, f"{100 * found.memory_share:.0f} %",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
