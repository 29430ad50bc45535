"""Teach Triton's interpreter bfloat16 and inline PTX, so that every path of a kernel can be proved without a GPU.

As shipped (3.6 to 3.9) the interpreter keeps bfloat16 as raw uint16: `tl.dot`, arithmetic and integer casts then return
garbage without a word, and float32 to bfloat16 truncates. Inline assembly raises, fused multiply-adds round twice, and
reducing by a function of one's own takes one element at a time. Here bfloat16 goes through float32 with
round-to-nearest-even, the few PTX instructions that qkernels uses are carried out as the PTX ISA defines them,
multiply-adds round once, and reductions take whole arrays. A load or a store outside of the tensors of a launch raises,
as it does under a memory checker on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
    _get_np_dtype,
)

Array = npt.NDArray[Any]


def install() -> None:
    """Patch the interpreter; once per process."""
    original_cast = InterpreterBuilder.cast_impl
    original_binary = InterpreterBuilder.binary_op
    original_dot = InterpreterBuilder.create_dot

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return original_cast(self, source, target)
        data = bf16_to_f32(source.data) if source.dtype.scalar == tl.bfloat16 else source.data
        if target.scalar == tl.bfloat16:
            return TensorHandle(f32_to_bf16(data.astype(np.float32)), tl.bfloat16)
        return TensorHandle(data.astype(_get_np_dtype(target)), target.scalar)

    def binary(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar):
            return original_binary(self, left, right, op)
        result = op(bf16_to_f32(left.data), bf16_to_f32(right.data))
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(f32_to_bf16(result), tl.bfloat16)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(bf16_to_f32(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return original_dot(self, a, b, c, *rest)

    def fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        return cast(self, source, target)

    def get_bf16(self: Any, value: float) -> TensorHandle:
        return TensorHandle(f32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        assert z.dtype.scalar == tl.float32, "only float32 is used"
        return TensorHandle(fma_f32(x.data, y.data, z.data), tl.float32)

    original_reduce = ReduceOps.generic_reduce

    def reduce(self: Any, inputs: tuple[Any, ...]) -> Any:
        """By halves, as a GPU does, where a power of two is reduced."""
        if len(inputs) > 1 or self.axis is None or self.keep_dims:
            return original_reduce(self, inputs)
        (value,) = inputs
        data, size = np.moveaxis(value.handle.data, self.axis, 0), value.shape[self.axis]
        while (size := size // 2) > 0:
            data = self.combine_fn.fn(*(self.to_tensor(half, value.dtype) for half in (data[:size], data[size:])))
            data = data.handle.data
        return [self.to_tensor(data[0], value.dtype)]

    original_run = GridExecutor.__call__
    original_load, original_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    memory = _Memory([])  # one launch at a time

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal memory
        memory = _Memory(arg for arg in args if isinstance(arg, Tensor))
        with np.errstate(all="ignore"):  # a GPU does not warn of overflow or NaN either
            original_run(self, *args, **kwargs)

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        memory.check(pointers, mask, "load")
        return original_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        memory.check(pointers, mask, "store")
        return original_store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = load
    InterpreterBuilder.create_masked_store = store
    GridExecutor.__call__ = run
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.get_bf16 = get_bf16
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.create_fma = fma
    InterpreterBuilder.create_inline_asm = _inline_asm
    ReduceOps.generic_reduce = reduce


class _Memory:
    """The bytes that tensors lie in, from their first element to their last."""

    def __init__(self, tensors: Iterable[Tensor]):
        spans: list[list[int]] = []
        for start, end in sorted(map(_span, (t for t in tensors if t.numel()))):
            if spans and start < spans[-1][1]:  # views of one tensor
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
        self.starts, self.ends = np.array(spans, np.int64).reshape(-1, 2).T

    def check(self, pointers: TensorHandle, mask: TensorHandle, what: str) -> None:
        """Raise IndexError if one that the mask lets through points elsewhere."""
        used = np.broadcast_to(mask.data, pointers.data.shape) != 0
        first = pointers.data[used].astype(np.int64)
        last = first + _get_np_dtype(pointers.get_element_ty()).itemsize
        place = np.searchsorted(self.starts, first, "right") - 1
        outside = (place < 0) | (last > self.ends[place])
        if outside.any():
            raise IndexError(f"{what}: {outside.sum()} of {first.size} pointers outside of the tensors of the launch")


def _span(t: Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + extent * t.element_size()


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """Bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def fma_f32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32, rounded once: the sum is rounded to odd in float64, which has bits to spare."""
    product = x.astype(np.float64) * y.astype(np.float64)  # exact
    z = z.astype(np.float64)
    total = np.asarray(product + z)
    part = total - product
    missing = (product - (total - part)) + (z - part)  # exact, if finite: product + z = total + missing
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (missing != 0) & (bits & 1 == 0)
    step = np.where((missing > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact, step, 0)).view(np.float64).astype(np.float32)


class _Results:
    """What the front end asks of an inline_asm operation."""

    def __init__(self, handles: list[TensorHandle]):
        self.handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def _inline_asm(
    self: Any, asm: str, constraints: str, values: list[TensorHandle], types: list[Any], is_pure: bool, pack: int
) -> _Results:
    """Each run of `pack` neighbouring elements is one invocation; narrow ones share registers, the first lowest."""
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    registers: list[Array] = []
    for value in values:
        data = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1)
        registers += list(data.view(np.uint32).reshape(-1, pack * data.itemsize // 4).T)
    dtypes = [_get_np_dtype(t) for t in types]
    counts = [pack * dtype.itemsize // 4 for dtype in dtypes]
    assert len(constraints.split(",")) == sum(counts) + len(registers), "constraints do not match the operands"
    outputs = run_ptx(asm, sum(counts), registers)
    handles = []
    for dtype, type_, count in zip(dtypes, types, counts, strict=True):
        mine, outputs = outputs[:count], outputs[count:]
        data = np.ascontiguousarray(np.stack(mine, axis=-1)).reshape(-1).view(dtype)
        handles.append(TensorHandle(data.reshape(shape), type_.scalar))
    return _Results(handles)


def run_ptx(asm: str, output_count: int, inputs: list[Array]) -> list[Array]:
    """Run straight-line PTX over arrays of 32-bit registers; $0.. are the outputs, then the inputs."""
    size = inputs[0].size
    registers: dict[str, Array] = {f"${output_count + i}": value for i, value in enumerate(inputs)}

    def read(operand: str) -> Array:
        if operand in registers:
            return registers[operand]
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(size, number, np.uint32)

    for line in asm.replace("{", "").replace("}", "").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, operands = line.split(maxsplit=1)
        target, *sources = re.split(r",\s*", operands)
        registers[target] = _INSTRUCTIONS[name](*map(read, sources)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(output_count)]


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    pool = [(word >> np.uint32(8 * i)) & 0xFF for word in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        choice = (int(selector[0]) >> (4 * i)) & 0xF
        assert choice < 8, "sign replication is not used"
        result |= pool[choice] << np.uint32(8 * i)
    return result


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _halves(word: Array) -> tuple[Array, Array]:
    return (word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)


def _join(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def _add_f16x2(a: Array, b: Array) -> Array:
    pairs = zip(_halves(a), _halves(b), strict=True)
    return _join(*((x.view(np.float16) + y.view(np.float16)).view(np.uint16) for x, y in pairs))


def _fma_f16x2(a: Array, b: Array, c: Array) -> Array:
    def fma(x: Array, y: Array, z: Array) -> Array:  # in float64 the product is exact, and here the sum too
        return (x.view(np.float16).astype(np.float64) * y.view(np.float16) + z.view(np.float16)).astype(np.float16)

    return _join(*(fma(*parts).view(np.uint16) for parts in zip(_halves(a), _halves(b), _halves(c), strict=True)))


def _fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    def fma(x: Array, y: Array, z: Array) -> Array:
        exact = bf16_to_f32(x).astype(np.float64) * bf16_to_f32(y) + bf16_to_f32(z)
        return f32_to_bf16(exact.astype(np.float32))

    return _join(*(fma(*parts) for parts in zip(_halves(a), _halves(b), _halves(c), strict=True)))


_INSTRUCTIONS = {
    "mov.b32": lambda a: a.copy(),
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "add.f16x2": _add_f16x2,
    "fma.rn.f16x2": _fma_f16x2,
    "fma.rn.bf16x2": _fma_bf16x2,
    "add.f32": lambda a, b: (a.view(np.float32) + b.view(np.float32)).view(np.uint32),
}
