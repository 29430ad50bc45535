"""How fast activations are quantized, with the RMSNorm before them and without.

    python -m benchmarks.activations --schemes w8a8 w4g128-a8 --sizes 4096 8192 --seconds 60

`fused` is quantize_activations with norm=, one kernel that writes codes alone; `apart` is torch's RMSNorm, then
quantize_activations; `compiled` is both in plain torch under torch.compile; `norm` and `quantize` are the parts. A
layer finds its inputs where the one before has just written them: so times are warm (the same tokens again and again,
in a CUDA graph) and eager. The floor is to move what must be moved at the speed of a copy from memory: what L2 holds
may be faster. Results go to benchmarks/results/<gpu>/<date>-activations.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import floors, harness, products
from benchmarks.providers_int8 import Quantized, compiled, rows_to_int8
from qkernels import ops_int8, packing, reference_int8, tables
from qkernels.cli import positive_int
from qkernels.scheme import Scheme, as_scheme
from qkernels.tuning import timing

SCHEMES, SIZES = ("w8a8", "w4g128-a8"), (4096, 8192)
TOKENS = (1, 16, 128, 1024, 4096)
EPS = 1e-6
# Sums of squares in float32, in chains of fewer than 2^7 additions, are off by less than 2^-17 of themselves, scales by
# no more. A value of up to 127 steps is off by less than 2^-10 of a step then: of 2^-9 of all values, which lie that
# close to the middle of two codes, the code may be the other one. Twice as many are allowed.
_SCALE_TOLERANCE, _OTHER_CODES = 2.0**-17, 2.0**-8


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tokens x (M, K), bfloat16, for weights of a scheme."""

    M: int
    K: int
    scheme: str

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)

    @property
    def moved_bytes(self) -> dict[str, int]:
        """That each candidate must move."""
        x, codes = 2 * self.M * self.K, floors.codes_bytes(self.M, self.K, self.parsed)
        norm = 2 * self.K
        return {
            "fused": x + norm + codes, "apart": 3 * x + norm + codes, "compiled": x + norm + codes,
            "norm": 2 * x + norm, "quantize": x + codes,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Time on a GPU; the exit status is 1 if codes are wrong or nothing was timed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schemes", nargs="+", default=list(map(as_scheme, SCHEMES)), type=_scheme, metavar="SCHEME")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), type=positive_int, metavar="K")
    parser.add_argument("--tokens", nargs="+", default=list(TOKENS), type=positive_int, metavar="M")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop before this many seconds have passed")
    parser.add_argument("--out", type=pathlib.Path, default=harness.RESULTS, help="folder of the result files")
    parser.add_argument("--commit", help="of the code, where this is not a git checkout")
    parser.add_argument("--gpu", choices=floors.GPUS, default="H200", help="without a GPU: whose figures to print")
    options = parser.parse_args(arguments)
    planned = [Problem(M, K, str(s)) for s in options.schemes for K in options.sizes for M in options.tokens]
    if not torch.cuda.is_available():
        print("There is no GPU here, so nothing is timed. What follows is known without one.\n")
        print(floor_table(planned, floors.GPUS[options.gpu]))
        return 0
    machine, ceilings = harness.machine(options.commit), harness.ceilings()
    path = harness.result_path(options.out, machine["device"], harness.today(), "activations")
    record = harness.header("activations", "activations", machine, ceilings)
    with torch.no_grad():
        record = harness.run(path, record, planned, options.seconds, functools.partial(measure, ceilings=ceilings))
    print(result_table(record))
    wrong = [entry for found in record["problems"] for entry in found["candidates"].values() if "wrong" in entry]
    return 1 if wrong or not record["problems"] else 0


def _scheme(text: str) -> Scheme:
    parsed = as_scheme(text)
    if parsed.activations is None or parsed.activations.static:
        raise argparse.ArgumentTypeError(f"{text} does not quantize activations as they come")
    return parsed


def operands(problem: Problem, device: str) -> tuple[Tensor, Tensor]:
    """(x, weight of the norm), bfloat16: normal tokens, each of a size of its own."""
    generator = torch.Generator(device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=device)
    x = make(problem.M, problem.K) * make(problem.M, 1).exp2()
    return x.to(products.DTYPE), (1 + 0.1 * make(problem.K)).to(products.DTYPE)


def candidates(problem: Problem, x: Tensor, norm: Tensor) -> dict[str, Callable[[], Quantized | Tensor]]:
    """What is timed; `compiled` where activations are symmetric."""
    scheme, how = problem.scheme, problem.parsed.activations
    assert how is not None

    def normed() -> Tensor:
        return F.rms_norm(x, (problem.K,), norm, EPS)

    found: dict[str, Callable[[], Quantized | Tensor]] = {
        "fused": lambda: ops_int8.quantize_activations(x, scheme, None, norm, EPS),
        "apart": lambda: ops_int8.quantize_activations(normed(), scheme),
        "norm": normed,
        "quantize": lambda: ops_int8.quantize_activations(x, scheme),
    }
    if how.symmetric:
        in_torch = compiled(_norm_and_codes)
        found["compiled"] = lambda: (*in_torch(x, norm), None)
    return found


def _norm_and_codes(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return rows_to_int8(F.rms_norm(x, norm.shape, norm, EPS))


def difference(problem: Problem, x: Tensor, norm: Tensor, found: Quantized) -> str | None:
    """What of codes, scales and zeros, with the norm, is not the oracle's; None if nothing is."""
    scheme, how = problem.parsed, problem.parsed.activations
    assert how is not None
    code, scale, zero = reference_int8.quantize_activations(x, how, None, norm, EPS)
    own = packing.unpack_activations(found[0], scheme.bits, problem.K)
    if not ((found[1] - scale).abs() <= _SCALE_TOLERANCE * scale).all():
        return "scales differ from the oracle's"
    off = (own.int() - code.int()).abs()
    if zero is not None:
        assert found[2] is not None
        moved = (found[2].int() - zero.int()).abs()
        if moved.max() > 1:
            return "zeros differ from the oracle's"
        off = torch.where(moved[:, None] > 0, 0, off)  # all codes of such a token are others
    if off.max() > 1 or (off > 0).float().mean() > _OTHER_CODES:
        return f"{int((off > 0).sum())} codes differ from the oracle's, by up to {int(off.max())}"
    return None


def measure(problem: Problem, ceilings: floors.Ceilings, replays: int = 30) -> harness.Record:
    """Check the fused kernel, then time all candidates, warm and eager."""
    x, norm = operands(problem, harness.DEVICE)
    calls = candidates(problem, x, norm)
    fused = ops_int8.quantize_activations(x, problem.scheme, None, norm, EPS)
    if (reason := difference(problem, x, norm, fused)) is not None:
        return {**dataclasses.asdict(problem), "candidates": {"fused": {"wrong": reason}}}
    timings = {
        "warm": timing.warm(calls, replays),
        "eager": timing.eager({name: [call] for name, call in calls.items()}, max(5, replays // 3)),
    }
    moved = problem.moved_bytes
    entries = {
        name: {
            **{kind: dataclasses.asdict(found[name]) for kind, found in timings.items()},
            "moved_bytes": moved[name],
            "floor_us": floors.bound_us(moved[name], 0, ceilings),
        }
        for name in calls
    }
    return {**dataclasses.asdict(problem), "candidates": entries}


def floor_table(planned: Sequence[Problem], ceilings: floors.Ceilings) -> str:
    """Floors in microseconds of problems."""
    names = list(planned[0].moved_bytes)
    rows = [
        (p.scheme, str(p.K), str(p.M), *(f"{floors.bound_us(p.moved_bytes[name], 0, ceilings):.2f}" for name in names))
        for p in planned
    ]
    title = f"Floors in microseconds: {ceilings.device}, {ceilings.copy / 1e12:.2f} TB/s ({ceilings.source})"
    return tables.text(title, ("scheme", "K", "M", *names), rows)


def result_table(record: harness.Record) -> str:
    """A result file as a table: warm times, what fusing gains over `apart`, and the fused kernel's eager time."""
    names = list(Problem(1, 1, "w8a8").moved_bytes)
    rows: list[tuple[str, ...]] = []
    for problem in record["problems"]:
        found, sizes = problem["candidates"], (problem["scheme"], str(problem["K"]), str(problem["M"]))
        if "wrong" in found["fused"]:
            rows.append((*sizes, f"WRONG: {found['fused']['wrong']}", *[""] * (len(names) + 2)))
            continue
        warm = {name: entry["warm"]["median_us"] for name, entry in found.items()}
        gain = warm["apart"] / warm["fused"]
        eager, floor_us = found["fused"]["eager"]["median_us"], found["fused"]["floor_us"]
        times = (f"{warm[name]:.1f}" if name in warm else "" for name in names)
        rows.append((*sizes, *times, f"{gain:.2f}x", f"{floor_us:.1f}", f"{eager:.1f}"))
    columns = ("scheme", "K", "M", *(f"{name} us" for name in names), "fusing", "floor us", "eager us")
    title = (
        f"{record['machine']['device']}, {record['date']}: {len(record['problems'])} of {record['planned']} problems"
    )
    return tables.text(title, columns, rows)


if __name__ == "__main__":
    sys.exit(main())
