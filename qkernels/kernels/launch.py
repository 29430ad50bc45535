"""What every launch needs to know about where it runs."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def program_of(N, BLOCK_N: tl.constexpr):
    """(block of N, block of the other dimension) of this program, in a one-dimensional grid, blocks of N first.

    A second dimension of a grid ends at 65535.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    return program % blocks, program // blocks


@triton.jit
def short_program_of(N, BLOCK_N: tl.constexpr):
    """program_of, by an unsigned division: half as many instructions. (Not for matmul: its main loop grows by 2 %.)"""
    blocks = tl.cdiv(N, BLOCK_N).to(tl.uint32)
    program = tl.program_id(0).to(tl.uint32)
    return (program % blocks).to(tl.int32), (program // blocks).to(tl.int32)


@functools.cache
def has_ptx() -> bool:
    """Whether kernels are compiled for NVIDIA GPUs, so that inline PTX can be used."""
    return not triton.knobs.runtime.interpret and torch.version.hip is None


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def group_strides(scale: Tensor) -> tuple[int, int]:
    """(group stride, row stride) of scales in elements; a scale that all rows share has row stride 0."""
    return scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0
