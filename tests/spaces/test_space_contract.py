"""Each space keeps the contract."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.models.transformer import Block
from flipproof.spaces.contract import Space
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import NeuronKind
from flipproof.spaces.tensors import FormatChoice
from flipproof.testing import SpaceContract


class Last(nn.Module):
    """What a recurrent layer gives behind the last step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class Stored(SpaceContract):
    format: FormatChoice = None
    where = fp.Parameters()

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        return net.eval()

    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network, where=self.where, format=self.format)

    def run(self, network: nn.Module) -> Tensor:
        return network(torch.linspace(-1, 1, 27).reshape(3, 1, 3, 3))


class TestParameters(Stored):
    pass


class TestBuffersToo(Stored):
    where = fp.Parameters(buffers=True, exclude="0")


class TestQuantised(Stored):
    format = fp.Affine(bits=5)


class TestWordsOfSeveralWidths(Stored):
    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network, format={"[04].weight": fp.SECDED(fp.Float16(), block=48)})


class TestPacked(Stored):
    travels = False

    def network(self) -> nn.Module:
        return fp.pack_(super().network(), format=fp.Affine(bits=4))


class TestNeurons(Stored):
    def space(self, network: nn.Module) -> Space:
        return NeuronSpace(network, [((lambda: self.run(network)), 3)], where=fp.Neurons(), format=self.format)


class TestQuantisedNeurons(TestNeurons):
    format = fp.FixedPoint(4, 4)


class TestValuesOfTransformers(TestNeurons):
    kinds: tuple[NeuronKind, ...] = ()

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(Block(4, 2, causal=True), nn.Flatten(), nn.Linear(12, 2)).eval()

    def space(self, network: nn.Module) -> Space:
        where = fp.Neurons(kinds=self.kinds)
        with torch.no_grad():
            return NeuronSpace(network, [((lambda: self.run(network)), 3)], where=where, format=self.format)

    def run(self, network: nn.Module) -> Tensor:
        return network(torch.linspace(-1, 1, 36).reshape(3, 3, 4))


class TestQuantisedValuesOfTransformers(TestValuesOfTransformers):
    format = fp.FixedPoint(4, 4)


class TestGates(TestValuesOfTransformers):
    kinds = ("gates", "cell", "recurrent")

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Last(nn.LSTM(4, 2, batch_first=True)).eval()
