"""SigLIP's sigmoid loss between images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.ranks import Exchange
from ..distributed.sharded import current
from ..primitives import pair_reduce, sum_and_own
from ..terms import Mask, Reduction, Score, Term
from .arguments import as_scalar, check_matched, poisoned
from .group import OpenClipRanks, own_rows, with_value_of
from .statistics import PairStatistics, moments

#: open_clip's exchanges: all but one hold one other rank's texts at a time.
_DIST_IMPLS = {
    "bidir": Exchange.RING, "shift": Exchange.RING, "reduce": Exchange.RING, "gather": Exchange.GATHER
}  # fmt: skip


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool = False,
    local_value: bool = False,
):
    """Function behind `SigLipLoss`; `local_value` as in `clip_loss`."""
    check_matched(image_features, text_features)
    scale = as_scalar("logit_scale", logit_scale)
    bias = 0.0 if logit_bias is None else as_scalar("logit_bias", logit_bias)
    batch = image_features.shape[0]
    labels = torch.arange(batch, device=image_features.device)
    terms = [
        Term(Reduction.SUM, Score.SOFTPLUS, Mask.DIFFERENT, scale=scale, offset=bias),
        Term(Reduction.SUM, Score.SOFTPLUS, Mask.SAME, scale=-scale, offset=-bias),
    ]
    features = image_features, text_features
    pairs = {"labels": labels, "ref_labels": labels}
    own = own_rows(image_features)
    if return_stats:
        terms += [Term(Reduction.MOMENTS, mask=mask) for mask in (Mask.SAME, Mask.DIFFERENT)]
        negative, positive, *extra = pair_reduce(*features, terms, **pairs)
        rows = positive + negative
        total, of_own = rows.sum(), rows[own].sum()
    else:
        total, of_own = sum_and_own(*features, terms, **pairs)
    loss = poisoned(total / max(batch, 1), *features)
    if local_value:
        loss = with_value_of(loss, of_own / max(len(range(batch)[own]), 1))
    return (loss, PairStatistics(*map(moments, extra))) if return_stats else loss


class SigLipLoss(OpenClipRanks, nn.Module):
    """A logistic loss on every image-text pair, without the B×B logits; value and gradients in one pass.

        l_ij = t <image_i, text_j> + b
        loss = 1/B  Σ_ij  softplus(-l_ij if i = j else l_ij)

    open_clip's class: same constructor, same call; features are used as they come (normalise them first).

    With `group=` the loss is that of the batches of all ranks, equal on all of them. With `rank=` and `world_size=` the
    value is open_clip's, the mean over the rank's own images; the gradients are those of the global batch, after
    averaging, in both cases.

    Args:
        cache_labels: accepted for compatibility; there is nothing to cache.
        rank: of this process.
        world_size: number of processes. Default 1: the batch of this process.
        dist_impl: None or one of "bidir", "shift", "reduce" (texts go round the ring) and "gather". Default: "bidir".
        chunk_size: accepted for compatibility; memory is bounded in any case.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        ValueError: on ranks that are not those of the process group, on an unknown `dist_impl`, or where `group` comes
            with `world_size` or `dist_impl`.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, equation 1 and algorithm 1.

    Example:
        >>> import torch
        >>> from flashpair.losses import SigLipLoss
        >>> image = text = torch.eye(4)
        >>> round(float(SigLipLoss()(image, text, logit_scale=10.0, logit_bias=-5.0)), 4)
        0.0269
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        group=None,
    ) -> None:
        if dist_impl is not None and dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl must be None or one of {', '.join(_DIST_IMPLS)}; got {dist_impl!r}")
        if group is not None and dist_impl is not None:
            raise ValueError(f"dist_impl must be None with group, whose Group says the exchange; got {dist_impl!r}")
        super().__init__(rank, world_size, group, exchange=_DIST_IMPLS[dist_impl or "bidir"])
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(B, B) of +1 on the diagonal and -1 elsewhere, stored, for subclasses; `forward` does not call this."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None) -> Tensor:
        """(B, B) logits, stored, for subclasses; `forward` does not call this."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(self, image_features, text_features, logit_scale, logit_bias=None, negative_only=False) -> Tensor:
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        signs = self.get_ground_truth(logits.device, logits.dtype, logits.shape[0], negative_only)
        return -F.logsigmoid(signs * logits).sum() / image_features.shape[0]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        return_stats: bool = False,
    ):
        """The loss of a batch of matched images and texts.

        Args:
            image_features: (B, D) float32, float64, bfloat16 or float16.
            text_features: (B, D) of the same dtype; row i belongs to image i.
            logit_scale: the factor t itself (already exponentiated), number or 0-d tensor.
            logit_bias: the offset b, number or 0-d tensor. Default: none.
            output_dict: return `{"contrastive_loss": loss}`.
            return_stats: also return `PairStatistics` of each image's similarities; costs a second pass backward.

        Returns:
            0-d loss in float32 (float64 for float64), as a dict with `output_dict`; `(that, PairStatistics)` with
            `return_stats`.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_features(
                self.forward, image_features, text_features,
                logit_scale=logit_scale, logit_bias=logit_bias, output_dict=output_dict, return_stats=return_stats,
            )  # fmt: skip
        result = siglip_loss(
            image_features, text_features, logit_scale, logit_bias,
            return_stats=return_stats, local_value=self.world_size > 1,
        )  # fmt: skip
        return self.answer(result, output_dict, return_stats)
