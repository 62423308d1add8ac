"""What a pass of a GPU backend reads: both sides normalised, with norms and labels, in an order that saves work.

Nothing here or in `panels`, `forward`, `backward` and `extremes` reads a device value, so nothing waits for the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .panels import float32_products
from .request import PARAMETERS, FlatTerm, Request
from .rowwise import TORCH, Rowwise, padded_length
from .terms import Extreme, Mask, Similarity

MAX_FEATURES = 1 << 20
#: From so many pairs on, kernels that gain by it get rows sorted by label: pairs of equal labels are then in few tiles.
#: Below, the copies would take longer than what they save.
ORDERED_PAIRS = 1 << 26
#: Parameters of a term that run along its reduced side.
ALONG_OTHERS = ("other_offset", "weight")


def unserved(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Reasons why kernels for these dtypes, which count rows in 32 bits, do not read embeddings x (rows, D)."""
    reasons = []
    if x.dtype not in dtypes:
        reasons.append(f"embeddings are {x.dtype}; allowed are {', '.join(str(d) for d in dtypes)}")
    if x.shape[0] >= 1 << 31:
        reasons.append(f"embeddings have {x.shape[0]} rows; at most {(1 << 31) - 1} are allowed")
    if x.shape[1] > MAX_FEATURES:
        reasons.append(f"embeddings have {x.shape[1]} features; at most {MAX_FEATURES} are allowed")
    return reasons


def on_device(launcher):
    """Run a launcher, whose first argument is a request, with the device of that request current."""

    @functools.wraps(launcher)
    def run(request: Request, *args):
        if not request.x.is_cuda:
            return launcher(request, *args)
        with torch.cuda.device(request.x.device):
            return launcher(request, *args)

    return run


def in_precision(launcher):
    """Run a launcher with the vendor's float32 products in the precision of its request."""

    @functools.wraps(launcher)
    def run(request: Request, *args):
        with float32_products(request.x, request.precision):
            return launcher(request, *args)

    return run


def padded(vectors: Tensor) -> Tensor:
    """(..., length) → (..., padded length), so that kernels read tiles of vectors without masks."""
    missing = padded_length(vectors.shape[-1]) - vectors.shape[-1]
    return (torch.nn.functional.pad(vectors, (0, missing)) if missing else vectors).contiguous()


def group_ids(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels (B,), (N,) as ranks, int32: half the registers of int64, same order, without waiting for the device."""
    both = labels if ref_labels is None else torch.cat([labels, ref_labels])
    ordered, order = both.sort(stable=True)
    rank = torch.zeros_like(ordered, dtype=torch.int32)
    rank[1:] = (ordered[1:] != ordered[:-1]).to(torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.empty_like(rank)
    ids[order] = rank
    return ids[: labels.shape[0]], (ids if ref_labels is None else ids[labels.shape[0] :])


def padded_labels(labels: Tensor) -> Tensor:
    """(rows,) → (padded rows,), repeating the last label so that padding widens no tile's range."""
    missing = padded_length(labels.shape[0]) - labels.shape[0]
    if missing:
        return torch.cat([labels, labels[-1:].expand(missing)])
    # The kernels read 16 bytes at a time, and a caller's labels may begin anywhere.
    return labels if labels.is_contiguous() and labels.data_ptr() % 16 == 0 else labels.clone()


@dataclass
class Operands:
    """What every kernel of a pass reads, apart from the terms' parameters."""

    raw_x: Tensor  # (B, D) as given
    raw_y: Tensor  # (N, D)
    x: Tensor  # (B, D) as the kernels read it: wide inputs normalised, 16-bit ones as given, since they are exact
    y: Tensor  # (N, D)
    x_norms: Tensor  # (2, padded B) inverse norm, squared norm
    y_norms: Tensor  # (2, padded N)
    x_labels: Tensor  # (padded B,) int64 as given, for kernels with plain tiles; int32 ranks for others
    y_labels: Tensor  # (padded N,)
    exclude: Tensor  # (padded B,) int32
    pair_mask: Tensor  # (B, N) uint8
    guide: tuple[Tensor, Tensor] | None  # (B, E), (N, E) sides of the second product
    scaled: bool  # the kernels multiply dot products by the inverse norms
    same_only: bool  # only pairs of equal labels count, so that tiles can be skipped
    orders: tuple[Tensor | None, Tensor | None]  # rows and columns as sorted by label

    def arrange(self, vector: Tensor | None, side: int) -> Tensor | None:
        """A caller's vector (..., owners) in the order of the operands."""
        order = self.orders[side]
        return vector if order is None or vector is None or vector.shape[-1] == 1 else vector[..., order]

    def restore(self, values: Tensor, side: int, dim: int = -1) -> Tensor:
        """Inverse of `arrange` along a dimension."""
        order = self.orders[side]
        if order is None:
            return values
        return torch.empty_like(values).index_copy_(dim, order, values)

    def places(self) -> tuple[Tensor, Tensor]:
        """(padded B,), (padded N,) int32: where the caller has the rows and the columns."""
        places = [
            padded(
                torch.arange(len(of), dtype=torch.int32, device=of.device) if order is None else order.to(torch.int32)
            )
            for of, order in zip((self.x,) if self.y is self.x else (self.x, self.y), self.orders, strict=False)
        ]
        return places[0], places[-1]

    def arranged_terms(self, terms: list[FlatTerm]) -> list[FlatTerm]:
        """Terms with their vectors in the order of the operands."""
        if self.orders[0] is None:
            return terms
        arranged = []
        for term in terms:
            moved = {}
            for name in PARAMETERS:
                value = getattr(term, name)
                if isinstance(value, Tensor):
                    moved[name] = self.arrange(value, int(term.axis) ^ int(name in ALONG_OTHERS))
            arranged.append(replace(term, **moved))
        return arranged

    def arranged_extreme(self, extreme: Extreme) -> Extreme:
        """An extreme with its thresholds in the order of the operands."""
        bounds = {"above": extreme.above, "below": extreme.below}
        return replace(extreme, **{n: self.arrange(b, 0) for n, b in bounds.items() if isinstance(b, Tensor)})


def _arranged_guide(request: Request, orders: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor] | None:
    if request.guide is None:
        return None
    sides = [
        (v if order is None else v[order]).contiguous()
        for v, order in zip(request.guide, orders, strict=True)
        if v is not None
    ]
    return sides[0], sides[-1]


def operands(request: Request, masks: set[Mask], plain_tiles: bool = False, rowwise: Rowwise = TORCH) -> Operands:
    """Operands of a pass with these masks; sorted by label where only pairs of equal labels count.

    `plain_tiles`: the kernels treat tiles without a pair of equal labels apart. Few labels are compared then, so that
    they may be wide; and rows are sorted by label wherever a mask asks for labels and there are `ORDERED_PAIRS`. A pass
    whose results depend on the order of the columns, as the lowest of several best, has to ask for `Operands.places`.
    """
    x, y, device = request.x, request.columns, request.x.device
    same_only, labelled = masks == {Mask.SAME}, bool(masks & {Mask.SAME, Mask.DIFFERENT})
    x_labels = y_labels = torch.empty(1, dtype=torch.int64 if plain_tiles else torch.int32, device=device)
    orders = (None, None)
    if labelled:
        x_labels, y_labels = request.labels, request.column_labels
        if not plain_tiles:
            x_labels, y_labels = group_ids(x_labels, None if request.symmetric else y_labels)
    many = plain_tiles and labelled and x.shape[0] * y.shape[0] >= ORDERED_PAIRS
    if (same_only or many) and request.pair_mask is None and request.exclude is None:
        row_order = x_labels.argsort(stable=True)
        column_order = row_order if request.symmetric else y_labels.argsort(stable=True)
        orders = (row_order, column_order)
        x, x_labels = x[row_order], x_labels[row_order]
        y, y_labels = (x, x_labels) if request.symmetric else (y[column_order], y_labels[column_order])
    guide = _arranged_guide(request, orders)
    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    y = x if request.symmetric else (y if y.stride(1) == 1 or y.shape[1] <= 1 else y.contiguous())
    raw_x, raw_y = x, y
    scaled = request.normalize and x.dtype in (torch.bfloat16, torch.float16)
    if request.normalize and not scaled:
        x = rowwise.unit_rows(x)
        y = x if request.symmetric else rowwise.unit_rows(y)
    squared = request.similarity != Similarity.DOT
    x_norms = rowwise.norms(x, scaled, squared)
    if labelled:
        x_labels = padded_labels(x_labels)
        y_labels = x_labels if request.symmetric else padded_labels(y_labels)
    exclude = x_labels
    if request.exclude is not None:
        inside = (request.exclude >= 0) & (request.exclude < y.shape[0])
        exclude = padded(torch.where(inside, request.exclude, -1).to(torch.int32))
    return Operands(
        raw_x,
        raw_y,
        x,
        y,
        x_norms,
        x_norms if request.symmetric else rowwise.norms(y, scaled, squared),
        x_labels,
        y_labels,
        exclude,
        x_labels if request.pair_mask is None else request.pair_mask.contiguous().view(torch.uint8),
        guide,
        scaled,
        same_only,
        orders,
    )
