"""Where a layer's output counts samples, also where something else is as long as the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.running.data import read_batches
from flipproof.running.neurons import neuron_space

T = B = 3


class TimeFirst(nn.Module):
    """A Linear at every step of a sequence whose first axis is time."""

    def __init__(self, *, inputs_too: bool = False, state: bool = False) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Linear(2, 2), nn.GRU(2, 4), nn.Linear(4, 3)
        self.inputs_too, self.state = inputs_too, state

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        steps, _ = self.rnn(torch.tanh(self.embed(x if self.inputs_too else x.transpose(0, 1))))
        return (self.out(steps[-1]), steps) if self.state else self.out(steps[-1])


class BatchFirst(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1) if self.inputs_too else x)


class Fixed(TimeFirst):
    """Made for one size of batch."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(x.reshape(B, T, 2))


class Table(nn.Module):
    """A Linear over a table as long as the batch, which holds no sample at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.key, self.out = nn.Parameter(torch.randn(B, 3)), nn.Linear(3, 3), nn.Linear(B, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.key(self.table).T)


def axes(model: nn.Module, x: Tensor, output=None) -> tuple[dict[str, int], dict[str, str]]:
    batches = read_batches([(x, torch.zeros(B))], torch.device("cpu"))
    space = neuron_space(model.eval(), batches, fp.Neurons(), None, output)
    return {site.name: site.axis for site in space.sites}, space.left_out


@pytest.mark.parametrize("steps", [T, 7])
def test_time_as_long_as_the_batch_is_no_batch(steps):
    x = torch.randn(B, steps, 2)
    assert axes(TimeFirst(), x) == ({"embed": 1, "rnn": 1, "out": 0}, {})
    assert axes(TimeFirst(inputs_too=True), x.transpose(0, 1)) == ({"embed": 1, "rnn": 1, "out": 0}, {})
    assert axes(TimeFirst(state=True), x, 0) == ({"embed": 1, "rnn": 1, "out": 0}, {})


def test_what_cannot_be_told_is_left_out_by_name():
    found, left_out = axes(Fixed(), torch.randn(B, T, 2))
    assert found == {"rnn": 1, "out": 0}
    assert "axes [0, 1] of its output (3, 3, 2) are all as long as the batch" in left_out["embed"]
    found, left_out = axes(Table(), torch.randn(B, 3))
    assert found == {"out": 0}
    assert "none grew by one" in left_out["key"]


def upsets(model: nn.Module, x: Tensor) -> Tensor:
    """How many (sample, step) of each neuron and bit of `embed` change the class: one hooked flip a forward."""
    counts = torch.zeros(T * 2, 32, dtype=torch.int32)
    with torch.no_grad():
        golden = model(x).argmax(1)
        for sample in range(B):
            for step in range(T):
                for feature in range(2):
                    for bit in range(32):

                        def hook(module, args, out, at=(step, sample, feature), bit=bit):
                            words = out.view(torch.int32).clone()
                            words[at] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
                            return words.view(torch.float32)

                        handle = model.embed.register_forward_hook(hook)
                        out = model(x)[sample]
                        handle.remove()
                        wrong = bool(out.isnan().any()) or int(out.argmax()) != int(golden[sample])
                        counts[step * 2 + feature, bit] += int(wrong)
    return counts


@pytest.mark.parametrize("inputs_too", [False, True])
def test_a_map_of_a_time_first_model_is_that_of_one_flip_a_forward(inputs_too):
    """Samples of inputs that count time first cannot be gathered by rows; they are asked about where they are."""
    model = TimeFirst(inputs_too=inputs_too).eval()
    x = torch.randn(B, T, 2)
    x = x.transpose(0, 1).contiguous() if inputs_too else x
    found = fp.analyze(
        model, [(x, torch.zeros(B))], fp.DeepVigor(factors="exhaustive", ranges=False), where=fp.Neurons("embed")
    )
    assert torch.equal(found.layers_found[0].critical, upsets(model, x))


def test_a_campaign_hits_one_step_of_one_sample():
    """Each sample's upset lies in that sample: its row of the golden outputs, and no other, may change."""
    model, x = TimeFirst().eval(), torch.randn(B, T, 2)
    batches = read_batches([(x, torch.zeros(B))], torch.device("cpu"))
    space = neuron_space(model, batches, fp.Neurons("embed"), None)
    site = space.site("embed")
    with torch.no_grad(), space.stored():
        golden = model(x)
        for sample in range(B):

            def change(seen, output, sample=sample):
                changed = output.clone()
                changed[seen.index(torch.tensor([sample]), torch.tensor([3]))] += 100.0
                return changed

            space.begin(0)
            with space.changed(change):
                differs = (model(x) != golden).any(dim=1).tolist()
            assert differs == [row == sample for row in range(B)]
    assert site.shape == (T, 2)
