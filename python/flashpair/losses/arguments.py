"""Checks shared by the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .. import backend_cpu, checks
from ..distributed.sharded import Sharded, by_row, sum_of_entries
from ..operator import watched
from ..request import statistics_dtype


def as_scalar(name: str, value: float | Tensor) -> float | Tensor:
    """A number that is not NaN, or a tensor of one element as 0-d (its value is not read).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element; got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {value.dtype}")
        return value if value.dim() == 0 else value.reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor; got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)


def constant(value: float | Tensor) -> float | Tensor:
    """The value without its gradient."""
    return value.detach() if isinstance(value, Tensor) else value


def inverse_temperature(value: float | Tensor) -> float | Tensor:
    """1 / temperature, positive.

    Raises:
        TypeError, ValueError: on a temperature that is not positive; the value of a tensor is not read.
    """
    checks.temperature("temperature", value)
    return 1.0 / as_scalar("temperature", value)


def check_matched(image_features: Tensor, text_features: Tensor, names=("image_features", "text_features")) -> None:
    """Two embeddings with equal numbers of rows.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checks.embedding_pair(image_features, text_features, names)
    if image_features.shape[0] != text_features.shape[0]:
        rows = image_features.shape[0], text_features.shape[0]
        raise ValueError(f"{names[0]} and {names[1]} must have equal numbers of rows; got {rows[0]} and {rows[1]}")


def numbered(**sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """{"name[0]": ..., "name[1]": ...} of sequences by name, as errors name their entries."""
    return {f"{name}[{k}]": value for name, of in sequences.items() for k, value in enumerate(of)}


def sequences(entries: Mapping[str, Tensor], *names: str) -> list[list[Tensor]]:
    """The sequences of these names again, from what `numbered` made of them."""
    return [[value for entry, value in entries.items() if entry.startswith(f"{name}[")] for name in names]


def without_gradient(rows: Tensor) -> Tensor:
    """The rows, of all ranks or not, as constants."""
    if isinstance(rows, Sharded):
        return rows.detached()
    return rows.detach() if isinstance(rows, Tensor) else rows


def check_rows(name: str, value: Tensor, rows: int, like: Tensor) -> None:
    """Embeddings with a given number of rows on the device of others.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checks.embeddings(name, value)
    checks.same_device("the embeddings", like, **{name: value})
    if value.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows as the batch; got {value.shape[0]}")


def poisoned(loss: Tensor, *embeddings: Tensor | None) -> Tensor:
    """The loss; NaN, and so its gradients, if an embedding is NaN or infinite, even one that no kept pair meets."""
    given = [e for e in embeddings if e is not None]
    # Elements may be looked at where nobody compiles or transforms the call, by an extension that reads them.
    if not watched(*given) and all(map(_readable, given)) and not backend_cpu.unavailable():
        return loss if backend_cpu.finite(given) else loss * math.nan
    total = sum_of_entries(given, loss.dtype)
    return loss * total.softmax(0)  # of one number: 1, or NaN


def _readable(value: Tensor) -> bool:
    """Whether the CPU's extension reads such a tensor."""
    return value.is_cpu and value.dtype in checks.DTYPES


def as_guide(value: Tensor, x: Tensor) -> Tensor:
    """Rows of a second product beside embeddings x: without gradient, in the dtype of x or in that of statistics."""
    dtype = x.dtype if value.dtype == x.dtype else statistics_dtype(x)
    return by_row(lambda rows: rows.to(dtype), without_gradient(value))
