"""Retrieval, clustering and verification metrics of embeddings, without the matrix of their distances.

Every retrieval metric is a function of the ranks of a query's matches, and a rank is a count of nearer references: one
pass, exact for every k, O(D) memory a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks
from .losses.ranks import counts_below
from .order_statistics import count_pairs, order_statistics
from .request import statistics_dtype
from .rows import RowPanel, row_reduce
from .terms import Mask, Similarity

_QUERIES = 8192  # at a time, between two steps of the progress bar
_LONG = 1 << 32  # pairs from which on a progress bar is shown


class Retrieval(NamedTuple):
    """Metrics of each query, (Q,) float64; NaN where the references hold no match."""

    recall: dict[int, Tensor]  # k → whether a match is among the k nearest
    precision: dict[int, Tensor]  # k → share of matches among the k nearest
    average_precision: Tensor  # mean over matches of the precision at their rank, up to `k`
    average_precision_at_r: Tensor  # the same up to rank R, the number of matches
    r_precision: Tensor  # share of matches among the R nearest
    reciprocal_rank: Tensor  # 1 / rank of the nearest match, 0 beyond `k`
    matches: Tensor  # R


def _ranks(panel: RowPanel, position: Tensor, valid: Tensor) -> Tensor:
    """(b, P) rank of each match, from 1; equal distances in the order of their columns."""
    d, near, column = panel.s, panel.s.gather(1, position), panel.column[position]
    less = counts_below(panel, Mask.ALL, near)
    level = counts_below(panel, Mask.ALL, near, closed=True) - less
    rank = less + 1
    tied = ((level > 1) & valid).any(0)
    for p in tied.nonzero()[:, 0].tolist():
        before = panel.allowed & (d == near[:, p, None]) & (panel.column[None, :] < column[:, p, None])
        rank[:, p] += before.sum(1)
    return rank


def retrieval(
    query: Tensor,
    query_labels: Tensor,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    ref_includes_query: bool = False,
    at: Sequence[int] = (1,),
    k: int | None = None,
    similarity: Similarity = Similarity.SQUARED_EUCLIDEAN,
    normalize: bool = False,
    progress: bool | None = None,
) -> Retrieval:
    """Metrics of each query from the ranks of its matches among the references.

        R matches at ranks r_1 < ... < r_R:   recall@k = [r_1 <= k],   precision@k = #{r_i <= k} / k,
        AP = (1/R) Σ_{r_i <= k} i / r_i,   AP@R = (1/R) Σ_{r_i <= R} i / r_i,   R-precision = #{r_i <= R} / R

    Args:
        query: (Q, D). query_labels: (Q,) int64.
        reference: (N, D), reference_labels: (N,). Default: the queries, each without itself.
        ref_includes_query: the first Q references are the queries; none meets itself.
        at: the k of recall and precision.
        k: how many neighbours count for AP and the reciprocal rank. Default: all.
        similarity, normalize: how rows are compared. Default: Euclidean, as given. Equal distances rank in the order of
            the references.
        progress: show a bar. Default: from 4 billion pairs on, where tqdm is installed.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Example:
        >>> import torch
        >>> from flashpair.evaluation import retrieval
        >>> x, labels = torch.tensor([[0.0], [1.0], [1.5], [9.0]]), torch.tensor([0, 0, 1, 1])
        >>> retrieval(x, labels, at=(1, 2)).recall[2].tolist()
        [1.0, 1.0, 0.0, 1.0]
    """
    checks.embedding_pair(query, reference, ("query", "reference"))
    checks.labels("query_labels", query_labels, query.shape[0])
    if reference is None:
        if reference_labels is not None:
            raise ValueError("reference_labels was given without reference")
        reference, reference_labels, ref_includes_query = query, query_labels, True
    elif reference_labels is None:
        raise ValueError("reference_labels must be given with reference; got None")
    checks.labels("reference_labels", reference_labels, reference.shape[0])
    for m, value in enumerate(at):
        checks.count(f"at[{m}]", value)
    if k is not None:
        checks.count("k", k)
    if ref_includes_query and reference.shape[0] < query.shape[0]:
        raise ValueError(
            f"reference must begin with the {query.shape[0]} queries if ref_includes_query; got "
            f"{reference.shape[0]} rows"
        )
    sign = -1 if similarity == Similarity.DOT else 1

    def formula(panel: RowPanel) -> list[Tensor]:
        panel.s = sign * panel.s
        position, valid = panel.members()
        last = torch.iinfo(torch.long).max
        rank = torch.where(valid, _ranks(panel, position, valid), last).sort(dim=1).values
        count = valid.sum(1).double()
        order = torch.arange(1, rank.shape[1] + 1, device=rank.device)
        precision = torch.where(rank < last, order / rank, 0.0).double()
        share = lambda limit: (rank <= limit).sum(1).double()  # noqa: E731
        least = rank[:, 0] if rank.shape[1] else torch.full_like(panel.row, last)
        within = rank <= (last - 1 if k is None else k)
        r = count.long()[:, None]
        depth = r if k is None else r.clamp_max(k)
        found = [(least <= m).double() for m in at] + [share(m) / m for m in at]
        found += [(precision * within).sum(1) / count, (precision * (rank <= depth)).sum(1) / count]
        first = torch.where(least < last, 1 / least.double(), 0.0)
        found += [share(depth) / depth[:, 0], torch.where(least <= (last - 1 if k is None else k), first, 0.0), count]
        return [torch.where(count > 0, v, torch.nan) for v in found[:-1]] + [count]

    parts = []
    starts = range(0, max(query.shape[0], 1), _QUERIES)
    with torch.no_grad():
        for start in _bar(starts, query.shape[0] * reference.shape[0], progress, "retrieval"):
            rows = query[start : start + _QUERIES]
            own = torch.arange(start, start + rows.shape[0], device=query.device) if ref_includes_query else None
            parts.append(
                row_reduce(
                    rows,
                    reference,
                    formula,
                    labels=query_labels[start : start + _QUERIES],
                    ref_labels=reference_labels,
                    exclude=own,
                    similarity=similarity,
                    normalize=normalize,
                )
            )
    values = [torch.cat(v) for v in zip(*parts, strict=True)]
    n = len(at)
    return Retrieval(
        dict(zip(at, values[:n], strict=True)), dict(zip(at, values[n : 2 * n], strict=True)), *values[2 * n :]
    )


def _bar(steps: Iterable, pairs: int, progress: bool | None, what: str) -> Iterable:
    if progress is False or (progress is None and pairs < _LONG):
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=what, unit="block")


class Verification(NamedTuple):
    """Pairs of a test set taken for one identity where their similarity is above a threshold."""

    threshold: Tensor  # (n,)
    true_accept_rate: Tensor  # (n,) share of pairs of one label that are accepted
    false_accept_rate: Tensor  # (n,) share of the other pairs that are


def true_accept_rates(
    x: Tensor,
    labels: Tensor,
    far: Sequence[float] = (1e-4, 1e-3, 1e-2),
    *,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = True,
) -> Verification:
    """TAR@FAR over all pairs: the share of positives beyond the threshold that a given share of negatives passes.

    Exact: the threshold is the order statistic of all negative pairs, found by counting passes; no pair is stored.

    Args:
        x: (B, D). labels: (B,) int64.
        far: shares of accepted negatives, each in (0, 1].
        similarity, normalize: how rows are compared. Default: cosine.

    Returns:
        `Verification` with the strictest thresholds that accept at most that share; NaN without pairs of a kind.

    Example:
        >>> import torch
        >>> from flashpair.evaluation import true_accept_rates
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]])
        >>> true_accept_rates(x, torch.tensor([0, 0, 1, 1]), far=[0.25]).true_accept_rate.tolist()
        [1.0]
    """
    checks.embeddings("x", x)
    checks.labels("labels", labels, x.shape[0])
    for m, value in enumerate(far):
        checks.number(f"far[{m}]", value, low=0.0, high=1.0, open_low=True)
    how = {"labels": labels, "similarity": similarity, "normalize": normalize}
    closer = similarity == Similarity.DOT
    positives, negatives = (count_pairs(x, None, m, [None], **how)[0] for m in (Mask.SAME, Mask.DIFFERENT))
    # The (far·n)-th closest negative itself is not accepted: everything beyond it is.
    accepted = (torch.tensor(list(far), dtype=torch.float64, device=x.device) * negatives).floor()
    rank = (negatives - 1 - accepted if closer else accepted).clamp_min(0)
    bound = torch.finfo(statistics_dtype(x)).max
    threshold = order_statistics(x, None, Mask.DIFFERENT, rank, bound, **how)
    threshold = torch.where(accepted >= negatives, -torch.inf if closer else torch.inf, threshold)
    limits = list(threshold.unbind(0))
    rates = []
    for mask, total in ((Mask.SAME, positives), (Mask.DIFFERENT, negatives)):
        above = count_pairs(x, None, mask, limits, **how)
        if not closer:  # smaller is closer: those not above, less those level
            lower = [torch.nextafter(t, torch.full_like(t, -torch.inf)) for t in limits]
            above = total - count_pairs(x, None, mask, lower, **how)
        rates.append(above / total)
    return Verification(threshold, *rates)


def roc(
    x: Tensor, labels: Tensor, points: int = 256, *, similarity: Similarity = Similarity.DOT, normalize: bool = True
) -> Verification:
    """The ROC curve over all pairs at evenly spaced thresholds, counted exactly; its area by trapezoids is the AUC.

    Args:
        x: (B, D). labels: (B,) int64.
        points: number of thresholds between the smallest and the largest similarity.

    Example:
        >>> import torch
        >>> from flashpair.evaluation import roc
        >>> x, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]]), torch.tensor([0, 0, 1, 1])
        >>> curve = roc(x, labels, points=64)
        >>> round(float(-torch.trapezoid(curve.true_accept_rate, curve.false_accept_rate)), 3)
        1.0
    """
    from .primitives import pair_reduce
    from .terms import Reduction, Term

    checks.embeddings("x", x)
    checks.labels("labels", labels, x.shape[0])
    how = {"labels": labels, "similarity": similarity, "normalize": normalize}
    (moments,) = pair_reduce(x, None, [Term(Reduction.MOMENTS)], similarity=similarity, normalize=normalize)
    low, high = moments[3].min(), moments[4].max()
    steps = torch.linspace(0, 1, points, dtype=low.dtype, device=x.device)
    threshold = low + (high - low) * steps
    threshold[0] = torch.nextafter(low, torch.full_like(low, -torch.inf))
    rates = []
    for mask in (Mask.SAME, Mask.DIFFERENT):
        total = count_pairs(x, None, mask, [None], **how)[0]
        above = torch.cat([count_pairs(x, None, mask, list(t.unbind(0)), **how) for t in threshold.split(16)])
        rates.append(above / total if similarity == Similarity.DOT else (total - above) / total)
    return Verification(threshold, *rates)


_RETRIEVAL = (
    "precision_at_1",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "r_precision",
)
_CLUSTERING = ("AMI", "NMI")


class AccuracyCalculator:
    """Metrics of embeddings by name.

    pytorch-metric-learning's class: same constructor, same call, same metrics (AMI, NMI, mean_average_precision,
    mean_average_precision_at_r, mean_reciprocal_rank, precision_at_1, r_precision), same treatment of queries without a
    match (left out). No k-nearest-neighbour index is built: ranks are counted, so that millions of rows cost O(D)
    memory each and no k is too large. Equal distances rank in the order of the references.

    Args:
        include, exclude: names of metrics. Default: all.
        avg_of_avgs: average the classes' averages. return_per_class: a list by class, ascending.
        k: how many neighbours count; None for all, "max_bin_count" for the size of the largest class.
        label_comparison_fn: must be None, equality.
        device: where to compute. Default: a GPU if there is one.
        knn_func: must be None.
        kmeans_func: (embeddings, number of clusters) → labels, for AMI and NMI. Default: scikit-learn's KMeans.
        normalize: divide rows by their norm first. Default: no, as there.
        progress: show a bar. Default: on long runs.

    Raises:
        TypeError, ValueError: on unknown metrics, or options that streaming cannot serve.

    Example:
        >>> import torch
        >>> from flashpair.evaluation import AccuracyCalculator
        >>> x, labels = torch.tensor([[0.0], [1.0], [1.6], [9.0]]), torch.tensor([0, 0, 1, 1])
        >>> AccuracyCalculator(include=("precision_at_1",), device=torch.device("cpu")).get_accuracy(x, labels)
        {'precision_at_1': 0.5}
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        avg_of_avgs: bool = False,
        return_per_class: bool = False,
        k: int | str | None = None,
        label_comparison_fn=None,
        device: torch.device | None = None,
        knn_func=None,
        kmeans_func: Callable | None = None,
        *,
        normalize: bool = False,
        progress: bool | None = None,
    ) -> None:
        self.metrics = self._chosen(include, exclude, sorted((*_RETRIEVAL, *_CLUSTERING)))
        if avg_of_avgs and return_per_class:
            raise ValueError("avg_of_avgs and return_per_class are mutually exclusive; got both")
        if k is not None and k != "max_bin_count":
            checks.count("k", k)
        for name, value in (("label_comparison_fn", label_comparison_fn), ("knn_func", knn_func)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None: ranks are counted by label; pytorch-metric-learning's takes one"
                )
        self.avg_of_avgs, self.return_per_class = avg_of_avgs, return_per_class
        self.k, self.kmeans_func = k, kmeans_func
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        self.normalize, self.progress = normalize, progress

    @staticmethod
    def _chosen(include: Sequence[str], exclude: Sequence[str], known: list[str]) -> list[str]:
        for name, value in (("include", include), ("exclude", exclude)):
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"{name} must be a tuple or a list of names; got {type(value).__name__}")
            if not set(value) <= set(known):
                raise ValueError(f"{name} must hold names out of {known}; got {sorted(set(value) - set(known))}")
        return [m for m in known if (not include or m in include) and m not in exclude]

    def get_accuracy(
        self,
        query,
        query_labels,
        reference=None,
        reference_labels=None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, float | list[float]]:
        """The metrics of some queries.

        Args:
            query: (Q, D) tensor or array. query_labels: (Q,) integers.
            reference: (N, D), reference_labels: (N,). Default: the queries, each without itself.
            ref_includes_query: the first Q references are the queries.
            include, exclude: a choice among this calculator's metrics.

        Returns:
            {name: value}, or lists by class with `return_per_class`; NaN where no query has a match.
        """
        metrics = self._chosen(include, exclude, self.metrics)
        if reference is None:
            ref_includes_query = True
        query, reference = (v if v is None else self._tensor(v) for v in (query, reference))
        labels, reference_labels = (
            v if v is None else self._tensor(v).reshape(-1).long() for v in (query_labels, reference_labels)
        )
        if reference is not None and ref_includes_query and not torch.equal(query, reference[: len(query)]):
            raise ValueError("reference must begin with the queries if ref_includes_query; its first rows differ")
        found: dict[str, Tensor] = {}
        if set(metrics) & set(_RETRIEVAL):
            refs = labels if reference_labels is None else reference_labels
            k = self.k
            if k == "max_bin_count":
                k = max(int(torch.unique(refs, return_counts=True)[1].max()) - int(ref_includes_query), 1)
            each = retrieval(
                query, labels, reference, reference_labels, ref_includes_query=ref_includes_query, k=k,
                normalize=self.normalize, progress=self.progress,
            )  # fmt: skip
            found = {
                "precision_at_1": each.precision[1],
                "mean_average_precision": each.average_precision,
                "mean_average_precision_at_r": each.average_precision_at_r,
                "mean_reciprocal_rank": each.reciprocal_rank,
                "r_precision": each.r_precision,
            }
        values = {m: self._averaged(found[m], labels) for m in metrics if m in found}
        if set(metrics) & set(_CLUSTERING):
            values |= self._clustered(query, labels, metrics)
        return {m: values[m] for m in metrics}

    def _tensor(self, value) -> Tensor:
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
        value = value.to(self.device)
        return value.float() if value.is_floating_point() and value.dtype not in checks.DTYPES else value

    def _averaged(self, values: Tensor, labels: Tensor) -> float | list[float]:
        there = ~values.isnan()
        if not (self.avg_of_avgs or self.return_per_class):
            return values[there].mean().item() if there.any() else math.nan
        classes, own = torch.unique(labels, return_inverse=True)
        if not there.any():
            return [math.nan] * len(classes) if self.return_per_class else math.nan
        kept, own = torch.unique(labels[there], return_inverse=True)
        sums = torch.zeros(len(kept), dtype=values.dtype, device=values.device).index_add_(0, own, values[there])
        means = sums / torch.bincount(own, minlength=len(kept))
        return means.tolist() if self.return_per_class else means.mean().item()

    def _clustered(self, query: Tensor, labels: Tensor, metrics: list[str]) -> dict[str, float]:
        try:
            from sklearn import cluster
            from sklearn import metrics as scores
        except ImportError as error:
            raise ImportError("AMI and NMI need scikit-learn: pip install scikit-learn") from error
        count = len(torch.unique(labels))
        if self.kmeans_func is None:
            found = cluster.KMeans(count, n_init=1, max_iter=20, random_state=0).fit_predict(
                query.float().cpu().numpy()
            )
        else:
            found = torch.as_tensor(self.kmeans_func(query, count)).cpu().numpy()
        pair = labels.cpu().numpy(), found
        known = {"AMI": scores.adjusted_mutual_info_score, "NMI": scores.normalized_mutual_info_score}
        return {m: float(f(*pair)) for m, f in known.items() if m in metrics}


__all__ = ["AccuracyCalculator", "Retrieval", "Verification", "retrieval", "roc", "true_accept_rates"]
