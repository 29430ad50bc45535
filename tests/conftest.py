"""Where the tests run: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before any kernel is imported: Triton decides when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreter

    interpreter.install()

# 2 cores with one worker process each: more threads would only get in each other's way.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def device() -> str:
    """Where kernels run: "cuda", or "cpu" for the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"{item.name}: needs an NVIDIA GPU"))
