"""The length of an update: the direction stays, and W moves as far as the group says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from helpers.cases import CASES, GAP, PRESETS, Case
from helpers.pairwise import in_turn
from lowrank_optim import FiraAdamW, GaLoreAdamW, LowRankAdamW, MuonW, NorMuonW, TrionW
from lowrank_optim.parts.checks import SettingError

SHAPES = [(13, 7), (5, 11), (3, 8, 5), (6, 2, 3, 3)]
EXACT = [
    case for case in CASES if not case.coarse and "rounding" not in case.name and not case.measured
]
"""Cases whose moments are not rounded, so that float64 shows the formula."""
LENGTHS = ("rms", "adamw")
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.0, "min_dim": 1}


def gradients(steps: int, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Return gradients of `SHAPES` that agree from step to step, as in the beginning of a run."""
    rng = torch.Generator().manual_seed(3)
    mean = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in SHAPES]
    return [
        [(x + torch.randn(x.shape, generator=rng, dtype=x.dtype)).to(dtype) for x in mean]
        for _ in range(steps)
    ]


def zeros(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Return parameters of zeros."""
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def moves(optimizer: torch.optim.Optimizer, grads: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return by how much each parameter moves in each step, matrices of stacks one by one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for step in grads:
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        found.append(
            [
                piece.flatten()
                for param, old in zip(params, before, strict=True)
                for piece in ((param.detach() - old) if param.ndim == 3 else [param.detach() - old])
            ]
        )
    return found


def build(case: Case, params: list[nn.Parameter], **changes: object) -> torch.optim.Optimizer:
    """Return the optimizer of a case."""
    return case.build(params, **{**SETTINGS, **changes})


@pytest.mark.parametrize(("case", "length"), in_turn(EXACT, *LENGTHS), ids=str)
def test_a_length_changes_no_direction(case, length):
    """The move is the published one times a positive number: one of each matrix and step."""
    grads = gradients(GAP + 2)
    published = moves(build(case, zeros(), length="published", scale=1.0), grads)
    measured = moves(build(case, zeros(), length=length, scale=1.5), grads)
    for plain, other in zip(published, measured, strict=True):
        for one, two in zip(plain, other, strict=True):
            if one.norm() == 0:
                assert two.norm() == 0
                continue
            ratio = two.norm() / one.norm()
            torch.testing.assert_close(two, one * ratio, rtol=1e-6, atol=1e-9 * two.norm().item())


def adams_rms(grads: list[list[Tensor]]) -> list[list[float]]:
    """Return the root mean squares of AdamW's moves in units of lr, from torch's own."""
    settings = {key: SETTINGS[key] for key in ("lr", "betas", "weight_decay")}
    found = moves(torch.optim.AdamW(zeros(), **settings), grads)
    return [[x.square().mean().sqrt().item() / SETTINGS["lr"] for x in step] for step in found]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_the_length_is_that_of_adamw(case):
    """Samples of small matrices are the whole matrices, so that torch's AdamW is the reference.

    Twenty steps: the correction of Adam's bias, and refreshes that start other moments anew.
    """
    grads = gradients(20)
    found = moves(build(case, zeros(), length="adamw", scale=0.5), grads)
    for step, expected in zip(found, adams_rms(grads), strict=True):
        for move, rms in zip(step, expected, strict=True):
            if move.norm() > 0:  # frugal's blocks and gradients out of the subspace may stand still
                got = move.square().mean().sqrt().item() / SETTINGS["lr"]
                assert got == pytest.approx(0.5 * rms, rel=1e-6)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_a_fixed_length_is_two_tenths_in_every_step(case):
    for step in moves(build(case, zeros(), length="rms", scale=0.5), gradients(GAP + 1)):
        for move in step:
            if move.norm() > 0:
                rms = move.square().mean().sqrt().item() / SETTINGS["lr"]
                assert rms == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("case", [case for case in EXACT if case.whole], ids=str)
def test_one_row_or_one_column_is_a_matrix_too(case):
    grads = [torch.tensor([[3.0], [-1.0], [0.5]]), torch.tensor([[3.0, -1.0, 0.5, 2.0]])]
    params = [nn.Parameter(torch.zeros_like(grad, dtype=torch.float64)) for grad in grads]
    optimizer = case.build(params, **SETTINGS, length="adamw", scale=1.0)
    moved = moves(optimizer, [[grad.double() for grad in grads]])[0]
    for move in moved:  # the first step of Adam is the sign
        assert move.square().mean().sqrt().item() == pytest.approx(SETTINGS["lr"], rel=1e-6)


@pytest.mark.parametrize("preset", [GaLoreAdamW, FiraAdamW, LowRankAdamW, NorMuonW])
def test_decay_and_sign_keep_their_meaning(preset):
    """W <- (1 - lr wd) W - lr s U, and + lr s U with `maximize`."""
    rank = {} if preset is NorMuonW else {"rank": 3}
    grads, lr, decay = gradients(1)[0], 0.1, 0.5
    found = {}
    for name, more in {
        "plain": {"weight_decay": 0.0},
        "decayed": {"weight_decay": decay},
        "up": {"weight_decay": 0.0, "maximize": True},
    }.items():
        params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
        optimizer = preset(params, lr=lr, length="adamw", **rank, **more)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        found[name] = [param.detach() - 1 for param in params]
    for place, plain in enumerate(found["plain"]):
        torch.testing.assert_close(found["decayed"][place], plain - lr * decay)
        torch.testing.assert_close(found["up"][place], -plain, rtol=1e-6, atol=1e-12)


def test_a_large_matrix_has_a_sample_of_some_entries_that_tells_its_length():
    """1024 entries of 96 x 64 and one a row of 1500 x 40: within a few percent of AdamW's step."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (40, 1500), (1500, 40)]
    ours = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 1.0, "weight_decay": 0.0}
    optimizer = LowRankAdamW(ours, rank=8, length="adamw", scale=1.0, **settings)
    adamw = torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        before = [
            (a.detach().clone(), b.detach().clone()) for a, b in zip(ours, theirs, strict=True)
        ]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng) + 0.3
            b.grad = a.grad.clone()
        optimizer.step()
        adamw.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            assert (a.detach() - old[0]).norm() == pytest.approx(
                float((b.detach() - old[1]).norm()), rel=0.08
            )
    shapes_of = [optimizer.state[p]["sample.exp_avg"].shape for p in ours]
    assert [tuple(shape) for shape in shapes_of] == [(96, 11), (1500, 1), (1500, 1)]


def test_rows_without_gradient_take_no_part_in_the_length():
    """Half the rows, and one of the experts, see no gradient: the others move as with AdamW."""
    rng = torch.Generator().manual_seed(1)
    for shape in ((64, 30), (4, 24, 10)):
        ours = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        theirs = copy.deepcopy(ours)
        optimizer = NorMuonW([ours], lr=1.0, weight_decay=0.0, length="adamw", betas=(0.9, 0.999))
        adamw = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.0)
        seen = torch.ones(shape, dtype=torch.bool)
        seen[..., ::2, :] = False
        if len(shape) == 3:
            seen[1] = False
        for _ in range(3):
            a, b = ours.detach().clone(), theirs.detach().clone()
            ours.grad = torch.randn(shape, generator=rng, dtype=torch.float64) * seen
            theirs.grad = ours.grad.clone()
            optimizer.step()
            adamw.step()
            moved, expected = ours.detach() - a, theirs.detach() - b
            assert moved[~seen].abs().max() < 1e-9
            norms = torch.linalg.matrix_norm(moved), torch.linalg.matrix_norm(expected)
            torch.testing.assert_close(*norms, rtol=0.1, atol=0.0)
            if len(shape) == 3:
                assert norms[0][1] == 0


@pytest.mark.parametrize("name", ["galore", "fira", "muon"])
@pytest.mark.parametrize("length", LENGTHS)
def test_what_has_no_gradient_yet_stands_still(name, length):
    """Zero gradients at first, as behind a zero-initialised layer, and tiny ones."""
    case = next(case for case in CASES if case.name == name)
    params = zeros(torch.float32)
    optimizer = build(case, params, length=length)
    for size in (0.0, 1e-30, 0.0, 1.0):
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, gradients(1, torch.float32)[0], strict=True):
            param.grad = grad * size
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert param.isfinite().all()
            moved = (param.detach() - old).square().mean().sqrt().item() / SETTINGS["lr"]
            assert moved <= 4.0
            if size == 0.0 and length == "adamw" and not before[0].any():
                assert moved == 0.0
    assert all(param.any() for param in params)


def test_low_precision_gradients_are_measured_in_float32():
    grads = gradients(3, torch.bfloat16)
    optimizer = GaLoreAdamW(zeros(torch.bfloat16), rank=3, length="adamw", **SETTINGS)
    moves(optimizer, grads)
    for param in optimizer.param_groups[0]["params"]:
        if (state := optimizer.state[param]).get("sample.exp_avg") is not None:
            assert state["sample.exp_avg"].dtype == torch.float32
    exact = GaLoreAdamW(zeros(torch.float32), rank=3, length="adamw", **SETTINGS)
    moves(exact, [[x.float() for x in step] for step in grads])
    for a, b in zip(*(o.param_groups[0]["params"] for o in (optimizer, exact)), strict=True):
        if "sample.exp_avg" in optimizer.state[a]:
            one, two = (o.state[p]["sample.exp_avg"] for o, p in ((optimizer, a), (exact, b)))
            assert torch.equal(one, two)


def test_groups_have_lengths_and_scales_of_their_own():
    """A group with its own length and no scale has the method's scale for it."""
    a, b, c = (nn.Parameter(torch.zeros(9, 5, dtype=torch.float64)) for _ in range(3))
    optimizer = GaLoreAdamW(
        [
            {"params": [a]},
            {"params": [b], "length": "rms"},
            {"params": [c], "length": "rms", "scale": 0.5},
        ],
        rank=2, lr=1.0, weight_decay=0.0,
    )  # fmt: skip
    assert [group["scale"] for group in optimizer.param_groups] == [0.25, 1.0, 0.5]
    for param in (a, b, c):
        param.grad = gradients(1)[0][0][:9, :5].clone()
    optimizer.step()
    assert b.square().mean().sqrt().item() == pytest.approx(0.2)
    assert c.square().mean().sqrt().item() == pytest.approx(0.1)
    optimizer.param_groups[2]["scale"] = 2.0  # as a schedule over it does
    before = c.detach().clone()
    optimizer.step()
    assert (c.detach() - before).square().mean().sqrt().item() == pytest.approx(0.4)


@pytest.mark.parametrize("length", ["published", *LENGTHS])
def test_the_scale_of_a_group_without_one_is_the_methods(length):
    """However the group comes in, and also where its scale is None."""

    def group(**settings):
        return {"params": [nn.Parameter(torch.zeros(9, 5))], "length": length, **settings}

    others = "rms" if length == "published" else "published"
    optimizer = GaLoreAdamW([group(), group(scale=None)], rank=2, length=others)
    optimizer.add_param_group(group())
    optimizer.add_param_group(group(scale=None))
    optimizer.param_groups += [group(), group(scale=None)]
    optimizer.step()
    scale = 0.25 if length == "published" else 1.0
    assert [each["scale"] for each in optimizer.param_groups] == [scale] * 6
    with pytest.raises(SettingError, match="group 6: scale must be a number of at least 0"):
        optimizer.add_param_group(group(scale=torch.tensor(1.0)))


def test_a_length_changed_under_the_state_is_refused_by_name():
    param = nn.Parameter(torch.ones(9, 5))
    optimizer = GaLoreAdamW([param], rank=2, length="published")
    param.grad = torch.ones(9, 5)
    optimizer.step()
    optimizer.param_groups[0]["length"] = "rms"  # nothing else is kept for it
    optimizer.step()
    optimizer.param_groups[0]["length"] = "adamw"
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"sample\.exp_avg.* length and .* cannot change"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("preset", [MuonW, TrionW])
def test_muons_own_lengths_are_of_the_published_one(preset):
    """One keyword says either; a group takes only the common one, and says where Muon's belongs."""
    param = nn.Parameter(torch.ones(9, 5))
    rank = {} if preset is MuonW else {"rank": 2}
    assert preset([param], length="dion", **rank).param_groups[0]["length"] == "published"
    assert preset([param], length="adamw", **rank).param_groups[0]["length"] == "adamw"
    with pytest.raises(SettingError, match=r"rule=Muon\(length='dion'\)"):
        preset([{"params": [param], "length": "dion"}], **rank)
    for wrong in ("adam", None, ["adamw"]):
        with pytest.raises(SettingError, match=r"length must be one of .*'adamw'.*'dion'"):
            preset([param], length=wrong, **rank)


def test_a_long_run_on_a_sample_goes_as_far_as_adamw():
    """The path of W, not of one step: gradients first agree and then are noise."""
    rng = torch.Generator().manual_seed(5)
    total = {"ours": 0.0, "adamw": 0.0}
    params = {name: nn.Parameter(torch.zeros(48, 64)) for name in total}
    settings = {"lr": 1e-2, "weight_decay": 0.0}
    optimizers = {
        "ours": NorMuonW([params["ours"]], length="adamw", betas=(0.9, 0.999), **settings),
        "adamw": torch.optim.AdamW([params["adamw"]], **settings),
    }
    mean = torch.randn(48, 64, generator=rng)
    for step in range(60):
        grad = mean * math.exp(-step / 20) + torch.randn(48, 64, generator=rng)
        for name, param in params.items():
            before = param.detach().clone()
            param.grad = grad.clone()
            optimizers[name].step()
            total[name] += float((param.detach() - before).norm())
    assert total["ours"] == pytest.approx(total["adamw"], rel=0.03)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_length_that_is_not_published_has_the_rate_of_adamw(preset):
    """Without an lr; Muon's own is twenty times that."""
    param = nn.Parameter(torch.ones(9, 5))
    for length in LENGTHS:
        assert preset([param], rank=2, length=length).param_groups[0]["lr"] == 1e-3
    published = preset([param], rank=2, length="published")
    assert published.param_groups[0]["lr"] == preset.published_lr
    assert preset([param], rank=2, lr=0.5, length="adamw").param_groups[0]["lr"] == 0.5
