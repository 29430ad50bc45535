"""What the choice of a configuration knows of a GPU: its name, generation and size, and rates of its generation."""

from __future__ import annotations

import dataclasses
import functools
import re

import torch


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of a GPU, by its vendor's datasheet.

    Attributes:
        bandwidth: of its memory, bytes/s.
        issue: instructions/s of single threads, 128 in a cycle of each multiprocessor.
        tensor: dense 16-bit products with float32 sums, FLOP/s.
        fused: share of `tensor` that matmul.py can hope for, whose mma.sync instructions are native up to sm_89.
    """

    bandwidth: float
    issue: float
    tensor: float
    fused: float = 0.7


# By compute capability; where a generation has several GPUs, the one that most people have.
_RATES = {
    80: Rates(2.04e12, 19.5e12, 312e12),  # A100 80GB
    86: Rates(0.94e12, 17.8e12, 71e12),  # RTX 3090
    89: Rates(1.01e12, 41.3e12, 165e12),  # RTX 4090
    90: Rates(4.8e12, 33.5e12, 990e12, fused=0.5),  # H200
    100: Rates(8.0e12, 35.0e12, 2250e12, fused=0.25),  # B200
    120: Rates(1.79e12, 52.4e12, 210e12),  # RTX 5090
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as far as choices go.

    Attributes:
        name: as the driver gives it, such as "NVIDIA H200".
        capability: such as 90.
        multiprocessors: how many.
    """

    name: str
    capability: int
    multiprocessors: int

    @property
    def rates(self) -> Rates:
        """Of its generation; of the newest one below, where it is unknown."""
        known = [capability for capability in _RATES if capability <= self.capability]
        return _RATES[max(known, default=min(_RATES))]

    @property
    def slug(self) -> str:
        """The name as a file name: "nvidia-h200"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


# What the kernels are written for first; also what is assumed where there is no GPU, in an interpreter.
H200 = Device("NVIDIA H200", 90, 132)


@functools.cache
def device_of(index: int) -> Device:
    """The GPU of a tensor, by tensor.get_device(); H200 for the CPU (-1)."""
    if index < 0:
        return H200
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)
