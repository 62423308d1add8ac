"""Preferences of a policy over a reference: DPO, IPO, SLiC."""

from __future__ import annotations

from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...request import statistics_dtype


class PreferenceKind(Enum):
    """Loss of the margin Δ = (log π_w - log π_l) - (log ref_w - log ref_l); ε the label smoothing."""

    SIGMOID = "sigmoid"  # -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)                         DPO, conservative DPO
    HINGE = "hinge"  # max(1 - β Δ, 0)                                                 SLiC
    IPO = "ipo"  # (Δ - 1 / (2 β))²                                                     IPO
    ROBUST = "robust"  # [ -(1 - ε) log σ(β Δ) + ε log σ(-β Δ) ] / (1 - 2 ε)           robust DPO


class PreferenceLoss(nn.Module):
    """Mean over pairs of a chosen and a rejected answer; no pairs beyond these, so no engine.

    Args:
        kind: see `PreferenceKind`. Default: SIGMOID.
        beta: β > 0. Default 0.1.
        label_smoothing: ε in [0, ½), for SIGMOID and ROBUST. Default 0.

    Raises:
        TypeError, ValueError: on a bad number or kind.

    Source: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7; Azar et al., "A General
    Theoretical Paradigm to Understand Learning from Human Preferences", 2023, equation 17; Zhao et al., "SLiC-HF",
    2023; Chowdhury et al., "Provably Robust DPO", ICML 2024. For IPO some average log-probabilities over tokens first.

    Example:
        >>> import torch
        >>> from flashpair.losses import PreferenceLoss
        >>> round(float(PreferenceLoss()(*torch.zeros(4, 3))), 4)  # log 2
        0.6931
    """

    def __init__(
        self, kind: PreferenceKind = PreferenceKind.SIGMOID, beta: float = 0.1, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        checks.member("kind", kind, PreferenceKind)
        checks.number("beta", beta, low=0.0, open_low=True)
        checks.number("label_smoothing", label_smoothing, low=0.0)
        if label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be below 0.5; got {label_smoothing}")
        if label_smoothing and kind in (PreferenceKind.HINGE, PreferenceKind.IPO):
            raise ValueError(f"label_smoothing must be 0 with {kind}; got {label_smoothing}")
        self.kind, self.beta, self.label_smoothing = kind, beta, label_smoothing

    def forward(
        self, policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
    ) -> Tensor:
        """The loss of log-probabilities (B,) of answers under the policy and the reference.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for no pairs.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        values = policy_chosen, policy_rejected, reference_chosen, reference_rejected
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Tensor) or value.dtype not in checks.DTYPES or value.dim() != 1:
                raise TypeError(f"{name} must be a 1-D floating-point tensor; got {value!r:.80}")
            if value.shape != policy_chosen.shape:
                raise ValueError(f"{name} must have {len(policy_chosen)} entries; got {len(value)}")
        dtype = statistics_dtype(policy_chosen)
        chosen, rejected, of_chosen, of_rejected = (v.to(dtype) for v in values)
        margin = (chosen - rejected) - (of_chosen - of_rejected)
        return self._losses(margin).sum() / max(len(margin), 1)

    def _losses(self, margin: Tensor) -> Tensor:
        logits, smoothing = self.beta * margin, self.label_smoothing
        if self.kind == PreferenceKind.HINGE:
            return F.relu(1 - logits)
        if self.kind == PreferenceKind.IPO:
            return (margin - 1 / (2 * self.beta)) ** 2
        right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        if self.kind == PreferenceKind.SIGMOID:
            return (1 - smoothing) * right + smoothing * wrong
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
