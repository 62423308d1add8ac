"""Checkpoints of class heads by class, which any number of ranks can take up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .head import ClassHead, class_range

_KEYS = ("num_classes", "first_class", "classes", "rest")


def save_shard(head: ClassHead, first_class: int | None = None, num_classes: int | None = None) -> dict:
    """What a head holds of its classes: weights, bias and the state of its fused optimiser, all by class, and the rest.

    Args:
        head: its weights are the classes from `first_class` on.
        first_class: default: where the head's own classes begin, 0 without a group.
        num_classes: of all ranks. Default: those of the head.

    Returns:
        {"num_classes", "first_class", "classes": {name: (n, ...) tensor}, "rest": {name: tensor}}, for `torch.save`.
        Copies on the CPU.

    Example:
        >>> from flashpair.heads import ClassHead, load_shard, reshard, save_shard
        >>> shards = reshard([save_shard(ClassHead(num_classes=5, embedding_size=3))], world_size=2)
        >>> [tuple(shard["classes"]["weight"].shape) for shard in shards]
        [(3, 3), (2, 3)]
        >>> load_shard(ClassHead(num_classes=2, embedding_size=3), shards[1])
    """
    checks.count("num_classes", head.num_classes if num_classes is None else num_classes)
    classes, rest = {}, {}
    by_class = ("weight", "bias", "class_weight") if head.group is None else ("weight",)  # the rest is whole there
    for name, value in head.state_dict().items():
        (classes if name in by_class else rest)[name] = value
    for name, value in _optimizer_rows(head).items():
        classes[f"optimizer.{name}"] = value
    copied = lambda state: {name: value.detach().cpu().clone() for name, value in state.items()}  # noqa: E731
    return {
        "num_classes": head.num_classes if num_classes is None else num_classes,
        "first_class": head.classes.start if first_class is None else first_class,
        "classes": copied(classes),
        "rest": copied(rest),
    }


def load_shard(head: ClassHead, shard: dict) -> None:
    """Put a shard into a head that holds as many classes; everything is checked before anything changes.

    The learning rate and the other numbers of an optimiser are not part of a shard.

    Raises:
        ValueError: where the shard does not fit, naming what was found and what is needed.
    """
    check_shard(shard)
    targets: dict[str, Tensor] = {}
    own = head.state_dict()
    for name, value in {**shard["classes"], **shard["rest"]}.items():
        if name.startswith("optimizer."):
            if head.fused is None:
                continue
            found = head.fused.rows_state(head.weight).get(name.removeprefix("optimizer."))
        else:
            found = own.get(name)
        if found is None:
            raise ValueError(f"the shard holds {name!r}, which the head does not have")
        if found.shape != value.shape:
            raise ValueError(f"{name} must have shape {tuple(found.shape)} to fit the head; got {tuple(value.shape)}")
        targets[name] = found
    missing = set(own) - set(targets)
    if missing:
        raise ValueError(f"the shard lacks {', '.join(sorted(missing))}")
    with torch.no_grad():
        for name, value in {**shard["classes"], **shard["rest"]}.items():
            if name in targets:
                targets[name].copy_(value)


def reshard(shards: Sequence[dict], world_size: int) -> list[dict]:
    """The shards of all ranks, cut for another number of ranks as `class_range` cuts the classes.

    Args:
        shards: of all ranks, in any order.
        world_size: number of ranks that take them up, at most one per class.

    Returns:
        One shard per rank, in the order of the ranks.

    Raises:
        ValueError: where the shards are not all classes exactly once, or do not agree with each other.
    """
    checks.count("world_size", world_size)
    if not shards:
        raise ValueError("shards must hold at least one shard; got none")
    for shard in shards:
        check_shard(shard)
    ordered = sorted(shards, key=lambda shard: shard["first_class"])
    total = ordered[0]["num_classes"]
    if world_size > total:
        raise ValueError(f"world_size must be at most the number of classes, {total}; got {world_size}")
    next_class = 0
    for shard in ordered:
        if shard["num_classes"] != total:
            raise ValueError(f"all shards must be of {total} classes; got one of {shard['num_classes']}")
        if shard["first_class"] != next_class:
            raise ValueError(f"a shard must begin at class {next_class}; the next one begins at {shard['first_class']}")
        for name, value in ordered[0]["classes"].items():
            other = shard["classes"].get(name)
            if other is None or other.shape[1:] != value.shape[1:] or other.dtype != value.dtype:
                raise ValueError(f"the shard of class {next_class} does not agree with the first in {name!r}")
        if set(shard["classes"]) != set(ordered[0]["classes"]):
            raise ValueError(f"the shard of class {next_class} holds more than the first")
        next_class += shard["classes"]["weight"].shape[0]
    if next_class != total:
        raise ValueError(f"the shards must hold all {total} classes; they end at class {next_class}")
    whole = {name: torch.cat([shard["classes"][name] for shard in ordered]) for name in ordered[0]["classes"]}
    cut = []
    for rank in range(world_size):
        own = class_range(total, rank, world_size)
        part = {name: value[own.start : own.stop].clone() for name, value in whole.items()}
        cut.append({"num_classes": total, "first_class": own.start, "classes": part, "rest": dict(ordered[0]["rest"])})
    return cut


def check_shard(shard: dict) -> None:
    """What `save_shard` returned, with equally many rows everywhere.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(shard, dict) or set(shard) != set(_KEYS) or "weight" not in shard["classes"]:
        raise ValueError(
            f"a shard must be what save_shard returned, with {', '.join(_KEYS)}; got {type(shard).__name__}"
        )
    rows = shard["classes"]["weight"].shape[0]
    for name, value in shard["classes"].items():
        if value.shape[0] != rows:
            raise ValueError(
                f"{name} must have a row for each of the {rows} classes of its shard; got {value.shape[0]}"
            )


def _optimizer_rows(head: ClassHead) -> dict[str, Tensor]:
    if head.fused is None:
        return {}
    state = head.fused.rows_state(head.weight)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
