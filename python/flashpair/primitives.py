"""The differentiable primitives: `pair_reduce`, `pair_sum`, `mine` and `pair_similarity`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, ops, reference
from .distributed.sharded import Sharded, current
from .formulas import Formula
from .operator import watched
from .pairs import pair_similarity, reduce_pairs
from .request import KEEP, decode, encode
from .terms import Axis, Extreme, Precision, Reduction, Similarity, Term
from .workspace import workspace_bytes


class Mined(NamedTuple):
    """Result of one `Extreme`: the most extreme entry first."""

    values: Tensor  # (B, k) statistics dtype, not differentiable; -inf / +inf where missing
    indices: Tensor  # (B, k) int64, -1 where missing


def _check(x, y, labels, ref_labels, pair_mask, exclude, exclude_self, similarity, precision) -> None:
    checks.embedding_pair(x, y)
    checks.similarity(similarity)
    checks.closed("precision", precision, Precision)
    rows, columns = x.shape[0], (x if y is None else y).shape[0]
    if labels is not None:
        checks.labels("labels", labels, rows)
    if ref_labels is not None:
        if y is None:
            raise ValueError("ref_labels was given without y; the columns are the rows and share their labels")
        if labels is None:
            raise ValueError("ref_labels was given without labels")
        checks.labels("ref_labels", ref_labels, columns)
    if y is not None and labels is not None and ref_labels is None:
        raise ValueError("labels was given for x but ref_labels is missing for y")
    if pair_mask is not None:
        checks.pair_mask(pair_mask, rows, columns)
    if exclude is not None:
        checks.indices("exclude", exclude, rows)
    if exclude_self and y is not None:
        raise ValueError("exclude_self=True needs y=None; give `exclude`, a column per row, for rectangular problems")
    checks.same_device("x", x, labels=labels, ref_labels=ref_labels, pair_mask=pair_mask, exclude=exclude)


def _outside_autocast(primitive: Callable) -> Callable:
    """Autocast would round float32 similarities to half precision; the inputs already say what they are."""

    @functools.wraps(primitive)
    def call(x, *args, **kwargs):
        if not (isinstance(x, Tensor) and ops.in_autocast()):  # what is no tensor is refused inside
            return primitive(x, *args, **kwargs)
        with ops.without_autocast(x):
            return primitive(x, *args, **kwargs)

    return call


def _divided():
    """The same passes with their rows divided over the ranks of a group."""
    from .distributed import passes

    return passes


def needs_grad(*tensors) -> bool:
    """Whether a backward pass may follow: gradients are on and one of the tensors wants its own."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _own(guide: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None] | None:
    """A guide whose rows other ranks hold too, as ordinary tensors."""
    if guide is None:
        return None
    return tuple(side.data_of_all() if isinstance(side, Sharded) else side for side in guide)


@_outside_autocast
def pair_reduce(
    x: Tensor,
    y: Tensor | None = None,
    terms: Sequence[Term] = (),
    *,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    pair_mask: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool | None = None,
    exclude: Tensor | None = None,
    guide: Tensor | tuple[Tensor, Tensor] | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """Masked reductions over all pairs of rows of x and y, without storing the B×N similarity matrix.

    `out_i = reduce_j w_j score(a_i s_ij + p_i + q_j)` for each term; see `flashpair.Term`. Differentiable in x, y and
    in every term's scale, offset, other_offset and weight. Memory is O((B + N) D) plus the workspace.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        y: (N, D) of the same dtype, or None for the pairs of x with itself (which costs half as much).
        terms: what to compute; all terms share one pass.
        labels: (B,) int64, for the masks SAME and DIFFERENT.
        ref_labels: (N,) int64, the labels of y.
        pair_mask: (B, N) bool for the masks GIVEN and NOT_GIVEN.
        pairs: (rows (P,), columns (P,)) int64; only these pairs exist, each as often as it is listed. Costs O(P D)
            time and O(P) memory; excludes `pair_mask`, `exclude`, `guide` and `exclude_self=True`.
        exclude_self: drop the pairs (i, i). Default: True when y is None and `pairs` is not given, else False.
        exclude: (B,) int64, one column that row i never meets (-1: none).
        guide: (u (B, E), v (N, E)), or u alone where y is None: the terms' second product t_ij = <u_i, v_j>, which is
            not stored either and takes no gradient; see `flashpair.Guide`. Of x's dtype, or float32 beside 16 bits.
        similarity: dot product, squared or plain Euclidean distance. Default: dot product.
        normalize: divide the rows of x and y by max(norm, 1e-12) first, gradient included.
        precision: arithmetic of float32 products on a GPU. Default: full float32.
        max_workspace_bytes: bound on the scratch memory; default `flashpair.set_max_workspace_bytes`.

    Returns:
        One tensor per term in float32 (float64 for float64 inputs): (B,) for rows, (N,) for columns;
        (5, owners) for `Reduction.MOMENTS`. Empty owners: see `flashpair.Reduction`.

    Raises:
        ValueError, TypeError: on bad input, before any work. BackendError: when no backend can serve.

    Example:
        >>> import torch
        >>> from flashpair import Axis, Reduction, Term, pair_reduce
        >>> image, text = torch.randn(6, 4), torch.randn(6, 4)
        >>> scale = torch.tensor(10.0, requires_grad=True)
        >>> rows, columns = pair_reduce(image, text, [
        ...     Term(Reduction.LOGSUMEXP, scale=scale),
        ...     Term(Reduction.LOGSUMEXP, axis=Axis.COLUMNS, scale=scale),
        ... ], normalize=True)
        >>> torch.allclose(rows, (10 * torch.cosine_similarity(image[:, None], text[None], dim=-1)).logsumexp(1))
        True
    """
    if pairs is not None:
        if pair_mask is not None or exclude is not None or exclude_self or guide is not None:
            raise ValueError(
                "pairs excludes pair_mask, exclude, guide and exclude_self=True: the list says which pairs exist"
            )
        exclude_self = False
    exclude_self = (y is None) if exclude_self is None else exclude_self
    _check(x, y, labels, ref_labels, pair_mask, exclude, exclude_self, similarity, precision)
    rows, columns = x.shape[0], (x if y is None else y).shape[0]
    checks.terms(terms, rows, columns, x.device, labels is not None, pair_mask is not None, guide is not None)
    guide = checks.guide(guide, x, columns, y is None, terms)
    if pairs is not None:
        checks.pair_list(pairs, x.device)
        return reduce_pairs(x, y, list(terms), pairs, labels, ref_labels, similarity, normalize)
    workspace = workspace_bytes(max_workspace_bytes)
    backend = dispatch.choose(x, rows * columns)
    params, spec, consts = encode(list(terms), similarity, normalize, exclude_self, False, precision, _own(guide))
    spec[KEEP] = int(needs_grad(x, y, *params))
    if backend == "reference":
        request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace)
        found = reference.pair_reduce(request)
        return tuple(_public(term, slots) for term, slots in zip(terms, found, strict=True))
    call = x, y, labels, ref_labels, pair_mask, exclude, params
    if current() is None:
        row_stats, column_stats = ops.pair_stats(*call, spec, consts, backend, workspace)
    else:
        row_stats, column_stats = _divided().pair_statistics(*call, terms, spec, consts, backend, workspace)
    return tuple(ops.statistics_of(terms, row_stats, column_stats))


@_outside_autocast
def reduce_in_turn(
    x: Tensor,
    y: Tensor | None,
    first: Sequence[Term],
    then: Callable[[Sequence[Tensor]], Sequence[Term]],
    formula: Formula | None = None,
    constants: Sequence[float] = (),
    *,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
) -> tuple[Tensor, ...] | Tensor:
    """`pair_reduce` of some terms, then of those that `then` makes of their results; one backward pass for all.

    No gradient goes through `then`: the results may become thresholds. Results: those that `then` made, then those of
    `first`; with a formula, the loss that it makes of them in this order.
    """
    pairs = {"labels": labels, "ref_labels": ref_labels, "exclude": exclude}
    how = {**pairs, "similarity": similarity, "normalize": normalize}
    columns = (x if y is None else y).shape[0]
    backend = dispatch.choose(x, x.shape[0] * columns)
    if backend == "reference" or current() is not None or watched(x):
        found = pair_reduce(x, y, first, **how)
        found = (*pair_reduce(x, y, then([v.detach() for v in found]), **how), *found)
        return found if formula is None else formula.value(*found[: formula.reads + formula.counts], *constants)
    _check(x, y, labels, ref_labels, None, exclude, y is None, similarity, Precision.IEEE)
    workspace, operands = workspace_bytes(None), (x, y, labels, ref_labels, None, exclude)
    all_terms: list[Term] = []
    found: list[tuple[Tensor, Tensor]] = []
    results: Sequence[Tensor] = ()
    for make in (lambda _: first, then):
        terms = make(results)
        checks.terms(terms, x.shape[0], columns, x.device, labels is not None, False)
        params, spec, consts = encode(list(terms), similarity, normalize, y is None, False, Precision.IEEE)
        spec[KEEP] = int(needs_grad(x, y, *params))
        with torch.no_grad():
            found.insert(0, ops.pair_stats(*operands, params, spec, consts, backend, workspace))
            results = ops.statistics_of(terms, *found[0])
        all_terms = [*terms, *all_terms]
    params, spec, consts = encode(all_terms, similarity, normalize, y is None, False, Precision.IEEE)
    call = found, operands, params, spec, consts, backend, workspace
    if formula is not None:
        return ops.loss_of_one_pass(*call, formula=formula.name, constants=constants)
    return tuple(ops.statistics_of(all_terms, *ops.as_of_one_pass(*call)))


@_outside_autocast
def pair_loss(
    x: Tensor,
    y: Tensor | None,
    terms: Sequence[Term],
    formula: Formula,
    extra: Sequence[Term] = (),
    own: slice | None = None,
    *,
    counts: Tensor | None = None,
    constants: Sequence[float] = (),
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """A loss that is a closed formula of statistics, with its pass in one node of autograd.

    Autograd differentiates the formula on the reference backend and among ranks.

    Args:
        terms: what the formula reads, one vector each; without `counts` the numbers of pairs that it reads, too.
        extra: further terms without gradient, from the same pass.
        own: rows whose own loss is wanted too; among ranks only.
        counts: (k, B) the numbers of pairs that the formula reads, in the dtype of the statistics.
        constants: of the formula.

    Returns:
        The loss; that of the own rows; the results of the extra terms.
    """
    pairs = {"labels": labels, "ref_labels": ref_labels, "exclude": exclude}
    wanted, columns = [*terms, *extra], (x if y is None else y).shape[0]
    backend = dispatch.choose(x, x.shape[0] * columns)
    if backend == "reference" or current() is not None or own is not None:
        found = pair_reduce(x, y, wanted, similarity=similarity, normalize=normalize, **pairs)
        read, found = [*found[: len(terms)], *(() if counts is None else counts)], list(found[len(terms) :])
        of_own = None if own is None else formula.value(*(v[own] for v in read), *constants)
        return formula.value(*read, *constants), of_own, found
    _check(x, y, labels, ref_labels, None, exclude, y is None, similarity, Precision.IEEE)
    checks.terms(wanted, x.shape[0], columns, x.device, labels is not None, False)
    params, spec, consts = encode(wanted, similarity, normalize, y is None, False, Precision.IEEE)
    spec[KEEP] = int(needs_grad(x, y, *params))
    how = params, spec, consts, backend, workspace_bytes(None), formula.name, list(constants)
    loss, rows, columns, *_ = ops.pair_loss(x, y, labels, ref_labels, None, exclude, counts, *how)
    return loss, None, ops.statistics_of(wanted, rows, columns)[len(terms) :] if extra else []


def _public(term: Term, slots: Tensor) -> Tensor:
    slots = slots if term.reduction.differentiable else slots.detach()
    return slots if term.reduction == Reduction.MOMENTS else slots[0]


@_outside_autocast
def pair_sum(
    x: Tensor,
    y: Tensor | None = None,
    terms: Sequence[Term] = (),
    *,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    pair_mask: Tensor | None = None,
    exclude_self: bool | None = None,
    exclude: Tensor | None = None,
    guide: Tensor | tuple[Tensor, Tensor] | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """Sum over all terms and all pairs, `Σ_t Σ_i Σ_j w_j score(z_ij)`, gradients computed in the same pass.

    For losses without a row statistic (SigLIP, binomial deviance): the weight of a pair depends on that pair alone, so
    S is computed once instead of twice. Arguments as in `pair_reduce`; every term must be a `Reduction.SUM`.

    Returns:
        0-d tensor in float32 (float64 for float64 inputs).

    Raises:
        ValueError: also when a term is not a sum.

    Example:
        >>> import torch
        >>> from flashpair import Reduction, Score, Term, pair_sum
        >>> x = torch.eye(3)
        >>> float(pair_sum(x, terms=[Term(Reduction.SUM, Score.HINGE, offset=0.5)]))  # six pairs with s = 0
        3.0
    """
    how = exclude_self, exclude, guide, similarity, normalize, precision, max_workspace_bytes
    return sum_and_own(x, y, terms, labels, ref_labels, pair_mask, *how)[0]


@_outside_autocast
def sum_and_own(
    x, y, terms, labels=None, ref_labels=None, pair_mask=None, exclude_self=None, exclude=None, guide=None,
    similarity=Similarity.DOT, normalize=False, precision=Precision.IEEE, max_workspace_bytes=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pair_sum`, and what of it the rows of this process contribute, without gradient: all outside of a group."""
    exclude_self = (y is None) if exclude_self is None else exclude_self
    _check(x, y, labels, ref_labels, pair_mask, exclude, exclude_self, similarity, precision)
    rows, columns = x.shape[0], (x if y is None else y).shape[0]
    checks.terms(terms, rows, columns, x.device, labels is not None, pair_mask is not None, guide is not None)
    guide = checks.guide(guide, x, columns, y is None, terms)
    for t, term in enumerate(terms):
        if term.reduction != Reduction.SUM:
            raise ValueError(f"terms[{t}].reduction must be SUM in pair_sum; got {term.reduction.name}")
    workspace = workspace_bytes(max_workspace_bytes)
    backend = dispatch.choose(x, rows * columns)
    params, spec, consts = encode(list(terms), similarity, normalize, exclude_self, False, precision, _own(guide))
    if backend == "reference":
        request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace)
        results = reference.pair_reduce(request)
        own = [r[0, slice(*x.range)] if isinstance(x, Sharded) and t.axis == Axis.ROWS else r
               for t, r in zip(terms, results, strict=True)]  # fmt: skip
        return tuple(torch.stack([r.sum() for r in of]).sum() for of in (results, [r.detach() for r in own]))
    needs = needs_grad(x), needs_grad(y), [needs_grad(p) for p in params]
    call = x, y, labels, ref_labels, pair_mask, exclude, params
    if current() is None:
        total = ops.pair_sum(*call, spec, consts, backend, workspace, *needs)[0]
        return total, total.detach()
    return _divided().pair_sum(*call, terms, spec, consts, backend, workspace, needs)


@_outside_autocast
def mine(
    x: Tensor,
    y: Tensor | None = None,
    extremes: Sequence[Extreme] = (),
    *,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    pair_mask: Tensor | None = None,
    exclude_self: bool | None = None,
    exclude: Tensor | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> tuple[Mined, ...]:
    """The k most extreme similarities of each row with their columns, without storing the B×N matrix.

    Not differentiable; give the indices to `pair_similarity` for values with an O(B·k·D) backward pass.
    Ties go to the lowest column; a NaN similarity counts as the most extreme. Arguments as in `pair_reduce`.

    Args:
        extremes: what to look for; all share one pass. See `flashpair.Extreme`.

    Returns:
        One `Mined(values (B, k), indices (B, k))` per extreme; index -1 where a row has fewer than k candidates.

    Example:
        >>> import torch
        >>> from flashpair import Extreme, Mask, mine
        >>> x, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
        >>> (hardest,) = mine(x, extremes=[Extreme(Mask.DIFFERENT)], labels=labels)
        >>> hardest.indices.flatten().tolist()
        [2, 2, 1]
    """
    exclude_self = (y is None) if exclude_self is None else exclude_self
    _check(x, y, labels, ref_labels, pair_mask, exclude, exclude_self, similarity, precision)
    rows, columns = x.shape[0], (x if y is None else y).shape[0]
    checks.extremes(extremes, rows, columns, x.device, labels is not None, pair_mask is not None)
    workspace = workspace_bytes(max_workspace_bytes)
    backend = dispatch.choose(x, rows * columns)
    # S may be kept for the loss that usually follows, so a miner under no_grad asks the embeddings themselves.
    keep = x.requires_grad or (y is not None and y.requires_grad)
    _, spec, _ = encode([], similarity, normalize, exclude_self, keep, precision)
    if backend == "reference":
        request = decode(x, y, labels, ref_labels, pair_mask, exclude, [], spec, [], workspace)
        request.extremes = [_detached(e) for e in extremes]
        return tuple(Mined(*found) for found in reference.mine(request))
    bounds: list[Tensor] = []
    consts: list[float] = []
    for extreme in extremes:
        spec += [int(extreme.mask), int(extreme.largest), extreme.k]
        for bound, absent in ((extreme.above, -torch.inf), (extreme.below, torch.inf)):
            is_tensor = isinstance(bound, Tensor)
            spec.append(len(bounds) if is_tensor else -1)
            bounds += [bound.detach()] if is_tensor else []
            consts.append(absent if is_tensor or bound is None else float(bound))
    call = labels, ref_labels, pair_mask, exclude, bounds
    if current() is None:
        columns_of = None if y is None else y.detach()
        found = ops.pair_mine(x.detach(), columns_of, *call, spec, consts, backend, workspace)
    else:
        found = _divided().mine(x, y, *call, extremes, spec, consts, backend, workspace)
    return tuple(Mined(found[2 * e], found[2 * e + 1]) for e in range(len(extremes)))


def _detached(extreme: Extreme) -> Extreme:
    detach = lambda v: v.detach() if isinstance(v, Tensor) else v  # noqa: E731
    return Extreme(extreme.mask, extreme.largest, extreme.k, detach(extreme.above), detach(extreme.below))


__all__ = ["Mined", "mine", "pair_reduce", "pair_similarity", "pair_sum"]
