"""Who multiplies codes of x by codes of w: this package, its parts, torch, and packages that may be installed.

The schemes are those with 8-bit activations, each token with a scale of its own. Peers round those scales, and values
in the middle of two codes, their own way: see HIDDEN_CODES.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.products import (
    DTYPE,
    TOLERANCE,
    Prepared,
    Problem,
    Provider,
    Work,
    float_weight,
    missing,
    product_work,
    quantized,
)
from qkernels import ops, ops_int8, packing, reference_int8
from qkernels.tensor import QTensor, quantize

# Sums of codes are exact, and what follows is a few operations in float32.
EXACT = 2.0**-12
# Of a provider that does not show its codes of x, the oracle's are compared with. Both round the same x, each to within
# half a step of absmax / 127 or a little less: their difference has a variance of at most step^2 / 6. The step is at
# most 6 / 127 of the root mean square of our x, which is normal, and 6 deviations are allowed.
HIDDEN_CODES = TOLERANCE + 6 * (6 / 127) / math.sqrt(6)

Quantized = tuple[Tensor, Tensor, "Tensor | None"]  # codes, scale and zero, as ops have them


def refused_by_int_mm(problem: Problem) -> str | None:
    """Why torch._int_mm does not take such operands on a GPU; None if it does. Nothing is padded for its sake."""
    if problem.M <= 16:
        return "torch._int_mm: more than 16 tokens only"
    return "torch._int_mm: K and N must be multiples of 8" if problem.K % 8 or problem.N % 8 else None


class Quantizing(Provider):
    """One that does what the scheme asks for: quantizes each token and multiplies codes."""

    def supports(self, problem: Problem) -> str | None:
        """Schemes with quantized activations."""
        return None if problem.parsed.activations is not None else "8-bit activations only"

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Of the scheme."""
        return product_work(problem.M, problem.N, problem.K, problem.parsed, weight_bytes)


class PerRow(Quantizing):
    """Likewise, for rows of 8-bit codes: what most packages have."""

    def supports(self, problem: Problem) -> str | None:
        """w8cs-a8s, which is w8a8."""
        if (reason := super().supports(problem)) is not None:
            return reason
        scheme, how = problem.parsed, problem.parsed.activations
        assert how is not None
        per_row = (scheme.bits, scheme.group_size, scheme.value_map) == (8, "channel", "symmetric")
        return None if per_row and how.symmetric else "symmetric 8-bit weights by channel, symmetric activations, only"


# ---- parts of this package's product ----


class QKernelsCodes(Quantizing):
    """The product alone."""

    name, what = "qkernels-codes", "a part: qkernels' product of codes; quantizing x is not timed"
    other = True

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q, scheme = quantize(float_weight(problem, seed, device), problem.scheme), problem.scheme

        def seen(operand: Quantized) -> Tensor:
            codes, scale, zero = operand
            code = packing.unpack_activations(codes, q.scheme.bits, q.in_features)
            return reference_int8.dequantize_activations(code, scale, zero)

        return Prepared(
            functools.partial(_multiply, q=q),
            q.dequantize,
            q.nbytes,
            enter=lambda x: ops_int8.quantize_activations(x, scheme),
            seen=seen,
            tolerance=EXACT,
        )

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Codes are read, y is written."""
        M, N, K = problem.M, problem.N, problem.K
        moved = weight_bytes + floors.codes_bytes(M, K, problem.parsed) + 2 * M * N
        return Work(moved, 0, 2 * M * N * K)


class QKernelsQuantize(Quantizing):
    """Quantizing x alone; the product of its codes shows whether it is right."""

    name, what = "qkernels-quantize", "a part: qkernels.quantize_activations; the product is not timed"
    other = True

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        q, scheme = quantize(float_weight(problem, seed, device), problem.scheme), problem.scheme
        return Prepared(
            lambda x: ops_int8.quantize_activations(x, scheme),
            q.dequantize,
            q.nbytes,
            leave=lambda result, x: _multiply(result, q),
            seen=lambda x: quantized(x, q.scheme),
            tolerance=EXACT,
        )

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """x is read, codes are written; with few tokens a cache holds both."""
        moved = 2 * problem.M * problem.K + floors.codes_bytes(problem.M, problem.K, problem.parsed)
        return Work(moved, 0, cached_bytes=moved)


def _multiply(operand: Quantized, q: QTensor) -> Tensor:
    return ops_int8.matmul(*operand, q.packed, q.scale, q.zero, None, str(q.scheme), q.in_features, DTYPE)


class QKernelsWeightOnly(Quantizing):
    """What quantizing x is to beat, with the same weights."""

    name, what = "qkernels-a16", "another function: qkernels.ops.matmul with the same weight, x not quantized"
    other = True

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Quantize."""
        scheme = str(problem.parsed.weight_only)
        q = quantize(float_weight(problem, seed, device), scheme)
        return Prepared(
            lambda x: ops.matmul(x, q.packed, q.scale, q.zero, None, scheme, q.in_features), q.dequantize, q.nbytes
        )

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Of the weights' scheme."""
        return Provider.work(self, problem, weight_bytes)


# ---- torch ----


class IntMM(Provider):
    """A reference rate, not a peer."""

    name, what = "int_mm", "a part: torch._int_mm with 8-bit rows; quantizing x and scaling y is not timed"
    other = True

    def supports(self, problem: Problem) -> str | None:
        """A rate to compare with, where codes of x or rows of 8-bit codes are in the scheme."""
        if problem.parsed.activations is None and str(problem.parsed).split("-")[0] != "w8cs":
            return "w8cs, and 8-bit activations, only"
        return refused_by_int_mm(problem)

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Scales per row of w and per token."""
        code, scale = rows_to_int8(float_weight(problem, seed, device))

        def leave(result: Tensor, operand: tuple[Tensor, Tensor]) -> Tensor:
            return (result.float() * operand[1] * scale.T).to(DTYPE)

        return Prepared(
            lambda operand: torch._int_mm(operand[0], code.T),
            lambda: code.float() * scale,
            code.nbytes + scale.nbytes,
            enter=rows_to_int8,
            leave=leave,
            seen=lambda operand: operand[0].float() * operand[1],
        )

    def work(self, problem: Problem, weight_bytes: int) -> Work:
        """Codes of x are bytes, y is int32."""
        M, N, K = problem.M, problem.N, problem.K
        return Work(N * K + M * K + 4 * M * N, 0, 2 * M * N * K)


def rows_to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales (rows, 1) float32) of symmetric rows, as one writes it in torch."""
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(x: Tensor, code_t: Tensor, scale_t: Tensor) -> Tensor:
    """y (M, N) of x (M, K), codes (K, N) and scales (1, N) of w: torch._int_mm with what has to be around it."""
    code, scale = rows_to_int8(x)
    return (torch._int_mm(code, code_t).float() * scale * scale_t).to(x.dtype)


class IntMMDynamic(PerRow):
    """How one does it with torch alone."""

    name, what = "int_mm-dynamic", "torch._int_mm, x quantized and y scaled in plain torch"

    def supports(self, problem: Problem) -> str | None:
        """What torch._int_mm takes."""
        return super().supports(problem) or refused_by_int_mm(problem)

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Scales per row of w."""
        code, scale = rows_to_int8(float_weight(problem, seed, device))
        function, code_t, scale_t = self.function(), code.T, scale.T.contiguous()
        return Prepared(
            lambda x: function(x, code_t, scale_t),
            lambda: code.float() * scale,
            code.nbytes + scale.nbytes,
            seen=lambda x: quantized(x, problem.parsed),
            tolerance=HIDDEN_CODES,
        )

    def function(self) -> Any:
        """What is called."""
        return int8_linear


class IntMMCompiled(IntMMDynamic):
    """Likewise, under torch.compile."""

    name, what = "int_mm-compiled", "torch._int_mm, x quantized and y scaled in torch under torch.compile"

    def function(self) -> Any:
        """One for all shapes, of which each is compiled on its own."""
        return compiled(int8_linear)


@functools.cache
def compiled(function: Any) -> Any:
    """Under torch.compile, however many shapes it meets: past its limit torch would go on uncompiled."""
    import torch._dynamo.config as config

    config.recompile_limit = config.accumulated_recompile_limit = 1 << 20
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- packages that may be installed ----


class TorchAOInt8(PerRow):
    """torchao's own, on a Linear."""

    name, what = "torchao-int8", "torchao Int8DynamicActivationInt8WeightConfig"

    def supports(self, problem: Problem) -> str | None:
        """What torch._int_mm takes: for other shapes torchao multiplies in float32, or on the CPU."""
        return super().supports(problem) or refused_by_int_mm(problem) or missing("torchao.quantization")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """Through quantize_."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = torch.nn.Linear(problem.K, problem.N, bias=False, device="meta", dtype=DTYPE)
        linear.weight = torch.nn.Parameter(float_weight(problem, seed, device), requires_grad=False)
        quantize_(linear, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        weight: Any = linear.weight
        return Prepared(
            self.call(linear),
            lambda: weight.dequantize(torch.float32),
            weight.qdata.nbytes + weight.scale.nbytes,
            seen=lambda x: quantized(x, problem.parsed),
            tolerance=HIDDEN_CODES,
        )

    def call(self, linear: torch.nn.Linear) -> Any:
        """What is called with x."""
        return linear


class TorchAOCompiled(TorchAOInt8):
    """Likewise, under torch.compile, as torchao is meant to be used."""

    name, what = "torchao-compiled", "torchao Int8DynamicActivationInt8WeightConfig under torch.compile"

    def call(self, linear: torch.nn.Linear) -> Any:
        """One function for all weights."""
        function, weight = compiled(_linear), linear.weight
        return lambda x: function(x, weight)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


class GemliteInt8(PerRow):
    """Triton kernels of gemlite; they tune themselves at the first call of a shape, which can take long."""

    name, what = "gemlite-int8", "gemlite A8W8 int8, dynamic"

    def supports(self, problem: Problem) -> str | None:
        """Rows of 8-bit codes: beside 4-bit groups gemlite multiplies float8, not int8."""
        if (reason := super().supports(problem)) is not None:
            return reason
        return "K must be a multiple of 32" if problem.K % 32 else missing("gemlite")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """The same codes as rows_to_int8, and its float32 scales."""
        from gemlite.helper import A8W8_int8_dynamic

        code, scale = rows_to_int8(float_weight(problem, seed, device))
        layer = A8W8_int8_dynamic(device=device, dtype=DTYPE).from_weights(code, scales=scale)
        return Prepared(
            layer,
            lambda: code.float() * scale,
            layer.W_q.nbytes + layer.scales.nbytes,
            seen=lambda x: quantized(x, problem.parsed),
            tolerance=HIDDEN_CODES,
        )


class LLMInt8(PerRow):
    """bitsandbytes' 8-bit product."""

    name, what = "llm.int8", "bitsandbytes LLM.int8, threshold 0: x is cast to float16, then quantized"
    threshold = 0.0

    def supports(self, problem: Problem) -> str | None:
        """Any shape whose K is a multiple of 4: for others it multiplies in float32."""
        if (reason := super().supports(problem)) is not None:
            return reason
        return "K must be a multiple of 4" if problem.K % 4 else missing("bitsandbytes")

    def prepare(self, problem: Problem, seed: int, device: str = "cuda") -> Prepared:
        """As its Linear8bitLt does on its way to a GPU."""
        import bitsandbytes

        # Says at every call that x is cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(float_weight(problem, seed, device).half())
        state = bitsandbytes.MatmulLtState(CB=codes, SCB=largest)
        state.has_fp16_weights = state.is_training = False
        state.threshold = self.threshold
        return Prepared(
            lambda x: bitsandbytes.matmul(x, codes, state=state),
            lambda: codes.float() * (largest.float() / 127)[:, None],
            codes.nbytes + largest.nbytes,
            seen=self.seen,
            tolerance=HIDDEN_CODES,
        )

    def seen(self, x: Tensor) -> Tensor:
        """Columns with a value of the threshold or more as they are, others as codes."""
        values = x.float()
        outlier = values.abs() >= (self.threshold or math.inf)
        code, scale = rows_to_int8(values.masked_fill(outlier, 0.0))
        return torch.where(outlier.any(0), values, code.float() * scale)


class LLMInt8Outliers(LLMInt8):
    """Likewise, as it is by default: it asks the GPU at every call whether there are outliers."""

    name, what = "llm.int8-6", "bitsandbytes LLM.int8, threshold 6: columns of x with larger values in 16 bits"
    threshold = 6.0
    captured = False


INT8_PROVIDERS: tuple[Provider, ...] = (
    IntMM(), QKernelsCodes(), QKernelsQuantize(), QKernelsWeightOnly(), IntMMDynamic(), IntMMCompiled(), TorchAOInt8(),
    TorchAOCompiled(), GemliteInt8(), LLMInt8(), LLMInt8Outliers(),
)  # fmt: skip
