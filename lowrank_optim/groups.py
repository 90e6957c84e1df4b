"""Which parameters of a model are projected."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .parts.checks import SettingError
from .parts.rank import MIN_DIM, AutoRank, rank_asked, rank_of, subspace_of
from .roles import roles_of
from .settings.plans import plan_of
from .settings.values import part_of

Named = Sequence[tuple[str, Tensor]]


def param_groups(
    model: nn.Module,
    rank: int | float | str | AutoRank = 0.25,
    *,
    lr: float | None = None,
    rest_lr: float | None = None,
    weight_decay: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    min_dim: int = MIN_DIM,
    **settings: Any,
) -> list[dict[str, Any]]:
    r"""Sort a model's trainable parameters into groups for an optimizer of this package.

    Parameters are classified, not modules, so that GPT-2's Conv1D and 3-D stacks of experts count:
    1. projected: matrices, stacks of matrices and convolutions, with `rank`;
    2. plain with decay: embeddings, output heads, matrices with an axis no longer than the rank or,
       with a share as rank, shorter than `min_dim` (they cannot be projected, so they take the
       rates of the plain ones), 1-D convolutions (three dimensions that are no stack), and what
       `exclude` names;
    3. plain without decay: norms, biases of any shape, everything else below two dimensions, and
       what state-space models keep beside their matrices or mark with `_no_weight_decay`.
    An output head is what the model says (`get_output_embeddings`, a layer as wide as `num_labels`
    or `num_classes`), or the last matrix of a module that has such a name (`head`, `classifier`,
    `fc`, `score`, ...) and stands in no numbered layer. Frozen parameters are left out, tied ones
    stand once (a head tied to an embedding is an embedding). Empty groups are left out.

    Where no matrix reaches `min_dim`, as when only adapters are trained, nothing is projected. A
    warning says so, and the first group holds the matrices that would otherwise be projected.

    Args:
        model: any module.
        rank: as in the optimizer: an int, or a share of the projected axis. 1.0 takes every matrix,
            for methods that work on whole ones (MuonW, CondaW, RACS, ...); "auto" or an
            `AutoRank` chooses as training goes.
        lr: learning rate of the projected matrices; None leaves it to the optimizer.
        rest_lr: learning rate of all others; None for the same as `lr`. Methods whose `scale` is
            below 1 train the others faster than the matrices: tune both.
        weight_decay: decay of groups 1 and 2; None leaves it to the optimizer.
        include: regular expression searched in names: of the matrices only these are projected.
        exclude: regular expression searched in names: these are not projected.
        min_dim: as in the optimizer, which reads it from the projected group.
        **settings: further settings of the projected group, such as `update_proj_gap`.

    Returns:
        Group dicts with "params", "param_names" and settings, the projected group first.

    Raises:
        ValueError: nothing would be projected, for a reason other than `min_dim`.
    """
    found, message = sorted_groups(
        model, rank, lr, rest_lr, weight_decay, include, exclude, min_dim, settings, strict=True
    )
    if message:
        warnings.warn(message, stacklevel=2)
    return found


def sorted_groups(
    model: nn.Module,
    rank: int | float | str | AutoRank,
    lr: float | None,
    rest_lr: float | None,
    weight_decay: float | None,
    include: str | None,
    exclude: str | None,
    min_dim: int,
    settings: dict[str, Any],
    strict: bool,
) -> tuple[list[dict[str, Any]], str]:
    """Return the groups of `param_groups` and its warning; raise for a high rank if `strict`."""
    rest = lr if rest_lr is None else rest_lr
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    share = rank_asked({"rank": rank, **settings})
    whole = "projector" in settings and part_of("projector", settings["projector"]).whole
    full = isinstance(share, float) and share == 1
    return arranged(
        [(name, param) for name, param in model.named_parameters() if param.requires_grad],
        model,
        {"rank": rank, "min_dim": min_dim, **_rate(lr), **decay, **settings},
        {"rank": None, **_rate(rest), **decay},
        (share, settings.get("side", "auto"), whole and not full, full),
        min_dim,
        (include, exclude),
        strict,
    )


def arranged(
    named: Named,
    model: nn.Module | None,
    projected: dict[str, Any],
    plain: dict[str, Any],
    rule: tuple[Any, ...],
    min_dim: int,
    chosen: tuple[str | None, str | None] = (None, None),
    strict: bool = False,
) -> tuple[list[dict[str, Any]], str]:
    """Return groups, without those that are empty, and a warning if nothing will be projected.

    Args:
        named: the parameters. Frozen ones are sorted too, and count for nothing.
        model: the module that they belong to, if it is known.
        projected, plain: settings of the first group, and of the others.
        rule: what `subspace_of` goes by, besides the shape and `min_dim`.
        min_dim: the least axis.
        chosen: `include` and `exclude`.
        strict: whether a rank that is too high is an error, not a warning.
    """
    include, exclude = chosen
    roles = roles_of(named, model)
    kinds: dict[int, str] = {}
    for name, param in named:
        kind = roles.get(id(param), "matrix" if param.ndim > 1 else "no decay")
        left_out = (include is not None and not re.search(include, name)) or (
            exclude is not None and re.search(exclude, name)
        )
        kinds[id(param)] = "plain" if kind == "matrix" and left_out else kind
    matrices = [param for _, param in named if kinds[id(param)] == "matrix"]

    def fit(least: int) -> list[Tensor]:
        return [x for x in matrices if subspace_of(tuple(x.shape), *rule, least) is not None]

    def trained(params: Iterable[Tensor]) -> bool:
        return any(param.requires_grad for param in params)

    message, fitting = "", fit(min_dim)
    if not trained(fitting) and (strict or trained(param for _, param in named)):
        long = fit(1)
        wanted = f"axes longer than rank={rule[0]}"
        if trained(long):
            wanted = f"no axis shorter than min_dim={min_dim}"
        who = "these parameters" if model is None else type(model).__name__
        lacks = f"it has no trainable matrix, besides embeddings and head, with {wanted}"
        if not matrices or (strict and not trained(long)):
            raise SettingError(
                f"no parameter of {who} would be projected: {lacks}, or "
                f"include={include!r} and exclude={exclude!r} leave none"
            )
        message = (
            f"no parameter of {who} is projected, all get AdamW's step: {lacks}. Adapters need no "
            "more; to project short matrices all the same, pass min_dim=1 or an int as rank"
        )
        fitting = fitting or long or matrices
        projected = {**projected, **{key: plain[key] for key in ("lr",) if key in plain}}
    chosen_ids = {id(param) for param in fitting}
    groups = {
        "projected": projected,
        "plain": plain,
        "no decay": {**plain, "weight_decay": 0.0},
    }
    found = {kind: {**group, "params": [], "param_names": []} for kind, group in groups.items()}
    for name, param in named:
        kind = "projected" if id(param) in chosen_ids else kinds[id(param)]
        group = found["plain" if kind == "matrix" else kind]
        group["params"].append(param)
        group["param_names"].append(name)
    return [group for group in found.values() if group["params"]], message


def given(params: Any, defaults: dict[str, Any]) -> tuple[Any, str]:
    """Return groups for what a constructor was given, and the text of a warning, "" for none.

    A module or (name, tensor) pairs are sorted as by `param_groups`, frozen parameters too.
    Anything else that torch's optimizers take is returned as it is.

    Args:
        params: tensors, (name, tensor) pairs, group dicts or a module.
        defaults: the settings, checked.
    """
    model = params if isinstance(params, nn.Module) else None
    if isinstance(params, (Tensor, dict)) or (model is None and not isinstance(params, Iterable)):
        return params, ""
    listed = list(params if model is None else model.named_parameters())
    pairs = all(
        isinstance(item, tuple) and [type(part) for part in item[:1]] == [str]
        and len(item) == 2 and isinstance(item[1], Tensor)
        for item in listed
    )  # fmt: skip
    if not listed or not pairs or defaults["rank"] is None:
        return listed, ""
    plan = plan_of(defaults)
    rule = (rank_of(defaults["rank"]), defaults["side"], plan.projector.whole, plan.full)
    found, message = arranged(listed, model, {}, {"rank": None}, rule, defaults["min_dim"])
    for group in found:
        group["params"] = list(zip(group.pop("param_names"), group["params"], strict=True))
    return found, message


def _rate(lr: float | None) -> dict[str, Any]:
    return {} if lr is None else {"lr": lr}
