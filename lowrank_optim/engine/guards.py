"""What protects a step: names for messages, refusals, and surroundings that must not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..parts.geometry import matrix_shape
from ..parts.plan import Job, Plan
from ..sharding.collectives import any_of

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
    """Return whether there are gradients, all zero, and every lr is 0. Looks at lr first."""
    rates = [group["lr"] for group, _, jobs in work if jobs]
    if not rates:
        return False
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False
    if any(float(rate) != 0 for rate in rates):
        return False
    all_jobs = [job for _, _, jobs in work for job in jobs]
    moves = any(bool(job.grad.count_nonzero()) for job in all_jobs)
    return not any_of(moves, [job.layout.everyone for job in all_jobs], all_jobs[0].grad.device)


def flat_piece(param: Tensor, known: tuple[int, ...] | None = None) -> str | None:
    """Return what the parameter is a flat piece of, as ZeRO and FSDP1 hand out; None if it is none.

    Args:
        param: the parameter as it is now.
        known: its shape when it was given to the optimizer.
    """
    if getattr(param, "_is_flat_param", False):
        return "matrices"
    if param.ndim != 1:
        return None
    for shape in (known, getattr(param, "ds_shape", None)):
        if shape is not None and matrix_shape(tuple(shape)):
            return f"a matrix of shape {tuple(shape)}"
    return "matrices" if getattr(param, "_fsdp_flattened", False) else None


def flat_error(name: str, piece: str) -> RuntimeError:
    """Return the error for a flat piece: plain AdamW in its place would be silent."""
    return RuntimeError(
        f"{name} is a flat piece of {piece}: rows and columns are gone, so it cannot be projected. "
        "Shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps them, or use DDP"
    )
