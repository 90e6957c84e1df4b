"""The training that `kill_resume.py` kills, in the loops of two frameworks.

Neither promises a whole checkpoint where it was killed in the middle of a save:

* Hugging Face's Trainer (transformers 5.23) writes six files straight into `checkpoint-N`.
  `get_last_checkpoint` also finds a folder that is half full, and resuming from it fails.
  `trainer_state.json` is written last: where it is missing or breaks off, the folder is deleted
  before the run is resumed. The random states and the place in the data are Trainer's business.
* Lightning (2.6) writes a file in `tempfile.gettempdir()` and moves it. On another file system than
  that of the checkpoints the move is a copy, which can break off: the folder of temporary files is
  therefore put beside them. Lightning saves no random states, and the place in the data only if
  the loader has a state: a callback and the loader have.

The packages are imported when a loop is made, so that the other needs not be there.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kill_loops import BATCH, LR, RANK, REST_LR, SAVE_EVERY, Job, data
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR


class HuggingFace:
    """Trainer with `trainer_optimizer`."""

    def __init__(self) -> None:
        import transformers

        from lowrank_optim.integrations.huggingface import trainer_optimizer

        transformers.utils.logging.set_verbosity_error()
        self.package, self.choose = transformers, trainer_optimizer

    def train(self, job: Job) -> None:
        class Log(self.package.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in logs:
                    job.log(state.global_step - 1, logs["loss"])

        for broken in self.unfinished(job.folder):
            shutil.rmtree(broken)
        model = job.model()
        args = self.package.TrainingArguments(
            str(job.folder), seed=job.seed, max_steps=job.steps, learning_rate=LR,
            per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", logging_steps=1,
            save_strategy="steps", save_steps=SAVE_EVERY, use_cpu=True, report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        chosen = self.choose(job.preset.optimizer, args, rank=RANK, rest_lr=REST_LR, **job.settings)
        rows = [{"tokens": row} for row in data()]
        run = self.package.Trainer(
            model, args, train_dataset=rows, optimizer_cls_and_kwargs=chosen, callbacks=[Log()]
        )
        run.remove_callback(self.package.PrinterCallback)
        newest = self.newest(job.folder)
        if newest and newest.endswith(f"-{job.steps}"):
            return  # resumed from the end, Trainer makes one step too many
        run.train(resume_from_checkpoint=newest)

    def newest(self, folder: Path) -> str | None:
        return self.package.trainer_utils.get_last_checkpoint(str(folder))

    def unfinished(self, folder: Path) -> list[Path]:
        return [path for path in folder.glob("checkpoint-*") if not whole(path)]

    def final(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = Path(self.newest(folder) or "")
        optimizer = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
        return load_file(path / "model.safetensors"), optimizer


def whole(path: Path) -> bool:
    """Whether Trainer has written all of a checkpoint: its last file is there to the end."""
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


class Order:
    """The batches of an epoch, which go on where they were when they were saved."""

    def __init__(self, seed: int) -> None:
        self.tokens, self.seed, self.done = data(), seed, 0

    def __len__(self) -> int:
        return len(self.tokens) // BATCH

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = divmod(self.done, len(self))
        shuffled = torch.Generator().manual_seed(self.seed + epoch)
        rows = torch.randperm(len(self.tokens), generator=shuffled).split(BATCH)
        for some in rows[first:]:
            self.done += 1
            yield self.tokens[some]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Lightning:
    """Lightning's Trainer with `ModelCheckpoint` and `ckpt_path`."""

    def __init__(self) -> None:
        import lightning.pytorch

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        self.package = lightning.pytorch

    def train(self, job: Job) -> None:
        class Module(self.package.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = job.model()

            def training_step(self, batch):
                return self.net(batch)["loss"]

            def configure_optimizers(self):
                optimizer = job.optimizer(self.net)
                schedule = CosineAnnealingLR(optimizer, job.steps)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        class Log(self.package.Callback):
            """Logs, and keeps the random state, which is set when nothing more is set up."""

            dropout: Tensor | None = None

            def state_dict(self):
                return {"dropout": torch.get_rng_state()}

            def load_state_dict(self, state):
                self.dropout = state["dropout"]

            def on_train_batch_start(self, *_):
                if self.dropout is not None:
                    torch.set_rng_state(self.dropout)
                    self.dropout = None

            def on_train_batch_end(self, trainer, module, outputs, *_):
                job.log(trainer.global_step - 1, outputs["loss"].item())

        tempfile.tempdir = str(job.folder / "unfinished")
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        saves = self.package.callbacks.ModelCheckpoint(
            job.folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1
        )
        trainer = self.package.Trainer(
            accelerator="cpu", max_steps=job.steps, callbacks=[Log(), saves], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        path = self.newest(job.folder)
        trainer.fit(Module(), Order(job.seed), ckpt_path=path, weights_only=True)

    def newest(self, folder: Path) -> Path | None:
        saved = folder.glob("step=*.ckpt")
        return max(saved, key=lambda path: int(path.stem.partition("=")[2]), default=None)

    def unfinished(self, folder: Path) -> list[Path]:
        return list((folder / "unfinished").glob("*"))

    def final(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        saved = torch.load(self.newest(folder), weights_only=True, map_location="cpu")
        return saved["state_dict"], saved["optimizer_states"][0]
