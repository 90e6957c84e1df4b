"""What an optimizer offers besides `step()`: to step its parameters one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine.step import Round, open_for
from .hooks import InBackward

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from ..optimizer import LowRank


class LayerWise(Optimizer):
    """Updates of single parameters, from hooks of a trainer or inside the backward pass."""

    _round: Round | None
    _in_backward: InBackward | None
    _grad_norm: Tensor | None

    def _forget_rounds(self) -> None:
        """Set what is derived and never saved to nothing."""
        self._round = None
        self._in_backward = None
        self._grad_norm = None

    def _note_norm(self) -> None:
        """Write the norm of the last step where it is saved."""
        for group in self.param_groups:
            group["grad_norm"] = None if self._grad_norm is None else float(self._grad_norm)

    def _recall_norm(self) -> None:
        """Take the norm of the last step from where `_note_norm` has put it."""
        norm = self.param_groups[0]["grad_norm"] if self.param_groups else None
        self._grad_norm = None
        if norm is not None:
            self._grad_norm = torch.tensor(norm, dtype=torch.float64, device="cpu")

    def _end_round(self) -> None:
        """End a step under way, and forget gradients that were accumulated for it."""
        if self._round is not None:
            self._round.close()
        if self._in_backward is not None:
            self._in_backward.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, as torch does, also those that `step_in_backward` accumulates."""
        super().zero_grad(set_to_none)
        self._end_round()

    @torch.no_grad()
    def step_param(self, param: Tensor, group: dict[str, Any] | None = None) -> None:
        """Update one parameter by the gradient it has now, as a fused backward pass does.

        For hooks of your own, which call this and free the gradient themselves. State and result
        are those of `step()`, which need not be called. Name and arguments are those of kohya's
        hooks; its stock code puts Adafactor's function in this place and takes no other optimizer.

        Args:
            param: a parameter of this optimizer; without a gradient it is left alone.
            group: its group, which is found without this.

        Raises:
            ValueError: the parameter is in no group.
            RuntimeError: as `step()`, or `skip_nonfinite=True`. Nothing is changed then.
        """
        if self._round is not None and param in self._round.done:
            self._end_round()
        turn, _ = open_for(cast("LowRank", self), param)
        entry = turn.entry_of(param)
        if param.grad is None:
            return
        turn.check(entry)
        turn.check_alone(entry, "clip or check gradients in the hook")
        self._round = turn
        job = turn.single(entry, param.grad)
        turn.do([(*turn.groups[entry.group][:2], [job])])

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
        """Step each parameter in the backward pass once its gradient is complete, and free that.

        The loop stays as it is: `step()` is still called once a step, after the last backward pass.
        It ends the step and does what is left, such as parameters without a hook. Optimizer, state,
        `state_dict()` and schedulers are the same as without; so are the results, bit for bit where
        nothing is clipped or accumulated in projected form (on a CPU; a GPU may round the products
        of several matrices, which `step()` refreshes together, otherwise than those of one).
        Gradients then take the memory of the largest one alone (with FSDP2: those of one
        sharded module). Call this when the model is on its
        device, after wrapping it; parameters added later join in at the next `step()`, and one that
        two optimizers ask for is stepped by the last. Every backward pass that reaches a parameter
        steps it, also one for another model's loss (a discriminator, while its generator learns):
        freeze it for that.

        Clipping: there is no gradient left for `torch.nn.utils.clip_grad_norm_`, so pass `max_norm`
        here. Without it, Lightning's `gradient_clip_val` is read, and a loop that calls a function
        to clip with is warned once. Each gradient is multiplied by min(1, max_norm / n). Where the
        backward pass was first run inside `measure_grad_norm()`, n is the norm of all gradients,
        which is exact clipping; otherwise n is that norm in the step before, or the gradient's own
        if that is larger.

        Args:
            accumulation_steps: backward passes a step; or a function that says whether the one
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
                without. Accumulate with `ddp.no_sync()`.

        Returns:
            A handle whose `remove()` goes back to ordinary steps.

        Raises:
            ValueError: a setting that cannot be used.
            RuntimeError: from `step`, nothing but ordinary tensors in several processes without
                `ddp`: their gradients are not averaged yet. From the backward pass: a parameter
                gets one more gradient than was said, a float16 gradient, or `skip_nonfinite=True`
                without `measure_grad_norm()`. The parameter is not changed then. From
                `GradScaler.step`, too late for the step under way: scaled gradients of float32 look
                like others.

        Reference: the idea is that of Lv et al., "Full Parameter Fine-tuning for Large Language
            Models with Limited Resources", arXiv 2306.09782 (LOMO), and of GaLore's per-layer
            updates; both without accumulation, and without clipping or with two passes only.
        """
        handle = InBackward(cast("LowRank", self), accumulation_steps, accumulate, max_norm, ddp)
        if self._in_backward is not None:
            self._in_backward.remove()
        self._end_round()
        self._in_backward = handle
        return handle

    def measure_grad_norm(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes measure the norm of all gradients, no more.

        For exact clipping, and `skip_nonfinite`, with `step_in_backward`:
        `with optimizer.measure_grad_norm(): loss.backward(retain_graph=True)`, then
        `loss.backward()` and `step()`. Gradients are freed as they are measured.

        Raises:
            RuntimeError: without `step_in_backward`, or with `accumulation_steps` above 1.
        """
        if self._in_backward is None:
            raise RuntimeError(
                "measure_grad_norm is for step_in_backward: without it, all gradients are there "
                "after the backward pass, for torch.nn.utils.clip_grad_norm_"
            )
        return self._in_backward.measuring()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step with `step_in_backward`, before clipping."""
        return self._grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell `GradScaler.step` that it has to unscale and to look for infinities itself."""
        if self._in_backward is not None:
            raise RuntimeError(
                "GradScaler does not go with step_in_backward: it has to see all gradients before "
                "the first is used. Take bfloat16, which needs no scaler, or ordinary steps"
            )
        return False
