"""A run saved on some number of processes goes on, on any other number."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel import GAP, METHODS, Net, difference, optimizer_of, train, trained, weights, wrapped
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

COUNTS = (1, 2, 4)
STOP, END = GAP + 1, 2 * GAP + 2
DTYPE = torch.float64
FORMS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("saved_on", COUNTS)
def test_saved_on_some_processes_goes_on_on_any_number(ranks, tmp_path, method, saved_on):
    reference = trained(method, END, DTYPE)
    uninterrupted = ranks.run(saved_on, save, method, tmp_path)[0]
    assert difference(uninterrupted, reference) < 1e-12
    for loaded_on in COUNTS:
        for form in FORMS:
            found = ranks.run(loaded_on, resume, method, tmp_path, form)[0]
            assert difference(found, reference) < 1e-12, (loaded_on, form)
            if loaded_on == saved_on:
                assert difference(found, uninterrupted) == 0, (loaded_on, form)
