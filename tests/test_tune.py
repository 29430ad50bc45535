"""Tables of configurations and the search that fills them; the search itself runs on a GPU."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

from qkernels import tune
from qkernels.cli import main
from qkernels.scheme import Scheme
from qkernels.tuning import choose, tables, timing
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import H200, Device
from qkernels.tuning.tables import Entry
from tests.conftest import HAS_GPU

W4 = Scheme.parse("w4g128")
CONFIG = MatmulConfig(16, 128, blocks=2, splits=5, num_warps=2, num_stages=4, max_registers=200)
BATCH = dataclasses.replace(CONFIG, block_m=64)


def entry(tokens: int, config: MatmulConfig | DenseConfig, shape: tuple[int, int] = (4096, 4096)) -> Entry:
    return Entry("w4g128", "bfloat16", *shape, tokens, config, us=1.0, default_us=2.0)


@pytest.fixture
def table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path))
    path = tables.user_path(H200)
    tables.write(
        path, H200, {"date": "today"},
        [entry(64, BATCH), entry(8, CONFIG), entry(4096, DenseConfig(4096)), entry(8, BATCH, (28672, 4096))],
    )  # fmt: skip
    yield path
    tables.forget()


def _lookup(tokens: int, out_features: int = 4096, in_features: int = 4096, scheme: str = "w4g128") -> object:
    return tables.lookup(tokens, out_features, in_features, Scheme.parse(scheme), torch.bfloat16, H200)


def test_what_a_table_says(table: pathlib.Path) -> None:
    assert table.name == "nvidia-h200.json"
    assert [_lookup(m) for m in (1, 8, 9, 64, 65, 4096, 4097)] == [
        CONFIG, CONFIG, BATCH, BATCH, DenseConfig(4096), DenseConfig(4096), None,
    ]  # fmt: skip
    assert _lookup(1, 5000, 3000) == CONFIG  # like 4096 x 4096
    assert _lookup(1, 20000, 4096) == BATCH  # like 28672 x 4096
    assert _lookup(1, 4096, 8193) is None  # like none
    assert _lookup(1, scheme="w4g64") is None
    assert _lookup(1, scheme="w4g128-bf16") == CONFIG  # how scales are stored changes little
    assert tables.lookup(1, 4096, 4096, W4, torch.float16, H200) is None
    assert tables.lookup(1, 4096, 4096, W4, torch.bfloat16, Device("NVIDIA L4", 89, 58)) is None


def test_choices_follow_the_table(table: pathlib.Path) -> None:
    assert choose.matmul(1, 4096, 4096, W4, torch.bfloat16, H200) == CONFIG
    assert choose.matmul(1, 4096, 4096, W4, torch.float16, H200) == choose.heuristic(
        1, 4096, 4096, W4, torch.float16, H200
    )


def test_scaled_weights_only_where_they_can_be(table: pathlib.Path) -> None:
    scaled = dataclasses.replace(CONFIG, scale_weights=True)
    tables.write(table, H200, {}, [entry(8, scaled)])
    assert _lookup(1) is None  # float16 scales, bfloat16 x
    assert _lookup(1, scheme="w4g128-bf16") == scaled
    assert not tables.fits(scaled, Scheme.parse("w4c-bf16"), torch.bfloat16, 1, 4096)
    assert not tables.fits(scaled, Scheme.parse("w4g32f-bf16"), torch.bfloat16, 1, 4096)
    assert not tables.fits(scaled, Scheme.parse("w4g32-fp32"), torch.float32, 1, 4096)


def test_products_of_codes_have_configurations_of_their_own(table: pathlib.Path) -> None:
    """A table of weight-only products says nothing of them; torch._int_mm only where it can be."""
    dense, w8a8 = DenseConfig(4096), Scheme.parse("w8a8")
    tables.write(table, H200, {}, [dataclasses.replace(entry(64, dense), scheme=s) for s in ("w8cs", "w8a8")])
    assert _lookup(64, scheme="w8cs-a8s") == _lookup(64, scheme="w8cs") == _lookup(1, scheme="w8cs") == dense
    assert _lookup(16, scheme="w8cs-a8s") is None  # it takes more than 16 tokens
    assert _lookup(64, scheme="w8cs-a8") is None
    assert tables.fits(dense, w8a8, torch.bfloat16, 17, 64)
    assert not tables.fits(dense, w8a8, torch.bfloat16, 17, 80)
    for other in ("w8c-a8s", "w8g64s-a8s", "w4cs-a8s", "w8cs-a8"):
        assert not tables.fits(dense, Scheme.parse(other), torch.bfloat16, 17, 128), other
    assert tables.fits(dense, Scheme.parse("w8g128s-a8s"), torch.bfloat16, 17, 128)  # all of K is one group
    assert not tables.fits(
        dataclasses.replace(CONFIG, scale_weights=True), Scheme.parse("w4g128-bf16-a8s"), torch.bfloat16, 1, 4096
    )


def test_tables_survive_a_round_trip(table: pathlib.Path) -> None:
    entries = tables.read(table)
    tables.write(table, H200, {}, entries)
    assert tables.read(table) == entries
    assert [path.name for path in table.parent.iterdir()] == [table.name]  # no temporary file is left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "'other'"),
        ({"tokens": 0}, "tokens 0"),
        ({"dtype": "float17"}, "float17"),
        ({"scheme": "w9"}, "w9"),
        ({"config": {}}, "missing"),
        ({"config": dataclasses.asdict(CONFIG) | {"block_m": 24}}, "power of two"),
        ({"config": dataclasses.asdict(CONFIG) | {"splits": 0}}, "splits must be a positive int, got 0"),
        ({"config": dataclasses.asdict(CONFIG) | {"max_registers": 256}}, "max_registers"),
        ({"config": dataclasses.asdict(CONFIG) | {"surprise": 1}}, "surprise"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_broken_table_is_named(table: pathlib.Path, change: dict[str, object], message: str) -> None:
    content = json.loads(table.read_text())
    content["entries"][0].update(change)
    table.write_text(json.dumps(content))
    tables.forget()
    with pytest.raises(ValueError, match=message) as error:
        _lookup(1)
    assert str(table) in str(error.value)


# ---- the search ----


@pytest.mark.parametrize("tokens", [1, 16, 33, 512])
@pytest.mark.parametrize("scheme", ["w4g128", "w3g64f", "w8c-bf16", "w4g128-bf16"])
def test_candidates_are_possible_and_hold_the_default(tokens: int, scheme: str) -> None:
    problem = tune.Problem(tokens, 4096, 4096, scheme, "bfloat16")
    default = choose.heuristic(tokens, 4096, 4096, problem.parsed, torch.bfloat16, H200)
    found = tune.tiles(default, problem, H200)
    assert found[0] == default
    best = next(config for config in found if isinstance(config, MatmulConfig))
    found += tune.splits(best, problem, H200) + tune.pipelines(best, problem, H200)
    for config in found:
        tables.check(config)
        assert tables.fits(config, problem.parsed, torch.bfloat16, tokens, 4096)
    assert any(isinstance(config, DenseConfig) for config in found) == (tokens >= 32)
    assert any(getattr(config, "scale_weights", False) for config in found) == (scheme == "w4g128-bf16")
    assert tune.splits(DenseConfig(5), problem, H200) == tune.pipelines(DenseConfig(5), problem, H200) == []


def test_wrong_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.Problem(3, 40, 256, "w4g64", "float16")
    operands = tune.exact_operands(problem, "cpu")
    wanted = tune.truth(operands, problem)
    results = {"right": wanted, "wrong": wanted.clone()}
    results["wrong"][2, 39] += 1
    for name, message in (("right", None), ("wrong", "1 of 120 results are wrong")):
        monkeypatch.setattr(tune, "product", lambda *_, name=name: results[name])
        assert tune.refusal(operands, wanted, problem, CONFIG) == message

    def fail(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(tune, "product", fail)
    assert tune.refusal(operands, wanted, problem, CONFIG) == "RuntimeError: out of resource: shared memory"


@pytest.mark.parametrize("scheme", ["w4g64", "w8c", "w3g32f", "w2g128s", "w8g16"])
def test_proofs_are_exact(scheme: str, device: str) -> None:
    """Of our own kernel too: whatever is right must not be refused."""
    problem = tune.Problem(3, 33, 288, scheme, "bfloat16")
    operands = tune.exact_operands(problem, device)
    assert len(operands.scale.unique()) > 1 or operands.scale.numel() == 1
    config = choose.fused(3, 33, 288, problem.parsed, torch.bfloat16, H200)
    assert tune.refusal(operands, tune.truth(operands, problem), problem, config) is None


def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that a rule makes up: each round starts from the best of the one before."""
    configs: dict[str, object] = {}

    def product(_: object, __: object, config: object) -> torch.Tensor:
        configs["last"] = config
        return torch.zeros(())

    def cold(candidates: dict[str, list[object]], seed: int) -> dict[str, timing.Timing]:
        found = {}
        for name, calls in candidates.items():
            calls[0]()  # type: ignore[operator]
            config = configs["last"]
            us = 100.0
            if isinstance(config, MatmulConfig):
                us = 10 + abs(config.block_n - 128) + abs(config.splits - 6) + abs(config.num_stages - 5)
            found[name] = timing.Timing(us, us, us, 30, 1)
        return found

    monkeypatch.setattr(tune, "product", product)
    monkeypatch.setattr(tune, "refusal", lambda *_: None)
    monkeypatch.setattr(timing, "cold", cold)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    problem = tune.Problem(1, 256, 4096, "w4g128", "bfloat16")
    found, refused = tune.best_of(problem, "cpu")
    assert refused == {}
    assert isinstance(found.config, MatmulConfig)
    assert (found.config.block_n, found.config.splits, found.config.num_stages) == (128, 6, 5)
    assert found.us == 10
    assert found.default_us > 70


def test_problems_come_with_few_tokens_first() -> None:
    found = list(tune.problems([(8, 16), (8, 32), (8, 16)], ["w4g128"], ["float16"], [8, 1]))
    assert [(p.tokens, p.in_features) for p in found] == [(1, 16), (1, 32), (8, 16), (8, 32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "GPT-5"], "'GPT-5' is not one of Llama-3-8B"),
        (["--shapes", "4096"], "NxK"),
        (["--schemes", "w99"], "w99"),
    ],
)
def test_tune_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "tuning needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "table.json"
    assert main(["tune", "--shapes", "512x1024", "--tokens", "1", "64", "--out", str(path)]) == 0
    entries = tables.read(path)
    assert [e.tokens for e in entries] == [1, 64]
    assert all(0 < e.us <= e.default_us * 1.2 for e in entries)
