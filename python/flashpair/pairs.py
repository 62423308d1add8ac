"""The sparse path: similarities of listed pairs in O(P) memory, and every reduction over such a list.

`pair_similarity` is one opaque operator for all devices: gathers in chunks, so that P·D is never stored; gradients are
accumulated in the order of the list, so two runs are bitwise equal. On a CPU both are C++ (csrc/listed_cpu.h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend_cpu, checks, dispatch, ops, reference
from .distributed.sharded import Sharded
from .formulas import Formula
from .operator import operator
from .request import FlatTerm, decode_terms, encode, statistics_dtype
from .terms import Axis, Combine, Mask, Precision, Reduction, Similarity, Term

_CHUNK_ELEMENTS = 1 << 18  # gathered elements at a time, 1 MiB in float32


def _chunks(rows: Tensor, features: int) -> range:
    step = max(_CHUNK_ELEMENTS // max(features, 1), 1)
    return range(0, rows.shape[0], step), step


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[index], with a deterministic backward pass on every device."""
    return values[index] if values.is_cuda else values.index_select(0, index)


def segment_sum(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """(owners,) sums of the values (P,) of each owner, deterministically."""
    zeros = values.new_zeros(owners)
    return zeros.index_put((owner,), values, accumulate=True) if zeros.is_cuda else zeros.index_add(0, owner, values)


def _refuse_negative(**indices: Tensor) -> None:
    """Negative indices would count from the end: `mine` marks missing entries by -1."""
    for name, index in indices.items():
        if index.device.type == "cpu" and index.numel() and int(index.min()) < 0:
            raise IndexError(f"{name} must not be negative (-1 marks a missing entry of mine); got {int(index.min())}")


def accumulate(into: Tensor, index: Tensor, values: Tensor) -> None:
    """into[index] += values, deterministically."""
    into.index_put_((index,), values, accumulate=True) if into.is_cuda else into.index_add_(0, index, values)


EPSILON = 1e-12  # as in `reference.normalized`


def _norms(x: Tensor, wanted: bool) -> Tensor | None:
    """(B, 1) what a row is divided by, in the statistics dtype."""
    if not wanted:
        return None
    dtype = statistics_dtype(x)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).clamp_min_(EPSILON)


def _rows_at(x: Tensor, norms: Tensor | None, index: Tensor) -> Tensor:
    """x[index], normalised, in the statistics dtype."""
    rows = x[index].to(statistics_dtype(x))
    return rows if norms is None else rows / norms[index]


def _native(x: Tensor, *others: Tensor) -> bool:
    """Whether C++ reads such rows where they lie."""
    return x.dtype in (torch.float32, torch.float64) and backend_cpu.at_hand(x, *others)


@operator("pair_similarity")
def similarity_of_pairs(
    x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, similarity: int, normalize: bool
) -> Tensor:
    if _native(x, rows, columns):
        out = backend_cpu.listed_similarity(x, y, rows, columns, similarity, normalize)
        if out.shape == rows.shape:  # else an index is out of range, which PyTorch says
            return out
    _refuse_negative(rows=rows, columns=columns)
    out = x.new_empty(rows.shape[0], dtype=statistics_dtype(x))
    x_norms = _norms(x, normalize)
    y, y_norms = (x, x_norms) if y is None else (y, _norms(y, normalize))
    starts, step = _chunks(rows, x.shape[1])
    for start in starts:
        part = slice(start, start + step)
        a, b = _rows_at(x, x_norms, rows[part]), _rows_at(y, y_norms, columns[part])
        if similarity == Similarity.DOT:
            out[part] = (a * b).sum(-1)
        else:
            squared = (a - b).square_().sum(-1)
            out[part] = squared if similarity == Similarity.SQUARED_EUCLIDEAN else squared.sqrt_()
    return out


@similarity_of_pairs.fake
def _(x, y, rows, columns, similarity, normalize):
    return x.new_empty(rows.shape, dtype=statistics_dtype(x))


@operator("pair_similarity_backward")
def gradients_of_pairs(
    grad: Tensor, out: Tensor, x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, similarity: int,
    normalize: bool,
) -> list[Tensor]:  # dx, and dy where y is given  # fmt: skip
    if _native(x, rows, columns):
        return backend_cpu.listed_gradients(grad, out, x, y, rows, columns, similarity, normalize)
    dtype = statistics_dtype(x)
    x_norms = _norms(x, normalize)
    dx = torch.zeros_like(x, dtype=dtype)
    other, y_norms, dy = (x, x_norms, dx) if y is None else (y, _norms(y, normalize), torch.zeros_like(y, dtype=dtype))
    if similarity == Similarity.SQUARED_EUCLIDEAN:
        grad = 2 * grad
    elif similarity == Similarity.EUCLIDEAN:
        grad = torch.where(out == 0, 0.0, grad / torch.where(out == 0, 1.0, out))
    starts, step = _chunks(rows, x.shape[1])
    for start in starts:
        part = slice(start, start + step)
        g, i, j = grad[part, None], rows[part], columns[part]
        a, b = _rows_at(x, x_norms, i), _rows_at(other, y_norms, j)
        if similarity == Similarity.DOT:
            accumulate(dx, i, g * b)
            accumulate(dy, j, g * a)
        else:
            difference = g * (a - b)
            accumulate(dx, i, difference)
            accumulate(dy, j, -difference)
    sides = [(dx, x, x_norms)] if y is None else [(dx, x, x_norms), (dy, y, y_norms)]
    return [_through_norm(gradient, side, norms).to(side.dtype) for gradient, side, norms in sides]


def _through_norm(gradient: Tensor, x: Tensor, norms: Tensor | None) -> Tensor:
    """Gradient of x from that of x / norm, in place: (g - x̂ <x̂, g>) / norm; g / norm at the floor of the norm."""
    if norms is None:
        return gradient
    step = max(_CHUNK_ELEMENTS // max(x.shape[1], 1), 1)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        unit = x[part].to(gradient.dtype) / norms[part]
        along = (unit * gradient[part]).sum(-1, keepdim=True)
        gradient[part] -= unit.mul_(torch.where(norms[part] <= EPSILON, 0.0, along))
    return gradient.div_(norms)


@gradients_of_pairs.fake
def _(grad, out, x, y, rows, columns, similarity, normalize):
    return [torch.empty_like(side) for side in (x, y) if side is not None]


def _backward_backward(ctx, needs, *grads):
    raise RuntimeError("flashpair.pair_similarity cannot be differentiated twice")


gradients_of_pairs.differentiable(_backward_backward)


def _setup(ctx, inputs, output):
    x, y, rows, columns, similarity, normalize = inputs
    ctx.save_for_backward(output, x, y, rows, columns)
    ctx.static = (similarity, normalize)


def _backward(ctx, needs, grad):
    grads = gradients_of_pairs(grad.contiguous(), *ctx.saved_tensors, *ctx.static)
    return grads[0], grads[1] if len(grads) > 1 else None, None, None, None, None


similarity_of_pairs.differentiable(_backward, _setup)


@operator("listed_loss")
def _loss_of_pairs(
    x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, counts: Tensor | None, similarity: int,
    normalize: bool, backend: str, formula: str, constants: list[float],
) -> list[Tensor]:  # loss, similarities (P,), their slopes (2, P / 2)  # fmt: skip
    found = similarity_of_pairs(x, y, rows, columns, similarity, normalize)
    statistics = found.view(2, -1)
    loss, slopes, _ = ops.slopes_of(backend, formula, statistics, statistics[:0], counts, constants)
    return [loss, found, slopes]


@_loss_of_pairs.fake
def _(x, y, rows, columns, counts, similarity, normalize, backend, formula, constants):
    dtype, pairs = statistics_dtype(x), rows.shape[0]
    return [x.new_empty(shape, dtype=dtype) for shape in ((), (pairs,), (2, pairs // 2))]


def _loss_setup(ctx, inputs, output):
    x, y, rows, columns, _, similarity, normalize, *_ = inputs
    ctx.save_for_backward(*output[1:], x, y, rows, columns)
    ctx.static = (similarity, normalize)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, needs, total, *_):
    if total is None:
        return (None,) * 10
    found, slopes, *pairs = ctx.saved_tensors
    grads = gradients_of_pairs((slopes * total).view(-1), found, *pairs, *ctx.static)
    return grads[0], grads[1] if len(grads) > 1 else None, *(None,) * 8


_loss_of_pairs.differentiable(_loss_backward, _loss_setup)


def listed_loss(
    x: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    formula: Formula,
    counts: Tensor | None,
    constants: Sequence[float],
    *,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
) -> Tensor:
    """A closed formula of two vectors of similarities of listed pairs in one node of autograd; not among ranks.

    Args:
        rows, columns: (2 P,), the pairs of the first vector and behind them as many of the second.
        counts, constants: as in `primitives.pair_loss`, counts (k, P).
    """
    _check_listed(x, y, rows, columns, similarity)
    # What listed pairs need no backend for is PyTorch's on a CPU, as in `pair_similarity`.
    backend = "reference" if x.is_cpu and not backend_cpu.at_hand(x) else dispatch.choose(x, 0)
    constants = [float(c) for c in constants]
    how = int(similarity), normalize, backend, formula.name, constants
    return _loss_of_pairs(x, y, rows, columns, counts, *how)[0]


def _check_listed(x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, similarity: Similarity) -> None:
    checks.embedding_pair(x, y)
    checks.similarity(similarity)
    checks.indices("rows", rows)
    checks.indices("columns", columns, rows.shape[0])
    checks.same_device("x", x, rows=rows, columns=columns)


def pair_similarity(
    x: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
) -> Tensor:
    """Similarities `s(x[rows_p], y[columns_p])` of listed pairs, differentiable, in O(P) memory.

    Args:
        x: (B, D) embeddings.
        y: (N, D) embeddings, or None for x itself.
        rows: (P,) int64, in [0, B).
        columns: (P,) int64, in [0, N).
        similarity: dot product, squared or plain Euclidean distance (computed from the difference).
        normalize: divide rows by max(norm, 1e-12) first.

    Returns:
        (P,) float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: on bad input. IndexError: on an index out of range.

    Example:
        >>> import torch
        >>> from flashpair import pair_similarity
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> pair_similarity(x, None, torch.tensor([0, 1]), torch.tensor([1, 1])).tolist()
        [1.0, 5.0]
    """
    _check_listed(x, y, rows, columns, similarity)
    if any(isinstance(side, Sharded) and side.streams() for side in (x, y)):
        from .distributed import passes

        return passes.listed_similarity(x, y, rows, columns, int(similarity), normalize)
    return similarity_of_pairs(x, y, rows, columns, int(similarity), normalize)


def reduce_pairs(
    x: Tensor,
    y: Tensor | None,
    terms: list[Term],
    pairs: tuple[Tensor, Tensor],
    labels: Tensor | None,
    ref_labels: Tensor | None,
    similarity: Similarity,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """`pair_reduce` over a list of pairs: O(P D) time, O(P) memory, formulas in plain PyTorch."""
    rows, columns = pairs
    s = pair_similarity(x, y, rows, columns, similarity=similarity, normalize=normalize)
    sizes = (x.shape[0], (x if y is None else y).shape[0])
    ref_labels = labels if y is None else ref_labels
    params, spec, consts = encode(terms, similarity, normalize, False, False, Precision.IEEE)
    results = []
    for term in decode_terms(spec, consts, params):
        keep = torch.ones_like(s, dtype=torch.bool)
        if term.mask in (Mask.SAME, Mask.DIFFERENT):
            keep = (labels[rows] == ref_labels[columns]) == (term.mask == Mask.SAME)
        elif term.mask != Mask.ALL:
            raise ValueError(f"mask {term.mask.name} needs pair_mask, which a list of pairs excludes")
        owner, other = (rows, columns) if term.axis == Axis.ROWS else (columns, rows)
        results.append(_reduce(term, s, keep, owner, other, sizes[term.axis]))
    return tuple(results)


def _at(value, index: Tensor, dtype: torch.dtype):
    """A parameter at each pair: numbers and one-element tensors broadcast."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(dtype)
    return value if value.numel() == 1 else _take(value, index)


def _reduce(term: FlatTerm, s: Tensor, keep: Tensor, owner: Tensor, other: Tensor, owners: int) -> Tensor:
    at = lambda value, index: _at(value, index, s.dtype)  # noqa: E731
    for bound, drops in ((term.above, torch.le), (term.below, torch.ge)):
        if bound is not None:
            keep = keep & ~drops(s.detach(), at(bound, owner))
    segment = lambda values: segment_sum(values, owner, owners)  # noqa: E731
    if term.reduction == Reduction.MOMENTS:
        return _moments(s.detach(), keep, owner, owners)
    offset = at(term.offset, owner)
    if term.other_offset is not None:
        q = _take(term.other_offset.to(s.dtype), other)
        combine = term.combine == Combine.LOGADDEXP
        offset = torch.logaddexp(torch.as_tensor(offset, dtype=s.dtype, device=s.device), q) if combine else offset + q
    f = reference.score(term.score, at(term.scale, owner) * s + offset, term.constant)
    if term.reduction == Reduction.COUNT:
        return segment((keep & ~(f.detach() <= 0)).to(s.dtype))
    if term.reduction == Reduction.MAX:
        return _segment_max(torch.where(keep, f.detach(), -torch.inf), owner, owners)
    w = 1.0 if term.weight is None else _take(term.weight.to(s.dtype), other)
    if term.reduction == Reduction.SUM:
        return segment(torch.where(keep, w * f, 0.0))
    keep = keep & (torch.as_tensor(w) != 0)
    # NaN must reach the maximum, so that it reaches the result.
    exponent = torch.where(keep, f, -torch.inf)
    top = _segment_max(exponent.detach(), owner, owners)
    shift = torch.where(top == -torch.inf, 0.0, top)
    e = torch.where(keep, w * torch.exp(exponent - shift[owner]), 0.0)
    total = segment(e)
    empty = total == 0
    if term.reduction == Reduction.LOGSUMEXP:
        return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + shift)
    p = e / _take(torch.where(empty, 1.0, total), owner)
    p = p.detach() if term.detach_weights else p
    return segment(torch.where(keep, p * s, 0.0))


def _segment_max(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    return values.new_full((owners,), -torch.inf).scatter_reduce(0, owner, values, "amax")


def _moments(s: Tensor, keep: Tensor, owner: Tensor, owners: int) -> Tensor:
    zeros = s.new_zeros(owners)
    count = segment_sum(keep.to(s.dtype), owner, owners)
    mean = segment_sum(torch.where(keep, s, 0.0), owner, owners) / count.clamp_min(1)
    variance = segment_sum(torch.where(keep, (s - mean[owner]) ** 2, 0.0), owner, owners) / count.clamp_min(1)
    low = (zeros + torch.inf).scatter_reduce(0, owner, torch.where(keep, s, torch.inf), "amin")
    high = _segment_max(torch.where(keep, s, -torch.inf), owner, owners)
    return torch.stack([count, mean, variance, low, high])
