"""How many positives and negatives a row has, by counting them."""

from __future__ import annotations

import pytest
import torch

from flashpair import backend_cpu, use_backend
from flashpair.losses import problem
from flashpair.operator import watched

ROWS, COLUMNS = 23, 17


def _counted(labels, ref_labels, exclude) -> tuple[list[int], list[int]]:
    columns = labels if ref_labels is None else ref_labels
    same, different = [], []
    for i, label in enumerate(labels.tolist()):
        left_out = i if ref_labels is None else -1 if exclude is None else int(exclude[i])
        met = [other for j, other in enumerate(columns.tolist()) if j != left_out]
        same.append(sum(other == label for other in met))
        different.append(len(met) - same[-1])
    return same, different


@pytest.mark.parametrize("way", ["in one operator", "by PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [ROWS, 1, 0])
@pytest.mark.parametrize("columns", ["own", "others", "others, one left out"])
def test_counts(columns, rows, dtype, way, monkeypatch):
    if way == "by PyTorch":
        monkeypatch.setattr(backend_cpu, "at_hand", lambda *tensors: False)
    elif backend_cpu.unavailable():
        pytest.skip("; ".join(backend_cpu.unavailable()))
    else:
        monkeypatch.delenv("FLASHPAIR_BACKEND", raising=False)
        monkeypatch.setattr(torch.Tensor, "sort", None)  # which PyTorch's way needs
        assert not watched(torch.zeros(1))
    generator = torch.Generator().manual_seed(rows)
    # Labels far apart, of a view whose entries are not side by side, and columns in another order than the rows'.
    labels = (torch.randint(-3, 3, (rows, 2), generator=generator) << 40)[:, 0]
    ref_labels = exclude = None
    if columns != "own":
        ref_labels = torch.randint(-3, 3, (COLUMNS,), generator=generator) << 40
    if columns == "others, one left out":
        exclude = torch.randint(-1, COLUMNS, (rows,), generator=generator)
    found = problem.label_counts(labels, ref_labels, exclude, dtype)
    same, different = _counted(labels, ref_labels, exclude)
    assert found.dtype == dtype and found.tolist() == [same, different]


def test_the_reference_counts_by_itself(monkeypatch):
    """What everything is compared with does not share an operator with it."""
    monkeypatch.setattr(backend_cpu, "label_counts", None)
    labels = torch.tensor([0, 1, 0])
    with use_backend("reference"):
        assert problem.label_counts(labels, None, None, torch.float64)[0].tolist() == [1, 0, 1]
