"""Exact products at random: shapes, schemes, dtypes and configurations, for as long as there is time.

    python -m benchmarks.stress --seconds 120 --out stress.json

Every partial sum of these products is exact, so results must be the very bits of float64 arithmetic, however they are
tiled, split, pipelined or multiplied: what a compiler or a race gets wrong shows. A third quantize x, to codes that
stand for it exactly, and multiply codes, by this package or by torch. Each product runs several times. Half of the
configurations have 4 or 8 warps, where Hopper multiplies by wgmma with weights in registers, whose
synchronization has been miscompiled before. The exit status is 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import random
import sys
import time
from typing import Any

import torch

from benchmarks import harness
from qkernels import tune
from qkernels.scheme import ACTIVATION_BITS, Scheme
from qkernels.tuning import choose, tables
from qkernels.tuning.candidates import Config, Problem
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import device_of

SUFFIXES = ("", "", "s", "f")
INT8_SHARE = 1 / 3
GROUPS = ("g128", "g128", "g64", "g32", "g16", "g48", "g256", "c", "t")


def random_problem(generator: random.Random, largest: int) -> Problem:
    """Sides up to `largest`, K at least 16; often just around a tile or a block."""

    def side(least: int) -> int:
        size = generator.randint(least, max(least, largest))
        return max(least, size // 128 * 128 + generator.choice((-1, 0, 0, 1, 16))) if generator.random() < 0.5 else size

    int8 = generator.random() < INT8_SHARE
    bits = generator.choice(ACTIVATION_BITS) if int8 else generator.randint(1, 8)
    suffix = generator.choice(("", "s") if int8 else SUFFIXES if bits > 1 else ("", "f"))
    dtype = generator.choice(("bfloat16", "float16"))
    scales = {"bfloat16": "-bf16", "float16": ""}[dtype] if generator.random() < 0.5 else ""
    activations = generator.choice(("-a8", "-a8s")) if int8 else ""
    scheme = f"w{bits}{generator.choice(GROUPS)}{suffix}{scales}{activations}"
    tokens = generator.choice((1, 3, 8, 16, 17, 33, 64, 100, 128, 255))
    in_features = side(16)
    if int8 and generator.random() < 0.2:  # what torch multiplies, too
        scheme, in_features = f"w8{generator.choice('ct')}s{scales}-a8s", -(-in_features // 64) * 64
    return Problem(min(tokens, largest), side(1), in_features, str(Scheme.parse(scheme)), dtype)


def random_config(generator: random.Random, problem: Problem) -> Config:
    """Any that the kernel takes, or what would be launched; of codes also torch's product, where it is possible."""
    given = problem.parsed, problem.torch_dtype, problem.tokens, problem.in_features
    int8 = problem.parsed.activations is not None
    dense = DenseConfig(rows=generator.choice((16, 40, 256, problem.out_features)))
    if int8 and tables.fits(dense, *given) and generator.random() < 0.5:
        return dense
    if generator.random() < 0.2:
        size = problem.tokens, problem.out_features, problem.in_features
        return choose.fused(*size, problem.parsed, problem.torch_dtype, device_of(-1))
    num_warps = generator.choice((1, 2, 4, 4, 8))
    block_n = max(16 * num_warps, generator.choice((32, 64, 128)))
    config = MatmulConfig(
        block_m=generator.choice((8, 16, 32, 64, 128, 256) if int8 else (8, 16, 32, 64, 128)),
        block_n=block_n,
        blocks=generator.choice((1, 1, 2)),
        splits=generator.choice((1, 1, 2, 3, 7, 16)),
        num_warps=num_warps,
        num_stages=generator.choice((2, 3, 3, 4)),
        max_registers=min(255, 65536 // (32 * num_warps)),
        scale_weights=generator.random() < 0.5,
    )
    if not tables.fits(config, *given):
        config = dataclasses.replace(config, scale_weights=False)
    return config


def run(seconds: float, seed: int, device: str, largest: int, out: pathlib.Path | None = None) -> dict[str, Any]:
    """Products until the time is up; what was wrong, what could not be launched, and counts by warps, or torch's."""
    generator = random.Random(seed)
    start = time.perf_counter()
    right: collections.Counter[str] = collections.Counter()
    wrong: list[dict[str, Any]] = []
    impossible: collections.Counter[str] = collections.Counter()
    while time.perf_counter() - start < seconds:
        problem = random_problem(generator, largest)
        operands = tune.exact_operands(problem, device, generator.randrange(2**31))
        wanted = tune.truth(operands, problem)
        for config in [random_config(generator, problem) for _ in range(3)]:
            why = tune.refusal(operands, wanted, problem, config)
            if why is None:
                right[str(config.num_warps) if isinstance(config, MatmulConfig) else "torch"] += 1
            elif "wrong" in why:
                wrong.append({"problem": dataclasses.asdict(problem), "config": dataclasses.asdict(config), "why": why})
            else:
                impossible[why.split(":")[0]] += 1
        found = {"seed": seed, "right": dict(right), "wrong": wrong, "impossible": dict(impossible)}
        if out is not None and (wrong or sum(right.values()) % 30 < 3):
            harness.write(out, found)
    if out is not None:
        harness.write(out, found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; the exit status is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=2100, help="side of a weight, and number of tokens")
    parser.add_argument("--out", type=pathlib.Path, help="a file for what was found")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: tests/test_kernels.py runs the same products in Triton's interpreter")
        return 2
    found = run(options.seconds, options.seed, "cuda", options.largest, options.out)
    print(f"right: {found['right']}  could not be launched: {found['impossible']}  WRONG: {len(found['wrong'])}")
    for case in found["wrong"][:10]:
        print(case)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
