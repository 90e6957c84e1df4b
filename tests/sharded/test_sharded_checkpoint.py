"""A run saved on some number of processes goes on, on any other number."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from helpers.pairwise import in_turn
from helpers.parallel import (
    GAP,
    METHODS,
    Net,
    difference,
    optimizer_of,
    train,
    trained,
    weights,
    wrapped,
)
from lowrank_optim import GaLoreAdamW

pytestmark = pytest.mark.slow

COUNTS = (1, 2, 4)
STOP, END = GAP + 1, 2 * GAP + 2
DTYPE = torch.float64
FORMS = {
    "nested": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True, flatten_optimizer_state_dict=True),
}


def save(method, folder):
    """Train up to `STOP`, save in every form, and return the weights at `END`."""
    model = wrapped(Net(DTYPE), "fsdp")
    optimizer = optimizer_of(model, method)
    train(model, optimizer, range(STOP))
    for form, options in FORMS.items():
        parts = dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True))
        if form != "full":
            dcp.save(parts, checkpoint_id=folder / form)
        elif dist.get_rank() == 0:
            torch.save(parts, folder / form)
    train(model, optimizer, range(STOP, END))
    return weights(model)


def resume(method, folder, form):
    """Load what `save` saved into a new model and go on to `END`."""
    options = FORMS[form]
    model = Net(DTYPE)
    torch.nn.init.zeros_(model.embed.weight)
    model = wrapped(model, "fsdp")
    optimizer = optimizer_of(model, method, lr=0.3)
    if form == "full":
        parts = torch.load(folder / form, weights_only=True)
    else:
        parts = dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True))
        dcp.load(parts, checkpoint_id=folder / form)
    set_state_dict(
        model, optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"], options=options
    )
    train(model, optimizer, range(STOP, END))
    return weights(model)


def forms_of(saved_on, loaded_on):
    """Return two of the four forms: all have their turn for each number of processes."""
    first = (COUNTS.index(saved_on) + COUNTS.index(loaded_on)) % 2
    return tuple(FORMS)[2 * first : 2 * first + 2]


def test_every_number_of_processes_saves_and_loads_every_form():
    for count in COUNTS:
        for pairs in ([(count, other) for other in COUNTS], [(other, count) for other in COUNTS]):
            assert {form for pair in pairs for form in forms_of(*pair)} == set(FORMS)


RUNS = [
    *(("galore-power-rotate", count, COUNTS) for count in COUNTS),
    *in_turn(tuple(METHODS)[::2], (1, (2,)), (2, (4,)), (4, (1,)), (2, (1,)), (4, (4,))),
]
"""Every number of processes with every other for one method, and one pair for some of the rest."""


@pytest.mark.parametrize(("method", "saved_on", "counts"), RUNS, ids=str)
def test_saved_on_some_processes_goes_on_on_any_number(ranks, tmp_path, method, saved_on, counts):
    reference = trained(method, END, DTYPE)
    uninterrupted = ranks.run(saved_on, save, method, tmp_path)[0]
    assert difference(uninterrupted, reference) < 1e-12
    for loaded_on in counts:
        forms = forms_of(saved_on, loaded_on)
        for form in forms if counts == COUNTS else forms[saved_on % 2 :][:1]:
            found = ranks.run(loaded_on, resume, method, tmp_path, form)[0]
            assert difference(found, reference) < 1e-12, (loaded_on, form)
            if loaded_on == saved_on:
                assert difference(found, uninterrupted) == 0, (loaded_on, form)


def from_one_process(method, path):
    """Load what one process has saved with torch.save, each rank its part of it, and go on."""
    model = wrapped(Net(DTYPE), "fsdp")
    optimizer = optimizer_of(model, method, lr=0.3)
    saved = torch.load(path, weights_only=True)
    set_model_state_dict(
        model, saved["m"], options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    optimizer.load_state_dict(saved["o"])
    train(model, optimizer, range(STOP, END))
    return weights(model)


@pytest.mark.parametrize("method", tuple(METHODS)[1::2])
def test_the_state_of_one_process_is_loaded_part_by_part(ranks, tmp_path, method):
    model = Net(DTYPE)
    optimizer = optimizer_of(model, method)
    train(model, optimizer, range(STOP))
    path = tmp_path / "plain.pt"
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, path)
    train(model, optimizer, range(STOP, END))
    for found in ranks.run(2, from_one_process, method, path):
        assert difference(found, weights(model)) < 1e-12


def wrong_way():
    """Give a sharded state to ordinary parameters, and a state of another layout."""
    model = wrapped(Net(), "fsdp")
    optimizer = optimizer_of(model, "galore")
    train(model, optimizer, range(1))
    plain = optimizer_of(Net(), "galore")
    with pytest.raises(ValueError, match=r"is sharded in the checkpoint and the parameter is not"):
        plain.load_state_dict(optimizer.state_dict())
    assert not plain.state
    columns = torch.nn.Linear(30, 8, bias=False)
    narrow = GaLoreAdamW(columns.parameters(), rank=3)
    columns.weight.grad = torch.ones_like(columns.weight)
    narrow.step()
    rows = fully_shard(torch.nn.Linear(30, 8, bias=False))
    auto = GaLoreAdamW(rows.parameters(), rank=3)
    with pytest.raises(ValueError, match=r'side="auto" goes by the sharding: take "right"'):
        auto.load_state_dict(narrow.state_dict())


def test_a_state_that_does_not_fit_is_refused_with_the_way_out(ranks):
    ranks.run(2, wrong_way)
