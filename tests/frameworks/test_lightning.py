"""Lightning's loops give the plain loop's numbers with `configure_optimizers` alone."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from helpers.cases import GAP
from helpers.loops import FEW, Net, assert_same_run, batches, fit, halving, loss_of
from helpers.places import ROOT, TESTS

few_cases = pytest.mark.parametrize("case", FEW, ids=str)
CLIP = 0.5
EPOCH = 6
STEPS = 2 * EPOCH
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Loader:
    """The batches of an epoch; it goes on where it was when it was saved."""

    def __init__(self):
        self.done = 0

    def __len__(self):
        return EPOCH

    def __iter__(self):
        for batch in batches(EPOCH - self.done % EPOCH, self.done):
            self.done += 1
            yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Training:
    """What a user writes, whichever package its base class is from."""

    def __init__(self, case, **settings):
        super().__init__()
        self.net, self.case, self.settings = Net(), case, settings

    def configure_optimizers(self):
        optimizer = self.case.build(self.net.named_parameters(), **self.settings)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": halving(optimizer), "interval": "step"},
        }

    def training_step(self, batch, _):
        return loss_of(self.net, batch)


class Module(Training, LightningModule):
    pass


class Manual(Module):
    def __init__(self, case):
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()
        self.lr_schedulers().step()


def run(module, *, epochs=2, ckpt_path=None, trainer_class=Trainer, **settings):
    """Train a module and return its net and its optimizer."""
    settings.setdefault("logger", False)
    trainer = trainer_class(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="callbacks" in settings,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, Loader(), ckpt_path=ckpt_path, weights_only=True)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is module.case.factory
    return module.net, optimizer


def plain(case, dtype=torch.float32, clip=CLIP, accumulate=1, **settings):
    """Return a model after the plain loop over all epochs, with its optimizer."""
    model = Net(dtype)
    optimizer = case.build(model.named_parameters(), **settings)
    schedule = halving(optimizer)
    fit(model, optimizer, batches(STEPS), scheduler=schedule, clip=clip, accumulate=accumulate)
    return model, optimizer


@few_cases
@pytest.mark.parametrize("accumulate", [1, 2])
def test_automatic_optimization_equals_the_plain_loop(case, accumulate):
    """Lightning hands the whole of forward, backward and clipping to `step` as a closure."""
    found = run(Module(case), gradient_clip_val=CLIP, accumulate_grad_batches=accumulate)
    assert_same_run(*found, *plain(case, accumulate=accumulate))


def test_the_package_of_the_old_name_does_the_same():
    old = pytest.importorskip("pytorch_lightning", reason="the package of the old name is optional")
    module = type("Old", (Training, old.LightningModule), {})(FEW[0])
    found = run(module, trainer_class=old.Trainer, gradient_clip_val=CLIP)
    assert_same_run(*found, *plain(FEW[0]))


@few_cases
def test_manual_optimization_equals_the_plain_loop(case):
    assert_same_run(*run(Manual(case)), *plain(case))


@few_cases
def test_true_bf16_keeps_state_in_float32(case):
    module = Module(case, stochastic_rounding=True)
    net, optimizer = run(module, precision="bf16-true", gradient_clip_val=CLIP)
    assert_same_run(net, optimizer, *plain(case, torch.bfloat16, stochastic_rounding=True))
    assert {param.dtype for param in net.parameters()} == {torch.bfloat16}
    wanted = {"exp_avg.scale", "exp_avg_sq.scale"} if case.coarse else {"exp_avg", "exp_avg_sq"}
    for name in wanted:
        assert optimizer.state[net.up.weight][name].dtype == torch.float32


def saving(folder):
    """Return a callback that saves after every step, and the names of what it saves."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@few_cases
@pytest.mark.parametrize("stop", [GAP, GAP + 1, EPOCH])
def test_fit_resumes_bit_identically(case, stop, tmp_path):
    """At a refresh and between in the middle of an epoch, and at its end; read safely."""
    settings = {"gradient_clip_val": CLIP}
    whole = run(Module(case), callbacks=[saving(tmp_path)], **settings)
    assert_same_run(*whole, *plain(case))
    resumed = Module(case)
    torch.nn.init.ones_(resumed.net.up.weight)
    found = run(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", **settings)
    assert_same_run(*found, *whole)


class Killed(Callback):
    """Kills its process before a step, as an out-of-memory killer does."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == EPOCH + 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder):
    torch.set_num_threads(1)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=GAP, save_top_k=-1)
    run(Module(FEW[0]), gradient_clip_val=CLIP, callbacks=[saves, Killed()])


def test_a_killed_run_resumes_bit_identically(tmp_path):
    code = "import sys, test_lightning; test_lightning.train_until_killed(sys.argv[1])"
    path = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "frameworks")))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    saved = sorted(file.name for file in tmp_path.iterdir())
    assert saved == [f"step={GAP}.ckpt", f"step={2 * GAP}.ckpt"]
    found = run(Module(FEW[0]), gradient_clip_val=CLIP, ckpt_path=tmp_path / saved[-1])
    assert_same_run(*found, *plain(FEW[0]))


class Applied(Callback):
    """Notes the rate of every step at the moment it is taken."""

    def __init__(self):
        self.rates = []

    def on_train_start(self, trainer, _):
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(
            lambda stepped, *_: self.rates.append(stepped.param_groups[0]["lr"])
        )


def test_the_logged_rate_is_the_one_applied(tmp_path):
    case, seen, logger = FEW[0], Applied(), CSVLogger(tmp_path)
    run(Module(case), logger=logger, callbacks=[seen, LearningRateMonitor("step")])
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row[f"lr-{case.factory.__name__}"]) for row in rows] == seen.rates
    assert seen.rates == [1e-2 * 0.9**step for step in range(STEPS)]
