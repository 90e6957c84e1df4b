"""The training that `kill_resume.py` kills, in two loops by hand.

All loops, those of `kill_frameworks.py` too, train the same small model with dropout, a cosine
schedule and shuffled data. They go on from the newest whole checkpoint in their folder, if there is
one, log the loss of every step, and save after every third, when its loss is in the log. Here the
checkpoint is one file, written beside the last and moved into place when it is whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    unflatten_state,
)

RANK, GAP, SAVE_EVERY, VOCAB, WIDTH, BATCH = 8, 7, 3, 128, 32, 16
LR, REST_LR = 1e-2, 3e-3


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

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the loss of the next tokens, as Trainer wants it."""
        hidden = self.embed(tokens[:, :-1])
        hidden = hidden + self.dropout(self.down(self.up(hidden).relu()))
        out = self.head(self.norm(hidden)).flatten(0, 1).float()
        return {"loss": nn.functional.cross_entropy(out, tokens[:, 1:].flatten())}


@dataclass(frozen=True)
class Job:
    """A run: what is trained, where its log and its checkpoints are, how long, and its seed."""

    preset: Preset
    folder: Path
    steps: int
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"update_proj_gap": GAP, "seed": self.seed, **self.preset.settings}

    def model(self) -> Model:
        """Return the model at the start, and seed what dropout draws."""
        torch.manual_seed(self.seed)
        return Model().to(self.preset.dtype)

    def optimizer(self, model: nn.Module) -> LowRank:
        groups = param_groups(model, rank=RANK, lr=LR, rest_lr=REST_LR)
        return self.preset.optimizer(groups, **self.settings)

    def log(self, step: int, loss: float) -> None:
        """Add a loss and the time to the log, all at once."""
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{step} {loss.hex()} {time.monotonic()}\n".encode())
        os.close(log)


def data() -> Tensor:
    """Return 512 short sequences."""
    tokens = torch.arange(VOCAB).repeat_interleave(4).unsqueeze(1)
    return torch.cat([(5**power * tokens + 7 * power) % VOCAB for power in range(9)], 1)


class Plain:
    """A loop by hand around `torch.save` and `torch.load`."""

    suffix = "pt"

    def train(self, job: Job) -> None:
        """Train to the end from the newest checkpoint, or from the start."""
        model, tokens = job.model(), data()
        order = torch.Generator().manual_seed(job.seed)
        optimizer = job.optimizer(model)
        scheduler = CosineAnnealingLR(optimizer, job.steps)
        done, path = 0, job.folder / f"checkpoint.{self.suffix}"
        if path.exists():
            saved = self.read(path)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["dropout"])
            order.set_state(saved["order"])
            done = saved["step"]
        for step in range(done, job.steps):
            batch = tokens[torch.randperm(len(tokens), generator=order)[:BATCH]]
            loss = model(batch)["loss"]
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            job.log(step, loss.item())
            if (step + 1) % SAVE_EVERY == 0:
                saved = {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "dropout": torch.get_rng_state(),
                    "order": order.get_state(),
                }
                self.write(saved, job.folder / "checkpoint.tmp")
                os.replace(job.folder / "checkpoint.tmp", path)

    def read(self, path: Path) -> dict[str, Any]:
        return torch.load(path, weights_only=True, map_location="cpu")

    def write(self, saved: dict[str, Any], path: Path) -> None:
        torch.save(saved, path)

    def unfinished(self, folder: Path) -> list[Path]:
        """Return what saves that were killed have left; safetensors names its own file .tmp..."""
        return [*folder.glob("*.tmp"), *folder.glob(".tmp*")]

    def final(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights and the state dict of the optimizer at the end."""
        saved = self.read(folder / f"checkpoint.{self.suffix}")
        return saved["model"], saved["optimizer"]


class Flat(Plain):
    """The same loop with one safetensors file, which holds tensors and text alone."""

    suffix = "safetensors"

    def write(self, saved: dict[str, Any], path: Path) -> None:
        state, text = flatten_state(saved["optimizer"])
        parts = {"model": saved["model"], "optimizer": state,
                 "random": {name: saved[name] for name in ("dropout", "order")}}  # fmt: skip
        tensors = {f"{part}.{name}": value for part, held in parts.items()
                   for name, value in held.items()}  # fmt: skip
        numbers = {name: saved[name] for name in ("step", "scheduler")}
        save_file(tensors, path, {**text, "loop": json.dumps(numbers)})

    def read(self, path: Path) -> dict[str, Any]:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for name, value in load_file(path).items():
            part, _, name = name.partition(".")
            parts[part][name] = value
        with safe_open(path, "pt") as file:
            text = file.metadata()
        optimizer = unflatten_state(parts["optimizer"], text)
        numbers = json.loads(text["loop"])
        return {"model": parts["model"], "optimizer": optimizer, **parts["random"], **numbers}
