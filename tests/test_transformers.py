"""from_pretrained and save_pretrained of transformers, against models that quantize_model or the oracle quantized."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import qkernels
from qkernels import FormatError, QuantEmbedding, QuantExperts, QuantLinear
from qkernels.integrations.transformers import QKernelsConfig
from tests import models
from tests.test_architectures import dequantized

LANGUAGE = [name for name in models.MODELS if name not in ("bert", "vit", "whisper")]


def saved(name: str, folder: pathlib.Path, dtype: torch.dtype = torch.float32, **options: Any) -> pathlib.Path:
    models.make(name, dtype).save_pretrained(folder, **options)
    return folder


def load(name: str, folder: pathlib.Path, **options: Any) -> Any:
    return models.model_class(name).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", models.MODELS)
def test_quantized_while_loading_saved_and_loaded(name: str, tmp_path: pathlib.Path) -> None:
    folder, arguments = saved(name, tmp_path / "float"), models.inputs(name)
    model = load(name, folder, quantization_config=QKernelsConfig("w4g32"))
    wanted = models.make(name)
    qkernels.quantize_model(wanted, "w4g32", method="rtn", progress=False)
    found = models.output(model, arguments)
    assert torch.equal(found, models.output(wanted, arguments))
    twin = dequantized(model, models.make(name))
    torch.testing.assert_close(found, models.output(twin, arguments), atol=2e-3, rtol=2e-3)
    assert {n: type(m).__name__ for n, m in model.named_modules()} == {
        n: type(m).__name__ for n, m in wanted.named_modules()
    }
    assert all(not p.requires_grad for n, p in model.named_parameters() if n.endswith(("_scale", "_zero")))

    model.save_pretrained(tmp_path / "quantized")
    again = load(name, tmp_path / "quantized")
    assert torch.equal(models.output(again, arguments), found)
    again.save_pretrained(tmp_path / "again")
    files = [{p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("quantized", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2", "gemma2", "whisper"])
def test_load_reads_what_save_pretrained_wrote(name: str, tmp_path: pathlib.Path) -> None:
    """Embeddings that an output layer is tied to are stored once, and names in files are those of config.json."""
    folder, arguments = saved(name, tmp_path / "float"), models.inputs(name)
    model = load(name, folder, quantization_config=QKernelsConfig("w4g32", embeddings="w8g32"))
    wanted = models.output(model, arguments)
    model.save_pretrained(tmp_path / "quantized")
    sources = [qkernels.load(tmp_path / "quantized", models.make(name)), load(name, tmp_path / "quantized")]
    if name != "whisper":  # no language model
        sources.append(qkernels.load(tmp_path / "quantized"))
    for again in sources:
        assert torch.equal(models.output(again, arguments), wanted)
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == (name in ("llama-tied", "gpt2", "gemma2"))  # whisper's is not called lm_head


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_what_quantize_model_quantized_is_saved_by_save_pretrained(name: str, tmp_path: pathlib.Path) -> None:
    model, arguments = models.make(name), models.inputs(name)
    qkernels.quantize_model(model, "w4g32", method="rtn", embeddings="w8g32", progress=False)
    found = models.output(model, arguments)
    model.save_pretrained(tmp_path / "quantized")
    qkernels.load(tmp_path / "quantized", models.make(name)).save_pretrained(tmp_path / "again")
    for folder in ("quantized", "again"):
        assert torch.equal(models.output(load(name, tmp_path / folder), arguments), found)
        assert torch.equal(models.output(qkernels.load(tmp_path / folder), arguments), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w4g32", "w8cs-bf16", "w3g16f-fp32"])
def test_scales_keep_their_dtype_in_models_of_another(scheme: str, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama", tmp_path / "float", dtype), models.inputs("llama")
    config = QKernelsConfig(scheme, embeddings="w8g32-fp32", method="rtn")
    model = load("llama", folder, dtype=dtype, quantization_config=config)
    wanted = load("llama", folder, dtype=dtype)
    qkernels.quantize_model(wanted, scheme, method="rtn", embeddings="w8g32-fp32", progress=False)
    assert torch.equal(models.output(model, arguments), models.output(wanted, arguments))
    model.save_pretrained(tmp_path / "quantized")
    again = load("llama", tmp_path / "quantized", dtype=dtype)
    assert torch.equal(models.output(again, arguments), models.output(wanted, arguments))
    layer = again.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype is qkernels.Scheme.parse(scheme).scale_dtype
    assert again.model.embed_tokens(torch.tensor([1])).dtype is dtype


def test_patterns_and_tied_embeddings(tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama-tied", tmp_path / "float"), models.inputs("llama-tied")
    choices: dict[str, Any] = {
        "schemes": {"*.down_proj": "w8c", "*.0.*.q_proj": None}, "skip": ["*.k_proj", "lm_head"], "embeddings": "w8g64",
    }  # fmt: skip
    model = load("llama-tied", folder, quantization_config=QKernelsConfig("w4g32", **choices))
    wanted = models.make("llama-tied")
    qkernels.quantize_model(wanted, "w4g32", method="rtn", progress=False, **choices)
    assert torch.equal(models.output(model, arguments), models.output(wanted, arguments))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantLinear)
    model.save_pretrained(tmp_path / "quantized")
    again = load("llama-tied", tmp_path / "quantized")
    assert again.dtype is torch.float32
    assert torch.equal(models.output(again, arguments), models.output(wanted, arguments))
    for m in (model, again):
        assert isinstance(m.model.embed_tokens, QuantEmbedding)
        for part in ("weight", "weight_scale", "weight_zero"):
            assert getattr(m.lm_head, part) is getattr(m.model.embed_tokens, part)
    assert torch.equal(models.output(qkernels.load(tmp_path / "quantized"), arguments), models.output(model, arguments))
    stored = sum(p.stat().st_size for p in (tmp_path / "quantized").glob("*.safetensors"))
    assert stored < 0.45 * sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_an_output_layer_with_codes_of_its_own_beside_the_embedding_that_it_was_tied_to(tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama-tied", tmp_path / "float"), models.inputs("llama-tied")
    model = load("llama-tied", folder, quantization_config=QKernelsConfig("w4g32", schemes={"lm_head": "w8c"}))
    assert isinstance(model.lm_head, QuantLinear)
    assert type(model.model.embed_tokens) is nn.Embedding
    wanted = models.make("llama-tied")
    qkernels.quantize_model(wanted, "w4g32", method="rtn", schemes={"lm_head": "w8c"}, progress=False)
    model.save_pretrained(tmp_path / "quantized")
    for m in (model, load("llama-tied", tmp_path / "quantized")):
        assert torch.equal(models.output(m, arguments), models.output(wanted, arguments))


def test_an_output_layer_and_its_embedding_with_different_codes(tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama-tied", tmp_path / "float"), models.inputs("llama-tied")
    config = QKernelsConfig("w4g32", schemes={"lm_head": "w8cs"}, embeddings="w8g32")
    model = load("llama-tied", folder, quantization_config=config)
    found = models.output(model, arguments)
    model.save_pretrained(tmp_path / "quantized")
    for again in (load("llama-tied", tmp_path / "quantized"), qkernels.load(tmp_path / "quantized")):
        assert [str(layer.scheme) for layer in (again.lm_head, again.model.embed_tokens)] == ["w8cs", "w8g32"]
        assert torch.equal(models.output(again, arguments), found)


def test_calibration_and_options_reach_quantize_model(tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama", tmp_path / "float"), models.inputs("llama")
    batches = [torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(5))]
    choices: dict[str, Any] = {"method": "gptq", "calibration": batches}
    model = load("llama", folder, quantization_config=QKernelsConfig("w3g32", options={"merge": True}, **choices))
    wanted = models.make("llama")
    qkernels.quantize_model(wanted, "w3g32", progress=False, merge=True, **choices)
    assert torch.equal(models.output(model, arguments), models.output(wanted, arguments))
    assert any(isinstance(m, qkernels.MergedLinear) for m in model.modules())
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(
        models.output(load("llama", tmp_path / "quantized"), arguments), models.output(wanted, arguments)
    )


def test_one_config_serves_several_models(tmp_path: pathlib.Path) -> None:
    config = QKernelsConfig("w4g32")
    for name in ("llama", "qwen2"):
        model = load(name, saved(name, tmp_path / name), quantization_config=config)
        wanted = models.make(name)
        qkernels.quantize_model(wanted, "w4g32", method="rtn", progress=False)
        assert torch.equal(models.output(model, models.inputs(name)), models.output(wanted, models.inputs(name)))
    assert config.weights is None


def test_sharded_files_and_a_device_map(tmp_path: pathlib.Path) -> None:
    folder, arguments = saved("llama", tmp_path / "float", max_shard_size="40KB"), models.inputs("llama")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load("llama", folder, quantization_config=QKernelsConfig("w4g32"), device_map="cpu")
    found = models.output(model, arguments)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 2
    for device_map in (None, "auto", {"": "cpu"}):
        again = load("llama", tmp_path / "quantized", device_map=device_map)
        assert torch.equal(models.output(again, arguments), found)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma2"])
def test_generating(name: str, tmp_path: pathlib.Path) -> None:
    folder, arguments = saved(name, tmp_path / "float"), models.inputs(name)
    model = load(name, folder, quantization_config=QKernelsConfig("w8g32", embeddings="w8g32"))
    twin = dequantized(model, models.make(name))
    caches = ("dynamic", "static") if name != "gpt2" else ("dynamic",)
    for cache in caches:
        options: dict[str, Any] = {
            "max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0,
            "disable_compile": True,
        }  # fmt: skip
        assert torch.equal(model.generate(**arguments, **options), twin.generate(**arguments, **options))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_compiled_whole(name: str, tmp_path: pathlib.Path) -> None:
    folder, arguments = saved(name, tmp_path / "float"), models.inputs(name)
    model = load(name, folder, quantization_config=QKernelsConfig("w4g32"))
    wanted = models.output(model, arguments)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(models.output(compiled, arguments), wanted)


def test_converting_a_quantized_model_is_refused_as_transformers_does(tmp_path: pathlib.Path) -> None:
    model = load("llama", saved("llama", tmp_path), quantization_config=QKernelsConfig("w4g32"))
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()


def test_a_base_model_and_a_model_with_a_head_read_each_other(tmp_path: pathlib.Path) -> None:
    from transformers import AutoModel, LlamaModel

    folder, arguments = saved("llama", tmp_path / "float"), models.inputs("llama")
    model = load("llama", folder, quantization_config=QKernelsConfig("w4g32"))
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head").eval()
    assert isinstance(base, LlamaModel)
    assert torch.equal(models.output(base, arguments), models.output(model.model, arguments))
    base.save_pretrained(tmp_path / "base")
    head = load("llama", tmp_path / "base")  # but for lm_head, which is new
    assert torch.equal(models.output(head.model, arguments), models.output(model.model, arguments))


def test_bad_weights_and_arguments_are_named(tmp_path: pathlib.Path) -> None:
    model = models.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "float")
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.1\.mlp\.up_proj"):
        load("llama", tmp_path / "float", quantization_config=QKernelsConfig("w4g32"))
    for arguments, message in (
        ({}, "needs a scheme"),
        ({"scheme": "w4g32", "weights": {}}, "needs a scheme"),
        ({"scheme": "w9"}, "'w9' is not a scheme"),
        ({"scheme": "w4g32", "method": "awq"}, "method must be one of"),
        ({"scheme": "w4g32", "method": "gptq"}, "needs calibration"),
        ({"scheme": "w4g32", "bits": 4}, "no argument 'bits'"),
        ({"scheme": "w4g32", "options": {"distill": 2}}, r"options \(distill\) need calibration"),
        ({"weights": [1]}, "must be an object"),
        ({"weights": {}, "version": "2"}, "version must be '1', got '2'"),
        ({"weights": {"a": {"scheme": "w4g32"}}}, "a: metadata must hold 'scheme' and 'shape'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            QKernelsConfig(**arguments)


def test_a_config_that_does_not_fit_the_model_is_named(tmp_path: pathlib.Path) -> None:
    folder = saved("llama", tmp_path / "float")
    load("llama", folder, quantization_config=QKernelsConfig("w4g32")).save_pretrained(tmp_path / "quantized")
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weights"]["model.layers.0.mlp.up_proj.weight"]["shape"] = [64, 96]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"up_proj\.weight is \(64, 96\), the model's \(96, 64\)"):
        load("llama", tmp_path / "quantized")


def test_experts_are_stored_as_the_model_has_them(tmp_path: pathlib.Path) -> None:
    folder = saved("mixtral", tmp_path / "float")
    model = load("mixtral", folder, quantization_config=QKernelsConfig("w4g32"))
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QuantExperts)
    model.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    names = config["quantization_config"]["weights"]
    assert names["model.layers.0.mlp.experts.gate_up_proj.weight"] == {"scheme": "w4g32", "shape": [4 * 192, 64]}
    assert "_experts_implementation" not in json.dumps(config)


def test_a_loaded_model_is_where_its_weights_are(tmp_path: pathlib.Path) -> None:
    """Nothing of a QuantEmbedding stays on the meta device: model.device is where users put their inputs."""
    folder = saved("llama-tied", tmp_path / "float")
    model = load("llama-tied", folder, quantization_config=QKernelsConfig("w4g32", embeddings="w8g32"))
    model.save_pretrained(tmp_path / "quantized")
    found, arguments = models.output(model, models.inputs("llama-tied")), models.inputs("llama-tied")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    offloaded = {"device_map": {**devices, "model.rotary_emb": "cpu", "lm_head": "cpu"}, "offload_folder": tmp_path}
    for options in ({}, {"device_map": "auto"}, offloaded):
        again = load("llama-tied", tmp_path / "quantized", **options)
        assert again.device.type == again.model.embed_tokens.like.device.type == "cpu"
        assert torch.equal(models.output(again, arguments), found)
    with pytest.raises(ValueError, match="what goes to a disk cannot be quantized"):
        load("llama-tied", folder, quantization_config=QKernelsConfig("w4g32"), **offloaded)


def test_a_pickled_model_runs_in_another_process(tmp_path: pathlib.Path) -> None:
    model = models.make("mixtral")
    qkernels.quantize_model(model, "w4g32", method="rtn", progress=False)
    arguments = models.inputs("mixtral")
    torch.save((model, arguments, models.output(model, arguments)), tmp_path / "model.pt")
    code = f"""import torch
model, arguments, found = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    print("same", torch.allclose(model(**arguments).logits, found, atol=1e-4))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "same True" in done.stdout, done.stderr
