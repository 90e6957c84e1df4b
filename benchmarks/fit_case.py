"""One training of LLaMA-7B on one card: built on the device in bf16, a few steps, what it took.

`fit_7b.py` runs each in a process of its own: `python fit_case.py JSON` prints the row as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_optim import DCTAdamW, FiraAdamW, LowRank, param_groups, state_bytes
from lowrank_optim.demo.corpus import load_corpus

GIB = 1 << 30
WITHHELD = GIB // 2
"""What a card keeps from all programs (ECC, firmware, the driver): its memory is below its name."""
CONTEXT = GIB // 2
"""A CUDA context and its modules: outside torch's allocator, and so outside the cap that it has."""
SIZES = {
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176,
             "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


class Case(NamedTuple):
    """What is trained: `card` in GiB, 0 for no cap; `rank` 0 for what is not projected."""

    size: str
    method: str
    card: int
    rank: int
    batch: int
    length: int = 256
    steps: int = 20


def dct(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Return ours, with a state of 8 bits and weights that are rounded stochastically."""
    groups = param_groups(model, rank=rank, lr=1e-4)
    return DCTAdamW(groups, state_dtype="8bit", stochastic_rounding=True)


def fira(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Return the same, with four times the rate where `scale`, 0.25, makes updates shorter."""
    groups = param_groups(model, rank=rank, lr=4e-4, rest_lr=1e-4)
    return FiraAdamW(groups, projector="power", state_dtype="8bit", stochastic_rounding=True)


def adamw(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Return torch's, with states in the weights' bf16."""
    cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if cuda else None)


def adamw8bit(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Return that of bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=1e-4)


METHODS: dict[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    "dct": dct, "fira": fira, "adamw": adamw, "adamw8bit": adamw8bit,
}  # fmt: skip
OURS = ("dct", "fira")
"""Those that update parameters in the backward pass."""


def cap_bytes(card: int) -> int:
    """Return what is left for torch's allocator on a card of so many GiB; 0 for no cap."""
    return card * GIB - WITHHELD - CONTEXT if card else 0


def build_model(size: str, device: str) -> Any:
    """Return the model with random weights (0.02), made on the device in bf16, checkpointing."""
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=False, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.24 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def batches(case: Case, device: str) -> Iterator[Tensor]:
    """Yield windows of the standard library's source, a byte a token: 256 of the vocabulary."""
    text, rng = load_corpus().train, torch.Generator().manual_seed(0)
    for _ in range(case.steps):
        starts = torch.randint(len(text) - case.length, (case.batch,), generator=rng)
        windows = [text[start : start + case.length] for start in starts.tolist()]
        yield torch.stack(windows).long().to(device)


def run(case: Case) -> dict[str, Any]:
    """Train, and return what there is to say, also where memory ran out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cap = cap_bytes(case.card)
    if cap and device == "cpu":
        raise RuntimeError("a cap needs a CUDA device; --tiny runs without")
    row: dict[str, Any] = {"outcome": "trained", "phase": "build"}
    losses: list[float] = []
    seconds: list[float] = []
    try:
        if cap:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        torch.manual_seed(0)
        model = build_model(case.size, device)
        row["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizer = METHODS[case.method](model, case.rank)
        if isinstance(optimizer, LowRank):
            optimizer.step_in_backward()
        for tokens in batches(case, device):
            start = time.perf_counter()
            row["phase"] = "forward"
            loss = model(input_ids=tokens, labels=tokens).loss
            row["phase"] = "backward"
            loss.backward()
            row["phase"] = "step"
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            row["state_bytes"] = row.get("state_bytes") or state_bytes(optimizer)
        row["phase"] = ""
        if not all(map(math.isfinite, losses)):
            row |= {"outcome": "failed", "message": "a loss is not finite"}
    except torch.OutOfMemoryError as error:
        row |= {"outcome": "out of memory", "message": one_line(error)}
    except ImportError as error:
        row |= {"outcome": "not installed", "message": one_line(error)}
    except Exception as error:
        row |= {"outcome": "failed", "message": one_line(error)}
    if losses:
        row |= {"loss_first": f"{losses[0]:.4f}", "loss_last": f"{losses[-1]:.4f}"}
    if len(seconds) == case.steps:
        rate = case.batch * case.length / median(seconds[1:])
        row |= {"first_step_s": f"{seconds[0]:.3f}", "tokens_per_s": f"{rate:.1f}"}
    return row | (memory(cap) if device == "cuda" else {"device": "cpu"})


def memory(cap: int) -> dict[str, Any]:
    """Return the peaks of torch's allocator, and what this process holds outside it."""
    free, total = torch.cuda.mem_get_info()
    return {
        "cap_bytes": cap or "",
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "outside_bytes": total - free - torch.cuda.memory_reserved(),
        "device": torch.cuda.get_device_name(),
    }


def one_line(error: BaseException) -> str:
    """Return an exception with its type, in one line that is not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
