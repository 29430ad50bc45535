"""Who multiplies: y = x @ w.T with a quantized w, by this package and by others.

Where x is quantized, too, it is providers_int8.py that has them; products.py says what a provider is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.products import (
    DTYPE,
    Prepared,
    Problem,
    Provider,
    WeightOnly,
    Work,
    float_weight,
    missing,
    product_work,
    quantized,
)
from benchmarks.providers_int8 import EXACT, INT8_PROVIDERS
from qkernels import ops, packing
from qkernels.tensor import QTensor, quantize

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

    name, what = "qkernels", "qkernels.ops.matmul; quantizes x where the scheme says so"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q, scheme = quantize(float_weight(problem, seed, device), problem.scheme), problem.scheme

        def call(x: Tensor) -> Tensor:
            return ops.matmul(x, q.packed, q.scale, q.zero, None, scheme, q.in_features)

        if q.scheme.activations is None:
            return Prepared(call, q.dequantize, q.nbytes)
        return Prepared(call, q.dequantize, q.nbytes, seen=lambda x: quantized(x, q.scheme), tolerance=EXACT)

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Of the scheme."""
        return product_work(problem.M, problem.N, problem.K, problem.parsed, weight_bytes)


class QKernelsDequantize(WeightOnly):
    """What a fused kernel must beat at many tokens."""

    name, what = "qkernels-dequantize", "qkernels dequantizes to bfloat16 in each call, then cuBLAS"

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q = quantize(float_weight(problem, seed, device), problem.scheme)
        return Prepared(lambda x: F.linear(x, q.dequantize(DTYPE)), lambda: q.dequantize(DTYPE).float(), q.nbytes)


class Tinygemm(WeightOnly):
    """The 4-bit kernel that comes with torch."""

    name, what = "tinygemm", "torch._weight_int4pack_mm: the same codes, scales and offsets in bfloat16"

    def supports(self, problem: Problem) -> str | None:
        """4 bits and groups of a few sizes."""
        if (reason := super().supports(problem)) is not None:
            return reason
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


# ---- packages that may be installed ----


class Gemlite(WeightOnly):
    """Triton kernels of gemlite; they tune themselves at the first call of a shape, which can take long."""

    name, what = "gemlite", "gemlite A16Wn: the same codes, scales and zeros in bfloat16"

    def supports(self, problem: Problem) -> str | None:
        """Whole groups of codes that divide a word."""
        if (reason := super().supports(problem)) is not None:
            return reason
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
        # partial sums are added up in bfloat16, by atomics
        return Prepared(layer, weight, stored, tolerance=2.0**-4)


class BitsAndBytes(WeightOnly):
    """NF4 of bitsandbytes."""

    name, what = "bitsandbytes", "bitsandbytes.matmul_4bit: NF4, float32 scales"

    def supports(self, problem: Problem) -> str | None:
        """4 bits in blocks of a few sizes."""
        if (reason := super().supports(problem)) is not None:
            return reason
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


class TorchAO(WeightOnly):
    """Weight-only configurations of torchao."""

    name, what = "torchao", "torchao weight-only: int8 per row, or int4 tile-packed (tinygemm with its own scales)"

    def supports(self, problem: Problem) -> str | None:
        """int8 per row, int4 in groups."""
        if (reason := super().supports(problem)) is not None:
            return reason
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


_WEIGHT: tuple[Provider, ...] = (
    CuBLAS(), QKernels(), QKernelsDequantize(), Tinygemm(), Gemlite(), BitsAndBytes(), TorchAO(),
)  # fmt: skip
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (*_WEIGHT, *INT8_PROVIDERS)}
WEIGHT_PROVIDERS = tuple(provider.name for provider in _WEIGHT)  # of schemes that leave x as it is
BASELINE = "cublas"
