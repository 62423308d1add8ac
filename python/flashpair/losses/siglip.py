"""SigLIP's sigmoid loss between images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..primitives import pair_reduce, pair_sum
from ..terms import Mask, Reduction, Score, Term
from .arguments import as_scalar, check_matched, poisoned, require_one_process
from .statistics import PairStatistics, moments

_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool = False,
):
    """Function behind `SigLipLoss`."""
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
    if not return_stats:
        return poisoned(pair_sum(*features, terms, **pairs) / max(batch, 1), *features)
    terms += [Term(Reduction.MOMENTS, mask=mask) for mask in (Mask.SAME, Mask.DIFFERENT)]
    negative, positive, *extra = pair_reduce(*features, terms, **pairs)
    loss = poisoned((positive + negative).sum() / max(batch, 1), *features)
    return loss, PairStatistics(*map(moments, extra))


class SigLipLoss(nn.Module):
    """A logistic loss on every image-text pair, without the B×B logits; value and gradients in one pass.

        l_ij = t <image_i, text_j> + b
        loss = 1/B  Σ_ij  softplus(-l_ij if i = j else l_ij)

    open_clip's class: same constructor, same call; features are used as they come (normalise them first).

    Args:
        cache_labels: accepted for compatibility; there is nothing to cache.
        rank: of this process.
        world_size: number of processes; only 1 is supported.
        dist_impl: None or one of "bidir", "shift", "reduce", "gather"; meaningful with several processes only.
        chunk_size: accepted for compatibility; memory is bounded in any case.

    Raises:
        ValueError: if `world_size` is not 1, or on an unknown `dist_impl`.

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
    ) -> None:
        super().__init__()
        require_one_process(world_size)
        if dist_impl is not None and dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl must be None or one of {', '.join(_DIST_IMPLS)}; got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
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
        result = siglip_loss(image_features, text_features, logit_scale, logit_bias, return_stats=return_stats)
        loss, *extra = result if return_stats else (result,)
        named = {"contrastive_loss": loss} if output_dict else loss
        return (named, *extra) if return_stats else named
