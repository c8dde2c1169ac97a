"""What `protect` costs, in forwards over the data that it is given."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import flipproof as fp
from benchmarks.measure import Row, Size, one_thread, seconds
from flipproof.models import digits_cnn, resnet20

WORKERS = 2

ASKED: dict[str, dict[str, Any]] = {
    "the chosen form alone": {"front": 0, "rivals": {}},
    "with rivals": {"front": 0},
    "with rivals and the front": {},
}


def run(size: Size) -> list[Row]:
    """Calls of `protect` ÷ one forward over their data on one thread.

    The network has random weights and is right about every image: what is measured is work, which depends on how many
    rates are tried and not on what is learned.
    """
    torch.manual_seed(0)
    if size is Size.SMOKE:
        net, shape, count = digits_cnn().eval(), (1, 8, 8), 40
    else:
        net, shape, count = resnet20().eval(), (3, 32, 32), size.choose(2000, 500, 40)
    with torch.no_grad(), one_thread():
        data = [(images, net(images).argmax(dim=1)) for images in torch.randn(count, *shape).split(100)]
        forward = min(seconds(lambda: [net(images) for images, _ in data]) for _ in range(3))
    found = []
    for what, choices in ASKED.items():
        if size is Size.SMOKE and "rivals" not in choices:
            choices = choices | {"rivals": {"8 bits": fp.Affine(bits=8)}, "trials": 1, "front": 10}
        given = partial(fp.protect, net, data, ber=1e-2, workers=WORKERS, progress=False, **choices)
        name = f"{type(net).__name__}, {count} images, {WORKERS} workers, {what}: protect ÷ one forward over them"
        found.append(Row(name, seconds(given) / forward))
    return found
