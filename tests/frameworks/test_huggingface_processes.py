"""Hugging Face's Trainer in several processes: DDP, FSDP2, and updates in the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.fsdp2_on_cpu import joined_to_accelerate
from helpers.hf_models import llama
from helpers.hf_runs import SETTINGS, arguments, logged, trainer
from lowrank_optim import FiraAdamW
from lowrank_optim.integrations.huggingface import LogGradNorm, trainer_optimizer

pytestmark = pytest.mark.slow


def in_several(folder, fsdp, layerwise, **settings):
    """Train in this process, one of several; return losses, norms and what there is at the end."""
    changes = {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}} if fsdp else {}
    with joined_to_accelerate(fsdp):
        torch.manual_seed(0)
        args = arguments(folder, max_grad_norm=0.0, ddp_find_unused_parameters=False, **changes)
        optimizer = trainer_optimizer(
            FiraAdamW, args, step_in_backward=layerwise, side="right", **SETTINGS, **settings
        )
        run = trainer(llama(), args, optimizer, *([LogGradNorm()] if layerwise else []))
        run.train()
        ours = run.optimizer.optimizer
        hooks = len(ours._session.in_backward._handles) if layerwise else 0
        shares = ours._session.process_group is dist.group.WORLD
        kind = type(run.model_wrapped).__name__
        return logged(run, "loss"), logged(run, "grad_norm"), kind, shares, hooks


def test_processes_share_subspaces_unless_they_are_told_not_to(ranks, tmp_path):
    for settings, shares in (({}, True), ({"process_group": None}, False)):
        for _, _, kind, found, _ in ranks.run(2, alone_or_not, tmp_path, settings):
            assert kind == "DistributedDataParallel"
            assert found == shares


def alone_or_not(folder, settings):
    return in_several(folder, False, False, **settings)


def test_fsdp2_of_trainer_is_ddp_to_rounding_and_layer_wise_too(ranks, tmp_path):
    (ddp, *_), _ = ranks.run(2, in_several, tmp_path, False, False)
    for layerwise in (False, True):
        for losses_, norms, kind, _, hooks in ranks.run(2, in_several, tmp_path, True, layerwise):
            assert kind == "FSDPLlamaForCausalLM"
            assert losses_ == pytest.approx(ddp, rel=1e-4)
            assert (hooks > 10) == layerwise
            assert min(norms) > 0.1


def refused_with_ddp(folder):
    with pytest.raises(ValueError, match=r"step_in_backward=True in several .* FSDP2.*fsdp=True"):
        in_several(folder, False, True)


def test_layer_wise_updates_with_ddp_are_refused(ranks, tmp_path):
    ranks.run(2, refused_with_ddp, tmp_path)
