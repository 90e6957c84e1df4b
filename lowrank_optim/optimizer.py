"""LowRank: a torch optimizer whose state is small because the gradient is projected first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import groups
from .checkpoints import load
from .checkpoints.versions import BEFORE, STATE_VERSION
from .engine import memory
from .engine.members import check_param, name_alike, named
from .engine.session import Session
from .engine.step import is_rehearsal, open_step
from .layerwise import api
from .layerwise.hooks import InBackward, check_accumulable
from .parts.checks import SettingError
from .parts.protocols import Feed, Projector, Residual, Rule
from .parts.rank import MIN_DIM, AutoRank
from .settings.keys import check_kept, check_keys, check_unknown, translate
from .settings.numbers import fill, placed
from .settings.plans import check_values
from .settings.values import CHECKS

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class LowRank(Optimizer):
    r"""An inner rule on projected gradients, with a choice of what happens to the rest.

    With G the gradient, its shorter axis last, P the projector's orthonormal basis and N the rule's
    direction on R = G P:  W <- (1 - lr wd) W - lr (scale N P^T + residual).
    The named methods (`GaLoreAdamW`, ...) are settings of this class. Every setting but `params`
    and `process_group` may stand in a parameter group, beside the numbers that its parts read
    (`momentum`, `limiter`, ..., see `parts.numbers`). A parameter with fewer than two dimensions,
    with a projected axis no longer than the rank, with an axis shorter than `min_dim`, or in a
    group whose rank is None is not projected: with the Adam rule it gets `torch.optim.AdamW`'s
    step.

    Args:
        params: a module, whose embeddings, heads, norms and biases are not projected, as
            `param_groups` sorts them; (name, tensor) pairs, sorted likewise as far as names and
            shapes tell; tensors or group dicts, which mean what they say. Frozen parameters are
            taken too, and are trained once they require a gradient.
        lr: learning rate, a number or a tensor of one element. None is the method's own with the
            published length, and 1e-3, AdamW's, with another.
        betas: decay of the moments, each in [0, 1).
        eps: added to the corrected root of the second moment.
        weight_decay: decoupled decay, applied before the update.
        rank: columns of the projected gradient: an int, or a float in (0, 1], a share of the
            projected axis; "auto" or an `AutoRank` chooses one for each matrix at each refresh, by
            the spectrum of its gradient. At least one group needs one.
        min_dim: where the rank is a share below 1.0, or is chosen, matrices with a shorter axis
            are not projected: it saves little and costs much. Does not apply to a rank in columns.
        state_budget: with `rank="auto"`, the most that the states of a group's matrices may take
            together, in bytes or as text such as "2GiB".
        update_proj_gap: updates between two refreshes of the subspace; the first is at update 1.
        scale: factor of the projected update (GradScaled: of its square); with `length` "rms" or
            "adamw", of the whole update. None takes the method's own for the length.
        length: how long the update of a projected parameter is. "published": as the rule and the
            residual say. "rms": its root mean square is lr times `scale` times 0.2. "adamw": it is
            `scale` times that of AdamW's step, measured on a sample of some 1024 entries of the
            matrix with the group's betas and eps (see `parts.length`): AdamW's lr, schedule and
            decay fit.
        projector: "svd", "power", "dct", "random", "columns", "blocks", "identity" or a
            `Projector`.
        feed: what is projected: "gradient", "error_feedback", "general_error_feedback",
            "whole_momentum" or a `Feed`.
        rule: "adam", "lion", "sgdm", "muon", "normuon", "orthogonal", "row_column_scaled",
            "row_normalized" or a `Rule`.
        residual: "drop", "norm_scaled", "state_free", "grad_scaled", "compensated" or a `Residual`.
        side: the axis that is projected: "auto" the shorter one (columns of a square matrix),
            "right" the columns, "left" the rows, "reverse" the longer one.
        on_refresh: what becomes of the moments when the subspace moves: "keep" them as they are,
            "reset" them and the bias correction, "rotate" them into the new basis, or "align" the
            new basis to the old one and keep them.
        state_dtype: dtype of moments and basis, e.g. torch.bfloat16 (moments are then rounded
            stochastically), or "8bit" (see `parts.storage`); None is float32, and float64 for
            float64 parameters.
        stochastic_rounding: round bf16 weights up or down at random, so that small updates count on
            average; a function of (seed, step). Other dtypes are not affected.
        skip_nonfinite: check the gradients of the group first, and if any value is not finite leave
            all parameters and state as they are; counted in `skipped_steps`. One host sync a step.
        maximize: ascend instead of descend.
        capturable: keep counts on the device, so that a step between two refreshes can be captured
            in a CUDA graph; see `step`.
        seed: a non-negative int; every random draw is a function of it and of the step.
        impl: "auto" runs Triton kernels on CUDA devices and plain torch elsewhere, "eager" plain
            torch always, "triton" kernels or an error. `summary()` says what runs and why.
        stagger: spread the refreshes of projectors that learn from the gradient over the interval,
            after the first, so that no step has to do all of them. This may shorten a matrix's
            first interval. Not with `capturable`.
        shard_basis: keep a part of the basis of a sharded matrix (DTensor) on each process instead
            of the whole, and gather it when it is used: `cols rank` values a matrix and step. For
            svd and power; the others keep no basis.
        foreach, fused: how torch steps what is not projected, as in `torch.optim.AdamW`.
        amsgrad, differentiable: only False, for code written for `torch.optim.AdamW`.
        process_group: the processes on which ordinary tensors among the parameters, and their
            gradients, are the same, as under DDP: `torch.distributed.group.WORLD`. A subspace is
            then learnt by one of them and shared. Sharded parameters (DTensors) know their own
            mesh. The group is not part of any state; a copy of the optimizer has none.

    Raises:
        ValueError: a setting out of its range or misspelt in a group, no rank in any group, or a
            trained parameter that is not real and floating; the message names it. Nothing is
            changed then.
        TypeError: a keyword that is no setting.
        RuntimeError: a parameter that is a flat piece of a matrix; from `step` also a sparse or
            complex gradient.
    """

    published_lr: ClassVar[float] = 1e-3
    published_scale: ClassVar[float] = 1.0
    measured_scale: ClassVar[float] = 1.0
    _session: Session

    @classmethod
    def lr_of(cls, length: str) -> float:
        """Return the learning rate for a length, for where none is given."""
        return cls.published_lr if length == "published" else 1e-3

    @classmethod
    def scale_of(cls, length: str) -> float:
        """Return the method's scale for a length, for where none is given."""
        return cls.published_scale if length == "published" else cls.measured_scale

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = None,
        min_dim: int = MIN_DIM,
        state_budget: int | str | None = None,
        update_proj_gap: int = 200,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = "svd",
        feed: str | Feed = "gradient",
        rule: str | Rule = "adam",
        residual: str | Residual = "drop",
        side: str = "auto",
        on_refresh: str = "keep",
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        impl: str = "auto",
        stagger: bool = True,
        shard_basis: bool = False,
        process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
        **unknown: Any,
    ) -> None:
        check_unknown(unknown, type(self).__name__)
        check_keys({"amsgrad": amsgrad, "differentiable": differentiable}, "")
        lr = self.lr_of(length) if lr is None else lr
        scale = self.scale_of(length) if scale is None else scale
        given_here = locals()
        defaults: dict[str, Any] = {
            **{key: given_here[key] for key in CHECKS if key in given_here},
            "skipped_steps": 0,
            "grad_norm": None,
            "state_version": STATE_VERSION,
        }
        chosen = {"foreach": foreach, "fused": fused}
        defaults.update((key, value) for key, value in chosen.items() if value is not None)
        check_values(defaults, "")
        self._session = Session(self, process_group)
        given, message = groups.given(params, defaults)
        if message:
            warnings.warn(message, stacklevel=2 if type(self) is LowRank else 3)
        super().__init__(given, defaults)
        if all(group["rank"] is None for group in self.param_groups):
            raise SettingError(
                "no group has a rank, so nothing would be projected: pass rank=..., or put "
                '"rank" in the groups to be projected (lowrank_optim.param_groups makes them)'
            )

    def _note(self) -> None:
        """Write what is still on its way into state and groups, even from a step left open."""
        if self._session.open is not None and self._session.in_backward is None:
            self._session.open.close()
        self._session.watch.read()
        self._session.note_norm()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds."""
        self._note()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, a copy or a checkpoint; settings it lacks take our defaults."""
        super().__setstate__(state)
        # Torch adds this when a state is loaded: flat checkpoints need the same keys at all times.
        self.defaults.pop("differentiable", None)
        self.defaults = {**BEFORE, **self.defaults}
        fresh = "_session" not in self.__dict__
        if fresh:
            self._session = Session(self)
        self._session.note_members()
        if fresh:
            self._session.recall_norm()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings are checked first, and nothing is added if one is wrong."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group)}")
        index = len(self.param_groups)
        where = f" in group {index}"
        group = dict(param_group)
        check_kept(group, where, STATE_VERSION)
        translate(group, where)
        fill(group, self.defaults, self.scale_of)
        group = placed(group, where, self.defaults)
        check_values(group, where)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        for name, param in named(group["params"], where):
            check_param(param, name, [])
        self._session.note_members()
        if self._session.in_backward is not None and self._session.in_backward.projects:
            check_accumulable(index, group, type(self).__name__)
        renamed = name_alike(self.param_groups, group)
        try:
            super().add_param_group(group)
        except Exception:
            for other in renamed:
                del other["param_names"]
            raise
        self._session.note_members()
        self._session.members.check(self.param_groups)
        self._session.note_checked(index)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        The first call creates the state of every parameter that requires a gradient. If its
        learning rate is 0 and all gradients are zero, it does no more: frameworks make such a call
        to learn the shape of the state.
        With `capturable`, a step that is captured in a CUDA graph moves no subspace, except DCT's
        with `update_proj_gap=1`: call `step()` outside the graph when a refresh is due.
        `torch.compile` leaves a step as it is: its graph breaks there.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The loss, or None without a closure.

        Raises:
            RuntimeError, ValueError: as the class says; nothing is changed then.
        """
        if torch.compiler.is_compiling():
            uncompiled = torch.compiler.disable(self._step)  # type: ignore[no-untyped-call]
            return uncompiled(closure)
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Do what `step` says."""
        session, loss = self._session, None
        layerwise = cast("InBackward | None", session.in_backward)
        if layerwise is not None:
            layerwise.look_for_clipping(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if layerwise is not None:
            layerwise.check_attached()
        step = open_step(session)
        step.check_all()
        if step.is_skipped():
            if layerwise is not None:
                layerwise.end()
            session.end_step()
            return loss
        work = step.jobs()
        if step.fresh:
            step.warn_if_plain()
            if not step.done and is_rehearsal(work):
                return loss
        if layerwise is None:
            step.do(work)
        else:
            layerwise.finish(step)
        step.close()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients as torch does, and the ones that `step_in_backward` accumulates."""
        self._session.note_members()  # else torch would use up a generator among the groups
        super().zero_grad(set_to_none)
        self._session.end_step()

    @torch.no_grad()
    def step_param(self, param: Tensor, group: dict[str, Any] | None = None) -> None:
        """Update one parameter by the gradient it has now, as a fused backward pass does.

        For hooks of your own, which call this and free the gradient themselves. State and result
        are the same as with `step()`, which need not be called. Name and arguments follow kohya's
        hooks; its stock code puts Adafactor's function in this place and takes no other optimizer.

        Args:
            param: a parameter of this optimizer; without a gradient it is left alone.
            group: not read, since the parameter is enough to find its group.

        Raises:
            ValueError: the parameter is in no group.
            RuntimeError: as `step()`, or `skip_nonfinite=True`. Nothing is changed then.
        """
        api.step_one(self._session, param)

    def step_parameter(
        self, param: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Do `step_param`, under the name and with the arguments of OneTrainer's hooks.

        OneTrainer's list of optimizers is closed: its stock code does not reach this one.
        """
        self.step_param(param, group)

    def step_in_backward(
        self,
        *,
        accumulation_steps: int | Callable[[], bool] = 1,
        accumulate: str = "full",
        max_norm: float | None = None,
        ddp: DistributedDataParallel | None = None,
    ) -> InBackward:
        """Step each parameter in the backward pass once its gradient is complete, then free it.

        The loop stays as it is: `step()` is still called once a step, after the last backward pass.
        It ends the step and does what is left, such as parameters without a hook. Optimizer, state,
        `state_dict()` and schedulers are the same as without; so are the results, bit for bit where
        nothing is clipped or accumulated in projected form (on a CPU; a GPU may round products of
        several matrices, which `step()` refreshes together, differently from products of one).
        Gradients then take the memory of the largest one alone (with FSDP2, of one sharded module).
        Call this when the model is on its device, after wrapping it. Parameters added later join in
        at the next `step()`. A parameter that two optimizers ask for is stepped by the last one.
        Every backward pass that reaches a parameter steps it, even one for another model's loss (a
        discriminator, while its generator learns): freeze it there.

        Clipping: there is no gradient left for `torch.nn.utils.clip_grad_norm_`, so pass `max_norm`
        here. Without it, Lightning's `gradient_clip_val` is read, and a loop that calls a clipping
        function is warned once. Each gradient is multiplied by min(1, max_norm / n). Where the
        backward pass was first run inside `measure_grad_norm()`, n is the norm of all gradients,
        which is exact clipping; otherwise n is that norm in the step before, or the gradient's own
        if that is larger.

        Args:
            accumulation_steps: backward passes a step; or a function that tells whether the pass
                under way is the last of its step, as `lambda: accelerator.sync_gradients`. Passes
                in which FSDP2 does not synchronise gradients do not count.
            accumulate: what is kept until the last pass. "full" keeps gradients whole in `.grad`:
                the memory of ordinary accumulation, and its results. "projected" keeps the
                projected gradient in the dtype of the arithmetic, `rows * rank` values a matrix
                (others stay whole); a subspace that moves in this step is learnt from the first
                pass alone, and the sum is equal to rounding. Only where the update needs no more:
                GaLore, DCT, and FRUGAL with state_free="none". `grad_norm` is then the norm of
                what is kept.
            max_norm: largest norm of all gradients; None does not clip, nor does `math.inf`, which
                says so to loops that clip.
            ddp: the wrapped model, if it is one: parameters are then stepped bucket by bucket, each
                once it is averaged. The buckets hold all gradients and stay in memory, as they do
                in ordinary steps. Accumulate with `ddp.no_sync()`.

        Returns:
            A handle whose `remove()` goes back to ordinary steps.

        Raises:
            ValueError: a setting that cannot be used.
            RuntimeError: from `step`, only ordinary tensors in several processes without `ddp`:
                their gradients are not averaged yet. From the backward pass: a parameter gets one
                more gradient than announced, a float16 gradient, or `skip_nonfinite=True`
                without `measure_grad_norm()`. The parameter is not changed then. From
                `GradScaler.step`, too late for the step under way: scaled gradients of float32 look
                like others.

        Reference: the idea is from Lv et al., "Full Parameter Fine-tuning for Large Language
            Models with Limited Resources", arXiv 2306.09782 (LOMO), and from GaLore's per-layer
            updates; both are without accumulation, and without clipping or with two passes only.
        """
        settings = (accumulation_steps, accumulate, max_norm, ddp)
        return api.start(self._session, *settings)

    def measure_grad_norm(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes only measure the norm of all gradients.

        For exact clipping, and `skip_nonfinite`, with `step_in_backward`:
        `with optimizer.measure_grad_norm(): loss.backward(retain_graph=True)`, then
        `loss.backward()` and `step()`. Gradients are freed as they are measured.

        Raises:
            RuntimeError: without `step_in_backward`, or with `accumulation_steps` above 1.
        """
        return api.measuring(self._session)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step with `step_in_backward`, before clipping."""
        return self._session.grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` unscales by itself: never, `GradScaler.step` does."""
        if self._session.in_backward is not None:
            raise RuntimeError(
                "GradScaler does not go with step_in_backward: it has to see all gradients before "
                "the first is used. Take bfloat16, which needs no scaler, or ordinary steps"
            )
        return False

    @property
    def skipped_steps(self) -> int:
        """Number of steps that `skip_nonfinite` has left out."""
        return max((int(group["skipped_steps"]) for group in self.param_groups), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, with settings that are objects given as text.

        State of a parameter that has been taken out of all groups is left out; the optimizer keeps
        it.
        """
        self._note()
        self._session.note_members()
        kept = dict(self.state)
        for param in kept:
            if isinstance(param, Tensor) and param not in self._session.members:
                del self.state[param]
        try:
            return load.portable(self._session, super().state_dict())
        finally:
            self.state.update(kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, each tensor on its parameter's device, to go on to the bit.

        States are matched by the names of parameters if both sides have them, else by place.
        Numbers of the groups come from the checkpoint, as in torch. Parts and `state_dtype` stay as
        this optimizer has them. Moments and bases that were stored in another way are converted,
        exactly where the storage asked for is the finer one. One warning says which settings
        differ.

        Raises:
            ValueError: the checkpoint has other parameters, was made with another rank, feed,
                projector, rule, residual, side or on_refresh, is of another optimizer, or holds
                values that no run leaves, such as NaN. Nothing is changed then.
        """
        load.load(self, state_dict)

    def summary(self) -> str:
        """Return a table: what is projected, what is not and why, and the state beside AdamW's."""
        return memory.summary(self)
