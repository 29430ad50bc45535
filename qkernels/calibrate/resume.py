"""A calibration that was cut off goes on from its last finished block.

A folder holds a native file for each finished block, and `state.safetensors`: how many there are, the hidden states
that the next block gets, and a digest of everything that the result depends on. Each file appears whole or not at all,
the state after the block that it counts.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibrate.batches import Call
from qkernels.formats import native
from qkernels.scheme import Scheme
from qkernels.tensor import QTensor

Hidden = list[Tensor | None]


class ResumeError(ValueError):
    """A folder holds another calibration, or is damaged; the message names it."""


def digest(
    model: nn.Module, plan: Mapping[str, tuple[nn.Linear, Scheme]], calls: Iterable[Call], *settings: object
) -> Tensor:
    """(32,) uint8: a hash of the model's tensors, the plan, the batches and the settings."""
    found = hashlib.blake2b(digest_size=32)
    for name, tensor in model.state_dict().items():
        _add(found, name, tensor)
    for call in calls:
        for key, value in [*enumerate(call.args), *call.kwargs.items()]:
            _add(found, str(key), value)
    _add(found, "plan", [(name, str(scheme)) for name, (_, scheme) in plan.items()])
    _add(found, "settings", settings)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def _add(found: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        found.update(f"{name} {value!r}".encode())


class Folder:
    """Where finished blocks are kept.

    Args:
        path: made if there is none.
        own: digest of the calibration that may go on here.

    Raises:
        ResumeError: it holds another calibration.
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], own: Tensor):
        self.path, self.digest = pathlib.Path(path), own
        self.path.mkdir(parents=True, exist_ok=True)

    def load(self, batches: int, device: torch.device) -> tuple[int, dict[str, QTensor], Hidden, Hidden] | None:
        """(finished blocks, their weights, hidden states of the original, of the quantized model), or None."""
        state_path = self.path / "state.safetensors"
        if not state_path.exists():
            return None
        state = native.read(state_path, device)
        if not torch.equal(_tensor(state, "digest", state_path).cpu(), self.digest):
            raise ResumeError(
                f"{self.path} holds a calibration of another model, with other schemes, batches or settings; "
                "choose another folder, or remove this one"
            )
        count = int(_tensor(state, "blocks", state_path))
        weights: dict[str, QTensor] = {}
        for block in range(count):
            path = self._block(block)
            if not path.exists():
                raise ResumeError(f"{path} is missing; remove {self.path} to begin again")
            weights.update({n: q for n, q in native.read(path, device).items() if isinstance(q, QTensor)})
        original, quantized = ([state.get(f"{kind}.{i}") for i in range(batches)] for kind in ("original", "quantized"))
        return count, weights, original, quantized  # type: ignore[return-value]

    def save(self, block: int, weights: Mapping[str, QTensor], original: Hidden, quantized: Hidden) -> None:
        """Keep a finished block, and what the next one gets."""
        native.write(self._block(block), weights)
        state = {"digest": self.digest, "blocks": torch.tensor(block + 1)}
        for kind, states in (("original", original), ("quantized", quantized)):
            state |= {f"{kind}.{i}": hidden for i, hidden in enumerate(states) if hidden is not None}
        native.write(self.path / "state.safetensors", state)

    def _block(self, index: int) -> pathlib.Path:
        return self.path / f"block-{index:04d}.safetensors"


def _tensor(state: Mapping[str, Any], name: str, path: pathlib.Path) -> Tensor:
    if not isinstance(found := state.get(name), Tensor):
        raise ResumeError(f"{path} holds no {name}: it is not the state of a calibration")
    return found
