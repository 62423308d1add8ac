"""Global contrastive losses: each sample's normaliser is averaged over all batches, not taken from one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import current
from ..pairs import pair_similarity
from ..primitives import pair_reduce
from ..terms import Axis, Mask, Reduction, Term
from .arguments import check_matched, poisoned
from .group import InGroup
from .places import load_whole_state, read, shares_of, whole_state, write
from .two_views import TwoViews, nothing

_UNSEEN = -math.inf  # log of the average of nothing


class SogCLRLoss(InGroup, nn.Module):
    """Contrastive loss whose per-sample normaliser is a moving average over the batches, so that small batches do.

        views:   g_i = mean_n e^{s_in / T}, n the 2 (B - 1) views of other samples
                 l_i = (g_i / u_i) Σ_n p_in s_in - s_i+
        towers:  g_i = mean_{j != i} e^{h_ij / T}, h_ij = s_ij - s_ii
                 l_i = (g_i / u_i) Σ_j p_ij h_ij
        u_i <- (1 - γ) u_i + γ g_i,   p_i· the softmax over the negatives, g / u and p without gradient
        loss:    views: mean of l over the samples, both views added;   towers: mean of both directions

    The gradient is that of T log u_i; the value is no bound of anything. A sample that is met for the first time has
    u_i = g_i. The averages are kept as logarithms, so no temperature overflows.

    Args:
        num_samples: of the whole training set.
        temperature: T > 0. Default 0.1.
        gamma: γ in (0, 1], weight of the new value. Default 0.9.
        towers: the two inputs come from different towers (images and texts): only pairs across are compared. Default:
            two views of one tower, all pairs.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: the batch is that of all its
            ranks, each of which keeps the averages of num_samples / ranks samples. Default: none.

    Raises:
        TypeError, ValueError: on a bad number; at the call also on an index outside of [0, num_samples). An index must
            not occur twice in a batch.

    Source: Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
    Performance", ICML 2022, algorithm 1; LibAUC's GCLoss. There a whole batch begins anew where all of its averages are
    0, and with towers the sum is not divided by B - 1.

    Example:
        >>> import torch
        >>> from flashpair.losses import SogCLRLoss
        >>> loss_of = SogCLRLoss(num_samples=100)
        >>> loss_of(torch.eye(3), torch.eye(3), index=torch.tensor([4, 17, 99]))
        tensor(-2.)
    """

    log_average: Tensor  # (num_samples or this rank's share, 2) log u of the first and the second input; -inf: unseen
    row_groups = (("first", "second", "index"),)

    def __init__(
        self, num_samples: int, temperature: float = 0.1, gamma: float = 0.9, towers: bool = False, group=None
    ) -> None:
        super().__init__(group=group)
        checks.count("num_samples", num_samples)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("gamma", gamma, low=0.0, high=1.0, open_low=True)
        self.num_samples, self.temperature, self.gamma, self.towers = num_samples, temperature, gamma, towers
        self.shares, own = shares_of(num_samples, self.group)
        self.register_buffer("log_average", torch.full((own, 2), _UNSEEN))

    def forward(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch; moves the averages of its samples while training.

        Args:
            first, second: (B, D) two views, or images and texts; row i of both is of one sample. Normalised here.
            index: (B,) int64, which samples of the training set.

        Returns:
            0-d loss in float32 (float64 for float64).
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"first": first, "second": second, "index": index})
        check_matched(first, second, ("first", "second"))
        checks.indices("index", index, first.shape[0])
        checks.same_device("first", first, index=index)
        _in_range(index, self.num_samples)
        if first.shape[0] == 0:
            return nothing(first, second)
        temperatures = self.temperatures(index)
        run = self._of_towers if self.towers else self._of_views
        log_g, mean, positive = run(first, second, temperatures)
        log_u = self._average(log_g, index)
        ratio = torch.exp(torch.where(log_g == _UNSEEN, _UNSEEN, log_g - log_u))
        losses = ratio * (mean - positive) if self.towers else ratio * mean - positive
        self.after(index, temperatures, log_u, (ratio * (mean - positive if self.towers else mean)).detach())
        total = losses.mean(0).sum()
        return poisoned(total / 2 if self.towers else total, first, second)

    def temperatures(self, index: Tensor) -> Tensor | float:
        """A number, or (B, 2) of each sample's first and second input."""
        return self.temperature

    def after(self, index: Tensor, temperatures, log_u: Tensor, weighted: Tensor) -> None:
        """What else is learned from a batch: `weighted` (B, 2) is (g / u) Σ p s, or h with towers."""

    def _of_views(self, first: Tensor, second: Tensor, temperatures) -> tuple[Tensor, Tensor, Tensor]:
        """log g, Σ p s and the positive's similarity, (B, 2) each."""
        views = TwoViews(first, second)
        scale = 1 / temperatures
        if isinstance(scale, Tensor):
            scale = scale[views.sample, views.side]
        terms = [
            Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale),
            Term(Reduction.SOFTMAX_MEAN, mask=Mask.DIFFERENT, scale=scale, detach_weights=True),
            Term(Reduction.SUM, mask=Mask.SAME),
        ]
        lse, mean, positive = (views.table(v) for v in views.reduce(*terms))
        return lse.detach() - math.log(max(2 * (views.rows - 1), 1)), mean, positive

    def _of_towers(self, first: Tensor, second: Tensor, temperatures) -> tuple[Tensor, Tensor, Tensor]:
        rows, labels = first.shape[0], torch.arange(first.shape[0], device=first.device)
        scales = 1 / temperatures
        of_side = lambda k: scales[:, k].contiguous() if isinstance(scales, Tensor) else scales  # noqa: E731
        terms = [
            Term(kind, mask=Mask.DIFFERENT, axis=axis, scale=of_side(int(axis)), detach_weights=detach)
            for axis in Axis
            for kind, detach in ((Reduction.LOGSUMEXP, False), (Reduction.SOFTMAX_MEAN, True))
        ]
        pairs = {"labels": labels, "ref_labels": labels, "normalize": True}
        found = pair_reduce(first, second, terms, **pairs)
        own = pair_similarity(first, second, labels, labels, normalize=True)
        scales = torch.stack([torch.as_tensor(of_side(k), dtype=own.dtype, device=own.device) for k in (0, 1)], -1)
        lse, mean = torch.stack(found[0::2], 1).detach(), torch.stack(found[1::2], 1)
        positive = torch.stack([own, own], 1)
        return lse - positive.detach() * scales - math.log(max(rows - 1, 1)), mean, positive

    @torch.no_grad()
    def _average(self, log_g: Tensor, index: Tensor) -> Tensor:
        """(B, 2) log u after this batch, which is kept while training; views share one average."""
        old = read(self.log_average, self.shares, index).to(log_g.dtype)
        faded = old + (math.log1p(-self.gamma) if self.gamma < 1 else _UNSEEN)
        moved = torch.logaddexp(faded, log_g + math.log(self.gamma))
        log_u = torch.where(old == _UNSEEN, log_g, moved)
        if self.training:
            kept = log_u
            if not self.towers:
                kept = (torch.logsumexp(log_u, 1, keepdim=True) - math.log(2)).expand(-1, 2)
            write(self.log_average, self.shares, index, kept)
        return log_u

    def whole_state(self) -> dict[str, Tensor]:
        """The state of all samples, equal on each rank: what `load_whole_state` takes with any number of ranks."""
        return whole_state(self.group, self.shares, **dict(self.named_buffers()))

    def load_whole_state(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's part of what `whole_state` gave.

        Raises:
            ValueError: on a state that does not fit, before anything changes.
        """
        load_whole_state(self.group, self.shares, state, **dict(self.named_buffers()))


class ISogCLRLoss(SogCLRLoss):
    """`SogCLRLoss` with a learned temperature for each sample.

        T_i minimises  T log u_i + T ρ:      d_i = log u_i + ρ - (g_i / u_i) Σ_n p_in s_in / T_i
        m_i <- (1 - β) m_i + β d_i,          T_i <- clip(T_i - η m_i, min, max)

    (with towers h for s, a temperature for each of the two sides.)

    Args:
        num_samples, gamma, towers, group: see `SogCLRLoss`.
        temperature: initial T. Default 0.1.
        temperature_min, temperature_max: bounds of T. Default 0.05 and 0.7.
        rho: ρ. Default 0.3.
        step: η. Default 0.01.
        momentum: β in (0, 1], weight of the new gradient. Default 0.9.

    Source: Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic
    Temperature Individualization", ICML 2023, algorithm 1; LibAUC's GCLoss with enable_isogclr.

    Example:
        >>> import torch
        >>> from flashpair.losses import ISogCLRLoss
        >>> loss_of = ISogCLRLoss(num_samples=100)
        >>> _ = loss_of(torch.eye(3), torch.eye(3), index=torch.tensor([4, 17, 99]))
        >>> loss_of.temperature_of[4].tolist() != [0.1, 0.1]
        True
    """

    temperature_of: Tensor  # (num_samples or this rank's share, 2) T of the first and the second input
    gradient_of: Tensor  # (…, 2) m

    def __init__(
        self,
        num_samples: int,
        temperature: float = 0.1,
        gamma: float = 0.9,
        towers: bool = False,
        temperature_min: float = 0.05,
        temperature_max: float = 0.7,
        rho: float = 0.3,
        step: float = 0.01,
        momentum: float = 0.9,
        group=None,
    ) -> None:
        super().__init__(num_samples, temperature, gamma, towers, group)
        checks.number("temperature_min", temperature_min, low=0.0, open_low=True, high=temperature)
        checks.number("temperature_max", temperature_max, low=temperature)
        checks.number("rho", rho)
        checks.number("step", step, low=0.0)
        checks.number("momentum", momentum, low=0.0, high=1.0, open_low=True)
        self.temperature_min, self.temperature_max = temperature_min, temperature_max
        self.rho, self.step, self.momentum = rho, step, momentum
        self.register_buffer("temperature_of", torch.full_like(self.log_average, temperature))
        self.register_buffer("gradient_of", torch.zeros_like(self.log_average))

    def temperatures(self, index: Tensor) -> Tensor:
        return read(self.temperature_of, self.shares, index)

    @torch.no_grad()
    def after(self, index: Tensor, temperatures: Tensor, log_u: Tensor, weighted: Tensor) -> None:
        if not self.training:
            return
        new = log_u + self.rho - weighted / temperatures
        if not self.towers:
            new = new.mean(1, keepdim=True).expand(-1, 2)
        gradient = (1 - self.momentum) * read(self.gradient_of, self.shares, index) + self.momentum * new
        moved = (temperatures - self.step * gradient).clamp(self.temperature_min, self.temperature_max)
        write(self.gradient_of, self.shares, index, gradient)
        write(self.temperature_of, self.shares, index, moved)


def _in_range(index: Tensor, samples: int) -> None:
    if index.numel() == 0 or torch.compiler.is_compiling():
        return
    allowed = (index >= 0) & (index < samples)
    if index.device.type != "cpu":
        torch._assert_async(allowed.all())
    elif not bool(allowed.all()):
        raise ValueError(f"index must be in [0, num_samples={samples}); got {int(index[~allowed][0])}")
