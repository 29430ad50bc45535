"""GPTQ: weights packed here, slowly and bit by bit, are read as scale times (code minus zero), bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import QTensor
from qkernels.formats import gptq
from qkernels.formats import reader as base

Array = npt.NDArray[Any]
STREAM = (2, 3, 4, 8)
# planes of a code in "gptq_p": (bits, how many of the code's bits are below)
PLANES = {2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 5: [(4, 0), (1, 4)], 6: [(4, 0), (2, 4)],
          7: [(4, 0), (2, 4), (1, 6)], 8: [(8, 0)]}  # fmt: skip
FORMS = [(bits, form) for bits in STREAM for form in ("gptq", "gptq_v2")] + [(bits, "gptq_p") for bits in PLANES]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _word(value: int) -> int:
    """An int32 with the bits of an unsigned number."""
    return value - 2**32 if value >= 2**31 else value


def _stream(codes: list[int], bits: int) -> list[int]:
    """Words of codes that follow each other without gaps, low bits first."""
    whole = sum(int(code) << bits * i for i, code in enumerate(codes))
    assert len(codes) * bits % 32 == 0
    return [whole >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def _planes(codes: list[int], bits: int) -> list[int]:
    """Words of planes: for each 32 codes, the fields of the low plane, then those of the next."""
    words = []
    for start in range(0, len(codes), 32):
        for width, shift in PLANES[bits]:
            words += _stream([int(code) >> shift & 2**width - 1 for code in codes[start : start + 32]], width)
    return words


def _pack(codes: Array, bits: int, form: str) -> Array:
    """(rows, codes) -> (rows, words) of unsigned numbers."""
    one_row = _planes if form == "gptq_p" and bits in (3, 5, 6, 7) else _stream
    return np.array([one_row(row, bits) for row in codes.tolist()], dtype=np.int64)


def _stored_zeros(zeros: Array, bits: int, form: str) -> Array:
    """(G, N) -> (G, words) int32, as exporters write them."""
    if form != "gptq":
        words = _pack(zeros, bits, form)
    elif bits == 3:
        words = _pack((zeros - 1) % 8, bits, form)
    else:
        ones = sum(1 << i for i in range(0, 32, bits))
        words = (_pack(zeros, bits, form) - ones) % 2**32
    return words.astype(np.uint32).view(np.int32)


class Case:
    """A weight, its tensors in a file, and its values."""

    def __init__(
        self,
        bits: int,
        form: str | None = "gptq",
        *,
        rows: int = 32,
        in_features: int = 96,
        group_size: int = 32,
        dtype: torch.dtype = torch.float16,
        zero: int | None = None,
        act_order: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng([seed, bits, rows, in_features])
        length = in_features if group_size == -1 else group_size
        groups = -(-in_features // length)
        codes = rng.integers(0, 2**bits, (rows, in_features))
        zeros = rng.integers(0, 2**bits, (groups, rows)) if zero is None else np.full((groups, rows), zero)
        scales = torch.from_numpy(rng.normal(0, 0.1, (groups, rows))).to(dtype)
        g_idx = np.arange(in_features) // length
        if act_order:
            g_idx = g_idx[rng.permutation(in_features)]
        layout = form or "gptq"
        self.config: dict[str, Any] = {
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False, "desc_act": act_order,
        }  # fmt: skip
        if form is not None:
            self.config["checkpoint_format"] = form
        self.parts = {
            "qweight": torch.from_numpy(_pack(codes, bits, layout).T.astype(np.uint32).view(np.int32).copy()),
            "qzeros": torch.from_numpy(_stored_zeros(zeros, bits, layout)),
            "scales": scales,
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }
        self.codes = codes
        wide = scales.to(torch.float32).numpy()
        self.values = np.zeros((rows, in_features), dtype=np.float32)
        for k in range(in_features):
            g = g_idx[k]
            self.values[:, k] = wide[g] * (codes[:, k] - zeros[g]).astype(np.float32)

    def read(self, module: str = "model.layers.0.mlp.up_proj", **config: Any) -> QTensor:
        return gptq.reader({**self.config, **config}, {}).decode(module, self.parts)

    def check(self, q: QTensor) -> None:
        assert q.shape == self.values.shape
        assert torch.equal(q.dequantize(), torch.from_numpy(self.values))


@pytest.mark.parametrize(("bits", "form"), FORMS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_and_form_is_read_bit_for_bit(bits: int, form: str, act_order: bool, dtype: torch.dtype) -> None:
    case = Case(bits, form, act_order=act_order, dtype=dtype)
    q = case.read()
    case.check(q)
    assert str(q.scheme).startswith(f"w{bits}g32")
    assert q.scheme.value_map == "affine"
    assert q.scheme.scale_dtype is dtype
    assert (q.order is not None) is act_order
    x = torch.randn(3, q.shape[1])
    torch.testing.assert_close(x @ q.T, x @ torch.from_numpy(case.values).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", STREAM)
@pytest.mark.parametrize(
    ("in_features", "group_size", "scheme"),
    [
        (96, -1, "c"),
        (96, 96, "g96"),
        (96, 64, "g64"),
        (96, 128, "c"),
        (64, 1000, "c"),
        (32, 2**70, "c"),
        (416, 128, "g128"),
    ],
)
def test_groups_of_any_size(bits: int, in_features: int, group_size: int, scheme: str) -> None:
    act_order = 1 < group_size < in_features
    case = Case(bits, in_features=in_features, group_size=group_size if group_size < 2**60 else -1, act_order=act_order)
    q = case.read(group_size=group_size)
    case.check(q)
    assert str(q.scheme) == f"w{bits}{scheme}"


@pytest.mark.parametrize(("bits", "rows"), [(2, 16), (4, 8), (8, 4), (8, 12), (4, 24), (3, 64)])
def test_rows_that_fill_words_of_zeros(bits: int, rows: int) -> None:
    case = Case(bits, rows=rows, in_features=48 if bits != 3 else 64, group_size=16)
    case.check(case.read())


def test_one_group_of_a_size_that_is_no_multiple_of_16() -> None:
    case = Case(4, in_features=40, group_size=40)
    case.check(case.read())
    with pytest.raises(ValueError, match="group_size must be a positive multiple of 16, got 20"):
        Case(4, in_features=40, group_size=20).read()


def test_without_g_idx_groups_are_runs() -> None:
    case = Case(4)
    del case.parts["g_idx"]
    case.check(case.read())
    one = Case(4, group_size=-1)
    del one.parts["g_idx"]
    one.check(one.read(desc_act=True))
    with pytest.raises(ValueError, match="there is no tensor 'g_idx', which says what the 3 groups"):
        case.read(desc_act=True)


def test_g_idx_counts_whatever_desc_act_says() -> None:
    ordered, plain = Case(4, act_order=True), Case(4)
    ordered.check(ordered.read(desc_act=False))
    plain.check(q := plain.read(desc_act=True))
    assert q.order is None
    ordered.parts["g_idx"] = ordered.parts["g_idx"].long()
    ordered.check(ordered.read())


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_of_every_width(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    words = torch.from_numpy(_pack(codes, bits, "gptq").astype(np.uint32).view(np.int32).copy())
    for count in range(65):
        found = base.unpack_stream(words[:, : -(-count * bits // 32)], bits, count)
        assert torch.equal(found, torch.from_numpy(codes[:, :count].astype(np.uint8)))
    with pytest.raises(ValueError, match="are too few for 65 codes"):
        base.unpack_stream(words, bits, 65)


# ---- words worked out by hand ----


def _one_column(bits: int, words: list[int], in_features: int, form: str = "gptq_v2") -> list[int]:
    """Codes of a column that all 32 columns repeat; scale 1, zero 0."""
    parts = {
        "qweight": torch.tensor([[_word(w)] * 32 for w in words], dtype=torch.int32),
        "qzeros": torch.zeros(1, bits, dtype=torch.int32),
        "scales": torch.ones(1, 32),
    }
    config = {"bits": bits, "group_size": -1, "checkpoint_format": form}
    return gptq.reader(config, {}).decode("m", parts).dequantize()[5].tolist()


def test_golden_words() -> None:
    assert _one_column(2, [0xE4E4E4E4], 16) == [0, 1, 2, 3] * 4
    assert _one_column(4, [0x76543210, 0xFEDCBA98], 16) == list(range(16))
    assert _one_column(8, [0x030201FF, 0x80FE7F00], 8) == [255, 1, 2, 3, 0, 127, 254, 128]
    # 0 to 7 over and over: eight codes are 0xFAC688, 24 bits, so that three words hold it four times
    assert _one_column(3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], 32) == [*range(8)] * 4
    # the same codes in planes: low two bits 0 1 2 3 are 0xE4 twice, high bits 0 0 0 0 1 1 1 1 are 0xF0
    assert _one_column(3, [0xE4E4E4E4, 0xE4E4E4E4, 0xF0F0F0F0], 32, "gptq_p") == [*range(8)] * 4
    nibbles = [0x76543210, 0xFEDCBA98] * 2
    assert _one_column(5, [*nibbles, 0xFFFF0000], 32) == list(range(32))
    # two bits above: 0 2 0 2, then 1 2 1 2
    upper = [low + (32 if low % 2 else 0) for low in range(16)] + [low + (32 if low % 2 else 16) for low in range(16)]
    assert _one_column(6, [*nibbles, 0x88888888, 0x99999999], 32) == upper
    # two bits above: 0, then 1; one bit above these: 0 1 0 1
    assert _one_column(7, [*nibbles, 0, 0x55555555, 0xAAAAAAAA], 32) == [
        low + 16 * half + (64 if low % 2 else 0) for half in (0, 1) for low in range(16)
    ]


def _zeros(bits: int, words: list[int], form: str, sym: bool = False) -> list[int]:
    """Zeros that are read of one group's words."""
    count = len(words) * 32 // bits
    rows = 32 if bits == 3 else 32 // bits
    parts = {
        "qweight": torch.zeros(bits if bits == 3 else rows * bits // 32, count, dtype=torch.int32),
        "qzeros": torch.tensor([[_word(w) for w in words]], dtype=torch.int32),
        "scales": torch.ones(1, count),
    }
    config = {"bits": bits, "group_size": -1, "checkpoint_format": form, "sym": sym}
    return (-gptq.reader(config, {}).decode("m", parts).dequantize()[:, 0]).int().tolist()


def test_golden_zeros() -> None:
    assert _zeros(4, [0x76543210], "gptq_v2") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert _zeros(4, [0x76543210], "gptq") == [1, 2, 3, 4, 5, 6, 7, 8]
    # 0 1 2 3 4 5 6 7 minus a one in each field, as words: 0x76543210 - 0x11111111; the lowest borrows from the next
    assert _zeros(4, [0x654320FF], "gptq") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert _zeros(4, [0xEEEEEEEF], "gptq") == [0] * 8  # 0 - 0x11111111
    assert _zeros(2, [0xAAAAAAAB], "gptq") == [0] * 16
    assert _zeros(8, [0xFEFEFEFF], "gptq") == [0] * 4
    assert _zeros(8, [0x7F7F7F7F], "gptq") == [128] * 4
    # of 3 bits each field for itself: all sevens are zeros
    assert _zeros(3, [0xFFFFFFFF] * 3, "gptq") == [0] * 32
    assert _zeros(3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], "gptq") == [1, 2, 3, 4, 5, 6, 7, 0] * 4


# ---- sym, labels ----


@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_zeros_in_the_middle_make_it_symmetric(bits: int, form: str) -> None:
    case = Case(bits, form, zero=2 ** (bits - 1), act_order=True)
    for sym in (False, True):
        q = case.read(sym=sym)
        case.check(q)
        assert q.scheme.value_map == "symmetric"
        assert q.zero is None


@pytest.mark.parametrize("bits", STREAM)
def test_files_that_call_zeros_of_the_second_version_the_first(bits: int) -> None:
    case = Case(bits, "gptq_v2", zero=2 ** (bits - 1))
    for label in ({"checkpoint_format": "gptq"}, {"checkpoint_format": None}):
        case.check(q := case.read(**label, sym=True))
        assert q.scheme.value_map == "symmetric"
    config = dict(case.config, checkpoint_format="gptq")
    del config["sym"]  # which is true then
    case.check(gptq.reader(config, {}).decode("m", case.parts))
    # Without sym such zeros are possible: they are what the label says.
    q = case.read(checkpoint_format="gptq", sym=False)
    assert q.zero is not None
    assert (q.zero == (2 ** (bits - 1) + 1)).all()
    # One zero that is another makes it no symmetric weight.
    other = Case(bits, "gptq_v2", zero=2 ** (bits - 1))
    other.parts["qzeros"][0, 0] ^= 1
    q = other.read(checkpoint_format="gptq", sym=True)
    assert q.zero is not None
    assert (q.zero[1] == (2 ** (bits - 1) + 1)).all()


def test_the_label_is_v1_unless_something_else_is_said() -> None:
    case = Case(4, None)
    case.check(case.read())
    case.check(case.read(checkpoint_format="GPTQ"))
    case.check(case.read(format="gptq"))
    v2 = Case(4, "gptq_v2")
    v2.check(v2.read(format="gptq_v2"))
    with pytest.raises(ValueError, match="checkpoint_format and format differ"):
        v2.read(format="gptq")


def test_an_old_file_beside_the_model() -> None:
    case = Case(4, None, zero=8, group_size=32)
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True,
           "model_name_or_path": "x", "model_file_base_name": None, "static_groups": False}  # fmt: skip
    case.check(gptq.reader(old, {}).decode("m", case.parts))
    case.check(gptq.reader({**old, "lm_head": True}, {}).decode("lm_head", case.parts))


def test_widths_that_have_planes_alone_need_no_label() -> None:
    for label in (None, "gptq", "gptq_v2", "gptq_p"):
        for bits in (5, 6, 7):
            case = Case(bits, "gptq_p")
            case.check(case.read(checkpoint_format=label))
        # One such module makes the whole file one of planes.
        three = Case(3, "gptq_p")
        three.check(three.read(checkpoint_format=label, dynamic={"+:.*head": {"bits": 5}}))


# ---- dynamic ----


def test_modules_with_settings_of_their_own() -> None:
    four, eight = Case(4), Case(8, group_size=16)
    dynamic = {
        "-:.*experts.*": {},
        "-:(?<=this is not looked at": {},
        r"^model\.layers\.0\.special$": {"group_size": -1},
        r"+:.*\.(?:18|19)\..*gate.*": {"bits": 8, "group_size": 16, "mse": 0.1},
        r".*\.18\..*": {"bits": 2},
        r"^model\.layers\.0\.special2$": {"bits": 8, "group_size": 16},
        r".*special2": {"bits": 2},
    }
    four.check(four.read("model.layers.0.mlp.gate", dynamic=dynamic))
    eight.check(eight.read("model.layers.18.mlp.gate_proj", dynamic=dynamic))
    eight.check(eight.read("model.layers.19.mlp.gate_proj", dynamic=dynamic))
    eight.check(eight.read("model.layers.0.special2", dynamic=dynamic))
    two = Case(2)
    two.check(two.read("model.layers.18.mlp.up_proj", dynamic={**dynamic}, bits=4))
    channel = Case(4, group_size=-1)
    channel.check(channel.read("model.layers.0.special", dynamic=dynamic, group_size=32))
    late = {"+:.*special": {"bits": 8, "group_size": 16}, r"^model\.layers\.0\.special$": {"bits": 2}}
    eight.check(eight.read("model.layers.0.special", dynamic=late))
    twice = {"^special$": {"bits": 8, "group_size": 16}, "+:^special$": {"bits": 2}}
    eight.check(eight.read("special", dynamic=twice))
    four.check(four.read("a.special.b", dynamic={"special": {"bits": 8}}))  # from the start, not anywhere
    four.check(four.read("special", dynamic={r"^special\.$": {"bits": 8}}))
    sym = Case(4, "gptq_v2", zero=8)
    sym.check(sym.read("m", checkpoint_format="gptq", dynamic={"m": {"sym": True}}))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ([], "dynamic must map patterns to settings"),
        ({1: {}}, "dynamic must map patterns to settings, got 1"),
        ({"a": 4}, "dynamic must map patterns to settings, got 'a': 4"),
        ({"a": {"bits": 9}}, "bits must be one of .* got 9, in the settings of 'a' in dynamic"),
        ({"a": {"group_size": "32"}}, "group_size must be an int, got '32', in the settings of 'a'"),
        ({"+:(a": {}}, r"dynamic: the pattern '\(a' is not supported: a \( that is not closed"),
        ({"(?<=a)b": {}}, "a group of another kind"),
        ({f"a{i:05d}.*": {} for i in range(7000)}, "patterns of more than 50000 characters"),
    ],
)
def test_settings_that_are_none(dynamic: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(4).read(dynamic=dynamic)


def test_many_exact_names_are_no_matter() -> None:
    dynamic = {rf"+:^model\.layers\.{i}\.mlp$": {"bits": 8, "group_size": 16} for i in range(5000)}
    eight = Case(8, group_size=16)
    eight.check(eight.read("model.layers.4999.mlp", dynamic=dynamic))


# ---- what is wrong is named ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "quant_method must be one of None, 'gptq', got 'awq'"),
        ({"bits": True}, "bits must be one of 2, 3, 4, 5, 6, 7, 8, got True"),
        ({"bits": 4.0}, "bits must be one of .* got 4.0"),
        ({"bits": "4"}, "bits must be one of .* got '4'"),
        ({"bits": 1}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be positive or -1, got 0"),
        ({"group_size": -2}, "group_size must be positive or -1, got -2"),
        ({"group_size": True}, "group_size must be an int, got True"),
        ({"group_size": None}, "group_size must be an int, got None"),
        ({"sym": 1}, "sym must be one of True, False, got 1"),
        ({"desc_act": "yes"}, "desc_act must be one of True, False, got 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be one of 'gptq', 'gptq_v2', 'gptq_p', got 'marlin'"),
        ({"checkpoint_format": 2}, "checkpoint_format must be one of"),
        ({"format": "bitblas"}, "format must be one of"),
        ({"pack_dtype": "int16"}, "pack_dtype must be one of None, 'int32', got 'int16'"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"rotation": "hadamard"}, "rotation must be one of None, got 'hadamard'"),
    ],
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config's {message}" if " " in message else message):
        Case(4).read(**config)


@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_fields_that_are_needed(name: str) -> None:
    config = dict(Case(4).config)
    del config[name]
    with pytest.raises(ValueError, match=f"quantization_config has no '{name}'"):
        gptq.reader(config, {})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("qweight", None, "there is no tensor 'qweight'"),
        ("qzeros", None, "there is no tensor 'qzeros'"),
        ("scales", None, "there is no tensor 'scales'"),
        ("qweight", torch.zeros(12, 32), "qweight must be int32, got float32"),
        ("qweight", torch.zeros(12, dtype=torch.int32), r"qweight must be \(K \* 4 / 32, N\), got shape \(12,\)"),
        ("qweight", torch.zeros(0, 32, dtype=torch.int32), "qweight must be"),
        ("qweight", torch.zeros(12, 0, dtype=torch.int32), "qweight must be"),
        (
            "qweight",
            torch.zeros(12, 33, dtype=torch.int32),
            "qweight of 4 bits must have a multiple of 8 columns, got 33",
        ),
        ("qweight", torch.zeros(16, 32, dtype=torch.int32), r"scales must have shape \(4, 32\), got \(3, 32\)"),
        ("qzeros", torch.zeros(3, 32, dtype=torch.int32), r"qzeros must have shape \(3, 4\), got \(3, 32\)"),
        ("qzeros", torch.zeros(3, 4), "qzeros must be int32, got float32"),
        ("scales", torch.zeros(3, 32, dtype=torch.float64), "scales must be float16, bfloat16, float32, got float64"),
        ("scales", torch.full((3, 32), torch.inf), "the scale of group 0, row 0 is NaN or infinite"),
        ("scales", torch.ones(1, 32), r"scales must have shape \(3, 32\), got \(1, 32\)"),
        ("g_idx", torch.zeros(95, dtype=torch.int32), r"g_idx must have shape \(96,\), got \(95,\)"),
        ("g_idx", torch.zeros(96), "g_idx must be int32, int64, got float32"),
        ("g_idx", torch.zeros(96, dtype=torch.int32), "g_idx gives group 0 96 features; groups are of 32"),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), "g_idx must be from 0 to 2, got 3"),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), "g_idx must be from 0 to 2, got -1"),
    ],
)
def test_tensors_that_do_not_agree(name: str, tensor: Tensor | None, message: str) -> None:
    case = Case(4)
    if tensor is None:
        del case.parts[name]
    else:
        case.parts[name] = tensor
    with pytest.raises((ValueError, TypeError), match=message):
        case.read()


@pytest.mark.parametrize(("bits", "words"), [(3, 4), (5, 12), (6, 3), (6, 9), (7, 20)])
def test_whole_blocks_of_words(bits: int, words: int) -> None:
    parts = {"qweight": torch.zeros(words, 32, dtype=torch.int32)}
    decode = gptq.reader({"bits": bits, "group_size": -1}, {}).decode
    with pytest.raises(ValueError, match=f"qweight of {bits} bits must have a multiple of {bits} rows, got {words}"):
        decode("m", parts)
    with pytest.raises(ValueError, match=f"qweight of {bits} bits must have a multiple of 32 columns, got 16"):
        decode("m", {"qweight": torch.zeros(bits, 16, dtype=torch.int32)})


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [
        Case(bits, form, rows=32, in_features=64, act_order=order) for bits, form in FORMS for order in (False, True)
    ]


ODD_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, -1]), st.floats(),
    st.sampled_from(["gptq", "gptq_v2", "gptq_p", "marlin", ""]), st.text(max_size=5), st.lists(st.integers()),
    st.dictionaries(st.text("am.*+(|)[]\\d"), st.dictionaries(st.sampled_from(["bits", "sym"]), st.integers(2, 8))),
)  # fmt: skip
FIELDS = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "format",
    "dynamic",
    "pack_dtype",
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_it_is_read_or_refused(cases: list[Case], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(cases))
    parts, config = dict(case.parts), dict(case.config)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            config[data.draw(st.sampled_from(FIELDS))] = data.draw(ODD_VALUES)
            continue
        name = data.draw(st.sampled_from(sorted(parts)))
        tensor = parts[name]
        how = data.draw(st.sampled_from(["cut", "dtype", "shape", "value", "gone"]))
        if how == "cut" and tensor.ndim:
            tensor = tensor.narrow(axis := data.draw(st.integers(0, tensor.ndim - 1)), 0, tensor.shape[axis] // 2)
        elif how == "dtype":
            tensor = tensor.to(data.draw(st.sampled_from([torch.int8, torch.int64, torch.float32, torch.bool])))
        elif how == "shape":
            tensor = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, 1, -1)])))
        elif how == "value" and tensor.numel():
            tensor = tensor.clone()
            values = [2**31 - 1, -(2**31), -1, 0] if tensor.dtype is torch.int32 else [torch.nan, -0.0, 1]
            with contextlib.suppress(RuntimeError, ValueError):
                tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.sampled_from(values))
        elif how == "gone" and len(parts) > 1:
            del parts[name]
            continue
        parts[name] = tensor
    try:
        q = gptq.reader(config, {}).decode("model.a", parts)
    except (ValueError, TypeError):
        return
    assert torch.isfinite(q.dequantize()).all()
