"""Contrastive, retrieval, multi-label and ranking losses beside the straightforward dense code for each.

    python bench/contrast.py                 forward + backward at B = 4096, D = 128
    python bench/contrast.py SimCLR GIST     losses whose name contains one of these
    python bench/contrast.py --large         time and memory of ours alone at B = 65536, D = 64;
                                             what takes longer than --minutes 3 is named, not run
    python bench/contrast.py --quick         a smoke check at a tiny size; nothing is kept

The dense code is below, a few lines a loss: what one writes from the formula in plain PyTorch. How it is measured:
bench/versus.py. Results go to bench/results/contrast.json and into the table of docs/contrastive.md.
"""

from __future__ import annotations

import functools
import sys

import machine
import torch
import torch.nn.functional as F
import versus
from torch import Tensor

T = 0.2


def inputs(batch: int, width: int) -> list[Tensor]:
    """Two views of random embeddings."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=g)
    return [x.requires_grad_(), (x.detach() + torch.randn(batch, width, generator=g)).requires_grad_()]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


@functools.cache
def targets(batch: int) -> Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(1))


@functools.cache
def clusters(batch: int, count: int = 50) -> Tensor:
    return torch.randint(count, (2, batch), generator=torch.Generator().manual_seed(2))


@functools.cache
def multi_hot(batch: int) -> Tensor:
    """Two labels a sample on average, of 80."""
    return (torch.rand(batch, 80, generator=torch.Generator().manual_seed(3)) < 0.025).long()


def guide(x: Tensor) -> Tensor:
    return x.detach()[:, : x.shape[1] // 2]


@functools.cache
def _rows(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def queue(x: Tensor) -> Tensor:
    """As many keys of earlier batches."""
    return _rows(*x.shape, 4).to(x)


def queue_labels(batch: int) -> Tensor:
    return multi_hot(batch).flip(0)


def centroids(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Centroids of two clusterings into B / 8 clusters, and the temperature of each."""
    count = len(x) // 8
    return [_rows(count, x.shape[1], k).to(x) for k in (5, 6)], [0.1 + 0.2 * targets(count).to(x)] * 2


def teacher(batch: int) -> Tensor:
    """A teacher's scores of two documents a query."""
    return _rows(batch, 2, 7)


def related(x: Tensor) -> Tensor:
    """How related two of 80 labels are."""
    return torch.rand(80, 80, generator=torch.Generator().manual_seed(8)).to(x)


def ages(batch: int) -> Tensor:
    return (100 * targets(batch)).long()


def real_ages(batch: int) -> Tensor:
    return 100 * targets(batch)


def scored(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores, deviations, targets, the targets' deviations)."""
    t = targets(len(x)).to(x)
    return x.sum(1), F.softplus(y.sum(1)), t, t.flip(0)


@functools.cache
def _losses() -> dict:
    from flashpair import losses as f

    return {
        "SimCLRLoss": lambda x, y: f.SimCLRLoss(T)(x, y),
        "DCLLoss": lambda x, y: f.DCLLoss(T)(x, y),
        "HardNegativeContrastiveLoss": lambda x, y: f.HardNegativeContrastiveLoss()(x, y),
        "HardContrastiveLoss": lambda x, y: f.HardContrastiveLoss(T)(x, y),
        "MACLLoss": lambda x, y: f.MACLLoss()(x, y),
        "MoCoV3Loss": lambda x, y: f.MoCoV3Loss(T)(x, y, x, y),
        "AlignmentUniformityLoss": lambda x, y: f.AlignmentUniformityLoss()(x, y),
        "CyCLIPLoss": lambda x, y: f.CyCLIPLoss()(unit(x), unit(y), 1 / T),
        "CWCLLoss": lambda x, y: f.CWCLLoss()(unit(x), unit(y), 1 / T, unit(guide(x))),
        "CWCLLoss, exponential": lambda x, y: f.CWCLLoss(f.CWCLWeight.EXPONENTIAL)(
            unit(x), unit(y), 1 / T, unit(guide(x))
        ),
        "DistillClipLoss": lambda x, y: sum(
            f.DistillClipLoss()(unit(x), unit(y), 1 / T, unit(guide(x)), unit(guide(y)), 9.0)
        ),
        "MannWhitneyLoss": lambda x, y: f.MannWhitneyLoss(0.05)(x, y),
        "CACRLoss": lambda x, y: f.CACRLoss()(x, y),
        "CACRQueueLoss": lambda x, y: f.CACRQueueLoss()([x, y], [x, y], queue(x)),
        "CACRMoCoLoss": lambda x, y: f.CACRMoCoLoss(T)([x, y, x + y], [x, y]),
        "MEOWLoss": lambda x, y: f.MEOWLoss()(x, y, clusters(len(x))),
        "AdaMEOWLoss": lambda x, y: f.AdaMEOWLoss(x.shape[1])(x, y),
        "ProtoNCELoss": lambda x, y: f.ProtoNCELoss()(x, clusters(len(x), len(x) // 8), *centroids(x)) + 0 * y.sum(),
        "SupReMixLoss": lambda x, y: f.SupReMixLoss()(x, ages(len(x))) + 0 * y.sum(),
        "SupReMixLoss, real": lambda x, y: f.SupReMixLoss()(x, real_ages(len(x))) + 0 * y.sum(),
        "RnCLoss": lambda x, y: f.RnCLoss()(x, targets(len(x))) + 0 * y.sum(),
        "AMCLLoss": lambda x, y: f.AMCLLoss()([x], [y], guide(x) / 8, guide(y) / 8),
        "SimLAPLoss": lambda x, y: f.SimLAPLoss()(x, torch.sigmoid(y), *clusters(len(x))),
        "MultipleNegativesRankingLoss": lambda x, y: f.MultipleNegativesRankingLoss(
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
        )([x, y]),
        "GISTEmbedLoss": lambda x, y: f.GISTEmbedLoss(T)([x, y], [guide(x), guide(y)]),
        "GISTEmbedLoss, no guide": lambda x, y: f.GISTEmbedLoss(T)([x, y]),
        "EmbeddingDistillationLoss": lambda x, y: f.EmbeddingDistillationLoss(temperature=T)(
            [x, y, y.roll(1, 0)], teacher(len(x))
        ),
        "EmbeddingDistillationLoss, M3": lambda x, y: f.EmbeddingDistillationLoss(
            kind=f.DistillationKind.M3_KD, temperature=T
        )([x, y, y.roll(1, 0)], teacher(len(x))),
        "CoSENTLoss": lambda x, y: f.CoSENTLoss()([x, y], targets(len(x))),
        "MultiLabelContrastiveLoss": lambda x, y: f.MultiLabelContrastiveLoss()(x, multi_hot(len(x))) + 0 * y.sum(),
        "MulSupConLoss": lambda x, y: f.MulSupConLoss()(x, multi_hot(len(x))) + 0 * y.sum(),
        "MulSupConLoss, queue": lambda x, y: (
            f.MulSupConLoss()(x, multi_hot(len(x)), y, queue(x), queue_labels(len(x))) + 0 * y.sum()
        ),
        "HybridMultiLabelLoss": lambda x, y: f.HybridMultiLabelLoss()(y @ prototypes(y).T, x, multi_hot(len(x))),
        "NWSLoss": lambda x, y: f.NWSLoss(80, x.shape[1], related(x))(x, multi_hot(len(x)), y) + 0 * y.sum(),
        "MSCLoss": lambda x, y: f.MSCLoss(80, x.shape[1])(x, multi_hot(len(x))) + 0 * y.sum(),
        "MSCRGLoss": lambda x, y: f.MSCRGLoss(80, x.shape[1])(x, multi_hot(len(x))) + 0 * y.sum(),
        "RankNetLoss": lambda x, y: f.RankNetLoss()(x.sum(1), targets(len(x))) + 0 * y.sum(),
        "ComparisonLoss": lambda x, y: f.ComparisonLoss()(x.sum(1), targets(len(x))) + 0 * y.sum(),
        "UNIQUELoss": lambda x, y: f.UNIQUELoss()(*scored(x, y)),
        "ADRMSELoss": lambda x, y: f.ADRMSELoss()(x.sum(1), 4 * targets(len(x))) + 0 * y.sum(),
        "LambdaLoss": lambda x, y: f.LambdaLoss()(x.sum(1), 4 * targets(len(x))) + 0 * y.sum(),
    }


# --- the dense code ---------------------------------------------------------------------------------------------------


def off_diagonal(s: Tensor) -> Tensor:
    return s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)


def views(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(similarities of 2 B views, negatives only; the positives' similarities)."""
    both = unit(torch.cat([x, y]))
    s, b = both @ both.T, len(x)
    index = torch.arange(2 * b)
    other = (index + b) % (2 * b)
    hidden = torch.zeros_like(s, dtype=torch.bool)
    hidden[index, index] = hidden[index, other] = True
    return s, hidden, s[index, other]


def sim_clr(x: Tensor, y: Tensor) -> Tensor:
    both = unit(torch.cat([x, y]))
    return F.cross_entropy(off_diagonal(both @ both.T / T), (torch.arange(2 * len(x)) + len(x)) % (2 * len(x)))


def dcl(x: Tensor, y: Tensor) -> Tensor:
    s, hidden, positive = views(x, y)
    return ((s / T).masked_fill(hidden, -torch.inf).logsumexp(1) - positive / T).mean()


def hard_negative(x: Tensor, y: Tensor) -> Tensor:
    s, hidden, positive = views(x, y)
    n, t = 2 * len(x) - 2, 0.5
    pos, neg = torch.exp(positive / t), torch.exp(s / t).masked_fill(hidden, 0.0)
    weighted = (neg * neg).sum(1) / (neg.sum(1) / n)
    ng = ((weighted - 0.1 * n * pos) / 0.9).clamp_min(n * torch.exp(torch.tensor(-1 / t)).item())
    return -torch.log(pos / (pos + ng)).mean()


def hard(x: Tensor, y: Tensor) -> Tensor:
    s = unit(x) @ unit(y).T
    kept = off_diagonal(s).topk(-int(-0.0819 * (len(x) - 1) // 1), dim=1).values
    return (torch.cat([s.diagonal()[:, None], kept], 1) / T).logsumexp(1).sub(s.diagonal() / T).mean()


def macl(x: Tensor, y: Tensor) -> Tensor:
    s, hidden, positive = views(x, y)
    t = 0.1 * (1 + 0.5 * positive.detach().mean())
    log_p = positive / t - torch.cat([positive[:, None], s.masked_fill(hidden, -torch.inf)], 1).div(t).logsumexp(1)
    return -(log_p / (1 - log_p.exp() + 1e-8).detach()).mean()


def moco_v3(x: Tensor, y: Tensor) -> Tensor:
    index, p, q = torch.arange(len(x)), unit(x), unit(y)
    return 2 * T * (F.cross_entropy(p @ q.detach().T / T, index) + F.cross_entropy(q @ p.detach().T / T, index))


def align_uniform(x: Tensor, y: Tensor) -> Tensor:
    p, q = unit(x), unit(y)
    spread = sum(torch.pdist(v).pow(2).mul(-2).exp().mean().log() for v in (p, q)) / 2
    return (p - q).square().sum(1).mean() + spread


def clip(s: Tensor) -> Tensor:
    index = torch.arange(len(s))
    return (F.cross_entropy(s, index) + F.cross_entropy(s.T, index)) / 2


def cy_clip(x: Tensor, y: Tensor) -> Tensor:
    p, q = unit(x), unit(y)
    s = p @ q.T
    cross, within = (s - s.T).square().sum(), (p @ p.T - q @ q.T).square().sum()
    return clip(s / T) + 0.25 * (cross + within) / len(x)


def cwcl(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Tensor:
    s, m = unit(x) @ unit(y).T / T, unit(guide(x))
    w = m @ m.T / 2 + 0.5 if bandwidth is None else ((m @ m.T - 1) / bandwidth).exp()
    rows = -(w * s.log_softmax(1)).sum(1) / w.sum(1)
    return rows.mean() + F.cross_entropy(s.T, torch.arange(len(x)))


def distill_clip(x: Tensor, y: Tensor) -> Tensor:
    s, taught = unit(x) @ unit(y).T / T, 9.0 * unit(guide(x)) @ unit(guide(y)).T
    of = lambda s, t: -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()  # noqa: E731
    return clip(s) + (of(s, taught) + of(s.T, taught.T)) / 2


def mann_whitney(x: Tensor, y: Tensor) -> Tensor:
    s = unit(x) @ unit(y).T
    negatives = s[~torch.eye(len(x), dtype=torch.bool)]
    return sum(F.softplus((negatives - p) / 0.05).sum() for p in s.diagonal()) / len(x)


def cacr(x: Tensor, y: Tensor) -> Tensor:
    squared = 2 - 2 * unit(x) @ unit(y).T
    weights = off_diagonal(-0.9 * squared).softmax(1)
    return squared.diagonal().mean() - (weights * squared).sum(1).mean()


def cacr_queue(x: Tensor, y: Tensor) -> Tensor:
    p, q, n = unit(x), unit(y), unit(queue(x))
    total = 2 * (2 - 2 * (p.detach() * q).sum(1).mean() / 2 - 2 * (p * q.detach()).sum(1).mean() / 2)
    for v in (p, q):
        s, own = v @ n.T, v @ v.T
        weights = (2 * torch.cat([s, off_diagonal(own)], 1)).softmax(1).detach()
        total = total - (weights * (2 - 2 * torch.cat([s, own], 1))).sum(1).mean()
    return total / 2


def cacr_moco(x: Tensor, y: Tensor) -> Tensor:
    queries, index, total = [unit(v) for v in (x, y, x + y)], torch.arange(len(x)), 0.0
    for v, key in enumerate(unit(k.detach()) for k in (x, y)):
        others = [q for a, q in enumerate(queries) if a != v]
        w = torch.stack([(q - key).square().sum(1) for q in others]).div(T).softmax(0).detach()
        rows = torch.stack([F.cross_entropy(q @ key.T / T, index, reduction="none") for q in others])
        total = total + 2 * T * (w * rows).sum(0).mean()
    return total / 2


def meow(x: Tensor, y: Tensor) -> Tensor:
    s, c = unit(x) @ unit(y).T / 0.4, clusters(len(x))
    weights = (c[:, :, None] != c[:, None, :]).sum(0)
    return ((weights * s.exp()).sum(1).log() - s.diagonal()).mean()


def ada_meow(x: Tensor, y: Tensor) -> Tensor:
    hidden, output = torch.nn.Linear(x.shape[1], 16).to(x), torch.nn.Linear(16, 1).to(x)
    a, b = unit(x), unit(y)
    s = a @ b.T / 0.4
    pairs = torch.tanh((a @ hidden.weight.T + hidden.bias)[:, None] + b @ hidden.weight.T)
    w = torch.sigmoid(output(pairs)).squeeze(2)
    return ((w * s.exp()).sum(1).log() - s.diagonal()).mean()


def proto_nce(x: Tensor, y: Tensor) -> Tensor:
    of = zip(*centroids(x), clusters(len(x), len(x) // 8), strict=True)
    return sum(F.cross_entropy(unit(x) @ unit(u).T / phi, c) for u, phi, c in of) / 2 + 0 * y.sum()


def sup_re_mix(x: Tensor, y: Tensor, target=ages) -> Tensor:
    """As the authors have it: a mixture for each triple of samples."""
    from flashpair.losses.contrast.sup_re_mix import beta_two, draw_seed

    z, t, index = unit(x), target(len(x)), torch.arange(len(x))
    s, c = z @ z.T / 0.3, z @ z.detach().T / 0.3
    apart = (t[:, None] - t[None]).abs()
    mixed = beta_two(draw_seed(), index[:, None], index[None], 8.0, x.dtype)
    negative = mixed * c.diagonal()[:, None] + (1 - mixed) * c + ((1 - mixed) * apart).log1p()
    d, e = (t[:, None] - t[None])[:, :, None], (t[None] - t[:, None])[:, None]
    between = (d > 0) & (d < 5) & (e > 0) & (e < 5)
    a = torch.where(between, e.to(x) / (d + e), 0.0)
    triples = torch.where(between, a * c[:, :, None] + (1 - a) * c[:, None], 0.0).flatten(1)
    positive = (apart == 0).fill_diagonal_(False)
    blocks = [
        off_diagonal(s + apart.to(x).log1p()), negative.masked_fill(apart == 0, -torch.inf),
        triples.masked_fill(~between.flatten(1), -torch.inf),
    ]  # fmt: skip
    count = positive.sum(1) + between.sum((1, 2))
    pull = (torch.where(positive, s, 0.0).sum(1) + triples.sum(1)) / count.clamp_min(1)
    return torch.where(count > 0, torch.cat(blocks, 1).logsumexp(1) - pull, 0.0).mean() + 0 * y.sum()


def rnc(x: Tensor, y: Tensor) -> Tensor:
    """As the authors have it: a pass over the batch for each of its columns."""
    n, t = len(x), targets(len(x)).to(x)
    keep = ~torch.eye(n, dtype=torch.bool)
    s = (-torch.cdist(x, x) / 2)[keep].view(n, n - 1)
    far = (t[:, None] - t[None]).abs()[keep].view(n, n - 1)
    e, total = s.exp(), 0.0
    for k in range(n - 1):
        total = total - (s[:, k] - torch.log((e * (far >= far[:, k : k + 1])).sum(1))).sum()
    return total / (n * (n - 1)) + 0 * y.sum()


def amcl(x: Tensor, y: Tensor) -> Tensor:
    s, heat = unit(x) @ unit(y).T, 0.05 + 1.95 * torch.sigmoid(-(guide(x) / 8) @ (guide(y) / 8).T)
    omega = x.shape[1] / 2 * heat.log() + 1 / heat
    n = len(x) - 1
    spread = omega.diagonal() - (omega.sum(1) - omega.diagonal()) / n
    return (off_diagonal(s / heat).logsumexp(1) - (s / heat).diagonal() + 0.01 * spread).mean()


def sim_lap(x: Tensor, y: Tensor) -> Tensor:
    g, (own, partner) = torch.sigmoid(y), clusters(len(x))
    norms = ((g * x).norm(dim=1, keepdim=True)) * ((g * g) @ (x * x).T).sqrt()
    s = 10 * (g * g * x) @ x.T / norms
    positive = partner[:, None] == own[None]
    rivals = s.masked_fill(positive | (own[:, None] == own[None]), -torch.inf).logsumexp(1, keepdim=True)
    return F.softplus(rivals - s)[positive].mean()


def multiple_negatives(x: Tensor, y: Tensor) -> Tensor:
    q, d = unit(x), unit(y)
    s = 20 * q @ d.T
    blocks = [s, off_diagonal(20 * q @ q.T), 20 * d @ q.T, off_diagonal(20 * d @ d.T)]
    return (torch.cat(blocks, 1).logsumexp(1) - s.diagonal()).mean()


def gist(x: Tensor, y: Tensor, of=guide) -> Tensor:
    (q, d), (u, v) = ((unit(a), unit(b)) for a, b in ((x, y), (of(x), of(y))))
    limit, eye = (u * v).sum(1, keepdim=True), torch.eye(len(x), dtype=torch.bool)
    blocks = [
        (a @ b.T / T).masked_fill((g @ h.T > limit) & ~eye if k == 0 else (g @ h.T > limit) | eye, -torch.inf)
        for k, (a, b, g, h) in enumerate(((q, d, u, v), (q, q, u, u), (d, d, v, v)))
    ]
    return (torch.cat(blocks, 1).logsumexp(1) - (q * d).sum(1) / T).mean()


def distillation(x: Tensor, y: Tensor, m3: bool = False) -> Tensor:
    q, d, index = unit(x), unit(torch.cat([y, y.roll(1, 0)])), torch.arange(len(x))
    s = q @ d.T / T
    own, taught = s.view(-1, 2, len(x)).diagonal(dim1=0, dim2=2).T, teacher(len(x)).to(x).softmax(1)
    first = F.cross_entropy(s, index, reduction="none")
    if not m3:
        return first.mean() - (taught * own.log_softmax(1)).sum(1).mean()
    without_first = s.index_put((index, index), s.new_tensor(-torch.inf))
    second = F.cross_entropy(without_first, index + len(x), reduction="none")
    return (taught * torch.stack([first, second], 1)).sum(1).mean()


def co_sent(x: Tensor, y: Tensor) -> Tensor:
    s, t = 20 * (unit(x) * unit(y)).sum(1), targets(len(x))
    pairs = (s[:, None] - s[None])[t[:, None] < t[None]]
    return torch.cat([pairs.new_zeros(1), pairs]).logsumexp(0)


def multi_label(x: Tensor, y: Tensor) -> Tensor:
    h = multi_hot(len(x)).to(x)
    shared, size = h @ h.T, h.sum(1)
    w = (shared / (size[:, None] + size[None] - shared).clamp_min(1)).fill_diagonal_(0)
    log_p = off_diagonal(unit(x) @ unit(x).T / 0.1).log_softmax(1)
    rows = -torch.where(w > 0, w * log_p, 0.0).sum(1) / w.sum(1).clamp_min(1e-12)
    return rows[w.sum(1) > 0].mean() + 0 * y.sum()


def mul_sup_con(x: Tensor, y: Tensor) -> Tensor:
    h = multi_hot(len(x)).to(x)
    log_p = off_diagonal(unit(x) @ unit(x).T / 0.1).log_softmax(1)
    others = h.sum(0) - 1
    weights = ((h * (others > 0) / others.clamp_min(1)) @ h.T).fill_diagonal_(0)
    return -torch.where(weights > 0, weights * log_p, 0.0).sum() / (h * (others > 0)).sum() + 0 * y.sum()


def mul_sup_con_queue(x: Tensor, y: Tensor) -> Tensor:
    h = multi_hot(len(x)).to(x)
    theirs = torch.cat([h, queue_labels(len(x)).to(x)])
    log_p = (unit(x) @ unit(torch.cat([y.detach(), queue(x)])).T / 0.1).log_softmax(1)
    positives = theirs.sum(0)
    weights = (h / positives.clamp_min(1)) @ theirs.T
    return -(weights * log_p).sum() / (h * (positives > 0)).sum() + 0 * y.sum()


def prototypes(x: Tensor) -> Tensor:
    torch.manual_seed(0)  # as `ours`
    return unit(torch.randn(80, x.shape[1])).to(x)


def msc(x: Tensor, y: Tensor) -> Tensor:
    h = multi_hot(len(x)).to(x)
    size, shared, z, p = h.sum(1), h @ h.T, unit(x), prototypes(x)
    union = torch.where(shared > 0, 1 / (size[:, None] + size[None] - shared).clamp_min(1), 0.0).fill_diagonal_(0)
    n = h / (1 + union @ h)
    logits = torch.cat([z @ p.T, off_diagonal(z @ z.T)], 1) / 0.1
    total = torch.cat([logits[:, :80], logits[:, 80:] + torch.log(torch.tensor(0.1))], 1).logsumexp(1)
    w = torch.cat([n, union * (n @ h.T)], 1)
    rows = torch.where(w > 0, w * (total[:, None] - logits), 0.0).sum(1) / size.clamp_min(1)
    return torch.where(size > 0, rows, 0.0).mean() + 0 * y.sum()


def mscrg(x: Tensor, y: Tensor) -> Tensor:
    h, z = torch.cat([multi_hot(len(x)).to(x), torch.eye(80).to(x)]), torch.cat([unit(x), prototypes(x)])
    others = h.sum(0) - 1
    w = ((h * (others > 0) / others.clamp_min(1)) @ h.T).fill_diagonal_(0) / h.sum(1).clamp_min(1)[:, None]
    s = z @ z.T / 0.1
    log_p = off_diagonal(s).log_softmax(1)
    push = torch.where(w > 0, (log_p.exp() - w).clamp_min(0).detach() * s, 0.0)
    losses = -torch.where(w > 0, w * log_p, 0.0) - push
    return losses.sum() / (w.sum(1) > 0).sum() + 0 * y.sum()


def nws(x: Tensor, y: Tensor) -> Tensor:
    h, z, p = multi_hot(len(x)).to(x), unit(x), unit(prototypes(x))
    size, shared = h.sum(1), h @ h.T
    share = torch.where(shared > 0, 1 / (size[:, None] + size[None] - shared).clamp_min(1), 0.0)
    each = torch.where(h > 0, h / (1 - 1 / size.clamp_min(1)[:, None] + share @ h), 0.0)
    w = torch.cat([share * (each @ h.T), each], 1)
    s, mean = torch.cat([z @ unit(y.detach()).T, z @ p.T], 1) / 0.07, h / size.clamp_min(1)[:, None]
    a = torch.cat([0.1 * (1 - mean @ related(x) @ mean.T) * (shared == 0), 1 - h], 1)
    total = torch.where(a > 0, s + a.clamp_min(1e-38).log(), -torch.inf).logsumexp(1, keepdim=True)
    rows = (w * (total - s)).sum(1) / size.clamp_min(1)
    return torch.where(size > 0, rows, 0.0).mean() + 0 * y.sum()


def hybrid(x: Tensor, y: Tensor) -> Tensor:
    h, z = multi_hot(len(x)).to(x), y @ prototypes(y).T
    p = z.sigmoid()
    pairs = h[:, :, None] * (1 - h[:, None])  # (B, C, C): present, absent
    correlation = (pairs * (p[:, None] - p[:, :, None]).exp()).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    w = (h @ h.T > 0).to(x).fill_diagonal_(0)
    log_p = off_diagonal(unit(x) @ unit(x).T / 0.1).log_softmax(1)
    rows = -torch.where(w > 0, log_p, 0.0).sum(1) / w.sum(1).clamp_min(1)
    return F.binary_cross_entropy_with_logits(z, h) + correlation.mean() + rows[w.sum(1) > 0].mean()


def rank_net(x: Tensor, y: Tensor) -> Tensor:
    a, t = x.sum(1), targets(len(x))
    return F.softplus(-(a[:, None] - a[None])[t[:, None] > t[None]]).mean() + 0 * y.sum()


def comparison(x: Tensor, y: Tensor) -> Tensor:
    a, t, i = x.sum(1), targets(len(x)), torch.triu_indices(len(x), len(x), 1)
    d, g = a[i[0]] - a[i[1]], (torch.sign(t[i[0]] - t[i[1]]).to(a) + 1) / 2
    p, q = torch.special.ndtr(d), torch.special.ndtr(-d)
    return (1 - (p * g + 1e-8).sqrt() - (q * (1 - g) + 1e-8).sqrt()).mean() + 0 * y.sum()


def unique(x: Tensor, y: Tensor) -> Tensor:
    a, sigma, t, tau = scored(x, y)
    i, j = torch.triu_indices(len(x), len(x), 1)
    over = lambda v: (v[i].square() + v[j].square() + 1e-8).sqrt()  # noqa: E731
    d, g = (a[i] - a[j]) / over(sigma.detach()), (t[i] - t[j]) / over(tau)
    fidelity = sum((torch.special.ndtr(v * d) * torch.special.ndtr(v * g) + 1e-8).sqrt() for v in (1, -1))
    ordered = torch.sign(tau[i] - tau[j]) * (sigma[i] - sigma[j])
    return (1 - fidelity + (0.025 - ordered).clamp_min(0)).mean()


def adr_mse(x: Tensor, y: Tensor) -> Tensor:
    a, t = x.sum(1), targets(len(x)).to(x)
    rank = (t[None] > t[:, None]).sum(1) + ((t[None] == t[:, None]).sum(1) + 1) / 2
    found = 0.5 + torch.sigmoid(a[None] - a[:, None]).sum(1)
    return ((rank - found).square() / torch.log2(1 + rank)).mean() + 0 * y.sum()


def lambda_loss(x: Tensor, y: Tensor) -> Tensor:
    a, t = x.sum(1), 4 * targets(len(x)).to(x)
    rank = lambda v: (v.argsort(descending=True).argsort() + 1).to(v)  # noqa: E731
    gain = (2**t - 1) / ((2**t - 1) / torch.log2(1 + rank(t))).sum()
    r, change = rank(a.detach()), (gain[:, None] - gain[None]).abs()
    apart = (r[:, None] - r[None]).abs().clamp_min(1)
    discount = 1 / torch.log2(1 + r)
    w = (discount[:, None] - discount[None]).abs() + 10 * (1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)).abs()
    losses = w * change * F.softplus(-(a[:, None] - a[None])) / torch.log(torch.tensor(2.0))
    return losses[t[:, None] > t[None]].mean() + 0 * y.sum()


DENSE = {
    "SimCLRLoss": sim_clr, "DCLLoss": dcl, "HardNegativeContrastiveLoss": hard_negative, "HardContrastiveLoss": hard,
    "MACLLoss": macl, "MoCoV3Loss": moco_v3, "AlignmentUniformityLoss": align_uniform, "CyCLIPLoss": cy_clip,
    "CWCLLoss": cwcl, "DistillClipLoss": distill_clip, "MannWhitneyLoss": mann_whitney, "CACRLoss": cacr,
    "MEOWLoss": meow, "RnCLoss": rnc, "AMCLLoss": amcl, "SimLAPLoss": sim_lap,
    "MultipleNegativesRankingLoss": multiple_negatives, "GISTEmbedLoss": gist, "CoSENTLoss": co_sent,
    "MultiLabelContrastiveLoss": multi_label, "MulSupConLoss": mul_sup_con, "MSCLoss": msc,
    "MSCRGLoss": mscrg, "RankNetLoss": rank_net,
    "ComparisonLoss": comparison, "LambdaLoss": lambda_loss,
    "AdaMEOWLoss": ada_meow, "ProtoNCELoss": proto_nce, "SupReMixLoss": sup_re_mix, "CACRQueueLoss": cacr_queue,
    "CACRMoCoLoss": cacr_moco,
    "SupReMixLoss, real": functools.partial(sup_re_mix, target=real_ages),
    "CWCLLoss, exponential": functools.partial(cwcl, bandwidth=0.1), "MulSupConLoss, queue": mul_sup_con_queue,
    "NWSLoss": nws, "HybridMultiLabelLoss": hybrid, "ADRMSELoss": adr_mse, "UNIQUELoss": unique,
    "EmbeddingDistillationLoss": distillation,
    "EmbeddingDistillationLoss, M3": functools.partial(distillation, m3=True),
    "GISTEmbedLoss, no guide": functools.partial(gist, of=Tensor.detach),
}  # fmt: skip


def ours(name: str, leaves: list[Tensor]) -> Tensor:
    torch.manual_seed(0)  # prototypes, networks, mixtures
    return _losses()[name](*leaves)


def dense(name: str, leaves: list[Tensor]) -> Tensor:
    torch.manual_seed(0)
    return DENSE[name](*leaves)


SUITE = versus.Suite(
    "contrast.py", machine.ROOT / "docs" / "contrastive.md", "dense code takes",
    sorted(DENSE), inputs, ours, dense,
    lambda name: "", lambda name: 1e-7,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(versus.main(SUITE, __doc__))
