"""Benchmarks: what is pure, and on a stand-in for a GPU what happens to its times. On a GPU: graphs and providers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels
from benchmarks import floors, harness, matmul, plot, products, providers, readme
from benchmarks import quantize as benchmark_quantize
from benchmarks.products import Problem
from benchmarks.providers import PROVIDERS
from qkernels.scheme import Scheme
from qkernels.tuning import problems, timing
from tests import fake_gpu
from tests.fake_gpu import CEILINGS, FakeClock, FakeGpu, machine

H200 = floors.GPUS["H200"]

# ---- floors and shapes ----


@pytest.mark.parametrize(
    ("N", "K", "wanted"),
    [
        (4096, 4096, (2.1, 4.0, 7.8)),
        (28672, 4096, (14.5, 28.2, 54.6)),
        (4096, 14336, (7.3, 14.1, 27.3)),
        (8192, 8192, (8.3, 16.1, 31.2)),
        (57344, 8192, (58.1, 112.7, 218.5)),
    ],
)
def test_floors_of_one_token(N: int, K: int, wanted: tuple[float, ...]) -> None:
    """Worked out by hand with 16-bit scales and offsets, 4.3 TB/s and 790 TFLOP/s."""
    kinds = (Scheme.parse("w4g128f"), Scheme.parse("w8g128f"), None)
    assert tuple(round(floors.floor_us(1, N, K, kind, H200), 1) for kind in kinds) == wanted


def test_floors_of_many_tokens_are_those_of_arithmetic() -> None:
    found = {floors.floor_us(512, 4096, 4096, kind, H200) for kind in (Scheme.parse("w4g128"), None)}
    assert found == {2 * 512 * 4096 * 4096 / 790e12 * 1e6}


@pytest.mark.parametrize("scheme", ["w4g128", "w3g64f", "w8cs", "w5ts", "w2g48-fp32", "w7c"])
def test_weight_bytes_are_those_of_a_weight(scheme: str) -> None:
    for N, K in ((7, 80), (16, 1000), (3, 2048)):
        q = qkernels.quantize(torch.randn(N, K), scheme)
        assert floors.weight_bytes(N, K, q.scheme) == q.nbytes
    assert floors.weight_bytes(3, 5, None) == 30


def test_shapes_of_models() -> None:
    weights = {
        name: sum(layer.count * layer.weights for layer in layers) / 1e9 for name, layers in problems.MODELS.items()
    }
    # Published sizes, less embeddings and lm_head; of the mixture, what one token passes through.
    assert round(weights["Llama-3-8B"], 2) == 6.98
    assert round(weights["Llama-3-70B"], 2) == 68.45
    assert round(weights["Qwen2.5-7B"], 2) == 6.53
    assert round(weights["Qwen2.5-32B"], 2) == 31.21
    assert 2.0 < weights["DeepSeek-V2-Lite"] < 2.7
    assert tuple(2**i for i in range(14)) == problems.TOKENS
    for layers in problems.MODELS.values():
        assert len({layer.name for layer in layers}) == len(layers)


# ---- timing: pure parts ----


def test_weight_sets_cover_three_times_the_cache() -> None:
    assert timing.weight_sets(8_781_824) == 21
    assert timing.weight_sets(180_000_000) == 1
    assert timing.weight_sets(180_000_001) == 1
    assert timing.weight_sets(10, l2_bytes=7) == 3
    assert timing.weight_sets(10, l2_bytes=7, memory_bytes=30) == 3
    with pytest.raises(ValueError, match="memory_bytes is 29"):
        timing.weight_sets(10, l2_bytes=7, memory_bytes=29)
    with pytest.raises(ValueError, match="call_bytes"):
        timing.weight_sets(0)


def test_passes_make_a_replay_long_enough() -> None:
    assert [timing.passes(us) for us in (0.0, 1.0, 40.0, 399.0, 400.0, 1e6)] == [100, 100, 10, 2, 1, 1]


def test_every_candidate_has_a_turn_in_every_round() -> None:
    names = ["a", "b", "c", "d"]
    rounds = timing.turns(names, 50, seed=1)
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 12  # of 24 orders
    firsts = [order[0] for order in rounds]
    assert all(firsts.count(name) > 3 for name in names)
    assert timing.turns(names, 50, seed=1) == rounds != timing.turns(names, 50, seed=2)


def test_interval_of_a_median() -> None:
    generator = torch.Generator().manual_seed(5)
    samples = (10 + torch.randn(400, generator=generator)).tolist()
    median, low, high = timing.median_interval(samples)
    assert median == pytest.approx(torch.tensor(samples, dtype=torch.float64).quantile(0.5).item())
    # The standard error of a median of n normal values is 1.2533 / sqrt(n); an interval of 95 % is 3.92 of them wide.
    assert 0.5 < (high - low) / (3.92 * 1.2533 / 20) < 1.5
    assert low <= median <= high
    few_low, few_high = timing.median_interval(samples[:20])[1:]
    assert few_high - few_low > 2 * (high - low)
    assert timing.median_interval(samples, confidence=0.5)[2] < high
    assert timing.median_interval([3.0]) == (3.0, 3.0, 3.0)
    assert timing.median_interval([1.0, 1.0, 1.0, 1.0, 50.0])[0] == 1.0
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite and at least one"):
            timing.median_interval(bad)


def test_interleaved_times_belong_to_their_candidates() -> None:
    clock = FakeClock()
    found = timing.interleave({"a": clock.work("a", 3), "b": clock.work("b", 5)}, clock, rounds=2, seed=0)
    assert found == {"a": [3, 3], "b": [5, 5]}
    one = ["mark", "x", "mark"]
    shape = ["x" if entry in "ab" else entry for entry in clock.log]
    assert shape == ["hold", *one, *one, "wait"] * 2
    assert [entry for entry in clock.log if entry in "ab"] == [n for o in timing.turns(["a", "b"], 2, 0) for n in o]


def test_unmeasured_replays_are_not_measured() -> None:
    clock = FakeClock()
    assert timing.interleave({"a": clock.work("a", 3)}, clock, rounds=1, seed=0, unmeasured=2) == {"a": [3]}
    assert clock.log == ["hold", "a", "a", "mark", "a", "mark", "wait"]


def test_eager_replays_start_on_an_idle_device() -> None:
    clock = FakeClock()
    timing.interleave({"a": clock.work("a", 3)}, clock, rounds=1, seed=0, apart=True)
    assert clock.log == ["wait", "mark", "a", "mark", "wait"]


# ---- a stand-in for a GPU ----


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


def test_times_are_of_one_call(gpu: FakeGpu) -> None:
    calls: list[timing.Call] = [lambda: None] * 21
    found = timing.cold({"a": calls, "b": calls[:1]}, replays=30)
    # 21 calls of 4 us, 5 times over; one call of 4 us, 58 times over
    assert gpu.captured == [(21, 1), (21, 5), (1, 1), (1, 58)]
    assert found["a"].median_us == pytest.approx(4 + 3 / (21 * 5))
    assert found["b"].median_us == pytest.approx(4 + 3 / 58)
    assert (found["a"].replays, found["a"].sets, found["b"].sets) == (30, 21, 1)
    assert found["a"].low_us == found["a"].high_us
    with pytest.raises(ValueError, match="'c' has no calls"):
        timing.cold({"c": []})


def test_warm_times_follow_a_replay_of_the_same(gpu: FakeGpu) -> None:
    (found,) = timing.warm({"a": lambda: None}, replays=7).values()
    assert found.median_us == pytest.approx(4 + 3 / 58)
    assert gpu.log[-5:] == ["replay", "mark", "replay", "mark", "wait"]
    assert found.replays == 7


def test_eager_times_are_of_twenty_calls_or_more(gpu: FakeGpu) -> None:
    short, long = gpu.work("short", 2.0), gpu.work("long", 1000.0)
    found = timing.eager({"short": [short] * 3, "long": [long] * 2}, replays=5)
    assert found["short"].median_us == 2.0
    assert found["long"].median_us == 1000.0
    assert gpu.log.count("short") == 3 + 3 + 5 * 21  # warmed up, tried, timed
    assert gpu.log.count("long") == 2 + 2 + 5 * 2


SMALL = Problem(3, 64, 256, "w4g64", "m", "l")  # about 10 kB in 4 bits: at 100 GB/s about 0.1 us, 0.05 us read


class Broken(providers.QKernels):
    """Answers wrongly."""

    name = "broken"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> products.Prepared:
        found = super().prepare(problem, seed, device)
        return dataclasses.replace(found, call=lambda x: found.call(x) * 1.1)


class Failing(providers.QKernels):
    """Does not answer."""

    name = "failing"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> products.Prepared:
        raise RuntimeError("no kernel image")


def test_one_problem_with_every_kind_of_provider(gpu: FakeGpu) -> None:
    chosen = [PROVIDERS["cublas"], PROVIDERS["qkernels"], Broken(), Failing(), PROVIDERS["int_mm"]]
    found = harness.measure(SMALL, chosen, CEILINGS, harness.WeightSets(), replays=9)
    entries = found["providers"]
    assert (found["M"], found["layer"], list(entries)) == (3, "l", [p.name for p in chosen])
    assert entries["int_mm"] == {"skipped": "w8cs, and 8-bit activations, only"}
    assert entries["failing"] == {"failed": "RuntimeError: no kernel image"}
    assert list(entries["broken"]) == ["wrong"]
    ours = entries["qkernels"]
    moved = floors.traffic_bytes(3, 64, 256, Scheme.parse("w4g64"))
    assert ours["moved_bytes"] == moved
    assert ours["floor_us"] == pytest.approx(moved / 1e11 * 1e6)
    assert ours["eta"] == pytest.approx(ours["floor_us"] / ours["cold"]["median_us"])
    assert ours["cold"]["sets"] == timing.weight_sets(moved, 100_000)
    assert (ours["cold"]["replays"], ours["warm"]["replays"]) == (9, 5)
    dense_sets = timing.weight_sets(floors.traffic_bytes(3, 64, 256, None), 100_000)
    assert entries["cublas"]["cold"]["sets"] == dense_sets
    assert ours["speed_up"] == pytest.approx(entries["cublas"]["cold"]["median_us"] / ours["cold"]["median_us"])
    json.dumps(found, allow_nan=False)


def test_a_time_below_the_floor_is_refused(gpu: FakeGpu) -> None:
    gpu.call_us = lambda call: 0.01
    entry = harness.measure(SMALL, [PROVIDERS["cublas"]], CEILINGS, harness.WeightSets())["providers"]["cublas"]
    assert "refused" in entry["contaminated"]
    assert "eta" not in entry
    assert "speed_up" not in entry
    # below the floor of copying, but not below that of reading, which is twice as fast here
    gpu.call_us = lambda call: 0.25
    entry = harness.measure(SMALL, [PROVIDERS["cublas"]], CEILINGS, harness.WeightSets(), 5)["providers"]["cublas"]
    assert 0.17 < entry["cold"]["median_us"] < 0.3 < entry["floor_us"]
    assert entry["eta"] > 1
    assert harness.judge(8.0, 10.0, 5.0) == {"eta": 1.25}
    assert "contaminated" in harness.judge(8.0, 10.0, 10.0)
    assert harness.judge(9.8, 10.0, 10.0) == {"eta": pytest.approx(1.02, abs=0.01)}  # within what ceilings are known to


def test_too_little_memory_for_all_at_once(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(timing, "cold", cold)
    chosen = [PROVIDERS["cublas"], PROVIDERS["int_mm"]]
    entries = harness.measure(SMALL, chosen, CEILINGS, harness.WeightSets())["providers"]
    assert entries["cublas"] == {"failed": "with all providers at once: OutOfMemoryError: no room"}
    assert entries["int_mm"] == {"skipped": "w8cs, and 8-bit activations, only"}


def test_no_speed_up_over_a_refused_baseline() -> None:
    good: dict[str, Any] = {"cold": {"median_us": 2.0}, "eta": 0.5}
    entries = {"cublas": {"cold": {"median_us": 1.0}, "contaminated": "x"}, "qkernels": dict(good)}
    harness.add_speed_ups(entries)
    assert "speed_up" not in entries["qkernels"]
    entries["cublas"] = {"cold": {"median_us": 8.0}, "eta": 0.5}
    harness.add_speed_ups(entries)
    assert entries["qkernels"]["speed_up"] == 4.0


def test_weight_sets_are_kept_for_the_same_weight_only() -> None:
    made: list[int] = []

    class Counting(products.Provider):
        name = "counting"

        def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> products.Prepared:
            made.append(seed)
            return products.Prepared(lambda x: x, lambda: torch.empty(0), 1)

    sets, provider = harness.WeightSets(), Counting()
    first = sets.get(provider, SMALL, 2)
    assert sets.get(provider, dataclasses.replace(SMALL, M=7), 3)[:2] == first
    assert made == [0, 1, 2]
    sets.get(provider, dataclasses.replace(SMALL, N=128), 1)
    sets.get(provider, SMALL, 1)
    assert made == [0, 1, 2, 0, 0]


# ---- providers ----


def _represents(prepared: products.Prepared, problem: Problem, seed: int, device: str) -> bool:
    """Whether a provider's weight is the float weight, but for rounding: a check of its own product cannot tell."""
    w = products.float_weight(problem, seed, device).float()
    return float((prepared.weight() - w).norm() / w.norm()) < 2.0 ** (3 - problem.parsed.bits)


ON_CPU = ("cublas", "qkernels", "qkernels-dequantize", "tinygemm", "int_mm")


def test_every_provider_that_runs_on_a_cpu_is_right() -> None:
    ran = set()
    for scheme in ("w4g128", "w4g32s", "w4g64f", "w8cs", "w3g64"):
        for M in (1, 33):
            problem = Problem(M, 80, 384, scheme)
            for name in ON_CPU:
                if PROVIDERS[name].supports(problem) is None:
                    prepared = PROVIDERS[name].prepare(problem, 1, "cpu")
                    x = products.activations(problem, "cpu")
                    assert products.check(prepared, x) is None, (name, scheme, M)
                    assert _represents(prepared, problem, 1, "cpu"), (name, scheme)
                    ran.add(name)
    assert ran == set(ON_CPU)


def _spoiled(spoil: Callable[[Tensor], Tensor]) -> str | None:
    problem, provider = Problem(40, 72, 384, "w4g64"), PROVIDERS["qkernels"]
    prepared = provider.prepare(problem, 0, "cpu")
    wrong = dataclasses.replace(prepared, call=lambda x: spoil(prepared.call(x)))
    return products.check(wrong, products.activations(problem, "cpu"))


def test_wrong_products_are_found() -> None:
    def zero(y: Tensor) -> Tensor:
        y[39, 71] = 0
        return y

    def nan(y: Tensor) -> Tensor:
        y[0, 3] = float("nan")
        return y

    assert _spoiled(lambda y: y) is None
    assert "at (39, 71)" in str(_spoiled(zero))
    assert "NaN" in str(_spoiled(nan))
    assert "float32" in str(_spoiled(lambda y: y.float()))
    assert "(40, 71)" in str(_spoiled(lambda y: y[:, :71]))


def test_one_wrong_scale_is_found() -> None:
    problem, provider = Problem(16, 64, 512, "w4g16"), PROVIDERS["qkernels"]
    q = qkernels.quantize(products.float_weight(problem, 0, "cpu"), problem.scheme)
    scale = q.scale.clone()
    scale[5, 7] = scale[6, 7] * 1.5
    other = dataclasses.replace(q, scale=scale)
    prepared = provider.prepare(problem, 0, "cpu")
    wrong = dataclasses.replace(prepared, call=lambda x: torch.nn.functional.linear(x, other))  # type: ignore[arg-type]
    assert "is off by" in str(products.check(wrong, products.activations(problem, "cpu")))


def test_products_of_the_float_weight_are_held_to_their_mean() -> None:
    problem, provider = Problem(16, 64, 512, "w4g128"), PROVIDERS["qkernels"]
    prepared, w = provider.prepare(problem, 0, "cpu"), products.float_weight(problem, 0, "cpu")
    x = products.activations(problem, "cpu")
    against_float = dataclasses.replace(prepared, weight=w.float, own=False)
    assert products.check(against_float, x) is None
    scaled = dataclasses.replace(against_float, call=lambda x: prepared.call(x) * 1.3)
    assert "on average" in str(products.check(scaled, x))


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("tinygemm", Problem(1, 64, 512, "w3g128"), "4 bits"),
        ("tinygemm", Problem(1, 64, 512, "w4c"), "groups"),
        ("tinygemm", Problem(1, 64, 192, "w4g64"), "multiple of 128"),
        ("tinygemm", Problem(1, 60, 512, "w4g64"), "N of 8"),
        ("int_mm", Problem(16, 64, 512, "w8cs"), "more than 16"),
        ("int_mm", Problem(17, 60, 512, "w8cs"), "multiples of 8"),
        ("gemlite", Problem(1, 64, 512, "w3g64"), "1, 2, 4 or 8 bits"),
        ("bitsandbytes", Problem(1, 64, 512, "w8g64"), "4 bits"),
        ("torchao", Problem(1, 64, 512, "w2g64"), "only"),
        ("torchao", Problem(1, 64, 576, "w4g128"), "multiple of the group"),
    ],
)
def test_what_a_provider_does_not_support(name: str, problem: Problem, reason: str) -> None:
    assert reason in str(PROVIDERS[name].supports(problem))


def test_packages_that_are_missing_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert "ModuleNotFoundError" in str(products.missing("no_such_package_of_kernels"))
    (tmp_path / "fails_without_a_gpu.py").write_text("raise AssertionError('no CUDA\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    assert products.missing("fails_without_a_gpu") == "import fails_without_a_gpu: AssertionError: no CUDA"
    monkeypatch.setattr(providers, "missing", lambda package: f"{package} is away")
    problem = Problem(1, 64, 512, "w4g64")
    reasons = [str(PROVIDERS[name].supports(problem)) for name in ("gemlite", "bitsandbytes", "torchao")]
    assert reasons == ["gemlite is away", "bitsandbytes is away", "torchao.quantization is away"]


def test_quantizing_is_compared_with_the_oracle() -> None:
    for scheme in ("w4g128", "w8cs", "w3g64f"):
        problem = Problem(1, 200, 512, scheme)
        w = products.float_weight(problem, 0, "cpu")
        q = qkernels.quantize(w, scheme)
        assert benchmark_quantize.difference(w, (q.packed, q.scale, q.zero), q.scheme) is None
        q.packed[199, 3] ^= 1
        assert "packed of rows 136 to 200" in str(
            benchmark_quantize.difference(w, (q.packed, q.scale, q.zero), q.scheme)
        )


# ---- suites and result files ----


def test_the_most_telling_problems_come_first() -> None:
    found = harness.most_informative_first(
        ["Llama-3-8B", "squares"], ["w4g128", "w8cs-fp16"], (1, 4, 16), first=(1, 16)
    )
    assert len(found) == len(set(found)) == (4 + 4) * 2 * 3
    assert {(p.model, p.scheme, p.M) for p in found[:8]} == {("Llama-3-8B", "w4g128", M) for M in (1, 16)}
    assert {p.scheme for p in found} == {"w4g128", "w8cs"}
    changes = sum((a.N, a.K, a.scheme) != (b.N, b.K, b.scheme) for a, b in itertools.pairwise(found))
    assert changes < 4 + 2 * 8  # weights are prepared once per stage
    with pytest.raises(ValueError, match=r"model 'GPT' is not known; models: Llama-3-8B"):
        harness.most_informative_first(["GPT"], ["w4g128"], [1], [1])
    with pytest.raises(ValueError, match="not a scheme"):
        harness.most_informative_first(["squares"], ["int4"], [1], [1])


def test_a_run_stops_in_time_and_has_written_what_it_did(tmp_path: pathlib.Path) -> None:
    path, now = tmp_path / "gpu/r.json", [0.0]
    on_disk: list[int] = []

    def measure(item: int) -> harness.Record:
        on_disk.append(len(json.loads(path.read_text())["problems"]) if path.exists() else 0)
        now[0] += item
        return {"item": item}

    record = harness.run(path, {"kind": "matmul"}, [3, 3, 2, 3, 1], 10.0, measure, now=lambda: now[0])
    assert [entry["item"] for entry in record["problems"]] == [3, 3, 2]  # the next may take 3 of the 2 that are left
    assert on_disk == [0, 1, 2]
    assert json.loads(path.read_text()) == record
    assert (record["finished"], record["planned"], record["seconds"], record["kind"]) == (False, 5, 8.0, "matmul")
    assert harness.run(path, {}, [1], 10.0, measure, now=lambda: now[0])["finished"] is True


def test_a_result_file_is_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    harness.write(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        harness.write(path, {"a": float("nan")})

    def fail(source: Any, target: Any) -> None:
        assert json.loads(pathlib.Path(source).read_text()) == {"a": 2}
        assert json.loads(path.read_text()) == {"a": 1}
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        harness.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_result_files_never_replace_those_of_another_run(tmp_path: pathlib.Path) -> None:
    first = harness.result_path(tmp_path, "NVIDIA H200", "2026-01-02", "quick")
    assert first == tmp_path / "nvidia-h200/2026-01-02-quick.json"
    harness.write(first, {})
    second = harness.result_path(tmp_path, "NVIDIA H200", "2026-01-02", "quick")
    assert second.name == "2026-01-02-quick-2.json"


def test_the_newest_result_file(tmp_path: pathlib.Path) -> None:
    assert harness.newest("matmul", tmp_path) is None
    for name, record in {
        "a/1.json": {"kind": "matmul", "date": "2026-01-02", "problems": [1]},
        "b/2.json": {"kind": "matmul", "date": "2026-01-03", "problems": [1, 2]},
        "b/3.json": {"kind": "matmul", "date": "2026-01-03", "problems": [1]},
        "b/4.json": {"kind": "matmul", "date": "2026-01-04", "problems": []},
        "b/5.json": {"kind": "model", "date": "2026-01-05", "variants": [1]},
        "b/7.json": {"kind": "model", "date": "2026-01-05", "variants": [1, 2]},
        "b/8.json": {"kind": "model", "date": "2026-01-06", "check": {}},
    }.items():
        harness.write(tmp_path / name, record)
    (tmp_path / "b/6.json").write_text("[1]")
    assert harness.newest("matmul", tmp_path) == tmp_path / "b/2.json"
    assert harness.newest("model", tmp_path) == tmp_path / "b/7.json"
    assert harness.newest("energy", tmp_path) is None


def test_the_machine_is_described_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert harness.driver_and_clocks("") == dict.fromkeys(harness._SMI_FIELDS)


def test_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "580.1, 345, 1980, 3201, 700.00"; echo "$@" > "$0.args"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = harness.driver_and_clocks("12-34")
    assert (found["driver"], found["max_sm_clock_mhz"], found["power_limit_w"]) == ("580.1", "1980", "700.00")
    assert "-i GPU-12-34" in (tmp_path / "nvidia-smi.args").read_text()


# ---- the command ----


@pytest.fixture
def results(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A result file, of a run of the command on the stand-in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "machine", lambda code: machine())
    monkeypatch.setattr(harness, "ceilings", lambda: dataclasses.replace(CEILINGS, copy=1e13))
    layers = (problems.Layer("qkv", 64, 256), problems.Layer("down", 128, 512))
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", layers)
    gpu.call_us = lambda call: 4.0 if "cublas" not in call.func.__qualname__.lower() else 12.0
    wanted = ["--schemes", "w4g128", "w8cs", "--tokens", "1", "16", "--replays", "4"]
    done = matmul.main([*wanted, "--seconds", "1000", "--out", str(tmp_path)])  # however busy this machine is
    assert done == 0
    (path,) = tmp_path.glob("*/*.json")
    return path


def test_a_run_on_a_gpu(results: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(results.read_text())
    assert results.parent.name == "nvidia-imaginary"
    assert (record["kind"], record["suite"], record["finished"], record["planned"]) == ("matmul", "quick", True, 8)
    assert record["ceilings"]["copy"] == 1e13
    for problem in record["problems"]:
        ours = problem["providers"]["qkernels"]
        assert ours["speed_up"] == pytest.approx(3, rel=0.05)
        assert {"cold", "warm", "eager", "eta", "floor_us"} <= set(ours)
    printed = matmul.result_tables(record)
    assert "Llama-3-8B, w4g128" in printed
    assert "skipped: int_mm: w8cs, and 8-bit activations, only" in printed
    assert matmul.line(record["problems"][0]).startswith("Llama-3-8B qkv w4g128 M=1: cublas 12.")


def test_wrong_products_fail_the_command(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "machine", lambda code: machine())
    monkeypatch.setattr(harness, "ceilings", lambda: CEILINGS)
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", (problems.Layer("qkv", 64, 256),))
    monkeypatch.setitem(PROVIDERS, "qkernels", Broken())
    command = ["--schemes", "w4g128", "--tokens", "1", "--providers", "cublas", "qkernels", "--out", str(tmp_path)]
    assert matmul.main(command) == 1
    assert "M=1 N=64 K=256 w4g128 broken: wrong: is off by" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert matmul.main(["--suite", "full", "--no-compile", "--out", str(tmp_path), "--gpu", "L4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("There is no GPU here, so nothing is timed.")
    assert "L4, 0.30 TB/s and 121 TFLOP/s bfloat16 (datasheet)" in printed
    for name, layers in problems.MODELS.items():
        assert f"\n{name}\n" in printed
        assert all(layer.name in printed for layer in layers)
    assert list(tmp_path.iterdir()) == []
    assert benchmark_quantize.main(["--out", str(tmp_path)]) == 0
    assert "14.8" in capsys.readouterr().out  # 6144 x 4096: read in bfloat16, written in 4.1875 bits, at 4.3 TB/s
    with pytest.raises(SystemExit):
        benchmark_quantize.main(["--schemes", "w8ts"])


def test_floor_rows_add_up_to_a_token() -> None:
    rows = matmul.floor_rows("Llama-3-8B", ["w4g128"], [1, 2], H200)
    assert [row[0] for row in rows] == [
        "qkv",
        "o",
        "gate_up",
        "down",
        "all of a token's",
        "qkv",
        "o",
        "gate_up",
        "down",
    ]
    layers = problems.MODELS["Llama-3-8B"]
    total = 32 * sum(floors.floor_us(1, layer.N, layer.K, None, H200) for layer in layers)
    assert rows[4][-1] == f"{total:.0f}"


@pytest.mark.slow
def test_static_costs_without_a_gpu() -> None:
    suite = dataclasses.replace(matmul.SUITES["quick"], schemes=("w4g128",), tokens=(16,))
    (row,) = matmul.static_table(suite, "L4").splitlines()[-1:]
    scheme, tokens, registers, _, _, instructions = row.split()
    assert (scheme, tokens) == ("w4g128", "16")
    assert 0 < int(registers) <= 255
    assert 0.5 < float(instructions) < 20


# ---- README and pictures ----

EMPTY = "text\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nmore\n"


def test_the_readme_has_floors_until_there_is_a_result() -> None:
    found = readme.with_speed(EMPTY, None)
    assert found.startswith("text\n<!-- speed:begin -->\nNo result file from a GPU yet.")
    assert found.endswith("<!-- speed:end -->\nmore\n")
    assert "old" not in found
    assert "| o | 4096 | 4096 | 1 | 2.0 |" in found
    assert readme.with_speed(found, None) == found
    with pytest.raises(ValueError, match="no line <!-- speed:begin -->"):
        readme.with_speed("nothing", None)


def test_the_readme_has_the_newest_result(
    results: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    pictures = list(plot.draw(json.loads(results.read_text()), results))
    found = readme.with_speed(EMPTY, results)
    assert "No result file" not in found
    assert "| layer | N | K | M | qkernels, us | cublas, us | qkernels-dequantize, us | tinygemm, us |" in found
    assert "| qkv | 64 | 256 | 1 | 4.0 | 12.1 | 4.0 | 4.0 |" in found
    assert "NVIDIA Imaginary, driver 1.2, torch 9.9, Triton 8.8, commit 012345678+" in found
    shown = [picture for picture in pictures if picture.name in found]
    assert len(shown) == 2
    assert all("w4g128" in picture.name for picture in shown)
    (tmp_path / "README.md").write_text(
        f"<!-- demo:begin -->\n<!-- demo:end -->\n<!-- static:begin -->\n<!-- static:end -->\n"
        f"<!-- accuracy:begin -->\n<!-- accuracy:end -->\n<!-- activations:begin -->\n<!-- activations:end -->\n{EMPTY}"
    )
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(harness, "newest", {"matmul": results}.get)
    assert readme.main([]) == 0
    written = (tmp_path / "README.md").read_text()
    assert "NVIDIA Imaginary" in written
    assert "| w8ts |" in written  # the demo's


@pytest.mark.parametrize("with_gpu", [True, False])
def test_the_notebook_of_speed_shows_what_there_is(
    with_gpu: bool, results: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells, with the result file and the stand-in for a GPU, or without both."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(harness, "machine", machine)
    monkeypatch.setattr(harness, "newest", ({"matmul": results} if with_gpu else {}).get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    monkeypatch.setattr(harness, "measure", functools.partial(harness.measure, replays=1))
    layers = (problems.Layer("o", 64, 256), problems.Layer("gate_up", 1024, 1024))
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", layers)
    beside = [*plot.draw(json.loads(results.read_text()), results), results]
    cells = json.loads((harness.ROOT / "notebooks/04_speed.ipynb").read_text())["cells"]
    shown: list[Any] = []
    names: dict[str, Any] = {"display": shown.append}
    capsys.readouterr()
    with pyplot.rc_context():
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    tables = [item.data for item in shown if type(item).__name__ == "Markdown"]
    pictures = [item for item in shown if type(item).__name__ == "Image"]
    assert ("no kernel of this library has been timed" in printed) == (not with_gpu)
    assert ("There is no GPU here: nothing is timed." in printed) == (not with_gpu)
    assert "energy: no result file" in printed
    if with_gpu:
        assert "matmul: nvidia-imaginary" in printed
        assert "Llama-3-8B gate_up w4g128 M=128: cublas 12." in printed
        assert len(tables) == 2  # of the file, and of what was measured on the spot
        assert "| qkv | 64 | 256 | 1 | 4.0 | 12.1 |" in tables[0]
        assert "| gate_up | 1024 | 1024 | 128 | 4." in tables[1]
        assert "suite notebook" in tables[1]
        assert not any("![" in table for table in tables)  # links would be broken in a notebook
        assert sorted(results.parent.iterdir()) == sorted(beside)
        assert len(pictures) == 2 * 2  # figures of one scheme
    else:
        assert not shown


def test_the_readme_is_checked(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.with_speed(text, *map(harness.newest, readme.KINDS)) == text
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    for changed, status in ((text, 0), (text.replace("<!-- speed:end -->", "x\n<!-- speed:end -->"), 1)):
        (tmp_path / "README.md").write_text(changed)
        assert readme.main(["--check"]) == status
    assert readme.main([]) == 0
    assert (tmp_path / "README.md").read_text() == text


def test_pictures_of_a_result(results: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(results.read_text())
    found = plot.lines(record, "Llama-3-8B", "w4g128", "speed_up")
    assert list(found) == ["qkv", "down"]
    assert [M for M, _ in found["down"]["qkernels"]] == [1, 16]
    assert found["qkv"]["cublas"] == [(1, 1.0), (16, 1.0)]
    assert plot.main([str(results)]) == 0
    pictures = sorted(results.parent.glob("*.png"))
    assert len(pictures) == 2 * 2  # schemes, figures
    for picture in pictures:
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.name in capsys.readouterr().out or picture.exists()
    assert set(plot.COLORS) == set(PROVIDERS)
    (results.parent / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        plot.main([str(results.parent / "other.json")])


def test_refused_times_are_not_drawn() -> None:
    entry = {"contaminated": "x", "cold": {"median_us": 1.0}}
    problem = {"model": "m", "scheme": "s", "layer": "l", "M": 1, "providers": {"qkernels": entry}}
    assert plot.lines({"problems": [problem]}, "m", "s", "eta") == {}


# ---- on a GPU ----


@pytest.mark.gpu
def test_gpu_a_replay_touches_every_set() -> None:
    counters = [torch.zeros(8, device="cuda") for _ in range(5)]
    calls: list[timing.Call] = [lambda c=counter: c.add_(1) for counter in counters]  # type: ignore[misc]
    timing.warm_up(calls)
    graph = timing.capture(calls, 3)
    assert [int(counter[0]) for counter in counters] == [1] * 5  # capturing runs nothing
    graph.replay()
    torch.cuda.synchronize()
    assert [int(counter[0]) for counter in counters] == [4] * 5


@pytest.mark.gpu
def test_gpu_calls_of_a_pass_write_to_memory_of_their_own() -> None:
    x = torch.ones(1024, device="cuda")
    pointers: list[int] = []

    def call() -> Tensor:
        y = x + 1
        pointers.append(y.data_ptr())
        return y

    timing.warm_up([call])
    pointers.clear()
    timing.capture([call] * 6)
    assert len(set(pointers)) == 6


@pytest.mark.gpu
def test_gpu_cold_is_slower_than_warm() -> None:
    weights = [
        torch.randn(4096, 2048, dtype=torch.float16, device="cuda")
        for _ in range(timing.weight_sets(2 * 4096 * 2048, timing.l2_bytes()))
    ]
    x = torch.randn(1, 2048, dtype=torch.float16, device="cuda")
    calls: list[timing.Call] = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]
    cold = timing.cold({"a": calls, "b": calls})
    warm = timing.warm({"a": calls[0]})["a"]
    eager = timing.eager({"a": calls}, replays=10)["a"]
    assert cold["a"].median_us >= warm.median_us
    assert cold["a"].low_us <= cold["a"].median_us <= cold["a"].high_us
    assert abs(cold["a"].median_us / cold["b"].median_us - 1) < 0.1  # the same work
    assert eager.median_us > 0.9 * warm.median_us
    bandwidth = timing.copy_bandwidth(2**28)
    assert cold["a"].median_us > 2 * 4096 * 2048 / max(bandwidth, timing.read_bandwidth(2**28)) * 1e6 * 0.97


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("scheme", ["w4g128", "w4g64s", "w4g32f", "w8cs", "w2g64", "w3g128"])
def test_gpu_providers_are_right(name: str, scheme: str) -> None:
    provider, reasons = PROVIDERS[name], []
    with torch.no_grad():
        for M in (1, 5, 33, 300):
            problem = Problem(M, 1152, 2048, scheme)
            reason = provider.supports(problem)
            if reason is None:
                prepared = provider.prepare(problem, 2)
                assert products.check(prepared, products.activations(problem)) is None, M
                assert _represents(prepared, problem, 2, "cuda"), M
            else:
                reasons.append(reason)
    if len(reasons) == 4:
        pytest.skip(f"{name}: {reasons[0]}")


@pytest.mark.gpu
def test_gpu_the_quick_suite_on_a_small_layer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", (problems.Layer("qkv", 1024, 2048),))
    names = [*matmul.QUICK_PROVIDERS]
    command = ["--schemes", "w4g128", "w8cs", "--tokens", "1", "64", "--out", str(tmp_path), "--providers", *names]
    matmul.main(command)
    (path,) = tmp_path.glob("*/*.json")
    for problem in json.loads(path.read_text())["problems"]:
        for name, entry in problem["providers"].items():
            assert "wrong" not in entry, (name, entry)
            assert "failed" not in entry, (name, entry)
        assert problem["providers"]["qkernels"]["cold"]["median_us"] > 0
    assert benchmark_quantize.main(["--schemes", "w4g128", "w8cs", "--out", str(tmp_path)]) == 0


def test_static_costs_in_the_readme() -> None:
    records = [
        {
            "kernel": "matmul", "scheme": scheme, "capability": capability, "dtype": dtype, "tokens": tokens,
            "registers": 100, "stack_bytes": 0, "programs": 12, "instructions_per_weight": 2.204,
            "shared_operations_per_weight": 0.15, "bound": "memory", "memory_share": 1.0,
        }
        for scheme in ("w4g128", "w4g128s") for capability in (90, 100)
        for dtype in ("float16", "bfloat16") for tokens in (1, 64)
    ]  # fmt: skip
    found = readme.with_static("a\n<!-- static:begin -->\nold\n<!-- static:end -->\nb\n", records)
    rows = [line for line in found.splitlines() if line.startswith("| w")]
    assert rows == ["| w4g128 | H200 (sm_90) | 100 | 12 | 2.20 | 0.15 | memory | 100 % |"]
    assert "None spills." in found
    assert "old" not in found
    records[2]["stack_bytes"] = 8
    assert "Spills: up to 8 bytes." in readme.static_table(records)
