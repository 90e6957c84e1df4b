"""The optimizers of this package in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Container
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..groups import sorted_groups
from ..optimizer import LowRank
from ..parts.checks import SettingError
from ..parts.rank import MIN_DIM, AutoRank
from ..sharding.collectives import several
from ..sharding.local import is_distributed
from . import require

require("transformers", "accelerate", extra="transformers")

from accelerate.state import (  # noqa: E402 - the line above says what is missing
    AcceleratorState,
    GradientState,
)
from accelerate.utils import DistributedType  # noqa: E402
from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer,
)


def trainer_optimizer(
    cls: type[LowRank],
    args: TrainingArguments,
    *,
    rank: int | float | str | AutoRank = 0.25,
    rest_lr: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    step_in_backward: bool = False,
    accumulate: str = "full",
    **settings: Any,
) -> tuple[type[Factory], dict[str, Any]]:
    r"""Return what Trainer takes as `optimizer_cls_and_kwargs`.

    Matrices are projected as `param_groups` sorts them. Learning rate, betas, eps and weight decay
    come from `args`, which is read when Trainer builds the optimizer. The parameters that Trainer
    decays are decayed. Frozen parameters are left out, tied ones stand once. Weights of the
    trainer's losses (sentence-transformers) are trained by AdamW's step. If all matrices are too
    short to be projected, as in adapters alone, a warning says that all get AdamW's step.
    Several processes share subspaces: `process_group` is all of them, unless it is given.

        optimizer = trainer_optimizer(GaLoreAdamW, args, rank=128, update_proj_gap=200)
        Trainer(model, args, train_dataset=texts, optimizer_cls_and_kwargs=optimizer)

    Args:
        cls: an optimizer of this package.
        args: the arguments that Trainer gets too.
        rank: as in the optimizer: an int, or a share of the projected axis.
        rest_lr: learning rate of what is not projected; None for the same. Trainer's schedule
            scales both, and its log shows the rate of the projected matrices.
        include: regular expression searched in names: of the matrices only these are projected.
        exclude: regular expression searched in names: these are not projected.
        step_in_backward: step each parameter in the backward pass and free its gradient, see
            `LowRank.step_in_backward`. Accumulation is Trainer's, and `max_grad_norm` clips by the
            norm of the step before. Trainer itself finds no gradient to clip and logs a norm of 0,
            unless the callback `LogGradNorm()` is passed to it. Several processes need FSDP2 for
            this; the first step is then an ordinary one.
        accumulate: what is kept of accumulated gradients: "full" or "projected".
        **settings: further settings of `cls`, such as `update_proj_gap`; `lr`, `betas`, `eps` and
            `weight_decay` take precedence over `args`.

    Returns:
        A factory and its keywords.

    Raises:
        ImportError: this version of transformers takes no factories.
        TypeError: `cls` is no optimizer of this package, or has no such setting.
        ValueError: a setting out of its range, `optim_args` or `optim_target_modules` in `args`,
            or `fp16` with `step_in_backward`. When Trainer builds the optimizer: nothing would be
            projected, or `step_in_backward` in several processes without FSDP2.
    """
    if not hasattr(trainer, "is_optimizer_factory"):
        raise ImportError(
            "the Trainer of this transformers takes no factory as optimizer_cls_and_kwargs: "
            "pip install --upgrade transformers"
        )
    if not (isinstance(cls, type) and issubclass(cls, LowRank)):
        raise TypeError(f"{cls!r} is no optimizer class of lowrank_optim, such as GaLoreAdamW")
    for field, instead in (
        ("optim_args", "pass the settings to trainer_optimizer"),
        ("optim_target_modules", 'pass include="attn|mlp", say, to trainer_optimizer'),
    ):
        if (value := getattr(args, field)) is not None:
            raise SettingError(f"{field}={value!r} in TrainingArguments is not read: {instead}")
    if step_in_backward and args.fp16:
        raise SettingError(
            "fp16=True in TrainingArguments does not go with step_in_backward: a GradScaler has to "
            "see all gradients before the first is used; take bf16=True, or ordinary steps"
        )
    fields = _fields(args, settings)
    rest = {} if rest_lr is None else {"lr": rest_lr}
    # A wrong setting is reported here, not when Trainer starts.
    trial = cls([{"params": [torch.zeros(1)], **rest}], rank=rank, **fields)
    if step_in_backward:
        trial.step_in_backward(accumulate=accumulate)
    chosen = {"rank": rank, "rest_lr": rest_lr, "include": include, "exclude": exclude}
    mode = accumulate if step_in_backward else None
    return Factory, {"cls": cls, "args": args, "in_backward": mode, **chosen, **settings}


class Factory:
    """Build the optimizer from the model, once Trainer has it; see `trainer_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        given: TrainingArguments | None = None,
        /,
        *,
        args: TrainingArguments,
        cls: type[LowRank],
        rank: int | float | str | AutoRank,
        rest_lr: float | None,
        include: str | None,
        exclude: str | None,
        in_backward: str | None,
        **settings: Any,
    ) -> LowRank:
        """Return the optimizer: projected groups first, and in each kind, decayed ones first.

        Arguments that a trainer gives by position (axolotl's does) replace `args`.
        """
        args = args if given is None else given
        if in_backward is not None and several() and not _is_sharded(model):
            raise SettingError(
                "step_in_backward=True in several processes needs FSDP2: DistributedDataParallel, "
                "which Trainer wraps around the model later, has not averaged gradients yet when "
                "the backward pass gives them. Take fsdp=True in TrainingArguments, or ordinary "
                "steps"
            )
        # The method is Trainer's own rule, and reads nothing from a trainer.
        decayed = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
        fields = _fields(args, settings)
        if several():
            fields.setdefault("process_group", dist.group.WORLD)
        groups, message = sorted_groups(
            model,
            rank,
            fields["lr"],
            rest_lr,
            None,
            include,
            exclude,
            settings.get("min_dim", MIN_DIM),
            {key: settings[key] for key in ("side", "projector") if key in settings},
            strict=False,
        )
        if message:
            warnings.warn(message, stacklevel=2)
        own = _of_losses(_caller(), {id(x) for group in groups for x in group["params"]})
        decayed |= {name for name, (_, decay) in own.items() if decay}
        groups.append(
            {
                "rank": None,
                "lr": fields["lr"] if rest_lr is None else rest_lr,
                "params": [param for param, _ in own.values()],
                "param_names": list(own),
            }
        )
        optimizer = cls(_split(groups, decayed, fields["weight_decay"]), **fields)
        if in_backward is not None:
            optimizer.step_in_backward(
                accumulation_steps=lambda: GradientState().sync_gradients,
                accumulate=in_backward,
                max_norm=args.max_grad_norm or math.inf,
            )
        return optimizer


class LogGradNorm(TrainerCallback):
    """Put the norm of all gradients, before clipping, where Trainer logs 0: `step_in_backward`."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct what is about to be reported, and what has been noted."""
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        norm = getattr(optimizer, "grad_norm", None)
        for logs in (kwargs.get("logs"), *state.log_history[-1:]):
            if norm is not None and logs and "grad_norm" in logs:
                logs["grad_norm"] = float(norm)


def _caller() -> Any:
    """Return the trainer whose method called the factory: nothing else tells what it holds."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    return frame and frame.f_locals.get("self")


def _of_losses(trainer: Any, known: Container[int]) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the trainable weights of a trainer's losses by name, and whether each is decayed.

    Losses of sentence-transformers are modules that hold the model and may have weights too.

    Args:
        trainer: with a module, or a dict of modules, as `loss`.
        known: ids of the model's parameters.
    """
    loss = getattr(trainer, "loss", None)
    found = {}
    for prefix, module in (loss if isinstance(loss, dict) else {"": loss}).items():
        if isinstance(module, nn.Module):
            decayed = set(Trainer.get_decay_parameter_names(cast(Trainer, None), module))
            for name, param in module.named_parameters():
                if param.requires_grad and id(param) not in known:
                    place = ".".join(part for part in ("loss", prefix, name) if part)
                    found[place] = (param, name in decayed)
    return found


def _is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP has sharded a model, or will once its optimizer is made."""
    if any(is_distributed(param) for param in model.parameters()):
        return True
    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def _fields(args: TrainingArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer fields of the arguments under our names, overridden by the settings."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **settings,
    }


def _split(
    groups: list[dict[str, Any]], decayed: Container[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Sort groups into projected and plain, decayed and not; those without parameters are left out.

    Args:
        groups: the result of `param_groups`.
        decayed: names of the parameters that weight decay applies to.
        weight_decay: their decay.
    """
    parts: dict[tuple[bool, bool], dict[str, Any]] = {}
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            decay = weight_decay if name in decayed else 0.0
            empty = {**group, "weight_decay": decay, "params": [], "param_names": []}
            part = parts.setdefault((group["rank"] is None, name not in decayed), empty)
            part["params"].append(param)
            part["param_names"].append(name)
    return [parts[kind] for kind in sorted(parts)]
