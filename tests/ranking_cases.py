"""Losses of scores: ours, and their definitions as loops."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from views import Case, Views

from flashpair import losses


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


def define_adr_mse(d: Views) -> Tensor:
    a, y, terms = d.x.sum(1), d.targets, []
    for of in lists(d):
        for i in of:
            better, alike = (sum(1.0 for j in of if v(y[j], y[i])) for v in (torch.gt, torch.eq))
            rank = better + (alike + 1) / 2
            found = 1 + sum((1 / (1 + torch.exp(-0.7 * (a[j] - a[i]))) for j in of if j != i), 0 * a[i])
            terms.append((rank - found) ** 2 / math.log2(1 + rank))
    return sum(terms) / len(terms)


def uncertain(d: Views) -> tuple[Tensor, ...]:
    """Scores, their deviations, targets, their deviations."""
    widths = d.y[:, 2].detach().abs().mul(2).round() / 2 + 0.5
    return d.x.sum(1), torch.nn.functional.softplus(d.y.sum(1)), d.targets, widths


def define_unique(d: Views) -> Tensor:
    (a, s, y, w), terms = uncertain(d), [0 * (d.x.sum() + d.y.sum())]
    for of in lists(d):
        for i, j in itertools.combinations(of, 2):
            p, g = (
                torch.special.ndtr((v[i] - v[j]) / (u[i] ** 2 + u[j] ** 2 + 1e-8).sqrt())
                for v, u in ((a, s.detach()), (y, w))
            )
            fidelity = 1 - (p * g + 1e-8).sqrt() - ((1 - p) * (1 - g) + 1e-8).sqrt()
            terms.append(fidelity + (0.2 - torch.sign(w[i] - w[j]) * (s[i] - s[j])).clamp_min(0))
    return sum(terms) / max(len(terms) - 1, 1)


CASES = [
    Case("ADRMSELoss", lambda g: losses.ADRMSELoss(0.7, group=g), scored, define_adr_mse),
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
    Case(
        "UNIQUELoss", lambda g: losses.UNIQUELoss(0.2, group=g), lambda loss, d: loss(*uncertain(d), d.labels),
        define_unique,
    ),
    Case("ListNetLoss", lambda g: losses.ListNetLoss(group=g), scored, define_list_net),
]  # fmt: skip
