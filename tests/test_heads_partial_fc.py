"""Partial FC, the optimisers that step in the backward pass, and checkpoints by class."""

from __future__ import annotations

import copy
import math

import pytest
import support
import torch
import torch.nn.functional as F

import flashpair
from flashpair.heads import (
    ClassHead,
    FusedAdamW,
    FusedSGD,
    Margin,
    PartialFC_V2,
    class_range,
    load_shard,
    reshard,
    save_shard,
    statistics,
)
from flashpair.heads.margins import add_angle

BACKENDS = [name for name in support.FUSED if not support.interpreted(name) or name == "triton"]
DTYPE = torch.float64


class Arc(Margin):
    """ArcFace by its definition, for heads whose margin does not matter."""

    def forward(self, cosine, norms, labels):
        return add_angle(cosine, 0.3)


def dense_arc(x, weight, labels, scale, angle=0.3):
    """Cross-entropy of ArcFace's logits, all of them stored."""
    cosine = F.normalize(x) @ F.normalize(weight).T
    own = F.one_hot(labels, weight.shape[0]).bool()
    moved = torch.where(
        cosine > math.cos(math.pi - angle), (cosine.acos() + angle).cos(), cosine - angle * math.sin(angle)
    )
    return F.cross_entropy(scale * torch.where(own, moved, cosine), labels)


def batch(rows=5, features=4, classes=11, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)  # not the weights' own numbers
    x = torch.randn(rows, features, dtype=DTYPE, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return x, labels


def head_like(weight: torch.Tensor, **options) -> ClassHead:
    head = ClassHead(*weight.shape, dtype=weight.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


OPTIMIZERS = {
    "sgd": (FusedSGD, torch.optim.SGD, {"lr": 0.3}),
    "momentum": (FusedSGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (FusedSGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fused_step_on_all_classes_is_torchs(backend, name, blocks, monkeypatch):
    fused, torchs, options = OPTIMIZERS[name]
    device = support.device(backend)
    if blocks > 1:
        monkeypatch.setattr(
            statistics,
            "blocks_of",
            lambda classes, *_, **__: [slice(i, min(i + 4, classes)) for i in range(0, classes, 4)],
        )
    start = torch.randn(11, 4, dtype=DTYPE if support.serves(backend, DTYPE) else torch.float32)
    bound = 1e-10 if start.dtype == DTYPE else 1e-4
    ours, dense = (head_like(start, margin=Arc(scale=8.0)).to(device) for _ in range(2))
    optimizer, reference = fused([ours.weight], **options), torchs([dense.weight], **options)
    ours.fuse(optimizer)
    for step in range(3):
        x, labels = (t.to(device) for t in batch(seed=step))
        x = x.to(start.dtype)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        with flashpair.use_backend(backend):
            loss = ours(a, labels)
            loss.backward()
        optimizer.step()
        reference.zero_grad()
        expected = dense_arc(b, dense.weight, labels, 8.0)
        expected.backward()
        reference.step()
        assert ours.weight.grad is None
        torch.testing.assert_close(loss, expected, rtol=bound, atol=bound)
        torch.testing.assert_close(a.grad, b.grad, rtol=bound, atol=bound)
        torch.testing.assert_close(ours.weight, dense.weight, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_step_on_sampled_classes_is_torchs_on_these_and_leaves_the_others(name):
    fused, torchs, options = OPTIMIZERS[name]
    weight = torch.randn(40, 4, dtype=DTYPE)
    head = PartialFC_V2(Arc(scale=8.0), 4, 40, sample_rate=0.25, dtype=DTYPE)
    with torch.no_grad():
        head.weight.copy_(weight)
    optimizer = fused([head.weight], **options)
    head.fuse(optimizer)
    # A row's own torch optimiser, which steps when the row takes part.
    rows = [torch.nn.Parameter(weight[i].clone()) for i in range(40)]
    references = [torchs([row], **options) for row in rows]
    for step in range(6):
        x, labels = batch(classes=40, seed=step)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        before = head.weight.detach().clone()
        head(a, labels).backward()
        taken = head.sampled
        stacked = torch.stack([rows[i] for i in taken])
        dense_arc(b, stacked, torch.searchsorted(taken, labels), 8.0).backward()
        for i in taken:
            references[i].step()
            references[i].zero_grad()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.weight, torch.stack(list(rows)), rtol=1e-10, atol=1e-10)
        others = torch.ones(40, dtype=torch.bool)
        others[taken] = False
        assert torch.equal(head.weight[others], before[others])


def test_samples_hold_the_batch_and_are_ascending():
    head = PartialFC_V2(Arc(), 4, 1000, sample_rate=0.1, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 999, 3, 500])
    seen = [head.sample(labels) for _ in range(20)]
    for classes in seen:
        assert classes.shape == (100,)
        assert torch.equal(classes, classes.unique())
        assert torch.isin(labels, classes).all()
    assert not torch.equal(seen[0], seen[1])
    again = PartialFC_V2(Arc(), 4, 1000, sample_rate=0.1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(seen[0], again.sample(labels))


def test_more_positives_than_samples_are_all_kept():
    head = PartialFC_V2(Arc(), 4, 20, sample_rate=0.1)
    labels = torch.tensor([7, 3, 3, 11, 19])
    assert head.sample(labels).tolist() == [3, 7, 11, 19]


def test_rows_without_a_class_take_part_in_nothing():
    head = PartialFC_V2(Arc(scale=8.0), 4, 40, sample_rate=0.25, dtype=DTYPE, ignore_index=-1)
    x, labels = batch(classes=40)
    labels[2] = -1
    x.requires_grad_()
    loss = head(x, labels)
    loss.backward()
    kept = labels >= 0
    expected = dense_arc(x[kept], head.weight[head.sampled], torch.searchsorted(head.sampled, labels[kept]), 8.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert not x.grad[2].any()


@pytest.mark.parametrize("sparse", [False, True])
def test_without_a_fused_step_the_weights_have_the_gradient_of_the_sampled_rows(sparse):
    head = PartialFC_V2(Arc(scale=8.0), 4, 40, sample_rate=0.25, dtype=DTYPE, sparse_grad=sparse)
    x, labels = batch(classes=40)
    loss = head(x, labels)
    loss.backward()
    weight = head.weight.detach().clone().requires_grad_()
    expected = dense_arc(x, weight[head.sampled], torch.searchsorted(head.sampled, labels), 8.0)
    expected.backward()
    gradient = head.weight.grad
    assert gradient.is_sparse == sparse
    if sparse:
        assert gradient._nnz() == 10
        gradient = gradient.to_dense()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-10)


def test_evaluation_sees_all_classes():
    head = PartialFC_V2(Arc(scale=8.0), 4, 40, sample_rate=0.25, dtype=DTYPE).eval()
    x, labels = batch(classes=40)
    torch.testing.assert_close(head(x, labels), dense_arc(x, head.weight, labels, 8.0), rtol=1e-10, atol=1e-10)


def test_float16_is_read_as_it_is_stored():
    head = PartialFC_V2(Arc(scale=8.0), 4, 40, fp16=True)
    x, labels = batch(classes=40)
    loss = head(x.float(), labels)
    loss.backward()
    expected = dense_arc(x.half().double(), head.weight.half().double(), labels, 8.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert head.weight.grad.dtype == torch.float32


# --- nothing half-done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(name, bad):
    fused, _, options = OPTIMIZERS[name]
    head = ClassHead(11, 4, dtype=DTYPE)
    optimizer = fused([head.weight], **options)
    head.fuse(optimizer)
    x, labels = batch()
    head(x, labels).backward()
    before = save_shard(head)
    x[1, 2] = bad
    x.requires_grad_()
    head(x, labels).backward()
    after = save_shard(head)
    for key, value in before["classes"].items():
        assert torch.equal(value, after["classes"][key]), key
    assert x.grad.isnan().any()


def test_bad_labels_are_refused_before_anything_changes():
    head = PartialFC_V2(Arc(), 4, 40, sample_rate=0.5)
    head.fuse(FusedSGD([head.weight], lr=1.0))
    before = head.weight.detach().clone()
    x = torch.randn(3, 4)
    # insightface gives such a row the constant loss -log(1e-30) = 69.08 and no gradient.
    with pytest.raises(ValueError, match=r"labels must be classes, in \[0, 40\).*got 40"):
        head(x, torch.tensor([0, 1, 40]))
    with pytest.raises(TypeError, match="labels must be int64"):
        head(x, torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="equal features"):
        head(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    assert torch.equal(before, head.weight)


def test_a_second_backward_pass_through_one_step_is_refused():
    head = ClassHead(11, 4)
    head.fuse(FusedSGD([head.weight], lr=0.1))
    x, labels = batch()
    loss = head(x.float(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_constructions_name_the_argument():
    with pytest.raises(TypeError, match="margin_loss must be a"):
        PartialFC_V2(lambda logits, labels: logits, 4, 10)
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="sample_rate"):
            PartialFC_V2(Arc(), 4, 10, sample_rate=rate)
    head = ClassHead(3, 4)
    with pytest.raises(TypeError, match="optimizer must be a"):
        head.fuse(torch.optim.SGD([head.weight], lr=0.1))
    with pytest.raises(ValueError, match="does not hold the weights"):
        head.fuse(FusedSGD([torch.nn.Parameter(torch.zeros(3, 4))], lr=0.1))
    with pytest.raises(ValueError, match="nesterov"):
        FusedSGD([head.weight], lr=0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        FusedAdamW([head.weight], betas=(0.9, 1.0))
    head.weight.grad = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="does not apply"):
        FusedSGD([head.weight], lr=0.1).step()


def test_without_gradients_nothing_is_updated():
    head = ClassHead(11, 4)
    head.fuse(FusedSGD([head.weight], lr=0.1))
    before = head.weight.detach().clone()
    x, labels = batch()
    with torch.no_grad():
        head(x.float(), labels)
    head.weight.requires_grad_(False)
    x = x.float().requires_grad_()
    head(x, labels).backward()
    assert torch.equal(head.weight, before)
    assert x.grad.any()


def test_learning_rate_schedules_and_loss_scales_reach_the_fused_step():
    x, labels = batch()
    moved = []
    for lr, scale in ((0.4, 1.0), (0.1, 1.0), (0.1, 1024.0)):
        torch.manual_seed(0)
        head = ClassHead(11, 4, dtype=DTYPE)
        optimizer = FusedSGD([head.weight], lr=0.4)
        head.fuse(optimizer)
        optimizer.grad_scale = scale
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, lr=lr: lr / 0.4)
        before = head.weight.detach().clone()
        (scale * head(x, labels)).backward()
        optimizer.step()
        scheduler.step()
        moved.append(head.weight - before)
    torch.testing.assert_close(moved[0], 4 * moved[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved[1], moved[2], rtol=1e-10, atol=1e-12)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ways", [(1, 3), (3, 2), (4, 1), (7, 7)])
def test_shards_survive_any_change_of_the_number_of_ranks(name, ways):
    fused, _, options = OPTIMIZERS[name]
    head = ClassHead(7, 4, dtype=DTYPE, bias=True)
    head.fuse(fused([head.weight], **options))
    x, labels = batch(classes=7)
    head(x, labels).backward()
    whole = save_shard(head)
    shards = reshard(reshard([whole], ways[0])[::-1], ways[1])
    assert [len(s["classes"]["weight"]) for s in shards] == [len(class_range(7, r, ways[1])) for r in range(ways[1])]
    (joined,) = reshard(shards, 1)
    other = ClassHead(7, 4, dtype=DTYPE, bias=True)
    other.fuse(fused([other.weight], **options))
    load_shard(other, joined)
    for key, value in whole["classes"].items():
        assert torch.equal(value, joined["classes"][key]), key
    a, b = head(x, labels), other(x, labels)
    a.backward()
    b.backward()
    assert torch.equal(head.weight, other.weight)


def test_shards_that_do_not_fit_change_nothing():
    head = ClassHead(7, 4)
    shards = reshard([save_shard(head)], 2)
    with pytest.raises(ValueError, match="begin at class 0"):
        reshard(shards[1:], 1)
    with pytest.raises(ValueError, match="end at class 4"):
        reshard(shards[:1], 1)
    with pytest.raises(ValueError, match="begin at class 4"):
        reshard([shards[0], shards[0], shards[1]], 1)
    with pytest.raises(ValueError, match="world_size must be at most"):
        reshard(shards, 8)
    with pytest.raises(ValueError, match="does not agree"):
        reshard([shards[0], reshard([save_shard(ClassHead(7, 5))], 2)[1]], 1)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight must have shape \(7, 4\)"):
        load_shard(head, shards[0])
    with pytest.raises(ValueError, match="'bias', which the head does not have"):
        load_shard(head, save_shard(ClassHead(7, 4, bias=True)))
    with pytest.raises(ValueError, match="lacks bias"):
        load_shard(ClassHead(7, 4, bias=True), save_shard(head))
    with pytest.raises(ValueError, match="what save_shard returned"):
        load_shard(head, {"weight": torch.zeros(7, 4)})
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimisers_state_dict_goes_on_where_it_was(name):
    """torch's own way to save: the same steps follow."""
    fused, _, options = OPTIMIZERS[name]
    both = [ClassHead(11, 4, dtype=DTYPE) for _ in range(2)]
    optimizers = [fused([head.weight], **options) for head in both]
    for head, optimizer in zip(both, optimizers, strict=True):
        head.fuse(optimizer)
    first = batch(seed=0)
    both[0](*first).backward()
    both[1].load_state_dict(both[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # as a file would
    for head in both:
        head(*batch(seed=1)).backward()
    assert torch.equal(both[0].weight, both[1].weight)
