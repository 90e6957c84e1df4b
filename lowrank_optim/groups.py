"""Which parameters of a model are projected."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .auto_rank import AutoRank, rank_of
from .geometry import subspace_of
from .settings import SettingError

HEADS = frozenset(
    {"lm_head", "head", "output", "output_layer", "embed_out", "classifier", "score", "fc_out"}
)
"""Last components of the names of output heads, where they stand outside numbered layers."""

WRAPPER = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|modules_to_save\.[^.]+)(?=\.|$)"
)
"""What torch.compile, activation checkpointing, FSDP and PEFT put into the names of modules."""

NUMBERED = re.compile(r"\.\d+(\.|$)")

EMBEDDING = re.compile(r"(^|[._])(embed|embedding|embeddings|wte|wpe|pos_embed|relative_attention)")


def param_groups(
    model: nn.Module,
    rank: int | float | str | AutoRank = 0.25,
    *,
    lr: float | None = None,
    rest_lr: float | None = None,
    weight_decay: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    r"""Sort a model's trainable parameters into groups for an optimizer of this package.

    Parameters are classified, not modules, so that GPT-2's Conv1D and 3-D stacks of experts count:
    1. projected: matrices, stacks of matrices and convolutions, with `rank`;
    2. plain with decay: embeddings, output head, matrices with an axis no longer than the rank
       (they would be plain anyway, and belong with the rates of the plain ones), 1-D convolutions
       (three dimensions that are no stack), and what `exclude` names;
    3. plain without decay: norms, biases of any shape, everything else below two dimensions, and
       parameters that their module marks with `_no_weight_decay`, as state-space models do.
    Frozen parameters are left out, tied ones stand once (a head tied to an embedding is an
    embedding). Groups without parameters are left out.

    Args:
        model: any module.
        rank: as in the optimizer: an int, or a share of the projected axis. 1.0 takes every matrix,
            for methods that work on whole ones (MuonW, NorMuonW, CondaW, RACS); "auto" or an
            `AutoRank` chooses as training goes.
        lr: learning rate of the projected matrices; None leaves it to the optimizer.
        rest_lr: learning rate of all others; None for the same as `lr`. Methods whose `scale` is
            below 1 train the others faster than the matrices: tune both.
        weight_decay: decay of groups 1 and 2; None leaves it to the optimizer.
        include: regular expression searched in names: of the matrices only these are projected.
        exclude: regular expression searched in names: these are not projected.
        **settings: further settings of the projected group, such as `update_proj_gap`.

    Returns:
        Group dicts with "params", "param_names" and settings, the projected group first.

    Raises:
        ValueError: nothing would be projected.
    """
    rest = lr if rest_lr is None else rest_lr
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    share = rank_of(rank)
    projected: dict[str, Any] = {"rank": share, **_rate(lr), **decay, **settings}
    plain: dict[str, Any] = {"rank": None, **_rate(rest), **decay}
    no_decay: dict[str, Any] = {"rank": None, **_rate(rest), "weight_decay": 0.0}

    side, full = settings.get("side", "auto"), isinstance(rank, float) and rank == 1

    special = _not_projected(model)
    groups = [projected, plain, no_decay]
    for group in groups:
        group.update(params=[], param_names=[])
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        kind = special.get(id(param))
        if param.ndim < 2 or kind == "no decay":
            group = no_decay
        elif (
            kind is not None
            or subspace_of(tuple(param.shape), share, side, full=full) is None
            or (include is not None and not re.search(include, name))
            or (exclude is not None and re.search(exclude, name))
        ):
            group = plain
        else:
            group = projected
        group["params"].append(param)
        group["param_names"].append(name)
    if not projected["params"]:
        raise SettingError(
            f"no parameter of {type(model).__name__} would be projected: it has no trainable "
            f"matrix, besides embeddings and head, with axes longer than rank={rank}, or "
            f"include={include!r} and exclude={exclude!r} leave none"
        )
    return [group for group in groups if group["params"]]


def _rate(lr: float | None) -> dict[str, Any]:
    return {} if lr is None else {"lr": lr}


def _not_projected(model: nn.Module) -> dict[int, str]:
    """Return ids of parameters that are plain whatever their shape: "no decay" or "plain"."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        name = WRAPPER.sub("", name)
        last = name.rpartition(".")[2]
        convolution = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        head = last in HEADS and not NUMBERED.search(name)
        embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or EMBEDDING.search(last)
        norm = "norm" in type(module).__name__.lower()
        for own, param in module.named_parameters(recurse=False):
            bias = own == "bias" or own.endswith("_bias")
            if embedding or EMBEDDING.search(own):
                found.setdefault(id(param), "plain")
            elif norm or bias or getattr(param, "_no_weight_decay", False):
                found.setdefault(id(param), "no decay")
            elif head or convolution:
                found.setdefault(id(param), "plain")
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module_of = getattr(model, getter, None)
        layer = module_of() if callable(module_of) else None
        if isinstance(layer, nn.Module):
            for own, param in layer.named_parameters(recurse=False):
                if own != "bias":
                    found.setdefault(id(param), "plain")
    return found
