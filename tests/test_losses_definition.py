"""Every loss, value and gradients in float64, against a loop over pairs written from its definition."""
# ruff: noqa: F811

import pytest
import support
import torch
from loss_cases import CASES, KINDS, batch, engine, evaluate, sides_of, signed_pairs, unit_distance  # noqa: F401

from flashpair import losses


def close(got: dict, want: dict, rtol: float) -> None:
    scale = want["loss"].abs().clamp_min(1e-3)
    for name, value in got.items():
        assert value.isfinite().all(), f"{name} is not finite"
        size = torch.maximum(want[name].abs().max() if want[name].numel() else scale, scale * 1e-3)
        error = (value - want[name]).abs().max() / size
        assert error <= rtol, f"{name}: relative error {error:.2e}, {value} instead of {want[name]}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_definition(case, side, kind, engine):
    if case.distance and kind == "duplicates":
        pytest.skip("the distance of equal rows has no gradient; see test_equal_rows")
    data = batch(kind, side)
    want = evaluate(case.definition, data.to(torch.float64), case.learns)
    got = evaluate(case.ours, data.to(torch.float64, support.device(engine)), case.learns)
    # Distances come from |x|^2 + |y|^2 - 2<x, y>: of collapsed embeddings half the digits cancel.
    close(got, want, 1e-10 if not (case.distance and kind == "collapsed") else 1e-9)


def test_equal_rows(engine):
    """Distances of equal rows: right to the square root of the precision, gradients finite."""
    data = batch("duplicates", False).to(torch.float64, support.device(engine))
    loss = losses.ContrastiveLoss(reducer=losses.SumReducer())(*data.call)
    positives, negatives = signed_pairs(data, unit_distance)
    want = sum(d for row in positives for d in row) + sum((1 - d).clamp_min(0) for row in negatives for d in row)
    assert abs(loss - want) < 1e-6
    (grad,) = torch.autograd.grad(loss, data.x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_gradcheck(case, side, engine):
    data = batch("random", side, b=5, n=4, d=3).to(torch.float64, support.device(engine))
    names = [n for n in data.leaves() if n in ("x", "y", *case.learns)]
    leaves = [data.leaves()[n] for n in names]
    if case.name == "circle":
        pytest.skip("its gradient detaches a factor by definition; test_definition covers it")

    def call(*values):
        for name, value in zip(names, values, strict=True):
            setattr(data, name, value)
        return case.ours(data)

    assert torch.autograd.gradcheck(call, leaves, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 1.0, 1e4])
@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "info_nce", "clip"])
def test_temperatures(name, temperature, engine):
    case = next(c for c in CASES if c.name == name)
    data = batch("random", case.sides[0])
    data.scale = torch.tensor(1 / temperature, dtype=torch.float64)
    want = evaluate(case.definition, data.to(torch.float64), case.learns)
    got = evaluate(case.ours, data.to(torch.float64, support.device(engine)), case.learns)
    close(got, want, 1e-10)


def test_info_nce_with_extra_keys(engine):
    """In-batch keys, negatives with gradient and a queue without: one softmax over all."""
    at = support.device(engine)
    q, k, extra, queue = (torch.randn(n, 6, dtype=torch.float64, device=at, requires_grad=True) for n in (5, 5, 3, 7))
    unit = lambda v: torch.nn.functional.normalize(v, dim=1)  # noqa: E731
    for in_batch in (True, False):
        own = (unit(q) * unit(k)).sum(1, keepdim=True)
        blocks = [unit(q) @ unit(k).T if in_batch else own, unit(q) @ unit(extra).T, unit(q) @ unit(queue.detach()).T]
        logits = torch.cat(blocks, 1) / 0.2
        want = (logits.logsumexp(1) - own[:, 0] / 0.2).mean()
        got, stats = losses.InfoNCELoss(0.2, in_batch_negatives=in_batch)(q, k, extra, queue, return_stats=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(got, [q, k, extra]), torch.autograd.grad(want, [q, k, extra]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        off = ~torch.eye(5, dtype=torch.bool, device=at)
        negatives = torch.cat(([blocks[0][off].reshape(5, 4)] if in_batch else []) + blocks[1:], 1)
        assert torch.equal(stats.negative.count, torch.full_like(stats.negative.count, negatives.shape[1]))
        torch.testing.assert_close(stats.negative.mean, negatives.mean(1))
        torch.testing.assert_close(stats.negative.variance, negatives.var(1, correction=0))
        torch.testing.assert_close(stats.negative.max, negatives.amax(1))
        torch.testing.assert_close(stats.positive.min, own[:, 0])
