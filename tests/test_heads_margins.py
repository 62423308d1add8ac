"""Margin heads against their definitions written out, row by row and class by class."""

# ruff: noqa: F811

from __future__ import annotations

import math

import pytest
import support
import torch
import torch.nn.functional as F
from head_cases import D64, backend, check  # noqa: F401

from flashpair import heads
from flashpair.heads.margins import add_angle, multiply_angle


def degrees(*angles: float) -> torch.Tensor:
    """Unit vectors of the plane."""
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles], dtype=D64)


WEIGHTS, LABELS = degrees(10, 50, 90), torch.tensor([0, 0, 1, 1, 2])


def batch(rows=7, features=4, classes=9, length=1.0, seed=0):
    """Embeddings near their classes, so that some negatives are harder than the moved positive and some are not."""
    g = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(classes, features, dtype=D64, generator=g)
    labels = torch.randint(0, classes, (rows,), generator=g)
    x = weight[labels] + 0.8 * torch.randn(rows, features, dtype=D64, generator=g)
    x = length * F.normalize(x) * torch.linspace(0.6, 1.6, rows, dtype=D64)[:, None]
    return x, weight, labels


def by_definition(x, weight, labels, positive, negative=lambda cosine, i: cosine, scale=lambda i: 64.0):
    """mean_i -log softmax: logit of the own class positive(cos θ, i), of the others negative(cos θ_j, i)."""
    total = 0.0
    for i in range(len(x)):
        cosines = [x[i] @ weight[j] / x[i].norm() / weight[j].norm() for j in range(len(weight))]
        logits = [scale(i) * (positive(c, i) if j == int(labels[i]) else negative(c, i)) for j, c in enumerate(cosines)]
        total = total + torch.stack(logits).logsumexp(0) - logits[int(labels[i])]
    return total / len(x)


def cos_of_sum(c, m):
    """cos(θ + m), ArcFace's fallback beyond π."""
    theta = torch.acos(c)
    return torch.cos(theta + m) if float(theta.detach()) + float(m) <= math.pi else c - m * math.sin(m)


def loss_of(margin, x, weight, labels, **options):
    return heads.class_loss(x, weight, labels, margin=margin.double(), **options)


def leaves_of(*arguments, **keywords):
    x, weight, labels = batch(*arguments, **keywords)
    return x.requires_grad_(), weight.requires_grad_(), labels


# --- the definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "positive"),
    [
        (dict(m2=0.5), lambda c: cos_of_sum(c, 0.5)),
        (dict(m2=2.5), lambda c: cos_of_sum(c, 2.5)),
        (dict(m2=0.0, m3=0.35), lambda c: c - 0.35),
        (dict(m2=0.3, m3=0.2), lambda c: cos_of_sum(c, 0.3) - 0.2),
        (dict(m2=0.0), lambda c: c),
    ],
)
def test_arc_and_cos(margin, positive, backend):
    x, weight, labels = leaves_of()
    expected = by_definition(x, weight, labels, lambda c, i: positive(c))
    check(loss_of(heads.CombinedMargin(**margin), x, weight, labels), expected, (x, weight))


def test_a_factor_of_the_angle(backend):
    """cos(m1 θ + m2) - m3 up to π, then falling on."""
    x, weight, labels = leaves_of()

    def positive(c, i):
        phi = 1.5 * torch.acos(c) + 0.1
        k = math.floor(float(phi.detach()) / math.pi)
        return (-1) ** k * torch.cos(phi) - 2 * k - 0.05

    margin = heads.CombinedMargin(8.0, 1.5, 0.1, 0.05)
    expected = by_definition(x, weight, labels, positive, scale=lambda i: 8.0)
    check(loss_of(margin, x, weight, labels), expected, (x, weight))


def test_a_learned_scale(backend):
    x, weight, labels = leaves_of()
    scale = torch.tensor(16.0, dtype=D64, requires_grad=True)
    expected = by_definition(x, weight, labels, lambda c, i: cos_of_sum(c, 0.5), scale=lambda i: scale)
    check(loss_of(heads.CombinedMargin(scale), x, weight, labels), expected, (x, weight, scale))


def test_interclass_filtering_leaves_e_to_the_0(backend):
    x, weight, labels = leaves_of()
    expected = by_definition(
        x, weight, labels, lambda c, i: cos_of_sum(c, 0.5), lambda c, i: c if float(c) <= 0.4 else 0.0 * c
    )
    margin = heads.CombinedMargin(interclass_filtering_threshold=0.4)
    check(loss_of(margin, x, weight, labels), expected, (x, weight))
    assert not torch.isclose(expected, by_definition(x, weight, labels, lambda c, i: cos_of_sum(c, 0.5)))


def test_sphere_face(backend):
    x, weight, labels = leaves_of(length=5.0)

    def positive(c, i):
        phi = 4 * torch.acos(c)
        k = math.floor(float(phi.detach()) / math.pi)
        return (-1) ** k * torch.cos(phi) - 2 * k

    expected = by_definition(x, weight, labels, positive, scale=lambda i: 1.3 * x[i].norm())
    check(loss_of(heads.SphereFaceMargin(4, 1.3), x, weight, labels), expected, (x, weight))


@pytest.mark.parametrize("easy", [True, False])
def test_mag_face(easy, backend):
    """Norms below, inside and above the bounds; the margin has a gradient through the norm."""
    x, weight, labels = leaves_of(length=70.0)
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % 9  # a cosine that may be negative

    def norm(i):
        return x[i].norm().clamp(60.0, 100.0)

    def positive(c, i):
        m = 0.45 + (0.8 - 0.45) * (norm(i) - 60) / 40
        if easy:
            return torch.cos(torch.acos(c) + m) if float(c) > 0 else c
        theta = torch.acos(c)
        return torch.cos(theta + m) if float(theta + m) <= math.pi else c - m * torch.sin(m)

    expected = by_definition(x, weight, labels, positive)
    expected = expected + sum(35 * (norm(i) / 100**2 + 1 / norm(i)) for i in range(len(x))) / len(x)
    margin = heads.MagFaceMargin(60.0, 100.0, easy_margin=easy)
    check(loss_of(margin, x, weight, labels), expected, (x, weight))
    head = heads.MagFace(9, 4, 60.0, 100.0, easy_margin=easy, dtype=D64)
    with torch.no_grad():
        head.weight.copy_(weight)
    torch.testing.assert_close(head(x, labels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["arc", "cos"])
@pytest.mark.parametrize("order", ["drawn", "plus", "public"])
def test_elastic_face(kind, order, backend):
    x, weight, labels = leaves_of()
    plus = order != "drawn"
    margin = heads.ElasticFaceMargin(
        std=0.1, kind=kind, plus=plus, public_order=order == "public", generator=torch.Generator().manual_seed(5)
    )
    mean = 0.5 if kind == "arc" else 0.35
    drawn = mean + 0.1 * torch.randn(len(x), dtype=D64, generator=torch.Generator().manual_seed(5))
    own = [float(F.cosine_similarity(x[i], weight[labels[i]], dim=0)) for i in range(len(x))]
    if plus:
        rank = sorted(range(len(x)), key=lambda i: -own[i])  # from easy to hard
        ordered = drawn.sort().values
        drawn = torch.stack([ordered[rank[i] if order == "public" else rank.index(i)] for i in range(len(x))])
    positive = (lambda c, i: cos_of_sum(c, drawn[i])) if kind == "arc" else (lambda c, i: c - drawn[i])
    check(loss_of(margin, x, weight, labels), by_definition(x, weight, labels, positive), (x, weight))
    if order == "plus":
        assert drawn[own.index(min(own))] == drawn.max()
    if order == "public":  # the hardest row need not get the largest margin
        assert not torch.equal(drawn.argsort(), torch.tensor(own).argsort(descending=True))


def test_curricular_face(backend):
    x, weight, labels = leaves_of()
    margin = heads.CurricularFaceMargin()
    t = 0.0
    hard = 0
    for _ in range(3):
        own = torch.stack([F.cosine_similarity(x[i], weight[labels[i]], dim=0) for i in range(len(x))]).detach()
        t = 0.01 * float(own.mean()) + 0.99 * t
        threshold = torch.cos(own.acos() + 0.5)
        hard = sum(
            float(F.cosine_similarity(x[i], weight[j], dim=0)) > threshold[i]
            for i in range(len(x))
            for j in range(len(weight))
            if j != int(labels[i])
        )
        expected = by_definition(
            x, weight, labels, lambda c, i: cos_of_sum(c, 0.5),
            lambda c, i, t=t, threshold=threshold: c * (t + c) if float(c) > threshold[i] else c,
        )  # fmt: skip
        check(loss_of(margin, x, weight, labels), expected, (x, weight))
    assert 0 < hard < len(x) * (len(weight) - 1)
    fixed = margin.t.clone()
    loss_of(margin.eval(), x, weight, labels)
    assert torch.equal(margin.t, fixed)


@pytest.mark.parametrize("clipped", [False, True])
def test_ada_face(clipped, backend):
    """Running statistics over three steps; with `clipped`, cosines beyond ±(1 - ε) on both sides."""
    x, weight, labels = leaves_of(length=20.0)
    eps = 0.3 if clipped else 1e-3
    margin = heads.AdaFaceMargin(t_alpha=0.3, eps=min(eps, 0.1))
    margin.eps = eps
    mean, std = 20.0, 100.0
    for _ in range(3):
        norms = x.detach().norm(dim=1).clamp(0.001, 100)
        mean = 0.3 * float(norms.mean()) + 0.7 * mean
        std = 0.3 * float(norms.std()) + 0.7 * std
        quality = (0.333 * (norms - mean) / (std + eps)).clamp(-1, 1)

        def clip(c):
            return c.clamp(-1 + eps, 1 - eps)

        def positive(c, i, quality=quality):
            theta = (clip(c).acos() - 0.4 * quality[i]).clamp(eps, math.pi - eps)
            return theta.cos() - (0.4 + 0.4 * quality[i])

        expected = by_definition(x, weight, labels, positive, lambda c, i: clip(c))
        check(loss_of(margin, x, weight, labels), expected, (x, weight))
    cosine = F.normalize(x) @ F.normalize(weight).T
    assert bool((cosine.abs() > 1 - eps).any()) == clipped


def test_p2s_grad(backend):
    x, weight, labels = leaves_of()
    head = heads.P2SGrad(9, 4, dtype=D64)
    with torch.no_grad():
        head.weight.copy_(weight)
    delta = F.one_hot(labels, 9)
    expected = ((F.normalize(x) @ F.normalize(head.weight).T - delta) ** 2).mean()
    check(head(x, labels), expected, (x, head.weight))


@pytest.mark.parametrize("workspace", [None, 1 << 20])
def test_sub_centers(workspace, backend):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 5, dtype=D64, generator=g, requires_grad=True)
    head = heads.SubCenterArcFace(6, 5, margin=0.4, scale=8.0, sub_centers=3, dtype=D64, max_workspace_bytes=workspace)
    labels = torch.tensor([0, 5, 2, 2])
    total = 0.0
    for i in range(4):
        cosines = [
            torch.stack([F.cosine_similarity(x[i], head.weight[3 * j + k], dim=0) for k in range(3)]).max()
            for j in range(6)
        ]
        logits = [8 * (cos_of_sum(c, 0.4) if j == int(labels[i]) else c) for j, c in enumerate(cosines)]
        total = total + torch.stack(logits).logsumexp(0) - logits[int(labels[i])]
    check(head(x, labels), total / 4, (x, head.weight))
    best = (F.normalize(x) @ F.normalize(head.weight).T).argmax(1) // 3
    assert torch.equal(head.predict(x)[1][:, 0], best)


def test_norm_face_learns_its_scale(backend):
    x, weight, labels = leaves_of()
    head = heads.NormFace(9, 4, scale=5.0, dtype=D64)
    with torch.no_grad():
        head.weight.copy_(weight)
    expected = F.cross_entropy(head.scale * F.normalize(x) @ F.normalize(head.weight).T, labels)
    check(head(x, labels), expected, (x, head.weight, head.scale))


# --- numbers of public code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "rows", "value"),
    [
        (heads.CombinedMargin(64, m2=0.5), (0, 20, 40, 60, 80), 4.35685243),  # insightface
        (heads.CombinedMargin(64, m2=0.0, m3=0.4), (0, 20, 40, 60, 80), 15.14531930),  # insightface
        (heads.CombinedMargin(64, m2=0.5), (3, 20, 41, 60, 80), 4.10765232),  # CurricularFace's ArcFace
        (heads.CurricularFaceMargin(), (3, 20, 41, 60, 80), 0.13676919),
    ],
)
def test_values_of_public_code(margin, rows, value, backend):
    loss = loss_of(margin, degrees(*rows), WEIGHTS, LABELS)
    assert abs(float(loss) - value) < 1e-7
    if isinstance(margin, heads.CurricularFaceMargin):
        assert abs(float(margin.t) - 0.00986932) < 1e-7
        margin.t.zero_()


def test_ada_face_value_of_public_code(backend):
    x = degrees(3, 20, 41, 60, 80) * torch.tensor([18.0, 22, 20, 26, 14], dtype=D64)[:, None]
    assert abs(float(loss_of(heads.AdaFaceMargin(t_alpha=1.0), x, WEIGHTS, LABELS)) - 15.81566133) < 1e-7


def test_straight_through_is_insightfaces_gradient(backend):
    """cos(θ + m) is computed under no_grad there: ∂loss/∂cos θ_y = s (p_y - 1) / B, without sin(θ + m) / sin θ."""
    found = {}
    for mode in ("exact", "straight_through"):
        x, weight, labels = leaves_of()
        logits = heads.CombinedMargin(8.0, m2=0.5, margin_grad=mode).logits(x, weight, labels)
        (found[mode],) = torch.autograd.grad(logits.cross_entropy.mean(), logits.similarity)
    own = torch.exp(-logits.cross_entropy)
    torch.testing.assert_close(found["straight_through"], 8.0 * (own - 1) / len(x), rtol=1e-12, atol=1e-12)
    theta = logits.similarity.acos()
    factor = torch.where(theta + 0.5 <= math.pi, torch.sin(theta + 0.5) / torch.sin(theta), 1.0)
    torch.testing.assert_close(found["exact"], factor * found["straight_through"], rtol=1e-10, atol=1e-12)


peer = pytest.importorskip("pytorch_metric_learning.losses")


@pytest.mark.parametrize(
    ("theirs", "margin"),
    [
        (
            lambda: peer.ArcFaceLoss(9, 4, margin=28.6, scale=64),
            lambda: heads.CombinedMargin(64, m2=math.radians(28.6)),
        ),
        (lambda: peer.CosFaceLoss(9, 4, margin=0.35, scale=64), lambda: heads.CombinedMargin(64, m2=0.0, m3=0.35)),
        (lambda: peer.SphereFaceLoss(9, 4), lambda: heads.SphereFaceMargin(4.0, 1.0)),
    ],
)
def test_like_the_peer(theirs, margin, backend):
    x, weight, labels = leaves_of(length=3.0)
    loss = theirs().double()
    (name,) = [n for n, _ in loss.named_parameters()]
    expected = torch.func.functional_call(loss, {name: weight.T}, (x, labels))
    check(loss_of(margin(), x, weight, labels), expected, (x, weight), bound=1e-9)


def test_sub_centers_like_the_peer(backend):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 5, dtype=D64, generator=g, requires_grad=True)
    labels = torch.tensor([0, 5, 2, 2])
    head = heads.SubCenterArcFace(6, 5, margin=math.radians(28.6), sub_centers=3, dtype=D64)
    loss = peer.SubCenterArcFaceLoss(num_classes=6, embedding_size=5, margin=28.6, scale=64, sub_centers=3).double()
    expected = torch.func.functional_call(loss, {"W": head.weight.T}, (x, labels))
    check(head(x, labels), expected, (x, head.weight), bound=1e-9)


def test_p2s_grad_like_the_peer(backend):
    x, weight, labels = leaves_of()
    head = heads.P2SGrad(9, 4, dtype=D64)
    with torch.no_grad():
        head.weight.copy_(F.normalize(weight))
    loss = peer.P2SGradLoss(num_classes=9, descriptors_dim=4).double()
    with torch.no_grad():
        loss.weight.copy_(head.weight.T)
    (a,) = torch.autograd.grad(head(x, labels), x)
    (b,) = torch.autograd.grad(loss(x, labels), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # it normalises its weights to five digits only


def test_the_peers_gradient_at_the_class_weight_is_nan_ours_is_finite(backend):
    x = WEIGHTS[:1].clone().requires_grad_()
    x.data = x.data / x.data.norm()
    weight = torch.eye(2, dtype=D64)
    x = weight[:1].clone().requires_grad_()
    loss = peer.ArcFaceLoss(2, 2).double()
    theirs = torch.func.functional_call(loss, {"W": weight.T.clone()}, (x, torch.tensor([0])))
    assert not torch.autograd.grad(theirs, x)[0].isfinite().all()
    assert torch.autograd.grad(loss_of(heads.CombinedMargin(), x, weight, torch.tensor([0])), x)[0].isfinite().all()


# --- extremes ---------------------------------------------------------------------------------------------------------

MARGINS = {
    "arc": lambda: heads.CombinedMargin(),
    "arc straight": lambda: heads.CombinedMargin(margin_grad="straight_through"),
    "combined": lambda: heads.CombinedMargin(64, 1.5, 0.2, 0.1),
    "sphere": lambda: heads.SphereFaceMargin(),
    "ada": lambda: heads.AdaFaceMargin(),
    "curricular": lambda: heads.CurricularFaceMargin(),
    "mag": lambda: heads.MagFaceMargin(),
    "elastic": lambda: heads.ElasticFaceMargin(plus=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_gradients_are_finite_on_and_opposite_the_class_weight(name, dtype, backend):
    weight = torch.eye(3, dtype=dtype)
    x = torch.cat([20 * weight, -20 * weight]).requires_grad_()
    weight.requires_grad_()
    loss = heads.class_loss(x, weight, torch.tensor([0, 1, 2, 0, 1, 2]), margin=MARGINS[name]().to(dtype))
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", MARGINS)
def test_rows_without_a_class_change_nothing(name, backend):
    x, weight, labels = batch(length=20.0)
    fewer = loss_of(MARGINS[name]().requires_grad_(False).eval(), x[1:], weight, labels[1:])
    if name == "elastic":
        return  # draws a margin for every row
    labels[0] = -100
    more = loss_of(MARGINS[name]().eval(), x, weight, labels)
    torch.testing.assert_close(more, fewer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ada", "curricular"])
def test_running_statistics_leave_out_rows_without_a_class(name, backend):
    x, weight, labels = batch(length=20.0)
    first, second = MARGINS[name]().double(), MARGINS[name]().double()
    loss_of(first, x[1:], weight, labels[1:])
    labels[0] = -100
    loss_of(second, x, weight, labels)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in MARGINS if n != "elastic"])
def test_sampled_classes_and_a_fused_step(name):
    """Partial FC with every margin: the labels count among the samples, all else is the same."""
    if "cpu" not in support.FUSED:
        pytest.skip("a fused backend is needed")
    x, weight, labels = batch(length=20.0, classes=30)
    head = heads.PartialFC_V2(MARGINS[name](), 4, 30, sample_rate=0.5, dtype=D64).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    head.fuse(heads.FusedSGD([head.weight], lr=0.1))
    x.requires_grad_()
    loss = head(x, labels)
    rows = head.sampled
    part = weight[rows].requires_grad_()
    expected = loss_of(MARGINS[name](), x, part, torch.searchsorted(rows, labels))
    gx, gw = torch.autograd.grad(expected, (x, part))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, gx, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(head.weight[rows], weight[rows] - 0.1 * gw, rtol=1e-9, atol=1e-10)


def test_falling_on_beyond_pi():
    c = torch.linspace(-1, 1, 401, dtype=D64)
    for values in (multiply_angle(c, 4.0), multiply_angle(c, 1.5, 0.2), add_angle(c, 0.5)):
        assert (values.diff() > -1e-9).all()  # never rises as the angle grows
    assert (add_angle(c, 0.5, fallback=False).diff() < -1e-9).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.CombinedMargin(scale=-1.0), "scale"),
        (lambda: heads.CombinedMargin(m1=0.5), "m1"),
        (lambda: heads.CombinedMargin(m2=28.6), "m2"),
        (lambda: heads.CombinedMargin(m3=-0.1), "m3"),
        (lambda: heads.CombinedMargin(interclass_filtering_threshold=1.1), "interclass_filtering_threshold"),
        (lambda: heads.CombinedMargin(margin_grad="none"), "margin_grad"),
        (lambda: heads.ArcFace(0, 4), "num_classes"),
        (lambda: heads.ArcFace(4, 4, margin=28.6), "m2"),
        (lambda: heads.AdaFaceMargin(t_alpha=0.0), "t_alpha"),
        (lambda: heads.CurricularFaceMargin(momentum=2.0), "momentum"),
        (lambda: heads.MagFaceMargin(lower_norm=10.0, upper_norm=5.0), "upper_norm"),
        (lambda: heads.ElasticFaceMargin(kind="sphere"), "kind"),
        (lambda: heads.SubCenterArcFace(4, 4, sub_centers=0), "sub_centers"),
        (lambda: heads.NormFace(4, 4, scale=0.0), "scale"),
        (lambda: heads.ClassHead(4, 4, margin=heads.CombinedMargin(), bias=True), "margin excludes bias"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
