"""The planner's state bytes are those of optimizers that have made a step, exactly."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_optim
from helpers.pairwise import crossed, in_turn
from helpers.peak import Peak
from lowrank_optim import LowRank, estimate_memory, state_bytes
from lowrank_optim import methods as presets
from lowrank_optim.engine.memory import shared_bytes
from lowrank_optim.engine.refresh import move_subspaces
from lowrank_optim.engine.step import Step
from lowrank_optim.parts.types import site_of
from lowrank_optim.planner.estimate import METHODS
from lowrank_optim.planner.models import MODELS, build
from lowrank_optim.planner.needs import needs_of, needs_of_ours, refresh_workspace, with_state

pytestmark = pytest.mark.slow

OURS = {name: method for name, method in METHODS.items() if method.optimizer}
STATES = [None, torch.bfloat16, "8bit"]
SIZES = ["llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b", "llama-13b"]


class Odd(nn.Module):
    """Every kind of parameter that a method treats in a way of its own, trainable or not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 40)
        self.up = nn.Linear(40, 104)
        self.down = nn.Linear(104, 40, bias=False)
        self.square = nn.Linear(40, 40)
        self.experts = nn.Parameter(torch.randn(3, 40, 24))
        self.conv = nn.Conv2d(24, 6, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(40)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        self.lm_head = nn.Linear(40, 300, bias=False)


def small_llama():
    config = LlamaConfig(
        hidden_size=72, intermediate_size=136, num_attention_heads=6, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=160,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def stepped(optimizer):
    """Give every trainable parameter a gradient, make a step, and return the optimizer."""
    rng = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)
    optimizer.step()
    return optimizer


@crossed(
    name=OURS,
    state=STATES,
    dtype=[torch.float32, torch.bfloat16, torch.float64],
    make=[Odd, small_llama],
)
def test_our_state_is_that_after_a_step(make, name, state, dtype):
    model = make().to(dtype)
    needs = needs_of(OURS[name], model.to("meta"), 7, state)
    model = make().to(dtype)
    optimizer = stepped(OURS[name].build(OURS[name].groups(model, 7), state_dtype=state))
    assert needs.state == state_bytes(optimizer)
    assert needs.shared == shared_bytes(optimizer)
    held = [key for group in optimizer.param_groups for key in lowrank_optim.settings.plans.plan_of(
        group).projector.keys]  # fmt: skip
    kept = sum(
        entry[key].numel() * entry[key].element_size()
        for entry in optimizer.state.values() for key in set(held)
        if isinstance(entry.get(key), torch.Tensor)
    )  # fmt: skip
    assert needs.bases == kept


@pytest.mark.parametrize("length", ["rms", "adamw"])
@pytest.mark.parametrize("name", ["galore", "fira", "ldadam", "muon"])
def test_a_length_is_planned(name, length):
    """Its sample is state and no basis, and a step on "meta" measures it."""
    found = []
    for place in ("meta", "cpu"):
        model = Odd().to(place)
        groups = OURS[name].groups(model, 7)
        found.append(OURS[name].optimizer(groups, length=length))
    planned, real = found
    needs = needs_of_ours(planned)
    assert needs.state == state_bytes(stepped(real))
    published = needs_of(OURS[name], Odd().to("meta"), 7, None)
    assert needs.bases == published.bases
    assert (needs.moments > published.moments) == (length == "adamw")
    assert needs.workspace >= published.workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Odd, small_llama])
def test_state_of_others_is_that_after_a_step(make, dtype):
    model = make().to(dtype)
    params = [param for param in model.parameters() if param.requires_grad]
    measured = state_bytes(stepped(torch.optim.AdamW(params)))
    assert needs_of(METHODS["adamw"], model, 7, None).state == measured
    theirs = stepped(AdamW8bit(params))
    tensors = {
        id(value): value.numel() * value.element_size()
        for state in theirs.state.values() for value in state.values()
        if isinstance(value, torch.Tensor)
    }  # fmt: skip
    assert needs_of(METHODS["adamw8bit"], model, 7, None).state == sum(tensors.values())


@pytest.mark.long
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_state_of_llama_60m_is_that_after_a_step(name, state):
    model = build("60m", torch.bfloat16)[0]
    needs = needs_of(OURS[name], model, 128, state)
    real = model.to_empty(device="cpu")
    optimizer = stepped(OURS[name].build(OURS[name].groups(real, 128), state_dtype=state))
    assert needs.state == state_bytes(optimizer)
    assert needs.shared == shared_bytes(optimizer)


def by_hand(name, size, rank, state):
    """Return bytes of state of a LLaMA of GaLore's table from the counts of values on record."""
    count = lambda term: sum(  # noqa: E731
        int(times or 1) for times in re.findall(rf"(?<!\w)(\d*){term}(?!\w)", OURS[name].state)
    )
    _, config, _ = MODELS[size]
    hidden, inner, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    vocab = config["vocab_size"]
    shapes = layers * ([(hidden, hidden)] * 4 + [(inner, hidden)] * 3)
    plain = 2 * [(vocab, hidden)]
    vectors = (2 * layers + 1) * [hidden]
    width = {None: 4, torch.bfloat16: 2, "8bit": 1}[state]
    block = lambda length: 4 * -(-length // 256) if state == "8bit" else 0  # noqa: E731
    total = 4 * (len(shapes) + len(plain) + len(vectors))  # step counts
    total += sum(2 * rows * (cols * width + block(cols)) for rows, cols in plain)
    total += sum(2 * length * (4 if state == "8bit" else width) for length in vectors)
    moments, whole = count("mr"), count("mn") - (name == "ldadam")  # its error is of bfloat16
    for rows, cols in shapes:
        total += moments * rows * (rank * width + block(rank))
        total += whole * rows * (cols * width + block(cols))
        total += cols * (count("n²") * cols + count("nr") * rank) * (4 if state is None else 2)
        total += {"galore": 1, "lowrank": 1, "fira": 4 + 1, "dct": 8 * rank + 1, "apollo": 4,
                  "frugal": 8 * rank + 4, "trion": 8 * rank + 1,
                  "ldadam": 2 * rows * cols + 1, "compensated": 4 * rows + 4 + 1, "conda": 1,
                  "racs": 4 * (rows + cols + 1)}.get(name, 0)  # fmt: skip
        if name in ("lowrank", "normuon"):  # a sample of 1024 entries, or one a row
            total += 2 * 4 * rows * -(-1024 // rows)
    if name == "normuon":
        total += 4 * layers * (5 * hidden + 2 * inner)  # outputs of q, k, v, o, down; gate, up
    return total


@pytest.mark.parametrize(
    ("name", "size", "state"),
    [
        *in_turn(OURS, *itertools.product(SIZES, STATES), every=["galore"]),
        *((name, "llama-1b", None) for name in OURS if name != "galore"),
        *((name, "llama-7b", "8bit") for name in OURS if name != "galore"),
    ],
    ids=str,
)
def test_state_of_presets_is_what_the_methods_say(size, name, state):
    model = build(size, torch.bfloat16)[0]
    rank = 1024 if model.config.hidden_size >= 4096 else 128
    optimizer = OURS[name].build(OURS[name].groups(model, rank), state_dtype=state)
    expected = by_hand(name, size, rank, state)
    assert lowrank_optim.predicted_bytes(optimizer) == expected
    if (size, state) in (("llama-1b", None), ("llama-7b", "8bit")):
        assert needs_of(OURS[name], model, rank, state).state == expected


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_parameters(name):
    model, _ = build(name, torch.bfloat16)
    assert sum(param.numel() for param in model.parameters()) == MODELS[name][2]
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_every_preset_is_a_method():
    classes = {
        name for name, value in vars(presets).items()
        if isinstance(value, type) and issubclass(value, LowRank) and value is not LowRank
    }  # fmt: skip
    assert {method.title for method in OURS.values()} == classes


@pytest.mark.parametrize("state", [None, "8bit"], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_workspace_of_a_refresh_is_what_a_refresh_makes(name, state):
    """On real tensors: what moves, and what is carried over, when subspaces are learnt anew."""
    # Of several matrices, power makes some products at once, but on a CPU one by one.
    alone = ("lowrank", "galore", "fira", "ldadam", "compensated")
    shapes = [(160, 96)] * (1 if name in alone else 5)

    def jobs(device):
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        optimizer = OURS[name].build(params, rank=16, state_dtype=state, update_proj_gap=1)
        step = Step(optimizer._session)
        ((group, plan, entries),) = step.prepared.groups
        return optimizer, [
            step.job(entry, torch.randn(entry.param.shape, device=device)) for entry in entries
        ], group, plan  # fmt: skip

    optimizer, real, group, plan = jobs("cpu")
    most = 0
    for step in (0, 1):
        for job in real:
            site_of(job).step = step
        known = [x for job in real for x in (job.param, job.grad, *job.state.values())]
        known += optimizer._session.shared.tensors()
        with torch.no_grad(), Peak([x for x in known if isinstance(x, torch.Tensor)]) as peak:
            move_subspaces(real, group, plan)
            plan.projector.factor(real[0].state, site_of(real[0]))
            kept = sum(peak.live.values())
        most = max(most, peak.peak - kept)
    _, planned, group, plan = jobs("meta")
    ready = [with_state(job, group, plan) for job in planned]
    estimated = refresh_workspace(ready, group, plan)
    assert most > 0 or estimated == 0
    assert estimated == pytest.approx(most, rel=0.05)


def test_the_largest_rank_fits_and_the_next_does_not():
    given = {"optimizer": "galore", "seq": 64, "gpu": "1.53GiB"}
    row = estimate_memory("60m", rank=64, **given)["galore"]
    assert row.largest_rank is not None
    assert row.largest_rank % 8 == 0
    assert estimate_memory("60m", rank=row.largest_rank, **given)["galore"].fits
    assert not estimate_memory("60m", rank=row.largest_rank + 8, **given)["galore"].fits
