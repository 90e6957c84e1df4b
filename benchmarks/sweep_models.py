"""Sort the parameters of every model class that can be built, and look at what is projected.

Models are made on the "meta" device, those of transformers from their default configs cut to two
layers of a kind where that builds. `param_groups` must raise for none. Printed are, for each
library, how many classes there are, were built, were sorted, have nothing to project, and are
sorted alike by `param_groups` and by names and shapes alone; then projected parameters that might
be none, by the ends of their names: those called like a head, an embedding, a norm or a scale, and
those that are no weight of a layer. `--names` prints all that is projected outside numbered layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import logging
import os
import pkgutil
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lowrank_optim import LowRank, param_groups
from lowrank_optim.roles import CONVOLUTIONS

Build = Callable[[], nn.Module]
LIBRARIES = ("transformers", "torchvision", "timm")
DEPTHS = re.compile(
    r"n_layers?|depth|(encoder_|decoder_)?layers|num_blocks|encoder_num_hidden_layers"
    r"|num_(hidden_|encoder_|decoder_)?layers"
)
SUSPECT = re.compile(
    r"head|classif|score|logit|predict|embed|norm|token|bias|scale|A_log|time_|table|(^|\.)fc$"
)
LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, *CONVOLUTIONS)


def cut(config: Any, seen: set[int]) -> None:
    """Leave two layers of each kind in a config and in those that it holds."""
    from transformers import PretrainedConfig

    seen.add(id(config))
    for key, value in list(vars(config).items()):
        if DEPTHS.fullmatch(key) and isinstance(value, int) and value > 2:
            setattr(config, key, 2)
        elif key == "layer_types" and isinstance(value, list):
            setattr(config, key, value[:2])
        elif isinstance(value, PretrainedConfig) and id(value) not in seen:
            cut(value, seen)


def transformers_models(only: str) -> Iterator[tuple[str, Build]]:
    """Yield every model class of some packages of transformers that has a config of its own."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers
    from transformers import models

    def build(cls: Any) -> nn.Module:
        config = cls.config_class()
        try:
            cut(config, set())
            return cls(config)
        except Exception:
            return cls(cls.config_class())

    for package in pkgutil.iter_modules(models.__path__):
        if not re.search(only, package.name):
            continue
        try:
            found = importlib.import_module(f"transformers.models.{package.name}")
            files = [m.name for m in pkgutil.iter_modules(found.__path__)]
        except Exception as error:
            print(f"transformers.models.{package.name}: {error!r}"[:120], file=sys.stderr)
            continue
        for file in files:
            if not file.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{package.name}.{file}")
            except Exception as error:
                print(f"{file}: {error!r}"[:120], file=sys.stderr)
                continue
            for name, cls in vars(module).items():
                own = inspect.isclass(cls) and cls.__module__ == module.__name__
                if (
                    own
                    and issubclass(cls, transformers.PreTrainedModel)
                    and getattr(cls, "config_class", None) is not None
                    and not name.endswith("PreTrainedModel")
                ):
                    yield name, lambda cls=cls: build(cls)


def torchvision_models(only: str) -> Iterator[tuple[str, Build]]:
    """Yield every model of torchvision, those for detection and segmentation too."""
    from torchvision import models

    for name in filter(re.compile(only).search, models.list_models()):
        takes = inspect.signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
        yield name, lambda name=name, extra=backbone: models.get_model(name, weights=None, **extra)


def timm_models(only: str) -> Iterator[tuple[str, Build]]:
    """Yield one model of each family of timm: the one with the shortest name of each module."""
    import timm

    for module in filter(re.compile(only).search, timm.list_modules()):
        names = timm.list_models(module=module)
        if names:
            name = min(names, key=lambda name: (len(name), name))
            yield name, lambda name=name: timm.create_model(name)


def ends(name: str) -> str:
    """Return the last three parts of a name, numbers as #."""
    return ".".join(re.sub(r"\d+", "#", name).split(".")[-3:])


def suspects(model: nn.Module, names: list[str]) -> Iterator[str]:
    """Yield projected parameters that might be no matrix of the body."""
    modules = dict(model.named_modules())
    for name in names:
        path, _, own = name.rpartition(".")
        outside = not re.search(r"\.\d+\.", name)
        layer = isinstance(modules.get(path), LAYERS) or own.endswith(("_proj", "weight"))
        if not layer or (outside and SUSPECT.search(name)):
            yield name


def by_names_alone(model: nn.Module, rank: float) -> set[str]:
    """Return what is projected where names and shapes are all that is known."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    group = LowRank(named, rank=rank, rule="muon", projector="power").param_groups[0]
    return set(group["param_names"] if group["rank"] is not None else ())


def sweep(library: str, only: str, show_names: bool, rank: float) -> Counter[str]:
    """Sort the models of a library and print what was found; return the counts."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    found: dict[str, list[str]] = defaultdict(list)
    start = time.perf_counter()
    for name, build in globals()[f"{library}_models"](only):
        counts["classes"] += 1
        try:
            with torch.device("meta"):
                model = build()
        except Exception as error:
            reasons[type(error).__name__] += 1
            continue
        counts["built"] += 1
        try:
            first = param_groups(model, rank=rank)[0]
        except ValueError as error:
            counts["nothing to project"] += 1
            print(f"  {name}: {error}"[:160], file=sys.stderr)
            continue
        except Exception as error:
            counts["crashed"] += 1
            print(f"{name}: {error!r}")
            continue
        counts["sorted"] += 1
        alike = set(first["param_names"]) == by_names_alone(model, rank)
        counts["alike by names alone"] += alike
        chosen = first["param_names"] if show_names else suspects(model, first["param_names"])
        shapes = {
            n: tuple(p.shape) for n, p in zip(first["param_names"], first["params"], strict=True)
        }
        for projected in chosen:
            if not (show_names and re.search(r"\.\d+\.", projected)):
                found[ends(projected)].append(f"{name} {projected} {shapes[projected]}")
    counts["seconds"] = round(time.perf_counter() - start)
    print(f"{library}: " + ", ".join(f"{key} {count}" for key, count in counts.items()))
    if reasons:
        print("  not built: " + ", ".join(f"{kind} {n}" for kind, n in reasons.most_common()))
    for end, places in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"  {len(places):>4} {end:<50} {places[0]}")
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    parser.add_argument(
        "--only", default="", help="regular expression searched in names of packages or models"
    )
    parser.add_argument("--rank", type=float, default=0.25, help="1.0: whatever the length of axes")
    parser.add_argument("--names", action="store_true", help="all that is projected outside layers")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for library in args.library or LIBRARIES:
                if importlib.util.find_spec(library) is None:
                    print(f"{library}: not installed")
                else:
                    sweep(library, args.only, args.names, args.rank)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
