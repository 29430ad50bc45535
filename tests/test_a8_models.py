"""Models of transformers whose layers quantize their inputs: against twins in floats, through files, in all modes."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels
from qkernels import FormatError, QuantExperts, QuantLinear, Scheme, pretrained
from qkernels import reference_int8 as oracle
from qkernels.integrations.transformers import QKernelsConfig
from qkernels.replace import counterpart, linears_for_conv1d, places, put
from tests import models
from tests.helpers import quantized
from tests.test_architectures import dequantized
from tests.test_transformers import load, saved

STATIC = ["w8cs-a8ts", "w4g32-a8t"]


def fake(x: Tensor, scheme: Scheme, activation: Tensor | None) -> Tensor:
    """x as its codes have it."""
    assert scheme.activations is not None
    codes = oracle.quantize_activations(x.reshape(-1, x.shape[-1]), scheme.activations, activation)
    return oracle.dequantize_activations(*codes).reshape(x.shape).to(x.dtype)


class _FakeExperts(QuantExperts):
    """As a loop over floats."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        dense = self.qweight.dequantize().unflatten(0, (self.num_experts, -1))
        seen = fake(x, self.scheme, None)
        rows = [
            F.linear(s, dense[e]) if e < len(dense) else s.new_zeros(dense.shape[1])
            for s, e in zip(seen, expert, strict=True)
        ]
        return torch.stack(rows)


def twin_of(model: Any, original: Any) -> Any:
    """The original with dequantized weights, whose layers read what codes of their inputs stand for."""
    twin = dequantized(model, original)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantExperts):
            experts = copy.deepcopy(layer)
            experts.__class__ = _FakeExperts
            parent, _, child = name.rpartition(".")
            delattr(twin.get_submodule(parent), child)
            setattr(twin.get_submodule(parent), child, experts)
            twin.get_submodule(parent).config._experts_implementation = "qkernels"
        elif isinstance(layer, QuantLinear) and layer.scheme.activations is not None:

            def hook(_: Any, args: tuple[Tensor], layer: QuantLinear = layer) -> tuple[Tensor]:
                return (fake(args[0], layer.scheme, layer.weight_activation),)

            twin.get_submodule(name).register_forward_pre_hook(hook)
    return twin


@contextlib.contextmanager
def checked(model: Any) -> Iterator[list[str]]:
    """Meanwhile every product is what floats give for the same input, within rounding; gives names of layers seen."""
    seen: list[str] = []

    def hook(name: str) -> Any:
        def check(layer: QuantLinear, args: tuple[Tensor], y: Tensor) -> None:
            x = fake(args[0].float(), layer.scheme, layer.weight_activation)
            wanted = F.linear(x, layer.qweight.dequantize(), layer.bias)
            torch.testing.assert_close(y, wanted.to(y.dtype), atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
            seen.append(name)

        return check

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    yield seen
    for handle in handles:
        handle.remove()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def check_twins(found: Tensor, model: Any, original: Any, arguments: dict[str, Tensor]) -> None:
    """Far nearer to the twin than quantizing inputs takes outputs.

    Not equal: a last bit of a sum that differs turns, now and then, a code of a later layer into the one beside it.
    """
    noise = error(found, models.output(dequantized(model, original), arguments))
    assert noise > 1e-4
    assert error(found, models.output(twin_of(model, original), arguments)) < 0.15 * noise


def make_static(name: str, scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose Linears have static activations, of the range of their inputs, as calibration would find them."""
    model, inputs = models.make(name, dtype), {}
    with linears_for_conv1d(model):
        linears = {
            n: m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith(("lm_head", ".wo"))
        }
        handles = [
            m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, args[0])) for n, m in linears.items()
        ]
        models.output(model, models.inputs(name, dtype))
        for handle in handles:
            handle.remove()
        for n, linear in linears.items():
            weight = quantized(linear.weight.detach(), scheme, inputs[n]) if n in inputs else None
            if weight is not None:
                put(counterpart(linear, weight), places(model)[linear])
    pretrained.describe(model)
    return model


# ---- every architecture ----


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((n, "w8a8") for n in models.MODELS), *((n, "w4g32-a8") for n in ("llama", "gpt2", "mixtral"))],
)
def test_quantized_while_loading(name: str, scheme: str, tmp_path: pathlib.Path) -> None:
    folder, arguments = saved(name, tmp_path / "float"), models.inputs(name)
    model = load(name, folder, quantization_config=QKernelsConfig(scheme))
    wanted = models.make(name)
    qkernels.quantize_model(wanted, scheme, method="rtn", progress=False)
    found = models.output(model, arguments)
    assert torch.equal(found, models.output(wanted, arguments))
    with checked(model) as seen:
        models.output(model, arguments)
    assert set(seen) == {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    check_twins(found, model, models.make(name), arguments)

    model.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert {entry["scheme"] for entry in config["weights"].values()} == {str(Scheme.parse(scheme))}
    assert torch.equal(models.output(load(name, tmp_path / "quantized"), arguments), found)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((n, STATIC[0]) for n in ("llama-tied", "gemma2", "gpt2", "bert", "vit", "whisper")),
     *((n, STATIC[1]) for n in ("qwen3", "phi3", "gpt2", "t5"))],
)  # fmt: skip
def test_static_models_come_back(name: str, scheme: str, tmp_path: pathlib.Path) -> None:
    model, arguments = make_static(name, scheme), models.inputs(name)
    found = models.output(model, arguments)
    with checked(model) as seen:
        models.output(model, arguments)
    assert len(seen) > 5
    check_twins(found, model, models.make(name), arguments)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    kind = models.model_class(name)
    again, info = kind.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ranges = {n: p for n, p in model.named_parameters() if n.endswith("weight_activation")}
    assert ranges
    for reloaded in (
        again.eval(),
        load(name, tmp_path / "quantized", device_map="auto"),
        qkernels.load(tmp_path / "quantized"),
    ):
        assert torch.equal(models.output(reloaded, arguments), found)
        for n, wanted in ranges.items():
            own = reloaded.get_parameter(n)
            assert own.dtype is torch.float32
            assert torch.equal(own, wanted)
            assert not own.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits_keep_static_ranges_in_float32(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    model, arguments = make_static("llama", "w8cs-a8ts", dtype), models.inputs("llama")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # as it is loaded: not in 16 bits
    found = models.output(model, arguments)
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": dtype}, {"device_map": {"": "cpu"}}):
        again = load("llama", tmp_path, **options)
        assert again.dtype is dtype
        assert {p.dtype for n, p in again.named_parameters() if n.endswith("_activation")} == {torch.float32}
        assert torch.equal(models.output(again, arguments), found)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = load("llama", tmp_path, device_map=devices, offload_folder=tmp_path / "disk")
    assert torch.equal(models.output(offloaded, arguments), found)


# ---- what a config can ask ----


def test_what_a_config_cannot_ask_is_said_before_anything_is_loaded() -> None:
    for arguments, message in (
        (
            {"scheme": "w8cs-a8ts"},
            "scheme 'w8cs-a8ts' has static activations, whose scale calibration finds: give calib",
        ),
        ({"scheme": "w8a8", "schemes": {"*.o_proj": "w4g32-a8t"}}, "scheme 'w4g32-a8t' has static activations"),
        ({"scheme": "w8cs-a8ts", "method": "search"}, "scheme 'w8cs-a8ts' has static activations"),
        (
            {"scheme": "w8a8", "embeddings": "w8a8"},
            "embeddings='w8cs-a8s': an embedding has no activations to quantize",
        ),
        ({"scheme": "w3g32-a8s"}, "weights of 4 or 8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            QKernelsConfig(**arguments)
    asked = QKernelsConfig("w8cs-a8ts", method="gptq", calibration=[torch.zeros(1, 4, dtype=torch.long)])
    assert asked.to_dict()["scheme"] == "w8cs-a8ts"


@pytest.mark.parametrize(
    ("scheme", "choices"),
    [
        ("w8cs-a8ts", {}),
        ("w4g32-a8t", {"method": "gptq", "options": {"merge": True}}),
        ("w8a8", {"options": {"smooth": "smoothquant"}}),
    ],
)
def test_calibration_finds_static_ranges(scheme: str, choices: dict[str, Any], tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama", tmp_path / "float"), models.inputs("llama")
    batches = [torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(5))]
    config = QKernelsConfig(scheme, calibration=batches, **choices)
    model = load("llama", folder, quantization_config=config)
    wanted = models.make("llama")
    options = {**choices, **choices.get("options", {})}
    options.pop("options", None)
    qkernels.quantize_model(wanted, scheme, calibration=batches, progress=False, **options)
    found = models.output(model, arguments)
    assert torch.equal(found, models.output(wanted, arguments))
    ranges = {n: t for n, t in model.state_dict().items() if n.endswith("weight_activation")}
    assert bool(ranges) == Scheme.parse(scheme).is_static
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in ranges.items())
    model.save_pretrained(tmp_path / "quantized")
    for again in (load("llama", tmp_path / "quantized"), qkernels.load(tmp_path / "quantized")):
        assert torch.equal(models.output(again, arguments), found)
        assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith("weight_activation"))


def test_schemes_by_name(tmp_path: pathlib.Path) -> None:
    """Some layers with quantized inputs, some without; experts, too, and an output layer beside its embedding."""
    folder, arguments = saved("mixtral", tmp_path / "float"), models.inputs("mixtral")
    choices: dict[str, Any] = {
        "schemes": {"*.o_proj": "w4g32", "*.experts.down_proj": "w8c", "lm_head": "w8cs-a8s"}, "embeddings": "w8c",
    }  # fmt: skip
    model = load("mixtral", folder, quantization_config=QKernelsConfig("w4g32-a8", **choices))
    block = model.model.layers[0]
    layers = (
        block.self_attn.q_proj,
        block.self_attn.o_proj,
        block.mlp.experts.gate_up_proj,
        block.mlp.experts.down_proj,
    )
    assert [str(layer.scheme) for layer in (*layers, model.lm_head)] == [
        "w4g32-a8",
        "w4g32",
        "w4g32-a8",
        "w8c",
        "w8cs-a8s",
    ]
    model.save_pretrained(tmp_path / "quantized")
    found = models.output(model, arguments)
    for again in (load("mixtral", tmp_path / "quantized"), qkernels.load(tmp_path / "quantized")):
        assert torch.equal(models.output(again, arguments), found)


def test_experts_and_embeddings_of_a_folder_that_cannot_be(tmp_path: pathlib.Path) -> None:
    folder = saved("mixtral", tmp_path / "float")
    load("mixtral", folder, quantization_config=QKernelsConfig("w8a8", embeddings="w8cs")).save_pretrained(
        tmp_path / "q"
    )
    path = tmp_path / "q" / "config.json"
    content = path.read_text()
    for name, scheme, message in (
        ("model.layers.1.mlp.experts.down_proj", "w8cs-a8ts", "experts cannot have static activations"),
        ("model.embed_tokens", "w8cs-a8s", "an embedding has no activations to quantize"),
    ):
        config = json.loads(content)
        config["quantization_config"]["weights"][f"{name}.weight"]["scheme"] = scheme
        path.write_text(json.dumps(config))
        with pytest.raises(FormatError, match=rf"{name}\.weight is {scheme}, but {message}"):
            load("mixtral", tmp_path / "q")
    batches = [models.inputs("mixtral")["input_ids"]]
    config = QKernelsConfig("w8cs-a8ts", calibration=batches)
    model = load("mixtral", folder, quantization_config=config)
    assert str(model.model.layers[1].mlp.experts.down_proj.scheme) == "w8cs-a8s"  # few batches reach every expert
    assert str(model.model.layers[1].self_attn.q_proj.scheme) == "w8cs-a8ts"


def test_static_ranges_that_a_folder_lacks_or_that_are_none(tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file, save_file

    make_static("llama", "w8cs-a8ts").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight_activation"
    tensors = load_file(file)
    for bad, message in (
        (None, r"layers\.1\.mlp\.up_proj.*weight_activation"),
        (torch.tensor([float("nan"), 0.0]), r"layers\.1\.mlp\.up_proj.*got nan"),
        (torch.tensor([1.0, 3.0]), r"layers\.1\.mlp\.up_proj.*zero from 0 to 0, got 1 and 3"),
        (torch.ones(3), r"layers\.1\.mlp\.up_proj.*\(3,\)"),
    ):
        save_file({n: t for n, t in {**tensors, name: bad}.items() if t is not None}, file, {"format": "pt"})
        with pytest.raises(FormatError, match=message):
            qkernels.load(tmp_path)


# ---- merged, compiled, generating ----


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8", "w8cs-a8ts"])
def test_merged_models(scheme: str, tmp_path: pathlib.Path) -> None:
    arguments = models.inputs("llama")
    if Scheme.parse(scheme).is_static:
        apart, merged = make_static("llama", scheme), make_static("llama", scheme)
        done = qkernels.merge_siblings(merged)
    else:
        apart, merged = models.make("llama"), models.make("llama")
        qkernels.quantize_model(apart, scheme, method="rtn", progress=False)
        done = qkernels.quantize_model(merged, scheme, method="rtn", merge=True, progress=False).merged  # type: ignore[assignment]
    assert done is not None
    assert len(done.groups) == 4
    wanted = models.output(apart, arguments)
    assert torch.equal(models.output(merged, arguments), wanted)
    merged.save_pretrained(tmp_path / "merged")
    apart.save_pretrained(tmp_path / "apart")
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("apart", "merged")]
    assert files[0] == files[1]
    again, info = models.model_class("llama").from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(models.output(again.eval(), arguments), wanted)


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8t"])
def test_compiled_with_dynamic_shapes(scheme: str) -> None:
    if Scheme.parse(scheme).is_static:
        model = make_static("llama-tied", scheme)
    else:
        model = models.make("llama-tied")
        qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    torch._dynamo.reset()
    exact = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(5)
    for batch, tokens in ((2, 7), (3, 5), (2, 12)):
        ids = {"input_ids": torch.randint(3, 99, (batch, tokens), generator=generator)}
        wanted = models.output(model, ids)
        assert error(models.output(exact, ids), wanted) < 1e-2
        assert error(models.output(compiled, ids), wanted) < 1e-2


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8cs-a8ts"])
def test_generating(name: str, scheme: str) -> None:
    model = make_static(name, scheme) if Scheme.parse(scheme).is_static else models.make(name)
    if not Scheme.parse(scheme).is_static:
        qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    twin, arguments = twin_of(model, models.make(name)), models.inputs(name)
    for cache in ("dynamic", "static") if name != "gpt2" else ("dynamic",):
        options: dict[str, Any] = {
            "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0,
            "disable_compile": True,
        }  # fmt: skip
        assert torch.equal(model.generate(**arguments, **options), twin.generate(**arguments, **options))
