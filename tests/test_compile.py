"""What the ops would launch, compiled for every supported GPU without one: spills, what fits, tensor-core instructions.

Each target gets every width and value map; groups, dtypes and batches take turns, so that the targets together see
most pairs. `python -m benchmarks.static_cost --all` compiles every scheme, for the targets, kernels and dtypes it gets.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks import static_cost
from benchmarks.compile_only import SHARED_MEMORY_BYTES, resident_programs, touched_in_flight
from benchmarks.static_cost import TARGETS, Cost, Problem
from qkernels.scheme import Scheme
from qkernels.tuning.configs import MatmulConfig
from tests.helpers import ALL_BITS, ALL_MAPS

GROUPS = ("g128", "g32", "c", "g16", "g64", "g48", "t")
DTYPES = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with static_cost.compiler() as pool:
        yield pool


def _check(problem: Problem, cost: Cost) -> None:
    assert cost.stack_bytes <= static_cost.spill_budget(problem), f"{problem} spills {cost.stack_bytes} bytes"
    assert cost.shared_bytes <= SHARED_MEMORY_BYTES[problem.capability], f"{problem}: {cost.shared_bytes}"
    assert cost.touched_in_flight == 0, f"{problem}: {cost.touched_in_flight} race with a wgmma"


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("target", TARGETS)
def test_matmul(target: int, bits: int, pool: ProcessPoolExecutor) -> None:
    start = TARGETS.index(target) + bits
    turns = zip(*(itertools.cycle(c) for c in (GROUPS, DTYPES, (1, 33, 16, 17, 8))), strict=True)
    turns = itertools.islice(turns, start, None)
    suffixes = [suffix for b, suffix in ALL_MAPS if b == bits]
    problems = [
        Problem("matmul", f"w{bits}{group}{suffix}", target, dtype, tokens)
        for suffix, (group, dtype, tokens) in zip(suffixes, turns, strict=False)
    ]
    for problem, cost in zip(problems, pool.map(static_cost.cost, problems), strict=True):
        _check(problem, cost)
        assert cost.mma > 0, f"{problem} has no tensor-core instruction: {cost.opcodes}"


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_codes(target: int, pool: ProcessPoolExecutor) -> None:
    """Groups of each kind, every tile that choose.py has, and M = 1, whose sizes Triton takes for constants."""
    schemes = [text for text in static_cost.with_activations() if not text.endswith("a8ts")]
    tokens = itertools.cycle((1, 17, 129, 9, 4096, 65, 33))
    start = TARGETS.index(target)
    problems = [
        Problem("matmul", scheme, target, ("bfloat16", "float32")[i % 5 == 4], next(tokens))
        for i, scheme in enumerate([*schemes[start :: len(TARGETS)], "w8cs-a8s", "w8cs-a8s", "w4g128-a8s"])
    ]
    for problem, cost in zip(problems, pool.map(static_cost.cost, problems), strict=True):
        _check(problem, cost)
        assert cost.mma > 0, f"{problem} has no tensor-core instruction: {cost.opcodes}"
        if "c" in problem.scheme:  # the oracle's bits
            assert not re.search(r"\bfma\.rn\.f32", cost.ptx), problem


@pytest.mark.parametrize("warps", [4, 8])
def test_registers_of_wgmmas_in_flight_are_left_alone(warps: int, pool: ProcessPoolExecutor) -> None:
    """Weights are operands in registers there, which compilers have been known to reuse too early."""
    config = MatmulConfig(block_m=64, block_n=128, blocks=1, splits=1, num_warps=warps, num_stages=3, max_registers=255)
    problems = [
        Problem("matmul", scheme, 90, "bfloat16", tokens=256, config=dataclasses.replace(config, block_m=block_m))
        for scheme, block_m in (
            ("w4g128", 64), ("w4g128", 16), ("w8g128", 32), ("w4g64s", 128), ("w3g32f", 64), ("w8cs", 64),
            ("w8cs-a8s", 128), ("w8c-a8", 64), ("w4cs-a8s", 16), ("w4g128-a8s", 64), ("w8g32-a8", 32),
        )
    ]  # fmt: skip
    for problem, cost in zip(problems, pool.map(static_cost.cost, problems), strict=True):
        assert cost.opcodes["HGMMA"] + cost.opcodes["IGMMA"] > 0, f"{problem}: {cost.opcodes}"
        assert cost.touched_in_flight == 0, problem


@pytest.mark.parametrize("kind", ["HGMMA.64x16x16.F32.BF16", "IGMMA.64x16x32.S8.S8"])
def test_a_register_touched_in_flight_is_found(kind: str) -> None:
    def loop(*between: str) -> list[str]:
        mma = f"{kind} R24, R40, gdesc[UR8], R24, gsb0"
        return [mma, *between, "WARPGROUP.DEPBAR.LE gsb0, 0x1", mma.replace("R40", "R44"), "WARPGROUP.ARRIVE"]

    assert touched_in_flight(loop("MOV R39, R40", "STS.128 [R2], R40", "IADD3 R48, R39, R47, RZ")) == []
    assert touched_in_flight(loop("LDGSTS.E.BYPASS.128 [R23], desc[UR10][R14.64], !P0")) == []
    for text in ("MOV R40, R2", "@!P1 LDS.64 R42, [R2]", "LDS.128 R37, [R2]", "IADD3 R2, R31, R3, RZ", "MOV R24, R2"):
        assert text.split()[-1] in "".join(touched_in_flight(loop(text))), text
    # The second is in flight until the next round's wait.
    assert touched_in_flight(loop("MOV R44, R2")) == ["MOV R44, R2"]
    waited = [*loop(), "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R44, R24"]
    assert touched_in_flight(waited) == []
    shared = f"{kind} R24, gdesc[UR8], R24, gsb0"
    assert touched_in_flight([shared, shared, "MOV R40, R2"]) == []
    assert set(touched_in_flight([shared, "MOV R24, R2"])) == {"MOV R24, R2"}


@pytest.mark.parametrize("target", TARGETS)
def test_activations(target: int, pool: ProcessPoolExecutor) -> None:
    problems = [
        Problem("activations", scheme, target, dtype, tokens=3, in_features=in_features)
        for scheme, dtype, in_features in (
            ("w8cs-a8s", "bfloat16", 4096), ("w4g128-a8", "float16", 4096), ("w8cs-a8ts", "float32", 28672),
            ("w8cs-a8", "bfloat16", 28672), ("w4cs-a8s", "float32", 200),
        )
    ]  # fmt: skip
    for problem, cost in zip(problems, pool.map(static_cost.cost, problems), strict=True):
        _check(problem, cost)
        assert not re.search(r"\.ftz|\.approx|\bfma\.rn\.f32|\bdiv\.full", cost.ptx), problem


@pytest.mark.parametrize("target", TARGETS)
def test_quantize_and_dequantize(target: int, pool: ProcessPoolExecutor) -> None:
    turn = itertools.cycle(itertools.product(GROUPS, (*DTYPES, "float32")))
    chosen = itertools.islice(turn, TARGETS.index(target), None)
    problems = [
        Problem(kernel, f"w{bits}{group}{suffix}", target, dtype)
        for kernel in ("quantize", "dequantize")
        for (bits, suffix), (group, dtype) in zip(ALL_MAPS[target % 3 :: 3], chosen, strict=False)
    ]
    for problem, cost in zip(problems, pool.map(static_cost.cost, problems), strict=True):
        _check(problem, cost)
        # Bit for bit the oracle's arithmetic: no subnormal flushed, no multiply-add but those that are asked for. The
        # one quotient that need not be exact is the reciprocal of a 16-bit scale (kernels/rounding.py).
        assert not re.search(r"\.ftz|\.approx", cost.ptx), problem
        if problem.kernel == "dequantize":
            assert not re.search(r"\bfma\.|\bdiv\.(rn|full)", cost.ptx), problem


@pytest.mark.parametrize(("target", "scheme"), [(80, "w7g32s"), (90, "w4g64"), (120, "w5g32")])
def test_float32_activations_stay_float32(target: int, scheme: str, pool: ProcessPoolExecutor) -> None:
    problem = Problem("matmul", scheme, target, "float32", tokens=3)
    cost = pool.submit(static_cost.cost, problem).result()
    _check(problem, cost)
    assert cost.mma == 0  # tensor cores would round x to TensorFloat-32
    assert cost.opcodes["FFMA"] > 0


# A rise means that unpacking got dearer. At the memory floor of an H200 some 4 instructions for each 4-bit weight are
# the wall, and as few on the others; `python -m benchmarks.static_cost` prints what there is.
@pytest.mark.parametrize(
    ("target", "scheme", "dtype", "budget"),
    [
        (90, "w4g128", "bfloat16", 2.3),
        (90, "w4g128", "float16", 2.05),
        (80, "w4g128", "bfloat16", 2.3),
        (86, "w4g128", "bfloat16", 2.3),
        (89, "w4g128", "float16", 2.1),
        (90, "w4g128s", "bfloat16", 2.2),
        (90, "w8g128", "float16", 2.8),
        (90, "w8g128", "bfloat16", 4.1),
        (90, "w3g128", "bfloat16", 3.1),
        (90, "w2g64", "bfloat16", 2.3),
        (90, "w8cs-a8s", "bfloat16", 0.95),
        (80, "w8cs-a8s", "bfloat16", 0.95),
        (90, "w4g128-a8s", "bfloat16", 1.75),
        (89, "w4g128-a8s", "bfloat16", 1.75),
        (90, "w4g128s-a8s", "bfloat16", 1.0),
        (90, "w4g64-a8s", "bfloat16", 2.5),
    ],
)
def test_instructions_per_weight(
    target: int, scheme: str, dtype: str, budget: float, pool: ProcessPoolExecutor
) -> None:
    cost = pool.submit(static_cost.cost, Problem("matmul", scheme, target, dtype)).result()
    assert budget - 0.25 < cost.instructions_per_weight <= budget  # much below, the budget should be lowered
    assert cost.bound == "memory"


def test_a_dearer_kernel_breaks_the_budget(pool: ProcessPoolExecutor) -> None:
    """Two warps on the same tile: each reads all of x. The budget above has to see that."""
    config = MatmulConfig(8, 64, blocks=1, splits=1, num_warps=2, num_stages=3, max_registers=255)
    cost = pool.submit(static_cost.cost, Problem("matmul", "w4g128", 90, "bfloat16", config=config)).result()
    assert cost.instructions_per_weight > 2.3


def test_unpacked_weights_do_not_go_through_shared_memory(pool: ProcessPoolExecutor) -> None:
    """Packed words and x do, once: far less than one operation for a weight."""
    problems = [Problem("matmul", "w4g128", target, "bfloat16") for target in (80, 89, 90, 120)]
    for cost in pool.map(static_cost.cost, problems):
        # 16-bit weights would take at least 1/8 to store and 1/8 to load, each 16 bytes at a time.
        assert cost.shared_operations_per_weight < 0.2, cost.opcodes


def test_resident_programs() -> None:
    assert resident_programs(90, registers=168, shared_bytes=12416, num_warps=1) == 12
    assert resident_programs(90, registers=32, shared_bytes=0, num_warps=1) == 32
    assert resident_programs(90, registers=32, shared_bytes=0, num_warps=4) == 16
    assert resident_programs(86, registers=32, shared_bytes=40 << 10, num_warps=1) == 2
    assert resident_programs(80, registers=255, shared_bytes=0, num_warps=2) == 4


# (kernel, scheme, dtype, instructions per weight as measured). A weight in 16 bits and its 4-bit code are 2.5 bytes: 19
# instructions for it take as long as its bytes, on the GPU with the fewest instructions to a byte (sm_90).
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "scheme", "dtype", "measured"),
    [
        ("dequantize", "w4g128", "float16", 4.94),
        ("dequantize", "w4g128", "bfloat16", 4.94),
        ("dequantize", "w4g128", "float32", 4.88),
        ("dequantize", "w8g128", "bfloat16", 5.62),
        ("dequantize", "w4g48", "bfloat16", 6.88),
        ("dequantize", "w7g16", "float32", 11.62),
        ("quantize", "w4g128", "float16", 13.0),
        ("quantize", "w4g128", "bfloat16", 13.5),
        ("quantize", "w8g128", "bfloat16", 13.5),
        ("quantize", "w4g128s", "bfloat16", 10.75),
        ("quantize", "w4g48", "float32", 18.25),
        ("quantize", "w7g32", "bfloat16", 22.62),
    ],
)
def test_instructions_and_accesses_of_quantize_and_dequantize(
    kernel: static_cost.Kernel, scheme: str, dtype: str, measured: float, target: int, pool: ProcessPoolExecutor
) -> None:
    cost = pool.submit(static_cost.cost, Problem(kernel, scheme, target, dtype)).result()
    assert measured / 2 < cost.instructions_per_weight <= 1.05 * measured
    # Weights and packed words travel 16 bytes at a time, and all of them do: what else there is are scales and zeros.
    weights = cost.weights_per_thread * (4 if dtype == "float32" else 2)
    packed = cost.weights_per_thread * Scheme.parse(scheme).bits / 8
    loaded, stored = (packed, weights) if kernel == "dequantize" else (weights, packed)
    assert cost.accesses["LDG.E.128"] == loaded / 16, cost.accesses
    assert cost.accesses["STG.E.128"] == stored / 16, cost.accesses
    assert not any(".64" in name for name in cost.accesses), cost.accesses


def test_the_multiply_adds_of_quantize_are_those_of_its_quotients(pool: ProcessPoolExecutor) -> None:
    cost = pool.submit(static_cost.cost, Problem("quantize", "w4g128", 90, "bfloat16")).result()
    assert cost.ptx.count("fma.rn.f32") == 2 * cost.weights_per_thread + 4  # and for the scale, and the zero


def test_a_tail_leaves_whole_blocks_their_wide_stores(pool: ProcessPoolExecutor) -> None:
    for kernel, wide in (("dequantize", 16), ("quantize", 2)):
        cost = pool.submit(static_cost.cost, Problem(kernel, "w4g128", 90, "bfloat16", in_features=4160)).result()
        assert cost.accesses["STG.E.128"] == wide, cost.accesses
