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
        length: of the updates.
        found_by: the runs that found them, and the file with their results.
    """

    lr: float
    rest_lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    length: str = "published"
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
        optimizer: its class; None for a baseline, which is not ours.
        state: values that it keeps for a matrix of m rows and n columns, m >= n, at rank r, in the
            words of the README's table.
        papers: the ones to cite.
        whole: whether it works on whole matrices, whatever rank is asked for.
        own_gap: whether its default interval between refreshes was tuned too. In the demo, other
            methods refresh three times a run.
        settings: what real models are trained with: where the paper decomposes, the projector with
            the same state and a smaller workspace.
        rates: used by the demo. None if none were searched for: the demo does not offer the method.
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
        """Name of its class; "" for a baseline."""
        return getattr(self.optimizer, "__name__", "")

    @property
    def default_gap(self) -> int | None:
        """Updates between two refreshes by default; None if nothing is refreshed."""
        if self.optimizer is None:
            return None
        found = inspect.signature(self.optimizer).parameters.get("update_proj_gap")
        return None if found is None else int(found.default)

    def build(self, params: Params, **more: Any) -> LowRank:
        """Return the optimizer with the settings for real models; a baseline has none."""
        assert self.optimizer is not None
        return self.optimizer(params, **{**self.settings, **more})

    def groups(self, model: nn.Module, rank: int | float, **more: Any) -> list[dict[str, Any]]:
        """Return a model's parameters in groups for this method, see `param_groups`."""
        return param_groups(model, rank=1.0 if self.whole else rank, **more)
