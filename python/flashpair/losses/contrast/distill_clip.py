"""CLIP's loss, and a teacher's softmax for the student to follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distributed.sharded import current
from ...primitives import pair_reduce
from ...terms import Axis, Guide, Mask, Reduction, Term
from ..arguments import as_guide, as_scalar, check_matched, check_rows, poisoned, without_gradient
from ..group import InGroup
from ..two_views import nothing


class DistillClipLoss(InGroup, nn.Module):
    """CLIP's loss beside the cross-entropy of the student's softmax under the teacher's, both directions.

        distill = 1/2B Σ_i [ LSE_j l_ij - Σ_j p_ij l_ij ]  +  1/2B Σ_j [ LSE_i l_ij - Σ_i p'_ij l_ij ]
        l = t <image_i, text_j>;   p, p' the teacher's softmax over rows' and columns' entries of its own logits

    open_clip's call. The teacher's logits are a second product in the tile; it takes no gradient.

    Args:
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: the global batch, as in
            `ClipLoss(group=...)`; open_clip's rank arguments are not taken. Default: none.

    Source: mlfoundations/open_clip, loss.py, DistillClipLoss.

    Example:
        >>> import torch
        >>> from flashpair.losses import DistillClipLoss
        >>> x = torch.eye(2)  # an indifferent teacher: the mean of both columns
        >>> clip, distill = DistillClipLoss()(x, x, 1.0, x, x, 0.0)
        >>> round(float(clip), 4), round(float(distill), 4)  # log(e + 1) - 1, log(e + 1) - 1/2
        (0.3133, 0.8133)
    """

    row_groups = (("image_features", "text_features", "dist_image_features", "dist_text_features"),)

    def __init__(self, group=None) -> None:
        super().__init__(group=group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ):
        """Both parts of the loss of a batch.

        Args:
            image_features, text_features: (B, D) of one dtype, row i of both belongs together.
            logit_scale: t, number or 0-d tensor.
            dist_image_features, dist_text_features: (B, E) of one dtype, the teacher's.
            dist_logit_scale: the teacher's factor, number or 0-d tensor.
            output_dict: return `{"contrastive_loss": clip, "distill_loss": distill}`.

        Returns:
            `(clip, distill)`, 0-d each in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            tensors = {
                "image_features": image_features, "text_features": text_features,
                "dist_image_features": without_gradient(dist_image_features),
                "dist_text_features": without_gradient(dist_text_features),
            }  # fmt: skip
            numbers = {"logit_scale": logit_scale, "dist_logit_scale": dist_logit_scale, "output_dict": output_dict}
            return self.over_group(self.forward, tensors, **numbers)
        check_matched(image_features, text_features)
        check_matched(dist_image_features, dist_text_features, ("dist_image_features", "dist_text_features"))
        rows = image_features.shape[0]
        check_rows("dist_image_features", dist_image_features, rows, image_features)
        scale, heat = as_scalar("logit_scale", logit_scale), as_scalar("dist_logit_scale", dist_logit_scale)
        if rows == 0:
            clip = distill = nothing(image_features, text_features)
        else:
            clip, distill = self._of(
                image_features, text_features, scale,
                dist_image_features, dist_text_features, heat,
            )  # fmt: skip
        return {"contrastive_loss": clip, "distill_loss": distill} if output_dict else (clip, distill)

    def _of(self, image, text, scale, teacher_image, teacher_text, heat) -> tuple[Tensor, Tensor]:
        index = torch.arange(image.shape[0], device=image.device)
        terms = [Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, axis=axis, scale=scale) for axis in Axis]
        terms.append(Term(Reduction.SUM, mask=Mask.SAME, scale=scale))
        *others, own = pair_reduce(image, text, terms, labels=index, ref_labels=index)
        gaps = [F.softplus(lse - own, threshold=40) for lse in others]
        heat = without_gradient(heat) if isinstance(heat, Tensor) else heat
        # A softmax mean of the student's similarities, with the teacher's softmax as its weights.
        taught = [
            Term(Reduction.SOFTMAX_MEAN, axis=axis, scale=heat, detach_weights=True, guide=Guide.LOGITS)
            for axis in Axis
        ]
        pull = pair_reduce(image, text, taught, guide=(as_guide(teacher_image, image), as_guide(teacher_text, image)))
        clip = sum(gap.mean() for gap in gaps) / 2
        # LSE over all = own + softplus(LSE over the others - own).
        distill = sum((gap + own - scale * p).mean() for gap, p in zip(gaps, pull, strict=True)) / 2
        poison = image, text, teacher_image, teacher_text
        return poisoned(clip, image, text), poisoned(distill, *poison)
