"""GaLore and Fira against their authors' own packages, `galore-torch` and `fira` from PyPI.

Both peers add eps to the uncorrected root and decay after the update, and the sign of a singular
vector is LAPACK's choice: so a tiny eps, no decay and one fixed subspace, where all of this is
without effect. The groups are handed to both sides as they are.

Both sides take the basis from a float32 SVD. Fira then divides by ||R_i||, so that a row which has
next to nothing in the subspace magnifies its rounding: of 300 runs over other seeds at rank 2, 14
of ours and 13 of the peer's end more than 1e-5 from the float64 trajectory, and 12 more than 1e-5
from each other. The seed here has no such row.
"""

import fira
import galore_torch
import numpy as np
import pytest
import torch

from helpers import references
from lowrank_optim import FiraAdamW, GaLoreAdamW

STEPS = 12
TOLERANCE = 1e-5
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0}
SHAPES = [(33, 17), (17, 33), (21, 21), (65, 9), (9, 65)]
OURS = {"galore": GaLoreAdamW, "fira": FiraAdamW}
PEERS = {"galore": galore_torch.GaLoreAdamW, "fira": fira.FiraAdamW}
REFERENCES = {"galore": references.GaLore, "fira": references.Fira}
SCALE_KEY = {"galore": "scale", "fira": "alpha"}

each_method = pytest.mark.parametrize("name", PEERS)


def ours(name, groups):
    return OURS[name](groups, stagger=False, **SETTINGS)


def peer(name, groups):
    return PEERS[name](groups, no_deprecation_warning=True, **SETTINGS)


def projected(name, params, rank, scale, proj_type="std", gap=STEPS + 1):
    return {
        "params": params,
        "rank": rank,
        "update_proj_gap": gap,
        SCALE_KEY[name]: scale,
        "proj_type": proj_type,
    }


def difference(build_ours, build_peer, shapes, seed=0):
    """The largest difference of any weight after any step; gradients depend on the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    start, mean = normal(), normal()
    sides = []
    for build in (build_ours, build_peer):
        params = [torch.nn.Parameter(W.clone()) for W in start]
        sides.append((build(params), params))
    largest = 0.0
    for _ in range(STEPS):
        noise = normal()
        for optimizer, params in sides:
            for p, m, e in zip(params, mean, noise, strict=True):
                p.grad = m + e + 0.1 * p.detach()
            optimizer.step()
        for a, b in zip(sides[0][1], sides[1][1], strict=True):
            largest = max(largest, (a - b).detach().abs().max().item())
    for p, W in zip(sides[1][1], start, strict=True):
        assert (p - W).detach().abs().max() > SETTINGS["lr"]
    return largest


def compare(name, shapes, groups, prepare=lambda optimizer: optimizer):
    return difference(
        lambda params: prepare(ours(name, groups(params))),
        lambda params: prepare(peer(name, groups(params))),
        shapes,
    )


@each_method
@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trajectory_is_the_peers(name, shape, scale, rank):
    largest = compare(name, [shape], lambda params: [projected(name, params, rank, scale)])
    assert largest <= TOLERANCE


@each_method
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(23, 14), (14, 23), (15, 15)], ids=str)
def test_proj_type_means_what_it_does_there(name, shape, proj_type):
    largest = compare(name, [shape], lambda params: [projected(name, params, 4, 0.25, proj_type)])
    assert largest <= TOLERANCE


@each_method
def test_plain_group_beside_a_projected_one(name):
    largest = compare(
        name,
        [(33, 17), (12, 20), (17,), (6, 5)],
        lambda params: [{"params": params[2:]}, projected(name, params[:2], 4, 0.25)],
    )
    assert largest <= TOLERANCE


@each_method
def test_learning_rate_of_the_group_may_change(name):
    def decaying(optimizer):
        def decay(optimizer, *_):
            for group in optimizer.param_groups:
                group["lr"] *= 0.8

        optimizer.register_step_post_hook(decay)
        return optimizer

    largest = compare(name, [(33, 17)], lambda params: [projected(name, params, 4, 0.25)], decaying)
    assert largest <= TOLERANCE


def test_a_model_divided_by_fira():
    """`fira.divide_params` makes the groups, we take them as they come."""

    def groups(params):
        model = torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Linear(33, 8))
        model[0].weight, model[0].bias = params[0], params[1]
        model[1].weight, model[1].bias = params[2], params[3]
        return fira.divide_params(
            model, target_modules_list=["0"], rank=4, update_proj_gap=STEPS + 1, alpha=0.25
        )

    largest = compare("fira", [(33, 17), (33,), (8, 33), (8,)], groups)
    assert largest <= TOLERANCE


@each_method
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(23, 14), (14, 23), (15, 15)], ids=str)
def test_reference_is_the_peer_in_float64_through_refreshes(name, shape, side, scale):
    """With the peer's own bases at each refresh, kept moments and the limiter agree as well."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape)
    p = torch.nn.Parameter(torch.tensor(W))
    optimizer = peer(name, [projected(name, [p], 4, scale, side, gap=5)])

    def basis(_):
        matrix = optimizer.state[p]["projector"].ortho_matrix.numpy()
        return matrix.T if side == "right" else matrix

    reference = REFERENCES[name](
        4,
        scale=scale,
        update_proj_gap=5,
        side=side,
        subspace=references.Given(basis),
        **SETTINGS,
    )
    for t in range(STEPS):
        G = rng.standard_normal(shape) * (1 + t % 3)
        p.grad = torch.tensor(G)
        optimizer.step()
        W = reference.step(W, G)
        np.testing.assert_allclose(W, p.detach().numpy(), rtol=0, atol=1e-8)
