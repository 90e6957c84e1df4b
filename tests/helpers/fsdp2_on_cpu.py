"""Accelerate's FSDP2 without a GPU, for the ranks of a test and for scripts under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType


def forget() -> None:
    """Forget what accelerate keeps once a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextmanager
def joined_to_accelerate(fsdp: bool = True) -> Iterator[None]:
    """Let accelerate take the process group that is there, as one of GPUs or of CPUs.

    Of CPUs it makes no FSDP: `AcceleratorState` looks at the plugin on GPUs and the like alone. So
    with `fsdp` it is told that there are several GPUs, and that their device is the CPU. All that
    comes behind this choice is its own code, unchanged.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, size)
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")
        if fsdp:
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
            several = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # noqa: E731
            patch.setattr(PartialState, "_prepare_backend", several)
        forget()
        try:
            yield
        finally:
            forget()
