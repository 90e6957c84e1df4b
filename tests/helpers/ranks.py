"""Several processes for a test: started once, joined anew into a process group for each call."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

MOST = 4
CALLS = 30
"""Calls after which processes are new: torch leaves threads of each group behind."""
WAIT = 300
"""Seconds that a collective, or a whole call, may take before the test fails."""


def serve(rank: int, calls: Connection) -> None:
    """Do what is asked, each time in the environment of the start."""
    torch.set_num_threads(1)
    environment = dict(os.environ)
    while True:
        function, args, count, store = calls.recv()
        os.environ.clear()
        os.environ.update(environment)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=WAIT),
            )
            try:
                answer = True, function(*args)
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = False, traceback.format_exc()
        calls.send(answer)


class Ranks:
    """A pool of processes; `run` lets the first of them call a function as ranks of one group."""

    def __init__(self) -> None:
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        self._calls = 0

    def start(self) -> None:
        """Start the processes, unless they are there and not too old."""
        self._calls += 1
        if self._ends and self._calls % CALLS:
            return
        self.close()
        context = multiprocessing.get_context("spawn")
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what each rank returns; raise what the first that failed has raised."""
        self.start()
        with tempfile.TemporaryDirectory() as folder:
            ends = self._ends[:count]
            for end in ends:
                end.send((function, args, count, os.path.join(folder, "store")))
            answers: dict[Connection, Any] = {}
            while len(answers) < count:
                ready = wait([end for end in ends if end not in answers], WAIT)
                for end in ready:
                    good, answers[end] = end.recv()
                    if not good:
                        self.close()
                        raise RuntimeError(f"rank {ends.index(end)}:\n{answers[end]}")
                if not ready:
                    late = [rank for rank, end in enumerate(ends) if end not in answers]
                    self.close()
                    raise TimeoutError(f"ranks {late} of {count} have not answered")
        return [answers[end] for end in ends]

    def close(self) -> None:
        """End the processes: those that wait for one that failed would wait for long."""
        for process in self._processes:
            process.kill()
            process.join()
        self._ends, self._processes = [], []
