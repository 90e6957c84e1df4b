"""Storage of moments: dense, in 8 bits and in 4; and how each is found in a state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .. import functional
from ..functional import (
    BLOCK,
    BLOCK_4BIT,
    CARRIED,
    MOMENTS,
    Noise,
    Stored,
    bits_of,
    compute_dtype,
    load,
    store,
)
from .protocols import Rule, Storage
from .types import Moments, State

Held = dict[str, Stored]
"""Moments as they lie in memory, by name."""

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}

LEAST = 4096
"""Elements from which on a moment of a whole parameter is kept in 8 bits, as in bitsandbytes."""


@dataclass(frozen=True)
class Dense:
    """Moments as plain tensors.

    Args:
        name: "float32", "float64" or "bfloat16"; None takes the dtype of the arithmetic, float32
            for bf16, fp16 and fp32 parameters and float64 for float64.
    """

    name: str | None = None

    def dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype that the state of a parameter gets."""
        return compute_dtype(like.dtype) if self.name is None else DTYPES[self.name]

    def zeros(self, slot: str, shape: tuple[int, ...], like: Tensor, size: int = 0) -> State:
        """Return one tensor; for a parameter that is not projected, with its strides."""
        if size:
            return {slot: torch.zeros_like(like, dtype=self.dtype(like), requires_grad=False)}
        return {slot: torch.zeros(shape, dtype=self.dtype(like), device=like.device)}


@dataclass(frozen=True)
class Blockwise8:
    """Moments of one byte a value, in blocks of at most 256 values of a row with a scale each.

    Codes follow bitsandbytes' dynamic map, see `functional.quantize_blockwise`. Moments
    of whole parameters that are vectors or have fewer than 4096 elements, and rows of one value,
    stay float32; a basis is bfloat16. The size that decides is the size of the whole parameter,
    also where it is sharded.

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """

    def dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype of a basis."""
        return torch.bfloat16

    def zeros(self, slot: str, shape: tuple[int, ...], like: Tensor, size: int = 0) -> State:
        """Return `codes` of the moment's shape and `scale`, a number a block.

        A row is the last axis of a projected moment, and all axes except the first of another one.
        """
        if size and (size < LEAST or len(shape) < 2):
            return Dense().zeros(slot, shape, like, size)
        rows, length = tuple(shape[:-1]), shape[-1]
        if size:
            rows, length = tuple(shape[:1]), torch.Size(shape[1:]).numel()
        if length == 1:
            return Dense().zeros(slot, shape, like, size)
        blocks = -(-length // BLOCK)
        return {
            f"{slot}.codes": torch.zeros(shape, dtype=torch.uint8, device=like.device),
            f"{slot}.scale": torch.zeros((*rows, blocks), dtype=torch.float32, device=like.device),
        }


@dataclass(frozen=True)
class Blockwise4:
    """What a feed carries in four bits a value, see `functional.quantize_4bit`."""

    def dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype of a basis."""
        return torch.bfloat16

    def zeros(self, slot: str, shape: tuple[int, ...], like: Tensor, size: int = 0) -> State:
        """Return `packed`, two values a byte, and `scale`, a number a block of a row."""
        *rows, length = shape
        packed = torch.zeros((*rows, -(-length // 2)), dtype=torch.int8, device=like.device)
        blocks = -(-length // BLOCK_4BIT)
        scale = torch.zeros((*rows, blocks), dtype=torch.float32, device=like.device)
        return {f"{slot}.packed": packed, f"{slot}.scale": scale}


def stored(state: State, slot: str) -> Stored:
    """Return a moment as it lies in a state: a tensor, or codes and scale."""
    dense: Tensor | None = state.get(slot)
    if dense is not None:
        return dense
    codes = f"{slot}.codes"
    return state[codes if codes in state else f"{slot}.packed"], state[f"{slot}.scale"]


def holds(state: State, slot: str) -> bool:
    """Return whether a state has a moment."""
    return slot in state or f"{slot}.scale" in state


def keys_of(state: State, slot: str) -> tuple[str, ...]:
    """Return the keys under which a state has a moment; () if it lacks the moment."""
    return next((keys for keys in forms(slot) if all(key in state for key in keys)), ())


def forms(slot: str) -> dict[tuple[str, ...], Storage]:
    """Return the keys under which a moment may be found, and the storage that makes them."""
    return {
        (slot,): Dense(),
        (f"{slot}.codes", f"{slot}.scale"): Blockwise8(),
        (f"{slot}.packed", f"{slot}.scale"): Blockwise4(),
    }


def moments_of(state: State, slots: Iterable[str]) -> Held:
    """Return some moments as they lie in a state."""
    return {slot: stored(state, slot) for slot in slots}


def rows_of(moment: Stored, rows: slice) -> Stored:
    """Return a view of some rows of each matrix of a projected moment."""
    if isinstance(moment, Tensor):
        return moment[..., rows, :]
    codes, scale = moment
    return codes[..., rows, :], scale[..., rows, :]


def load_moments(
    held: Held, rule: Rule, dtype: torch.dtype, ops: ModuleType = functional
) -> Moments:
    """Return moments in the dtype of the arithmetic; a stored tensor itself if it has that dtype.

    Args:
        held: the moments as they lie in memory.
        rule: whose moments they are.
        dtype: of the arithmetic.
        ops: who reads the 8-bit format, see `Site.ops`.
    """
    return {slot: load(moment, dtype, slot in rule.squares, ops) for slot, moment in held.items()}


def store_moments(
    held: Held,
    moments: Moments,
    rule: Rule,
    noise: Noise,
    *,
    plain: bool = False,
    carried: bool = False,
    ops: ModuleType = functional,
) -> None:
    """Write loaded and changed moments back, in place.

    Args:
        held: what they were loaded from.
        moments: their values.
        rule: whose moments they are.
        noise: source of random bits.
        plain: whether they belong to a parameter that is not projected.
        carried: whether they were carried into a new subspace, which draws bits of its own.
        ops: who writes the 8-bit format and draws bits, see `Site.ops`.
    """
    for place, (slot, value) in enumerate(moments.items()):
        if held[slot] is value:
            continue
        kind = (CARRIED if carried else MOMENTS)[place]
        square = slot in rule.squares
        bits = partial(bits_of, noise, kind, value, plain, ops.random_bits)
        store(held[slot], value, square, bits, ops)


def shape_of(state: State, slot: str) -> torch.Size:
    """Return the shape of a moment."""
    moment = stored(state, slot)
    return (moment if isinstance(moment, Tensor) else moment[0]).shape


STORAGES: dict[str | None, Storage] = {
    None: Dense(),
    **{name: Dense(name) for name in DTYPES},
    "8bit": Blockwise8(),
}

FEED_STORAGES: dict[str | None, Storage] = {**STORAGES, "4bit": Blockwise4()}
"""What feeds may carry in."""
