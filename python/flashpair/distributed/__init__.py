"""Losses of a batch that several processes hold together; see `Group`.

    loss = flashpair.losses.ClipLoss(group=torch.distributed.group.WORLD)      # or a DeviceMesh dimension, or a Group

The loss is that of the global batch, in rank order, and equal on all ranks; gradients are such that DDP's and FSDP's
averaging makes them those of one process with the whole batch.
"""

from __future__ import annotations

from .ranks import DistributedError, Exchange, Group

__all__ = ["DistributedError", "Exchange", "Group"]
