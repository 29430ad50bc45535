"""Find the best configuration of matmul for shapes on this machine's GPU: what `qkernels tune` does.

For each problem, rounds of candidates around the best so far: tiles and warps, then splits of K, then pipelining. A
candidate must first prove itself: on a product whose every partial sum is exact, it has to give the very bits of
float64 arithmetic, in several runs. What proves right is timed cold, all of a round interleaved in CUDA graphs. So a
compiler bug, of which there were some in this corner, costs a candidate and not a wrong result.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import dispatch, packing, reference
from qkernels import tables as text_tables
from qkernels.scheme import Scheme
from qkernels.tuning import choose, tables, timing
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import Device, device_of

Config = MatmulConfig | DenseConfig

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
_PROOFS = 3  # runs of each candidate on the exact product
_MARGIN = 0.01  # faster by less is noise: the default stays


@dataclasses.dataclass(frozen=True)
class Problem:
    """(tokens, in_features) times a weight (out_features, in_features); dtype of x, float16 or bfloat16."""

    tokens: int
    out_features: int
    in_features: int
    scheme: str
    dtype: str

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


# ---- candidates: pure ----


def tiles(best: Config, problem: Problem, device: Device) -> list[Config]:
    """First round: the best so far, tiles that cover the tokens with little to spare, cuBLAS."""
    scheme, dtype = problem.parsed, problem.torch_dtype
    size = problem.tokens, problem.out_features, problem.in_features
    found: list[Config] = [best]
    start = choose.fused(*size, scheme, dtype, device)
    found.append(start)
    enough = max(8, 1 << (problem.tokens - 1).bit_length())
    for block_m in sorted({max(8, min(128, enough)), max(8, min(128, enough) // 2), max(8, min(128, enough) // 4)}):
        for block_n, num_warps in ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (128, 8)):
            if 16 <= block_m * block_n // (32 * num_warps) <= 128:  # sums that a thread keeps
                for scaled in (False, True):
                    # at least two programs to a multiprocessor
                    tile = MatmulConfig(
                        block_m, block_n, 1, 1, num_warps, 3, min(255, 32768 // (32 * num_warps)), scaled
                    )
                    found.append(dataclasses.replace(tile, splits=start.splits))
    if problem.tokens >= 32:
        found.append(choose.dense(problem.out_features, problem.in_features, dtype))
    return _possible(found, problem)


def splits(best: Config, problem: Problem, device: Device) -> list[Config]:
    """Second round."""
    if isinstance(best, DenseConfig):
        return []
    steps = max(1, problem.in_features // (best.blocks * packing.block_columns(problem.parsed.bits)))
    wanted = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    return [dataclasses.replace(best, splits=n) for n in wanted if n <= steps and n != best.splits]


def pipelines(best: Config, problem: Problem, device: Device) -> list[Config]:
    """Third round: stages, blocks to a step, registers."""
    if isinstance(best, DenseConfig):
        return []
    found: list[Config] = [dataclasses.replace(best, num_stages=n) for n in (2, 4, 5, 6)]
    found += [dataclasses.replace(best, blocks=2 * best.blocks, num_stages=n) for n in (2, 3)]
    found += [
        dataclasses.replace(best, max_registers=n) for n in (96, 128, 168, 255) if n * 32 * best.num_warps <= 65536
    ]
    return _possible(found, problem)


def _possible(found: Iterable[Config], problem: Problem) -> list[Config]:
    """Each once, in order, if it can serve the problem."""
    given = problem.parsed, problem.torch_dtype, problem.tokens, problem.in_features
    return [config for config in dict.fromkeys(found) if tables.fits(config, *given)]


# ---- proof and time: on the GPU ----


@dataclasses.dataclass(frozen=True)
class Operands:
    """What a product takes, on the GPU."""

    x: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None


def exact_operands(problem: Problem, device: str, seed: int = 0) -> Operands:
    """Operands whose every partial sum is exact: x of -1, 0, 1; scales that are powers of two, as far apart as fits.

    Sums of K terms, each at most 2^bits - 1 times the ratio of the largest scale to the smallest, stay below 2^24.
    """
    scheme = problem.parsed
    room = math.log2(2**24 / max(1, problem.in_features * (2**scheme.bits - 1) * 2))
    span = max(0, min(4, int(room)))
    generator = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=generator, device=device)

    shape = scheme.scale_shape(problem.out_features, problem.in_features)
    scale = torch.exp2(integers(0, span + 1, shape).float() - span).to(scheme.scale_dtype)
    zero = None
    if scheme.value_map == "affine":
        zero = integers(0, scheme.code_max + 1, shape).to(torch.uint8)
    elif scheme.value_map == "offset":
        zero = (integers(-8, 9, shape).float() * 2.0**-span).to(scheme.scale_dtype)
    codes = integers(scheme.code_min, scheme.code_max + 1, (problem.out_features, problem.in_features))
    packed = packing.pack(codes.to(torch.uint8), scheme.bits)
    x = integers(-1, 2, (problem.tokens, problem.in_features)).to(problem.torch_dtype)
    return Operands(x, packed, scale, zero)


def timed_operands(problem: Problem, device: str, seed: int) -> Operands:
    """Random codes, zeros and x; results stay finite."""
    proof = exact_operands(dataclasses.replace(problem, tokens=1), device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(problem.tokens, problem.in_features, generator=generator, device=device).to(problem.torch_dtype)
    return Operands(x, proof.packed, proof.scale, proof.zero)


def product(operands: Operands, problem: Problem, config: Config) -> Tensor:
    """With this configuration."""
    return dispatch.multiply(operands.x, operands.packed, operands.scale, operands.zero, None, problem.parsed, config)


def truth(operands: Operands, problem: Problem) -> Tensor:
    """The exact product, rounded once."""
    w = reference.dequantize(
        operands.packed, operands.scale, operands.zero, problem.parsed, problem.in_features, torch.float32
    )
    return (operands.x.double() @ w.double().T).to(problem.torch_dtype)


def refusal(operands: Operands, wanted: Tensor, problem: Problem, config: Config) -> str | None:
    """Why a configuration cannot be used; None if it proved right."""
    try:
        results = [product(operands, problem, config) for _ in range(_PROOFS)]
        wrong = max(int((result != wanted).sum()) for result in results)
    except Exception as error:  # out of shared memory or registers, or the compiler gives up: any type
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # torch's own product may round partial sums to x's dtype: it is not ours to prove.
    if wrong and not isinstance(config, DenseConfig):
        return f"{wrong} of {wanted.numel()} results are wrong"
    return None


def best_of(problem: Problem, device: str = "cuda", seed: int = 0) -> tuple[tables.Entry, dict[Config, str]]:
    """(what is fastest, and its time; why others were refused)."""
    gpu = device_of(torch.cuda.current_device())
    proof = exact_operands(problem, device, seed)
    wanted = truth(proof, problem)
    first = timed_operands(problem, device, seed)
    weight_bytes = sum(t.nbytes for t in (first.packed, first.scale, first.zero) if t is not None)
    count = timing.weight_sets(weight_bytes, timing.l2_bytes())
    sets = [first, *(timed_operands(problem, device, seed + i) for i in range(1, count))]
    refused: dict[Config, str] = {}
    times: dict[Config, float] = {}

    def calls(config: Config) -> list[Callable[[], object]]:
        return [lambda s=s: product(s, problem, config) for s in sets]  # type: ignore[misc]

    default = choose.heuristic(
        problem.tokens, problem.out_features, problem.in_features, problem.parsed, problem.torch_dtype, gpu
    )
    best = default
    for candidates in (tiles, splits, pipelines):
        proved = []
        for config in candidates(best, problem, gpu):
            why = refusal(proof, wanted, problem, config)
            if why is None:
                proved.append(config)
            else:
                refused[config] = why
        if best not in refused and best not in proved:
            proved.append(best)  # again, in the same round as those it is compared with
        if not proved:
            raise RuntimeError(f"no configuration of {problem} gives the exact product: {refused}")
        found = timing.cold({str(i): calls(config) for i, config in enumerate(proved)}, seed=seed)
        times.update({config: found[str(i)].median_us for i, config in enumerate(proved)})
        best = min(proved, key=lambda config: times[config])
    if default in times and times[best] > times[default] * (1 - _MARGIN):
        best = default
    entry = tables.Entry(
        problem.scheme, problem.dtype, problem.out_features, problem.in_features, problem.tokens, best,
        us=round(times[best], 3), default_us=round(times.get(default, math.nan), 3),
    )  # fmt: skip
    return entry, refused


def problems(
    shapes: Iterable[tuple[int, int]], schemes: Iterable[str], dtypes: Iterable[str], tokens: Iterable[int]
) -> Iterator[Problem]:
    """Every combination, each shape once; fewest tokens first, which matter most."""
    every = list(dict.fromkeys(shapes))
    for scheme in schemes:
        for dtype in dtypes:
            for m in sorted(set(tokens)):
                for out_features, in_features in every:
                    yield Problem(m, out_features, in_features, str(Scheme.parse(scheme)), dtype)


def run(
    wanted: Sequence[Problem], path: pathlib.Path | None, seconds: float, say: Callable[[str], None]
) -> pathlib.Path:
    """Tune for problems until the time is up, writing the table after each; entries for others stay.

    Args:
        wanted: in order of importance.
        path: the table; the user's own for this GPU by default.
        seconds: after which no new problem is begun.
        say: where lines for the user go.

    Raises:
        RuntimeError: there is no GPU.
        ValueError: path holds something else than a table.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs an NVIDIA GPU; without one the heuristic of choose.py serves")
    from tqdm import tqdm

    device = device_of(torch.cuda.current_device())
    path = path or tables.user_path(device)
    entries = {_key(entry): entry for entry in (tables.read(path) if path.exists() else [])}
    start = time.perf_counter()
    rows: list[tuple[str, ...]] = []
    for problem in tqdm(wanted, desc="tuning", unit="problem"):
        if time.perf_counter() - start > seconds:
            say(f"time is up: {len(rows)} of {len(wanted)} problems tuned")
            break
        entry, refused = best_of(problem)
        entries[_key(entry)] = entry
        tables.write(path, device, _measured(), entries.values())
        for config, why in refused.items():
            if "wrong" in why:
                say(f"REFUSED {problem}: {config}: {why}")
        gain = f"{entry.default_us / entry.us:.2f}x"
        size = f"{entry.out_features} x {entry.in_features}"
        rows.append(
            (entry.scheme, entry.dtype, size, str(entry.tokens), f"{entry.default_us:.2f}", f"{entry.us:.2f}", gain)
        )
    dispatch.forget()
    columns = ("scheme", "dtype", "weight", "tokens", "default us", "tuned us", "gain")
    say(text_tables.text(f"{path}: {len(entries)} entries", columns, rows, text_columns=3))
    return path


def _key(entry: tables.Entry) -> tuple[Any, ...]:
    return entry.scheme, entry.dtype, entry.out_features, entry.in_features, entry.tokens


def _measured() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "how": "cold L2, medians of CUDA graphs; each configuration proved exact first",
    }
