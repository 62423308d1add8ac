"""The engine of class heads against dense code in float64: every option, and options together."""

# ruff: noqa: F811

from __future__ import annotations

import itertools
import math

import pytest
import support
import torch
import torch.nn.functional as F
from head_cases import D64, backend, check  # noqa: F401

import flashpair
from flashpair import Extreme, Reduction, Term, heads
from flashpair.algebra import merge, merge_extremes
from flashpair.heads import statistics, streaming

ROWS, FEATURES, CLASSES = 6, 4, 11


def leaves(seed=0, classes=CLASSES, rows=ROWS):
    g = torch.Generator().manual_seed(300 + seed)
    x = torch.randn(rows, FEATURES, dtype=D64, generator=g)
    weight = torch.randn(classes, FEATURES, dtype=D64, generator=g)
    bias = torch.randn(classes, dtype=D64, generator=g)
    labels = torch.randint(0, classes, (rows,), generator=g)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def dense_logits(x, weight, bias, scale, normalize, softcap):
    if normalize:
        x, weight = F.normalize(x), F.normalize(weight)
    z = x @ weight.T * (scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale)
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


SCALES = {
    "1": lambda: 1.0,
    "number": lambda: 3.0,
    "learned": lambda: torch.tensor(3.0, dtype=D64, requires_grad=True),
    "per row": lambda: torch.linspace(1, 4, ROWS, dtype=D64).requires_grad_(),
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_logits(scale, biased, normalize, softcap, backend):
    """Own logit, logsumexp and sum of all classes, with all gradients."""
    x, weight, bias, labels = leaves()
    bias = bias if biased else None
    scale = SCALES[scale]()
    tensors = [t for t in (x, weight, bias, scale) if isinstance(t, torch.Tensor)]
    z = dense_logits(x, weight, bias, scale, normalize, softcap)
    found = heads.class_logits(
        x, weight, labels, bias=bias, scale=scale, normalize=normalize, softcap=softcap, extras=("sum",)
    )
    own = z[torch.arange(ROWS), labels]
    check(found.logit, own, tensors)
    check(found.lse, z.logsumexp(1), tensors)
    check(found.sum, z.sum(1), tensors)
    check(found.cross_entropy, z.logsumexp(1) - own, tensors)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_scale_per_class(normalize, backend):
    """Beside one per row and a bias."""
    x, weight, bias, labels = leaves()
    rows, columns = (torch.linspace(1, 3, n, dtype=D64).requires_grad_() for n in (ROWS, CLASSES))
    a, b = (F.normalize(x), F.normalize(weight)) if normalize else (x, weight)
    expected = F.cross_entropy(rows[:, None] * (a @ b.T) * columns + bias, labels)
    found = heads.class_loss(x, weight, labels, bias=bias, scale=rows, class_scale=columns, normalize=normalize)
    check(found, expected, (x, weight, bias, rows, columns))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_entropy(biased, normalize, backend):
    x, weight, bias, labels = leaves()
    bias = bias if biased else None
    scale = torch.tensor(2.0, dtype=D64, requires_grad=True)
    z = dense_logits(x, weight, bias, scale, normalize, None)
    found = heads.class_logits(x, weight, labels, bias=bias, scale=scale, normalize=normalize, extras=("mean",)).entropy
    tensors = [t for t in (x, weight, bias, scale) if t is not None]
    check(found, -(z.softmax(1) * z.log_softmax(1)).sum(1), tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_is_torchs(biased, ignored, weighted, smoothing, reduction, backend):
    x, weight, bias, labels = leaves()
    if ignored:
        labels[[1, 4]] = -100
    bias = bias if biased else None
    v = torch.rand(CLASSES, dtype=D64, generator=torch.Generator().manual_seed(1)) if weighted else None
    z = dense_logits(x, weight, bias, 1.0, False, None)
    expected = F.cross_entropy(z, labels, v, label_smoothing=smoothing, reduction=reduction)
    tensors = [t for t in (x, weight, bias) if t is not None]
    formula = heads.CrossEntropy(label_smoothing=smoothing)
    found = heads.class_loss(x, weight, labels, bias=bias, formula=formula, class_weight=v, reduction=reduction)
    check(found, expected, tensors)
    found = flashpair.linear_cross_entropy(
        x, weight, labels, linear_bias=bias, weight=v, label_smoothing=smoothing, reduction=reduction
    )
    check(found, expected, tensors)


def test_a_weight_of_zero_is_as_torchs(backend):
    x, weight, _, labels = leaves()
    v = torch.ones(CLASSES, dtype=D64)
    v[labels[0]] = 0
    expected = F.cross_entropy(x @ weight.T, labels, v, label_smoothing=0.2)
    check(heads.class_loss(x, weight, labels, formula=heads.CrossEntropy(0.2), class_weight=v), expected, (x, weight))


def test_megatrons_smoothing_spreads_over_the_other_classes(backend):
    """(1 - α) nll - α/(C - 1) Σ_{j≠y} log p_j with α the smoothing, as Megatron's code weighs them."""
    x, weight, _, labels = leaves()
    alpha = 0.1
    logs = (x @ weight.T).log_softmax(1)
    own = logs[torch.arange(ROWS), labels]
    expected = (-(1 - alpha) * own - alpha / (CLASSES - 1) * (logs.sum(1) - own)).mean()
    found = heads.class_loss(x, weight, labels, formula=heads.CrossEntropy(alpha, "megatron"))
    check(found, expected, (x, weight))


def test_the_squared_logsumexp(backend):
    x, weight, _, labels = leaves()
    z = x @ weight.T
    expected = F.cross_entropy(z, labels) + 0.3 * (z.logsumexp(1) ** 2).mean()
    check(heads.class_loss(x, weight, labels, formula=heads.CrossEntropy(z_loss=0.3)), expected, (x, weight))


def test_sample_weights_multiply_and_the_mean_divides_by_rows(backend):
    x, weight, _, labels = leaves()
    labels[2] = -100
    v = torch.rand(ROWS, dtype=D64, requires_grad=True)
    rows = F.cross_entropy(x @ weight.T, labels, reduction="none")
    check(heads.class_loss(x, weight, labels, sample_weight=v), (v * rows).sum() / (ROWS - 1), (x, weight, v))


def test_everything_at_once(backend):
    """Cosines, bias, learned scale, soft cap, smoothing, both kinds of weights, ignored rows, logsumexp²."""
    x, weight, bias, labels = leaves()
    labels[3] = 7
    scale = torch.tensor(5.0, dtype=D64, requires_grad=True)
    v, u = torch.rand(CLASSES, dtype=D64), torch.rand(ROWS, dtype=D64)
    z = dense_logits(x, weight, bias, scale, True, 3.0)
    expected = F.cross_entropy(z, labels, v, label_smoothing=0.1, reduction="none") + 0.2 * z.logsumexp(1) ** 2
    expected = torch.where(labels == 7, 0.0, u * expected)
    found = heads.class_loss(
        x, weight, labels, formula=heads.CrossEntropy(0.1, z_loss=0.2), bias=bias, scale=scale, normalize=True,
        softcap=3.0, class_weight=v, sample_weight=u, ignore_index=7, reduction="none",
    )  # fmt: skip
    check(found, expected, (x, weight, bias, scale))


# --- few classes, few rows, no rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 1), (1, 2), (5, 2), (1, 7)])
def test_few(rows, classes, backend):
    x, weight, _, labels = leaves(classes=classes, rows=rows)
    check(heads.class_loss(x, weight, labels), F.cross_entropy(x @ weight.T, labels), (x, weight))


def test_no_rows(backend):
    x, weight, _, labels = leaves(rows=0)
    loss = heads.class_loss(x, weight, labels)
    assert float(loss) == 0.0
    gx, gw = torch.autograd.grad(loss, (x, weight))
    assert gx.shape == (0, FEATURES) and not gw.any()


def test_every_row_ignored(backend):
    x, weight, _, labels = leaves()
    labels.fill_(-100)
    assert float(heads.class_loss(x, weight, labels)) == 0.0
    gradients = torch.autograd.grad(heads.class_loss(x, weight, labels), (x, weight))
    assert not any(g.any() for g in gradients)
    assert flashpair.linear_cross_entropy(x, weight, labels).isnan()  # as torch
    assert F.cross_entropy(x @ weight.T, labels).isnan()


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_nan_in_nan_out(where, backend):
    x, weight, bias, labels = leaves()
    broken = {"x": x, "weight": weight, "bias": bias}[where]
    with torch.no_grad():
        broken[(0,) * broken.dim()] = math.nan
    assert heads.class_loss(x, weight, labels, bias=bias).isnan()


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_narrow_dtypes_lose_no_more_than_torch(dtype, normalize, backend):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=g).to(dtype) for n in (48, 200))
    labels = torch.randint(0, 200, (48,), generator=g)

    def results(run, kind):
        a, b = (t.detach().to(kind).requires_grad_() for t in (x, weight))
        loss = run(a, b)
        return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (a, b)))]

    def dense(a, b):
        z = dense_logits(a, b, None, 4.0, normalize, None)
        return F.cross_entropy(z, labels)

    truth = results(dense, D64)
    torchs = results(dense, dtype)
    ours = results(lambda a, b: heads.class_loss(a, b, labels, scale=4.0, normalize=normalize), dtype)
    for mine, theirs, exact in zip(ours, torchs, truth, strict=True):
        error, allowed = (mine - exact).abs().max(), (theirs - exact).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_small_losses_keep_their_digits(backend):
    """A learned row in float32: 1e-7 is not rounded to what logsumexp - logit has left of it."""
    x, weight = torch.eye(2), torch.eye(2)
    loss = heads.class_loss(x, weight, torch.tensor([0, 1]), scale=16.0, normalize=True)
    assert abs(float(loss) / math.log1p(math.exp(-16.0)) - 1) < 1e-5


@pytest.mark.parametrize("least", [1e-3, 1e-2])
def test_gradient_filter_is_within_its_bound(least):
    """Dropped are the classes of probability at most ε: each row's logit gradient is off by at most (C - 1) ε in L1."""
    if "cpu" not in support.FUSED:
        pytest.skip("the reference has nothing to filter")
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(8, 300, dtype=D64, generator=g)  # with the identity as weights x's gradient is the logits'
    labels = torch.randint(0, 300, (8,), generator=g)
    eye = torch.eye(300, dtype=D64)
    gradients = []
    for bound in (0.0, least):
        leaf = z.clone().requires_grad_()
        with flashpair.use_backend("cpu"):
            heads.class_loss(leaf, eye, labels, gradient_filter=bound, reduction="sum").backward()
        gradients.append(leaf.grad)
    exact, filtered = gradients
    error = (exact - filtered).abs().sum(1)
    assert (error > 0).all() and (error <= 299 * least).all()
    others = F.one_hot(labels, 300) == 0
    # The probability among the other classes decides: those of the pass.
    p = z.masked_fill(~others, -math.inf).softmax(1)
    assert torch.equal(filtered[others] == 0, (p <= least)[others])


# --- the pass in blocks of classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_blocks_of_classes_are_one_pass(normalize, monkeypatch):
    """As on a GPU, where a block's normalised copy must fit the workspace."""
    if "cpu" not in support.FUSED:
        pytest.skip("the C++ extension was not built")
    x, weight, bias, labels = leaves()
    v = torch.rand(CLASSES, dtype=D64)
    scale = torch.tensor(3.0, dtype=D64, requires_grad=True)
    cut = lambda classes, *_: [slice(i, min(i + 4, classes)) for i in range(0, classes, 4)]  # noqa: E731
    with flashpair.use_backend("cpu"):
        for options in (
            {"bias": bias, "class_weight": v, "formula": heads.CrossEntropy(0.1)},
            {},
            {"gradient_filter": 1e-9},
        ):
            tensors = [x, weight, scale, *([bias] if "bias" in options else [])]
            whole = heads.class_loss(x, weight, labels, scale=scale, normalize=normalize, **options)
            with monkeypatch.context() as patch:
                patch.setattr(statistics, "class_blocks", cut)
                parts = heads.class_loss(x, weight, labels, scale=scale, normalize=normalize, **options)
                found = torch.autograd.grad(parts, tensors)
            torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
            for a, b in zip(found, torch.autograd.grad(whole, tensors), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_merged_statistics_are_those_of_the_union(reduction, at):
    """Also where one of the parts, or one row of it, is empty."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, dtype=D64, generator=g), torch.randn(9, 3, dtype=D64, generator=g)

    def slots(columns):
        if len(columns) == 0:
            empty = {
                Reduction.LOGSUMEXP: [-math.inf],
                Reduction.MAX: [-math.inf],
                Reduction.SOFTMAX_MEAN: [0.0, -math.inf],
                Reduction.MOMENTS: [0.0, 0.0, 0.0, math.inf, -math.inf],
            }.get(reduction, [0.0])
            return torch.tensor(empty, dtype=D64)[:, None].expand(-1, 5)
        term = Term(reduction, scale=2.0, above=1.0)
        with flashpair.use_backend("reference"):
            (value,) = flashpair.pair_reduce(x, columns, [term])
            if reduction == Reduction.MOMENTS:
                return value
            if reduction != Reduction.SOFTMAX_MEAN:
                return value[None]
            (lse,) = flashpair.pair_reduce(x, columns, [Term(Reduction.LOGSUMEXP, scale=2.0, above=1.0)])
        return torch.stack([value, lse])

    torch.testing.assert_close(merge(reduction, slots(y[:at]), slots(y[at:])), slots(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_merged_extremes_are_those_of_the_union(at, largest):
    """Ties, NaN, infinities and rows with fewer entries than k."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.inf, 1.0]], dtype=D64)
    y = torch.tensor([[1.0, 1], [2, 1], [1, 1], [math.nan, 0], [2, 0], [0, 2], [1, 2], [-1, 1], [2, 2]], dtype=D64)
    extreme = Extreme(largest=largest, k=3, above=0.5)

    def found(first, end):
        if first == end:
            missing = -math.inf if largest else math.inf
            return torch.full((3, 3), missing, dtype=D64), torch.full((3, 3), -1)
        k = min(3, end - first)
        with flashpair.use_backend("reference"):
            (mined,) = flashpair.mine(x, y[first:end], [Extreme(largest=largest, k=k, above=0.5)])
        return mined.values, torch.where(mined.indices < 0, -1, mined.indices + first)

    merged = merge_extremes(extreme, found(0, at), found(at, 9))
    want = found(0, 9)
    assert torch.equal(merged[1], want[1])
    torch.testing.assert_close(merged[0], want[0], equal_nan=True)


# --- dense code on blocks ---------------------------------------------------------------------------------------------


def test_streamed_in_blocks_is_dense(monkeypatch):
    """Both reductions, a shared tensor, a column tensor of several dimensions, integer rows."""
    x, weight, bias, labels = leaves()
    temperature = torch.tensor(0.7, dtype=D64, requires_grad=True)

    def formula(rows, columns, shared, block):
        z = (rows[0] @ columns[0].T + columns[1][:, 0]) / shared[0]
        own = rows[1][:, None] == torch.arange(block.start, block.start + z.shape[1])
        return z.logsumexp(1), torch.where(own, z, 0.0).sum(1)

    monkeypatch.setattr(streaming, "_blocks", lambda columns, step: [slice(i, min(i + 3, 11)) for i in range(0, 11, 3)])
    lse, own = streaming.streamed(
        formula, [x, labels], [weight, bias[:, None]], [Reduction.LOGSUMEXP, Reduction.SUM], shared=[temperature]
    )
    z = (x @ weight.T + bias) / temperature
    check(lse - own, F.cross_entropy(z, labels, reduction="none"), (x, weight, bias, temperature))


def test_the_workspace_cuts_blocks():
    sizes = []

    def formula(rows, columns, shared, block):
        sizes.append(columns[0].shape[0])
        return [(rows[0] @ columns[0].T).logsumexp(1)]

    x, weight = torch.randn(64, 3), torch.randn(1000, 3)
    (found,) = streaming.streamed(formula, [x], [weight], [Reduction.LOGSUMEXP], max_workspace_bytes=1 << 20)
    torch.testing.assert_close(found, (x @ weight.T).logsumexp(1))
    assert len(sizes) > 1 and 64 * max(sizes) * 4 * 8 <= 1 << 20
    with pytest.raises(ValueError, match="reductions must be"):
        streaming.streamed(formula, [x], [weight], [Reduction.COUNT])


# --- soft targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("scale", SCALES)
def test_soft_targets(scale, kind, weighted, normalize, backend):
    x, weight, bias, _ = leaves()
    scale = SCALES[scale]()
    v = torch.rand(CLASSES, dtype=D64) if weighted else None
    g = torch.Generator().manual_seed(4)
    if kind == "dense":
        full = torch.rand(ROWS, CLASSES, dtype=D64, generator=g).requires_grad_()
        targets, extra = full, [full]
    else:
        index = torch.stack([torch.randperm(CLASSES, generator=g)[:3] for _ in range(ROWS)])
        index[0, 1] = -1
        share = torch.rand(ROWS, 3, dtype=D64, generator=g).requires_grad_()
        full = torch.zeros(ROWS, CLASSES, dtype=D64)
        for i, k in itertools.product(range(ROWS), range(3)):
            if index[i, k] >= 0:
                full = full.index_put((torch.tensor(i), index[i, k]), share[i, k], accumulate=True)
        targets, extra = heads.SparseTargets(index, share), [share]
    z = dense_logits(x, weight, bias, scale, normalize, None)
    expected = F.cross_entropy(z, full, v)
    found = heads.soft_cross_entropy(x, weight, targets, bias=bias, scale=scale, normalize=normalize, class_weight=v)
    check(found, expected, [x, weight, bias, *extra, *([scale] if isinstance(scale, torch.Tensor) else [])])


def test_sparse_targets_under_a_soft_cap(backend):
    x, weight, bias, labels = leaves()
    targets = heads.SparseTargets(labels[:, None], torch.ones(ROWS, 1, dtype=D64))
    expected = F.cross_entropy(dense_logits(x, weight, bias, 2.0, False, 3.0), labels)
    check(heads.soft_cross_entropy(x, weight, targets, bias=bias, scale=2.0, softcap=3.0), expected, (x, weight, bias))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_with_probabilities(reduction, smoothing, backend):
    x, weight, bias, _ = leaves()
    target = torch.rand(ROWS, CLASSES, dtype=D64).softmax(1)
    v = torch.rand(CLASSES, dtype=D64)
    expected = F.cross_entropy(x @ weight.T + bias, target, v, reduction=reduction, label_smoothing=smoothing)
    found = flashpair.linear_cross_entropy(
        x, weight, target, linear_bias=bias, weight=v, reduction=reduction, label_smoothing=smoothing
    )
    check(found, expected, (x, weight, bias))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_linear_cross_entropy_has_torchs_signature(backend):
    import inspect

    ours, theirs = (inspect.signature(f).parameters for f in (flashpair.linear_cross_entropy, F.linear_cross_entropy))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    x, weight, bias, labels = leaves()
    labels[0] = 3
    for kwargs in (dict(), dict(ignore_index=3), dict(label_smoothing=0.3, reduction="sum"), dict(linear_bias=bias)):
        check(
            flashpair.linear_cross_entropy(x, weight, labels, **kwargs),
            F.linear_cross_entropy(x, weight, labels, **kwargs),
            (x, weight),
        )
    one = flashpair.linear_cross_entropy(x[0], weight, labels[0])
    torch.testing.assert_close(one, F.linear_cross_entropy(x[0], weight, labels[0]))
    none = flashpair.linear_cross_entropy(x[0], weight, labels[0], reduction="none")
    assert none.shape == ()


def test_two_hot_is_linear_interpolation():
    centers = torch.tensor([-1.0, 0.0, 2.0, 3.0], dtype=D64)
    values = torch.tensor([-5.0, -1.0, -0.25, 0.0, 1.0, 3.0, 9.0], dtype=D64)
    found = heads.two_hot(values, centers)
    mean = (found.probability * centers[found.index]).sum(1)
    torch.testing.assert_close(mean, values.clamp(-1, 3))
    assert (found.probability >= 0).all() and torch.equal(
        found.index[:, 1] - found.index[:, 0], torch.ones(7, dtype=torch.long)
    )


def test_hl_gauss_is_the_mass_of_the_bins():
    """By numerical integration; in the tails too."""
    edges = torch.linspace(0, 1, 6, dtype=D64)
    values = torch.tensor([0.0, 0.11, 0.5, 1.0, 7.0], dtype=D64)
    found = heads.hl_gauss(values, edges, sigma=0.15)
    grid = torch.linspace(0, 1, 100001, dtype=D64)
    density = torch.exp(-((grid[None] - values.clamp(0, 1)[:, None]) ** 2) / (2 * 0.15**2))
    mass = torch.stack(
        [torch.trapezoid(density[:, i * 20000 : (i + 1) * 20000 + 1], grid[:20001]) for i in range(5)], 1
    )
    torch.testing.assert_close(found, mass / mass.sum(1, keepdim=True), rtol=1e-8, atol=1e-10)
    narrow = heads.hl_gauss(values.float(), edges.float(), sigma=0.01)
    assert narrow.isfinite().all()
    torch.testing.assert_close(narrow.sum(1), torch.ones(5))


@pytest.mark.parametrize("sigma", [0.0, 0.75])
def test_regression_over_bins_learns(sigma, backend):
    torch.manual_seed(0)
    x = torch.randn(128, 3)
    values = x @ torch.tensor([1.0, -2.0, 0.5])
    head = heads.HLGaussHead(3, -8.0, 8.0, bins=31, sigma=sigma)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    before = (head.predict(x) - values).abs().mean()
    for _ in range(60):
        optimizer.zero_grad()
        head(x, values).backward()
        optimizer.step()
    assert (head.predict(x) - values).abs().mean() < 0.35 * before


# --- sampled classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct_positive", [True, False])
def test_sampled_classes(correct_positive, backend):
    x, weight, bias, labels = leaves()
    labels[1] = -100
    classes = torch.unique(torch.cat([labels[labels >= 0], torch.tensor([0, 10])]))
    log_q = torch.rand(len(classes), dtype=D64, requires_grad=True)
    total = 0.0
    for i in (0, 2, 3, 4, 5):
        z = []
        for k, j in enumerate(classes.tolist()):
            own = j == int(labels[i])
            z.append(x[i] @ weight[j] + bias[j] - (log_q[k] if correct_positive or not own else 0.0))
        target = z[classes.tolist().index(int(labels[i]))]
        total = total + torch.stack(z).logsumexp(0) - target
    found = heads.sampled_class_loss(
        x, weight, labels, classes, log_q=log_q, bias=bias, correct_positive=correct_positive
    )
    check(found, total / 5, (x, weight, bias, log_q))


def test_a_sample_without_a_positive_is_refused(backend):
    x, weight, _, labels = leaves()
    classes = torch.unique(labels)[1:]
    with pytest.raises(ValueError, match="classes must be ascending and hold the class of every row"):
        heads.sampled_class_loss(x, weight, labels, classes)
    with pytest.raises(ValueError, match="log_q must have shape"):
        heads.sampled_class_loss(x, weight, labels, torch.unique(labels), log_q=torch.zeros(99))


# --- the module -------------------------------------------------------------------------------------------------------


def test_predict_and_accuracy(backend):
    x, weight, bias, labels = leaves()
    for options in (dict(), dict(bias=True), dict(normalize=True, scale=3.0, bias=True), dict(softcap=2.0)):
        head = heads.ClassHead(CLASSES, FEATURES, dtype=D64, **options)
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)
        z = dense_logits(
            x, weight, head.bias, options.get("scale", 1.0), "normalize" in options, options.get("softcap")
        )
        values, classes = head.predict(x, 3)
        expected = z.topk(3)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(classes, expected.indices)
        labels[0] = -100
        right = (expected.indices == labels[:, None]).any(1)[1:].double().mean()
        assert abs(float(head.accuracy(x, labels, 3)) - float(right)) < 1e-6


def test_narrow_embeddings_are_read_in_the_dtype_of_the_weights(backend):
    head = heads.ClassHead(CLASSES, FEATURES)
    x, labels = torch.randn(ROWS, FEATURES), torch.arange(ROWS)
    torch.testing.assert_close(head(x.bfloat16(), labels), head(x.bfloat16().float(), labels))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x, labels), head(x.clone(), labels), rtol=0, atol=0)
    with pytest.raises(TypeError, match="embeddings must not be wider than the weights"):
        head(x.double(), labels)


def test_the_reference_twin_runs_on_the_reference():
    twin = flashpair.reference.ArcFace(CLASSES, FEATURES, dtype=D64)
    x, _, _, labels = leaves()
    head = heads.ArcFace(CLASSES, FEATURES, dtype=D64)
    head.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(x, labels), head(x, labels), rtol=1e-10, atol=1e-10)
    with pytest.raises(AttributeError, match="heads"):
        flashpair.reference.NoSuchHead  # noqa: B018


def test_a_second_derivative_is_refused():
    if "cpu" not in support.FUSED:
        pytest.skip("the reference has second derivatives")
    x, weight, _, labels = leaves()
    with flashpair.use_backend("cpu"):
        (g,) = torch.autograd.grad(heads.class_loss(x, weight, labels), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            g.sum().backward()


def test_compiled_code_is_eager_code(backend):
    x, weight, bias, labels = leaves()
    run = lambda a, w, b: heads.class_loss(a, w, labels, bias=b, scale=2.0, formula=heads.CrossEntropy(0.1))  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    check(compiled(x, weight, bias), run(x, weight, bias), (x, weight, bias))


# --- bad input --------------------------------------------------------------------------------------------------------

X, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # insightface's loss of a label out of range is -log(1e-30) = 69.08, for ever and without a gradient.
        (
            lambda: heads.class_loss(X, W, torch.tensor([0, 5])),
            ValueError,
            r"labels must be classes, in \[0, 5\).*got 5",
        ),
        (lambda: heads.class_loss(X, W, torch.tensor([0, -1])), ValueError, r"labels must be classes.*got -1"),
        (lambda: heads.class_loss(X, W, Y.int()), TypeError, "labels must be int64"),
        (lambda: heads.class_loss(X, W, Y[:1]), ValueError, "labels must have shape"),
        (lambda: heads.class_loss(X, W[:, :2], Y), ValueError, "equal features"),
        (lambda: heads.class_loss(X, W.double(), Y), TypeError, "one dtype"),
        (lambda: heads.class_loss(X, W, Y, bias=torch.zeros(4)), ValueError, "bias must have shape"),
        (lambda: heads.class_loss(X, W, Y, class_weight=torch.ones(4)), ValueError, "class_weight must have shape"),
        (lambda: heads.class_loss(X, W, Y, class_weight=torch.ones(5).long()), TypeError, "class_weight"),
        (lambda: heads.class_loss(X, W, Y, class_scale=torch.ones(4)), ValueError, "class_scale must have shape"),
        (lambda: heads.class_loss(X, W, Y, sample_weight=torch.ones(3)), ValueError, "sample_weight must have shape"),
        (lambda: heads.class_loss(X, W, Y, reduction="average"), ValueError, "reduction must be"),
        (lambda: heads.class_loss(X, W, Y, softcap=0.0), ValueError, "softcap"),
        (lambda: heads.class_loss(X, W, Y, scale=torch.ones(3)), ValueError, "scale"),
        (lambda: heads.class_loss(X, W, Y, gradient_filter=2.0), ValueError, "gradient_filter"),
        (lambda: heads.class_loss(X, W, Y, margin=lambda c: c), TypeError, "margin must be"),
        (lambda: heads.class_loss(X, W, Y, margin=heads.CombinedMargin(), scale=2.0), ValueError, "margin excludes"),
        (lambda: heads.CrossEntropy(label_smoothing=1.5), ValueError, "label_smoothing"),
        (lambda: heads.CrossEntropy(convention="other"), ValueError, "convention"),
        (lambda: heads.CrossEntropy(z_loss=-1.0), ValueError, "z_loss"),
        (lambda: heads.ClassHead(0, 3), ValueError, "num_classes"),
        (lambda: heads.ClassHead(3, 3.0), TypeError, "embedding_size"),
        (lambda: heads.ClassHead(3, 3, formula=lambda logits: logits), TypeError, "formula"),
        (lambda: heads.class_logits(X, W, Y, extras=("variance",)), ValueError, "extras must be of"),
        (lambda: heads.class_statistics(X, W, Y, [Term(Reduction.MOMENTS)]), ValueError, "MOMENTS"),
        (lambda: heads.class_statistics(X, W, Y, [Term(Reduction.SUM)], index=Y), ValueError, "index must have shape"),
        (lambda: heads.soft_cross_entropy(X, W, torch.zeros(2, 4)), ValueError, "targets must be"),
        (lambda: heads.soft_cross_entropy(X, W, torch.zeros(2, 5), softcap=1.0), ValueError, "softcap needs"),
        (lambda: heads.two_hot(torch.zeros(2), torch.tensor([1.0, 0.0])), ValueError, "centers must be ascending"),
        (lambda: heads.hl_gauss(torch.zeros(2), torch.tensor([0.0, 1.0]), sigma=0.0), ValueError, "sigma"),
        (lambda: flashpair.linear_cross_entropy(X, W, Y, options=object()), ValueError, "options must be None"),
        (
            lambda: flashpair.linear_cross_entropy(X, torch.zeros(5, 2, 3), Y),
            ValueError,
            "linear_weight must have shape",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
