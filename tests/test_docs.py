"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pathlib
import re
from typing import Any

import pytest
import torch

import qkernels
from benchmarks import readme
from qkernels.demo import fetch
from tests import models, test_load

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name",
    [
        "qkernels.scheme",
        "qkernels.tensor",
        "qkernels.model",
        "qkernels.planning.plan",
        "qkernels.nn",
        "qkernels.activations",
    ],
)
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert found.attempted > 0
    assert found.failed == 0


def test_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert isinstance(names["y"], torch.Tensor)
    assert names["y"].shape == (3, 4096)
    assert "scheme='w4g128', 8,781,824 bytes, 4.19 bits per weight" in capsys.readouterr().out


def test_examples_of_quantized_activations() -> None:
    """Line by line, each on a model of its own; then layers that share codes."""
    _, whole, shared = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    batches = [models.inputs("llama")["input_ids"]]
    for line in whole.splitlines():
        names = {"qkernels": qkernels, "model": models.make("llama"), "batches": batches}
        exec(line, names)
        layer = names["model"].model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
        assert layer.scheme.activations is not None
    model = models.make("llama")
    qkernels.quantize_model(model, "w8a8", progress=False)
    norm, attention = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn
    hidden = torch.randn(2, 5, norm.weight.numel())
    projections = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}
    names = {"qkernels": qkernels, "hidden": hidden, "norm": norm, **projections}
    exec(shared, names)
    wanted = attention.q_proj(norm(hidden)).detach()
    torch.testing.assert_close(names["q"].detach(), wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max().detach()))


def test_lines_of_ours_for_those_who_come_from_elsewhere(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands after a + in the README runs, where there is such a model."""
    from transformers import AutoModelForCausalLM

    models.make("llama").save_pretrained(tmp_path / "model")
    quantized = models.make("llama")
    qkernels.quantize_model(quantized, "w4g32", progress=False)
    _, pack, config = test_load.FORMATS["gptq"]
    test_load.write(tmp_path / "model-gptq", quantized, pack, config)
    (tmp_path / "model.gguf").symlink_to(fetch.fetch(fetch.SMOLLM2))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        lines = block.splitlines()
        assert all(line.startswith(("- ", "+ ")) for line in lines)
        names: dict[str, Any] = {
            "qkernels": qkernels, "AutoModelForCausalLM": AutoModelForCausalLM, "model": models.make("llama"),
        }  # fmt: skip
        exec("\n".join(line[2:] for line in lines if line.startswith("+ ")), names)
        assert any(isinstance(m, qkernels.QuantLinear) for m in names["model"].modules())


def test_table_of_the_readme_is_that_of_the_result_file() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.with_table(text, json.loads(readme.RESULT.read_text())) == text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_outputs_of_notebooks_are_whole_and_clean(path: pathlib.Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        text = "".join(
            "".join(part) for part in (output.get("text", ""), *data.values()) if part != data.get("image/png")
        )
        found = re.search(r"/(tmp|home|root|work|Users)/|\d+%\||\x1b", text)  # paths, progress bars, escapes
        assert found is None, found


def test_everything_public_is_documented() -> None:
    for name in qkernels.__all__:
        thing = getattr(qkernels, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{attribute}"
