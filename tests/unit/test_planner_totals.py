"""What the planner says of activations and totals is what training takes, on a CPU within 5 %."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.pairwise import crossed
from helpers.peak import Peak
from lowrank_optim import LowRank, estimate_memory, state_bytes
from lowrank_optim.engine.memory import shared_bytes
from lowrank_optim.planner.estimate import METHODS
from lowrank_optim.planner.estimate import enable_checkpointing as checkpoint
from lowrank_optim.planner.models import build, token_loss
from lowrank_optim.planner.phases import weight_bytes
from lowrank_optim.planner.search import Traces
from lowrank_optim.planner.trace import trace

pytestmark = pytest.mark.slow

RANK = 16


def llama(dtype=torch.float32, kv_heads=4, vocab=320, checkpointing=False):
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_attention_heads=4, num_hidden_layers=3,
        num_key_value_heads=kv_heads, vocab_size=vocab, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).train()
    if checkpointing:
        checkpoint(model)
    return model


def optimizer_of(name, model):
    """Return the optimizer that the planner means by a name."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True)
    return METHODS[name].build(METHODS[name].groups(model, RANK))


def measured(model, optimizer, batch, seq, layerwise=False):
    """Return the most bytes that live in a second step on a CPU: backward pass, and all of it."""
    if layerwise:
        optimizer.step_in_backward()

    def backward():
        tokens = torch.zeros(batch, seq, dtype=torch.int64)
        model(input_ids=tokens, labels=tokens).loss.backward()

    backward()
    optimizer.step()
    optimizer.zero_grad()
    shared = optimizer._session.shared.tensors() if isinstance(optimizer, LowRank) else []
    entries = (value for state in optimizer.state.values() for value in state.values())
    known = [*model.parameters(), *model.buffers(), *shared]
    known += [value for value in entries if isinstance(value, torch.Tensor)]
    with Peak(known) as peak:
        backward()
        first = peak.peak
        optimizer.step()
    kept = weight_bytes(model) + state_bytes(optimizer)
    kept += shared_bytes(optimizer) if isinstance(optimizer, LowRank) else 0
    return kept + first, kept + peak.peak


@crossed(dtype=[torch.float32, torch.bfloat16], vocab=[320, 3200], checkpointing=[False, True])
def test_activations_are_those_of_a_real_pass(dtype, vocab, checkpointing):
    real = llama(dtype, vocab=vocab, checkpointing=checkpointing)
    tokens = torch.zeros(3, 80, dtype=torch.int64)
    with Peak([*real.parameters(), *real.buffers(), tokens]) as peak:
        real(input_ids=tokens, labels=tokens).loss.backward()
    real.zero_grad()
    planned = trace(real.to("meta"), token_loss, 3, 80).live.max() - tokens.nbytes
    assert planned == pytest.approx(peak.peak, rel=0.05)


TOTALS = [
    ("adamw", 4, 64, False, False),
    ("adamw", 1, 8, False, False),
    ("galore", 4, 64, False, True),
    ("galore", 4, 64, True, False),
    ("lowrank", 4, 64, True, True),
    ("fira", 4, 96, False, False),
]


@pytest.mark.parametrize(("name", "batch", "seq", "layerwise", "checkpointing"), TOTALS)
def test_total_is_that_of_a_real_step(name, batch, seq, layerwise, checkpointing):
    model = llama(checkpointing=checkpointing)
    plan = estimate_memory(
        model, optimizer=name, rank=RANK, batch=batch, seq=seq, layerwise=layerwise
    )[name]
    backward, total = measured(model, optimizer_of(name, model), batch, seq, layerwise)
    assert plan.total == pytest.approx(total, rel=0.05)
    if not layerwise:
        assert plan.phases["backward"].total == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.optimizer])
def test_total_is_that_of_a_real_step_where_the_step_takes_the_most(name):
    """Few tokens, a model whose matrices are larger than what plain torch works on at once."""
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1032, num_attention_heads=4, num_hidden_layers=3,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    plan = estimate_memory(model, optimizer=name, rank=RANK, batch=1, seq=8)[name]
    _, total = measured(model, optimizer_of(name, model), 1, 8)
    assert plan.peak == "step"
    assert plan.total == pytest.approx(total, rel=0.05)


def test_attention_is_counted_without_a_matrix_of_all_pairs():
    model, loss = build("60m", torch.bfloat16)
    for seq in (256, 2048):
        live = trace(model, loss, 1, seq).live.max()
        assert live < 1.25 * (seq / 256) * trace(model, loss, 1, 256).live.max()


def test_grouped_keys_are_smaller():
    sizes = [trace(llama(torch.bfloat16, heads).to("meta"), token_loss, 4, 64) for heads in (4, 1)]
    whole, grouped = (found.live.max() - found.grads.max() for found in sizes)
    assert grouped < whole


def test_what_flash_attention_takes_within_is_counted():
    """Float32 sums of the queries' gradients: where nothing else is large, the peak is theirs."""

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))

        def forward(self, x):
            query, key, value = (x * self.weight for _ in range(3))
            return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def loss(model, batch, seq):
        return model(torch.ones(batch, 8, seq, 16, device="meta", dtype=torch.bfloat16)).sum()

    found = trace(Attend().to("meta"), loss, 2, 256)
    values, queries = 2 * 8 * 256 * 16, 2 * 8 * 256
    # x, query, key, value, output and three gradients of two bytes; a number a query from the
    # forward pass and one within; the sums. The output's gradient is one number, expanded.
    expected = values * (2 * 8 + 4) + queries * (4 + 4)
    assert found.live.max() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("layerwise", [False, True])
def test_other_batches_are_those_of_their_own_pass(layerwise):
    model = llama().to("meta")
    traces = Traces(model, token_loss, 2, 48)
    for batch in (1, 3, 7):
        own = trace(model, token_loss, batch, 48)
        found = traces.at(batch)
        mine, theirs = (
            (x.live - x.grads).max() if layerwise else x.live.max() for x in (found, own)
        )
        assert mine == pytest.approx(theirs, rel=0 if batch > 1 else 0.01)


def test_dropout_keeps_a_mask_of_booleans():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x):
            return nn.functional.dropout(x * self.weight, 0.5)

    def loss(model, batch, seq):
        return model(torch.ones(batch, seq, 100, device="meta")).sum()

    found = trace(Net().to("meta").train(), loss, 2, 50)
    values = 2 * 50 * 100
    # The backward pass needs the input, the mask, and a gradient before and behind dropout.
    assert found.live.max() == pytest.approx(values * (4 + 1 + 4 + 4), rel=0.01)


@pytest.mark.parametrize("layerwise", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_largest_batch_fits_and_the_next_does_not(layerwise):
    given = {"optimizer": "galore", "seq": 64, "rank": 64, "gpu": "2GiB", "layerwise": layerwise}
    row = estimate_memory("60m", **given)["galore"]
    most = row.largest_batch
    assert most is not None
    assert most > 1
    assert estimate_memory("60m", batch=most, **given)["galore"].fits
    assert not estimate_memory("60m", batch=most + 1, **given)["galore"].fits


@pytest.mark.gpu
@pytest.mark.parametrize("layerwise", [False, True], ids=["", "layer-wise"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", ["1b", "7b"])
def test_total_on_a_gpu(size, name, layerwise, record_property):
    """Three steps: the first makes the state and learns all subspaces."""
    rank, seq = (128, 512) if size == "1b" else (1024, 512)
    given = {"rank": rank, "seq": seq, "layerwise": layerwise, "checkpointing": True}
    state = "8bit" if size == "7b" else None
    total = torch.cuda.get_device_properties(0).total_memory
    plan = estimate_memory(size, optimizer=name, state_dtype=state, gpu=total, **given)[name]
    if layerwise and not plan.layerwise:
        pytest.skip(f"{plan.label} has no layer-wise mode")
    if not plan.fits:
        pytest.skip(f"{plan.total / 2**30:.1f} GiB are more than this card has")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = build(size, torch.bfloat16)[0].to_empty(device="cuda")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(std=0.02)
        for tensor in model.buffers():
            tensor.fill_(0.5)  # to_empty leaves what was there: no nan from angles
    checkpoint(model)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(model.parameters(), lr=1e-4)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        method = METHODS[name]
        gap = {} if method.whole else {"update_proj_gap": 2}
        groups = method.groups(model, rank)
        optimizer = method.build(groups, lr=1e-4, state_dtype=state, **gap)
    if layerwise:
        optimizer.step_in_backward()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        tokens = torch.randint(0, 32000, (1, seq), device="cuda")
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    record_property("planned", plan.total)
    record_property("measured", measured)
    assert plan.total == pytest.approx(measured, rel=0.05)
