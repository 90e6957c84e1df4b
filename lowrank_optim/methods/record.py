"""What is known of a method besides its class: one record each, which all tables read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..groups import param_groups
from ..optimizer import LowRank, Params
from .bibliography import Paper


@dataclass(frozen=True)
class Rates:
    """Learning rates that were searched for, not taken from a paper.

    Attributes:
        lr: peak rate of the matrices.
        rest_lr: peak rate of embeddings, head and norms.
        betas: of the matrices.
        found_by: the run and the file that has it.
    """

    lr: float
    rest_lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    found_by: str = (
        "best of twelve runs of the demo (a LLaMA of width 192 on bytes, 150 steps), with another "
        "seed and without the texts that it validates on: benchmarks/results/tune_demo.csv"
    )


@dataclass(frozen=True)
class Method:
    """A method by its name.

    Attributes:
        name: what commands call it.
        label: what tables and figures call it.
        optimizer: its class; None for one that is compared with and not ours.
        state: values that it keeps of a matrix of m rows and n columns, m >= n, at rank r, in the
            words of the README's table.
        papers: those to cite.
        whole: whether it works on whole matrices, whatever rank is asked for.
        own_gap: whether the interval between refreshes that is its default is part of what was
            tuned; others refresh in the demo three times a run.
        settings: what real models are trained with: where decompositions are the paper's, the
            projector whose state is the same and whose workspace is smaller.
        rates: used by the demo; None where none were searched for: the demo does not offer it.
        in_planner, in_demo: whether the planner and the demo show it without being asked.
    """

    name: str
    label: str
    optimizer: Callable[..., LowRank] | None = None
    state: str = ""
    papers: tuple[Paper, ...] = ()
    whole: bool = False
    own_gap: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: Rates | None = None
    in_planner: bool = False
    in_demo: bool = False

    @property
    def title(self) -> str:
        """Return the name of its class, which must be ours."""
        return getattr(self.optimizer, "__name__", "")

    @property
    def default_gap(self) -> int | None:
        """Return the updates between refreshes that its class has; None: nothing is refreshed."""
        if self.optimizer is None:
            return None
        found = inspect.signature(self.optimizer).parameters.get("update_proj_gap")
        return None if found is None else int(found.default)

    def build(self, params: Params, **more: Any) -> LowRank:
        """Return the optimizer as real models are trained with, which must be ours."""
        assert self.optimizer is not None
        return self.optimizer(params, **{**self.settings, **more})

    def groups(self, model: nn.Module, rank: int | float, **more: Any) -> list[dict[str, Any]]:
        """Return the groups of a model's parameters for it, see `param_groups`."""
        return param_groups(model, rank=1.0 if self.whole else rank, **more)
