"""Losses in closed form: values as defined, slopes as autograd finds them, in every backend that has its own."""

from __future__ import annotations

import math

import pytest
import support
import torch

import flashpair
from flashpair import Mask, Reduction, Term, backend_cpu, dispatch
from flashpair.formulas import FORMULAS, MEAN_GAP, MEAN_GAP_OF_BOTH
from flashpair.losses import ClipLoss, InfoNCELoss, SimCLRLoss
from flashpair.primitives import pair_loss

#: Formula, slots of rows and of columns, owners: less than a vector, more than a block, further slots, nobody.
CASES = [
    (MEAN_GAP_OF_BOTH, 2, 1, 7), (MEAN_GAP, 2, 0, 1), (MEAN_GAP_OF_BOTH, 2, 1, 1024), (MEAN_GAP_OF_BOTH, 7, 6, 2500),
    (MEAN_GAP, 3, 6, 1030), (MEAN_GAP_OF_BOTH, 2, 1, 0), (MEAN_GAP, 3, 0, 0),
]  # fmt: skip
every_case = pytest.mark.parametrize(
    ("formula", "row_slots", "column_slots", "owners"), CASES, ids=lambda v: getattr(v, "name", None)
)


def _statistics(row_slots: int, column_slots: int, owners: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(owners)
    # Gaps from where e^-|gap| vanishes to where it is 1.
    made = [torch.randn(slots, owners, generator=generator, dtype=torch.float64) for slots in (row_slots, column_slots)]
    return [(30 * side**3).to(dtype) for side in made]


def _implementations(formula, dtype):
    """(name, slopes, device) of each."""
    found = [("torch", formula.slopes, "cpu")]
    for name in support.FUSED:
        device = support.device(name)
        own = getattr(dispatch.named(name).load(), "FORMULAS", {}).get(formula.name)
        if own is not None and not dispatch.named(name).why_not(torch.empty(1, 1, dtype=dtype, device=device)):
            found.append((name, own, device))
    return found


def test_mean_gap_is_a_cross_entropy():
    """Softmax over the others and the own logit, written out."""
    others, own = [[0.3, -1.2], [2.0, 0.5], [-0.4, 0.1]], [1.0, -0.7, 0.2]
    wanted = 0.0
    for logits, o in zip(others, own, strict=True):
        wanted -= math.log(math.exp(o) / (math.exp(o) + sum(map(math.exp, logits)))) / len(own)
    log_sums = torch.tensor(others, dtype=torch.float64).logsumexp(1)
    assert float(MEAN_GAP.value(log_sums, torch.tensor(own, dtype=torch.float64))) == pytest.approx(wanted, rel=1e-14)


@every_case
def test_slopes_are_those_of_autograd(formula, row_slots, column_slots, owners):
    rows, columns = (s.requires_grad_() for s in _statistics(row_slots, column_slots, owners))
    loss = formula.value(rows[0], rows[1], *columns[: formula is MEAN_GAP_OF_BOTH])
    wanted = [loss, *torch.autograd.grad(loss, (rows, columns), allow_unused=True)]
    wanted = [torch.zeros_like(s) if g is None else g for s, g in zip((loss, rows, columns), wanted, strict=True)]
    with torch.no_grad():
        found = formula.slopes(rows, columns)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_every_implementation(formula, row_slots, column_slots, owners, dtype):
    statistics = _statistics(row_slots, column_slots, owners, dtype)
    wanted = formula.slopes(*(s.double() for s in statistics))
    eps = torch.finfo(dtype).eps
    for name, slopes, device in _implementations(formula, dtype):
        found = slopes(*(s.to(device) for s in statistics))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == dtype and a.shape == b.shape, name
            # A column's slope is the sum of two, which may cancel; a float32 gap is rounded before the exponential.
            scale = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a.cpu().double(), b, rtol=64 * eps, atol=8 * eps * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_and_nan(dtype):
    """No other: no loss. A NaN shows in the loss and where it is."""
    rows = torch.tensor([[-torch.inf, 1.0, 2.0], [0.5, 0.5, 0.5]], dtype=dtype)
    columns = torch.tensor([[0.1, torch.nan, 0.3]], dtype=dtype)
    for name, slopes, device in _implementations(MEAN_GAP, dtype):
        alone, of_rows, _ = (t.cpu() for t in slopes(rows.to(device), columns.to(device)))
        assert float(alone) == pytest.approx((math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.5))) / 3), name
        assert float(of_rows[0, 0]) == 0 and bool((of_rows[:, 1:] != 0).all()), name
    for name, slopes, device in _implementations(MEAN_GAP_OF_BOTH, dtype):
        loss, of_rows, of_columns = (t.cpu() for t in slopes(rows.to(device), columns.to(device)))
        assert loss.isnan() and of_columns.isnan().tolist() == [[False, True, False]], name
        assert of_rows.isnan().tolist() == [[False] * 3, [False, True, False]], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "both"), [((1, 9), (0, 9), False), ((2, 9), (0, 9), True), ((2, 9), (1, 4), True)]
)
def test_one_operator_refuses_what_is_not_there(rows, columns, both, dtype):
    """Instead of reading past the end."""
    if backend_cpu.unavailable():
        pytest.skip("; ".join(backend_cpu.unavailable()))
    with pytest.raises(RuntimeError, match="mean_gap: rows must be"):
        torch.ops.flashpair_cpu.mean_gap(torch.zeros(rows, dtype=dtype), torch.zeros(columns, dtype=dtype), both)


def test_names_are_those_of_the_table():
    assert all(formula.name == name for name, formula in FORMULAS.items())
    for backend in support.FUSED:
        assert set(getattr(dispatch.named(backend).load(), "FORMULAS", {})) <= set(FORMULAS)


@pytest.mark.parametrize("loss", [ClipLoss(), InfoNCELoss(), SimCLRLoss()], ids=lambda loss: type(loss).__name__)
def test_a_loss_is_one_node(loss, backend):
    """Behind it come the features, or how two views lie side by side."""
    device = support.device(backend)
    x, y = (torch.randn(9, 5, device=device).requires_grad_() for _ in range(2))
    with flashpair.use_backend(backend):
        found = loss(x, y, 10.0) if isinstance(loss, ClipLoss) else loss(x, y)
        nodes, waiting = set(), [found.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
    names = sorted(node.name() for node in nodes)
    known = {"torch::autograd::AccumulateGrad", "CatBackward0", "DerivativeBackward"}
    if device != "cpu":
        known |= {"MulBackward0"}  # embeddings of a GPU are not looked at
    assert names.count("DerivativeBackward") == 1 and set(names) <= known, names


def test_a_loss_cannot_be_differentiated_twice(backend):
    x = torch.randn(6, 4, device=support.device(backend)).requires_grad_()
    terms = [Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT), Term(Reduction.SUM, mask=Mask.SAME)]
    with flashpair.use_backend(backend):
        loss, *_ = pair_loss(x, None, terms, MEAN_GAP, labels=torch.arange(6, device=x.device) // 2)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


def test_a_cotangent_scales_every_gradient(backend):
    device = support.device(backend)
    x, y = (torch.randn(6, 4, device=device).requires_grad_() for _ in range(2))
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    with flashpair.use_backend(backend):
        once = torch.autograd.grad(ClipLoss()(x, y, scale), (x, y, scale))
        fourfold = torch.autograd.grad(4 * ClipLoss()(x, y, scale), (x, y, scale))
    for a, b in zip(once, fourfold, strict=True):
        torch.testing.assert_close(4 * a, b, rtol=1e-5, atol=1e-7)
