"""Who does a step, Triton kernels or plain torch, and why; and who codes moments."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .. import functional
from ..parts.plan import Plan
from ..parts.rules import Adam
from ..parts.storage import Blockwise8, Dense
from ..parts.types import Group, Site, State

HALF = (torch.bfloat16, torch.float16)


@cache
def kernels() -> ModuleType:
    """Return the module of kernels, imported at the first use: it needs triton."""
    return importlib.import_module("lowrank_optim.kernels")


def prepare(site: Site, plan: Plan, group: Group, param: Tensor, grad: Tensor) -> None:
    """Note in a site whether kernels step its parameter, and whether kernels code its moments.

    Raises:
        RuntimeError: `impl="triton"`, and kernels cannot do the step.
    """
    site.launches = refusal(plan, group, param, grad) is None
    site.ops = codecs(plan, group, param, grad)


def refusal(
    plan: Plan, group: Group, param: Tensor, grad: Tensor, state: State | None = None
) -> str | None:
    """Return why plain torch does the step of a parameter, or None where kernels do it.

    Args:
        plan, group: of the parameter.
        param, grad: the part that this process holds.
        state: its state, if it is not projected.

    Raises:
        RuntimeError: `impl="triton"`, and there is a reason against it for a projected parameter.
    """
    projected = state is None
    if (reason := not_asked_for(group, param)) is not None:
        return reason
    reason = unable(plan, param, grad) or missing(plan, projected)
    if reason is None and state is not None and not dense(param, grad, state):
        reason = "strides of parameter, gradient and moments that differ"
    if reason is not None and group["impl"] == "triton" and projected:
        raise RuntimeError(
            f'impl="triton", but the parameter of shape {tuple(param.shape)} cannot be stepped by '
            f'kernels: {reason}. Use impl="auto"'
        )
    return reason


def codecs(plan: Plan, group: Group, param: Tensor, grad: Tensor) -> ModuleType:
    """Return who reads and writes moments in 8 bits and draws bits: kernels, or plain torch.

    Whether kernels do the step is another question: the kernels of formats know no rule.
    """
    against = not_asked_for(group, param) or unable(plan, param, grad)
    return kernels() if against is None else functional


def not_asked_for(group: Group, param: Tensor) -> str | None:
    """Return why a group's `impl` means plain torch for a parameter, or None."""
    impl, device = group["impl"], param.device.type
    if impl == "eager":
        return 'impl="eager"'
    return f"on {device.upper()}" if impl == "auto" and device != "cuda" else None


def unable(plan: Plan, param: Tensor, grad: Tensor) -> str | None:
    """Return why no kernel can work on tensors of these dtypes and classes, or None."""
    dtypes = (param.dtype, grad.dtype, plan.storage.dtype(param))
    return _unable(param.device.type, dtypes, type(param), type(grad))


@lru_cache(maxsize=1024)
def _unable(device: str, dtypes: tuple[torch.dtype, ...], *types: type) -> str | None:
    if not has_triton():
        return "triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"on {device.upper()}"
    for kind in types:
        if kind not in (Tensor, torch.nn.Parameter):
            return f"tensors of the class {kind.__name__}"
    for dtype in dtypes:
        if dtype not in (torch.float32, *HALF):
            return f"dtype {str(dtype).removeprefix('torch.')}"
    return None


PART, WHOLE, PLAIN = "part of each row", "whole matrices", "not projected"
"""What is projected."""

LAUNCHES = {
    (Adam, Dense, PART): ("project_moments", "lift_write"),
    (Adam, Blockwise8, PART): ("project_moments", "lift_write"),
    (Adam, Dense, PLAIN): ("adam_step",),
    (Adam, Blockwise8, PLAIN): ("adam_step",),
}
"""The kernels that do a step, by rule, storage of its moments and what is projected."""


def missing(plan: Plan, projected: bool) -> str | None:
    """Return which part of a plan has no kernel, or None where kernels can do the step."""
    rule = plan.rule if projected else plan.rule.plain
    what = PLAIN if not projected else WHOLE if plan.projector.whole else PART
    if not any(known[0] is type(rule) for known in LAUNCHES):
        return f"no kernel for the rule {type(rule).__name__}"
    if projected and plan.feed.slots:
        return f"no kernel for the feed {type(plan.feed).__name__}"
    if not any(known[::2] == (type(rule), what) for known in LAUNCHES):
        return f"no kernel for the projector {type(plan.projector).__name__}"
    if (type(rule), type(plan.storage), what) not in LAUNCHES:
        return f"no kernel for moments stored as {type(plan.storage).__name__}"
    return None


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
    """Return how a parameter will be stepped, as far as is known before there is a gradient."""
    if not projected and isinstance(plan.rule.plain, Adam) and exact(plan, param):
        return "torch's AdamW"
    reason = not_asked_for(group, param)
    if reason is not None:
        return f"plain torch ({reason})"
    reason = unable(plan, param, param) or missing(plan, projected)
    return "kernels" if reason is None else f"plain torch ({reason})"


def exact(plan: Plan, param: Tensor) -> bool:
    """Return whether the moments of a whole parameter are dense and of its own dtype."""
    shape = tuple(param.shape)
    like = torch.empty(shape, dtype=param.dtype, device="meta")
    entries = plan.storage.zeros("exp_avg", shape, like, param.numel() or 1)
    forms = {key: value.dtype for key, value in entries.items()}
    return param.dtype in (torch.float32, torch.float64) and forms == {"exp_avg": param.dtype}
