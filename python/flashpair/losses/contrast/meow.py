"""MEOW: negatives weigh by how often clusterings tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import check_matched, inverse_temperature, numbered, poisoned
from ..group import InGroup
from ..two_views import nothing


class MEOWLoss(InGroup, nn.Module):
    """InfoNCE whose negatives weigh by the number of clusterings that tell them from the anchor.

        w_ij = K - Σ_k [ c_k(i) = c_k(j) ]  in 0 ... K
        loss = mean_i [ log Σ_j w_ij e^{s_ij / T}  -  s_ii / T ]

    w_ii = 0: the positive is no part of the sum, so the loss may be negative. Anchors that nothing is told apart from
    contribute 0. One pass over the pairs a clustering.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.4.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive.

    Source: Yu et al., "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and Weighted Negative Samples"
    (MEOW), SDM 2023; jianxiangyu/MEOW, module/contrast.py. Its prototypical term is `ProtoNCELoss`, learned weights are
    `AdaMEOWLoss`; anchors without negatives are log 0 there.

    Example:
        >>> import torch
        >>> from flashpair.losses import MEOWLoss
        >>> x, clusters = torch.eye(3), torch.tensor([[0, 0, 1], [0, 1, 2]])
        >>> round(float(MEOWLoss(temperature=1.0)(x, x, clusters)), 4)  # (2 log 3 + log 4) / 3 - 1
        0.1945
    """

    row_groups = None

    def __init__(self, temperature: float | Tensor = 0.4, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor, clusters: Tensor) -> Tensor:
        """The loss of a batch; anchors are the rows of `first`.

        Args:
            first, second: (B, D) row i of both is of sample i; cosines are compared.
            clusters: (K, B) int64, the cluster of each sample in each of K ≥ 1 clusterings.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.
        """
        if self.group is not None and current() is None:
            run = lambda first, second, **c: self.forward(first, second, torch.stack(list(c.values())))  # noqa: E731
            return self.over_group(run, lambda: {"first": first, "second": second, **named_clusterings(clusters)})
        named_clusterings(clusters)
        check_matched(first, second, ("first", "second"))
        if clusters.shape[1] != first.shape[0]:
            raise ValueError(f"clusters must have shape (clusterings, {first.shape[0]}); got {tuple(clusters.shape)}")
        checks.same_device("first", first, clusters=clusters)
        rows = first.shape[0]
        if rows == 0:
            return nothing(first, second)
        scale, index = inverse_temperature(self.temperature), torch.arange(rows, device=first.device)
        rivals: Tensor | None = None
        for labels in clusters.unbind(0):
            apart = [Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale)]
            (found,) = pair_reduce(first, second, apart, labels=labels, ref_labels=labels.clone(), normalize=True)
            rivals = found if rivals is None else log_add_exp(rivals, found)
        positive = scale * pair_similarity(first, second, index, index, normalize=True)
        losses = torch.where(rivals == -torch.inf, 0.0, rivals - positive)
        return poisoned(losses.mean(), first, second)


def named_clusterings(clusters: Tensor) -> dict[str, Tensor]:
    """The clusterings, one by one."""
    if not isinstance(clusters, Tensor) or clusters.dtype != torch.int64 or clusters.dim() != 2:
        got = f"{clusters.dtype} {tuple(clusters.shape)}" if isinstance(clusters, Tensor) else type(clusters).__name__
        raise TypeError(f"clusters must be int64 of shape (clusterings, rows); got {got}")
    if clusters.shape[0] == 0:
        raise ValueError(f"clusters must hold at least one clustering; got shape {tuple(clusters.shape)}")
    return numbered(clusters=clusters.unbind(0))
