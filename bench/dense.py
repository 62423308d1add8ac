"""The same losses in dense PyTorch, as one writes them by hand; and in row chunks whose S is computed again backward.

Where the terms of a loss belong to rows, `*_terms(inputs, rows)` gives those of a slice of the batch: the dense loss
takes all rows at once, the chunked one a slice at a time under torch.utils.checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from inputs import Inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 1024
ALL = slice(None)


def masks(labels: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor]:
    """(rows, B) positives without self, negatives."""
    same = labels[rows, None] == labels[None]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)[rows]
    return same & ~itself, ~same


def cosine(x: Tensor, y: Tensor | None = None, rows: slice = ALL) -> Tensor:
    x = F.normalize(x)
    return x[rows] @ (x if y is None else F.normalize(y)).T


def masked_lse(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, -math.inf).logsumexp(1)


def average_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def at_once(terms: Callable[[Inputs, slice], Tensor], reduce: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda i: reduce(terms(i, ALL))


def chunked(terms: Callable[[Inputs, slice], Tensor], reduce: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    def loss(i: Inputs) -> Tensor:
        starts = range(0, len(i.x), CHUNK_ROWS)
        of = [checkpoint(terms, i, slice(s, min(s + CHUNK_ROWS, len(i.x))), use_reentrant=False) for s in starts]
        return reduce(torch.cat(of))

    return loss


# --- two towers -------------------------------------------------------------------------------------------------------


def dense_clip(i: Inputs) -> Tensor:
    logits = i.scale * i.x @ i.y.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_terms(i: Inputs, rows: slice) -> Tensor:
    """Both directions of some pairs: S twice over all of them."""
    target = torch.arange(len(i.x), device=i.x.device)[rows]
    one = F.cross_entropy(i.scale * i.x[rows] @ i.y.T, target, reduction="none")
    return (one + F.cross_entropy(i.scale * i.y[rows] @ i.x.T, target, reduction="none")) / 2


def siglip_terms(i: Inputs, rows: slice) -> Tensor:
    logits = i.scale * i.x[rows] @ i.y.T + i.bias
    sign = 2 * torch.eye(len(i.x), device=logits.device, dtype=logits.dtype)[rows] - 1
    return -F.logsigmoid(sign * logits).sum(1)


def info_nce_terms(i: Inputs, rows: slice, temperature: float = 0.1) -> Tensor:
    logits = i.scale * cosine(i.x, i.y, rows) / temperature
    return F.cross_entropy(logits, torch.arange(len(i.x), device=logits.device)[rows], reduction="none")


# --- softmax over labelled pairs --------------------------------------------------------------------------------------


def sup_con_terms(i: Inputs, rows: slice, temperature: float = 0.1) -> Tensor:
    z = cosine(i.x, rows=rows) / temperature
    positive, negative = masks(i.labels, rows)
    return masked_lse(z, positive | negative) - (z * positive).sum(1) / positive.sum(1)


def nt_xent_terms(i: Inputs, rows: slice, temperature: float = 0.07) -> Tensor:
    """One positive per row (two views of each image)."""
    z = cosine(i.x, rows=rows) / temperature
    positive, negative = masks(i.labels, rows)
    return masked_lse(z, positive | negative) - (z * positive).sum(1)


def multi_similarity_terms(i: Inputs, rows: slice, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1) -> Tensor:
    s = cosine(i.x, rows=rows)
    positive, negative = masks(i.labels, rows)
    fixed = s.detach()
    hardest_positive = fixed.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    hardest_negative = fixed.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    positive = positive & (fixed - epsilon < hardest_negative)
    negative = negative & (fixed + epsilon > hardest_positive)
    pull, push = masked_lse(alpha * (base - s), positive), masked_lse(beta * (s - base), negative)
    return F.softplus(pull) / alpha + F.softplus(push) / beta


def circle_terms(i: Inputs, rows: slice, m: float = 0.4, gamma: float = 80.0) -> Tensor:
    s = cosine(i.x, rows=rows)
    positive, negative = masks(i.labels, rows)
    fixed = s.detach()
    pull = masked_lse(-gamma * (1 + m - fixed).relu() * (s - (1 - m)), positive)
    push = masked_lse(gamma * (fixed + m).relu() * (s - m), negative)
    return F.softplus(pull + push)


# --- class heads ------------------------------------------------------------------------------------------------------


def dense_arc_face(i: Inputs, margin: float = 0.5, scale: float = 64.0) -> Tensor:
    """As public code does it, on the cosine of each row with its own class alone."""
    logits, rows = cosine(i.x, i.y), torch.arange(len(i.x), device=i.x.device)
    own = logits[rows, i.labels].clamp(-1 + 1e-6, 1 - 1e-6)
    moved = torch.where(own > math.cos(math.pi - margin), (own.acos() + margin).cos(), own - margin * math.sin(margin))
    return F.cross_entropy(scale * logits.index_put((rows, i.labels), moved), i.labels)


def dense_linear(i: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(i.x, i.y) / 16, i.labels)


# --- distances --------------------------------------------------------------------------------------------------------


def distances(x: Tensor) -> Tensor:
    """(B, B) Euclidean distances of normalised rows; the diagonal is 0 with gradient 0."""
    s = cosine(x)
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return (2 - 2 * s).clamp_min(0).masked_fill(itself, 1.0).sqrt().masked_fill(itself, 0.0)


def dense_contrastive(i: Inputs, negative_margin: float = 1.0) -> Tensor:
    d = distances(i.x)
    positive, negative = masks(i.labels)
    return average_nonzero(d * positive) + average_nonzero((negative_margin - d).relu() * negative)


def dense_memory_contrastive(i: Inputs, negative_margin: float = 1.0) -> Tensor:
    """A batch against the memory, no pair of which is a row with itself."""
    d = (2 - 2 * cosine(i.x, i.memory)).clamp_min(1e-12).sqrt()
    same = i.labels[:, None] == i.memory_labels
    return average_nonzero(d * same) + average_nonzero((negative_margin - d).relu() * ~same)


def dense_batch_hard(i: Inputs, margin: float = 0.05) -> Tensor:
    d = distances(i.x)
    positive, negative = masks(i.labels)
    furthest = d.masked_fill(~positive, -math.inf).max(1).values
    closest = d.masked_fill(~negative, math.inf).min(1).values
    return average_nonzero((furthest - closest + margin).relu())


def dense_all_triplets(i: Inputs, margin: float = 0.05) -> Tensor:
    """Every anchor, positive and negative at once, (B, B, B)."""
    d = distances(i.x)
    positive, negative = masks(i.labels)
    violation = (d[:, :, None] - d[:, None, :] + margin).relu()
    return average_nonzero(violation * (positive[:, :, None] & negative[:, None, :]))


NEIGHBOURS = 32


def dense_nearest(i: Inputs) -> Tensor:
    """Sum of the similarities of each row's nearest neighbours."""
    s = cosine(i.x)
    return s.fill_diagonal_(-math.inf).topk(NEIGHBOURS, dim=1).values.sum()
