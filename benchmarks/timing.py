"""Times of steps, and the two rates of a machine that floors are counted by."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distributions
from statistics import median
from typing import Any

import torch
from provenance import output, provenance

import lowrank_optim

Row = dict[str, Any]


@dataclass
class Sample:
    """Times of some steps in ms, of the host alone too, and the most memory one of them took."""

    ms: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak: int | str = ""

    def row(self, kind: str) -> Row:
        """Return its columns."""
        host = f"{median(self.host):.4g}" if self.host else ""
        low, high = f"{min(self.ms):.4g}", f"{max(self.ms):.4g}"
        row = {"kind": kind, "repeats": len(self.ms), "ms": median(self.ms), "host_ms": host}
        return row | {"ms_min": low, "ms_max": high, "peak_bytes": self.peak}


def timed(
    step: Callable[[], Any], device: str, repeats: int = 1, warm: int = 0, limit: float = math.inf
) -> Sample:
    """Time a step `repeats` times, fewer if that takes longer than `limit` seconds."""
    for _ in range(warm):
        step()
    sample, cuda, end = Sample(), device == "cuda", time.perf_counter() + limit
    while len(sample.ms) < repeats and (not sample.ms or time.perf_counter() < end):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        start = time.perf_counter()
        step()
        host = 1e3 * (time.perf_counter() - start)
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
            sample.ms.append(events[0].elapsed_time(events[1]))
            sample.host.append(host)
            sample.peak = max(torch.cuda.max_memory_allocated() - before, sample.peak or 0)
        else:
            sample.ms.append(host)
    return sample


def facts(device: str, dtype: torch.dtype) -> Row:
    """Return the columns that are the same in every row, the machine's two rates among them."""
    cuda = device == "cuda"
    source = torch.randn((1 << 30 if cuda else 1 << 28) // 4, device=device)
    target = torch.zeros_like(source)
    copy = timed(lambda: target.copy_(source), device, 10, warm=2)
    n = 8192 if cuda else 1024
    left, right = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    product = timed(lambda: left @ right, device, 10, warm=2)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cpuinfo = output("grep", "-m1", "model name", "/proc/cpuinfo").partition(": ")[2]
    return {
        "copy_gb_s": round(2 * source.nbytes / median(copy.ms) / 1e6, 1),
        "matmul_tflops": round(2 * n**3 / median(product.ms) / 1e9, 4),
        "device": torch.cuda.get_device_name() if cuda else cpuinfo or platform.processor(),
        "driver": output(*query) if cuda else "",
        "triton": next((found.version for found in distributions(name="triton")), "none"),
        "package": lowrank_optim.__version__,
        **provenance(),
        "threads": torch.get_num_threads(),
    }
