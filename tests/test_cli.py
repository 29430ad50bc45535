"""The command line: what it prints and writes, and one clear line for what it cannot do."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import qkernels
from qkernels import QTensor, cli
from qkernels.formats import native


@pytest.fixture
def model_file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "embed.weight": torch.randn(20, 64),
        "layer.weight": torch.randn(24, 64).bfloat16(),
        "layer.bias": torch.randn(24),
        "conv.weight": torch.randn(4, 4, 3),
        "norm.weight": torch.ones(64),
        "table": torch.ones(3, 5),
    }
    safetensors.torch.save_file(tensors, path)
    return path


def test_quantize_and_inspect(
    model_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert cli.main(["quantize", str(model_file), str(out), "--scheme", "w4g32"]) == 0
    assert "1 of 6 tensors to w4g32: 3.1 kB -> 912 B" in capsys.readouterr().out
    original, stored = safetensors.torch.load_file(model_file), qkernels.load(out)
    assert stored.keys() == original.keys()
    q = stored["layer.weight"]
    assert isinstance(q, QTensor)
    wanted = qkernels.quantize(original["layer.weight"], "w4g32")
    assert all(torch.equal(a, b) for a, b in zip(q.tensors, wanted.tensors, strict=True))
    for name in original.keys() - {"layer.weight"}:
        assert torch.equal(stored[name], original[name])

    assert cli.main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "6 tensors" in text
    (line,) = (line for line in text.splitlines() if "layer.weight" in line)
    assert line.split() == ["layer.weight", "w4g32", "24", "x", "64", "912", "B", "4.75"]


def test_a_method_chooses_the_codes(model_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "small.safetensors"
    assert cli.main(["quantize", str(model_file), str(out), "--scheme", "w2g32", "--method", "search"]) == 0
    q = qkernels.load(out)["layer.weight"]
    assert isinstance(q, QTensor)
    w = safetensors.torch.load_file(model_file)["layer.weight"]
    wanted = qkernels.quantize(w, "w2g32", method="search")
    assert all(torch.equal(a, b) for a, b in zip(q.tensors, wanted.tensors, strict=True))
    assert not torch.equal(q.packed, qkernels.quantize(w, "w2g32").packed)


@pytest.fixture
def plan_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A plan for a layer that model_file holds, and leaves its embedding alone."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 24)})
    path = tmp_path / "plan.json"
    qkernels.plan(model, target_bits=5, candidates=["w3g32", "w4g32"], progress=False).save(path)
    return path


def test_a_plan_names_layers_and_schemes(
    model_file: pathlib.Path, plan_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert cli.main(["quantize", str(model_file), str(out), "--plan", str(plan_file)]) == 0
    assert f"1 of 6 tensors to {plan_file}: 3.1 kB -> 912 B" in capsys.readouterr().out
    stored, w = qkernels.load(out), safetensors.torch.load_file(model_file)["layer.weight"]
    assert [name for name, t in stored.items() if isinstance(t, QTensor)] == ["layer.weight"]
    wanted = qkernels.quantize(w, "w4g32")
    assert all(torch.equal(a, b) for a, b in zip(stored["layer.weight"].tensors, wanted.tensors, strict=True))


def test_plans_that_do_not_fit(
    model_file: pathlib.Path, plan_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    for tensors, message in (
        ({"layers.weight": torch.ones(24, 64)}, f"holds no layer.weight, which {plan_file} names"),
        ({"layer.weight": torch.ones(24, 32)}, "layer is (24, 32) in the model, but (24, 64) in the plan"),
        ({"layer.weight": torch.ones(24, 64, dtype=torch.int32)}, "layer.weight: w must be float16"),
    ):
        safetensors.torch.save_file(tensors, other)
        assert cli.main(["quantize", str(other), str(out), "--plan", str(plan_file)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["quantize", str(model_file), str(out), "--plan", str(plan_file), "--skip", "layer*"]) == 2
    assert "--skip is for --scheme" in capsys.readouterr().err
    assert cli.main(["quantize", str(model_file), str(out), "--plan", str(model_file)]) == 2
    assert "not a plan" in capsys.readouterr().err
    assert not out.exists()


def test_skip_patterns_are_yours_to_choose(model_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "small.safetensors"
    assert cli.main(["quantize", str(model_file), str(out), "--scheme", "w8c", "--skip", "layer*"]) == 0
    stored = qkernels.load(out)
    assert isinstance(stored["embed.weight"], QTensor)
    assert isinstance(stored["layer.weight"], torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "IN", "OUT", "--scheme", "w9g128"], "bits must be from 1 to 8, got 9"),
        (["quantize", "MISSING", "OUT", "--scheme", "w4g32"], "No such file or directory"),
        (["quantize", "TEXT", "OUT", "--scheme", "w4g32"], "not a whole safetensors file"),
        (["quantize", "NAN", "OUT", "--scheme", "w4g32"], "layer.weight: w must be finite, got nan at index (3, 7)"),
        (
            ["quantize", "IN", "OUT", "--scheme", "w4g32", "--skip", "*"],
            "holds no 2-D float16, bfloat16 or float32 weight",
        ),
        (["quantize", "IN", "NOWHERE", "--scheme", "w4g32"], "there is no folder"),
        (["quantize", "IN", "FOLDER", "--scheme", "w4g32"], "is a folder"),
        (["quantize", "IN", "IN", "--scheme", "w4g32"], "is the input itself"),
        (["quantize", "IN", "OUT", "--scheme", "w4g32", "--skip", "layers*"], "--skip layers* fits no tensor"),
        (["inspect", "MISSING"], "No such file or directory"),
        (["inspect", "TEXT"], "not a whole safetensors file"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    arguments: list[str],
    message: str,
    model_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, nan = tmp_path / "notes.txt", tmp_path / "nan.safetensors"
    text.write_text("these are not tensors " * 10)
    weight = torch.randn(8, 64)
    weight[3, 7] = float("nan")
    safetensors.torch.save_file({"layer.weight": weight}, nan)
    out = tmp_path / "out.safetensors"
    out.write_text("kept")
    places = {
        "IN": model_file, "OUT": out, "MISSING": tmp_path / "missing", "TEXT": text, "NAN": nan,
        "NOWHERE": tmp_path / "no" / "such" / "folder", "FOLDER": tmp_path,
    }  # fmt: skip
    before = sorted(tmp_path.iterdir())
    assert cli.main([str(places.get(a, a)) for a in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qkernels: error: ")
    assert message in error
    assert out.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == before


def test_a_quantized_file_is_not_quantized_again(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.safetensors"
    native.write(path, {"layer.weight": qkernels.quantize(torch.randn(8, 64), "w4g32")})
    assert cli.main(["quantize", str(path), str(tmp_path / "again"), "--scheme", "w4g32"]) == 2
    assert "already quantized" in capsys.readouterr().err


def test_the_installed_command_shows_its_help() -> None:
    done = subprocess.run([sys.executable, "-m", "qkernels.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("demo", "quantize", "inspect"))
    done = subprocess.run([sys.executable, "-m", "qkernels.cli"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_a_checkout_that_is_not_installed_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert "not installed" in capsys.readouterr().out
