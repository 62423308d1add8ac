"""Losses in closed form: values as defined, slopes as autograd finds them, in every backend that has its own."""

from __future__ import annotations

import math

import pytest
import support
import torch

import flashpair
from flashpair import Mask, Reduction, Term, backend_cpu, dispatch
from flashpair.formulas import (
    CIRCLE,
    FORMULAS,
    MEAN_GAP,
    MEAN_GAP_OF_BOTH,
    MEAN_OF_PAIRS,
    MEANS_OF_PAIRS,
    MULTI_SIMILARITY,
    SUP_CON,
    TRIPLET,
    Average,
)
from flashpair.losses import ClipLoss, InfoNCELoss, SimCLRLoss
from flashpair.primitives import pair_loss

#: Formulas of anchors and what follows the average among their constants.
OF_ANCHORS = [
    (SUP_CON, (0.0,)), (SUP_CON, (1.0,)), (MULTI_SIMILARITY, (2.0, 50.0)), (CIRCLE, ()), (TRIPLET, (1.0, 0.2, 0.0)),
    (TRIPLET, (-1.0, 0.2, 1.0)),
]  # fmt: skip
#: Average, slots of rows and of columns, owners.
AVERAGES = [
    (Average.SUM, 2, 0, 7), (Average.MEAN, 3, 1, 1030), (Average.ABOVE_ZERO, 2, 0, 1024),
    (Average.ABOVE_ZERO, 6, 5, 2500), (Average.MEAN, 2, 0, 0), (Average.ABOVE_ZERO, 2, 0, 0),
]  # fmt: skip
#: Formula, constants, slots of rows and of columns, owners: less than a vector, more than a block, further slots, none.
CASES = [
    (MEAN_GAP_OF_BOTH, (), 2, 1, 7), (MEAN_GAP, (), 2, 0, 1), (MEAN_GAP_OF_BOTH, (), 2, 1, 1024),
    (MEAN_GAP_OF_BOTH, (), 7, 6, 2500), (MEAN_GAP, (), 3, 6, 1030), (MEAN_GAP_OF_BOTH, (), 2, 1, 0),
    (MEAN_GAP, (), 3, 0, 0), (MEAN_OF_PAIRS, (), 1, 0, 7), (MEAN_OF_PAIRS, (), 3, 1, 1030),
    (MEAN_OF_PAIRS, (), 1, 0, 0), (MEANS_OF_PAIRS, (), 2, 0, 1024), (MEANS_OF_PAIRS, (), 5, 2, 2500),
    *[(formula, (float(average), *constants), *sizes)
      for formula, constants in OF_ANCHORS for average, *sizes in AVERAGES],
]  # fmt: skip
every_case = pytest.mark.parametrize(
    ("formula", "constants", "row_slots", "column_slots", "owners"), CASES, ids=lambda v: getattr(v, "name", None)
)


def _statistics(formula, row_slots: int, column_slots: int, owners: int, dtype=torch.float64) -> list:
    """Rows, columns and counts, of which some are 0."""
    generator = torch.Generator().manual_seed(owners)
    # Gaps from where e^-|gap| vanishes to where it is 1.
    made = [torch.randn(slots, owners, generator=generator, dtype=torch.float64) for slots in (row_slots, column_slots)]
    if formula.anchors is not None:  # what float32 does not tell from 0 is not above it
        made[0].clamp_(-1.1, 1.1)
    counts = torch.randint(4, (formula.counts, owners), generator=generator).to(dtype) if formula.counts else None
    return [*[(30 * side**3).to(dtype) for side in made], counts]


def _implementations(formula, dtype):
    """(name, slopes, device) of each."""
    found = [("torch", formula.slopes, "cpu")]
    for name in support.FUSED:
        device = support.device(name)
        own = getattr(dispatch.named(name).load(), "FORMULAS", {}).get(formula.name)
        if own is not None and not dispatch.named(name).why_not(torch.empty(1, 1, dtype=dtype, device=device)):
            found.append((name, own, device))
    return found


def _on(device: str, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def test_mean_gap_is_a_cross_entropy():
    """Softmax over the others and the own logit, written out."""
    others, own = [[0.3, -1.2], [2.0, 0.5], [-0.4, 0.1]], [1.0, -0.7, 0.2]
    wanted = 0.0
    for logits, o in zip(others, own, strict=True):
        wanted -= math.log(math.exp(o) / (math.exp(o) + sum(map(math.exp, logits)))) / len(own)
    log_sums = torch.tensor(others, dtype=torch.float64).logsumexp(1)
    assert float(MEAN_GAP.value(log_sums, torch.tensor(own, dtype=torch.float64))) == pytest.approx(wanted, rel=1e-14)


def _written_out(formula, rows, counts, constants) -> float:
    """The definitions, an anchor at a time, in Python's floats."""
    losses = []
    for i in range(rows.shape[1]):
        a, b = (float(v) for v in rows[:2, i])
        if formula is MULTI_SIMILARITY:
            alpha, beta = constants[1:]
            losses.append(math.log1p(math.exp(a)) / alpha + math.log1p(math.exp(b)) / beta)
            continue
        if formula is TRIPLET:
            sign, margin, smooth = constants[1:]
            violation = sign * (b - a) + margin
            value = math.log1p(math.exp(violation)) if smooth else max(violation, 0.0)
            losses.append(value if float(counts[0, i]) else 0.0)
            continue
        positives, others = (float(v) for v in counts[:, i])
        other = any(float(n) > 0 for n in counts[1]) or constants[1] if formula is SUP_CON else others > 0
        kept = positives > 0 and other
        value = a - b / max(positives, 1) if formula is SUP_CON else math.log1p(math.exp(a + b))
        losses.append(value if kept else 0.0)
    if constants[0] == Average.SUM:
        return sum(losses)
    chosen = [loss for loss in losses if loss > 0] if constants[0] == Average.ABOVE_ZERO else losses
    return sum(chosen) / max(len(chosen), 1)


@pytest.mark.parametrize("average", list(Average))
@pytest.mark.parametrize(("formula", "constants"), OF_ANCHORS, ids=lambda v: getattr(v, "name", None))
def test_losses_of_anchors_written_out(formula, constants, average):
    rows, _, counts = _statistics(formula, 2, 0, 40)
    rows, constants = rows.clamp(-20, 20), (float(average), *constants)
    wanted = _written_out(formula, rows, counts, constants)
    assert float(formula.value(*rows, *(() if counts is None else counts), *constants)) == pytest.approx(wanted)
    for name, slopes, device in _implementations(formula, torch.float64):
        assert float(slopes(*_on(device, rows, rows[:0], counts), constants)[0]) == pytest.approx(wanted), name


@pytest.mark.parametrize("alone", [False, True])
def test_a_batch_of_one_class(alone):
    """pytorch-metric-learning's loss is 0 where no anchor has a negative, and no anchor needs one of its own."""
    rows, counts = torch.tensor([[2.0, 3.0], [0.5, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    constants = float(Average.MEAN), float(alone)
    for others, wanted in ((0.0, (1.5 + 2.5) / 2 if alone else 0.0), (1.0, (1.5 + 2.5) / 2)):
        counts[1, 0] = others
        assert float(SUP_CON.value(*rows, *counts, *constants)) == wanted
        for name, slopes, device in _implementations(SUP_CON, torch.float32):
            found, of_rows, _ = slopes(*_on(device, rows, rows[:0], counts), constants)
            assert float(found) == wanted and bool(of_rows.count_nonzero()) == bool(wanted), name


def test_means_of_pairs_written_out():
    rows, _, counts = _statistics(MEANS_OF_PAIRS, 2, 0, 9)
    counts[1] = 0  # no pair: the sum over nothing
    rows[1] = 0
    assert float(MEANS_OF_PAIRS.value(*rows, *counts)) == pytest.approx(float(rows[0].sum()) / int(counts[0].sum()))


@every_case
def test_slopes_are_those_of_autograd(formula, constants, row_slots, column_slots, owners):
    rows, columns, counts = _statistics(formula, row_slots, column_slots, owners)
    rows, columns = rows.requires_grad_(), columns.requires_grad_()
    read = [*rows[: formula.reads], *columns[: formula is MEAN_GAP_OF_BOTH], *(() if counts is None else counts)]
    loss = formula.value(*read, *constants)
    wanted = [loss, *torch.autograd.grad(loss, (rows, columns), allow_unused=True)]
    wanted = [torch.zeros_like(s) if g is None else g for s, g in zip((loss, rows, columns), wanted, strict=True)]
    with torch.no_grad():
        found = formula.slopes(rows, columns, counts, constants)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_every_implementation(formula, constants, row_slots, column_slots, owners, dtype):
    statistics = _statistics(formula, row_slots, column_slots, owners, dtype)
    wanted = formula.slopes(*(None if s is None else s.double() for s in statistics), constants)
    eps = torch.finfo(dtype).eps
    for name, slopes, device in _implementations(formula, dtype):
        found = slopes(*_on(device, *statistics), constants)
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
        alone, of_rows, _ = (t.cpu() for t in slopes(*_on(device, rows, columns), None, ()))
        assert float(alone) == pytest.approx((math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.5))) / 3), name
        assert float(of_rows[0, 0]) == 0 and bool((of_rows[:, 1:] != 0).all()), name
    for name, slopes, device in _implementations(MEAN_GAP_OF_BOTH, dtype):
        loss, of_rows, of_columns = (t.cpu() for t in slopes(*_on(device, rows, columns), None, ()))
        assert loss.isnan() and of_columns.isnan().tolist() == [[False, True, False]], name
        assert of_rows.isnan().tolist() == [[False] * 3, [False, True, False]], name


@pytest.mark.parametrize("average", list(Average))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_that_lack_something_and_nan(dtype, average):
    """Log-sums over nothing are no loss where the anchor is left out, or both are softplus of -inf; NaN is not 0."""
    nothing, nan = -torch.inf, torch.nan
    rows = torch.tensor([[nothing, 1.0, nan, 2.0], [nothing, nothing, 0.5, 0.25]], dtype=dtype)
    counts = torch.tensor([[0.0, 1.0, 1.0, 2.0], [3.0, 0.0, 2.0, 2.0]], dtype=dtype)
    for formula, constants in ((SUP_CON, (0.0,)), (MULTI_SIMILARITY, (2.0, 50.0)), (CIRCLE, ())):
        for given in (rows, rows.nan_to_num(nan=1.0, neginf=nothing)):
            for name, slopes, device in _implementations(formula, dtype):
                numbers = counts if formula.counts else None
                found = slopes(*_on(device, given, given[:0], numbers), (float(average), *constants))
                loss, of_rows, _ = (t.cpu() for t in found)
                assert bool(loss.isnan()) == bool(given.isnan().any()), (name, formula.name)
                assert bool((of_rows[:, 0] == 0).all()) and bool((of_rows[:, 3] != 0).all()), (name, formula.name)
                assert not of_rows[:, [0, 1, 3]].isnan().any(), (name, formula.name)
                if formula is CIRCLE:
                    assert bool((of_rows[:, 1] == 0).all()), (name, formula.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("formula", "rows", "columns", "counts", "constants", "complaint"),
    [
        (MEAN_GAP, (1, 9), (0, 9), None, (), "rows of formula 0 must be 2"),
        (MEAN_GAP_OF_BOTH, (2, 9), (0, 9), None, (), "columns of formula 1 must be 1"),
        (MEAN_GAP_OF_BOTH, (2, 9), (1, 4), None, (), "columns of formula 1 must be 1"),
        (SUP_CON, (2, 9), (0, 9), None, (1.0, 0.0), "counts of formula 2 must be 2"),
        (SUP_CON, (2, 9), (0, 9), (1, 9), (1.0, 0.0), "counts of formula 2 must be 2"),
        (CIRCLE, (2, 9), (0, 9), (2, 8), (1.0,), "counts of formula 4 must be 2"),
        (MULTI_SIMILARITY, (2, 9), (0, 9), None, (1.0, 2.0), "too few constants"),
        (MEANS_OF_PAIRS, (2, 9), (0, 9), (1, 9), (), "counts of formula 6 must be 2"),
        (TRIPLET, (2, 9), (0, 9), None, (0.0, 1.0, 0.1, 0.0), "counts of formula 7 must be 1"),
    ],
)
def test_one_operator_refuses_what_is_not_there(formula, rows, columns, counts, constants, complaint, dtype):
    """Instead of reading past the end."""
    if backend_cpu.unavailable():
        pytest.skip("; ".join(backend_cpu.unavailable()))
    number, given = list(FORMULAS).index(formula.name), [torch.zeros(s, dtype=dtype) for s in (rows, columns)]
    numbers = None if counts is None else torch.zeros(counts, dtype=dtype)
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.flashpair_cpu.formula(number, *given, numbers, list(constants))
    with pytest.raises(RuntimeError, match="none of number 8"):
        torch.ops.flashpair_cpu.formula(8, *given, numbers, list(constants))
    for wrong in (given[0].half(), given[0].double() if dtype == torch.float32 else given[0].float()):
        with pytest.raises(RuntimeError, match="of one type"):
            torch.ops.flashpair_cpu.formula(number, wrong, given[1], numbers, list(constants))
    with pytest.raises(RuntimeError, match="contiguous"):
        twice = torch.zeros(rows[0], 2 * rows[1], dtype=dtype)[:, ::2]
        torch.ops.flashpair_cpu.formula(number, twice, given[1], numbers, list(constants))
    if numbers is not None:  # of another dtype
        with pytest.raises(RuntimeError, match="counts"):
            torch.ops.flashpair_cpu.formula(number, *given, torch.zeros(formula.counts, 9).half(), [1.0, 2.0, 3.0])


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
