"""Tables of configurations and the search that fills them; the search itself runs on a GPU."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import pytest
import torch

from qkernels import reference, reference_int8, tune
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


def test_entries_of_floats_do_not_serve_codes(table: pathlib.Path) -> None:
    """Codes of activations are multiplied by another kernel, which other configurations suit."""
    assert _lookup(1, scheme="w4g128-a8s") is _lookup(1, scheme="w4g128-a8") is None
    own = dataclasses.replace(CONFIG, block_m=32)
    tables.write(table, H200, {}, [entry(8, CONFIG), dataclasses.replace(entry(8, own), scheme="w4g128-a8s")])
    assert _lookup(1) == CONFIG
    assert _lookup(1, scheme="w4g128-a8s") == _lookup(1, scheme="w4g128-bf16-a8ts") == own  # one scale is as another
    assert _lookup(1, scheme="w4g128-a8") is None  # zeros of activations add work


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
@pytest.mark.parametrize("scheme", ["w4g128", "w3g64f", "w8c-bf16", "w4g128-bf16", "w8cs-a8s", "w4g128-bf16-a8"])
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
    has_dense = tokens >= 32 and scheme != "w4g128-bf16-a8"  # there is none of 4-bit codes
    assert any(isinstance(config, DenseConfig) for config in found) == has_dense
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


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g64-a8", "w8c-a8"])
def test_codes_are_multiplied_by_the_configuration_that_is_tried(scheme: str, device: str) -> None:
    problem = tune.Problem(3, 33, 288, scheme, "bfloat16")
    operands = tune.exact_operands(problem, device)
    wanted = tune.truth(operands, problem)
    config = choose.fused(3, 33, 288, problem.parsed, torch.bfloat16, H200)
    assert tune.refusal(operands, wanted, problem, config) is None
    assert tune.refusal(operands, torch.full_like(wanted, torch.nan), problem, config) == "99 of 99 results are wrong"


def test_cublas_must_prove_products_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of integers are exact, whoever adds them up."""
    for scheme, message in (("w8cs-a8s", "1 of 24 results are wrong"), ("w8cs", None)):
        problem = tune.Problem(3, 8, 64, scheme, "float16")
        operands = tune.exact_operands(problem, "cpu")
        wrong = tune.truth(operands, problem)
        wrong[0, 0] = torch.nan
        monkeypatch.setattr(tune, "product", lambda *_, wrong=wrong: wrong)
        assert tune.refusal(operands, tune.truth(operands, problem), problem, DenseConfig(8)) == message


def test_static_activations_are_tuned_as_dynamic_ones() -> None:
    with pytest.raises(
        ValueError, match="w8cs-a8ts is multiplied as w8cs-a8s is, and served by its entries: tune that"
    ):
        list(tune.problems([(8, 16)], ["w4g128", "w8cs-a8ts"], ["float16"], [1]))


Times = Callable[[object], float]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], None]:
    """Times of configurations, None for a dense product, are what a rule says."""

    def use(us_of: Times) -> None:
        ran: list[object] = []

        def product(_: object, __: object, config: object) -> torch.Tensor:
            ran.append(config)
            return torch.zeros(())

        def cold(candidates: dict[str, list[Callable[[], object]]], seed: int) -> dict[str, timing.Timing]:
            found = {}
            for name, calls in candidates.items():
                ran.clear()
                calls[0]()
                us = us_of(ran[0] if ran else None)
                found[name] = timing.Timing(us, us, us, 30, 1)
            return found

        monkeypatch.setattr(tune, "product", product)
        monkeypatch.setattr(tune, "refusal", lambda *_: None)
        monkeypatch.setattr(timing, "cold", cold)
        monkeypatch.setattr(timing, "l2_bytes", lambda: 1000)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)

    return use


def test_the_fastest_is_kept(made_up: Callable[[Times], None]) -> None:
    """Each round starts from the best of the one before."""

    def us_of(config: object) -> float:
        if isinstance(config, MatmulConfig):
            return 10 + abs(config.block_n - 128) + abs(config.splits - 6) + abs(config.num_stages - 5)
        return 100

    made_up(us_of)
    problem = tune.Problem(1, 256, 4096, "w4g128", "bfloat16")
    found, refused = tune.best_of(problem, "cpu")
    assert refused == {}
    assert isinstance(found.config, MatmulConfig)
    assert (found.config.block_n, found.config.splits, found.config.num_stages) == (128, 6, 5)
    assert found.us == 10
    assert found.default_us > 70
    assert found.dense_us is None


@pytest.mark.parametrize(("torch_us", "kind"), [(5.0, DenseConfig), (50.0, MatmulConfig)])
def test_the_faster_product_of_codes_is_kept(
    torch_us: float, kind: type, made_up: Callable[[Times], None], tmp_path: pathlib.Path
) -> None:
    """Of this package's kernel and torch's; beside it stands what a dense product would take."""

    def us_of(config: object) -> float:
        return 7.0 if config is None else torch_us if isinstance(config, DenseConfig) else 20.0

    made_up(us_of)
    entries = [
        tune.best_of(tune.Problem(tokens, 256, 128, "w8cs-a8s", "bfloat16"), "cpu")[0] for tokens in (16, 32, 64)
    ]
    few, more, many = entries
    assert isinstance(few.config, MatmulConfig)  # torch takes more than 16 tokens
    assert isinstance(more.config, kind)
    assert isinstance(many.config, kind)
    assert many.us == min(torch_us, 20)
    assert (few.dense_us, more.dense_us, many.dense_us) == (None, None, 7.0)
    path = tmp_path / "table.json"
    tables.write(path, H200, {}, entries)
    assert tables.read(path) == entries
    printed = tune.report("title", entries).splitlines()
    slower = "WARNING: slower than cuBLAS with a dense weight: w8cs-a8s 256 x 128 at 64 tokens (20.00 us, not 7.00)"
    assert printed[-1] == slower if torch_us == 50 else "WARNING" not in "".join(printed)
    assert sum("7.00" in line for line in printed if "WARNING" not in line) == 1


def test_dense_products_have_weights_that_are_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 10_000)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    calls = tune.dense_calls(tune.Problem(3, 32, 64, "w8cs-a8s", "bfloat16"), x)
    assert len(calls) == -(-3 * 10_000 // (2 * 32 * 64))
    results = [call() for call in calls]
    assert results[0].shape == (3, 32)
    assert not torch.equal(results[0], results[1])


INT8 = ["w8cs-a8s", "w8c-a8", "w8ts-a8", "w4g64-a8s", "w4g128s-a8", "w8g16-a8", "w4cs-bf16-a8s"]


@pytest.mark.parametrize("tokens", [1, 16, 17, 1024])
@pytest.mark.parametrize("scheme", INT8)
def test_candidates_of_products_of_codes(tokens: int, scheme: str) -> None:
    problem = tune.Problem(tokens, 4096, 14336, scheme, "bfloat16")
    given = problem.parsed, torch.bfloat16, tokens, 14336
    default = choose.heuristic(tokens, 4096, 14336, problem.parsed, torch.bfloat16, H200)
    found = tune.tiles(default, problem, H200)
    assert found[0] == default
    assert len(found) == len(set(found)) >= 5
    dense = {config for config in found if isinstance(config, DenseConfig)}
    # The whole weight as int8 is less than the workspace; 1024 rows of it stay in L2.
    assert dense == ({DenseConfig(4096), DenseConfig(1024)} if scheme == "w8cs-a8s" and tokens > 16 else set())
    best = next(config for config in found if isinstance(config, MatmulConfig))
    for config in [*found, *tune.splits(best, problem, H200), *tune.pipelines(best, problem, H200)]:
        tables.check(config)
        assert tables.fits(config, *given)
        if isinstance(config, MatmulConfig):
            assert not config.scale_weights
            assert 32 * config.num_warps * config.max_registers <= 65536
            sums = config.block_m * config.block_n // (32 * config.num_warps)
            if config in found[2:] and config.num_warps == 8:  # two programs at a time, if sums leave room
                assert config.max_registers == (255 if sums > 64 else 128)
    tiles = {(config.block_m, config.block_n) for config in found if isinstance(config, MatmulConfig)}
    assert ((256, 128) in tiles) == ((128, 256) in tiles) == (tokens == 1024)
    assert all(block_m <= max(16, 2 * tokens) for block_m, _ in tiles)


@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_of_a_proof_stand_for_x_exactly(scheme: str, dtype: str) -> None:
    problem = tune.Problem(40, 24, 320, scheme, dtype)
    operands, how = tune.exact_operands(problem, "cpu"), problem.parsed.activations
    assert how is not None
    code, scale, zero = reference_int8.quantize_activations(operands.x, how)
    assert torch.equal(reference_int8.dequantize_activations(code, scale, zero), operands.x.float())
    assert set(scale.tolist()) == {0.125, 0.25, 0.5, 1.0}
    assert zero is None or len(zero.unique()) > 10
    assert len(code.unique()) > 20  # not -1, 0 and 1 alone
    y = reference_int8.matmul(
        code, scale, zero, operands.packed, operands.scale, operands.zero, None, problem.parsed, problem.torch_dtype
    )
    assert torch.equal(y, tune.truth(operands, problem))
    assert len(y.unique()) > 100


@pytest.mark.parametrize("scheme", INT8)
def test_proofs_of_products_of_codes_are_exact(scheme: str, device: str) -> None:
    problem = tune.Problem(19, 40, 192, scheme, "bfloat16")
    operands = tune.exact_operands(problem, device)
    wanted = tune.truth(operands, problem)
    fused = choose.fused(19, 40, 192, problem.parsed, torch.bfloat16, H200)
    configs = [fused, dataclasses.replace(fused, splits=2)]
    configs += [DenseConfig(16)] if scheme == "w8cs-a8s" else []
    for config in configs:
        assert tune.refusal(operands, wanted, problem, config) is None, config


@pytest.mark.parametrize(("out_features", "in_features", "rows"), [(512, 4096, [512]), (57344, 8192, [28672, 2048])])
def test_rows_of_torchs_product_of_codes(out_features: int, in_features: int, rows: list[int]) -> None:
    """As many as the workspace holds as int8, and as many as stay in L2; never more than there are."""
    problem = tune.Problem(64, out_features, in_features, "w8cs-a8s", "bfloat16")
    found = tune.tiles(DenseConfig(rows[0]), problem, H200)
    assert [config.rows for config in found if isinstance(config, DenseConfig)] == rows


@pytest.mark.parametrize("scheme", ["w8g16-a8", "w8c-a8s", "w4g64-a8s", "w4g128s-a8"])
@pytest.mark.parametrize("in_features", [64, 4096, 14336])
def test_sums_of_a_proof_are_exact_in_float32(scheme: str, in_features: int) -> None:
    """Whatever part of them comes first, in the smallest scale that there is; of one group before it is scaled."""
    problem = tune.Problem(3, 8, in_features, scheme, "bfloat16")
    operands, how = tune.exact_operands(problem, "cpu"), problem.parsed.activations
    assert how is not None
    _, x_scale, _ = reference_int8.quantize_activations(operands.x, how)
    smallest = operands.scale.float().min(dim=0).values
    weight = operands.packed, operands.scale, operands.zero
    w = reference.dequantize(*weight, problem.parsed, in_features, torch.float32) / smallest[:, None]
    size = (operands.x.float() / x_scale[:, None]).abs().double() @ w.abs().double().T
    assert size.max() <= 2**24


def test_a_proof_of_one_value() -> None:
    """K = 1: the ends of a range cannot both be there."""
    for scheme in ("w8c-a8", "w8c-a8s"):
        problem = tune.Problem(5, 3, 1, scheme, "bfloat16")
        operands, how = tune.exact_operands(problem, "cpu"), problem.parsed.activations
        assert how is not None
        codes = reference_int8.quantize_activations(operands.x, how)
        assert torch.equal(reference_int8.dequantize_activations(*codes), operands.x.float())


def test_tokens_of_products_of_codes() -> None:
    found = list(tune.problems([(8, 16)], ["w4g128", "w8a8"], ["float16"], None))
    tokens = {scheme: [p.tokens for p in found if p.scheme == scheme] for scheme in ("w4g128", "w8cs-a8s")}
    assert tokens == {"w4g128": list(tune.TOKENS), "w8cs-a8s": [*tune.TOKENS, 2048, 4096, 8192]}


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


@pytest.mark.gpu
def test_tuning_products_of_codes_on_a_gpu(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "table.json"
    command = ["tune", "--schemes", "w8a8", "w4a8", "--shapes", "512x1024", "--tokens", "1", "64", "--out", str(path)]
    assert main(command) == 0
    entries = tables.read(path)
    assert [(e.scheme, e.tokens) for e in entries] == [(s, m) for s in ("w8cs-a8s", "w4g128-a8s") for m in (1, 64)]
    assert [e.dense_us is None for e in entries] == [True, False] * 2
