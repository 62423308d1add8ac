"""Partial FC: a softmax head that in every step sees the classes of the batch and a random sample of the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..distributed.sharded import current
from .head import ClassHead
from .margins import Margin
from .optim import HeadUpdate


class PartialFC_V2(ClassHead):
    """A margin head over a random sample of the classes that holds the batch's own; insightface's class.

        S = {y_i} ∪ random others, |S| = max(int(rate C), |{y_i}|)
        loss = mean_i CE(margin(scale cos(x_i, w_j)), j in S)

    Cosines are not clamped to [-1, 1] (they are accurate to rounding), and the loss has no floor: insightface's ends at
    -log(1e-30) = 69.08 with zero gradient, also where a label is out of range, which is an error here.

    Args:
        margin_loss: a `Margin` of this library, `CombinedMargin(64, 1.0, 0.5, 0.0)` for instance; functions of dense
            logits cannot be streamed.
        embedding_size: D.
        num_classes: C.
        sample_rate: rate in (0, 1]. Default 1, all classes. In evaluation mode all classes count. In a group each rank
            samples among its own.
        fp16: read embeddings and weights in float16, as under insightface's flag; float32 accumulation. Default False.
        sparse_grad: the weights' gradient is a sparse tensor of the sampled rows, for optimisers that take these.
            Default False: a dense gradient. `fuse` avoids both.
        generator: of the samples; default torch's own.
        **kwargs: see `ClassHead`.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
    Partial FC", CVPR 2022; class of the same name in insightface's arcface_torch.

    Example:
        >>> import torch
        >>> from flashpair.heads import CosFace, FusedSGD, PartialFC_V2
        >>> head = PartialFC_V2(CosFace(1, 1).margin, embedding_size=8, num_classes=1000, sample_rate=0.1)
        >>> head.fuse(FusedSGD([head.weight], lr=0.1, momentum=0.9))  # optional: no gradient of the weights at all
        >>> embeddings = torch.randn(4, 8, requires_grad=True)
        >>> head(embeddings, torch.tensor([0, 1, 2, 999])).backward()
        >>> head.sampled.shape
        torch.Size([100])
    """

    def __init__(
        self,
        margin_loss: Margin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        sparse_grad: bool = False,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> None:
        if not isinstance(margin_loss, Margin):
            raise TypeError(
                "margin_loss must be a flashpair.heads.Margin, such as CombinedMargin; "
                f"got {type(margin_loss).__name__}"
            )
        checks.number("sample_rate", sample_rate, low=0.0, high=1.0, open_low=True)
        super().__init__(num_classes, embedding_size, margin=margin_loss, **kwargs)
        self.sample_rate, self.fp16 = sample_rate, fp16
        self.sparse_grad, self.generator = sparse_grad, generator
        self.sampled: Tensor | None = None  # (S,) classes of the last forward pass, ascending; None: all

    def sample(self, labels: Tensor) -> Tensor:
        """(S,) ascending classes of this process: those of `labels` (B,) and random others."""
        count = max(int(self.sample_rate * len(self.classes)), 1)
        if labels.shape[0] > count:
            present = labels[labels >= 0].unique()
            if present.shape[0] >= count:
                return present
        priority = torch.rand(len(self.classes), device=labels.device, generator=self.generator)
        # Rows without a class raise the priority of class 0 by nothing.
        priority.scatter_reduce_(0, labels.clamp_min(0), torch.where(labels >= 0, 2.0, 0.0), reduce="amax")
        return priority.topk(count, sorted=False).indices.sort().values

    def logits(self, embeddings: Tensor, labels: Tensor):
        """As in `ClassHead`, over the sampled classes; the labels of the result count among them."""
        if self.group is not None:
            return self._spread_logits(embeddings, labels)
        x = self.as_embeddings(embeddings)
        self.check_labels(labels, x)
        weight, options = self.weight, self.options()
        self.sampled = None
        if self.training and self.sample_rate < 1.0:
            own = labels if self.ignore_index is None else torch.where(labels == self.ignore_index, -1, labels)
            self.sampled = self.sample(own)
            labels = torch.where(own < 0, labels, torch.searchsorted(self.sampled, own.clamp_min(0)))
            if self.class_weight is not None:
                options["class_weight"] = self.class_weight[self.sampled]
            if self.fused is None:
                weight = F.embedding(self.sampled, weight, sparse=self.sparse_grad)
        if self.updates:
            options["update"] = HeadUpdate(self.fused, self.weight, self.sampled)
        elif self.fused is not None and self.sampled is not None:
            weight = weight[self.sampled]
        if self.fp16:
            if "update" in options:
                raise ValueError("fp16=True excludes a fused optimiser: its steps are in the weights' own dtype")
            x, weight = x.half(), weight.half()
        return self.margin.logits(x, weight, labels, **options)

    def _spread_logits(self, embeddings: Tensor, labels: Tensor):
        """Each rank samples among its own classes; labels count among all of them."""
        if current() is None:
            return self.over_group(self.logits, {"embeddings": embeddings, "labels": labels})
        x = self.as_embeddings(embeddings)
        self.check_labels(labels, x)
        self.sampled = rows = None
        if self.training and self.sample_rate < 1.0:
            first, end = self.classes.start, self.classes.stop
            self.sampled = self.sample(torch.where((labels >= first) & (labels < end), labels - first, -1))
            if self.fused is None:
                rows = F.embedding(self.sampled, self.weight, sparse=self.sparse_grad)
            elif not self.updates:
                rows = self.weight[self.sampled]
        update = HeadUpdate(self.fused, self.weight, self.sampled) if self.updates else None
        weight = self.spread_weight(selected=self.sampled, rows=rows, update=update)
        if self.fp16:
            if update is not None:
                raise ValueError("fp16=True excludes a fused optimiser: its steps are in the weights' own dtype")
            x, weight = x.cast(torch.float16), weight.cast(torch.float16)
        return self.margin.logits(x, weight, labels, **self.options())
