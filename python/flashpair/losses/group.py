"""The `group=` of losses and miners: one loss of the batches of several processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch import distributed as dist

from .. import checks
from ..distributed.agreement import options_of
from ..distributed.ranks import Group, as_group
from ..distributed.sharded import Sharded, over_ranks
from ..miners.selection import may_be_global
from .arguments import check_matched


class InGroup:
    """Mixin of the modules that take `group=`."""

    #: Names of tensors that must have equal numbers of rows on each rank; None: all of them.
    row_groups: tuple[tuple[str, ...], ...] | None = (("embeddings", "labels"), ("ref_emb", "ref_labels"))

    def __init__(self, *args, group=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.group = as_group(group)

    def over_group(
        self,
        function: Callable,
        tensors: dict[str, Tensor | None] | Callable[[], dict[str, Tensor | None]],
        check: Callable | None = None,
        **kwargs,
    ):
        """`function` of the tensors of all ranks, see `flashpair.distributed.sharded.over_ranks`."""
        name, indices_tuple = type(self).__name__, kwargs.get("indices_tuple")
        options = options_of(self)
        if indices_tuple is not None:
            options += f"; indices_tuple {_shape_of(indices_tuple)}"

        def check_all() -> None:
            if not may_be_global(indices_tuple):
                raise ValueError(
                    f"indices_tuple of {name}(group=...) must be of the global batch: give the miner the group too"
                )
            if check is not None:
                check()

        run = lambda **given: function(**given, **kwargs)  # noqa: E731
        return over_ranks(self.group, name, options, run, tensors, self.row_groups, check_all)


def _shape_of(indices_tuple) -> str:
    """What ranks can compare of index tuples without reading them."""
    if isinstance(indices_tuple, (tuple, list)):
        return str([getattr(index, "shape", None) for index in indices_tuple])
    rows = getattr(indices_tuple, "positives", None)
    return f"{type(indices_tuple).__name__} {None if rows is None else rows.shape}"


def with_value_of(loss: Tensor, shown: Tensor) -> Tensor:
    """The gradient of one number with the value of another."""
    return loss + (shown - loss).detach()


def own_rows(features: Tensor) -> slice:
    """Rows of a global batch that this process brought."""
    return slice(*features.range) if isinstance(features, Sharded) else slice(None)


class OpenClipRanks(InGroup):
    """open_clip's `rank=` and `world_size=`: all processes, and the value that open_clip logs on each."""

    row_groups = (("image_features", "text_features"),)

    def __init__(self, rank: int, world_size: int, group, **exchange) -> None:
        checks.count("world_size", world_size)
        checks.count("rank", rank, low=0, high=world_size - 1)
        if group is not None and world_size > 1:
            raise ValueError(f"group and world_size exclude each other; got a group and world_size={world_size}")
        if world_size > 1:
            group = Group(**exchange)
        super().__init__(group=group)
        self.rank, self.world_size = rank, world_size

    def over_features(self, function: Callable, image_features: Tensor, text_features: Tensor, **kwargs):
        """`function` of the features of all ranks."""

        def check() -> None:
            self.check_ranks()
            check_matched(image_features, text_features)

        features = {"image_features": image_features, "text_features": text_features}
        return self.over_group(function, features, check, **kwargs)

    def answer(self, result, output_dict: bool, return_stats: bool):
        """What open_clip's call returns of a loss, or of `(loss, statistics)`."""
        loss, *extra = result if return_stats else (result,)
        named = {"contrastive_loss": loss} if output_dict else loss
        return (named, *extra) if return_stats else named

    def check_ranks(self) -> None:
        """The ranks that were named are those of the process group.

        Raises:
            ValueError: naming the argument.
        """
        if self.world_size > 1:
            for name, value, real in (
                ("world_size", self.world_size, dist.get_world_size()),
                ("rank", self.rank, dist.get_rank()),
            ):
                if value != real:
                    raise ValueError(f"{name} must be that of the process group, {real}; got {value}")
