"""from_pretrained over two processes gives the model that one process has."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import qkernels
from qkernels import QuantEmbedding, QuantLinear
from qkernels.formats.native import Entry
from qkernels.integrations.transformers import QKernelsConfig
from qkernels.nn import QuantModule
from qkernels.parallel.layers import ColwiseLinear, RowwiseLinear
from qkernels.replace import places, put
from tests import models
from tests.processes import RANKS, Processes

OLD = importlib.util.find_spec("transformers.distributed.tensor_parallel") is None
needs_styles = pytest.mark.skipif(OLD, reason="transformers before 5.17 has styles of another kind")

SIZES: dict[str, Any] = {"vocab_size": 96}  # which two processes can share
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "first_k_dense_replace": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
INPUTS = {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    found.run(imported)
    yield found
    found.stop()


def imported() -> None:
    """Import what takes long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

    assert LlamaForCausalLM is not None


def saved(name: str, folder: pathlib.Path, sizes: dict[str, Any] = SIZES) -> pathlib.Path:
    """A folder with a float model."""
    import transformers

    if name == "deepseek_v2":
        torch.manual_seed(0)
        model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**DEEPSEEK, **sizes))
    else:
        config, kind, arguments = models.MODELS[name]
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**{**arguments, **sizes}))
    model.save_pretrained(folder)
    return folder


def loaded(folder: pathlib.Path, quantize: dict[str, Any] | None, distribute: dict[str, Any] | None) -> Any:
    """A model in evaluation mode; `distribute` are arguments of a DistributedConfig."""
    import transformers

    options: dict[str, Any] = {}
    if quantize is not None:
        options["quantization_config"] = QKernelsConfig(**quantize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if distribute == {"tp_plan": "auto"}:
            options["tp_plan"] = "auto"  # deprecated, and what people know
        elif distribute is not None:
            from transformers.distributed import DistributedConfig

            options["distributed_config"] = DistributedConfig(**distribute)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a process."""
    rank = str(dist.get_rank())
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}.items():
        monkeypatch.setenv(name, value)


def seen(model: Any) -> dict[str, Any]:
    """What a model does, and what its quantized layers hold."""
    with torch.no_grad():
        logits = model(**INPUTS).logits
    embeds = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model(inputs_embeds=embeds).logits.square().sum().backward()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    tokens = [model.generate(**INPUTS, **options, cache_implementation=c) for c in ("dynamic", "static")]
    layers = {n: (type(m), m.qweight.dequantize()) for n, m in model.named_modules() if isinstance(m, QuantModule)}
    return {"logits": logits, "gradient": embeds.grad, "tokens": torch.stack(tokens), "layers": layers}


def seen_in_two(folder: pathlib.Path, quantize: dict[str, Any] | None, distribute: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_a_process(monkeypatch)
        return seen(loaded(folder, quantize, distribute))


def check(answers: list[dict[str, Any]], wanted: dict[str, Any]) -> set[type]:
    """The classes of quantized layers, if processes found what is wanted."""
    for answer in answers:
        torch.testing.assert_close(answer["logits"], wanted["logits"], atol=1e-4, rtol=1e-4)
        scale = float(wanted["gradient"].abs().max())
        torch.testing.assert_close(answer["gradient"] / scale, wanted["gradient"] / scale, atol=1e-4, rtol=1e-3)
        assert torch.equal(answer["tokens"], wanted["tokens"])
        assert answer["layers"].keys() == wanted["layers"].keys()
    for name, (_, whole) in wanted["layers"].items():
        kinds, parts = zip(*(answer["layers"][name] for answer in answers), strict=True)
        if kinds[0] is ColwiseLinear:
            assert torch.equal(torch.cat(parts), whole)
        elif kinds[0] is RowwiseLinear:
            assert torch.equal(torch.cat(parts, dim=1), whole)
        else:
            assert all(torch.equal(part, whole) for part in parts)
    return {kind for kind, _ in answers[0]["layers"].values()}


@needs_styles
@pytest.mark.parametrize(
    ("name", "quantize", "kinds"),
    [
        ("llama", {"scheme": "w4g16"}, {ColwiseLinear, RowwiseLinear}),
        ("llama", {"scheme": "w3cf", "skip": []}, {ColwiseLinear, RowwiseLinear}),
        ("llama-tied", {"scheme": "w4g16", "embeddings": "w8g32"}, {ColwiseLinear, RowwiseLinear, QuantEmbedding}),
        ("llama-tied", {"scheme": "w4g16", "schemes": {"lm_head": "w8c"}}, {ColwiseLinear, RowwiseLinear}),
        ("qwen2", {"scheme": "w5ts"}, {ColwiseLinear, RowwiseLinear}),
        ("qwen3", {"scheme": "w4g16", "schemes": {"*.0.*.q_proj": None, "*.1.*.o_proj": None}}, None),
        ("phi3", {"scheme": "w4g16"}, {ColwiseLinear, RowwiseLinear}),
        ("mixtral", {"scheme": "w4g16", "embeddings": "w8c"}, None),
        ("gpt_oss", {"scheme": "w4g32"}, None),
        ("deepseek_v2", {"scheme": "w4g16"}, None),
    ],
)
def test_a_model_over_two_processes(
    name: str, quantize: dict[str, Any], kinds: set[type] | None, tmp_path: pathlib.Path, processes: Processes
) -> None:
    folder = saved(name, tmp_path / "float")
    model = loaded(folder, quantize, None)
    model.save_pretrained(tmp_path / "quantized")
    wanted = seen(model)
    for where, asked in ((folder, quantize), (tmp_path / "quantized", None)):
        found = check(processes.run(seen_in_two, where, asked, {"tp_plan": "auto"}), wanted)
        assert kinds is None or {kind for kind in found if kind.__name__ != "QuantLinear"} == kinds


@needs_styles
def test_a_vocabulary_that_processes_cannot_share_stays_whole(tmp_path: pathlib.Path, processes: Processes) -> None:
    folder = saved("llama-tied", tmp_path / "float", {"vocab_size": 99})
    quantize = {"scheme": "w4g16", "embeddings": "w8c"}
    model = loaded(folder, quantize, None)
    model.save_pretrained(tmp_path / "quantized")
    wanted = seen(model)
    for where, asked in ((folder, quantize), (tmp_path / "quantized", None)):
        answers = processes.run(seen_in_two, where, asked, {"tp_plan": "auto"})
        assert check(answers, wanted) == {ColwiseLinear, RowwiseLinear, QuantEmbedding, QuantLinear}


@needs_styles
def test_a_plan_of_ones_own(tmp_path: pathlib.Path, processes: Processes) -> None:
    from transformers.distributed import DistributedConfig

    folder = saved("llama", tmp_path / "float")
    plan = {f"model.layers.*.self_attn.{p}_proj": "colwise_gather_output" for p in "qkv"}
    plan["model.layers.*.self_attn.o_proj"] = "rowwise_split_input"
    if hasattr(DistributedConfig, "ep_size"):  # then a plan is added to the model's own, and else replaces it
        plan |= {f"model.layers.*.mlp.{p}_proj": "replicate" for p in ("gate", "up", "down")}
    quantize = {"scheme": "w4g16"}
    answers = processes.run(seen_in_two, folder, quantize, {"tp_size": 2, "tp_plan": plan})
    assert check(answers, seen(loaded(folder, quantize, None))) == {ColwiseLinear, RowwiseLinear, QuantLinear}
    kinds = {name: kind for name, (kind, _) in answers[0]["layers"].items()}
    assert kinds["model.layers.0.mlp.down_proj"] is QuantLinear
    assert kinds["model.layers.1.self_attn.o_proj"] is RowwiseLinear


@needs_styles
def test_an_order_of_inputs_stays_where_rows_are_cut(tmp_path: pathlib.Path, processes: Processes) -> None:
    model = loaded(saved("llama", tmp_path / "float"), {"scheme": "w4g16"}, None)
    for name, layer in list(model.named_modules()):
        if name.endswith(("q_proj", "gate_proj")):
            weight = dataclasses.replace(layer.qweight, order=torch.randperm(64).int())
            put(QuantLinear(weight), places(model)[layer])
            model.config.quantization_config.weights[f"{name}.weight"] = Entry.of(weight)
    model.save_pretrained(tmp_path / "quantized")
    wanted = seen(model)
    check(processes.run(seen_in_two, tmp_path / "quantized", None, {"tp_plan": "auto"}), wanted)


def saved_by_two(folder: pathlib.Path, target: pathlib.Path, distribute: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_a_process(monkeypatch)
        loaded(folder, None, distribute).save_pretrained(target)


@needs_styles
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-tied", "mixtral"])
@pytest.mark.parametrize("scheme", ["w4g16", "w8cs", "w3tf"])
@pytest.mark.parametrize("distribute", [{"tp_size": 2}, {"fsdp_size": 2}], ids=["tp", "fsdp"])
def test_what_several_processes_save_is_whole(
    name: str, scheme: str, distribute: dict[str, Any], tmp_path: pathlib.Path, processes: Processes
) -> None:
    folder, one, two = saved(name, tmp_path / "float"), tmp_path / "one", tmp_path / "two"
    skip = ["lm_head"] if name == "llama-tied" else []
    loaded(folder, {"scheme": scheme, "embeddings": "w8g32", "skip": skip}, None).save_pretrained(one)
    processes.run(saved_by_two, one, two, distribute)
    stored = [load_file(path / "model.safetensors") for path in (one, two)]
    if name == "llama-tied" and "fsdp_size" in distribute:  # transformers then stores tied weights twice
        stored[1] = {n: t for n, t in stored[1].items() if not n.startswith("lm_head.")}
        with torch.no_grad():
            logits = [loaded(path, None, None)(**INPUTS).logits for path in (one, two)]
        assert torch.equal(*logits)
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[1][n], t) and stored[1][n].dtype is t.dtype for n, t in stored[0].items())
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (one, two)]
    assert configs[0] == configs[1]


@needs_styles
def test_fully_sharded_by_transformers(tmp_path: pathlib.Path, processes: Processes) -> None:
    model = loaded(saved("llama", tmp_path / "float"), {"scheme": "w4g16"}, None)
    model.save_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        wanted = model(**INPUTS).logits
    for found in processes.run(logits_in_two, tmp_path / "quantized", {"fsdp_size": 2}):
        assert torch.equal(found, wanted)


@needs_styles
def test_processes_without_a_plan_have_whole_models(tmp_path: pathlib.Path, processes: Processes) -> None:
    folder = saved("llama-tied", tmp_path / "float")
    quantize = {"scheme": "w4g16", "embeddings": "w8c"}
    wanted = seen(loaded(folder, quantize, None))
    answers = processes.run(seen_in_two, folder, quantize, None)
    assert check(answers, wanted) == {QuantLinear, QuantEmbedding}
    assert all(torch.equal(answer["logits"], wanted["logits"]) for answer in answers)


def logits_in_two(folder: pathlib.Path, distribute: dict[str, Any]) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        in_a_process(monkeypatch)
        return loaded(folder, None, distribute)(**INPUTS).logits


def read_by_load(folder: pathlib.Path) -> torch.Tensor:
    from transformers.distributed import DistributedConfig

    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        in_a_process(monkeypatch)
        model = qkernels.load(folder, device=None, distributed_config=DistributedConfig(tp_size=2))
        assert isinstance(model.model.layers[0].mlp.down_proj, RowwiseLinear)
        return model(**INPUTS).logits


@needs_styles
def test_qkernels_load_passes_a_plan_on(tmp_path: pathlib.Path, processes: Processes) -> None:
    model = loaded(saved("llama", tmp_path / "float"), {"scheme": "w4g16"}, None)
    model.save_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        wanted = model(**INPUTS).logits
    for found in processes.run(read_by_load, tmp_path / "quantized"):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def refusal(folder: pathlib.Path, quantize: dict[str, Any] | None, distribute: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_a_process(monkeypatch)
        with pytest.raises(ValueError, match=r"quantized|calibration|groups|cut") as caught:
            loaded(folder, quantize, distribute)
        return str(caught.value)


TP = {"tp_size": 2}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "llama", {"scheme": "w4g64"}, TP,
        "model.layers.0.mlp.down_proj: in_features = 96 over 2 processes is 48 each, not whole groups of 64 (w4g64)",
    ),
    (
        "llama", {"scheme": "w4g16"}, {**TP, "tp_plan": {"model.layers.*.mlp.up_proj": "packed_colwise"}},
        "model.layers.0.mlp.up_proj is quantized: a plan cannot ask for 'packed_colwise'; accepted: colwise,",
    ),
    (
        "llama", {"scheme": "w4g16", "embeddings": "w8g32"}, {**TP, "tp_plan": {"model.embed_tokens": "colwise"}},
        "model.embed_tokens is quantized: a plan cannot ask for 'colwise'",
    ),
    (
        "llama", {"scheme": "w4g16", "method": "search", "calibration": "random"}, TP,
        ": calibration needs the whole model in one process",
    ),
    (
        "gpt_oss", {"scheme": "w4g32", "method": "search", "calibration": "random"}, TP,
        ": calibration needs the whole model in one process",
    ),
]  # fmt: skip


@needs_styles
@pytest.mark.parametrize(("name", "quantize", "distribute", "message"), REFUSED)
def test_what_cannot_be_cut_is_named(
    name: str,
    quantize: dict[str, Any],
    distribute: dict[str, Any],
    message: str,
    tmp_path: pathlib.Path,
    processes: Processes,
) -> None:
    folder = saved(name, tmp_path / "float")
    asked: list[tuple[pathlib.Path, dict[str, Any] | None]] = [(folder, quantize)]
    if "calibration" not in quantize:
        loaded(folder, quantize, None).save_pretrained(tmp_path / "quantized")
        asked.append((tmp_path / "quantized", None))
    for where, how in asked:
        for said in processes.run(refusal, where, how, distribute):
            assert message in said


@needs_styles
def test_experts_are_not_given_to_processes_each(tmp_path: pathlib.Path, processes: Processes) -> None:
    from transformers.distributed import DistributedConfig

    spread = (
        {"tp_size": 2, "ep_size": 2}
        if hasattr(DistributedConfig, "ep_size")
        else {"enable_expert_parallel": True, "tp_size": 2}
    )
    folder = saved("mixtral", tmp_path / "float")
    loaded(folder, {"scheme": "w4g16"}, None).save_pretrained(tmp_path / "quantized")
    for where, how in ((folder, {"scheme": "w4g16"}), (tmp_path / "quantized", None)):
        for said in processes.run(refusal, where, how, {**TP, **spread}):
            assert "mlp.experts" in said
            assert "is quantized" in said


@needs_styles
def test_quantizing_into_parts_of_fsdp_is_refused(tmp_path: pathlib.Path, processes: Processes) -> None:
    folder = saved("llama", tmp_path / "float")
    for said in processes.run(refusal, folder, {"scheme": "w4g16"}, {"fsdp_size": 2}):
        assert "model.layers.0.self_attn.q_proj cannot be quantized while it is loaded into several processes" in said


@pytest.mark.skipif(not OLD, reason="this transformers has styles that quantized layers know")
def test_styles_of_another_kind_are_refused(tmp_path: pathlib.Path, processes: Processes) -> None:
    folder = saved("llama", tmp_path / "float")
    loaded(folder, {"scheme": "w4g16"}, None).save_pretrained(tmp_path / "quantized")
    for where, how in ((folder, {"scheme": "w4g16"}), (tmp_path / "quantized", None)):
        for said in processes.run(refusal, where, how, {"tp_plan": "auto"}):
            assert "q_proj is quantized: tensor parallelism of it needs transformers 5.17 or later" in said
