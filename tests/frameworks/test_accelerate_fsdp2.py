"""Accelerate's FSDP2: parameters swapped under the optimizer, checkpoints on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helpers.fsdp2_on_cpu import joined_to_accelerate
from helpers.parallel import GAP, Net, batch, difference, loss_of, optimizer_of, weights

pytestmark = pytest.mark.slow

METHODS = ("galore-power-rotate", "dct", "fira-8bit", "fira-cut", "frugal", "apollo")
FORMS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
COUNTS = (1, 2, 4)
MICRO = 2
STOP, END = GAP + 1, 2 * GAP + 2
CLIP = 0.3
Run = tuple[Accelerator, nn.Module, Any]


def prepared(method: str, form: str, zeros: bool = False, **changes: Any) -> Run:
    """Return an accelerator, and what it makes of a model and the optimizer built before."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Sequential"],
        state_dict_type=form,
        cpu_ram_efficient_loading=changes.pop("efficient", False),
    )
    accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=MICRO)
    assert accelerator.is_fsdp2
    # Inside another module: accelerate 1.15 loads no parameter of the outermost one efficiently.
    model: nn.Module = nn.Sequential(Net(torch.float64))
    if zeros:
        for param in model.parameters():
            nn.init.zeros_(param)
    model, optimizer = accelerator.prepare(model, optimizer_of(model, method, **changes))
    groups = optimizer.optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    assert all(isinstance(param, DTensor) for param in params)
    assert {id(param) for param in params} == {id(param) for param in model.parameters()}
    return accelerator, model, optimizer


def train(run: Run, steps: range, clip: bool = True) -> None:
    """Run some steps of two backward passes each."""
    accelerator, model, optimizer = run
    for step in steps:
        for part in range(MICRO):
            with accelerator.accumulate(model):
                words = batch(MICRO * step + part, dist.get_rank(), dist.get_world_size())
                accelerator.backward(loss_of(model, words))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def by_hand(method: str, steps: int) -> dict[str, Tensor]:
    """Return the weights of the plain loop in one process."""
    model = Net(torch.float64)
    optimizer = optimizer_of(model, method)
    for step in range(steps):
        for part in range(MICRO):
            (loss_of(model, batch(MICRO * step + part)) / MICRO).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def save(method: str, folder: Path) -> dict[str, Tensor]:
    """Train, save in both forms at `STOP`, and return the weights at `END`."""
    for form in FORMS:
        with joined_to_accelerate():
            run = prepared(method, form)
            train(run, range(STOP))
            run[0].save_state(str(folder / form))
            train(run, range(STOP, END))
    assert any(isinstance(x, DTensor) for state in run[2].state.values() for x in state.values())
    return weights(run[1][0])


def resume(method: str, folder: Path, form: str) -> dict[str, Tensor]:
    """Load what was saved into a new model of zeros and go on to `END`."""
    with joined_to_accelerate():
        run = prepared(method, form, True, lr=0.3)
        run[0].load_state(str(folder / form))
        train(run, range(STOP, END))
        return weights(run[1][0])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_on_any_number_of_ranks(ranks, tmp_path, method):
    """One method in every form on every number, the others in one form on one number each."""
    place = list(METHODS).index(method)
    forms, counts = FORMS, COUNTS
    if place:
        forms, counts = (FORMS[place % len(FORMS)],), (COUNTS[place % len(COUNTS)],)
    reference = by_hand(method, END)
    uninterrupted = ranks.run(2, save, method, tmp_path)[0]
    assert difference(uninterrupted, reference) < 1e-12
    for form in forms:
        for count in counts:
            for found in ranks.run(count, resume, method, tmp_path, form):
                assert difference(found, reference) < 1e-12, (form, count)
                if count == 2:
                    assert difference(found, uninterrupted) == 0, form


def trained(method: str, in_backward: bool, efficient: bool = False) -> dict[str, Tensor]:
    """Train without clipping, in the backward pass or not."""
    with joined_to_accelerate():
        run = prepared(method, FORMS[0], efficient and dist.get_rank() > 0, efficient=efficient)
        accelerator, _, optimizer = run
        if in_backward:
            optimizer.optimizer.step_in_backward(
                accumulation_steps=lambda: accelerator.sync_gradients
            )
        train(run, range(STOP), clip=False)
        if in_backward:
            assert float(optimizer.optimizer.grad_norm) > 0
        return weights(run[1][0])


@pytest.mark.parametrize("method", ["galore-power-rotate", "fira-8bit"])
def test_updates_in_the_backward_pass_are_those_of_step(ranks, method):
    ordinary = ranks.run(2, trained, method, False)
    for ours, theirs in zip(ranks.run(2, trained, method, True), ordinary, strict=True):
        assert difference(ours, theirs) == 0


def test_weights_that_one_rank_alone_has_loaded(ranks):
    """`cpu_ram_efficient_loading`: parameters on the meta device while they are sharded."""
    ordinary = ranks.run(2, trained, "fira", False)
    found = ranks.run(2, trained, "fira", False, True)
    for ours, theirs in zip(found, ordinary, strict=True):
        assert difference(ours, theirs) == 0
