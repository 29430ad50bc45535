"""Folders of checkpoints: every layout there is, one weight at a time, and none that a hostile one can misuse."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import weakref
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels
from qkernels import FormatError, QTensor, cli, formats
from qkernels.formats import native, reader
from qkernels.formats.folder import READERS, Checkpoint
from tests import fake_format
from tests import test_compressed_inputs as compressed_inputs
from tests.fake_format import CONFIG

A = fake_format.tensors()
NORM = {"norm.weight": torch.arange(5.0), "a.bias": torch.ones(6)}


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_format.register(monkeypatch)


def _check(found: dict[str, Tensor | QTensor], stored: dict[str, Tensor]) -> None:
    """That a module called a and plain tensors came back."""
    plain = {name: t for name, t in stored.items() if not re.fullmatch(r"a\.(codes|steps|zeros)", name)}
    assert found.keys() == {"a.weight", *plain}
    q = found["a.weight"]
    assert isinstance(q, QTensor)
    assert torch.equal(q.dequantize(), fake_format.values(stored))
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype is tensor.dtype


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_one_file(name: str, zeros: bool, tmp_path: pathlib.Path) -> None:
    stored = {**fake_format.tensors(zeros=zeros), **NORM}
    fake_format.write(tmp_path, {name: stored})
    for path in (tmp_path, str(tmp_path), tmp_path / name):
        _check(formats.read(path), stored)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.config, checkpoint.quantization) == ({"quantization_config": CONFIG}, CONFIG)
    assert list(checkpoint.files) == [tmp_path / name]
    assert list(checkpoint.names) == [name for name, _ in checkpoint.tensors()]
    assert checkpoint.quantized == {"a.weight"}


def test_parts_of_a_weight_lie_in_other_files(tmp_path: pathlib.Path) -> None:
    stored = {**fake_format.tensors(), **NORM}
    names = sorted(stored)
    files = {f"model-{i}.safetensors": {name: stored[name] for name in names[i::3]} for i in range(3)}
    assert len({file for file, held in files.items() for name in held if name.startswith("a.")}) == 3
    fake_format.write(tmp_path, files)
    _check(formats.read(tmp_path), stored)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "gptq.safetensors.index.json")
    _check(formats.read(tmp_path), stored)


def test_the_whole_file_goes_before_an_index(tmp_path: pathlib.Path) -> None:
    """As it does for transformers; what else lies there is not asked for."""
    stored = {**A, **NORM}
    index = {"weight_map": dict.fromkeys(stored, "gone.safetensors")}
    fake_format.write(tmp_path, {"model.safetensors": stored}, index=index)
    safetensors.torch.save_file(stored, tmp_path / "consolidated.safetensors")
    _check(formats.read(tmp_path), stored)


def test_quantized_inputs(tmp_path: pathlib.Path) -> None:
    """Of compressed-tensors: their scale and zero are parts of the weight, wherever they lie."""
    folder = compressed_inputs.write_folder(tmp_path)
    found = formats.read(folder)
    assert found.keys() == {"dynamic.weight", "static.weight", "static.bias"}
    given = found["static.weight"]
    assert isinstance(given, QTensor)
    assert given.activation is not None
    assert (str(given.scheme), given.activation.tolist()) == ("w8cs-a8t", [0.25, -5])
    dynamic = found["dynamic.weight"]
    assert isinstance(dynamic, QTensor)
    assert (str(dynamic.scheme), dynamic.activation) == ("w8cs-a8s", None)
    for path in folder.glob("*.safetensors"):
        state = safetensors.torch.load_file(path)
        if "static.input_scale" in state:
            safetensors.torch.save_file({**state, "static.input_scale": torch.tensor([-1.0])}, path)
    with pytest.raises(FormatError, match=r"model-\d.safetensors: static\.weight: input_scale must be from .*, got -1"):
        formats.read(folder)


def test_names_with_and_without_a_module(tmp_path: pathlib.Path) -> None:
    stored = {
        **fake_format.tensors(""),
        **fake_format.tensors("b.c"),
        "xcodes": torch.ones(1),
        "codes.x": torch.ones(1),
    }
    found = formats.read(fake_format.write(tmp_path, {"model.safetensors": stored}))
    assert {name for name, t in found.items() if isinstance(t, QTensor)} == {"weight", "b.c.weight"}
    assert found.keys() == {"weight", "b.c.weight", "xcodes", "codes.x"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"quantization_config": CONFIG, "x": 1}}, CONFIG),
        ({"config.json": {"text_config": {"quantization_config": CONFIG}}}, CONFIG),
        ({"config.json": {"quantization_config": None, "text_config": {"quantization_config": CONFIG}}}, CONFIG),
        ({"config.json": {"quantization_config": CONFIG, "text_config": {"quantization_config": {}}}}, CONFIG),
        ({"config.json": {}, "quantize_config.json": CONFIG}, CONFIG),
        ({"config.json": {"quantization_config": CONFIG}, "quantize_config.json": {"bits": 3}}, CONFIG),
        ({"quant_config.json": CONFIG}, CONFIG),
        ({"quantize_config.json": {"bits": 4, "quant_method": None}}, {"bits": 4, "quant_method": "gptq"}),
        ({"quant_config.json": {"w_bit": 4}}, {"w_bit": 4, "quant_method": "awq"}),
        ({"config.json": {"text_config": []}}, None),
        ({}, None),
    ],
)
def test_where_it_says_how_weights_are_quantized(
    files: dict[str, Any], expected: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("gptq", "awq"):
        monkeypatch.setitem(READERS, method, "tests.fake_format")
    fake_format.write(tmp_path, {"model.safetensors": NORM}, None)
    for name, content in files.items():
        fake_format.write_json(tmp_path / name, content)
    with pytest.raises(FormatError, match="'bits'") if "w_bit" in (expected or {}) else contextlib.nullcontext():
        assert Checkpoint(tmp_path).quantization == expected


def test_a_folder_without_quantized_weights(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_format.write(tmp_path, {"model.safetensors": NORM}, {"model_type": "x"})
    assert formats.read(tmp_path).keys() == NORM.keys()
    assert not Checkpoint(tmp_path).quantized
    assert cli.main(["inspect", str(tmp_path / "model.safetensors")]) == 0
    assert re.search(r"norm\.weight +float32 +5 +20 B", capsys.readouterr().out)


def test_the_names_of_formats() -> None:
    """The reader of each is its own file; those that there are have one."""
    for method, module in READERS.items():
        assert module in ("tests.fake_format", "qkernels.formats.native") or module.endswith(method.replace("-", "_"))


def test_old_bitsandbytes_configurations(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "bitsandbytes", "tests.fake_format")
    stored = {**fake_format.tensors(), **NORM}
    config = {"quantization_config": {"load_in_8bit": True, "bits": 4}}
    _check(formats.read(fake_format.write(tmp_path, {"model.safetensors": stored}, config)), stored)


def test_metadata_of_all_files_goes_to_the_reader(tmp_path: pathlib.Path) -> None:
    files = {"1.safetensors": fake_format.tensors(), "2.safetensors": NORM}
    fake_format.write(tmp_path, files)
    safetensors.torch.save_file(NORM, tmp_path / "2.safetensors", {"fake": "bad"})
    with pytest.raises(FormatError, match=r"config\.json: the metadata's fake is bad"):
        formats.read(tmp_path)


def test_names_that_a_format_makes_longer(tmp_path: pathlib.Path) -> None:
    stored = {**A, **{f"{name}:_data": t for name, t in NORM.items()}, "x": torch.ones(1)}
    folder = fake_format.write(tmp_path, {"model.safetensors": stored}, metadata={"suffix": ":_data"})
    _check(formats.read(folder), {**A, **NORM, "x": torch.ones(1)})
    fake_format.write(
        folder, {"model.safetensors": {**stored, "x:_data": torch.ones(1)}}, metadata={"suffix": ":_data"}
    )
    with pytest.raises(FormatError, match="'x' would be given twice"):
        formats.read(folder)


# ---- native files ----


def _native(folder: pathlib.Path) -> dict[str, Tensor | QTensor]:
    q = qkernels.quantize(torch.randn(6, 80, generator=torch.Generator().manual_seed(0)), "w4g32")
    held: dict[str, Tensor | QTensor] = {"b.weight": q, "b.bias": torch.ones(6), "tied": q, "c": torch.ones(2)}
    folder.mkdir(exist_ok=True)
    native.write(folder / "model-1.safetensors", {n: held[n] for n in ("b.weight", "tied")})
    native.write(folder / "model-2.safetensors", {n: held[n] for n in ("b.bias", "c")})
    places = dict.fromkeys(("b.weight", "b.weight_scale", "b.weight_zero"), "model-1.safetensors")
    places |= dict.fromkeys(("b.bias", "c"), "model-2.safetensors")
    fake_format.write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    return held


def _same(found: dict[str, Tensor | QTensor], held: dict[str, Tensor | QTensor]) -> None:
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        other = found[name]
        if isinstance(tensor, QTensor):
            assert isinstance(other, QTensor)
            assert other.scheme == tensor.scheme
            assert all(torch.equal(a, b) for a, b in zip(other.tensors, tensor.tensors, strict=True))
        else:
            assert torch.equal(other, tensor)


def test_native_files_in_a_folder(tmp_path: pathlib.Path) -> None:
    held = _native(tmp_path)
    _same(formats.read(tmp_path), held)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.quantized == {"b.weight", "tied"}
    assert list(checkpoint.names) == list(formats.read(tmp_path))
    # beside those of another format
    stored = {**fake_format.tensors(), **NORM}
    safetensors.torch.save_file(stored, tmp_path / "model-3.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(stored, "model-3.safetensors")
    fake_format.write_json(tmp_path / "model.safetensors.index.json", index)
    fake_format.write_json(tmp_path / "config.json", {"quantization_config": CONFIG})
    found = formats.read(tmp_path)
    _same({name: found[name] for name in held}, held)
    _check({name: t for name, t in found.items() if name not in held}, stored)


def test_a_native_file_does_not_ask_what_lies_beside_it(tmp_path: pathlib.Path) -> None:
    _native(tmp_path)
    for name in ("config.json", "quantize_config.json"):
        (tmp_path / name).write_text("[")
    assert formats.read(tmp_path / "model-1.safetensors").keys() == {"b.weight", "tied"}
    with pytest.raises(FormatError, match=r"config\.json: not JSON"):
        formats.read(tmp_path)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", ["w4g32", "w3cs", "w2g16f-bf16"])
def test_native_tensors_without_metadata(scheme: str, ordered: bool, tmp_path: pathlib.Path) -> None:
    """As a package writes them that saves a model's parameters itself: config.json alone says what they are."""
    q = qkernels.quantize(torch.randn(6, 80), scheme)
    if ordered:
        q = QTensor(q.packed, q.scale, q.zero, q.scheme, 80, torch.randperm(80).to(torch.int32))
    parts = {f"b.weight{suffix}": part for suffix, part in native.parts_of(q).items()}
    config = {"quantization_config": native.quantization_config({"b.weight": native.Entry.of(q)})}
    assert ("ordered" in config["quantization_config"]["weights"]["b.weight"]) is ordered
    fake_format.write(tmp_path, {"model.safetensors": {**parts, **NORM}}, config)
    _same(formats.read(tmp_path), {"b.weight": q, **NORM})
    for name in parts:
        fake_format.write(tmp_path, {"model.safetensors": {n: t for n, t in parts.items() if n != name}}, config)
        with pytest.raises(FormatError, match=r"b\.weight"):
            formats.read(tmp_path)
    fake_format.write(tmp_path, {"model.safetensors": {**parts, "c.weight_scale": torch.ones(1)}}, config)
    with pytest.raises(FormatError, match=r"c\.weight: .* do not have it"):
        formats.read(tmp_path)
    extra = "order" if q.order is None else "zero"
    if extra not in {name.rpartition("_")[2] for name in parts}:
        held = {**parts, f"b.weight_{extra}": torch.arange(80, dtype=torch.int32)}
        fake_format.write(tmp_path, {"model.safetensors": held}, config)
        with pytest.raises(FormatError, match=rf"b\.weight: .* has no weight_{extra}"):
            formats.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, r"version must be one of '1', got '2'"),
        ({"weights": []}, "weights must be an object, got list"),
        ({"weights": {"b.weight": {"scheme": "nf4", "shape": [1, 1]}}}, r"b\.weight: 'nf4' is not a scheme"),
        (
            {"weights": {"norm.weight": {"scheme": "w4c", "shape": [1, 5]}}},
            r"'norm\.weight', but no file has its scales",
        ),
    ],
)
def test_a_wrong_configuration_of_our_own(change: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    config = {"quantization_config": {**native.quantization_config({}), **change}}
    with pytest.raises(FormatError, match=rf"config\.json.*{message}"):
        formats.read(fake_format.write(tmp_path, {"model.safetensors": NORM}, config))


# ---- memory ----


def _most_alive(stream: Any) -> tuple[int, int]:
    """(how many it gives, the most of them alive at once, one that was just given among them)."""
    alive: set[int] = set()
    most = count = 0
    while (item := next(stream, None)) is not None:
        count += 1
        alive.add(count)
        memory = item[1].packed if isinstance(item[1], QTensor) else item[1]
        weakref.finalize(memory, alive.discard, count)
        del memory
        most = max(most, len(alive))
        del item
    return count, most


def test_one_tensor_at_a_time(tmp_path: pathlib.Path) -> None:
    stored = {name: t for module in "abcdefgh" for name, t in fake_format.tensors(module).items()}
    fake_format.write(tmp_path / "fake", {"1.safetensors": stored, "2.safetensors": NORM})
    assert _most_alive(formats.stream(tmp_path / "fake")) == (10, 1)
    native.write(tmp_path / "native", formats.read(tmp_path / "fake"))
    assert _most_alive(formats.stream(tmp_path / "native")) == (10, 1)
    assert _most_alive(native.stream(tmp_path / "native")) == (10, 1)


def test_one_decoded_weight_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is decoded, none before it is there any more."""
    alive: set[int] = set()
    seen: list[int] = []
    made = reader.weight

    def counted(*args: Any, **kwargs: Any) -> QTensor:
        seen.append(len(alive))
        q = made(*args, **kwargs)
        alive.add(id(q.packed))
        weakref.finalize(q.packed, alive.discard, id(q.packed))
        return q

    monkeypatch.setattr(fake_format, "weight", counted)
    stored = {name: t for module in "abcd" for name, t in fake_format.tensors(module).items()}
    fake_format.write(tmp_path, {"model.safetensors": stored})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert seen == [0, 0, 0, 0]


def test_one_native_weight_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is read, none before it is there any more."""
    native.write(tmp_path / "file", {name: qkernels.quantize(torch.randn(6, 80), "w4g32") for name in "abcd"})
    alive: set[int] = set()
    seen: list[int] = []
    made = native._weight

    def counted(*args: Any) -> QTensor:
        seen.append(len(alive))
        q = made(*args)
        alive.add(id(q))
        weakref.finalize(q, alive.discard, id(q))
        return q

    monkeypatch.setattr(native, "_weight", counted)
    assert cli.main(["inspect", str(tmp_path / "file")]) == 0
    assert seen == [0] * 8  # checked, then read


def test_a_bad_native_file_gives_nothing(tmp_path: pathlib.Path) -> None:
    """The last weight's scales are NaN: the first is not given, either."""
    q = qkernels.quantize(torch.randn(6, 80), "w4g32")
    bad = QTensor(q.packed, q.scale * float("nan"), q.zero, q.scheme, 80)
    native.write(tmp_path / "file", {"a": q, "z": bad})
    with pytest.raises(FormatError, match="z_scale holds NaN"):
        next(native.stream(tmp_path / "file"))


def test_files_are_opened_when_they_are_needed(tmp_path: pathlib.Path) -> None:
    """Those that lie behind are closed again: with hundreds of files there is no limit to run into."""
    files = {f"{i:03}.safetensors": {f"t{i:03}": torch.ones(2)} for i in range(40)}
    fake_format.write(tmp_path, files)
    most = 0
    for _name, _tensor in formats.stream(tmp_path):
        mapped = pathlib.Path("/proc/self/maps").read_text().splitlines()
        most = max(most, len({line.split()[-1] for line in mapped if str(tmp_path) in line}))
    assert 0 < most <= 5  # the tensor itself holds one


# ---- hostile folders ----

MAP = dict.fromkeys(A, "x.safetensors")
HOSTILE_INDEXES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "index.json: not JSON"),
    "not text": ('{"\udcff"', "index.json: not JSON"),
    "deep": ("[" * 100_000, "index.json: not JSON"),
    "long number": ('{"a": ' + "9" * 10_000 + "}", "index.json: not JSON"),
    "a list": ([], "index.json: must hold a JSON object, got list"),
    "no map": ({"metadata": {}}, "must hold a 'weight_map'"),
    "map a list": ({"weight_map": ["a"]}, "must hold a 'weight_map'"),
    "empty map": ({"weight_map": {}}, "must hold a 'weight_map'"),
    "a number": ({"weight_map": {**MAP, "q": 1}}, "'q': must name a .safetensors file in the folder, got 1"),
    "null": ({"weight_map": {**MAP, "q": None}}, "'q': must name"),
    "above": ({"weight_map": {**MAP, "q": "../secret.safetensors"}}, "'q': must name"),
    "above, for Windows": ({"weight_map": {**MAP, "q": "..\\secret.safetensors"}}, "'q': must name"),
    "absolute": ({"weight_map": {**MAP, "q": "/secret.safetensors"}}, "'q': must name"),
    "below": ({"weight_map": {**MAP, "q": "sub/x.safetensors"}}, "'q': must name"),
    "a drive": ({"weight_map": {**MAP, "q": "C:x.safetensors"}}, "'q': must name"),
    "NUL": ({"weight_map": {**MAP, "q": "\0.safetensors"}}, "'q': must name"),
    "long": ({"weight_map": {**MAP, "q": "x" * 5000 + ".safetensors"}}, "'q': must name"),
    "a pickle": ({"weight_map": {**MAP, "q": "x.bin"}}, "'q': must name"),
    "the folder": ({"weight_map": {**MAP, "q": ".."}}, "'q': must name"),
    "missing": ({"weight_map": {**MAP, "q": "y.safetensors"}}, "names 'y.safetensors', which is not there"),
    "a folder": ({"weight_map": {**MAP, "q": "sub.safetensors"}}, "names 'sub.safetensors', which is not there"),
    "surrogates": ({"weight_map": {**MAP, "q": "\udcff.safetensors"}}, "which is not there"),
    "a tensor too many": ({"weight_map": {**MAP, "q": "x.safetensors"}}, "it has no tensor 'q', which the index"),
}


@pytest.mark.parametrize("name", HOSTILE_INDEXES)
def test_a_hostile_index_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    index, message = HOSTILE_INDEXES[name]
    folder = tmp_path / "folder"
    fake_format.write(folder, {"x.safetensors": A}, index="" if name == "not text" else index)
    if name == "not text":
        (folder / "model.safetensors.index.json").write_bytes(index.encode(errors="surrogateescape"))
    safetensors.torch.save_file({"q": torch.ones(3)}, tmp_path / "secret.safetensors")
    (folder / "sub.safetensors").mkdir()
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        formats.read(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


HOSTILE_CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{]", "config.json: not JSON"),
    "deep": ('{"a":' * 100_000, "config.json: not JSON"),
    "a list": ([CONFIG], "config.json: must hold a JSON object, got list"),
    "a string": ({"quantization_config": "fake"}, "quantization_config must be an object, got str"),
    "of text": ({"text_config": {"quantization_config": []}}, "quantization_config must be an object, got list"),
    "no method": ({"quantization_config": {"bits": 4}}, "config.json: quant_method must be one of awq, bits"),
    "another": ({"quantization_config": {"quant_method": "mxfp4"}}, "gptq, hqq, qkernels, torchao, fake, got 'mxfp4'"),
    "a module": ({"quantization_config": {"quant_method": "os"}}, "quant_method must be one of"),
    "a list of methods": ({"quantization_config": {"quant_method": ["fake"]}}, "quant_method must be one of"),
    "a bad field": ({"quantization_config": {**CONFIG, "bits": True}}, "config.json: quantization_config's bits must"),
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    config, message = HOSTILE_CONFIGS[name]
    fake_format.write(tmp_path, {"model.safetensors": A}, config)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FormatError, match=re.escape(message)) as caught:
            formats.read(path)
        assert str(tmp_path) in str(caught.value)


def test_an_endless_configuration_is_not_read(tmp_path: pathlib.Path) -> None:
    fake_format.write(tmp_path, {"model.safetensors": A})
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(FormatError, match="has 1099511627776 bytes; at most"):
        formats.read(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert Checkpoint(tmp_path).config == {}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": {**A, "a.weight": torch.ones(3)}}, "'a.weight' would be given twice"),
        ({"1.safetensors": A, "2.safetensors": {"a.weight": torch.ones(3)}}, "'a.weight' would be given twice"),
        ({"1.safetensors": A, "2.safetensors": {"a.zeros": A["a.zeros"]}}, "2.safetensors: 'a.zeros' is in 1.safet"),
        ({"1.safetensors": {**NORM, "x": torch.ones(1)}, "2.safetensors": NORM}, "is in 1.safetensors, too"),
        ({"model.safetensors": {"a.codes": A["a.codes"]}}, "model.safetensors: a.weight: there is no tensor 'steps'"),
        ({"model.safetensors": {**A, "a.steps": torch.ones(2)}}, "a.weight: steps must have shape (6, 3), got (2,)"),
        ({"model.safetensors": {**A, "a.codes": A["a.codes"].float()}}, "a.weight: codes must be uint8, got float32"),
        ({"model.safetensors": {**A, "a.zeros": A["a.zeros"] + 99}}, "a.weight: zeros must be from 0 to 15"),
    ],
)
def test_tensors_that_do_not_fit_together(
    files: dict[str, dict[str, Tensor]], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        formats.read(fake_format.write(tmp_path, files))


def test_a_tensor_that_two_modules_would_have(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(config: Any, metadata: Any) -> reader.Reader:
        return reader.Reader("codes", ("steps", "zeros", "b.codes"), lambda module, parts: pytest.fail("decoded"))

    monkeypatch.setattr(fake_format, "reader", nested)
    stored = {**A, **fake_format.tensors("a.b")}
    with pytest.raises(FormatError, match=r"'a\.b\.codes' belongs to two modules"):
        formats.read(fake_format.write(tmp_path, {"model.safetensors": stored}))


def test_an_error_of_torch_names_the_tensor(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*args: Any, **kwargs: Any) -> None:
        torch.ones(2).reshape(3)

    monkeypatch.setattr(fake_format, "weight", torn)
    with pytest.raises(FormatError, match=r"a\.weight: shape '\[3\]' is invalid"):
        formats.read(fake_format.write(tmp_path, {"model.safetensors": A}))


def test_folders_without_tensors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FormatError, match="holds no safetensors file"):
        formats.read(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"a GGUF file \(model\.gguf\) is read by its own path"):
        formats.read(tmp_path)
    for name in ("pytorch_model.bin", "qmodel.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(FormatError, match=r"holds only pickles .* never read: convert to safetensors"):
            formats.read(tmp_path)
    (tmp_path / ".hidden.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="holds only pickles"):
        formats.read(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file(NORM, tmp_path / name)
    with pytest.raises(
        FormatError, match=r"holds 2 safetensors files \(a.safetensors, b.safetensors, ...\) and no index"
    ):
        formats.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        formats.read(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match=r"model\.safetensors: not a whole safetensors file"):
        formats.read(tmp_path)


def test_links_out_of_the_folder_are_not_followed(tmp_path: pathlib.Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    fake_format.write(outside, {"model.safetensors": {**A, **NORM}})
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).symlink_to(outside / name)
        with pytest.raises(FormatError, match=rf"{name} is a link out of its folder, to {re.escape(str(outside))}"):
            formats.read(folder)
        (folder / name).unlink()
        os.link(outside / name, folder / name)
    _check(formats.read(folder), {**A, **NORM})
    (folder / "quantize_config.json").symlink_to(outside / "config.json")
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"quantize_config\.json is a link out of its folder"):
        formats.read(folder)
    (folder / "quantize_config.json").unlink()
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    (tmp_path / "link").symlink_to(folder)
    _check(formats.read(tmp_path / "link"), {**A, **NORM})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": "m.safetensors"}}))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "m.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(FormatError, match=r"m\.safetensors is a link out of its folder"):
        formats.read(folder)


def test_the_cache_of_hugging_face(tmp_path: pathlib.Path) -> None:
    """There files are links to blobs, two folders up."""
    fake_format.write(tmp_path / "made", {"model.safetensors": {**A, **NORM}})
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("model.safetensors", "config.json")):
        (tmp_path / "made" / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    for path in (snapshot, snapshot / "model.safetensors"):
        _check(formats.read(path), {**A, **NORM})


# ---- fuzzing ----

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["fake", "gptq", 4]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["weight_map", "quant_method", "bits", "a.codes"]) | st.text(), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def _mutated(data: st.DataObject, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)) | st.integers(0, min(600, len(content))))
        kind = data.draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "swap"]))
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "swap":  # one name for another
            old, new = (data.draw(st.sampled_from([b"a.codes", b"a.steps", b"a.zeros", b"a.weigh"])) for _ in "ab")
            content = bytearray(bytes(content).replace(old, new, 1))
        else:
            new = data.draw(st.binary(min_size=1, max_size=6))
            content[at : at + len(new) if kind == "overwrite" else at] = new
    return bytes(content)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_folder_is_read_or_refused(data: st.DataObject, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "folder"
    stored = {**A, **NORM}
    files = {f"{i}.safetensors": {name: stored[name] for name in sorted(stored)[i::2]} for i in range(2)}
    fake_format.write(folder, files, {"quantization_config": CONFIG, "text_config": {}})
    for name in data.draw(st.lists(st.sampled_from(sorted(path.name for path in folder.iterdir())), min_size=1)):
        path = folder / name
        if name.endswith(".json") and data.draw(st.booleans()):
            content = json.loads(path.read_text()) if path.read_bytes()[:1] == b"{" else {}
            key = data.draw(st.sampled_from([*content, "weight_map", "quantization_config"]))
            inner = content.get(key)
            if isinstance(inner, dict) and inner and data.draw(st.booleans()):
                inner[data.draw(st.sampled_from(list(inner)))] = data.draw(_JSON)
            else:
                content[key] = data.draw(_JSON)
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(_mutated(data, path.read_bytes()))
            break
    try:
        found = formats.read(folder)
    except (FormatError, OSError):
        return
    except ImportError as error:
        assert "qkernels.formats" in str(error)  # noqa: PT017 - a reader that is not there
        return
    for tensor in found.values():
        if isinstance(tensor, QTensor):
            assert tensor.dequantize().shape == tensor.shape
        else:
            assert tensor.nbytes < 10_000
