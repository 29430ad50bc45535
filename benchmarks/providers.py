"""Who multiplies: y = x @ w.T with a quantized w, by this package and by others.

Every provider starts from the same float weight and quantizes it its own way. Before anything is timed, `check`
compares a product with the exact one of the very weights that the provider's codes stand for. Where a provider does
not say what those are, the float weight stands in, with a tolerance for quantizing. Providers that compute another
function say so in `what`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkernels import ops, packing
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor, quantize

DTYPE = torch.bfloat16  # of activations and results
_TRUTH_WEIGHTS = 2**26  # float64 weights held at a time while checking
_CHECKED_TOKENS = 32
FLOAT_TOLERANCE = 0.2  # against the float weight: 4 bits in groups of 256 give about half of it


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: x (M, K) with a weight (N, K) under a scheme. model and layer say where the shape is from."""

    M: int
    N: int
    K: int
    scheme: str
    model: str = ""
    layer: str = ""

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One weight in a provider's own form.

    Attributes:
        call: what is timed: operand -> result.
        weight: () -> (N, K) float32 that the codes stand for; the float weight itself if not `own`.
        nbytes: of the weight as stored.
        own: whether `weight` is exactly what is multiplied.
        enter: x -> operand, not timed.
        leave: (result, operand) -> y (M, N), not timed.
        seen: operand -> x as it is multiplied.
    """

    call: Callable[[Any], Tensor]
    weight: Callable[[], Tensor]
    nbytes: int
    own: bool = True
    enter: Callable[[Tensor], Any] = lambda x: x
    leave: Callable[[Tensor, Any], Tensor] = lambda result, operand: result
    seen: Callable[[Any], Tensor] = lambda operand: operand


class Provider:
    """What computes the product.

    Attributes:
        name: short, unique.
        what: what is computed, in words.
        tolerance: see `check`.
        rate: peak of the arithmetic it uses, in units of that of bfloat16.
    """

    name: str
    what: str
    tolerance = 2.0**-6
    rate = 1.0

    def supports(self, problem: Problem) -> str | None:
        """Why not, in words; None if it does."""
        return None

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """The weight of a seed, quantized."""
        raise NotImplementedError


def float_weight(problem: Problem, seed: int, device: str) -> Tensor:
    """(N, K) bfloat16: normal values, off center, whose size changes from row to row and every 16 columns.

    A scale or a zero that is looked up in the wrong place then shows.
    """
    N, K = problem.N, problem.K
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.randn(N, K, generator=generator, device=device).add_(0.5)
    rows = torch.rand(N, 1, generator=generator, device=device).mul_(2).sub_(1).exp2_()
    columns = torch.rand(-(-K // 16), generator=generator, device=device).mul_(2).sub_(1).exp2_()
    return w.mul_(rows).mul_(columns.repeat_interleave(16)[:K]).mul_(K**-0.5).to(DTYPE)


def activations(problem: Problem, device: str = "cuda", seed: int = 0) -> Tensor:
    """(M, K) bfloat16, normal."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(problem.M, problem.K, generator=generator, device=device).to(DTYPE)


def check(provider: Provider, prepared: Prepared, x: Tensor) -> str | None:
    """What is wrong with the product of x, or None.

    Up to 32 tokens, the first and the last among them, and all columns are compared with float64. With
    S = sqrt(sum x^2 w^2), the size of a sum of K terms of random sign, each value may be off by
    2^-8 |y| + tolerance * S: rounding of y, and of weights and partial sums that are kept in bfloat16. One wrong scale
    or address in a group of 16 is several times more. Against a float weight, the root mean square of error / S must
    not exceed FLOAT_TOLERANCE.
    """
    operand = prepared.enter(x)
    y = prepared.leave(prepared.call(operand), operand)
    w = prepared.weight()
    if y.shape != (x.shape[0], w.shape[0]) or y.dtype is not DTYPE:
        return f"gave {tuple(y.shape)} {y.dtype}, not {(x.shape[0], w.shape[0])} {DTYPE}"
    tokens = torch.linspace(0, x.shape[0] - 1, min(_CHECKED_TOKENS, x.shape[0]), device=x.device).long()
    seen = prepared.seen(operand)[tokens].double()
    worst, at, squares = 0.0, (0, 0), 0.0
    step = max(1, _TRUTH_WEIGHTS // w.shape[1])
    for start in range(0, w.shape[0], step):
        part = w[start : start + step].double()
        exact = seen @ part.T
        size = (seen.square() @ part.square().T).sqrt().clamp(min=1e-30)
        error = (y[tokens, start : start + step].double() - exact).abs()
        if not torch.isfinite(error).all():
            return "gave NaN or infinity"
        squares += (error / size).square().sum().item()
        excess = (error - 2.0**-8 * exact.abs()) / size
        largest = int(excess.argmax())
        if excess.flatten()[largest] > worst:
            row, column = divmod(largest, excess.shape[1])
            worst, at = float(excess.flatten()[largest]), (int(tokens[row]), start + column)
    if prepared.own:
        if worst > provider.tolerance:
            return f"is off by {worst:.3g} of its size at {at}; {provider.tolerance:.3g} is allowed"
        return None
    mean = (squares / (len(tokens) * w.shape[0])) ** 0.5
    if mean > FLOAT_TOLERANCE:
        return f"is off by {mean:.3g} of its size on average; {FLOAT_TOLERANCE:.3g} is allowed"
    return None


# ---- torch and this package ----


class CuBLAS(Provider):
    """The baseline."""

    name, what = "cublas", "torch, bfloat16 weight"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Dequantize once."""
        w = quantize(float_weight(problem, seed, device), problem.scheme).dequantize(DTYPE)
        return Prepared(lambda x: F.linear(x, w), w.float, w.nbytes)


class QKernels(Provider):
    """This package."""

    name, what = "qkernels", "qkernels.ops.matmul"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q, scheme = quantize(float_weight(problem, seed, device), problem.scheme), problem.scheme

        def call(x: Tensor) -> Tensor:
            return ops.matmul(x, q.packed, q.scale, q.zero, None, scheme, q.in_features)

        return Prepared(call, q.dequantize, q.nbytes)


class QKernelsDequantize(Provider):
    """What a fused kernel must beat at many tokens."""

    name, what = "qkernels-dequantize", "qkernels dequantizes to bfloat16 in each call, then cuBLAS"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q = quantize(float_weight(problem, seed, device), problem.scheme)
        return Prepared(lambda x: F.linear(x, q.dequantize(DTYPE)), lambda: q.dequantize(DTYPE).float(), q.nbytes)


class Tinygemm(Provider):
    """The 4-bit kernel that comes with torch."""

    name, what = "tinygemm", "torch._weight_int4pack_mm: the same codes, scales and offsets in bfloat16"

    def supports(self, problem: Problem) -> str | None:
        """4 bits and groups of a few sizes."""
        scheme = problem.parsed
        if scheme.bits != 4 or scheme.group_size not in (32, 64, 128, 256):
            return "4 bits and groups of 32, 64, 128 or 256 only"
        # inner tiles of 8 * 16 along K, and of 8 along N
        group = scheme.group_length(problem.K)
        if problem.K % max(128, group) or problem.N % 8:
            return "K must be a multiple of 128 and of the group, N of 8"
        return None

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """w = s (q - zero) is s (q - 8) + s (8 - zero), and w = s q + m is s (q - 8) + (m + 8 s)."""
        q = quantize(float_weight(problem, seed, device), problem.scheme)
        code = packing.unpack(q.packed, 4, problem.K)
        scale = q.scale.to(DTYPE)
        offset = _offset(q, scale, around=8).to(DTYPE)
        pairs = torch.stack((scale, offset), dim=-1).contiguous()  # (groups, N, 2)
        group = q.scheme.group_length(problem.K)
        if device == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code.int(), 1)
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            nibbles = (code[:, ::2] << 4 | code[:, 1::2]).contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            multiply = torch.ops.aten._weight_int4pack_mm

        def weight() -> Tensor:
            by_group = (code.float() - 8).unflatten(1, (-1, group))
            w = by_group * scale.T.float().unsqueeze(-1) + offset.T.float().unsqueeze(-1)
            return w.flatten(1).to(DTYPE).float()  # the kernel multiplies bfloat16

        return Prepared(lambda x: multiply(x, packed, group, pairs), weight, packed.nbytes + pairs.nbytes)


def _offset(q: QTensor, scale: Tensor, around: int) -> Tensor:
    """(groups, N) float32 such that w = scale * (code - around) + offset."""
    if q.zero is None:
        return scale.float() * (around - q.scheme.center)
    if q.scheme.value_map == "offset":
        return q.zero.float() + around * scale.float()
    return scale.float() * (around - q.zero.float())


class Int8(Provider):
    """A reference rate, not a peer."""

    name, what = "int8", "torch._int_mm: another function, of int8 activations; quantizing x and scaling y not timed"
    rate = 2.0

    def supports(self, problem: Problem) -> str | None:
        """Rows of 8-bit codes."""
        if str(problem.parsed).split("-")[0] != "w8cs":
            return "w8cs only"
        if problem.M <= 16:
            return "more than 16 tokens only"
        return "K and N must be multiples of 8" if problem.K % 8 or problem.N % 8 else None

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Scales per row of w and per token."""
        code, scale = _rows_to_int8(float_weight(problem, seed, device))

        def leave(result: Tensor, operand: tuple[Tensor, Tensor]) -> Tensor:
            return (result.float() * operand[1] * scale.T).to(DTYPE)

        return Prepared(
            lambda operand: torch._int_mm(operand[0], code.T),
            lambda: code.float() * scale,
            code.nbytes + scale.nbytes,
            enter=_rows_to_int8,
            leave=leave,
            seen=lambda operand: operand[0].float() * operand[1],
        )


def _rows_to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales (rows, 1)) of symmetric rows."""
    scale = values.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (values.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


# ---- packages that may be installed ----


@functools.cache
def missing(package: str) -> str | None:
    """Why a package cannot be imported, or None. Some raise anything at all where there is no GPU."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"import {package}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip()
    return None


class Gemlite(Provider):
    """Triton kernels of gemlite; they tune themselves at the first call of a shape, which can take long."""

    name, what = "gemlite", "gemlite A16Wn: the same codes, scales and zeros in bfloat16"
    tolerance = 2.0**-4  # partial sums are added up in bfloat16, by atomics

    def supports(self, problem: Problem) -> str | None:
        """Whole groups of codes that divide a word."""
        scheme = problem.parsed
        if scheme.bits not in (1, 2, 4, 8) or not isinstance(scheme.group_size, int) or scheme.value_map == "offset":
            return "1, 2, 4 or 8 bits in groups, with integer zeros, only"
        if problem.K % scheme.group_size or problem.K % 32:
            return "K must be a multiple of 32 and of the group"
        return missing("gemlite")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """It stores w = s q + m, with m = -s zero in bfloat16."""
        from gemlite.helper import A16Wn

        q = quantize(float_weight(problem, seed, device), problem.scheme)
        bits, group = q.scheme.bits, q.scheme.group_length(problem.K)
        code = packing.unpack(q.packed, bits, problem.K)
        scale = q.scale.T.to(DTYPE).contiguous()
        zero = torch.full_like(scale, q.scheme.center) if q.zero is None else q.zero.T.to(DTYPE).contiguous()
        layer = A16Wn(device=device, dtype=DTYPE).from_weights(code, scale, zero, bits, group)

        def weight() -> Tensor:
            offset = (-zero.float() * scale.float()).to(DTYPE).float().unsqueeze(-1)
            w = code.float().unflatten(1, (-1, group)) * scale.float().unsqueeze(-1) + offset
            return w.flatten(1).to(DTYPE).float()

        stored = sum(t.nbytes for t in (layer.W_q, layer.scales, layer.zeros))
        return Prepared(layer, weight, stored)


class BitsAndBytes(Provider):
    """NF4 of bitsandbytes."""

    name, what = "bitsandbytes", "bitsandbytes.matmul_4bit: NF4, float32 scales"

    def supports(self, problem: Problem) -> str | None:
        """4 bits in blocks of a few sizes."""
        scheme = problem.parsed
        if scheme.bits != 4 or scheme.group_size not in (32, 64, 128, 256, 512):
            return "4 bits and groups of 32, 64, 128, 256 or 512 only"
        if problem.K % scheme.group_length(problem.K):
            return "K must be a multiple of the group"
        return missing("bitsandbytes")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize, with blocks as long as the scheme's groups."""
        import bitsandbytes

        w = float_weight(problem, seed, device)
        block = problem.parsed.group_length(problem.K)
        packed, state = bitsandbytes.functional.quantize_4bit(w, blocksize=block, quant_type="nf4")
        # Before version 0.50 the transpose was what matmul_4bit took; since then either will do.
        transposed = packed.t()
        return Prepared(
            lambda x: bitsandbytes.matmul_4bit(x, transposed, quant_state=state),
            lambda: bitsandbytes.functional.dequantize_4bit(packed, state).float(),
            packed.nbytes + state.absmax.nbytes,
        )


class TorchAO(Provider):
    """Weight-only configurations of torchao."""

    name, what = "torchao", "torchao weight-only: int8 per row, or int4 tile-packed (tinygemm with its own scales)"

    def supports(self, problem: Problem) -> str | None:
        """int8 per row, int4 in groups."""
        scheme = problem.parsed
        int8 = scheme.bits == 8 and scheme.group_size == "channel" and scheme.value_map == "symmetric"
        int4 = scheme.bits == 4 and scheme.group_size in (32, 64, 128, 256)
        if not int8 and not int4:
            return "w8cs, and 4 bits with groups of 32, 64, 128 or 256, only"
        if int4 and problem.K % scheme.group_length(problem.K):
            return "K must be a multiple of the group"
        return missing("torchao.quantization")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Through torchao's own quantize_, on a Linear."""
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        w = float_weight(problem, seed, device)
        linear = torch.nn.Linear(problem.K, problem.N, bias=False, device="meta", dtype=DTYPE)
        linear.weight = torch.nn.Parameter(w, requires_grad=False)
        scheme = problem.parsed
        if scheme.bits == 8:
            quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
            weight: Any = linear.weight
            return Prepared(linear, lambda: weight.dequantize().float(), weight.qdata.nbytes + weight.scale.nbytes)
        config = Int4WeightOnlyConfig(
            group_size=scheme.group_length(problem.K),
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
        quantize_(linear, config)
        weight = linear.weight
        return Prepared(linear, w.float, weight.qdata.nbytes + weight.scale_and_zero.nbytes, own=False)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        CuBLAS(), QKernels(), QKernelsDequantize(), Tinygemm(), Int8(), Gemlite(), BitsAndBytes(), TorchAO(),
    )
}  # fmt: skip
BASELINE = "cublas"
