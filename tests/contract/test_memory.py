"""Bytes of state, exactly, and no full-size temporaries."""

from __future__ import annotations

import pytest
import torch

from helpers.cases import CASES, GAP, Model, train
from helpers.peak import Peak
from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    functional,
    predicted_bytes,
    state_bytes,
)
from lowrank_optim.engine.memory import shared_bytes

M, N, R = 40, 24, 5
STEP = 4
"""Bytes of the step count."""
SAMPLE = 2 * 4 * M * N
"""Bytes of Adam's moments of a sample: all of a matrix of at most 1024 entries, in float32."""

EXACT = {
    "galore": (GaLoreAdamW, {}, lambda v: (2 * M * R + N * R) * v + 1),
    "galore power": (GaLoreAdamW, {"projector": "power"}, lambda v: (2 * M * R + N * R) * v + 1),
    "dct": (DCTAdamW, {}, lambda v: 2 * M * R * v + R * 8 + 1),
    "fira": (FiraAdamW, {}, lambda v: (2 * M * R + N * R) * v + 4 + 1),
    "frugal": (FrugalAdamW, {}, lambda v: 2 * M * R * v + R * 8 + STEP),
    "lowrank": (LowRankAdamW, {}, lambda v: (2 * M * R + N * R) * v + 1 + SAMPLE),
    "a fixed length": (LowRankAdamW, {"length": "rms"}, lambda v: (2 * M * R + N * R) * v + 1),
    "apollo": (ApolloAdamW, {}, lambda v: 2 * M * R * v + 4),
    "apollo mini": (ApolloAdamW, {"rank": 1}, lambda v: 2 * M * v + 4),
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_what_the_method_says(method, shape, state_dtype, dtype):
    factory, settings, values = EXACT[method]
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(2)]
    optimizer = factory(params, **{"rank": R, "state_dtype": state_dtype, **settings})
    assert state_bytes(optimizer) == 0
    expected = 2 * (values(2 if state_dtype else 4) + STEP)
    assert predicted_bytes(optimizer) == expected
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert state_bytes(optimizer) == expected
    if method == "dct":
        assert shared_bytes(optimizer) == 4 * N * N


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prediction_equals_measurement(case):
    model = Model()
    optimizer = case.build(model.parameters())
    predicted = predicted_bytes(optimizer)
    train(model, optimizer, range(GAP))
    if case.chooses:
        assert state_bytes(optimizer) < predicted
        predicted = predicted_bytes(optimizer)
    assert state_bytes(optimizer) == predicted


def test_eight_bits_are_a_byte_a_value_and_a_scale_a_block():
    """Moments of large matrices; vectors and small ones stay float32, a basis is bfloat16."""
    rank, wide = 300, torch.nn.Parameter(torch.zeros(320, 400))
    plain, short = torch.nn.Parameter(torch.zeros(16, 300)), torch.nn.Parameter(torch.zeros(4095))
    flat = torch.nn.Parameter(torch.zeros(5000))
    groups = [
        {"params": [wide], "rank": rank, "side": "right"},
        {"params": [plain, short, flat], "rank": None},
    ]
    optimizer = GaLoreAdamW(groups, state_dtype="8bit", projector="power")
    for param in (wide, plain, short, flat):
        param.grad = torch.randn_like(param)
    predicted = predicted_bytes(optimizer)
    optimizer.step()
    expected = 2 * 320 * (rank + 4 * 2) + 400 * rank * 2 + 1
    expected += 2 * 16 * (300 + 4 * 2) + 2 * 4 * (4095 + 5000) + 4 * STEP
    assert state_bytes(optimizer) == predicted == expected


def test_conv_and_stack_bytes():
    conv = torch.nn.Parameter(torch.randn(32, 8, 3, 3))
    stack = torch.nn.Parameter(torch.randn(4, 16, 24))
    optimizer = GaLoreAdamW([conv, stack], rank=R)
    conv.grad, stack.grad = torch.randn_like(conv), torch.randn_like(stack)
    optimizer.step()
    conv_values = 2 * 72 * R + 32 * R
    stack_values = 4 * (2 * 24 * R + 16 * R)
    assert state_bytes(optimizer) == 4 * (conv_values + stack_values) + 2 * STEP + 1 + 4


SHAPE = (256, 192)
SMALL = 8 * SHAPE[0] * 16 * 4
"""What a step may use beside: a few tensors of rows x rank, rank 16."""


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["galore", "galore power", "dct", "fira", "frugal", "apollo"])
def test_no_full_size_temporary_beyond_one_gradient(method, wide, dtype, monkeypatch):
    """Also at a refresh, but for the workspace of an exact SVD, which is LAPACK's."""
    monkeypatch.setattr(functional.products, "CHUNK", 4 * SHAPE[1])
    factory, settings, _ = EXACT[method]
    shape = SHAPE[::-1] if wide else SHAPE
    param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = factory([param], rank=16, **{"update_proj_gap": 3, **settings})
    param.grad = torch.randn_like(param)
    optimizer.step()
    gradient = param.numel() * param.element_size()
    for step in range(1, 5):
        known = [param, param.grad, *(
            value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)
        ), *optimizer._session.shared.tensors()]  # fmt: skip
        with Peak(known) as peak:
            optimizer.step()
        refreshed = step % optimizer.defaults["update_proj_gap"] == 0
        if optimizer.defaults["projector"] == "svd" and refreshed:
            continue
        one_buffer = gradient if refreshed or method == "frugal" else 0
        assert 0 < peak.peak <= one_buffer + SMALL, (step, peak.peak, gradient)


def test_peak_is_measured():
    """The instrument itself: a buffer that is made and dropped counts, an old one does not."""
    x = torch.zeros(1000)
    with Peak([x]) as peak:
        x.add_(1)
        assert peak.peak == 0
        y = x * 2
        del y
        z = x + 1
        del z
    assert peak.peak == 4000


def test_summary_reads_well():
    model = Model()
    optimizer = GaLoreAdamW(
        [
            {"params": [model.tall, model.wide, model.stack], "rank": 3},
            {"params": [model.vector, model.square]},
        ]
    )
    text = optimizer.summary()
    lines = text.splitlines()
    assert lines[0] == "GaLoreAdamW: 74.3% of 358 parameters projected"
    assert len({len(line) for line in lines[1:5]}) == 1
    assert lines[2].split()[:3] == ["0", "SVD", "3"]
    assert lines[3].split()[:3] == ["1", "-", "-"]
    assert lines[4].split()[0] == "all"
    assert lines[5:] == [
        "3 tensors stepped by plain torch (on CPU)",
        "2 tensors stepped by torch's AdamW",
    ]


def test_a_summary_says_what_was_left_plain_and_why():
    shapes = [(40, 9), (40, 7), (7, 40), (3, 40, 7), (40, 2), (40, 40)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    frozen = torch.nn.Parameter(torch.zeros(40, 7), requires_grad=False)
    groups = [
        {"params": [*params[:4], frozen], "rank": 0.3, "min_dim": 8},
        {"params": params[4:], "rank": 2},
        {"params": [torch.nn.Parameter(torch.zeros(40, 7))], "rank": None},
    ]
    lines = GaLoreAdamW(groups).summary().splitlines()
    assert [line for line in lines if "left plain" in line] == [
        "3 matrices left plain: an axis is shorter than min_dim=8",
        "1 matrices left plain: the projected axis is no longer than rank 2",
    ]


def test_a_summary_where_nothing_is_projected_says_so():
    model = Model()
    for settings in ({"rank": 100}, {"rank": 0.25}, {"rank": "auto", "projector": "power"}):
        optimizer = GaLoreAdamW(model.parameters(), **settings)
        text = optimizer.summary()
        assert text.startswith("GaLoreAdamW: 0.0% of 501 parameters projected")
        assert "projects none of its 9 parameter tensors and saves nothing" in text
        assert "left plain" in text


@pytest.mark.parametrize("rank", ["auto", 0.25, 3])
def test_a_summary_can_be_asked_for_at_any_time(rank):
    """Before, after and without a step, with a rank just changed, all frozen, or no elements."""
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=rank, projector="power", min_dim=1)
    wide = len(optimizer.summary().splitlines()[2])
    train(model, optimizer, range(2))
    assert len(optimizer.summary().splitlines()[2]) == wide
    optimizer.param_groups[0]["rank"] = "auto"
    assert "SVD" not in optimizer.summary()
    model.requires_grad_(False)
    assert GaLoreAdamW(model.parameters(), rank=rank, projector="power").summary()
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    assert GaLoreAdamW([empty], rank=rank, projector="power", min_dim=1).summary()
