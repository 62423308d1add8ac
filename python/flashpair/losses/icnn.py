"""Inter- and intra-class nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..primitives import mine
from ..request import statistics_dtype
from ..terms import Extreme, Mask, Similarity
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem

_EPSILON = 1e-7


class ICNNLoss(MetricLoss):
    """Near neighbours should be of the own class and close, those of other classes far.

    Over each row's `neighbours` nearest others, sorted, with distances d_il = sqrt(‖x_i - x_l‖² + 1e-6) and c_il = 1
    for the own class; the first k count, all of them find nn_i, the nearest of another class:

        n_il = d_il / nn_i, divided by its row maximum where that is above 1
        sc = 1 - mean_i mean_{l: c=1} n_il,     dc = | mean_i mean_{l: c=0} d_il / max d  + o |,  o = -1 if no c=0 at
        all γ = mean_i (Σ_l c_il) / k  (no gradient),      loss = -log( ((sc + dc) / 2 + γ) / 2 )

    O(B·D) work for the gradient: only the kept distances have one. Embeddings are not normalised. With `ref_emb` the
    neighbours are references, the nearest one included (the authors' code drops it even there).

    Args:
        k: neighbours that count. Default 4; B - 2 where k + 2 >= B, and γ is then 1.
        neighbours: how many are looked at for nn_i, at least k. Default k + 1. At most 64.

    Raises:
        ValueError, TypeError: on a bad number, a distance, a reducer, a miner, or a call without labels.

    Source: Mendez-Ruiz et al., "SuSana Distancia is all you need", 2023, as in the first author's code
    (`modified_score`, whose variance term is commented out). The paper's text was not available to check against.

    Example:
        >>> import torch
        >>> from flashpair.losses import ICNNLoss
        >>> x, labels = torch.tensor([[0.0], [0.1], [3.0], [3.1]]), torch.tensor([0, 0, 1, 1])
        >>> ICNNLoss(k=2)(x, labels) < ICNNLoss(k=2)(x, labels.roll(1))
        tensor(True)
    """

    def __init__(self, k: int = 4, neighbours: int | None = None, **kwargs) -> None:
        if "distance" in kwargs or "reducer" in kwargs:
            raise ValueError(
                "distance and reducer must not be given to ICNNLoss, which is one number with its own distance"
            )
        super().__init__(**kwargs)
        checks.count("k", k)
        if neighbours is not None:
            checks.count("neighbours", neighbours, low=k)
        self.k, self.neighbours = k, neighbours

    def get_default_distance(self):
        return LpDistance(normalize_embeddings=False, power=2)

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.pairs is not None or problem.bounds:
            raise ValueError("indices_tuple must be None for ICNNLoss, which finds its own neighbours; got one")
        problem.reduce([])
        own = problem.y is None
        columns = problem.x.shape[0] if own else problem.y.shape[0]
        small = self.k + 2 >= columns
        k = max(columns - 2, 1) if small else self.k
        wide = min((self.k + 1 if self.neighbours is None else self.neighbours), columns - own)
        k = min(k, wide)
        if wide < 1:
            raise ValueError(f"embeddings must have at least {2 if own else 1} rows to compare with; got {columns}")
        if problem.x.shape[0] == 0:
            return 0.0 * problem.x.sum(dtype=statistics_dtype(problem.x))
        (found,) = mine(
            problem.x, problem.y, [Extreme(Mask.ALL, largest=False, k=wide)],
            exclude=problem.exclude, similarity=Similarity.SQUARED_EUCLIDEAN,
        )  # fmt: skip
        index = found.indices.clamp_min(0)
        rows = torch.arange(index.shape[0], device=index.device)[:, None].expand_as(index)
        squared = pair_similarity(
            problem.x, problem.y, rows.reshape(-1), index.reshape(-1), similarity=Similarity.SQUARED_EUCLIDEAN
        )
        d = (squared.view_as(index) + 1e-6).sqrt()
        labels = problem.labels if own else problem.ref_labels
        same = ((labels[index] == problem.labels[:, None]) & (found.indices >= 0)).to(d.dtype)
        other = ((labels[index] != problem.labels[:, None]) & (found.indices >= 0)).to(d.dtype)
        rival = torch.where(other > 0, d, torch.inf).amin(1, keepdim=True)
        scaled = torch.where(rival < torch.inf, d[:, :k] / (torch.where(rival < torch.inf, rival, 1.0) + _EPSILON), 0.0)
        scaled = scaled / scaled.amax(1, keepdim=True).clamp_min(1)
        same, other, d = same[:, :k], other[:, :k], d[:, :k]
        closeness = 1 - _mean_of_means(same * scaled, same)
        foreign = other * d
        apart = _mean_of_means(foreign / (foreign.amax() + _EPSILON), other)
        apart = (apart - torch.where(other.sum() == 0, 1.0, 0.0)).abs()
        purity = 1.0 if small else (same.sum(1) / k).mean().detach()
        return -torch.log(((closeness + apart) / 2 + purity) / 2)


def _mean_of_means(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows with weight of each row's weighted mean."""
    count = weight.sum(1)
    rows = (count > 0).sum().to(count.dtype)
    return (values.sum(1) / (count + _EPSILON)).sum() / (rows + _EPSILON)
