"""A whole campaign, trial by trial, beside two other tools that do the same work in the same run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, keep_freed_memory, one_thread, seconds
from benchmarks.others import Missing, Place, PyTorchFI, TorchEI
from flipproof.datasets.digits import digits
from flipproof.faults.sampling import TrialGenerator
from flipproof.models import digits_cnn, resnet18
from flipproof.models.digits_cnn import DigitsCNN
from flipproof.models.resnet import ResNet

NAMES = {ResNet: "ResNet-18", DigitsCNN: "digits CNN"}


def run(size: Size) -> list[Row]:
    """Per trial: one random bit of a convolution weight flipped, the batch run, the class compared, all put back."""
    torch.manual_seed(0)
    if size is Size.SMOKE:
        net, image = digits_cnn().eval(), torch.randn(1, 1, 8, 8)
    else:
        net, image = resnet18().eval(), torch.randn(1, 3, 32, 32)
    with one_thread():
        return _beside_others(net, image, size) + _loop_overhead(size)


def _beside_others(net: nn.Module, image: Tensor, size: Size) -> list[Row]:
    name = f"{NAMES[type(net)]}, batch 1, one bit flip in a convolution weight"
    trials, repeats, rounds = size.choose(1000, 100, 3), size.choose(20, 10, 1), size.choose(7, 2, 1)
    layers = [layer for layer, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    where = fp.Parameters(include=layers, kinds=["weight"])
    places = [_place(net, layers, where, trial) for trial in range(max(repeats, 8))]
    rows: list[Row] = []
    others: dict[str, Callable[[Place], tuple[Tensor, int]]] = {}
    for tool in (PyTorchFI, TorchEI):
        try:
            other = tool(deepcopy(net), image)
        except Missing as reason:
            rows.append(Row(f"{name}: {tool.name} ÷ flipproof", None, note=str(reason)))
            continue
        _same_answers(net, image, where, places[:8], other, tool.name)
        others[tool.name] = other

    found: dict[str, list[float]] = {"steady": [], "whole": []}

    def campaign(turn: int) -> float:
        steady, whole = campaign_seconds(net, image, fp.RandomBits(1), trials, turn, where=where)
        found["whole"].append(whole)
        return steady

    def loop(other: Callable[[Place], object], turn: int) -> float:
        return seconds(lambda: [other(place) for place in places[:repeats]]) / repeats

    actions = {
        "flipproof": campaign,
        "forward": lambda turn: seconds(lambda: net(image)),
        **{tool: partial(loop, other) for tool, other in others.items()},
    }
    medians = interleaved(actions, rounds)
    for tool in others:
        goal = 5.0 if tool == PyTorchFI.name else None
        rows.append(Row(f"{name}: {tool} ÷ flipproof, a trial", medians[tool] / medians["flipproof"], at_least=goal))
        what = f"{name}: {tool} ÷ flipproof, set-up shared by {trials} trials"
        rows.append(Row(what, medians[tool] / median(found["whole"])))
    rows.append(Row(f"{name}: trial ÷ bare forward", medians["flipproof"] / medians["forward"]))
    if others and size is not Size.SMOKE and keep_freed_memory():
        kept = interleaved(actions, rounds)
        rows += [Row(f"{name}: {t} ÷ flipproof, a trial, memory kept", kept[t] / kept["flipproof"]) for t in others]
    return rows


def campaign_seconds(
    net: nn.Module, images: Tensor, faults: fp.BitErrorRate | fp.RandomBits, trials: int, seed: int, **options: object
) -> tuple[float, float]:
    """Seconds a trial of a real campaign with its journal on disk: in its steady state, and set-up included.

    A user metric takes the time: it is called once a trial, so from one call to the next everything has happened once,
    drawing, injecting, running, classifying and writing the record.
    """
    ticks: list[float] = []

    def tick(outputs: Tensor, targets: Tensor) -> float:
        ticks.append(time.perf_counter())
        return 0.0

    data = [(images, torch.zeros(len(images), dtype=torch.long))]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        fp.assess(
            net,
            data=data,
            faults=faults,
            trials=trials,
            seed=seed,
            metrics={"tick": tick, "correct": _correct},
            journal=Path(folder) / "journal.jsonl",
            progress=False,
            **options,  # type: ignore[arg-type]
        )
        whole = time.perf_counter() - began
    return (ticks[-1] - ticks[1]) / (len(ticks) - 2), whole / trials


def _correct(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(dim=1) == targets).sum()) / len(targets)


def _loop_overhead(size: Size) -> list[Row]:
    """What the campaign adds to the forward on a network so small that it shows."""
    images, net = digits("test")[0][0], digits_cnn().eval()
    found = interleaved(
        {
            "trial": lambda turn: campaign_seconds(
                net, images, fp.BitErrorRate(1e-5), size.choose(300, 60, 3), turn, cache_bytes=0
            )[0],
            "forward": lambda turn: min(seconds(lambda: net(images)) for _ in range(size.choose(50, 20, 1))),
        },
        size.choose(9, 3, 1),
    )
    what = f"digits CNN, batch {len(images)}, BER 1e-05: trial, whole and recorded ÷ bare forward"
    return [Row(what, found["trial"] / found["forward"])]


def _place(net: nn.Module, layers: list[str], where: fp.Parameters, trial: int) -> Place:
    space = fp.FaultSpace(net, where=where)
    ((name, value, bit),) = space.places(fp.RandomBits(1).draw(space, TrialGenerator(0, "places", trial)))
    layer = name.removesuffix(".weight")
    shape = net.get_parameter(name).shape
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(value), shape))
    return Place(name, layers.index(layer), value, index, bit)


def _same_answers(
    net: nn.Module,
    image: Tensor,
    where: fp.Parameters,
    places: list[Place],
    other: Callable[[Place], tuple[Tensor, int]],
    name: str,
) -> None:
    """Before any timing: the other tool's faulty output has the same bits, and names the same class."""
    space = fp.FaultSpace(net, where=where)
    for place in places:
        with space.corrupted(space.faults([(place.name, place.value, place.bit)])):
            ours = net(image)
        theirs, their_class = other(place)
        same = torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
        if not same or int(ours.argmax()) != their_class:
            raise AssertionError(f"{name} and flipproof disagree about {place}: {theirs.tolist()}, {ours.tolist()}")
