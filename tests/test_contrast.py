"""The contrastive losses against loops from their papers, and what each promises beside its value."""
# ruff: noqa: F811

import math

import contrast_cases
import multi_label_cases
import pytest
import support
import torch
from contrast_cases import CASES
from loss_cases import engine  # noqa: F401
from views import Views, evaluate, unit, views

from flashpair import losses
from flashpair.losses.contrast.feature_transformation import beta_like

KINDS = ["random", "collapsed", "aligned", "large"]


def moved(d: Views, dtype: torch.dtype, device: str = "cpu") -> Views:
    return Views(*(v.detach().to(device=device, dtype=dtype).requires_grad_() for v in (d.x, d.y)))


def close(got: dict, want: dict, bound: float) -> None:
    for name, value in want.items():
        scale = max(value.abs().max().item(), 1.0)
        assert (got[name] - value).abs().max().item() <= bound * scale, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_definition(case, kind, engine):
    d = views(kind)
    close(evaluate(case.ours, moved(d, torch.float64, support.device(engine))), evaluate(case.define, d), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float32(case, engine):
    """A few times what float32 itself loses, measured in the definition."""
    d = views()
    want = evaluate(case.define, d)
    got = evaluate(case.ours, moved(d, torch.float32, support.device(engine)))
    plain = evaluate(case.define, moved(d, torch.float32))
    for name, value in want.items():
        lost = (plain[name] - value).abs().max().item()
        assert (got[name] - value).abs().max().item() <= 8 * lost + 3e-6 * max(value.abs().max().item(), 1), name


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_small_batches(case, rows, engine):
    """An empty batch is 0; one sample has no negatives and nothing that is NaN; gradients exist."""
    d = moved(views(b=rows) if rows else views(b=2), torch.float64, support.device(engine))
    d = Views(*(v.detach()[:rows].clone().requires_grad_() for v in (d.x, d.y)))
    loss = case.ours(d)
    assert loss.shape == () and not loss.isnan()
    if rows == 0:
        assert loss.item() == 0
    if rows == 1 and case.name.startswith("DCL"):
        assert loss.item() == -math.inf  # log of no negatives
        return
    grads = torch.autograd.grad(loss, [d.x, d.y], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_poison_reaches_the_loss(case, value, engine):
    d = moved(views(), torch.float64, support.device(engine))
    bad = d.x.detach().clone()
    bad[3, 1] = value
    d.x = bad.requires_grad_()
    assert case.ours(d).isnan()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_saved_for_backward(case):
    """Nothing of the size of S is kept: 300 × 300 numbers are 360 kB."""
    if "cpu" not in support.FUSED:
        pytest.skip("the CPU backend is measured")
    d = moved(views(b=300), torch.float32)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        for part in (t._indices(), t._values()) if t.is_sparse else (t,):
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    with support.forced("cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = case.ours(d)
    loss.backward()
    assert sum(kept.values()) < 300 * (60 * 8 + 24 * 5 * 4), sum(kept.values())


def test_mann_whitney_at_the_papers_temperature(engine):
    """T = 0.01: the table against every comparison, in float64 and float32."""
    d = moved(views(b=40), torch.float64, support.device(engine))
    s = unit(d.x) @ unit(d.y).T
    off = ~torch.eye(40, dtype=torch.bool, device=s.device)
    z = (s[off][None, :] - s.diagonal()[:, None]) / 0.01
    want = torch.nn.functional.softplus(z).sum() / 40
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-6)):
        e = moved(d, dtype, support.device(engine))
        got = losses.MannWhitneyLoss()(e.x, e.y)
        assert abs(got.double() - want) <= bound * want
        for a, b in zip(torch.autograd.grad(got, [e.x, e.y]), torch.autograd.grad(want, [d.x, d.y], retain_graph=True),
                        strict=True):  # fmt: skip
            assert (a.double() - b).abs().max() <= 50 * bound * b.abs().max()


def test_transformed_positives():
    """Extrapolation by 1 + Beta(2, 2) lowers what positives have in common; keys take no gradient."""
    torch.manual_seed(0)
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (64, 64, 32))
    q, k = q.requires_grad_(), (0.7 * q + 0.3 * k).detach().requires_grad_()
    plain = losses.FeatureTransformationLoss(0.5, None, None)(q, k, queue)
    assert torch.equal(plain, losses.info_nce_loss(q, k.detach(), queue=queue, temperature=0.5, normalize=False,
                                                   in_batch_negatives=False))  # fmt: skip
    torch.manual_seed(3)
    harder = losses.FeatureTransformationLoss(0.5, 2.0, None)(q, k, queue)
    assert harder > plain
    torch.manual_seed(3)
    stretch = 1 + beta_like(q, 2.0)
    far, other = stretch * q + (1 - stretch) * k.detach(), stretch * k.detach() + (1 - stretch) * q
    logits = torch.cat([(far * other).sum(1, keepdim=True), far @ queue.T], 1) / 0.5
    torch.testing.assert_close(harder, (logits.logsumexp(1) - logits[:, 0]).mean())
    assert torch.autograd.grad(harder, [q, k], allow_unused=True)[1] is None


def test_multi_view_masks(engine):
    """An arbitrary, asymmetric mask; an anchor without positives counts in the mean."""
    d = moved(views(), torch.float64, support.device(engine))
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[4] = False
    for mode in ("all", "one"):
        loss = losses.MultiViewSupConLoss(0.2, mode)
        ours = lambda e: loss(contrast_cases.stacked(e), mask=mask.to(e.x.device))  # noqa: B023, E731
        want = evaluate(lambda e: contrast_cases.define_multi_view(e, None, mode == "one", mask), views())  # noqa: B023
        close(evaluate(ours, d), want, 1e-10)


def test_hard_contrastive_keeps_ties(engine):
    """Duplicated keys at the threshold all stay."""
    x = torch.tensor(
        [[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64, device=support.device(engine)
    )
    loss = losses.HardContrastiveLoss(1.0, fraction=0.3)(x, x)  # one negative of three
    s = x @ x.T
    rows = [[1, 2], [2], [1], [1, 2]]
    want = sum(torch.log(s[i, i].exp() + s[i, j].exp().sum()) - s[i, i] for i, j in enumerate(rows)) / 4
    torch.testing.assert_close(loss, want)


def test_diagnostics(engine):
    d = moved(views(), torch.float64, support.device(engine))
    found = losses.temperature_diagnostics(d.x, d.y, 0.2, d.labels)
    s = unit(d.x) @ unit(d.y).T / 0.2
    off = ~torch.eye(9, dtype=torch.bool, device=s.device)
    r = s[off].reshape(9, 8).softmax(1)
    torch.testing.assert_close(found.pull, 1 - s.softmax(1).diagonal())
    torch.testing.assert_close(found.effective_negatives, (-(r * r.log()).sum(1)).exp())
    torch.testing.assert_close(found.hardest_share, r.amax(1))
    own = unit(d.x) @ unit(d.x).T
    alike = (d.labels[:, None] == d.labels[None]) & off
    torch.testing.assert_close(found.tolerance, own[alike].mean())
    torch.testing.assert_close(found.uniformity, -contrast_cases.define_uniformity(d.x))
    assert losses.temperature_diagnostics(d.x, d.y, 0.2).tolerance.isnan()


@pytest.mark.parametrize(
    ("name", "define"),
    [
        ("MultiLabelProtoLoss", multi_label_cases.define_proto),
        ("MSCLoss", multi_label_cases.define_msc),
        ("MSCRGLoss", multi_label_cases.define_mscrg),
    ],
)
def test_gradient_of_prototypes(name, define, engine):
    d = views()
    options = (0.1, 0.7, 0.2) if name == "MSCLoss" else ()
    loss = multi_label_cases.with_prototypes(getattr(losses, name)(4, 5, *options)).to(support.device(engine))
    prototypes = multi_label_cases.PROTOTYPES.clone().requires_grad_()
    (want,) = torch.autograd.grad(define(d, prototypes), prototypes)
    value = multi_label_cases.labelled(loss, moved(d, torch.float64, support.device(engine)))
    (got,) = torch.autograd.grad(value, loss.prototypes)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)


def test_label_sets(monkeypatch):
    """What rows share, in chunks of any size; lists and multi-hot tensors are the same."""
    from flashpair.losses.multi_label import label_sets

    hot = torch.rand(40, 13, generator=torch.Generator().manual_seed(0)) < 0.2
    hot[3] = hot[17] = False
    sets = losses.LabelSets.of("labels", hot, 40, hot.device)
    same = losses.LabelSets.from_lists([row.nonzero().flatten().tolist() for row in hot], 13)
    assert torch.equal(sets.owner, same.owner) and torch.equal(sets.label, same.label)
    row = torch.tensor([5, 3, 17, 39, 0, 3])
    want = hot[row].float() @ hot.float().T
    for entries in (1 << 22, 50, 1):
        monkeypatch.setattr(label_sets, "_ENTRIES", entries)
        assert torch.equal(sets.overlap(sets, row, torch.float32), want)
        for _, local, other in sets.shared_with(sets, torch.arange(40)):
            assert len(other) <= entries or len(local.unique()) == 1
    values = torch.randn(13, 4, dtype=torch.float64)
    weights = torch.rand(len(sets.owner), dtype=torch.float64)
    dense = torch.zeros(40, 13, dtype=torch.float64).index_put((sets.owner, sets.label), weights)
    torch.testing.assert_close(sets.mixture(values, weights), dense @ values)


def test_ten_thousand_labels():
    """Memory does not grow with the number of labels: sets, not tables."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=g).requires_grad_()
    of = [torch.randperm(10_000, generator=g)[:5].tolist() for _ in range(250)] * 2
    sets = losses.LabelSets.from_lists(of, 10_000)
    hot = torch.zeros(500, 10_000).index_put((sets.owner, sets.label), torch.ones(len(sets.owner)))
    for loss in (losses.MultiLabelContrastiveLoss(), losses.MulSupConLoss(), losses.JSCLLoss()):
        torch.testing.assert_close(loss(x, sets), loss(x, hot))


def test_logit_losses():
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (6, 5), generator=torch.Generator().manual_seed(0))
    y[0], y[1] = 0, 1
    rows = []
    for logits, labels in zip(z, y, strict=True):
        absent = 1 + sum(v.exp() for v, c in zip(logits, labels, strict=True) if not c)
        present = 1 + sum((-v).exp() for v, c in zip(logits, labels, strict=True) if c)
        rows.append(torch.log(torch.as_tensor(absent)) + torch.log(torch.as_tensor(present)))
    torch.testing.assert_close(losses.ZLPRLoss()(z, y), torch.stack(rows).mean())
    for clip, power in ((0.0, 2.0), (0.05, 2.0), (0.3, 0.5)):
        p = torch.sigmoid(z)
        q = (p - clip).clamp_min(1e-300)  # so that a power below one has a slope
        want = -torch.where(y.bool(), (1 - p) ** 0.5 * p.log(), q**power * (1 - q).log()).sum() / 6
        got = losses.AsymmetricLoss(power, 0.5, clip)(z, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)))


def test_preferences():
    """Each kind from its paper; gradients reach the policy only through the margin."""
    g = torch.Generator().manual_seed(0)
    w, b, rw, rb = (torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4))
    delta = (w - b) - (rw - rb)
    good, bad = torch.sigmoid(0.3 * delta), torch.sigmoid(-0.3 * delta)
    kinds = losses.PreferenceKind
    for kind, smoothing, want in (
        (kinds.SIGMOID, 0.0, -good.log()),
        (kinds.SIGMOID, 0.1, -0.9 * good.log() - 0.1 * bad.log()),
        (kinds.HINGE, 0.0, (1 - 0.3 * delta).clamp_min(0)),
        (kinds.IPO, 0.0, (delta - 1 / 0.6) ** 2),
        (kinds.ROBUST, 0.1, (-0.9 * good.log() + 0.1 * bad.log()) / 0.8),
    ):
        got = losses.PreferenceLoss(kind, 0.3, smoothing)(w, b, rw, rb)
        torch.testing.assert_close(got, want.mean())
        grads = [torch.autograd.grad(v, [w, rb], retain_graph=True) for v in (got, want.mean())]
        torch.testing.assert_close(*grads)


def test_reranking_gradients():
    """The matched choices have the gradients of contrastive training and of supervised fine-tuning."""
    g = torch.Generator().manual_seed(0)
    yes, no = (torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sign = torch.ones(5, 4, dtype=torch.float64)
    sign[:, 0] = -1
    contrastive = -yes.log_softmax(1)[:, 0].mean()
    tuned = torch.nn.functional.softplus(sign * (yes - no)).sum() / 5
    for name, want in (("CONTRASTIVE", contrastive), ("SFT", tuned)):
        loss = losses.RerankingLoss(losses.RerankingWeight[name], losses.RerankingDirection[name])(yes, no)
        for leaf in (yes, no):
            pair = [torch.autograd.grad(v, leaf, retain_graph=True, allow_unused=True)[0] for v in (loss, want)]
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                torch.testing.assert_close(*pair)
    flat = losses.RerankingLoss(losses.RerankingWeight.UNIFORM)(yes, no)
    torch.testing.assert_close(torch.autograd.grad(flat, yes)[0], sign / 5)


def test_jscl_sees_nothing_of_samples_that_share_no_label():
    """Not even the one on top of the anchor, at a temperature where the others are far away."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]])
    got = losses.JSCLLoss(0.01)(x, labels)
    # Anchors 0 and 1: log-sum over the other one, at cosine -1, less the mean of both; anchor 2 shares nothing.
    want = ((-100 - (-100 + 100) / 2) + (-100 - (-100 - 100) / 2)) / 3
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


LEARNABLE = {
    "SimCLRLoss": lambda t, d: losses.SimCLRLoss(t)(d.x, d.y),
    "DCLLoss": lambda t, d: losses.DCLLoss(t)(d.x, d.y),
    "HardContrastiveLoss": lambda t, d: losses.HardContrastiveLoss(t, 0.4)(d.x, d.y),
    "MEOWLoss": lambda t, d: losses.MEOWLoss(t)(d.x, d.y, d.clusters),
    "RnCLoss": lambda t, d: losses.RnCLoss(t)(d.x, d.targets),
    "NNCLRLoss": lambda t, d: losses.NNCLRLoss(t)(d.x, d.y, d.x, d.z, d.queue),
    "FeatureTransformationLoss": lambda t, d: losses.FeatureTransformationLoss(t, None, None)(d.x, d.y, d.queue),
    # Its factor 2 T takes no gradient.
    "MoCoV3Loss": lambda t, d: losses.MoCoV3Loss(t)(*contrast_cases.keys(d)) / (2 * t.detach()),
    "CWCLLoss": lambda t, d: losses.CWCLLoss()(unit(d.x), unit(d.y), 1 / t, d.frozen),
    "CyCLIPLoss": lambda t, d: losses.CyCLIPLoss()(unit(d.x), unit(d.y), 1 / t),
    "DistillClipLoss": lambda t, d: losses.DistillClipLoss()(unit(d.x), unit(d.y), 1 / t, d.z, d.y, 1.0)[1],
}


@pytest.mark.parametrize("name", LEARNABLE)
def test_gradient_of_the_temperature(name, engine):
    """Against a central difference."""
    d = moved(views(), torch.float64, support.device(engine))
    at = lambda t: LEARNABLE[name](torch.tensor(t, dtype=torch.float64, device=d.x.device), d).item()  # noqa: E731
    t = torch.tensor(0.4, dtype=torch.float64, device=d.x.device, requires_grad=True)
    (got,) = torch.autograd.grad(LEARNABLE[name](t, d), t)
    want = (at(0.4 + 1e-5) - at(0.4 - 1e-5)) / 2e-5
    assert abs(got.item() - want) <= 1e-7 * max(abs(want), 1)


def test_thresholds_leave_room_for_rounding():
    """Of two negatives that another product may put in the other order, both stay."""
    from flashpair.losses.contrast.hard_contrastive import thresholds

    angle = torch.tensor([0.0, 1.0, 1.0 + 1e-16, 2.0], dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x[2, 0] += 2e-16
    last = (x[0] @ x[2]).clamp(max=x[0] @ x[1])
    assert thresholds(x, x, 1)[0] <= last - 6 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize(("density", "bound"), [(torch.float32, 1e-7), (torch.float64, 1e-10)])
def test_the_table_alone(temperature, density, bound, monkeypatch):
    """In float64 at the density of either dtype: F and its gradients within the stated share of the largest."""
    from flashpair.losses.contrast import mann_whitney

    monkeypatch.setitem(mann_whitney._DENSITY, torch.float64, mann_whitney._DENSITY[density])
    own = 2 * torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    own.requires_grad_()
    s = torch.linspace(-1, 1, 999, dtype=torch.float64, requires_grad=True)
    got = mann_whitney.Interpolated.apply(*mann_whitney.softplus_table(own, temperature), s)
    want = torch.nn.functional.softplus((s[:, None] - own) / temperature, threshold=100).sum(1)
    for a, b in ((got, want), *zip(*(torch.autograd.grad(v.sum(), [s, own]) for v in (got, want)), strict=True)):
        assert ((a - b).abs() <= bound * b.abs().max()).all()


BAD = [
    (lambda x: losses.SimCLRLoss(0.0), ValueError, "temperature"),
    (lambda x: losses.SimCLRLoss(reduction="mean"), TypeError, r"reduction must be one of SimCLRReduction.MEAN"),
    (lambda x: losses.SimCLRLoss()(x, x[:3]), ValueError, "first and second must have equal numbers of rows"),
    (lambda x: losses.SimCLRLoss()(x, x.double()), TypeError, "first and second must have one dtype"),
    (lambda x: losses.DCLWLoss(sigma=-1), ValueError, "sigma"),
    (lambda x: losses.DebiasedContrastiveLoss(tau_plus=1.0), ValueError, "tau_plus must be below 1"),
    (lambda x: losses.HardNegativeContrastiveLoss(beta=-1.0), ValueError, "beta"),
    (lambda x: losses.HardContrastiveLoss(fraction=0.0), ValueError, "fraction"),
    (lambda x: losses.AlignmentLoss(0.0), ValueError, "alpha"),
    (lambda x: losses.UniformityLoss()(x[0]), ValueError, "embeddings must have shape"),
    (lambda x: losses.CyCLIPLoss(cross=math.nan), ValueError, "cross"),
    (lambda x: losses.CWCLLoss()(x, x, 1.0, x[:2]), ValueError, "frozen must have 4 rows"),
    (lambda x: losses.MannWhitneyLoss(1e-6), ValueError, "temperature"),
    (lambda x: losses.MannWhitneyLoss()(x, x, x[:, :2]), ValueError, "negatives must have equal features"),
    (lambda x: losses.CACRLoss()(x), ValueError, "views must be at least 2"),
    (lambda x: losses.CACRLoss()(x, x, x[:2]), ValueError, r"views\[2\]"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(4).long()), TypeError, "clusters must be int64 of shape"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(2, 3).long()), ValueError, "clusters must have shape"),
    (lambda x: losses.RnCLoss()(x, torch.zeros(4).long()), TypeError, "targets must be a floating-point tensor"),
    (lambda x: losses.RnCLoss()(x, torch.zeros(3)), ValueError, r"targets must have shape \(4,\)"),
    (lambda x: losses.NNCLRLoss()(x, x, x, x, x[:0]), ValueError, "support must have at least one row"),
    (lambda x: losses.NNCLRLoss()(x, x, x, x[:2], x), ValueError, "first and second_prediction must have equal"),
    (lambda x: losses.MoCoV3Loss()(x, x, x, x[:2]), ValueError, "first_query and second_key must have equal"),
    (lambda x: losses.CoCaLoss(2.0, 1.0)(x, x, x, x.long(), 1.0), ValueError, "logits must have shape"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(0, 4).long()), ValueError, "clusters must hold at least one"),
    (lambda x: losses.MultiViewSupConLoss()(x), ValueError, "features must have shape"),
    (lambda x: losses.MultiViewSupConLoss(contrast_mode="both"), ValueError, "contrast_mode must be 'all' or 'one'"),
    (
        lambda x: losses.MultiViewSupConLoss()(x[:, None], torch.zeros(4).long(), torch.eye(4).bool()), ValueError,
        "labels and mask exclude each other",
    ),
    (lambda x: losses.FeatureTransformationLoss(positive_alpha=0.0), ValueError, "positive_alpha"),
    (lambda x: losses.FeatureTransformationLoss()(x, x, x[:, :2]), ValueError, "queue must have equal features"),
    (lambda x: losses.MACLLoss(alpha=1.0), ValueError, r"alpha \* \(1 \+ A_0\) must be below 1"),
    (lambda x: losses.MultipleNegativesRankingLoss()([x]), ValueError, "embeddings must hold at least 2 columns"),
    (lambda x: losses.MultipleNegativesRankingLoss()([x, x[:2]]), ValueError, r"embeddings\[1\]"),
    (lambda x: losses.MultipleNegativesRankingLoss()([{}, {}]), ValueError, "model must be given"),
    (lambda x: losses.MultipleNegativesRankingLoss(directions=["doc_to_doc"]), ValueError, "directions must be"),
    (lambda x: losses.MultipleNegativesRankingLoss(partition_mode="all"), ValueError, "partition_mode must be one of"),
    (lambda x: losses.MultipleNegativesRankingLoss(hardness_mode="all"), ValueError, "hardness_mode must be one of"),
    (lambda x: losses.GISTEmbedLoss()([x, x], [x]), ValueError, "the same two or more columns; got 2 and 1"),
    (lambda x: losses.GISTEmbedLoss()([x, x], [x, x[:2]]), ValueError, r"guide_embeddings\[1\] must have 4 rows"),
    (lambda x: losses.GISTEmbedLoss(margin_strategy="none"), ValueError, "margin_strategy must be one of"),
    (lambda x: losses.CoSENTLoss()([x, x]), TypeError, "labels must be a tensor"),
    (lambda x: losses.CoSENTLoss()([x, x], torch.zeros(3)), ValueError, "labels must hold 4 numbers"),
    (lambda x: losses.CoSENTLoss()([x, x, x], torch.zeros(4)), ValueError, "embeddings must hold 2 columns; got 3"),
    (lambda x: losses.MarginMSELoss()([x, x], torch.zeros(4)), ValueError, "embeddings must hold at least 3 columns"),
    (lambda x: losses.MarginMSELoss()([x, x, x], torch.zeros(4, 2)), ValueError, r"labels must have shape \(4, 1\)"),
    (lambda x: losses.MatryoshkaLoss(losses.SimCLRLoss(), []), ValueError, "matryoshka_dims must be one or more"),
    (lambda x: losses.MatryoshkaLoss(losses.SimCLRLoss(), [9])(x, x), ValueError, "at least 9 features"),
    (lambda x: losses.DistillClipLoss()(x, x, 1.0, x[:2], x[:2], 1.0), ValueError, "dist_image_features must have 4"),
    (lambda x: losses.MulSupConLoss()(x, torch.zeros(3, 2)), ValueError, r"labels must be LabelSets or a multi-hot"),
    (lambda x: losses.MulSupConLoss()(x, torch.full((4, 2), 2)), ValueError, "labels must hold 0 and 1 only"),
    (lambda x: losses.MultiLabelContrastiveLoss("jaccard"), TypeError, "weight must be one of LabelWeight.ALL"),
    (lambda x: losses.MSCLoss(3, 5)(x, torch.zeros(4, 2)), ValueError, "labels must have num_labels=3 columns"),
    (lambda x: losses.LabelSets.from_lists([[0, 3]], 3), ValueError, r"labels\[0\] must be different numbers"),
    (lambda x: losses.ZLPRLoss()(x, torch.zeros(4, 2)), ValueError, "labels must be multi-hot of shape"),
    (lambda x: losses.RankNetLoss()(x, x), TypeError, "scores must be a 1-D"),
    (lambda x: losses.RankNetLoss()(x[:, 0], x[:3, 0]), ValueError, r"targets must have shape \(4,\)"),
    (lambda x: losses.ListNetLoss()(x[:, 0], x[:, 0], torch.zeros(3).long()), ValueError, "lists must have shape"),
    (lambda x: losses.ComparisonLoss("thurstone"), TypeError, "model must be one of ComparisonModel.THURSTONE"),
    (lambda x: losses.LambdaLoss(k=0), ValueError, "k must be at least 1"),
    (lambda x: losses.PreferenceLoss(losses.PreferenceKind.IPO, 0.1, 0.1), ValueError, "label_smoothing must be 0"),
    (lambda x: losses.PreferenceLoss()(*x[:3], x[3, :2]), ValueError, "reference_rejected must have 5 entries"),
    (lambda x: losses.RerankingLoss()(x, x[:2]), ValueError, "yes and no must have one shape"),
    (lambda x: losses.AMCLLoss()([x], [x, x], x, x), ValueError, "first and second must hold as many heads"),
    (lambda x: losses.AMCLLoss(2.0, 1.0), ValueError, "temperature_max"),
    (lambda x: losses.SimLAPLoss()(x, x, torch.zeros(4), torch.zeros(4).long()), TypeError, "labels must be int64"),
    (lambda x: losses.temperature_diagnostics(x[:1], x[:1], 0.1), ValueError, "first must have at least 2 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.randn(4, 5))


@pytest.mark.parametrize("name", ["SimCLRLoss", "CWCLLoss", "RankNetLoss", "MultipleNegativesRankingLoss joint"])
def test_compiles_as_one_graph(name):
    case = next(c for c in CASES if c.name == name)
    d, loss = views(b=16), case.make(None)
    want = evaluate(lambda d: case.call(loss, d), d)
    compiled = torch.compile(lambda d: case.call(loss, d), fullgraph=True, backend="aot_eager")
    got = evaluate(compiled, views(b=16))
    torch._dynamo.reset()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_narrow_dtypes(case, dtype, engine):
    """The loss of the rounded embeddings; what is computed of them before the loss is called is rounded too."""
    if not support.serves(engine, dtype):
        pytest.skip(f"{engine} does not serve {dtype}")
    rounded = Views(*(v.detach().to(dtype).requires_grad_() for v in (views().x, views().y)))
    torch.manual_seed(7)  # for the losses that draw
    want = case.define(moved(rounded, torch.float64))
    torch.manual_seed(7)
    device = support.device(engine)
    d = moved(rounded, dtype, device)
    got = case.ours(d)
    assert got.dtype == torch.float32
    rows = rounded.x.detach().double()
    size = max(abs(want.item()), 1.0) * max(rows.abs().max().item(), 1.0)
    assert abs(got.double().cpu() - want) <= 16 * torch.finfo(dtype).eps * size
    (grad,) = torch.autograd.grad(got, d.x)
    assert grad.dtype == dtype and grad.isfinite().all()
