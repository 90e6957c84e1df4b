"""Whole optimizers: kernels against plain torch, and who does which step.

float32 sums are made in another order, and sign-like steps may flip where their argument is almost
zero: a few elements then differ by a step, so weights are compared in the mean as well as at most.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from helpers.cases import CASES, GAP, Model, gradient
from helpers.kernels import Small, assert_alike
from lowrank_optim import DCT, ApolloAdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, LowRank
from lowrank_optim.engine.backend import refusal
from lowrank_optim.settings.plans import plan_of

pytest.importorskip("triton", reason="kernels need triton")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tall_tiles")]
STEPS = 2 * GAP + 1
FEW = GAP + 2
"""Steps where moments are rounded: over one refresh, for interpreted kernels are slow."""
REASONS = {
    "projector Blocks": ["frugal-blocks"],
    "rule Lion": ["lion", "lion-state-free"],
    "rule SGDM": ["sgdm-paper-fira"],
    "feed ErrorFeedback": ["error-feedback", "error-feedback-bf16", "error-feedback-4bit"],
    "feed GeneralErrorFeedback": ["ldadam", "ldadam-length"],
    "feed WholeMomentum": ["conda", "conda-low"],
    "rule Orthogonal": ["trion", "trion-8bit"],
    "rule Muon": ["muon-power"],
}


def rule_of(case):
    """The name of the rule of matrices that are taken whole."""
    (group,) = case.build([nn.Parameter(torch.ones(7, 5))]).param_groups
    return type(plan_of(group).rule).__name__


NO_KERNEL = {name: reason for reason, names in REASONS.items() for name in names}
NO_KERNEL |= {case.name: f"rule {rule_of(case)}" for case in CASES if case.whole}
FUSED = [case for case in CASES if case.name not in NO_KERNEL]


def run(case, dtype, device, impl, steps=None, few=False, **changes):
    steps = steps or (FEW if few else STEPS)
    model = Small(dtype, few).to(device)
    rank = {**{"rank": 3}, **case.settings}["rank"]
    optimizer = case.build(model.groups(rank), impl=impl, **changes)
    for step in range(steps):
        for position, param in enumerate(model.parameters()):
            param.grad = gradient(param.cpu(), step, position).to(device)
        optimizer.step()
    return model, optimizer


ALIKE = {
    "galore-rotate", "galore-align", "galore-power", "galore-rounding", "dct", "dct-gap", "fira",
    "apollo-rotate", "auto-rank",
}  # fmt: skip
"""Cases that differ from others in what happens around the kernels alone."""


@pytest.mark.parametrize("case", [c for c in FUSED if c.name not in ALIKE], ids=str)
def test_kernels_step_as_plain_torch_does(case, device):
    fused, optimizer = run(case, torch.float32, device, "triton", few=case.coarse)
    plain, _ = run(case, torch.float32, device, "eager", few=case.coarse)
    worst, mean = (0.5, 3e-2) if case.coarse else (1e-3, 1e-4)
    assert_alike(fused, plain, Small(torch.float32, few=case.coarse), worst, mean)
    assert "kernels" in optimizer.summary()


def test_columns_of_matrices_of_unlike_age(device):
    """Of two matrices of one shape one has missed a gradient: moments in 8 bits still move."""

    def trained(impl):
        params = [nn.Parameter(torch.zeros(21, 9, device=device)) for _ in range(2)]
        optimizer = DCTAdamW(params, rank=3, state_dtype="8bit", impl=impl, lr=1e-2)
        for step in range(6):
            for place, param in enumerate(params):
                missed = step == 1 and place == 1
                param.grad = None if missed else gradient(param.cpu(), step, place).to(device)
            optimizer.step()
        assert [optimizer.state[param]["step"].item() for param in params] == [6, 5]
        return torch.stack(params)

    one, other = trained("triton"), trained("eager")
    assert (one - other).abs().mean() < 3e-2 * other.abs().mean()


@pytest.mark.parametrize(
    ("name", "state_dtype", "rounding"),
    [
        ("galore-power", "8bit", True),
        ("fira-dct", torch.bfloat16, False),
        ("fira-dct", None, True),
        ("frugal", torch.bfloat16, True),
        ("apollo", "8bit", False),
        ("apollo", None, True),
    ],
    ids=str,
)
def test_bfloat16_weights_and_small_states(name, rounding, state_dtype, device):
    """A unit in the last place of a bfloat16 weight is as long as several steps."""
    (case,) = (case for case in CASES if case.name == name)
    changes = {
        "state_dtype": state_dtype, "stochastic_rounding": rounding, "lr": 5e-2, "few": True
    }  # fmt: skip
    fused, optimizer = run(case, torch.bfloat16, device, "triton", **changes)
    plain, _ = run(case, torch.bfloat16, device, "eager", **changes)
    assert_alike(fused, plain, Small(torch.bfloat16, few=True), 3.0, 0.15)
    state = optimizer.state[fused.large]
    assert ("exp_avg.codes" in state) == (state_dtype == "8bit")


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"], ids=str)
def test_small_states_follow_float32(state_dtype, device):
    """Against float32 states, in plain torch: what is lost by storing less."""
    for name in ("galore-power", "frugal", "apollo"):
        (case,) = (case for case in CASES if case.name == name)
        changes = {"on_refresh": "reset"} if name != "apollo" else {}
        small, _ = run(case, torch.float32, device, "eager", state_dtype=state_dtype, **changes)
        whole, _ = run(case, torch.float32, device, "eager", **changes)
        assert_alike(small, whole, Small(torch.float32), 3.0, 0.25)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NO_KERNEL], ids=str)
def test_what_has_no_kernel_is_refused_with_the_reason(case, device):
    with pytest.raises(
        RuntimeError, match=rf'impl="triton".*no kernel for the {NO_KERNEL[case.name]}'
    ):
        run(case, torch.float32, device, "triton")


def test_reasons_against_kernels():
    class Wrapped(torch.Tensor):
        """A tensor subclass, as distributed and quantised tensors are."""

    plain = torch.zeros(8, 6)
    for impl, param, grad, reason in (
        ("eager", plain, plain, 'impl="eager"'),
        ("auto", plain, plain, "on CPU"),
        ("triton", plain.double(), plain, "float64"),
        ("triton", plain, plain.as_subclass(Wrapped), "class Wrapped"),
    ):
        group = GaLoreAdamW([nn.Parameter(plain)], rank=2, impl=impl).param_groups[0]
        arguments = (plan_of(group), group, param, grad)
        if impl == "triton":
            with pytest.raises(RuntimeError, match=rf"shape \(8, 6\) cannot be .*{reason}"):
                refusal(*arguments)
            assert reason in refusal(*arguments, {})
        else:
            assert refusal(*arguments) == reason


def test_a_refused_step_changes_nothing():
    params = [nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8, 6).double())]
    optimizer = GaLoreAdamW(params, rank=2, impl="triton")
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="float64"):
        optimizer.step()
    assert not optimizer.state
    assert all((param == 1).all() for param in params)


def test_summary_says_what_runs_and_why():
    matrix = nn.Parameter(torch.zeros(8, 6))
    text = GaLoreAdamW([matrix], rank=2).summary()
    assert "plain torch (on CPU)" in text
    text = LowRank([matrix], rank=2, rule="lion", impl="auto").summary()
    assert "plain torch (on CPU)" in text
    text = GaLoreAdamW([matrix], rank=2, impl="eager").summary()
    assert 'plain torch (impl="eager")' in text


def test_what_a_graph_could_not_find_again_is_refused():
    for factory, projector in ((ApolloAdamW, "random"), (FrugalAdamW, "blocks")):
        with pytest.raises(ValueError, match="capturable=True does not go with the projector"):
            factory(
                [nn.Parameter(torch.zeros(8, 6))], rank=0.3, projector=projector, capturable=True
            )


@pytest.mark.parametrize("case", [c for c in FUSED if "apollo" not in c.name], ids=str)
def test_counts_on_the_device_do_not_change_the_step(case):
    """`capturable` keeps the counts as tensors and changes nothing but the times of refreshes."""
    results = []
    for capturable in (False, True):
        model = Model()
        optimizer = case.build(model.parameters(), capturable=capturable, stagger=False)
        for step in range(2 * GAP + 1):
            for position, param in enumerate(model.parameters()):
                param.grad = gradient(param, step, position)
            optimizer.step()
        results.append(model)
    for name, param in results[0].named_parameters():
        torch.testing.assert_close(param, getattr(results[1], name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fira-dct", "frugal"])
def test_run_time_numbers_on_the_device_do_not_change_a_fused_step(name, device):
    (case,) = (case for case in CASES if case.name == name)
    changes = {
        "stagger": False, "stochastic_rounding": True, "state_dtype": torch.bfloat16, "steps": 3,
        "few": True,
    }  # fmt: skip
    host, _ = run(case, torch.bfloat16, device, "triton", **changes)
    there, _ = run(
        case, torch.bfloat16, device, "triton", capturable=True,
        lr=torch.tensor(1e-2, device=device), **changes,
    )  # fmt: skip
    for param, other in zip(host.parameters(), there.parameters(), strict=True):
        assert (param != other).float().mean() <= 0.02


def test_matrices_of_one_shape_share_launches(monkeypatch, device):
    from lowrank_optim import kernels
    from lowrank_optim.engine import launches as stepping

    launches = []
    for name in ("project_moments", "lift_write"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, n=name, r=real: launches.append((n, len(a[0]))) or r(*a)
        )
    params = [nn.Parameter(torch.randn(12, 7, device=device)) for _ in range(5)]
    params.append(nn.Parameter(torch.randn(7, 12, device=device)))
    optimizer = FiraAdamW(params, rank=3, impl="triton")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert sorted(launches) == [
        ("lift_write", 1), ("lift_write", 5), ("project_moments", 1), ("project_moments", 5),
    ]  # fmt: skip
    launches.clear()
    a_matrix = 3 * 12 * 2 * 4  # the basis lies in the state
    monkeypatch.setattr(stepping, "AT_ONCE", 2 * a_matrix)
    optimizer.step()
    assert [count for name, count in launches if name == "lift_write"] == [2, 2, 1, 1]
    launches.clear()
    monkeypatch.setattr(stepping, "AT_ONCE", 1)
    monkeypatch.setattr(stepping, "SHARE", 2)
    optimizer.step()
    assert [count for name, count in launches if name == "lift_write"] == [3, 2, 1]


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [("fira-8bit", None), ("apollo", None), ("frugal", "full"), ("galore-power", "projected")],
)
def test_kernels_in_the_backward_pass(name, accumulate, device):
    """One by one as all together, to the bit; projected sums are stepped by plain torch."""
    (case,) = (case for case in CASES if case.name == name)
    dtype = torch.float32 if accumulate == "projected" else torch.bfloat16
    passes = 2 if accumulate else 1
    results = []
    for layerwise in (False, True):
        model = Small(dtype, few=True).to(device)
        optimizer = case.build(model.groups(3), impl="triton", stochastic_rounding=True)
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=passes, accumulate=accumulate or "full")
        for step in range(2 if case.coarse else 3):
            for _ in range(passes):
                losses = [
                    (param.float() * gradient(param, step, place).to(device)).sum()
                    for place, param in enumerate(model.parameters())
                ]
                torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    for left, right in zip(*results, strict=True):
        if accumulate == "projected":
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(left, right)


def test_bases_of_few_matrices_are_held_at_once(monkeypatch, device):
    """What a projector gathers for a matrix goes before those of the next launch are made."""
    from lowrank_optim.engine import launches as stepping

    held, most = weakref.WeakSet(), []

    class Counted(DCT):
        def factor(self, state, site):
            made = super().factor(state, site)
            held.add(made)
            most.append(len(held))
            return made

    params = [nn.Parameter(torch.randn(12, 7, device=device)) for _ in range(6)]
    optimizer = DCTAdamW(params, rank=3, projector=Counted(), impl="triton")
    for param in params:
        param.grad = torch.randn_like(param)
    monkeypatch.setattr(stepping, "AT_ONCE", 2 * 3 * (12 * 4 + 7 * 6))
    optimizer.step()
    assert len(most) >= 6
    assert max(most) <= 4


def test_strided_plain_parameters_go_to_plain_torch(device):
    """A whole parameter whose gradient lies otherwise in memory is stepped, and rightly."""
    weights = torch.randn(70, 61, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(61, 70, generator=torch.Generator().manual_seed(1)).bfloat16().mT
    results = []
    for impl in ("eager", "auto"):
        param = nn.Parameter(weights.to(device))
        matrix = nn.Parameter(torch.ones(6, 5, device=device))
        optimizer = GaLoreAdamW(
            [{"params": [param], "rank": None}, {"params": [matrix], "rank": 2}], impl=impl
        )
        param.grad, matrix.grad = grad.to(device), torch.ones_like(matrix)
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
