"""A small model trained by several processes, and by one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRank,
    NorMuonW,
    TrionW,
    param_groups,
)

GAP = 3
WORDS = 19
METHODS: dict[str, tuple[type[LowRank], dict[str, Any]]] = {
    "galore": (GaLoreAdamW, {}),
    "galore-power-rotate": (GaLoreAdamW, {"projector": "power", "on_refresh": "rotate"}),
    "dct": (DCTAdamW, {"update_proj_gap": 1}),
    "fira": (FiraAdamW, {}),
    "fira-cut": (FiraAdamW, {"shard_basis": True}),
    "frugal": (FrugalAdamW, {}),
    "apollo": (ApolloAdamW, {}),
    "frugal-none": (FrugalAdamW, {"state_free": "none"}),
    "galore-8bit": (GaLoreAdamW, {"state_dtype": "8bit"}),
    "dct-8bit": (DCTAdamW, {"state_dtype": "8bit", "update_proj_gap": 1}),
    "fira-8bit": (FiraAdamW, {"state_dtype": "8bit"}),
    "frugal-8bit": (FrugalAdamW, {"state_dtype": "8bit"}),
    "apollo-8bit": (ApolloAdamW, {"state_dtype": "8bit"}),
    "ldadam": (LDAdamW, {"update_proj_gap": 1}),
    "trion-8bit": (TrionW, {"momentum_dtype": "8bit", "update_proj_gap": 1}),
    "normuon": (NorMuonW, {"update_proj_gap": None}),
    "galore-rms": (GaLoreAdamW, {"length": "rms"}),
    "fira-length": (FiraAdamW, {"length": "adamw"}),
    "galore-length": (GaLoreAdamW, {"length": "adamw"}),
}
"""The presets with float32 and 8-bit states, and lengths, and the projector to recommend."""


class Net(nn.Module):
    """Embedding, two blocks of odd widths with norms, a stack of experts, and a head.

    Rows that two and four processes do not share out evenly, and three experts for four.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 15) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(WORDS, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 10)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(10)
        self.experts = nn.Parameter(torch.zeros(3, 10, 10))
        self.head = nn.Linear(10, WORDS)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=rng, dtype=torch.float64) * 0.3
        self.to(dtype)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embed(words)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = hidden + torch.einsum("...i,eij->...j", hidden, self.experts)
        return self.head(self.norm(hidden))


def batch(step: int, rank: int = 0, size: int = 1) -> Tensor:
    """Return a rank's share of the words of a step; that of one process is the whole."""
    words = torch.randint(0, WORDS, (4, 6), generator=torch.Generator().manual_seed(step))
    return words.chunk(size)[rank]


def loss_of(model: nn.Module, words: Tensor) -> Tensor:
    """Return the loss, a mean over words."""
    return nn.functional.cross_entropy(model(words).flatten(0, 1), words.flatten())


def optimizer_of(model: nn.Module, method: str, **changes: Any) -> LowRank:
    """Build an optimizer that projects the matrices of the blocks and the experts."""
    cls, settings = METHODS[method]
    groups = param_groups(model, rank=0.4, side="right", weight_decay=0.1, min_dim=1)
    settings = {"lr": 1e-2, "update_proj_gap": GAP, **settings, **changes}
    return cls(groups, **{key: value for key, value in settings.items() if value is not None})


def wrapped(model: Net, kind: str) -> nn.Module:
    """Hand a model to torch: "fsdp", "hybrid" (two groups with copies), or "ddp"."""
    if kind == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = None
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("b",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Run some steps; in several processes, each on its share of the words."""
    joined = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    for step in steps:
        loss_of(model, batch(step, rank, size)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(method: str, steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the weights of an ordinary run in one process."""
    model = Net(dtype)
    train(model, optimizer_of(model, method), range(steps))
    return weights(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all of the weights of a model, however they lie on processes."""
    module = getattr(model, "module", model)
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in module.named_parameters()
    }


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference of two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
