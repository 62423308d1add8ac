"""The contrastive losses of views and towers: ours, and their definitions as loops from the papers. One row, all tests.

`CASES` are all of these tables: retrieval_cases.py, multi_label_cases.py and ranking_cases.py hold the others.
"""

from __future__ import annotations

import itertools
import math

import multi_label_cases
import ranking_cases
import retrieval_cases
import torch
from loss_cases import cosine
from torch import Tensor
from views import Case, Views, lse, mean, unit

from flashpair import losses
from flashpair.losses.contrast.feature_transformation import beta_like
from flashpair.losses.contrast.sup_re_mix import beta_two
from flashpair.random import draw_seed, uniform


def anchors(d: Views) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """(view, its positive, its negatives) for each of the 2 B views."""
    b = len(d.x)
    both = [*d.x, *d.y]
    return [(both[i], both[(i + b) % (2 * b)], [v for k, v in enumerate(both) if k % b != i % b]) for i in range(2 * b)]


def define_sim_clr(d: Views, temperature: float = 0.1) -> Tensor:
    terms = []
    for a, p, negatives in anchors(d):
        s = [cosine(a, v) / temperature for v in (p, *negatives)]
        terms.append(lse(s) - s[0])
    return mean(terms)


def define_dcl(d: Views, weighted: bool = False, through: bool = False) -> Tensor:
    terms, own = [], torch.stack([cosine(a, b) for a, b in zip(d.x, d.y, strict=True)])
    weights = 2 - len(d.x) * torch.softmax(own / 0.5, 0) if weighted else torch.ones_like(own)
    weights = weights if through else weights.detach()
    for i, (a, p, negatives) in enumerate(anchors(d)):
        rivals = lse([cosine(a, v) / 0.1 for v in negatives])
        terms.append(rivals - weights[i % len(d.x)] * cosine(a, p) / 0.1)
    return mean(terms)


def define_hard_negative(d: Views, beta: float, tau_plus: float = 0.1, through: bool = True) -> Tensor:
    """As joshr17/HCL computes it, without logarithms."""
    terms, t = [], 0.5
    for a, p, negatives in anchors(d):
        pos, neg = torch.exp(cosine(a, p) / t), torch.stack([torch.exp(cosine(a, v) / t) for v in negatives])
        weights = neg**beta / (neg**beta).mean()
        reweighted = ((weights if through else weights.detach()) * neg).sum()
        n = len(negatives)
        ng = ((-tau_plus * n * pos + reweighted) / (1 - tau_plus)).clamp_min(n * math.exp(-1 / t))
        terms.append(-torch.log(pos / (pos + ng)))
    return mean(terms)


def define_hard(d: Views, fraction: float, simple: float | None = None) -> Tensor:
    terms, b = [], len(d.x)
    kept = math.ceil(fraction * (b - 1))
    for i in range(b):
        s = [cosine(d.x[i], d.y[j]) for j in range(b)]
        hardest = sorted((s[j] for j in range(b) if j != i), key=Tensor.item, reverse=True)[:kept]
        if simple is None:
            terms.append(lse([v / 0.1 for v in [s[i], *hardest]]) - s[i] / 0.1)
        else:
            terms.append(simple * mean(hardest) - s[i])
    return mean(terms)


def define_alignment(d: Views, alpha: float = 2.0) -> Tensor:
    return mean([(unit(a) - unit(b)).norm() ** alpha for a, b in zip(d.x, d.y, strict=True)])


def define_uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    pairs = itertools.combinations(unit(x), 2)
    return torch.log(mean([torch.exp(-t * (a - b).square().sum()) for a, b in pairs]))


def define_clip(p: Tensor, q: Tensor, t: float) -> Tensor:
    b, terms = len(p), []
    for i in range(b):
        row, column = [t * p[i] @ q[j] for j in range(b)], [t * p[j] @ q[i] for j in range(b)]
        terms += [lse(row) - row[i], lse(column) - column[i]]
    return mean(terms)


def define_cy_clip(d: Views) -> Tensor:
    p, q, b = unit(d.x), unit(d.y), len(d.x)
    cross = within = 0.0
    for i, j in itertools.product(range(b), repeat=2):
        cross = cross + (p[i] @ q[j] - p[j] @ q[i]) ** 2
        within = within + (p[i] @ p[j] - q[i] @ q[j]) ** 2
    return define_clip(p, q, 7.0) + 0.25 * cross / b + 0.5 * within / b


def define_cwcl(d: Views, bandwidth: float | None = None) -> Tensor:
    p, q, m, b, t = unit(d.x), unit(d.y), d.frozen, len(d.x), 7.0
    rows, columns = [], []
    for i in range(b):
        w = [0.5 * m[i] @ m[j] + 0.5 for j in range(b)]
        if bandwidth is not None:
            w = [torch.exp((m[i] @ m[j] - 1) / bandwidth) for j in range(b)]
        logits = [t * p[i] @ q[j] for j in range(b)]
        total = lse(logits)
        rows.append(sum(w[j] * (total - logits[j]) for j in range(b)) / sum(w))
        others = [t * p[j] @ q[i] for j in range(b)]
        columns.append(lse(others) - others[i])
    return mean(rows) + mean(columns)


def define_mann_whitney(d: Views, extra: bool = False, averaged: bool = False) -> Tensor:
    b, t = len(d.x), 0.3
    own = [cosine(d.x[i], d.y[i]) for i in range(b)]
    negatives = [cosine(d.x[i], d.y[j]) for i, j in itertools.product(range(b), repeat=2) if i != j]
    if extra:
        negatives += [cosine(a, v) for a in d.x for v in d.z]
    loss = sum(torch.log1p(torch.exp((s - p) / t)) for p in own for s in negatives) / b
    return loss / len(negatives) if averaged else loss


def define_cacr(d: Views, through: bool = True, tau_plus: float = 0.0) -> Tensor:
    views, b = [unit(v) for v in (d.x, d.y, d.z)], len(d.x)
    cost = lambda a, c: (a - c).square().sum()  # noqa: E731
    soft = lambda w: torch.softmax(w if through else w.detach(), 0)  # noqa: E731
    pull = []
    for k, view in enumerate(views):
        for i in range(b):
            c = torch.stack([cost(view[i], other[i]) for j, other in enumerate(views) if j != k])
            pull.append((soft(c) * c).sum())
    push = []
    for a, c in itertools.combinations(views, 2):
        for i in range(b):
            far = torch.stack([cost(a[i], c[j]) for j in range(b) if j != i])
            repelled = (soft(-0.9 * far) * -far).sum()
            push.append((repelled + tau_plus * cost(a[i], c[i])) / (1 - tau_plus))
    return mean(pull) + mean(push)


def define_cacr_queue(d: Views, through: bool = False, in_batch: bool = True) -> Tensor:
    """As the authors' code computes it: one softmax over the queue's and the batch's distances."""
    queries, b = [unit(v) for v in (d.x, d.y, d.z)], len(d.x)
    keys = [unit(v).detach() for v in momentum_keys(d)]
    queue, cost = unit(d.queue), lambda a, c: (a - c).square().sum()
    terms = []
    for k, view in enumerate(queries):
        for i in range(b):
            c = torch.stack([cost(view[i], other[i]) for j, other in enumerate(keys) if j != k])
            far = [cost(view[i], n) for n in queue]
            logits = [v.detach() for v in far]
            own = [cost(view[i], view[j]) for j in range(b) if j != i and in_batch]
            far, logits = far + own, logits + [v if through else v.detach() for v in own]
            weights = torch.softmax(-1.3 * torch.stack(logits), 0)
            terms.append((torch.softmax(c.detach(), 0) * c).sum() - (weights * torch.stack(far)).sum())
    return mean(terms)


def momentum_keys(d: Views) -> list[Tensor]:
    return [(d.x * 0.9 + 0.1).detach(), (d.y * 1.1 - 0.1).detach(), d.z.detach().flip(1)]


def cacr_queue(loss, d: Views) -> Tensor:
    return loss([d.x, d.y, d.z], momentum_keys(d), d.queue)


def define_cacr_moco(d: Views, views_of_keys: int, euclidean: bool, t: float = 0.6) -> Tensor:
    queries, keys = [unit(v) for v in (d.x, d.y, d.z)], [unit(v).detach() for v in momentum_keys(d)]
    terms, b = [], len(d.x)
    for v, i in itertools.product(range(views_of_keys), range(b)):
        others = [a for a in range(3) if a != v]
        far = torch.stack([(queries[a][i] - keys[v][i]).square().sum() for a in others]).detach()
        weights = torch.softmax(far / t, 0)
        for w, a in zip(weights, others, strict=True):
            s = torch.stack([queries[a][i] @ keys[v][j] for j in range(b)])
            if euclidean:
                cost = 1 - torch.stack([s[j] for j in range(b) if j != i])
                terms.append(w * (1 - s[i] - (torch.softmax(-cost / t, 0).detach() * cost).sum()))
            else:
                terms.append(2 * t * w * ((s / t).logsumexp(0) - s[i] / t))
    return sum(terms) / b / views_of_keys


def define_meow(d: Views) -> Tensor:
    terms, b = [], len(d.x)
    for i in range(b):
        weights = [sum(int(c[i] != c[j]) for c in d.clusters) for j in range(b)]
        total = sum(w * torch.exp(cosine(d.x[i], d.y[j]) / 0.4) for j, w in enumerate(weights))
        if any(weights):
            terms.append(torch.log(total) - cosine(d.x[i], d.y[i]) / 0.4)
    return sum(terms, 0 * d.x.sum()) / b


def network(seed: int = 3) -> list[Tensor]:
    """W (4, 5), c (4,), v (1, 4), d (1,)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).double() for shape in ((4, 5), (4,), (1, 4), (1,))]


def with_network(loss):
    for parameter, value in zip(loss.parameters(), network(), strict=True):
        parameter.data = value
    return loss


def define_ada_meow(d: Views, parameters: list[Tensor] | None = None) -> Tensor:
    w, c, v, bias = (p.to(d.x) for p in (network() if parameters is None else parameters))
    a, b, terms = unit(d.x), unit(d.y), []
    for i in range(len(a)):
        weight = [torch.sigmoid(v[0] @ torch.tanh(w @ (a[i] + b[j]) + c) + bias[0]) for j in range(len(b))]
        total = sum(weight[j] * torch.exp(a[i] @ b[j] / 0.4) for j in range(len(b)))
        terms.append(-torch.log(torch.exp(a[i] @ b[i] / 0.4) / total))
    return mean(terms)


def centroids(like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of three clusterings, and φ."""
    g = torch.Generator().manual_seed(6)
    sizes = (2, 4, 3)
    return tuple(
        [make(n).double().to(like.device) for n in sizes]
        for make in (lambda n: torch.randn(n, 5, generator=g), lambda n: 0.1 + torch.rand(n, generator=g))
    )


def define_proto_nce(d: Views, negatives: int | None = None) -> Tensor:
    z, terms = unit(d.x), []
    seed = None if negatives is None else draw_seed()
    for m, (of, centers, phi) in enumerate(zip(d.clusters.tolist(), *centroids(d.x), strict=True)):
        columns = range(len(centers))
        if negatives is not None:  # as PCL has it: a sample's own centroid as often as there are samples with it
            key = uniform(seed, torch.full((len(centers),), m), torch.arange(len(centers))).tolist()
            columns = of + sorted(set(range(len(centers))) - set(of), key=key.__getitem__)[:negatives]
        for i, k in enumerate(of):
            s = [z[i] @ unit(u).to(z) / p.to(z) for u, p in zip(centers, phi, strict=True)]
            terms.append(lse([s[c] for c in columns]) - s[k])
    return mean(terms)


def ages(d: Views) -> Tensor:
    """(B,) integer targets that follow from the row."""
    return (2 * d.x[:, 0].detach()).round().long()


def real_ages(d: Views) -> Tensor:
    """(B,) real targets that follow from the row, some of them equal."""
    y = 1.3 * d.x[:, 0].detach()
    return torch.where(d.x[:, 1].detach() > 0.5, y, (4 * y).round() / 4)


def define_sup_re_mix(d: Views, gap: float, mix_negatives: bool = True, target=ages, w=lambda far: far + 1) -> Tensor:
    """Every mixture made, as the authors' code does."""
    z, y, b, t = unit(d.x), target(d).tolist(), len(d.x), 0.5
    seed = draw_seed() if mix_negatives else 0
    terms = []
    for i in range(b):
        positives = [z[j] for j in range(b) if j != i and y[j] == y[i]]
        others = [(z[k], abs(y[i] - y[k])) for k in range(b) if y[k] != y[i]]
        for j, k in itertools.product(range(b), repeat=2):
            if 0 < y[i] - y[j] < gap and 0 < y[k] - y[i] < gap:
                alpha = (y[k] - y[i]) / (y[k] - y[j])
                positives.append((alpha * z[j] + (1 - alpha) * z[k]).detach())
        for k in range(b):
            if mix_negatives and y[k] != y[i]:
                share = beta_two(seed, torch.tensor(i), torch.tensor(k), 6.0, torch.float64).item()
                others.append(((share * z[i] + (1 - share) * z[k]).detach(), (1 - share) * abs(y[i] - y[k])))
        candidates = [(v, 0) for v in positives] + others
        if positives:
            total = torch.log(sum(w(apart) * torch.exp(z[i] @ v / t) for v, apart in candidates))
            terms.append(total - mean([z[i] @ v / t for v in positives]))
    return sum(terms, 0 * z.sum()) / b


def likelihoods(d: Views) -> tuple[Tensor, Tensor]:
    """log p of data and log p / q of noise."""
    return 0.02 * (d.x * d.y).sum(1), 0.02 * (d.z * d.y).sum(1)


def after_a_batch(loss):
    loss.log_average.fill_(0.5)
    return loss


def define_meco(d: Views) -> Tensor:
    """The gradient is that of the surrogate, the value that of the objective."""
    data, noise = likelihoods(d)
    g = mean([torch.exp(v) for v in noise])
    u = (0.7 * math.exp(0.5) + 0.3 * g).detach()
    surrogate = -mean(list(data)) + g / u
    return surrogate + (torch.log(u) - g / u).detach()


def define_rnc(d: Views) -> Tensor:
    n, terms = len(d.x), []
    far = lambda i, j: (d.targets[i] - d.targets[j]).abs().item()  # noqa: E731
    for i in range(n):
        s = {j: -(d.x[i] - d.x[j]).norm() / 2 for j in range(n) if j != i}
        for k in s:
            terms.append(lse([s[j] for j in s if far(i, j) >= far(i, k)]) - s[k])
    return sum(terms) / (n * (n - 1))


def define_moco_v3(d: Views) -> Tensor:
    terms, t, b = [], 0.2, len(d.x)
    for query, key in ((d.x, (d.y * 1.1 - 0.1).detach()), (d.y, (d.x * 0.9 + 0.1).detach())):
        for i in range(b):
            s = [cosine(query[i], key[j]) / t for j in range(b)]
            terms.append(lse(s) - s[i])
    return 2 * t * sum(terms) / b


def define_nnclr(d: Views) -> Tensor:
    terms, b = [], len(d.x)
    for view, prediction in ((d.x, d.z), (d.y, d.x)):
        for i in range(b):
            near = max(d.queue, key=lambda k: cosine(view[i], k).item())
            s = [cosine(near, prediction[j]) / 0.1 for j in range(b)]
            terms.append(lse(s) - s[i])
    return mean(terms)


def define_multi_view(d: Views, labels: Tensor | None, one: bool = False, mask: Tensor | None = None) -> Tensor:
    views, b = [unit(d.x), unit(d.y), unit(d.z)], len(d.x)
    labels = torch.arange(b) if labels is None else labels
    terms, everything = [], [(k, i) for k in range(3) for i in range(b)]
    for k, i in everything[: b if one else None]:
        s = {other: views[k][i] @ views[other[0]][other[1]] / 0.2 for other in everything if other != (k, i)}
        alike = lambda j: labels[i] == labels[j] if mask is None else mask[i, j]  # noqa: B023, E731
        positives = [v for (_, j), v in s.items() if alike(j)]
        terms.append(lse(list(s.values())) - mean(positives) if positives else 0 * views[k][i].sum())
    return mean(terms) * 0.2 / 0.07


def define_transformed(d: Views) -> Tensor:
    """Only the negatives are mixed: what is drawn does not depend on who holds which rows."""
    generator = torch.Generator().manual_seed(draw_seed() & ((1 << 62) - 1))
    share = beta_like(d.queue, 1.6, generator)
    order = torch.randperm(6, generator=generator)
    negatives = [share[j] * d.queue[j] + (1 - share[j]) * d.queue[order[j]] for j in range(6)]
    terms = []
    for q, k in zip(d.x, d.y.detach(), strict=True):
        s = [q @ k / 2.0, *(q @ n / 2.0 for n in negatives)]
        terms.append(lse(s) - s[0])
    return mean(terms)


def define_macl(d: Views) -> Tensor:
    """lightly's MACLLoss, which follows the paper's algorithm 1."""
    alignment = mean([cosine(a, p) for a, p, _ in anchors(d)]).detach()
    t = (0.1 * (1 + 0.5 * (alignment - 0.0))).item()
    terms = []
    for a, p, negatives in anchors(d):
        s = torch.stack([cosine(a, v) / t for v in (p, *negatives)])
        weight = (1 / (1 - torch.softmax(s, 0)[0] + 1e-8)).detach()
        terms.append(-weight * (s[0] - s.logsumexp(0)))
    return mean(terms)


def define_distill_clip(d: Views) -> Tensor:
    p, q, b, t = unit(d.x), unit(d.y), len(d.x), 7.0
    u, v = (c.detach()[:, :3] for c in (d.z, d.y))
    terms = []
    for rows, columns_, of_rows, of_columns in ((p, q, u, v), (q, p, v, u)):
        for i in range(b):
            logits = torch.stack([t * rows[i] @ columns_[j] for j in range(b)])
            taught = torch.softmax(torch.stack([2.0 * of_rows[i] @ of_columns[j] for j in range(b)]), 0)
            terms.append(-(taught * torch.log_softmax(logits, 0)).sum())
    return define_clip(p, q, t) + 3 * mean(terms)


def gates(d: Views) -> Tensor:
    return torch.sigmoid(d.y)


def define_sim_lap(d: Views, labels: Tensor | None = None, partner: Tensor | None = None, scale: float = 10) -> Tensor:
    z, g, b, y = d.x, gates(d), len(d.x), d.labels if labels is None else labels
    partner = (y + 1) % 3 if partner is None else partner
    terms = [0 * z.sum()]
    for i in range(b):
        s = [scale * cosine(g[i] * z[i], g[i] * z[j]) for j in range(b)]
        rivals = [s[j] for j in range(b) if y[j] not in (y[i], partner[i])]
        for j in range(b):
            if y[j] == partner[i]:
                terms.append(torch.log1p(sum((torch.exp(v - s[j]) for v in rivals), 0 * s[j])))
    return sum(terms) / max(len(terms) - 1, 1)


def define_amcl(d: Views, top: int | None = None, beta: float = 0.3) -> Tensor:
    b, total = len(d.x), 0.0
    phi, psi = d.x[:, :3] * 0.5, d.y[:, 1:4]
    tau = lambda i, j: 0.1 + 0.9 * torch.sigmoid(-(phi[i] @ psi[j]))  # noqa: E731
    for x, y in ((d.x, d.y), (d.z, d.y)):
        half = x.shape[1] / 2
        for i in range(b):
            omega = {j: half * tau(i, j).log() + 1 / tau(i, j) for j in range(b)}
            s = {j: cosine(x[i], y[j]) / tau(i, j) for j in range(b)}
            others = [j for j in range(b) if j != i]
            if top is None:
                push = lse([s[j] for j in others]) - beta * mean([omega[j] for j in others])
            else:
                others = sorted(others, key=lambda j: -s[j].item())[:top]
                push = mean([s[j] for j in others]) - beta * mean([tau(i, j).log() + 1 / tau(i, j) for j in others])
            total = total + push - s[i] + beta * omega[i]
    return total / b


def heads(loss, d: Views) -> Tensor:
    return loss([d.x, d.z], [d.y, d.y], d.x[:, :3] * 0.5, d.y[:, 1:4])


def distilled(loss, d: Views) -> Tensor:
    clip, distill = loss(unit(d.x), unit(d.y), 7.0, d.z[:, :3], d.y[:, :3], 2.0)
    return clip + 3 * distill


def define_matryoshka(d: Views) -> Tensor:
    cut = lambda m: Views(d.x[:, :m], d.y[:, :m])  # noqa: E731
    return 2.0 * define_sim_clr(cut(5), 0.5) + 0.5 * define_sim_clr(cut(2), 0.5)


def two(loss, d: Views) -> Tensor:
    return loss(d.x, d.y)


def towers(loss, d: Views) -> Tensor:
    return loss(unit(d.x), unit(d.y), 7.0)


def keys(d: Views) -> tuple:
    return d.x, d.y, d.x * 0.9 + 0.1, d.y * 1.1 - 0.1


def stacked(d: Views) -> Tensor:
    return torch.stack([unit(d.x), unit(d.y), unit(d.z)], 1)


CASES = [
    Case("SimCLRLoss", lambda g: losses.SimCLRLoss(group=g), two, define_sim_clr),
    Case(
        "SimCLRLoss sum", lambda g: losses.SimCLRLoss(0.5, losses.SimCLRReduction.SUM_OF_VIEWS, group=g), two,
        lambda d: 2 * define_sim_clr(d, 0.5),
    ),
    Case("DCLLoss", lambda g: losses.DCLLoss(group=g), two, define_dcl),
    Case("DCLWLoss", lambda g: losses.DCLWLoss(group=g), two, lambda d: define_dcl(d, True)),
    Case(
        "DCLWLoss through", lambda g: losses.DCLWLoss(detach_weights=False, group=g), two,
        lambda d: define_dcl(d, True, True),
    ),
    Case(
        "DebiasedContrastiveLoss", lambda g: losses.DebiasedContrastiveLoss(group=g), two,
        lambda d: define_hard_negative(d, 0.0),
    ),
    Case(
        "DebiasedContrastiveLoss floor", lambda g: losses.DebiasedContrastiveLoss(tau_plus=0.6, group=g), two,
        lambda d: define_hard_negative(d, 0.0, 0.6),
    ),
    Case(
        "HardNegativeContrastiveLoss", lambda g: losses.HardNegativeContrastiveLoss(group=g), two,
        lambda d: define_hard_negative(d, 1.0),
    ),
    Case(
        "HardNegativeContrastiveLoss detached",
        lambda g: losses.HardNegativeContrastiveLoss(beta=0.5, detach_weights=True, group=g), two,
        lambda d: define_hard_negative(d, 0.5, through=False),
    ),
    Case(
        "HardContrastiveLoss", lambda g: losses.HardContrastiveLoss(fraction=0.35, group=g), two,
        lambda d: define_hard(d, 0.35), True,
    ),
    Case(
        "HardContrastiveLoss simple", lambda g: losses.HardContrastiveLoss(fraction=0.35, simple=2.0, group=g), two,
        lambda d: define_hard(d, 0.35, 2.0), True,
    ),
    Case("AlignmentLoss", lambda g: losses.AlignmentLoss(3.0, group=g), two, lambda d: define_alignment(d, 3.0)),
    Case(
        "UniformityLoss", lambda g: losses.UniformityLoss(group=g), lambda loss, d: loss(d.x),
        lambda d: define_uniformity(d.x),
    ),
    Case(
        "AlignmentUniformityLoss", lambda g: losses.AlignmentUniformityLoss(0.5, 2.0, group=g), two,
        lambda d: 0.5 * define_alignment(d) + define_uniformity(d.x) + define_uniformity(d.y),
    ),
    Case("CyCLIPLoss", lambda g: losses.CyCLIPLoss(0.25, 0.5, group=g), towers, define_cy_clip, True),
    Case(
        "CWCLLoss", lambda g: losses.CWCLLoss(group=g),
        lambda loss, d: loss(unit(d.x), unit(d.y), 7.0, d.frozen), define_cwcl, True,
    ),
    Case(
        "CWCLLoss exponential", lambda g: losses.CWCLLoss(losses.CWCLWeight.EXPONENTIAL, 0.4, group=g),
        lambda loss, d: loss(unit(d.x), unit(d.y), 7.0, d.frozen), lambda d: define_cwcl(d, 0.4),
    ),
    Case("MannWhitneyLoss", lambda g: losses.MannWhitneyLoss(0.3, group=g), two, define_mann_whitney, True),
    Case(
        "MannWhitneyLoss negatives", lambda g: losses.MannWhitneyLoss(0.3, True, group=g),
        lambda loss, d: loss(d.x, d.y, d.z), lambda d: define_mann_whitney(d, True, True), True,
    ),
    Case("CACRLoss", lambda g: losses.CACRLoss(group=g), lambda loss, d: loss(d.x, d.y, d.z), define_cacr),
    Case(
        "CACRLoss detached", lambda g: losses.CACRLoss(detach_weights=True, tau_plus=0.1, group=g),
        lambda loss, d: loss(d.x, d.y, d.z), lambda d: define_cacr(d, False, 0.1),
    ),
    Case("CACRQueueLoss", lambda g: losses.CACRQueueLoss(1.0, 1.3, group=g), cacr_queue, define_cacr_queue),
    Case(
        "CACRQueueLoss through", lambda g: losses.CACRQueueLoss(1.0, 1.3, detach_in_batch=False, group=g), cacr_queue,
        lambda d: define_cacr_queue(d, True),
    ),
    Case(
        "CACRQueueLoss queue", lambda g: losses.CACRQueueLoss(1.0, 1.3, False, group=g), cacr_queue,
        lambda d: define_cacr_queue(d, in_batch=False),
    ),
    Case(
        "CACRMoCoLoss", lambda g: losses.CACRMoCoLoss(0.6, group=g),
        lambda loss, d: loss([d.x, d.y, d.z], momentum_keys(d)[:2]), lambda d: define_cacr_moco(d, 2, False),
    ),
    Case(
        "CACRMoCoLoss euclidean", lambda g: losses.CACRMoCoLoss(0.6, losses.CACRCost.EUCLIDEAN, group=g),
        lambda loss, d: loss([d.x, d.y, d.z], momentum_keys(d)), lambda d: define_cacr_moco(d, 3, True),
    ),
    Case("MEOWLoss", lambda g: losses.MEOWLoss(group=g), lambda loss, d: loss(d.x, d.y, d.clusters), define_meow),
    Case(
        "AdaMEOWLoss", lambda g: with_network(losses.AdaMEOWLoss(5, hidden_size=4, group=g)),
        lambda loss, d: loss.to(d.x.device)(d.x, d.y), define_ada_meow, True,
    ),
    Case(
        "ProtoNCELoss", lambda g: losses.ProtoNCELoss(group=g),
        lambda loss, d: loss(d.x, d.clusters, *centroids(d.x)), define_proto_nce,
    ),
    Case(
        "ProtoNCELoss drawn", lambda g: losses.ProtoNCELoss(1, group=g),
        lambda loss, d: loss(d.x, d.clusters, *centroids(d.x)), lambda d: define_proto_nce(d, 1),
    ),
    Case(
        "SupReMixLoss", lambda g: losses.SupReMixLoss(0.5, 4, 6.0, group=g), lambda loss, d: loss(d.x, ages(d)),
        lambda d: define_sup_re_mix(d, 4), True,
    ),
    Case(
        "SupReMixLoss unmixed", lambda g: losses.SupReMixLoss(0.5, 1, mix_negatives=False, group=g),
        lambda loss, d: loss(d.x, ages(d)), lambda d: define_sup_re_mix(d, 1, False), True,
    ),
    *(
        Case(
            f"SupReMixLoss {weight.value}",
            lambda g, weight=weight: losses.SupReMixLoss(0.5, 2.5, 6.0, weight=weight, group=g),
            lambda loss, d: loss(d.x, ages(d)), lambda d, w=w: define_sup_re_mix(d, 2.5, w=w), True,
        )
        for weight, w in (
            (losses.SupReMixWeight.NONE, lambda far: 1.0),
            (losses.SupReMixWeight.L1, lambda far: 1 / (far + 1)),
            (losses.SupReMixWeight.L2, lambda far: 1 / (far**2 + 1)),
            (losses.SupReMixWeight.L2_INV, lambda far: far**2 + 1),
        )
    ),
    Case(
        "SupReMixLoss real", lambda g: losses.SupReMixLoss(0.5, 0.8, 6.0, group=g),
        lambda loss, d: loss(d.x, real_ages(d)), lambda d: define_sup_re_mix(d, 0.8, target=real_ages), True,
    ),
    Case(
        "SupReMixLoss real positives", lambda g: losses.SupReMixLoss(0.5, 2.0, mix_negatives=False, group=g),
        lambda loss, d: loss(d.x, real_ages(d)), lambda d: define_sup_re_mix(d, 2.0, False, real_ages), True,
    ),
    Case(
        "MECOLoss", lambda g: after_a_batch(losses.MECOLoss(0.3, group=g)),
        lambda loss, d: loss.to(d.x.device)(*likelihoods(d)), define_meco,
    ),
    Case("RnCLoss", lambda g: losses.RnCLoss(group=g), lambda loss, d: loss(d.x, d.targets), define_rnc, True),
    Case("MoCoV3Loss", lambda g: losses.MoCoV3Loss(0.2, group=g), lambda loss, d: loss(*keys(d)), define_moco_v3),
    Case(
        "NNCLRLoss", lambda g: losses.NNCLRLoss(group=g), lambda loss, d: loss(d.x, d.y, d.x, d.z, d.queue),
        define_nnclr,
    ),
    Case(
        "MultiViewSupConLoss", lambda g: losses.MultiViewSupConLoss(0.2, group=g),
        lambda loss, d: loss(stacked(d), d.labels), lambda d: define_multi_view(d, d.labels),
    ),
    Case(
        "MultiViewSupConLoss one", lambda g: losses.MultiViewSupConLoss(0.2, "one", group=g),
        lambda loss, d: loss(stacked(d), d.labels), lambda d: define_multi_view(d, d.labels, True),
    ),
    Case(
        "MultiViewSupConLoss unlabelled", lambda g: losses.MultiViewSupConLoss(0.2, group=g),
        lambda loss, d: loss(stacked(d)), lambda d: define_multi_view(d, None),
    ),
    Case(
        "FeatureTransformationLoss", lambda g: losses.FeatureTransformationLoss(2.0, None, group=g),
        lambda loss, d: loss(d.x, d.y, d.queue), define_transformed,
    ),
    Case("DistillClipLoss", lambda g: losses.DistillClipLoss(group=g), distilled, define_distill_clip),
    Case(
        "CoCaLoss", lambda g: losses.CoCaLoss(2.0, 0.5, group=g),
        lambda loss, d: loss(unit(d.x), unit(d.y), d.x[:, None] * 0, d.x[:, :1].long() * 0 + 1, 7.0)[0],
        lambda d: 0.5 * define_clip(unit(d.x), unit(d.y), 7.0),
    ),
    Case(
        "MatryoshkaLoss",
        lambda g: losses.MatryoshkaLoss(losses.SimCLRLoss(0.5, group=g), [2, 5], [0.5, 2.0]), two, define_matryoshka,
    ),
    Case(
        "SimLAPLoss", lambda g: losses.SimLAPLoss(group=g),
        lambda loss, d: loss(d.x, gates(d), d.labels, (d.labels + 1) % 3), define_sim_lap, True,
    ),
    Case("AMCLLoss", lambda g: losses.AMCLLoss(0.1, 1.0, 0.3, group=g), heads, define_amcl, True),
    Case(
        "AMCLLoss top", lambda g: losses.AMCLLoss(0.1, 1.0, 0.3, 3, group=g), heads, lambda d: define_amcl(d, 3), True
    ),
    Case("MACLLoss", lambda g: losses.MACLLoss(group=g), two, define_macl),
    *retrieval_cases.CASES,
    *multi_label_cases.CASES,
    *ranking_cases.CASES,
]  # fmt: skip
