"""Unified negative pairs and the symmetry term against their definitions."""

# ruff: noqa: F811

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from head_cases import D64, backend  # noqa: F401

import flashpair
from flashpair import heads


def negative_cosines(x, labels):
    """Of all pairs a < b of different classes."""
    return [
        F.cosine_similarity(x[a], x[b], dim=0)
        for a in range(len(x))
        for b in range(a + 1, len(x))
        if labels[a] != labels[b]
    ]


def by_definition(x, weight, labels, margin, scale, whisker):
    """Every row's logits with all kept negative pairs beside the classes; the loss and how many were kept."""
    negatives = negative_cosines(x, labels)
    ordered = sorted(float(s.detach()) for s in negatives)
    q1, q3 = ordered[int(0.25 * len(ordered))], ordered[int(0.75 * len(ordered))]
    low, high = q1 - whisker * (q3 - q1), q3 + whisker * (q3 - q1)
    kept = [scale * s for s in negatives if low <= float(s.detach()) <= high]
    total = 0.0
    for i in range(len(x)):
        logits = [
            scale * (F.cosine_similarity(x[i], w, dim=0) - (margin if j == int(labels[i]) else 0.0))
            for j, w in enumerate(weight)
        ]
        total = total + torch.stack([*logits, *kept]).logsumexp(0) - logits[int(labels[i])]
    return total / len(x), len(kept)


def cos_face(weight, margin, scale):
    head = heads.CosFace(*weight.shape, margin=margin, scale=scale, dtype=D64)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


@pytest.mark.parametrize("whisker", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_by_definition(seed, whisker, backend):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, dtype=D64, generator=g).requires_grad_()
    labels = torch.randint(0, 4, (9,), generator=g)
    head = cos_face(torch.randn(5, 4, dtype=D64, generator=g), 0.3, 8.0)
    expected, kept = by_definition(x, head.weight, labels, 0.3, 8.0, whisker)
    found = heads.UNPG(head, whisker)(x, labels)
    assert kept > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    tensors = (x, head.weight)
    ours, truth = (torch.autograd.grad(value, tensors) for value in (found, expected))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("whisker", "kept"), [(1.5, 8), (0.1, 7)])
def test_the_public_value(whisker, kept, backend):
    circle = lambda *a: torch.tensor([[math.cos(math.radians(v)), math.sin(math.radians(v))] for v in a], dtype=D64)  # noqa: E731
    x, weight, labels = circle(0, 20, 40, 60, 80), circle(10, 50, 90), torch.tensor([0, 0, 1, 1, 2])
    expected, count = by_definition(x, weight, labels, 0.5, 64.0, whisker)
    assert count == kept and len(negative_cosines(x, labels)) == 8
    found = heads.UNPG(cos_face(weight, 0.5, 64.0), whisker)(x, labels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if whisker == 1.5:
        assert abs(float(found) - 29.80937801) < 1e-7
        quartiles, pairs = heads.negative_quantiles(x, labels)
        torch.testing.assert_close(quartiles, torch.tensor([0.5, 0.93969262], dtype=D64), rtol=1e-7, atol=0)
        assert pairs == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 3, 17, 60])
@pytest.mark.parametrize("kind", ["random", "ties", "opposite", "orthogonal"])
def test_quantiles_are_those_of_a_sort(kind, rows, dtype, backend):
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 6, dtype=dtype, generator=g)
    if kind == "ties":
        x = x.sign()
    if kind == "opposite":
        x[1::2] = -x[:1]
    if kind == "orthogonal":
        x = torch.eye(rows, dtype=dtype)  # cosines 0, which are as many as there are signs of zero
    labels = torch.arange(rows) // 2
    if rows == 2:
        labels = torch.arange(2)
    fractions = (0.0, 0.25, 0.5, 0.75, 0.99)
    found, count = heads.negative_quantiles(x, labels, fractions)
    a, b = torch.triu_indices(rows, rows, 1)
    apart = labels[a] != labels[b]
    s = flashpair.reference.similarity_matrix(x, None, flashpair.Similarity.DOT, True)[a[apart], b[apart]].sort().values
    assert count == len(s)
    expected = torch.stack([s[int(f * len(s))] for f in fractions])
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_without_negative_pairs_it_is_the_head(backend):
    x = torch.randn(4, 3, dtype=D64, requires_grad=True)
    head = cos_face(torch.randn(5, 3, dtype=D64), 0.3, 8.0)
    labels = torch.full((4,), 2)
    found, expected = heads.UNPG(head)(x, labels), head(x, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (x, head.weight)), torch.autograd.grad(expected, (x, head.weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_without_a_class_are_in_no_pair(backend):
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(8, 4, dtype=D64, generator=g), torch.tensor([0, 1, 2, 0, 1, 2, 3, 3])
    head = cos_face(torch.randn(5, 4, dtype=D64, generator=g), 0.3, 8.0)
    fewer = heads.UNPG(head)(x[:7], labels[:7])
    labels[7] = -100
    torch.testing.assert_close(heads.UNPG(head)(x, labels), fewer, rtol=1e-12, atol=1e-12)


def test_with_other_margins_and_a_learned_scale(backend):
    """The regulariser of MagFace stays; the scale has the gradient of both parts."""
    g = torch.Generator().manual_seed(1)
    x, labels = 30 * torch.randn(6, 4, dtype=D64, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
    mag = heads.MagFace(5, 4, dtype=D64)
    assert heads.UNPG(mag)(x, labels) > mag(x, labels)
    scale = torch.tensor(8.0, dtype=D64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=D64, generator=g)

    def loss(s):
        head = heads.ClassHead(5, 4, margin=heads.CombinedMargin(s, m2=0.2), dtype=D64)
        with torch.no_grad():
            head.weight.copy_(weight)
        return heads.UNPG(head)(x, labels)

    assert torch.autograd.gradcheck(loss, (scale,))


def test_bad_heads_are_refused():
    with pytest.raises(TypeError, match="head must be"):
        heads.UNPG(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="over cosines"):
        heads.UNPG(heads.ClassHead(3, 4))
    with pytest.raises(ValueError, match="whisker"):
        heads.UNPG(heads.CosFace(3, 4), whisker=-1.0)
    with pytest.raises(ValueError, match="one scale"):
        heads.UNPG(heads.SphereFace(3, 4))(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"fractions\[0\]"):
        heads.negative_quantiles(torch.randn(2, 4), torch.tensor([0, 1]), (1.5,))


@pytest.mark.parametrize("distance", ["cosine", "squared_euclidean", "euclidean"])
def test_symmetry_loss(distance):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 3, dtype=D64, generator=g, requires_grad=True) for _ in range(2))
    frontal = torch.tensor([True, False, True, True, False])
    total = 0.0
    for i in (0, 2, 3):
        a, b = left[i] / left[i].norm(), right[i] / right[i].norm()
        total = (
            total + {"cosine": 1 - a @ b, "squared_euclidean": (a - b) @ (a - b), "euclidean": (a - b).norm()}[distance]
        )
    found = heads.symmetry_loss(left, right, frontal, distance=distance)
    torch.testing.assert_close(found, total / 3, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (left, right)), torch.autograd.grad(total / 3, (left, right)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    same = heads.symmetry_loss(left, left, distance=distance)
    assert abs(float(same)) < 1e-12 and torch.autograd.grad(same, left)[0].isfinite().all()
    with pytest.raises(ValueError, match="distance must be"):
        heads.symmetry_loss(left, right, distance="l1")
    with pytest.raises(ValueError, match="symmetric must be bool"):
        heads.symmetry_loss(left, right, torch.ones(5))
