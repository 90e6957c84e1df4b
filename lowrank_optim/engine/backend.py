"""Which implementation does a step: Triton kernels, or plain torch and the reason why."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .. import functional
from ..parts.plan import Plan
from ..parts.rules import Adam
from ..parts.types import Group, Site, State

HALF = (torch.bfloat16, torch.float16)


@cache
def kernels() -> ModuleType:
    """Return the module of kernels, imported at the first use: it needs triton."""
    return importlib.import_module("lowrank_optim.kernels")


def refusal(
    plan: Plan, group: Group, param: Tensor, grad: Tensor, state: State, projected: bool
) -> str | None:
    """Return why plain torch does the step of a parameter, or None where kernels do it.

    Raises:
        RuntimeError: `impl="triton"`, and there is a reason against it for a projected parameter.
    """
    impl, device = group["impl"], param.device.type
    if impl == "eager":
        return 'impl="eager"'
    if impl == "auto" and device != "cuda":
        return f"on {device.upper()}"
    reason = reason_against(
        plan, projected, device, param.dtype, grad.dtype, type(param), type(grad)
    )
    if reason is None and not projected and not dense(param, grad, state):
        reason = "strides of parameter, gradient and moments that differ"
    if reason is not None and impl == "triton" and projected:
        raise RuntimeError(
            f'impl="triton", but the parameter of shape {tuple(param.shape)} cannot be stepped by '
            f'kernels: {reason}. Use impl="auto"'
        )
    return reason


@lru_cache(maxsize=1024)
def reason_against(
    plan: Plan,
    projected: bool,
    device: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    *types: type,
) -> str | None:
    """Return what stands against kernels for parameters of one kind, or None."""
    if not has_triton():
        return "triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"on {device.upper()}"
    if (reason := missing(plan, projected)) is not None:
        return reason
    for kind in types:
        if kind not in (Tensor, torch.nn.Parameter):
            return f"tensors of the class {kind.__name__}"
    for name in (dtype, grad_dtype, plan.storage.dtype(torch.empty((), dtype=dtype))):
        if name not in (torch.float32, *HALF):
            return f"dtype {str(name).removeprefix('torch.')}"
    return None


def missing(plan: Plan, projected: bool) -> str | None:
    """Return which part of a plan has no kernel, or None."""
    rule = plan.rule if projected else plan.rule.plain
    if type(rule) is not Adam:
        return f"no kernel for the rule {type(rule).__name__}"
    if projected and plan.feed.slots:
        return f"no kernel for the feed {type(plan.feed).__name__}"
    if projected and plan.projector.whole:
        return f"no kernel for the projector {type(plan.projector).__name__}"
    return None


def dct_scores(grads: Sequence[Tensor], norm: str, site: Site) -> Tensor:
    """Return the scores of the columns of the cosine basis, see `functional.dct_scores`."""
    empty = grads[0].numel() == 0
    if empty or not site.kernels or not kernels().supports(site.cols, grads[0].dtype):
        return functional.dct_scores(grads, norm)
    with functional.on_device(grads[0].device):
        scores: Tensor = kernels().dct_scores(grads, norm)
        return scores


def formats(site: Site) -> ModuleType:
    """Return who reads and writes moments in 8 bits and draws bits: kernels, or plain torch."""
    return kernels() if site.kernels and site.dtype == torch.float32 else functional


@cache
def has_triton() -> bool:
    """Return whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dense(param: Tensor, grad: Tensor, state: State) -> bool:
    """Return whether a whole parameter, its gradient and its moments are laid out alike."""
    moments = [value for value in state.values() if isinstance(value, Tensor)]
    return all(tensor.is_contiguous() for tensor in (param, grad, *moments))


def reason_of(plan: Plan, group: Group, param: Tensor, projected: bool) -> str:
    """Return how a parameter is stepped, as far as it shows before there is a gradient."""
    impl, device = group["impl"], param.device.type
    if not projected and isinstance(plan.rule.plain, Adam) and exact(plan, param):
        return "torch's AdamW"
    if impl == "eager":
        return 'plain torch (impl="eager")'
    if impl == "auto" and device != "cuda":
        return f"plain torch (on {device.upper()})"
    reason = reason_against(
        plan, projected, device, param.dtype, param.dtype, type(param), type(param)
    )
    return "kernels" if reason is None else f"plain torch ({reason})"


def exact(plan: Plan, param: Tensor) -> bool:
    """Return whether the moments of a whole parameter are dense and of its own dtype."""
    shape = tuple(param.shape)
    like = torch.empty(shape, dtype=param.dtype, device="meta")
    entries = plan.storage.zeros("exp_avg", shape, like, param.numel() or 1)
    forms = {key: value.dtype for key, value in entries.items()}
    return param.dtype in (torch.float32, torch.float64) and forms == {"exp_avg": param.dtype}
