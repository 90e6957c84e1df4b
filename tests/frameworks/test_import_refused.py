"""What cannot be imported is refused with the reason, and nothing is changed."""

from __future__ import annotations

import copy

import galore_torch
import pytest
import torch
from torch import nn

from helpers.foreign import (
    GAP,
    RANK,
    begun,
    groups,
    our_optimizer,
    step,
    weights,
)
from lowrank_optim import DCTAdamW, GaLoreAdamW, GradScaled, LowRank, import_state


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
    "a sample": (
        as_it_is,
        lambda p: our_optimizer("galore", p, length="adamw"),
        'no sample of each matrix, .* length="adamw" in group 1: .* length="published"',
    ),
    "a length of its own": (
        as_it_is,
        lambda p: our_optimizer("galore", p, length="rms"),
        r"scale=0\.5 in group 1 .* has length='rms': .* keep=\(\"scale\",\)",
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
