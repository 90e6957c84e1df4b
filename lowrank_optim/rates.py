"""The run-time numbers of a step: rates, counts, and where random bits come from."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import Noise, stream_of
from .plan import Group, Job


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
    return Noise(group["seed"], count, stream_of(job.position))


def rounds(param: Tensor, group: Group) -> bool:
    """Return whether the weight is rounded stochastically."""
    return group["stochastic_rounding"] and param.dtype == torch.bfloat16
