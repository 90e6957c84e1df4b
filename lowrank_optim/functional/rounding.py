"""Randomness as a function of numbers, and rounding that uses it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
IN_CACHE = 1 << 16
"""Elements whose bits are drawn at once on a CPU: their 64-bit words then stay in its cache."""
AT_ONCE = 1 << 20
"""The same elsewhere: some 40 MB of words, so that launches do not take longer than the work."""


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Return a generator that is a function of some non-negative numbers alone."""
    seed = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(seed) >> 1)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for it."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make launches go to a device: triton takes the current one's, torch the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Noise(NamedTuple):
    """Where the random bits of one matrix come from: a function of these numbers alone.

    Attributes:
        seed: of the optimizer.
        step: t, the number of updates, this one included; an int or a 0-d tensor.
        stream: `position << 32 | first row`, see `stream_of`.
        height: rows of a whole matrix, where a stack has only some rows of each.
    """

    seed: int
    step: int | Tensor
    stream: int
    height: int | None = None


def stream_of(position: int, first_row: int = 0) -> int:
    """Return the stream of a matrix: place of its parameter, and its first row in a stack."""
    return position << 32 | first_row


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four tensors of random 32-bit words, as int64: Philox-4x32 of ten rounds.

    Args:
        seed: 64 bits, the key.
        counter: four int64 tensors of 32-bit words that broadcast.

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    a, b, c, d = counter
    key = [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & WORD) ^ b ^ key[0],
            second & WORD,
            (first >> 32 & WORD) ^ d ^ key[1],
            first & WORD,
        )
        key = [key[0] + WEYL[0] & WORD, key[1] + WEYL[1] & WORD]
    return a, b, c, d


def random_bits(noise: Noise, kind: int, rows: slice, cols: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each element of some rows of a matrix, int32 `(rows, cols)`.

    Element (i, j) has the half `j mod 2` (low half first) of the word `j mod 8 div 2` of Philox
    at the counter (kind << 29 | j div 8, first row + i, position, step).
    """
    groups = torch.arange(-(-cols // 8), dtype=torch.int64, device=device) | kind << 29
    position = torch.full((), noise.stream >> 32, dtype=torch.int64, device=device)
    step = noise.step
    if isinstance(step, Tensor):
        step = step.to(device, torch.int64)
    else:
        step = torch.full((), step, dtype=torch.int64, device=device)
    first = noise.stream & WORD
    bits = torch.empty(rows.stop - rows.start, cols, dtype=torch.int32, device=device)
    most = IN_CACHE if device.type == "cpu" else AT_ONCE
    height = max(1, most // max(1, cols))
    for start in range(rows.start, rows.stop, height):
        stop = min(start + height, rows.stop)
        lines = torch.arange(first + start, first + stop, dtype=torch.int64, device=device)
        words = philox(noise.seed, (groups, lines.unsqueeze(1), position, step))
        halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
        bits[start - rows.start : stop - rows.start] = halves.flatten(1)[:, :cols]
        if bits.is_meta:
            break  # no values: the other pieces show nothing new
    return bits


Draw = Callable[[Noise, int, slice, int, torch.device], Tensor]
"""What `random_bits` is, and the kernel that does the same."""


def stack_bits(
    noise: Noise,
    kind: int,
    count: int,
    rows: slice,
    length: int,
    cols: int,
    device: torch.device,
    draw: Draw = random_bits,
) -> Tensor:
    """Return `random_bits` for the same rows of each matrix of a stack, `(count * rows, cols)`.

    Args:
        noise, kind, cols, device: as there.
        count: matrices.
        rows: which rows of each, of those that are here.
        length: rows of each that are here.
        draw: `random_bits`, or a kernel that does the same.
    """
    height = length if noise.height is None else noise.height
    if count == 1:
        return draw(noise, kind, rows, cols, device)
    bits = torch.empty(count, rows.stop - rows.start, cols, dtype=torch.int32, device=device)
    for place in range(count):
        lines = slice(place * height + rows.start, place * height + rows.stop)
        bits[place] = draw(noise, kind, lines, cols, device)
    return bits.flatten(0, 1)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Round to bfloat16 up or down at random, so that the expectation is the (float32) value.

    Sixteen random bits are added below the bits that stay, and the rest is cut off. Values that are
    not finite are rounded as usual.

    Args:
        x: any shape.
        bits: same shape, int32, values below 2^16.
    """
    x = x.to(torch.float32).contiguous()
    moved = (x.view(torch.int32) + bits).bitwise_and_(-(1 << 16))
    return torch.where(x.isfinite(), moved.view(torch.float32), x).to(torch.bfloat16)


def round_into_(target: Tensor, value: Tensor, bits: Tensor | None) -> None:
    """Write `value` into `target`, rounding stochastically with `bits`; nothing if they are one."""
    if bits is not None:
        target.copy_(stochastic_round(value, bits))
    elif target is not value:
        target.copy_(value)
