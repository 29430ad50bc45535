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
from benchmarks import decode, energy, harness, model, plot, readme, totals
from benchmarks.decode import Decoder, Prefill, Variant
from benchmarks.energy import Energy, UnavailableError
from benchmarks.floors import Ceilings
from benchmarks.products import Work
from qkernels import MergedLinear, QuantLinear, reference_int8
from qkernels.tuning import problems, timing

SLOW = Ceilings("stand-in", copy=4e9, matmul=1e15, source="measured", read=5e9)


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


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g128-a8"])
def test_inputs_are_rounded_as_codes_are(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dense twin; so a model that does not round them, or whose codes are of other tokens, is found wrong."""
    found = model.check([scheme], "cpu")
    assert found[scheme]["merged"] == 0.0
    assert found[scheme]["dense"] < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(decode, "quantized", lambda x, scheme: x)
        with pytest.raises(RuntimeError, match=r"logits differ by 0\.0.* from dense"):
            model.check([scheme], "cpu")
    original = reference_int8.quantize_activations
    with monkeypatch.context() as patch:
        patch.setattr(reference_int8, "quantize_activations", lambda x, *rest: original(x.roll(1, 0), *rest))
        with pytest.raises(RuntimeError, match="logits differ"):
            model.check([scheme], "cpu")


def test_of_many_sequences_the_one_in_the_middle_counts() -> None:
    """Where rounding may go either way; else all of them."""
    a = torch.zeros(5, 3)
    b = torch.tensor([[0.0, 1, 2], [0, 0, 3], [0, 0, -1], [0, 0, 0], [-9, 0, 0]])
    assert model._difference(a, b, middle=True) == 2
    assert model._difference(a, b, middle=False) == 9
    b[:3] = torch.nan
    assert not model._difference(a, b, middle=True) <= 1e9
    assert not model._difference(a, b, middle=False) <= 1e9


# ---- prompts ----


def test_prompts_again_and_again() -> None:
    """Each pass gives the logits that transformers' own model, without a cache, has after the last token."""
    built = _build("w4g128", merged=True)
    prefill = Prefill(built, 16, batch=3)
    first, second = prefill.step(), prefill.runner()()
    assert torch.equal(first, second)
    assert prefill.prompt.shape == (3, 16)
    assert [layer.cumulative_length.item() for layer in prefill.cache.layers] == [16, 16]
    built.set_attn_implementation("eager")
    with torch.no_grad():
        whole = built(prefill.prompt, use_cache=False).logits[:, -1]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=0)


def test_work_of_a_prompt() -> None:
    weights = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 384 * 256)  # of two layers' Linears
    lm_head, attention = 2 * 2 * 256 * 500, 2 * 2 * 2 * 16 * 16 * 256  # both for 2 sequences; half of each square
    linears = 2 * 2 * 16 * weights
    for scheme, merged in ((None, False), ("w4g128", False), ("w4g128", True), ("w8cs-a8s", True)):
        prefill = Prefill(_build(scheme, merged), 16, batch=2)
        assert prefill.tokens == 32
        int8 = scheme == "w8cs-a8s"
        work = prefill.work
        assert work.operations == lm_head + attention + (0 if int8 else linears), scheme
        assert work.int8_operations == (linears if int8 else 0)
        assert work.moved_bytes == prefill.weight_bytes + prefill.cache_bytes
    decoder = Decoder(_build("w8cs-a8s"), 16, batch=2)
    assert decoder.work == Work(decoder.weight_bytes + decoder.cache_bytes, 0)
    assert (decoder.tokens, prefill.weight_bytes - decoder.weight_bytes) == (2, 4 * 30 * 256)  # rows of the embedding


def test_prompts_are_measured(tmp_path: pathlib.Path) -> None:
    fast = Ceilings("stand-in", copy=1e15, matmul=1e12, source="measured", int8=2e12)
    variants = [Variant(None), Variant("w8cs-a8s", True)]
    found = model.measure("tiny", variants, 16, 2, 1, 1, fast, "cpu", lambda call, calls: 0.5, Prefill)
    assert [v["tokens_per_s"] for v in found] == [64, 64]
    dense, int8 = (v["floor_us"] for v in found)
    linears = 2 * 32 * 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 384 * 256)
    assert dense - int8 == pytest.approx(linears / 2e12 * 1e6)
    assert found[1]["eta"] == pytest.approx(int8 / 5e5)
    board = Board(watts=500, idle=80)

    def now() -> float:
        board.spend(3, 500)
        return board.seconds

    record = _record("energy-prefill", []) | {"context": 8, "phase": "prefill"}
    path = tmp_path / "gpu" / "energy-prefill.json"
    record = energy.run(record, path, "tiny", variants[1:], board.counter, 10, "cpu", now, Prefill)
    (variant,) = record["variants"]
    assert variant["tokens"] % (2 * 8) == 0
    assert variant["joules_per_token"] == variant["joules"] / variant["tokens"] > 0
    assert "prefill" in energy.result_table(record)
    assert plot.main([str(path)]) == 0
    assert harness.newest("energy", tmp_path) is None  # of another kind
    assert harness.newest("energy-prefill", tmp_path) == path


@pytest.mark.parametrize("main", [model.main, energy.main])
def test_the_commands_of_prompts(
    main: Callable[[list[str]], int], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--tiny", "--prefill", "--schemes", "w8a8", "--out", str(tmp_path)]) == 0
    (path,) = (tmp_path / "cpu").glob("*-prefill-check.json")
    record = json.loads(path.read_text())
    assert record["kind"] in ("model-prefill", "energy-prefill")
    assert list(record["check"]) == ["w8cs-a8s"]
    with pytest.raises(SystemExit):
        main(["--schemes", "w8cs-a8ts"])


# ---- figures and files ----


def test_figures_of_a_variant() -> None:
    found = model.figures(Variant("w4g128", True), [0.004, 0.002, 0.003], 2, 3_000_000, 1_000_000, SLOW)
    assert found["name"] == "w4g128 merged"
    assert found["step_ms"] == pytest.approx(3)
    assert (found["step_ms_lowest"], found["step_ms_highest"]) == (2, 4)
    assert found["tokens_per_s"] == pytest.approx(2 / 0.003)
    assert found["floor_us"] == pytest.approx(1000)
    assert found["eta"] == pytest.approx(1 / 3)
    dense = model.figures(Variant(None), [0.006], 2, 12_000_000, 1_000_000, SLOW)
    variants: list[dict[str, Any]] = [found, dense, {"name": "w8c", "scheme": "w8c", "skipped": "does not fit"}]
    model.add_speed_ups(variants)
    assert [v.get("speed_up") for v in variants] == [pytest.approx(2), 1, None]
    text = model.result_table(_record("model", variants))
    assert "33%" in text
    assert "skipped: w8c: does not fit" in text


def _record(kind: str, variants: list[dict[str, Any]]) -> harness.Record:
    machine = {"device": "NVIDIA Imaginary", "driver": "1.2", "torch": "9.9", "triton": "8.8", "commit": "0123456789ab"}
    record = harness.header(kind, kind, machine, SLOW) | {"date": "2026-01-02", "idle_watts": 80.0}
    setting = {"model": "Llama-3-8B", "context": 64, "batch": 2, "phase": "decoding", "tokens": 2}
    return record | setting | {"variants": variants}


def test_a_step_faster_than_memory_is_refused() -> None:
    """4 MB take 1 ms to copy here, and 0.8 ms to read."""
    found = [
        model.figures(Variant(scheme), [seconds], 1, 3_000_000, 1_000_000, SLOW)
        for scheme, seconds in ((None, 0.7e-3), ("w4g128", 0.9e-3), ("w8g128", 2e-3))
    ]
    assert ["contaminated" in v for v in found] == [True, False, False]
    assert "eta" not in found[0]
    assert found[1]["eta"] == pytest.approx(1 / 0.9)  # faster than a copy, which a step is not
    model.add_speed_ups(found)
    assert not any("speed_up" in v for v in found)  # over a refused time
    record = _record("model", found)
    assert [line.split(":")[:2] for line in model.refused(record)] == [["dense", " contaminated"]]
    assert "refused" in model.result_table(record)
    of_energy = [
        energy.figures(Variant("w4g128"), Energy(100.0, seconds, 50, 4.0), 2, Work(4_000_000, 0), SLOW)
        for seconds in (25 * 0.7e-3, 25 * 2e-3)
    ]
    assert ["contaminated" in v for v in of_energy] == [True, False]
    assert of_energy[1]["eta"] == pytest.approx(0.5)
    assert "refused" in energy.result_table(_record("energy", of_energy))


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
    found = model.measure("tiny", variants, 16, 1, 2, 3, SLOW, "cpu", seconds_per_call)
    assert [v["name"] for v in found] == ["dense", "w4g128", "w4g128 merged", "w8g128", "w8g128 merged"]
    assert [v.get("tokens_per_s") for v in found] == [2, 2, 2, None, None]
    assert found[4]["skipped"] == "does not fit: CUDA out of memory. Tried"
    assert found[1]["weight_bytes"] == found[2]["weight_bytes"] < found[0]["weight_bytes"]


def _timed(us: float) -> timing.Timing:
    return timing.Timing(us, us, us, 30, 4)


def test_sums_over_layers() -> None:
    layers = problems.MODELS["Llama-3-70B"]
    entries: dict[str, Any] = {
        layer.name: {"cold": {"median_us": us}, "floor_us": us / 2, "eta": 0.5}
        for layer, us in zip(layers, (1.0, 2.0, 3.0, 4.0), strict=True)
    }
    found = totals.total(entries, layers)
    assert (found["total_us"], found["floor_us"]) == (800, 400)  # 80 layers
    entries["down"] = {"cold": {"median_us": 4.0}, "floor_us": 2.0, "contaminated": "too fast"}
    found = totals.total(entries, layers)
    assert "total_us" not in found
    record = _record("model", []) | {"totals": [{"model": "m", "scheme": None, **found}]}
    assert model.refused(record) == ["m down dense: contaminated: too fast"]
    assert "4.0!" in totals.totals_table(record)
    assert "refused" in totals.totals_table(record)


def test_layers_are_timed_with_all_schemes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (problems.Layer("a", 64, 128, 3), problems.Layer("b", 96, 128, 2))
    monkeypatch.setitem(problems.MODELS, "small", layers)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 20_000)
    seen: list[dict[str, int]] = []

    def cold(candidates: dict[str, list[timing.Call]]) -> dict[str, timing.Timing]:
        seen.append({name: len(calls) for name, calls in candidates.items()})
        return {"w8c": times[0], "dense": times[1]}

    times = (_timed(20.0), _timed(60.0))
    monkeypatch.setattr(timing, "cold", cold)
    dense, found = totals.layer_totals("small", (None, "w8c"), 3, SLOW, "cpu")
    assert seen == [{"dense": 4, "w8c": 8}, {"dense": 3, "w8c": 5}]
    assert (dense["scheme"], dense["total_us"], found["scheme"], found["total_us"]) == (None, 300, "w8c", 100)
    moved = 64 * 128 + 3 * 64 + 2 * 3 * (64 + 128)  # codes, scales and zeros, x and y
    assert found["layers"]["a"]["floor_us"] == pytest.approx(moved / 4e9 * 1e6)
    assert found["layers"]["a"]["eta"] == pytest.approx(moved / 4e9 * 1e6 / 20)
    assert "3.00" in totals.totals_table({"tokens": 3, "totals": [dense, found]}).splitlines()[-1]
    times = (_timed(1.0), _timed(60.0))  # 2.5 us at least
    dense, found = totals.layer_totals("small", (None, "w8c"), 3, SLOW, "cpu")
    assert "total_us" in dense
    assert "total_us" not in found
    assert "contaminated" in found["layers"]["b"]


def test_floors_of_layers_with_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.MODELS, "small", (problems.Layer("a", 64, 128, 3),))
    monkeypatch.setattr(timing, "l2_bytes", lambda: 20_000)
    monkeypatch.setattr(timing, "cold", lambda candidates: dict.fromkeys(candidates, _timed(20.0)))
    (found,) = totals.layer_totals("small", ("w8cs-a8s",), 3, SLOW, "cpu")
    moved = 64 * 128 + 2 * 64 + 2 * 3 * (64 + 128) + 2 * 3 * (128 + 4)  # codes of x with a scale, written and read
    assert found["layers"]["a"]["floor_us"] == pytest.approx(moved / 4e9 * 1e6)
    fast = Ceilings("stand-in", copy=1e15, matmul=1e9, source="measured", int8=5e9)
    (found,) = totals.layer_totals("small", ("w8cs-a8s",), 3, fast, "cpu")
    assert found["layers"]["a"]["floor_us"] == pytest.approx(2 * 3 * 64 * 128 / 5e9 * 1e6)


def test_layers_are_timed_with_enough_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 60_000)
    for scheme, nbytes in (("w8c", 64 * 128 + 3 * 64), (None, 2 * 64 * 128)):
        calls = totals.layer_calls(problems.Layer("a", 64, 128), scheme, 3, "cpu")
        assert len(calls) == -(-180_000 // nbytes)
        first, second = calls[0](), calls[1]()
        assert isinstance(first, torch.Tensor)
        assert isinstance(second, torch.Tensor)
        assert first.shape == (3, 64)
        assert not torch.equal(first, second)


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
        assert {"suite", "date", "machine", "ceilings"} <= record.keys()
        assert {"device", "driver", "torch", "triton", "transformers", "commit"} <= record["machine"].keys()
        assert record["machine"]["device"] == "cpu"
        assert harness.newest(kind, tmp_path) is None  # nothing was measured
    for bad in (["--schemes", "int4"], ["--context", "1"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            model.main(bad)
    with pytest.raises(SystemExit):
        energy.main(["--seconds", "3"])
    assert model.main(["--tiny", "--commit", "abc", "--out", str(tmp_path)]) == 0
    (again,) = (tmp_path / "cpu").glob("*-model-check-2.json")
    assert json.loads(again.read_text())["machine"]["commit"] == "abc"


def test_the_command_of_the_model_on_a_gpu(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but what needs one: the loop runs a tiny model on the CPU, and layers take the time they are said to."""
    measure, seconds = model.measure, [0.5]

    def on_cpu(size: str, *rest: Any, phase: Any) -> list[harness.Record]:
        assert size == "Llama-3-8B"
        return measure("tiny", *rest, device="cpu", seconds_per_call=lambda call, calls: seconds[0], phase=phase)

    def layer_totals(name: str, schemes: tuple[str | None, ...], tokens: int, ceilings: Ceilings) -> list[Any]:
        (path,) = tmp_path.glob("*/*.json")
        written = json.loads(path.read_text())
        assert len(written["variants"]) == 3  # before the totals
        assert not written["finished"]
        entry = {"cold": {"median_us": 7.0}, "floor_us": 5.0, "eta": 0.7}
        layers = problems.MODELS[name]
        found = totals.total({layer.name: entry for layer in layers}, layers)
        return [{"model": name, "scheme": scheme, **found} for scheme in schemes]

    monkeypatch.setattr(model, "check", lambda schemes, device: {})
    monkeypatch.setattr(model, "measure", on_cpu)
    monkeypatch.setattr(totals, "layer_totals", layer_totals)
    monkeypatch.setattr(harness, "machine", lambda code: {"device": "NVIDIA Imaginary", "commit": code})
    monkeypatch.setattr(harness, "ceilings", lambda: SLOW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    command = ["--context", "16", "--commit", "abc", "--out", str(tmp_path)]
    assert model.main(command) == 0
    path = harness.newest("model", tmp_path)
    assert path is not None
    assert path.parent.name == "nvidia-imaginary"
    record = json.loads(path.read_text())
    assert (record["kind"], record["suite"], record["planned"], record["finished"]) == ("model", "model", 3, True)
    assert (record["machine"]["commit"], record["ceilings"]["copy"]) == ("abc", 4e9)
    assert record["seconds"] >= 0
    assert [v["tokens_per_s"] for v in record["variants"]] == [2, 2, 2]
    assert [t["total_us"] for t in record["totals"]] == [32 * 4 * 7.0] * 2 + [80 * 4 * 7.0] * 2
    assert str(path) in capsys.readouterr().out
    seconds[0] = 1e-9
    assert model.main([*command, "--no-totals"]) == 1
    assert "w4g128 merged: contaminated: 0.00 us is below" in capsys.readouterr().out


# ---- README and pictures ----


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """A result file of each kind, with one time refused and one variant that did not fit."""
    of_model: list[dict[str, Any]] = [
        model.figures(Variant(scheme, merged), [seconds], 2, 3_000_000, 1_000_000, SLOW)
        for scheme, merged, seconds in ((None, False, 8e-3), ("w4g128", True, 2e-3), ("w2g64", False, 1e-6))
    ]
    model.add_speed_ups(of_model)
    of_model.append({"name": "w8g128", "scheme": "w8g128", "merged": False, "skipped": "does not fit: no room"})
    of_energy = [
        energy.figures(Variant(scheme), Energy(joules, seconds, 1000, 50.0), 2, Work(4_000_000, 0), SLOW)
        for scheme, joules, seconds in ((None, 2000.0, 10.0), ("w4g128", 1000.0, 5.0), ("w2g64", 1.0, 1e-3))
    ]
    found = {}
    for kind, variants in (("model", of_model), ("energy", of_energy)):
        found[kind] = folder / "gpu" / f"2026-01-02-{kind}.json"
        harness.write(found[kind], _record(kind, variants))
    return found


def test_the_readme_has_decoding_and_energy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = "a\n<!-- speed:begin -->\n<!-- speed:end -->\nb\n"
    bare = readme.with_speed(empty, None)
    assert "tokens/s" not in bare
    assert "joules" not in bare
    files = _files(tmp_path)
    found = readme.with_speed(empty, None, files["model"])
    assert found.startswith(bare.removesuffix("<!-- speed:end -->\nb\n"))
    assert "| weights | tokens/s | share of floor | speed-up |" in found
    assert "| bfloat16 | 250 | 12% | 1.00 |\n| w4g128 merged | 1000 | 50% | 4.00 |\n" in found
    assert "| w2g64 | refused |  |  |\n| w8g128 | does not fit |  |  |\n" in found
    assert "2 sequences, context 64" in found
    assert "NVIDIA Imaginary, driver 1.2, torch 9.9, Triton 8.8, commit 012345678, 2026-01-02" in found
    assert "joules" not in found
    found = readme.with_speed(empty, None, *files.values())
    assert "tokens/s" in found
    assert "| bfloat16 | 2.000 | 1.500 |\n| w4g128 | 1.000 | 0.750 |\n| w2g64 | refused |  |\n" in found
    assert "joules.png" not in found
    alone = readme.with_speed(empty, None, None, files["energy"])
    assert "| w4g128 | 1.000 | 0.750 |" in alone
    assert "tokens/s" not in alone
    (picture,) = plot.draw_energy(json.loads(files["energy"].read_text()), files["energy"])
    assert f"({picture.as_posix()})" in readme.with_speed(empty, None, *files.values())

    (tmp_path / "README.md").write_text(
        f"<!-- demo:begin -->\n<!-- demo:end -->\n<!-- static:begin -->\n<!-- static:end -->\n"
        f"<!-- accuracy:begin -->\n<!-- accuracy:end -->\n<!-- activations:begin -->\n<!-- activations:end -->\n{empty}"
    )
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(harness, "newest", lambda kind, newest=harness.newest: newest(kind, tmp_path))
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    written = (tmp_path / "README.md").read_text()
    assert "No result file from a GPU yet" in written  # of products
    assert "| w4g128 merged | 1000 |" in written
    assert "| w4g128 | 1.000 | 0.750 |" in written
    assert "(gpu/2026-01-02-energy-joules.png)" in written


def test_joules_are_drawn(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _files(tmp_path)
    record = json.loads(files["energy"].read_text())
    assert plot.bars(record) == {"dense": (1.5, 0.5), "w4g128": (0.75, 0.25)}  # the refused one is left out
    assert plot.main([str(tmp_path)]) == 0
    picture = files["energy"].with_name("2026-01-02-energy-joules.png")
    assert capsys.readouterr().out.splitlines() == [str(picture)]
    first = picture.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot.main([str(files["energy"])]) == 0
    assert picture.read_bytes() == first
    assert list(plot.draw_energy(record | {"variants": record["variants"][2:]}, files["energy"])) == []
    with pytest.raises(SystemExit):
        plot.main([str(files["model"])])
    assert "no result file of benchmarks.matmul or benchmarks.energy" in capsys.readouterr().err


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
    record = energy.figures(Variant("w4g128"), found, 32, Work(4_000_000, 0), SLOW)
    assert record["joules"] == pytest.approx(5100)
    assert record["eta"] == pytest.approx(1e-3 / 0.3)
    table = energy.result_table(_record("energy", [record]) | {"idle_watts": idle})
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
    path = tmp_path / "gpu" / "energy.json"

    def now() -> float:
        board.spend(3, 500)
        seen.append(len(json.loads(path.read_text())["variants"]) if path.exists() else 0)
        return board.seconds

    record = _record("energy", []) | {"context": 8}
    variants = [Variant(None), Variant("w4g128", True)]
    record = energy.run(record, path, "tiny", variants, board.counter, 10, "cpu", now)
    assert sorted(set(seen)) == [0, 1]  # the first is in the file while the second runs
    written = json.loads(path.read_text())
    assert written == record
    assert (written["planned"], written["finished"]) == (2, True)
    assert harness.newest("energy", tmp_path) == path
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
    for scheme, merged in ((None, False), ("w4g128", False), ("w4g128", True), ("w8cs-a8s", True)):
        built = decode.build("tiny", Variant(scheme, merged), "cuda", torch.bfloat16, 64)
        prefill = Prefill(built, 64, 2)
        prefill.step()
        run, keys = prefill.runner(), prefill.cache.layers[1].keys
        wanted = keys.clone()
        keys.zero_()
        run()
        assert torch.equal(keys, wanted)
        captured, eager = Decoder(built, 64, 2), Decoder(built, 64, 2)
        run = captured.runner()
        captured.token.copy_(eager.token)
        for _ in range(4):
            run()
            eager.step()
            assert torch.equal(captured.token, eager.token)


@pytest.mark.gpu
def test_the_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.check(["w4g128"], "cuda")
    ceilings = harness.ceilings()
    found = model.measure("tiny", model.variants_of(["w4g128"]), 64, 1, 2, 4, ceilings)
    assert all(v["eta"] < 1 for v in found)
    assert model.check(["w8a8", "w4a8"], "cuda")
    found = model.measure("tiny", model.variants_of(["w8cs-a8s"]), 64, 1, 2, 4, ceilings, phase=Prefill)
    assert all(v["eta"] < 1 for v in found)
    monkeypatch.setitem(problems.MODELS, "small", (problems.Layer("a", 4096, 4096, 2),))
    with torch.no_grad():
        for total in totals.layer_totals("small", (None, "w4g128"), 1, ceilings):
            assert 1 < total["layers"]["a"]["cold"]["median_us"] < 1000
            assert total["total_us"] == 2 * total["layers"]["a"]["cold"]["median_us"]
