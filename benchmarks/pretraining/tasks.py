"""What is trained: models, texts and schedules, from minutes on two cores to one GPU.

The GaLore protocol (Zhao et al., arXiv 2403.03507, appendix C): LLaMA, untied, sequences of 256,
10 % of warm-up, cosine to a tenth, no decay, no clipping. Ours differs in its text and its packing,
in batches and steps, which are what the device can do, and in the vocabulary of the small tasks.
The tasks on bytes are those of the demo: almost all parameters are in projected matrices there, as
they are in large models. The tasks for a GPU have float32 weights and take their products in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lowrank_optim.demo.train import rate


@dataclass(frozen=True)
class Task:
    """A model and how it is trained.

    Args:
        vocab: size of the BPE, or 256 for bytes.
        text: MiB of text that are read.
        batch, length: windows a step, tokens a window.
        steps: optimizer steps of a run, unless the run says otherwise.
        windows: held-out windows that the reported loss is the mean of.
        points: number of points of a curve, each the loss on `curve_windows` held-out windows.
        clip: largest norm of all gradients together; None for the protocol's none.
        weight_decay: of all but norms.
        mixed: whether the forward pass takes its products in bf16, whatever the weights are.
        schedule: one of `SCHEDULES`.
    """

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int
    text: int = 32
    windows: int = 256
    curve_windows: int = 32
    points: int = 10
    clip: float | None = None
    weight_decay: float = 0.0
    mixed: bool = False
    schedule: str = "cosine"


def stable(step: int, steps: int) -> float:
    """Share of the peak rate: linear over the first tenth and over the last fifth, to a tenth.

    Args:
        step: steps already taken, from 0.
    """
    warm, last = max(1, steps // 10), max(1, steps // 5)
    left = min(1.0, max(0.0, (steps - step) / last))
    return min((step + 1) / warm, 0.1 + 0.9 * left)


SCHEDULES = {"cosine": rate, "stable": stable}


TASKS = {
    task.name: task
    for task in (
        Task("smoke", 256, 32, 80, 2, 2, 32, 4, 12, text=2, windows=8, curve_windows=4, points=3),
        Task("bytes-128", 256, 128, 344, 4, 4, 128, 16, 400, clip=1.0, weight_decay=0.1),
        Task("bytes-192", 256, 192, 512, 4, 6, 128, 16, 400, clip=1.0, weight_decay=0.1),
        Task("3m", 8192, 128, 344, 4, 4, 256, 4, 400, windows=128),
        Task("3m-16", 8192, 128, 344, 4, 4, 256, 16, 400, windows=128),
        Task("60m", 32000, 512, 1376, 8, 8, 256, 64, 1000, text=128, mixed=True),
        Task("130m", 32000, 768, 2048, 12, 12, 256, 64, 1000, text=128, mixed=True),
    )
}


def variants(task: Task) -> list[Task]:
    """Return a task under other conditions: clipping or its lack, schedule, batch."""
    changed: dict[str, dict[str, Any]] = {
        "clip": {"clip": 1.0 if task.clip is None else None},
        "stable": {"schedule": "stable"},
        "batch": {"batch": 4 * task.batch},
    }
    return [
        replace(task, name=f"{task.name}+{variant}", **change)
        for variant, change in changed.items()
    ]


for known in ("smoke", "bytes-128", "3m"):
    TASKS |= {task.name: task for task in variants(TASKS[known])}


def build_model(task: Task, seed: int, weights: str, device: str) -> Any:
    """Make the task's LLaMA with weights that depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=task.hidden,
        intermediate_size=task.intermediate,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        max_position_embeddings=task.length,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, getattr(torch, weights))
