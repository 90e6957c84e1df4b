"""Checkpoints of galore-torch, fira and apollo-torch go on in our optimizers.

Theirs add eps to the uncorrected root and decay after the update: so eps is tiny here, and an
update is what is left of a step without its decay. The sign of a singular vector is LAPACK's choice
there, so that after a refresh subspaces are compared, not weights.
"""

from __future__ import annotations

import copy
import os
import sys

import fira
import galore_torch
import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradScaled,
    LowRank,
    import_state,
)
from lowrank_optim.functional import load
from lowrank_optim.storage import stored

DECAY, GAP, RANK = 0.1, 5, 3
SHAPES = {"tall": (13, 7), "wide": (5, 11), "square": (9, 9), "bias": (11,)}
PROJECTED = ("tall", "wide", "square")
PROJ_TYPES = {"std": "auto", "reverse_std": "reverse", "right": "right", "left": "left"}
NUMBERS = {"lr": 1e-2, "eps": 1e-12, "weight_decay": DECAY}


def apollo_class(*_, **__):
    module = pytest.importorskip("apollo_torch", reason="apollo-torch is needed to compare with it")
    return module.APOLLOAdamW


THEIRS = {
    "galore": (lambda: galore_torch.GaLoreAdamW, {"scale": 0.5}),
    "fira": (lambda: fira.FiraAdamW, {"alpha": 0.5}),
    "apollo": (apollo_class, {"scale": 2.0, "proj": "random", "scale_type": "channel"}),
    "apollo-svd": (apollo_class, {"scale": 2.0, "proj": "svd", "scale_type": "channel"}),
}
OURS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "apollo": ApolloAdamW,
    "apollo-svd": lambda *args, **more: ApolloAdamW(*args, projector="svd", **more),
}
EXACT = ("galore", "fira", "apollo-svd")
KEEP = {"apollo": ("scale",)}
"""Axes of several lengths have no common scale there: see the test of just that."""
each_exact = pytest.mark.parametrize("name", EXACT)
each = pytest.mark.parametrize("name", THEIRS)


def weights(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def groups(params, **settings):
    """The plain group first, as in their README."""
    return [
        {"params": [params["bias"]]},
        {"params": [params[name] for name in PROJECTED], **settings},
    ]


def their_optimizer(name, params, *, rank=RANK, gap=GAP, proj_type="std", **numbers):
    cls, keys = THEIRS[name]
    settings = {"rank": rank, "update_proj_gap": gap, "proj_type": proj_type, **keys}
    return cls()(groups(params, **settings), no_deprecation_warning=True, **{**NUMBERS, **numbers})


def our_optimizer(name, params, *, rank=RANK, side="auto", **settings):
    """One that has nothing but its structure in common with theirs."""
    return OURS[name](groups(params, rank=rank), side=side, **{"stagger": False, **settings})


def step(params, optimizer, number):
    """Do one step with gradients of the number alone; return the updates without their decay."""
    before = {name: param.detach().clone() for name, param in params.items()}
    for place, param in enumerate(params.values()):
        rng = torch.Generator().manual_seed(100 * number + place)
        mean = torch.ones(param.shape, dtype=torch.float64).cumsum(0)
        noise = torch.randn(param.shape, generator=rng, dtype=torch.float64)
        param.grad = (0.2 * mean + noise).to(param.dtype)
    optimizer.step()
    kept = 1 - NUMBERS["lr"] * DECAY
    ours = isinstance(optimizer, LowRank)
    return {
        name: before[name] * kept - param.detach() if ours else before[name] - param.detach() / kept
        for name, param in params.items()
    }


def begun(name, steps, dtype=torch.float64, **settings):
    """Their optimizer after some steps, with its parameters."""
    params = weights(dtype)
    optimizer = their_optimizer(name, params, **settings)
    for number in range(steps):
        step(params, optimizer, number)
    return params, optimizer


def copies(params):
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}


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


def edited(change):
    """A galore-torch checkpoint with something changed in the state of its first matrix."""

    def make(saved):
        change(saved["state"][1])
        return saved

    return make


def full(state):
    state["projector"].proj_type = "full"
    state["projector"].ortho_matrix = [torch.zeros(13, 3), torch.zeros(3, 7)]


def without_basis(state):
    state["projector"].ortho_matrix = None


def narrow_basis(state):
    state["projector"].ortho_matrix = torch.zeros(2, 7)


def eight_bit(state):
    for key in ("exp_avg", "exp_avg_sq"):
        del state[key]
    state.update(state1=torch.zeros(13, 3, dtype=torch.uint8), qmap1=torch.zeros(256))


def adafactor(saved):
    """What the Adafactor of galore-torch makes."""
    params = weights(torch.float32)
    settings = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std", "scale": 0.5}
    optimizer = galore_torch.GaLoreAdafactor(groups(params, **settings))
    step(params, optimizer, 0)
    return optimizer.state_dict()


def without_state(saved):
    """What transformers saves of a layer-wise run: the state of a dummy."""
    return {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def in_group(**changes):
    """A galore-torch checkpoint with something changed in its projected group."""

    def make(saved):
        saved["param_groups"][1].update(changes)
        return saved

    return make


def as_it_is(saved):
    return saved


def in_side(side):
    return lambda p: our_optimizer("galore", p, side=side)


REFUSED = {
    "proj_type full": (edited(full), "galore", r"\(13, 7\).*proj_type='full'.*two bases"),
    "no basis": (edited(without_basis), "galore", r"projector of .*\(13, 7\).*no basis"),
    "basis of another width": (edited(narrow_basis), "galore", r"basis .*\(7, 2\).*\(7, 3\) here"),
    "8 bits": (edited(eight_bit), "galore", r"\(13, 7\).*'state1', 'qmap1'.*8-bit"),
    "adafactor": (adafactor, "galore", r"'RMS'.*Adafactor"),
    "no moment": (edited(lambda s: s.pop("exp_avg_sq")), "galore", "no 'exp_avg_sq'"),
    "layer-wise": (without_state, "galore", "no state: .*layer-wise"),
    "no bias correction": (
        in_group(correct_bias=False),
        "galore",
        "correct_bias=False in group 1",
    ),
    "a number that is none": (in_group(eps=-1.0), "galore", r"eps=-1\.0 in group 1"),
    "other method": (as_it_is, "fira", "galore-torch.*NormScaled.*group 1: build GaLoreAdamW"),
    "other rank": (
        as_it_is,
        lambda p: our_optimizer("galore", p, rank=2),
        r"ranks of parameter 0 of group 1.*rank 3 in the checkpoint, 2 here",
    ),
    "rank beyond the axis": (
        as_it_is,
        lambda p: our_optimizer("galore", p, rank=7),
        r"\(13, 7\), was projected to rank 3 .* not projected here",
    ),
    "plain there": (
        as_it_is,
        lambda p: GaLoreAdamW([{"params": [torch.nn.Parameter(torch.ones(8, 6))], "rank": 2},
                               groups(p, rank=RANK)[1]]),
        r"\(8, 6\), was not projected in the checkpoint and is projected to rank 2 here",
    ),
    "left": (as_it_is, in_side("left"), r"\(13, 7\).*proj_type='std'.*side='left'.*side=\"auto\""),
    "reverse": (as_it_is, in_side("reverse"), r"side='reverse' here"),
    "other projector": (
        as_it_is,
        lambda p: GaLoreAdamW(groups(p, rank=RANK), projector="random"),
        r'learnt.*Random\(\).*projector="svd"',
    ),
    "dct": (as_it_is, lambda p: DCTAdamW(groups(p, rank=RANK)), r"DCT\("),
    "other rule": (
        as_it_is,
        lambda p: LowRank(groups(p, rank=RANK), rule="lion"),
        r"Adam's moments.*Lion\(\)",
    ),
    "other groups": (
        as_it_is,
        lambda p: GaLoreAdamW(list(p.values()), rank=RANK),
        r"groups of \[1, 3\].*of \[4\]",
    ),
    "other shapes": (
        as_it_is,
        lambda p: GaLoreAdamW([groups(p)[0], {"params": [nn.Parameter(torch.ones(14, 7)),
                               p["wide"], p["square"]], "rank": RANK}]),
        r"'exp_avg' of .*\(14, 7\), has shape \(13, 3\) in the checkpoint and \(14, 3\) here",
    ),
    "our own": (
        lambda saved: our_checkpoint(),
        "galore",
        "one of this package is loaded with optimizer.load_state_dict",
    ),
    "nothing": (lambda saved: {"model": {}}, "galore", "holds 0 optimizer state dicts"),
    "two": (lambda saved: {"a": saved, "b": saved}, "galore", "holds 2 optimizer state dicts"),
}  # fmt: skip


def our_checkpoint():
    params = weights()
    optimizer = our_optimizer("galore", params)
    step(params, optimizer, 0)
    return optimizer.state_dict()


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_imported_is_refused_and_changes_nothing(why):
    change, build, message = REFUSED[why]
    _, theirs = begun("galore", 3)
    saved = change(copy.deepcopy(theirs.state_dict()))
    params = weights()
    ours = our_optimizer(build, params) if isinstance(build, str) else build(params)
    for group in ours.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        import_state(ours, saved)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for place, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][place][key]))


APOLLO_REFUSED = {
    "as GaLore": (lambda p: our_optimizer("galore", p), "apollo-torch.*build ApolloAdamW"),
    "learnt": (lambda p: our_optimizer("apollo-svd", p), r'random.*SVD\(\).*projector="random"'),
    "a factor a tensor": (
        lambda p: LowRank(groups(p, rank=RANK), projector="random",
                          residual=GradScaled(per="tensor")),
        r"scale_type='channel'.*GradScaled\(per=\"row\"\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", APOLLO_REFUSED)
def test_an_apollo_checkpoint_goes_into_nothing_else(why):
    build, message = APOLLO_REFUSED[why]
    params, theirs = begun("apollo", 2)
    ours = build(params)
    with pytest.raises(ValueError, match=message):
        import_state(ours, theirs.state_dict(), keep=("scale",))
    assert not ours.state


def test_only_an_optimizer_of_ours_takes_it():
    with pytest.raises(TypeError, match="not a AdamW"):
        import_state(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), {})
