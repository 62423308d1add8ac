"""The dense reference against loops over pairs, written from the definitions in `flashpair.terms`."""

from __future__ import annotations

import itertools
import math

import pytest
import support
import torch

import flashpair
from flashpair import (
    Axis,
    Combine,
    Extreme,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    mine,
    pair_reduce,
    reference,
    use_backend,
)

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


# --- the definition, one pair at a time -------------------------------------------------------------------------------


def similarity(a: list[float], b: list[float], kind: Similarity, normalize: bool) -> float:
    if normalize:
        a, b = ([v / max(math.sqrt(sum(u * u for u in w)), 1e-12) for v in w] for w in (a, b))
    if kind == Similarity.DOT:
        return sum(u * v for u, v in zip(a, b, strict=True))
    squared = sum((u - v) ** 2 for u, v in zip(a, b, strict=True))
    return squared if kind == Similarity.SQUARED_EUCLIDEAN else math.sqrt(squared)


def score(kind: Score, z: float, c: float) -> float:
    return {
        Score.IDENTITY: lambda: z,
        Score.HINGE: lambda: max(z, 0.0),
        Score.SOFTPLUS: lambda: max(z, 0.0) + math.log1p(math.exp(-abs(z))),
        Score.SQUARE: lambda: z**2,
        Score.SQUARED_HINGE: lambda: max(z, 0.0) ** 2,
        Score.CIRCLE: lambda: max(z + c, 0.0) * (z - c),
        Score.SOFTCAP: lambda: c * math.tanh(z / c),
        Score.LOG_COSH: lambda: math.log(math.cosh(z)),
    }[kind]()


def logaddexp(a: float, b: float) -> float:
    top = max(a, b)
    return top if top == -INF else top + math.log(math.exp(a - top) + math.exp(b - top))


def kept(data, i: int, j: int, mask: Mask, exclude_self: bool, exclude) -> bool:
    """Whether pair (row i, column j) is seen."""
    columns = data.labels if data.ref_labels is None else data.ref_labels
    same = int(data.labels[i]) == int(columns[j])
    given = bool(data.pair_mask[i, j])
    inside = {
        Mask.ALL: True,
        Mask.SAME: same,
        Mask.DIFFERENT: not same,
        Mask.GIVEN: given,
        Mask.NOT_GIVEN: not given,
    }[mask]
    return inside and not (exclude_self and i == j) and not (exclude is not None and int(exclude[i]) == j)


def at(value, index: int, absent: float) -> float:
    if value is None:
        return absent
    if not isinstance(value, torch.Tensor):
        return float(value)
    return float(value if value.dim() == 0 else value[index])


def statistic(term: Term, data, owner: int, kind: Similarity, normalize: bool, exclude_self: bool, exclude):
    """The value of one owner: a float, or five for the moments."""
    y = data.x if data.y is None else data.y
    rows = term.axis == Axis.ROWS
    found = []  # (s, w, score)
    for other in range(y.shape[0] if rows else data.x.shape[0]):
        i, j = (owner, other) if rows else (other, owner)
        s = similarity(data.x[i].tolist(), y[j].tolist(), kind, normalize)
        if not kept(data, i, j, term.mask, exclude_self, exclude):
            continue
        if not at(term.above, owner, -INF) < s < at(term.below, owner, INF):
            continue
        p, q = at(term.offset, owner, 0.0), at(term.other_offset, other, 0.0)
        offset = p
        if term.other_offset is not None:
            offset = p + q if term.combine == Combine.ADD else logaddexp(p, q)
        z = at(term.scale, owner, 1.0) * s + offset
        found.append((s, at(term.weight, other, 1.0), score(term.score, z, term.constant)))
    if term.reduction == Reduction.SUM:
        return sum(w * f for _, w, f in found)
    if term.reduction == Reduction.COUNT:
        return sum(f > 0 for _, _, f in found)
    if term.reduction == Reduction.MOMENTS:
        if not found:
            return [0.0, 0.0, 0.0, INF, -INF]
        values = [s for s, _, _ in found]
        mean = sum(values) / len(values)
        return [len(values), mean, sum((v - mean) ** 2 for v in values) / len(values), min(values), max(values)]
    if term.reduction == Reduction.MAX:
        return max((f for _, _, f in found), default=-INF)
    total = sum(w * math.exp(f) for _, w, f in found)
    if term.reduction == Reduction.LOGSUMEXP:
        return math.log(total) if total > 0 else -INF
    return sum(w * math.exp(f) * s for s, w, f in found) / total if total > 0 else 0.0


def check(terms, data, kind=Similarity.DOT, normalize=False, exclude_self=None, exclude=None, pair_mask=True):
    got = pair_reduce(
        **data.pairs,
        terms=terms,
        pair_mask=data.pair_mask if pair_mask else None,
        exclude_self=exclude_self,
        exclude=exclude,
        similarity=kind,
        normalize=normalize,
    )
    drop = data.y is None if exclude_self is None else exclude_self
    for term, values in zip(terms, got, strict=True):
        owners = data.x.shape[0] if term.axis == Axis.ROWS or data.y is None else data.y.shape[0]
        want = [statistic(term, data, o, kind, normalize, drop, exclude) for o in range(owners)]
        want = torch.tensor(want, dtype=torch.float64).reshape(owners, -1).T.reshape(values.shape)
        torch.testing.assert_close(values, want, rtol=1e-12, atol=1e-12, msg=lambda m, t=term: f"{t}\n{m}")


SIDES = [pytest.param((7, 5), id="rectangular"), pytest.param((6, None), id="self")]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("reduction", Reduction)
def test_every_score_mask_and_similarity(sides, axis, reduction):
    data = support.make(*sides, 3)
    for kind, mask, score_kind in itertools.product(Similarity, Mask, Score):
        check([Term(reduction, score_kind, mask, axis, offset=-0.3, constant=0.25)], data, kind)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("reduction", Reduction)
def test_every_parameter(sides, axis, reduction):
    data = support.make(*sides, 4, seed=1)
    own, other = ("row", "column") if axis == Axis.ROWS else ("column", "row")
    vector = lambda side, name: getattr(data, f"{side}_{name}")  # noqa: E731
    base = {"reduction": reduction, "axis": axis}
    scale, offset = vector(own, "scale"), vector(own, "offset")
    far, weight = vector(other, "offset"), vector(other, "weight")
    zeros = weight.clone()
    zeros[::2] = 0
    options = [
        {"scale": 3.0},
        {"scale": data.scale, "offset": data.bias},
        {"scale": scale, "offset": offset},
        {"offset": offset, "other_offset": far},
        {"offset": offset, "other_offset": far, "combine": Combine.LOGADDEXP},
        {"offset": 0.5, "other_offset": far, "combine": Combine.LOGADDEXP},
        {"weight": weight},
        {"weight": zeros},
        {"above": 0.1},
        {"below": torch.tensor(0.2, dtype=torch.float64)},
        {"above": offset - 0.5, "below": offset + 0.5},
        {"detach_weights": True, "weight": weight, "scale": 2.0},
    ]
    for option in options:
        for normalize in (False, True):
            check([Term(**base, **option)], data, normalize=normalize)


@pytest.mark.parametrize("reduction", Reduction)
def test_self_pairs_and_excluded_columns(reduction):
    square, rectangle = support.make(6, None, 3), support.make(5, 8, 3)
    for axis in Axis:
        terms = [Term(reduction, axis=axis), Term(reduction, mask=Mask.SAME, axis=axis)]
        check(terms, square, exclude_self=True)
        check(terms, square, exclude_self=False)
        check(terms, square, exclude=square.exclude)
        check(terms, rectangle, exclude=rectangle.exclude)


def test_thresholds_are_strict():
    x, y = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    terms = [Term(Reduction.SUM, above=1.0), Term(Reduction.SUM, below=3.0), Term(Reduction.SUM, above=1.0, below=3.0)]
    assert [float(v) for v in pair_reduce(x, y, terms)] == [5.0, 3.0, 2.0]


def test_count_needs_a_positive_score():
    x, y = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    scores = (Score.IDENTITY, Score.HINGE, Score.SQUARE, Score.SOFTPLUS)
    counts = pair_reduce(x, y, [Term(Reduction.COUNT, s) for s in scores])
    assert [float(c) for c in counts] == [1.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("columns", [0, 3])
def test_empty_rows(columns):
    x, y = torch.ones(2, 2, dtype=torch.float64), torch.ones(columns, 2, dtype=torch.float64)
    got = pair_reduce(x, y, [Term(r, above=INF if columns else None) for r in Reduction])
    assert [v[..., 0].tolist() for v in got] == [0.0, 0.0, -INF, 0.0, [0.0, 0.0, 0.0, INF, -INF], -INF]


def test_empty_rows_have_zero_gradients():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for reduction in (Reduction.SUM, Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN):
        (out,) = pair_reduce(x, terms=[Term(reduction, mask=Mask.SAME, scale=scale)], labels=torch.arange(3))
        for gradient in torch.autograd.grad(out.sum(), (x, scale)):
            assert gradient.eq(0).all()


@pytest.mark.parametrize("reduction", [r for r in Reduction if r != Reduction.COUNT])
def test_nan_shows(reduction):
    data = support.make(4, 3, 2)
    data.x[1, 0] = NAN
    (values,) = pair_reduce(data.x, data.y, [Term(reduction)])
    if reduction == Reduction.MOMENTS:
        values = values[1]
    assert values.isnan().tolist() == [False, True, False, False]
    (values,) = pair_reduce(data.x, data.y, [Term(reduction, above=0.0, below=1.0)])
    assert (values[1] if reduction == Reduction.MOMENTS else values)[1].isnan()


def test_nan_threshold_keeps_the_pair():
    (total,) = pair_reduce(torch.ones(2, 1), torch.ones(1, 1), [Term(Reduction.SUM, above=torch.tensor([NAN, 2.0]))])
    assert total.tolist() == [1.0, 0.0]


def test_softplus_is_exact_for_large_arguments():
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    (value,) = pair_reduce(x, x.detach(), [Term(Reduction.SUM, Score.SOFTPLUS, offset=20.0)])
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.item() == pytest.approx(21 + math.log1p(math.exp(-21)), rel=1e-15)
    assert slope.item() == pytest.approx(1 / (1 + math.exp(-21)), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_scores_keep_their_digits(dtype):
    support.check_scores("reference", dtype)


def test_half_precision_is_accumulated_wide_even_under_autocast():
    data = support.make(6, 5, 64, precision=torch.bfloat16)
    (want,) = pair_reduce(data.x, data.y, [Term(Reduction.LOGSUMEXP)])
    x, y = data.x.bfloat16(), data.y.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in ((x, y), (x.float(), y.float())):
            (got,) = pair_reduce(a, b, [Term(Reduction.LOGSUMEXP)])
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


# --- extremes ---------------------------------------------------------------------------------------------------------


def best(extreme: Extreme, data, i: int, exclude_self: bool, exclude) -> tuple[list[float], list[int]]:
    """(values, columns) of row i by sorting all its candidates."""
    y = data.x if data.y is None else data.y
    found = []
    for j in range(y.shape[0]):
        s = similarity(data.x[i].tolist(), y[j].tolist(), Similarity.DOT, False)
        low, high = at(extreme.above, i, -INF), at(extreme.below, i, INF)
        inside = (extreme.above is None or not s <= low) and (extreme.below is None or not s >= high)
        if kept(data, i, j, extreme.mask, exclude_self, exclude) and inside:
            rank = INF if math.isnan(s) else s if extreme.largest else -s
            found.append((-rank, j, s))
    found = sorted(found)[: extreme.k]
    missing = [(0.0, -1, -INF if extreme.largest else INF)] * (extreme.k - len(found))
    return [s for _, _, s in found + missing], [j for _, j, _ in found + missing]


def check_mine(extremes, data, exclude=None):
    got = mine(**data.pairs, extremes=extremes, pair_mask=data.pair_mask, exclude=exclude)
    for extreme, found in zip(extremes, got, strict=True):
        for i in range(data.x.shape[0]):
            values, columns = best(extreme, data, i, data.y is None, exclude)
            assert found.indices[i].tolist() == columns, extreme
            torch.testing.assert_close(
                found.values[i], torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("sides", SIDES)
def test_mine(sides, largest):
    data = support.make(*sides, 3)
    for mask, k in itertools.product(Mask, (1, 2, 5)):
        thresholds = ({}, {"above": 0.0}, {"below": data.row_offset}, {"above": -0.3, "below": data.bias + 0.7})
        check_mine([Extreme(mask, largest, k, **t) for t in thresholds], data)
    check_mine([Extreme(Mask.ALL, largest, 2)], data, exclude=data.exclude)


def test_mine_ties_go_to_the_lowest_column():
    y = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]])
    (low, high) = mine(torch.ones(1, 1), y, [Extreme(largest=False, k=4), Extreme(k=3)])
    assert low.indices.tolist() == [[0, 2, 4, 1]] and high.indices.tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("largest", [True, False])
def test_mine_with_nan_and_infinities(largest):
    data = support.make(5, 5, 1)
    data.x[:] = 1.0
    data.x[1] = -1.0
    data.y[:] = torch.tensor([[INF], [1.0], [NAN], [-INF], [2.0]], dtype=torch.float64)
    check_mine([Extreme(m, largest, 5) for m in (Mask.ALL, Mask.SAME, Mask.GIVEN)], data)


def test_mine_with_more_wanted_than_there_are():
    data = support.make(3, None, 2, labels="distinct")
    found, none = mine(data.x, extremes=[Extreme(k=3), Extreme(Mask.SAME, k=2)], labels=data.labels)
    assert (found.indices >= 0).sum(1).tolist() == [2, 2, 2]
    assert none.indices.eq(-1).all() and none.values.eq(-INF).all()
    (empty,) = mine(data.x, data.x[:0], [Extreme(k=2, largest=False)])
    assert empty.indices.eq(-1).all() and empty.values.eq(INF).all() and empty.values.shape == (3, 2)


# --- slopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity_kind", Similarity)
@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN])
def test_gradcheck(reduction, similarity_kind):
    data = support.make(4, 3, 2).to(torch.float64)
    for axis, score_kind in itertools.product(Axis, [s for s in Score if s != Score.CIRCLE]):
        own, other = ("row", "column") if axis == Axis.ROWS else ("column", "row")
        parameters = [getattr(data, f"{own}_scale"), getattr(data, f"{own}_offset")]
        parameters += [getattr(data, f"{other}_offset"), getattr(data, f"{other}_weight")]

        def loss(x, y, a, p, q, w, axis=axis, score_kind=score_kind):
            term = Term(
                reduction,
                score_kind,
                axis=axis,
                scale=a,
                offset=p,
                other_offset=q,
                weight=w,
                combine=Combine.LOGADDEXP,
                constant=0.25,
            )
            return pair_reduce(x, y, [term], similarity=similarity_kind, normalize=True)[0]

        assert torch.autograd.gradcheck(loss, (data.x, data.y, *parameters))


def test_circle_detaches_its_weight():
    x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    (value,) = pair_reduce(x, one, [Term(Reduction.SUM, Score.CIRCLE, constant=0.25, scale=2.0)])
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.item() == (1 + 0.25) * (1 - 0.25) and slope.item() == (1 + 0.25) * 2


def test_detached_softmax_weights():
    data = support.make(3, 4, 2).to(torch.float64)
    (mean,) = pair_reduce(data.x, data.y, [Term(Reduction.SOFTMAX_MEAN, scale=data.scale, detach_weights=True)])
    (gradient,) = torch.autograd.grad(mean.sum(), data.x)
    p = (data.scale * data.x @ data.y.T).softmax(1).detach()
    torch.testing.assert_close(gradient, p @ data.y, rtol=1e-12, atol=1e-12)


def test_twins_of_losses_and_miners():
    """`flashpair.reference.<Name>` is the dense twin: same class name, its passes on the reference backend only."""
    x, labels = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 7
    seen = []
    dense = reference.pair_reduce

    def spy(request):
        seen.append(request)
        return dense(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "pair_reduce", spy)
        twin = reference.MultiSimilarityLoss()(x, labels, reference.MultiSimilarityMiner()(x, labels))
    loss = flashpair.losses.MultiSimilarityLoss()(x, labels, flashpair.miners.MultiSimilarityMiner()(x, labels))
    torch.testing.assert_close(twin, loss)
    assert seen and reference.MultiSimilarityLoss.__name__ == "MultiSimilarityLoss"
    assert isinstance(reference.MultiSimilarityLoss(), flashpair.losses.MultiSimilarityLoss)
    with pytest.raises(AttributeError, match="NoSuchLoss"):
        reference.NoSuchLoss  # noqa: B018
