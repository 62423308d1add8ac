"""Optimisers whose step happens in the backward pass of a head, on a block of class weights at a time: the gradient of
the weights, as large as the weights, never exists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import current


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimisers that a head calls in its backward pass; see `ClassHead.fuse`.

    Parameter groups are torch's, so learning-rate schedulers and `state_dict` work as usual. `step` has nothing left to
    do. Each backward pass is one step: gradients are not accumulated over several. Where losses are scaled (mixed
    precision), `grad_scale`, a number or a 0-d tensor, is what gradients are divided by.
    """

    grad_scale: float | Tensor = 1.0

    def step(self, closure=None):
        """Nothing: the weights were updated in the backward pass.

        Raises:
            RuntimeError: where a parameter has a gradient, which this optimiser has not seen.
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(parameter.shape)} has a gradient, which {type(self).__name__} "
                        "does not apply: its steps happen in the backward pass of a head that was given it by `fuse`"
                    )
        return loss

    def group_of(self, parameter: Tensor) -> dict:
        """The parameter group that holds `parameter`.

        Raises:
            ValueError: if none does.
        """
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                return group
        raise ValueError(f"the optimizer does not hold the weights of the head, shape {tuple(parameter.shape)}")

    def update(self, parameter: nn.Parameter, classes: slice | Tensor, gradient: Tensor, finite: Tensor) -> None:
        """One step on some rows of a parameter (C, D).

        Args:
            parameter: as given to the constructor.
            classes: the rows, a slice or (S,) int64 without repetition.
            gradient: (S, D); may be overwritten.
            finite: () bool; nothing changes where False.
        """
        if finite.device.type == "cpu" and not bool(finite):
            return
        rows = _Rows(classes, None if finite.device.type == "cpu" else finite)
        if isinstance(self.grad_scale, Tensor) or self.grad_scale != 1.0:
            gradient = gradient.div_(self.grad_scale)
        self._update(self.group_of(parameter), parameter, rows, gradient)

    def _update(self, group: dict, parameter: nn.Parameter, rows: _Rows, gradient: Tensor) -> None:
        raise NotImplementedError

    def rows_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State with one row per class; made on first use."""
        raise NotImplementedError


class _Rows:
    """Reads and writes some rows of tensors whose first dimension is the classes."""

    def __init__(self, classes: slice | Tensor, finite: Tensor | None) -> None:
        self.classes, self.finite = classes, finite

    def read(self, whole: Tensor) -> Tensor:
        """A copy of the rows."""
        part = whole[self.classes]
        return part.clone() if isinstance(self.classes, slice) else part

    def write(self, whole: Tensor, value: Tensor) -> None:
        """Replace the rows."""
        if self.finite is not None:
            value = torch.where(self.finite, value, whole[self.classes])
        if isinstance(self.classes, slice):
            whole[self.classes].copy_(value)
        else:
            whole.index_copy_(0, self.classes, value)


class FusedSGD(FusedOptimizer):
    """SGD with momentum whose step happens in the backward pass of a head.

        g ← g + λ w        m ← μ m + g        w ← w - η (g + μ m with `nesterov`, else m)

    On all classes it is `torch.optim.SGD`; with sampled classes the others keep weights and momentum.

    Args:
        params: the class weights.
        lr: η >= 0.
        momentum: μ >= 0. Default 0.
        weight_decay: λ >= 0. Default 0.
        nesterov: needs momentum. Default False.

    Raises:
        TypeError, ValueError: on a bad number, naming it.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
    Partial FC", CVPR 2022 (the row-sparse step); the fusion into the backward pass is this library's.

    Example:
        >>> import torch
        >>> from flashpair.heads import ClassHead, FusedSGD
        >>> head = ClassHead(num_classes=100, embedding_size=4)
        >>> head.fuse(FusedSGD([head.weight], lr=0.1, momentum=0.9))
        >>> before = head.weight.detach().clone()
        >>> head(torch.randn(2, 4, requires_grad=True), torch.tensor([0, 1])).backward()
        >>> head.weight.grad is None, bool((head.weight != before).any())
        (True, True)
    """

    def __init__(
        self, params, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            checks.number(name, value, low=0.0)
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0; got momentum=0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def rows_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.group_of(parameter)["momentum"] == 0:
            return {}
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state

    def _update(self, group, parameter, rows, gradient) -> None:
        weights = rows.read(parameter)
        if group["weight_decay"]:
            gradient = gradient.add_(weights, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = self.rows_state(parameter)["momentum_buffer"]
            momentum = rows.read(buffer).mul_(group["momentum"]).add_(gradient)
            gradient = gradient.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
            rows.write(buffer, momentum)
        rows.write(parameter, weights.sub_(group["lr"] * gradient))


class FusedAdamW(FusedOptimizer):
    """AdamW whose step happens in the backward pass of a head.

        w ← (1 - η λ) w    m ← β₁ m + (1 - β₁) g    v ← β₂ v + (1 - β₂) g²
        w ← w - η m / (1 - β₁^t) / (sqrt(v / (1 - β₂^t)) + ε)

    On all classes it is `torch.optim.AdamW`. With sampled classes each class has its own step count t: it sees AdamW on
    the steps in which it took part, and nothing of it changes in others.

    Args:
        params: the class weights.
        lr: η >= 0. Default 1e-3.
        betas: β₁, β₂ in [0, 1). Default (0.9, 0.999).
        eps: ε >= 0. Default 1e-8.
        weight_decay: λ >= 0. Default 0.01.

    Raises:
        TypeError, ValueError: on a bad number, naming it.

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.

    Example:
        >>> import torch
        >>> from flashpair.heads import ClassHead, FusedAdamW
        >>> head = ClassHead(num_classes=100, embedding_size=4)
        >>> head.fuse(FusedAdamW([head.weight]))
        >>> head(torch.randn(2, 4), torch.tensor([0, 1])).backward()
        >>> head.weight.grad is None
        True
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            checks.number(name, value, low=0.0)
        for k, beta in enumerate(betas):
            checks.number(f"betas[{k}]", beta, low=0.0, high=1.0)
            if beta == 1:
                raise ValueError(f"betas[{k}] must be below 1; got {beta}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def rows_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(parameter.shape[0], dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _update(self, group, parameter, rows, gradient) -> None:
        state = self.rows_state(parameter)
        first, second = group["betas"]
        steps = rows.read(state["step"]).add_(1)
        mean = rows.read(state["exp_avg"]).lerp_(gradient, 1 - first)
        square = rows.read(state["exp_avg_sq"]).mul_(second).addcmul_(gradient, gradient, value=1 - second)
        for name, value in (("step", steps), ("exp_avg", mean), ("exp_avg_sq", square)):
            rows.write(state[name], value)
        count = steps.double()[:, None]
        by_mean = (group["lr"] / (1 - first**count)).to(mean.dtype)
        by_square = (1 - second**count).sqrt().to(square.dtype)
        denominator = square.sqrt_().div_(by_square).add_(group["eps"])
        weights = rows.read(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        rows.write(parameter, weights.sub_(mean.div_(denominator).mul_(by_mean)))


class HeadUpdate:
    """A `WeightUpdate`: one optimiser on the weights of one head, over all or selected classes."""

    def __init__(self, optimizer: FusedOptimizer, weight: nn.Parameter, selected: Tensor | None = None) -> None:
        self.optimizer, self.weight, self.selected = optimizer, weight, selected
        self.ranks = current()

    def agreed(self, finite: Tensor) -> Tensor:
        """The same answer on all ranks; a rank that is gone raises here, before any weight changes."""
        return finite if self.ranks is None else self.ranks.total((~finite).float()) == 0

    def step(self, classes: slice | Tensor, gradient: Tensor, finite: Tensor) -> None:
        """One step on some rows."""
        self.optimizer.update(self.weight, classes, gradient.to(self.weight.dtype), finite)
