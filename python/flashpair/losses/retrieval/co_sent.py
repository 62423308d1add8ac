"""CoSENT and AnglE: pairs in the order of their labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import by_row
from ...pairs import pair_similarity
from ..arguments import poisoned
from ..two_views import nothing
from .sentences import SentenceLoss


class CoSENTLoss(SentenceLoss):
    """Pairs with a higher label must be more similar than pairs with a lower one.

        loss = log( 1 + Σ_{i, j: y_i < y_j} e^{scale (s_i - s_j)} ),    s_i the cosine of the i-th pair

    O(B log B): running log-sums in the order of the labels. sentence-transformers' class.

    Args:
        model: turns features into `{"sentence_embedding": ...}`. Default: none, columns are embeddings.
        scale: > 0. Default 20.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad scale; at the call also on other than two columns, or without labels.

    Source: Su, "CoSENT: a more efficient sentence embedding scheme than Sentence-BERT", 2022; sentence-transformers,
    cosent.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import CoSENTLoss
        >>> x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines 1 and 0
        >>> round(float(CoSENTLoss(scale=1.0)([x, y], torch.tensor([0.0, 1.0]))), 4)  # log(1 + e)
        1.3133
    """

    def __init__(self, model: nn.Module | None = None, scale: float = 20.0, group=None) -> None:
        super().__init__(model, group)
        checks.number("scale", scale, low=0.0, open_low=True)
        self.scale = scale

    def similarities(self, first: Tensor, second: Tensor) -> Tensor:
        """(B,) of the pairs."""
        index = torch.arange(first.shape[0], device=first.device)
        return pair_similarity(first, second, index, index, normalize=True)

    def of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(f"embeddings must hold 2 columns; got {len(embeddings)}")
        labels = checked_labels(labels, embeddings[0])
        if len(labels) == 0:
            return nothing(*embeddings)
        logits = self.scale * self.similarities(*embeddings)
        labels, order = labels.sort(stable=True)
        logits = logits[order]
        higher = torch.searchsorted(labels, labels, right=True)  # first pair with a higher label
        sums = (-logits).flip(0).logcumsumexp(0).flip(0)
        none = torch.finfo(logits.dtype).min  # not -inf: a log-sum of nothing has no gradient
        pairs = torch.where(higher < len(labels), logits + sums[higher.clamp_max(len(labels) - 1)], none)
        return poisoned(F.softplus(pairs.logsumexp(0), threshold=40), *embeddings)


class AnglELoss(CoSENTLoss):
    """`CoSENTLoss` of the similarity `|cos(x, y) + <x'', y' > - <x', y''>|`: halves ', '' of unit vectors.

    Args:
        model, scale, group: see `CoSENTLoss`.

    Source: Li and Li, "AnglE-optimized Text Embeddings", ACL 2024, equations 5-8, in the form of sentence-transformers'
    pairwise_angle_sim.

    Example:
        >>> import torch
        >>> from flashpair.losses import AnglELoss
        >>> AnglELoss()([torch.eye(2), torch.eye(2)], torch.tensor([0.0, 0.0])).item()  # nothing is ordered
        0.0
    """

    def similarities(self, first: Tensor, second: Tensor) -> Tensor:
        if first.shape[1] % 2:
            first, second = (by_row(lambda x: F.pad(x, (0, 1)), v) for v in (first, second))
        half = first.shape[1] // 2
        turned = by_row(lambda x: torch.cat([x[:, half:], -x[:, :half]], 1), first)
        return (super().similarities(first, second) + super().similarities(turned, second)).abs()


def checked_labels(labels: Tensor | None, embeddings: Tensor) -> Tensor:
    """(B,) one label a pair, of any number type.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.numel() != embeddings.shape[0]:
        raise ValueError(f"labels must hold {embeddings.shape[0]} numbers, one a pair; got {tuple(labels.shape)}")
    checks.same_device("embeddings", embeddings, labels=labels)
    return labels.reshape(-1).int() if labels.dtype == torch.bool else labels.reshape(-1)
