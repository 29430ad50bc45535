"""Compile kernels for any GPU, on a machine that has none, through the very launch code that a GPU would run.

    with compile_only(90) as launches:
        matmul(x, packed, ...)                    # meta tensors will do: nothing runs
    launches[0].sass.loop_instructions

A stand-in for Triton's driver reports the wanted compute capability and records each launch. So what is compiled has
the constants, the alignments and the options of the real call. `cuobjdump` and `nvdisasm`, which come with Triton, do
the rest.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as active_driver

# Shared memory that one program may have, in bytes, by compute capability (CUDA programming guide, technical
# specifications); these are also the capabilities that kernels are compiled and checked for.
SHARED_MEMORY_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Warps and programs that a multiprocessor can hold; the same source.
_MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_MOST_PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


def resident_programs(capability: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that one multiprocessor runs at a time.

    It has 64 Ki registers, given to warps 256 at a time, and 1 KiB more shared memory than a program may have, of which
    each program takes 1 KiB for itself.
    """
    warps_by_registers = 65536 // (-(-registers * 32 // 256) * 256)
    return min(
        _MOST_PROGRAMS[capability],
        min(_MOST_WARPS[capability], warps_by_registers) // num_warps,
        (SHARED_MEMORY_BYTES[capability] + 1024) // (shared_bytes + 1024),
    )


@dataclasses.dataclass(frozen=True)
class Sass:
    """What the machine code of a kernel tells."""

    registers: int  # per thread
    stack_bytes: int  # per thread; above 0 means spills or a local array
    instructions: int
    loop_instructions: int  # of the main loop: the longest of `loops`
    opcodes: collections.Counter[str]  # of the whole kernel, by stem: "HGMMA", "LOP3", "STS", ...
    loop_opcodes: collections.Counter[str]
    loops: tuple[tuple[str, ...], ...]  # the code of those that multiply by wgmma, or else of the longest one alone
    accesses: collections.Counter[str]  # to global memory in the whole kernel, with their width: "LDG.E.128", ...


@dataclasses.dataclass
class Launch:
    """One launch that would have happened."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int  # per block
    ptx: str
    cubin: bytes

    @functools.cached_property
    def sass(self) -> Sass:
        """Counts from the machine code."""
        return disassemble(self.cubin)


class _Driver:
    """The few parts of a Triton driver that a launch touches."""

    def __init__(self, capability: int, record: bool):
        self.capability = capability
        self.record = record
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device: one per capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY_BYTES[device]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        if not self.record:
            return _no_launch

        def launch(grid_x: int, grid_y: int, grid_z: int, *args: Any) -> None:
            compiled = next(
                kernel
                for kernel in src.fn.device_caches[self.capability][0].values()
                if kernel.metadata.hash == metadata.hash
            )
            active_driver.active.launches.append(
                Launch(
                    name=metadata.name,
                    grid=(grid_x, grid_y, grid_z),
                    num_warps=metadata.num_warps,
                    shared_bytes=metadata.shared,
                    ptx=compiled.asm["ptx"],
                    cubin=compiled.asm["cubin"],
                )
            )

        return launch


def _no_launch(*_: Any) -> None:
    pass


@contextlib.contextmanager
def compile_only(capability: int, record: bool = True) -> Iterator[list[Launch]]:
    """Inside, Triton launches compile for `capability` (a key of SHARED_MEMORY_BYTES) and are recorded, not run.

    With record=False they are forgotten at once: what is left is the time that the host takes.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_only needs compiled kernels: start Python without TRITON_INTERPRET=1")
    driver = _Driver(capability, record)
    active_driver.set_active(driver)
    try:
        yield driver.launches
    finally:
        active_driver.set_active(None)  # found again when next asked for


def disassemble(cubin: bytes) -> Sass:
    """Counts from a cubin's resource usage and disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", path)
        listing = _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")

    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    backward = []
    for at, text in enumerate(code):
        jump = re.search(r"BRA.*?`\((\.L_\w+)\)", text)
        if jump and labels.get(jump[1], at + 1) <= at:
            backward.append((labels[jump[1]], at + 1))
    loops = [tuple(code[start:stop]) for start, stop in _main_loops(code, backward)]
    return Sass(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        instructions=len(code),
        loop_instructions=len(loops[0]) if loops else 0,
        opcodes=_stems(code),
        loop_opcodes=_stems(loops[0] if loops else ()),
        loops=tuple(loops),
        accesses=collections.Counter(re.findall(r"\b(?:LDG|STG)\.\S+", "\n".join(code))),
    )


def touched_in_flight(loop: Sequence[str]) -> list[str]:
    """Instructions of a loop that write an operand of a wgmma that may be in flight, or touch its sums.

    The loop is walked twice, as a wgmma may stay in flight from one round to the next. A wgmma that ends a group says
    `gsb0`, and a wait says how many groups may go on.
    """
    groups: list[list[tuple[set[int], set[int]]]] = [[]]  # (operands, sums) of each wgmma; the last group is open
    found = []
    for text in itertools.chain(loop, loop):
        text = re.sub(r"^@!?U?P\w+\s+", "", text)
        numbers = [int(n) for n in re.findall(r"\bR(\d+)", text)]
        if mma := re.match(r"[HI]GMMA\.\d+x(\d+)x\S+ R(\d+), (?:R(\d+)|gdesc)", text):
            tokens, sums = int(mma[1]), int(mma[2])
            operands = set(range(int(mma[3]), int(mma[3]) + 4)) if mma[3] else set()  # else in shared memory
            groups[-1].append((operands, set(range(sums, sums + tokens // 2))))
            if "gsb0" in text:
                groups.append([])
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", text):
            groups = groups[max(0, len(groups) - 1 - int(wait[1], 16)) :]
        elif numbers:
            opcode = text.split()[0]
            width = 4 if re.search(r"\.(128|4)\b", opcode) else 2 if re.search(r"\.(64|2|WIDE)\b", opcode) else 1
            writes = not opcode.startswith(("ST", "LDGSTS", "SYNCS", "UTMA", "RED"))
            written = set(range(numbers[0], numbers[0] + width)) if writes else set()
            for operands_of, sums_of in itertools.chain.from_iterable(groups):
                if written & operands_of or (written | set(numbers)) & sums_of:
                    found.append(text)
    return found


def _main_loops(code: Sequence[str], backward: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, stop) of what `Sass.loops` are, longest first, from all backward branches.

    A kernel of several partitions has a loop in each, all within the one that hands out work; and a wait that is tried
    again out of line jumps back into the loop from far behind it. So of branches that overlap the shortest is the loop.
    """
    found: list[tuple[int, int]] = []
    by_length = sorted(backward, key=lambda loop: loop[1] - loop[0])
    for start, stop in by_length:
        apart = all(stop <= other_start or other_stop <= start for other_start, other_stop in found)
        if apart and any("GMMA" in text for text in code[start:stop]):
            found.append((start, stop))
    return found[::-1] or by_length[-1:]


def _stems(code: Iterable[str]) -> collections.Counter[str]:
    return collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in code)


def _run(tool: str, *args: object) -> str:
    path = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([path, *map(str, args)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
