"""The benchmark of accuracy: its scores against their definitions, its result file, table and picture."""

from __future__ import annotations

import copy
import json
import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accuracy, peers, plot, readme, subjects
from qkernels import Scheme, quantize
from qkernels.demo import fetch, language_model
from tests.tiny_model import save_tiny_llama

PARAGRAPH = (
    "The library keeps books. It lends them to people who read! "
    "Who brings them back late; pays a fine of a shilling.\n\n"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> subjects.LanguageModel:
    """The language model's part, with a random Llama and a text of our own."""
    folder = tmp_path_factory.mktemp("accuracy")
    save_tiny_llama(folder / "llama")
    (folder / "texts").mkdir()
    for name, words in (("lcet10", "evaluated"), ("texts/a", "first"), ("texts/b", "second"), ("texts/c", "third")):
        (folder / f"{name}.txt").write_text("".join(f"{words} {i}. {PARAGRAPH}" for i in range(40)))
    places = {fetch.SMOLLM2.name: "llama", fetch.LCET10.name: "lcet10.txt", fetch.OTHER_TEXTS.name: "texts"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "fetch", lambda source: folder / places[source.name])
        return subjects.LanguageModel(count=3, calibration=6)


def test_language_model_scores_are_those_of_the_definition(tiny: subjects.LanguageModel) -> None:
    other = copy.deepcopy(tiny.model)
    for parameter in other.parameters():
        parameter.data *= 0.9
    scores = tiny.score(other)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(tiny.windows).logits[:, :-1].double(), -1) for m in (tiny.model, other))
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    loss = -q.gather(-1, tiny.windows[:, 1:, None])[..., 0].mean(1)
    assert scores["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert scores["kl_error"] == pytest.approx(float(kl.std() / math.sqrt(3)), rel=1e-3)
    assert scores["perplexity"] == pytest.approx(math.exp(float(loss.mean())), rel=1e-5)
    assert scores["perplexity_error"] == pytest.approx(scores["perplexity"] * float(loss.std()) / 3**0.5, rel=1e-3)
    assert abs(tiny.score(tiny.model)["kl"]) < 1e-6


def test_calibration_is_from_other_texts_than_evaluation(tiny: subjects.LanguageModel) -> None:
    def text(tokens: Tensor) -> str:
        return bytes(int(t) for t in tokens.flatten() if t < 256).decode("latin-1")

    assert tiny.windows.shape == (3, language_model.WINDOW)
    assert [batch.shape for batch in tiny.calibration] == [(1, language_model.WINDOW)] * 6
    evaluated = {tuple(window.tolist()) for window in tiny.windows}
    assert not any(tuple(batch[0].tolist()) in evaluated for batch in tiny.calibration)
    assert len({tuple(batch[0].tolist()) for batch in tiny.calibration}) == 6
    assert text(tiny.windows[0]) != text(tiny.calibration[0])


def test_sentences_and_their_batches() -> None:
    found = subjects._sentences(PARAGRAPH.replace(" ", "\n", 3) + "Too short. " + "word " * 61 + ".")
    assert found == [
        "It lends them to people who read!",
        "Who brings them back late;",
        "pays a fine of a shilling.",
    ]

    class Tokenizer:
        def __call__(self, sentences: list[str]) -> Any:
            return type("Tokens", (), {"input_ids": [[len(word) for word in s.split()] for s in sentences]})

    sentences = [f"a bc def {'x' * i}" for i in range(1, 5)] + ["one two"]
    batches = subjects._batches(Tokenizer(), sentences, limit=3)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 2), (3, 4), (1, 4)]
    assert batches[1]["input_ids"][:, 3].tolist() == [1, 2, 3]


def test_ranks_of_pairs() -> None:
    embeddings = nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1)
    torch.testing.assert_close(subjects._similarities(embeddings), torch.tensor([0.5**0.5, 0.0, 0.5**0.5]))
    assert subjects._ranks(torch.tensor([0.3, -1.0, 2.0])).tolist() == [1.0, 0.0, 2.0]


def test_a_copy_holds_what_codes_stand_for(tiny: subjects.LanguageModel) -> None:
    before = {name: t.clone() for name, t in tiny.model.state_dict().items()}
    made = accuracy.quantized(tiny, Scheme.parse("w4g32"), "rtn")
    assert made.layers == 14
    for name, module in made.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = tiny.model.get_submodule(name).weight
            assert torch.equal(module.weight, quantize(weight.detach(), "w4g32").dequantize())
    assert made.bits == pytest.approx(4 + 24 / 32)
    assert torch.equal(made.model.lm_head.weight, tiny.model.lm_head.weight)
    assert all(torch.equal(t, before[name]) for name, t in tiny.model.state_dict().items())


def test_a_plan_stays_within_the_bytes(tiny: subjects.LanguageModel) -> None:
    scheme = Scheme.parse("w3g64")
    assert accuracy.quantized(tiny, scheme, "plan").bits <= accuracy.quantized(tiny, scheme, "rtn").bits


def test_peers_say_what_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.refusal("hqq package", Scheme.parse("w4g64"), 576) == "not installed"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: "there")
    assert peers.refusal("hqq package", Scheme.parse("w4g64"), 576) is None
    assert peers.refusal("hqq package", Scheme.parse("w5g64"), 576) == "no 5 bits"
    assert peers.refusal("quanto", Scheme.parse("w4g128"), 576) == "576 inputs are not whole groups of 128"
    assert peers.refusal("quanto", Scheme.parse("w3g64"), 576) == "no groups with 3 bits"
    for scheme in ("w4c", "w4g64s", "w4g64f"):
        assert "groups with integer zeros" in str(peers.refusal("hqq package", Scheme.parse(scheme), 576))


def test_bits_of_a_peer_count_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "hqq package", ("hqq", lambda w, scheme: w + 1, peers._hqq_stores))
    weight = torch.zeros(3, 100, dtype=torch.float16)
    found, bits = peers.quantized("hqq package", weight, Scheme.parse("w4g64"))
    assert found.dtype == torch.float32
    assert bool((found == 1).all())
    assert bits == 300 * 4 + 5 * 32


@pytest.mark.parametrize("peer", list(peers.PEERS))
def test_peers_are_nearly_as_good_as_rounding(peer: str) -> None:
    scheme = Scheme.parse("w4g64")
    if reason := peers.refusal(peer, scheme, 128):
        pytest.skip(f"{peer}: {reason}")
    w = torch.randn(16, 128)
    ours = (quantize(w, scheme).dequantize() - w).norm()
    assert (peers.quantized(peer, w, scheme)[0] - w).norm() < 1.5 * ours


@pytest.fixture(scope="module")
def record(tiny: subjects.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    path = tmp_path_factory.mktemp("results") / "accuracy.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.importlib.util, "find_spec", lambda name: None)
        return path, accuracy.run(path, [tiny], ["w4g64", "w3g64"], ["rtn", "hqq", "hqq package"])


def test_a_result_file_is_continued(
    tiny: subjects.LanguageModel, record: tuple[pathlib.Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = record
    assert json.loads(path.read_text()) == found
    keys = [(e["model"], e["scheme"], e["method"]) for e in found["entries"]]
    assert keys == [(tiny.name, s, m) for s in ("w4g64", "w3g64") for m in ("rtn", "hqq", "hqq package")]
    assert [e.get("skipped") for e in found["entries"]] == [None, None, "not installed"] * 2
    rtn = [e for e in found["entries"] if e["method"] == "rtn"]
    assert rtn[0]["kl"] < rtn[1]["kl"]
    measured: list[tuple[str, str]] = []

    def measure(subject: Any, scheme: Scheme, method: str, memory: Any) -> dict[str, Any]:
        measured.append((str(scheme), method))
        return {"skipped": "new"}

    monkeypatch.setattr(accuracy, "measure", measure)
    path.with_name("copy.json").write_text(path.read_text())
    accuracy.run(path.with_name("copy.json"), [tiny], ["w3g64", "w2g64"], ["rtn"])
    assert measured == [("w2g64", "rtn")]
    again = accuracy.run(path.with_name("copy.json"), [tiny], ["w3g64"], ["rtn"], again=True)
    assert measured[1:] == [("w3g64", "rtn")]
    assert [e["skipped"] for e in again["entries"] if (e["scheme"], e["method"]) == ("w3g64", "rtn")] == ["new"]
    shorter = copy.copy(tiny)
    shorter.about = "2 windows"
    with pytest.raises(ValueError, match="not 2 windows: name another file"):
        accuracy.run(path, [shorter], ["w4g64"], ["rtn"])


def test_table_readme_and_picture(record: tuple[pathlib.Path, Any]) -> None:
    path, found = record
    printed = accuracy.table(found, subjects.LanguageModel.name)
    assert "hqq package" not in printed
    assert len([line for line in printed.splitlines() if line.split()[:1] in (["w4g64"], ["w3g64"])]) == 4
    block = readme.accuracy_block(path)
    rtn = next(line for line in block.splitlines() if line.startswith("| rtn"))
    entries = {e["scheme"]: e for e in found["entries"] if e["method"] == "rtn"}
    cells = [cell.strip() for cell in rtn.split("|")[2:-1]]
    assert cells == [f"{entries[s]['kl']:.4g} / {entries[s]['perplexity']:.4g}" for s in ("w4g64", "w3g64")]
    text = "a\n<!-- accuracy:begin -->\nold<!-- accuracy:end -->\nb"
    assert readme.with_accuracy(text, None) == "a\n<!-- accuracy:begin -->\n<!-- accuracy:end -->\nb"
    (picture,) = plot.draw_accuracy(found, path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    points = plot.curves(found, subjects.LanguageModel.name)
    assert list(points) == ["rtn", "hqq"]
    assert points["rtn"] == [(entries[s]["bits_per_weight"], entries[s]["kl"]) for s in ("w3g64", "w4g64")]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.17234, 0.00345, "0.1723 ± 0.0034"),
        (50.816, 1.234, "50.8 ± 1.2"),
        (3.2e6, 1e5, "3.2e+06"),
        (0.5, None, "0.500"),
    ],
)
def test_scores_have_as_many_digits_as_their_error_warrants(value: float, error: float | None, text: str) -> None:
    entry = {"kl": value} if error is None else {"kl": value, "kl_error": error}
    assert accuracy.with_error(entry, "kl") == text


def test_command_refuses_a_scheme_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--schemes", "w4g100"])
    assert "w4g100" in capsys.readouterr().err


def test_pictures_leave_out_what_would_flatten_the_rest() -> None:
    name = subjects.LanguageModel.name
    entries = [
        {"model": name, "method": "rtn", "bits_per_weight": bits, "kl": kl}
        for bits, kl in ((4.2, 0.3), (2.4, 9.0), (8.2, 0.001), (5.0, 1e-10))
    ]
    assert plot.curves({"entries": entries}, name) == {"rtn": [(2.4, 9.0), (4.2, 0.3)]}
