"""Find the best configuration of matmul for shapes on this machine's GPU: what `qkernels tune` does.

For each problem, rounds of candidates around the best so far: tiles and warps, then splits of K, then pipelining. A
candidate must first prove itself: on a product whose every partial sum is exact, it has to give the very bits of
float64 arithmetic, in several runs. What proves right is timed cold, all of a round interleaved in CUDA graphs. So a
compiler bug, of which there were some in this corner, costs a candidate and not a wrong result.

Where activations are quantized, what is timed includes that. Such a layer cannot fall back to a dense product, whose
result is another: so that product is timed beside, and shapes where it is faster are named.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
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
from qkernels.scheme import Activations, Scheme
from qkernels.tuning import choose, tables, timing
from qkernels.tuning.candidates import Config, Problem, pipelines, splits, tiles
from qkernels.tuning.configs import DenseConfig
from qkernels.tuning.devices import device_of

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
INT8_TOKENS = (*TOKENS, 2048, 4096, 8192)  # where the heuristic cannot tell which of two kernels is faster
_INT8_STEPS = 255  # from the lowest code of an activation to the highest
_PROOFS = 3  # runs of each candidate on the exact product
_MARGIN = 0.01  # faster by less is noise: the default stays
_REPORTED_TOKENS = 64  # from which on a product of codes is compared with a dense one


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
    Where x is quantized its codes stand for it exactly, and are as large as fits: see `_exact_tokens`.
    """
    scheme = problem.parsed
    terms = problem.in_features + (_INT8_STEPS if scheme.activations else 0)
    room = math.log2(2**24 / max(1, terms * (2**scheme.bits - 1) * 2))
    span = max(0, min(4, int(room / 2 if scheme.activations else room)))
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
    size = (problem.tokens, problem.in_features)
    if scheme.activations is None:
        x = integers(-1, 2, size)
    else:
        x = _exact_tokens(size, scheme.activations, max(1, min(60, int(2 ** (room - span)))), integers)
    return Operands(x.to(problem.torch_dtype), packed, scale, zero)


def _exact_tokens(
    size: tuple[int, int], how: Activations, largest: int, integers: Callable[[int, int, Sequence[int]], Tensor]
) -> Tensor:
    """x (M, K) float32 whose codes stand for it exactly: up to `largest`, and one value or two that set a scale of 1.

    127 is the largest that a symmetric scale of 1 reaches, and -u and 255 - u the ends of an affine one with the zero
    u - 128. Then each token is multiplied by a power of two of its own.
    """
    M, K = size
    x = integers(-largest, largest + 1, size).float()
    at = integers(0, K, (M, 1))
    if how.symmetric:
        x.scatter_(1, at, 127.0)
    else:
        below = integers(64, 192, (M, 1)).float() if K > 1 else torch.zeros_like(x)
        x.scatter_(1, (at + 1) % K, -below)
        x.scatter_(1, at, _INT8_STEPS - below)
    return x * torch.exp2(integers(-3, 1, (M, 1)).float())


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
    # torch's own product of floats may round partial sums to x's dtype: not ours to prove. That of codes is exact.
    if wrong and (problem.parsed.activations is not None or not isinstance(config, DenseConfig)):
        return f"{wrong} of {wanted.numel()} results are wrong"
    return None


def dense_calls(problem: Problem, x: Tensor) -> list[Callable[[], object]]:
    """Products of x with weights of its own dtype, by cuBLAS: so many that none is found in L2."""
    shape = problem.out_features, problem.in_features
    count = timing.weight_sets(x.element_size() * math.prod(shape), timing.l2_bytes())
    weights = [torch.randn(shape, dtype=x.dtype, device=x.device) for _ in range(count)]
    return [functools.partial(torch.nn.functional.linear, x, w) for w in weights]


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
    beside: dict[str, list[Callable[[], object]]] = {}
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
        if candidates is pipelines and problem.parsed.activations and problem.tokens >= _REPORTED_TOKENS:
            beside = {"dense": dense_calls(problem, first.x)}
        found = timing.cold({str(i): calls(config) for i, config in enumerate(proved)} | beside, seed=seed)
        times.update({config: found[str(i)].median_us for i, config in enumerate(proved)})
        best = min(proved, key=lambda config: times[config])
    if default in times and times[best] > times[default] * (1 - _MARGIN):
        best = default
    entry = tables.Entry(
        problem.scheme, problem.dtype, problem.out_features, problem.in_features, problem.tokens, best,
        us=round(times[best], 3), default_us=round(times.get(default, math.nan), 3),
        dense_us=round(found["dense"].median_us, 3) if beside else None,
    )  # fmt: skip
    return entry, refused


def problems(
    shapes: Iterable[tuple[int, int]], schemes: Iterable[str], dtypes: Iterable[str], tokens: Iterable[int] | None
) -> Iterator[Problem]:
    """Every combination, each shape once; fewest tokens first, which matter most.

    tokens: None for TOKENS, or INT8_TOKENS.

    Raises:
        ValueError: a scheme is none, or has static activations.
    """
    every = list(dict.fromkeys(shapes))
    for scheme in map(Scheme.parse, schemes):
        if scheme.is_static:
            raise ValueError(f"{scheme} is multiplied as {scheme.dynamic} is, and served by its entries: tune that")
        for dtype in dtypes:
            for m in sorted(set(tokens or (INT8_TOKENS if scheme.activations else TOKENS))):
                for out_features, in_features in every:
                    yield Problem(m, out_features, in_features, str(scheme), dtype)


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
    tuned: list[tables.Entry] = []
    for problem in tqdm(wanted, desc="tuning", unit="problem"):
        if time.perf_counter() - start > seconds:
            say(f"time is up: {len(tuned)} of {len(wanted)} problems tuned")
            break
        entry, refused = best_of(problem)
        entries[_key(entry)] = entry
        tables.write(path, device, _measured(), entries.values())
        for config, why in refused.items():
            if "wrong" in why:
                say(f"REFUSED {problem}: {config}: {why}")
        tuned.append(entry)
    dispatch.forget()
    say(report(f"{path}: {len(entries)} entries", tuned))
    return path


def report(title: str, entries: Sequence[tables.Entry]) -> str:
    """Entries as a table; then a line that names the shapes where a dense product is faster."""
    rows, slower = [], []
    for entry in entries:
        size, tokens = f"{entry.out_features} x {entry.in_features}", str(entry.tokens)
        times = entry.default_us, entry.us
        dense = "" if entry.dense_us is None else f"{entry.dense_us:.2f}"
        gain = f"{entry.default_us / entry.us:.2f}x"
        rows.append((entry.scheme, entry.dtype, size, tokens, *(f"{us:.2f}" for us in times), gain, dense))
        if entry.dense_us is not None and entry.us > entry.dense_us:
            slower.append(f"{entry.scheme} {size} at {tokens} tokens ({entry.us:.2f} us, not {dense})")
    columns = ("scheme", "dtype", "weight", "tokens", "default us", "tuned us", "gain", "dense us")
    warning = [f"WARNING: slower than cuBLAS with a dense weight: {', '.join(slower)}"] if slower else []
    return "\n".join([text_tables.text(title, columns, rows, text_columns=3), *warning])


def _key(entry: tables.Entry) -> tuple[Any, ...]:
    return entry.scheme, entry.dtype, entry.out_features, entry.in_features, entry.tokens


def _measured() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "how": "cold L2, medians of CUDA graphs; each configuration proved exact first",
    }
