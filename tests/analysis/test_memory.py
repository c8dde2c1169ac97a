"""`max_bytes` bounds what an analysis holds, also of a model with a thousand classes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import flipproof as fp

CLASSES, INPUTS = 1000, 24


class Live(TorchDispatchMode):
    """Bytes of tensors made while it is active that are still alive, without the network's own, and the most so far."""

    def __init__(self, net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), data[0][0])}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known and storage.nbytes():
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.fixture
def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(16, 500), nn.ReLU(), nn.Linear(500, CLASSES))
    return net, [(torch.randn(INPUTS, 16), torch.zeros(INPUTS))]


def kept(found: fp.VulnerabilityMap) -> int:
    tensors = [value for layer in found.layers_found for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("max_bytes", [2**20, 2**22])
def test_what_is_kept_and_what_is_alive_stay_within_the_bound(network, max_bytes):
    net, data = network
    with Live(net, data) as live:
        found = fp.analyze(net, data, fp.DeepVigor(max_bytes=max_bytes, ranges=False, neurons=10, holes=0))
    classes = len(set(net(data[0][0]).argmax(1).tolist()))
    assert 12 < classes <= INPUTS  # a few of a thousand: the others take no room
    assert kept(found) <= max_bytes
    own = sum(parameter.nbytes for parameter in net.parameters())  # a copy, to see whether a forward writes to it
    assert kept(found) < live.most <= 2 * max_bytes + 2 * own  # the map, and a round of questions


def test_a_map_that_would_not_fit_is_refused_with_what_it_needs(network):
    net, data = network
    with pytest.raises(fp.FlipproofError, match=r"1,500 places and \d+ golden classes keeps 1\.\d MiB.*allows 1\.0"):
        fp.analyze(net, data, fp.DeepVigor(max_bytes=2**20))
    with pytest.raises(fp.FlipproofError, match=r"max_bytes=\d+\)") as caught:
        fp.analyze(net, data, fp.DeepVigor(max_bytes=2**20))
    needed = int(str(caught.value).partition("max_bytes=")[2].partition(")")[0])
    classes = len(set(net(data[0][0]).argmax(1).tolist()))
    ten, twenty = (
        kept(fp.analyze(net, data, fp.DeepVigor(ranges=False, holes=0, neurons=count))) for count in (10, 20)
    )
    a_neuron = (twenty - ten) / 20  # of two layers
    assert a_neuron >= 24 + 4 * 32 + 32 * classes
    assert needed == ten + (1500 - 20) * a_neuron


def test_classes_that_no_input_has_take_no_room(network):
    net, data = network
    few = fp.DeepVigor(ranges=False, holes=0, neurons=50)
    found = fp.analyze(net, [(data[0][0][:2], data[0][1][:2])], few)
    assert kept(found) < 2**16  # 100 neurons × (24 + 4 · 32 + 32 · 2) bytes; all classes would take 3.2 MB
    labels = set(net(data[0][0][:2]).argmax(1).tolist())
    assert set(found.ranges["class"]) == {"all", *map(str, labels)}
