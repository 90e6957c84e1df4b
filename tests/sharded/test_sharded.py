"""Steps of parameters that are cut over processes: the numbers of one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from helpers.cases import CASES, GAP, PROJECTED, RANK, SHAPES, Case, Model, gradient, train
from helpers.sharded import (
    LAYOUTS,
    cut,
    mesh_of,
    placements_for,
    run_case,
    same_everywhere,
    sharded,
    size_of,
    train_sharded,
    whole,
)
from lowrank_optim import FiraAdamW, FrugalAdamW, GaLoreAdamW, predicted_bytes, state_bytes
from lowrank_optim.engine import two_phase as halves

pytestmark = pytest.mark.slow

STEPS = 2 * GAP + 1
"""Each matrix moves its subspace two or three times."""
PRESETS = ("galore", "dct", "fira", "frugal", "apollo")
EIGHT = [
    Case(f"{case.name}-8bit", case.factory, {**case.settings, "state_dtype": "8bit"})
    for case in CASES
    if case.name in PRESETS
]
MAIN = "fsdp-2"
CORE = ("galore-power-rotate", "fira", "dct", "normuon")
"""Every kind of sum and exchange: cases for every layout."""
FEW = (
    "galore-align", "frugal-blocks", "apollo-mini", "error-feedback", "trion", "muon-power",
    "conda", "ldadam", "compensated", "auto-rank",
    *(case.name for case in CASES if case.whole and not case.coarse and case.name != "normuon"),
)  # fmt: skip
"""Cases that take turns: layouts differ in where parts are, not in what is summed."""


def some_cases(layout):
    """Return the cases for a layout: all for the main one, a third of the few for another."""
    turn = tuple(LAYOUTS).index(layout) % 3
    names = {*CORE, *FEW[turn::3]}
    return [case for case in CASES if layout == MAIN or case.name in names]


def fixed(case, side):
    """Return the change that makes a case project the same axis everywhere."""
    return {} if "side" in case.settings else {"side": side}


def differences(cases, layout, dtype, side, reference_side, without=()):
    """Return for each case how far the weights are from those of one process, and equality."""
    found = {}
    for case in cases:
        ours, _ = run_case(case, layout, dtype, STEPS, fixed(case, side), without)
        theirs = Model(dtype)
        for name in without:
            delattr(theirs, name)
        train(theirs, case.build(theirs.parameters(), **fixed(case, reference_side)), range(STEPS))
        found[case.name] = (
            max(
                float((whole(left) - right).abs().max())
                for left, right in zip(ours.parameters(), theirs.parameters(), strict=True)
                if right.numel()
            ),
            all(same_everywhere(whole(param)) for param in ours.parameters()),
        )
    return found


def assert_close(answers, tolerance):
    for found in answers:
        far = {name: far for name, (far, same) in found.items() if far > tolerance or not same}
        assert not far


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_process(ranks, layout):
    args = (some_cases(layout), layout, torch.float64, "right", "right")
    assert_close(ranks.run(size_of(layout), differences, *args), 1e-12)


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4"])
def test_in_float32_too_with_states_in_8_bits(ranks, layout):
    cases = [case for case in CASES if case.name in PRESETS and layout == MAIN]
    args = ([*cases, *EIGHT], layout, torch.float32, "right", "right")
    assert_close(ranks.run(size_of(layout), differences, *args), 1e-6)


@pytest.mark.parametrize(("layout", "side"), [("fsdp-2", "right"), ("columns", "left")])
def test_auto_projects_the_axis_that_is_not_cut(ranks, layout, side):
    cases = [case for case in CASES if case.name in (*CORE, *FEW[layout == "columns" :: 2])]
    without = ("conv", "narrow", "stack")  # of a stack, the second axis is that of the rows
    args = (cases, layout, torch.float64, "auto", side, without)
    assert_close(ranks.run(2, differences, *args), 1e-12)


@pytest.mark.parametrize("layout", ["fsdp-2", "hybrid", "strided", "rows-columns"])
def test_an_axis_that_is_cut_is_projected_where_it_is_asked_for(ranks, layout):
    turn = ("fsdp-2", "hybrid", "strided", "rows-columns").index(layout)
    cases = [case for case in CASES if case.name in (*CORE, *FEW[turn::4])]
    args = (cases, layout, torch.float64, "left", "left", ("conv", "narrow"))
    assert_close(ranks.run(size_of(layout), differences, *args), 1e-12)


def refuse_convolution():
    model = sharded(Model(), mesh_of("fsdp-2"), "fsdp-2")
    optimizer = GaLoreAdamW(model.named_parameters(), rank=RANK, side="left")
    with pytest.raises(ValueError, match=r'conv.*is projected along its rows: take side="right"'):
        train_sharded(model, optimizer, range(1))
    assert not optimizer.state


def test_the_first_axis_of_a_sharded_convolution_is_refused(ranks):
    ranks.run(2, refuse_convolution)


def rounded(layout, settings):
    """Train bf16 weights whose rounding draws random bits, sharded and not."""
    case = Case("", FrugalAdamW, {"stochastic_rounding": True, "side": "right", **settings})
    ours, _ = run_case(case, layout, torch.bfloat16, GAP + 1, {})
    theirs = Model(torch.bfloat16)
    train(theirs, case.build(theirs.parameters()), range(GAP + 1))
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(whole(left), right), name


@pytest.mark.parametrize(
    ("state_dtype", "layout"),
    [*(("bfloat16", layout) for layout in LAYOUTS), *(("8bit", x) for x in ("fsdp-4", "columns"))],
)
def test_random_bits_go_by_the_row_of_the_whole_matrix(ranks, layout, state_dtype):
    """FRUGAL sums nothing over processes, so that all is equal to the bit, vectors included."""
    ranks.run(size_of(layout), rounded, layout, {"state_dtype": state_dtype})


def state_here(case):
    """Check what a state is made of, and return its bytes here: of sharded parts, and of others."""
    _, optimizer = run_case(case, "fsdp-4", torch.float32, 1, {"side": "right"})
    assert state_bytes(optimizer) == predicted_bytes(optimizer)
    assert "states as they lie on this process" in optimizer.summary()
    parts = others = 0
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, DTensor):
                assert value.device_mesh == param.device_mesh
                local = value.to_local()
                parts += local.numel() * local.element_size()
            elif isinstance(value, torch.Tensor):
                assert value.ndim == 0 or not key.startswith("exp_avg"), key
                assert same_everywhere(value)
                others += value.numel() * value.element_size()
            else:
                assert isinstance(value, int)
    return parts, others


def states_here(cases):
    return [state_here(case) for case in cases]


def test_state_is_shared_out_and_the_rest_is_the_same_everywhere(ranks):
    """Parts add up to what one process has: bytes on a rank are total / ranks but for odd rows."""
    cases = [case for case in CASES if case.name in (*CORE, *FEW)] + EIGHT
    for case, answers in zip(
        cases, zip(*ranks.run(4, states_here, cases), strict=True), strict=True
    ):
        model = Model()
        optimizer = case.build(model.parameters(), side="right")
        train(model, optimizer, range(1))
        parts = [here for here, _ in answers]
        (others,) = {rest for _, rest in answers}
        assert sum(parts) + others == state_bytes(optimizer), case
        assert max(parts) <= 0.4 * sum(parts), case


def late_experts(layout):
    """Train a stack whose matrices get their first gradients late, sharded and not."""
    runs = []
    for cuts in (True, False):
        value = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(1)).double()
        mesh = mesh_of(layout)
        if cuts:
            value = cut(value, mesh, placements_for(value, layout))
        param = nn.Parameter(value)
        optimizer = FiraAdamW([param], lr=1e-2, rank=RANK, side="right", update_proj_gap=20)
        for step in range(12):
            grad = gradient(torch.empty(5, 8, 6, dtype=torch.float64), step, 0)
            grad[step // 2 + 1 :] = 0
            param.grad = cut(grad, mesh, placements_for(grad, layout)) if cuts else grad
            optimizer.step()
        pending = optimizer.state[param]["pending"]
        runs.append((whole(param), pending, whole(optimizer.state[param]["unset"])))
    (ours, waits, unset), (theirs, also, expected) = runs
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert waits == also
    assert torch.equal(unset, expected)
    assert same_everywhere(torch.tensor(waits))


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4", "columns", "nested"])
def test_matrices_without_gradient_at_first_find_their_subspace_as_on_one_process(ranks, layout):
    ranks.run(size_of(layout), late_experts, layout)


def one_bad_value(skips):
    """Put a nan where one rank alone sees it."""
    model = sharded(Model(), mesh_of("fsdp-2"), "fsdp-2")
    optimizer = FiraAdamW(
        model.parameters(), rank=RANK, side="right", update_proj_gap=1, skip_nonfinite=skips
    )
    train_sharded(model, optimizer, range(2))
    before = [whole(param) for param in model.parameters()]
    basis = optimizer.state[model.tall]["basis"].clone()
    for position, param in enumerate(model.parameters()):
        grad = gradient(torch.empty(param.shape), 2, position)
        if position == 0:
            grad[-1, 0] = math.nan
        param.grad = cut(grad, param.device_mesh, list(param.placements))
    optimizer.step()
    assert torch.equal(optimizer.state[model.tall]["basis"], basis)
    after = [whole(param) for param in model.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert optimizer.skipped_steps == int(skips)
    assert any(moved) == (not skips)
    return optimizer.skipped_steps


@pytest.mark.parametrize("skips", [True, False])
def test_a_value_that_is_not_finite_counts_on_all_ranks(ranks, skips):
    assert ranks.run(2, one_bad_value, skips) == [int(skips)] * 2


def rehearse(layout):
    """Make the step by which frameworks learn the state: no rank may go on alone."""
    model, other = (sharded(Model(), mesh_of(layout), layout) for _ in range(2))
    optimizers = [FiraAdamW(m.parameters(), rank=RANK, side="right") for m in (model, other)]
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    rates = [group["lr"] for group in optimizers[0].param_groups]
    optimizers[0].param_groups[0]["lr"] = 0.0
    optimizers[0].step()
    optimizers[0].param_groups[0]["lr"] = rates[0]
    assert set(optimizers[0].state) == set(model.parameters())
    for one, optimizer in zip((model, other), optimizers, strict=True):
        train_sharded(one, optimizer, range(GAP))
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left.to_local(), right.to_local())


def test_a_step_without_gradients_and_rate_changes_nothing(ranks):
    ranks.run(4, rehearse, "fsdp-4")


def partial_gradients():
    """A gradient that is a sum over ranks is added up, as tensor parallelism leaves some."""
    mesh = mesh_of("replicated")
    found = []
    for places in ([Partial()], [Replicate()]):
        param = nn.Parameter(cut(torch.ones(8, 6), mesh, [Replicate()]))
        optimizer = GaLoreAdamW([param], rank=2)
        for step in range(3):
            whole_grad = gradient(torch.empty(8, 6), step, 0)
            share = whole_grad * (0.25 if dist.get_rank() else 0.75)
            local = share if places == [Partial()] else whole_grad
            param.grad = DTensor.from_local(local, mesh, places, run_check=False)
            optimizer.step()
        found.append(whole(param))
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    assert same_everywhere(found[0])


def test_partial_gradients_are_added_up(ranks):
    ranks.run(2, partial_gradients)


def test_shapes_are_odd_enough():
    """Rows that two and four ranks do not share out evenly, and less rows than ranks."""
    rows = {name: SHAPES[name][0] for name in PROJECTED}
    assert any(rows[name] % 2 for name in PROJECTED)
    assert any(rows[name] < 4 for name in PROJECTED)


def cut_bases(layout, dtype):
    """Train with bases that are cut, and return how far the weights are from those of one process.

    With them come the bytes of a basis here, and of a whole one.
    """
    names = ("galore-align", "galore-power-rotate", "fira", "galore-8bit")
    turn = tuple(LAYOUTS).index(layout) % 2
    cases = [case for case in CASES if case.name in (names if layout == MAIN else names[turn::2])]
    found = {}
    for case in cases:
        changes = {"side": "right", "shard_basis": True}
        ours, optimizer = run_case(case, layout, dtype, STEPS, changes)
        assert state_bytes(optimizer) == predicted_bytes(optimizer)
        theirs = Model(dtype)
        train(theirs, case.build(theirs.parameters(), side="right"), range(STEPS))
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        far = max(float((whole(a) - b).abs().max()) for a, b in pairs if b.numel())
        found[case.name] = far, all(same_everywhere(whole(p)) for p in ours.parameters())
        basis = optimizer.state[ours.square].get("basis")
        if basis is not None:
            assert basis.shape == (9, RANK)
            assert basis.to_local().shape[0] < 9
            size = basis.to_local().numel() * basis.to_local().element_size()
            assert basis.to_local().untyped_storage().nbytes() == size
    return found


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4", "hybrid", "nested", "rows-columns"])
def test_a_basis_may_be_cut_and_put_together_for_use(ranks, layout):
    assert_close(ranks.run(size_of(layout), cut_bases, layout, torch.float64), 1e-12)


def by_kernels(layout, changes):
    """Train by kernels on parts, and by plain torch on whole matrices; return the distance."""
    case = Case("", FiraAdamW, {"projector": "power", "side": "right", **changes})
    shapes = {"wide": (5, 11), "even": (6, 11), "stack": (3, 8, 5), "short": (4, 9)}
    values = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name, shape in shapes.items()
    }
    mesh = mesh_of(layout)
    ours, theirs = nn.Module(), nn.Module()
    for name, value in values.items():
        part = cut(value, mesh, placements_for(value, layout))
        ours.register_parameter(name, nn.Parameter(part))
        theirs.register_parameter(name, nn.Parameter(value.clone()))
    steps = range(2 if "state_dtype" in changes else GAP + 1)
    train_sharded(ours, case.build(ours.parameters(), impl="triton"), steps)
    reference = {key: value for key, value in changes.items() if key != "shard_basis"}
    case = Case("", FiraAdamW, {"projector": "power", "side": "right", **reference})
    train(theirs, case.build(theirs.parameters()), steps)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((whole(left) - right).abs().max()) for left, right in pairs)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp-2", {"shard_basis": True}),
        ("columns", {}),
        ("fsdp-2", {"state_dtype": "8bit"}),
        ("fsdp-2", {"length": "adamw"}),
        ("columns", {"length": "rms"}),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not interpret kernels")
def test_kernels_step_parts_of_matrices(ranks, layout, changes):
    """Matrices whose parts are alike on one rank and not on the other are launched alike."""
    assert max(ranks.run(2, by_kernels, layout, changes)) < 1e-5


def several_sums(bytes_held, length):
    """Train with room for one matrix at a time between the halves of a step."""
    halves.HELD, kept = bytes_held, halves.HELD
    settings = {"side": "right", "shard_basis": True, "stagger": False, "length": length}
    case = Case("", FiraAdamW, settings)
    try:
        model, _ = run_case(case, "fsdp-2", torch.float64, STEPS, {})
    finally:
        halves.HELD = kept
    return [whole(param) for param in model.parameters()]


@pytest.mark.parametrize("length", ["published", "adamw"])
def test_a_step_may_sum_several_times_to_hold_less(ranks, length):
    """The numbers are those of one sum for all, to the bit."""
    once = ranks.run(2, several_sums, halves.HELD, length)
    for ours, theirs in zip(ranks.run(2, several_sums, 1, length), once, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
