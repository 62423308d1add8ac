"""The contrastive losses: ours, its definition as loops from the paper. One row, all tests."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from loss_cases import cosine
from torch import Tensor

from flashpair import losses
from flashpair.losses.contrast.feature_transformation import beta_like
from flashpair.losses.retrieval.multiple_negatives import DIRECTIONS, HARDNESS
from flashpair.random import draw_seed


@dataclasses.dataclass
class Views:
    """A batch of matched rows, and what some losses want beside it; each row's extras follow from the row."""

    x: Tensor  # (B, D) leaf
    y: Tensor  # (B, D) leaf

    @property
    def z(self) -> Tensor:
        """(B, D) a third view."""
        return self.x.flip(1) + 0.5 * self.y

    @property
    def frozen(self) -> Tensor:
        """(B, 3) unit vectors of another tower."""
        return unit((self.x[:, :3] * 2 + self.y[:, 1:4]).detach())

    @property
    def labels(self) -> Tensor:
        return (self.x[:, 0].detach() > 0).long() + (self.y[:, 1].detach() > 0.5).long()

    @property
    def targets(self) -> Tensor:
        """(B,) with ties."""
        return (self.x[:, 0] + self.y[:, 0]).detach().mul(2).round() / 2

    @property
    def multi_hot(self) -> Tensor:
        """(B, 4) of which some rows are empty."""
        return (self.x[:, :4].detach() + 0.3 * self.y[:, 1:5].detach() > 0.5).long()

    @property
    def clusters(self) -> Tensor:
        return torch.stack([(self.x[:, k].detach() > 0.3).long() for k in (0, 1, 2)])

    @property
    def queue(self) -> Tensor:
        """(6, D) keys that all ranks hold alike."""
        g = torch.Generator().manual_seed(5)
        return torch.randn(6, self.x.shape[1], generator=g, dtype=torch.float64).to(self.x)


def unit(a: Tensor) -> Tensor:
    return a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def lse(values: list[Tensor]) -> Tensor:
    return torch.stack(values).logsumexp(0)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


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


def define_cwcl(d: Views) -> Tensor:
    p, q, m, b, t = unit(d.x), unit(d.y), d.frozen, len(d.x), 7.0
    rows, columns = [], []
    for i in range(b):
        w = [0.5 * m[i] @ m[j] + 0.5 for j in range(b)]
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


def define_meow(d: Views) -> Tensor:
    terms, b = [], len(d.x)
    for i in range(b):
        weights = [sum(int(c[i] != c[j]) for c in d.clusters) for j in range(b)]
        total = sum(w * torch.exp(cosine(d.x[i], d.y[j]) / 0.4) for j, w in enumerate(weights))
        if any(weights):
            terms.append(torch.log(total) - cosine(d.x[i], d.y[i]) / 0.4)
    return sum(terms, 0 * d.x.sum()) / b


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


def columns(d: Views) -> list[Tensor]:
    return [d.x, d.y, d.z, d.z.flip(1)]


def guides(d: Views, count: int) -> list[Tensor]:
    return [c.detach()[:, 1:5] * 2 + 0.3 for c in columns(d)[:count]]


def define_multiple_negatives(
    d: Views, directions=("qd",), joint: bool = True, hard: str | None = None, strength: float = 0.0
) -> Tensor:
    q, docs, b, scale, terms = d.x, columns(d)[1:], len(d.x), 5.0, []
    for i in range(b):
        blocks = {"qd": [], "qq": [], "dq": [], "dd": []}
        for k, j in itertools.product(range(3), range(b)):
            s = cosine(q[i], docs[k][j])
            harder = (hard == "all_negatives" and (k, j) != (0, i)) or (hard == "in_batch_negatives" and j != i)
            harder = harder or (hard == "hard_negatives" and j == i and k > 0)
            blocks["qd"].append(scale * s + (strength * s.detach() if harder else 0))
            if j != i:
                blocks["dd"].append(scale * cosine(docs[0][i], docs[k][j]))
        for j in range(b):
            if j != i:
                blocks["qq"].append(scale * cosine(q[i], q[j]))
            blocks["dq"].append(scale * cosine(docs[0][i], q[j]))
        chosen = [blocks[k] for k in directions]
        total = lse([v for block in chosen for v in block]) if joint else mean([lse(block) for block in chosen])
        terms.append(total - scale * cosine(q[i], docs[0][i]))
    return mean(terms)


def define_gist(d: Views, count: int, relative: bool = False, margin: float = 0.0, both: bool = True) -> Tensor:
    e, g, b, terms = columns(d)[:count], guides(d, count), len(d.x), []
    for i in range(b):
        own = cosine(g[0][i], g[1][i]).item()
        limit = own - margin * (abs(own) if relative else 1)
        kept = [cosine(e[0][i], e[1][i]) / 0.5]
        blocks = [
            (0, 1, True),
            *([(0, 0, True), (1, 1, True)] if both else []),
            *((0, k, False) for k in range(2, count)),
        ]
        for a, c, skip in blocks:
            for j in range(b):
                if not (skip and i == j) and cosine(g[a][i], g[c][j]).item() <= limit:
                    kept.append(cosine(e[a][i], e[c][j]) / 0.5)
        terms.append(lse(kept) - kept[0])
    return mean(terms)


def define_cosent(d: Views, angle: bool = False) -> Tensor:
    s, y = [], d.targets
    for a, c in zip(d.x, d.y, strict=True):
        similarity = cosine(a, c)
        if angle:
            p, q = (torch.nn.functional.pad(unit(v), (0, 1)) for v in (a, c))
            similarity = (similarity + (p[3:] * q[:3] - p[:3] * q[3:]).sum()).abs()
        s.append(similarity)
    rows = range(len(s))
    return torch.log1p(sum((torch.exp(5.0 * (s[i] - s[j])) for i in rows for j in rows if y[i] < y[j]), 0 * d.x.sum()))


def define_margin_mse(d: Views) -> Tensor:
    wanted = torch.stack([d.targets, -d.targets], 1)
    terms = [(q @ p - q @ n[k] - w[k]) ** 2 for q, p, n, w in zip(d.x, d.y, torch.stack([d.z, d.z.flip(1)], 1), wanted,
                                                                  strict=True) for k in range(2)]  # fmt: skip
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


def label_sets(d: Views) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in d.multi_hot]


WEIGHTS = {
    losses.LabelWeight.ALL: lambda a, b: float(a == b and bool(a)),
    losses.LabelWeight.ANY: lambda a, b: float(bool(a & b)),
    losses.LabelWeight.JACCARD: lambda a, b: len(a & b) / max(len(a | b), 1),
    losses.LabelWeight.SIMILARITY_DISSIMILARITY: lambda a, b: len(a & b) / max(len(a), 1) / (1 + len(b - a)),
}


def define_multi_label(d: Views, kind, everyone: bool = False) -> Tensor:
    y, b, terms, anchors_ = label_sets(d), len(d.x), [0 * d.x.sum()], 0
    for i in range(b):
        s = {j: cosine(d.x[i], d.x[j]) / 0.1 for j in range(b) if j != i}
        w = {j: WEIGHTS[kind](y[i], y[j]) for j in s}
        if sum(w.values()) > 0:
            anchors_ += 1
            total = lse(list(s.values()))
            terms.append(sum(w[j] * (total - s[j]) for j in s) / sum(w.values()))
    return sum(terms) / (b if everyone else max(anchors_, 1))


def define_jscl(d: Views) -> Tensor:
    y, b, terms = label_sets(d), len(d.x), [0 * d.x.sum()]
    for i in range(b):
        s = {j: cosine(d.x[i], d.x[j]) / 0.1 for j in range(b) if j != i}
        w = {j: WEIGHTS[losses.LabelWeight.JACCARD](y[i], y[j]) for j in s}
        if any(w.values()):
            total = torch.log(sum(w[j] * torch.exp(s[j]) for j in s))
            terms.append(sum(total - v for v in s.values()) / len(s))
    return sum(terms) / b


def define_mul_sup_con(d: Views, per_sample: bool = False) -> Tensor:
    y, b, rows = label_sets(d), len(d.x), []
    for i in range(b):
        s = {j: cosine(d.x[i], d.x[j]) / 0.1 for j in range(b) if j != i}
        of_labels = []
        for c in y[i]:
            near = [s[j] for j in s if c in y[j]]
            if near:
                of_labels.append(lse(list(s.values())) - mean(near))
        rows.append(of_labels)
    if per_sample:
        return sum((mean(r) for r in rows if r), 0 * d.x.sum()) / b
    return sum((v for r in rows for v in r), 0 * d.x.sum()) / max(sum(len(r) for r in rows), 1)


PROTOTYPES = torch.randn(4, 5, generator=torch.Generator().manual_seed(9)).double()


def with_prototypes(loss):
    loss.prototypes.data = PROTOTYPES.clone()
    return loss


def define_proto(d: Views, prototypes: Tensor = PROTOTYPES) -> Tensor:
    terms = [0 * d.x.sum()]
    for x, y in zip(d.x, label_sets(d), strict=True):
        s = torch.stack([cosine(x, p) / 0.1 for p in prototypes])
        if y:
            terms.append(-sum(s.log_softmax(0)[c] for c in y) / len(y))
    return sum(terms) / len(d.x)


def define_msc(d: Views, prototypes: Tensor = PROTOTYPES, alpha: float = 0.7, beta: float = 0.2) -> Tensor:
    y, b, terms = label_sets(d), len(d.x), [0 * d.x.sum()]
    for i in range(b):
        s = {j: cosine(d.x[i], d.x[j]) / 0.1 for j in range(b) if j != i}
        of_label = [cosine(d.x[i], p) / 0.1 for p in prototypes]
        z = lse([*of_label, *(v + math.log(beta) for v in s.values())])
        n = {c: 1 + alpha * sum(1 / len(y[i] | y[j]) for j in s if c in y[j]) for c in y[i]}
        loss = sum((z - of_label[c]) / n[c] for c in y[i])
        loss = loss + sum(alpha / len(y[i] | y[j]) / n[c] * (z - s[j]) for j in s for c in y[i] & y[j])
        if y[i]:
            terms.append(loss / len(y[i]))
    return sum(terms) / b


def define_mscrg(d: Views, prototypes: Tensor = PROTOTYPES, alpha: float = 0.0, regularised: bool = True) -> Tensor:
    z, y = [*d.x, *prototypes], [*label_sets(d), *({c} for c in range(len(prototypes)))]
    terms, anchors_ = [0 * d.x.sum()], 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        s = torch.stack([cosine(z[i], z[j]) / 0.1 for j in others])
        log_p = s.log_softmax(0)

        def share(j: int) -> float:
            if alpha < 0:
                return float(y[j] <= y[i])  # noqa: B023
            return (len(y[i] & y[j]) / len(y[j])) ** alpha  # noqa: B023

        n = {c: sum(share(j) for j in others if c in y[j]) for c in y[i]}
        w = [sum(share(j) / n[c] for c in y[i] & y[j] if n[c]) / max(len(y[i]), 1) for j in others]
        anchors_ += any(w)
        for k, weight in enumerate(w):
            if weight:
                terms.append(-weight * log_p[k])
                if regularised:
                    terms.append(-(log_p[k].exp() - weight).clamp_min(0).detach() * s[k])
    return sum(terms) / max(anchors_, 1)


def labelled(loss, d: Views) -> Tensor:
    return loss(d.x, d.multi_hot)


def gates(d: Views) -> Tensor:
    return torch.sigmoid(d.y)


def define_sim_lap(d: Views) -> Tensor:
    z, g, b, y = d.x, gates(d), len(d.x), d.labels
    partner = (y + 1) % 3
    terms = [0 * z.sum()]
    for i in range(b):
        s = [10 * cosine(g[i] * z[i], g[i] * z[j]) for j in range(b)]
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


def scored(loss, d: Views) -> Tensor:
    return loss(d.x.sum(1), d.targets, d.labels)


def lists(d: Views) -> list[list[int]]:
    return [[i for i in range(len(d.x)) if d.labels[i] == c] for c in sorted(set(d.labels.tolist()))]


def define_rank_net(d: Views) -> Tensor:
    a, y = d.x.sum(1), d.targets
    pairs = [(i, j) for of in lists(d) for i in of for j in of if y[i] > y[j]]
    return sum((torch.log1p(torch.exp(-0.7 * (a[i] - a[j]))) for i, j in pairs), 0 * a.sum()) / max(len(pairs), 1)


def define_comparison(d: Views, thurstone: bool, fidelity: bool) -> Tensor:
    a, y, terms = d.x.sum(1), d.targets, [0 * d.x.sum()]
    for of in lists(d):
        for i, j in itertools.combinations(of, 2):
            z = (a[i] - a[j]) / 1.5
            p, q = (torch.special.ndtr(v) if thurstone else torch.sigmoid(v) for v in (z, -z))
            g = (float(y[i] > y[j]) + float(y[i] >= y[j])) / 2
            if fidelity:
                terms.append(1 - (p * g + 1e-8).sqrt() - (q * (1 - g) + 1e-8).sqrt())
            else:
                log_p, log_q = (torch.special.log_ndtr(v) for v in (z, -z)) if thurstone else (p.log(), q.log())
                terms.append(-g * log_p - (1 - g) * log_q)
    return sum(terms) / max(len(terms) - 1, 1)


def define_lambda(d: Views, weight, k: int | None = None) -> Tensor:
    a, y, terms = d.x.sum(1), d.targets, [0 * d.x.sum()]
    log = lambda r: math.log2(1 + r)  # noqa: E731
    for of in lists(d):
        rank = {i: r for r, i in enumerate(sorted(of, key=lambda i: -a[i].item()), 1)}
        best = sorted(of, key=lambda i: -y[i].item())[:k]
        ideal = sum((2 ** y[i].item() - 1) / log(r) for r, i in enumerate(best, 1))
        gain = {i: (2 ** y[i].item() - 1) / ideal if ideal > 0 else 0.0 for i in of}
        for i, j in itertools.product(of, of):
            if not y[i] > y[j] or (k is not None and max(rank[i], rank[j]) > k):
                continue
            change, apart = abs(gain[i] - gain[j]), abs(rank[i] - rank[j])
            lambdas = abs(1 / log(rank[i]) - 1 / log(rank[j])) * change
            ndcg2 = abs(1 / log(apart) - 1 / log(apart + 1)) * change
            w = {
                "none": 1.0, "ndcg1": gain[i] / log(rank[i]), "lambda_rank": lambdas, "ndcg2": ndcg2,
                "ndcg2++": 10 * ndcg2 + lambdas,
            }[weight.value]  # fmt: skip
            terms.append(w * torch.log2(1 + torch.exp(-(a[i] - a[j]))))
    return sum(terms) / max(len(terms) - 1, 1)


def define_list_net(d: Views) -> Tensor:
    a, y, of_all = d.x.sum(1), d.targets, lists(d)
    return sum(-(y[of].softmax(0) * a[of].log_softmax(0)).sum() for of in of_all) / len(of_all)


def distilled(loss, d: Views) -> Tensor:
    clip, distill = loss(unit(d.x), unit(d.y), 7.0, d.z[:, :3], d.y[:, :3], 2.0)
    return clip + 3 * distill


def define_matryoshka(d: Views) -> Tensor:
    cut = lambda m: Views(d.x[:, :m], d.y[:, :m])  # noqa: E731
    return 2.0 * define_sim_clr(cut(5), 0.5) + 0.5 * define_sim_clr(cut(2), 0.5)


@dataclasses.dataclass
class Case:
    """`make(group)` is the loss, `call(loss, views)` its value, `define(views)` the loops."""

    name: str
    make: Callable
    call: Callable
    define: Callable
    rows: bool = False  # asks for whole rows, features or a third tower: ranks must gather

    def __repr__(self) -> str:
        return self.name

    def ours(self, d: Views) -> Tensor:
        return self.call(self.make(None), d)


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
    Case("MEOWLoss", lambda g: losses.MEOWLoss(group=g), lambda loss, d: loss(d.x, d.y, d.clusters), define_meow),
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
    *(
        Case(
            f"MultipleNegativesRankingLoss {name}",
            lambda g, options=options: losses.MultipleNegativesRankingLoss(scale=5.0, **options, group=g),
            lambda loss, d: loss(columns(d)), lambda d, how=how: define_multiple_negatives(d, **how),
        )
        for name, options, how in (
            ("base", {}, {}),
            ("joint", {"directions": DIRECTIONS}, {"directions": ("qd", "qq", "dq", "dd")}),
            (
                "symmetric", {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
                {"directions": ("qd", "dq"), "joint": False},
            ),
            *(
                (mode, {"hardness_mode": mode, "hardness_strength": 3.0}, {"hard": mode, "strength": 3.0})
                for mode in HARDNESS[1:]
            ),
        )
    ),
    Case(
        "GISTEmbedLoss", lambda g: losses.GISTEmbedLoss(0.5, group=g),
        lambda loss, d: loss(columns(d)[:2], guides(d, 2)), lambda d: define_gist(d, 2), True,
    ),
    Case(
        "GISTEmbedLoss relative", lambda g: losses.GISTEmbedLoss(0.5, "relative", 0.3, group=g),
        lambda loss, d: loss(columns(d), guides(d, 4)), lambda d: define_gist(d, 4, True, 0.3), True,
    ),
    Case(
        "GISTEmbedLoss anchors", lambda g: losses.GISTEmbedLoss(0.5, "absolute", -0.2, False, False, group=g),
        lambda loss, d: loss(columns(d)[:3], guides(d, 3)), lambda d: define_gist(d, 3, False, -0.2, False), True,
    ),
    Case(
        "CoSENTLoss", lambda g: losses.CoSENTLoss(scale=5.0, group=g), lambda loss, d: loss([d.x, d.y], d.targets),
        define_cosent,
    ),
    Case(
        "AnglELoss", lambda g: losses.AnglELoss(scale=5.0, group=g), lambda loss, d: loss([d.x, d.y], d.targets),
        lambda d: define_cosent(d, True), True,
    ),
    Case(
        "MarginMSELoss", lambda g: losses.MarginMSELoss(group=g),
        lambda loss, d: loss(columns(d), torch.stack([d.targets, -d.targets], 1)), define_margin_mse, True,
    ),
    Case("DistillClipLoss", lambda g: losses.DistillClipLoss(group=g), distilled, define_distill_clip, True),
    Case(
        "CoCaLoss", lambda g: losses.CoCaLoss(2.0, 0.5, group=g),
        lambda loss, d: loss(unit(d.x), unit(d.y), d.x[:, None] * 0, d.x[:, :1].long() * 0 + 1, 7.0)[0],
        lambda d: 0.5 * define_clip(unit(d.x), unit(d.y), 7.0),
    ),
    Case(
        "MatryoshkaLoss",
        lambda g: losses.MatryoshkaLoss(losses.SimCLRLoss(0.5, group=g), [2, 5], [0.5, 2.0]), two, define_matryoshka,
    ),
    *(
        Case(
            f"MultiLabelContrastiveLoss {kind.value}",
            lambda g, kind=kind: losses.MultiLabelContrastiveLoss(kind, group=g), labelled,
            lambda d, kind=kind: define_multi_label(d, kind), True,
        )
        for kind in losses.LabelWeight
    ),
    Case(
        "MultiLabelContrastiveLoss everyone",
        lambda g: losses.MultiLabelContrastiveLoss(all_anchors=True, group=g), labelled,
        lambda d: define_multi_label(d, losses.LabelWeight.JACCARD, True), True,
    ),
    Case("JSCLLoss", lambda g: losses.JSCLLoss(group=g), labelled, define_jscl, True),
    Case("MulSupConLoss", lambda g: losses.MulSupConLoss(group=g), labelled, define_mul_sup_con, True),
    Case(
        "MulSupConLoss samples", lambda g: losses.MulSupConLoss(0.1, losses.MulSupConReduction.PER_SAMPLE, group=g),
        labelled, lambda d: define_mul_sup_con(d, True), True,
    ),
    Case(
        "MultiLabelProtoLoss", lambda g: with_prototypes(losses.MultiLabelProtoLoss(4, 5, group=g)), labelled,
        define_proto, True,
    ),
    Case(
        "MSCLoss", lambda g: with_prototypes(losses.MSCLoss(4, 5, 0.1, 0.7, 0.2, group=g)), labelled, define_msc, True
    ),
    *(
        Case(
            f"MSCRGLoss {alpha} {regularised}",
            lambda g, alpha=alpha, r=regularised: with_prototypes(losses.MSCRGLoss(4, 5, 0.1, alpha, r, group=g)),
            labelled, lambda d, alpha=alpha, r=regularised: define_mscrg(d, PROTOTYPES, alpha, r), True,
        )
        for alpha, regularised in ((0.0, True), (0.0, False), (0.5, True), (-1.0, True))
    ),
    Case(
        "SimLAPLoss", lambda g: losses.SimLAPLoss(group=g),
        lambda loss, d: loss(d.x, gates(d), d.labels, (d.labels + 1) % 3), define_sim_lap, True,
    ),
    Case("AMCLLoss", lambda g: losses.AMCLLoss(0.1, 1.0, 0.3, group=g), heads, define_amcl, True),
    Case(
        "AMCLLoss top", lambda g: losses.AMCLLoss(0.1, 1.0, 0.3, 3, group=g), heads, lambda d: define_amcl(d, 3), True
    ),
    Case("RankNetLoss", lambda g: losses.RankNetLoss(0.7, group=g), scored, define_rank_net),
    *(
        Case(
            f"ComparisonLoss {model.value} {criterion.value}",
            lambda g, m=model, c=criterion: losses.ComparisonLoss(m, c, 1.5, group=g), scored,
            lambda d, m=model, c=criterion: define_comparison(d, m.value == "thurstone", c.value == "fidelity"),
        )
        for model, criterion in itertools.product(losses.ComparisonModel, losses.ComparisonCriterion)
    ),
    *(
        Case(
            f"LambdaLoss {weight.value} {k}", lambda g, w=weight, k=k: losses.LambdaLoss(w, k, group=g), scored,
            lambda d, w=weight, k=k: define_lambda(d, w, k),
        )
        for weight, k in [*((w, None) for w in losses.LambdaWeight), (losses.LambdaWeight.NDCG2_PLUS, 2)]
    ),
    Case("ListNetLoss", lambda g: losses.ListNetLoss(group=g), scored, define_list_net),
    Case("MACLLoss", lambda g: losses.MACLLoss(group=g), two, define_macl),
]  # fmt: skip


def views(kind: str = "random", b: int = 9, d: int = 5, seed: int = 0) -> Views:
    """Two views in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, d, generator=g).double()
    y = x + 0.7 * torch.randn(b, d, generator=g).double()
    if kind == "collapsed":
        x, y = x[:1] + 0.1 * x, y[:1] + 0.1 * y
    elif kind == "aligned":
        y = x + 1e-3 * y
    elif kind == "large":
        x, y = 30 * x, 30 * y
    return Views(x.requires_grad_(), y.requires_grad_())


def evaluate(function: Callable[[Views], Tensor], d: Views) -> dict[str, Tensor]:
    torch.manual_seed(7)  # for the losses that draw
    loss = function(d)
    grads = torch.autograd.grad(loss, [d.x, d.y], allow_unused=True)
    found = {"loss": loss.detach().double().cpu()}
    for name, leaf, grad in zip(("dx", "dy"), (d.x, d.y), grads, strict=True):
        found[name] = torch.zeros(leaf.shape).double() if grad is None else grad.double().cpu()
    return found
