"""A state dict as named tensors and text, for formats that hold no more, such as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..parts.checks import SettingError


def flatten_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take the state dict of an optimizer apart, e.g. for `safetensors.torch.save_file`.

    Tensors are called "layers.0.weight.exp_avg" where the groups have `param_names`, else
    "0.exp_avg" by the parameter's number; they are contiguous, and no two share memory. The rest is
    JSON: numbers come back to the bit, tuples as tuples, and a dot in a name makes no difference.

    Args:
        state_dict: 'state' and 'param_groups'.

    Returns:
        Tensors by name, and metadata: text by name.

    Raises:
        ValueError: a value is no tensor, number, text, None, or list, tuple or dict of these; the
            message says where.
    """
    if set(state_dict) != {"state", "param_groups"}:
        raise SettingError(
            f"a state dict has 'state' and 'param_groups' alone, this one has {list(state_dict)}"
        )
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def text_of(value: Any, name: str) -> Any:
        if value is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, Tensor):
            while name in tensors:
                name += "_"
            flat = value.detach().contiguous()
            if flat.untyped_storage().data_ptr() in storages:
                flat = flat.clone()
            storages.add(flat.untyped_storage().data_ptr())
            tensors[name] = flat
            return {"tensor": name, "stride": value.stride()}
        if isinstance(value, (list, tuple)):
            items = [text_of(item, f"{name}.{place}") for place, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        if isinstance(value, Mapping):
            return {
                "dict": [[text_of(k, name), text_of(v, f"{name}.{k}")] for k, v in value.items()]
            }
        raise SettingError(f"{name} is a {type(value).__name__}, which cannot be written as text")

    groups, state = state_dict["param_groups"], state_dict["state"]
    names: dict[Any, str] = {}
    for group in groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    held = [[key, text_of(value, names.get(key, str(key)))] for key, value in state.items()]
    text = {"state": json.dumps(held), "param_groups": json.dumps(text_of(groups, "param_groups"))}
    return tensors, {"format": "pt", **text}


def unflatten_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the state dict that `flatten_state` took apart, for `load_state_dict`.

    Args:
        tensors: by name, as `safetensors.torch.load_file` gives them.
        metadata: as `safetensors.safe_open(...).metadata()` gives it.

    Raises:
        ValueError: the metadata was not made by `flatten_state`, or is damaged, or a tensor is
            missing.
    """

    def value_of(text: Any) -> Any:
        if not isinstance(text, dict):
            return text
        if "dict" in text:
            return {value_of(key): value_of(value) for key, value in text["dict"]}
        for kind in (list, tuple):
            if kind.__name__ in text:
                return kind(map(value_of, text[kind.__name__]))
        if text["tensor"] not in tensors:
            raise SettingError(f"the tensor {text['tensor']!r} is missing")
        tensor, stride = tensors[text["tensor"]], text["stride"]
        if list(tensor.stride()) == stride:
            return tensor
        return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)

    if not metadata or not {"state", "param_groups"} <= set(metadata):
        raise SettingError("the metadata is not from flatten_state: save its text with the tensors")
    try:
        return {
            "state": {key: value_of(text) for key, text in json.loads(metadata["state"])},
            "param_groups": value_of(json.loads(metadata["param_groups"])),
        }
    except SettingError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise SettingError(f"the metadata of flatten_state is damaged: {error}") from error
