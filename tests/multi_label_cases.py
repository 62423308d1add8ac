"""Losses of label sets: ours, and their definitions as loops."""

from __future__ import annotations

import math

import torch
from loss_cases import cosine
from torch import Tensor
from views import Case, Views, lse, mean

from flashpair import losses


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
