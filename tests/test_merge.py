"""Siblings multiplied in one launch: the same bits, whoever asks, whenever; and one launch where it can be."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import pathlib
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qkernels
from qkernels import MergedLinear, QTensor, QuantLinear, merge, ops, siblings, source

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**SIZES)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=16)),
}
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of the weight of every product that is computed without a gradient."""
    found: list[int] = []
    original = ops.matmul_cpu

    def counted(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        found.append(packed.shape[0])
        return original(x, packed, *rest)

    monkeypatch.setattr(ops, "matmul_cpu", counted)
    return found


def _pair(make: Callable[[], nn.Module], scheme: str = "w4g32", **options: Any) -> tuple[Any, Any]:
    """The same model quantized twice: layers apart, and merged."""
    apart = make().eval()
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    merged = copy.deepcopy(apart)
    qkernels.quantize_model(apart, scheme, progress=False)
    qkernels.quantize_model(merged, scheme, progress=False, **{"merge": True, **options})
    return apart, merged


class Parent(nn.Module):
    """What attention does with its input; `between` runs after the first projection."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n, bias=bias) for n in (64, 32, 48))
        self.between: Callable[[Tensor], Any] = lambda x: None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x)
        self.between(x)
        return q, self.k_proj(x), self.v_proj(x)


class Clean(Parent):
    """What source code proves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


def _same(a: Tensor, b: Tensor) -> bool:
    """But for the order of sums, which a wider product may change on some machines."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5))


def _equal(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(_same(a, b) for a, b in zip(found, wanted, strict=True))


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))


# ---- models ----


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_has_the_same_bits_in_fewer_launches(name: str, launches: list[int]) -> None:
    apart, merged = _pair(MODELS[name])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            wanted = apart(TOKENS).logits
            assert len(launches) == 14
            launches.clear()
            assert _same(merged(TOKENS).logits, wanted)
            assert launches == 2 * [64 + 32 + 32, 64, 96 + 96, 64]
            launches.clear()
    assert _same(merged(TOKENS).logits, apart(TOKENS).logits)  # gradients recorded


@pytest.mark.parametrize("scheme", ["w8cs", "w3g48f", "w4g32-bf16", "w2g64s"])
def test_every_scheme_but_one_scale_per_tensor_merges(scheme: str) -> None:
    apart, merged = _pair(lambda: Parent().bfloat16(), scheme)
    with torch.no_grad():
        assert _equal(merged(X.bfloat16()), apart(X.bfloat16()))
    for name in ("q_proj", "k_proj", "v_proj"):
        one, other = getattr(merged, name), getattr(apart, name)
        assert _equal(one.qweight.tensors, other.qweight.tensors)
        assert _same(one.bias, other.bias)


def test_generating_with_a_cache(launches: list[int]) -> None:
    apart, merged = _pair(MODELS["llama"])
    wanted = apart.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False)
    count = len(launches)
    assert _same(merged.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False), wanted)
    assert (len(launches) - count) * 14 == count * 8


def test_models_without_siblings_stay_as_they_are() -> None:
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    apart, merged = _pair(lambda: transformers.GPTNeoXForCausalLM(config))
    assert not any(isinstance(m, MergedLinear) for m in merged.modules())
    with torch.no_grad():
        assert _same(merged(TOKENS).logits, apart(TOKENS).logits)


def test_the_report_names_what_is_merged_and_what_is_not() -> None:
    model = nn.ModuleDict({"a": Clean(), "b": Parent(), "c": Parent()})
    report = qkernels.quantize_model(
        model, "w4g32", schemes={"b.*": "w8t", "c.k_proj": "w8c"}, merge=True, progress=False
    )
    assert report.merged is not None
    assert report.merged.groups == (("a.q_proj", "a.k_proj", "a.v_proj"), ("c.q_proj", "c.v_proj"))
    assert [reason for _, reason in report.merged.apart] == ["one scale for a whole tensor", "different scheme"]
    text = str(report)
    assert report.merged.not_proved == (("c.q_proj", "c.v_proj"),)
    assert "2 groups multiplied in one launch, 1 of them not in inference mode nor under torch.compile" in text
    assert "not all of q_proj + k_proj + v_proj of c: different scheme" in text
    assert text.count("q_proj + k_proj + v_proj") == 3 + 2
    assert "one launch" not in str(qkernels.quantize_model(Parent(), "w4g32", progress=False))


def test_siblings_that_do_not_fit_stay_apart() -> None:
    def reason(change: Callable[[Any], Any]) -> str:
        model = Parent()
        qkernels.quantize_model(model, "w4g32", progress=False)
        change(model)
        wanted = model(X)
        merged = qkernels.merge_siblings(model, [("q_proj", "k_proj")])
        assert merged.groups == ()
        assert _equal(model(X), wanted)
        return merged.apart[0][1]

    def elsewhere(model: Any) -> None:
        model.other = model.k_proj

    def without_bias(model: Any) -> None:
        model.k_proj.bias = None

    def hooked(model: Any) -> None:
        model.k_proj.register_forward_hook(lambda module, args, y: 2 * y)

    assert reason(elsewhere) == "a layer in several places"
    assert reason(without_bias) == "different bias"
    assert reason(hooked) == "hooks or a forward of its own"
    assert reason(lambda model: model.k_proj.bias.requires_grad_(False)) == "different bias"


def test_bad_groups_are_named_before_anything_changes() -> None:
    for groups, error in (([("q_proj",)], ValueError), (["q_proj"], TypeError), ([("a.b", "c")], ValueError)):
        model = Parent()
        with pytest.raises(error, match="group"):
            qkernels.quantize_model(model, "w4g32", merge=groups, progress=False)  # type: ignore[arg-type]
        assert type(model.q_proj) is nn.Linear


# ---- who asks, and when ----


def test_siblings_called_from_elsewhere_multiply_their_own_rows(launches: list[int]) -> None:
    apart, merged = _pair(Parent)
    with torch.no_grad():
        for name in ("v_proj", "q_proj", "q_proj", "k_proj"):
            launches.clear()
            found = getattr(merged, name)(X)
            assert launches == [found.shape[1]]
            assert _same(found, getattr(apart, name)(X))
        assert _equal(merged.forward(X), apart(X))  # past the hooks


def test_changes_between_the_calls_are_seen() -> None:
    """In place, in place inside a function, another tensor, other modes, the same layer again, its rows changed."""
    apart, merged = _pair(Parent)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for between in (
                lambda model: lambda x: x.add_(1),
                lambda model: lambda x: torch.relu_(x[:1]),
                lambda model: lambda x: x.detach().mul_(2),
                lambda model: lambda x: model.k_proj(torch.ones(64)),
                lambda model: lambda x: model.q_proj(x).zero_(),
                lambda model: lambda x: model.k_proj(x).zero_(),
            ):
                apart.between, merged.between = between(apart), between(merged)
                merged.q_proj.shared.untaken = 0
                assert _equal(merged(X.clone()), apart(X.clone())), mode
                assert merged.q_proj.shared.untaken == (mode is torch.no_grad)


def test_outputs_may_be_changed_in_place() -> None:
    apart, merged = _pair(Parent)
    with torch.no_grad():
        found = [y.mul_(i) for i, y in enumerate(merged(X))]
        assert _equal(found, [i * y for i, y in enumerate(apart(X))])
        assert _equal(merged(X), apart(X))


def test_autocast_that_begins_between_the_calls() -> None:
    class Mixed(Parent):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q = self.q_proj(x)
            with torch.autocast("cpu", torch.bfloat16):
                k = self.k_proj(x)
            return q, k, self.v_proj(x)

    apart, merged = _pair(Mixed)
    with torch.no_grad():
        found, wanted = merged(X), apart(X)
        assert [y.dtype for y in found] == [torch.float32, torch.bfloat16, torch.float32]
        assert _equal(found, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert _equal(merged(X), apart(X))


def test_gradients_are_those_of_layers_apart() -> None:
    apart, merged = _pair(Parent)
    gradients = []
    for model in (apart, merged):
        x = X.clone().requires_grad_()
        q, k, v = model(x)
        (q[:, :32] * k).sum().backward(retain_graph=True)
        v.mul_(2).square().sum().backward()  # in place: legal for layers apart
        gradients.append(x.grad)
        if model is merged:
            bias = model.q_proj.shared.bias.grad
            assert _same(bias, torch.cat([getattr(apart, f"{n}_proj").bias.grad for n in "qkv"]))
    assert _same(*gradients)


def test_gradients_switched_on_between_the_calls() -> None:
    class Switch(Parent):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                q = self.q_proj(x)
            return q, self.k_proj(x), self.v_proj(x)

    _, merged = _pair(Switch)
    q, k, v = merged(X.clone().requires_grad_())
    assert not q.requires_grad
    assert k.grad_fn is not None
    assert v.grad_fn is not None


@pytest.mark.parametrize("parent", [Parent, Clean])
def test_hooks_of_a_sibling_see_and_change_what_they_would(parent: type[Parent]) -> None:
    apart, merged = _pair(parent)
    for mode in (torch.no_grad, torch.inference_mode):
        for model in (apart, merged):
            model.handles = [
                model.k_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(3),)),
                model.v_proj.register_forward_hook(lambda module, args, y: -y),
            ]
        with mode():
            assert _equal(merged(X.clone()), apart(X.clone())), mode
            if mode is torch.no_grad:
                assert _equal(_products_in_graphs(merged, X.clone())[1], apart(X.clone()))
        for handle in apart.handles + merged.handles:
            handle.remove()


def test_nothing_outlives_the_call_of_the_parent(launches: list[int]) -> None:
    _, merged = _pair(Parent)
    kept: list[weakref.ref[Tensor]] = []
    original = siblings.MergedWeight.product

    def watched(self: Any, x: Tensor) -> Tensor:
        kept.append(weakref.ref(y := original(self, x)))
        return y

    def fail(x: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(siblings.MergedWeight, "product", watched)
        merged.between = fail
        with pytest.raises(RuntimeError, match="stop"):
            merged(X)
        gc.collect()
        assert [ref() for ref in kept] == [None]
        assert siblings._threads.scopes == []
        launches.clear()
        merged.k_proj(X)  # the same tensor, unchanged
        assert launches == [32]


def test_a_sibling_in_a_thread_of_its_own(launches: list[int]) -> None:
    apart, merged = _pair(Parent)
    with concurrent.futures.ThreadPoolExecutor(4) as pool, torch.no_grad():
        inputs = [torch.randn(1 + i % 5, 64) for i in range(60)]
        for found, wanted in zip(pool.map(torch.no_grad()(merged), inputs), map(apart, inputs), strict=True):
            assert _equal(found, wanted)
        merged.between = lambda x: pool.submit(torch.no_grad()(merged.k_proj), x).result()
        launches.clear()
        merged(X)
        assert launches == [144, 32]


def test_siblings_that_read_different_inputs_stop_being_multiplied_together(launches: list[int]) -> None:
    class Cross(Parent):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.q_proj(x), self.k_proj(2 * x), self.v_proj(3 * x)

    apart, merged = _pair(Cross)
    with torch.no_grad():
        for _ in range(2):
            assert _equal(merged(X), apart(X))
            assert launches[:3] == [144, 32, 48]
            launches.clear()
        with pytest.warns(UserWarning, match="q_proj, k_proj, v_proj .* do not read the same input"):
            merged(X)
        launches.clear()
        assert _equal(merged(X), apart(X))
        assert launches[:3] == [64, 32, 48]


def test_a_call_now_and_then_that_does_not_share_does_no_harm(launches: list[int]) -> None:
    _, merged = _pair(Parent)
    with torch.no_grad():
        for i in range(12):
            merged.between = (lambda x: x.add_(1)) if i % 3 else (lambda x: None)
            merged(X.clone())
        launches.clear()
        merged.between = lambda x: None
        merged(X)
        assert launches == [144]


# ---- copies, files, devices ----


def test_copies_stand_alone(launches: list[int]) -> None:
    apart, merged = _pair(Parent)
    merged.between = apart.between = merge.check_groups  # a function that can be pickled, and does nothing
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        with torch.no_grad():
            copied.q_proj.shared.weight_scale.mul_(2)
            launches.clear()
            assert not _same(copied(X)[1], apart(X)[1])
            assert launches[0] == 144
            assert _equal(merged(X), apart(X))
        assert copied.q_proj.shared is copied.k_proj.shared is not merged.q_proj.shared
    alone = copy.deepcopy(merged.k_proj)
    assert _same(alone(X), apart.k_proj(X))


def test_state_dicts_look_as_if_nothing_were_merged() -> None:
    apart, merged = _pair(MODELS["qwen2"])
    wanted, found = apart.state_dict(), merged.state_dict()
    assert list(wanted) == list(found)
    assert _equal(found.values(), wanted.values())
    torch.manual_seed(5)
    other_apart, other = _pair(MODELS["qwen2"])
    other.load_state_dict(wanted)
    with torch.no_grad():
        assert _same(other(TOKENS).logits, apart(TOKENS).logits)
    other_apart.load_state_dict(found, assign=True)
    with torch.no_grad():
        assert _same(other_apart(TOKENS).logits, apart(TOKENS).logits)
    other.load_state_dict({n: t + 1 if t.is_floating_point() else t for n, t in wanted.items()}, assign=True)
    assert _same(other.model.layers[0].self_attn.k_proj.bias, apart.model.layers[0].self_attn.k_proj.bias + 1)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj.weight_scale"):
        other.load_state_dict({n: t for n, t in wanted.items() if n != name})
    with pytest.raises(RuntimeError, match=r"up_proj.weight_scale of a w4g32 layer must be torch.float16"):
        other.load_state_dict({**wanted, name: wanted[name].float()})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up_proj.more"):
        other.load_state_dict({**wanted, "model.layers.0.mlp.up_proj.more": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"use qkernels\.load"):
        copy.deepcopy(other).to("meta").load_state_dict(wanted, assign=True)


@pytest.mark.parametrize("target", ["plain", "apart", "merged", "meta"])
def test_files_go_from_any_to_any(target: str, tmp_path: pathlib.Path) -> None:
    apart, merged = _pair(MODELS["qwen2"])
    path = tmp_path / "model.safetensors"
    qkernels.save(merged, path)
    qkernels.save(apart, tmp_path / "apart")
    tensors, wanted = qkernels.load(path), qkernels.load(tmp_path / "apart")
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        parts = zip(*(t.tensors if isinstance(t, QTensor) else (t,) for t in (tensor, wanted[name])), strict=True)
        assert all(_same(*pair) for pair in parts), name
    torch.manual_seed(7)
    fresh_apart, fresh_merged = _pair(MODELS["qwen2"])
    fresh = {"plain": MODELS["qwen2"](), "apart": fresh_apart, "merged": fresh_merged, "meta": fresh_merged}[target]
    if target == "meta":
        rotary = fresh.model.rotary_emb
        fresh.model.rotary_emb = nn.Identity()
        fresh.to("meta")
        fresh.model.rotary_emb = rotary
    qkernels.load(path, fresh.eval())
    assert isinstance(fresh.model.layers[0].self_attn.q_proj, MergedLinear) == (target in ("merged", "meta"))
    with torch.no_grad():
        assert _same(fresh(TOKENS).logits, apart(TOKENS).logits)
        if target != "merged":
            qkernels.merge_siblings(fresh)
            assert _same(fresh(TOKENS).logits, apart(TOKENS).logits)


def test_a_file_with_schemes_that_do_not_merge_unmerges(tmp_path: pathlib.Path) -> None:
    model = Parent()
    mixed = copy.deepcopy(model)
    qkernels.quantize_model(mixed, "w4g32", schemes={"k_proj": "w8t"}, progress=False)
    qkernels.save(mixed, tmp_path / "file")
    qkernels.quantize_model(model, "w4g32", merge=True, progress=False)
    qkernels.load(tmp_path / "file", model)
    assert type(model.k_proj) is QuantLinear
    with torch.no_grad():
        assert _equal(model(X), mixed(X))


def test_moving_and_converting_keeps_codes_and_scales() -> None:
    apart, merged = _pair(Parent)
    for model in (apart, merged):
        model.half().bfloat16()
        model.q_proj.to("cpu")
    assert merged.q_proj.shared.weight_scale.dtype is torch.float16
    assert merged.q_proj.bias.dtype is torch.bfloat16
    with torch.no_grad():
        assert _equal(merged(X.bfloat16()), apart(X.bfloat16()))
    names = [name for name, _ in merged.named_parameters()]
    assert names == [f"q_proj.shared.{n}" for n in ("weight", "weight_scale", "weight_zero", "bias")]


# ---- torch.compile and export ----


def _products_in_graphs(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """(products in the graphs that torch.compile makes, result)."""
    found = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal found
        found += sum("qkernels.matmul" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found, result


def test_compiled_models_have_one_product_for_siblings() -> None:
    apart, merged = _pair(MODELS["llama"])
    with torch.no_grad():
        wanted = apart(TOKENS).logits
        products, found = _products_in_graphs(merged, TOKENS)
        assert products == 8
        assert _same(found.logits, wanted)
        assert _same(merged(TOKENS).logits, wanted)  # nothing of the trace stays behind
    products, found = _products_in_graphs(merged, TOKENS)  # with gradients
    assert products == 14
    assert _same(found.logits, wanted)


def test_compiled_parents_whose_source_proves_nothing_keep_layers_apart() -> None:
    apart, merged = _pair(Parent)
    apart.between = merged.between = lambda x: x.add_(1)
    with torch.no_grad():
        products, found = _products_in_graphs(merged, X.clone())
        assert products == 3
        assert _equal(found, apart(X.clone()))


def test_compiled_siblings_alone_and_another_forward() -> None:
    apart, merged = _pair(Clean)
    with torch.no_grad():
        products, found = _products_in_graphs(merged, X)
        assert products == 1
        assert _equal(found, apart(X))
        products, found = _products_in_graphs(lambda x: (merged.k_proj(x), merged.k_proj(x)), X)
        assert products == 2
        assert _same(found[0], apart.k_proj(X))

        def changed(self: Any, x: Tensor) -> Any:
            q = self.q_proj(x)
            x.add_(1)
            return q, self.k_proj(x), self.v_proj(x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Clean, "forward", changed)
            products, found = _products_in_graphs(merged, X.clone())
            assert products == 3
            assert _equal(found, apart(X.clone()))
            with torch.inference_mode():
                assert _equal(merged(X.clone()), apart(X.clone()))


class Breaks(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        if y.shape[0] == 5:
            raise ValueError("five")
        return y.relu()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 32), nn.Linear(64, 32)
        self.act = Breaks()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate_proj(x)) * self.up_proj(x)


def test_a_graph_break_between_siblings() -> None:
    apart, merged = _pair(Gated)
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager")
    shared = merged.up_proj.shared
    assert shared.forward_of_parent is Gated.forward
    with torch.no_grad():
        for rows in (3, 5, 4, 3):
            x = torch.randn(rows, 64)
            if rows == 5:
                with pytest.raises(ValueError, match="five"):
                    compiled(x)
                continue
            assert _same(compiled(x), apart(x))
            assert _same(compiled(x.mul_(2)), apart(x))
            assert shared.traced is None


def test_a_module_that_calls_a_sibling_between_the_calls() -> None:
    class Inner(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y * self.parent[0].up_proj(torch.ones(64))

    apart, merged = _pair(Gated)
    for model in (apart, merged):
        model.act = Inner()
        model.act.parent = [model]  # no submodule
    with torch.no_grad():
        wanted = apart(X)
        assert _same(merged(X), wanted)
        assert _same(_products_in_graphs(merged, X)[1], wanted)


def test_exported_models() -> None:
    apart, merged = _pair(Parent, merge=True)
    for strict in (False, True):
        program = torch.export.export(merged, (X,), strict=strict)
        assert _equal(program.module()(X), apart(X))


# ---- what source code proves ----


def _attention(self: Any, x: Tensor) -> Any:
    shape = (*x.shape[:-1], -1, 16)
    q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
    k = self.k_proj(x) * self.scaling
    return self.out(q, k)


def _mlp(self: Any, x: Tensor) -> Any:
    return self.down(self.act(self.q_proj(x)) * self.k_proj(x))


def _in_steps(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x) * self.scaling
    q = q.view(-1, 16)
    q = self.q_norm(q)
    k = self.k_proj(x)
    return q, k


def _rebound_by_a_result(self: Any, x: Tensor) -> Any:
    x = self.q_proj(x)
    return x * self.k_proj(x)


def _alias_viewed_and_given_away(self: Any, x: Tensor) -> Any:
    residual = x
    q = self.q_proj(x)
    r = self.act(residual.view(-1))
    k = self.k_proj(x)
    return q * k * r


def _in_place(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x)
    x += 1
    return q * self.k_proj(x)


def _method_in_place(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x).add_(x)
    return q * self.k_proj(x)


def _rebound(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x)
    x = self.norm(q)
    return q * self.k_proj(x)


def _given_away(self: Any, x: Tensor) -> Any:
    q = self.act(self.q_proj(x), x)
    k = self.k_proj(x)
    return q * k


def _alias_given_away(self: Any, x: Tensor) -> Any:
    residual = x
    q = self.act(self.q_proj(x), residual)
    k = self.k_proj(x)
    return q * k


def _alias_in_place(self: Any, x: Tensor) -> Any:
    residual = x
    q = self.q_proj(x) * residual.add_(1)
    k = self.k_proj(x)
    return q * k


def _two_inputs(self: Any, x: Tensor, z: Tensor) -> Any:
    q = self.q_proj(x)
    k = self.k_proj(z)
    return q * k


def _expression(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x + 1)
    k = self.k_proj(x + 1)
    return q * k


def _branch(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x)
    if self.training:
        x.zero_()
    k = self.k_proj(x)
    return q * k


def _twice(self: Any, x: Tensor) -> Any:
    q = self.q_proj(x)
    k = self.k_proj(x)
    return q * k * self.q_proj(x)


def test_what_source_code_proves() -> None:
    for forward in (_attention, _mlp, _in_steps):
        assert source.shows_one_input(forward, ("q_proj", "k_proj")), forward
    for forward in (
        _in_place, _method_in_place, _rebound, _given_away, _alias_given_away, _alias_in_place, _two_inputs,
        _rebound_by_a_result, _alias_viewed_and_given_away,
        _expression, _branch, _twice, lambda self, x: self.q_proj(x) * self.k_proj(x), torch.add,
    ):  # fmt: skip
        assert not source.shows_one_input(forward, ("q_proj", "k_proj")), forward
    assert not source.shows_one_input(_mlp, ("q_proj", "v_proj"))


# ---- on a GPU ----


@pytest.mark.gpu
def test_merged_layers_in_a_cuda_graph() -> None:
    model = Parent().cuda().half()
    qkernels.quantize_model(model, "w4g32", merge=True, progress=False)
    x = torch.zeros(3, 64, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        for seed in range(3):
            x.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert _equal(found, [layer(x) for layer in (model.q_proj, model.k_proj, model.v_proj)])


@pytest.mark.gpu
def test_another_stream_between_the_calls() -> None:
    class Streams(Parent):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            torch.cuda._sleep(50_000_000)  # the product that q_proj starts comes late
            q = self.q_proj(x)
            with torch.cuda.stream(side):
                k = self.k_proj(x).clone()
            side.synchronize()
            return q, k, self.v_proj(x)

    model = Streams().cuda().half()
    qkernels.quantize_model(model, "w4g32", merge=True, progress=False)
    x = torch.randn(3, 64, device="cuda").half()
    with torch.no_grad():
        wanted = [layer(x) for layer in (model.q_proj, model.k_proj, model.v_proj)]
        assert _equal(model(x), wanted)
