"""What protects a step: names for messages, refusals, and surroundings that must not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .plan import Job, Plan

Work = list[tuple[dict[str, Any], Plan, list[Job]]]


def named(params: Any, where: str) -> list[tuple[str, Tensor]]:
    """Return the tensors among what a group calls `params`, with what to call each in a message."""
    listed = [params] if isinstance(params, Tensor) else list(params)
    found = []
    for place, item in enumerate(listed):
        name = f"parameter {place}{where}"
        if isinstance(item, tuple):
            name, item = f"parameter {item[0]!r}{where}", item[1]
        if isinstance(item, Tensor):
            found.append((f"{name}, of shape {tuple(item.shape)},", item))
    return found


@contextmanager
def without_autocast(work: Work) -> Iterator[None]:
    """Compute in the dtypes that are written, as torch's optimizers do, also under autocast."""
    devices = {job.param.device.type for _, _, jobs in work for job in jobs}
    with ExitStack() as stack:
        for device in devices:
            if device != "meta" and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def is_rehearsal(work: Work) -> bool:
    """Return whether every learning rate is 0 and every gradient zero. Looks at lr first."""
    rates = [group["lr"] for group, _, jobs in work if jobs]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False
    if any(float(rate) != 0 for rate in rates):
        return False
    return not any(bool(job.grad.count_nonzero()) for _, _, jobs in work for job in jobs)


def refuse_flat(param: Tensor, name: str) -> None:
    """Raise for a flat piece of a matrix, as ZeRO and FSDP1 hand out, instead of using AdamW."""
    shape = getattr(param, "ds_shape", None)
    if shape is not None and len(shape) > 1 and param.ndim == 1:
        raise RuntimeError(flat_message(name, tuple(shape)))
    if getattr(param, "_is_flat_param", False) or (
        getattr(param, "_fsdp_flattened", False) and param.ndim == 1
    ):
        raise RuntimeError(flat_message(name, None))


def flat_message(name: str, shape: tuple[int, ...] | None) -> str:
    """Return what to say of a flat piece, and what to use instead."""
    was = "matrices" if shape is None else f"a matrix of shape {shape}"
    return (
        f"{name} is a flat piece of {was}: rows and columns are gone, and it cannot be projected. "
        "Shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps them, or use DDP"
    )
