"""Table III of ProAct: thresholds over parameters for the networks of the paper, counted on the networks themselves."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from flipproof.hardening.harden import harden
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.report import hardening_report
from flipproof.models import alexnet, resnet50, vgg16
from flipproof.reproduce.proact_published import table_3
from flipproof.reproduce.published import beside


def memory_table() -> pd.DataFrame:
    """Percent (Eq. 6) of neuron-wise, layer-wise and hybrid thresholds, beside what the paper prints."""
    rows = []
    for name, build in (("AlexNet", alexnet), ("VGG-16", vgg16), ("ResNet-50", resnet50)):
        for classes in (10, 100):
            neurons, parameters = _neurons(build(classes), classes)
            counts = {"neuron-wise": sum(neurons), "layer-wise": len(neurons), "hybrid": len(neurons) - 1 + neurons[-1]}
            rows += [
                {"network": f"{name} CIFAR-{classes}", "kind": kind, "memory_percent": 100 * count / parameters}
                for kind, count in counts.items()
            ]
    return beside(pd.DataFrame(rows), table_3(), on=["network", "kind"], value="memory_percent")


def _neurons(model: nn.Module, classes: int) -> tuple[list[int], int]:
    """Neurons of each activation in the order of execution, and the parameters of the model."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # alive whatever the initialisation: biases above zero
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 0.5)
    data = [(torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0, classes - 1]))]
    safe = harden(model, Ranger(per="neuron"), data=data)
    report = hardening_report(safe)
    counts = [sum(p.numel() for p in safe.get_submodule(site.module).parameters()) for site in report.sites]
    return counts, report.parameters
