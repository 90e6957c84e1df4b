"""Runs of Hugging Face's Trainer with our optimizers: exact, and resumed exactly."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, default_data_collator, get_scheduler
from transformers.trainer_utils import get_last_checkpoint

from helpers.cases import CASES, FULL, GAP, PRESETS, assert_same, weights
from helpers.hf_models import frozen_llama, gpt2, llama, mixtral
from helpers.hf_runs import SETTINGS, arguments, fields_by_name, killable, logged, trainer
from helpers.loops import KINDS
from helpers.places import ROOT, TESTS
from lowrank_optim import FiraAdamW, FrugalAdamW, GaLoreAdamW, param_groups
from lowrank_optim.integrations.huggingface import LogGradNorm, trainer_optimizer

pytestmark = pytest.mark.slow

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module", autouse=True)
def _what_imports_left_is_no_garbage():
    """Trainer collects garbage at the start of each run, for longer than these runs take."""
    gc.freeze()
    yield
    gc.unfreeze()


class Seen(TrainerCallback):
    """Notes of each step the learning rates, the gradient's norm, whether it was left out, and the
    weights after it."""

    def __init__(self):
        self.rates, self.norms, self.skipped, self.weights = [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(grads)))

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.skipped.append(optimizer.step_was_skipped)
        self.weights.append(weights(model))


def scaled(run, device="cpu"):
    """Give a Trainer in fp16 a scaler whose first gradients overflow; on a CPU it has none at all.

    Without a GPU accelerate leaves fp16 out in silence: no scaler, no autocast.
    """
    run.accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**21)
    run.accelerator.native_amp = True
    return run


LOOPS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "clipping": {"max_grad_norm": 1e-3},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "fp16": {"fp16": True},
}


@pytest.mark.parametrize(
    ("case", "loop"),
    [(name, "plain") for name in ("galore", "dct", "fira", "frugal", "apollo")]
    + [(name, loop) for name in ("fira", "frugal") for loop in list(LOOPS)[1:]],
)
def test_training_is_that_of_a_loop_by_hand(case, loop, tmp_path):
    """Loss, gradient norm, learning rates and weights of each step, to the bit."""
    case = BY_NAME[case]
    settings = {**SETTINGS, "scale": 0.5, **case.settings}
    torch.manual_seed(0)
    model = llama()
    copied = copy.deepcopy(model)
    args = arguments(tmp_path, adam_beta2=0.99, **LOOPS[loop])
    seen, batches = Seen(), []
    run = trainer(
        model, args, trainer_optimizer(case.factory, args, rest_lr=3e-3, **settings), seen
    )
    run.data_collator = lambda rows: batches.append(default_data_collator(rows)) or batches[-1]
    (scaled(run) if args.fp16 else run).train()

    rank, micro = settings.pop("rank"), args.gradient_accumulation_steps
    groups = param_groups(copied, rank, lr=1e-2, rest_lr=3e-3, weight_decay=0.1)
    optimizer = case.factory(groups, betas=(0.9, 0.99), **settings)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, enabled=args.fp16)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    copied.train()
    losses, norms, rates = [], [], []
    for step in range(10):
        some, loss = batches[step * micro : (step + 1) * micro], torch.zeros(())
        items = torch.tensor(sum(batch["labels"][:, 1:].numel() for batch in some))
        for batch in some:
            with torch.autocast("cpu", dtype, enabled=args.bf16 or args.fp16):
                part = copied(**batch, num_items_in_batch=items).loss
            scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(copied.parameters(), args.max_grad_norm)))
        rates.append([group["lr"] for group in optimizer.param_groups])
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == before:
            schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert logged(run, "loss") == losses
    assert np.array_equal(logged(run, "grad_norm"), norms, equal_nan=True)
    assert seen.rates == rates
    assert_same(weights(model), weights(copied))
    if loop == "clipping":
        assert max(seen.norms) < 1.01e-3 < 1e-1 < min(norms)
    if loop == "fp16":
        assert 0 < sum(seen.skipped) < 10


@pytest.mark.parametrize("accumulation", [1, 3])
def test_layer_wise_updates_are_those_of_a_step(accumulation, tmp_path):
    """Without clipping to the bit; the norm in the log is real."""
    runs = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0 if layerwise else 1e9,
            dataloader_drop_last=False,
            max_steps=-1,
            num_train_epochs=3,
        )
        optimizer = trainer_optimizer(
            FiraAdamW, args, step_in_backward=layerwise, rest_lr=3e-3, **SETTINGS
        )
        run = trainer(llama(), args, optimizer, *([LogGradNorm()] if layerwise else []))
        run.train()
        runs.append(run)
    ordinary, layerwise = runs
    assert logged(ordinary, "loss") == logged(layerwise, "loss")
    norms = logged(layerwise, "grad_norm")
    assert min(norms) > 0.01
    assert norms == pytest.approx(logged(ordinary, "grad_norm"), rel=1e-5)
    assert_same(weights(ordinary.model), weights(layerwise.model))


def test_layer_wise_updates_clip_by_max_grad_norm_and_resume(tmp_path):
    def run_of(folder, **changes):
        torch.manual_seed(0)
        args = arguments(folder, max_grad_norm=0.05, **changes)
        optimizer = trainer_optimizer(GaLoreAdamW, args, step_in_backward=True, **SETTINGS)
        run = trainer(gpt2(), args, optimizer, LogGradNorm())
        assert run.create_optimizer()._session.in_backward.max_norm == 0.05
        return run

    whole = run_of(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = run_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert min(logged(whole, "grad_norm")) > 0.1
    assert logged(whole, "grad_norm") == logged(resumed, "grad_norm")
    assert_same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_logged_learning_rate_is_the_applied_one(schedule, tmp_path):
    model = llama()
    args = arguments(tmp_path, lr_scheduler_type=schedule)
    seen = Seen()
    optimizer = trainer_optimizer(GaLoreAdamW, args, rest_lr=2e-3, **SETTINGS)
    run = trainer(model, args, optimizer, seen)
    run.train()
    matrices, plain, no_decay = zip(*seen.rates, strict=True)
    assert list(matrices) == logged(run, "learning_rate")
    assert max(matrices) == 1e-2
    assert len(set(matrices)) > 7
    assert plain == no_decay == pytest.approx([rate / 5 for rate in matrices], rel=1e-12)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in FULL])
def test_a_class_and_its_settings_work_too(preset, tmp_path):
    """Trainer then gives two groups without names: embeddings are projected too."""
    torch.manual_seed(0)
    model = llama()
    before = weights(model)
    args = arguments(tmp_path, weight_decay=0.3, adam_beta1=0.5)
    run = trainer(model, args, (preset, {"lr": 3e-3, **SETTINGS}))
    run.train()
    fields = fields_by_name(model, run.optimizer, ("betas", "weight_decay", "rank"))
    betas = inspect.signature(preset).parameters["betas"].default
    for name, values in fields.items():
        assert values == [betas, 0.0 if "norm" in name else 0.3, 5], name
    embedding = run.optimizer.state[model.model.embed_tokens.weight]
    assert embedding["exp_avg"].shape == (64, 5)
    assert max(logged(run, "learning_rate")) == 3e-3
    assert all(not torch.equal(before[name], param) for name, param in weights(model).items())


@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_the_optimizer_in_trainer_tells_what_it_projects(build, tmp_path):
    model = build()
    first = next(iter(model.parameters())).requires_grad_(False)
    kept = first.detach().clone()
    args = arguments(tmp_path, max_steps=2)
    run = trainer(model, args, trainer_optimizer(FrugalAdamW, args, min_dim=1))
    run.train()
    table = run.optimizer.optimizer.summary()
    assert float(table.splitlines()[0].split(": ")[1].split("%")[0]) > 78
    assert torch.equal(first, kept)
    assert first not in run.optimizer.state


def same(left, right):
    """Return whether two state dicts are equal to the bit, dtypes included."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def losses(run):
    """Return what was logged at each step, as text, which is exact and in which nan equals nan."""
    return [str(sorted(entry.items())) for entry in run.state.log_history if "loss" in entry]


def checkpoint(folder, step):
    return str(folder / f"checkpoint-{step}")


def assert_resumes(folder, make, stops):
    """Assert that runs from some checkpoints end as the one that made them, and return that one.

    Args:
        folder: where the checkpoints are.
        make: a function that returns a Trainer which saves every two steps: of the step it is to
            start from, which makes other initial weights too.
        stops: the steps to resume from.
    """
    whole = make(0)
    whole.train()
    for stop in stops:
        rest = make(stop)
        rest.train(resume_from_checkpoint=checkpoint(folder, stop))
        assert losses(rest)[stop:] == losses(whole)[stop:]
        assert_same(weights(rest.model), weights(whole.model))
        assert same(rest.optimizer.state_dict(), whole.optimizer.state_dict())
    return whole


def subspaces(folder, stop):
    """Return what a checkpoint says of each subspace: itself, when it was drawn, or its shape."""
    saved = torch.load(Path(checkpoint(folder, stop)) / "optimizer.pt", weights_only=True)
    return [
        [state.get(key) for key in ("basis", "index", "drawn")]
        + [tuple(state[key].shape) for key in ("exp_avg",) if key in state]
        for state in saved["state"].values()
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_that_the_scaler_leaves_out_leaves_no_trace(device, tmp_path):
    """In the first steps and later; a run that is resumed counts on."""
    args = arguments(tmp_path, fp16=True, use_cpu=device == "cpu", save_strategy="steps",
                     save_steps=2)  # fmt: skip

    def make(start, *callbacks):
        torch.manual_seed(start)
        model = llama(attn_implementation="eager")
        optimizer = trainer_optimizer(FiraAdamW, args, **SETTINGS)
        return scaled(trainer(model, args, optimizer, *callbacks), device)

    seen = Seen()
    run = make(0, seen)
    before = weights(run.model)
    run.train()
    for skipped, after in zip(seen.skipped, seen.weights, strict=True):
        if skipped:
            assert_same(after, before)
        before = after
    taken = seen.skipped.count(False)
    assert seen.skipped[0]
    assert taken >= 4
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {taken}
    assert run.lr_scheduler.last_epoch == taken
    assert all(value.isfinite().all() for value in before.values())
    assert_resumes(tmp_path, make, [2, 6])


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_resume_on_and_between_refreshes(case, tmp_path):
    """All matrices refreshed at updates 1, 5 and 9."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    settings = {**SETTINGS, "update_proj_gap": GAP, **case.settings, "stagger": False}

    def make(start):
        torch.manual_seed(start)
        return trainer(llama(), args, trainer_optimizer(case.factory, args, **settings))

    assert_resumes(tmp_path, make, [4, 6])
    if case.whole:
        return
    assert not same(subspaces(tmp_path, 4), subspaces(tmp_path, 6))
    if settings["update_proj_gap"] == GAP:
        assert same(subspaces(tmp_path, 6), subspaces(tmp_path, 8))


@pytest.mark.parametrize(
    ("name", "build"),
    [("galore-power", gpt2), ("fira-8bit", frozen_llama), ("galore-rounding", mixtral)],
)
def test_resume_in_bf16_keeps_the_dtypes_of_states(name, build, tmp_path):
    """Weights in bf16, moments in float32 or 8 bits, refreshes spread over all steps."""
    case = BY_NAME[name]
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=8)

    def make(start):
        torch.manual_seed(start)
        model = build().to(torch.bfloat16)
        if build is mixtral and start:
            # Trainer saves experts one by one and does not find the stacks again: with a warning
            # it leaves them as they are. `from_pretrained` does find them.
            read = model.from_pretrained(checkpoint(tmp_path, start), dtype=torch.bfloat16)
            model.load_state_dict(read.state_dict())
        settings = {**SETTINGS, **case.settings}
        optimizer = trainer_optimizer(case.factory, args, rest_lr=3e-3, **settings)
        return trainer(model, args, optimizer)

    run = assert_resumes(tmp_path, make, [2, 6])
    coarse = name == "fira-8bit"
    kinds = {
        "exp_avg": torch.float32,
        "exp_avg_sq.codes": torch.uint8,
        "basis": torch.bfloat16 if coarse else torch.float32,
        "index": torch.int64,
    }
    found = {(key, value.dtype) for state in run.optimizer.state.values()
             for key, value in state.items() if key in kinds}  # fmt: skip
    assert found == {(key, kinds[key]) for key, _ in found}
    assert ("exp_avg_sq.codes", torch.uint8) in found or not coarse
    assert ("exp_avg", torch.float32) in found


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in FULL])
def test_resume_when_trainer_is_given_a_class(preset, tmp_path):
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=2, max_steps=6, gradient_accumulation_steps=2
    )

    def make(start):
        torch.manual_seed(start)
        return trainer(gpt2(), args, (preset, {"lr": 1e-2, **SETTINGS}))

    assert_resumes(tmp_path, make, [2, 4])


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(tmp_path):
    """Killed in another process, at a step of chance after the first checkpoint."""
    step = random.SystemRandom().randint(3, 10)
    command = [sys.executable, "-m", "helpers.hf_runs", str(tmp_path), str(step)]
    paths = os.pathsep.join(map(str, (ROOT, TESTS)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    last = get_last_checkpoint(str(tmp_path))
    assert last == checkpoint(tmp_path, (step - 1) // 2 * 2)

    whole = killable(tmp_path / "whole")
    whole.train()
    rest = killable(tmp_path)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole), f"killed in step {step}"
    assert_same(weights(rest.model), weights(whole.model))
    assert same(rest.optimizer.state_dict(), whole.optimizer.state_dict())
