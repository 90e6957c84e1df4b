"""The optimizers of the step benchmark, ours and the peers', and the check each passes first.

Nothing of a peer is copied here: each is imported when asked for, and called through its published
interface. One that is not installed raises ImportError, which the benchmark notes in its row.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lowrank_optim import FiraAdamW, GaLoreAdamW, LowRank
from lowrank_optim.functional import dct_basis
from lowrank_optim.methods import registry

NEVER = 10**9
"""A gap between refreshes that no run comes to the end of."""

Build = Callable[..., torch.optim.Optimizer]
SIZES = {"60m": (512, 1376, 8), "1b": (2048, 5461, 24), "7b": (4096, 11008, 32)}
"""Width, inner width and layers of the models."""
VOCAB = 32000
BYTES = {"float32": 4, "bfloat16": 2, "8bit": 1}


@dataclass(frozen=True)
class Method:
    """One line of the benchmark.

    Attributes:
        name: as on the command line.
        build: `build(matrices, rest, rank=, gap=, **settings)` returns the optimizer; ours takes
            the settings `state_dtype` and `impl` too, and any of `LowRank`.
        gap: updates between refreshes by default; 0 where there is nothing to refresh.
        ours: whether it is of this package.
        projects: whether its moments are projected.
        reads: how often the gradient must be read: twice where the whole of it decides a factor.
        products: full products with a basis, 2 r flops a parameter each, in a step.
        moments: how many moments lie in the subspace.
        carried: how many tensors as large as the weight are kept besides.
        full: whether the subspace is everything when timed, whatever the rank. At the gate, what
            learns a basis has rank `GATE_RANK` even so: singular values beyond are tied there.
        orthogonal: whether a step iterates on what is projected, 5 times 4 m n^2 + 2 n^3 flops, in
            bfloat16.
        allowed: how far an update may be off in bfloat16 or 8 bits, where that is more than
            `tolerance`. Of a sign of what is left over, 0.26 was measured, and 0.43 with half the
            residual; of a residual divided by energies that are small differences, 0.096; of
            orthogonal factors, 0.11, and 0.18 with another form of momentum.
        spectrum: whether a refresh multiplies by the whole basis, 2 n flops a parameter.
        draws: whether the arithmetic's dtype decides on random numbers: a float64 reference would
            have others.
        svd: whether a refresh takes a full SVD of every matrix, and is measured on few.
        twin: what of ours does the same as this peer, if anything.
        state: what a peer keeps; empty where it is the dtype of the parameters.
    """

    name: str
    build: Build
    gap: int = 200
    ours: bool = False
    projects: bool = True
    reads: int = 1
    products: int = 2
    moments: int = 2
    carried: int = 0
    full: bool = False
    orthogonal: bool = False
    allowed: float = 0.0
    spectrum: bool = False
    draws: bool = False
    svd: bool = False
    twin: Build | None = None
    state: str = ""


def peer(module: str, cls: str, **low: Any) -> Build:
    """Return a builder of a peer with the two groups of its README."""

    def build(matrices: list[Tensor], rest: list[Tensor], *, rank: int, gap: int, **more: Any):
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        groups.append({"params": matrices, "rank": rank, "update_proj_gap": gap, **low})
        return getattr(importlib.import_module(module), cls)(groups, **more)

    return build


def eight_bit(module: str) -> Build:
    """AdamW8bit of `module`, on all parameters alike."""

    def build(matrices: list[Tensor], rest: list[Tensor], *, rank: int, gap: int) -> Any:
        return importlib.import_module(module).AdamW8bit([*matrices, *rest], lr=1e-3)

    return build


GALORE = peer("galore_torch", "GaLoreAdamW", scale=0.25, proj_type="std")
FIRA = peer("fira", "FiraAdamW", alpha=0.25, proj_type="std")
CHANNEL = {"proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
PEERS = [
    Method("galore-torch", GALORE, svd=True, twin=partial(GaLoreAdamW, projector="svd")),
    Method("fira-pypi", FIRA, svd=True, reads=2, twin=partial(FiraAdamW, projector="svd")),
    Method("apollo-torch", peer("apollo_torch", "APOLLOAdamW", **CHANNEL), reads=2, products=1),
    Method("bitsandbytes-8bit", eight_bit("bitsandbytes.optim"), 0, projects=False, state="8bit"),
    Method("torchao-8bit", eight_bit("torchao.optim"), 0, projects=False, state="8bit"),
]


def ours(cls: Callable[..., LowRank], **fixed: Any) -> Callable[..., LowRank]:
    """Return a builder of one of our optimizers; all matrices refresh together."""

    def build(matrices: list[Tensor], rest: list[Tensor], *, rank: int, gap: int, **more: Any):
        groups = [{"params": matrices, "rank": rank}, {"params": rest, "rank": None}]
        if not more.get("state_dtype"):
            more.pop("state_dtype", None)
        takes_gap = "update_proj_gap" in signature(cls).parameters
        gaps = {"update_proj_gap": gap} if takes_gap else {}
        return cls(groups, stagger=False, **{**gaps, **fixed, **more})

    return build


def recorded(name: str, **more: Any) -> Callable[..., LowRank]:
    """Return a builder of one of our methods as real models are trained with it."""
    method = registry.METHODS[name]
    return ours(method.optimizer, **method.settings, **more)


def plain(matrices: list[Tensor], rest: list[Tensor], *, rank: int, gap: int, **more: Any):
    """Our optimizer with a rank at which nothing is projected: AdamW."""
    return LowRank([*matrices, *rest], rank=NEVER, **more)


def adamw(matrices: list[Tensor], rest: list[Tensor], **_: Any) -> torch.optim.Optimizer:
    """torch's AdamW, the fused one: the fastest that it has, on a CPU by far."""
    return torch.optim.AdamW([*matrices, *rest], fused=True)


def adamw_loop(matrices: list[Tensor], rest: list[Tensor], **_: Any) -> torch.optim.Optimizer:
    """torch's AdamW as a loop over parameters, which is what it takes on a CPU unless asked."""
    return torch.optim.AdamW([*matrices, *rest], foreach=False)


BASELINE = Method("adamw", adamw, 0, projects=False)
LOOP = Method("adamw-loop", adamw_loop, 0, projects=False)
OURS = [
    Method("galore", recorded("galore"), ours=True, draws=True),
    Method("galore-fused", recorded("galore", fused=True), ours=True, draws=True),
    Method("dct-200", recorded("dct"), ours=True),
    Method("dct-1", recorded("dct"), 1, ours=True, spectrum=True),
    Method("fira", recorded("fira"), ours=True, reads=2, draws=True),
    Method("frugal", recorded("frugal"), ours=True, products=0),
    Method("apollo", recorded("apollo"), ours=True, reads=2, products=1),
    Method("lowrank", recorded("lowrank", length="published"), 50, ours=True, products=3,
           draws=True, allowed=0.35),
    Method("compensated", recorded("compensated"), ours=True, reads=2, draws=True, allowed=0.12),
    Method("ldadam", recorded("ldadam"), 1, ours=True, carried=1, products=6, draws=True),
    Method("trion", recorded("trion"), 1, ours=True, moments=0, carried=1, products=3,
           orthogonal=True, allowed=0.15, spectrum=True),
    Method("muon", recorded("muon"), 0, ours=True, moments=1, products=0, full=True,
           orthogonal=True, allowed=0.15),
    Method("normuon", recorded("normuon", length="published"), 0, ours=True, moments=1,
           products=0, full=True, orthogonal=True, allowed=0.15),
    Method("conda", recorded("conda"), 2000, ours=True, moments=1, carried=1, products=3, full=True,
           svd=True),
    Method("racs", recorded("racs"), 0, ours=True, reads=2, moments=0, products=0, full=True),
    Method("plain", plain, 0, ours=True, projects=False),
]  # fmt: skip
METHODS = {method.name: method for method in [LOOP, *OURS, *PEERS]}


@dataclass
class Sides:
    """Parameters with gradients: matrices that may be projected, and the rest."""

    matrices: list[Tensor]
    rest: list[Tensor]

    @property
    def params(self) -> int:
        """Return how many numbers they hold."""
        return sum(p.numel() for p in (*self.matrices, *self.rest))


class Problem(Sides):
    """Parameters and gradients of one size, the same numbers after every `reset`."""

    def __init__(self, size: str, layers: int | None, dtype: torch.dtype, device: str) -> None:
        hidden, inner, depth = SIZES[size]
        self.size, self.layers, self.device = size, layers or depth, device
        square, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
        matrices = [*[square] * 4, up, up, down] * self.layers
        rest = [(VOCAB, hidden), (VOCAB, hidden), *[(hidden,)] * (2 * self.layers + 1)]

        def empty(shape: tuple[int, ...]) -> Tensor:
            param = torch.empty(shape, dtype=dtype, device=device).requires_grad_()
            param.grad = torch.empty_like(param)
            return param

        super().__init__([empty(s) for s in matrices], [empty(s) for s in rest])
        self.kinds = {s: 4 if s == square else 3 for s in (square, up)}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fill weights and gradients."""
        rng = torch.Generator(self.device).manual_seed(0)
        for param in (*self.matrices, *self.rest):
            param.normal_(0, 0.02, generator=rng)
            param.grad.normal_(0, 0.01, generator=rng)

    @property
    def alone(self) -> Sides:
        """Return the matrices without the rest."""
        return Sides(self.matrices, [])

    def one(self, shape: tuple[int, ...]) -> Tensor:
        """Return a matrix of a shape."""
        return next(p for p in self.matrices if tuple(p.shape) == shape)


def floor(method: Method, problem: Sides, rank: int, state: str) -> tuple[float, float]:
    """Return the bytes and the flops that a step between refreshes cannot do without.

    Weights are read and written, gradients read `reads` times, moments and what is carried read and
    written; a product with a basis is 2 r flops a parameter. What could stay on the chip is not
    counted.
    """
    own = problem.matrices[0].element_size()
    kept = BYTES.get(state, own)
    total = flops = 0.0
    for param in (*problem.matrices, *problem.rest):
        low = method.projects and param.ndim == 2 and (method.full or min(param.shape) > rank)
        if low and not any(param is other for other in problem.rest):
            rows, cols = max(param.shape), min(param.shape)
            width = cols if method.full else rank
            total += (2 + method.reads + 2 * method.carried * kept / own) * own * param.numel()
            total += 2 * kept * method.moments * rows * width
            wide = 2 * cols if method.spectrum else 0
            flops += (2 * width * method.products + wide) * param.numel()
            if method.orthogonal:
                flops += 5 * (4 * rows * width**2 + 2 * width**3)
        else:
            total += (3 * own + 4 * kept) * param.numel()
    return total, flops


@contextmanager
def cheap_svd(rank: int) -> Iterator[None]:
    """Let `torch.linalg.svd` return `rank` orthonormal directions of a random range finder.

    `eigh`, by which ours take an SVD, returns those of a QR. What the steps between two refreshes
    cost does not depend on which basis it is.
    """

    def stand_in(matrix: Tensor, full_matrices: bool = True, **_: Any) -> tuple[Tensor, ...]:
        probe = torch.randn(matrix.shape[0], rank, dtype=matrix.dtype, device=matrix.device)
        right = torch.linalg.qr(matrix.mT @ probe).Q
        return torch.linalg.qr(matrix @ right).Q, matrix.new_ones(rank), right.mT.contiguous()

    def square(matrix: Tensor) -> Any:
        return torch.return_types.linalg_eigh((matrix[..., 0], torch.linalg.qr(matrix).Q))

    with mock.patch.multiple(torch.linalg, svd=stand_in, eigh=square):
        yield


SHAPES = [(96, 64), (64, 96), (80, 80)]
PLAIN = [(72, 64), (64,)]
EXACT = 1e-3
"""How far an update may be off in float32, relative to its length."""
GATE_RANK, GATE_STEPS, GATE_GAP = 8, 3, 2


def tolerance(dtype: torch.dtype, state: str = "float32", draws: bool = False) -> float:
    """How far an update may be from the reference's, relative to its length.

    Measured on the CPU: 3e-7 in float32. In bfloat16 0.036, where DCT's columns change, and 0.045
    with the singular directions of a momentum, 8-bit moments or not; 0.07 with a power iteration,
    for a bfloat16 product turns the basis a little, and Adam acts on each of its directions. No
    residual is 0.77 off, moments kept instead of reset 0.14, no limiter 0.08 to 0.1.
    """
    if dtype == torch.bfloat16 or state != "float32":
        return 0.09 if draws else 0.05
    return EXACT


def small_problem(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights, and gradients of three steps, as float64 numbers that `dtype` can hold.

    Near-ties would let rounding choose another subspace, and Adam depends on each direction of it:
    so the gradients have separated singular values, of which the first few stand out, and right
    singular vectors near to columns of the cosine basis. The last step has another subspace and a
    larger gradient, so that what becomes of the moments and the limiters are in the result.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def gradient(shape: tuple[int, ...], step: int) -> Tensor:
        if len(shape) == 1:
            return normal(*shape)
        rows, cols = max(shape), min(shape)
        values = torch.full((cols,), 0.05, dtype=torch.float64)
        values[:GATE_RANK] = 10 * 0.7 ** torch.arange(GATE_RANK)
        near = dct_basis(cols, torch.float64, torch.device("cpu")).roll(-5 - step // 2, dims=1)
        right = torch.linalg.qr(near + 0.05 * normal(cols, cols)).Q
        whole = torch.linalg.qr(normal(rows, cols)).Q * values @ right.mT
        whole *= 1 + step
        return whole if shape[0] == rows else whole.mT.contiguous()

    shapes = [*SHAPES, *PLAIN]
    weights = [(0.05 * normal(*shape)).to(dtype).double() for shape in shapes]
    grads = [[gradient(s, t).to(dtype).double() for s in shapes] for t in range(GATE_STEPS)]
    return weights, grads


def moved(
    build: Callable[[list[Tensor], list[Tensor]], torch.optim.Optimizer],
    dtype: torch.dtype,
    device: str,
    numbers: torch.dtype,
) -> list[Tensor]:
    """How far the small problem's weights, kept in `dtype` on `device`, move in three steps.

    Args:
        numbers: the dtype that holds the values of weights and gradients, at most as wide.
    """
    weights, grads = small_problem(numbers)
    params = [w.to(device=device, dtype=dtype, copy=True).requires_grad_() for w in weights]
    optimizer = build(params[: len(SHAPES)], params[len(SHAPES) :])
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.to(device=device, dtype=dtype)
        optimizer.step()
    ends = [param.detach().cpu().double() for param in params]
    return [end - weight for end, weight in zip(ends, weights, strict=True)]


def gate(method: Method, dtype: torch.dtype, device: str, state: str, impl: str) -> str:
    """Return why an optimizer must not be timed, or nothing.

    Ours, with the settings that will be timed, against `impl="eager"` on the CPU, in float64, or in
    float32 where a power iteration would start from other random columns in float64; a peer
    with a twin against that, in float32 on the device, where all that the two sides do differently
    (eps, decay) is switched off. Others have nothing here to agree with.
    """
    if method.ours:
        common = {"rank": GATE_RANK, "gap": min(GATE_GAP, method.gap or GATE_GAP), "lr": 5e-2}

        def timed(matrices: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
            return method.build(matrices, rest, state_dtype=state, impl=impl, **common)

        def plain(matrices: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
            return method.build(matrices, rest, state_dtype=None, impl="eager", **common)

        right = moved(plain, torch.float32 if method.draws else torch.float64, "cpu", dtype)
        found = moved(timed, dtype, device, dtype)
        allowed = tolerance(dtype, state, method.draws)
        if allowed > EXACT or method.orthogonal:
            allowed = max(allowed, method.allowed)
    elif method.twin is not None:
        twin, even = method.twin, {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.0}

        def peer(matrices: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
            return method.build(matrices, [], rank=GATE_RANK, gap=NEVER, **even)

        def ours(matrices: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
            return twin(matrices, rank=GATE_RANK, update_proj_gap=NEVER, impl="eager", **even)

        right = moved(ours, torch.float32, device, torch.float32)[: len(SHAPES)]
        found = moved(peer, torch.float32, device, torch.float32)[: len(SHAPES)]
        allowed = tolerance(torch.float32)
    else:
        return ""
    pairs = zip([*SHAPES, *PLAIN], found, right, strict=False)
    errors = {
        shape: ((a - b).norm() / b.norm()).nan_to_num(math.inf).item() for shape, a, b in pairs
    }
    shape, error = max(errors.items(), key=lambda item: item[1])
    if error <= allowed:
        return ""
    return f"{shape} moved {error:.2g} off, relative to its update; {allowed:g} is allowed"
