"""Losses of label sets: ours, and their definitions as loops."""

from __future__ import annotations

import math

import torch
from loss_cases import cosine
from torch import Tensor
from views import Case, Views, lse, mean

from flashpair import losses
from flashpair.losses.multi_label.nws import NWSAggregation


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


def define_jscl(d: Views, temperature: float = 0.1) -> Tensor:
    y, b, terms = label_sets(d), len(d.x), [0 * d.x.sum()]
    for i in range(b):
        s = {j: cosine(d.x[i], d.x[j]) / temperature for j in range(b) if j != i}
        w = {j: WEIGHTS[losses.LabelWeight.JACCARD](y[i], y[j]) for j in s}
        if any(w.values()):
            total = lse([s[j] + math.log(w[j]) for j in s if w[j]])
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


OF_QUEUE = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]])


def references(d: Views) -> tuple[list[Tensor], list[set[int]]]:
    """Keys and a queue without gradient, and their labels."""
    of_queue = [set(row.nonzero().flatten().tolist()) for row in OF_QUEUE]
    return [*d.y.detach(), *d.queue], [*label_sets(d), *of_queue]


def define_mul_sup_con_queue(d: Views, per_sample: bool = False, queue: bool = True, keys: bool = True) -> Tensor:
    refs, of_refs = references(d)
    first, end = 0 if keys else len(d.x), None if queue else len(d.x)
    refs, of_refs, rows = refs[first:end], of_refs[first:end], []
    for x, y in zip(d.x, label_sets(d), strict=True):
        s = [cosine(x, r) / 0.1 for r in refs]
        found = [[v for v, z in zip(s, of_refs, strict=True) if c in z] for c in y]
        rows.append([lse(s) - mean(near) for near in found if near])
    if per_sample:
        return sum((mean(r) for r in rows if r), 0 * d.x.sum()) / len(d.x)
    return sum((v for r in rows for v in r), 0 * d.x.sum()) / max(sum(len(r) for r in rows), 1)


RELATED = torch.rand(4, 4, generator=torch.Generator().manual_seed(4)).double()
RELATED[2, 3] = 1.0


def define_nws(
    d: Views, prototypes: Tensor = PROTOTYPES, alone: bool = False, alpha: float = 0.7, beta: float = 0.2,
    largest: bool = False,
) -> Tensor:  # fmt: skip
    refs, of_refs = ([*d.x.detach()], label_sets(d)) if alone else references(d)
    terms = [0 * d.x.sum()]
    for x, y in zip(d.x, label_sets(d), strict=True):
        s = [cosine(x, r) / 0.1 for r in refs]
        of_label = [cosine(x, p) / 0.1 for p in prototypes]
        negatives = [of_label[c] for c in range(4) if c not in y]
        for v, z in zip(s, of_refs, strict=True):
            pairs = [float(RELATED[c, e]) for c in y for e in z]
            related = max(pairs, default=0.0) if largest else sum(pairs) / max(len(pairs), 1)
            if not y & z and related < 1:
                negatives.append(v + math.log(beta * (1 - related)))
        if not y or not negatives:
            continue
        total = lse(negatives)
        n = {c: 1 - alpha / len(y) + alpha * sum(1 / len(y | z) for z in of_refs if c in z) for c in y}
        loss = sum((total - of_label[c]) / n[c] for c in y)
        for v, z in zip(s, of_refs, strict=True):
            loss = loss + sum(alpha / len(y | z) / n[c] for c in y & z) * (total - v)
        terms.append(loss / len(y))
    return sum(terms) / len(d.x)


def define_correlation(logits: Tensor, y: list[set[int]]) -> Tensor:
    terms, p = [0 * logits.sum()], torch.sigmoid(logits)
    for i, present in enumerate(y):
        absent = set(range(logits.shape[1])) - present
        pairs = [torch.exp(p[i, a] - p[i, c]) for a in absent for c in present]
        if pairs:
            terms.append(mean(pairs))
    return sum(terms) / len(y)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)


def define_hybrid(d: Views) -> Tensor:
    z, y = d.y[:, :4], label_sets(d)
    bce = 0 * z.sum()
    for i in range(len(z)):
        for c in range(4):
            p = torch.sigmoid(z[i, c] if c in y[i] else -z[i, c])
            bce = bce - CLASS_WEIGHTS[c] * torch.log(p) / z.numel()
    contrastive = define_multi_label(d, losses.LabelWeight.ANY)
    return 0.5 * bce + 2 * define_correlation(z, y) + 0.3 * contrastive


def queued(loss, d: Views) -> Tensor:
    return loss(d.x, d.multi_hot, d.y, d.queue, OF_QUEUE.to(d.x.device))


def labelled(loss, d: Views) -> Tensor:
    return loss(d.x, d.multi_hot)


CASES = [
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
    Case("JSCLLoss cold", lambda g: losses.JSCLLoss(0.01, group=g), labelled, lambda d: define_jscl(d, 0.01), True),
    Case("JSCLLoss", lambda g: losses.JSCLLoss(group=g), labelled, define_jscl, True),
    Case("MulSupConLoss", lambda g: losses.MulSupConLoss(group=g), labelled, define_mul_sup_con, True),
    Case(
        "MulSupConLoss samples", lambda g: losses.MulSupConLoss(0.1, losses.MulSupConReduction.PER_SAMPLE, group=g),
        labelled, lambda d: define_mul_sup_con(d, True), True,
    ),
    Case("MulSupConLoss queue", lambda g: losses.MulSupConLoss(group=g), queued, define_mul_sup_con_queue, True),
    Case(
        "NWSLoss", lambda g: with_prototypes(losses.NWSLoss(4, 5, RELATED, 0.1, 0.7, 0.2, group=g)), queued, define_nws,
        True,
    ),
    Case(
        "NWSLoss max",
        lambda g: with_prototypes(losses.NWSLoss(4, 5, RELATED, 0.1, 0.7, 0.2, NWSAggregation.MAX, group=g)),
        queued, lambda d: define_nws(d, largest=True), True,
    ),
    Case(
        "HybridMultiLabelLoss", lambda g: losses.HybridMultiLabelLoss(CLASS_WEIGHTS, 0.5, 2.0, 0.3, group=g),
        lambda loss, d: loss.to(d.x.device)(d.y[:, :4], d.x, d.multi_hot), define_hybrid, True,
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
]  # fmt: skip
