"""Plain training loops: scaled losses, odd gradients, late parameters, distributed checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from helpers.cases import CASES, GAP, RANK, Case, assert_same, weights
from helpers.loops import FEW, Net, assert_same_run, batches, fit, halving, loss_of, trained
from helpers.pairwise import in_turn
from lowrank_optim import GaLoreAdamW, param_groups

ONE_FACTOR = {
    "apollo-mini", "muon", "muon-8bit", "muon-power", "normuon", "trion", "trion-8bit",
    "apollo-mini-length", "normuon-length",
}  # fmt: skip
"""Cases whose update of a row depends on all others."""
each_case = pytest.mark.parametrize("case", CASES, ids=str)
STEPS = 2 * GAP + 2
BAD = (0, 1, GAP, GAP + 2)
"""Steps before which a batch gives gradients that are not finite: the first, a refresh, between."""

inf, nan = float("inf"), float("nan")


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_case
def test_a_batch_that_the_scaler_skips_leaves_no_trace(case):
    """Unscaled, clipped and stepped as torch's documentation does; scales are powers of two."""
    model = Net()
    optimizer = case.build(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for step in range(STEPS):
        for factor in (inf, 1.0) if step in BAD else (1.0,):
            loss = loss_of(model, batches(1, step)[0]) * factor
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_run(model, optimizer, *trained(case, STEPS, clip=0.5))


@each_case
def test_a_batch_left_out_by_skip_nonfinite_leaves_no_trace_but_the_count(case):
    """Also after clipping, which makes every gradient NaN."""
    model = Net()
    optimizer = case.build(model.named_parameters(), skip_nonfinite=True)
    for step in range(STEPS):
        if step in BAD:
            fit(model, optimizer, batches(1), clip=0.5, loss=lambda *args: loss_of(*args) * inf)
        fit(model, optimizer, batches(1, step), clip=0.5)
    assert optimizer.skipped_steps == len(BAD)
    assert_same_run(model, optimizer, *trained(case, STEPS, clip=0.5))


@each_case
@pytest.mark.parametrize(("step", "value"), [(0, inf), (2, nan), (GAP, inf)])
def test_one_bad_value_spoils_what_it_must_and_no_subspace(case, step, value):
    """AdamW spoils the entry; a projection mixes its row, what looks at all of it the matrix."""
    model, optimizer = trained(case, step)
    clean = copy.deepcopy((model, optimizer))
    place = (torch.tensor(9), torch.tensor(4))
    hook = model.up.weight.register_hook(lambda grad: grad.index_put(place, torch.tensor(value)))
    fit(model, optimizer, batches(1, step))
    hook.remove()
    fit(*clean, batches(1, step))
    ours, theirs = weights(model), weights(clean[0])
    spoiled = ~ours.pop("up.weight").isfinite()
    del theirs["up.weight"]
    assert_same(ours, theirs)
    spoiled[:, 4] &= case.name != "galore-reverse"
    spoiled[9] = False
    assert not spoiled.any() or case.name in ONE_FACTOR
    for state in optimizer.state.values():
        if "basis" in state:
            basis = state["basis"].float()
            eye = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
            limit = 1e-2 if case.coarse else 1e-5
            torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=limit)


@each_case
def test_gradients_of_zero_decay_the_weights_and_training_goes_on(case):
    """The first ones move what AdamW moves; refreshes among later ones break nothing."""
    model, twin = Net(), Net()
    optimizer = case.build(model.named_parameters())
    plain = torch.optim.AdamW(twin.parameters(), lr=optimizer.defaults["lr"], weight_decay=0.01)
    plain.param_groups[0]["maximize"] = optimizer.defaults["maximize"]

    def nothing(*args):
        return loss_of(*args) * 0.0

    fit(model, optimizer, batches(3), loss=nothing)
    fit(twin, plain, batches(3), loss=nothing)
    assert_same(weights(model), weights(twin))
    start = loss_of(model, batches(1)[0]).item()
    for _ in range(2):
        fit(model, optimizer, batches(1) * 2 * GAP)
        fit(model, optimizer, batches(1) * (GAP + 1), loss=nothing)
    change = loss_of(model, batches(1)[0]).item() - start
    assert change > 0.05 if optimizer.defaults["maximize"] else change < -0.05


@each_case
def test_a_branch_that_is_not_used_for_a_while(case):
    """Without a gradient a weight stays, and its own count stands; a resumed run agrees."""

    def unused(model, batch):
        return loss_of(model, batch, expert=-1)

    model = Net()
    optimizer = case.build(model.named_parameters())
    start = weights(model)
    idle = ("experts", "back.weight", "back.bias")
    fit(model, optimizer, batches(GAP + 1), loss=unused)
    assert all(torch.equal(weights(model)[name], start[name]) for name in idle)
    assert all(float(optimizer.state[model.get_parameter(name)]["step"]) == 0 for name in idle)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = Net()
    resumed.load_state_dict(saved["model"])
    other = case.build(resumed.named_parameters())
    other.load_state_dict(saved["optimizer"])
    for pair in ((model, optimizer), (resumed, other)):
        fit(*pair, batches(3, 20), loss=lambda *args: loss_of(*args, expert=0))
        fit(*pair, batches(3, 30), loss=unused)
        fit(*pair, batches(3, 40), loss=lambda *args: loss_of(*args, expert=1))
        fit(*pair, batches(3, 50))
    assert_same_run(model, optimizer, resumed, other)
    assert not any(torch.equal(weights(model)[name], start[name]) for name in idle)
    assert all(float(optimizer.state[model.get_parameter(name)]["step"]) == 9 for name in idle)


@each_case
def test_tied_weights_are_stepped_once_and_stay_tied(case):
    model = Net(tied=True)
    optimizer = case.build(model.named_parameters())
    fit(model, optimizer, batches(GAP + 1))
    assert float(optimizer.state[model.embed.weight]["step"]) == GAP + 1
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = Net(tied=True)
    resumed.load_state_dict(saved["model"])
    other = case.build(resumed.named_parameters())
    set_optimizer_state_dict(resumed, other, get_optimizer_state_dict(model, optimizer))
    fit(model, optimizer, batches(GAP))
    fit(resumed, other, batches(GAP))
    assert_same_run(model, optimizer, resumed, other)
    assert resumed.head.weight is resumed.embed.weight


def test_tied_weights_given_twice_are_what_they_are_in_torch():
    """`param_groups` gives them once; in one group they are warned of, in two refused."""
    model = Net(tied=True)
    tied = model.embed.weight
    groups = param_groups(model, rank=RANK)
    assert sum(param is tied for group in groups for param in group["params"]) == 1
    for make in (torch.optim.AdamW, lambda params: GaLoreAdamW(params, rank=RANK)):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            make([tied, tied])
        with pytest.raises(ValueError, match="more than one parameter group"):
            make([{"params": [tied]}, {"params": [tied]}])


@each_case
def test_a_parameter_that_is_unfrozen_and_added_late_is_resumed(case):
    stop = GAP - 1
    late = {"lr": 3e-3, "weight_decay": 0.0}
    whole = Net()
    whole.mix.requires_grad_(False)
    first = [(name, p) for name, p in whole.named_parameters() if p.requires_grad]
    optimizer = case.build(first)
    fit(whole, optimizer, batches(stop))
    whole.mix.requires_grad_(True)
    optimizer.add_param_group({"params": [("mix.weight", whole.mix.weight)], **late})
    fit(whole, optimizer, batches(2, stop))
    saved = through_a_file({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = Net()
    resumed.load_state_dict(saved["model"])
    named = dict(resumed.named_parameters())
    mix = named.pop("mix.weight")
    other = case.build([{"params": list(named.items())}, {"params": [("mix.weight", mix)], **late}])
    other.load_state_dict(saved["optimizer"])
    fit(whole, optimizer, batches(STEPS, stop + 2))
    fit(resumed, other, batches(STEPS, stop + 2))
    assert_same_run(whole, optimizer, resumed, other)
    assert float(other.state[resumed.mix.weight]["step"]) == STEPS + 2


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_bf16_weights_rounded_at_random_resume_bit_identically(case):
    stop = GAP + 1
    whole, resumed = Net(torch.bfloat16), Net(torch.bfloat16)
    settings = {"stochastic_rounding": True}
    optimizer = case.build(whole.parameters(), **settings)
    schedule = halving(optimizer)
    fit(whole, optimizer, batches(stop), scheduler=schedule, clip=0.5)
    parts = {"model": whole, "optimizer": optimizer, "schedule": schedule}
    saved = through_a_file({name: part.state_dict() for name, part in parts.items()})
    other = case.build(resumed.parameters(), **settings)
    following = halving(other)
    parts = {"model": resumed, "optimizer": other, "schedule": following}
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    fit(whole, optimizer, batches(STEPS, stop), scheduler=schedule, clip=0.5)
    fit(resumed, other, batches(STEPS, stop), scheduler=following, clip=0.5)
    assert_same_run(whole, optimizer, resumed, other)
    assert not torch.equal(resumed.up.weight, Net(torch.bfloat16).up.weight)


NESTED = StateDictOptions()
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@pytest.mark.parametrize(
    ("case", "options", "as_rate"),
    in_turn(CASES, (NESTED, float), (FLAT, torch.tensor), (FLAT, float), (NESTED, torch.tensor)),
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_asking_for_the_state_dict_before_training_leaves_no_trace(case, options, as_rate):
    """It takes a step with gradients of zero and a rate of 0."""
    rate = as_rate(case.settings.get("lr", 1e-2))
    model, plain = Net(), Net()
    asked = case.build(model.named_parameters(), lr=rate)
    get_optimizer_state_dict(model, asked, options=options)
    assert len(asked.state) == len(list(model.parameters()))
    other = case.build(plain.named_parameters(), lr=rate)
    for pair in ((model, asked), (plain, other)):
        assert type(pair[1].param_groups[0]["lr"]) is type(rate)
        fit(*pair, batches(GAP + 2))
    assert_same_run(model, asked, plain, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    ("case", "options", "as_rate"),
    in_turn(
        FEW, (NESTED, torch.tensor), (FLAT, torch.tensor), (FLAT, float), (FULL, float),
        every=FEW[:1],
    ),
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)  # fmt: skip
def test_a_distributed_checkpoint_on_disk_resumes(case, options, as_rate, tmp_path):
    """Into the state dict of a fresh optimizer that has loaded its own, as Accelerate makes it."""
    whole, resumed = Net(), Net()
    optimizer = case.build(whole.named_parameters(), lr=as_rate(2**-7))
    fit(whole, optimizer, batches(GAP + 1))
    optimizer.param_groups[0]["lr"] = as_rate(2**-8)
    held = get_optimizer_state_dict(whole, optimizer, options=options)
    dcp.save({"model": whole.state_dict(), "optimizer": held}, checkpoint_id=tmp_path)
    other = case.build(resumed.named_parameters(), lr=as_rate(2**-7))
    other.load_state_dict(other.state_dict())
    held = get_optimizer_state_dict(resumed, other, options=options)
    found = {"model": resumed.state_dict(), "optimizer": held}
    dcp.load(found, checkpoint_id=tmp_path)
    resumed.load_state_dict(found["model"])
    set_optimizer_state_dict(resumed, other, found["optimizer"], options=options)
    fit(whole, optimizer, batches(STEPS))
    fit(resumed, other, batches(STEPS))
    assert_same_run(whole, optimizer, resumed, other)
    assert float(other.param_groups[0]["lr"]) == 2**-8


def test_groups_keep_their_keys_once_a_state_is_loaded():
    """A flat checkpoint is read by the group keys of the optimizer that loads it."""
    model = Net()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    keys = set(optimizer.param_groups[0])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(6, 5))]})
    assert [set(group) for group in optimizer.param_groups] == [keys, keys]
    assert set(copy.deepcopy(optimizer).param_groups[0]) == keys
