"""The Gluon experiment, as far as it goes without a GPU: what is compiled and refused, what its command reports."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch

from benchmarks import floors, gluon_matmul, harness, static_cost
from benchmarks.compile_only import SHARED_MEMORY_BYTES, _main_loops
from benchmarks.gluon_matmul import VARIANTS, Figures
from qkernels import tune
from qkernels.tune import Operands, Problem
from qkernels.tuning import timing


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Future[Figures]]]:
    with static_cost.compiler(2) as pool:
        yield {name: pool.submit(gluon_matmul.compiled, name) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_machine_code(name: str, figures: dict[str, Future[Figures]]) -> None:
    variant, found = VARIANTS[name], figures[name].result()
    assert found.stack_bytes == 0
    assert found.shared_bytes <= SHARED_MEMORY_BYTES[90] == 227 << 10
    assert found.hgmma == [8 * variant.rows // 64] * 2  # of both consumers
    expected = {1: 8} if variant.across else {1: 7, 0: 1}
    assert [dict(waits) for waits in found.waits] == [expected] * 2
    assert found.touched == [0, 0]
    assert found.unguarded_releases == 0
    assert found.loop_registers <= 240
    assert 2 < found.instructions_per_weight < 4


def test_a_release_without_a_barrier_is_found() -> None:
    arrive = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R164+UR7], RZ"
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80"
    assert gluon_matmul.unguarded_releases(["LDS.64 R2, [R3]", barrier, "MOV R2, R3", arrive]) == 0
    assert gluon_matmul.unguarded_releases([barrier, "LDS.64 R2, [R3]", arrive]) == 1
    assert gluon_matmul.unguarded_releases([barrier, arrive, "WARPGROUP.DEPBAR.LE gsb0, 0x1", arrive]) == 1
    assert gluon_matmul.unguarded_releases([arrive]) == 1


def test_main_loops() -> None:
    code = ["MOV", "HGMMA", "BRA", "MOV", "HGMMA", "MOV", "BRA", "MOV", "BRA", "BRA"]
    # One loop around all; a wait out of line that jumps back into the second loop; one without a product.
    assert _main_loops(code, [(1, 3), (3, 7), (4, 10), (0, 9), (7, 9)]) == [(3, 7), (1, 3)]
    assert _main_loops(["MOV"] * 9, [(1, 3), (3, 7)]) == [(3, 7)]
    assert _main_loops(["MOV"] * 9, []) == []


def _operands(M: int = 4, N: int = 32, K: int = 256) -> dict[str, torch.Tensor]:
    x = torch.zeros(M, K, dtype=torch.bfloat16)
    scale = torch.zeros(K // 128, N, dtype=torch.bfloat16)
    packed = torch.zeros(N, K // 8, dtype=torch.int32)
    return {"x": x, "packed": packed, "scale": scale, "zero": torch.zeros_like(scale, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (_operands(K=192), ValueError, "K must be a multiple of 128, got 192"),
        (_operands(K=0), ValueError, "K must be a multiple of 128, got 0"),
        (_operands(N=24), ValueError, "N must be a multiple of 16, got 24"),
        (_operands(M=0), ValueError, r"at least one token, got shape \(0, 256\)"),
        ({"x": torch.zeros(4, 256)}, TypeError, "x must be bfloat16, got torch.float32"),
        ({"scale": torch.zeros(2, 32)}, TypeError, "scale must be bfloat16, got torch.float32"),
        ({"x": torch.zeros(256, 4, dtype=torch.bfloat16).T}, ValueError, "x must be contiguous"),
        ({"x": torch.zeros(1025, dtype=torch.bfloat16)[1:].view(4, 256)}, ValueError, "multiple of 16 bytes"),
        ({"packed": torch.zeros(32, 33, dtype=torch.int32)}, ValueError, r"packed must be \(32, 32\) int32"),
        ({}, ValueError, "x must be on a GPU of sm_90, got cpu"),
    ],
)
def test_refusals(changed: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gluon_matmul.multiply(**(_operands() | changed), variant=VARIANTS["cross-128x256"])


def test_a_hang_is_told_from_a_wrong_result() -> None:
    def python(code: str) -> Sequence[str]:
        return sys.executable, "-c", code

    assert gluon_matmul.proved(python("print('exact')"), 60) == "exact"
    assert gluon_matmul.proved(python("print('x'); print('7 are wrong'); raise SystemExit(1)"), 60) == "7 are wrong"
    assert gluon_matmul.proved(python("raise RuntimeError('oh')"), 60) == "RuntimeError: oh"
    assert gluon_matmul.proved(python("raise SystemExit(3)"), 60) == "exit status 3"
    assert gluon_matmul.proved(python("while True: pass"), 1) == "hangs: no answer in 1 s"


def _oracle(wrong_at: int | None = None) -> Callable[..., torch.Tensor]:
    calls = []

    def product(operands: Operands, variant: gluon_matmul.Variant) -> torch.Tensor:
        M, K = operands.x.shape
        calls.append(1)
        y = tune.truth(operands, Problem(M, operands.packed.shape[0], K, gluon_matmul.SCHEME, "bfloat16"))
        if len(calls) == wrong_at:
            y[-1, -1] += 1
        return y

    return product


def test_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setattr(gluon_matmul, "PROOFS", ((2, 16, 128), (3, 32, 256)))
    variant = VARIANTS["drain-128x256"]
    monkeypatch.setattr(gluon_matmul, "product", _oracle())
    assert gluon_matmul.prove(variant) is None
    monkeypatch.setattr(gluon_matmul, "product", _oracle(wrong_at=2 * gluon_matmul.REPEATS))  # the very last
    assert gluon_matmul.prove(variant) == "M 3, N 32, K 256, run 19: 1 of 96 results are wrong"


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(calls: dict[str, list[timing.Call]], replays: int) -> dict[str, timing.Timing]:
        for each in calls.values():
            for call in each:
                call()
        return {name: timing.Timing(2.0 + len(name), 1.0, 9.0, replays, len(calls[name])) for name in calls}

    def warm_up(calls: Sequence[timing.Call]) -> None:
        for call in calls:
            call()

    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "warm_up", warm_up)
    monkeypatch.setattr(timing, "capture", lambda calls: None)
    monkeypatch.setattr(timing, "cold", cold)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 4000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gluon_matmul, "FUSED", dataclasses.replace(gluon_matmul.FUSED, block_m=16, block_n=16))
    oracle = _oracle()

    def product(operands: Operands, variant: gluon_matmul.Variant) -> torch.Tensor:
        if not variant.across:
            raise RuntimeError("out of resources")
        return oracle(operands, variant)

    monkeypatch.setattr(gluon_matmul, "product", product)
    problem = Problem(4, 16, 256, gluon_matmul.SCHEME, "bfloat16")
    found = gluon_matmul.measure(problem, ["cross-128x256", "drain-128x256"], floors.GPUS["H200"], 3)
    entries = found["candidates"]
    assert set(entries) == {"cross-128x256", "drain-128x256", "fused", "dequantize", "cublas"}
    assert entries["drain-128x256"] == {"failed": "RuntimeError: out of resources"}
    assert entries["cublas"]["floor_us"] > entries["fused"]["floor_us"] > 0
    record = {"machine": {"device": "test"}, "date": "today", "problems": [found]}
    last = gluon_matmul.result_table(record).splitlines()[-1]
    words = re.split(r"\s{2,}", last.strip())
    assert words == ["4", "16", "256", "15.0", "not proved", "failed", "7.0", "12.0", "8.0", "0.80x"]


def test_what_hangs_is_reported_and_not_timed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def proved(command: Sequence[str], seconds: float) -> str:
        return "hangs: no answer in 7 s" if command[-1] == "cross-256x128" else "exact"

    def measure(problem: Problem, variants: Sequence[str], **rest: object) -> harness.Record:
        entries = {name: {"cold": {"median_us": 9.0}, "eta": 0.5} for name in (*variants, "cublas")}
        return {**dataclasses.asdict(problem), "candidates": entries}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(harness, "machine", lambda commit: {"device": "Test GPU"})
    monkeypatch.setattr(harness, "ceilings", lambda: floors.GPUS["H200"])
    monkeypatch.setattr(gluon_matmul, "proved", proved)
    monkeypatch.setattr(gluon_matmul, "measure", measure)
    assert gluon_matmul.main(["--out", str(tmp_path)]) == 1
    assert "cross-256x128: hangs: no answer in 7 s" in capsys.readouterr().out
    (path,) = tmp_path.glob("test-gpu/*-gluon.json")
    record = json.loads(path.read_text())
    assert record["finished"]
    assert len(record["problems"]) == 12
    assert set(record["problems"][0]["candidates"]) == {"cross-128x256", "drain-128x256", "cublas"}
    monkeypatch.setattr(gluon_matmul, "proved", lambda *_: "exact")
    assert gluon_matmul.main(["--out", str(tmp_path)]) == 0


def test_no_proof_without_the_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gluon_matmul.main(["--prove", "cross-128x256"])
    assert "--prove needs a GPU of sm_90" in capsys.readouterr().err
