"""Checkpoints of galore-torch, fira and apollo-torch go on in our optimizers.

The sign of a singular vector is LAPACK's choice there, so that after a refresh subspaces are
compared, not weights.
"""

from __future__ import annotations

import os
import sys

import galore_torch
import pytest
import torch
from torch import Tensor, nn

from helpers.foreign import (
    DECAY,
    GAP,
    KEEP,
    NUMBERS,
    PROJ_TYPES,
    PROJECTED,
    RANK,
    SHAPES,
    THEIRS,
    begun,
    copies,
    each,
    each_exact,
    our_optimizer,
    step,
    their_optimizer,
    weights,
)
from lowrank_optim import ApolloAdamW, GaLoreAdamW, import_state
from lowrank_optim.functional import load
from lowrank_optim.parts.storage import stored


def projection(basis: Tensor) -> Tensor:
    """The projector onto the span of the columns, which knows no signs."""
    return basis @ basis.mT


def their_basis(optimizer, param):
    """With the projected axis first, as ours."""
    ortho = optimizer.state[param]["projector"].ortho_matrix
    return ortho if ortho.shape[1] == RANK else ortho.mT


@pytest.mark.parametrize(
    ("name", "proj_type"),
    [(name, kind) for name in ("galore", "fira") for kind in PROJ_TYPES] + [("apollo-svd", "std")],
)
@pytest.mark.parametrize("stop", [1, GAP, GAP + 1, 2 * GAP + 2])
def test_training_goes_on_in_the_same_subspace(name, proj_type, stop):
    """Updates agree to 1e-6 until the next refresh, which falls on the same step and finds the
    same subspace. (Fira and APOLLO have 1e-8 in more denominators than we do; apollo-torch can
    only project the shorter axis.)
    """
    params, theirs = begun(name, stop, proj_type=proj_type)
    twins = copies(params)
    ours = our_optimizer(name, twins, side=PROJ_TYPES[proj_type])
    import_state(ours, theirs.state_dict())
    refresh = -(-stop // GAP) * GAP
    before = {key: ours.state[twins[key]]["basis"].clone() for key in PROJECTED}
    for key in PROJECTED:
        assert ours.state[twins[key]]["pending"] == 0
        assert not ours.state[twins[key]]["unset"].any()
    for number in range(stop, refresh + 1):
        left, right = step(twins, ours, number), step(params, theirs, number)
        for key in SHAPES if number < refresh else ("bias",):
            error = (left[key] - right[key]).norm() / right[key].norm()
            assert error <= 1e-6, (number, key)
        for key in PROJECTED:
            mine, its = ours.state[twins[key]]["basis"], their_basis(theirs, params[key])
            if number < refresh:
                assert torch.equal(mine, its)
            else:
                torch.testing.assert_close(projection(mine), projection(its), rtol=0, atol=1e-5)
                assert not torch.allclose(projection(mine), projection(before[key]), atol=0.05)


@each_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_kept_in_another_dtype_goes_on_as_near_as_that_allows(name, dtype):
    """Of bf16 weights we keep float32 states: what they are given is the same to the bit."""
    params, theirs = begun(name, GAP + 2, dtype)
    twins = copies(params)
    ours = our_optimizer(name, twins)
    import_state(ours, theirs.state_dict())
    for key in SHAPES:
        mine, its = ours.state[twins[key]], theirs.state[params[key]]
        wide = key == "wide"
        for slot in ("exp_avg", "exp_avg_sq"):
            assert mine[slot].dtype == torch.float32
            assert torch.equal(mine[slot], (its[slot].mT if wide else its[slot]).float())
    if dtype == torch.float32:
        left, right = step(twins, ours, GAP + 2), step(params, theirs, GAP + 2)
        for key in SHAPES:
            assert (left[key] - right[key]).norm() <= 1e-4 * right[key].norm(), key


@pytest.mark.parametrize("stop", [1, 4, GAP, GAP + 3])
def test_staggered_the_next_refresh_is_at_the_next_turn(stop):
    params, theirs = begun("galore", stop)
    ours = our_optimizer("galore", params, stagger=True)
    import_state(ours, theirs.state_dict())
    moved = {key: [] for key in PROJECTED}
    for number in range(stop, stop + 2 * GAP):
        before = {key: ours.state[params[key]]["basis"].clone() for key in PROJECTED}
        step(params, ours, number)
        for key in PROJECTED:
            if not torch.equal(ours.state[params[key]]["basis"], before[key]):
                moved[key].append(number)
    for turn, key in enumerate(PROJECTED):
        first, second = moved[key]
        assert first - stop < GAP
        assert first % GAP == turn * GAP // len(PROJECTED)
        assert second == first + GAP


@each
def test_plain_parameters_go_on_exactly(name):
    """Their AdamW's state is torch's: the bias gets the next update of `torch.optim.AdamW`."""
    params, theirs = begun(name, 7)
    twins = copies(params)
    ours = our_optimizer(name, twins)
    import_state(ours, theirs.state_dict(), keep=KEEP.get(name, ()))
    mine, its = ours.state[twins["bias"]], theirs.state[params["bias"]]
    assert set(mine) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(mine["step"]) == 7
    alone = nn.Parameter(twins["bias"].detach().clone())
    adamw = torch.optim.AdamW([alone], **NUMBERS)
    adamw.state[alone] = {
        "step": torch.tensor(7.0),
        "exp_avg": its["exp_avg"].clone(),
        "exp_avg_sq": its["exp_avg_sq"].clone(),
    }
    step(twins, ours, 7)
    alone.grad = twins["bias"].grad
    adamw.step()
    assert torch.equal(twins["bias"], alone)


@each
def test_numbers_come_from_the_checkpoint_but_those_that_are_kept(name):
    params, theirs = begun(name, 2, betas=(0.8, 0.95), eps=1e-7)
    saved = theirs.state_dict()
    for group in saved["param_groups"]:
        group["initial_lr"] = 0.5
    shares = name == "apollo"
    ours = our_optimizer(name, params, seed=3)
    if shares:
        saved = only_first(saved)
        ours = ApolloAdamW(groups_of_first(params), seed=3)
    import_state(ours, saved)
    plain, projected = ours.param_groups
    for group in (plain, projected):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-7)
        assert (group["weight_decay"], group["initial_lr"], group["seed"]) == (DECAY, 0.5, 3)
    scale = THEIRS[name][1].get("alpha", THEIRS[name][1].get("scale"))
    assert projected["scale"] == scale * (RANK / 7 if shares else 1)
    assert projected["update_proj_gap"] == GAP
    assert not {"alpha", "proj_type", "correct_bias", "proj", "scale_type"} & set(projected)
    again = type(ours)(
        [{"params": group["params"], "rank": group["rank"]} for group in ours.param_groups],
        lr=0.3,
        scale=0.7,
        projector=projected["projector"],
    )
    import_state(again, saved, keep=("lr", "scale"))
    assert [group["lr"] for group in again.param_groups] == [0.3, 0.3]
    assert again.param_groups[1]["scale"] == 0.7
    assert again.param_groups[1]["eps"] == 1e-7
    with pytest.raises(ValueError, match="keep='learning_rate' is no setting"):
        import_state(again, saved, keep=("learning_rate",))


def groups_of_first(params):
    return [{"params": [params["bias"]]}, {"params": [params["tall"]], "rank": RANK}]


def only_first(saved):
    """Of a checkpoint, the plain group and the first matrix."""
    plain, projected = saved["param_groups"]
    return {**saved, "param_groups": [plain, {**projected, "params": projected["params"][:1]}]}


@each
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_is_read_without_the_package_that_made_it(name, nested, tmp_path, monkeypatch):
    params, theirs = begun(name, 3)
    saved = theirs.state_dict()
    path = tmp_path / "optimizer.pt"
    torch.save({"epoch": 1, "optimizers": [saved]} if nested else saved, path)
    ours, other = (our_optimizer(name, params) for _ in range(2))
    import_state(ours, saved, keep=KEEP.get(name, ()))
    for package in ("galore_torch", "fira", "apollo_torch"):
        for module in [key for key in sys.modules if key.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, module, None)
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(path, weights_only=True)
    import_state(other, str(path) if nested else path, keep=KEEP.get(name, ()))
    assert set(torch.serialization.get_safe_globals()) == allowed
    for param in params.values():
        left, right = ours.state[param], other.state[param]
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), key


class Unsafe:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    params, theirs = begun("galore", 1)
    saved = theirs.state_dict()
    saved["state"][0]["step"] = Unsafe(tmp_path / "made")
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt'.*holds more than tensors"):
        import_state(our_optimizer("galore", params), tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()
    with pytest.raises(FileNotFoundError):
        import_state(our_optimizer("galore", params), tmp_path / "b.pt")


@each_exact
@pytest.mark.parametrize("state", [torch.bfloat16, "8bit"], ids=str)
def test_states_are_stored_as_ours_are(name, state):
    """In bf16 and 8 bits, to the nearest values of the format."""
    params, theirs = begun(name, 7)
    ours = our_optimizer(name, params, state_dtype=state)
    import_state(ours, theirs.state_dict())
    for key in PROJECTED:
        mine, its = ours.state[params[key]], theirs.state[params[key]]
        assert mine["basis"].dtype == torch.bfloat16
        for slot, square in (("exp_avg", False), ("exp_avg_sq", True)):
            held = stored(mine, slot)
            assert isinstance(held, tuple) == (state == "8bit")
            value = load(held, torch.float32, square)
            right = its[slot].mT if key == "wide" else its[slot]
            largest = right.abs().amax(-1, keepdim=True)
            assert ((value - right).abs() <= (0.04 if held is not value else 0) * largest).all()
    step(params, ours, 7)


@pytest.mark.parametrize("state", [torch.bfloat16, "8bit"], ids=str)
def test_squares_are_rounded_at_random_each_parameter_by_itself(state):
    """Two plain matrices with the same moments are stored differently, and right on average."""
    pair = [nn.Parameter(torch.ones(80, 60)) for _ in range(2)]
    matrix = nn.Parameter(torch.ones(8, 6))
    groups = [{"params": pair}, {"params": [matrix], "rank": 2}]
    theirs = galore_torch.GaLoreAdamW(
        [groups[0], {**groups[1], "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}],
        no_deprecation_warning=True,
    )
    grad = torch.randn(80, 60, generator=torch.Generator().manual_seed(0))
    for param in (*pair, matrix):
        param.grad = grad[: param.shape[0], : param.shape[1]]
    theirs.step()
    ours = GaLoreAdamW(groups, state_dtype=state)
    import_state(ours, theirs.state_dict())
    found = [load(stored(ours.state[param], "exp_avg_sq"), torch.float32, True) for param in pair]
    right = theirs.state[pair[0]]["exp_avg_sq"]
    assert not torch.equal(*found)
    for value in found:
        assert float(value.mean() / right.mean()) == pytest.approx(1, abs=2e-3)


def test_a_parameter_that_had_no_gradient_yet_starts_anew():
    params = weights()
    theirs = their_optimizer("galore", params)
    params["wide"].requires_grad_(False)
    for number in range(2):
        for place, param in enumerate(params.values()):
            if param.requires_grad:
                param.grad = torch.full_like(param, number + place + 1.0)
        theirs.step()
    params["wide"].requires_grad_()
    ours = our_optimizer("galore", params)
    step(params, ours, 0)
    import_state(ours, theirs.state_dict())
    assert params["wide"] not in ours.state
    step(params, ours, 2)
    assert float(ours.state[params["wide"]]["step"]) == 1
    assert float(ours.state[params["tall"]]["step"]) == 3


def test_the_limiter_goes_on_and_starts_anew_from_a_norm_of_zero():
    params, theirs = begun("fira", 2)
    saved = theirs.state_dict()
    wanted = [float(saved["state"][place]["scaling_grad"]) for place in (1, 2, 3)]
    saved["state"][2]["scaling_grad"] = torch.tensor(0.0)
    ours = our_optimizer("fira", params)
    import_state(ours, saved)
    found = [float(ours.state[params[key]]["residual_norm"]) for key in PROJECTED]
    assert found == [wanted[0], float("inf"), wanted[2]]
    without = our_optimizer("fira", params, limiter=None)
    import_state(without, saved)
    assert "residual_norm" not in without.state[params["tall"]]
