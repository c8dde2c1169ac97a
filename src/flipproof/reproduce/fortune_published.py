"""What FORTUNE prints (Nazari et al. 2024): Tables I and II."""

from __future__ import annotations

import pandas as pd

BERS = (1e-5, 3e-5, 1e-4, 3e-4)
WEIGHTS = {"VGG11": 28_133_056, "ResNet18": 8_373_952, "AlexNet": 58_289_504, "Inception": 21_604_928}
"""Weights that the memory column follows; ResNet-18's matches no choice of layers of that network."""

ROWS: tuple[tuple[str, str, int, float, tuple[float, ...], tuple[float, ...]], ...] = (
    ("VGG11", "8-bit", 225_064_448, 1.0, (5.62, 22.30, 62.40, 74.52), (50.21, 150.63, 502.10, 1506.30)),
    ("VGG11", "P-5-bit", 196_931_392, 1.4172, (1.11, 5.23, 28.33, 68.73), (35.45, 106.35, 354.50, 1063.52)),
    ("VGG11", "P-4-bit", 168_798_336, 1.4172, (1.45, 6.01, 28.19, 67.99), (25.76, 77.30, 257.66, 773.00)),
    ("VGG11", "P-3-bit", 140_665_280, 1.4172, (1.49, 5.35, 34.20, 67.13), (17.66, 53.00, 176.68, 530.05)),
    ("ResNet18", "8-bit", 66_991_616, 1.0, (0.18, 1.85, 14.64, 32.29), (1.92, 5.78, 19.27, 57.82)),
    ("ResNet18", "P-5-bit", 58_617_664, 1.1954, (0.16, 0.81, 3.54, 18.77), (0.85, 2.57, 8.58, 25.74)),
    ("ResNet18", "P-4-bit", 50_243_712, 1.1954, (0.24, 0.66, 2.63, 18.34), (0.61, 1.84, 6.15, 18.47)),
    ("ResNet18", "P-3-bit", 41_869_760, 1.1954, (0.25, 0.79, 3.74, 21.89), (0.51, 1.53, 5.10, 15.31)),
    ("AlexNet", "8-bit", 466_316_032, 1.0, (0.00, 0.49, 3.14, 30.71), (88.82, 266.47, 888.23, 2664.70)),
    ("AlexNet", "P-5-bit", 408_026_528, 1.0294, (0.14, 0.04, 0.48, 4.73), (10.47, 31.43, 104.78, 314.46)),
    ("AlexNet", "P-4-bit", 349_737_024, 1.0294, (0.19, 0.10, 0.52, 5.30), (8.62, 25.87, 86.24, 258.72)),
    ("AlexNet", "P-3-bit", 291_447_520, 1.0294, (0.27, 0.58, 2.62, 13.58), (15.34, 46.03, 153.44, 460.33)),
    ("Inception", "8-bit", 173_011_456, 1.0, (0.09, 0.16, 0.45, 1.43), (0.57, 1.71, 5.71, 17.15)),
    ("Inception", "P-5-bit", 151_234_496, 2.9173, (0.00, 0.02, 0.02, 0.19), (0.06, 0.18, 0.60, 1.80)),
    ("Inception", "P-4-bit", 129_758_592, 2.9173, (0.01, 0.05, 0.08, 0.14), (0.03, 0.09, 0.33, 0.99)),
)
"""Network, type, memory in bits, time relative to 8 bits, drop in percent at `BERS`, P_drop in 1e-3 at `BERS`."""


def table_1() -> pd.DataFrame:
    """Accuracy without faults."""
    rows = {
        "8-bit": (0.9241, 0.9306, 0.9532, 0.9370),
        "5-bit": (0.9219, 0.9281, 0.9546, 0.9324),
        "4-bit": (0.9218, 0.9266, 0.9491, 0.9203),
        "3-bit": (0.8983, 0.9084, 0.9326, 0.8071),
    }
    cells = [(network, type_, a) for type_, values in rows.items() for network, a in zip(WEIGHTS, values, strict=True)]
    return pd.DataFrame(cells, columns=["network", "type", "accuracy"])


def table_2() -> pd.DataFrame:
    """One row a network, type and rate: memory (bits), time (to 8 bits), drop (percent), P_drop."""
    cells = [
        (network, type_, memory, time, ber, drop, p / 1000)
        for network, type_, memory, time, drops, ps in ROWS
        for ber, drop, p in zip(BERS, drops, ps, strict=True)
    ]
    return pd.DataFrame(cells, columns=["network", "type", "memory", "time", "ber", "drop", "p_drop"])
