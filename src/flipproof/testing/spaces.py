"""What every space has to do, as a pytest class to inherit."""

from __future__ import annotations

import pickle
from itertools import pairwise
from operator import attrgetter
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flipproof.errors import FaultSpaceError
from flipproof.faults import TrialGenerator
from flipproof.formats.base import bit_pattern
from flipproof.running.values import same
from flipproof.spaces.contract import Draw, Faults, Space, Upsets
from flipproof.spaces.quantised import parts
from flipproof.spaces.tensors import elsewhere


class SpaceContract:
    """Inherit, give `network`, `space` and `run`, and pytest runs the contract.

    Example:
        In a test file, for a space of one's own::

            from flipproof.testing import SpaceContract


            class TestConstants(SpaceContract):
                def network(self):
                    return Net()

                def space(self, network):
                    return Constants().space(network, None, [])

                def run(self, network):
                    return network(torch.ones(2, 3))
    """

    travels: ClassVar[bool] = True
    """Whether the network can be pickled; parametrised ones cannot."""

    def network(self) -> nn.Module:
        """The network that is hit; the same values every time."""
        raise NotImplementedError

    def space(self, network: nn.Module) -> Space:
        """Its space."""
        raise NotImplementedError

    def run(self, network: nn.Module) -> Tensor:
        """What it answers on the batches of the space, one behind the other."""
        raise NotImplementedError

    def draw(self, space: Space, trial: int, bits: int = 7) -> Draw:
        """Faults at random places."""
        generator = TrialGenerator(0, "contract", trial)
        if space.samples is not None:
            return Upsets(generator.below(space.bits, space.samples))
        return Faults(generator.distinct(min(bits, space.bits), space.bits))

    def test_bits_are_numbered_without_a_gap(self) -> None:
        space = self.space(self.network())
        assert [site.offset for site in space.sites] == np.cumsum([0, *(s.bits for s in space.sites)])[:-1].tolist()
        assert space.bits == sum(site.bits for site in space.sites) > 0
        assert len({site.name for site in space.sites}) == len(space.sites)

    def test_layers_own_every_bit_once(self) -> None:
        network = self.network()
        space = self.space(network)
        spans = sorted(span for spans in space.layers.values() for span in spans)
        assert (spans[0][0], spans[-1][1]) == (0, space.bits)
        assert all(end == first for (_, end), (first, _) in pairwise(spans))
        assert set(space.layers) <= {name for name, _ in network.named_modules(remove_duplicate=False)}

    def test_every_bit_has_a_place_of_its_own(self) -> None:
        space = self.space(self.network())
        places = space.places(Faults(np.arange(space.bits)))
        assert len(set(places)) == space.bits
        found = []
        for name, value, bit in places:
            (site,) = (site for site in space.sites if site.name == name)
            assert 0 <= value < site.values
            (inside,) = (int(p) for p in site.positions(bit) if int(site.locate(np.array([p]))[0][0]) == value)
            found.append(site.offset + inside)
        assert found == list(range(space.bits))
        table = space.locate(Faults(np.arange(space.bits)))
        assert list(table.itertuples(index=False, name=None)) == places

    def test_coverage_counts_what_is_left_out(self) -> None:
        space = self.space(self.network())
        assert space.coverage == space.bits / (space.bits + space.left_out_bits)
        assert 0 < space.coverage <= 1
        assert all(space.left_out.values())
        assert not set(space.left_out) & {site.name for site in space.sites}
        if space.left_out_bits:
            assert space.left_out

    def test_faults_are_there_and_then_gone_bit_for_bit(self) -> None:
        network = self.network()
        space = self.space(network)
        before = _memory(network)
        with space.stored():
            stored = _memory(network)
            golden = self._answer(space, network)
            for trial in range(5):
                with space.corrupted(self.draw(space, trial)) as changed:
                    assert changed == len(self.draw(space, trial))
                    found = self._answer(space, network)
                    if space.as_stored:
                        assert _same(_memory(network), stored)
                        assert torch.equal(bit_pattern(found), bit_pattern(golden))
                assert _same(_memory(network), stored)
                assert torch.equal(bit_pattern(self._answer(space, network)), bit_pattern(golden))
        assert _same(_memory(network), before)

    def test_answers_depend_on_the_space(self) -> None:
        """Some faults have to reach the answer, or it is no space of this network."""
        network = self.network()
        space = self.space(network)
        with space.stored():
            golden = self._answer(space, network)
            answers = []
            for trial in range(20):
                with space.corrupted(self.draw(space, trial, bits=max(7, space.bits // 2))):
                    answers.append(self._answer(space, network))
        assert any(not torch.equal(bit_pattern(found), bit_pattern(golden)) for found in answers)

    def test_everything_is_put_back_when_the_model_raises(self) -> None:
        network = self.network()
        space = self.space(network)
        before = _memory(network)
        hooks = _hooks(network)
        with pytest.raises(ZeroDivisionError), space.stored(), space.corrupted(self.draw(space, 0)):
            raise ZeroDivisionError
        assert _same(_memory(network), before)
        assert _hooks(network) == hooks

    def test_faults_outside_are_refused(self) -> None:
        network = self.network()
        space = self.space(network)
        where = np.array([space.bits])
        outside = Faults(where) if space.samples is None else Upsets(where.repeat(space.samples))
        before = _memory(network)
        with pytest.raises(FaultSpaceError, match="outside"), space.stored(), space.corrupted(outside):
            pass
        assert _same(_memory(network), before)

    def test_draws_of_another_kind_are_refused(self) -> None:
        space = self.space(self.network())
        other = Upsets(np.array([0])) if space.samples is None else Faults(np.array([0]))
        with pytest.raises(FaultSpaceError, match=type(other).__name__), space.stored(), space.corrupted(other):
            pass

    def test_the_space_of_a_copy_hits_the_copy_alone_and_the_same(self) -> None:
        network, copy = self.network(), self.network()
        space = self.space(network)
        again = space.again(copy)
        assert (again.bits, again.samples, again.layers) == (space.bits, space.samples, space.layers)
        before = _memory(network)
        for trial in range(3):
            draw = self.draw(space, trial)
            with again.stored(), again.corrupted(draw):
                assert _same(_memory(network), before)
                found = self._answer(again, copy)
            with space.stored(), space.corrupted(draw):
                assert torch.equal(bit_pattern(self._answer(space, network)), bit_pattern(found))

    def test_network_and_space_travel_to_another_process_together(self) -> None:
        """Worker processes get a copy of both; the space that arrives hits the network that arrives."""
        if not self.travels:
            pytest.skip("this network cannot be pickled")
        network = self.network()
        space = self.space(network)
        draw = self.draw(space, 0)
        if space.samples is not None:  # what ran the batches stays at home
            space = space.again(network)
        network_there, space_there = pickle.loads(pickle.dumps((network, space)))
        with space.stored(), space.corrupted(draw):
            expected = self._answer(space, network)
        with space_there.stored(), space_there.corrupted(draw):
            assert torch.equal(bit_pattern(self._answer(space_there, network_there)), bit_pattern(expected))

    def test_where_runs_start_belongs_to_the_network(self) -> None:
        network = self.network()
        space = self.space(network)
        modules = {name for name, _ in network.named_modules(remove_duplicate=False)}
        starts = space.starts()
        assert starts is None or set(starts) <= modules
        with space.stored(), space.corrupted(self.draw(space, 0)):
            start = space.start(self.draw(space, 0))
        assert start.layer is None or start.layer in modules
        assert all(attrgetter(name)(network) is not None for name in start.names)

    def _answer(self, space: Space, network: nn.Module) -> Tensor:
        space.begin(0)
        with torch.no_grad():
            return self.run(network).clone()


def _memory(network: nn.Module) -> dict[str, Tensor]:
    """Everything that modules hold: plain attributes, what tensors wrap, and what objects of C++ consist of."""
    held = [
        (f"{name}.{key}", value)
        for name, module in network.named_modules()
        for key, value in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
        if isinstance(value, Tensor)
    ]
    plain = [part for name, value in held for part in parts(name, value)]
    return {name: value.detach().clone() for name, value in [*plain, *elsewhere(network)]}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def _hooks(network: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
