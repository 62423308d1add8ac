"""Contrastive loss with signal-to-noise ratios for distances."""

from __future__ import annotations

import math

from torch import Tensor

from ..reference import normalized
from ..request import statistics_dtype
from .contrastive import ContrastiveLoss, reduce_margins
from .peer import LpDistance, SNRDistance
from .problem import pair_problem


class SignalToNoiseRatioContrastiveLoss(ContrastiveLoss):
    """Contrastive loss whose distance is the variance of the difference over the variance of the anchor.

        d_ij = var(x_i - x_j) / var(x_i)        over features, of normalised embeddings by default
        loss = reduce_{(i,p)} [d_ip - pos_margin]_+  +  reduce_{(i,n)} [neg_margin - d_in]_+

    With centred embeddings that is a squared distance over a number of the row, so it runs as one pass; the peer stores
    (B, B, D). pytorch-metric-learning's class: same constructor, same call. An anchor whose features are all equal
    has no
    variance: NaN, as there.

    Args:
        **kwargs: see `ContrastiveLoss`. The distance is SNRDistance; default reducer: AvgNonZeroReducer, over pairs.

    Raises:
        ValueError, TypeError: on a bad margin, or an unsupported distance or reducer.

    Source: Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", CVPR 2019,
    equation 8.

    Example:
        >>> import torch
        >>> from flashpair.losses import SignalToNoiseRatioContrastiveLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(SignalToNoiseRatioContrastiveLoss()(embeddings, labels)), 4)  # (2/3) / (1/4)
        2.6667
    """

    def check_distance(self) -> None:
        if type(self.distance) is not SNRDistance:
            shown = type(self.distance).__name__
            raise ValueError(f"distance must be SNRDistance for SignalToNoiseRatioContrastiveLoss; got {shown}")

    def get_default_distance(self):
        return SNRDistance()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        if return_stats:
            raise ValueError("return_stats must be False for SignalToNoiseRatioContrastiveLoss; got True")
        x, y = (v if v is None else self._centred(v) for v in (embeddings, None if ref_emb is embeddings else ref_emb))
        plain = LpDistance(normalize_embeddings=False, power=2)
        problem = pair_problem(x, labels, indices_tuple, y, ref_labels, plain, collapse=False)
        inverse = 1 / x.square().sum(1)
        return problem.finish(reduce_margins(problem, self.reducer, self.pos_margin, self.neg_margin, inverse))

    def _centred(self, x: Tensor) -> Tensor:
        """x (B, D) less the mean of its features, scaled so that the squared length is the variance."""
        x = normalized(x) if self.distance.normalize_embeddings else x.to(statistics_dtype(x))
        return (x - x.mean(1, keepdim=True)) / math.sqrt(max(x.shape[1] - 1, 1))
