"""Files of weights that meet quantized activations: what is written comes back; hostile ones are refused by name."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import qkernels
from qkernels import FormatError, QTensor, QuantLinear, Scheme, cli
from qkernels.formats import native
from tests.helpers import quantized
from tests.tiny_model import TOKENS, TinyModel

DYNAMIC = ("w8cs-a8s", "w4g32-a8", "w8ts-bf16-a8", "w4g48s-fp32-a8s")
STATIC = ("w8cs-a8ts", "w4g32-a8t", "w8g16-a8t", "w4cs-a8ts")


def _random(scheme: str) -> QTensor:
    return quantized(torch.randn(6, 80, generator=torch.Generator().manual_seed(0)), scheme)


def _same(found: object, wanted: QTensor) -> bool:
    assert isinstance(found, QTensor)
    pairs = list(zip(found.tensors, wanted.tensors, strict=True))
    return found.scheme == wanted.scheme and all(a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("scheme", DYNAMIC + STATIC)
def test_what_is_written_is_read(scheme: str, tmp_path: pathlib.Path) -> None:
    q, path = _random(scheme), tmp_path / "file.safetensors"
    qkernels.save({"a.weight": q, "same": q, "norm": torch.arange(3.0)}, path)
    back = qkernels.load(path)
    assert _same(back["a.weight"], q)
    assert back["same"] is back["a.weight"]
    stored = safetensors.torch.load_file(path)
    assert ("a.weight_activation" in stored) == (scheme in STATIC)
    if scheme in STATIC:
        assert stored["a.weight_activation"].dtype is torch.float32
        assert stored["a.weight_activation"].tolist() == q.activation.tolist()  # type: ignore[union-attr]
    with safetensors.safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["qkernels"])["weights"]["a.weight"]
    assert entry == {"scheme": scheme, "shape": [6, 80]}


def test_one_range_for_several_weights_is_stored_with_each(tmp_path: pathlib.Path) -> None:
    q = _random("w8cs-a8ts")
    k = dataclasses.replace(q, packed=q.packed.clone(), scale=q.scale.clone())  # the same tensor for activations
    qkernels.save({"q": q, "k": k}, tmp_path / "file")
    back = qkernels.load(tmp_path / "file")
    assert _same(back["q"], q)
    assert _same(back["k"], k)
    assert set(safetensors.torch.load_file(tmp_path / "file")) >= {"q_activation", "k_activation"}


def test_weights_that_differ_in_static_activations_alone_are_no_aliases(tmp_path: pathlib.Path) -> None:
    q = _random("w8cs-a8ts")
    other = dataclasses.replace(q, activation=torch.tensor([0.5, 0.0]))
    qkernels.save({"q": q, "other": other}, tmp_path / "file")
    back = qkernels.load(tmp_path / "file")
    assert _same(back["q"], q)
    assert _same(back["other"], other)


def test_weights_that_share_codes_and_read_inputs_in_their_own_ways(tmp_path: pathlib.Path) -> None:
    q = _random("w8cs")
    weights = {s: dataclasses.replace(q, scheme=Scheme.parse(s)) for s in ("w8cs", "w8cs-a8s", "w8cs-a8")}
    qkernels.save({**weights, "again": weights["w8cs-a8"]}, tmp_path / "file")
    back = qkernels.load(tmp_path / "file")
    assert all(_same(back[s], q) for s, q in weights.items())
    assert back["again"].packed.data_ptr() == back["w8cs-a8"].packed.data_ptr()


# ---- hostile files ----


def _entry(scheme: str) -> dict[str, Any]:
    return {"scheme": scheme, "shape": [6, 80]}


def _written(path: pathlib.Path, scheme: str, change: dict[str, Tensor | None], said: str | None = None) -> None:
    """The file of a weight "a", with other tensors, or said to be of another scheme."""
    q = _random(scheme)
    parts = {f"a{suffix}": tensor for suffix, tensor in native.parts_of(q).items()}
    tensors = {name: t for name, t in {**parts, **change}.items() if t is not None}
    header = json.dumps({"weights": {"a": _entry(said or scheme)}, "aliases": {}})
    safetensors.torch.save_file(tensors, path, {"qkernels_version": "1", "qkernels": header})


def _pair(scale: float, zero: float) -> Tensor:
    return torch.tensor([scale, zero], dtype=torch.float32)


NAN, INF = float("nan"), float("inf")
RANGE = "a: activation must be a scale from 2.-119 to 2.119 and a zero from "
SHAPE = r"a: activation must be \(2,\) float32, got "
HOSTILE: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": ("w8cs-a8ts", None, "a: the file has no tensor 'a_activation'"),
    "NaN scale": ("w8cs-a8ts", _pair(NAN, 0), f"{RANGE}0 to 0, got nan and 0"),
    "scale of 0": ("w8cs-a8ts", _pair(0, 0), f"{RANGE}0 to 0, got 0 and 0"),
    "negative scale": ("w4g32-a8t", _pair(-0.25, 0), f"{RANGE}-128 to 127, got -0.25 and 0"),
    "infinite scale": ("w8cs-a8ts", _pair(INF, 0), f"{RANGE}0 to 0, got inf"),
    "subnormal scale": ("w8cs-a8ts", _pair(1e-40, 0), f"{RANGE}0 to 0, got 9.99"),
    "zero of a symmetric one": ("w8cs-a8ts", _pair(1, 1), f"{RANGE}0 to 0, got 1 and 1"),
    "large zero": ("w4g32-a8t", _pair(1, 128), f"{RANGE}-128 to 127, got 1 and 128"),
    "low zero": ("w4g32-a8t", _pair(1, -129), f"{RANGE}-128 to 127, got 1 and -129"),
    "fractional zero": ("w4g32-a8t", _pair(1, 0.5), f"{RANGE}-128 to 127, got 1 and 0.5"),
    "NaN zero": ("w4g32-a8t", _pair(1, NAN), f"{RANGE}-128 to 127, got 1 and nan"),
    "float64": ("w8cs-a8ts", _pair(1, 0).double(), SHAPE + r"\(2,\) torch.float64"),
    "float16": ("w8cs-a8ts", _pair(1, 0).half(), SHAPE + r"\(2,\) torch.float16"),
    "integer": ("w8cs-a8ts", torch.tensor([1, 0]), SHAPE + r"\(2,\) torch.int64"),
    "scalar": ("w8cs-a8ts", torch.tensor(1.0), SHAPE + r"\(\)"),
    "per row": ("w8cs-a8ts", torch.ones(6, 2), SHAPE + r"\(6, 2\)"),
    "empty": ("w8cs-a8ts", torch.ones(0), SHAPE + r"\(0,\)"),
    "extra for a dynamic one": ("w8cs-a8s", _pair(1, 0), "a w8cs-a8s weight has no static activations, .*a_activation"),
    "extra for weights alone": ("w4g32", _pair(1, 0), "a w4g32 weight has no static activations, but .*a_activation"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(name: str, tmp_path: pathlib.Path) -> None:
    scheme, activation, message = HOSTILE[name]
    path = tmp_path / "file.safetensors"
    _written(path, scheme, {"a_activation": activation})
    with pytest.raises(FormatError, match=message) as caught:
        qkernels.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_by_name(name: str, tmp_path: pathlib.Path) -> None:
    """Files of a folder need no metadata of their own: config.json has it."""
    scheme, activation, _ = HOSTILE[name]
    _written(tmp_path / "model.safetensors", scheme, {"a_activation": activation})
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("a", "a.weight", 1): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "qkernels", "version": "1", "weights": {"a.weight": _entry(scheme)}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(FormatError, match=r"\ba\b.*activation") as caught:
        qkernels.formats.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "said", "message"),
    [
        ("w8cs", "w8cs-a8ts", "a: the file has no tensor 'a_activation'"),
        ("w8cs-a8ts", "w8cs", "has no static activations"),
        ("w4g32-a8t", "w4g32-a8ts", "zero from 0 to 0, got"),
        ("w8cs", "w8csf-a8s", "is not a scheme"),
        ("w4g32f", "w4g32f-a8s", "symmetric or have integer zeros"),
        ("w2g16", "w2g16-a8s", "weights of 4 or 8 bits"),
    ],
)
def test_a_weight_that_is_said_to_be_another(scheme: str, said: str, message: str, tmp_path: pathlib.Path) -> None:
    _written(tmp_path / "file", scheme, {}, said)
    with pytest.raises(FormatError, match=message):
        qkernels.load(tmp_path / "file")


def test_what_could_not_be_read_is_not_written(tmp_path: pathlib.Path) -> None:
    for tensors, message in (
        (
            {"a": _random("w8cs"), "a_activation": torch.ones(2)},
            "'a_activation' would be taken for a part of 'a', a w8cs",
        ),
        ({"a": _random("w8cs-a8ts"), "a_activation": torch.ones(2)}, "two tensors would be stored as 'a_activation'"),
        ({"a": _random("w8cs"), "a_zero": torch.ones(2)}, "'a_zero' would be taken for a part of 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            qkernels.save(tensors, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_from_before_there_were_activations(tmp_path: pathlib.Path) -> None:
    """As it was written then: a name that is no part of any weight is a tensor like others."""
    q = qkernels.quantize(torch.randn(4, 32), "w4g16")
    header = {"weights": {"a": {"scheme": "w4g16", "shape": [4, 32]}}, "aliases": {"b": "a"}}
    tensors = {"a": q.packed, "a_scale": q.scale, "a_zero": q.zero, "hidden_activation": torch.ones(3)}
    metadata = {"format": "pt", "qkernels_version": "1", "qkernels": json.dumps(header)}
    safetensors.torch.save_file(tensors, tmp_path / "file", metadata)  # type: ignore[arg-type]
    back = qkernels.load(tmp_path / "file")
    assert _same(back["a"], q)
    assert back["b"] is back["a"]
    assert torch.equal(back["hidden_activation"], torch.ones(3))


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w4g32-a8t"])
@pytest.mark.parametrize("shard", ["2GB", "1B"])
def test_converting_files_and_folders(scheme: str, shard: str, tmp_path: pathlib.Path) -> None:
    """What is native stays what it is, with or without metadata of its own, in one file or several."""
    q, k = _random(scheme), quantized(torch.randn(6, 80), scheme, torch.ones(3))
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"a.weight": q, "b.weight": k, "norm": torch.arange(3.0)}
    qkernels.save(tensors, source / "model.safetensors")
    assert cli.main(["convert", str(source / "model.safetensors"), str(tmp_path / "file.safetensors")]) == 0
    entries = {f"{n}.weight": {"scheme": scheme, "shape": [6, 80]} for n in "ab"}
    config = {"quant_method": "qkernels", "version": "1", "weights": entries}
    (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    stored = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file(stored, source / "model.safetensors", {"format": "pt"})
    assert cli.main(["convert", str(source), str(tmp_path / "folder"), "--max-shard-size", shard]) == 0
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) == (1 if shard == "2GB" else 3)
    written = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    assert written["weights"] == entries
    for path in (tmp_path / "file.safetensors", source, tmp_path / "folder"):
        back = qkernels.formats.read(path)
        assert _same(back["a.weight"], q)
        assert _same(back["b.weight"], k)


# ---- models ----


def _static_model(scheme: str) -> TinyModel:
    """A model whose layers each have a static range of their own."""
    model = TinyModel().eval()
    for i, block in enumerate(model.blocks):
        for name in ("up", "down"):
            linear = getattr(block, name)
            weight = quantized(linear.weight.detach(), scheme, torch.randn(50) * (1 + i))
            setattr(block, name, QuantLinear(weight, linear.bias).eval())
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8", "w8cs-a8ts", "w4g16-a8t"])
def test_models_come_back(scheme: str, tmp_path: pathlib.Path) -> None:
    model = TinyModel().eval()
    if Scheme.parse(scheme).is_static:
        model = _static_model(scheme)
    else:
        qkernels.quantize_model(model, scheme, progress=False)
    path = tmp_path / "model.safetensors"
    qkernels.save(model, path)
    with torch.device("meta"):
        empty = TinyModel().eval()
    with torch.no_grad():
        wanted = model(TOKENS)
        for again in (qkernels.load(path, TinyModel().eval()), qkernels.load(path, empty), qkernels.load(path, model)):
            assert torch.equal(again(TOKENS), wanted)
            assert again.blocks[1].down.scheme == Scheme.parse(scheme)
            assert again.again is again.blocks[0]
    if Scheme.parse(scheme).is_static:
        assert {n for n in model.state_dict() if n.endswith("_activation")} == {
            f"{path}.{name}.weight_activation" for path in ("blocks.0", "blocks.1", "again") for name in ("up", "down")
        }


class _Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 80), nn.Linear(80, 6, bias=False)


def test_an_embedding_of_a_file_that_has_activations_is_refused(tmp_path: pathlib.Path) -> None:
    model, tied = _Embeds(), _Embeds()
    tied.out.weight = tied.embed.weight
    before = dict(model.named_modules())
    for scheme in ("w8cs-a8s", "w8cs-a8ts"):
        qkernels.save({"embed.weight": _random(scheme), "out.weight": _random(scheme)}, tmp_path / "both")
        with pytest.raises(FormatError, match=rf"embed\.weight is {scheme}, but an embedding has no activations"):
            qkernels.load(tmp_path / "both", model)
        qkernels.save({"out.weight": _random(scheme)}, tmp_path / "out")
        with pytest.raises(FormatError, match=rf"embed\.weight is {scheme}, but an embedding has no activations"):
            qkernels.load(tmp_path / "out", tied)
    assert dict(model.named_modules()) == before


# ---- the command line ----


@pytest.fixture
def model_file(tmp_path: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    tensors = {"layer.weight": torch.randn(24, 64), "layer.bias": torch.randn(24), "embed.weight": torch.randn(9, 64)}
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize(("asked", "written"), [("w8a8", "w8cs-a8s"), ("w4a8", "w4g128-a8s"), ("w4g32-a8", "w4g32-a8")])
def test_quantizing_a_file(
    asked: str, written: str, model_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert cli.main(["quantize", str(model_file), str(out), "--scheme", asked]) == 0
    assert f"1 of 3 tensors to {written}" in capsys.readouterr().out
    weight = safetensors.torch.load_file(model_file)["layer.weight"]
    assert _same(qkernels.load(out)["layer.weight"], qkernels.quantize(weight, asked))
    assert cli.main(["inspect", str(out)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "layer.weight" in line)
    assert line.split()[:2] == ["layer.weight", written]


def test_static_activations_cannot_be_had_of_a_file(
    model_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    plan = tmp_path / "plan.json"
    model = nn.ModuleDict({"layer": nn.Linear(64, 24)})
    qkernels.plan(model, target_bits=9, candidates=["w8cs"], progress=False).save(plan)
    plan.write_text(plan.read_text().replace("w8cs", "w8cs-a8ts").replace("1584", "1592"))
    for how in (["--scheme", "w8cs-a8ts"], ["--plan", str(plan)]):
        # before the input is even opened
        assert cli.main(["quantize", str(tmp_path / "missing"), str(out), *how]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "w8cs-a8ts has static activations, whose scale calibration finds" in error
        assert "quantize_model" in error
    assert not out.exists()


def test_inspecting_static_activations(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    q = _random("w8cs-a8ts")
    qkernels.save({"layer.weight": q}, tmp_path / "file.safetensors")
    assert cli.main(["inspect", str(tmp_path / "file.safetensors")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "layer.weight" in line)
    assert line.split() == ["layer.weight", "w8cs-a8ts", "6", "x", "80", f"{q.nbytes}", "B", f"{q.bits_per_weight:.2f}"]
    assert q.nbytes == 6 * 80 + 6 * 2 + 8
