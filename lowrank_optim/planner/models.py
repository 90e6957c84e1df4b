"""Models by name, by configuration or by factory, made on the "meta" device: no weights."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..integrations import require
from ..parts.checks import is_real
from .trace import Loss

MOST = 100_000
"""Layers, labels or parameter tensors beyond which a configuration is taken to be a mistake."""

COUNTED = re.compile(r"(^|_)(layers?|depths?|labels)$")
"""Names of settings that tell transformers how many of something to make."""

LONG = 240
"""Characters that are shown of an error from others' code."""


class PlanError(ValueError):
    """What cannot be planned, in one line."""


def _like_llama(hidden: int, inner: int, heads: int, layers: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        **rest,
    }


_LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN2 = {"vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN3 = {**_QWEN2, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
_TIED = {"tie_word_embeddings": True}

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    # The sizes of GaLore's table, arXiv 2403.03507.
    "llama-60m": ("llama", _like_llama(512, 1376, 8, 8), 58_073_600),
    "llama-130m": ("llama", _like_llama(768, 2048, 12, 12), 134_105_856),
    "llama-350m": ("llama", _like_llama(1024, 2736, 16, 24), 367_969_280),
    "llama-1b": ("llama", _like_llama(2048, 5461, 32, 24), 1_339_082_752),
    "llama-7b": ("llama", _like_llama(4096, 11008, 32, 32), 6_738_415_616),
    "llama-13b": ("llama", _like_llama(5120, 13824, 40, 40), 13_015_864_320),
    # Public architectures.
    "llama-3.2-1b": (
        "llama",
        _like_llama(2048, 8192, 32, 16, head_dim=64, **_LLAMA3, **_TIED),
        1_235_814_400,
    ),
    "llama-3.2-3b": (
        "llama",
        _like_llama(3072, 8192, 24, 28, head_dim=128, **_LLAMA3, **_TIED),
        3_212_749_824,
    ),
    "llama-3-8b": ("llama", _like_llama(4096, 14336, 32, 32, **_LLAMA3), 8_030_261_248),
    "tinyllama-1.1b": (
        "llama",
        _like_llama(2048, 5632, 32, 22, num_key_value_heads=4),
        1_100_048_384,
    ),
    "smollm2-135m": (
        "llama",
        _like_llama(576, 1536, 9, 30, **_TIED) | {"num_key_value_heads": 3, "vocab_size": 49152},
        134_515_008,
    ),
    "smollm2-1.7b": (
        "llama",
        _like_llama(2048, 8192, 32, 24, **_TIED) | {"vocab_size": 49152},
        1_711_376_384,
    ),
    "mistral-7b": (
        "mistral",
        _like_llama(4096, 14336, 32, 32, num_key_value_heads=8, sliding_window=None),
        7_241_732_096,
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        _like_llama(896, 4864, 14, 24, num_key_value_heads=2, **_TIED) | _QWEN2,
        494_032_768,
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        _like_llama(1536, 8960, 12, 28, num_key_value_heads=2, **_TIED) | _QWEN2,
        1_543_714_304,
    ),
    "qwen2.5-7b": (
        "qwen2",
        _like_llama(3584, 18944, 28, 28, num_key_value_heads=4) | _QWEN2 | {"vocab_size": 152064},
        7_615_616_512,
    ),
    "qwen3-0.6b": ("qwen3", _like_llama(1024, 3072, 16, 28, **_TIED) | _QWEN3, 596_049_920),
    "qwen3-1.7b": ("qwen3", _like_llama(2048, 6144, 16, 28, **_TIED) | _QWEN3, 1_720_574_976),
    "qwen3-8b": ("qwen3", _like_llama(4096, 12288, 32, 36) | _QWEN3, 8_190_735_360),
    "gemma-2-2b": (
        "gemma2",
        _like_llama(2304, 9216, 8, 26, num_key_value_heads=4, head_dim=256)
        | {"vocab_size": 256000},
        2_614_341_888,
    ),
    "phi-3-mini": (
        "phi3",
        _like_llama(3072, 8192, 32, 32, pad_token_id=32000) | {"vocab_size": 32064},
        3_821_079_552,
    ),
    "pythia-1b": (
        "gpt_neox",
        _like_llama(2048, 8192, 8, 16) | {"vocab_size": 50304},
        1_011_781_632,
    ),
    "gpt2": ("gpt2", {}, 124_439_808),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
}
"""Name -> transformers' model type, what differs from its defaults, published parameter count."""


def full_name(name: str) -> str:
    """Return the key of `MODELS` that is meant, or the name itself."""
    meant = (name.lower(), f"llama-{name.lower()}")
    return next((key for key in meant if key in MODELS), name)


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    """Make a model on the "meta" device.

    Args:
        name: a key of `MODELS` ("60m" is "llama-60m"), a `config.json` of transformers or its
            folder, or `module:factory`: a function that returns a module, or a module and a
            function (model, batch, seq) that returns its loss.
        dtype: of the weights; the weights of a factory keep their own.

    Returns:
        The model in training mode and its loss.

    Raises:
        PlanError: there is no such model, or it cannot be made.
        ImportError: transformers is needed and missing.
    """
    preset = full_name(name)
    if preset in MODELS:
        require("transformers", extra="transformers")
        from transformers import AutoConfig

        kind, settings, _ = MODELS[preset]
        return _from_config(AutoConfig.for_model(kind, **settings), dtype), token_loss
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _from_config(_read(path), dtype), token_loss
    if ":" in name:
        return _from_factory(name)
    if path.suffix or os.sep in name:
        raise PlanError(f"no such file: {path}")
    near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise PlanError(
        f"unknown model '{name}'{hint} Known are {', '.join(MODELS)}; else give a config.json of "
        "transformers or module:factory"
    )


def _read(path: Path) -> Any:
    """Return the configuration in a file; raise PlanError if there is none."""
    require("transformers", extra="transformers")
    with foreign(f"{path} is no configuration of transformers"):
        settings = json.loads(path.read_text("utf-8"))
        _check(settings)
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _check(settings: Any) -> None:
    """Raise ValueError if transformers would build something else from it, or build for ever."""
    if not isinstance(settings, dict):
        raise ValueError(f"it holds {type(settings).__name__}, not an object of settings")
    named = settings.get("architectures")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(x, str) for x in named)
    ):
        raise ValueError(f"architectures={named!r}: wanted a list of class names")
    for key, value in settings.items():
        if isinstance(value, dict):
            _check(value)
        elif COUNTED.search(key):
            for count in value if isinstance(value, list) else [value]:
                if is_real(count) and count > MOST:
                    raise ValueError(f"{key}={value}: more than {MOST:,} are not planned")


def _from_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """Make the class that a configuration names, or the causal language model of its type."""
    import transformers

    with foreign(f"no model of type {config.model_type}"), torch.device("meta"), _counted():
        config.use_cache = False  # as in training: nothing is kept for generation
        if config.architectures:
            make = _class_of(config.architectures[0])._from_config
        else:
            auto = transformers.AutoModelForCausalLM
            make = partial(auto.from_config, trust_remote_code=False)
        model: nn.Module = make(config, dtype=dtype)
        return model.train()


def _class_of(name: str) -> Any:
    """Return the model class of transformers that has a name."""
    import transformers

    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    known = {own.lower(): own for own in dir(transformers)}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    hint = f"; did you mean {known[near[0]]}?" if near else ";"
    raise ValueError(
        f"architectures: transformers has no model class '{name}'{hint} Without architectures, "
        "the causal language model is planned"
    )


@contextmanager
def foreign(failed: str) -> Iterator[None]:
    """Run others' code on what the user gave, and turn any error of it into one line.

    Raises:
        PlanError: begins with `failed`, and says what was raised. Warnings and logs are dropped.
    """
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Exception, SystemExit) as error:
        raise PlanError(f"{failed}: {_line(error)}") from error
    finally:
        logging.disable(quiet)


@contextmanager
def _counted() -> Iterator[None]:
    """Stop at more parameters than models have: a wrong count in a configuration may make them."""
    names: list[str] = []

    def note(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        names.append(name)
        if len(names) > MOST:
            raise ValueError(f"it has more than {MOST:,} parameter tensors")

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _from_factory(name: str) -> tuple[nn.Module, Loss]:
    """Call `module:factory`; the current folder is searched first, then Python's path."""
    module, _, factory = name.partition(":")
    here = str(Path.cwd())
    with foreign(f"{name} makes no model"):
        sys.path.insert(0, here)
        try:
            function = getattr(importlib.import_module(module), factory)
            with torch.device("meta"):
                made = function()
        finally:
            sys.path.remove(here)
        model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, token_loss)
        if isinstance(model, nn.Module) and callable(loss):
            return without_values(model).train(), loss
    raise PlanError(
        f"{name} returns {type(made).__name__}: wanted a module, or a module and a loss"
    )


def without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are on "meta"."""
    known: dict[int, Any] = {}
    for param in model.parameters():
        empty = torch.empty_like(param, device="meta", requires_grad=False)
        known[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
    for buffer in model.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, known)


def token_loss(model: nn.Module, batch: int, seq: int) -> Tensor:
    """Return the loss of a language model: its own, or float32 cross entropy of its output."""
    tokens = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    if hasattr(model, "config"):
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss
    out = model(tokens)
    logits = getattr(out, "logits", out)
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())


def _line(error: BaseException) -> str:
    """Return an error's class, unless it is ValueError, and its text, shortened, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONG else f"{text[:LONG]}..."
    kind = type(error).__name__
    return f"{kind}: {text}" if text and type(error) is not ValueError else text or kind
