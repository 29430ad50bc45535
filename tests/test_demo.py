"""The demo: end to end on a tiny model of our own, what it fetches, and, where it can be fetched, the real weights."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pathlib
import tarfile
import zipfile

import pytest
import torch

from qkernels import cli, plots
from qkernels.demo import fetch, language_model, story
from qkernels.demo.fetch import FetchError, Source
from qkernels.quality import PredictionScore
from qkernels.tensor import QuantizationError, quantize
from tests.tiny_model import save_tiny_llama

TEXT = "A paragraph of text\nwhich is wrapped.\n\n   And another one,\nthe second.\n\n" * 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a random Llama of two layers and a tokenizer of bytes."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


def test_demo_from_model_to_plots(
    tiny: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    schemes = ["w8g32", "w4g64", "w2c"]
    arguments = [
        "demo",
        "--model",
        str(tiny),
        "--text",
        str(text),
        "--windows",
        "2",
        "--tokens",
        "5",
        "--device",
        "cpu",
    ]
    assert cli.main([*arguments, "--schemes", *schemes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tiny-llama on cpu; 2 windows of 512 tokens of text.txt" in printed
    for scheme in schemes:
        assert any(line.split()[:1] == [scheme] for line in printed.splitlines())
    assert story.QUESTION in printed
    assert "(5 tokens" in printed

    record = json.loads((out / "demo.json").read_text())
    results = record["results"]
    assert [r["scheme"] for r in results] == schemes
    # 2 layers of 64 x (64 + 32 + 32 + 64) attention and 3 * 64 x 128 MLP weights; the output layer is left alone
    weights = 2 * (64 * 192 + 3 * 64 * 128)
    assert (record["layers"], record["weights"]) == (14, weights)
    # codes, and per group of 32 two bytes of scale and one of zero
    assert results[0]["nbytes"] == weights + weights // 32 * 3
    assert [r["snr_db"] for r in results] == sorted((r["snr_db"] for r in results), reverse=True)
    assert 0 < results[0]["kl"] < results[1]["kl"] < results[2]["kl"]
    for picture in ("perplexity.png", "outlier.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"


def test_scores_are_those_of_the_definition(tiny: pathlib.Path) -> None:
    """Perplexity and KL of the demo's loop, against the formulas written out in float64."""
    model, tokenizer = language_model.load(tiny, "cpu")
    windows = language_model.windows(TEXT, tokenizer, 2)
    variant = story._quantized_copy(model, story.Scheme.parse("w3g64"))
    original = story._predict_all(model, {"w3g64": variant}, windows)
    p, q = (torch.log_softmax(m(windows).logits[:, :-1].double(), -1) for m in (model, variant.model))
    targets = windows[:, 1:, None]
    assert original.perplexity == pytest.approx(math.exp(-p.gather(-1, targets).mean().item()), rel=1e-5)
    assert variant.score.perplexity == pytest.approx(math.exp(-q.gather(-1, targets).mean().item()), rel=1e-5)
    assert variant.score.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert original.predictions == 2 * 511


def test_the_original_survives_its_quantized_copies(tiny: pathlib.Path) -> None:
    model, _ = language_model.load(tiny, "cpu")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    variant = story._quantized_copy(model, story.Scheme.parse("w4g64"))
    assert variant.model.lm_head.weight is model.lm_head.weight
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_windows_unwrap_paragraphs(tiny: pathlib.Path) -> None:
    _, tokenizer = language_model.load(tiny, "cpu")
    windows = language_model.windows(TEXT, tokenizer, 3)
    assert windows.shape == (3, language_model.WINDOW)
    assert tokenizer.decode(windows.flatten()).startswith(
        "A paragraph of text which is wrapped.\n\nAnd another one, the second.\n\nA paragraph"
    )
    with pytest.raises(language_model.ModelError, match="the text has 5 tokens; at least 512"):
        language_model.windows("short", tokenizer, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MISSING", "--text", "TEXT"], "there is no such file or folder"),
        (["--model", "EMPTY", "--text", "TEXT"], "does not load as a causal language model"),
        (["--model", "TINY", "--text", "MISSING"], "No such file"),
        (["--model", "TINY", "--text", "TEXT", "--schemes", "w4"], "'w4' is not a scheme"),
        (["--model", "TINY", "--text", "TEXT", "--device", "toaster"], "toaster"),
        (["--model", "TINY", "--text", "TEXT", "--device", "meta"], "--device must be cpu"),
        (["--model", "TINY", "--text", "TEXT", "--out", "TEXT"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tiny: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty"
    text.write_text(TEXT)
    empty.mkdir()
    places = {"MISSING": tmp_path / "missing", "EMPTY": empty, "TINY": tiny, "TEXT": text}
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out), *(str(places.get(a, a)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert "qkernels: error: " in error
    assert message in error
    assert not out.exists()


# ---- fetching ----


def _source(wheel: bool, archive: pathlib.Path, content: bytes) -> Source:
    return Source(
        name="a file",
        requirement="package==1",
        wheel=wheel,
        archive_sha256=fetch._sha256(archive),
        members={"package/file.txt": hashlib.sha256(content).hexdigest()},
        licence="",
    )


@pytest.mark.parametrize("wheel", [True, False])
def test_fetch_checks_and_caches(wheel: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / ("package.whl" if wheel else "package.tar.gz")
    if wheel:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("package/file.txt", b"text")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo("package/file.txt")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
    downloads = []
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_download", lambda source, folder: (downloads.append(source), archive)[1])
    good = _source(wheel, archive, b"text")
    assert fetch.fetch(good).read_bytes() == b"text"
    assert fetch.fetch(good).parent == tmp_path / "cache"
    assert len(downloads) == 1
    fetch.fetch(good).write_bytes(b"damaged")
    assert fetch.fetch(good).read_bytes() == b"text"
    assert len(downloads) == 2
    for bad, message in (
        (_source(wheel, archive, b"other"), "file.txt: sha256 must be"),
        (
            Source(**{**vars(good), "archive_sha256": "0" * 64, "members": {"package/new.txt": ""}}),
            "package==1: sha256 must be",
        ),
        (Source(**{**vars(good), "members": {"package/none.txt": ""}}), "holds no package/none.txt"),
    ):
        with pytest.raises(FetchError, match=message):
            fetch.fetch(bad)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file.txt"]


def test_files_that_belong_together_come_from_one_download(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "package.whl"
    contents = {"package/a/one.txt": b"1", "package/b/two.txt": b"2"}
    with zipfile.ZipFile(archive, "w") as zipped:
        for name, content in contents.items():
            zipped.writestr(name, content)
    downloads = []
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_download", lambda source, folder: (downloads.append(source), archive)[1])
    members = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    source = Source(**{**vars(_source(True, archive, b"")), "name": "folder", "members": members})
    for _ in range(2):
        folder = fetch.fetch(source)
        assert folder == tmp_path / "cache/folder"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one.txt": b"1", "two.txt": b"2"}
    assert len(downloads) == 1
    (folder / "two.txt").unlink()
    fetch.fetch(source)
    assert (folder / "two.txt").read_bytes() == b"2"
    assert len(downloads) == 2


def test_offline_the_message_says_what_to_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path))
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "could not fetch lcet10.txt" in error
    assert "qkernels demo --model PATH --text FILE" in error


# ---- pictures and scores ----


def test_plot_of_a_row_shows_the_largest_outlier(tmp_path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.Linear(20, 10))
    with torch.no_grad():
        model[0].weight[7, 299] = 5.0
    assert plots.row_with_largest_outlier(model) == ("0", 7)
    plots.outlier_row(tmp_path / "row.png", "0", model[0].weight, 7)
    assert (tmp_path / "row.png").stat().st_size > 10_000


def test_scores_of_no_and_of_hopeless_predictions() -> None:
    score = PredictionScore()
    assert math.isnan(score.perplexity)
    score.add(torch.tensor([[-1e6, 0.0]]), torch.tensor([0]))
    assert score.perplexity == math.inf
    assert [story.number(v) for v in (38.846, 12345.6, 5.9e5, 3.2e7, 0.00312)] == [
        "38.85", "12,346", "590,000", "3.2e+07", "0.00312",
    ]  # fmt: skip


# ---- the real weights ----

# Relative error over all 210 Linears of round-to-nearest codes, measured apart from this package.
REFERENCE_ERRORS = {
    "w8ts": 0.0362, "w8cs": 0.0085, "w4cs": 0.1541, "w4g128s": 0.1235, "w4g64": 0.0937, "w4g32f": 0.0, "w3g64": 0.2007,
}  # fmt: skip


@pytest.mark.slow
def test_weight_errors_of_a_real_model() -> None:
    try:
        path = fetch.fetch(fetch.SMOLLM2)
    except FetchError as error:
        pytest.skip(f"{fetch.SMOLLM2.name} cannot be fetched: {error}")
    model, _ = language_model.load(path, "cpu")
    linears = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"}
    assert len(linears) == 210
    for scheme, wanted in REFERENCE_ERRORS.items():
        total = QuantizationError(0.0, 0.0, 0.0)
        for linear in linears.values():
            total += quantize(linear.weight.detach(), scheme).error(linear.weight)
        assert total.relative == pytest.approx(wanted, abs=0.00006), scheme
