"""The compact CNN, the small ViT and the small GPT."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flipproof.errors import DataError
from flipproof.models import compact_cnn, small_gpt, small_vit
from flipproof.models.training import seeded, shifted_and_flipped, token_loss, train_onecycle
from flipproof.models.transformer import Attention

SMALL = {
    "compact_cnn": (compact_cnn, lambda: torch.randn(5, 3, 32, 32), 10, 242_218),
    "small_vit": (small_vit, lambda: torch.randn(5, 1, 28, 28), 10, 204_938),
    "small_gpt": (small_gpt, lambda: torch.randint(65, (5, 64)), 65, 354_401),
}


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_counts(name):
    build, inputs, classes, parameters = SMALL[name]
    model = build().eval()
    assert model(inputs()).shape == (5, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert build(classes + 2).eval()(inputs()).shape == (5, classes + 2)


@pytest.mark.parametrize("name", SMALL)
def test_one_sample_alone_has_the_answer_it_has_in_a_batch(name):
    build, inputs, _, _ = SMALL[name]
    model, x = build().eval(), inputs()
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), model(x))


def test_state_dict_keys():
    """Checkpoints are loaded by these names."""
    cnn, vit, gpt = (set(build().state_dict()) for build in (compact_cnn, small_vit, small_gpt))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convolutions = {f"features.{i}.weight" for i in (0, 4, 8, 11, 15)}
    norms = {f"features.{i}.{part}" for i in (1, 5, 9, 12, 16) for part in norm}
    assert cnn == convolutions | norms | {"classifier.weight", "classifier.bias"}
    layers = (
        "norm1",
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.out",
        "norm2",
        "mlp.0",
        "mlp.2",
    )

    def both(*names: str) -> set[str]:
        return {f"{name}.{part}" for name in names for part in ("weight", "bias")}

    blocks = [[f"blocks.{i}.{layer}" for i in range(depth) for layer in layers] for depth in (4, 3)]
    assert vit == both("patches", "norm", "classifier", *blocks[0]) | {"positions"}
    assert gpt == both("norm", "head", *blocks[1]) | {"tokens.weight", "positions.weight"}


def test_no_weights_are_shared():
    """The cache is a safetensors file, which refuses them."""
    for build in (compact_cnn, small_vit, small_gpt):
        model = build()
        places = [value.data_ptr() for value in model.state_dict().values()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs(causal):
    """nn.MultiheadAttention keeps queries, keys and values in one matrix; the numbers are the same."""
    ours, theirs = Attention(12, 3, causal=causal), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        for part in ("weight", "bias"):
            stacked = torch.cat([getattr(layer, part) for layer in (ours.query, ours.key, ours.value)])
            getattr(theirs, f"in_proj_{part}").copy_(stacked)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, 12)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=hidden, need_weights=False)[0])


def test_the_gpt_sees_no_later_character_and_answers_at_the_last():
    model, tokens = small_gpt(vocabulary=9, context=8).eval(), torch.randint(9, (3, 8))
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 9
    with torch.inference_mode():
        every, changed = model.all_positions(tokens), model.all_positions(other)
        torch.testing.assert_close(every[:, :5], changed[:, :5])
        assert (every[:, 5:] != changed[:, 5:]).any(dim=2).all()
        torch.testing.assert_close(model(tokens), every[:, -1])
        torch.testing.assert_close(model(tokens[:, :3]), every[:, 2])  # shorter than the context


def test_the_vit_reads_patches_row_by_row():
    """A linear layer on each 4 × 4 patch, written by hand."""
    model, x = small_vit().eval(), torch.randn(1, 1, 28, 28)
    patch = x[0, 0, 4:8, 8:12].flatten()
    by_hand = F.linear(patch, model.patches.weight.flatten(1), model.patches.bias) + model.positions[0, 7 + 2]
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(x)
    torch.testing.assert_close(seen[0][0, 9], by_hand)


class TestTrainOnecycle:
    """A function of its arguments that learns."""

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(66) % 3
        return torch.randn(66, 2, generator=generator) * 0.3 + torch.eye(3)[targets][:, :2] * 3, targets

    def test_it_learns(self):
        x, y = self.data()
        model = train_onecycle(nn.Linear(2, 3), x, y, epochs=30, lr=0.1, batch_size=20)
        assert not model.training
        assert int((model(x).argmax(dim=1) == y).sum()) > 60

    @pytest.mark.parametrize("name", SMALL)
    def test_an_epoch_is_the_same_every_time_whatever_was_drawn_before(self, name, one_thread):
        build, inputs, classes, _ = SMALL[name]
        x, y = inputs(), torch.arange(5) % classes

        def trained(seed):
            torch.rand(seed + 1)  # the global generator has no say
            augment = None if name == "small_gpt" else shifted_and_flipped
            model = train_onecycle(
                seeded(build)(), x, y, epochs=1, lr=0.01, batch_size=2, weight_decay=0.1, augment=augment, seed=seed
            )
            return torch.cat([p.flatten() for p in model.parameters()])

        first, again, other = trained(0), trained(0), trained(1)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first, torch.cat([p.flatten() for p in seeded(build)().parameters()]))

    def test_biases_do_not_decay_and_weights_do(self):
        """With a loss that is 0 everywhere only decay moves a weight: by lr · decay of itself a step."""
        model = nn.Linear(3, 2)
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        low = 0.1 / 25 / 1e4
        for rate in (0.1 / 25, low + 0.75 * (0.1 - low), low + 0.25 * (0.1 - low), low):  # the rise is one step of four
            weight *= 1 - rate * 0.5
        x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
        train_onecycle(model, x, y, epochs=2, lr=0.1, batch_size=2, weight_decay=0.5, loss=lambda out, _: 0 * out.sum())
        torch.testing.assert_close(model.weight, weight)
        assert torch.equal(model.bias, bias)

    def test_another_method_and_all_positions(self):
        model, tokens = small_gpt(vocabulary=5, context=6), torch.arange(48).reshape(8, 6) % 5
        following = (tokens + 1) % 5
        train_onecycle(
            model, tokens, following, epochs=60, lr=0.01, batch_size=8, outputs=model.all_positions, loss=token_loss
        )
        assert torch.equal(model(tokens).argmax(dim=1), following[:, -1])
        assert torch.equal(model.all_positions(tokens).argmax(dim=2), following)

    @pytest.mark.parametrize(
        "wrong", [{"epochs": 0}, {"batch_size": 0}, {"batch_size": 67}, {"targets": torch.zeros(3, dtype=torch.long)}]
    )
    def test_what_it_cannot_train_on_is_refused(self, wrong):
        x, y = self.data()
        with pytest.raises(DataError, match="needs at least one epoch and one batch"):
            train_onecycle(nn.Linear(2, 3), **{"inputs": x, "targets": y, "epochs": 1, "lr": 0.1, **wrong})


def test_moved_images_are_windows_of_the_mirrored_surroundings():
    """Every result is one of the 2 × 3 × 3 that there are, and all of them come."""
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    around = F.pad(image, (1,) * 4, mode="reflect")
    windows = [around[0, :, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    possible = [*windows, *(window.flip(2) for window in windows)]
    moved = shifted_and_flipped(image.expand(300, 2, 3, 4), torch.Generator().manual_seed(0), pixels=1)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved[:, 0], moved[:, 1])  # all channels move together
    found = [[torch.equal(one[:1], other) for other in possible].index(True) for one in moved]
    assert set(found) == set(range(18))
