"""One forward and backward pass on the "meta" device: which bytes live when, without computing.

The model's own code runs, and each operator tells shapes and dtypes of what it makes. Where a GPU
runs other operators than "meta" does, the GPU's are run: attention that forms no seq x seq matrix
(torch's flash kernel; the memory-efficient one for float32 or with a mask), and dropout that keeps
a mask of booleans.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Loss = Callable[[nn.Module, int, int], Tensor]
"""Runs a model on a batch of so many sequences of some length and returns its loss."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of storages that come to life inside, after each operator.

    Attributes:
        now: bytes that live now.
        series: `now` after each operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.series: list[int] = []
        self._sizes: dict[int, int] = {}

    @property
    def peak(self) -> int:
        """The most bytes that lived at once."""
        return max(self.series, default=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what is new."""
        out = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if _is_tensor(leaf)}
        for leaf in tree_leaves(out):
            if not _is_tensor(leaf):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and key not in old:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        if func in _WITHIN:
            self.series.append(self.now + _WITHIN[func](*args))
        self.series.append(self.now)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided


def _eigenvalue_work(x: Tensor, *_: Any) -> int:
    """Return the bytes of a divide-and-conquer eigensolver's workspace: 2 n^2 values."""
    return 2 * x.numel() * x.element_size()


def _attention_work(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """Return the bytes of the workspace of flash attention's backward pass.

    It holds the gradient of the queries and a number a query in float32 and, where heads share keys
    and values, the gradients of both for each head.
    """
    sums = 4 * (query.numel() + grad.shape[:-1].numel())
    shared = key.shape[-3] != query.shape[-3]
    return sums + 2 * shared * grad.numel() * grad.element_size()


_WITHIN: dict[Any, Callable[..., int]] = {
    torch.ops.aten._linalg_eigh.default: _eigenvalue_work,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _attention_work,
}
"""Bytes that an operator takes and gives back on a GPU, which no tensor of "meta" shows."""


class AsOnCuda(TorchFunctionMode):
    """Replace operators that "meta" makes from parts by the ones that a CUDA device runs."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the CUDA form of an operator, or the operator itself."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is nn.functional.dropout:
            return dropout(*args, **kwargs)
        if func in (Tensor.all, torch.all) and len(args) == 1 and args[0].is_meta and not kwargs:
            return torch.ones((), dtype=torch.bool)  # sequences are whole: nothing is masked
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Make what attention on a GPU makes: the output and a float32 a query for the backward pass.

    A mask of booleans becomes one of numbers, as on a GPU.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] == value.shape[-1] <= 256:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return out
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        share = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(share, -3) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask, -torch.inf
            )
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return out


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Make what dropout on a GPU makes: the output and a boolean a value."""
    if not training or p == 0:
        return input
    out: Tensor = torch.native_dropout(input, p, training)[0]
    return out


@dataclass(frozen=True)
class Trace:
    """What lived during one forward and backward pass, weights, buffers and state left out.

    Attributes:
        live: bytes after each operator, gradients of parameters among them.
        grads: of these, bytes of gradients that were complete.
        steps: for each parameter, in the order in which gradients became complete: the place in
            `live`, the bytes of its gradient, and the parameter.
    """

    live: np.ndarray[Any, np.dtype[np.int64]]
    grads: np.ndarray[Any, np.dtype[np.int64]]
    steps: list[tuple[int, int, nn.Parameter]]


def trace(model: nn.Module, loss: Loss, batch: int, seq: int) -> Trace:
    """Run one forward and backward pass of a model on the "meta" device.

    Raises:
        Exception: anything that the model raises, such as NotImplementedError for an operator that
            does not know "meta".
    """
    counted = Live()
    done: list[tuple[int, int, nn.Parameter]] = []

    def note(param: Tensor) -> None:
        assert param.grad is not None
        assert isinstance(param, nn.Parameter)
        size = param.grad.untyped_storage().nbytes()
        done.append((len(counted.series), size, param))

    params = [param for param in model.parameters() if param.requires_grad]
    handles = [
        param.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        for param in params
    ]
    try:
        with AsOnCuda(), counted:
            value = loss(model, batch, seq)
            # What `backward` calls; it would leave the mode that checkpointed layers are run in.
            _engine_run_backward(
                (value,), (torch.ones_like(value),), False, False, (), True, accumulate_grad=True
            )
            del value
    finally:
        for handle in handles:
            handle.remove()
        for param in params:
            param.grad = None
    live = np.array(counted.series, dtype=np.int64)
    grads = np.zeros_like(live)
    for place, size, _ in done:
        grads[place:] += size
    return Trace(live, grads, [(place - 1, size, param) for place, size, param in done])
