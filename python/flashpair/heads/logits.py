"""What a streamed pass knows of the (B, C) logits of a head, and per-row losses as formulas over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..algebra import log_add_exp
from ..distributed.sharded import Sharded
from ..losses.arguments import constant
from ..panels import product
from ..request import statistics_dtype
from ..terms import Precision, Reduction, Score, Term
from .statistics import WeightUpdate, check_classes, class_statistics

REDUCTIONS = ("mean", "sum", "none")

#: What a formula may ask for beside the logsumexp, over the other classes j != y:
#:     sum     Σ_j z_j            squares  Σ_j z_j²           mean  Σ_j softmax_j z_j, softmax over the other classes
#:     weighted_sum  Σ_j v_j z_j with the weights of `class_weight`
#:     spread  Σ_j (z_j - μ)², μ the mean over all classes without its gradient
EXTRAS = ("sum", "squares", "mean", "weighted_sum", "spread")


@dataclass(frozen=True)
class ClassLogits:
    """Per row: the logit of the own class and what is known of the others, z = scale <x, w> + bias (soft-capped).

    `target` and `rivals` are counted from `shift` (a softmax does not depend on it, its rounding does).
    """

    target: Tensor  # (B,) logit of the own class, margin included, minus shift
    rivals: Tensor  # (B,) logsumexp over the other classes, minus shift
    shift: Tensor | float  # number, () or (B,), without gradient
    similarity: Tensor  # (B,) <x, w_y> before margin, scale and bias
    valid: Tensor  # (B,) bool; False: the row has no class and counts for nothing
    labels: Tensor  # (B,) -1 where not valid
    classes: int
    class_weight: Tensor | None = None  # (C,)
    extras: dict[str, Tensor] = field(default_factory=dict)  # see EXTRAS

    @property
    def cross_entropy(self) -> Tensor:
        """(B,) -log p_y = log(1 + exp(rivals - target)), which keeps the digits of a small loss."""
        return F.softplus(self.rivals - self.target, threshold=40)

    @property
    def log_other(self) -> Tensor:
        """(B,) log(1 - p_y)."""
        return -F.softplus(self.target - self.rivals, threshold=40)

    @property
    def lse(self) -> Tensor:
        """(B,) logsumexp over all classes."""
        return log_add_exp(self.rivals, self.target) + self.shift

    @property
    def logit(self) -> Tensor:
        """(B,) logit of the own class."""
        return self.target + self.shift

    @property
    def own_weight(self) -> Tensor | float:
        """(B,) weight of the row's class; 1 without weights."""
        return 1.0 if self.class_weight is None else self.class_weight[self.labels.clamp_min(0)]

    @property
    def total_weight(self) -> Tensor | float:
        """Weight of all classes."""
        return float(self.classes) if self.class_weight is None else self.class_weight.sum()

    @property
    def weighted_sum(self) -> Tensor:
        """(B,) Σ_j v_j z_j over all classes; needs the extra "weighted_sum"."""
        return self.extras["weighted_sum"] + self.own_weight * self.logit

    @property
    def sum(self) -> Tensor:
        """(B,) Σ_j z_j over all classes; needs the extra "sum"."""
        return self.extras["sum"] + self.logit

    @property
    def entropy(self) -> Tensor:
        """(B,) -Σ_j p_j log p_j over all classes; needs the extra "mean"."""
        own = torch.exp(-self.cross_entropy)
        expected = own * self.logit + torch.exp(self.log_other) * self.extras["mean"]
        return self.lse - expected

    def with_target(self, target: Tensor) -> ClassLogits:
        """The same with another logit of the own class."""
        return replace(self, target=target)


#: Per-row loss (B,) of a head's logits. A formula that needs extras lists them in an attribute `extras`.
Formula = Callable[[ClassLogits], Tensor]


def class_logits(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    class_scale: Tensor | None = None,
    normalize: bool = False,
    softcap: float | None = None,
    margin: Callable[[Tensor], Tensor] | None = None,
    own_offset: Tensor | None = None,
    rivals: Sequence[Term | tuple[Term, Tensor | float]] | None = None,
    extras: Sequence[str] = (),
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    gradient_filter: float = 0.0,
    update: WeightUpdate | None = None,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> ClassLogits:
    """The logits of a head, z_ij = scale_i <x_i, w_j> + bias_j, as far as losses need them; the engine of all heads.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        weight: (C, D) of the same dtype.
        labels: (B,) int64 in [0, C), or `ignore_index`.
        bias: (C,) or None. Also where log-probabilities of sampled classes are subtracted.
        scale: number, 0-d tensor or (B,) tensor, inverse of the temperature; differentiable.
        class_scale: (C,) factors of the classes' similarities, or None; differentiable. Copies the weights.
        normalize: cosines instead of dot products, gradient through the norms.
        softcap: c of c tanh(z / c), or None.
        margin: changes the similarities (B,) of the rows with their own classes.
        own_offset: (B,) added to the logit of the own class, before the soft cap.
        rivals: logsumexp terms whose union is the other classes, where these are not all alike, each alone or with what
            is added to its result; z minus `scale` with `normalize`. Excludes bias and softcap.
        extras: see `EXTRAS`. "mean" with a bias copies the weights, the bias as one more feature; not with a soft cap.
        class_weight: (C,) weights v of the classes, or None.
        ignore_index: label of rows that count for nothing.
        gradient_filter, update, precision, max_workspace_bytes: see `class_statistics`.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.
    """
    checks.embedding_pair(x, weight, ("x", "weight"))
    classes = weight.shape[0] if update is None or update.selected is None else update.selected.shape[0]
    check_classes(labels, x, classes, missing=ignore_index)
    if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != (classes,)):
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must have shape ({classes},), one per class; got {got}")
    check_per_class("class_weight", class_weight, classes)
    check_per_class("class_scale", class_scale, classes)
    if class_scale is not None and update is not None:
        raise ValueError("class_scale excludes a fused optimiser: its gradient is of the scaled weights")
    if softcap is not None:
        checks.number("softcap", softcap, low=0.0, open_low=True)
    if isinstance(weight, Sharded) and (class_scale is not None or {"spread", "mean"} & set(extras)):
        raise ValueError("class_scale and formulas that need 'mean' or 'spread' of the logits exclude group")
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    own = torch.where(valid, labels, -1)
    if class_scale is not None:
        units = [F.normalize(t, dim=1, eps=1e-12) if normalize else t for t in (x, weight)]
        x, weight, normalize = units[0], units[1] * class_scale[:, None].to(weight.dtype), False
    if "mean" in extras and bias is not None and softcap is None and update is None:
        # The softmax mean of <x, w> + b / scale: the bias as one more feature.
        units = [F.normalize(t, dim=1, eps=1e-12) if normalize else t for t in (x, weight)]
        x = torch.cat([units[0], torch.ones_like(x[:, :1])], dim=1)
        weight = torch.cat([units[1], (bias / scale)[:, None].to(weight.dtype)], dim=1)
        bias, normalize = None, False
    # Cosines count from 1 down: the logsumexp of a row that is learned is then near 0 and keeps its digits.
    shift = constant(scale) if normalize and softcap is None else 0.0
    z = {"scale": scale, "other_offset": bias}
    cap = {"score": Score.SOFTCAP, "constant": softcap} if softcap is not None else {}
    pieces = [Term(Reduction.LOGSUMEXP, offset=-shift, **z, **cap)] if rivals is None else rivals
    pieces = [piece if isinstance(piece, tuple) else (piece, 0.0) for piece in pieces]
    terms = [term for term, _ in pieces]
    for name in extras:
        if name == "spread":
            terms.append(_spread(x, weight, scale, normalize, bias, softcap, update))
        else:
            terms.append(_extra(name, z, cap, bias, softcap, class_weight))
    similarity, *found = class_statistics(
        x, weight, own, terms,
        normalize=normalize, gradient_filter=gradient_filter, update=update, precision=precision,
        max_workspace_bytes=max_workspace_bytes,
    )  # fmt: skip
    target = scale * (similarity if margin is None else margin(similarity))
    if bias is not None:
        target = target + bias.to(target.dtype)[own.clamp_min(0)]
    if own_offset is not None:
        if own_offset.shape != target.shape:
            raise ValueError(f"own_offset must have shape ({target.shape[0]},); got {tuple(own_offset.shape)}")
        target = target + own_offset
    if softcap is not None:
        target = softcap * torch.tanh(target / softcap)
    parts = [lse + added for lse, (_, added) in zip(found, pieces, strict=False)]
    named = dict(zip(extras, found[len(parts) :], strict=True))
    if "mean" in named:
        named["mean"] = scale * named["mean"]
    rest = functools.reduce(log_add_exp, parts)
    return ClassLogits(target - shift, rest, shift, similarity, valid, own, classes, class_weight, named)


@torch.no_grad()
def _spread(x, weight, scale, normalize, bias, softcap, update) -> Term:
    """Squares counted from the mean, which is linear in the embedding: O((B + C) D)."""
    if softcap is not None or update is not None:
        raise ValueError("'spread' of the logits is not available with softcap or a fused optimiser")
    dtype = statistics_dtype(x)
    scale = constant(scale)
    step = max((1 << 22) // max(weight.shape[1], 1), 1)
    rows = lambda v: F.normalize(v.to(dtype), dim=1, eps=1e-12) if normalize else v.to(dtype)  # noqa: E731
    centre = sum(rows(block).sum(0) for block in weight.split(step)) / weight.shape[0]
    mean = scale * product(rows(x), centre[:, None]).squeeze(1) + (0.0 if bias is None else bias.to(dtype).mean())
    return Term(Reduction.SUM, Score.SQUARE, scale=scale, offset=-mean, other_offset=bias)


def check_per_class(name: str, value: Tensor | None, classes: int) -> None:
    """(C,) floating point, or None.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if value is None:
        return
    checks.floating(name, value)
    if tuple(value.shape) != (classes,):
        raise ValueError(f"{name} must have shape ({classes},), one per class; got {tuple(value.shape)}")


def _extra(name: str, z: dict, cap: dict, bias: Tensor | None, softcap: float | None, class_weight) -> Term:
    if name == "sum":
        return Term(Reduction.SUM, **z, **cap)
    if name == "weighted_sum":
        return Term(Reduction.SUM, weight=class_weight, **z, **cap)
    if name == "squares" and softcap is None:
        return Term(Reduction.SUM, Score.SQUARE, **z)
    if name == "mean" and bias is None and softcap is None:
        return Term(Reduction.SOFTMAX_MEAN, scale=z["scale"])
    if name in EXTRAS:
        raise ValueError(f"{name!r} of the logits is not available with bias or softcap")
    raise ValueError(f"extras must be of {', '.join(EXTRAS)}; got {name!r}")


def reduce_rows(
    losses: Tensor, valid: Tensor, reduction: str = "mean", weight: Tensor | None = None, total=None
) -> Tensor:
    """Losses (B,) of the valid rows, times `weight` (B,), as `reduction` says.

    Args:
        losses: (B,)
        valid: (B,) bool; other rows count 0, also where their loss is NaN or infinite.
        reduction: "mean" (of the valid rows, 0 without any), "sum" or "none".
        weight: (B,) or None.
        total: what "mean" divides by instead of the number of valid rows.

    Raises:
        ValueError: on an unknown reduction.
    """
    check_reduction(reduction)
    losses = torch.where(valid, losses, 0.0)
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (valid.sum().clamp_min(1) if total is None else total)


def check_reduction(reduction: str) -> None:
    """One of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}")
