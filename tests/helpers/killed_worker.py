"""A run of two processes for torchrun, in which some are killed and all go on from a checkpoint.

    torchrun --nproc-per-node 2 --max-restarts 2 tests/helpers/killed_worker.py FOLDER

Each method trains a model of its own, a step of each after another, and all are saved together.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from helpers.parallel import Net, batch, loss_of, optimizer_of, wrapped

METHODS = ("galore-power-rotate", "dct", "fira-8bit", "fira-cut", "frugal", "apollo")
STEPS, EVERY = 12, 2
KILLS = {0: (1, 7, "dct"), 1: (0, 10, "saving")}
"""By the number of restarts: the rank that is killed, the step, and what it is about to do."""
Runs = dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]


def state_of(runs: Runs, options: StateDictOptions | None = None) -> dict[str, Any]:
    """Return weights and optimizer states by method."""
    return {method: list(get_state_dict(*run, options=options)) for method, run in runs.items()}


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint that is complete: its metadata are written last, and renamed."""
    found = sorted(folder.glob("*/.metadata"))
    return found[-1].parent if found else None


def train(folder: Path, life: int | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint on, and return all weights and states at the end.

    Args:
        folder: of the checkpoints.
        life: the number of restarts; None if nothing is to be killed.
    """

    def killed(step: int, what: str) -> None:
        if KILLS.get(-1 if life is None else life) == (dist.get_rank(), step, what):
            os.kill(os.getpid(), signal.SIGKILL)

    runs: Runs = {}
    for method in METHODS:
        model = wrapped(Net(), "fsdp")
        runs[method] = model, optimizer_of(model, method)
    first = 0
    if (saved := newest(folder)) is not None:
        parts = state_of(runs)
        dcp.load(parts, checkpoint_id=saved)
        for method, (model, optimizer) in runs.items():
            weights, state = parts[method]
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = int(saved.name)
    if life is not None:
        (folder / f"life-{life}-{dist.get_rank()}").write_text(str(first))
    for step in range(first + 1, STEPS + 1):
        for method, (model, optimizer) in runs.items():
            loss_of(model, batch(step, dist.get_rank(), dist.get_world_size())).backward()
            killed(step, method)
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            killed(step, "saving")
            dcp.save(state_of(runs), checkpoint_id=folder / f"{step:04d}")
    return state_of(runs, StateDictOptions(full_state_dict=True, cpu_offload=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    end = train(folder, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    if dist.get_rank() == 0:
        torch.save(end, folder / "end.pt")
    dist.destroy_process_group()
