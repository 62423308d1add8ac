"""AdaMEOW: the weight of a pair is learned from both of its samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ... import backend_cpu, checks, rows_cpu
from ...distributed.sharded import all_rows
from ...pairs import pair_similarity
from ...panels import product
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ..arguments import inverse_temperature
from ..two_views import MatchedLoss


class PairGate(torch.autograd.Function):
    """(b, n) Σ_h v_h tanh(p_hi + q_hj), one hidden unit at a time: no (b, n, hidden) tensor, forward or backward.

    By PyTorch, and on a CPU by an operator. Units come first, p (hidden, b) and q (hidden, n): with a stride between
    the columns the sum takes thrice as long.
    """

    @staticmethod
    def forward(ctx, p: Tensor, q: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(p, q, v)
        ctx.native = backend_cpu.at_hand(p, q, v)
        if ctx.native:
            return rows_cpu.pair_gate(p, q, v)
        total, unit = p.new_zeros(2, p.shape[1], q.shape[1])
        for h in range(len(v)):
            total.addcmul_(_unit(p, q, h, unit), v[h])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        p, q, v = ctx.saved_tensors
        if ctx.native:
            return rows_cpu.pair_gate_slopes(p, q, v, grad)
        dp, dq, dv = torch.empty_like(p), torch.empty_like(q), torch.empty_like(v)
        grad = grad.contiguous()
        unit, slope = torch.empty_like(grad), torch.empty_like(grad)
        for h in range(len(v)):
            _unit(p, q, h, unit)
            dv[h] = torch.dot(grad.view(-1), unit.view(-1))
            torch.ops.aten.tanh_backward.grad_input(grad, unit, grad_input=slope)
            torch.sum(slope, 1, out=dp[h]), torch.sum(slope, 0, out=dq[h])
        return dp.mul_(v[:, None]), dq.mul_(v[:, None]), dv


def _unit(p: Tensor, q: Tensor, h: int, out: Tensor) -> Tensor:
    return torch.add(p[h, :, None], q[h, None], out=out).tanh_()


class AdaMEOWLoss(MatchedLoss):
    """InfoNCE whose pairs have weights that a small network learns.

        w_ij = σ( v · tanh(W (a_i + b_j) + c) + d )  in (0, 1)
        loss = mean_i [ log Σ_j w_ij e^{<a_i, b_j> / T}  -  <a_i, b_i> / T ]

    of unit vectors a (first) and b (second). The pair (i, i) is in the sum with its weight, so the loss may be
    negative; one sample alone gives mean log w. W a and W b are made once, a panel of pairs takes the tanh of one
    hidden unit at a time, and says its part of the gradients at once.

    Args:
        embedding_size: D.
        temperature: T, positive number or 0-d tensor (learnable). Default 0.4.
        hidden_size: of the network. Default 16.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    The parameters are those of `hidden` (W, c) and `output` (v, d), two `nn.Linear`.

    Raises:
        TypeError, ValueError: on a size or a temperature that is not positive.

    Source: Yu et al., "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and Weighted Negative Samples"
    (MEOW), SDM 2023; jianxiangyu/MEOW, code_adameow/module/adameow.py. Assumed: MEOW's default temperature.

    Example:
        >>> import torch
        >>> from flashpair.losses import AdaMEOWLoss
        >>> loss, x = AdaMEOWLoss(embedding_size=3, temperature=1.0), torch.eye(3)
        >>> _ = [p.data.zero_() for p in loss.parameters()]  # every weight is 1/2
        >>> round(loss(x, x).item(), 4)  # log((e + 2) / 2) - 1
        -0.1417
    """

    def __init__(
        self, embedding_size: int, temperature: float | Tensor = 0.4, hidden_size: int = 16, group=None
    ) -> None:
        super().__init__(group=group)
        checks.count("embedding_size", embedding_size)
        checks.temperature("temperature", temperature)
        checks.count("hidden_size", hidden_size)
        self.temperature = temperature
        self.hidden, self.output = nn.Linear(embedding_size, hidden_size), nn.Linear(hidden_size, 1)

    def check(self, first: Tensor, second: Tensor) -> None:
        super().check(first, second)
        checks.same_device("first", first, **{"the loss's parameters": self.hidden.weight})
        if first.shape[1] != self.hidden.in_features:
            raise ValueError(f"first must have embedding_size={self.hidden.in_features} features; got {first.shape[1]}")

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        scale, dtype = inverse_temperature(self.temperature), statistics_dtype(first)
        weight = self.hidden.weight.to(dtype)
        unit = lambda rows: F.normalize(all_rows(rows).to(dtype), dim=1, eps=1e-12)  # noqa: E731
        p = product(unit(first), weight.T) + self.hidden.bias.to(dtype)  # (B, hidden)
        q = product(weight, unit(second).T)  # (hidden, B)
        v, d = self.output.weight[0].to(dtype), self.output.bias.to(dtype)

        def weighted(panel: RowPanel, p: Tensor, q: Tensor, v: Tensor, d: Tensor, scale: Tensor) -> list[Tensor]:
            gate = PairGate.apply(p.T.contiguous(), q[:, panel.column], v)
            return [(scale * panel.s + F.logsigmoid(gate + d)).logsumexp(1).sum()]

        shared = [q, v, d, torch.as_tensor(scale, dtype=dtype, device=first.device)]
        (rivals,) = row_reduce(first, second, weighted, rows=[p], shared=shared, totals=1, normalize=True, copies=12)
        index = torch.arange(first.shape[0], device=first.device)
        positive = scale * pair_similarity(first, second, index, index, normalize=True)
        return rivals / first.shape[0] - positive.mean()
