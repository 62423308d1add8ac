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
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...terms import Guide, Reduction, Term
from ..arguments import check_matched, check_rows, poisoned, sequences, without_gradient
from ..group import InGroup
from ..two_views import nothing
from .sentences import finished, joined, named_columns

STRATEGIES = ("absolute", "relative")


class GISTEmbedLoss(InGroup, nn.Module):
    """InfoNCE that leaves out every candidate which a guide holds for closer than the positive.

        threshold_i = g(a_i, p_i) - margin   (absolute),   g(a_i, p_i) - margin |g(a_i, p_i)|   (relative)
        kept: candidates with g <= min(threshold_i, max_score), and the positive itself
        loss = mean_i [ LSE over kept s(a_i, p_j), s(a_i, a_j), s(p_i, p_j), s(a_i, n_j)  -  s(a_i, p_i) ]

    s = cosine / T, g the guide's cosine, a second product in the tile. a_i and p_i are no candidates
    of themselves (in sentence-transformers only because the guide's own cosine of 1 is above the threshold). Without a
    guide g is the model's own cosine, as a constant: absolute is NV-Retriever's TopK-MarginPos, relative with margin
    0.05 its TopK-PercPos at 95 % (where the positive's similarity is positive) and max_score its TopK-Abs, here for the
    candidates of a batch.

    Args:
        temperature: T > 0. Default 0.01.
        margin_strategy: "absolute" or "relative". Default: absolute.
        margin: Default 0.
        max_score: candidates above it are left out whatever the positive's similarity. Default: none.
        contrast_anchors, contrast_positives: whether the candidates a_j and p_j of p_i count. Default True, True.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on bad numbers or strategies.

    Source: Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
    2024, equation 3; sentence-transformers, gist_embed.py, and mine_hard_negatives for the name of max_score. Moreira
    et al., "NV-Retriever: Improving text embedding models with effective hard-negative mining", 2024, read in summaries
    only: it filters mined negatives before training.

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
        max_score: float | None = None,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("margin", margin)
        if margin_strategy not in STRATEGIES:
            raise ValueError(f"margin_strategy must be one of {STRATEGIES}; got {margin_strategy!r}")
        if max_score is not None:
            checks.number("max_score", max_score)
        self.max_score = max_score
        self.temperature, self.margin_strategy, self.margin = temperature, margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives

    def forward(self, embeddings: list[Tensor], guide_embeddings: list[Tensor] | None = None) -> Tensor:
        """The loss of columns: anchors, positives and, where there are any, negatives.

        Args:
            embeddings: two or more columns (B, D) of one dtype.
            guide_embeddings: as many columns (B, E) of the guide, which take no gradient. Default: `embeddings`.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        embeddings = list(embeddings)
        guides = None if guide_embeddings is None else [without_gradient(g) for g in guide_embeddings]
        if self.group is not None and current() is None:

            def run(**columns: Tensor) -> Tensor:
                of, by = sequences(columns, "embeddings", "guide_embeddings")
                return self.forward(of, by or None)

            return self.over_group(run, lambda: _named(embeddings, guides))
        _named(embeddings, guides)
        guides = [without_gradient(e) for e in embeddings] if guides is None else guides
        for k, (column, guide) in enumerate(zip(embeddings, guides, strict=True)):
            check_matched(embeddings[0], column, ("embeddings[0]", f"embeddings[{k}]"))
            check_rows(f"guide_embeddings[{k}]", guide, embeddings[0].shape[0], embeddings[0])
            checks.embedding_pair(guides[0], guide, ("guide_embeddings[0]", f"guide_embeddings[{k}]"))
        if embeddings[0].shape[0] == 0:
            return nothing(*embeddings)
        return poisoned(self._of(embeddings, guides), *embeddings, *guides)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of columns that are embedded in parts, (b, D) and (b, E) each.

        What sentence-transformers' CachedGISTEmbedLoss calls: `cached.calculate_loss = loss.calculate_loss`.

        Args:
            reps, reps_guided: parts of `embeddings` and of `guide_embeddings`, by column.
            with_backward: runs the backward pass and returns the value alone. Default False.
        """
        return finished(self.forward(joined(reps), joined(reps_guided)), with_backward)

    def _of(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        dtype = statistics_dtype(embeddings[0])
        unit = functools.partial(by_row, lambda rows: F.normalize(rows.to(dtype), dim=1, eps=1e-12))
        anchor, positive, *negatives = zip(embeddings, map(unit, guides), strict=True)
        index = torch.arange(anchor[0].shape[0], device=anchor[0].device)
        guided = pair_similarity(anchor[1], positive[1], index, index)
        margin = self.margin * (guided.abs() if self.margin_strategy == "relative" else 1.0)
        # A copy of the positive is not closer than it, however the products round.
        threshold = guided - margin + 8 * max(torch.finfo(statistics_dtype(v)).eps for v in (anchor[0], *guides))
        if self.max_score is not None:
            threshold = threshold.clamp_max(self.max_score)
        below = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))  # what is equal stays
        kept = [Term(Reduction.LOGSUMEXP, scale=1 / self.temperature, below=below, guide=Guide.THRESHOLD)]

        def block(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor] | None, exclude: Tensor | None) -> Tensor:
            y, guide = (None, rows[1]) if columns is None else (columns[0], (rows[1], columns[1]))
            return pair_reduce(rows[0], y, kept, guide=guide, exclude=exclude, normalize=True)[0]

        own = pair_similarity(anchor[0], positive[0], index, index, normalize=True) / self.temperature
        blocks = [block(anchor, positive, index)]  # row i must not meet column i: it is counted once, unguided
        if self.contrast_anchors:
            blocks.append(block(anchor, None, None))
        if self.contrast_positives:
            blocks.append(block(positive, None, None))
        blocks += [block(anchor, negative, None) for negative in negatives]
        return (functools.reduce(log_add_exp, blocks, own) - own).mean()


def _named(embeddings: list[Tensor], guides: list[Tensor] | None) -> dict[str, Tensor]:
    if guides is None:
        return named_columns(embeddings)
    if len(embeddings) != len(guides):
        raise ValueError(
            "embeddings and guide_embeddings must hold the same two or more columns; "
            f"got {len(embeddings)} and {len(guides)}"
        )
    return {**named_columns(embeddings), **named_columns(guides, "guide_embeddings")}
