"""Models of Llama's shape with random weights, a decode step of theirs, and the pass over a prompt.

Weights are made where they are needed: the codes of a quantized model directly, so that it never takes more memory than
it ends up with. What a step computes is what transformers' model computes; what is left out are masks, since the cache
is full: a step writes the last slot of a StaticCache and attends to all of it; a prompt fills it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.products import Work, quantized
from qkernels import QTensor, QuantLinear, Scheme, merge_siblings, packing
from qkernels.replace import places, put
from qkernels.selection import DEFAULT_SKIP
from qkernels.tuning import timing

# The fields of LlamaConfig.
SIZES: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500,
    },
}  # fmt: skip
_STD = 0.02  # of random weights: what such models start from
_ATTENTION = "qkernels_full_cache"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model's Linears are stored and multiplied; lm_head stays as it is.

    Attributes:
        scheme: None for dense weights.
        merged: whether siblings are multiplied in one launch.
    """

    scheme: str | None
    merged: bool = False

    @property
    def name(self) -> str:
        """Such as "w4g128 merged"."""
        return (self.scheme or "dense") + (" merged" if self.merged else "")


def build(
    size: str, variant: Variant, device: torch.device | str, dtype: torch.dtype, context: int, seed: int = 0
) -> Any:
    """A LlamaForCausalLM with random weights; those of one size, scheme and seed are the same, merged or not."""
    import transformers

    _register_attention()
    config = transformers.LlamaConfig(
        **SIZES[size],
        max_position_embeddings=max(context, 8192),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation=_ATTENTION,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    if variant.scheme is not None:
        for linear, where in places(model).items():
            if isinstance(linear, nn.Linear) and where[0][1] not in DEFAULT_SKIP:
                put(
                    QuantLinear(random_weight(linear.out_features, linear.in_features, variant.scheme, generator)),
                    where,
                )
        if variant.merged:
            merge_siblings(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=dtype, device=device)
                made = made.fill_(1.0) if made.ndim == 1 else made.normal_(0, _STD, generator=generator)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"{left[0]} and {len(left) - 1} others were not given values")
    return model


def random_weight(N: int, K: int, scheme: str, generator: torch.Generator) -> QTensor:
    """Codes, scales and zeros (N, K), on the generator's device, that stand for weights of about the usual size."""
    parsed, device = Scheme.parse(scheme), generator.device
    make = functools.partial(torch.randint, generator=generator, device=device, dtype=torch.uint8)
    packed = packing.pack(make(parsed.code_min, parsed.code_max + 1, (N, K)), parsed.bits)
    shape = parsed.scale_shape(N, K)
    spread = torch.rand(shape, generator=generator, device=device) + 0.5
    scale = (spread * (_STD * math.sqrt(12) / 2**parsed.bits)).to(parsed.scale_dtype)
    zero = None
    if parsed.value_map == "affine":
        zero = make(max(0, parsed.center - 1), min(parsed.code_max, parsed.center + 1) + 1, shape)
    elif parsed.value_map == "offset":
        zero = -scale * parsed.center
    return QTensor(packed, scale, zero, parsed, K)


def dense_twin(model: Any, context: int) -> Any:
    """The same model with Linears that hold the dequantized weights, in its dtype and on its device.

    They round their inputs to what codes stand for, where the model's do.
    """
    size = next(name for name, fields in SIZES.items() if fields["hidden_size"] == model.config.hidden_size)
    embedding = model.model.embed_tokens.weight
    twin = build(size, Variant(None), embedding.device, embedding.dtype, context)
    plain = {n: t for n, t in model.state_dict().items() if n in twin.state_dict() and t.is_floating_point()}
    twin.load_state_dict(plain, strict=False)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            linear = twin.get_submodule(name)
            linear.weight.copy_(layer.qweight.dequantize(embedding.dtype))
            linear.register_forward_pre_hook(functools.partial(_round_inputs, scheme=layer.scheme))
    return twin


def _round_inputs(module: nn.Module, inputs: tuple[Tensor], scheme: Scheme) -> tuple[Tensor]:
    (x,) = inputs
    return (quantized(x.flatten(0, -2), scheme).view(x.shape).to(x.dtype),)


class Loop:
    """What runs a model again and again over a cache.

    Args:
        model: of `build`.
        context: slots of the cache.
        batch: sequences.
        length: of their prompts.
        seed: of the prompts.
    """

    def __init__(self, model: Any, context: int, batch: int, length: int, seed: int):
        import transformers

        self.model, self.batch, self.length = model, batch, length
        self.device = model.model.embed_tokens.weight.device
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=context)
        generator = torch.Generator(self.device).manual_seed(seed)
        self.prompt = torch.randint(
            model.config.vocab_size, (batch, length), generator=generator, device=self.device
        )  # fmt: skip
        self._positions = torch.arange(length, device=self.device)[None]

    @torch.no_grad()
    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.model(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def _go_to(self, position: int) -> None:
        """Have the next tokens take the slots from a position on."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(position)  # on the device: part of a captured graph

    def step(self) -> Tensor:
        """Logits (batch, vocabulary) after the last token."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """That a step takes in, of all sequences."""
        raise NotImplementedError

    @property
    def work(self) -> Work:
        """What a step has to do at least."""
        raise NotImplementedError

    def runner(self) -> Callable[[], object]:
        """What makes one step: the replay of a CUDA graph, or the step itself on a CPU."""
        if self.device.type != "cuda":
            return self.step
        timing.warm_up([self.step] * 3)
        graph = timing.capture([self.step])
        graph.replay()  # the first replay uploads it
        return graph.replay

    @property
    def weight_bytes(self) -> int:
        """Of all weights that a step reads: everything but the rows of the embedding that are not looked up."""
        embedding = self.model.model.embed_tokens.weight
        rows = self.tokens * embedding.shape[1] * embedding.element_size()
        return sum(p.nbytes for p in self.model.parameters()) - embedding.nbytes + rows

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of all slots."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Decoder(Loop):
    """Prompts that fill all but the last slot of a cache, and the step that fills it, again and again; see Loop."""

    phase = "decoding"

    def __init__(self, model: Any, context: int, batch: int, seed: int = 0):
        super().__init__(model, context, batch, context - 1, seed)
        logits = self._run(self.prompt, self._positions)
        self._last = torch.full((1, 1), self.length, device=self.device)
        self.token = logits.argmax(-1, keepdim=True)

    def step(self) -> Tensor:
        """Logits (batch, vocabulary) for the token in the last slot; the likeliest next one takes its place."""
        self._go_to(self.length)
        logits = self._run(self.token, self._last)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    @property
    def tokens(self) -> int:
        """One of each sequence."""
        return self.batch

    @property
    def work(self) -> Work:
        """To read all weights and the whole cache: beside it, arithmetic is nothing."""
        return Work(self.weight_bytes + self.cache_bytes, 0)


class Prefill(Loop):
    """Prompts that fill a cache, in one pass, again and again; see Loop."""

    phase = "prefill"

    def __init__(self, model: Any, context: int, batch: int, seed: int = 0):
        super().__init__(model, context, batch, context, seed)
        self._run(self.prompt, self._positions)

    def step(self) -> Tensor:
        """Logits (batch, vocabulary) after each prompt."""
        self._go_to(0)
        return self._run(self.prompt, self._positions)

    @property
    def tokens(self) -> int:
        """All of all sequences."""
        return self.batch * self.length

    @property
    def work(self) -> Work:
        """To read all weights, write the cache, and multiply: in Linears, by lm_head once, in half of all attention."""
        dense = int8 = 0
        for layer in self.model.model.modules():
            if isinstance(layer, (nn.Linear, QuantLinear)):
                operations = 2 * self.tokens * layer.in_features * layer.out_features
                coded = isinstance(layer, QuantLinear) and layer.scheme.activations is not None
                dense, int8 = dense + operations * (not coded), int8 + operations * coded
        config = self.model.config
        dense += 2 * self.batch * config.hidden_size * config.vocab_size
        dense += config.num_hidden_layers * 2 * self.batch * self.length**2 * config.hidden_size
        return Work(self.weight_bytes + self.cache_bytes, dense, int8)


Phase = Decoder | Prefill


def _full_cache_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention where a prompt starts an empty cache, or a token takes its last slot: so no mask is needed."""
    length = query.shape[2]
    if length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
    y = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=length > 1, scale=options.get("scaling"), enable_gqa=True
    )
    return y.transpose(1, 2).contiguous(), None


def _register_attention() -> None:
    import transformers

    transformers.AttentionInterface.register(_ATTENTION, _full_cache_attention)
