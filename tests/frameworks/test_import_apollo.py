"""Checkpoints of apollo-torch: another random subspace, with steps and moments as long as there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.foreign import (
    KEEP,
    RANK,
    THEIRS,
    apollo_class,
    begun,
    our_optimizer,
)
from lowrank_optim import ApolloAdamW, import_state

SHAPE, WIDTH = (192, 96), 24


def apollo_runs(seed, steps, *, rank, limited, scale_type):
    """Theirs after some steps, and what made them; another draw of the subspace for each seed."""
    rng = torch.Generator().manual_seed(seed)
    mean = 0.3 * torch.randn(SHAPE, generator=rng)
    param = nn.Parameter(torch.randn(SHAPE, generator=rng))
    group = {"params": [param], "rank": rank, "update_proj_gap": 10, "proj_type": "std"}
    theirs = apollo_class()(
        [{**group, **THEIRS["apollo"][1], "scale_type": scale_type}],
        lr=1e-2, eps=1e-12, disable_nl=not limited,
    )  # fmt: skip
    theirs.state[param]["seed"] = 1000 + seed

    def gradients():
        while True:
            yield mean + torch.randn(SHAPE, generator=rng)

    stream = gradients()
    seen = []
    for _ in range(steps):
        param.grad = next(stream)
        seen.append(param.grad)
        theirs.step()
    return param, theirs, stream, seen


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(("rank", "scale_type"), [(WIDTH, "channel"), (1, "tensor")])
def test_apollo_goes_on_with_steps_of_the_same_length(rank, scale_type, limited):
    """At a refresh of theirs both draw a new subspace: the lengths agree on average.

    Their Gaussian makes 1 / |R| longer by 3 / (4 rank) on average; 24 runs tell 3 % at rank 24.
    """
    ratios = []
    for seed in range(24):
        param, theirs, stream, _ = apollo_runs(
            seed, 10, rank=rank, limited=limited, scale_type=scale_type
        )
        twin = nn.Parameter(param.detach().clone())
        limiter = {} if limited else {"limiter": None}
        ours = ApolloAdamW([twin], rank=rank, seed=seed, **limiter)
        import_state(ours, theirs.state_dict())
        assert ours.state[twin]["drawn"] == 0
        start = param.detach().clone()
        param.grad = twin.grad = next(stream)
        theirs.step()
        ours.step()
        moved, there = (weight.detach() - start for weight in (twin, param))
        ratios.append(float(moved.norm() / there.norm()))
        assert ours.state[twin]["drawn"] == 10
    ratio = torch.tensor(ratios)
    assert abs(float(ratio.mean()) - 1) < 0.03 + 3 * float(ratio.std()) / 24**0.5
    assert float(ratio.std()) < (0.03 if rank == WIDTH else 0.2)


def test_apollo_moments_are_as_long_as_our_own_would_be():
    """Beside an optimizer of ours that has seen the same gradients from the start."""
    found = []
    for seed in range(8):
        param, theirs, _, seen = apollo_runs(
            seed, 13, rank=WIDTH, limited=True, scale_type="channel"
        )
        ours, own = (ApolloAdamW([param], rank=WIDTH, update_proj_gap=10) for _ in range(2))
        import_state(ours, theirs.state_dict())
        for grad in seen:
            param.grad = grad
            own.step()
        assert ours.state[param]["drawn"] == own.state[param]["drawn"] == 10
        mine, native = ours.state[param], own.state[param]
        found.append(
            [float(mine[key].norm() / native[key].norm()) for key in ("exp_avg", "exp_avg_sq")]
        )
    mean = torch.tensor(found).mean(0)
    assert abs(float(mean[0]) - 1) < 0.05
    assert abs(float(mean[1]) - 1) < 0.05


@pytest.mark.parametrize("name", ["apollo", "apollo-svd"])
def test_apollo_limiter_is_as_long_as_the_step_it_limits(name):
    """Theirs is measured before the root of the scale, ours after."""
    params, theirs = begun(name, 3)
    ours = our_optimizer(name, params, scale=0.5)
    import_state(ours, theirs.state_dict(), keep=("scale",))
    norm = float(theirs.state[params["tall"]]["scaled_grad"])
    stretch = 7 / RANK if name == "apollo" else 1.0
    found = float(ours.state[params["tall"]]["residual_norm"])
    assert found == pytest.approx(norm * (0.5 * stretch) ** 0.5, rel=1e-6)


def test_apollo_scale_of_axes_of_several_lengths_is_left_to_the_user():
    params, theirs = begun("apollo", 2)
    ours = our_optimizer("apollo", params)
    with pytest.raises(ValueError, match=r"in group 1 have .* lengths.*0\.667, 0\.857, 1\.2.*keep"):
        import_state(ours, theirs.state_dict())
    assert not ours.state
    import_state(ours, theirs.state_dict(), keep=KEEP["apollo"])
    assert ours.param_groups[1]["scale"] == 1.0
