"""What a parameter is for: told by the layer that holds it, by its name and by its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

WRAPPER = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|modules_to_save\.[^.]+)(?=\.|$)"
)
"""What torch.compile, activation checkpointing, FSDP and PEFT put into the names of modules."""

PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")
"""Where `torch.nn.utils.parametrize` keeps a parameter of a module."""

LENGTHS = re.compile(r"\.original0$|(^|\.)weight_g$")
"""Where both forms of `weight_norm` keep the lengths of a weight's rows."""

BIAS = re.compile(r"(^|_)bias(es)?(_|$)")

EMBEDDING = re.compile(
    r"(^|[._])(embed|embedding|embeddings|wte|wpe|pos_embed|relative_attention|emb$)|^shared$"
)

TABLE = re.compile(r"(^|_)(tokens?|latents?|probe|pos|table|latent_query)(_\dd)?$|^rel_pos")
"""Parameters that are no layer's weight and stand for inputs: tokens, queries, positions."""

SCALE = re.compile(r"(\w+_)?(scales?|alphas?|gammas?)")
"""Parameters that are no layer's weight and multiply channels."""

NORM = re.compile(r"norm(?!ali[sz])", re.IGNORECASE)

STATE_SPACE = re.compile(r"A_log$|^time_decay$")
"""Parameters by which a state-space model is told (Mamba, Jamba, Zamba, RWKV). The other parameters
of such a layer are no matrices either, except those that `WEIGHT` finds."""

WEIGHT = re.compile(r"weight|proj|_w\d")

HEAD = re.compile(
    r"(\w+_)?(?<!conv_)(?<!pre_)(heads?|classifiers?|logits(_\w+)?|scores?|predictors?)|aux\w*|fc",
    re.IGNORECASE,
)
"""Modules whose last matrix is an output of the model, where they stand outside numbered layers.

`conv_head` and `pre_logits` are not: in timm, these are the last layers of a body.
"""

OUTPUTS = frozenset({"output", "output_layer", "embed_out", "fc_out"})
"""Layers that are an output where they stand outside numbered layers. Inside them, other modules
have these names too: BERT's attention."""

LAST = re.compile(r"fc\d+|out|logits|final(_layer|_conv)?")
"""Layers that are an output if they are the last of the model and no part of another module."""

LINES = (nn.Conv1d, nn.ConvTranspose1d)
CONVOLUTIONS = (*LINES, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Path = tuple[str, ...]
Modules = dict[Path, nn.Module]


class Seen(NamedTuple):
    """A parameter under one of its names.

    Attributes:
        path: names of the modules that hold it, without wrappers and parametrizations.
        own: its name in the last of them.
        module: the last of them; None where only names are known.
        length: whether it is what `weight_norm` splits off a weight.
    """

    param: Tensor
    path: Path
    own: str
    module: nn.Module | None
    length: bool


def roles_of(named: Iterable[tuple[str, Tensor]], model: nn.Module | None) -> dict[int, str]:
    """Return the roles, by id, of parameters that are never projected, whatever their shape.

    "plain" are embeddings, output heads and 1-D convolutions. "no decay" are norms, biases of any
    shape, and all else that acts on channels one by one.

    Args:
        named: parameters with their names, in the model's order.
        model: the module that they belong to, whose layers then take precedence over names. Errors
            that its own methods raise are ignored. None if only names and shapes are known.
    """
    modules: Modules = {}
    if model is not None:
        named = model.named_parameters(remove_duplicate=False)
        modules = {bare(name): part for name, part in model.named_modules(remove_duplicate=False)}
    seen = [look(name, param, modules) for name, param in named]
    state_spaces = {one.path for one in seen if STATE_SPACE.search(one.own)}
    roles: dict[int, str] = {}
    matrices = []
    for one in seen:
        if (role := role_of(one, one.path in state_spaces)) is not None:
            roles.setdefault(id(one.param), role)
        elif one.param.ndim > 1:
            matrices.append(one)
    for param in (*heads(seen, matrices, modules), *labelled(matrices, modules), *declared(model)):
        roles.setdefault(id(param), "plain")
    return roles


def bare(name: str) -> Path:
    """Return the parts of a name, without what wrappers and parametrizations put into it."""
    name = PARAMETRIZED.sub(r"\1\2", WRAPPER.sub("", name))
    return tuple(part for part in name.split(".") if part)


def look(name: str, param: Tensor, modules: Modules) -> Seen:
    """Return a parameter with what its name tells of it."""
    *path, own = bare(name) or ("",)
    length = bool(LENGTHS.search(name)) and is_vector(param)
    return Seen(param, tuple(path), own, modules.get(tuple(path)), length)


def is_vector(param: Tensor) -> bool:
    """Return whether all elements lie along one axis."""
    return param.numel() == max(param.shape, default=1)


def role_of(one: Seen, state_space: bool) -> str | None:
    """Return the role that its layer, or its name, gives a parameter; None for a matrix."""
    param, path, own, module, length = one
    last = path[-1] if path else ""
    kind = last if module is None else type(module).__name__
    layer = isinstance(module, CONVOLUTIONS) or bool(WEIGHT.search(own))
    if length or BIAS.search(own):
        return "no decay"
    embedding = isinstance(module, nn.Embedding) or "Embedding" in kind
    if embedding or EMBEDDING.search(last) or EMBEDDING.search(own):
        return "plain"
    weighs = isinstance(module, (nn.Linear, *CONVOLUTIONS))
    if (NORM.search(kind) and not weighs) or getattr(param, "_no_weight_decay", False):
        return "no decay"
    if STATE_SPACE.search(own) or SCALE.fullmatch(own) or (state_space and not WEIGHT.search(own)):
        return "no decay"
    if param.ndim > 2 and is_vector(param) and not isinstance(module, CONVOLUTIONS):
        return "no decay"
    if TABLE.search(own) or (param.ndim == 3 and param.shape[0] == 1 and not layer):
        return "plain"
    if isinstance(module, LINES) or (module is None and param.ndim == 3 and "conv" in last):
        return "plain"
    return None


def heads(seen: list[Seen], matrices: list[Seen], modules: Modules) -> Iterator[Tensor]:
    """Yield the matrices that are output heads by name and place.

    Where only names are known, a head that has a bias and no weight of its own has a tied weight.
    The last matrix under its name is then not the head.
    """
    weights = {one.path for one in seen if WEIGHT.search(one.own)}
    biases = {one.path for one in seen if one.own == "bias" and one.module is None}
    last: dict[Path, Tensor] = {}
    for param, path, *_ in matrices:
        for depth, part in enumerate(path):
            if depth and part.isdigit():
                break
            if HEAD.fullmatch(part):
                last[branch(path, depth, modules)] = param
        else:
            if path and path[-1] in OUTPUTS:
                yield param
    yield from (param for path, param in last.items() if path not in biases - weights)
    if matrices and (path := matrices[-1].path) and LAST.fullmatch(path[-1]):
        around = path[:-1]
        if all(one.path[: len(around)] == around for one in seen):
            yield matrices[-1].param


def branch(path: Path, depth: int, modules: Modules) -> Path:
    """Return the path of a module named as a head, or of its element if it is a list or dict."""
    key, element = path[: depth + 1], path[depth + 1 : depth + 2]
    module = modules.get(key)
    several = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if several or (module is None and key[-1].endswith("s") and "".join(element).isdigit()):
        return key + element
    return key


def labelled(matrices: list[Seen], modules: Modules) -> Iterator[Tensor]:
    """Yield weights outside numbered layers that give a value for each label of the model.

    The number of labels is `num_labels`, `num_classes`, or the number of tokens of an embedding
    that has more tokens than dimensions.
    """
    labels = {}
    tokens = {
        part.num_embeddings
        for part in modules.values()
        if isinstance(part, nn.Embedding) and part.num_embeddings > part.embedding_dim
    }
    for path, module in modules.items():
        counts = (asked(asked(module, "config"), "num_labels"), asked(module, "num_classes"))
        if found := {count for count in counts if isinstance(count, int) and count > 0}:
            labels[path] = found
    for one in matrices:
        inside = any(part.isdigit() for part in one.path[1:-1])
        rows, cols = one.param.shape[:2]
        if inside or rows == cols or one.module is None or not one.own.startswith("weight"):
            continue
        sizes = (asked(one.module, key) for key in ("out_features", "out_channels", "nf"))
        width = next((size for size in sizes if isinstance(size, int)), rows)
        tells = any(width in labels.get(one.path[:end], ()) for end in range(len(one.path) + 1))
        if tells or (width in tokens and width > one.param.numel() // width):
            yield one.param


def declared(model: nn.Module | None) -> Iterator[Tensor]:
    """Yield the weights of embeddings and heads that modules name, as transformers' models do."""
    for module in () if model is None else model.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            layer = asked(module, getter, call=True)
            if isinstance(layer, nn.Module):
                for name, param in layer.named_parameters():
                    if len(bare(name)) == 1 and param.ndim > 1:
                        yield param


def asked(thing: Any, name: str, call: bool = False) -> Any:
    """Return an attribute, or the result of calling it; None if it is missing or raises."""
    try:
        found = getattr(thing, name, None)
        return found() if call and callable(found) else found
    except Exception:  # a model's own code: some raise NotImplementedError, some anything
        return None
