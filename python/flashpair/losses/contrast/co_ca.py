"""CoCa: CLIP's loss and that of the captions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ..clip import ClipLoss


class CoCaLoss(ClipLoss):
    """`clip_loss_weight · ClipLoss` and `caption_loss_weight · cross-entropy of the caption's tokens`.

    open_clip's class: same constructor, same call, the two parts returned one beside the other. The captions' mean is
    over this process's tokens, as there.

    Args:
        caption_loss_weight, clip_loss_weight: open_clip's own defaults for CoCa are 2 and 1.
        pad_id: token that does not count. Default 0.
        local_loss, gather_with_grad, cache_labels, rank, world_size, group: see `ClipLoss`.

    Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", TMLR 2022, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.losses import CoCaLoss
        >>> image, text, logits, tokens = torch.eye(2), torch.eye(2), torch.zeros(2, 3, 7), torch.ones(2, 3).long()
        >>> clip, caption = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.0)(image, text, logits, tokens, 1.0)
        >>> round(float(caption), 4)  # 2 log 7
        3.8918
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        group=None,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, group)
        checks.number("caption_loss_weight", caption_loss_weight)
        checks.number("clip_loss_weight", clip_loss_weight)
        self.caption_loss_weight, self.clip_loss_weight, self.pad_id = caption_loss_weight, clip_loss_weight, pad_id

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ):
        """Both parts of the loss of a batch.

        Args:
            image_features, text_features, logit_scale: as in `ClipLoss`.
            logits: (B, T, vocabulary) of the captions' tokens.
            labels: (B, T) int64, the tokens themselves; `pad_id` does not count.
            output_dict: return `{"contrastive_loss": clip, "caption_loss": caption}`.

        Returns:
            `(clip, caption)`, 0-d each. With a weight of 0 the contrastive part is not computed and is 0.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                "logits must have shape (rows, tokens, vocabulary) and labels (rows, tokens); "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        clip = image_features.new_zeros(())
        if self.clip_loss_weight:
            clip = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = F.cross_entropy(logits.permute(0, 2, 1), labels, ignore_index=self.pad_id)
        caption = self.caption_loss_weight * caption
        return {"contrastive_loss": clip, "caption_loss": caption} if output_dict else (clip, caption)
