"""The rest of the pair-based family: ours, its definition as loops over pairs, the public peer. One row, all tests."""

from __future__ import annotations

import itertools
import math

import torch
from loss_cases import Batch, Case, cosine, mean, peer_losses, peer_miners, total, unit_distance
from torch import Tensor

from flashpair import losses, miners


def unit(a: Tensor) -> Tensor:
    return a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((unit(a) - unit(b)) ** 2).sum()


def table(data: Batch, similarity) -> tuple[list, list, list]:
    """(s[i][j], positives of i, negatives of i) as columns; the row itself is in neither."""
    y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    s = [[similarity(a, b) for b in y] for a in data.x]
    positives, negatives = [], []
    for i in range(len(data.x)):
        columns = [j for j in range(len(y)) if data.y is not None or j != i]
        positives.append([j for j in columns if refs[j] == data.labels[i]])
        negatives.append([j for j in columns if refs[j] != data.labels[i]])
    return s, positives, negatives


def some(values: list[Tensor]) -> list[Tensor]:
    return [v for v in values if v.item() > 0]


def lse(values: list[Tensor]) -> Tensor:
    return torch.stack(values).logsumexp(0)


def plus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def define_generalized_lifted(data: Batch) -> Tensor:
    s, positives, negatives = table(data, unit_distance)
    terms = []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        pull = lse([s[i][j] for j in p]) if p else torch.zeros((), dtype=data.x.dtype)
        push = lse([1 - s[i][j] for j in n]) if n else torch.zeros((), dtype=data.x.dtype)
        terms.append((pull + push).clamp_min(0))
    return mean(terms, data.x)


def define_lifted(data: Batch) -> Tensor:
    s, positives, negatives = table(data, unit_distance)
    rows = range(len(data.x))
    refs = data.labels if data.y is None else data.ref_labels
    terms = []
    for i in rows:
        for p in positives[i]:
            far = [1 - s[i][n] for n in negatives[i]] + [1 - s[k][p] for k in rows if data.labels[k] != refs[p]]
            terms.append((lse(far) + s[i][p]).clamp_min(0) ** 2 / 2 if far else s[i][p] * 0)
    return mean(terms, data.x)


def define_nca(data: Batch) -> Tensor:
    s, positives, negatives = table(data, squared)
    terms = []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        if p:
            terms.append(lse([-s[i][j] for j in p + n]) - lse([-s[i][j] for j in p]))
    return mean(terms, data.x)


def define_intra_pair_variance(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    near = [s[i][j] for i, row in enumerate(positives) for j in row]
    far = [s[i][j] for i, row in enumerate(negatives) for j in row]
    pull = [((1 - 0.01) * mean(near, data.x) - v).clamp_min(0) ** 2 for v in near]
    push = [(v - (1 + 0.01) * mean(far, data.x)).clamp_min(0) ** 2 for v in far]
    return mean(pull, data.x) + mean(push, data.x)


def define_tuplet(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    terms, beta = [], math.radians(5.73)
    for i, row in enumerate(positives):
        for p in row:
            eased = torch.cos(torch.acos(s[i][p]) - beta)
            terms.append(torch.log1p(total([torch.exp(64 * (s[i][n] - eased)) for n in negatives[i]], data.x)))
    return mean(terms, data.x)


def define_threshold_consistent(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    pull = [0.9 - s[i][j] for i, row in enumerate(positives) for j in row if s[i][j].item() <= 0.9]
    push = [s[i][j] - 0.5 for i, row in enumerate(negatives) for j in row if s[i][j].item() >= 0.5]
    return mean(pull, data.x) + mean(push, data.x)


def define_ranked_list(data: Batch) -> Tensor:
    s, positives, negatives = table(data, unit_distance)
    terms, alpha, margin, tn, floor = [], 1.2, 0.4, 10, 1e-5 * len(s[0]) if len(s) else 0.0
    for i in range(len(data.x)):
        near = [s[i][j] for j in positives[i] if s[i][j].item() > alpha - margin]
        far = [s[i][j] for j in negatives[i] if s[i][j].item() < alpha]
        pull = total([d - (alpha - margin) for d in near], data.x) / (len(near) + floor)
        weights = [torch.exp(tn * (alpha - d)) for d in far]
        push = total([w * (alpha - d) for w, d in zip(weights, far, strict=True)], data.x)
        terms.append(0.5 * pull + 0.5 * push / (total(weights, data.x) + floor))
    return mean(terms, data.x)


def define_margin(data: Batch) -> Tensor:
    s, positives, negatives = table(data, unit_distance)
    terms, active, beta = [], 0, 1.25
    for i in range(len(data.x)):
        for p, n in itertools.product(positives[i], negatives[i]):
            pull, push = (s[i][p] - beta + 0.2).clamp_min(0), (beta - s[i][n] + 0.2).clamp_min(0)
            active += (pull.item() > 0) + (push.item() > 0)
            terms.append(pull + push)
    return total(terms, data.x) / max(active, 1)


def define_angular(data: Batch) -> Tensor:
    y = data.x if data.y is None else data.y
    s, positives, negatives = table(data, cosine)
    terms, t = [], math.tan(math.radians(40)) ** 2
    for i, row in enumerate(positives):
        for p in row:
            ends = unit(data.x[i]) + unit(y[p])
            far = [4 * t * ends @ unit(y[n]) - 2 * (1 + t) * s[i][p] for n in negatives[i]]
            terms.append(torch.log1p(total([torch.exp(z) for z in far], data.x)))
    return mean(terms, data.x)


def nodes(values: list[Tensor], low: float, high: float, bins: int, like: Tensor) -> list[Tensor]:
    """Tent functions of the nodes."""
    step = (high - low) / bins
    inside = [v.clamp(low, high) for v in values]
    return [
        total([(1 - (v - (low + k * step)).abs() / step).clamp_min(0) for v in inside], like) for k in range(bins + 1)
    ]


def define_fast_ap(data: Batch) -> Tensor:
    s, positives, negatives = table(data, squared)
    terms = []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        if not p:
            continue
        near, every = (nodes([s[i][j] for j in js], 0, 4, 10, data.x) for js in (p, p + n))
        precision, rank, below = [], 0.0, 0.0
        for h, a in zip(near, every, strict=True):
            below, rank = below + h, rank + a
            if h.item() > 0:
                precision.append(h * below / rank)
        terms.append(1 - total(precision, data.x) / len(p))
    return mean(terms, data.x)


def define_histogram(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    near, far = set(), set()
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        if p and n:
            order = (lambda a, b: (min(a, b), max(a, b))) if data.y is None else (lambda a, b: (a, b))
            near |= {order(i, j) for j in p}
            far |= {order(i, j) for j in n}
    if not near:
        return (data.x * 0).sum()
    a, b = (nodes([s[i][j] for i, j in sorted(pairs)], -1, 1, 100, data.x) for pairs in (near, far))
    a, b = torch.stack(a) / len(near), torch.stack(b) / len(far)
    return (b * a.cumsum(0)).sum()


def sigmoid_rank(s: list, point: Tensor, columns: list[int], tau: float, like: Tensor) -> Tensor:
    return total([torch.sigmoid((s[k] - point) / tau) for k in columns], like)


def define_smooth_ap(data: Batch) -> Tensor:
    s, positives, _ = table(data, cosine)
    terms, tau = [], 0.01
    for i, p in enumerate(positives):
        members = p if data.y is not None else sorted([*p, i])
        precision = []
        for j in members:
            near = sigmoid_rank(s[i], s[i][j], [k for k in members if k != j], tau, data.x)
            every = sigmoid_rank(s[i], s[i][j], [k for k in range(len(s[i])) if k != j], tau, data.x)
            precision.append((1 + near) / (1 + every))
        if members:
            terms.append(1 - total(precision, data.x) / len(members))
    return mean(terms, data.x)


def define_pnp(data: Batch, penalty=lambda r: r) -> Tensor:
    s, positives, negatives = table(data, cosine)
    terms = []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        if p:
            members = p if data.y is not None else [*p, i]
            terms.append(mean([penalty(sigmoid_rank(s[i], s[i][j], n, 0.01, data.x)) for j in members], data.x))
    return mean(terms, data.x)


PENALTIES = {
    "O": lambda r: r,
    "Ds": torch.log1p,
    "Dq": lambda r: 1 - 1 / (1 + r),
    "Iu": lambda r: (1 + r) * torch.log1p(r),
    "Ib": lambda r: (2 * r - torch.log1p(2 * r)) / 4,
}


def triplets(data: Batch, similarity):
    s, positives, negatives = table(data, similarity)
    for i in range(len(data.x)):
        for p, n in itertools.product(positives[i], negatives[i]):
            yield s[i][p], s[i][n], p, n


def define_triplet(data: Batch) -> Tensor:
    return mean(some([(a - b + 0.2).clamp_min(0) for a, b, *_ in triplets(data, unit_distance)]), data.x)


def define_triplet_smooth(data: Batch) -> Tensor:
    return mean([plus(b - a + 0.1) for a, b, *_ in triplets(data, cosine)], data.x)


def define_triplet_swap(data: Batch) -> Tensor:
    y = data.x if data.y is None else data.y
    terms = []
    for near, far, p, n in triplets(data, unit_distance):
        terms.append((near - torch.minimum(far, unit_distance(y[p], y[n])) + 0.2).clamp_min(0))
    return mean(some(terms), data.x)


def define_triplet_semihard_mined(data: Batch) -> Tensor:
    found = [(a, b) for a, b, *_ in triplets(data, unit_distance) if 0 < b.item() - a.item() <= 0.3]
    return mean(some([(a - b + 0.2).clamp_min(0) for a, b in found]), data.x)


def define_dynamic_soft_margin(data: Batch) -> Tensor:
    values = [a - b for a, b, *_ in triplets(data, unit_distance)]
    counts, step = [0.0] * 10, 0.4
    for v in values:
        place = (v.item() + 2) / step
        left = min(math.floor(place), 9)
        counts[left] += 1 - (place - left)
        counts[min(left + 1, 9)] += place - left
    terms = [sum(counts[: min(int((v.item() + 2) // step), 9) + 1]) / sum(counts) * v for v in values]
    return mean(terms, data.x)


def define_semi_hard(data: Batch) -> Tensor:
    s, positives, negatives = table(data, squared)
    terms = []
    for i, row in enumerate(positives):
        far = [s[i][n] for n in negatives[i]]
        for p in row if far else []:
            beyond = [d for d in far if d.item() > s[i][p].item()]
            chosen = min(beyond, key=Tensor.item) if beyond else max(far, key=Tensor.item)
            terms.append((s[i][p] - chosen + 1).clamp_min(0))
    return mean(terms, data.x)


def define_binomial_deviance(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    terms = []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        pull, push = [plus(-2 * (s[i][j] - 0.5)) for j in p], [plus(40 * (s[i][j] - 0.5)) for j in n]
        terms.append(mean(pull, data.x) + mean(push, data.x))
    return mean(terms, data.x)


def define_pair_circle(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    m, gamma = 0.4, 80
    keep = lambda i, j: data.y is not None or i < j  # noqa: E731
    near = [s[i][j] for i, row in enumerate(positives) for j in row if keep(i, j)]
    far = [s[i][j] for i, row in enumerate(negatives) for j in row if keep(i, j)]
    if not near or not far:
        return (data.x * 0).sum()
    pull = [-gamma * (1 + m - v).detach().clamp_min(0) * (v - (1 - m)) for v in near]
    push = [gamma * (v + m).detach().clamp_min(0) * (v - m) for v in far]
    return plus(lse(pull) + lse(push))


def define_snr(data: Batch) -> Tensor:
    s, positives, negatives = table(data, lambda a, b: (unit(a) - unit(b)).var() / unit(a).var())
    pull = some([s[i][j] - 0.1 for i, row in enumerate(positives) for j in row])
    push = some([1 - s[i][j] for i, row in enumerate(negatives) for j in row])
    return mean(pull, data.x) + mean(push, data.x)


def define_n_pairs(data: Batch) -> Tensor:
    rows = range(len(data.x))
    firsts = {}
    for i, j in itertools.product(rows, rows):
        if i != j and data.labels[i] == data.labels[j]:
            firsts.setdefault(int(data.labels[i]), (i, j))
    pairs = [firsts[label] for label in sorted(firsts)]
    terms = []
    for i, j in pairs:
        terms.append(lse([cosine(data.x[i], data.x[p]) for _, p in pairs]) - cosine(data.x[i], data.x[j]))
    return mean(terms, data.x)


def define_instance(data: Batch) -> Tensor:
    ranks = sorted({int(v) for v in data.labels})
    terms = []
    for i in range(len(data.x)):
        row = [64 * cosine(data.x[i], b) for b in data.x]
        terms.append(lse(row) - row[ranks.index(int(data.labels[i]))])
    return mean(terms, data.x)


def define_centroid_triplet(data: Batch) -> Tensor:
    y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    terms = []
    for i in range(len(data.x)):
        own = [j for j in range(len(y)) if refs[j] == data.labels[i] and (data.y is not None or j != i)]
        if not own:
            continue
        near = unit_distance(data.x[i], y[own].mean(0))
        for label in {int(v) for v in refs} - {int(data.labels[i])}:
            far = unit_distance(data.x[i], y[[j for j in range(len(y)) if refs[j] == label]].mean(0))
            terms.append((near - far + 0.05).clamp_min(0))
    return mean(some(terms), data.x)


def define_proto_triplet(data: Batch) -> Tensor:
    y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    means = {int(v): y[refs == v].mean(0) for v in refs}
    terms = []
    for a, label in zip(data.x, data.labels, strict=True):
        d = {c: (((a - m) ** 2).sum() + 1e-6).sqrt() for c, m in means.items()}
        others = [v for c, v in d.items() if c != int(label) and v.item() > 1.0001e-3]
        if int(label) in d and others:
            terms.append((d[int(label)] - min(others, key=Tensor.item) + 0.5).clamp_min(0))
    return total(terms, data.x) / max(len(data.x), 1)


def define_icnn(data: Batch, k: int = 4) -> Tensor:
    y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    e, rows, kept = 1e-7, [], []
    for i in range(len(data.x)):
        others = [j for j in range(len(y)) if data.y is not None or j != i]
        d = [((((data.x[i] - y[j]) ** 2).sum() + 1e-6).sqrt(), bool(refs[j] == data.labels[i])) for j in others]
        d = sorted(d, key=lambda v: v[0].item())[: k + 1]
        rivals = [v for v, same in d if not same]
        rows.append((d[:k], min(rivals, key=Tensor.item) if rivals else None))
        kept += [v for v, same in d[:k] if not same]
    near, far, purity = [], [], 0
    top = max(kept, key=Tensor.item) if kept else torch.zeros(())
    for d, rival in rows:
        scaled = [v / (rival + e) if rival is not None else v * 0 for v, _ in d]
        scale = max([*scaled, torch.ones((), dtype=data.x.dtype)], key=Tensor.item)
        own = [v / scale for v, (_, same) in zip(scaled, d, strict=True) if same]
        foreign = [v / (top + e) for v, same in d if not same]
        purity += len(own)
        near += [total(own, data.x) / (len(own) + e)] if own else []
        far += [total(foreign, data.x) / (len(foreign) + e)] if foreign else []
    closeness = 1 - total(near, data.x) / (len(near) + e)
    apart = (total(far, data.x) / (len(far) + e) - (0 if kept else 1)).abs()
    return -torch.log(((closeness + apart) / 2 + purity / (k * len(data.x))) / 2)


def define_vicreg(data: Batch) -> Tensor:
    x, y = data.x, data.y
    b, d = x.shape
    loss = 25 * mean([((p - q) ** 2).mean() for p, q in zip(x, y, strict=True)], x)
    for view in (x, y):
        centred = view - view.mean(0)
        covariance = [[(centred[:, k] * centred[:, m]).sum() / (b - 1) for m in range(d)] for k in range(d)]
        loss = loss + 25 * mean([(1 - (covariance[k][k] + 1e-4).sqrt()).clamp_min(0) / 2 for k in range(d)], x)
        loss = loss + total([covariance[k][m] ** 2 for k in range(d) for m in range(d) if k != m], x) / d
    return loss


def define_barlow(data: Batch) -> Tensor:
    z = [(v - v.mean(0)) / (v.var(0, correction=0) + 1e-5).sqrt() for v in (data.x, data.y)]
    b, d = data.x.shape
    c = [[(z[0][:, k] * z[1][:, m]).sum() / b for m in range(d)] for k in range(d)]
    own = [(1 - c[k][k]) ** 2 for k in range(d)]
    return total(own, data.x) + 0.0051 * total([c[k][m] ** 2 for k in range(d) for m in range(d) if k != m], data.x)


def soft_weight(slope: float):
    def weight(s: Tensor, mask: Tensor) -> Tensor:
        e = torch.where(mask, torch.exp(slope * (s - 0.5)), 0.0)
        return e / (1 + e.sum(1, keepdim=True))

    return weight


def define_general_pair_weighting(data: Batch) -> Tensor:
    s, positives, negatives = table(data, cosine)
    terms = []
    for i in range(len(data.x)):
        for sign, slope, columns in ((-1, -2.0, positives[i]), (1, 50.0, negatives[i])):
            e = [torch.exp(slope * (s[i][j] - 0.5)).detach() for j in columns]
            below = 1 + sum(e)
            terms += [sign * v / below * s[i][j] for v, j in zip(e, columns, strict=True)]
    return total(terms, data.x) / max(len(data.x), 1)


def named(name: str, *, unit_rows: bool = False, **options):
    """(ours, peer) of one class name."""
    ours = lambda d: getattr(losses, name)(**options)(*d.call)  # noqa: E731

    def peer(d: Batch) -> Tensor:
        call = [unit(v) if unit_rows and v is not None and v.is_floating_point() else v for v in d.call]
        if call[3] is not None and name == "ThresholdConsistentMarginLoss":
            raise AssertionError("the peer ignores ref_emb")
        return getattr(peer_losses, name)(**options)(*call)

    return ours, peer


def case(name: str, definition, *, ours=None, peer=None, label: str = "", sides=(False, True), **fields) -> Case:
    options = fields.pop("options", {})
    unit_rows = fields.pop("unit_rows", False)
    both = named(name, unit_rows=unit_rows, **options)
    ours = both[0] if ours is None else ours
    peer = both[1] if peer is None else peer or None
    return Case(f"{name}{' ' + label if label else ''}", ours, definition, peer, sides, **fields)


def semihard(d: Batch, module, loss) -> Tensor:
    mined = module.TripletMarginMiner(margin=0.3, type_of_triplets="semihard")(d.x, d.labels, d.y, d.ref_labels)
    return loss(d.x, d.labels, mined, d.y, d.ref_labels)


NO_PEER = False
SELF_ONLY = (False,)

FAMILY = [
    case("GeneralizedLiftedStructureLoss", define_generalized_lifted, distance=True),
    case("LiftedStructureLoss", define_lifted, distance=True),
    case("NCALoss", define_nca, distance=True),
    case("IntraPairVarianceLoss", define_intra_pair_variance),
    case("TupletMarginLoss", define_tuplet),
    case("ThresholdConsistentMarginLoss", define_threshold_consistent),
    case("RankedListLoss", define_ranked_list, distance=True, options={"margin": 0.4, "Tn": 10}),
    case("MarginLoss", define_margin, distance=True, options={"beta": 1.25}),  # exact in float32, as it is kept
    case("AngularLoss", define_angular, unit_rows=True, distance=True),
    case("FastAPLoss", define_fast_ap, distance=True),
    case("HistogramLoss", define_histogram),
    case("SmoothAPLoss", define_smooth_ap, peer=NO_PEER),
    *(
        case(
            "PNPLoss",
            lambda d, f=penalty: define_pnp(d, f),
            label=variant,
            options={"variant": variant},
        )
        for variant, penalty in PENALTIES.items()
    ),
    case("TripletMarginLoss", define_triplet, label="all", distance=True, options={"margin": 0.2}),
    case(
        "TripletMarginLoss",
        define_triplet_smooth,
        label="smooth",
        ours=lambda d: losses.TripletMarginLoss(0.1, smooth_loss=True, distance=losses.CosineSimilarity())(*d.call),
        peer=lambda d: peer_losses.TripletMarginLoss(0.1, smooth_loss=True, distance=losses.CosineSimilarity())(
            *d.call
        ),
    ),
    case("TripletMarginLoss", define_triplet_swap, label="swap", distance=True, options={"margin": 0.2, "swap": True}),
    case(
        "TripletMarginLoss",
        define_triplet_semihard_mined,
        label="semihard",
        ours=lambda d: semihard(d, miners, losses.TripletMarginLoss(0.2)),
        peer=lambda d: semihard(d, peer_miners, peer_losses.TripletMarginLoss(0.2)),
        distance=True,
    ),
    case("DynamicSoftMarginLoss", define_dynamic_soft_margin, peer=NO_PEER, distance=True),
    case("TripletSemiHardLoss", define_semi_hard, peer=NO_PEER, distance=True),
    case("BinomialDevianceLoss", define_binomial_deviance, peer=NO_PEER),
    case("PairCircleLoss", define_pair_circle, peer=NO_PEER),
    case(
        "SignalToNoiseRatioContrastiveLoss",
        define_snr,
        distance=True,
        options={"pos_margin": 0.1},
    ),
    case("NPairsLoss", define_n_pairs, sides=SELF_ONLY),
    case("InstanceLoss", define_instance, sides=SELF_ONLY),
    case("CentroidTripletLoss", define_centroid_triplet, peer=NO_PEER, distance=True),
    case("ProtoTripletLoss", define_proto_triplet, peer=NO_PEER, distance=True),
    case("ICNNLoss", define_icnn, peer=NO_PEER, distance=True),
    case(
        "GeneralPairWeightingLoss",
        define_general_pair_weighting,
        peer=NO_PEER,
        options={"positive_weight": soft_weight(-2.0), "negative_weight": soft_weight(50.0)},
    ),
    case(
        "VICRegLoss",
        define_vicreg,
        sides=("matched",),
        ours=lambda d: losses.VICRegLoss()(d.x, ref_emb=d.y),
        peer=lambda d: peer_losses.VICRegLoss()(d.x, ref_emb=d.y),
    ),
    case(
        "BarlowTwinsLoss",
        define_barlow,
        peer=NO_PEER,
        sides=("matched",),
        ours=lambda d: losses.BarlowTwinsLoss()(d.x, ref_emb=d.y),
    ),
]

#: Losses whose peer takes no reference embeddings, or gets them wrong (see test_family_peer).
PEER_ON_ONE_SIDE = {
    "FastAPLoss", "HistogramLoss", "PNPLoss", "RankedListLoss", "LiftedStructureLoss", "ThresholdConsistentMarginLoss",
}  # fmt: skip
