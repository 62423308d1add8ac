"""What the primitives must express: each loss in a few lines of them, against its dense formula or a public peer."""

from __future__ import annotations

import math

import pytest
import support
import torch
import torch.nn.functional as F
from support import assert_close

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
    pair_similarity,
    pair_sum,
)

SUM, COUNT, LSE = Reduction.SUM, Reduction.COUNT, Reduction.LOGSUMEXP
SAME, DIFFERENT, COLUMNS = Mask.SAME, Mask.DIFFERENT, Axis.COLUMNS


def _inputs(backend: str, b: int = 24, n: int | None = None, d: int = 6, labels: str = "few"):
    """x, y, scale as leaves, in the widest dtype of the backend."""
    dtype = torch.float64 if support.serves(backend, torch.float64) else torch.float32
    return support.make(b, n, d, labels).to(dtype, support.device(backend))


def _agree(ours, dense, leaves) -> None:
    """Value and every gradient of two scalars."""
    rtol = 1e-10 if leaves[0].dtype == torch.float64 else 2e-5
    assert_close("value", ours.detach().double().cpu(), dense.detach().double().cpu(), rtol)
    got, want = (torch.autograd.grad(loss, leaves) for loss in (ours, dense))
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert w.abs().max() > 0, "a gradient that is zero shows nothing"
        assert_close(f"gradient {k}", g.double().cpu(), w.double().cpu(), rtol)


def _unit(x):
    return F.normalize(x, dim=1)


def _masks(labels):
    """(same without self, different) of labels (B,)."""
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def test_clip_rows_and_columns_of_one_pass(backend):
    d = _inputs(backend, n=24)
    rows, columns = pair_reduce(
        d.x, d.y, [Term(LSE, scale=d.scale), Term(LSE, axis=COLUMNS, scale=d.scale)], normalize=True
    )
    diagonal = torch.arange(24, device=d.x.device)
    matched = d.scale * pair_similarity(d.x, d.y, diagonal, diagonal, normalize=True)
    ours = (rows - matched).mean() / 2 + (columns - matched).mean() / 2

    logits = d.scale * _unit(d.x) @ _unit(d.y).T
    dense = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    _agree(ours, dense, (d.x, d.y, d.scale))


def test_siglip_gradient_in_the_forward(backend):
    d = _inputs(backend, n=24)
    same = torch.arange(24, device=d.x.device)
    terms = [
        Term(SUM, Score.SOFTPLUS, SAME, scale=-d.scale, offset=-d.bias),
        Term(SUM, Score.SOFTPLUS, DIFFERENT, scale=d.scale, offset=d.bias),
    ]
    ours = pair_sum(d.x, d.y, terms, labels=same, ref_labels=same, normalize=True) / 24

    logits = d.scale * _unit(d.x) @ _unit(d.y).T + d.bias
    signs = 2 * torch.eye(24, dtype=d.x.dtype, device=d.x.device) - 1
    dense = -F.logsigmoid(signs * logits).sum() / 24
    _agree(ours, dense, (d.x, d.y, d.scale, d.bias))


def test_supcon_self_similarity(backend):
    d = _inputs(backend)
    terms = [Term(LSE, scale=d.scale), Term(SUM, mask=SAME, scale=d.scale), _count(SAME)]
    lse, positives, count = pair_reduce(d.x, terms=terms, labels=d.labels, normalize=True)
    ours = (lse - positives / count)[count > 0].mean()

    same, _ = _masks(d.labels)
    logits = d.scale * _unit(d.x) @ _unit(d.x).T
    logits = logits.masked_fill(torch.eye(24, dtype=torch.bool, device=d.x.device), -math.inf)
    log_p = logits.log_softmax(1)
    has = same.any(1)
    dense = -(torch.where(same, log_p, 0.0).sum(1) / same.sum(1).clamp_min(1))[has].mean()
    _agree(ours, dense, (d.x, d.scale))


def _count(mask: Mask) -> Term:
    """Number of pairs under a mask."""
    return Term(COUNT, mask=mask, scale=0.0, offset=1.0)


def test_nt_xent_with_several_positives_chained(backend):
    d = _inputs(backend)
    pairs = {"labels": d.labels, "normalize": True}
    (negatives,) = pair_reduce(d.x, terms=[Term(LSE, mask=DIFFERENT, scale=d.scale)], **pairs)
    # -log( e^a / (e^a + sum_n e^n) ) = softplus(lse_n - a)
    positives = Term(SUM, Score.SOFTPLUS, SAME, scale=-d.scale, offset=negatives)
    losses, count = pair_reduce(d.x, terms=[positives, _count(SAME)], **pairs)
    ours = losses.sum() / count.sum()

    same, different = _masks(d.labels)
    s = d.scale * _unit(d.x) @ _unit(d.x).T
    total = 0.0
    for i, p in same.nonzero().tolist():
        e = s[i, p].exp()
        total = total - torch.log(e / (e + s[i][different[i]].exp().sum()))
    _agree(ours, total / same.sum(), (d.x, d.scale))


def test_original_lifted_structure_chained(backend):
    """Song et al. 2016, equation 4; the peer is pytorch-metric-learning's LiftedStructureLoss."""
    peer = pytest.importorskip("pytorch_metric_learning.losses").LiftedStructureLoss(neg_margin=1, pos_margin=0)
    d = _inputs(backend)
    options = {"labels": d.labels, "similarity": Similarity.EUCLIDEAN, "normalize": True}
    (negatives,) = pair_reduce(d.x, terms=[Term(LSE, mask=DIFFERENT, scale=-1.0, offset=1.0)], **options)
    both = {"offset": negatives, "other_offset": negatives, "combine": Combine.LOGADDEXP}
    losses, count = pair_reduce(d.x, terms=[Term(SUM, Score.SQUARED_HINGE, SAME, **both), _count(SAME)], **options)
    ours = losses.sum() / 2 / count.sum()

    same, different = _masks(d.labels)
    x = _unit(d.x)
    distance = (x[:, None] - x[None, :]).square().sum(-1).clamp_min(1e-30).sqrt()
    total = 0.0
    for i, p in same.nonzero().tolist():
        far = torch.cat([distance[i][different[i]], distance[p][different[p]]])
        total = total + torch.relu((1 - far).exp().sum().log() + distance[i, p]) ** 2
    dense = total / 2 / same.sum()
    _agree(ours, dense, (d.x,))
    assert float(ours) == pytest.approx(float(peer(d.x.detach().cpu(), d.labels.cpu())), rel=1e-5)


def test_multi_similarity_with_relative_thresholds(backend):
    """Wang et al. 2019; the thresholds of the miner are rows of `mine`, never pairs."""
    alpha, beta, base, epsilon = 2.0, 10.0, 0.5, 0.1
    d = _inputs(backend)
    options = {"labels": d.labels, "normalize": True}
    hardest, farthest = mine(d.x, extremes=[Extreme(DIFFERENT), Extreme(SAME, largest=False)], **options)
    terms = [
        Term(LSE, mask=SAME, scale=-alpha, offset=alpha * base, below=hardest.values[:, 0] + epsilon),
        Term(LSE, mask=DIFFERENT, scale=beta, offset=-beta * base, above=farthest.values[:, 0] - epsilon),
    ]
    positive, negative = pair_reduce(d.x, terms=terms, **options)
    ours = (F.softplus(positive) / alpha + F.softplus(negative) / beta).mean()

    same, different = _masks(d.labels)
    s = _unit(d.x) @ _unit(d.x).T
    total = 0.0
    for i in range(24):
        near, far = s[i][different[i]], s[i][same[i]]
        kept_far, kept_near = far[far < near.max() + epsilon], near[near > far.min() - epsilon]
        assert len(kept_near) > 0 and len(kept_far) > 0, "this case has to mine something in every row"
        total = total + torch.log(1 + (-alpha * (kept_far - base)).exp().sum()) / alpha
        total = total + torch.log(1 + (beta * (kept_near - base)).exp().sum()) / beta
    assert sum(int((s[i][different[i]] <= s[i][same[i]].min() - epsilon).sum()) for i in range(24)) > 0, (
        "and drop something"
    )
    _agree(ours, total / 24, (d.x,))


def test_batch_hard_with_sparse_backward(backend):
    """Hermans et al. 2017: hardest positive and negative of each row, gradients through those pairs only."""
    margin = 0.2
    d = _inputs(backend)
    far, near = mine(
        d.x,
        extremes=[Extreme(SAME), Extreme(DIFFERENT, largest=False)],
        labels=d.labels,
        similarity=Similarity.EUCLIDEAN,
    )
    rows = torch.arange(24, device=d.x.device)
    positive, negative = (
        pair_similarity(d.x, None, rows, e.indices[:, 0], similarity=Similarity.EUCLIDEAN) for e in (far, near)
    )
    ours = torch.relu(positive - negative + margin).mean()

    same, different = _masks(d.labels)
    distance = (d.x[:, None] - d.x[None, :]).square().sum(-1).clamp_min(1e-30).sqrt()
    hardest = torch.where(same, distance, -math.inf).amax(1) - torch.where(different, distance, math.inf).amin(1)
    _agree(ours, torch.relu(hardest + margin).mean(), (d.x,))


@pytest.mark.parametrize("k", [1, 8, 64])
def test_top_k_negatives_of_each_row(k, backend):
    """A softmax over the k hardest negatives only."""
    d = _inputs(backend, n=66, labels="distinct")
    options = {"labels": d.labels, "ref_labels": d.ref_labels, "normalize": True}
    (top,) = mine(d.x, d.y, [Extreme(DIFFERENT, k=k)], **options)
    rows = torch.arange(24, device=d.x.device)[:, None].expand_as(top.indices)
    s = pair_similarity(d.x, d.y, rows.flatten(), top.indices.flatten(), normalize=True).view_as(top.values)
    ours = (d.scale * s).logsumexp(1).mean()

    full = _unit(d.x) @ _unit(d.y).T
    full = full.masked_fill(d.labels[:, None] == d.ref_labels[None, :], -math.inf)
    dense = (d.scale * full.topk(k, dim=1).values).logsumexp(1).mean()
    torch.testing.assert_close(top.values, full.topk(k, dim=1).values.detach())
    _agree(ours, dense, (d.x, d.y, d.scale))


@pytest.mark.parametrize("detach", [False, True])
def test_contrastive_repulsion_is_a_softmax_weighted_mean(detach, backend):
    """CACR (Zheng et al. 2021): negatives weighted by their own closeness, with or without gradient of the weights."""
    d = _inputs(backend, n=30)
    diagonal, columns = (torch.arange(k, device=d.x.device) for k in (24, 30))
    term = Term(Reduction.SOFTMAX_MEAN, mask=DIFFERENT, scale=-d.scale, detach_weights=detach)
    (mean,) = pair_reduce(
        d.x,
        d.y,
        [term],
        labels=diagonal,
        ref_labels=columns,
        similarity=Similarity.SQUARED_EUCLIDEAN,
        normalize=True,
    )
    ours = -mean.mean()

    cost = (_unit(d.x)[:, None] - _unit(d.y)[None, :]).square().sum(-1)
    logits = (-d.scale * cost).masked_fill(diagonal[:, None] == columns[None, :], -math.inf)
    p = logits.softmax(1)
    dense = -((p.detach() if detach else p) * cost).sum(1).mean()
    _agree(ours, dense, (d.x, d.y) if detach else (d.x, d.y, d.scale))


def test_memory_bank_without_gradient(backend):
    """Cross-batch memory (Wang et al. 2020): batch against a bank that takes no gradient, own entries excluded."""
    d = _inputs(backend, n=60)
    bank = d.y.detach()
    own = torch.arange(24, device=d.x.device) + 10  # where the batch itself lies in the bank
    terms = [
        Term(SUM, Score.HINGE, SAME, scale=-1.0, offset=0.9),
        Term(SUM, Score.HINGE, DIFFERENT, offset=-0.1),
    ]
    positive, negative = pair_reduce(d.x, bank, terms, labels=d.labels, ref_labels=d.ref_labels, exclude=own)
    ours = (positive + negative).mean()

    s = d.x @ bank.T
    seen = torch.arange(60, device=d.x.device)[None, :] != own[:, None]
    same = d.labels[:, None] == d.ref_labels[None, :]
    dense = (torch.relu(0.9 - s) * (seen & same) + torch.relu(s - 0.1) * (seen & ~same)).sum(1).mean()
    _agree(ours, dense, (d.x,))
    assert not bank.requires_grad and bank.grad is None


def test_contrastive_with_euclidean_margins_and_nonzero_average(backend):
    """Hadsell et al. 2006, averaged over the pairs that violate their margin."""
    d = _inputs(backend)
    options = {"labels": d.labels, "similarity": Similarity.EUCLIDEAN, "normalize": True}
    near, far = {"mask": SAME, "offset": -0.3}, {"mask": DIFFERENT, "scale": -1.0, "offset": 1.2}
    terms = [Term(r, Score.HINGE, **k) for k in (near, far) for r in (SUM, COUNT)]
    positive, violating, negative, close = (v.sum() for v in pair_reduce(d.x, terms=terms, **options))
    ours = positive / violating + negative / close

    same, different = _masks(d.labels)
    distance = (_unit(d.x)[:, None] - _unit(d.x)[None, :]).square().sum(-1).clamp_min(1e-30).sqrt()
    positive, negative = torch.relu(distance - 0.3)[same], torch.relu(1.2 - distance)[different]
    dense = positive[positive > 0].mean() + negative[negative > 0].mean()
    _agree(ours, dense, (d.x,))


def test_circle(backend):
    """Sun et al. 2020, equation 6, the factors in brackets taken as constants."""
    gamma, margin = 16.0, 0.4
    d = _inputs(backend)
    root = math.sqrt(gamma)
    terms = [
        Term(LSE, Score.CIRCLE, SAME, scale=-root, offset=root, constant=root * margin),
        Term(LSE, Score.CIRCLE, DIFFERENT, scale=root, constant=root * margin),
    ]
    ours = F.softplus(sum(pair_reduce(d.x, terms=terms, labels=d.labels, normalize=True))).mean()

    same, different = _masks(d.labels)
    s = _unit(d.x) @ _unit(d.x).T
    positive = -gamma * torch.relu(1 + margin - s.detach()) * (s - (1 - margin))
    negative = gamma * torch.relu(s.detach() + margin) * (s - margin)
    total = 0.0
    for i in range(24):
        total = total + F.softplus(positive[i][same[i]].logsumexp(0) + negative[i][different[i]].logsumexp(0))
    _agree(ours, total / 24, (d.x,))


def test_per_row_scales_offsets_and_column_weights(backend):
    """Learned temperatures of each anchor, importance weights and logit adjustment of each candidate."""
    d = _inputs(backend, n=30)
    term = Term(LSE, scale=d.row_scale, offset=d.row_offset, other_offset=d.column_offset, weight=d.column_weight)
    ours = pair_reduce(d.x, d.y, [term], normalize=True)[0].square().mean()

    z = d.row_scale[:, None] * (_unit(d.x) @ _unit(d.y).T) + d.row_offset[:, None] + d.column_offset[None, :]
    dense = torch.log((d.column_weight[None, :] * z.exp()).sum(1)).square().mean()
    _agree(ours, dense, (d.x, d.y, d.row_scale, d.row_offset, d.column_offset, d.column_weight))


def test_explicit_masks_and_pair_lists(backend):
    d = _inputs(backend, n=30)
    term = [Term(LSE, mask=Mask.GIVEN, scale=d.scale)]
    (masked,) = pair_reduce(d.x, d.y, term, pair_mask=d.pair_mask, normalize=True)
    (listed,) = pair_reduce(
        d.x, d.y, [Term(LSE, scale=d.scale)], pairs=d.pair_mask.nonzero(as_tuple=True), normalize=True
    )
    for ours in (masked, listed):
        s = (d.scale * _unit(d.x) @ _unit(d.y).T).masked_fill(~d.pair_mask, -math.inf)
        _agree(ours.mean(), s.logsumexp(1).mean(), (d.x, d.y, d.scale))


def test_statistics_of_positives_and_negatives_beside_a_loss(backend):
    d = _inputs(backend)
    terms = [Term(LSE), Term(Reduction.MOMENTS, mask=SAME), Term(Reduction.MOMENTS, mask=DIFFERENT)]
    _, *moments = pair_reduce(d.x, terms=terms, labels=d.labels, normalize=True)
    s = _unit(d.x.detach()) @ _unit(d.x.detach()).T
    for got, mask in zip(moments, _masks(d.labels), strict=True):
        for i in range(24):
            row = s[i][mask[i]]
            want = torch.stack(
                [row.new_tensor(float(len(row))), row.mean(), row.var(correction=0), row.min(), row.max()]
            )
            torch.testing.assert_close(got[:, i], want)
