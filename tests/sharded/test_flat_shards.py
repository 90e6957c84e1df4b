"""Flat pieces of matrices, as FSDP1 and ZeRO hand them out, are refused with the way out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from helpers.parallel import Net, batch, loss_of
from lowrank_optim import FrugalAdamW, GaLoreAdamW

pytestmark = pytest.mark.slow

MESSAGE = "is a flat piece of .* Shard with FSDP2"


def fsdp1(keeps_names):
    """Return what an optimizer built after FSDP1 says, and one built before, at its first step."""
    model = Net()
    before = GaLoreAdamW(model.parameters(), rank=3)
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(model, use_orig_params=keeps_names, device_id=cpu)
    with pytest.raises(RuntimeError) as after_wrapping:
        FrugalAdamW(model.parameters())
    found = [str(after_wrapping.value)]
    if keeps_names:
        loss_of(model, batch(0)).backward()
        values = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(RuntimeError) as at_first_step:
            before.step()
        found.append(str(at_first_step.value))
        assert not before.state
        for value, param in zip(values, model.parameters(), strict=True):
            assert torch.equal(value, param)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("keeps_names", [True, False])
def test_fsdp1_is_refused(ranks, keeps_names):
    for found in ranks.run(2, fsdp1, keeps_names):
        assert len(found) == (2 if keeps_names else 1)
        for message in found:
            assert "flat piece of" in message
            assert "fully_shard" in message


def zero_partition(matrix):
    """Make what DeepSpeed gives an optimizer: one flat, contiguous share of all parameters."""
    flat = torch.cat([matrix.detach().flatten(), torch.zeros(7)])
    piece = nn.Parameter(flat.chunk(dist.get_world_size())[dist.get_rank()].clone())
    piece.ds_shape = matrix.shape
    return piece


def zero():
    matrix = nn.Parameter(torch.randn(12, 8))
    with pytest.raises(RuntimeError, match=MESSAGE):
        GaLoreAdamW([{"params": [zero_partition(matrix)], "rank": 3}])
    optimizer = GaLoreAdamW([matrix], rank=3)
    piece = zero_partition(matrix)
    optimizer.param_groups[0]["params"][0] = piece  # as ZeRO does with an optimizer it is given
    piece.grad = torch.ones_like(piece)
    before = piece.detach().clone()
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step()
    assert torch.equal(piece, before)


def test_zero_is_refused_at_construction_and_at_the_first_step(ranks):
    ranks.run(2, zero)
