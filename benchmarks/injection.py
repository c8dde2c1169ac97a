"""What faults cost beside the forward pass they are injected into."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, one_thread, seconds
from flipproof._interrupts import given_back
from flipproof.datasets.digits import digits
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats import Format
from flipproof.models import digits_cnn, resnet18

RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
CODED = (fp.Float16(), fp.FixedPoint(), fp.Affine(8), fp.Affine(8, axis=0))

SHOWN = {fp.Affine(8, axis=0): "Affine a channel"}


def run(size: Size) -> list[Row]:
    """(draw + inject + restore) ÷ bare forward, for each network, format and rate."""
    images = digits("test")[0][0]
    torch.manual_seed(0)
    rows = []
    if size is not Size.SMOKE:
        net, batch = resnet18().eval(), torch.randn(64, 3, 32, 32)
        rounds = size.choose(11, 3, 1)
        rows += _rows("ResNet-18, batch 64", net, batch, fp.Float32(), rounds, lambda ber: 0.02 if ber > 1e-5 else 1e-3)
        for coded in CODED:
            rows += _rows("ResNet-18, batch 64", net, batch, coded, size.choose(5, 1, 1), lambda ber: 0.05)
    small, rounds = digits_cnn().eval(), size.choose(401, 41, 1)
    for images_used in (len(images), 64):
        name = f"digits CNN, batch {images_used}"
        rows += _rows(name, small, images[:images_used], fp.Float32(), rounds, lambda ber: 0.02)
    for images_used in (len(images), 64):
        for coded in CODED:
            name = f"digits CNN, batch {images_used}"
            rows += _rows(name, small, images[:images_used], coded, rounds, lambda ber: 0.05)
    return rows


def _rows(
    name: str, net: nn.Module, batch: Tensor, fmt: Format, rounds: int, goal: Callable[[float], float]
) -> list[Row]:
    space = fp.FaultSpace(net, format=fmt)
    points = {f"{point.coordinates()['ber']:g}": point for point in fp.BitErrorRate(RATES).points()}
    with one_thread(), given_back(net), space.stored():  # as in a campaign
        forward = partial(net, batch)
        actions = {"forward": lambda turn: seconds(forward)}
        for ber, point in points.items():
            actions[ber] = partial(_fault_seconds, point, repr(point), space, forward)
            actions[f"{ber}, caches warm"] = partial(_warm_seconds, point, repr(point), space)
        found = interleaved(actions, rounds)
    rows = []
    for ber in points:
        what = f"{name}, {SHOWN.get(fmt, type(fmt).__name__)}, BER {ber}"
        rows.append(Row(what, found[ber] / found["forward"], at_most=goal(float(ber)), percent=True))
        warm = f"{ber}, caches warm"
        rows.append(Row(f"{what}, caches warm", found[warm] / found["forward"], percent=True))
    return rows


def _fault_seconds(
    point: fp.BitErrorRate, name: str, space: fp.FaultSpace, forward: Callable[[], object], turn: int
) -> float:
    """As in a trial: a forward comes before drawing and between injecting and restoring, and leaves the caches cold."""
    forward()
    began = time.perf_counter()
    faults = point.draw(space, TrialGenerator(0, name, turn))
    injected = space.corrupted(faults)
    injected.__enter__()
    before = time.perf_counter() - began
    try:
        forward()
    finally:
        after = seconds(lambda: injected.__exit__(None, None, None))
    return before + after


def _warm_seconds(point: fp.BitErrorRate, name: str, space: fp.FaultSpace, turn: int) -> float:
    """The same work for the twentieth time in a row, with nothing in between."""

    def once() -> None:
        with space.corrupted(point.draw(space, TrialGenerator(0, name, turn))):
            pass

    return [seconds(once) for _ in range(20)][-1]
