"""A backend of the operators' contract in dense PyTorch without autograd, written from the pair-weight formulas.

It stands where a fused backend would (`stats`, `weights`, `sums`, `mine`), so the operators are tested even where no
fused backend is built, and the formulas that fused backends implement are tested against autograd of the reference.
"""

from __future__ import annotations

import torch

from flashpair import Axis, Combine, Guide, Reduction, Score, Similarity, reference
from flashpair.ops import Needs

calls: list[str] = []  # what ran, in order; tests clear and read it


def unavailable() -> list[str]:
    return []


def why_not(x) -> list[str]:
    return [] if x.dtype != torch.float16 else ["the dense backend of the tests does not serve torch.float16"]


def stats(request):
    calls.append("stats")
    b, n = request.shape
    found = {Axis.ROWS: [request.x.new_empty(0, b)], Axis.COLUMNS: [request.x.new_empty(0, n)]}
    with torch.no_grad():
        for term, slots in zip(request.terms, reference.pair_reduce(request), strict=True):
            found[term.axis].append(slots)
    return torch.cat(found[Axis.ROWS]), torch.cat(found[Axis.COLUMNS])


def mine(request):
    calls.append("mine")
    return reference.mine(request)


def sums(request, needs: Needs):
    calls.append("sums")
    rows, columns = stats(request)
    dx, dy, dparams = weights(request, rows, columns, torch.ones_like(rows), torch.ones_like(columns), needs)
    return rows.sum() + columns.sum(), dx, dy, dparams


def slope(kind: Score, z, constant: float):
    """phi'(z)."""
    if kind == Score.IDENTITY:
        return torch.ones_like(z)
    if kind == Score.HINGE:
        return (z > 0).to(z.dtype)
    if kind == Score.SOFTPLUS:
        return torch.sigmoid(z)
    if kind == Score.SQUARE:
        return 2 * z
    if kind == Score.SQUARED_HINGE:
        return 2 * z.clamp_min(0)
    if kind == Score.CIRCLE:
        return (z + constant).clamp_min(0)
    if kind == Score.SOFTCAP:
        return 1 - torch.tanh(z / constant) ** 2
    if kind == Score.LOG_COSH:
        return torch.tanh(z)
    raise ValueError(kind)


def weights(request, rows, columns, grad_rows, grad_columns, needs: Needs):
    calls.append("weights" + "x" * needs.x + "y" * needs.y)
    s = reference.similarity_matrix(request.x, request.columns, request.similarity, request.normalize)
    t = reference.guide_matrix(request)
    t = torch.ones_like(s) if t is None else t
    gradients = [torch.zeros(p.numel(), dtype=s.dtype) for p in request.params]
    g_s = torch.zeros_like(s)  # (B, N), dL/ds
    for term in request.terms:
        is_rows = term.axis == Axis.ROWS
        statistics, cotangents = (rows, grad_rows) if is_rows else (columns, grad_columns)
        keep = reference.pair_keep(request, term.mask)
        part = _term(
            term,
            s if is_rows else s.T,
            t if is_rows else t.T,
            keep if is_rows else keep.T,
            statistics[term.slot : term.slot + term.reduction.slots],
            cotangents[term.slot],
            gradients,
        )
        g_s += part if is_rows else part.T
    dx, dy = _embeddings(request, g_s, s)
    dparams = [g if need else None for g, need in zip(gradients, needs.params, strict=True)]
    return dx if needs.x else None, dy if needs.y else None, dparams


def _term(term, s, t, keep, out, g, gradients):
    """The part of one term in dL/ds (owners, others); adds to the gradients of the parameters."""
    zero = torch.zeros_like(s)
    if not term.reduction.differentiable:
        return zero
    keep = keep & reference._within(t if term.guide == Guide.THRESHOLD else s, term.above, term.below)
    column = lambda v: v.to(s.dtype).reshape(-1, 1) if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=s.dtype)  # noqa: E731
    a, p, g = column(term.scale), column(term.offset), g[:, None]
    to_owner = to_other = torch.ones_like(s)
    offset = p
    if term.other_offset is not None:
        q = term.other_offset.to(s.dtype)[None, :]
        if term.combine == Combine.LOGADDEXP:
            offset = torch.logaddexp(p, q)
            to_owner, to_other = torch.exp(p - offset) + zero, torch.exp(q - offset) + zero
        else:
            offset = p + q
    z = a * (t if term.guide == Guide.LOGITS else s) + offset
    f, df = reference.score(term.score, z, term.constant), slope(term.score, z, term.constant)
    w = torch.ones_like(s) if term.weight is None else term.weight.to(s.dtype)[None, :] + zero
    if term.guide == Guide.WEIGHT:
        w = w * t
        keep = keep if term.reduction == Reduction.SUM else keep & ~(t <= 0)
    direct = zero
    if term.reduction == Reduction.SUM:
        per_weight = torch.where(keep, g * f, 0.0)
        dz = torch.where(keep, g * w * df, 0.0)
    else:
        # The weight belongs into the exponent: w exp(f - out) is off by the rounding of a large out.
        p = torch.where(keep & (w != 0), torch.exp(f + w.log() - out[-1][:, None]), 0.0)
        if term.reduction == Reduction.LOGSUMEXP:
            dexponent = torch.where(keep, g * p, 0.0)
        else:
            direct = torch.where(keep, g * p, 0.0)
            dexponent = torch.where(keep, g * p * (s - out[0][:, None]), 0.0) * (not term.detach_weights)
        per_weight = torch.where(w == 0, 0.0, dexponent / torch.where(w == 0, 1.0, w))
        dz = torch.where(keep, dexponent * df, 0.0)
    for name, value in (("scale", dz * s), ("offset", dz * to_owner)):
        at = term.index[name]
        if at >= 0:
            gradients[at] += torch.where(keep, value, 0.0).sum(1 if gradients[at].numel() > 1 else None)
    for name, value in (("other_offset", dz * to_other), ("weight", per_weight)):
        at = term.index[name]
        if at >= 0:
            gradients[at] += torch.where(keep, value, 0.0).sum(0)
    return torch.where(keep, dz * a + direct, 0.0)


def _embeddings(request, g_s, s):
    """dL/dx (B, D) and dL/dy (N, D) from dL/ds; the sum of both where the columns are the rows."""
    x, y = (v.to(s.dtype) for v in (request.x, request.columns))
    if request.normalize:
        x, y = reference.normalized(x), reference.normalized(y)
    if request.similarity == Similarity.DOT:
        dx, dy = g_s @ y, g_s.T @ x
    else:
        if request.similarity == Similarity.EUCLIDEAN:
            g_s = torch.where(s == 0, 0.0, g_s / torch.where(s == 0, 1.0, 2 * s))
        dx = 2 * (g_s.sum(1, keepdim=True) * x - g_s @ y)
        dy = 2 * (g_s.sum(0)[:, None] * y - g_s.T @ x)
    if request.normalize:
        dx, dy = _normalize_backward(request.x, x, dx), _normalize_backward(request.columns, y, dy)
    if request.symmetric:
        dx, dy = dx + dy, None
    return dx.to(request.x.dtype), None if dy is None else dy.to(request.x.dtype)


def _normalize_backward(x, unit, g):
    norm = x.to(g.dtype).norm(dim=1, keepdim=True)
    tangent = g - unit * (g * unit).sum(1, keepdim=True)
    return torch.where(norm > 1e-12, tangent, g) / norm.clamp_min(1e-12)
