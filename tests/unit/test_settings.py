"""Settings over time: in checkpoints, in groups of other origin, and changed later."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lowrank_optim import (
    ApolloAdamW,
    Columns,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRank,
)


def test_numpy_numbers_as_settings_stay_loadable():
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW(
        [param], lr=np.float64(1e-3), weight_decay=np.float32(0.1), rank=np.int64(2)
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert (type(group["lr"]), type(group["weight_decay"]), type(group["rank"])) == (
        float, float, int,
    )  # fmt: skip


def test_numbers_of_parts_are_those_of_the_checkpoint_on_resume():
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = FiraAdamW([param], rank=2, limiter=1.01)
    param.grad = torch.randn(8, 6)
    optimizer.step()
    other = FiraAdamW([param], rank=2, limiter=1.5)
    with pytest.warns(UserWarning, match=r"limiter 1\.01 \(here 1\.5\)"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["residual"] == "NormScaled(form='code')"
    assert other.param_groups[0]["limiter"] == 1.01
    without = FiraAdamW([param], rank=2, limiter=None)
    with pytest.raises(ValueError, match=r"made with limiter=1\.01 in group 0.* has None"):
        without.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_of_another_rank_is_refused_without_state_too():
    params = [torch.nn.Parameter(torch.ones(8, 6))]
    saved = GaLoreAdamW(params, rank=2, min_dim=1).state_dict()
    with pytest.raises(ValueError, match="rank 2 in the checkpoint, 3 here"):
        GaLoreAdamW(params, rank=3).load_state_dict(saved)
    same = GaLoreAdamW(params, rank=0.3, min_dim=1)
    same.load_state_dict(saved)
    assert same.param_groups[0]["rank"] == 0.3


def test_blocks_resume_with_the_seed_of_the_checkpoint():
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(5)]
    build = lambda seed: FrugalAdamW(  # noqa: E731
        params, rank=0.4, projector="blocks", update_proj_gap=2, seed=seed
    )
    optimizer = build(1)
    for param in params:
        param.grad = torch.randn(8, 6)
    for _ in range(3):
        optimizer.step()
    other = build(2)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["seed"] == 1


def test_settings_survive_a_checkpoint_that_lacks_them():
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    groups = [
        {"params": params[:1], "rank": 2, "update_proj_gap": 7, "scale": 2.0},
        {"params": params[1:]},
    ]
    optimizer = GaLoreAdamW(groups)
    adamw = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.5)
    optimizer.load_state_dict(adamw.state_dict())
    first, second = optimizer.param_groups
    assert (first["rank"], first["update_proj_gap"], first["scale"]) == (2, 7, 2.0)
    assert (second["rank"], second["update_proj_gap"], first["lr"]) == (None, 200, 0.5)


def test_flat_pieces_are_still_found_after_a_load():
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW([param], rank=2)
    flat = torch.nn.Parameter(torch.ones(48))
    optimizer.param_groups[0]["params"][0] = flat
    optimizer.load_state_dict(optimizer.state_dict())
    flat.grad = torch.ones(48)
    with pytest.raises(RuntimeError, match="flat piece of a matrix"):
        optimizer.step()


def test_a_projector_without_dataclass_text_can_resume():
    class Mine(Columns):
        __repr__ = object.__repr__

    @dataclass(frozen=True)
    class Known(Mine):
        pass

    for kind in (Mine, Known):
        param = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = LowRank([param], rank=2, projector=kind())
        param.grad = torch.randn(8, 6)
        optimizer.step()
        LowRank([param], rank=2, projector=kind()).load_state_dict(optimizer.state_dict())


def test_values_set_later_are_named():
    param = torch.nn.Parameter(torch.ones(8, 6))
    param.grad = torch.ones(8, 6)
    optimizer = GaLoreAdamW([param], rank=2)
    optimizer.param_groups[0]["projector"] = "pca"
    with pytest.raises(ValueError, match=r"projector='pca'.*'power'"):
        optimizer.step()


def test_group_keys_of_other_optimizers():
    def build(**extra):
        param = torch.nn.Parameter(torch.ones(8, 6))
        return GaLoreAdamW([{"params": [param], "rank": 2, **extra}])

    build(amsgrad=False, differentiable=False, weight_decay_mult=1.0, lr_mult=2.0)
    with pytest.raises(ValueError, match="amsgrad=True in group 0"):
        build(amsgrad=True)
    with pytest.raises(ValueError, match=r"'beta1' in group 0.*use 'betas'"):
        build(beta1=0.9)
    with pytest.raises(ValueError, match="foreach=True in group 0"):
        build(foreach=True, lr=torch.tensor(1e-3))
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        build(lr=torch.tensor(-1.0))


def test_refused_parameters_are_named():
    spin = torch.ones(8, 6, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"'spins' in group 0, of shape \(8, 6\), is torch.complex64"
    ):
        GaLoreAdamW([("spins", spin)], rank=2)
    with pytest.raises(ValueError, match="parameter 1 in group 0"):
        GaLoreAdamW([torch.nn.Parameter(torch.ones(8, 6)), spin], rank=2)


def test_shared_bases_are_dropped_when_no_longer_used():
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(3)]
    optimizer = ApolloAdamW(params, rank=2, update_proj_gap=3, on_refresh="rotate")
    for step in range(10):
        for place, param in enumerate(params):
            param.grad = torch.randn(8, 6) if step or place else None
        optimizer.step()
        drawn = {optimizer.state[param]["drawn"] for param in params}
        assert len(optimizer._session.shared.tensors()) <= len(drawn) + 2
    optimizer.step()
    optimizer.step()
    assert len(optimizer._session.shared.tensors()) == len(
        {optimizer.state[param]["drawn"] for param in params}
    )
    dct = DCTAdamW(params, rank=2)
    dct.step()
    assert len(dct._session.shared.tensors()) == 1
