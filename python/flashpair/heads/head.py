"""A layer of class weights with its loss: the base of every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.ranks import Ranks
from ..distributed.sharded import Sharded, current, even_sizes, offsets, shared_by
from ..losses.group import InGroup
from ..primitives import mine
from ..random import draw_seed
from ..terms import Extreme, Precision
from .cross_entropy import CrossEntropy, logits_loss
from .formula import Formula
from .logits import ClassLogits, check_reduction, class_logits, reduce_rows
from .margins import Margin, check_margin, norms_of
from .optim import FusedOptimizer, HeadUpdate
from .statistics import check_classes


def class_range(num_classes: int, rank: int, world_size: int) -> range:
    """The classes that one of `world_size` ranks holds: contiguous, the first ranks one more where they do not divide.

    Raises:
        ValueError: on a rank outside the world.

    Example:
        >>> from flashpair.heads import class_range
        >>> [list(class_range(5, rank, 2)) for rank in range(2)]
        [[0, 1, 2], [3, 4]]
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size); got rank {rank} of {world_size}")
    starts = offsets(even_sizes(num_classes, world_size))
    return range(starts[rank], starts[rank + 1])


class ClassHead(InGroup, nn.Module):
    """Class weights and a loss over their logits, which are never stored; `nn.Linear` and its loss in one.

        z_ij = scale <x_i, w_j> + b_j        loss = reduce_i formula(z_i, y_i)

    Args:
        num_classes: C.
        embedding_size: D.
        formula: per-row loss. Default: `CrossEntropy()`.
        margin: a `Margin`; cosines times its scale then. Excludes bias, normalize, scale and softcap.
        bias: a learned bias per class. Default False.
        scale: inverse temperature, number or tensor; `nn.Parameter` to learn it. Default 1.
        normalize: cosines. Default False; always with a margin.
        softcap: c of c tanh(z / c). Default: none.
        class_weight: (C,) weights of the classes.
        ignore_index: label of rows that count for nothing. Default -100.
        reduction: "mean", "sum" or "none".
        gradient_filter: see `class_statistics`. Default 0, exact.
        init_std: standard deviation of the initial weights. Default 0.01.
        precision, max_workspace_bytes: see `pair_reduce`.
        device, dtype: of the weights.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group` over whose ranks the classes
            are spread: `weight` holds those of `classes`, about C / ranks of them, and the batch is that of all ranks.
            The loss is equal on all ranks. Gradients of the embeddings are for a backbone under DDP; those of `weight`
            are complete, so the head itself is not to be wrapped. A bias is held whole by every rank. Default: none.

    Raises:
        TypeError, ValueError: on a bad argument, naming it. RuntimeError: on a group before
            `torch.distributed.init_process_group`.

    Example:
        >>> import torch
        >>> from flashpair.heads import ClassHead
        >>> head = ClassHead(num_classes=1000, embedding_size=8)
        >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 999]))
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        formula: Formula | None = None,
        margin: Margin | None = None,
        bias: bool = False,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        softcap: float | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        gradient_filter: float = 0.0,
        init_std: float = 0.01,
        precision: Precision = Precision.IEEE,
        max_workspace_bytes: int | None = None,
        device=None,
        dtype=None,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.count("num_classes", num_classes)
        checks.count("embedding_size", embedding_size)
        check_reduction(reduction)
        checks.number("init_std", init_std, low=0.0)
        checks.number("gradient_filter", gradient_filter, low=0.0, high=1.0)
        if formula is not None and not isinstance(formula, Formula):
            raise TypeError(f"formula must be a flashpair.heads.Formula; got {type(formula).__name__}")
        if margin is not None:
            check_margin(margin, bias or None, scale, softcap)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.formula = CrossEntropy() if formula is None else formula
        self.margin = margin
        self.shares = self._shares()
        self.weight = nn.Parameter(torch.empty(len(self.classes), embedding_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype)) if bias else None
        self.scale, self.normalize, self.softcap = scale, normalize or margin is not None, softcap
        self.register_buffer("class_weight", class_weight)
        self.ignore_index, self.reduction, self.gradient_filter = ignore_index, reduction, gradient_filter
        self.fused: FusedOptimizer | None = None
        self.init_std, self.precision, self.max_workspace_bytes = init_std, precision, max_workspace_bytes
        self.reset_parameters()

    row_groups = (("embeddings", "labels", "sample_weight"),)

    def _shares(self) -> list[int]:
        """Numbers of classes of the ranks of the group."""
        if self.group is None:
            return [self.num_classes]
        if not self.spreads:
            raise ValueError(f"group must be None for {type(self).__name__}, whose classes cannot be spread over ranks")
        ranks = Ranks(self.group)
        if ranks.size > self.num_classes:
            raise ValueError(f"num_classes must be at least one for each of {ranks.size} ranks; got {self.num_classes}")
        self._rank = ranks.rank
        return even_sizes(self.num_classes, ranks.size)

    @property
    def classes(self) -> range:
        """The classes whose weights this process holds."""
        if self.group is None:
            return range(self.num_classes)
        return class_range(self.num_classes, self._rank, len(self.shares))

    def spread_weight(self, **how) -> Tensor:
        """The weights as a pass takes them: in a call of a group, as part of those of all ranks."""
        ranks = current()
        if self.group is None or ranks is None:
            return self.weight
        from ..distributed.classes import ShardedClasses

        return ShardedClasses.of(self.weight, self.shares, ranks, **how)

    def reset_parameters(self) -> None:
        """Weights from N(0, init_std²), other ones on each rank of a group; bias 0."""
        generator = None
        if self.group is not None:
            with shared_by(Ranks(self.group)):
                seed = draw_seed() & ((1 << 62) - 1)
            generator = torch.Generator(self.weight.device).manual_seed(seed + self._rank)
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    #: Whether the classes can be spread over the ranks of a group.
    spreads = True

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, reduction={self.reduction!r}"

    def options(self) -> dict:
        """What the logits are computed with, beside embeddings, weights and labels."""
        return {
            "extras": self.formula.extras,
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index,
            "gradient_filter": self.gradient_filter,
            "precision": self.precision,
            "max_workspace_bytes": self.max_workspace_bytes,
        }

    def fuse(self, optimizer: FusedOptimizer | None) -> None:
        """Let the backward pass update the weights, block by block: their gradient is never stored.

        Args:
            optimizer: `FusedSGD` or `FusedAdamW` that holds `self.weight`; None: back to a gradient.

        Raises:
            TypeError, ValueError: on another optimiser, or one that does not hold the weights.
        """
        if optimizer is not None:
            if not isinstance(optimizer, FusedOptimizer):
                raise TypeError(f"optimizer must be a flashpair.heads.FusedOptimizer; got {type(optimizer).__name__}")
            optimizer.group_of(self.weight)
        self.fused = optimizer

    def logits(self, embeddings: Tensor, labels: Tensor) -> ClassLogits:
        """What a streamed pass knows of the logits: own logit, logsumexp, and the extras of the formula.

        Embeddings of a narrower dtype than the weights are read in the weights' (autocast, for instance).
        """
        if self.group is not None and current() is None:
            return self.over_group(self.logits, {"embeddings": embeddings, "labels": labels})
        x, options = self.as_embeddings(embeddings), self.options()
        update = HeadUpdate(self.fused, self.weight) if self.updates else None
        weight = self.spread_weight(update=update)
        if weight is self.weight:
            options["update"] = update
        if self.margin is not None:
            return self.margin.logits(x, weight, labels, **options)
        return class_logits(
            x, weight, labels,
            bias=self.bias, scale=self.scale, normalize=self.normalize, softcap=self.softcap, **options,
        )  # fmt: skip

    @property
    def updates(self) -> bool:
        """Whether a backward pass of what is computed now updates the weights."""
        return self.fused is not None and torch.is_grad_enabled() and self.weight.requires_grad

    def check_labels(self, labels: Tensor, x: Tensor) -> None:
        """(B,) classes or `ignore_index`.

        Raises:
            TypeError, ValueError: naming the labels.
        """
        check_classes(labels, x, self.num_classes, missing=self.ignore_index)

    def as_embeddings(self, embeddings: Tensor) -> Tensor:
        """The embeddings in the dtype of the weights.

        Raises:
            TypeError, ValueError: also where that would lose digits.
        """
        checks.embeddings("embeddings", embeddings)
        if torch.promote_types(embeddings.dtype, self.weight.dtype) != self.weight.dtype:
            raise TypeError(
                f"embeddings must not be wider than the weights, {self.weight.dtype}; got {embeddings.dtype}"
            )
        if isinstance(embeddings, Sharded):
            return embeddings.cast(self.weight.dtype)
        return embeddings.to(self.weight.dtype)

    def forward(self, embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) of the weights' dtype or narrower.
            labels: (B,) int64 in [0, C), or `ignore_index`.
            sample_weight: (B,) factors of the rows' losses.

        Returns:
            0-d loss, or (B,) with reduction "none", in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument, before any work.
        """
        if self.group is not None and current() is None:
            tensors = {"embeddings": embeddings, "labels": labels, "sample_weight": sample_weight}
            return self.over_group(self.forward, tensors)
        return self.finish(self.logits(embeddings, labels), embeddings, sample_weight)

    def finish(self, logits: ClassLogits, embeddings: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss from the logits, the margin's regulariser included."""
        loss = logits_loss(logits, self.formula, self.reduction, sample_weight)
        if self.margin is None:
            return loss
        added = self.margin.regularizer(norms_of(embeddings))
        return loss if added is None else loss + reduce_rows(added, logits.valid, self.reduction)

    @torch.no_grad()
    def accuracy(self, embeddings: Tensor, labels: Tensor, k: int = 1) -> Tensor:
        """Share of the rows with a class for which it is among the k of highest logit; 0 without any row."""
        if self.group is not None and current() is None:
            return self.over_group(self.accuracy, {"embeddings": embeddings, "labels": labels}, k=k)
        self.check_labels(labels, embeddings)
        valid = torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index
        hit = (self.predict(embeddings, k)[1] == labels[:, None]).any(1) & valid
        return hit.sum() / valid.sum().clamp_min(1)

    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k classes of highest logit, margins left aside.

        Args:
            embeddings: (B, D).
            k: 1 to 64.

        Returns:
            logits (B, k) and classes (B, k), the highest first; ties go to the lowest class.
        """
        ranks = current()
        if self.group is not None and ranks is None:
            return self.over_group(self.predict, {"embeddings": embeddings}, k=k)
        x = self.as_embeddings(embeddings)
        scale = self.scale if self.margin is None else self.margin.scale
        weight = self.weight
        x = x.whole() if isinstance(x, Sharded) else x
        if self.bias is not None:
            # <x, w> + b / scale orders as the logits do.
            weight = nn.functional.normalize(weight, dim=1) if self.normalize else weight
            x = nn.functional.normalize(x, dim=1) if self.normalize else x
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
            own = self.bias[self.classes.start : self.classes.stop]
            weight = torch.cat([weight, (own / scale)[:, None].to(weight.dtype)], dim=1)
        how = {"normalize": self.normalize and self.bias is None, "precision": self.precision}
        if self.group is None:
            (found,) = mine(x, weight, [Extreme(k=k)], **how)
        else:
            from ..distributed.classes import highest

            found = highest(x, weight, k, self.classes.start, ranks, **how)
        z, classes = scale * found[0], found[1]
        return (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)), classes
