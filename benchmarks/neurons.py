"""Neuron faults: a campaign of single upsets beside hooked forwards, pytorchfi and MRFI, on the same faults."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, one_thread
from benchmarks.others import Missing, _imported
from flipproof.faults.sampling import TrialGenerator
from flipproof.models import digits_cnn, resnet18, vgg16
from flipproof.running.data import read_batches
from flipproof.running.neurons import neuron_space
from flipproof.spaces.neurons import NeuronSpace

Fault = tuple[int, str, int, int]
"""Sample, layer, neuron, bit."""


def run(size: Size) -> list[Row]:
    """Seconds a fault of each tool ÷ ours, and the classes have to agree."""
    torch.manual_seed(0)
    if size is Size.SMOKE:
        return _rows("digits CNN, 4 images", digits_cnn().eval(), torch.randn(4, 1, 8, 8), 2, 2, 1)
    images = torch.randn(32, 3, 32, 32)
    rows = []
    for name, net in (("ResNet-18", resnet18()), ("VGG-16", vgg16())):
        rows += _rows(f"{name}, 32 images", net.eval(), images, size.choose(300, 100, 1), 4, size.choose(5, 3, 1))
    return rows


def _rows(name: str, net: nn.Module, images: Tensor, trials: int, ones: int, rounds: int) -> list[Row]:
    with torch.no_grad():
        data = [(images, net(images).argmax(dim=1))]
    where = fp.Neurons(include=tuple(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)))
    batches = read_batches(data, torch.device("cpu"))
    space = neuron_space(net, batches, where, fp.Float32())
    point = fp.RandomBits(1)

    def faults(turn: int) -> list[Fault]:
        drawn = point.draw(space, TrialGenerator(turn, repr(point), 0))
        return [(i, *place) for i, place in enumerate(space.places(drawn))]

    def ours(turn: int) -> float:
        began = time.perf_counter()
        fp.assess(net, data=data, faults=point, where=where, trials=trials, seed=turn, progress=False)
        return (time.perf_counter() - began) / (trials * len(images))

    def hooked(turn: int) -> float:
        began = time.perf_counter()
        for fault in faults(turn)[:ones]:
            _hooked(net, images, space, fault)
        return (time.perf_counter() - began) / ones

    rivals: dict[str, Any] = {"one hooked forward a fault": hooked}
    notes: dict[str, str] = {}
    try:
        other = _PyTorchFI(net, images)
    except Missing as missing:
        notes["pytorchfi 0.6.0"] = str(missing)
    else:

        def pytorchfi(turn: int) -> float:
            chosen = faults(turn)[:ones]
            began = time.perf_counter()
            classes = [other(fault) for fault in chosen]
            spent = time.perf_counter() - began
            if classes != [_hooked(net, images, space, fault) for fault in chosen]:
                raise AssertionError("pytorchfi and the hook disagree about the same faults")
            return spent / ones

        rivals["pytorchfi 0.6.0"] = pytorchfi
    try:
        batched = _MRFI(net, images)
    except Missing as missing:
        notes["MRFI 2.1.0"] = str(missing)
    else:

        def mrfi(turn: int) -> float:
            chosen = faults(turn)
            began = time.perf_counter()
            classes = batched(chosen)
            spent = time.perf_counter() - began
            if classes[:ones] != [_hooked(net, images, space, fault) for fault in chosen[:ones]]:
                raise AssertionError("MRFI and the hook disagree about the same faults")
            return spent / len(images)

        rivals["MRFI 2.1.0, a batch a forward"] = mrfi
    with one_thread():
        found = interleaved({"ours": ours, **rivals}, rounds)
    rows = [
        Row(f"{name}, {rival} ÷ flipproof", found[rival] / found["ours"], at_least=_goal(rival)) for rival in rivals
    ]
    return rows + [Row(f"{name}, {rival} ÷ flipproof", None, note=note) for rival, note in notes.items()]


def _goal(rival: str) -> float | None:
    return next((goal for tool, goal in (("pytorchfi", 10.0), ("MRFI", 3.0)) if rival.startswith(tool)), None)


def _hooked(net: nn.Module, images: Tensor, space: NeuronSpace, fault: Fault) -> int:
    sample, layer, neuron, bit = fault

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        changed = output.clone()
        flat = changed.view(-1)
        mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        flat[neuron] = (flat[neuron].view(torch.int32) ^ mask).view(torch.float32)
        return changed

    handle = net.get_submodule(layer).register_forward_hook(hook)
    try:
        return int(net(images[sample : sample + 1]).argmax())
    finally:
        handle.remove()


class _MRFI:
    """MRFI 2.1.0 with a fixed position and bit in each image of the batch: all faults of a layer in one forward."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        mrfi = _imported("mrfi", "python -m pip install MRFI==2.1.0")
        self._images = images
        self._sizes: dict[str, int] = {}
        self._net = copy.deepcopy(net)  # it keeps its hooks
        injector = {
            "type": "activation_out",
            "enabled": False,
            "selector": {"method": "FixPositions", "positions": [0]},
            "error_mode": {"method": "FloatFixedBitFlip", "bit": [0]},
            "module_type": ["Conv2d"],
        }
        self._injected: Any = mrfi.MRFI(self._net, mrfi.EasyConfig({"faultinject": [injector]}))
        for name, module in self._net.named_modules():
            if isinstance(module, nn.Conv2d):
                handle = module.register_forward_hook(self._watch(name))
                self._injected(images[:1])
                handle.remove()

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._sizes[name] = output[0].numel()

        return hook

    def __call__(self, faults: list[Fault]) -> list[int]:
        layer = faults[0][1]
        config: Any = self._net.get_submodule(layer).FI_config.activation_out[0]
        config.enabled = True
        config.selector.args["positions"] = [i * self._sizes[layer] + neuron for i, _, neuron, _ in faults]
        config.error_mode.args["bit"] = [bit for *_, bit in faults]
        try:
            return [int(label) for label in self._injected(self._images).argmax(dim=1)]
        finally:
            config.enabled = False


class _PyTorchFI:
    """pytorchfi 0.6.0 as its documentation injects a neuron: a corrupted model for each fault, one image a forward."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        core = _imported("pytorchfi.core", "python -m pip install pytorchfi==0.6.0")
        self._images = images
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
        handles = [net.get_submodule(name).register_forward_hook(self._watch(name)) for name in self._layers]
        net(images[:1])
        for handle in handles:
            handle.remove()
        self._injector: Any = core.fault_injection(net, 1, input_shape=list(images.shape[1:]))

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._shapes[name] = tuple(output.shape[1:])

        return hook

    def __call__(self, fault: Fault) -> int:
        sample, layer, neuron, bit = fault
        _, height, width = self._shapes[layer]
        channel, rest = divmod(neuron, height * width)
        mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        at = (0, channel, *divmod(rest, width))
        number = self._layers.index(layer)
        injector = self._injector

        def flip(module: nn.Module, args: object, output: Tensor) -> None:
            if injector.get_current_layer() == number:
                output[at] = (output[at].view(torch.int32) ^ mask).view(torch.float32)
            injector.updateLayer()

        injector.reset_current_layer()
        faulty = injector.declare_neuron_fi(function=flip)
        chosen = int(faulty(self._images[sample : sample + 1]).argmax())
        injector.fi_reset()
        return chosen
