"""A tiny language model, its batches, and the plain loop that every framework's loop must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.cases import CASES, Case, assert_same, weights

Batch = tuple[Tensor, Tensor]

TOKENS = 19
FEW = [
    case
    for case in CASES
    if case.name in ("galore-power-rotate", "galore-8bit", "dct", "fira", "frugal", "apollo")
]
"""One case of each method and one of small states, for loops that take long to set up."""
KINDS = FEW + [
    case
    for case in CASES
    if case.name in ("muon-8bit", "ldadam", "auto-rank", "frugal-blocks", "racs", "lion")
]
"""And one of each kind of state."""


class Net(nn.Module):
    """Matrices tall, wide and square, a stack of experts, an embedding, a norm and biases."""

    def __init__(self, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, 10)
        self.up = nn.Linear(10, 14)
        self.norm = nn.LayerNorm(14)
        self.down = nn.Linear(14, 10)
        self.mix = nn.Linear(10, 10, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 10, 7) / 3)
        self.back = nn.Linear(7, 10)
        self.head = nn.Linear(10, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: Tensor, expert: int | None = None) -> Tensor:
        """Return logits; with `expert` only that one of the stack is used, with -1 none."""
        hidden = self.embed(tokens)
        hidden = hidden + self.down(self.norm(self.up(hidden)).relu())
        if expert != -1:
            chosen = self.experts.sum(0) if expert is None else self.experts[expert]
            hidden = hidden + self.back((hidden @ chosen).tanh())
        return self.head(hidden + self.mix(hidden))


def batches(count: int, start: int = 0) -> list[Batch]:
    """Return batches of tokens and targets; each is a function of its number alone."""
    found = []
    for number in range(start, start + count):
        rng = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, TOKENS, (2, 6), generator=rng)
        found.append((tokens, tokens.roll(-1, 1)))
    return found


def loss_of(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    """Return the mean loss of a batch."""
    logits = model(batch[0], **kwargs).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    *,
    scheduler: Any = None,
    accumulate: int = 1,
    clip: float | None = None,
    loss: Callable[..., Tensor] = loss_of,
) -> None:
    """Train as a plain loop does, one step for every `accumulate` batches."""
    for number, batch in enumerate(data, 1):
        (loss(model, batch) / accumulate).backward()
        if number % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that gives every step a rate of its own."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of all state, by the place of the parameter and the name of the entry."""
    return {
        f"{place}.{key}": torch.as_tensor(value).clone()
        for place, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def assert_same_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    other_model: nn.Module,
    other: torch.optim.Optimizer,
) -> None:
    """Assert that weights and state are equal to the bit, and that there is state at all."""
    assert_same(weights(model), weights(other_model))
    assert_same(states(optimizer), states(other))
    assert states(optimizer)


def trained(case: Case, count: int, **kwargs: Any) -> tuple[Net, torch.optim.Optimizer]:
    """Return a model after a plain loop over `count` batches, with its optimizer."""
    model = Net()
    optimizer = case.build(model.named_parameters())
    fit(model, optimizer, batches(count), **kwargs)
    return model, optimizer
