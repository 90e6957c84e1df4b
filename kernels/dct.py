"""Scores of the columns of a cosine transform, in one pass over the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import addresses, over, tables
from .cosines import Factoring, cosines, factored, supports

__all__ = ["dct_scores", "supports"]

COPY = 1 << 22
"""Elements of the buffer through which gradients go whose rows are not contiguous."""

TYPES = {
    torch.float32: (tl.float32, tl.bfloat16),
    torch.float16: (tl.float16, tl.float16),
    torch.bfloat16: (tl.bfloat16, tl.bfloat16),
}
"""Types of a gradient and of the first product. The second product is in bfloat16, because sums of
float16 may overflow."""


@triton.jit
def _parts(x, dtype: tl.constexpr, stored: tl.constexpr):
    """Return x rounded to `dtype` and what the rounding left, both in the type of the tables."""
    high = x.to(dtype)  # x is (A, B), as both parts
    low = (x.to(tl.float32) - high.to(tl.float32)).to(dtype)
    return high.to(stored), low.to(stored)


@triton.jit
def _entries(row, at, here, exact: tl.constexpr):
    """Return entries of a row, zero where the tile is larger than the matrix."""
    # at, here and the result are (A B,)
    if exact:
        return tl.load(row + at)
    else:
        return tl.load(row + at, mask=here, other=0.0)


@triton.jit
def _product(x, x_low, y, y_low, total, split: tl.constexpr):
    """Return `total + x @ y`, of both parts of each factor where they are split."""
    # total and the result are (A, B): of (A, A) @ (A, B), or of (A, B) @ (B, B)
    if split:
        total = tl.dot(x_low, y, total)
        total = tl.dot(x, y_low, total)
    return tl.dot(x, y, total)


@triton.jit
def _scores(
    table,
    partial,
    middle,
    w_ptr,
    t_ptr,
    m_ptr,
    rows,
    row_stride,
    element: tl.constexpr,
    first_type: tl.constexpr,
    split: tl.constexpr,
    squares: tl.constexpr,
    n: tl.constexpr,
    n1: tl.constexpr,
    n2: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Sum |S| or S^2 of every `programs`-th row of one gradient; see `dct_scores`."""
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    which = tl.program_id(1).to(tl.int64)
    grad = tl.load(table + which).to(tl.pointer_type(element))
    middle += which * rows * B
    partial += (which * programs + first) * n
    count = tl.cdiv(rows - first, programs)
    stored: tl.constexpr = w_ptr.dtype.element_ty
    second: tl.constexpr = m_ptr.dtype.element_ty

    a = tl.arange(0, A)[:, None]
    b = tl.arange(0, B)[None, :]
    w_at = w_ptr + a * A + tl.arange(0, A)[None, :]
    m_at = m_ptr + tl.arange(0, B)[:, None] * B + b
    # Parts: real and imaginary for the even entries, then for the odd ones; then what is left over.
    re_even = tl.load(w_at)  # (A, A), as all entries of W
    im_even = tl.load(w_at + A * A)
    re_odd = tl.load(w_at + 2 * A * A)
    im_odd = tl.load(w_at + 3 * A * A)
    re_even_low, im_even_low, re_odd_low, im_odd_low = re_even, im_even, re_odd, im_odd
    m_re = tl.load(m_at)  # (B, B), as all entries of M
    m_im = tl.load(m_at + B * B)
    m_re_low, m_im_low = m_re, m_im
    if split:
        re_even_low = tl.load(w_at + 4 * A * A)
        im_even_low = tl.load(w_at + 5 * A * A)
        re_odd_low = tl.load(w_at + 6 * A * A)
        im_odd_low = tl.load(w_at + 7 * A * A)
        m_re_low = tl.load(m_at + 3 * B * B)
        m_im_low = tl.load(m_at + 4 * B * B)
    t_at = t_ptr + a * B + b
    t_re = tl.load(t_at)  # (A, B): the twiddle factors between the two products
    t_im = tl.load(t_at + A * B)

    # The odd entries are read backwards. Neighbouring threads take every other entry; the two reads
    # of a line follow each other and meet in the first-level cache. Flat offsets keep the layout of
    # these loads (an entry a thread) apart from the layout of the tables, whose loads are wide.
    spot = tl.arange(0, A * B)
    spot_a = spot // B
    spot_b = spot % B
    even_at = 2 * (spot if n2 == B else spot_a * n2 + spot_b)
    odd_at = n - 1 - even_at
    here = (spot_a < n1 // 2) & (spot_b < n2)
    exact: tl.constexpr = n1 == A * 2 and n2 == B
    columns = tl.arange(0, B)
    zero = tl.zeros((A, B), tl.float32)
    sum_re = zero
    sum_im = zero
    row = first.to(tl.int64)
    for _ in range(count):
        even = _entries(grad + row * row_stride, even_at, here, exact)
        odd = _entries(grad + row * row_stride, odd_at, here, exact)
        v, v_low = _parts(tl.reshape(even, (A, B)), first_type, stored)
        u, u_low = _parts(tl.reshape(odd, (A, B)), first_type, stored)
        y_re = _product(re_even, re_even_low, v, v_low, zero, split)  # (A, B), as z, p, q and s
        y_im = _product(im_even, im_even_low, v, v_low, zero, split)
        y_re = _product(re_odd, re_odd_low, u, u_low, y_re, split)
        y_im = _product(im_odd, im_odd_low, u, u_low, y_im, split)
        tl.store(middle + row * B + columns, tl.sum(tl.where(a == 0, y_im, 0.0), axis=0))
        row += programs
        if split or B > 32:  # there are no registers to keep them in
            t_re = tl.load(t_at)
            t_im = tl.load(t_at + A * B)
        z_re = t_re * y_re - t_im * y_im
        z_im = tl.where(a == 0, 0.0, t_re * y_im + t_im * y_re)
        p, p_low = _parts(z_re, tl.bfloat16, second)
        q, q_low = _parts(z_im, tl.bfloat16, second)
        minus_q, minus_q_low = _parts(-z_im, tl.bfloat16, second)
        s = _product(p, p_low, m_re, m_re_low, zero, split)
        s = _product(minus_q, minus_q_low, m_im, m_im_low, s, split)
        sum_re += s * s if squares else tl.abs(s)
        s = _product(p, p_low, m_im, m_im_low, zero, split)
        s = _product(q, q_low, m_re, m_re_low, s, split)
        sum_im += s * s if squares else tl.abs(s)

    held = (a < n1 // 2) & (b < n2)
    k = a + n1 * b
    sum_re = tl.where(k == 0, sum_re * (0.5 if squares else 0.7071067811865476), sum_re)
    tl.store(partial + k, sum_re, mask=held)
    tl.store(partial + (n - k), sum_im, mask=held & (a > 0))

    # The rows of the class n1/2 now stand below each other: one product of matrices for A of them.
    tl.debug_barrier()
    m_mid = tl.load(m_at + 2 * B * B)  # (B, B)
    m_mid_low = tl.load(m_at + 5 * B * B) if split else m_mid
    sum_mid = zero
    for start in range(0, count, A):
        mine = start + a  # (A, 1); x and s are (A, B)
        at = middle + (first + mine.to(tl.int64) * programs) * B + b
        x, x_low = _parts(tl.load(at, mask=mine < count, other=0.0), tl.bfloat16, second)
        s = _product(x, x_low, m_mid, m_mid_low, zero, split)
        sum_mid += s * s if squares else tl.abs(s)
    tl.store(partial + n1 // 2 + n1 * columns, tl.sum(sum_mid, axis=0), mask=columns < n2)


def dct_scores(grads: Sequence[Tensor], norm: str) -> Tensor:
    """Return the norm over the rows of each column of S = G Q, Q being the cosine basis.

    score[k] = sum_r |S[r, k]|  (l1)  or  sqrt(sum_r S[r, k]^2)  (l2)

    With v the even entries of a row, then the odd ones backwards, and F its Fourier transform,

        Z[k] = sqrt(2/n) exp(-i pi k / (2n)) F[k],  S[k] = Re Z[k],  S[n-k] = -Im Z[k].

    n = n1 n2, index a n2 + b, frequency k1 + n1 k2: two products and a twiddle between them,

        Y[k1, b]       = sum_a exp(-2 pi i a k1 / n1) v[a n2 + b]
        Z[k1 + n1 k2]  = sum_b exp(-i pi k2 (4b+1) / (2 n2)) T[k1, b] Y[k1, b]
        T[k1, b]       = sqrt(2/n) exp(-i pi k1 (4b+1) / (2n)),

    the turn of the cosine transform being shared out between T and the second matrix. Both parts of
    Z are wanted, so the classes k1 < n1/2 ("slots") give every column except k1 = n1/2's. For
    slot 0 the imaginary part of Y is zero: its room carries Y[n1/2, b], which is real, to memory (4
    bytes per n1 elements), and each program ends with one real product for all its rows.

    Work per element: 2 n1 + 4 n2 flops in the products (128 at n = 512, 256 at 2048, 384 at 4096,
    512 at 8192; a product with Q has 2 n), thrice that for float32, and about 6 outside them.
    Bytes: the gradient once.

    Float32 is split into two bfloat16 numbers, as the matrices are, and takes three products of
    such parts: about 4e-6 of a score, without the registers that TF32 would need for the same. A
    bfloat16 gradient is multiplied as it is; W, M and T Y are rounded to bfloat16, which leaves
    8e-4 of a score on average and 3.2e-3 at most, as much as a product with Q in bfloat16; of two
    rows, over which nothing averages out, 1e-2. Columns that carry next to nothing beside others
    are known less well; they are not chosen.

    A view whose rows are not contiguous is copied piece by piece through a buffer of `COPY`
    elements: it stays in the second-level cache, so that memory is still read about once, where
    reading columns in place would fetch a sector of 32 bytes for every element and row.

    Args:
        grads: K gradients of one shape `(rows, cols)`, on one device, of any strides; float32,
            float16 or bfloat16.
        norm: "l1" or "l2".

    Returns:
        `(K, cols)` in float32.

    Raises:
        ValueError: a width or dtype for which `supports` is false.

    References: Cooley & Tukey, "An algorithm for the machine calculation of complex Fourier
        series" (1965); Makhoul, "A fast cosine transform in one and two dimensions" (1980).
    """
    cols = grads[0].shape[1]
    for dtype in {grad.dtype for grad in grads}:
        if not supports(cols, dtype):
            raise ValueError(f"no kernel for the cosine transform of {cols} columns in {dtype}")
    groups: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
    for i, grad in enumerate(grads):
        groups.setdefault((grad.dtype, grad.stride()), []).append(i)
    found: dict[int, Tensor] = {}
    for (_, stride), members in groups.items():
        group = [grads[i] for i in members]
        part = _launch(group, norm) if stride[1] == 1 else _through_copies(group, norm)
        found.update(zip(members, part.unbind(), strict=True))
    sums = torch.stack([found[i] for i in range(len(grads))])
    return sums.sqrt() if norm == "l2" else sums


def _through_copies(grads: Sequence[Tensor], norm: str) -> Tensor:
    """Return what `_launch` returns, by bounded copies, where rows are not contiguous."""
    rows, cols = grads[0].shape
    some = min(len(grads), max(1, COPY // (rows * cols)))
    height = min(rows, max(1, COPY // (some * cols)))
    buffer = grads[0].new_empty(some, height, cols)
    sums = torch.zeros(len(grads), cols, dtype=torch.float32, device=buffer.device)
    for i in range(0, len(grads), some):
        for top in range(0, rows, height):
            pieces = [grad[top : top + height] for grad in grads[i : i + some]]
            copies = list(buffer[: len(pieces), : len(pieces[0])].unbind())
            for copy, piece in zip(copies, pieces, strict=True):
                copy.copy_(piece)
            sums[i : i + some] += _launch(copies, norm)
    return sums


def _programs(grad: Tensor, count: int, layout: Factoring) -> int:
    """Return how many programs share the rows of one of `count` gradients."""
    rows = grad.shape[0]
    if grad.device.type != "cuda":
        return min(3, rows)
    # One wave: every program is resident from the start, and rows are shared out evenly. Warps that
    # a multiprocessor holds, by the registers of the compiled kernel (140 at 4 warps in bfloat16,
    # 172 at 2, 84 at 1; above 200 where a row is split or long).
    warps = 8 if grad.dtype == torch.float32 or layout.b > 32 else 12 if layout.warps > 2 else 10
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count
    resident = processors * (warps // layout.warps)
    # At least 8 rows each, over which a program spreads its tables and the store of its sums.
    return max(1, min(resident // count, over(rows, 8)))


def _launch(grads: Sequence[Tensor], norm: str) -> Tensor:
    """Return the sums of |S| or S^2, `(K, cols)`; one dtype and stride, contiguous rows."""
    grad = grads[0]
    rows, n = grad.shape
    layout = factored(n)
    split = grad.dtype == torch.float32
    programs = _programs(grad, len(grads), layout)
    partial = torch.empty(len(grads), programs, n, dtype=torch.float32, device=grad.device)
    middle_dtype = torch.float32 if split else torch.bfloat16
    middle = torch.empty(len(grads), rows, layout.b, dtype=middle_dtype, device=grad.device)
    element, first_type = TYPES[grad.dtype]
    _scores[(programs, len(grads))](
        *tables(grad.device, addresses(grads)),
        partial,
        middle,
        *cosines(n, grad.dtype, grad.device),
        rows,
        grad.stride(0),
        element,
        first_type,
        split,
        norm == "l2",
        n,
        layout.n1,
        layout.n2,
        layout.a,
        layout.b,
        num_warps=layout.warps,
        num_stages=1,
    )
    return partial.sum(1)
