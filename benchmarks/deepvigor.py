"""DeepVigor's factors beside exhaustive injection of the same neurons, bits and inputs, on LeNet-5."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, one_thread
from flipproof.faults.sampling import TrialGenerator
from flipproof.models import lenet5

BITS = 32
BATCH = 512


def run(size: Size) -> list[Row]:
    """Seconds a neuron and input of injection ÷ those of the analysis."""
    torch.manual_seed(0)
    net = lenet5().eval()
    images = torch.randn(size.choose(8, 4, 1), 1, 28, 28)
    data = [(images, torch.zeros(len(images), dtype=torch.int64))]
    neurons = None if size is not Size.SMOKE else 5
    methods = {
        "factors by search": fp.DeepVigor(ranges=False, holes=0, neurons=neurons),
        "exact factors": fp.DeepVigor(factors="exhaustive", ranges=False, neurons=neurons),
        "factors and ranges": fp.DeepVigor(holes=0, neurons=neurons),
    }
    layers = {name: net.get_submodule(name) for name in ("conv1", "conv2", "conv3", "fc1", "fc2")}
    places = {name: _neurons(net, layer, images) for name, layer in layers.items()}

    def analysed(method: fp.DeepVigor, turn: int) -> float:
        began = time.perf_counter()
        found = fp.analyze(net, data, method)
        return (time.perf_counter() - began) / int((found.layers["analysed"] * found.layers["inputs"]).sum())

    def sequential(turn: int) -> float:
        return _injected(net, images[:1], layers, places, turn, size.choose(40, 20, 2), 1) * BITS

    def batched(turn: int) -> float:
        return _injected(net, images[:1], layers, places, turn, BATCH * size.choose(8, 4, 1), BATCH) * BITS

    actions = {name: lambda turn, method=method: analysed(method, turn) for name, method in methods.items()}
    with one_thread():
        found = interleaved({**actions, "sequential": sequential, "batched": batched}, size.choose(7, 3, 1))
    goals = {"sequential": 100.0, "batched": 10.0}
    return [
        Row(
            f"LeNet-5, {rival} exhaustive injection ÷ DeepVigor, {name}",
            found[rival] / found[name],
            at_least=goals[rival] if name == "factors by search" else None,
            note="" if size is not Size.SMOKE else "smoke",
        )
        for name in methods
        for rival in ("sequential", "batched")
    ]


def _neurons(net: nn.Module, layer: nn.Module, images: Tensor) -> int:
    found: list[int] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output[0].numel()))
    net(images[:1])
    handle.remove()
    return found[0]


def _injected(
    net: nn.Module,
    image: Tensor,
    layers: dict[str, nn.Module],
    places: dict[str, int],
    turn: int,
    faults: int,
    rows: int,
) -> float:
    """Seconds a fault: hooked whole forwards of `rows` copies of the image, a random neuron and bit in each row.

    Faults are drawn over all neurons, so their mean cost is that of going through all of them.
    """
    borders = [0]
    for count in places.values():
        borders.append(borders[-1] + count)
    drawn = torch.from_numpy(TrialGenerator(0, "benchmark", turn).below(borders[-1] * BITS, faults))
    neuron, bit = drawn // BITS, drawn % BITS
    copies = image.expand(rows, -1, -1, -1).contiguous()
    began = time.perf_counter()
    done = 0
    layer_of = torch.bucketize(neuron, torch.tensor(borders[1:]), right=True)
    # rows of one forward share the layer, as whoever writes this by hand would have it
    by_layer = [(layer_of == i).nonzero()[:, 0] for i in range(len(places))]
    for part in (part for group in by_layer if group.numel() for part in torch.split(group, rows)):
        which = int(layer_of[part[0]])
        name, place = list(places)[which], neuron[part] - borders[which]
        masks = torch.ones_like(part).bitwise_left_shift(bit[part]).to(torch.int32)

        def hook(module: nn.Module, args: object, output: Tensor, at: Tensor = place, masks: Tensor = masks) -> Tensor:
            flat = output.reshape(output.shape[0], -1).clone()
            row = torch.arange(len(at))
            flat[row, at] = (flat[row, at].view(torch.int32) ^ masks).view(torch.float32)
            return flat.reshape(output.shape)

        handle = layers[name].register_forward_hook(hook)
        net(copies[: len(part)]).argmax(dim=1)
        handle.remove()
        done += len(part)
    return (time.perf_counter() - began) / done
