"""GISTEmbed: a guide model says which negatives of the batch are none."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...distributed.sharded import by_row, current
from ...pairs import pair_similarity
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ..arguments import check_matched, check_rows, poisoned, without_gradient
from ..group import InGroup
from ..two_views import nothing
from .sentences import named_columns

STRATEGIES = ("absolute", "relative")


class GISTEmbedLoss(InGroup, nn.Module):
    """InfoNCE that leaves out every candidate which a guide holds for closer than the positive.

        threshold_i = g(a_i, p_i) - margin   (absolute),   g(a_i, p_i) - margin |g(a_i, p_i)|   (relative)
        kept: candidates with g <= threshold_i, and the positive itself
        loss = mean_i [ LSE over kept s(a_i, p_j), s(a_i, a_j), s(p_i, p_j), s(a_i, n_j)  -  s(a_i, p_i) ]

    s = cosine / T, g the guide's cosine, a second product that exists a panel at a time. a_i and p_i are no candidates
    of themselves (in sentence-transformers only because the guide's own cosine of 1 is above the threshold).

    Args:
        temperature: T > 0. Default 0.01.
        margin_strategy: "absolute" or "relative". Default: absolute.
        margin: Default 0.
        contrast_anchors, contrast_positives: whether the candidates a_j and p_j of p_i count. Default True, True.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on bad numbers or strategies.

    Source: Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
    2024, equation 3; sentence-transformers, gist_embed.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import GISTEmbedLoss
        >>> x = torch.eye(3)
        >>> guide = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> loss = GISTEmbedLoss(temperature=1.0, margin=0.1)  # the guide sees no difference between 0 and 1
        >>> bool(loss([x, x], [guide, guide]) < loss([x, x], [x, x]))
        True
    """

    row_groups = None

    def __init__(
        self,
        temperature: float = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("margin", margin)
        if margin_strategy not in STRATEGIES:
            raise ValueError(f"margin_strategy must be one of {STRATEGIES}; got {margin_strategy!r}")
        self.temperature, self.margin_strategy, self.margin = temperature, margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives

    def forward(self, embeddings: list[Tensor], guide_embeddings: list[Tensor]) -> Tensor:
        """The loss of columns: anchors, positives and, where there are any, negatives.

        Args:
            embeddings: two or more columns (B, D) of one dtype.
            guide_embeddings: as many columns (B, E) of the guide, which take no gradient.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        embeddings, guides = list(embeddings), [without_gradient(g) for g in guide_embeddings]
        if self.group is not None and current() is None:

            def run(**columns: Tensor) -> Tensor:
                values = list(columns.values())
                return self.forward(values[: len(embeddings)], values[len(embeddings) :])

            return self.over_group(run, lambda: _named(embeddings, guides))
        _named(embeddings, guides)
        for k, (column, guide) in enumerate(zip(embeddings, guides, strict=True)):
            check_matched(embeddings[0], column, ("embeddings[0]", f"embeddings[{k}]"))
            check_rows(f"guide_embeddings[{k}]", guide, embeddings[0].shape[0], embeddings[0])
            checks.embedding_pair(guides[0], guide, ("guide_embeddings[0]", f"guide_embeddings[{k}]"))
        if embeddings[0].shape[0] == 0:
            return nothing(*embeddings)
        return poisoned(self._of(embeddings, guides), *embeddings, *guides)

    def _of(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        unit = functools.partial(by_row, functools.partial(F.normalize, dim=1, eps=1e-12))
        anchor, positive, *negatives = zip(embeddings, map(unit, guides), strict=True)
        index = torch.arange(anchor[0].shape[0], device=anchor[0].device)
        guided = pair_similarity(anchor[1], positive[1], index, index)
        margin = self.margin * (guided.abs() if self.margin_strategy == "relative" else 1.0)
        # A copy of the positive is not closer than it, however the products round.
        slack = 8 * max(torch.finfo(statistics_dtype(v)).eps for v in (anchor[0], guided))
        threshold = guided - margin + slack
        own = pair_similarity(anchor[0], positive[0], index, index, normalize=True) / self.temperature
        blocks = [(anchor, positive, True)]  # rows, columns, whether row i must not meet column i
        if self.contrast_anchors:
            blocks.append((anchor, anchor, True))
        if self.contrast_positives:
            blocks.append((positive, positive, True))
        blocks += [(anchor, negative, False) for negative in negatives]
        total = own
        for (x, u), (y, v), excludes in blocks:

            def kept(panel: RowPanel, threshold: Tensor) -> list[Tensor]:
                keep = panel.allowed & ~(panel.products[0] > threshold[:, None])
                return [torch.where(keep, panel.s / self.temperature, -torch.inf).logsumexp(1)]

            (found,) = row_reduce(
                x, y, kept, products=[(u, v)], rows=[threshold], exclude=index if excludes else None, normalize=True
            )
            total = log_add_exp(total, found)
        return (total - own).mean()


def _named(embeddings: list[Tensor], guides: list[Tensor]) -> dict[str, Tensor]:
    if len(embeddings) != len(guides):
        raise ValueError(
            "embeddings and guide_embeddings must hold the same two or more columns; "
            f"got {len(embeddings)} and {len(guides)}"
        )
    return {**named_columns(embeddings), **named_columns(guides, "guide_embeddings")}
