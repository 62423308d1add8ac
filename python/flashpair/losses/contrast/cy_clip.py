"""CyCLIP: similarities that do not depend on which tower an embedding comes from."""

from __future__ import annotations

from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...panels import product
from ...request import statistics_dtype
from ..arguments import check_matched, poisoned
from ..clip import clip_loss
from ..group import InGroup
from ..two_views import nothing


def cyclic_consistency(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_ij (<x_i, y_j> - <x_j, y_i>)², Σ_ij (<x_i, x_j> - <y_i, y_j>)²) of (B, D) embeddings, without B×B matrices.

    With u = x + y, v = x - y both differences are halves of <u_i, v_j> ∓ <v_i, u_j>: three D×D products, which lose no
    digits where the towers agree.
    """
    u, v = first + second, first - second
    squares, crossed = (product(u.T, u) * product(v.T, v)).sum(), product(u.T, v)
    mixed = (crossed * crossed.T).sum()
    return (squares - mixed) / 2, (squares + mixed) / 2


class CyCLIPLoss(InGroup, nn.Module):
    """CLIP's loss, and penalties on similarities that change with the tower.

        loss = ClipLoss + cross · 1/B Σ_ij (<x_i, y_j> - <x_j, y_i>)²  +  within · 1/B Σ_ij (<x_i, x_j> - <y_i, y_j>)²

    The penalties are sums of squares of B×B matrices, computed from D×D ones.

    Args:
        cross, within: weights of the penalties. Default 0.25 and 0.25.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a weight that is no number.

    Source: Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", NeurIPS 2022, equations 3-5; the
    scaling by 1/B is that of the authors' code.

    Example:
        >>> import torch
        >>> from flashpair.losses import ClipLoss, CyCLIPLoss
        >>> x = torch.eye(3)
        >>> torch.equal(CyCLIPLoss()(x, x, 10.0), ClipLoss()(x, x, 10.0))  # equal towers: no penalty
        True
    """

    row_groups = (("image_features", "text_features"),)

    def __init__(self, cross: float = 0.25, within: float = 0.25, group=None) -> None:
        super().__init__(group=group)
        checks.number("cross", cross)
        checks.number("within", within)
        self.cross, self.within = cross, within

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
        """The loss of matched features (B, D), used as they come (normalise them first), and CLIP's scale."""
        if self.group is not None and current() is None:
            tensors = {"image_features": image_features, "text_features": text_features}
            return self.over_group(self.forward, tensors, logit_scale=logit_scale)
        check_matched(image_features, text_features)
        if image_features.shape[0] == 0:
            return nothing(image_features, text_features)
        loss = clip_loss(image_features, text_features, logit_scale)
        dtype = statistics_dtype(image_features)
        cross, within = cyclic_consistency(image_features.to(dtype), text_features.to(dtype))
        penalty = (self.cross * cross + self.within * within) / image_features.shape[0]
        return poisoned(loss + penalty, image_features, text_features)
