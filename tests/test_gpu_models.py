"""Whole models on a GPU: loaded there, quantized there, captured in graphs; against the same on a CPU."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qkernels
from qkernels import QKernelsConfig, QuantEmbedding, QuantExperts, QuantLinear
from qkernels.demo import fetch
from tests import models
from tests.helpers import quantized
from tests.test_a8_models import make_static

pytestmark = pytest.mark.gpu


def _quantized(name: str, dtype: torch.dtype = torch.float16) -> Any:
    model = models.make(name, dtype)
    qkernels.quantize_model(model, "w4g32", method="rtn", embeddings="w8g32", progress=False)
    return model.cuda()


def test_embeddings_give_the_oracles_bits() -> None:
    q = qkernels.quantize(torch.randn(50, 80), "w3g16f")
    ids = torch.randint(0, 50, (3, 9))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = QuantEmbedding(q.to("cuda"), dtype)(ids.cuda())
        assert torch.equal(found.cpu(), q.dequantize(dtype)[ids])


def test_experts_are_exact_where_products_are() -> None:
    code = torch.randint(0, 16, (4 * 48, 128), dtype=torch.uint8)
    scheme = qkernels.Scheme.parse("w4g32")
    scale, zero = torch.full((4, 192), 0.25).half(), torch.full((4, 192), 7, dtype=torch.uint8)
    q = qkernels.QTensor(qkernels.packing.pack(code, 4), scale, zero, scheme, 128)
    x, expert = torch.randint(-1, 2, (37, 128)).half(), torch.randint(0, 6, (37,))
    wanted = QuantExperts(q, 4)(x, expert)
    assert torch.equal(QuantExperts(q.to("cuda"), 4)(x.cuda(), expert.cuda()).cpu(), wanted)


def test_quantizing_while_loading_gives_the_codes_of_a_cpu(tmp_path: pathlib.Path) -> None:
    models.make("llama-tied").save_pretrained(tmp_path)
    kind = models.model_class("llama-tied")
    config = {"scheme": "w4g32", "embeddings": "w8g32", "method": "rtn"}
    found = kind.from_pretrained(tmp_path, quantization_config=QKernelsConfig(**config), device_map="cuda")
    wanted = kind.from_pretrained(tmp_path, quantization_config=QKernelsConfig(**config))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), tensor), name
    assert all(isinstance(m, (QuantLinear, QuantEmbedding)) for m in (found.lm_head, found.model.embed_tokens))


def _decode(model: Any, cache: Any, tokens: Tensor, position: Tensor) -> Tensor:
    return model(input_ids=tokens, past_key_values=cache, position_ids=position[None]).logits


@torch.no_grad()
def test_a_decode_step_in_a_cuda_graph() -> None:
    """Captured once with a static cache, then replayed for token after token."""
    from transformers import StaticCache

    model = _quantized("llama-tied").eval()
    prompt = models.inputs("llama-tied")["input_ids"][:1].cuda()
    wanted = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    cache = StaticCache(config=model.config, max_cache_len=40)
    start = prompt.shape[1]
    token = _decode(model, cache, prompt, torch.arange(start, device="cuda"))[:, -1:].argmax(-1)
    found = [token.clone()]
    position = torch.tensor([start], device="cuda")
    saved = copy.deepcopy(cache)
    _decode(model, saved, token, position)  # kernels are loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        following = _decode(model, cache, token, position).argmax(-1)
    for _ in range(9):
        graph.replay()
        token.copy_(following)
        position += 1
        found.append(token.clone())
    answer = wanted[:, start:]  # shorter where it came to an end
    assert torch.equal(torch.cat(found, dim=1)[:, : answer.shape[1]], answer)


@torch.no_grad()
def test_reduce_overhead() -> None:
    model = _quantized("llama-tied").eval()
    prompt = models.inputs("llama-tied")["input_ids"].cuda()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **options)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits, atol=2e-2, rtol=2e-2)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), wanted)


@torch.no_grad()
def test_a_gguf_file_loads_onto_the_gpu_and_answers() -> None:
    model = qkernels.load(fetch.fetch(fetch.SMOLLM2), device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    tokens = torch.tensor([[504, 3575, 282, 4649, 314]], device="cuda")  # "The capital of France is"
    twin = qkernels.load(fetch.fetch(fetch.SMOLLM2), dtype=torch.float32)
    found, wanted = model(tokens).logits.cpu().float(), twin(tokens.cpu()).logits
    assert found[0, -1].argmax() == wanted[0, -1].argmax()


# ---- quantized activations ----


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8", "w8cs-a8ts", "w4g32-a8t"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_layers_of_codes_give_what_a_cpu_gives(scheme: str, dtype: torch.dtype) -> None:
    """By token counts that take other launches, codes given by hand, and siblings in one launch."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 256, generator=generator).to(dtype)
    weights = [quantized(torch.randn(n, 256, generator=generator), scheme, inputs) for n in (192, 64, 64)]
    parent = nn.ModuleDict(dict(zip(("q_proj", "k_proj", "v_proj"), map(QuantLinear, weights), strict=True))).eval()
    there = copy.deepcopy(parent).cuda()
    merged = copy.deepcopy(parent).cuda()
    assert len(qkernels.merge_siblings(nn.ModuleDict({"block": merged})).groups) == 1
    close = {"atol": 2e-2 if dtype is torch.float16 else 0.15, "rtol": 1e-2}
    for tokens in (1, 5, 16, 33, 300):
        x = inputs[:tokens]
        for name, layer in parent.items():
            found = there[name](x.cuda())
            torch.testing.assert_close(found.cpu(), layer(x), **close)
            if "g" not in scheme:  # one scale for a row: every operation is the oracle's
                assert torch.equal(found.cpu(), layer(x))
            codes = qkernels.quantize_activations(x.cuda(), scheme, activation=there[name].weight_activation)
            assert torch.equal(there[name](codes), found)
            torch.testing.assert_close(merged[name](x.cuda()), found, **close)
    moved = there["q_proj"].qweight.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors, weights[0].tensors, strict=True))


@torch.no_grad()
def test_experts_of_codes_give_what_a_cpu_gives() -> None:
    q = qkernels.quantize(torch.randn(4 * 48, 128), "w8a8")
    x, expert = torch.randn(37, 128).half(), torch.randint(0, 6, (37,))
    wanted = QuantExperts(q, 4)(x, expert)
    assert torch.equal(QuantExperts(q.to("cuda"), 4)(x.cuda(), expert.cuda()).cpu(), wanted)


@pytest.mark.parametrize("scheme", ["w8a8", "w8cs-a8ts"])
@torch.no_grad()
def test_models_of_codes_load_onto_the_gpu(scheme: str, tmp_path: pathlib.Path) -> None:
    model, arguments = models.make("llama-tied"), models.inputs("llama-tied")
    if scheme == "w8a8":
        qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    else:
        model = make_static("llama-tied", scheme)
    model.save_pretrained(tmp_path)
    there = models.model_class("llama-tied").from_pretrained(tmp_path, device_map="cuda").eval()
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    found = there(**{n: t.cuda() for n, t in arguments.items()}).logits.cpu()
    wanted = models.output(model, arguments)
    # a last bit of a sum that differs may turn a code of a later layer into the one beside it
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    there.save_pretrained(tmp_path / "again")
    stored = [load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(stored[1][n], t) for n, t in stored[0].items())


@pytest.mark.parametrize("scheme", ["w8a8", "w8cs-a8ts"])
@torch.no_grad()
def test_codes_in_reduce_overhead_and_graphs(scheme: str) -> None:
    model = make_static("llama-tied", scheme) if scheme != "w8a8" else models.make("llama-tied")
    if scheme == "w8a8":
        qkernels.quantize_model(model, scheme, method="rtn", progress=False)
    model = model.cuda().eval()
    prompt = models.inputs("llama-tied")["input_ids"].cuda()
    wanted = model(prompt).logits
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(prompt).logits
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 64, device="cuda")
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    static_x = torch.zeros_like(x)
    layer(static_x)  # kernels are loaded before the capture
    with torch.cuda.graph(graph):
        y = layer(static_x)
    static_x.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)
