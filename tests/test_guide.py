"""The second product of a pass, beside the table of programs: what it refuses, NaN, and where it must not reach."""

from __future__ import annotations

import math

import pytest
import support
import torch

from flashpair import Axis, Guide, Mask, Precision, Reduction, Term, pair_reduce, pair_sum
from flashpair.panels import float32_products

THRESHOLD = Term(Reduction.LOGSUMEXP, below=0.5, guide=Guide.THRESHOLD)
WEIGHT = Term(Reduction.SUM, guide=Guide.WEIGHT)


def _precise(backend: str) -> torch.dtype:
    return torch.float64 if support.serves(backend, torch.float64) else torch.float32


def test_a_guide_by_hand(backend):
    """Thresholds, weights and logits of three rows and two columns."""
    at = {"dtype": _precise(backend), "device": support.device(backend)}
    x, y = torch.tensor([[1.0], [2.0], [3.0]], **at), torch.tensor([[1.0], [10.0]], **at)
    u, v = torch.tensor([[0.0], [1.0], [-1.0]], **at), torch.tensor([[1.0], [0.25]], **at)
    terms = [
        Term(Reduction.SUM, below=0.5, guide=Guide.THRESHOLD),  # t: 0 0 | 1 1/4 | -1 -1/4
        Term(Reduction.SUM, guide=Guide.WEIGHT),
        Term(Reduction.LOGSUMEXP, scale=0.0, guide=Guide.WEIGHT),
        Term(Reduction.SOFTMAX_MEAN, scale=math.log(4) / 3 * 4, detach_weights=True, guide=Guide.LOGITS),
    ]
    with support.forced(backend):
        found = pair_reduce(x, y, terms, guide=(u, v))
    # Row 2: t differs by 3/4, so the softmax of scaled t is 4 : 1; row 3: 1 : 4.
    want = [[11, 20, 33], [0, 2 + 5, -3 - 7.5], [-math.inf, math.log(1.25), -math.inf], [5.5, (8 + 20) / 5, 123 / 5]]
    for got, value in zip(found, want, strict=True):
        torch.testing.assert_close(got.cpu().double(), torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_nan_in_a_guide_reaches_its_rows(side, backend):
    """A NaN passes thresholds, so it shows in weights; rows that it has no part in are as before."""
    at = {"dtype": _precise(backend), "device": support.device(backend)}
    x, u = torch.randn(20, 5, **at), torch.rand(20, 3, **at)
    y, v = (None, None) if side == "self" else (torch.randn(18, 5, **at), torch.rand(18, 3, **at))
    bad = u.clone()
    bad[4, 1] = math.nan
    with support.forced(backend):
        run = lambda u: pair_reduce(x, y, [WEIGHT, THRESHOLD], guide=u if v is None else (u, v))  # noqa: E731
        good, found = run(u), run(bad)
    assert found[0][4].isnan()
    others = torch.arange(20) != 4
    assert found[0][others].isnan().all() if side == "self" else torch.equal(found[0][others], good[0][others])
    assert found[1][4].isfinite()  # kept, with a weight of its own


@pytest.mark.parametrize("option", ["pair_mask", "exclude"])
def test_a_guide_of_pairs_in_one_direction(option, backend):
    """A mask or excluded columns that are not symmetric make a self-similarity a rectangle, its guide too."""
    at = {"dtype": _precise(backend), "device": support.device(backend)}
    x, u = torch.randn(7, 4, **at).requires_grad_(), torch.rand(7, 3, **at)
    mask, order = torch.rand(7, 7, device=at["device"]) < 0.5, torch.arange(7, device=at["device"])
    given = {"pair_mask": mask} if option == "pair_mask" else {"exclude": (order + 1) % 7, "exclude_self": False}
    rectangle = {"pair_mask": mask, "exclude": order} if option == "pair_mask" else given | {"exclude_self": None}
    terms = [Term(Reduction.SUM, mask=Mask.GIVEN if option == "pair_mask" else Mask.ALL, guide=Guide.WEIGHT)]
    with support.forced(backend):
        calls = pair_reduce(x, None, terms, guide=u, **given), pair_reduce(x, x, terms, guide=(u, u), **rectangle)
        (found, slopes), (want, expected) = (
            (v, torch.autograd.grad((v * torch.arange(1.0, 8, **at)).sum(), x)[0]) for (v,) in calls
        )
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_a_guide(backend):
    at = {"dtype": _precise(backend), "device": support.device(backend)}
    x, u = torch.randn(6, 4, **at).requires_grad_(), torch.rand(6, 4, **at).requires_grad_()
    with support.forced(backend):
        total = pair_sum(x, terms=[WEIGHT], guide=u)
        grads = torch.autograd.grad(total, [x, u], allow_unused=True)
    assert grads[0] is not None and grads[1] is None


def test_a_float32_guide_beside_narrow_embeddings(backend):
    """Its products are not rounded to the dtype of the embeddings, nor to what the process allows on a GPU."""
    if not support.serves(backend, torch.bfloat16):
        pytest.skip(f"{backend} does not serve bfloat16")
    device = support.device(backend)
    x = torch.ones(17, 4, dtype=torch.bfloat16, device=device)
    u = 1 + torch.arange(17, device=device, dtype=torch.float32)[:, None] / 4096  # bfloat16 knows none of these
    with support.forced(backend), float32_products(u, Precision.TF32):
        (found,) = pair_reduce(x, x.clone(), [WEIGHT], guide=(u, torch.ones_like(u)))
    torch.testing.assert_close(found, 4 * 17 * u[:, 0], rtol=1e-5, atol=0)


X, U = torch.randn(4, 3), torch.randn(4, 2)
BAD = [
    (lambda: pair_reduce(X, terms=[THRESHOLD]), ValueError, r"terms\[0\].guide is THRESHOLD, which needs the guide"),
    (lambda: pair_reduce(X, terms=[Term(Reduction.SUM)], guide=U), ValueError, "no term has a guide"),
    (lambda: pair_reduce(X, terms=[WEIGHT], guide=(U, U)), TypeError, r"a tensor \(B, E\), as y is None; got tuple"),
    (lambda: pair_reduce(X, X, [WEIGHT], guide=U), TypeError, "a tuple of tensors .* as y is given; got Tensor"),
    (lambda: pair_reduce(X, X, [WEIGHT], guide=(U,)), TypeError, "got tuple of length 1"),
    (lambda: pair_reduce(X, terms=[WEIGHT], guide=U[:3]), ValueError, r"guide must be a tensor with 4 rows; got shape"),
    (lambda: pair_reduce(X, X, [WEIGHT], guide=(U, U[:2])), ValueError, r"guide\[1\] must be a tensor with 4 rows"),
    (lambda: pair_reduce(X, X, [WEIGHT], guide=(U, X)), ValueError, "guide must be two tensors of one width and dtype"),
    (lambda: pair_reduce(X, terms=[WEIGHT], guide=U.double()), TypeError, "guide must be torch.float32 beside"),
    (lambda: pair_reduce(X, terms=[WEIGHT], guide=U.bfloat16()), TypeError, "guide must be torch.float32 beside"),
    (lambda: pair_reduce(X, terms=[WEIGHT], guide=U, pairs=(X[:, 0].long(), X[:, 0].long())), ValueError, "guide"),
    (lambda: pair_reduce(X, terms=[Term(Reduction.SUM, guide=1)], guide=U), TypeError, r"terms\[0\].guide must be"),
    (
        lambda: pair_reduce(X, terms=[Term(Reduction.SUM, guide=Guide.THRESHOLD)], guide=U), ValueError,
        r"needs terms\[0\].above or terms\[0\].below; got neither",
    ),
    (
        lambda: pair_reduce(X, terms=[Term(Reduction.LOGSUMEXP, guide=Guide.LOGITS)], guide=U), ValueError,
        "needs reduction=SOFTMAX_MEAN and detach_weights=True; got LOGSUMEXP and False",
    ),
    (
        lambda: pair_reduce(X, terms=[Term(Reduction.COUNT, guide=Guide.WEIGHT)], guide=U), ValueError,
        "guide is WEIGHT, which COUNT does not have",
    ),
    (
        lambda: pair_reduce(X, X, [Term(Reduction.SUM, axis=Axis.COLUMNS, weight=torch.ones(4, requires_grad=True),
                                        guide=Guide.WEIGHT)], guide=(U, U)),
        ValueError, r"terms\[0\].weight must take no gradient",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
