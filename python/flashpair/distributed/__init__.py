"""Losses of a batch that several processes hold together; see `Group`.

    loss = flashpair.losses.ClipLoss(group=torch.distributed.group.WORLD)      # or a DeviceMesh dimension, or a Group

The loss is that of the global batch, in rank order, and equal on all ranks; gradients are such that DDP's and FSDP's
averaging makes them those of one process with the whole batch.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {"DistributedError": "ranks", "Exchange": "ranks", "Group": "ranks"}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
