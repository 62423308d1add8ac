"""Losses of queries and documents: ours, and their definitions as loops."""

from __future__ import annotations

import itertools

import torch
from loss_cases import cosine
from torch import Tensor
from views import Case, Views, lse, mean, unit

from flashpair import losses
from flashpair.losses.retrieval.multiple_negatives import DIRECTIONS, HARDNESS


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


def define_gist(
    d: Views, count: int, relative: bool = False, margin: float = 0.0, both: bool = True, highest: float = 2.0,
    alone: bool = False,
) -> Tensor:  # fmt: skip
    e, b, terms = columns(d)[:count], len(d.x), []
    g = e if alone else guides(d, count)
    for i in range(b):
        own = cosine(g[0][i], g[1][i]).item()
        limit = min(own - margin * (abs(own) if relative else 1), highest)
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


def taught(d: Views) -> Tensor:
    return torch.stack([d.targets, -0.5 * d.targets, d.targets * 0 + 0.3], 1)


def define_distillation(d: Views, m3: bool = False, alone: bool = False) -> Tensor:
    (q, *documents), terms = columns(d), []
    for i in range(len(q)):
        own, t = [cosine(q[i], c[i]) / 0.5 for c in documents], taught(d)[i].softmax(0)
        far = [cosine(q[i], c[j]) / 0.5 for c in documents for j in range(len(q)) if j != i and not alone]
        losses_of = [lse([*far, *own[k:]]) - own[k] for k in range(3)]
        divergence = sum(t[k] * (lse(own) - own[k]) for k in range(3)) + 0.7 * losses_of[0]
        terms.append(sum(t[k] * losses_of[k] for k in range(3)) if m3 else divergence)
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


CASES = [
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
        lambda loss, d: loss(columns(d)[:2], guides(d, 2)), lambda d: define_gist(d, 2),
    ),
    Case(
        "GISTEmbedLoss relative", lambda g: losses.GISTEmbedLoss(0.5, "relative", 0.3, group=g),
        lambda loss, d: loss(columns(d), guides(d, 4)), lambda d: define_gist(d, 4, True, 0.3),
    ),
    Case(
        "GISTEmbedLoss anchors", lambda g: losses.GISTEmbedLoss(0.5, "absolute", -0.2, False, False, group=g),
        lambda loss, d: loss(columns(d)[:3], guides(d, 3)), lambda d: define_gist(d, 3, False, -0.2, False),
    ),
    Case(
        "GISTEmbedLoss alone", lambda g: losses.GISTEmbedLoss(0.5, "relative", 0.2, max_score=0.6, group=g),
        lambda loss, d: loss(columns(d)[:3]), lambda d: define_gist(d, 3, True, 0.2, True, 0.6, True),
    ),
    *(
        Case(
            f"EmbeddingDistillationLoss {kind.value}{' alone' * alone}",
            lambda g, k=kind, alone=alone: losses.EmbeddingDistillationLoss(
                None, k, 0.5, in_batch_negatives=not alone, contrastive_weight=0.7, group=g
            ),
            lambda loss, d: loss(columns(d), taught(d)),
            lambda d, m3=kind == losses.DistillationKind.M3_KD, alone=alone: define_distillation(d, m3, alone), True,
        )
        for kind, alone in itertools.product(losses.DistillationKind, (False, True))
    ),
    Case(
        "CoSENTLoss", lambda g: losses.CoSENTLoss(scale=5.0, group=g), lambda loss, d: loss([d.x, d.y], d.targets),
        define_cosent,
    ),
    Case(
        "AnglELoss", lambda g: losses.AnglELoss(scale=5.0, group=g), lambda loss, d: loss([d.x, d.y], d.targets),
        lambda d: define_cosent(d, True),
    ),
    Case(
        "MarginMSELoss", lambda g: losses.MarginMSELoss(group=g),
        lambda loss, d: loss(columns(d), torch.stack([d.targets, -d.targets], 1)), define_margin_mse, True,
    ),
]  # fmt: skip
