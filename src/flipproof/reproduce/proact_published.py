"""What the ProAct paper prints, as tables: fractions where it prints percent, except for memory (percent)."""

from __future__ import annotations

import pandas as pd

NETWORKS = tuple(f"{net} {data}" for net in ("AlexNet", "VGG-16", "ResNet-50") for data in ("CIFAR-10", "CIFAR-100"))


def table_1() -> pd.DataFrame:
    """Baseline accuracy."""
    return _wide(
        ("AlexNet", "VGG-16", "ResNet-50"),
        {"CIFAR-10": (0.8167, 0.8987, 0.9111), "CIFAR-100": (0.5544, 0.6545, 0.7437)},
        ("data", "network", "accuracy"),
    )


def table_2() -> pd.DataFrame:
    """Accuracy that the methods cost without faults."""
    return _wide(
        NETWORKS,
        {
            "Ranger (layer)": (0.0, 0.0001, 0.0, 0.0, 0.0015, 0.0),
            "Ranger (neuron)": (0.0, 0.0003, 0.0002, 0.0007, 0.0019, 0.0008),
            "FT-ClipAct": (0.0090, 0.0240, 0.0115, 0.0169, 0.0469, 0.0160),
            "FitAct": (0.0078, 0.0064, 0.0114, 0.0083, 0.0030, 0.0003),
            "ProAct": (0.0029, 0.0051, 0.0100, 0.0035, 0.0022, 0.0010),
        },
        ("method", "network", "clean_drop"),
    )


def table_3() -> pd.DataFrame:
    """Memory overhead in percent, as printed; for AlexNet Eq. 6 gives 0.284 and 0.0176, printed as 0.29 and 0.017."""
    return _wide(
        NETWORKS,
        {
            "neuron-wise": (0.29, 0.21, 1.88, 0.85, 12.23, 12.23),
            "layer-wise": (3e-5, 3.5e-5, 8.84e-5, 4.46e-5, 2e-4, 2e-4),
            "hybrid": (0.017, 0.020, 0.014, 0.012, 0.134, 0.134),
        },
        ("kind", "network", "memory_percent"),
    )


def table_4() -> pd.DataFrame:
    """Accuracy drop under faults, against each network's own baseline."""
    rates = {
        "AlexNet CIFAR-10": (1e-6, 0.0767, 0.0434, 0.0252),
        "VGG-16 CIFAR-10": (3e-6, 0.0319, 0.0261, 0.0188),
        "ResNet-50 CIFAR-10": (1e-6, 0.0909, 0.0153, 0.0142),
        "AlexNet CIFAR-100": (3e-7, 0.0789, 0.0631, 0.0528),
        "VGG-16 CIFAR-100": (1e-7, 0.0674, 0.0634, 0.0440),
        "ResNet-50 CIFAR-100": (3e-7, 0.1275, 0.1124, 0.0937),
    }
    rows = [
        {"network": network, "ber": ber, "method": method, "accuracy_drop": drop}
        for network, (ber, *drops) in rates.items()
        for method, drop in zip(("FT-ClipAct", "FitAct", "ProAct"), drops, strict=True)
    ]
    return pd.DataFrame(rows)


def table_5() -> pd.DataFrame:
    """Eq. 9's L2 distance, faults layer by layer at 1e-4."""
    return _wide(
        ("AlexNet", "VGG-16", "ResNet-50"),
        {"FitAct": (65.6, 80.3, 93.7), "ProAct": (45.9, 72.4, 86.5)},
        ("method", "network", "l2"),
    )


def _wide(columns: tuple[str, ...], rows: dict[str, tuple[float, ...]], names: tuple[str, str, str]) -> pd.DataFrame:
    row, column, value = names
    return pd.DataFrame(
        [
            {row: name, column: where, value: number}
            for name, values in rows.items()
            for where, number in zip(columns, values, strict=True)
        ]
    )
