"""Benchmarks of products of codes, and of quantizing activations; see test_benchmarks.py."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import activations, floors, harness, matmul, plot, products, providers_int8, readme, targets
from benchmarks.floors import Ceilings
from benchmarks.products import Prepared, Problem, Provider, Work
from benchmarks.providers import PROVIDERS, WEIGHT_PROVIDERS
from qkernels import ops_int8
from qkernels.scheme import Scheme
from qkernels.tuning import problems, timing
from tests import fake_gpu
from tests.fake_gpu import CEILINGS, FakeGpu, machine

H200 = floors.GPUS["H200"]
W8A8, W4A8 = Scheme.parse("w8a8"), Scheme.parse("w4a8")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


# ---- floors ----


def test_floors_of_products_of_codes() -> None:
    """Worked out by hand: 4.3 TB/s; 1979 TOP/s."""
    weight = 4096 * 4096 + 2 * 4096  # codes, float16 scales
    moved = weight + 2 * 4096 * 2 + 2 * (4096 + 4)  # x and y, then codes with a scale, twice
    assert floors.floor_us(1, 4096, 4096, W8A8, H200) == pytest.approx(moved / 4.3e12 * 1e6)
    for scheme in (W8A8, W4A8):
        assert floors.floor_us(4096, 4096, 4096, scheme, H200) == pytest.approx(2 * 4096**3 / 1979e12 * 1e6)
    assert floors.floor_us(4096, 4096, 4096, W8A8.weight_only, H200) == pytest.approx(2 * 4096**3 / 790e12 * 1e6)
    assert floors.GPUS["H100"].int8 == 1979e12
    unknown = dataclasses.replace(H200, int8=0.0)
    assert floors.bound_us(43, 10**15, unknown, 10**18) == floors.bound_us(43, 10**15, unknown)
    assert floors.bound_us(43, 79 * 10**10, unknown, 10**18) == pytest.approx(1e3)
    assert floors.bound_us(0, 79 * 10**10, H200, 1979 * 10**9) == pytest.approx(1e3 + 1e3)  # one after the other


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w8g64-a8", "w4g128-a8s", "w4c-a8"])
def test_bytes_of_codes_are_those_of_codes(scheme: str) -> None:
    for M, K in ((1, 16), (7, 100), (3, 2048)):
        found = ops_int8.quantize_activations(torch.randn(M, K), scheme)
        assert floors.codes_bytes(M, K, Scheme.parse(scheme)) == sum(t.nbytes for t in found if t is not None)
    assert floors.codes_bytes(5, 64, W8A8.weight_only) == 0


def test_rates_by_the_names_of_devices() -> None:
    rates = {
        name: floors.int8_rate(name) / 1e12
        for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090")
    }
    assert list(rates.values()) == [1979, 624, 242, 0, 660.6]


def test_a_measured_machine_has_the_datasheets_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("copy_bandwidth", 3e12), ("read_bandwidth", 4e12)):
        monkeypatch.setattr(timing, name, lambda size, value=value: value)
    monkeypatch.setattr(timing, "matmul_rate", lambda: 7e14)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.ceilings() == Ceilings("NVIDIA H100 80GB HBM3", 3e12, 7e14, "measured", 4e12, 1979e12)


# ---- providers ----


def _represents(prepared: Prepared, problem: Problem, seed: int, device: str) -> bool:
    w = products.float_weight(problem, seed, device).float()
    return float((prepared.weight() - w).norm() / w.norm()) < 2.0 ** (3 - problem.parsed.bits)


EVERYWHERE = {"cublas", "qkernels", "qkernels-codes", "qkernels-quantize", "qkernels-a16"}
WITH_PACKAGES = {"torchao-int8": "torchao.quantization", "llm.int8": "bitsandbytes", "llm.int8-6": "bitsandbytes"}


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("w8cs-a8s", EVERYWHERE | {"int_mm", "int_mm-dynamic", *WITH_PACKAGES}),
        ("w4g128-a8s", EVERYWHERE | {"int_mm"}),
        ("w4g32s-a8", EVERYWHERE | {"int_mm"}),
        ("w8c-a8", EVERYWHERE | {"int_mm"}),
    ],
)
def test_every_provider_that_runs_on_a_cpu_is_right(scheme: str, wanted: set[str]) -> None:
    """But for those that compile: they have a test of their own."""
    ran = set()
    for M in (1, 33):
        problem = Problem(M, 80, 384, scheme)
        for name, provider in PROVIDERS.items():
            if "compiled" not in name and provider.supports(problem) is None:
                with torch.no_grad():
                    prepared = provider.prepare(problem, 1, "cpu")
                    assert products.check(prepared, products.activations(problem, "cpu")) is None, (name, M)
                assert _represents(prepared, dataclasses.replace(problem, scheme="w4g16"), 1, "cpu"), name
                ran.add(name)
    installed = {name for name in wanted if products.missing(WITH_PACKAGES.get(name, "torch")) is None}
    assert ran == installed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int_mm-compiled", "torchao-compiled"])
def test_compiled_providers_are_right(name: str) -> None:
    """Each number of tokens is compiled anew, and weights are no reason to."""
    for M in (17, 33):
        problem = Problem(M, 80, 384, "w8cs-a8s")
        if (reason := PROVIDERS[name].supports(problem)) is not None:
            pytest.skip(reason)
        x = products.activations(problem, "cpu")
        with torch.no_grad():
            for seed in range(2):
                prepared = PROVIDERS[name].prepare(problem, seed, "cpu")
                assert products.check(prepared, x) is None
                assert _represents(prepared, problem, seed, "cpu")
    assert torch._dynamo.config.recompile_limit > 1000


PROBLEM = Problem(40, 72, 384, "w8cs-a8s")


def _checked(name: str, change: Callable[[Any], Any], problem: Problem = PROBLEM) -> str:
    prepared = PROVIDERS[name].prepare(problem, 0, "cpu")
    wrong = dataclasses.replace(prepared, call=lambda operand: change(prepared.call(operand)))
    return str(products.check(wrong, products.activations(problem, "cpu")))


def test_wrong_products_of_codes_are_found() -> None:
    def one_column(y: Tensor) -> Tensor:
        y[:, 5] *= 1.02
        return y

    def other_token(y: Tensor) -> Tensor:
        y[39] = y[38]
        return y

    for name in ("qkernels", "qkernels-codes"):
        assert _checked(name, lambda y: y) == "None"
        assert "is off by" in _checked(name, one_column)
        assert "is off by" in _checked(name, other_token)
    assert _checked("int_mm-dynamic", lambda y: y) == "None"
    assert "at (39, " in _checked("int_mm-dynamic", other_token)


def test_wrong_codes_are_found() -> None:
    """Also where the product of them would be right."""

    def tokens_mixed_up(result: tuple[Tensor, Tensor, None]) -> tuple[Tensor, Tensor, None]:
        return result[0], result[1].roll(1), None

    def one_step_higher(result: tuple[Tensor, Tensor, None]) -> tuple[Tensor, Tensor, None]:
        return result[0] + 0x01010101, result[1], None

    assert _checked("qkernels-quantize", lambda result: result) == "None"
    assert "is off by" in _checked("qkernels-quantize", tokens_mixed_up)
    assert "is off by" in _checked("qkernels-quantize", one_step_higher)

    prepared = PROVIDERS["qkernels-codes"].prepare(PROBLEM, 0, "cpu")
    x = products.activations(PROBLEM, "cpu")
    for change in (tokens_mixed_up, one_step_higher):
        wrong = dataclasses.replace(prepared, enter=lambda x, change=change: change(prepared.enter(x)))
        assert "multiplies another x" in str(products.check(wrong, x))
    step = x.float().abs().amax(1, keepdim=True) / 127
    cut_off = dataclasses.replace(prepared, seen=lambda operand: torch.trunc(x.float() / step) * step)
    assert "off by 0.99" in str(products.check(cut_off, x))  # steps; rounding is off by half of one at most
    lost = dataclasses.replace(prepared, seen=lambda operand: prepared.seen(operand) * torch.nan)
    assert "multiplies another x" in str(products.check(lost, x))
    scaled = dataclasses.replace(PROVIDERS["cublas"].prepare(PROBLEM, 0, "cpu"), seen=lambda x: x * 1.01)
    assert "multiplies another x" in str(products.check(scaled, x))


def test_rounding_of_hidden_codes_is_allowed_and_no_more() -> None:
    """Ties the other way, and steps of absmax / 127.5, but not codes of 5 bits."""
    prepared = PROVIDERS["int_mm-dynamic"].prepare(PROBLEM, 0, "cpu")
    x, w = products.activations(PROBLEM, "cpu"), prepared.weight()

    def rounded(steps: float, up: float) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            scale = x.float().abs().amax(1, keepdim=True) / steps
            code = torch.floor(x.float() / scale + up).clamp(-127, 127)
            return (code * scale @ w.T).to(products.DTYPE)

        return call

    for steps, up, right in ((127, 0.5, True), (127, 0.4999, True), (127.5, 0.5, True), (15, 0.5, False)):
        found = products.check(dataclasses.replace(prepared, call=rounded(steps, up)), x)
        assert (found is None) == right, (steps, found)
    assert 0.1 < providers_int8.HIDDEN_CODES < 0.15


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("int_mm", Problem(16, 64, 512, "w8cs-a8s"), "more than 16"),
        ("int_mm", Problem(17, 64, 516, "w4g64-a8"), "multiples of 8"),
        ("int_mm", Problem(17, 64, 512, "w4g64"), "8-bit activations, only"),
        ("int_mm-dynamic", Problem(16, 64, 512, "w8cs-a8s"), "more than 16"),
        ("int_mm-dynamic", Problem(17, 60, 512, "w8cs-a8s"), "multiples of 8"),
        ("int_mm-compiled", Problem(17, 64, 512, "w8cs-a8"), "symmetric activations"),
        ("torchao-int8", Problem(8, 64, 512, "w8cs-a8s"), "more than 16"),
        ("torchao-compiled", Problem(17, 64, 512, "w4g128-a8s"), "8-bit weights by channel"),
        ("gemlite-int8", Problem(17, 64, 500, "w8cs-a8s"), "multiple of 32"),
        ("gemlite-int8", Problem(17, 64, 512, "w4g128-a8s"), "8-bit weights by channel"),
        ("llm.int8", Problem(1, 64, 510, "w8cs-a8s"), "multiple of 4"),
        ("llm.int8", Problem(1, 64, 512, "w8c-a8s"), "8-bit weights by channel"),
        ("qkernels-a16", Problem(1, 64, 512, "w8cs"), "8-bit activations only"),
        ("llm.int8-6", Problem(1, 64, 512, "w8cs"), "8-bit activations only"),
        *(
            (name, Problem(1, 64, 512, "w4g128-a8s"), "x is not quantized")
            for name in ("qkernels-dequantize", "tinygemm", "gemlite", "bitsandbytes", "torchao")
        ),
    ],
)
def test_what_a_provider_does_not_support(name: str, problem: Problem, reason: str) -> None:
    assert reason in str(PROVIDERS[name].supports(problem))


def test_packages_that_are_missing_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers_int8, "missing", lambda package: f"{package} is away")
    problem = Problem(32, 64, 512, "w8cs-a8s")
    names = ("torchao-int8", "torchao-compiled", "gemlite-int8", "llm.int8", "llm.int8-6")
    packages = ["torchao.quantization"] * 2 + ["gemlite"] + ["bitsandbytes"] * 2
    assert [PROVIDERS[name].supports(problem) for name in names] == [f"{package} is away" for package in packages]


def test_outliers_are_seen_as_they_are() -> None:
    """Of LLM.int8: a column with a value of 6 is not rounded, and does not widen the steps of others."""
    x = torch.tensor([[6.0, 1.0, 0.3], [0.2, 0.5, 0.1]], dtype=torch.bfloat16)
    found = providers_int8.LLMInt8Outliers().seen(x)
    assert torch.equal(found[:, 0], x[:, 0].float())
    assert (found - x.float()).abs().max() <= 0.5 / 127
    assert found[0, 2] != x[0, 2]
    plain = providers_int8.LLMInt8().seen(x)
    assert plain[0, 2] == pytest.approx(6 * 6 / 127)
    assert found[0, 2] == pytest.approx(38 / 127)


def test_what_a_call_has_to_do() -> None:
    """x, codes with a scale, y; of parts what is theirs."""
    problem, operations = Problem(3, 64, 256, "w8cs-a8s"), 2 * 3 * 64 * 256
    x, codes, y = 2 * 3 * 256, 3 * (256 + 4), 2 * 3 * 64
    whole = Work(1000 + x + 2 * codes + y, 0, operations, cached_bytes=2 * codes)
    found = {name: provider.work(problem, 1000) for name, provider in PROVIDERS.items()}
    for name in ("qkernels", "int_mm-dynamic", "int_mm-compiled", "torchao-int8", "gemlite-int8", "llm.int8"):
        assert found[name] == whole, name
    assert found["cublas"] == found["qkernels-a16"] == Work(1000 + x + y, operations)
    assert found["qkernels-codes"] == Work(1000 + codes + y, 0, operations)
    assert found["qkernels-quantize"] == Work(x + codes, 0, cached_bytes=x + codes)
    assert found["int_mm"] == Work(64 * 256 + 3 * 256 + 4 * 3 * 64, 0, operations)
    plain = dataclasses.replace(problem, scheme="w8cs")
    assert PROVIDERS["qkernels"].work(plain, 1000) == Work(1000 + x + y, operations)
    parts = {name for name, provider in PROVIDERS.items() if provider.other}
    assert parts == {"int_mm", "qkernels-codes", "qkernels-quantize", "qkernels-a16"}


# ---- what becomes of times ----


def test_what_a_cache_may_hold_is_no_reason_to_refuse() -> None:
    work = Work(1_000_000, 0, cached_bytes=400_000)  # 10 us at 100 GB/s; 3 us of what is not cached, read at 200
    assert harness.against_floor(20.0, work, CEILINGS) == {"floor_us": 10.0, "eta": 0.5}
    assert harness.against_floor(4.0, work, CEILINGS)["eta"] == 2.5
    assert "contaminated" in harness.against_floor(2.8, work, CEILINGS)
    int8 = dataclasses.replace(CEILINGS, int8=1e12)
    assert harness.against_floor(40.0, Work(1_000_000, 0, 20_000_000), int8) == {"floor_us": 20.0, "eta": 0.5}
    assert "contaminated" in harness.against_floor(19.0, Work(1_000_000, 0, 20_000_000), int8)


class NotCaptured(type(PROVIDERS["qkernels"])):  # type: ignore[misc]
    """As the one with outliers is."""

    name, what, captured = "not captured", "asks the GPU", False


def test_what_no_graph_can_hold_has_an_eager_time_alone(gpu: FakeGpu) -> None:
    problem = Problem(20, 64, 256, "w8cs-a8s", "m", "l")
    chosen: list[Provider] = [PROVIDERS["cublas"], NotCaptured(), PROVIDERS["qkernels-quantize"]]
    found = harness.measure(problem, chosen, CEILINGS, harness.WeightSets(), replays=9)
    entry, others = found["providers"]["not captured"], found["providers"]
    assert entry["eager"]["replays"] == 5
    assert not {"cold", "warm", "eta", "floor_us", "speed_up", "contaminated", "failed"} & entry.keys()
    assert {"cold", "warm", "eager", "eta"} <= others["cublas"].keys()
    # Captured are the two others: alone, then cold and warm, each once more to be long enough.
    assert len(gpu.captured) == 2 * (1 + 2 + 2)
    assert others["qkernels-quantize"]["moved_bytes"] == 2 * 20 * 256 + 20 * 260
    record = {"problems": [found]}
    assert "cublas 4.0, not captured 0.0 eager, qkernels-quantize 4.0 us" in matmul.line(found)
    (row,) = (line for line in matmul.result_tables(record).splitlines() if "not captured" in line)
    assert row.split() == ["l", "not", "captured", "20", "0.0"]


def test_static_activations_are_not_compared() -> None:
    with pytest.raises(ValueError, match="'w8cs-a8ts' has static activations"):
        harness.most_informative_first(["squares"], ["w8a8", "w8cs-a8ts"], [1], [1])


# ---- suites ----


def test_suites() -> None:
    for name in ("w8a8", "w4a8"):
        suite = matmul.SUITES[name]
        assert str(Scheme.parse(suite.schemes[0])) == str(Scheme.parse(name))
        assert set(suite.providers) <= PROVIDERS.keys()
        assert {*targets.TARGETS[0].than.split(), "qkernels", "cublas", "int_mm"} <= set(suite.providers)
        assert all(Scheme.parse(scheme).activations for scheme in suite.schemes)
        assert {1, 16, 1024} <= set(suite.first)
    of_rows = [name for name in PROVIDERS if PROVIDERS[name].supports(Problem(64, 64, 64, "w8cs-a8s")) is None]
    assert set(of_rows) - set(matmul.SUITES["w8a8"].providers) == set()
    assert set(matmul.SUITES["full"].providers) == {*WEIGHT_PROVIDERS, "int_mm"}
    assert set(plot.COLORS) == set(PROVIDERS)


def test_a_run_of_a_suite(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a dense product takes 12 us, torch's of int8 3, and all others 4."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "machine", lambda code: machine())
    monkeypatch.setattr(harness, "ceilings", lambda: dataclasses.replace(CEILINGS, copy=1e13, int8=1e15))
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", (problems.Layer("qkv", 64, 256),))
    few = tuple(dataclasses.replace(target, fewest=64) for target in targets.TARGETS[:2])
    monkeypatch.setattr(targets, "TARGETS", few)

    def call_us(call: Any) -> float:
        name = call.func.__qualname__
        return 12.0 if "CuBLAS" in name else 3.0 if "IntMM" in name else 4.0

    gpu.call_us = call_us
    names = ["cublas", "qkernels", "qkernels-codes", "qkernels-quantize", "qkernels-a16", "int_mm", "int_mm-dynamic"]
    command = ["--suite", "w8a8", "--models", "Llama-3-8B", "--tokens", "1", "64", "--providers", *names]
    assert matmul.main([*command, "--replays", "4", "--seconds", "1000", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*-w8a8.json")
    record = json.loads(path.read_text())
    assert (record["suite"], record["finished"], record["planned"]) == ("w8a8", True, 2)
    assert record["ceilings"]["int8"] == 1e15
    one, many = (p["providers"] for p in record["problems"])
    assert one["int_mm"] == {"skipped": "torch._int_mm: more than 16 tokens only"}
    assert many["qkernels"]["speed_up"] == pytest.approx(3, rel=0.05)
    ceilings = Ceilings(**record["ceilings"])
    assert many["qkernels"]["floor_us"] == pytest.approx(floors.floor_us(64, 64, 256, W8A8, ceilings))
    printed = capsys.readouterr().out
    assert "1000 TOP/s int8 by its datasheet" in printed
    assert "Llama-3-8B, w8cs-a8s" in printed
    over_dense, over_torch = (line.split() for line in printed.splitlines() if line.lstrip().startswith("w8a8 "))
    assert "met" in over_dense
    assert "met" in over_torch
    assert [line[-9] for line in (over_dense, over_torch)] == ["1.50", "0.70"]
    assert [line[-7:-4] for line in (over_dense, over_torch)] == [["1", "of", "1"]] * 2
    assert [float(line[-8]) for line in (over_dense, over_torch)] == pytest.approx([3, 0.75], abs=0.03)
    assert plot.main([str(tmp_path)]) == 0  # of each kind the newest
    assert len(list(path.parent.glob("*.png"))) == 2
    assert harness.newest("matmul", tmp_path) is None  # the README's other table keeps its file
    assert harness.newest("matmul-w8a8", tmp_path) == path
    empty = "<!-- speed:begin -->\n<!-- speed:end -->\n"
    shown = readme.with_speed(empty, None, w8a8=path)
    assert "No result file from a GPU yet" in shown
    _, row = (line.split(" | ") for line in shown.splitlines() if line.startswith("| qkv | 64 | 256 | 64 |"))
    assert [float(us) for us in row[4:11]] == pytest.approx([4, 12, 4, 4, 4, 3, 3], abs=0.15)
    assert "int8 counts with the 1000 TOP/s of the datasheet" in shown
    assert "Llama-3-8B-w8cs-a8s-speed-up.png" in shown


def test_without_a_gpu_the_suites_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert matmul.main(["--suite", "w8a8", "--no-compile", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "790 TFLOP/s bfloat16 (measured), 1979 TOP/s int8 by its datasheet" in printed
    assert "w8cs-a8s   bfloat16" in printed
    assert matmul.main(["--suite", "quick", "--no-compile", "--out", str(tmp_path)]) == 0
    assert "int8" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_static_costs_without_a_gpu() -> None:
    suite = dataclasses.replace(matmul.SUITES["w8a8"], tokens=(64,))
    (row,) = matmul.static_table(suite, "H200").splitlines()[-1:]
    scheme, tokens, registers, _, _, instructions = row.split()
    assert (scheme, tokens) == ("w8a8", "64")
    assert 0 < int(registers) <= 255
    assert 0 < float(instructions) < 20


# ---- targets ----


def _measured(scheme: str, M: int, times: dict[str, float], layer: str = "o", **change: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {name: {"cold": {"median_us": us}, "eta": 0.5} for name, us in times.items()}
    return {"model": "Llama-3-8B", "scheme": scheme, "layer": layer, "M": M, "providers": entries} | change


def test_targets() -> None:
    record = {
        "problems": [
            _measured("w8cs-a8s", 1024, {"qkernels": 10, "cublas": 15, "int_mm": 7}),
            _measured("w8cs-a8s", 2048, {"qkernels": 10, "cublas": 14, "int_mm": 9}, layer="down"),
            _measured("w8cs-a8s", 512, {"qkernels": 10, "cublas": 5, "int_mm": 1}),  # too few tokens
            _measured("w8cs-a8s", 1024, {"qkernels": 10, "cublas": 5}, model="squares"),
            _measured("w4g128-a8s", 16, {"qkernels": 10, "qkernels-a16": 10.5, "cublas": 1}),
            _measured("w4g128-a8s", 64, {"qkernels": 10, "qkernels-a16": 5}),
        ]
    }
    rows = [line.split() for line in targets.table(record).splitlines()[-3:]]
    assert [row[0] for row in rows] == ["w8a8", "w8a8", "w4a8"]
    assert [("met" in row, "MISSED" in row) for row in rows] == [(False, True), (True, False), (True, False)]
    assert rows[0][-9:] == ["1.50", "1.40", "1", "of", "2", "down,", "M", "=", "2048"]
    assert rows[1][-9:] == ["0.70", "0.70", "2", "of", "2", "o,", "M", "=", "1024"]
    assert rows[2][-9:] == ["1.00", "1.05", "1", "of", "1", "o,", "M", "=", "16"]
    refused = record["problems"][0]["providers"]["qkernels"]
    del refused["eta"]
    assert "0 of 1" in targets.table(record)
    assert targets.table({"problems": []}) == ""


# ---- quantizing activations ----


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g128-a8"])
def test_codes_with_a_norm_are_compared_with_the_oracle(scheme: str) -> None:
    problem = activations.Problem(33, 384, scheme)
    x, norm = activations.operands(problem, "cpu")
    codes, scale, zero = ops_int8.quantize_activations(x, scheme, None, norm, activations.EPS)
    assert activations.difference(problem, x, norm, (codes, scale, zero)) is None
    assert "scales differ" in str(activations.difference(problem, x, norm, (codes, scale * 1.001, zero)))
    assert "scales differ" in str(activations.difference(problem, x, norm, (codes, scale * torch.nan, zero)))
    one = codes.clone()
    one[3, 7] ^= 1
    assert activations.difference(problem, x, norm, (one, scale, zero)) is None  # one step, as rounding may
    two = codes.clone()
    two[3, 7] ^= 2
    assert str(activations.difference(problem, x, norm, (two, scale, zero))).startswith("1 codes differ")
    assert "codes differ" in str(activations.difference(problem, x, norm, (codes ^ 1, scale, zero)))
    without = ops_int8.quantize_activations(x, scheme)
    assert "differ" in str(activations.difference(problem, x, norm, without))
    if zero is not None:
        assert "zeros differ" in str(activations.difference(problem, x, norm, (codes, scale, zero + 2)))


def test_what_is_timed_of_activations_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rounding of a norm's output to bfloat16, which only the fused one does without."""
    monkeypatch.setattr(activations, "compiled", lambda function: function)
    for scheme in ("w8cs-a8s", "w8c-a8"):
        problem = activations.Problem(9, 320, scheme)
        x, norm = activations.operands(problem, "cpu")
        calls: dict[str, Any] = activations.candidates(problem, x, norm)
        assert set(calls) == set(problem.moved_bytes) - (set() if scheme == "w8cs-a8s" else {"compiled"})
        normed = calls["norm"]()
        assert torch.allclose(
            normed.float(), x.float() * x.float().square().mean(1, keepdim=True).rsqrt() * norm, rtol=2**-7
        )
        apart, alone = calls["apart"](), calls["quantize"]()
        wanted = ops_int8.quantize_activations(normed, scheme)
        assert all(torch.equal(a, b) for a, b in zip(apart, wanted, strict=True) if a is not None and b is not None)
        assert torch.equal(alone[0], ops_int8.quantize_activations(x, scheme)[0])
        fused = calls["fused"]()
        assert torch.allclose(fused[1], apart[1], rtol=2**-7)
        if "compiled" in calls:
            code, scale, none = calls["compiled"]()
            assert none is None
            assert torch.equal(scale[:, 0], apart[1])
            assert code.shape == (9, 320)


def test_bytes_of_quantizing() -> None:
    """x read, then codes and a scale for each token written; a norm apart writes and reads its output."""
    found = activations.Problem(10, 256, "w8cs-a8s").moved_bytes
    x, norm, codes = 10 * 512, 512, 10 * 260
    assert found == {
        "fused": x + norm + codes, "apart": 3 * x + norm + codes, "compiled": x + norm + codes,
        "norm": 2 * x + norm, "quantize": x + codes,
    }  # fmt: skip


def test_the_command_of_activations(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activations, "compiled", lambda function: function)
    monkeypatch.setattr(harness, "machine", lambda code: machine())
    monkeypatch.setattr(harness, "ceilings", lambda: CEILINGS)
    command = ["--sizes", "128", "--tokens", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert activations.main(command) == 0
    assert "There is no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu.call_us = lambda call: 12.0 if "<lambda>" not in call.__qualname__ else 4.0
    assert activations.main([*command, "--seconds", "1000"]) == 0
    (path,) = tmp_path.glob("*/*-activations.json")
    record = json.loads(path.read_text())
    assert [(p["M"], p["K"], p["scheme"]) for p in record["problems"]] == [(4, 128, "w8cs-a8s"), (4, 128, "w4g128-a8")]
    entry = record["problems"][0]["candidates"]["fused"]
    assert entry["floor_us"] == pytest.approx(entry["moved_bytes"] / 1e11 * 1e6)
    assert {"warm", "eager"} <= entry.keys()
    assert "1.00x" in capsys.readouterr().out  # apart and fused are lambdas alike here

    exact = ops_int8.quantize_activations
    monkeypatch.setattr(activations.ops_int8, "quantize_activations", lambda x, scheme, *rest: exact(2 * x, scheme))
    assert activations.main([*command, "--seconds", "1000"]) == 1
    assert "WRONG: scales differ" in capsys.readouterr().out
    for bad in ("w4g128", "w8cs-a8t"):
        with pytest.raises(SystemExit):
            activations.main(["--schemes", bad])


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name not in WEIGHT_PROVIDERS or name == "qkernels"])
@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g128-a8s", "w4g128-a8", "w8c-a8"])
def test_gpu_providers_are_right(name: str, scheme: str) -> None:
    provider, reasons = PROVIDERS[name], []
    with torch.no_grad():
        for M in (1, 5, 33, 300):
            problem = Problem(M, 1152, 2048, scheme)
            reason = provider.supports(problem)
            if reason is None:
                prepared = provider.prepare(problem, 2)
                x = products.activations(problem)
                assert products.check(prepared, x) is None, M
                if provider.captured:
                    call = prepared.enter(x)
                    timing.warm_up([lambda p=prepared, c=call: p.call(c)])
                    timing.capture([lambda p=prepared, c=call: p.call(c)])
            else:
                reasons.append(reason)
    if len(reasons) == 4:
        pytest.skip(f"{name}: {reasons[0]}")


@pytest.mark.gpu
def test_gpu_suites_on_a_small_layer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.MODELS, "Llama-3-8B", (problems.Layer("qkv", 1024, 2048),))
    for suite in ("w8a8", "w4a8"):
        command = ["--suite", suite, "--models", "Llama-3-8B", "--tokens", "1", "64", "--out", str(tmp_path)]
        matmul.main([*command, "--replays", "5"])
        (path,) = tmp_path.glob(f"*/*-{suite}.json")
        for problem in json.loads(path.read_text())["problems"]:
            for name, entry in problem["providers"].items():
                assert "wrong" not in entry, (name, entry)
                assert "failed" not in entry, (name, entry)
    assert activations.main(["--sizes", "1024", "--tokens", "1", "64", "--out", str(tmp_path)]) == 0
