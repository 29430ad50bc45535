"""What needs a GPU is staged to run there at once: commands that exist, stages that stop in time, honest summaries."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import sys

import pytest
import torch

from benchmarks import prove, stress
from benchmarks.prove import Stage
from qkernels import tune
from qkernels.tuning import tables
from qkernels.tuning.configs import MatmulConfig
from qkernels.tuning.devices import H200
from tests.conftest import HAS_GPU


def _stage(name: str, code: str, proof: bool = False) -> Stage:
    return Stage(name, (sys.executable, "-c", code), 1.0, proof)


def _statuses(out: pathlib.Path) -> dict[str, object]:
    return {s["stage"]: s["status"] for s in json.loads((out / "summary.json").read_text())["stages"]}


def test_stages_run_in_turn_and_are_summed_up(tmp_path: pathlib.Path) -> None:
    told = (sys.executable, "-c", "import os; print(os.environ['WHAT'])")
    chosen = [
        _stage("proof", "print('fine')", proof=True),
        _stage("fails", "import sys; print('oh'); sys.exit(3)"),
        Stage("absent", ("no-such-program",), 1.0),
        _stage("endless", "print('begun', flush=True)\nwhile True: pass"),
        Stage("told", told, 1.0, environment=(("WHAT", "x"),)),
    ]
    assert prove.run(chosen, tmp_path, seconds=15) == 3
    assert _statuses(tmp_path) == {
        "proof": 0, "fails": 3, "absent": "not run: no no-such-program", "endless": "stopped after 3 s", "told": 0,
    }  # fmt: skip
    assert (tmp_path / "endless.log").read_text() == "begun\n"
    assert (tmp_path / "told.log").read_text() == "x\n"


def test_nothing_is_timed_once_a_proof_has_failed(tmp_path: pathlib.Path) -> None:
    chosen = [
        _stage("proof", "raise SystemExit(1)", proof=True),
        _stage("speed", "print('fast')"),
        _stage("other proof", "", proof=True),
    ]
    assert prove.run(chosen, tmp_path, seconds=60) == 2
    assert _statuses(tmp_path) == {"proof": 1, "speed": "not run: a proof failed", "other proof": 0}


def test_every_test_that_only_a_gpu_runs_is_in_a_stage(tmp_path: pathlib.Path) -> None:
    told = {argument for stage in prove.stages(tmp_path, 3600, H200) for argument in stage.command}
    files = pathlib.Path(__file__).parent.glob("test_*.py")
    only = {f"tests/{file.name}" for file in files if "\npytestmark = pytest.mark.gpu\n" in file.read_text()}
    assert "tests/test_gpu_int8.py" in only
    assert only <= told


def test_commands_exist(tmp_path: pathlib.Path) -> None:
    """Modules take the options that stages give them, as far as that shows without a GPU."""
    found = prove.stages(tmp_path, 3600, H200)
    assert sum(stage.weight for stage in found) == pytest.approx(1, abs=0.05)
    assert len({stage.name for stage in found}) == len(found)
    root = pathlib.Path(prove.__file__).parent.parent
    for stage in found:
        if stage.command[1:2] == ("-m",) and stage.command[2] not in ("pytest", "benchmarks.plot"):
            __import__(stage.command[2])
        for word in stage.command:
            if word.startswith("tests/"):
                assert (root / word).exists()
    (table,) = (word for stage in found if stage.name == "tune" for word in stage.command if word.endswith(".json"))
    assert pathlib.Path(table) == tmp_path / "tuning" / tables.user_path(H200).name


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove.main(["--out", str(tmp_path)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out
    assert prove.main(["--out", str(tmp_path), "--list", "--stages", "stress", "tune", "--minutes", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["stress", "tune"]
    assert sum(int(line.split("(")[1].split()[0]) for line in lines) == pytest.approx(540, abs=2)
    with pytest.raises(SystemExit):
        prove.main(["--out", str(tmp_path), "--list", "--stages", "nothing"])
    assert stress.main([]) == 2


def test_stress_covers_much_and_only_what_is_possible() -> None:
    generator = random.Random(0)
    seen, by_torch = set(), 0
    for _ in range(1500):
        problem = stress.random_problem(generator, 2100)
        assert problem.in_features >= 16 <= problem.tokens + 15
        config = stress.random_config(generator, problem)
        tables.check(config)
        assert tables.fits(config, problem.parsed, problem.torch_dtype, problem.tokens, problem.in_features)
        seen |= {("bits", problem.parsed.bits), ("map", problem.parsed.value_map), ("group", problem.parsed.group_size)}
        int8 = problem.parsed.activations
        seen.add(("activations", None if int8 is None else int8.symmetric))
        if isinstance(config, MatmulConfig):
            seen |= {("warps", config.num_warps), ("scaled", config.scale_weights), ("m", config.block_m)}
        else:
            assert int8 is not None
            seen.add(("torch", config.rows < problem.out_features))
            by_torch += 1
    assert by_torch > 15
    assert len(seen) == 8 + 3 + 8 + 3 + 4 + 2 + 6 + 2


@pytest.mark.skipif(HAS_GPU, reason="the interpreter's turn is without one")
def test_stress_in_the_interpreter(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stress.run(6, seed=1, device="cpu", largest=40, out=tmp_path / "stress.json")
    assert sum(found["right"].values()) >= 3
    assert found["wrong"] == []
    assert found["impossible"] == {}
    assert json.loads((tmp_path / "stress.json").read_text()) == found

    monkeypatch.setattr(stress, "INT8_SHARE", 1.0)
    found = stress.run(6, seed=3, device="cpu", largest=80)
    assert sum(found["right"].values()) >= 3
    assert found["wrong"] == []
    assert found["impossible"] == {}

    exact = tune.product
    monkeypatch.setattr(tune, "product", lambda *args: exact(*args) + torch.finfo(torch.float16).eps * 8)
    found = stress.run(1, seed=1, device="cpu", largest=40)
    assert found["wrong"]
    assert dataclasses.asdict(stress.random_problem(random.Random(1), 40)).keys() == found["wrong"][0]["problem"].keys()
