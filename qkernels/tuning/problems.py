"""THE named list of shapes: what benchmarks, tuning and tests run. Data only.

A layer is a linear layer as inference runs it: q, k and v merged, gate and up merged. Embeddings and lm_head are left
out, as quantize_model leaves them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """One shape of weight, (N, K) = (out_features, in_features).

    Attributes:
        name: what the layer does in its model.
        N: output features.
        K: input features.
        count: how many of them a token passes through in the whole model; of experts, those that it is sent to.
    """

    name: str
    N: int
    K: int
    count: int = 1

    @property
    def weights(self) -> int:
        """N * K."""
        return self.N * self.K


def _dense(layers: int, hidden: int, qkv: int, feed_forward: int) -> tuple[Layer, ...]:
    return (
        Layer("qkv", qkv, hidden, layers),
        Layer("o", hidden, hidden, layers),
        Layer("gate_up", 2 * feed_forward, hidden, layers),
        Layer("down", hidden, feed_forward, layers),
    )


# name -> layers
MODELS: dict[str, tuple[Layer, ...]] = {
    "Llama-3-8B": _dense(32, hidden=4096, qkv=6144, feed_forward=14336),
    "Llama-3-70B": _dense(80, hidden=8192, qkv=10240, feed_forward=28672),
    "Qwen2.5-7B": _dense(28, hidden=3584, qkv=4608, feed_forward=18944),
    "Qwen2.5-32B": _dense(64, hidden=5120, qkv=7168, feed_forward=27648),
    # Odd shapes: K that is no whole number of 1024, N that is no whole number of 128. The first of 27 layers is dense,
    # the others send a token to 6 experts and to a shared one of twice their size.
    "DeepSeek-V2-Lite": (
        Layer("kv_a", 576, 2048, 27),
        Layer("q", 3072, 2048, 27),
        Layer("kv_b", 4096, 512, 27),
        Layer("o", 2048, 2048, 27),
        Layer("dense_gate_up", 21888, 2048, 1),
        Layer("dense_down", 2048, 10944, 1),
        Layer("shared_gate_up", 5632, 2048, 26),
        Layer("shared_down", 2048, 2816, 26),
        Layer("expert_gate_up", 2816, 2048, 26 * 6),
        Layer("expert_down", 2048, 1408, 26 * 6),
    ),
    "squares": tuple(Layer(f"{size}x{size}", size, size) for size in (4096, 8192, 12288, 16384)),
}

# M: decoding a few sequences, then many, then prompts.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
