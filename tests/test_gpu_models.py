"""Whole models on a GPU: loaded there, quantized there, captured in graphs; against the same on a CPU."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import QKernelsConfig, QuantEmbedding, QuantExperts, QuantLinear
from qkernels.demo import fetch
from tests import models

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
