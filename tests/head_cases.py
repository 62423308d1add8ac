"""What the tests of class heads share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import support
import torch
from torch import Tensor

import flashpair

#: The specification and the C++ backend, both in float64; the GPU backends have tests of their own.
BACKENDS = ["reference", *(["cpu"] if "cpu" in support.FUSED else [])]
D64 = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    """Each of them, forced."""
    with flashpair.use_backend(request.param):
        yield request.param


def check(found: Tensor, expected: Tensor, tensors: Sequence[Tensor], bound: float = 1e-10) -> None:
    """Value, and the gradients of a random combination of its elements."""
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    cotangent = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(9))
    ours, truth = (torch.autograd.grad(value, tensors, cotangent, retain_graph=True) for value in (found, expected))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
