"""Large batches through encoders that do not fit: representations first, the loss once, the encoders again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map

from . import checks

_BUCKET_BYTES = 1 << 27  # gradients averaged at a time


class GradientCache:
    """One step of any loss on a batch that the encoders see in chunks, with the gradients of the whole batch.

        1. representations of each chunk, without a graph          2. the loss of all of them, and its gradient in each
        3. each chunk again, with a graph, backward from its gradient

    Memory of the encoders is that of one chunk; they run forward twice. Random numbers (dropout) of the second run are
    those of the first; running statistics of batch normalisation move once. Under `torch.autocast`, call it inside of
    the context. Encoders wrapped in DistributedDataParallel exchange their gradients once, at the end; FSDP2 modules
    (`fully_shard`) with the last chunk of each encoder.

    Args:
        loss: called as `loss(*representations, **kwargs)`; with `group=` it is that of all ranks.
        encoders: one callable for each input, mapping a chunk of it to representations (rows, D). The same one may
            stand for several inputs.
        chunk_size: rows of an input that an encoder sees at a time.
        modules: what holds the encoders' parameters, where the encoders are no modules themselves (functions, methods):
            whose gradient exchange waits, and whose batch normalisation moves once. Default: encoders that are modules.
        scaler: a `torch.amp.GradScaler` for float16; its `step` and `update` stay with the caller. Default: none.

    Raises:
        TypeError, ValueError: on bad arguments, naming them.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.

    Example:
        >>> import torch
        >>> from flashpair import GradientCache
        >>> from flashpair.losses import ClipLoss
        >>> image, text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> step = GradientCache(ClipLoss(), [image, text], chunk_size=2)
        >>> loss = step(torch.randn(6, 8), torch.randn(6, 6), logit_scale=10.0)
        >>> image.weight.grad.shape, loss.requires_grad
        (torch.Size([4, 8]), False)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        encoders: Sequence[Callable],
        chunk_size: int,
        *,
        modules: Sequence[nn.Module] | None = None,
        scaler=None,
    ) -> None:
        checks.count("chunk_size", chunk_size)
        if not callable(loss):
            raise TypeError(f"loss must be callable; got {type(loss).__name__}")
        if not encoders or not all(callable(e) for e in encoders):
            raise TypeError(f"encoders must be a list of callables; got {encoders!r}")
        found = [e for e in encoders if isinstance(e, nn.Module)] if modules is None else list(modules)
        self.loss, self.encoders, self.chunk_size, self.scaler = loss, list(encoders), chunk_size, scaler
        self.modules = list(dict.fromkeys(found))

    def __call__(self, *inputs, **kwargs) -> Tensor:
        """Adds the gradients of one step to `.grad`, and returns the loss without graph.

        Args:
            *inputs: one for each encoder: a tensor, or a tuple, list or dict of tensors, of equal numbers of rows.
            **kwargs: passed to the loss as they are (labels, logit_scale, …).
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(f"inputs must be one for each of {len(self.encoders)} encoders; got {len(inputs)}")
        chunks = [self._chunks(k, value) for k, value in enumerate(inputs)]
        with self._quiet():
            with torch.no_grad():
                runs = [
                    [_run(encoder, part) for part in parts]
                    for encoder, parts in zip(self.encoders, chunks, strict=True)
                ]
            # Versions of torch keep autocast's narrow copies of weights, here made without a graph.
            torch.clear_autocast_cache()
            loss, gradients = self._loss([[value for value, _ in run] for run in runs], kwargs)
            with _unmoved(self.modules):
                self._again(chunks, runs, gradients)
        self._exchange()
        return loss

    def _chunks(self, k: int, value) -> list:
        leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        rows = {leaf.shape[0] for leaf in leaves if leaf.dim()}
        if len(rows) != 1:
            raise ValueError(f"inputs[{k}] must hold tensors of one number of rows; got {sorted(rows)}")
        cut = lambda first: lambda v: v[first : first + self.chunk_size] if isinstance(v, Tensor) and v.dim() else v  # noqa: E731
        return [tree_map(cut(first), value) for first in range(0, max(rows.pop(), 1), self.chunk_size)]

    def _loss(self, parts: list[list[Tensor]], kwargs: dict) -> tuple[Tensor, list[Tensor]]:
        whole = [torch.cat(part).requires_grad_() for part in parts]
        with torch.enable_grad():
            loss = self.loss(*whole, **kwargs)
        if not isinstance(loss, Tensor) or loss.dim():
            raise TypeError(f"loss must return a 0-d tensor; got {type(loss).__name__}")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach(), [torch.zeros_like(v) if v.grad is None else v.grad for v in whole]

    def _again(self, chunks: list[list], runs: list[list], gradients: list[Tensor]) -> None:
        for e, encoder in enumerate(self.encoders):
            start = 0
            for c, part in enumerate(chunks[e]):
                value, state = runs[e][c]
                self._exchange_sharded(c == len(chunks[e]) - 1)
                with _random_state(state), torch.enable_grad():
                    again = _call(encoder, part)
                if again.requires_grad:
                    again.backward(gradients[e][start : start + value.shape[0]])
                start += value.shape[0]

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No exchange of gradients."""
        with contextlib.ExitStack() as stack:
            self._exchange_sharded(False)
            stack.callback(self._exchange_sharded, True)
            for module in self.modules:
                if hasattr(module, "no_sync"):
                    stack.enter_context(module.no_sync())
            yield

    def _exchange_sharded(self, wanted: bool) -> None:
        """Whether FSDP2 exchanges gradients in the backward passes to come."""
        for module in self.modules:
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(wanted)

    def _exchange(self) -> None:
        """The mean of the gradients over the ranks of each DistributedDataParallel module.

        Its own exchange would miss the parameters that the last chunk does not use.
        """
        for module in self.modules:
            if isinstance(module, DistributedDataParallel):
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                for bucket in _buckets(gradients):
                    flat = torch.cat([g.reshape(-1) for g in bucket])
                    dist.all_reduce(flat, group=module.process_group)
                    flat /= dist.get_world_size(module.process_group)
                    for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                        g.copy_(mean.view_as(g))


def _call(encoder: Callable, part):
    if isinstance(part, (tuple, list)):
        return encoder(*part)
    return encoder(**part) if isinstance(part, dict) else encoder(part)


def _run(encoder: Callable, part) -> tuple[Tensor, tuple]:
    """Representations of a chunk, and the random state before it."""
    state = _random_states(part)
    value = _call(encoder, part)
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"encoders must return representations (rows, D); got {got}")
    return value.detach(), state


def _random_states(part) -> tuple:
    devices = {leaf.device for leaf in tree_flatten(part)[0] if isinstance(leaf, Tensor) and leaf.is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


@contextlib.contextmanager
def _random_state(state: tuple) -> Iterator[None]:
    """Random numbers continue from a state inside, and where they were afterwards."""
    host, devices = state
    with torch.random.fork_rng(devices=list(devices)):
        torch.set_rng_state(host)
        for device, value in devices.items():
            torch.cuda.set_rng_state(value, device)
        yield


@contextlib.contextmanager
def _unmoved(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Running statistics of batch normalisation are afterwards what they were."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(b, b.clone()) for b in chain.from_iterable(norm.buffers(recurse=False) for norm in norms)]
    yield
    for buffer, value in kept:
        buffer.copy_(value)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device, together at most `_BUCKET_BYTES` or a single one."""
    groups: dict[tuple, list[Tensor]] = {}
    for g in gradients:
        bucket = groups.setdefault((g.dtype, g.device), [])
        if bucket and sum(v.numel() * v.element_size() for v in (*bucket, g)) > _BUCKET_BYTES:
            yield bucket
            bucket = groups[g.dtype, g.device] = []
        bucket.append(g)
    yield from (bucket for bucket in groups.values() if bucket)
