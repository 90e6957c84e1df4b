"""Which parameters of a model are projected."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .settings import SettingError
from .update import matrix_shape

HEADS = frozenset(
    {"lm_head", "head", "output", "output_layer", "embed_out", "classifier", "score", "fc_out"}
)
"""Last components of the names of output heads."""

EMBEDDING = re.compile(r"(^|[._])(embed|embedding|embeddings|wte|wpe|pos_embed|relative_attention)")


def param_groups(
    model: nn.Module,
    rank: int | float = 0.25,
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
    2. plain with decay: embeddings, output head, and what `exclude` names;
    3. plain without decay: norms, biases and everything else below two dimensions.
    Frozen parameters are left out, tied ones stand once (a head tied to an embedding is an
    embedding). Groups without parameters are left out.

    Args:
        model: any module.
        rank: as in the optimizer: an int, or a share of the projected axis.
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
    projected: dict[str, Any] = {"rank": rank, **_rate(lr), **decay, **settings}
    plain: dict[str, Any] = {"rank": None, **_rate(rest), **decay}
    no_decay: dict[str, Any] = {"rank": None, **_rate(rest), "weight_decay": 0.0}

    special = _not_projected(model)
    groups = [projected, plain, no_decay]
    for group in groups:
        group.update(params=[], param_names=[])
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param.ndim < 2 or special.get(id(param)) == "norm":
            group = no_decay
        elif (
            id(param) in special
            or matrix_shape(param.shape) is None
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
            f"matrix besides embeddings and head, or include={include!r} and exclude={exclude!r} "
            "leave none"
        )
    return [group for group in groups if group["params"]]


def _rate(lr: float | None) -> dict[str, Any]:
    return {} if lr is None else {"lr": lr}


def _not_projected(model: nn.Module) -> dict[int, str]:
    """Return ids of the parameters of embeddings, output heads and norms, with the kind."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        kind = ""
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or EMBEDDING.search(last):
            kind = "embedding"
        elif last in HEADS:
            kind = "head"
        elif "norm" in type(module).__name__.lower():
            kind = "norm"
        for parameter_name, param in module.named_parameters(recurse=False):
            if kind or EMBEDDING.search(parameter_name):
                found.setdefault(id(param), kind or "embedding")
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module_of = getattr(model, getter, None)
        embedding = module_of() if callable(module_of) else None
        if isinstance(embedding, nn.Module):
            for param in embedding.parameters(recurse=False):
                found.setdefault(id(param), "embedding")
    return found
