"""Adam, and torch's own AdamW where a parameter is not projected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ... import functional
from ..types import Group, Job, Moments, State
from ._base import Elementwise

PIECE = 1 << 16
"""Elements that are updated at once on a CPU."""

SMALL = 1 << 12
"""Elements up to which parameters go in a list on a CPU: the same bits in fewer calls."""


@dataclass(frozen=True)
class Adam(Elementwise):
    """Adam with bias correction and eps outside the corrected root, as `torch.optim.AdamW` has it.

    Reads `betas` and `eps` of the group.

    Reference: Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980;
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    squares: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update both moments in place and return N, see `functional.adam`."""
        beta1, beta2 = group["betas"]
        return functional.adam(
            grad, moments["exp_avg"], moments["exp_avg_sq"], count, beta1, beta2, group["eps"]
        )

    def directions(
        self,
        grads: list[Tensor],
        moments: list[Moments],
        count: int | Tensor,
        group: Group,
    ) -> list[Tensor]:
        """Do what `direction` does with several small gradients of one count."""
        beta1, beta2 = group["betas"]
        firsts, seconds = ([held[slot] for held in moments] for slot in self.slots)
        return functional.adam_some(grads, firsts, seconds, count, beta1, beta2, group["eps"])

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry both moments in place, see `functional.rotate_moments`."""
        functional.rotate_moments(
            moments["exp_avg"], moments["exp_avg_sq"], rotation, count, *group["betas"]
        )

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return (1-b1^t) / sqrt(1-b2^t)."""
        correction1, correction2 = functional.bias_corrections(count, *group["betas"])
        ratio = correction1 / correction2
        return ratio.to(torch.float32) if isinstance(ratio, Tensor) else ratio

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Call torch's own functional AdamW where parameter, gradient and moments agree in dtype.

        The result equals `torch.optim.AdamW` to the bit; on a CUDA device its fused form, unless
        the group says otherwise. Half-precision parameters are left undone.
        """
        native: list[Job] = []
        undone: list[Job] = []
        for job in jobs:
            (native if self._is_native(job) else undone).append(job)
        few: list[Piece] = []
        pieces: list[Piece] = []
        for job in native:
            if not goes_in_a_loop(job, group):
                pieces.append(one_piece(job))
            elif job.param.numel() <= SMALL and not isinstance(group["lr"], Tensor):
                few.append(one_piece(job))
            else:
                pieces += in_pieces(job)
        if few:
            call_adamw(few, group, foreach=True)
        if pieces:
            call_adamw(pieces, group, foreach=group.get("foreach"))
        return undone

    def counts_on_device(self, param: Tensor, moments: State, group: Group) -> bool:
        """Return whether torch's fused kernel will read the step count."""
        return self._agree(param.dtype, moments) and bool(wants_fused(param, group))

    def _is_native(self, job: Job) -> bool:
        dtype = job.param.dtype
        return job.grad.dtype == dtype and self._agree(dtype, job.state)

    def _agree(self, dtype: torch.dtype, moments: State) -> bool:
        """Return whether moments are plain tensors of a dtype that torch's loops are exact in."""
        if dtype not in (torch.float32, torch.float64):
            return False
        if "exp_avg" not in moments or "exp_avg_sq" not in moments:
            return False
        return bool(moments["exp_avg_sq"].dtype == dtype == moments["exp_avg"].dtype)


Piece = tuple[Tensor, ...]
"""Parameter, gradient, both moments and step count; or equal parts of all except the count."""


def call_adamw(pieces: list[Piece], group: Group, foreach: bool | None) -> None:
    """Call torch's functional AdamW."""
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*pieces, strict=True))
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=foreach,
        fused=wants_fused(params[0], group),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        capturable=group["capturable"] and params[0].is_cuda,
    )


def goes_in_a_loop(job: Job, group: Group) -> bool:
    """Return whether torch steps parameters one by one: on a CPU, unless a form is asked for."""
    return job.param.device.type == "cpu" and not group.get("foreach") and not group.get("fused")


def one_piece(job: Job) -> Piece:
    """Return a parameter as one piece."""
    state = job.state
    return job.param, job.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]


def in_pieces(job: Job) -> Iterator[Piece]:
    """Yield a parameter in pieces for a CPU's cache.

    Torch's loop goes over a parameter some ten times. With 16 million elements in 200 pieces, it
    takes a third of the time and gives the same bits. Only the last piece counts the step.
    """
    *tensors, step = one_piece(job)
    if job.param.numel() < 2 * PIECE or not all(x.is_contiguous() for x in tensors):
        yield one_piece(job)
        return
    flat = [x.detach().view(-1) for x in tensors]
    pieces = list(zip(*(torch.split(x, PIECE) for x in flat), strict=True))
    for piece in pieces[:-1]:
        yield (*piece, step.clone())
    yield (*pieces[-1], step)


def wants_fused(param: Tensor, group: Group) -> bool | None:
    """Return torch's `fused`: as the group says, else True on CUDA, else what torch chooses."""
    fused: bool | None = group.get("fused")
    if fused is None and not group.get("foreach") and param.device.type == "cuda":
        return True
    return fused
