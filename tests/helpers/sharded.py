"""Models whose parameters are DTensors, and what the ranks of a test do with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from helpers.cases import Case, Model, gradient

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp-2": ((2,), (Shard(0),)),
    "fsdp-4": ((4,), (Shard(0),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "columns": ((2,), (Shard(1),)),
    "columns-4": ((4,), (Shard(1),)),
    "rows-columns": ((2, 2), (Shard(0), Shard(1))),
    "columns-rows": ((2, 2), (Shard(1), Shard(0))),
    "nested": ((2, 2), (Shard(0), Shard(0))),
    "strided": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "replicated": ((2,), (Replicate(),)),
}
"""Mesh and placements by name; an axis that a parameter lacks is not cut."""


def size_of(layout: str) -> int:
    """Return the number of processes of a layout."""
    return torch.Size(LAYOUTS[layout][0]).numel()


def mesh_of(layout: str) -> DeviceMesh:
    """Return the mesh of a layout."""
    shape = LAYOUTS[layout][0]
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def placements_for(tensor: Tensor, layout: str) -> list[Any]:
    """Return the placements of a parameter."""
    kept = LAYOUTS[layout][1]
    return [p if getattr(p, "dim", -1) < tensor.ndim else Replicate() for p in kept]


def cut(tensor: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """Return a tensor that is the same everywhere as a DTensor, as FSDP2 and TP cut it."""
    if not any(isinstance(placement, _StridedShard) for placement in placements):
        return distribute_tensor(tensor, mesh, placements)
    local, shape = tensor, tensor.shape
    for dim in (1, 0):
        local = distribute_tensor(local, mesh["ab"[dim]], [Shard(0)]).to_local()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=tensor.stride()
    )


def sharded(model: nn.Module, mesh: DeviceMesh, layout: str) -> nn.Module:
    """Turn the parameters of a model into DTensors, in place."""
    for name, param in list(model.named_parameters()):
        value = cut(param.detach(), mesh, placements_for(param, layout))
        setattr(model, name, nn.Parameter(value))
    return model


def train_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Do what `cases.train` does, with gradients cut as the parameters are."""
    for step in steps:
        for position, param in enumerate(model.parameters()):
            whole = gradient(torch.empty(param.shape, dtype=param.dtype), step, position)
            param.grad = cut(whole, param.device_mesh, list(param.placements))
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of strided shards, the pieces in the order in which they were cut."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        local = tensor.detach().to_local()
        for dim in (0, 1):
            local = gathered(local, tensor.device_mesh.get_group(dim))
        return local
    return tensor.detach().full_tensor()


def gathered(local: Tensor, group: Any) -> Tensor:
    """Return the pieces of a group one below the other."""
    pieces: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(pieces, local, group)
    return torch.cat(pieces)


def run_case(
    case: Case,
    layout: str,
    dtype: torch.dtype,
    steps: int,
    changes: dict[str, Any],
    without: tuple[str, ...] = (),
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a sharded model, without some parameters, and its optimizer after some steps."""
    model = Model(dtype)
    for name in without:
        delattr(model, name)
    sharded(model, mesh_of(layout), layout)
    optimizer = case.build(model.parameters(), **changes)
    train_sharded(model, optimizer, range(steps))
    return model, optimizer


def same_everywhere(tensor: Tensor) -> bool:
    """Return whether a tensor is the same, to the bit, on all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor.detach())
    return all(torch.equal(found[0], other) for other in found)
