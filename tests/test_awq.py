"""AWQ: weights packed here, slowly and field by field, are read as scale times (code minus zero), bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import QTensor
from qkernels.formats import awq

Array = npt.NDArray[Any]
COLUMN_OF_FIELD = (0, 2, 4, 6, 1, 3, 5, 7)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _pack(values: Array) -> Tensor:
    """(rows, N) -> (rows, N / 8) int32."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.int64)
    for row in range(words.shape[0]):
        for c in range(words.shape[1]):
            for i in range(8):
                words[row, c] |= int(values[row, 8 * c + COLUMN_OF_FIELD[i]]) << 4 * i
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


class Case:
    """A weight, its tensors in a file, and its values."""

    def __init__(
        self,
        *,
        rows: int = 24,
        in_features: int = 96,
        group_size: int = 32,
        dtype: torch.dtype = torch.float16,
        zero: int | None = None,
    ) -> None:
        rng = np.random.default_rng([rows, in_features])
        length = in_features if group_size == -1 else group_size
        groups = -(-in_features // length)
        codes = rng.integers(0, 16, (in_features, rows))
        zeros = rng.integers(0, 16, (groups, rows)) if zero is None else np.full((groups, rows), zero)
        scales = torch.from_numpy(rng.normal(0, 0.1, (groups, rows))).to(dtype)
        self.config: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
        self.parts = {"qweight": _pack(codes), "qzeros": _pack(zeros), "scales": scales}
        wide = scales.to(torch.float32).numpy()
        self.values = np.zeros((rows, in_features), dtype=np.float32)
        for k in range(in_features):
            self.values[:, k] = wide[k // length] * (codes[k] - zeros[k // length]).astype(np.float32)

    def read(self, **config: Any) -> QTensor:
        return awq.reader({**self.config, **config}, {}).decode("model.layers.0.mlp.up_proj", self.parts)

    def check(self, q: QTensor) -> None:
        assert q.shape == self.values.shape
        assert torch.equal(q.dequantize(), torch.from_numpy(self.values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("in_features", "group_size", "scheme"),
    [(96, 32, "w4g32"), (96, -1, "w4c"), (96, 96, "w4g96"), (96, 64, "w4g64"), (40, 40, "w4c"), (64, 128, "w4c")],
)
def test_it_is_read_bit_for_bit(dtype: torch.dtype, in_features: int, group_size: int, scheme: str) -> None:
    case = Case(in_features=in_features, group_size=group_size, dtype=dtype)
    q = case.read()
    case.check(q)
    suffix = {torch.float16: "", torch.bfloat16: "-bf16", torch.float32: "-fp32"}[dtype]
    assert str(q.scheme) == scheme + suffix
    assert q.order is None
    x = torch.randn(3, in_features)
    torch.testing.assert_close(x @ q.T, x @ torch.from_numpy(case.values).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 16, 40])
def test_rows_of_any_eight(rows: int) -> None:
    case = Case(rows=rows)
    case.check(case.read())


def test_golden_words() -> None:
    # Fields 0 to 7, low ones first, are rows 0 2 4 6 1 3 5 7: 0x75316420 holds 0 to 7 in their order.
    parts = {
        "qweight": torch.tensor([[0x75316420], [0x76543210], [-1]], dtype=torch.int32).repeat(16, 1),
        "qzeros": torch.tensor([[0x02000001]], dtype=torch.int32),  # row 0: 1, row 5: 2
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    w = awq.reader({"bits": 4, "group_size": -1}, {}).decode("m", parts).dequantize()
    assert w[:, 0].tolist() == [-1, 1, 2, 3, 4, 3, 6, 7]
    assert w[:, 1].tolist() == [-1, 4, 1, 5, 2, 4, 3, 7]
    assert w[:, 2].tolist() == [14, 15, 15, 15, 15, 13, 15, 15]


def test_zeros_in_the_middle_make_it_symmetric() -> None:
    case = Case(zero=8)
    for zero_point in (True, False, None):
        q = case.read(zero_point=zero_point)
        case.check(q)
        assert str(q.scheme) == "w4g32s"
        assert q.zero is None
    other = Case()
    other.check(other.read(zero_point=False))  # zeros are what qzeros says
    del case.parts["qzeros"]
    with pytest.raises(ValueError, match="there is no tensor 'qzeros'"):
        case.read(zero_point=False)


def test_configurations_of_all_names() -> None:
    case = Case()
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": ["visual"]}
    case.check(awq.reader(old, {}).decode("m", case.parts))
    case.check(awq.reader({"bits": 4, "group_size": 32}, {}).decode("m", case.parts))
    case.check(case.read(w_bit=4, q_group_size=32))
    case.check(case.read(version=None, format="gemm", checkpoint_format="gemm", pack_dtype="int32", backend="auto"))
    case.check(case.read(dynamic={"-:.*head": {}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *[({"version": v}, f"version must be one of None, 'gemm', got '{v}'") for v in ("gemv", "gemv_fast", "marlin")],
        ({"version": "exllama"}, "version must be one of None, 'gemm', got 'exllama'"),
        ({"version": "GEMV"}, "version must be one of None, 'gemm', got 'gemv'"),
        ({"version": 1}, "version must be one of None, 'gemm', got 1"),
        ({"format": "llm-awq"}, "format must be one of None, 'gemm', got 'llm-awq'"),
        ({"backend": "llm-awq"}, "backend must not be 'llm-awq'"),
        ({"quant_method": "gptq"}, "quant_method must be one of None, 'awq', got 'gptq'"),
        ({"bits": 8}, "bits must be one of 4, got 8"),
        ({"bits": True}, "bits must be one of 4, got True"),
        ({"w_bit": 3}, "bits and w_bit differ: 4 and 3"),
        ({"q_group_size": 64}, "group_size and q_group_size differ: 32 and 64"),
        ({"group_size": 0}, "group_size must be positive or -1, got 0"),
        ({"group_size": 32.0}, "group_size must be an int, got 32.0"),
        ({"zero_point": 1}, "zero_point must be one of None, True, False, got 1"),
        ({"pack_dtype": "int16"}, "pack_dtype must be one of"),
        ({"dynamic": {"+:a": {"bits": 8}}}, "dynamic may only exclude modules"),
        ({"dynamic": 3}, "dynamic may only exclude modules, got 3"),
    ],
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config's {message}"):
        Case().read(**config)


@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_fields_that_are_needed(name: str) -> None:
    config = dict(Case().config)
    del config[name]
    with pytest.raises(ValueError, match=f"quantization_config has no '{name}'"):
        awq.reader(config, {})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qweight", None, "there is no tensor 'qweight'"),
        ("scales", None, "there is no tensor 'scales'"),
        ("qweight", torch.zeros(96, 3), "qweight must be int32, got float32"),
        ("qweight", torch.zeros(96, dtype=torch.int32), r"qweight must be \(K, N / 8\), got shape \(96,\)"),
        ("qweight", torch.zeros(0, 3, dtype=torch.int32), "qweight must be"),
        ("qweight", torch.zeros(64, 3, dtype=torch.int32), r"scales must have shape \(2, 24\), got \(3, 24\)"),
        ("qzeros", torch.zeros(3, 24, dtype=torch.int32), r"qzeros must have shape \(3, 3\), got \(3, 24\)"),
        ("qzeros", torch.zeros(3, 3, dtype=torch.int64), "qzeros must be int32, got int64"),
        ("scales", torch.ones(3, 24).double(), "scales must be float16, bfloat16, float32, got float64"),
        ("scales", torch.full((3, 24), torch.nan), "the scale of group 0, row 0 is NaN or infinite"),
    ],
)
def test_tensors_that_do_not_agree(name: str, tensor: Tensor | None, message: str) -> None:
    case = Case()
    if tensor is None:
        del case.parts[name]
    else:
        case.parts[name] = tensor
    with pytest.raises((ValueError, TypeError), match=message):
        case.read()


def test_groups_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="group_size must be a positive multiple of 16, got 24"):
        Case(group_size=24).read()


ODD_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([4, 16, 32, 48, 96, 128, -1]), st.floats(), st.text(),
    st.sampled_from(["gemm", "GEMM", "gemv"]), st.lists(st.integers()), st.dictionaries(st.text(), st.integers()),
)  # fmt: skip
FIELDS = ("quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "dynamic")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_it_is_read_or_refused(data: st.DataObject) -> None:
    case = Case(rows=8)
    parts, config = dict(case.parts), dict(case.config)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            config[data.draw(st.sampled_from(FIELDS))] = data.draw(ODD_VALUES)
            continue
        name = data.draw(st.sampled_from(sorted(parts)))
        tensor = parts[name]
        how = data.draw(st.sampled_from(["cut", "dtype", "shape", "value", "gone"]))
        if how == "cut":
            tensor = tensor.narrow(axis := data.draw(st.integers(0, tensor.ndim - 1)), 0, tensor.shape[axis] // 2)
        elif how == "dtype":
            tensor = tensor.to(data.draw(st.sampled_from([torch.int8, torch.int64, torch.float32, torch.bool])))
        elif how == "shape":
            tensor = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, 1, -1)])))
        elif how == "value" and tensor.numel():
            tensor = tensor.clone()
            value = data.draw(st.sampled_from([0, 1, -1] if not tensor.is_floating_point() else [torch.nan, -0.0, 1]))
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
        elif how == "gone" and len(parts) > 1:
            del parts[name]
            continue
        parts[name] = tensor
    try:
        q = awq.reader(config, {}).decode("model.a", parts)
    except (ValueError, TypeError):
        return
    assert torch.isfinite(q.dequantize()).all()
