"""The pairs of one call, wherever they come from: labels, labels with mined thresholds, or explicit index tuples.

A loss states its terms over `Mask.SAME` (positives), `Mask.DIFFERENT` (negatives) and `Mask.ALL` (both); `reduce`
turns them into one pass over all pairs, or into sums over the listed pairs when there is a list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import backend_cpu, checks
from ..algebra import log_add_exp
from ..formulas import Formula
from ..miners.selection import Bound, ClosestNegative, MinedPairs, check_indices, listed, settled
from ..pairs import pair_similarity, segment_sum
from ..primitives import pair_loss, pair_reduce, reduce_in_turn
from ..request import statistics_dtype
from ..rows import row_reduce
from ..terms import Mask, Reduction, Score, Term
from .arguments import poisoned
from .geometry import Geometry, geometry_of
from .ranks import gathered
from .statistics import PairStatistics, moments
from .weights import row_weights

_SIGNED = (Mask.SAME, Mask.DIFFERENT)


def label_counts(labels: Tensor, ref_labels: Tensor | None, exclude: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(2, B): numbers of positives and negatives of each row from the sorted labels, O((B + N) log N)."""
    if backend_cpu.at_hand(labels):
        return backend_cpu.label_counts(labels, ref_labels, exclude, dtype)
    columns = labels if ref_labels is None else ref_labels
    ordered = columns.sort().values
    same = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    other = columns.shape[0] - same
    if ref_labels is None:
        same = same - 1
    elif exclude is not None:
        met = exclude >= 0
        alike = met & (columns[exclude.clamp_min(0)] == labels)
        same, other = same - alike.long(), other - (met & ~alike).long()
    return torch.stack([same, other]).to(dtype)


def _count(mask: Mask) -> Term:
    """The number of pairs under a mask."""
    return Term(Reduction.COUNT, Score.IDENTITY, mask, scale=0.0, offset=1.0)


@dataclass
class PairProblem:
    """The positive and negative pairs of one call."""

    x: Tensor  # (B, D)
    y: Tensor | None  # (N, D); None: x
    geometry: Geometry
    labels: Tensor | None = None  # (B,)
    ref_labels: Tensor | None = None  # (N,)
    exclude: Tensor | None = None  # (B,)
    bounds: dict[Mask, dict[str, Bound]] = field(default_factory=dict)  # above, below (B,) of each sign
    pairs: dict[Mask, tuple[Tensor, Tensor]] | None = None  # explicit lists; then labels say nothing of the pairs
    anchor_labels: Tensor | None = None  # (B,), for class weights and parameters of classes
    mined: object = None  # an index tuple that weights rows instead of choosing pairs
    measure: bool = False  # whether statistics are wanted
    statistics: PairStatistics | None = None

    def reduce(
        self, terms: list[Term], counts: list[Mask] | tuple[Mask, ...] = (), statistics: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Results of the terms, and the number of pairs of each row under each mask of `counts`."""
        statistics = statistics or (self.measure and self.statistics is None)
        extra = [Term(Reduction.MOMENTS, mask=mask) for mask in _SIGNED] if statistics else []
        known: dict[Mask, Tensor] = {}
        if not statistics and counts:
            if self.pairs is None and not self.bounds:
                known = dict(zip(_SIGNED, self._label_counts().unbind(0), strict=True))
            else:
                extra = [_count(mask) for mask in counts]
        if not terms and not extra:
            return [], [known[mask] for mask in counts]
        run = self._listed if self.pairs is not None else self._labelled
        results = run([*terms, *extra])
        results, found = results[: len(terms)], results[len(terms) :]
        if statistics:
            self.statistics = PairStatistics(*(moments(slots) for slots in found))
            known = dict(zip(_SIGNED, (slots[0] for slots in found), strict=True))
        elif extra:
            known = dict(zip(counts, found, strict=True))
        return results, [known[mask] for mask in counts]

    def loss(
        self,
        terms: list[Term],
        formula: Formula,
        counts: tuple[Mask, ...] = (),
        constants: Sequence[float] = (),
        statistics: bool = False,
    ) -> Tensor:
        """A closed formula of the results of the terms and of the numbers of pairs of each row, in one node of autograd
        where one pass, or two in turn, find all of them.

        Args:
            counts: none, (SAME,) or (SAME, DIFFERENT): the numbers that the formula reads.
        """
        statistics = statistics or (self.measure and self.statistics is None)
        by_label = self.pairs is None and not self.bounds
        if by_label and not statistics:
            known = self._label_counts()[: len(counts)] if counts else None
            return pair_loss(self.x, self.y, terms, formula, counts=known, constants=constants, **self._how)[0]
        read = [*terms, *map(_count, counts)]
        awaited = None if by_label or self.pairs is not None else self._awaited(read)
        in_order = all(a.mask <= b.mask for a, b in itertools.pairwise(read))  # as _in_turn reduces them
        signed = all(term.mask != Mask.ALL for term in terms)
        if statistics or self.pairs is not None or not signed or (awaited is not None and not in_order):
            results, found = self.reduce(terms, counts, statistics)
            return formula.value(*results, *found, *constants)
        if awaited is not None:
            return self._in_turn(read, awaited, formula, constants)
        parts = [part for term in read for part in self._parts(term)]
        return pair_loss(self.x, self.y, parts, formula, constants=constants, **self._how)[0]

    def _label_counts(self) -> Tensor:
        return label_counts(self.labels, self.ref_labels, self.exclude, statistics_dtype(self.x))

    def row_reduce(self, formula, loss: str, **options) -> tuple[Tensor, ...]:
        """`flashpair.row_reduce` over the pairs that labels define.

        Raises:
            ValueError: where the pairs are a list or lie between mined thresholds.
        """
        if self.pairs is not None or self.bounds:
            raise ValueError(f"indices_tuple must be None for {loss}, which looks at whole rows; got one")
        if self.measure:
            self.reduce([], statistics=True)
        return row_reduce(
            self.x,
            self.y,
            formula,
            labels=self.labels,
            ref_labels=self.ref_labels,
            exclude=self.exclude,
            similarity=self.geometry.similarity,
            normalize=self.geometry.normalize,
            **options,
        )

    def sum_over_positives(self, losses: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """(B,) Σ over each row's positives p of `losses(s_ip, *row tensors)`, whatever the similarity's role in it.

        Only similarities within classes are computed.
        """
        if self.pairs is not None:
            i, p = self.pairs[Mask.SAME]
            values = losses(self.similarity(i, p), *(r[i] for r in rows))
            return segment_sum(values, i, self.x.shape[0])
        bounds = settled(self.bounds.get(Mask.SAME, {}))
        limits = [bounds[k] for k in ("above", "below") if k in bounds]

        def formula(panel, *inputs: Tensor) -> list[Tensor]:
            cut = len(inputs) - len(limits)
            s, valid = gathered(panel)
            for name, limit in zip([k for k in ("above", "below") if k in bounds], inputs[cut:], strict=True):
                drops = torch.le if name == "above" else torch.ge
                valid = valid & ~drops(s.detach(), limit[:, None])
            values = losses(torch.where(valid, s, 0.0), *(r[:, None] for r in inputs[:cut]))
            return [torch.where(valid, values, 0.0).sum(1)]

        return row_reduce(
            self.x,
            self.y,
            formula,
            rows=[*rows, *limits],
            labels=self.labels,
            ref_labels=self.ref_labels,
            exclude=self.exclude,
            similarity=self.geometry.similarity,
            normalize=self.geometry.normalize,
            within_class=True,
        )[0]

    def row_weights(self) -> Tensor | float:
        """(B,) weights of the anchors from a miner, 1 without one."""
        columns = None if self.y is None else self.y.shape[0]
        found = row_weights(self.mined, self.labels, statistics_dtype(self.x), columns is not None, columns)
        return 1.0 if found is None else found

    def similarity(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(P,) similarities of listed pairs, differentiable."""
        how = {"similarity": self.geometry.similarity, "normalize": self.geometry.normalize}
        return pair_similarity(self.x, self.y, rows, columns, **how)

    def _labelled(self, terms: list[Term]) -> list[Tensor]:
        awaited = self._awaited(terms)
        if awaited is None:
            return self._one_pass(terms)
        positive, negative = ([t for t, term in enumerate(terms) if term.mask == mask] for mask in _SIGNED)
        found = self._in_turn([terms[t] for t in (*positive, *negative)], awaited)
        results = dict(zip((*positive, *negative), found, strict=False))
        return [results[t] for t in range(len(terms))]

    def _in_turn(self, terms: list[Term], awaited: ClosestNegative, formula: Formula | None = None, constants=()):
        """Results of terms over positives, then over negatives, or a formula of them, in two passes.

        The negatives first, which tell how close they come; few tiles hold the positives that are then reduced.
        """
        positive = [term for term in terms if term.mask == Mask.SAME]

        def then(found) -> list[Term]:
            awaited.found(found[-1])
            return [part for term in positive for part in self._parts(term)]

        first = [part for term in terms[len(positive) :] for part in self._parts(term)] + [awaited.term()]
        if positive:
            return reduce_in_turn(self.x, self.y, first, then, formula, constants, **self._how)
        found = pair_reduce(self.x, self.y, first, **self._how)
        then(found)
        return found if formula is None else formula.value(*found[:-1], *constants)

    def _awaited(self, terms: list[Term]) -> ClosestNegative | None:
        """A threshold of the positives that a pass over the negatives among the terms would find."""
        if torch.compiler.is_compiling():
            return None
        for bound in self.bounds.get(Mask.SAME, {}).values():
            if isinstance(bound, ClosestNegative) and bound.awaited(self.exclude):
                masks = {term.mask for term in terms}
                return bound if Mask.DIFFERENT in masks and masks <= set(_SIGNED) else None
        return None

    @property
    def _how(self) -> dict:
        """How a pass over all pairs compares them."""
        return {
            "labels": self.labels, "ref_labels": self.ref_labels, "exclude": self.exclude,
            "similarity": self.geometry.similarity, "normalize": self.geometry.normalize,
        }  # fmt: skip

    def _one_pass(self, terms: list[Term]) -> list[Tensor]:
        parts = [self._parts(term) for term in terms]
        flat = iter(pair_reduce(self.x, self.y, [part for group in parts for part in group], **self._how))
        results = []
        for group in parts:
            found = [next(flat) for _ in group]
            results.append(found[0] if len(found) == 1 else log_add_exp(*found))
        return results

    def _parts(self, term: Term) -> list[Term]:
        """The term with the mined thresholds; a logsumexp over both signs is split where these differ by sign."""
        if not self.bounds:
            return [term]
        if term.mask == Mask.ALL:
            return [part for mask in _SIGNED for part in self._parts(replace(term, mask=mask))]
        bounds = settled(self.bounds[term.mask])
        return [
            replace(
                term,
                above=_tighter(torch.maximum, term.above, bounds.get("above")),
                below=_tighter(torch.minimum, term.below, bounds.get("below")),
            )
        ]

    def _listed(self, terms: list[Term]) -> list[Tensor]:
        results: list[Tensor | None] = [None] * len(terms)
        for mask in Mask:
            chosen = [t for t, term in enumerate(terms) if term.mask == mask]
            if not chosen:
                continue
            pairs = self.pairs.get(mask) or tuple(torch.cat(p) for p in zip(*self.pairs.values(), strict=True))
            found = pair_reduce(
                self.x,
                self.y,
                [replace(terms[t], mask=Mask.ALL) for t in chosen],
                pairs=pairs,
                exclude_self=False,
                similarity=self.geometry.similarity,
                normalize=self.geometry.normalize,
            )
            for t, result in zip(chosen, found, strict=True):
                results[t] = result
        return results

    def finish(self, loss: Tensor):
        """The loss, NaN if an embedding is not finite; with the statistics where they were asked for."""
        loss = poisoned(loss, self.x, self.y)
        return loss if self.statistics is None else (loss, self.statistics)


def _tighter(choose, a, b):
    if a is None or b is None:
        return b if a is None else a
    return choose(torch.as_tensor(a, dtype=b.dtype, device=b.device), b)


def check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels) -> None:
    """The arguments of a metric-learning loss or miner.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checks.embedding_pair(embeddings, ref_emb, ("embeddings", "ref_emb"))
    if labels is None and indices_tuple is None:
        raise ValueError("labels or indices_tuple must be given; got neither")
    if labels is not None:
        checks.labels("labels", labels, embeddings.shape[0])
    if ref_labels is not None:
        if ref_emb is None:
            raise ValueError("ref_labels was given without ref_emb")
        if labels is None and indices_tuple is None:
            raise ValueError("ref_labels was given without labels")
        checks.labels("ref_labels", ref_labels, ref_emb.shape[0])
    elif ref_emb is not None and indices_tuple is None:
        raise ValueError("ref_emb was given without ref_labels (or indices_tuple)")
    checks.same_device("embeddings", embeddings, labels=labels, ref_labels=ref_labels)


def _unique(a: Tensor, b: Tensor, columns: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    key = torch.unique(a * columns + b)
    return (key // max(columns, 1), key % max(columns, 1)), key


def _from_lists(x, y, geometry, indices, collapse: bool) -> PairProblem:
    a1, p, a2, n = indices if len(indices) == 4 else (indices[0], indices[1], indices[0], indices[2])
    positive, negative = (a1, p), (a2, n)
    if collapse:
        columns = (x if y is None else y).shape[0]
        positive, first = _unique(a1, p, columns)
        negative, second = _unique(a2, n, columns)
        shared = first[torch.isin(first, second)]
        if shared.numel():
            pair = (int(shared[0]) // columns, int(shared[0]) % columns)
            raise ValueError(f"indices_tuple lists pair {pair} as positive and as negative; it can only be one")
    return PairProblem(x, y, geometry, pairs={Mask.SAME: positive, Mask.DIFFERENT: negative})


def all_pairs(indices_tuple) -> bool:
    """Whether an index tuple leaves nothing out but one column a row: none, or a selection without thresholds."""
    return indices_tuple is None or (isinstance(indices_tuple, MinedPairs) and not indices_tuple.bounds)


def pair_problem(
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    distance,
    collapse: bool = True,
) -> PairProblem:
    """The pairs of a call in pytorch-metric-learning's convention.

    Self pairs are left out where `ref_labels` is `labels` itself (also with other embeddings), as the peer does.

    Args:
        collapse: whether a pair listed twice in an index tuple counts once.
    """
    check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    geometry = geometry_of(distance)
    x, y = embeddings, None if ref_emb is embeddings else ref_emb
    if isinstance(indices_tuple, MinedPairs):
        bounds = indices_tuple.bounds_in(geometry)
        if bounds is not None and indices_tuple.mined_from(embeddings, ref_emb):
            mined = indices_tuple
            return PairProblem(
                x, mined.columns, geometry, mined.labels, mined.ref_labels, mined.exclude, bounds,
                anchor_labels=mined.labels if labels is None else labels,
            )  # fmt: skip
    indices_tuple = listed(indices_tuple)
    if indices_tuple is not None:
        check_indices(indices_tuple, x.shape[0], (x if y is None else y).shape[0], x.device)
        return replace(_from_lists(x, y, geometry, indices_tuple, collapse), anchor_labels=labels)
    exclude = None
    same_labels = ref_labels is None or ref_labels is labels
    if y is None and not same_labels:
        y = x
    elif y is not None and ref_labels is labels:
        exclude = torch.arange(x.shape[0], device=x.device)
    return PairProblem(x, y, geometry, labels, None if y is None else ref_labels, exclude, anchor_labels=labels)
