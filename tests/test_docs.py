"""What the documentation shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pathlib
import re

import pytest
import torch

import qkernels
from benchmarks import readme

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["qkernels.scheme", "qkernels.tensor", "qkernels.model", "qkernels.planning.plan"])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert found.attempted > 0
    assert found.failed == 0


def test_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert isinstance(names["y"], torch.Tensor)
    assert names["y"].shape == (3, 4096)
    assert "scheme='w4g128', 8,781,824 bytes, 4.19 bits per weight" in capsys.readouterr().out


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
