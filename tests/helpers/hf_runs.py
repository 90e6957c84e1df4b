"""Small models and short runs of Hugging Face's Trainer; also a program, so that one can be killed.

    PYTHONPATH=tests python -m helpers.hf_runs FOLDER STEP

trains in FOLDER, and ends by SIGKILL in the step of that number, its gradients ready.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.hf_models import VOCABULARY, gpt2
from lowrank_optim import FiraAdamW
from lowrank_optim.integrations.huggingface import trainer_optimizer

SETTINGS = {"rank": 5, "update_proj_gap": 4}


def texts(count: int = 24, length: int = 7) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=rng)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Ten steps on the CPU, every loss logged."""
    fields = {"per_device_train_batch_size": 3, "max_steps": 10, "learning_rate": 1e-2,
              "weight_decay": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine",
              "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0,
              "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    return TrainingArguments(str(folder), **{**fields, **changes})


def trainer(
    model: nn.Module, args: TrainingArguments, optimizer: Any, *callbacks: TrainerCallback
) -> Trainer:
    """Return a Trainer that takes its optimizer as `optimizer_cls_and_kwargs`."""
    return Trainer(
        model,
        args,
        train_dataset=texts(),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=list(callbacks),
    )


def fields_by_name(model, optimizer, keys=("lr", "betas", "eps", "weight_decay")):
    """Return what an optimizer does with each parameter; each must stand once."""
    names = {id(param): name for name, param in model.named_parameters()}
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    assert len(params) == len({id(param) for param, _ in params})
    return {names[id(param)]: [group[key] for key in keys] for param, group in params}


def killable(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    """Return the run that is killed, resumed and compared: Fira, with dropout in the model."""
    torch.manual_seed(0)
    args = arguments(folder, save_strategy="steps", save_steps=2)
    return trainer(gpt2(), args, trainer_optimizer(FiraAdamW, args, **SETTINGS), *callbacks)


class Kill(TrainerCallback):
    """Ends this process as the system does when memory runs out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def logged(run, key):
    """Return the values of a key in the log, step by step."""
    return [entry[key] for entry in run.state.log_history if key in entry]


if __name__ == "__main__":
    torch.set_num_threads(1)
    killable(Path(sys.argv[1]), Kill(int(sys.argv[2]))).train()
