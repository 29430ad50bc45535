"""Models of transformers' architectures, of tiny random size."""

from __future__ import annotations

from typing import Any

import torch

_TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# name -> (config class, model class, arguments of the config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, **_SPECIAL}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    ),
    "bert": ("BertConfig", "BertModel", _TEXT),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
            "image_size": 16, "patch_size": 4, "initializer_range": 0.2,
        },
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
            "max_source_positions": 24, "max_target_positions": 24, "init_std": 0.2, "decoder_start_token_id": 1,
            **_SPECIAL,
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "initializer_factor": 2.0, "feed_forward_proj": "gated-gelu",
        },
    ),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, in evaluation mode, the same every time."""
    import transformers

    config, model, arguments = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith("bias"):  # zeros would hide a bias that is lost, or another expert's
            torch.nn.init.normal_(parameter, std=0.1)
    return made.to(dtype).eval()


def model_class(name: str) -> Any:
    import transformers

    return getattr(transformers, MODELS[name][1])


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    tokens = torch.randint(3, 99, (2, 7), generator=generator)
    if name == "whisper":
        features = torch.randn(2, 16, 48, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": tokens}
    return {"input_ids": tokens, "decoder_input_ids": tokens} if name == "t5" else {"input_ids": tokens}


def output(model: Any, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        found = model(**arguments)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
