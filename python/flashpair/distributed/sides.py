"""Rows and columns of S as one rank sees them: its own rows, and every column in turn.

rows        sharded: its own rows             replicated: an even share of them
columns     sharded: gathered, or block by block round the ring             replicated: as they are
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .ranks import Ranks
from .sharded import Sharded, even_sizes, offsets

#: function(block of columns (n, D), first, end) → gradient of the block, or None
Visitor = Callable[[Tensor, int, int], Tensor | None]


class Side:
    """One of the two tensors of a pass over pairs."""

    def __init__(self, value: Tensor, ranks: Ranks) -> None:
        self.value, self.ranks = value, ranks
        self.sharded = isinstance(value, Sharded)
        self.tensor = value.local if self.sharded else value  # what autograd sees
        self.sizes = value.sizes if self.sharded else even_sizes(value.shape[0], ranks.size)
        starts = offsets(self.sizes)
        self.first, self.end = starts[ranks.rank : ranks.rank + 2]

    # --- as rows ------------------------------------------------------------------------------------------------------

    def own(self) -> Tensor:
        """(b, D) this rank's rows."""
        return self.tensor if self.sharded else self.tensor[self.first : self.end]

    def gradient_of_own(self, gradient: Tensor) -> Tensor:
        """Gradient of `tensor` from that of this rank's rows."""
        return gradient * self.ranks.size if self.sharded else self.ranks.gather(gradient, self.sizes)

    # --- as columns ---------------------------------------------------------------------------------------------------

    def visit(self, visitor: Visitor) -> Tensor | None:
        """Calls `visitor` on every column; returns the gradient of `tensor` if it returns those of the blocks."""
        if self.sharded and self.value.streams():
            gradient = self._round(visitor)
            return None if gradient is None else gradient * self.ranks.size
        whole = self.value.data_of_all() if self.sharded else self.tensor
        gradient = visitor(whole, 0, whole.shape[0])
        if gradient is None:
            return None
        if self.sharded:
            return self.ranks.scatter_total(gradient, self.sizes) * self.ranks.size
        return self.ranks.total(gradient)

    def _round(self, visitor: Visitor) -> Tensor | None:
        """Once round the ring: blocks go on while they are worked on; their gradients travel along and end at home."""
        ranks, starts = self.ranks, offsets(self.sizes)
        block, carried = self.tensor.detach(), None
        for step in range(ranks.size):
            owner, before = (ranks.rank - step) % ranks.size, (ranks.rank - step - 1) % ranks.size
            coming = None
            if step < ranks.size - 1:
                coming = ranks.pass_on(block, (self.sizes[before], *block.shape[1:]), tag=0)
            gradient = visitor(block, starts[owner], starts[owner + 1])
            if gradient is not None:
                if carried is not None:
                    gradient += carried.wait()
                carried = ranks.pass_on(gradient, (self.sizes[before], *gradient.shape[1:]), tag=1)
            if coming is not None:
                block = coming.wait()
        return None if carried is None else carried.wait()
