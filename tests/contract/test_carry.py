"""Moments are carried into a new subspace some rows at a time, and it makes no difference."""

from __future__ import annotations

import pytest
import torch

from helpers.cases import CASES, GAP, Case, Model, train
from helpers.peak import Peak
from lowrank_optim import DCTAdamW, FrugalAdamW, GaLoreAdamW, LowRank, functional
from lowrank_optim.engine import carry as carrying
from lowrank_optim.engine import refresh as subspace

ROTATING = [
    case for case in CASES if case.build(Model().parameters()).defaults["on_refresh"] == "rotate"
]
COPIES = [case for case in ROTATING if "dct" in case.name] + [
    Case("columns", FrugalAdamW, {"on_refresh": "rotate"}),
    Case("lion", LowRank, {"rule": "lion", "betas": (0.9, 0.99), "projector": "dct",
                           "on_refresh": "rotate"}),
]  # fmt: skip
PRODUCTS = [case for case in ROTATING if case not in COPIES]


def trained(case, monkeypatch, chunks, **changes):
    """Return weights and states after two refreshes of all matrices."""
    for module in (carrying, functional.steps):
        monkeypatch.setattr(module, "row_chunks", chunks)
    model = Model()
    optimizer = case.build(model.parameters(), stagger=False, **changes)
    train(model, optimizer, range(2 * GAP + 1))
    return [*model.parameters()], optimizer.state_dict()["state"]


def both(case, monkeypatch, **changes):
    """Train with moments carried whole, and two rows of each matrix at a time."""
    seen = []

    def whole(rows, row_size):
        return [slice(0, rows)]

    def pairs(rows, row_size):
        seen.append(rows)
        return [slice(row, min(row + 2, rows)) for row in range(0, rows, 2)]

    found = (
        trained(case, monkeypatch, whole, **changes),
        trained(case, monkeypatch, pairs, **changes),
    )
    assert {13, 11, 9, 8} <= set(seen)
    return found


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize("case", COPIES, ids=str)
def test_copied_moments_are_the_same_to_the_bit(case, state_dtype, monkeypatch):
    """With their random bits, which go by the row of the whole matrix, also in a stack."""
    one, other = both(case, monkeypatch, state_dtype=state_dtype)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_rotated_moments_differ_by_the_rounding_of_a_product_at_most(case, monkeypatch):
    one, other = both(case, monkeypatch)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (3, 40, 24)], ids=str)
def test_chunks_of_the_usual_kind_and_more_than_one_block_a_row(shape, monkeypatch):
    """8 bits: rows of 280 values have two blocks."""
    found = []
    for chunk in (1 << 22, 700):
        monkeypatch.setattr(functional.products, "CHUNK", chunk)
        param = torch.nn.Parameter(torch.zeros(shape))
        side = "right" if shape[-1] > 40 else "auto"
        optimizer = DCTAdamW([param], rank=280 if side == "right" else 10, side=side,
                             state_dtype="8bit")  # fmt: skip
        for step in range(4):
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(optimizer.state_dict()["state"])
    torch.testing.assert_close(*found, rtol=0, atol=0)


ROWS, COLS, CHUNK = 1024, 300, 16384


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize("rank", [64, 256])
@pytest.mark.parametrize("projector", ["dct", "power"])
def test_no_moment_is_loaded_whole(projector, rank, state_dtype, monkeypatch):
    """In 8 bits a row is filled up to 256 values, of which each takes some 40 bytes on the way."""
    monkeypatch.setattr(functional.products, "CHUNK", CHUNK)
    monkeypatch.setattr(functional.rounding, "IN_CACHE", CHUNK // 8)
    param = torch.nn.Parameter(torch.zeros(ROWS, COLS))
    optimizer = GaLoreAdamW(
        [param],
        rank=rank,
        projector=projector,
        on_refresh="rotate",
        update_proj_gap=1,
        state_dtype=state_dtype,
    )
    peaks, carry = [], subspace.carry

    def measured(moved, *rest):
        known = [*optimizer._session.shared.tensors()]
        for job, old, new, _ in moved:
            known += [*job.state.values(), *old.values(), *new.values()]
        with Peak([x for x in known if isinstance(x, torch.Tensor)]) as peak:
            carry(moved, *rest)
        if moved:  # at the first step nothing is carried
            peaks.append(peak.peak)

    monkeypatch.setattr(subspace, "carry", measured)
    for step in range(3):
        param.grad = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert len(peaks) == 2
    basis = 4 * (2 * COLS * rank + 2 * rank * rank) if projector == "power" else 0
    assert 0 < max(peaks) <= 44 * CHUNK + basis
