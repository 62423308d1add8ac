"""Every loss of the pair-based family beside pytorch-metric-learning's class of the same name.

    python bench/family.py                    forward + backward at B = 4096, D = 128, four rows a class
    python bench/family.py FastAP Triplet     losses whose name contains one of these
    python bench/family.py --large            time and memory of ours alone at B = 65536, D = 64
    python bench/family.py --quick            a smoke check at a tiny size; nothing is kept

How it is measured: bench/versus.py. Results go to bench/results/family.json and into the table of docs/losses.md.
"""

from __future__ import annotations

import sys

import machine
import torch
import versus

RANKED = {"margin": 0.4, "Tn": 10}

#: Name → arguments; those of one class under several names say what differs.
LOSSES: dict[str, dict] = {
    "AngularLoss": {},
    "BinomialDevianceLoss": {},
    "CentroidTripletLoss": {},
    "CircleLoss": {},
    "ContrastiveLoss": {},
    "DynamicSoftMarginLoss": {},
    "FastAPLoss": {},
    "GeneralizedLiftedStructureLoss": {},
    "HistogramLoss": {},
    "ICNNLoss": {},
    "InstanceLoss": {},
    "IntraPairVarianceLoss": {},
    "LiftedStructureLoss": {},
    "MarginLoss": {},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {},
    "PNPLoss": {},
    "PairCircleLoss": {},
    "ProtoTripletLoss": {},
    "RankedListLoss": RANKED,
    "SignalToNoiseRatioContrastiveLoss": {},
    "SmoothAPLoss": {},
    "SupConLoss": {},
    "ThresholdConsistentMarginLoss": {},
    "TripletMarginLoss": {},
    "TripletMarginLoss (smooth)": {"smooth_loss": True},
    "TripletMarginLoss (swap)": {"swap": True},
    "TripletSemiHardLoss": {},
    "TupletMarginLoss": {},
}

#: Where the peer's value is another one, or its gradient is (tests/test_family_peer.py); it is timed all the same.
DIFFERENT = {"AngularLoss", "DynamicSoftMarginLoss", "SmoothAPLoss"}


def inputs(batch: int, width: int) -> list[torch.Tensor]:
    """Random embeddings."""
    return [torch.randn(batch, width, generator=torch.Generator().manual_seed(0)).requires_grad_()]


def value(module, name: str, leaves: list[torch.Tensor]) -> torch.Tensor:
    """A fresh loss every time, since one of the peer's cannot be called twice; classes of four, of eight where B is
    large, sorted as the peer's SmoothAP needs them."""
    (x,) = leaves
    labels = torch.arange(len(x)) // (8 if len(x) > 32768 else 4)
    return getattr(module, name.split()[0])(**LOSSES[name])(x, labels)


def ours(name: str, leaves: list[torch.Tensor]) -> torch.Tensor:
    from flashpair import losses

    return value(losses, name, leaves)


def theirs(name: str, leaves: list[torch.Tensor]) -> torch.Tensor:
    from pytorch_metric_learning import losses

    return value(losses, name, leaves)


def absent(name: str) -> str:
    from pytorch_metric_learning import losses

    return "" if hasattr(losses, name.split()[0]) else "no such class"


def agreement(name: str) -> float | None:
    return None if name in DIFFERENT else 1e-5 if name == "HistogramLoss" else 1e-7  # float32 inside


SUITE = versus.Suite(
    "family.py", machine.ROOT / "docs" / "losses.md", "pytorch-metric-learning takes", list(LOSSES),
    inputs, ours, theirs, absent, agreement,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(versus.main(SUITE, __doc__))
