"""The native file: what it stores, that it is never half written, and that a hostile one is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels
from qkernels import FormatError, QTensor
from qkernels.formats import native


def _weight(scheme: str = "w4g32") -> QTensor:
    return qkernels.quantize(torch.randn(6, 80, generator=torch.Generator().manual_seed(0)), scheme)


@pytest.mark.parametrize("scheme", ["w4g32", "w1c", "w7ts", "w3g16f-bf16", "w8g64s-fp32"])
def test_what_is_written_is_read(scheme: str, tmp_path: pathlib.Path) -> None:
    q, path = _weight(scheme), tmp_path / "file.safetensors"
    native.write(path, {"layer.weight": q, "norm": torch.arange(5.0), "empty": torch.empty(0, 3)})
    tensors = native.read(path)
    back = tensors["layer.weight"]
    assert isinstance(back, QTensor)
    assert (back.scheme, back.shape) == (q.scheme, q.shape)
    for a, b in zip(back.tensors, q.tensors, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    assert torch.equal(tensors["norm"], torch.arange(5.0))
    assert tensors["empty"].shape == (0, 3)


def test_an_order_of_inputs_is_kept(tmp_path: pathlib.Path) -> None:
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    q, path = dataclasses.replace(_weight(), order=order), tmp_path / "file.safetensors"
    native.write(path, {"a": q})
    back = native.read(path)["a"]
    assert isinstance(back, QTensor)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert not torch.equal(back.dequantize(), _weight().dequantize())
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["a_order"][3] = tensors["a_order"][4]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(FormatError, match="a: order must hold each of 0 to 79 once"):
        native.read(path)


def test_the_file_is_plain_safetensors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file.safetensors"
    native.write(path, {"a.weight": _weight()})
    tensors = safetensors.torch.load_file(path)
    assert {n: t.dtype for n, t in tensors.items()} == {
        "a.weight": torch.int32, "a.weight_scale": torch.float16, "a.weight_zero": torch.uint8,
    }  # fmt: skip
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["qkernels_version"] == "1"
    assert json.loads(metadata["qkernels"])["weights"] == {"a.weight": {"scheme": "w4g32", "shape": [6, 80]}}


def test_tensors_that_share_memory(tmp_path: pathlib.Path) -> None:
    base, q, path = torch.arange(12.0), _weight(), tmp_path / "file.safetensors"
    native.write(
        path,
        {"a": base, "same": base, "reshaped": base.view(3, 4), "part": base[2:5], "columns": base.view(3, 4).T,
         "q": q, "q_again": q, "e1": torch.empty(0), "e2": torch.empty(0)},
    )  # fmt: skip
    back = native.read(path)
    assert back["same"] is back["a"]
    assert back["q_again"] is back["q"]
    assert torch.equal(back["reshaped"], base.view(3, 4))
    assert torch.equal(back["part"], base[2:5])
    assert torch.equal(back["columns"], base.view(3, 4).T)


def test_an_existing_file_survives_a_failed_write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"
    native.write(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def half_written(tensors: Any, name: str, metadata: Any) -> None:
        pathlib.Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        native.write(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_bad_things_to_write_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="two tensors would be stored as 'a_scale'"):
        native.write(tmp_path / "file", {"a": _weight(), "a_scale": torch.ones(1)})
    with pytest.raises(TypeError, match="'a' must be a Tensor or a QTensor, got list"):
        native.write(tmp_path / "file", {"a": [1.0]})
    with pytest.raises(ValueError, match="got '__metadata__'"):
        native.write(tmp_path / "file", {"__metadata__": torch.ones(1)})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        native.write(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(OSError, match="there is no folder"):
        native.write(tmp_path / "nowhere" / "file", {"a": torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_a_new_file_has_the_usual_permissions(tmp_path: pathlib.Path) -> None:
    native.write(tmp_path / "file", {"a": torch.ones(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- hostile files ----

GOOD = {"scheme": "w4g32", "shape": [6, 80]}


def _header(weights: Any, aliases: Any = None) -> str:
    return json.dumps({"weights": weights, "aliases": {} if aliases is None else aliases})


def _parts() -> dict[str, Tensor]:
    q = _weight()
    assert q.zero is not None
    return {"a": q.packed, "a_scale": q.scale, "a_zero": q.zero}


def _changed(**change: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in {**_parts(), **change}.items() if t is not None}


NAN_SCALE, BIG_ZERO = torch.ones(3, 6).half(), torch.zeros(3, 6, dtype=torch.uint8)
NAN_SCALE[1, 1], BIG_ZERO[2, 2] = float("nan"), 16

HOSTILE: dict[str, tuple[dict[str, Tensor], dict[str, str] | None, str]] = {
    "no metadata": (_parts(), None, "no 'qkernels' entry"),
    "other metadata": (_parts(), {"format": "pt"}, "no 'qkernels' entry"),
    "no version": (_parts(), {"qkernels": _header({"a": GOOD})}, "version must be '1', got None"),
    "future version": (_parts(), {"qkernels": _header({"a": GOOD}), "qkernels_version": "2"}, "got '2'"),
    "not JSON": (_parts(), {"qkernels": "{"}, "is not JSON"),
    "deep JSON": (_parts(), {"qkernels": "[" * 100_000}, "is not JSON"),
    "JSON list": (_parts(), {"qkernels": "[]"}, "must hold 'weights' and 'aliases'"),
    "weights a list": (_parts(), {"qkernels": _header([])}, "must be objects"),
    "entry a string": (_parts(), {"qkernels": _header({"a": "w4g32"})}, "a: metadata must hold 'scheme' and 'shape'"),
    "entry without shape": (_parts(), {"qkernels": _header({"a": {"scheme": "w4g32"}})}, "a: metadata must hold"),
    "unknown scheme": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "nf4"}})}, "a: 'nf4' is not a scheme"),
    "scheme a number": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": 4}})}, "a: a scheme string is a str"),
    "huge group": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "w4g" + "9" * 5000}})}, "a: "),
    "shape 1-D": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [480]}})}, "a: shape must be two sizes"),
    "negative shape": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [6, -80]}})}, "a: shape must be two"),
    "overflowing shape": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [6, 2**63]}})}, "a: shape must be"),
    "boolean shape": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [True, 80]}})}, "a: shape must be two"),
    "float shape": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [6.0, 80]}})}, "a: shape must be two"),
    "other rows": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [7, 80]}})}, "says 7 rows, .* has 6"),
    "other columns": (_parts(), {"qkernels": _header({"a": {**GOOD, "shape": [6, 200]}})}, "a: packed must be"),
    "other bits": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "w5g32"}})}, "a: packed must be"),
    "other group": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "w4g16"}})}, "a: scale must be"),
    "offset scheme": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "w4g32f"}})}, "a: zero must be"),
    "symmetric scheme": (_parts(), {"qkernels": _header({"a": {**GOOD, "scheme": "w4g32s"}})}, "has no zeros, but"),
    "unknown name": (_parts(), {"qkernels": _header({"b": GOOD})}, "b: the file has no tensor 'b'"),
    "no scale": (_changed(a_scale=None), {"qkernels": _header({"a": GOOD})}, "no tensor 'a_scale'"),
    "no zero": (_changed(a_zero=None), {"qkernels": _header({"a": GOOD})}, "no tensor 'a_zero'"),
    "float packed": (_changed(a=torch.zeros(6, 12)), {"qkernels": _header({"a": GOOD})}, "a: packed must be"),
    "1-D scale": (_changed(a_scale=torch.ones(18).half()), {"qkernels": _header({"a": GOOD})}, "a: scale must be"),
    "integer scale": (_changed(a_scale=torch.ones(3, 6).int()), {"qkernels": _header({"a": GOOD})}, "a: scale must"),
    "NaN scale": (_changed(a_scale=NAN_SCALE), {"qkernels": _header({"a": GOOD})}, "a_scale holds NaN"),
    "large zero": (_changed(a_zero=BIG_ZERO), {"qkernels": _header({"a": GOOD})}, "a: zero must be at most 15 .*16"),
    "NaN offset": (
        _changed(a_zero=NAN_SCALE), {"qkernels": _header({"a": {**GOOD, "scheme": "w4g32f"}})}, "a_zero holds NaN",
    ),
    "one part of two weights": (
        {**_parts(), "a_scale_scale": torch.ones(1)},
        {"qkernels": _header({"a": GOOD, "a_scale": {**GOOD, "scheme": "w4ts"}})},
        "a_scale belongs to two weights",
    ),
    "alias of nothing": (_parts(), {"qkernels": _header({"a": GOOD}, {"b": "c"})}, "alias 'b' must be"),
    "alias of a part": (_parts(), {"qkernels": _header({"a": GOOD}, {"b": "a_scale"})}, "alias 'b' must be"),
    "alias hides a tensor": (_parts(), {"qkernels": _header({"a": GOOD}, {"a": "a"})}, "alias 'a' must be"),
    "alias a list": (_parts(), {"qkernels": _header({"a": GOOD}, {"b": ["a"]})}, "alias 'b' must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(name: str, tmp_path: pathlib.Path) -> None:
    tensors, metadata, message = HOSTILE[name]
    path = tmp_path / "file.safetensors"
    if metadata is not None and "qkernels" in metadata and name != "no version":
        metadata = {"qkernels_version": "1", **metadata}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(FormatError, match=message) as caught:
        native.read(path)
    assert str(path) in str(caught.value)


def test_files_of_another_kind(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"short", b"\x80\x04\x95pickle", struct.pack("<Q", 2**63) + b"{}", b"GGUF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not a whole safetensors file"):
            native.read(path)
    with pytest.raises(FileNotFoundError):
        native.read(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        native.read(tmp_path)


_WHOLE: list[bytes] = []


def _whole_file(folder: pathlib.Path) -> bytes:
    if not _WHOLE:
        native.write(folder / "whole", {"a": _weight(), "b": _weight("w3g16f"), "c": torch.arange(4)})
        _WHOLE.append((folder / "whole").read_bytes())
    return _WHOLE[0]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_file_is_read_or_refused(data: st.DataObject, tmp_path: pathlib.Path) -> None:
    """Cut off, overwritten or with bytes inserted: a valid result or a FormatError, nothing else."""
    content = bytearray(_whole_file(tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)) | st.integers(0, min(700, len(content))))
        kind = data.draw(st.sampled_from(["cut", "flip", "overwrite", "insert"]))
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            new = data.draw(st.binary(min_size=1, max_size=9))
            content[at : at + len(new) if kind == "overwrite" else at] = new
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        tensors = native.read(path)
    except FormatError:
        return
    for tensor in tensors.values():
        if isinstance(tensor, QTensor):
            assert tensor.dequantize().shape == tensor.shape


def test_lazy_views_are_stored_as_what_they_show(tmp_path: pathlib.Path) -> None:
    z = torch.randn(3, dtype=torch.complex64)
    native.write(tmp_path / "file", {"z": z, "conjugate": z.conj()})
    tensors = native.read(tmp_path / "file")
    conjugate = tensors["conjugate"]
    assert isinstance(conjugate, Tensor)
    assert torch.equal(conjugate, z.conj().resolve_conj())
