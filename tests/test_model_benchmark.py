"""The benchmarks of a decoding model and of its energy, as far as they can be tried without a GPU."""

from __future__ import annotations

import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qkernels
from benchmarks import decode, energy, machine, model
from benchmarks.decode import Decoder, Variant
from benchmarks.energy import Energy, UnavailableError
from qkernels import MergedLinear, QuantLinear


def _build(scheme: str | None, merged: bool = False) -> Any:
    return decode.build("tiny", Variant(scheme, merged), "cpu", torch.float32, 16)


# ---- the model and its loop ----


@pytest.mark.parametrize("scheme", ["w4g128", "w3g64f", "w8cs", "w1g16", "w2t"])
def test_random_weights_are_those_of_a_model(scheme: str) -> None:
    q = decode.random_weight(96, 200, scheme, torch.Generator().manual_seed(0))
    w = q.dequantize()
    assert 0.01 < w.std() < 0.04
    assert w.mean().abs() < 0.02
    assert len(q.packed.unique()) > 200  # random codes, not one pattern


def test_a_quantized_model_is_made_of_codes_alone() -> None:
    quantized, merged = _build("w4g128"), _build("w4g128", merged=True)
    linears = [name for name, m in quantized.named_modules() if type(m) is nn.Linear]
    assert linears == ["lm_head"]
    assert sum(type(m) is QuantLinear for m in quantized.modules()) == 14
    assert sum(isinstance(m, MergedLinear) for m in merged.modules()) == 10
    states = zip(quantized.state_dict().items(), merged.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in states)
    assert not any(p.is_meta for p in [*merged.parameters(), *merged.buffers()])
    assert _build("w4g128").state_dict().keys() == quantized.state_dict().keys()
    dense = _build(None)
    assert not any(isinstance(m, QuantLinear) for m in dense.modules())
    assert 0.019 < dense.model.layers[1].mlp.up_proj.weight.std() < 0.021


def test_a_step_is_the_next_token_of_transformers_own_model() -> None:
    """With masks, eager attention and no cache: none of the loop's own parts."""
    quantized = _build("w4g128")
    decoder = Decoder(quantized, 16, batch=3)
    sequence = torch.cat([decoder.prompt, decoder.token], dim=1)
    logits = decoder.step()
    again = Decoder(quantized, 16, batch=3)
    quantized.set_attn_implementation("eager")
    with torch.no_grad():
        whole = quantized(sequence, use_cache=False).logits
    assert torch.equal(sequence[:, -1], whole[:, -2].argmax(-1))
    torch.testing.assert_close(logits, whole[:, -1], atol=1e-5, rtol=0)
    assert torch.equal(decoder.token[:, 0], whole[:, -1].argmax(-1))
    assert logits.abs().max() > 0.1
    assert [layer.cumulative_length.item() for layer in decoder.cache.layers] == [16, 16]
    assert torch.equal(again.prompt, decoder.prompt)


def test_steps_go_on_in_the_last_slot() -> None:
    decoder = Decoder(_build("w4g128", merged=True), 16, batch=2)
    tokens = []
    for _ in range(3):
        wanted = torch.cat([decoder.prompt, decoder.token], dim=1)
        logits = decoder.step()
        with torch.no_grad():
            whole = Decoder(decoder.model, 16, batch=2).model(wanted, use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)
        tokens.append(decoder.token.clone())
    assert not torch.equal(tokens[0], tokens[1])


def test_bytes_of_a_step() -> None:
    decoder = Decoder(_build("w8c"), 16, batch=2)
    layer = 256 * 256 * 2 + 128 * 256 * 2 + 3 * 384 * 256  # q and o, k and v, gate, up and down: 8 bits
    rows = 2 * 256 + 2 * 128 + 2 * 384 + 256  # a float16 scale and an 8-bit zero for each
    norms = 4 * 256 * (2 * 2 + 1)
    assert decoder.weight_bytes == 2 * (layer + 3 * rows) + norms + 4 * 500 * 256 + 4 * 2 * 256
    assert decoder.cache_bytes == 4 * 2 * 2 * 2 * 2 * 16 * 64  # layers, keys and values, batch, heads, slots, head size


def test_the_check_finds_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model.check(["w4g128"], "cpu")
    assert found["w4g128"]["merged"] == 0.0
    assert 0 < found["w4g128"]["without cache"] < 1e-5

    original = qkernels.siblings.MergedWeight.product
    with monkeypatch.context() as patch:
        patch.setattr(qkernels.siblings.MergedWeight, "product", lambda self, x: original(self, x).roll(1, -1))
        with pytest.raises(RuntimeError, match=r"w4g128: logits differ by .* from merged"):
            model.check(["w4g128"], "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(decode.Decoder, "_run", _with_shifted_positions)
        with pytest.raises(RuntimeError, match="from without cache"):
            model.check(["w4g128"], "cpu")


_run = decode.Decoder._run


def _with_shifted_positions(self: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return _run(self, tokens, positions + (positions.shape[1] == 1))


# ---- figures and files ----


def test_figures_of_a_variant() -> None:
    found = model.figures(Variant("w4g128", True), [0.004, 0.002, 0.003], 2, 3_000_000, 1_000_000, 4e9)
    assert found["name"] == "w4g128 merged"
    assert found["step_ms"] == pytest.approx(3)
    assert (found["step_ms_lowest"], found["step_ms_highest"]) == (2, 4)
    assert found["tokens_per_s"] == pytest.approx(2 / 0.003)
    assert found["floor_ms"] == pytest.approx(1)
    assert found["share_of_floor"] == pytest.approx(1 / 3)
    dense = model.figures(Variant(None), [0.006], 2, 12_000_000, 1_000_000, 4e9)
    variants: list[dict[str, Any]] = [found, dense, {"name": "w8c", "scheme": "w8c", "skipped": "does not fit"}]
    model.add_speed_ups(variants)
    assert [v.get("speed_up") for v in variants] == [pytest.approx(2), 1, None]
    record = {"model": "m", "context": 4, "batch": 2, "device": "d", "variants": variants}
    text = model.result_table(record)
    assert "33%" in text
    assert "skipped: w8c: does not fit" in text


def test_variants_take_turns() -> None:
    order: list[str] = []
    runners: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in "abc"}

    def seconds_per_call(call: Callable[[], object], calls: int) -> float:
        for _ in range(calls):
            call()
        return float(len(order))

    found = model.take_turns(runners, 20, 2, seconds_per_call)
    rounds = ["".join(order[i : i + 6]) for i in range(0, 120, 6)]
    assert all(sorted(one) == sorted("aabbcc") for one in rounds)
    assert len(set(rounds)) > 2
    assert sorted(second for seconds in found.values() for second in seconds) == [2.0 * i for i in range(1, 61)]


def test_variants_on_a_cpu_and_one_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    build = decode.build

    def limited(size: str, variant: Variant, *rest: Any, **named: Any) -> Any:
        if variant.scheme == "w8g128":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return build(size, variant, *rest, **named)

    def seconds_per_call(call: Callable[[], object], calls: int) -> float:
        call()
        return 0.5

    monkeypatch.setattr(model, "build", limited)
    variants = model.variants_of(["w4g128", "w8g128"])
    found = model.measure("tiny", variants, 16, 1, 2, 3, 1e9, "cpu", seconds_per_call)
    assert [v["name"] for v in found] == ["dense", "w4g128", "w4g128 merged", "w8g128", "w8g128 merged"]
    assert [v.get("tokens_per_s") for v in found] == [2, 2, 2, None, None]
    assert found[4]["skipped"] == "does not fit: CUDA out of memory. Tried"
    assert found[1]["weight_bytes"] == found[2]["weight_bytes"] < found[0]["weight_bytes"]


def test_sums_over_layers() -> None:
    assert [sum(e.count * e.N * e.K for e in machine.MODELS[m]) for m in machine.MODELS] == [6979321856, 68451041280]
    times = {"qkv": 1.0, "o": 2.0, "gate_up": 3.0, "down": 4.0}
    assert model.total_us(times, machine.MODELS["Llama-3-70B"]) == 800
    totals = [
        {"model": "Llama-3-8B", "scheme": scheme, "layers_us": times, "total_us": us}
        for scheme, us in ((None, 3000.0), ("w4g128", 1000.0))
    ]
    assert "3.00" in model.totals_table({"batch": 1, "totals": totals}).splitlines()[-1]


def test_layers_are_timed_with_enough_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.weight_sets(60_000_000) == 3
    assert machine.weight_sets(50_000_000) == 4
    monkeypatch.setattr(machine, "L2_BYTES", 60_000)
    monkeypatch.setattr(machine.weight_sets, "__defaults__", (60_000,))
    for scheme, nbytes in (("w8c", 64 * 128 + 3 * 64), (None, 2 * 64 * 128)):
        calls = model.layer_calls(machine.Layer("a", 64, 128, 1), scheme, 3, "cpu")
        assert len(calls) == -(-180_000 // nbytes)
        assert calls[0]().shape == (3, 64)
        assert not torch.equal(calls[0](), calls[1]())


def test_files_appear_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu" / "file.json"
    machine.write(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        machine.write(path, {"a": float("nan")})
    monkeypatch.setattr(machine.os, "replace", _fail)
    with pytest.raises(OSError, match="full"):
        machine.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def _fail(*_: Any) -> None:
    raise OSError("full")


def test_the_commands_without_a_gpu(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main, kind in ((model.main, "model"), (energy.main, "energy")):
        assert main(["--tiny", "--schemes", "w4g128", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "There is no GPU here" in printed
        assert "w4g128: logits differ from dense" in printed
        (path,) = (tmp_path / "cpu").glob(f"*-{kind}-check.json")
        record = json.loads(path.read_text())
        assert record["kind"] == kind
        assert record["check"]["w4g128"]["merged"] == 0
        assert {"device", "driver", "torch", "triton", "commit", "date"} <= record.keys()
    for bad in (["--schemes", "int4"], ["--context", "1"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            model.main(bad)
    with pytest.raises(SystemExit):
        energy.main(["--seconds", "3"])
    assert model.result_path(tmp_path, "CPU", record["date"], "model-check").name.endswith("model-check-2.json")


# ---- energy ----


class Board:
    """A board that takes some watts, with a clock of its own."""

    def __init__(self, watts: float, idle: float) -> None:
        self.seconds, self.millijoules = 100.0, 5e6
        self.watts, self.idle = watts, idle

    def spend(self, seconds: float, watts: float) -> None:
        self.seconds += seconds
        self.millijoules += 1e3 * seconds * watts

    def sleep(self, seconds: float) -> None:
        self.spend(seconds, self.idle)

    def steps(self) -> None:
        self.spend(0.3, self.watts)

    def counter(self) -> int:
        return int(self.millijoules)

    def now(self) -> float:
        return self.seconds


def test_energy_of_a_loop() -> None:
    board = Board(watts=500, idle=80)
    idle = energy.idle_watts(board.counter, 10, 5, board.now, board.sleep)
    assert idle == pytest.approx(80)
    assert board.seconds == 115
    found = energy.measure(board.steps, 32, board.counter, idle, 10, board.now)
    assert found.seconds == pytest.approx(34 * 0.3)
    assert found.tokens == 34 * 32  # the call before counting is not counted
    assert found.watts == pytest.approx(500)
    assert found.joules_per_token == pytest.approx(500 * 0.3 / 32)
    assert found.joules_per_token_above_idle == pytest.approx(420 * 0.3 / 32)
    record = energy.figures(Variant("w4g128"), found)
    assert record["joules"] == pytest.approx(5100)
    table = energy.result_table(
        {"model": "m", "context": 1, "batch": 32, "device": "d", "idle_watts": idle, "variants": [record]}
    )
    assert "idles at 80 W" in table
    assert "4.688" in table
    assert "3.938" in table


def test_a_counter_that_stands_still_is_no_counter() -> None:
    board = Board(watts=500, idle=80)
    with pytest.raises(UnavailableError, match="stands still"):
        energy.measure(board.steps, 1, lambda: 7, 80, 10, board.now)
    with pytest.raises(UnavailableError, match="went back"):
        energy.idle_watts(lambda: -board.counter(), 10, 5, board.now, board.sleep)


def test_variants_are_measured_one_by_one(tmp_path: pathlib.Path) -> None:
    board = Board(watts=500, idle=80)
    seen: list[int] = []
    path = tmp_path / "energy.json"

    def now() -> float:
        board.spend(3, 500)
        seen.append(len(json.loads(path.read_text())["variants"]) if path.exists() else 0)
        return board.seconds

    record: dict[str, Any] = {"context": 8, "batch": 2, "idle_watts": 80.0}
    variants = [Variant(None), Variant("w4g128", True)]
    energy.run(record, path, "tiny", variants, board.counter, 10, "cpu", now)
    assert sorted(set(seen)) == [0, 1]  # the first is in the file while the second runs
    written = json.loads(path.read_text())
    assert [v["name"] for v in written["variants"]] == ["dense", "w4g128 merged"]
    assert written["variants"][1]["tokens"] % 2 == 0


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UnavailableError, match="nvidia-ml-py is not installed"):
        energy.nvml_counter()

    class NVMLError(Exception):
        pass

    def unsupported(handle: str) -> int:
        raise NVMLError(f"Not Supported: {handle}")

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=unsupported,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-34"))
    with pytest.raises(UnavailableError, match="does not work here: Not Supported: GPU-12-34"):
        energy.nvml_counter()
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1234
    assert energy.nvml_counter()() == 1234


def test_energy_adds_nothing_of_its_own() -> None:
    assert Energy(100.0, 10.0, 50, 4.0).joules_per_token_above_idle == pytest.approx(1.2)


# ---- on a GPU ----


@pytest.mark.gpu
def test_a_captured_step_repeats_what_an_eager_one_does() -> None:
    for scheme, merged in ((None, False), ("w4g128", False), ("w4g128", True)):
        built = decode.build("tiny", Variant(scheme, merged), "cuda", torch.bfloat16, 64)
        captured, eager = Decoder(built, 64, 2), Decoder(built, 64, 2)
        run = captured.runner()
        captured.token.copy_(eager.token)
        for _ in range(4):
            run()
            eager.step()
            assert torch.equal(captured.token, eager.token)


@pytest.mark.gpu
def test_the_loop_is_measured(tmp_path: pathlib.Path) -> None:
    assert model.check(["w4g128"], "cuda")
    bandwidth = machine.copy_bandwidth(2**28)
    found = model.measure("tiny", model.variants_of(["w4g128"]), 64, 1, 2, 4, bandwidth)
    assert all(v["step_ms"] > v["floor_ms"] for v in found)
    with torch.no_grad():
        calls = model.layer_calls(machine.Layer("a", 4096, 4096, 1), "w4g128", 1, "cuda")
        assert 1 < machine.cold_us(calls, replays=3) < 1000
