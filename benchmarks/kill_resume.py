"""Kill training again and again, resume it, and compare it bit for bit with a run left alone.

Each preset trains a small model with dropout, a schedule and shuffled data in processes that are
killed (SIGKILL) at random points: in a step, while a checkpoint is written, while one is read. The
next process resumes from the last checkpoint, until the run is done. Every loss that any of them
wrote to the log, the final weights and the final optimizer state must be those of a run that was
not killed. Rows go to results/kill_resume.csv; the exit status is 1 if anything differs.

Processes are forked from this one, which has imported torch and runs nothing itself, so that each
starts in milliseconds. One CPU core is enough; needs a system with fork.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch.optim imports at its first use: 2 s in every process otherwise
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRank,
    flatten_state,
    param_groups,
)

RESULTS = Path(__file__).parent / "results" / "kill_resume.csv"
RANK, GAP, SAVE_EVERY, VOCAB, WIDTH = 8, 7, 3, 128, 32
FIELDS = (
    "preset", "steps", "kill_points", "kills_hit", "while_saving", "while_starting",
    "steps_repeated", "max_difference", "identical", "seed", "torch",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """An optimizer with its settings, and the dtype of the weights."""

    optimizer: type[LowRank]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


SMALL = {"projector": "power", "state_dtype": "8bit", "stochastic_rounding": True}
PRESETS = {
    "galore": Preset(GaLoreAdamW),
    "dct": Preset(DCTAdamW, {"update_proj_gap": 1}),
    "fira": Preset(FiraAdamW),
    "frugal": Preset(FrugalAdamW),
    "apollo": Preset(ApolloAdamW),
    "galore-8bit-bf16": Preset(GaLoreAdamW, SMALL, torch.bfloat16),
}


class Model(nn.Module):
    """An embedding that is 8 bits large, two projected matrices, dropout, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.dropout(self.down(self.up(hidden).relu()))
        return self.head(self.norm(hidden))


def main(arguments: list[str] | None = None) -> int:
    """Run the presets, write the rows, show them; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated")
    parser.add_argument("--kills", type=int, default=20, help="points a preset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the points and of the training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the csv to write")
    args = parser.parse_args(arguments)
    names = args.presets.split(",")
    if unknown := [name for name in names if name not in PRESETS]:
        parser.error(f"unknown preset {unknown[0]!r}; choose among {', '.join(PRESETS)}")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(name, Path(folder), args.kills, args.steps, args.seed))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    show(rows)
    return 0 if all(row["identical"] == "yes" for row in rows) else 1


def examine(name: str, folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Train a preset alone and with kills; return the row that compares them."""
    alone, killed = folder / "alone", folder / "killed"
    alone.mkdir()
    killed.mkdir()
    started = time.monotonic()
    wait(fork(lambda: train(name, alone, steps, seed)), name)
    pace = (time.monotonic() - started) / steps
    rng = random.Random(seed)
    hits = {"step": 0, "saving": 0, "starting": 0}
    for step in sorted(rng.randrange(steps - 2 * SAVE_EVERY) for _ in range(kills)):
        place = kill_one(name, killed, steps, seed, step, rng.uniform(0, 3 * pace))
        if place is None:
            break
        hits[place] += 1
    wait(fork(lambda: train(name, killed, steps, seed)), name)
    wanted, found = losses(alone), losses(killed)
    if {step for step, _ in found} != set(range(steps)):
        raise RuntimeError(f"{name}: not every step of {steps} is in the log")
    truth = dict(wanted)
    worst = max(difference(loss, truth[step]) for step, loss in found)
    worst = max(worst, apart(final(alone), final(killed)))
    return {
        "preset": name,
        "steps": steps,
        "kill_points": kills,
        "kills_hit": sum(hits.values()),
        "while_saving": hits["saving"],
        "while_starting": hits["starting"],
        "steps_repeated": len(found) - steps,
        "max_difference": worst,
        "identical": "yes" if worst == 0 else "no",
        "seed": seed,
        "torch": torch.__version__,
    }


def fork(work: Callable[[], None]) -> int:
    """Start a process that does some work and ends; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int, name: str) -> None:
    """Wait for a process to end by itself; raise RuntimeError if it failed."""
    _, status = os.waitpid(pid, 0)
    check_ended(status, name)


def check_ended(status: int, name: str) -> None:
    """Raise RuntimeError unless a process came to its end."""
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{name}: a process that was not killed ended with status {status}")


def kill_one(name: str, folder: Path, steps: int, seed: int, step: int, delay: float) -> str | None:
    """Start a process and kill it `delay` seconds after the log shows a step.

    Returns:
        What it was doing: "saving", "starting" (nothing logged yet) or "step"; None if it was done.
    """
    before, unfinished = len(losses(folder)), written(folder / "checkpoint.tmp")
    pid = fork(lambda: train(name, folder, steps, seed))
    while max((number for number, _ in losses(folder)), default=-1) < step:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            check_ended(status, name)
            return None
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        check_ended(status, name)
        return None
    if written(folder / "checkpoint.tmp") not in (None, unfinished):
        return "saving"
    return "step" if len(losses(folder)) > before else "starting"


def written(path: Path) -> int | None:
    """Return when a file was last written, None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def train(name: str, folder: Path, steps: int, seed: int) -> None:
    """Train to the end from the last checkpoint, or from the start; log every loss."""
    preset, path = PRESETS[name], folder / "checkpoint.pt"
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    tokens = torch.arange(VOCAB).repeat_interleave(4).unsqueeze(1)
    tokens = torch.cat([(5**power * tokens + 7 * power) % VOCAB for power in range(9)], 1)
    model = Model().to(preset.dtype)
    settings = {"update_proj_gap": GAP, **preset.settings}
    groups = param_groups(model, rank=RANK, lr=1e-2, rest_lr=3e-3)
    optimizer = preset.optimizer(groups, seed=seed, **settings)
    scheduler = CosineAnnealingLR(optimizer, steps)
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["dropout"])
        order.set_state(saved["order"])
        done = saved["step"]
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(done, steps):
        batch = tokens[torch.randperm(len(tokens), generator=order)[:16]]
        out = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(out.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        os.write(log, f"{step} {loss.item().hex()}\n".encode())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            saved = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "dropout": torch.get_rng_state(),
                "order": order.get_state(),
            }
            torch.save(saved, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", path)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return the steps and losses of a log, in the order in which they were written."""
    if not (folder / "log").exists():
        return []
    whole_lines = (folder / "log").read_text().rpartition("\n")[0].splitlines()
    pairs = [line.split() for line in whole_lines]
    return [(int(step), float.fromhex(loss)) for step, loss in pairs]


def final(folder: Path) -> dict[str, Tensor]:
    """Return the weights and the optimizer state at the end, by name."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors, text = flatten_state({**saved["optimizer"], "param_groups": []})
    numbers = torch.tensor(list(text["state"].encode()))
    return {**saved["model"], **tensors, "numbers": numbers}


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors, 0 only if they are equal to the bit."""
    if left.keys() != right.keys():
        return math.inf
    worst = 0.0
    for name, value in left.items():
        if torch.equal(value, right[name]):
            continue
        if value.shape != right[name].shape:
            return math.inf
        gap = float((value.double() - right[name].double()).abs().max())
        worst = max(worst, gap if gap > 0 else math.inf)
    return worst


def difference(left: float, right: float) -> float:
    """Return the difference of two losses; infinity where one is not a number."""
    gap = abs(left - right)
    return math.inf if math.isnan(gap) else gap


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(title="killed and resumed, against a run left alone")
    for name in FIELDS[:-2]:
        left = name == "preset"
        table.add_column(name.replace("_", " "), justify="left" if left else "right", no_wrap=left)
    for row in rows:
        table.add_row(*(str(row[name]) for name in FIELDS[:-2]))
    Console(width=130).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
