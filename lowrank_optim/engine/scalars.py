"""The run-time numbers of a step: rates, counts, and where random bits come from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import Noise, Stored, stream_of
from ..parts.types import Group, Job


def rates_of(group: Group) -> tuple[float | Tensor, float | Tensor]:
    """Return the step size, with its sign, and the decay: numbers, or 0-d tensors on a device."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
    return lr if group["maximize"] else -lr, 1 - lr * group["weight_decay"]


def age_of(job: Job, group: Group) -> int | Tensor:
    """Return the number of gradients in the moments, this one included."""
    age: Tensor = job.state["age" if "age" in job.state else "step"]
    return age if group["capturable"] else int(age)


def noise_of(job: Job, group: Group) -> Noise:
    """Return the source of random bits of one parameter's step."""
    step: Tensor = job.state["step"]
    count = step if group["capturable"] else int(step)
    return Noise(group["seed"], count, *stream_and_height(job))


def stream_and_height(job: Job) -> tuple[int, int | None]:
    """Return the last two numbers of a source of random bits for what is held of a parameter."""
    layout = job.layout
    return stream_of(job.position, layout.first_row), None if job.site is None else layout.rows


def in_rows(x: Tensor) -> Tensor:
    """Return a vector, or a number, as a column: its rows are what processes share out."""
    return x.view(-1, 1) if x.ndim < 2 else x


def moment_in_rows(moment: Stored) -> Stored:
    """Return the moment of a vector as a column; in 8 bits there is none of a vector."""
    return in_rows(moment) if isinstance(moment, Tensor) else moment


def rounds(param: Tensor, group: Group) -> bool:
    """Return whether the weight is rounded stochastically."""
    return group["stochastic_rounding"] and param.dtype == torch.bfloat16
