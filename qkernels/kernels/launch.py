"""What every launch needs to know about where it runs."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver as _driver


@triton.jit
def program_of(N, BLOCK_N: tl.constexpr):
    """(block of N, block of the other dimension) of this program, in a one-dimensional grid, blocks of N first.

    A second dimension of a grid ends at 65535. Unsigned, because that divides in half as many instructions.
    """
    blocks = tl.cdiv(N, BLOCK_N).to(tl.uint32)
    program = tl.program_id(0).to(tl.uint32)
    return (program % blocks).to(tl.int32), (program // blocks).to(tl.int32)


@functools.cache
def has_ptx() -> bool:
    """Whether kernels are compiled for NVIDIA GPUs, so that inline PTX can be used."""
    return not triton.knobs.runtime.interpret and torch.version.hip is None


class Launcher:
    """Launches a kernel; once it is compiled, without Triton's own processing of arguments, which takes far longer.

    Which compiled kernel serves a call depends on everything that Triton specializes on: the GPU, dtypes, constants
    and options, the numbers (1, multiples of 16, more than 32 bits), and whether pointers are multiples of 16. Numbers
    are kept as they are: a few more entries, less to work out. Calls with misaligned pointers are left to Triton.

    One dictionary, read and written in single steps: safe in threads. Work is queued on the current stream of the
    tensors' GPU. Nothing is allocated or synchronized, so a launch can be captured in a CUDA graph.

    Args:
        kernel: a function under triton.jit, whose parameters are tensors, then numbers, then constants.
        constants: names of its constants, in order.
        options: names of the compile options that a launch gives.
    """

    def __init__(self, kernel: Any, constants: Sequence[str], options: Sequence[str] = ("num_warps",)):
        self.kernel = kernel
        self.names = (*constants, *options)
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        options: tuple[Any, ...],
    ) -> None:
        """Launch so many programs; constants and options in the order of their names."""
        if _INTERPRETED:
            self.kernel[(programs,)](*tensors, *numbers, **dict(zip(self.names, constants + options)))
            return
        driver = _driver.active
        device = tensors[0].get_device()
        if tensors[0].is_cuda and driver.get_current_device() != device:
            with torch.cuda.device(device):
                self(programs, tensors, numbers, constants, options)
            return
        pointers = [t.data_ptr() for t in tensors]
        either = 0
        for pointer in pointers:
            either |= pointer
        key = (driver.get_current_device(), numbers, constants, options, *[t.dtype for t in tensors])
        compiled = self.compiled.get(key)
        if compiled is None or either % 16 or _enter_hooks.calls or _exit_hooks.calls:
            compiled = self.kernel[(programs,)](*tensors, *numbers, **dict(zip(self.names, constants + options)))
            if not either % 16:
                if len(self.compiled) >= _MOST_COMPILED:
                    self.compiled.clear()
                self.compiled[key] = compiled
            return
        compiled.run(
            programs, 1, 1, driver.get_current_stream(key[0]), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *numbers, *constants,
        )  # fmt: skip


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_INTERPRETED = triton.knobs.runtime.interpret
_enter_hooks = triton.knobs.runtime.launch_enter_hook  # of profilers, which want Triton's own launch
_exit_hooks = triton.knobs.runtime.launch_exit_hook
_MOST_COMPILED = 4096  # entries of a Launcher: every other number of tokens is one


def group_strides(scale: Tensor) -> tuple[int, int]:
    """(group stride, row stride) of scales in elements; a scale that all rows share has row stride 0."""
    return scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0
