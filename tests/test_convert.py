"""Converting: the same values in native files, everything else that a folder holds, and never half of it."""

from __future__ import annotations

import json
import pathlib
import re
import weakref
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels
from qkernels import FormatError, QTensor, cli, formats
from qkernels.convert import LARGEST_COPY, Converted, convert
from qkernels.formats import native
from qkernels.formats.folder import Checkpoint
from tests import fake_format
from tests import test_compressed_inputs as compressed_inputs
from tests.fake_format import CONFIG

MODULES = ("a", "bb", "ccc", "dddd")
PLAIN = {"norm.weight": torch.arange(5.0).bfloat16(), "embed": torch.ones(30, 16), "count": torch.tensor(3)}


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_format.register(monkeypatch)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of two files, with weights that have parts in both."""
    stored = {**PLAIN, **{name: t for module in MODULES for name, t in fake_format.tensors(module).items()}}
    names = sorted(stored)
    files = {f"model-{i}.safetensors": {name: stored[name] for name in names[i::2]} for i in range(2)}
    config = {"model_type": "x", "quantization_config": CONFIG, "text_config": {"a": 1, "quantization_config": CONFIG}}
    return fake_format.write(tmp_path / "in", files, config)


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert type(other) is type(tensor)
        if isinstance(tensor, QTensor):
            assert other.scheme == tensor.scheme
            assert all(torch.equal(a, b) for a, b in zip(other.tensors, tensor.tensors, strict=True))
        else:
            assert torch.equal(other, tensor)
            assert other.dtype is tensor.dtype


def _folder(path: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_folder_in_one_file(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done, out = convert(source, tmp_path / "out", progress=False), tmp_path / "out"
    assert set(_folder(out)) == {"config.json", "model.safetensors"}
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert done == Converted(7, 4, before, (out / "model.safetensors").stat().st_size)
    found = formats.read(out)
    _same(found, formats.read(source))
    _same(native.read(out / "model.safetensors"), found)
    stored = {**PLAIN, **{name: t for module in MODULES for name, t in fake_format.tensors(module).items()}}
    for module in MODULES:
        q = found[f"{module}.weight"]
        assert isinstance(q, QTensor)
        assert torch.equal(q.dequantize(), fake_format.values(stored, module))
    entries = {f"{module}.weight": {"scheme": "w4g32", "shape": [6, 80]} for module in MODULES}
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "x",
        "quantization_config": {"quant_method": "qkernels", "version": "1", "weights": entries},
        "text_config": {"a": 1},
    }
    assert json.loads((source / "config.json").read_text())["quantization_config"] == CONFIG


def test_a_folder_in_several_files(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    wanted = formats.read(source)
    done = convert(source, out, max_shard_bytes=1000, progress=False)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert done.bytes_after == sum((out / name).stat().st_size for name in files)
    _same(formats.read(out), wanted)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    held = {name: file for file in files for name in safetensors.torch.load_file(out / file)}
    assert index["weight_map"] == held
    assert {"a.weight", "a.weight_scale", "a.weight_zero", "norm.weight"} <= held.keys()
    for file in files:
        tensors = native.read(out / file)  # each is a native file by itself
        assert sum(t.nbytes for t in tensors.values()) <= 1000 or len(tensors) == 1
    # as few files as one after the other can be put into
    sizes = [sum(t.nbytes for t in native.read(out / file).values()) for file in files]
    first = [next(native.stream(out / file))[1].nbytes for file in files]
    assert all(size + following > 1000 for size, following in zip(sizes, first[1:], strict=False))
    assert len(Checkpoint(out).files) == count


def test_converting_what_was_converted(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Again, in files of another size, and in one file: nothing changes."""
    convert(source, tmp_path / "1", max_shard_bytes=1000, progress=False)
    convert(tmp_path / "1", tmp_path / "2", progress=False)
    convert(tmp_path / "2" / "model.safetensors", tmp_path / "3.safetensors", progress=False)
    for path in ("1", "2", "3.safetensors"):
        _same(formats.read(tmp_path / path), formats.read(source))
    configs = [json.loads((tmp_path / i / "config.json").read_text()) for i in "12"]
    assert configs[0] == configs[1]


def test_orders_and_aliases(tmp_path: pathlib.Path) -> None:
    q = qkernels.quantize(torch.randn(6, 80), "w4g32")
    q = QTensor(q.packed, q.scale, q.zero, q.scheme, 80, torch.randperm(80).to(torch.int32))
    (tmp_path / "in").mkdir()
    native.write(tmp_path / "in" / "model.safetensors", {"a": q, "b": torch.ones(3), "c": q})
    convert(tmp_path / "in", tmp_path / "out", max_shard_bytes=1, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    found = formats.read(tmp_path / "out")
    _same(found, {"a": q, "b": torch.ones(3), "c": q})
    assert found["a"] is found["c"]
    weights = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["weights"]
    assert weights == {"a": {"scheme": "w4g32", "shape": [6, 80], "ordered": True}}


def test_quantized_inputs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of compressed-tensors: static ranges move with the codes, and config.json says how inputs are quantized."""
    source = compressed_inputs.write_folder(tmp_path / "in")
    wanted = formats.read(source)
    for name, size in (("out", "1kB"), ("again", "1GB")):
        assert cli.main(["convert", str(source), str(tmp_path / name), "--max-shard-size", size]) == 0
        source = tmp_path / name
        found = formats.read(source)
        _same(found, wanted)
        assert {n: q.activation is None for n, q in found.items() if isinstance(q, QTensor)} == {
            "dynamic.weight": True, "static.weight": False,
        }  # fmt: skip
        weights = json.loads((source / "config.json").read_text())["quantization_config"]["weights"]
        assert {n: entry["scheme"] for n, entry in weights.items()} == {
            "dynamic.weight": "w8cs-a8s", "static.weight": "w8cs-a8t",
        }  # fmt: skip
        capsys.readouterr()
        assert cli.main(["inspect", str(source)]) == 0
        assert re.search(r"static\.weight +w8cs-a8t +6 +x +64", capsys.readouterr().out)


OTHERS = {
    "tokenizer.json": b"{}", "vocab.txt": b"a", "spiece.model": b"\n\x0e", "chat_template.jinja": b"{{",
    "README.md": b"#", "LICENSE": b"free", "modeling_x.py": b"1", "qwen.tiktoken": b"x",
    "generation_config.json": b"{}", "1_Pooling/config.json": b'{"pooling": 1}', "empty": b"",
}  # fmt: skip
NOT_COPIED = {
    "pytorch_model.bin": b"\x80\x02", "x.pt": b"PK\3\4", "x.PTH": b"", "original/consolidated.00.pth": b"",
    "quantize_config.json": b"{}", "quant_config.json": b"{}", ".gitattributes": b"", ".cache/x.json": b"{}",
    "pytorch_model.bin.index.json": b"{}", "onnx/model.onnx": b"", "x.gguf": b"GGUF", "tf_model.h5": b"",
    "old.safetensors": b"",
}  # fmt: skip


def test_other_files_are_copied(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, content in {**OTHERS, **NOT_COPIED, "state": b"\x80\x05.", "archive": b"PK\3\4"}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    with open(source / "huge.txt", "wb") as file:
        file.truncate(LARGEST_COPY + 1)
    done, found = convert(source, tmp_path / "out", progress=False), _folder(tmp_path / "out")
    assert found.keys() == OTHERS.keys() | {"model.safetensors", "config.json"}
    assert {name: found[name] for name in OTHERS} == OTHERS
    assert done.left == ("archive", "huge.txt", "state")


def test_a_link_out_of_the_folder_is_not_copied(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "key").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "key")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "key").write_text("secret")
    (source / "more").symlink_to(tmp_path / "more")
    (source / "nowhere.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"tokenizer\.json is a link out of its folder"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "out", progress=False)
    assert set(_folder(tmp_path / "out")) == {"config.json", "model.safetensors"}


def test_files_become_files(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stored = {**fake_format.tensors(), "n": torch.ones(2)}
    fake_format.write(tmp_path / "one", {"x.safetensors": stored})
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    done = convert(tmp_path / "one" / "x.safetensors", out, progress=False)
    _same(native.read(out), formats.read(tmp_path / "one"))
    before = (tmp_path / "one" / "x.safetensors").stat().st_size
    assert done == Converted(2, 1, before, out.stat().st_size)


def test_gguf_files(tmp_path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "test")
    _, size = gguf.GGML_QUANT_SIZES[Kind.Q4_1]
    data = np.random.default_rng(0).integers(0, 60, (5, 2 * size), dtype=np.uint8)
    writer.add_tensor("w", data, raw_dtype=Kind.Q4_1)
    writer.add_tensor("n", np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = convert(tmp_path / "in.gguf", tmp_path / "out.safetensors", progress=False)
    assert (done.tensors, done.quantized) == (2, 1)
    _same(native.read(tmp_path / "out.safetensors"), formats.read(tmp_path / "in.gguf"))


def test_the_command(source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "state").write_bytes(b"\x80\x05.")
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--max-shard-size", "1.5kB"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    after = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    sizes = f"{before / 1000:.1f} kB -> {after / 1000:.1f} kB"
    assert line == f"7 tensors, 4 of them quantized: {sizes}; not copied: state"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 7 tensors" in text
    (line,) = (line for line in text.splitlines() if line.split()[:1] == ["a.weight"])
    assert line.split()[1:5] == ["w4g32", "6", "x", "80"]
    assert cli.main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert "not copied" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("7", 7), ("1T", 10**12), ("3B", 3)],
)
def test_sizes(text: str, count: int) -> None:
    assert cli.byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2GiB", "nan", "1e9", "2 apples", "0.1B"])
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "a", "b", f"--max-shard-size={text}"])
    assert "must be bytes, such as 2GB or 500MB" in capsys.readouterr().err


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "FULL"], "is not empty"),
        (["IN", "FILE"], "is a file: a folder becomes a folder"),
        (["IN", "IN"], "is in the input itself"),
        (["IN", "BELOW"], "is in the input itself"),
        (["IN", "NOWHERE"], "there is no folder"),
        (["PLAIN", "OUT"], "plain holds no quantized weights to convert; `qkernels quantize`"),
        (["ONE", "OUT"], "model.safetensors holds no quantized weights to convert"),
        (["MISSING", "OUT"], "No such file or directory"),
        (["TEXT", "OUT"], "not a whole safetensors file"),
        (["EMPTY", "OUT"], "holds no safetensors file"),
        (["ONE", "FULL"], "is a folder"),
        (["ONE", "ONE"], "is the input itself"),
        (["ONE", "NOWHERE"], "there is no folder"),
        (["DAMAGED", "OUT"], "c.weight: there is no tensor 'steps'"),
        (["CLASH", "OUT"], "two tensors would be stored as 'a.weight_scale'"),
        (["CLASH", "OUT", "--max-shard-size", "1"], "two tensors would be stored as 'a.weight_scale'"),
    ],
)
def test_what_it_cannot_do_leaves_nothing(
    arguments: list[str], message: str, source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        name: tmp_path / name.lower()
        for name in ("IN", "OUT", "FULL", "FILE", "PLAIN", "MISSING", "TEXT", "EMPTY", "DAMAGED", "CLASH")
    }
    places |= {"BELOW": source / "out", "NOWHERE": tmp_path / "no" / "out", "ONE": tmp_path / "plain/model.safetensors"}
    fake_format.write(places["FULL"], {"x.safetensors": PLAIN})
    fake_format.write(places["PLAIN"], {"model.safetensors": PLAIN}, {})
    broken = {**fake_format.tensors(), "c.codes": torch.ones(2, 32, dtype=torch.uint8)}
    fake_format.write(places["DAMAGED"], {"model.safetensors": broken})
    fake_format.write(places["CLASH"], {"x.safetensors": {**fake_format.tensors(), "a.weight_scale": torch.ones(3)}})
    for name in ("FILE", "TEXT"):
        places[name].write_text("these are not tensors " * 10)
    places["EMPTY"].mkdir()
    before = _folder(tmp_path)
    folders = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", *(str(places.get(a, a)) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qkernels: error: ")
    assert message in error
    assert (_folder(tmp_path), sorted(tmp_path.rglob("*"))) == (before, folders)


def test_an_empty_folder_is_taken(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    convert(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out").is_symlink()
    _same(formats.read(tmp_path / "real"), formats.read(source))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    error: BaseException, source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = native.write, []

    def failing(path: pathlib.Path, tensors: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise error
        write(path, tensors)

    monkeypatch.setattr(native, "write", failing)
    (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", max_shard_bytes=1, progress=False)
    assert len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not any((tmp_path / "out").iterdir())


def test_configurations_that_cannot_be_written(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    depth = 900  # is read, but what writes it needs more levels
    text = json.dumps({"quantization_config": CONFIG, "deep": 0}).replace("0", "[" * depth + "]" * depth)
    fake_format.write_json(source / "config.json", text)
    try:
        convert(source, tmp_path / "out", progress=False)
    except FormatError as error:
        assert "nested too deeply" in str(error)  # noqa: PT017 - how deep is too deep depends on Python
        assert not (tmp_path / "out").exists()
    else:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["deep"]


def test_bad_arguments(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        convert(source, tmp_path / "out", max_shard_bytes=0)


# ---- memory ----


@pytest.mark.parametrize("progress", [False, True])
def test_one_file_of_tensors_is_in_memory(
    progress: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a weight is decoded, no more is there than goes into one file."""
    alive: dict[int, int] = {}
    seen: list[int] = []
    made = fake_format.weight

    def counted(*args: Any, **kwargs: Any) -> QTensor:
        seen.append(sum(alive.values()))
        q = made(*args, **kwargs)
        alive[id(q.packed)] = q.nbytes
        weakref.finalize(q.packed, alive.pop, id(q.packed))
        return q

    monkeypatch.setattr(fake_format, "weight", counted)
    stored = {name: t for module in MODULES for name, t in fake_format.tensors(module).items()}
    source = fake_format.write(tmp_path / "in", {"model.safetensors": stored})
    size = {q.nbytes for q in formats.read(source).values()}.pop()
    seen.clear()
    convert(source, tmp_path / "1", max_shard_bytes=1, progress=progress)
    assert seen == [0, size, size, size]  # one waits, to be written when the next does not fit
    seen.clear()
    convert(source, tmp_path / "2", max_shard_bytes=2 * size, progress=progress)
    assert seen == [0, size, 2 * size, size]
    seen.clear()
    cli.main(["convert", str(source), str(tmp_path / "3")])
    assert seen == [0, size, 2 * size, 3 * size]


# ---- fuzzing ----


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_source_is_converted_or_refused(data: st.DataObject, tmp_path: pathlib.Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    stored: dict[str, Tensor] = {**fake_format.tensors(), "n": torch.ones(2)}
    fake_format.write(source, {"model.safetensors": stored})
    path = source / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(300, len(content))))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    try:
        done = convert(source, out, data.draw(st.sampled_from([1, 500, 10**9])), progress=False)
    except (ValueError, OSError):
        assert not out.exists()
        return
    assert done.tensors == len(formats.read(source))
    _same(formats.read(out), formats.read(source))
    for made in out.iterdir():
        made.unlink()
    out.rmdir()
