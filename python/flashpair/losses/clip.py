"""CLIP's symmetric cross-entropy between images and texts."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import current
from ..formulas import MEAN_GAP_OF_BOTH
from ..primitives import pair_loss, pair_reduce
from ..terms import Axis, Mask, Reduction, Term
from .arguments import as_scalar, check_matched, poisoned, without_gradient
from .group import OpenClipRanks, own_rows, with_value_of
from .statistics import PairStatistics, moments


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    return_stats: bool = False,
    local_value: bool = False,
):
    """Function behind `ClipLoss`; `labels` is `arange(B)` if somebody has it already.

    `local_value`: in a group, the value is the mean over this rank's rows, the gradient that of the global loss.
    """
    check_matched(image_features, text_features)
    scale = as_scalar("logit_scale", logit_scale)
    if labels is None:
        labels = torch.arange(image_features.shape[0], device=image_features.device)
    # One pass. LSE_j l_ij - l_ii is softplus(LSE_{j != i} l_ij - l_ii).
    terms = [
        Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale),
        Term(Reduction.SUM, mask=Mask.SAME, scale=scale),
        Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, axis=Axis.COLUMNS, scale=scale),
    ]
    extra = [Term(Reduction.MOMENTS, mask=mask) for mask in (Mask.SAME, Mask.DIFFERENT)] if return_stats else []
    features, own = (image_features, text_features), own_rows(image_features) if local_value else None
    loss, of_own, found = pair_loss(*features, terms, MEAN_GAP_OF_BOTH, extra, own, labels=labels, ref_labels=labels)
    loss = poisoned(loss, *features)
    if isinstance(logit_bias, Tensor):
        loss = loss + 0.0 * as_scalar("logit_bias", logit_bias)  # a softmax does not see a shift
    if local_value:
        loss = with_value_of(loss, of_own)
    return (loss, PairStatistics(*map(moments, found))) if return_stats else loss


def _one_sided(queries: Tensor, keys: Tensor, scale: float | Tensor, labels: Tensor) -> Tensor:
    """(B,) cross-entropies of queries among keys, which take no gradient."""
    keys = without_gradient(keys)
    terms = [
        Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale),
        Term(Reduction.SUM, mask=Mask.SAME, scale=scale),
    ]
    others, own = pair_reduce(queries, keys, terms, labels=labels, ref_labels=labels)
    return F.softplus(others - own, threshold=40)


class _Scaled(torch.autograd.Function):
    """A tensor whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class ClipLoss(OpenClipRanks, nn.Module):
    """Symmetric cross-entropy of image-text similarities, without the B×B logits.

        l_ij = t <image_i, text_j>
        loss = 1/2B  Σ_i [ LSE_j l_ij - l_ii ]  +  1/2B  Σ_j [ LSE_i l_ij - l_jj ]

    open_clip's class: same constructor, same call; features are used as they come (normalise them first).

    With `group=` the loss is that of the batches of all ranks, equal on all of them, with the gradients of one process
    that has the whole batch (after DDP's averaging). `rank=` and `world_size=` do what open_clip's do on all processes:

        local_loss  gather_with_grad   value                  gradient of the features, after averaging
        False       True               of the global batch    of the global batch
        True        True               mean of the own rows   of the global batch
        False       False              of the global batch    1 / world_size of that
        True        False              mean of the own rows   as queries only, none as keys

    Each rank computes its rows of S only, for both directions at once (in two passes in the last case).

    Args:
        local_loss, gather_with_grad: see above; without effect on a single process.
        cache_labels: keep the labels between calls of one batch size.
        rank: of this process.
        world_size: number of processes. Default 1: the batch of this process.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        ValueError: on ranks that are not those of the process group, or where `group` comes with `world_size`,
            `local_loss` or `gather_with_grad`.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

    Example:
        >>> import torch
        >>> from flashpair.losses import ClipLoss
        >>> image = text = torch.eye(4)
        >>> round(float(ClipLoss()(image, text, logit_scale=100.0)), 4)
        0.0
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        group=None,
    ) -> None:
        super().__init__(rank, world_size, group)
        if group is not None and (local_loss or gather_with_grad):
            raise ValueError("local_loss and gather_with_grad must be False with group, whose gradients are complete")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(B,) int64: the column that belongs to each row."""
        if torch.compiler.is_compiling():  # a cache would mean a recompilation whenever it changes
            return torch.arange(num_logits, device=device)
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None) -> tuple[Tensor, Tensor]:
        """Both (B, B) logits, stored, for subclasses that want them; `forward` does not call this."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits = logits + logit_bias
        return logits, logits.T

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
            logit_bias: number or 0-d tensor; has no influence, receives a zero gradient.
            output_dict: return `{"contrastive_loss": loss}`.
            return_stats: also return `PairStatistics` of each image's similarities.

        Returns:
            0-d loss in float32 (float64 for float64), as a dict with `output_dict`; `(that, PairStatistics)` with
            `return_stats`.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            features = image_features, text_features
            if self.world_size > 1 and not self.local_loss and not self.gather_with_grad:
                features = [_Scaled.apply(v, 1 / self.world_size) for v in features]
            return self.over_features(
                functools.partial(ClipLoss.forward, self), *features,
                logit_scale=logit_scale, logit_bias=logit_bias, output_dict=output_dict, return_stats=return_stats,
            )  # fmt: skip
        checks.embeddings("image_features", image_features)
        labels = self.get_ground_truth(image_features.device, image_features.shape[0])
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            result = self._loss_of_queries(image_features, text_features, logit_scale, labels, return_stats)
        else:
            result = clip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                labels=labels,
                return_stats=return_stats,
                local_value=self.world_size > 1 and self.local_loss,
            )
        return self.answer(result, output_dict, return_stats)

    def _loss_of_queries(self, image_features, text_features, logit_scale, labels, return_stats):
        if return_stats:
            raise ValueError("return_stats must be False with local_loss and without gather_with_grad; got True")
        check_matched(image_features, text_features)
        scale = as_scalar("logit_scale", logit_scale)
        rows = _one_sided(image_features, text_features, scale, labels)
        rows = rows + _one_sided(text_features, image_features, scale, labels)
        loss = poisoned(0.5 * rows.sum() / max(rows.shape[0], 1), image_features, text_features)
        shown = rows[own_rows(image_features)]
        return with_value_of(loss, 0.5 * shown.sum() / max(shown.shape[0], 1))
