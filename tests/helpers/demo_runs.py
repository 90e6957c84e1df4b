"""Runs of the demo that nobody trained."""

from __future__ import annotations

from dataclasses import replace

from lowrank_optim.demo.recipes import RECIPES
from lowrank_optim.demo.train import Point, Run


def make_run(name: str, **changes: object) -> Run:
    run = Run(
        name=name,
        label=RECIPES[name].label,
        lr=1e-3,
        rest_lr=1e-2,
        validation_loss=2.0,
        state_bytes=4 * 2**20,
        shared_bytes=0,
        step_ms=1.0,
        first_step_ms=3.0,
        slowest_step_ms=5.0,
        training_step_ms=9.0,
        parameters=1000,
        curve=(Point(0, None, 5.0), Point(4, 3.0, 2.0)),
    )
    return replace(run, **changes)
