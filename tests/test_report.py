"""Reports of quality: figures against their definitions in float64, the table, its pictures and files, the command."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import qkernels
from qkernels import QuantLinear, cli, reference_int8
from qkernels.formats import native
from qkernels.reporting import pictures
from qkernels.reporting._second_moments import SecondMoments
from qkernels.reporting.table import QualityReport
from tests.tiny_model import TOKENS, TinyModel, save_tiny_llama

LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


class TinyLanguageModel(TinyModel):
    """Its tokens do not see each other, so padding changes nothing but what is counted."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(logits=super().forward(input_ids))


def _pair(kind: type[TinyModel] = TinyModel, scheme: str = "w3g32", **options: Any) -> tuple[TinyModel, TinyModel]:
    """(quantized, reference)."""
    reference = kind().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(3)  # so that predictions are not all alike
    model = copy.deepcopy(reference)
    qkernels.quantize_model(model, scheme, **{"method": "rtn", "progress": False, **options})
    return model, reference


def _linear(name: str, model: nn.Module) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


# ---- weights ----


@pytest.mark.parametrize("scheme", ["w4g32", "w3g48", "w4c", "w8ts", "w4g32f", "w2g16s-bf16"])
def test_figures_of_a_weight_are_those_of_the_definition(scheme: str) -> None:
    model, reference = _pair(scheme=scheme)
    with torch.no_grad():
        _linear("blocks.0.up", reference).weight[5, 7] += 40.0
        _linear("blocks.0.up", reference).weight[9, 63] -= 40.0  # clipped by scales that do not know of them
    report = qkernels.report(model, reference)
    assert report["name"] == LAYERS
    for row in report:
        layer = model.get_submodule(row.name)
        assert isinstance(layer, QuantLinear)
        q, w = layer.qweight, _linear(row.name, reference).weight.detach().double()
        e = w - q.dequantize().double()
        length = q.scheme.group_length(q.in_features)
        steps = 0.0
        for n in range(w.shape[0]):
            for k in range(w.shape[1]):
                s = q.scale[0, 0] if q.scheme.group_size == "tensor" else q.scale[k // length, n]
                steps = max(steps, abs(e[n, k].item()) / s.item())
        assert row.max_error_steps == pytest.approx(steps, rel=1e-5)
        clipped = row.name == "blocks.0.up"
        assert (row.max_error_steps > 5) if clipped else (row.max_error_steps <= 0.5001)
        assert row.snr_db == pytest.approx(10 * math.log10(w.square().sum() / e.square().sum()), rel=1e-5)
        assert row.error == q.error(w.float())
        assert row.outlier_share == (2 / w.numel() if clipped else 0)
        assert (row.scheme, row.shape, row.nbytes) == (scheme, tuple(w.shape), q.nbytes)
        assert row.bits_per_weight == q.bits_per_weight
        assert row.output_error is None
    assert report.model is None


@pytest.mark.parametrize(
    ("shape", "scheme", "block_shape"),
    [
        ((6, 80), "w4g32", (1, 32)), ((401, 80), "w4g32", (3, 32)), ((3, 16 * 201), "w4g16", (1, 32)),
        ((4, 300), "w4c", (1, 128)), ((4, 48), "w4t", (1, 48)),
    ],
)  # fmt: skip
def test_blocks_are_means_of_squares(shape: tuple[int, int], scheme: str, block_shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    q = qkernels.quantize(w, scheme)
    (row,) = qkernels.report({"layer.weight": q}, {"layer.weight": w})
    assert row.name == "layer"
    assert row.block_shape == block_shape
    squares = (w - q.dequantize()).square()
    cells = [[c.mean() for c in rows.split(block_shape[1], 1)] for rows in squares.split(block_shape[0], 0)]
    torch.testing.assert_close(row.blocks, torch.tensor(cells))


# ---- activations ----


def _inputs(reference: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Everything that layers read, kept."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        _linear(name, reference).register_forward_pre_hook(
            lambda _, args, name=name: kept[name].append(args[0].clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in inputs]).double() for name, inputs in kept.items()}


def test_output_errors_are_those_of_the_definition() -> None:
    model, reference = _pair()
    batches = [TOKENS, TOKENS[:1, :3] + 1]
    report = qkernels.report(model, reference, batches)
    inputs = _inputs(reference, LAYERS, batches)
    assert len(inputs["blocks.0.up"]) == 2 * len(inputs["blocks.1.up"])  # the shared block runs twice
    for row in report:
        x, w = inputs[row.name], _linear(row.name, reference).weight.double()
        layer = model.get_submodule(row.name)
        assert isinstance(layer, QuantLinear)
        e = w - layer.qweight.dequantize().double()
        assert row.output_error == pytest.approx(((x @ e.T).norm() / (x @ w.T).norm()).item(), rel=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8", "w8cs-a8ts"])
def test_output_errors_hold_those_of_quantized_inputs(scheme: str) -> None:
    batches = [TOKENS, TOKENS[:1, :3] + 1]
    model, reference = _pair(scheme=scheme, schemes={"blocks.1.down": "w4g32"}, calibration=batches, fallback=1.0)
    report = qkernels.report(model, reference, batches)
    inputs = _inputs(reference, LAYERS, batches)
    for row in report:
        x, w = inputs[row.name], _linear(row.name, reference).weight.double()
        layer = model.get_submodule(row.name)
        assert isinstance(layer, QuantLinear)
        how, quantized = layer.scheme.activations, x
        assert (how is None) == (row.name == "blocks.1.down")
        if how is not None:
            code = reference_int8.quantize_activations(x.float(), how, layer.weight_activation)
            quantized = reference_int8.dequantize_activations(*code).double()
        e = x @ w.T - quantized @ layer.qweight.dequantize().double().T
        assert row.output_error == pytest.approx((e.norm() / (x @ w.T).norm()).item(), rel=1e-3)
        assert row.scheme == str(layer.scheme) == ("w4g32" if how is None else str(qkernels.Scheme.parse(scheme)))
    assert str(qkernels.Scheme.parse(scheme)) in str(report)


def test_padding_and_what_is_not_finite_where_inputs_are_quantized() -> None:
    model, reference = _pair(TinyLanguageModel, scheme="w8a8")
    mask = torch.ones_like(TOKENS)
    mask[1, 3:] = 0
    found = qkernels.report(model, reference, [{"input_ids": TOKENS, "attention_mask": mask}])
    rows = torch.cat([TOKENS[0], TOKENS[1, :3]])[None]  # tokens do not see each other
    wanted = qkernels.report(model, reference, [rows])
    for one, other in zip(found["output_error"], wanted["output_error"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    unused = nn.ModuleDict({"q": nn.Linear(64, 64)})
    unused.forward = lambda x: x  # type: ignore[method-assign]
    twin = copy.deepcopy(unused)
    qkernels.quantize_model(twin, "w8a8", progress=False)
    with pytest.raises(ValueError, match=r"no batch reaches q in the reference model"):
        qkernels.report(twin, unused, [torch.randn(3, 64)])
    with torch.no_grad():
        reference.embed.weight[int(TOKENS[0, 0]), 3] = math.inf
    with pytest.raises(ValueError, match=r"the input of blocks\.0\.up in the reference model holds NaN or infinity"):
        qkernels.report(model, reference, [TOKENS])


class Siblings(nn.Module):
    """Three layers; the third reads what `change` makes of the input."""

    def __init__(self, change: Any = None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + self.k(input=x)
        return y + self.v(x if self.change is None else self.change(x))


@pytest.mark.parametrize(
    ("change", "matrices"), [(None, 1), (lambda x: x.mul_(2), 2), (lambda x: x if len(x) > 4 else x.relu(), 2)]
)
def test_layers_that_read_one_input_share_its_moments(change: Any, matrices: int) -> None:
    model = Siblings(change)
    watched = {name: layer for name, layer in model.named_children() if isinstance(layer, nn.Linear)}
    moments = SecondMoments(watched)
    wanted = {name: torch.zeros(32, 32) for name in watched}
    with torch.no_grad():
        for tokens in (5, 3, 6):  # of the third change, all but the second batch are the same for v
            x = torch.randn(tokens, 32)
            for name in watched:
                read = x.clone() if change is None or name != "v" else change(x.clone())
                wanted[name] += read.T @ read
            with moments.watching():
                model(x)
    assert len({id(h) for h in moments.moments.values()}) == matrices
    for name, h in moments.moments.items():
        torch.testing.assert_close(h, wanted[name])
    assert moments.last is None  # no activation is kept


def test_merged_layers_are_reported_like_others() -> None:
    reference = nn.Module()
    reference.q_proj, reference.k_proj = nn.Linear(64, 32), nn.Linear(64, 48)
    plain, merged = copy.deepcopy(reference), copy.deepcopy(reference)
    qkernels.quantize_model(plain, "w4g32", method="rtn", progress=False)
    qkernels.quantize_model(merged, "w4g32", merge=[("q_proj", "k_proj")], method="rtn", progress=False)
    assert isinstance(merged.q_proj, qkernels.MergedLinear)
    rows = qkernels.report(merged, reference).layers
    assert rows == qkernels.report(plain, reference).layers
    assert [row.name for row in rows] == ["q_proj", "k_proj"]


# ---- outputs ----


@torch.no_grad()
def test_predictions_are_scored_as_defined() -> None:
    model, reference = _pair(TinyLanguageModel)
    found = qkernels.report(model, reference, [TOKENS, TOKENS[:1, :4]]).model
    assert found is not None
    p, q = (
        torch.cat([torch.log_softmax(m(t).logits[:, :-1].double(), -1).flatten(0, 1) for t in (TOKENS, TOKENS[:1, :4])])
        for m in (reference, model)
    )
    targets = torch.cat([TOKENS[:, 1:].flatten(), TOKENS[0, 1:4]])[:, None]
    assert (found.batches, found.predictions) == (2, 2 * 6 + 3)
    assert found.perplexity == pytest.approx(math.exp(-q.gather(-1, targets).mean()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(-p.gather(-1, targets).mean()), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.kl > 1e-3
    assert found.output_error is None


def test_batches_may_be_tensors_dicts_and_tuples_and_a_generator() -> None:
    model, reference = _pair(TinyLanguageModel)
    wanted = qkernels.report(model, reference, [TOKENS])
    for batch in ({"input_ids": TOKENS}, (TOKENS,), [TOKENS, None]):
        assert qkernels.report(model, reference, (b for b in [batch])) == wanted


def test_padding_counts_for_nothing() -> None:
    model, reference = _pair(TinyLanguageModel)
    padded, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    padded[0, 4:], mask[0, 4:] = 13, 0
    wanted = qkernels.report(model, reference, [TOKENS[:1, :4], TOKENS[1:]])
    found = qkernels.report(model, reference, [{"input_ids": padded, "attention_mask": mask}])
    assert found.model is not None
    assert wanted.model is not None
    assert found.model.predictions == wanted.model.predictions == 3 + 6
    assert found.model.kl == pytest.approx(wanted.model.kl, rel=1e-5)
    assert found["output_error"] == pytest.approx(wanted["output_error"], rel=1e-5)


@torch.no_grad()
def test_outputs_that_predict_no_token_are_compared_as_vectors() -> None:
    model, reference = _pair()
    wanted, got = reference(TOKENS).double(), model(TOKENS).double()
    error = ((wanted - got).norm() / wanted.norm()).item()
    distance = (1 - torch.cosine_similarity(wanted, got, dim=-1)).mean().item()
    found = qkernels.report(model, reference, [TOKENS]).model
    assert found is not None
    assert (found.predictions, found.perplexity) == (0, None)
    assert found.output_error == pytest.approx(error, rel=1e-4)
    assert found.cosine_distance == pytest.approx(distance, rel=1e-4)
    assert "output error" in str(found)


def test_masked_language_models_are_not_asked_for_the_next_token() -> None:
    model, reference = _pair(TinyLanguageModel)
    model.can_generate = reference.can_generate = lambda: False  # type: ignore[assignment]
    found = qkernels.report(model, reference, [TOKENS]).model
    assert found is not None
    assert found.perplexity is None
    assert found.output_error is not None


# ---- what cannot be reported ----


def _nan(reference: TinyModel) -> Iterator[Tensor]:
    yield TOKENS
    reference.blocks[1].up.bias.data[3] = math.nan  # type: ignore[union-attr]
    yield TOKENS


class Unreached(TinyModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks[1](self.embed(tokens)))


@pytest.mark.parametrize(
    ("kind", "batches", "error", "message"),
    [
        (TinyModel, lambda _: [], ValueError, "batches is empty"),
        (TinyModel, lambda _: TOKENS, TypeError, r"got a Tensor; for a single batch write batches=\[batch\]"),
        (TinyModel, lambda _: {"tokens": TOKENS}, TypeError, "got a dict"),
        (TinyModel, lambda _: [3], TypeError, "batch 0 must be a Tensor, a dict or a tuple"),
        (TinyModel, lambda _: [TOKENS, TOKENS + 50], ValueError, "the model fails on batch 1: IndexError"),
        (TinyModel, _nan, ValueError, r"the input of blocks\.1\.down in the reference model holds NaN"),
        (Unreached, lambda _: [TOKENS], ValueError, r"no batch reaches blocks\.0\.up, blocks\.0\.down in"),
        (TinyLanguageModel, lambda _: [TOKENS[:, :1]], ValueError, "each needs two tokens or more"),
    ],
)
def test_bad_batches_are_refused_and_models_left_as_they_were(
    kind: type[TinyModel], batches: Any, error: type[Exception], message: str
) -> None:
    model, reference = _pair(kind)
    reference.train()
    reference.norm.eval()
    with pytest.raises(error, match=message):
        qkernels.report(model, reference, batches(reference))
    assert reference.training
    assert not reference.norm.training
    assert not model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in reference.modules())


def test_models_run_in_evaluation_mode_and_keep_no_hooks() -> None:
    modes = []

    class Watched(TinyModel):
        def forward(self, tokens: Tensor) -> Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(tokens)

    model, reference = _pair(Watched)
    model.train()
    reference.train()
    qkernels.report(model, reference, [TOKENS])
    assert modes == [(False, False)] * 2
    assert model.training
    assert reference.blocks[0].training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*reference.modules(), *model.modules()])


def test_models_that_do_not_fit_are_refused() -> None:
    model, reference = _pair()
    with pytest.raises(ValueError, match="model \\(TinyModel\\) holds no QuantLinear"):
        qkernels.report(reference, reference)
    with pytest.raises(ValueError, match=r"blocks\.0\.up is quantized in reference, too"):
        qkernels.report(model, model)
    with pytest.raises(ValueError, match=r"no layer 'blocks\.0\.up', .* \(4 of 4 such layers\).* like '0'"):
        qkernels.report(model, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="both be modules or both mappings"):
        qkernels.report(model, reference.state_dict())
    with pytest.raises(TypeError, match="a mapping of tensors, got str"):
        qkernels.report("model", reference)  # type: ignore[arg-type]
    reference.blocks[1].down = nn.Linear(128, 32)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks\.1\.down is \(64, 128\) in model, but \(32, 128\) in reference"):
        qkernels.report(model, reference)
    reference.blocks[1].down = nn.LayerNorm(64)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks\.1\.down in reference must be an nn\.Linear, got LayerNorm"):
        qkernels.report(model, reference)
    reference.blocks[0].up.weight.data[3, 4] = math.inf  # type: ignore[union-attr]
    reference.blocks[1].down = nn.Linear(128, 64)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks\.0\.up in reference holds NaN or infinity"):
        qkernels.report(model, reference)


def test_mappings_that_do_not_fit_are_refused() -> None:
    w = torch.randn(8, 64)
    q = qkernels.quantize(w, "w4g32")
    for model, reference, batches, message in (
        ({"a": w}, {"a": w}, None, "nothing is quantized"),
        ({"a": q}, {"b": w}, None, "reference has no tensor 'a'"),
        ({"a": q}, {"a": w.long()}, None, "a in reference must be a floating Tensor, got torch.int64"),
        ({"a": q}, {"a": w}, [TOKENS], "batches need models"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            qkernels.report(model, reference, batches)


# ---- the table ----


@pytest.fixture
def report() -> QualityReport:
    model, reference = _pair(schemes={"*.down": "w8g64"})
    return qkernels.report(model, reference, [TOKENS])


def test_a_report_is_a_small_table(report: QualityReport) -> None:
    assert len(report) == len(list(report)) == 4
    assert report[0].name == LAYERS[0]
    assert report["scheme"] == ["w3g32", "w8g64"] * 2
    assert report.sort("snr_db")["snr_db"] == sorted(report["snr_db"])
    assert report.sort("snr_db", descending=True)["snr_db"] == sorted(report["snr_db"])[::-1]
    assert report["name"] == LAYERS  # sorting made another
    assert report.worst(2)["output_error"] == sorted(report["output_error"])[:-3:-1]
    assert report.to_dicts()[1]["scheme"] == "w8g64"
    assert list(report.to_dicts()[0]) == list(report.columns)
    assert report.bits_per_weight == pytest.approx(sum(report["bits_per_weight"]) / 4)
    with pytest.raises(KeyError, match="'loss' is not a column; columns are name, scheme"):
        report["loss"]
    with pytest.raises(ValueError, match="count must be at least 1"):
        report.worst(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.layers = ()  # type: ignore[misc]
    unmeasured = dataclasses.replace(report, layers=tuple(dataclasses.replace(r, output_error=None) for r in report))
    assert unmeasured.worst(4)["snr_db"] == sorted(report["snr_db"])
    with pytest.raises(ValueError, match="output_error was not measured"):
        unmeasured.sort("output_error")
    assert "output error" not in str(unmeasured).splitlines()[2]


def test_what_is_printed(report: QualityReport) -> None:
    lines = str(report).splitlines()
    assert re.match(r"4 layers: .*, SNR .* dB; whole model: output error .* over 1 batch$", lines[0])
    (line,) = (line for line in lines if "blocks.1.down" in line)
    row = report[3]
    assert line.split()[:5] == ["blocks.1.down", "w8g64", "64", "x", "128"]
    assert f"{row.snr_db:.1f}" in line.split()
    assert f"{row.bits_per_weight:.2f}" == line.split()[-1]


def test_a_lossless_layer_is_called_so(tmp_path: pathlib.Path) -> None:
    w = torch.zeros(8, 64)
    w[:, ::3] = 15  # steps of 1
    report = qkernels.report({"a": qkernels.quantize(w, "w4g32f")}, {"a": w})
    assert report[0].snr_db == math.inf
    assert "lossless" in str(report).splitlines()[-1]
    report.save(tmp_path)
    assert (tmp_path / "heatmap.png").exists()


def test_names_are_escaped_in_html(report: QualityReport) -> None:
    evil = dataclasses.replace(report, layers=(dataclasses.replace(report[0], name="<script>alert('x')</script>"),))
    for text in (evil._repr_html_(), evil._page({})):
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def test_pandas_where_there_is_pandas(report: QualityReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        report.to_pandas()
    fake = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert report.to_pandas() == (report.to_dicts(), list(report.columns))


# ---- pictures and files ----


def test_plots_are_figures_that_jupyter_shows(report: QualityReport) -> None:
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure

    for kind in pictures.KINDS:
        figure = report.plot(kind)
        assert isinstance(figure, Figure)
        shown, _ = DisplayFormatter().format(figure)
        assert shown["image/png"][:4] == b"\x89PNG"
    assert "blocks.1.up" in report.plot("heatmap", layer="blocks.1.up").axes[0].get_title(loc="left")
    assert report.worst(1)[0].name in report.plot("heatmap").axes[0].get_title(loc="left")
    names = [text.get_text() for text in report.plot("layers").axes[0].get_yticklabels()]
    assert names == report.worst(4)["name"]
    many = dataclasses.replace(report, layers=report.layers * 20)
    (axes,) = many.plot("layers").axes
    assert sorted(len(line.get_xdata()) for line in axes.lines) == [40, 40]  # up and down, each of a colour
    for arguments, message in (
        (("pie",), "kind must be one of 'layers', 'bits', 'heatmap', got 'pie'"),
        (("heatmap", "x"), "no layer 'x'"),
        (("bits", "blocks.1.up"), "layer is for kind='heatmap'"),
    ):
        with pytest.raises(ValueError, match=message):
            report.plot(*arguments)


def test_a_heat_map_has_the_right_edges() -> None:
    w = torch.randn(5, 80)
    report = qkernels.report({"a": qkernels.quantize(w, "w4g32")}, {"a": w})
    axes = report.plot("heatmap").axes[0]
    edges = axes.collections[0].get_coordinates()[0, :, 0].tolist()
    assert edges == [0, 32, 64, 80]


def test_saved_files(report: QualityReport, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = report.save(folder)
    assert sorted(path.name for path in paths) == sorted(path.name for path in folder.iterdir())
    with open(folder / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == LAYERS
    assert [float(row["output_error"]) for row in rows] == report["output_error"]
    assert rows[0]["shape"] == "128x64"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='(?!data:)", page)  # nothing from elsewhere
    assert "http" not in page
    before = {path: path.read_bytes() for path in paths}
    report.save(folder)
    assert {path: path.read_bytes() for path in paths} == before


def test_saving_is_whole_or_not_at_all(
    report: QualityReport, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        report.save(tmp_path / "file")

    def full(path: pathlib.Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:3])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        report.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_without_matplotlib_say_what_to_install() -> None:
    code = (
        "import sys, torch, qkernels; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "w = torch.randn(8, 64); r = qkernels.report({'a': qkernels.quantize(w, 'w4g32')}, {'a': w}); print(r)\n"
        "try: r.plot()\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("pip install matplotlib")


# ---- the command ----


def test_the_command_compares_two_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, folder = tmp_path / "model.safetensors", tmp_path / "small"
    folder.mkdir()
    weights = {
        "a.weight": torch.randn(24, 64).bfloat16(),
        "b.weight": torch.randn(8, 64),
        "embed.weight": torch.ones(3),
    }
    safetensors.torch.save_file(weights, original)
    assert cli.main(["quantize", str(original), str(folder / "q.safetensors"), "--scheme", "w4g32"]) == 0
    capsys.readouterr()
    for quantized in (folder, folder / "q.safetensors"):
        assert cli.main(["report", str(quantized), "--reference", str(original), "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("2 layers:")
        error = qkernels.quantize(weights["a.weight"], "w4g32").error(weights["a.weight"])
        (line,) = (line for line in printed.splitlines() if line.split()[:2] == ["a", "w4g32"])
        assert f"{error.snr_db:.1f}" in line
        assert "saved report.csv, report.html, layers.png, bits.png and heatmap.png in" in printed
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


def test_the_command_measures_a_language_model(
    llama: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkernels.demo import language_model

    reference, tokenizer = language_model.load(llama, "cpu")
    model = copy.deepcopy(reference)
    qkernels.quantize_model(model, "w3g32", method="rtn", progress=False)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # what else the file holds counts, too
    saved, text = tmp_path / "q.safetensors", tmp_path / "text.txt"
    qkernels.save(model, saved)
    text.write_text("A paragraph of text\nwhich is wrapped.\n\n" * 40)
    arguments = ["report", str(saved), "--reference", str(llama), "--text", str(text), "--windows", "2"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    windows = language_model.windows(text.read_text(), tokenizer, 2)
    wanted = qkernels.report(model, reference, [window[None] for window in windows])
    assert str(wanted) in printed
    assert "whole model: perplexity" in str(wanted)
    assert "2 windows of 512 tokens of text.txt, on cpu" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["QUANTIZED", "--reference", "MISSING"], "there is no such file or folder"),
        (["MISSING", "--reference", "PLAIN"], "No such file"),
        (["PLAIN", "--reference", "PLAIN"], "not a qkernels file"),
        (["QUANTIZED", "--reference", "QUANTIZED"], "is quantized itself"),
        (["QUANTIZED", "--reference", "TEXT"], "not a whole safetensors file"),
        (["QUANTIZED", "--reference", "OTHER"], "reference has no tensor 'a.weight'"),
        (["FOLDER", "--reference", "PLAIN"], "must hold one safetensors file, found 3"),
        (["QUANTIZED", "--reference", "PLAIN", "--text", "TEXT"], "--text needs a language model"),
        (["QUANTIZED", "--reference", "PLAIN", "--out", "TEXT"], "is not a folder"),
        (
            ["QUANTIZED", "--reference", "LLAMA", "--text", "TEXT"],
            "a.weight is quantized, but the model has no layer",
        ),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    arguments: list[str], message: str, llama: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = torch.randn(8, 64)
    places = {
        "QUANTIZED": tmp_path / "q.safetensors", "PLAIN": tmp_path / "p.safetensors", "TEXT": tmp_path / "text.txt",
        "OTHER": tmp_path / "o.safetensors", "MISSING": tmp_path / "missing", "FOLDER": tmp_path, "LLAMA": llama,
    }  # fmt: skip
    native.write(places["QUANTIZED"], {"a.weight": qkernels.quantize(w, "w4g32")})
    safetensors.torch.save_file({"a.weight": w}, places["PLAIN"])
    safetensors.torch.save_file({"b.weight": w}, places["OTHER"])
    places["TEXT"].write_text("A text that is no tensor. " * 100)
    assert cli.main(["report", *(str(places.get(a, a)) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qkernels: error: ")
    assert message in error
    assert places["TEXT"].read_text().startswith("A text")
