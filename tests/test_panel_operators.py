"""The operators behind row formulas on a CPU: what plain PyTorch makes of the same panel, values and gradients."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import support
import torch

import flashpair
from flashpair import Similarity, backend_cpu, row_reduce, rows, rows_cpu
from flashpair.losses import (
    DynamicSoftMarginLoss,
    FastAPLoss,
    HistogramLoss,
    MannWhitneyLoss,
    PNPLoss,
    RnCLoss,
    SmoothAPLoss,
    TripletMarginLoss,
    TripletSemiHardLoss,
    ranks,
)
from flashpair.losses.contrast import ada_meow, mann_whitney, rank_n_contrast
from flashpair.losses.ranks import Step
from flashpair.rows import RowPanel
from flashpair.terms import Mask

if backend_cpu.unavailable():
    pytest.skip("; ".join(backend_cpu.unavailable()), allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
#: Columns; the classes of the rows: empty, all columns, anywhere, larger than what is compared without bisection.
SHAPES = [(5, [0]), (1, [0, 1]), (7, [0, 7, 3, 1, 7]), (50, [0, 2, 50, 33]), (203, [5, 40, 130, 0, 203, 64])]
shapes = pytest.mark.parametrize(("columns", "lengths"), SHAPES)
masks = pytest.mark.parametrize("mask", [Mask.ALL, Mask.SAME, Mask.DIFFERENT])


def panel_of(columns: int, lengths: list[int], dtype, ties: bool = False) -> RowPanel:
    """Rows with classes anywhere; the excluded column in the class, outside of it, none."""
    g = torch.Generator().manual_seed(columns)
    rows = 3 * len(lengths)
    count = torch.tensor(lengths).repeat_interleave(3)
    start = (torch.rand(rows, generator=g) * (columns - count + 1)).long()
    inside, outside = start, torch.where(start > 0, start - 1, (start + count) % columns)
    own = torch.where(torch.arange(rows) % 3 == 0, inside.clamp_max(columns - 1), outside)
    own[torch.arange(rows) % 3 == 2] = -1
    s = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    if ties:
        s = (2 * s).round() / 2
    s = s.to(dtype).requires_grad_()
    every = torch.arange(columns)
    return RowPanel(s, torch.arange(rows), every, own, start, count, int(count.max()), [])


def points_of(panel: RowPanel) -> torch.Tensor:
    """A point for each member, and for those that are none."""
    position, valid = panel.members()
    return torch.where(valid, panel.s.detach().gather(1, position), 0.25).requires_grad_()


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """Equal up to `bound`, relative to the largest entry and to 1."""
    largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=bound, atol=bound * largest)


def same(function, inputs, monkeypatch, rtol: float | None = None) -> list[torch.Tensor]:
    """`function()` by operators and by PyTorch: its results and what random cotangents say of the inputs."""
    found = []
    for native in (True, False):
        if native:
            assert backend_cpu.at_hand(*inputs)
        else:
            monkeypatch.setattr(backend_cpu, "at_hand", lambda *tensors: False)
        results = function()
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        sloped = [v for v in results if v.requires_grad]
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for v in sloped]
        slopes = torch.autograd.grad(sloped, inputs, cotangents, allow_unused=True) if sloped else inputs
        slopes = [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, slopes, strict=True)]
        found.append([*results, *slopes])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        close(ours, plain, rtol or 64 * torch.finfo(inputs[0].dtype).eps)
    return found[0]


@dtypes
@shapes
@masks
@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("own", [False, True])
def test_soft_ranks(columns, lengths, dtype, mask, step, own, monkeypatch):
    panel = panel_of(columns, lengths, dtype)
    points = points_of(panel)
    function = lambda: ranks.soft_ranks(panel, mask, points, 3.0, step, sign=-1.0, own=own)  # noqa: E731
    same(function, [panel.s, points], monkeypatch)


@dtypes
@shapes
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "closed"),
    [(None, 0.5, False), (0.5, None, False), (-0.5, 1.0, True), (0.0, 0.0, True), (None, None, False)],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_triplet_sums(columns, lengths, dtype, ties, low, high, closed, sign, monkeypatch):
    panel = panel_of(columns, lengths, dtype, ties)
    function = lambda: ranks.triplet_sums(panel, sign, low, high, closed)  # noqa: E731
    counts, sums, _ = same(function, [panel.s], monkeypatch, rtol=None if dtype == torch.float64 else 3e-5)
    # The definition, of the row in the middle.
    i, met = len(counts) // 2, []
    d = (sign * panel.s.detach()[i]).tolist()
    for p in panel.same[i].nonzero()[:, 0].tolist():
        for n in panel.different[i].nonzero()[:, 0].tolist():
            limit = torch.tensor(d[n], dtype=dtype) - torch.tensor(math.inf if high is None else high, dtype=dtype)
            above = low is None or torch.tensor(d[n], dtype=dtype) - torch.tensor(low, dtype=dtype) > d[p]
            if above and (d[p] >= limit if closed else d[p] > limit):
                met.append(d[p] - d[n])
    assert counts[i] == len(met)
    assert sums[i].item() == pytest.approx(math.fsum(met), rel=1e-4 if dtype == torch.float32 else 1e-12, abs=1e-4)


@dtypes
@shapes
@masks
@pytest.mark.parametrize("closed", [False, True])
def test_counts_below(columns, lengths, dtype, mask, closed, monkeypatch):
    panel = panel_of(columns, lengths, dtype, ties=True)
    limits = points_of(panel).detach()
    for sign in (1.0, -1.0):
        same(lambda: ranks.counts_below(panel, mask, sign * limits, closed, sign=sign), [panel.s], monkeypatch)  # noqa: B023
        monkeypatch.undo()


@dtypes
@shapes
@masks
def test_sums_up_to(columns, lengths, dtype, mask, monkeypatch):
    panel = panel_of(columns, lengths, dtype, ties=True)
    limits = points_of(panel).detach()
    same(lambda: ranks.sums_up_to(panel, mask, limits), [panel.s], monkeypatch)


@dtypes
@shapes
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_next_above(columns, lengths, dtype, ties, sign, monkeypatch):
    panel = panel_of(columns, lengths, dtype, ties)
    points = sign * points_of(panel).detach()
    some = panel.counts[1] > 0

    def chosen():  # ties may choose any
        return panel.s.detach().gather(1, ranks.next_above(panel, points, sign=sign))[some]

    same(chosen, [panel.s], monkeypatch)
    columns_of = ranks.next_above(panel, points, sign=sign)
    assert panel.different.gather(1, columns_of)[some].all()


@dtypes
@shapes
@masks
@pytest.mark.parametrize("weighted", [False, True])
def test_row_histogram(columns, lengths, dtype, mask, weighted, monkeypatch):
    panel = panel_of(columns, lengths, dtype)  # beyond both ends too
    weights = torch.linspace(0.5, 1.5, columns, dtype=dtype) if weighted else None
    function = lambda: ranks.row_histogram(panel, mask, -1.0, 1.5, 11, weights)  # noqa: E731
    same(function, [panel.s], monkeypatch, rtol=1e-10 if dtype == torch.float64 else 1e-4)


@dtypes
@pytest.mark.parametrize("similarity", [Similarity.SQUARED_EUCLIDEAN, Similarity.EUCLIDEAN])
@pytest.mark.parametrize("normalize", [False, True])
def test_distances(dtype, similarity, normalize, monkeypatch):
    """Of equal rows 0, without a gradient; two thirds of the panel are its own transpose."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[[0, 1, 2, 0, 4, 5, 0, 7, 8]].to(dtype)
    weights = torch.linspace(-1, 2, 9, dtype=dtype)
    found = []
    for native in (True, False):
        monkeypatch.setattr(backend_cpu, "at_hand", lambda *tensors, native=native: native)
        leaf = x.clone().requires_grad_()
        how = {"similarity": similarity, "normalize": normalize, "exclude_self": False}
        (rows,) = row_reduce(leaf, None, lambda panel: [panel.s @ weights[panel.column]], **how)
        found.append((rows, *torch.autograd.grad(rows.square().sum(), leaf)))
    rows = found[0][0]
    assert rows[0] == rows[3] == rows[6]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("scale", [0.5, 300.0, 1e6])  # logits within the range of exponentials, beyond it, far beyond
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal"])
def test_ordered_log_sums(dtype, narrow, scale, kind):
    g = torch.Generator().manual_seed(0)
    for count, columns in ((5, 37), (4, 2), (3, 1), (0, 3)):
        s = torch.rand(count, columns, generator=g, dtype=torch.float64).to(dtype)
        targets = torch.rand(columns, generator=g, dtype=torch.float64)
        targets = {"distinct": targets, "ties": (4 * targets).round(), "equal": torch.zeros_like(targets)}[kind]
        targets = targets.to(torch.float32 if narrow else torch.float64)
        own = torch.randint(columns, (count,), generator=g)
        left_out = torch.where(torch.arange(count) % 2 == 0, own, -1)
        order, factor = targets.argsort(), torch.tensor(scale, dtype=dtype)
        total, of_s, of_scale = rows_cpu.ordered_log_sums(
            s, factor, targets[own], targets[order], order, left_out, True
        )
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        wanted = [zeros(()), zeros(count, columns), zeros(())]
        for i in range(count):
            keep = [j for j in range(columns) if j != left_out[i]]
            value, factor_of = s[i].double().requires_grad_(), factor.double().requires_grad_()
            apart, logits = (targets[own[i]] - targets).abs(), -factor_of * value
            sums = [logits[[j for j in keep if apart[j] >= apart[k]]].logsumexp(0) - logits[k] for k in keep]
            if sums:
                row = sum(sums)
                slopes = torch.autograd.grad(row, (value, factor_of))
                wanted[0], wanted[2] = wanted[0] + row.detach(), wanted[2] + slopes[1]
                wanted[1][i] = slopes[0]
        for got, want in zip((total, of_s, of_scale), wanted, strict=True):
            close(got.double(), want, torch.finfo(dtype).eps * 16 * max(scale, 1))


@dtypes
def test_tabulated(dtype):
    g = torch.Generator().manual_seed(0)
    own = (2 * torch.rand(20, generator=g, dtype=torch.float64) - 1).to(dtype)
    table = [v.detach().requires_grad_() for v in mann_whitney.softplus_table(own, 0.05)]
    s = (2 * torch.rand(6, 45, generator=g, dtype=torch.float64) - 1).to(dtype)
    s[0, :4] = torch.tensor([1.0, -1.0, 1 + 1e-6, -1 - 1e-6])  # where rounding may lead
    left_out = torch.tensor([0, 44, -1, 7, -1, 20])
    leaf = s.clone().requires_grad_()
    values = mann_whitney.Interpolated.apply(*table, leaf)
    plain = torch.where(torch.arange(45) != left_out[:, None], values, 0.0).sum()
    wanted = [plain, *torch.autograd.grad(plain, (*table, leaf))]
    found = rows_cpu.tabulated(*(v.detach() for v in table), s, left_out, mann_whitney._MARGIN, True)
    for got, want in zip(found, wanted, strict=True):
        close(got, want, 2 * len(table[0]) * torch.finfo(dtype).eps)  # that of a place among the knots
    assert rows_cpu.tabulated(*(v.detach() for v in table), s, left_out, mann_whitney._MARGIN, False)[3].numel() == 0


@dtypes
@pytest.mark.parametrize("weight", [None, 0.7], ids=["log-sum", "mean"])
@pytest.mark.parametrize("columns", [2, 5, 37, 203])
def test_hardest(columns, weight, dtype):
    """Of rows with ties, of one value, near each other and far apart; rows of a panel stand for queries."""
    g = torch.Generator().manual_seed(columns)
    s = 2 * torch.rand(7, columns, generator=g, dtype=torch.float64) - 1
    s[1], s[2], s[3], s[4] = (4 * s[1]).round() / 4, 0.25, 1e-3 * s[3], s[4].sign()
    own = torch.randint(columns, (7,), generator=g)
    scale = torch.tensor(300.0, dtype=dtype)  # e^300 is beyond float32
    for kept in {1, max((columns - 1) // 3, 1), columns - 1}:
        found = rows_cpu.hardest(s.to(dtype), own, kept, scale, weight, True)
        leaf, factor = s.to(dtype).double().requires_grad_(), scale.double().requires_grad_()
        total = 0
        for i in range(7):
            others = torch.cat([leaf[i, : own[i]], leaf[i, own[i] + 1 :]])
            last = others.detach().sort(descending=True).values[kept - 1]
            chosen, positive = others[others > last - 8 * torch.finfo(dtype).eps], leaf[i, own[i]]
            logits = factor * torch.cat([positive[None], chosen])
            total = total + (logits.logsumexp(0) - logits[0] if weight is None else weight * chosen.mean() - positive)
        slopes = torch.autograd.grad(total, (leaf, factor), allow_unused=True)
        bound = 64 * columns * torch.finfo(dtype).eps
        close(found[0].double(), total.detach(), bound)
        close(found[1].double(), slopes[0], bound)
        if weight is None:
            close(found[2].double(), slopes[1], bound)
        total = rows_cpu.hardest(s.to(dtype), own, kept, scale, weight, False)
        assert total[0] == found[0] and total[1].numel() == 0


@pytest.mark.parametrize("weight", [None, 0.7])
def test_hardest_keeps_nan(weight):
    for at in (0, 4):
        s = torch.zeros(1, 5)
        s[0, at] = math.nan
        assert rows_cpu.hardest(s, torch.tensor([0]), 2, torch.ones(()), weight, True)[0].isnan()


@dtypes
@pytest.mark.parametrize("size", [(3, 5, 37), (1, 1, 1), (2, 0, 4), (2, 3, 0), (4, 9, 64)])
def test_pair_gate(dtype, size, monkeypatch):
    units, rows_, columns = size
    g = torch.Generator().manual_seed(0)
    shapes = (units, rows_), (units, columns), (units,)
    leaves = [(3 * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes]
    same(lambda: ada_meow.PairGate.apply(*leaves), leaves, monkeypatch)


LOSSES = {
    "TripletMarginLoss": TripletMarginLoss, "TripletSemiHardLoss": TripletSemiHardLoss,
    "smooth": functools.partial(TripletMarginLoss, smooth_loss=True), "SmoothAPLoss": SmoothAPLoss, "PNPLoss": PNPLoss,
    "FastAPLoss": FastAPLoss, "HistogramLoss": HistogramLoss, "DynamicSoftMarginLoss": DynamicSoftMarginLoss,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_ask_the_operators(name, monkeypatch):
    """What is left to PyTorch would be missed; bad values do not stop them."""
    for slow in ("_SoftRanks", "soft_histogram", "_reached", "kept"):
        monkeypatch.setattr(ranks, slow, None)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(30) % 4
    LOSSES[name]()(x, labels).backward()
    assert x.grad.isfinite().all()
    for bad in (math.nan, math.inf):
        broken = x.detach().clone()
        broken[3, 1] = bad
        assert LOSSES[name]()(broken, labels).isnan()


@pytest.mark.parametrize("name", [*LOSSES, "RnCLoss", "MannWhitneyLoss"])
def test_losses_by_pytorch(name, monkeypatch):
    """What a GPU runs, in panels of few rows: as by the operators."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 90, 6, generator=g, dtype=torch.float64)
    labels, targets = torch.arange(90) % 7, torch.rand(90, generator=g)
    loss_of = {
        "RnCLoss": lambda v: RnCLoss()(v, targets), "MannWhitneyLoss": lambda v: MannWhitneyLoss(1.0)(v, y),
    }.get(name, lambda v: LOSSES[name]()(v, labels))  # fmt: skip
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(backend_cpu, "at_hand", lambda *tensors: False)
        monkeypatch.setattr(rows, "_CPU_ELEMENTS", 1000 + 500 * native)
        monkeypatch.setattr(rows, "_CPU_ROWS", 4)
        leaf = x.clone().requires_grad_()
        loss = loss_of(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for ours, plain in zip(*found, strict=True):
        close(ours, plain, 1e-12)


def test_pairs_of_losses_ask_the_operators(monkeypatch):
    monkeypatch.setattr(rank_n_contrast, "OrderedLogSums", None)
    monkeypatch.setattr(mann_whitney, "Interpolated", None)
    x, y = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (RnCLoss()(x, torch.rand(40)) + MannWhitneyLoss(1.0)(x, y)).backward()


def test_nan_is_below_nothing(monkeypatch):
    """Nor is anything below a NaN: the ranks of others do not change."""
    panel = panel_of(50, [0, 2, 40], torch.float64)
    with torch.no_grad():
        panel.s[:, 3] = math.nan
    for points in (points_of(panel).detach(), points_of(panel).detach()[:, :2]):
        points[1] = math.nan
        points[2, ::2] = math.nan  # among others
        for closed in (False, True):
            counts = ranks.counts_below(panel, Mask.ALL, points, closed)
            assert (counts[1] == 0).all() and counts.max() < 50 and counts[2, 0] == 0
            level = torch.le if closed else torch.lt
            for i in range(len(points)):
                met = torch.arange(50) != panel.own[i]
                wanted = [(level(panel.s[i], point) & met).sum() for point in points[i]]
                assert counts[i].tolist() == [int(w) for w in wanted]
            with monkeypatch.context() as plain:
                plain.setattr(backend_cpu, "at_hand", lambda *tensors: False)
                assert torch.equal(ranks.counts_below(panel, Mask.ALL, points, closed), counts)


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_rank_n_contrast_of_two_samples_is_zero(dtype, temperature):
    x = 1000 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert RnCLoss(temperature)(x, torch.tensor([0.0, 1.0])) == 0


def test_rank_n_contrast_of_targets_that_are_not_finite(monkeypatch):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    for bad in (math.nan, math.inf):
        targets = torch.arange(9.0)
        targets[4] = bad
        for native in (True, False):
            monkeypatch.setattr(backend_cpu, "at_hand", lambda *tensors, native=native: native)
            assert RnCLoss()(x, targets).isnan() and RnCLoss()(x, targets[:, None].expand(-1, 2)).isnan()


def test_operators_refuse_what_does_not_fit():
    panel = panel_of(7, [3], torch.float64)
    points = points_of(panel).detach()
    short = RowPanel(panel.s, panel.row, panel.column, panel.own, panel.start[:-1], panel.count, panel.most, [])
    index = torch.zeros(3).long(), torch.zeros(2).long()
    calls = [
        lambda: ranks.soft_ranks(short, Mask.ALL, points, 1.0),
        lambda: ranks.counts_below(panel, Mask.ALL, points[:-1]),
        lambda: ranks.next_above(panel, points[:-1]),
        lambda: ranks.row_histogram(panel, Mask.ALL, -1.0, 1.0, 0),
        lambda: rows_cpu.through_roots(panel.s.detach(), panel.s.detach()[:-1]),
        lambda: rows_cpu.distances_(panel.s.detach(), torch.zeros(2), torch.zeros(7), True, True),
        lambda: rows_cpu.pair_gate(*torch.zeros(2, 3, 4), torch.zeros(2)),
        lambda: rows_cpu.pair_gate(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3).double()),
        lambda: rows_cpu.tabulated(*torch.zeros(2, 9), torch.zeros(3, 3), torch.zeros(3).long(), 4, True),
        lambda: rows_cpu.hardest(torch.zeros(3, 3), torch.zeros(3).long(), 3, torch.ones(()), None, True),
        lambda: rows_cpu.hardest(torch.zeros(3, 3), torch.full((3,), -1), 1, torch.ones(()), None, True),
        lambda: rows_cpu.ordered_log_sums(torch.zeros(2, 3), torch.ones(()), *torch.zeros(2, 2), *index, True),
        lambda: ranks.counts_below(panel, Mask.ALL, points.float()),
        lambda: ranks.next_above(replace(panel, own=panel.own.int()), points),
        lambda: rows_cpu.through_roots(panel.s.detach(), panel.s.detach().float()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()


def test_others_are_left_to_pytorch():
    """Whoever forces a backend, or watches, gets no operator that he did not ask for."""
    x = torch.zeros(1)
    assert backend_cpu.at_hand(x) and not backend_cpu.at_hand(x, x.to("meta"))
    with flashpair.use_backend("reference"):
        assert not backend_cpu.at_hand(x)
    with support.forced("dense"):
        assert not backend_cpu.at_hand(x)
    with flashpair.use_backend("cpu"):
        assert backend_cpu.at_hand(x)
