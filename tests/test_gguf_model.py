"""A transformers model's state from a GGUF file: what transformers itself loads in float32, bit for bit."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import FormatError, QTensor
from qkernels.demo import fetch
from qkernels.integrations.gguf import model_class, model_state, skeleton
from tests.test_gguf import _blocks

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K")
SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "vocab_size": 96,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
SAME_HEADS = {"attention.head_count_kv": 8}
LFM2 = {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}
QWEN35 = {
    "attention.key_length": 32,
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 256,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
}
# name of the test: (architecture, the file's name of the model, further metadata, whether the output layer is tied)
MODELS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("llama", "made up", {"rope.dimension_count": 32}, True),
    "llama, as many keys": ("llama", "made up", {"rope.dimension_count": 32, **SAME_HEADS}, False),
    "qwen2": ("qwen2", "made up", {}, False),
    "qwen3": ("qwen3", "made up", {}, True),
    "gemma2": ("gemma2", "made up", {"attention.key_length": 32, "attention.sliding_window": 32}, True),
    "gemma3": ("gemma3", "made up", {"attention.key_length": 32, "attention.sliding_window": 32}, True),
    "phi3": ("phi3", "made up", {}, False),
    "gpt2": ("gpt2", "made up", {"feed_forward_length": 1024}, True),
    "gpt2, untied": ("gpt2", "made up", {"feed_forward_length": 1024}, False),
    "bloom": ("bloom", "made up", {"feed_forward_length": 1024}, True),
    "falcon": ("falcon", "made up", {"feed_forward_length": 1024, "attention.head_count_kv": 1}, True),
    "stablelm": ("stablelm", "made up", {}, False),
    "starcoder2": ("starcoder2", "made up", {}, True),
    "nemotron": ("nemotron", "made up", {}, False),
    "mamba": (
        "mamba",
        "made up",
        {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 512},
        True,
    ),
    "lfm2": ("lfm2", "made up", LFM2, True),
    "qwen35": ("qwen35", "made up", QWEN35, False),
    "t5": (
        "t5",
        "made up",
        {"attention.key_length": 32, "attention.relative_buckets_count": 32, "decoder_start_token_id": 0, **SAME_HEADS},
        True,
    ),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers and what it imports warn of is not ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        logging.disable_progress_bar()
        yield


def _state(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor | QTensor]]:
    with _quiet():
        return model_state(path, dtype)


def _write(
    path: pathlib.Path, architecture: str, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> pathlib.Path:
    """Tensors are arrays, or pairs of an array of blocks and their type."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    for key, value in metadata.items():
        add: dict[type, Callable[[str, Any], None]] = {
            str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
        }  # fmt: skip
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_token_list([f"<{i}>" for i in range(SIZES["vocab_size"])])
    writer.add_pad_token_id(0)
    for tensor_name, data in tensors.items():
        array, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(tensor_name, array, raw_dtype=None if kind is None else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(folder: pathlib.Path, case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file of this model has."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture, name, metadata, tied = MODELS[case]
    some = {"blk.0.ffn_norm.weight": np.zeros(1, np.float32)}  # from which transformers tells variants
    if not tied:
        some["output.weight"] = some["blk.0.ffn_norm.weight"]
    path = _write(folder / "shapes.gguf", architecture, name, {**SIZES, **metadata}, some)
    config = AutoConfig.from_pretrained(str(folder), gguf_file=path.name)
    path.unlink()
    model = skeleton(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if architecture == "qwen35":
        return _qwen35_shapes(shapes)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    found = {ours: shapes[theirs] for ours, theirs in get_gguf_hf_weights_map(model, processor).items()}
    if architecture == "gpt2":
        transposed = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        found = {name: shape[::-1] if name.endswith(transposed) else shape for name, shape in found.items()}
    if tied:
        found.pop("output.weight", None)
    return {
        name: (shape[0], *shape[2:]) if "conv" in name and len(shape) == 3 else shape for name, shape in found.items()
    }


def _qwen35_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    names = {
        "model.embed_tokens.": "token_embd.", "lm_head.": "output.", "model.norm.": "output_norm.",
        "model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
        "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }  # fmt: skip
    found = {}
    for name, shape in shapes.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = (shape[0], shape[2]) if "conv1d" in name else shape
    return found


def _tensors(shapes: Mapping[str, tuple[int, ...]], kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Random ones; of weights every type, of the first three where K is short, and of the rest float32 and float16."""
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        plain = "conv" in name or "ssm_a" in name or "rel_b" in name or name.startswith("position_embd")
        kind = kinds[i % len(kinds)] if shape[-1] % 256 == 0 else kinds[i % 3]
        if len(shape) == 2 and not plain:
            block, _ = gguf.GGML_QUANT_SIZES[Kind[kind]]
            tensors[name] = (_blocks(kind, shape[0], shape[1] // block, seed=i), kind)
        else:
            values = -generator.random(shape) if "ssm_a" in name else generator.standard_normal(shape)
            tensors[name] = values.astype(np.float32 if i % 2 or plain else np.float16)
    return tensors


def _make(folder: pathlib.Path, case: str) -> pathlib.Path:
    architecture, name, metadata, _ = MODELS[case]
    with _quiet():
        kinds = ("Q8_0", "Q4_K", "Q5_K", "Q6_K") if case == "qwen35" else KINDS  # those that 5.17 reads
        tensors = _tensors(_shapes(folder, case), kinds)
    return _write(folder / "model.gguf", architecture, name, {**SIZES, **metadata}, tensors)


def _theirs(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    with _quiet():
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        seq2seq = config.model_type in ("t5", "umt5")
        kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        return kind.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)


def _same(found: Tensor, wanted: Tensor) -> bool:
    as_bits = (t.detach().contiguous().view(torch.uint8) for t in (found, wanted))
    return found.dtype == wanted.dtype and torch.equal(*as_bits)


def _compare(path: pathlib.Path) -> tuple[Any, dict[str, Tensor | QTensor]]:
    config, state = _state(path)
    model = _theirs(path)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    wanted |= {name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()}
    for name, tensor in state.items():
        values = tensor.dequantize() if isinstance(tensor, QTensor) else tensor
        if isinstance(tensor, QTensor) and type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D":
            values = values.T.contiguous()
        assert _same(values, wanted[name]), name
    tied = set(wanted) - set(state)
    assert tied <= set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    ours, theirs = config.to_dict(), model.config.to_dict()
    for key in ("_name_or_path", "dtype", "quantization_config"):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
    return config, state


def _supported(case: str) -> bool:
    """Older versions of transformers know fewer architectures."""
    import transformers
    from packaging.version import Version

    return case != "qwen35" or Version(transformers.__version__) >= Version("5.17")


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_is_what_transformers_loads(case: str, tmp_path: pathlib.Path) -> None:
    if not _supported(case):
        pytest.skip("this version of transformers does not know it")
    path = _make(tmp_path, case)
    config, state = _compare(path)
    quantized = [name for name, tensor in state.items() if isinstance(tensor, QTensor)]
    held = sum(info.tensor_type.name in KINDS for info in gguf.GGUFReader(path).tensors)
    assert len(quantized) == held > 2 * SIZES["block_count"]
    if hasattr(config, "tie_word_embeddings") and case not in ("bloom", "falcon"):
        assert config.tie_word_embeddings == MODELS[case][3]


def test_plain_tensors_have_the_wanted_dtype(tmp_path: pathlib.Path) -> None:
    for case in ("gemma2", "llama"):
        (tmp_path / case).mkdir()
        path = _make(tmp_path / case, case)
        _, state = _state(path, torch.bfloat16)
        model = _theirs(path, torch.bfloat16)
        plain = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        assert len(plain) > 4
        for name, tensor in plain.items():
            assert _same(tensor, model.get_parameter(name)), name


def test_experts_that_are_not_quantized_are_merged_as_transformers_does(tmp_path: pathlib.Path) -> None:
    """Quantized ones are 3-D, and refused."""
    sizes = {
        **SIZES, "expert_count": 4, "expert_used_count": 2, "attention.key_length": 32,
        "expert_feed_forward_length": 512,
    }  # fmt: skip
    MODELS["experts"] = ("qwen3moe", "made up", sizes, True)
    with _quiet():
        tensors = _tensors(_shapes(tmp_path, "experts"))
    del MODELS["experts"]
    generator = np.random.default_rng(0)
    for block in range(2):
        for what, shape in (("gate", (4, 768, 256)), ("up", (4, 768, 256)), ("down", (4, 256, 768))):
            tensors[f"blk.{block}.ffn_{what}_exps.weight"] = generator.standard_normal(shape).astype(np.float16)
            tensors.pop(f"blk.{block}.ffn_{what}_exps", None)
    path = _write(tmp_path / "model.gguf", "qwen3moe", "made up", sizes, tensors)
    _, state = _compare(path)
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 1536, 256)
    tensors["blk.1.ffn_up_exps.weight"] = (np.stack([_blocks("Q8_0", 768, 8)] * 4), "Q8_0")
    path = _write(tmp_path / "model.gguf", "qwen3moe", "made up", sizes, tensors)
    with pytest.raises(FormatError, match=r"blk.1.ffn_up_exps.weight \(Q8_0\): a quantized tensor must be 2-D"):
        _state(path)


# ---- files that do not hold a model ----


def _llama(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) of a small model."""
    with _quiet():
        return {**SIZES, **MODELS["llama"][2]}, _tensors(_shapes(folder, "llama"))


def test_tensors_that_do_not_fit_are_refused(tmp_path: pathlib.Path) -> None:
    metadata, tensors = _llama(tmp_path)

    def refused(match: str, changed: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> None:
        path = _write(tmp_path / "model.gguf", "llama", "made up", {**metadata, **(sizes or {})}, changed)
        with pytest.raises(FormatError, match=match):
            _state(path)

    without = {name: data for name, data in tensors.items() if name != "blk.1.ffn_up.weight"}
    refused("there is no tensor for model.layers.1.mlp.up_proj.weight", without)
    without = {name: data for name, data in tensors.items() if name != "token_embd.weight"}
    refused("there is no tensor for model.embed_tokens.weight", without)
    other = {"blk.0.ffn_up.weight": (_blocks("Q8_0", 64, 8), "Q8_0")}
    refused(r"model.layers.0.mlp.up_proj.weight must have shape \(512, 256\), got \(64, 256\)", tensors | other)
    other = {"blk.0.ffn_up.weight": np.zeros((512, 128), np.float32)}
    refused(r"model.layers.0.mlp.up_proj.weight must have shape \(512, 256\), got \(512, 128\)", tensors | other)
    other = {"blk.0.ffn_norm.weight": np.zeros(256, np.int32)}
    refused("blk.0.ffn_norm.weight of architecture 'llama': .* must be floating, got torch.int32", tensors | other)
    other = {"blk.0.attn_q.weight": (_blocks("Q8_0", 250, 8), "Q8_0")}
    refused("blk.0.attn_q.weight of architecture 'llama': ValueError: cannot reshape", tensors | other)
    other = {"blk.0.ffn_up.weight": (_blocks("Q8_0", 512, 8), "IQ4_NL")}
    refused(r"blk.0.ffn_up.weight \(IQ4_NL\): this type is not read", tensors | {
        "blk.0.ffn_up.weight": (np.zeros((512, 144), np.uint8), "IQ4_NL")})  # fmt: skip
    refused("num_hidden_layers must be from 0 to 20, .* got 4000000000", tensors, {"block_count": 4_000_000_000})
    refused("num_hidden_layers must be from 0 to 20, .* got 'two'", tensors, {"block_count": "two"})
    refused("transformers makes no model of architecture 'llama'", tensors, {"attention.head_count": 0})
    extra = {"rope_freqs.weight": np.ones(16, np.float32), "blk.7.odd.weight": (_blocks("Q8_0", 3, 1), "Q8_0")}
    path = _write(tmp_path / "model.gguf", "llama", "made up", metadata, tensors | extra)
    assert _state(path)[1].keys() == _compare(path)[1].keys()


def test_the_class_of_a_configuration() -> None:
    with _quiet():
        from transformers import PretrainedConfig, T5Config, ViTConfig

        assert type(skeleton(ViTConfig())).__name__ == "ViTModel"
        assert model_class(T5Config(architectures=["T5EncoderModel"])).__name__ == "T5EncoderModel"
        assert model_class(T5Config()).__name__ == "T5ForConditionalGeneration"
        with pytest.raises(ValueError, match=r"no model of configuration Pre.rainedConfig"):
            model_class(PretrainedConfig())


def test_files_of_no_known_model_are_refused(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    damaged = bytearray(whole.read_bytes())
    damaged[damaged.index(b"llama")] = 128  # no UTF-8
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(FormatError, match=r"general\.architecture: UnicodeDecodeError"):
        _state(tmp_path / "damaged.gguf")
    metadata, tensors = _llama(tmp_path)
    path = _write(tmp_path / "model.gguf", "strange", "made up", metadata, tensors)
    with pytest.raises(FormatError, match="transformers makes no model of architecture 'strange': ValueError"):
        _state(path)
    path.write_bytes(b"GGUF, I am not")
    with pytest.raises(FormatError, match="not a whole GGUF file"):
        _state(path)
    with pytest.raises(FileNotFoundError):
        _state(tmp_path / "nowhere.gguf")
    with pytest.raises(TypeError, match=r"dtype must be float16, bfloat16 or float32, got torch.int8"):
        _state(path, torch.int8)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: w + 1, "values"),
        (lambda w: -w, "signs"),
        (lambda w: w.T, "transposed, and the module is no Conv1D"),
        (lambda w: np.expand_dims(w, 1), "another dimension"),
        (lambda w: w[: len(w) // 2], "half of the rows"),
        (lambda w: w.reshape(2, -1, 2, 128).swapaxes(1, 2).reshape(w.shape), "pieces of rows"),
        (lambda w: np.concatenate([w[:-1], w[:1]]), "a row twice"),
        (lambda w: np.concatenate([w[:, :-1], w[:, :1]], axis=1), "a column twice"),
        (lambda w: np.concatenate([w[:1, ::-1], w[1:]]), "one row turned"),
        (lambda w: np.concatenate([w[::-1, :1], w[:, 1:]], axis=1), "one column turned"),
        (lambda w: w * 2, "scaled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_code_survives_is_refused(
    change: Callable[[Any], Any], what: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, tensors = _llama(tmp_path)
    _process(monkeypatch, change)
    path = _write(tmp_path / "model.gguf", "llama", "made up", metadata, tensors)
    with pytest.raises(FormatError, match=r"blk.0.attn_output.weight of .* does more to it than move whole rows"):
        _state(path)


def _process(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let transformers do this to one square weight."""
    with _quiet():
        from transformers import modeling_gguf_pytorch_utils as theirs

    original = theirs.LlamaTensorProcessor.process

    def process(self: Any, weights: Any, name: str, **others: Any) -> Any:
        if name == "blk.0.attn_output.weight":
            weights = change(weights)
        return original(self, weights, name, **others)

    monkeypatch.setattr(theirs.LlamaTensorProcessor, "process", process)


def test_a_quantized_weight_becomes_one_parameter_and_a_parameter_one_weight(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, tensors = _llama(tmp_path)
    path = _write(tmp_path / "model.gguf", "llama", "made up", metadata, tensors)
    with _quiet():
        from transformers import modeling_gguf_pytorch_utils as theirs

    def split(self: Any, weights: Any, name: str, parsed_parameters: Any, **others: Any) -> Any:
        for half in ("one", "other"):
            parsed_parameters["tensors"][f"{name}.{half}"] = torch.from_numpy(np.array(weights))
        return theirs.GGUFTensor(weights, None, {})

    def rename(self: Any, weights: Any, name: str, **others: Any) -> Any:
        return theirs.GGUFTensor(weights, name.replace("blk.1.", "blk.0."), {})

    for process, match in (
        (split, "must become one parameter"),
        (rename, "there is another tensor for model.layers.0"),
    ):
        monkeypatch.setattr(theirs.LlamaTensorProcessor, "process", process)
        with pytest.raises(FormatError, match=match):
            _state(path)


def test_rows_and_columns_may_move_together(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, tensors = _llama(tmp_path)
    generator = np.random.default_rng(0)
    rows, columns = generator.permutation(256), generator.permutation(256)
    _process(monkeypatch, lambda w: w[rows][:, columns])
    path = _write(tmp_path / "model.gguf", "llama", "made up", metadata, tensors)
    _, state = _compare(path)
    q = state["model.layers.0.self_attn.o_proj.weight"]
    assert isinstance(q, QTensor)
    assert q.order is not None
    x = torch.randn(3, 256)
    torch.testing.assert_close(x @ q.T, x @ q.dequantize().T, rtol=1e-4, atol=0.1)  # values of hundreds


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return _make(tmp_path_factory.mktemp("whole"), "llama")  # not its bytes: Hypothesis would print them


_CHANGES = st.tuples(st.integers(0, 900) | st.integers(900, 4000), st.sampled_from([0, 1, 127, 128, 255]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(_CHANGES, min_size=1, max_size=3))
def test_damaged_metadata_is_refused_or_read(
    whole: pathlib.Path, tmp_path: pathlib.Path, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(whole.read_bytes())
    assert damaged.index(b"tokenizer.ggml.tokens") < 900 < 4000 < len(damaged)
    for place, value in changes:
        damaged[place] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(FormatError):
        _, state = _state(path)
        assert sum(t.nbytes for t in state.values()) <= 4 * len(damaged)


@pytest.mark.slow
def test_the_real_file() -> None:
    """SmolLM2: nothing missing, nothing left over, every bit as transformers loads it."""
    path = fetch.fetch(fetch.SMOLLM2)
    config, state = _compare(path)
    quantized = {name for name, tensor in state.items() if isinstance(tensor, QTensor)}
    assert (len(state), len(quantized)) == (272, 211)
    assert "model.embed_tokens.weight" in quantized
    assert config.tie_word_embeddings
    assert sum(t.nbytes for t in state.values()) <= 1.01 * path.stat().st_size
