"""What lies on this process of a tensor that may be a DTensor."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_distributed(value: Any) -> bool:
    """Return whether a value is a DTensor, without importing torch's class, which takes time."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def here(value: Any) -> Any:
    """Return what this process holds of a tensor; anything else as it is."""
    return value.to_local() if is_distributed(value) else value


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    local: Tensor = here(tensor)
    return local


def reuse_later(grad: Tensor) -> None:
    """Keep the memory of a gradient until the current stream is done with it, also if it is freed.

    FSDP2 makes gradients on one stream and, with copies, calls hooks on another.
    """
    local = here(grad)
    if local.is_cuda:
        local.record_stream(torch.cuda.current_stream(local.device))
