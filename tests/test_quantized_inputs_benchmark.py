"""The benchmark of quantized activations: what stands for layers, its result file, and its table."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from benchmarks import quantized_inputs, readme, subjects
from qkernels import QuantLinear
from tests import models


class _Subject:
    """A tiny Llama, scored by the error of its logits under the metrics of the real language model."""

    name = subjects.LanguageModel.name
    metrics = subjects.LanguageModel.metrics
    about = "1 window"

    def __init__(self) -> None:
        self.model: nn.Module = models.make("llama")
        self.batch = models.inputs("llama")
        self.calibration: list[Any] = [self.batch]

    def score(self, model: nn.Module) -> dict[str, float]:
        wanted, found = (models.output(m, self.batch) for m in (self.model, model))
        error = float((found - wanted).norm() / wanted.norm())
        return {"kl": error, "kl_error": error / 10, "perplexity": 1 + error, "perplexity_error": error / 10}


def _output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return models.output(model, batch)


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g32-a8", "w8cs-a8ts", "w4g32"])
def test_what_stands_for_layers_computes_what_they_do(scheme: str) -> None:
    model, batch = models.make("llama"), models.inputs("llama")
    qkernels.quantize_model(model, scheme, calibration=[batch], progress=False)
    twin = copy.deepcopy(model)
    quantized_inputs.replace_layers(twin)
    assert not any(isinstance(m, QuantLinear) for m in twin.modules())
    assert sum(isinstance(m, quantized_inputs.QuantizedInput) for m in twin.modules()) == 14
    # Sums that float32 rounds in another order move codes of later layers by a step here and there.
    torch.testing.assert_close(_output(twin, batch), _output(model, batch), rtol=0, atol=2e-2)
    layer = qkernels.QuantLinear(qkernels.quantize(torch.randn(8, 64), "w8a8"), torch.randn(8))
    x = torch.randn(5, 64)
    torch.testing.assert_close(quantized_inputs.QuantizedInput(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, _Subject, Any]:
    path, subject = tmp_path_factory.mktemp("results") / "quantized_inputs.json", _Subject()
    before = {name: t.clone() for name, t in subject.model.state_dict().items()}
    rows = [row for row in quantized_inputs.ROWS if quantized_inputs.TORCHAO not in row]
    record = quantized_inputs.run(path, [subject], rows)
    assert all(torch.equal(t, before[name]) for name, t in subject.model.state_dict().items())
    return path, subject, record


def test_rows_are_measured_once_and_differ_as_they_should(
    measured: tuple[pathlib.Path, _Subject, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, subject, record = measured
    assert json.loads(path.read_text()) == record
    found = {(e["scheme"], e["how"]): e for e in record["entries"]}
    assert list(found) == [row for row in quantized_inputs.ROWS if quantized_inputs.TORCHAO not in row]
    assert found["w8cs", ""]["kl"] < found["w8cs-a8s", ""]["kl"] < 0.2
    assert [found[row]["quantized_inputs"] for row in (("w8cs", ""), ("w8cs-a8s", ""))] == [0, 14]
    assert "inputs of 14 of 14 layers quantized, 0 of them static" in quantized_inputs.line(found["w8cs-a8s", ""])
    assert found["w8cs-a8ts", "mse"]["static_inputs"] == 14
    monkeypatch.setattr(quantized_inputs, "measure", lambda *args: {"skipped": "new"})
    again = quantized_inputs.run(path, [subject], [("w8cs", ""), ("w8cs-a8s", quantized_inputs.TORCHAO)])
    assert [e["skipped"] for e in again["entries"] if "skipped" in e] == ["new"]
    path.write_text(json.dumps(record))
    other = copy.copy(subject)
    other.about = "2 windows"  # type: ignore[misc]
    with pytest.raises(ValueError, match="not 2 windows: name another file"):
        quantized_inputs.run(path, [other], [])


def test_the_table_shows_each_row(measured: tuple[pathlib.Path, _Subject, Any]) -> None:
    path, _, record = measured
    path.write_text(json.dumps(record))
    entry = next(e for e in record["entries"] if e["how"] == "mse, fallback 0.05")
    entry.update(quantized_inputs=5, static_inputs=3)
    path.write_text(json.dumps(record))
    block = readme.activations_block(path)
    lines = [line for line in block.splitlines() if line.startswith("| w")]
    assert len(lines) == len(record["entries"])
    shown = next(line for line in lines if "mse, fallback 0.05" in line and "smooth" not in line)
    assert f"{entry['kl']:.4g} / {entry['perplexity']:.4g} (5 of 14, 3 static) |" in shown
    assert "| w8cs |  | " in block
    text = "a\n<!-- activations:begin -->\nold<!-- activations:end -->\nb"
    assert readme.with_activations(text, None) == "a\n<!-- activations:begin -->\n<!-- activations:end -->\nb"


def test_the_peer_quantizes_the_same_layers() -> None:
    pytest.importorskip("torchao")
    subject = _Subject()
    found = quantized_inputs.measure(subject, "w8cs-a8s", quantized_inputs.TORCHAO)
    assert found["layers"] == found["quantized_inputs"] == 14
    assert 0 < found["kl"] < 0.2
