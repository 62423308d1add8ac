"""The specification: every primitive in dense, plain PyTorch with nothing but autograd. Every test's oracle.

    s_ij = <x_i, y_j> | ||x_i - y_j||^2 | ||x_i - y_j||          (x, y normalised first when `normalize`)
    z_ij = a_i s_ij + combine(p_i, q_j)
    out_i = reduce_j w_j phi(z_ij)                               t_ij = <u_i, v_j>: see `flashpair.Guide`

Pair weight of a term with cotangent g_i, i.e. its part of dL/ds_ij (what the fused backends compute; autograd gets
it here by itself):

    SUM           g_i w_j phi'(z_ij) a_i
    LOGSUMEXP     g_i w_j exp(phi(z_ij) - out_i) phi'(z_ij) a_i
    SOFTMAX_MEAN  g_i p_ij (1 + phi'(z_ij) a_i (s_ij - out_i)),   p_ij = w_j exp(phi(z_ij) - lse_i)
                  (only g_i p_ij when the weights are detached)

and with G = dL/ds, for the dot product dX = G Y, dY = G^T X; for squared distances dX_i = 2 sum_j G_ij (x_i - y_j),
dY_j = 2 sum_i G_ij (y_j - x_i); for plain distances the same with G_ij / (2 d_ij), and 0 where d_ij = 0.

Everything here costs O(B N) memory. It is never chosen silently for a large input.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .panels import product
from .request import FlatTerm, Request, statistics_dtype
from .terms import Axis, Combine, Extreme, Guide, Mask, Reduction, Score, Similarity


def normalized(x: Tensor) -> Tensor:
    """Rows of x (B, D) divided by max(||x_i||, 1e-12), in at least float32."""
    return F.normalize(x.to(statistics_dtype(x)), dim=-1, eps=1e-12)


_recorder: ContextVar[list[Tensor] | None] = ContextVar("flashpair_recorder", default=None)


@contextlib.contextmanager
def recorded_similarities() -> Iterator[list[Tensor]]:
    """The similarity matrices (B, N) that dense code makes inside the block and that have a gradient, which is kept.

    Example:
        >>> import torch
        >>> from flashpair import losses, reference
        >>> x, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 2
        >>> with reference.recorded_similarities() as found:
        ...     reference.SupConLoss()(x, labels).backward()
        >>> found[0].grad.shape  # the signed weight of each pair
        torch.Size([6, 6])
    """
    found: list[Tensor] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def similarity_matrix(x: Tensor, y: Tensor | None, similarity: Similarity, normalize: bool) -> Tensor:
    """s (B, N) of x (B, D) and y (N, D), accumulated in at least float32; y None: of x with itself."""
    s = _similarity_matrix(x, y, similarity, normalize)
    recorder = None if torch.compiler.is_compiling() else _recorder.get()
    if recorder is not None and s.requires_grad:
        s.retain_grad()
        recorder.append(s)
    return s


def _similarity_matrix(x: Tensor, y: Tensor | None, similarity: Similarity, normalize: bool) -> Tensor:
    own = y is None
    x, y = (normalized(v) if normalize else v.to(statistics_dtype(v)) for v in (x, x if own else y))
    dot = product(x, y.T)
    if similarity == Similarity.DOT:
        return dot
    squared = ((x * x).sum(-1)[:, None] + (y * y).sum(-1)[None, :] - 2.0 * dot).clamp_min(0.0)
    if own:
        squared = squared - torch.diag(squared.diagonal())  # a row is at distance 0 of itself, also after rounding
    if similarity == Similarity.SQUARED_EUCLIDEAN:
        return squared
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def score(kind: Score, z: Tensor, constant: float) -> Tensor:
    """phi(z); autograd of this expression is the slope that every backend uses."""
    if kind == Score.IDENTITY:
        return z
    if kind == Score.HINGE:
        return torch.relu(z)
    if kind == Score.SOFTPLUS:
        return F.softplus(z, threshold=40.0)  # torch's 20 is off by 2e-9 in float64
    if kind == Score.SQUARE:
        return z * z
    if kind == Score.SQUARED_HINGE:
        return torch.relu(z) ** 2
    if kind == Score.CIRCLE:
        return torch.relu(z.detach() + constant) * (z - constant)
    if kind == Score.SOFTCAP:
        return constant * torch.tanh(z / constant)
    if kind == Score.LOG_COSH:
        return _log_cosh(z)
    raise ValueError(f"unknown score {kind!r}")


def _log_cosh(z: Tensor) -> Tensor:
    """log cosh z with full relative accuracy and no overflow."""
    size = z.abs()
    small = size < 1
    near = 0.5 * torch.log1p(torch.where(small, z, 0.0).sinh() ** 2)
    size = torch.where(small, 1.0, size)
    far = (size - math.log(2)) + torch.log1p(torch.exp(-2 * size))
    return torch.where(small, near, far)


def pair_keep(request: Request, mask: Mask) -> Tensor:
    """(B, N) bool: the pairs a mask keeps, self pairs and excluded columns removed."""
    b, n = request.shape
    if mask in (Mask.SAME, Mask.DIFFERENT):
        keep = request.labels[:, None] == request.column_labels[None, :]
        keep = keep if mask == Mask.SAME else ~keep
    elif mask in (Mask.GIVEN, Mask.NOT_GIVEN):
        keep = request.pair_mask if mask == Mask.GIVEN else ~request.pair_mask
    else:
        keep = torch.ones(b, n, dtype=torch.bool, device=request.x.device)
    columns = torch.arange(n, device=request.x.device)
    if request.exclude_self:
        keep = keep & (columns[None, :] != torch.arange(b, device=request.x.device)[:, None])
    if request.exclude is not None:
        keep = keep & (columns[None, :] != request.exclude[:, None])
    return keep


def guide_matrix(request: Request) -> Tensor | None:
    """t (B, N), the second product of a pass, if there is one."""
    if request.guide is None:
        return None
    u, v = (None if side is None else side.detach().to(statistics_dtype(request.x)) for side in request.guide)
    return product(u, (u if v is None else v).T)


def _within(s: Tensor, above: float | Tensor | None, below: float | Tensor | None) -> Tensor | bool:
    """(owners, others) bool from thresholds; NaN keeps the pair."""
    keep = torch.ones_like(s, dtype=torch.bool)
    for bound, drops in ((above, torch.le), (below, torch.ge)):
        if bound is not None:
            bound = bound.to(s.dtype).reshape(-1, 1) if isinstance(bound, Tensor) else bound
            keep = keep & ~drops(s.detach(), bound)
    return keep


def _reduce(term: FlatTerm, s: Tensor, t: Tensor | None, keep: Tensor) -> Tensor:
    """(slots, owners) statistics of one term; s, t and keep are (owners, others)."""
    keep = keep & _within(t if term.guide == Guide.THRESHOLD else s, term.above, term.below)
    if term.reduction == Reduction.MOMENTS:
        return _moments(s.detach(), keep)
    column = lambda v: v.to(s.dtype).reshape(-1, 1) if isinstance(v, Tensor) else v  # noqa: E731
    offset = column(term.offset)
    if term.other_offset is not None:
        other = term.other_offset.to(s.dtype)[None, :]
        if term.combine == Combine.LOGADDEXP:
            offset = torch.logaddexp(torch.as_tensor(offset, dtype=s.dtype, device=s.device), other)
        else:
            offset = offset + other
    z = column(term.scale) * (t if term.guide == Guide.LOGITS else s) + offset
    f = score(term.score, z, term.constant)
    if term.reduction == Reduction.COUNT:
        return (keep & ~(f.detach() <= 0)).sum(-1, dtype=s.dtype)[None]
    if term.reduction == Reduction.MAX:
        f = torch.where(keep, f.detach(), -torch.inf)
        return (f.amax(-1) if f.shape[1] else f.new_full(f.shape[:1], -torch.inf))[None]
    w = None if term.weight is None else term.weight.to(s.dtype)[None, :]
    if term.guide == Guide.WEIGHT:
        w = t if w is None else w * t
        keep = keep if term.reduction == Reduction.SUM else keep & ~(t <= 0)
    if term.reduction == Reduction.SUM:
        return torch.where(keep, f if w is None else w * f, 0.0).sum(-1)[None]
    keep = keep if w is None else keep & (w != 0)
    exponent = torch.where(keep, f if w is None else f + torch.where(keep, w, 1.0).log(), -torch.inf)
    empty = ~keep.any(-1)
    lse = torch.where(empty[:, None], 0.0, exponent).logsumexp(-1)
    lse = torch.where(empty, -torch.inf, lse)
    if term.reduction == Reduction.LOGSUMEXP:
        return lse[None]
    p = torch.where(keep, torch.exp(exponent - torch.where(empty, 0.0, lse)[:, None]), 0.0)
    p = p.detach() if term.detach_weights else p
    return torch.stack([torch.where(keep, p * s, 0.0).sum(-1), lse])


def _moments(s: Tensor, keep: Tensor) -> Tensor:
    """(5, owners): count, mean, population variance, min, max of the kept entries of s (owners, others)."""
    count = keep.sum(-1, dtype=s.dtype)
    mean = torch.where(keep, s, 0.0).sum(-1) / count.clamp_min(1)
    variance = torch.where(keep, (s - mean[:, None]) ** 2, 0.0).sum(-1) / count.clamp_min(1)
    if s.shape[1] == 0:
        return torch.stack([count, mean, variance, count + torch.inf, count - torch.inf])
    low = torch.where(keep, s, torch.inf).amin(-1)
    high = torch.where(keep, s, -torch.inf).amax(-1)
    return torch.stack([count, mean, variance, low, high])


def pair_reduce(request: Request) -> list[Tensor]:
    """The statistics of each term: (slots, owners), differentiable by autograd."""
    s = similarity_matrix(request.x, request.y, request.similarity, request.normalize)
    t = guide_matrix(request)
    results = []
    for term in request.terms:
        keep = pair_keep(request, term.mask)
        turned = (lambda m: m) if term.axis == Axis.ROWS else (lambda m: None if m is None else m.T)
        results.append(_reduce(term, turned(s), turned(t), turned(keep)))
    return results


@torch.no_grad()
def mine(request: Request) -> list[tuple[Tensor, Tensor]]:
    """(values (B, k), indices (B, k)) of each extreme; ties go to the lowest column, missing: index -1."""
    s = similarity_matrix(request.x, request.y, request.similarity, request.normalize)
    return [_extreme(extreme, s, pair_keep(request, extreme.mask)) for extreme in request.extremes]


def _extreme(extreme: Extreme, s: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    keep = keep & _within(s, extreme.above, extreme.below)
    missing = -torch.inf if extreme.largest else torch.inf
    padding = max(extreme.k - s.shape[1], 0)  # rows shorter than k
    keep = F.pad(keep, (0, padding), value=False)
    s = torch.where(keep, F.pad(s, (0, padding)), missing)
    # Stable, so equal values keep the order of their columns; NaN counts as most extreme. A kept infinity and a
    # missing entry compare equal, so kept entries are put in front by a second stable sort.
    key = torch.where(s.isnan(), torch.inf, s if extreme.largest else -s)
    order = key.argsort(dim=1, descending=True, stable=True)
    front = keep.gather(1, order).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, front)[:, : extreme.k]
    kept = keep.gather(1, order)
    return s.gather(1, order), torch.where(kept, order, -1)


@functools.cache
def __getattr__(name: str) -> type:
    """`reference.<Name>`: the loss, miner or head of that name with every pass on this backend, whatever is usable."""
    from . import heads, losses, miners
    from .dispatch import use_backend

    homes = (losses, miners, heads)
    fused = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if not (isinstance(fused, type) and issubclass(fused, torch.nn.Module)):
        raise AttributeError(
            f"flashpair.reference has no {name!r}; it holds the twins of flashpair.losses, miners and heads"
        )

    def forward(self, *args, **kwargs):
        with use_backend("reference"):
            return fused.forward(self, *args, **kwargs)

    return type(name, (fused,), {"forward": forward, "__doc__": fused.__doc__, "__module__": __name__})
