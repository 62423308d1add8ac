"""Continuously weighted contrastive loss: how alike two samples are in a frozen tower says how positive they are."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...panels import product
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...terms import Axis, Guide, Reduction, Term
from ..arguments import as_guide, as_scalar, check_matched, check_rows, poisoned
from ..group import InGroup
from ..two_views import nothing


class CWCLWeight(Enum):
    """Weight of a pair, from the cosine of both samples in the frozen tower."""

    AFFINE = "affine"  # (1 + cos) / 2
    EXPONENTIAL = "exponential"  # exp((cos - 1) / bandwidth)


class CWCLLoss(InGroup, nn.Module):
    """Cross-entropy towards weights from a frozen tower one way, CLIP's the other way.

        w_ij = (1 + <m_i, m_j>) / 2  or  e^{(<m_i, m_j> - 1) / h},   m the unit vectors of the frozen tower
        rows:     mean_i 1 / (Σ_j w_ij)  Σ_j w_ij [ LSE_k t <p_i, q_k>  -  t <p_i, q_j> ]
        columns:  mean_j [ LSE_i t <p_i, q_j>  -  t <p_j, q_j> ]
        loss = rows + columns

    Where w is affine in a product, Σ_j w_ij q_j is a D×D' matrix times m_i: no second pass over the pairs. The
    exponential one is a second product in the tile.

    Args:
        weight: see `CWCLWeight`. Default: AFFINE, the paper's.
        bandwidth: h > 0 of the exponential weight. Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Srinivasa et al., "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss", NeurIPS 2023,
    equations 4 and 5. Read through CellCLIP's and another implementation; assumed from the former: the directions are
    added, not averaged. The exponential weight is a user's, not the paper's.

    Example:
        >>> import torch
        >>> from flashpair.losses import CWCLLoss
        >>> p = q = torch.eye(2)
        >>> same = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # opposite in the frozen tower: weights 1 and 0, CLIP twice
        >>> round(float(CWCLLoss()(p, q, 1.0, frozen=same)), 4)  # 2 (log(e + 1) - 1)
        0.6265
    """

    row_groups = (("first", "second", "frozen"),)

    def __init__(self, weight: CWCLWeight = CWCLWeight.AFFINE, bandwidth: float = 0.1, group=None) -> None:
        super().__init__(group=group)
        checks.member("weight", weight, CWCLWeight)
        checks.number("bandwidth", bandwidth, low=0.0, open_low=True)
        self.weight, self.bandwidth = weight, bandwidth

    def forward(
        self, first: Tensor, second: Tensor, logit_scale: float | Tensor, frozen: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            first, second: (B, D) p and q of one dtype, used as they come (normalise them first).
            logit_scale: t, number or 0-d tensor.
            frozen: (B, D') unit vectors m, which take no gradient. Default: `first`, the frozen tower's own.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        frozen = first if frozen is None else frozen
        if self.group is not None and current() is None:
            tensors = {"first": first, "second": second, "frozen": frozen.detach()}
            return self.over_group(self.forward, tensors, logit_scale=logit_scale)
        check_matched(first, second, ("first", "second"))
        check_rows("frozen", frozen, first.shape[0], first)
        scale = as_scalar("logit_scale", logit_scale)
        rows = first.shape[0]
        if rows == 0:
            return nothing(first, second)
        logits = [Term(Reduction.LOGSUMEXP, axis=axis, scale=scale) for axis in Axis]
        by_row, by_column = pair_reduce(first, second, logits)
        index = torch.arange(rows, device=first.device)
        own = scale * pair_similarity(first, second, index, index)
        weighted = self._affine if self.weight == CWCLWeight.AFFINE else self._exponential
        loss = (by_row - scale * weighted(first, second, frozen)).mean() + (by_column - own).mean()
        return poisoned(loss, first, second, frozen)

    def _affine(self, first: Tensor, second: Tensor, frozen: Tensor) -> Tensor:
        """(B,) Σ_j w_ij <p_i, q_j> / Σ_j w_ij."""
        dtype = statistics_dtype(first)
        p, q, m = first.to(dtype), second.to(dtype), frozen.detach().to(dtype)
        mass = product(m, m.sum(0)[:, None]).squeeze(1) + len(m)
        return (p * (product(m, product(m.T, q)) + q.sum(0))).sum(1) / mass

    def _exponential(self, first: Tensor, second: Tensor, frozen: Tensor) -> Tensor:
        m = as_guide(frozen, first)
        # w / Σ w is a softmax of <m_i, m_j> / h.
        term = Term(Reduction.SOFTMAX_MEAN, scale=1 / self.bandwidth, detach_weights=True, guide=Guide.LOGITS)
        return pair_reduce(first, second, [term], guide=(m, m))[0]
