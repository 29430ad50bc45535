"""What every launch needs to know about where it runs."""

import functools
import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver as _driver


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


class Launch:
    """One way to launch a kernel: with these numbers, constants and options, on tensors of always the same dtypes.

    Once it is compiled for a GPU, it goes without Triton's own processing of arguments, which takes far longer. All
    that Triton specializes on is fixed here but the alignment of pointers: calls with a pointer that is no multiple of
    16 are left to Triton. Work is queued on the current stream of the tensors' GPU; nothing is allocated or
    synchronized, so a launch can be captured in a CUDA graph. Safe in threads: its one dictionary is read and written
    in single steps.

    Args:
        kernel: a function under triton.jit, whose parameters are tensors, then numbers, then constants.
        programs: how many.
        numbers: in the kernel's order.
        constants: by name, in the kernel's order.
        options: such as num_warps, by name.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[float, ...], constants: dict[str, Any], options: dict[str, Any]
    ):
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.named = constants | options
        self.rest = (*numbers, *constants.values())
        self.compiled: dict[int, Any] = {}  # by GPU

    def __call__(self, *tensors: Tensor) -> None:
        """Launch; tensors on one GPU, in the kernel's order."""
        if _INTERPRETED:
            self.kernel[(self.programs,)](*tensors, *self.numbers, **self.named)
            return
        driver = _driver.active
        device = driver.get_current_device()
        first = tensors[0]
        if first.is_cuda and first.get_device() != device:  # Triton launches on the current device
            with torch.cuda.device(first.device):
                self(*tensors)
            return
        pointers = [t.data_ptr() for t in tensors]
        misaligned = functools.reduce(operator.or_, pointers) & 15
        compiled = self.compiled.get(device)
        if compiled is None or misaligned or _enter_hooks.calls or _exit_hooks.calls:
            found = self.kernel[(self.programs,)](*tensors, *self.numbers, **self.named)
            if not misaligned:
                self.compiled[device] = found.run, found.function, found.packed_metadata
            return
        run, function, metadata = compiled
        stream = driver.get_current_stream(device)
        run(self.programs, 1, 1, stream, function, metadata, None, None, None, *pointers, *self.rest)


_INTERPRETED = triton.knobs.runtime.interpret
_enter_hooks = triton.knobs.runtime.launch_enter_hook  # of profilers, which want Triton's own launch
_exit_hooks = triton.knobs.runtime.launch_exit_hook


def token_stride(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from one token of x (..., K) to the next: contiguous, or 2-D with inner stride 1.

    Of more dimensions those of size 1 may have any stride, and x is contiguous all the same.
    """
    return stride[0] if len(shape) == 2 else shape[-1]


def group_strides(scale: Tensor) -> tuple[int, int]:
    """(group stride, row stride) of scales in elements; a scale that all rows share has row stride 0."""
    return scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0
