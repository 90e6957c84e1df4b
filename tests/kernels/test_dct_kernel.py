"""The fast cosine transform: against scipy, against the basis, and the kernel against both."""

import pytest
import scipy.fft
import torch
from lowrank_optim.kernels import _host as tables
from lowrank_optim.kernels import cosines as cosine_tables
from lowrank_optim.kernels import dct as kernel

from helpers.pairwise import crossed
from lowrank_optim.functional import dct, dct_basis
from lowrank_optim.functional import dct_scores as plain_scores

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that was not written reads as nan."""
    make = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kwargs: make(*size, **kwargs).fill_(torch.nan)
    )


def noise(*size, device, dtype=torch.float32):
    values = torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))
    return values.to(device, dtype)


def tolerance(dtype, device):
    # The interpreter truncates where a GPU rounds to the nearest.
    if dtype == torch.float32:
        return 1e-4 if device.type == "cpu" else 2e-5
    return 2e-2 if device.type == "cpu" else 1.5e-3


def rounded(grad, norm):
    """Return the scores of a half-precision gradient with the roundings that the kernel makes.

    Those are of W, M and the input of the second product, to bfloat16 (W to float16 for a float16
    gradient). Sums, in float32 there, are exact here: a number between two of bfloat16 may go to
    the other one there, and move a score by a thousandth.
    """
    rows, n = grad.shape
    n1, n2, *_ = cosine_tables.factored(n)
    half, slots = n1 // 2, torch.arange(n1 // 2)[:, None] + n1 * torch.arange(n2)
    tables = cosine_tables.cosines(n, grad.dtype, torch.device("cpu"))
    w, t, m = (table.double() for table in tables)
    w, t, m = w[:, :half, :half], t[:, :half, :n2], m[:, :n2, :n2]
    x = grad.cpu().double()
    even, odd = x[:, ::2].reshape(rows, half, n2), x.flip(1)[:, ::2].reshape(rows, half, n2)
    y_re, y_im = w[0] @ even + w[2] @ odd, w[1] @ even + w[3] @ odd
    middle = y_im[:, 0].bfloat16().double()
    z_re, z_im = t[0] * y_re - t[1] * y_im, t[0] * y_im + t[1] * y_re
    z_im[:, 0] = 0
    z_re, z_im = z_re.bfloat16().double(), z_im.bfloat16().double()
    spectrum = x.new_zeros(rows, n)
    spectrum[:, slots.flatten()] = (z_re @ m[0] - z_im @ m[1]).flatten(1)
    spectrum[:, 0] *= 0.5**0.5
    spectrum[:, (n - slots[1:]).flatten()] = (z_re @ m[1] + z_im @ m[0])[:, 1:].flatten(1)
    spectrum[:, half + n1 * torch.arange(n2)] = middle @ m[2]
    return torch.linalg.vector_norm(spectrum, 1 if norm == "l1" else 2, dim=0)


def error_of(scores, expected):
    # Against a usual score: with few rows some scores are next to nothing.
    return float((scores - expected).abs().max() / expected.mean())


def check(grads, norm):
    exact = plain_scores([grad.double() for grad in grads], norm).cpu()
    scores = kernel.dct_scores(grads, norm)
    assert scores.dtype == torch.float32
    for got, wanted, grad in zip(scores.cpu().double(), exact, grads, strict=True):
        if grad.is_cuda and grad.dtype in HALVES:
            wanted = rounded(grad, norm)
        assert error_of(got, wanted) < tolerance(grad.dtype, device=grad.device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "n"), [(300, 256), (200, 512), (150, 2048), (100, 4096)])
def test_what_is_rounded_leaves_the_scores_right(rows, n, dtype):
    grad = noise(rows, n, device="cpu", dtype=dtype)
    for norm in ("l1", "l2"):
        exact = plain_scores([grad.double()], norm)[0]
        assert error_of(rounded(grad, norm), exact) < 3.5e-3


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 64, 320, 511])
def test_plain_transform(n):
    x = noise(3, 5, n, device="cpu").double()
    transformed = dct(x)
    torch.testing.assert_close(
        transformed, torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho")), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(transformed, x @ dct_basis(n, x.dtype, x.device), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 65])
def test_plain_scores_are_column_norms(n, norm, dtype, monkeypatch):
    monkeypatch.setattr("lowrank_optim.functional.products.CHUNK", 12 * n)
    grads = [noise(11, n, device="cpu").to(dtype), noise(n, 11, device="cpu").to(dtype).mT]
    spectrum = torch.stack(grads).double() @ dct_basis(n, torch.float64, torch.device("cpu"))
    expected = torch.linalg.vector_norm(spectrum, 1 if norm == "l1" else 2, dim=-2)
    scores = plain_scores(grads, norm)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@crossed(
    shape=[(37, 256), (5, 320), (7, 512), (3, 2), (4, 30), (9, 172), (3, 2048), (2, 4096)],
    dtype=[torch.float32, *HALVES],
    norm=["l1", "l2"],
)
def test_kernel_is_the_reference(shape, dtype, norm, device):
    rows, n = shape
    check([noise(rows, n, device=device, dtype=dtype)], norm)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_many_gradients_in_one_call(norm, device):
    grads = [noise(19, 64, device=device) * 10.0**i for i in range(-2, 3)]
    check(grads, norm)


@pytest.mark.usefixtures("poisoned")
def test_gradients_of_several_strides_and_dtypes_in_one_call(device):
    wide = noise(6, 100, device=device)
    grads = [
        noise(6, 48, device=device),
        wide[:, 3:51],
        noise(48, 6, device=device).mT,
        noise(12, 48, device=device)[::2],
        noise(6, 96, device=device)[:, ::2],
        noise(6, 48, device=device, dtype=torch.bfloat16),
        noise(48, 6, device=device).mT,
    ]
    check(grads, "l1")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("room", [5 * 32, 22 * 32, 1 << 22])
def test_transposed_views_go_through_a_buffer_of_any_size(room, device, monkeypatch):
    monkeypatch.setattr(kernel, "COPY", room)
    views = [noise(3, 32, 11, device=device)[i].mT for i in range(3)]
    for norm in ("l1", "l2"):
        check(views, norm)


def test_every_frequency_alone_is_found(device):
    """A row that is one cosine scores in its column alone."""
    n = 96
    basis = dct_basis(n, torch.float32, torch.device(device)).mT.contiguous()
    scores = kernel.dct_scores(list(basis.unsqueeze(1).unbind()), "l1")
    torch.testing.assert_close(scores, torch.eye(n, device=device), atol=1e-4, rtol=0)


def test_large_float16_does_not_overflow(device):
    grad = torch.full((3, 256), 6e4, dtype=torch.float16, device=device)
    assert kernel.dct_scores([grad], "l1")[0, 0].item() == pytest.approx(3 * 16 * 6e4, rel=2e-2)


@pytest.mark.parametrize("n", [1, 7, 127, 2 * 67 * 3 * 67, 1 << 14, 5461])
def test_widths_without_a_plan_are_refused(n):
    assert not kernel.supports(n)
    with pytest.raises(ValueError, match=str(n)):
        kernel.dct_scores([torch.zeros(2, n)], "l1")


def test_float64_is_refused():
    assert not kernel.supports(64, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        kernel.dct_scores([torch.zeros(2, 64, dtype=torch.float64)], "l1")


@pytest.mark.parametrize("n", [512, 768, 1024, 1376, 2048, 3072, 4096, 5120, 8192])
def test_usual_widths_have_a_plan(n):
    assert kernel.supports(n)


def test_tables_are_kept_and_bounded(device, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", 2)
    monkeypatch.setattr(tables, "_tables", type(tables._tables)())
    a, b, c = (torch.zeros(2, device=device) for _ in range(3))
    pair, other = tables.addresses([a, b]), tables.addresses([b, a])
    table = tables.tables(a.device, pair, other)
    assert [row.tolist() for row in table] == [pair, other]
    assert tables.tables(a.device, pair, other) is table
    assert [row.tolist() for row in tables.tables(a.device, other)] == [other]
    assert tables.tables(a.device, pair, other) is table
    tables.tables(a.device, tables.addresses([c]))
    assert len(tables._tables) == 2
    assert tables.tables(a.device, pair, other) is table


def test_tables_of_any_length_start_where_wide_loads_can(device):
    numbers = [1 << 40, -3, 5]
    for row in tables.tables(torch.empty(0, device=device).device, numbers, numbers[::-1]):
        assert row[:3].tolist() in (numbers, numbers[::-1])
        assert row.data_ptr() % 16 == 0
