"""What the LSTM paper prints (Parchekani et al. 2024): Table I and the figures its text gives."""

from __future__ import annotations

import pandas as pd

NETWORKS = ("Stage-CONV-384", "Stage-CONV-72", "Stage-384", "Stage-72")

CRITICAL = {
    "none": (0.9005, 0.5497, 0.8202, 0.7733),
    "AVC": (0.1388, 0.0518, 0.3647, 0.1686),
}
"""Critical SDC + DUE at BER 1e-2, in the order of `NETWORKS` (IV-B, IV-C)."""

WBC_OVER_AVC = (2.36, 1.19, 2.26, 1 / 1.13)
"""AUROC drop with AVC ÷ with WBC at BER 1e-2 (IV-C.3)."""

REDUCTION = {"WBC": 278.6, "AVC": 10.6}
"""Largest reduction of critical SDC + DUE over the networks."""


def table_1() -> pd.DataFrame:
    """Accuracy, AUROC and numbers of weights."""
    rows = [
        ("Stage-CONV-384", 0.9494, 0.7921, 738618, 442368, 24960),
        ("Stage-CONV-72", 0.8375, 0.7675, 48764, 51840, 1800),
        ("Stage-384", 0.9028, 0.7929, 738618, 0, 384),
        ("Stage-72", 0.7728, 0.7697, 48764, 0, 72),
    ]
    columns = ["network", "accuracy", "auroc", "lstm", "conv", "fc"]
    return pd.DataFrame(rows, columns=columns).melt("network", var_name="quantity", value_name="value")


def critical_totals() -> pd.DataFrame:
    """Critical SDC + DUE at BER 1e-2."""
    rows = [
        (network, method, 1e-2, value)
        for method, values in CRITICAL.items()
        for network, value in zip(NETWORKS, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["network", "method", "ber", "critical_total"])
