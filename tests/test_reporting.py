"""The quality report: its figures worked out anew from activations, its columns, files and errors."""

from __future__ import annotations

import copy
import csv
import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import cli
from qkernels.formats import native


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Any, list[Tensor], qkernels.QualityReport]:
    reference = _llama()
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight[3, 5] = 3.0  # against 0.02: an outlier
    model = copy.deepcopy(reference)
    qkernels.quantize_model(model, "w4g32", method="rtn", schemes={"*.down_proj": "w8cs"}, progress=False)
    batches = list(torch.randint(0, 97, (3, 2, 20), generator=torch.Generator().manual_seed(1)))
    return reference, model, batches, qkernels.report(model, reference, batches)


def test_output_errors_are_those_of_the_activations(measured: Any) -> None:
    reference, model, batches, report = measured
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        seen: list[Tensor] = []
        hook = reference.get_submodule(name).register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                reference(batch)
        hook.remove()
        x = torch.cat([s.flatten(0, -2) for s in seen]).double()
        w, quantized = (
            t.detach().double()
            for t in (reference.get_submodule(name).weight, model.get_submodule(name).qweight.dequantize())
        )
        (row,) = (row for row in report if row.name == name)
        assert row.output_error == pytest.approx(((x @ (w - quantized).T).norm() / (x @ w.T).norm()).item(), rel=1e-3)
        assert row.snr_db == pytest.approx(20 * math.log10(w.norm() / (w - quantized).norm()), rel=1e-4)


def test_steps_and_outliers_are_counted(measured: Any) -> None:
    _, model, _, report = measured
    steps = report["max_error_steps"]
    assert max(steps) <= 0.5 + 1e-3
    assert min(steps) > 0.4
    share = dict(zip(report["name"], report["outlier_share"], strict=True))
    assert share["model.layers.0.mlp.up_proj"] == pytest.approx(1 / (96 * 64))
    assert share["model.layers.1.mlp.up_proj"] == 0
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qkernels.QuantLinear)}
    assert report["name"] == list(layers)
    assert report.nbytes == sum(m.qweight.nbytes for m in layers.values())
    assert {row.scheme for row in report if "down_proj" in row.name} == {"w8cs"}


def test_the_model_is_scored_against_its_reference(measured: Any) -> None:
    reference, model, batches, report = measured
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ours, theirs = (m(batch).logits[:, :-1].double().log_softmax(-1) for m in (model, reference))
            for i, found in enumerate((ours, theirs)):
                losses[i] -= found.gather(-1, batch[:, 1:, None]).sum().item()
            divergence += (theirs.exp() * (theirs - ours)).sum().item()
            count += batch[:, 1:].numel()
    quality = report.model
    assert quality.predictions == count
    assert quality.perplexity == pytest.approx(math.exp(losses[0] / count), rel=1e-5)
    assert quality.reference_perplexity == pytest.approx(math.exp(losses[1] / count), rel=1e-5)
    assert quality.kl == pytest.approx(divergence / count, rel=1e-2)


def test_columns_order_and_files(measured: Any, tmp_path: pathlib.Path) -> None:
    report = measured[3]
    assert len(report) == 14
    assert report.sort("snr_db")["snr_db"] == sorted(report["snr_db"])
    assert [row.name for row in report.worst(2)] == [
        row.name for row in sorted(report, key=lambda row: -row.output_error)[:2]
    ]
    assert report.to_dicts()[0]["scheme"] == "w4g32"
    assert "KL" in str(report)
    assert "<table" in report._repr_html_()
    with pytest.raises((KeyError, ValueError), match="snr"):
        report["loudness"]
    paths = report.save(tmp_path / "out")
    assert {"report.csv", "report.html"} < {path.name for path in paths}
    assert any(path.suffix == ".png" and path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == report["name"]
    assert float(rows[3]["output_error"]) == pytest.approx(report["output_error"][3])


class Hostile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _pair() -> tuple[nn.Module, nn.Module]:
    reference = Hostile()
    model = copy.deepcopy(reference)
    qkernels.quantize_model(model, "w4g32", progress=False)
    return model, reference


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches"),
        ([torch.randn(2, 32)], "unused"),
        ([torch.full((2, 32), torch.nan)], "used"),
        ([torch.randn(2, 31)], "fails on batch 0: RuntimeError"),
    ],
)
def test_batches_that_do_not_serve(batches: list[Tensor], message: str) -> None:
    model, reference = _pair()
    with pytest.raises(ValueError, match=message):
        qkernels.report(model, reference, batches)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *reference.modules()])


def test_models_that_do_not_belong_together() -> None:
    model, reference = _pair()
    with pytest.raises(ValueError, match="holds no QuantLinear"):
        qkernels.report(reference, reference)
    with pytest.raises(ValueError, match="is quantized in reference, too"):
        qkernels.report(model, model)
    with pytest.raises(ValueError, match="has no layer 'used'"):
        qkernels.report(model, nn.Sequential(nn.Linear(32, 32)))


def test_the_command_compares_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors.torch

    w = torch.randn(24, 64)
    safetensors.torch.save_file({"layer.weight": w}, tmp_path / "reference.safetensors")
    q = qkernels.quantize(w, "w4g32")
    native.write(tmp_path / "small.safetensors", {"layer.weight": q})
    arguments = ["report", str(tmp_path / "small.safetensors"), "--reference", str(tmp_path / "reference.safetensors")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert f"{q.error(w).snr_db:.1f}" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.csv").exists()
    assert cli.main(["report", str(tmp_path / "none"), "--reference", str(tmp_path / "reference.safetensors")]) == 2
    assert "none" in capsys.readouterr().err
