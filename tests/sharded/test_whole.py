"""Rules that take matrices whole: whatever company a matrix is in, it is stepped as if alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.sharded import cut, mesh_of, placements_for, size_of
from lowrank_optim import RACS, MuonW, NorMuonW, TrionW
from lowrank_optim.engine import update
from lowrank_optim.parts.rules import muon

pytestmark = pytest.mark.slow

METHODS = [
    lambda params: MuonW(params),
    lambda params: NorMuonW(params),
    lambda params: RACS(params),
    lambda params: TrionW(params, rank=3),
]
SHAPES = [(9, 5), (5, 9), (9, 5), (2, 9, 5), (5, 9), (7, 7)]


def stepped(make, params, grads):
    optimizer = make(params)
    for some in grads:
        for param, grad in zip(params, some, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("at_once", [None, 1, 100])
def test_company_does_not_matter(make, at_once, monkeypatch):
    """Matrices and their transposes look alike to a rule, and have neurons on different axes."""
    if at_once is not None:
        monkeypatch.setattr(update, "MATRICES_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in SHAPES]
    grads = [[torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in start] for _ in range(3)]
    together = stepped(make, [torch.nn.Parameter(x.clone()) for x in start], grads)
    for place, x in enumerate(start):
        alone = stepped(make, [torch.nn.Parameter(x.clone())], [[g[place]] for g in grads])[0]
        torch.testing.assert_close(together[place], alone, rtol=0, atol=1e-12)


def shapes_iterated_on(layout):
    """Return the shapes of what this rank's Newton-Schulz is given in a step of twelve matrices."""
    found, exact = [], muon.newton_schulz

    def noted(x, **settings):
        found.append(tuple(x.shape))
        return exact(x, **settings)

    muon.newton_schulz = noted
    try:
        params = [torch.nn.Parameter(torch.ones(10, 6)) for _ in range(12)]
        group = None
        if layout == "ddp":
            group = dist.group.WORLD
        else:
            mesh = mesh_of(layout)
            params = [
                torch.nn.Parameter(cut(x.detach(), mesh, placements_for(x, layout))) for x in params
            ]
        optimizer = MuonW(params, side="right", process_group=group)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        muon.newton_schulz = exact
    return found


@pytest.mark.parametrize("layout", ["fsdp-2", "hybrid", "nested", "ddp"])
def test_each_matrix_is_iterated_on_whole_and_by_one_process(ranks, layout):
    count = 2 if layout == "ddp" else size_of(layout)
    answers = ranks.run(count, shapes_iterated_on, layout)
    assert sum(batch for found in answers for batch, *_ in found) == 12
    assert {shape[1:] for found in answers for shape in found} == {(10, 6)}
    assert len({sum(batch for batch, *_ in found) for found in answers}) == 1
