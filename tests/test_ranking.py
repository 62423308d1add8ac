"""What the losses and functions of scores promise beside their values, which tests/test_contrast.py holds."""

from __future__ import annotations

import math

import pytest
import torch
from ranking_cases import CASES
from views import Views, evaluate, views

from flashpair import losses
from flashpair.losses.ranking import pairs_by_target

TILED = [c for c in CASES if c.name.split()[0] in ("ComparisonLoss", "LambdaLoss", "UNIQUELoss")]


@pytest.mark.parametrize("elements", [1, 5, 30])
@pytest.mark.parametrize("case", TILED, ids=repr)
def test_tiles(case, elements, monkeypatch):
    """However the pairs are cut, of several lists with equal targets."""
    monkeypatch.setattr(pairs_by_target, "_CPU_ELEMENTS", elements)
    got, want = evaluate(case.ours, views(b=23)), evaluate(case.define, views(b=23))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


def test_every_pair_is_in_one_tile():
    start, end = [1, 2, 3, 4, 5, 7, 7], [4, 4, 4, 4, 7, 7, 7]
    for elements in (1, 4, 100):
        seen = []
        for tile in pairs_by_target._tiles(start, end, elements):
            pairs = [(i, j) for i in range(7)[tile.rows] for j in range(7)[tile.columns]]
            inside = [(i, j) for i, j in pairs if start[i] <= j < end[i]]
            assert tile.ragged or inside == pairs
            seen += inside
        assert sorted(seen) == [(i, j) for i in range(7) for j in range(start[i], end[i])]


@pytest.mark.parametrize("model", losses.ComparisonModel)
@pytest.mark.parametrize("criterion", losses.ComparisonCriterion)
@pytest.mark.parametrize("tie", [False, True])
def test_far_scores(model, criterion, tie):
    """The wrong order by thousands: finite, and a slope only where the criterion has one."""
    a = torch.tensor([-3000.0, 3000.0], requires_grad=True)
    y = torch.tensor([1.0, 1.0 if tie else 0.0])
    loss = losses.ComparisonLoss(model, criterion)(a, y)
    (slopes,) = torch.autograd.grad(loss, a)
    d, thurstone = 6000.0, model == losses.ComparisonModel.THURSTONE
    if criterion == losses.ComparisonCriterion.FIDELITY:
        want, slope = (1 - math.sqrt(0.5 + 1e-8) - 1e-4 if tie else 1 - 2e-4), 0.0
    else:
        share = 0.5 if tie else 1.0
        want = share * (d * d / 2 + math.log(d * math.sqrt(2 * math.pi)) if thurstone else d)
        slope = share * (d if thurstone else 1.0)
    torch.testing.assert_close(loss.detach(), torch.tensor(want))
    torch.testing.assert_close(slopes, torch.tensor([-slope, slope]))


def test_gradient_is_of_the_cotangent():
    a, y = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.arange(6)
    loss = losses.ComparisonLoss()(a, y)
    once, thrice = (torch.autograd.grad(v, a, retain_graph=True)[0] for v in (loss, 3 * loss))
    torch.testing.assert_close(thrice, 3 * once)


def test_deviations_learn_from_their_hinge_alone():
    """And scores from the fidelity alone: UNIQUE holds the deviations in p for constants."""
    a, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.0, 1.0], [2.0, 1.0]))
    y, w = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    for margin, slope in ((0.5, 1.0), (0.0, 1.0)):
        (found,) = torch.autograd.grad(losses.UNIQUELoss(margin)(a, s, y, w), s)
        assert found.tolist() == [slope, -slope]
    (found,) = torch.autograd.grad(losses.UNIQUELoss(0.5)(a, s, y, w.flip(0)), s)
    assert found.tolist() == [0.0, 0.0]  # already in order by more than the margin


def objective(model, c: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """As the paper has it, a pair at a time; the diagonal is constant."""
    phi = torch.special.ndtr if model == losses.ComparisonModel.THURSTONE else torch.sigmoid
    total = -(q**2).sum() / 2
    for i in range(len(q)):
        for j in range(len(q)):
            total = total + c[i, j] * torch.log(phi(q[i] - q[j]).clamp_min(1e-6))
    return total


@pytest.mark.parametrize("model", losses.ComparisonModel)
@pytest.mark.parametrize("kind", ["shares", "counts", "one side"])
def test_compare_to_score(model, kind):
    """The slopes at the maximum are 0."""
    c = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = {"shares": c, "counts": (100 * c).round(), "one side": c.triu() * 5}[kind]
    q = losses.compare_to_score(c, model).requires_grad_()
    (slopes,) = torch.autograd.grad(objective(model, c, q), q)
    assert slopes.abs().max() <= 1e-10 * c.sum()
    assert abs(q.sum()) <= 1e-10
    single = losses.compare_to_score(c.float(), model)
    torch.testing.assert_close(single, q.detach().float(), rtol=1e-5, atol=1e-5)
    scaled = losses.compare_to_score(c, model, highest=100.0)
    low, high = q.min(), q.max()
    torch.testing.assert_close(scaled, 100 * (q.detach() - low) / (high - low))


def test_compare_to_score_where_whole_steps_diverge():
    """A chain of items of which few were compared, some of them very often."""
    c = torch.rand(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = (1e6 * c.pow(16)).triu()
    q = losses.compare_to_score(c, losses.ComparisonModel.BRADLEY_TERRY)
    won = c * torch.sigmoid(q - q[:, None])
    assert (won.sum(1) - won.sum(0) - q).abs().max() <= 1e-9 * c.sum()


def test_compare_to_score_of_little():
    even = torch.full((3, 3), 0.5)
    assert losses.compare_to_score(even).tolist() == [0.0] * 3
    assert losses.compare_to_score(even, highest=10.0).tolist() == [5.0] * 3
    assert losses.compare_to_score(torch.zeros(0, 0)).shape == (0,)
    assert losses.compare_to_score(torch.ones(1, 1), highest=10.0).tolist() == [5.0]
    even[0, 1] = math.nan
    assert losses.compare_to_score(even).isnan().any()
    assert losses.compare_to_score(torch.eye(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_unequal_lists_of_one():
    """A list of one item has nothing to compare."""
    d = Views(*(torch.ones(3, 2, dtype=torch.float64).requires_grad_() for _ in range(2)))
    for loss in (losses.ComparisonLoss(), losses.LambdaLoss(), losses.ADRMSELoss()):
        value = loss(d.x.sum(1), torch.arange(3), torch.arange(3))
        assert value.item() == 0 and torch.autograd.grad(value, d.x)[0].abs().max() == 0
