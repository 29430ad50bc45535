"""Two processes that a test can run functions in, with a gloo process group between them."""

from __future__ import annotations

import datetime
import multiprocessing.connection
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
TIMEOUT = 60  # seconds, on a machine that has much else to do


class Processes:
    """Started once, because importing takes seconds, and again after an error, which may leave the other one waiting.

    Args:
        folder: an empty one, where they meet.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.meetings = folder, 0
        self.workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(*arguments) gives in each process; of an error there, RuntimeError with its traceback.

        The function is one of a module's, so that its name is enough; torch.distributed is initialized.
        """
        if not self.workers:
            self._start()
        deadline = time.monotonic() + TIMEOUT
        try:
            for _, pipe in self.workers:
                pipe.send((function, arguments))
            return [self._answer(rank, deadline) for rank in range(RANKS)]
        except BaseException:
            self.stop()
            raise

    def _answer(self, rank: int, deadline: float) -> Any:
        pipe = self.workers[rank][1]
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"process {rank} has not answered in {TIMEOUT} seconds")
        error, value = pipe.recv()
        if error is not None:
            raise RuntimeError(f"process {rank}:\n{error}")
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.meetings += 1
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, str(self.folder / f"meeting{self.meetings}"), theirs), daemon=True
            )
            worker.start()
            theirs.close()  # so that a process that dies ends the pipe
            self.workers.append((worker, ours))

    def stop(self) -> None:
        """End the processes."""
        for worker, pipe in self.workers:
            worker.kill()
            worker.join()
            pipe.close()
        self.workers = []


def _serve(rank: int, meeting: str, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    while True:
        function, arguments = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((None, function(*arguments)))
        except BaseException:  # as those of pytest are
            pipe.send((traceback.format_exc(), None))
