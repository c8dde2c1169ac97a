from __future__ import annotations

import pytest
import torch
from torch import nn

import flipproof as fp

FORMATS = [None, fp.Float32(), fp.Float16(), fp.BFloat16(), fp.FixedPoint(), fp.Affine(bits=4), fp.Float8E5M2()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(self.drop(x))


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(1)
    net = Block()
    with torch.no_grad():
        net.head.weight[0, 0] = -0.0  # a zero whose sign a careless restore would lose
    net.norm.running_mean.uniform_()
    return net


@pytest.fixture
def images():
    return [(torch.randn(9, 1, 6, 6), torch.arange(9) % 3)]


def snapshot(model):
    """All that must come back: bits, addresses, flags, hooks, gradients."""
    return (
        {
            name: (
                t.data_ptr(),
                t.dtype,
                t.stride(),
                t.requires_grad,
                t.detach().clone().contiguous().view(torch.uint8),
            )
            for name, t in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.dim())]
        },
        {name: module.training for name, module in model.named_modules()},
        {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()},
        {name: p.grad for name, p in model.named_parameters()},
    )


def assert_same(before, after):
    for name, (*facts, bits) in before[0].items():
        *now, bits_now = after[0][name]
        assert facts == now, name
        assert torch.equal(bits, bits_now), name
    assert before[1:] == after[1:]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("workers", [1, 2])
def test_bits_flags_and_hooks(block, images, format, workers):
    block.train()
    block.norm.eval()  # as one freezes a layer while fine-tuning
    block.head.register_forward_hook(lambda module, inputs, result: None)
    before = snapshot(block)
    setup = {"data": images, "faults": fp.BitErrorRate(0.05), "trials": 4, "format": format, "workers": workers}
    result = fp.assess(block, **setup, where=fp.Parameters(buffers=True))
    assert_same(before, snapshot(block))
    assert block.training
    assert not block.norm.training
    eval_result = fp.assess(block.eval(), **setup, where=fp.Parameters(buffers=True))
    assert list(eval_result.trials["digest"]) == list(result.trials["digest"])
    assert eval_result.golden == result.golden  # dropout and batch statistics were off in both


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_in_the_middle(block, images, format, error):
    calls = 0

    def failing(outputs, targets):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("stop here")
        return 0.0

    block.train()
    before = snapshot(block)
    threads = torch.get_num_threads()
    with pytest.raises(error, match="stop here"):
        fp.assess(block, data=images, faults=fp.BitErrorRate(0.05), format=format, metrics=failing)
    assert_same(before, snapshot(block))
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_after_ctrl_c_inside_the_faulty_forward(block, images):
    calls = 0

    def interrupt(module, inputs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handle = block.head.register_forward_pre_hook(interrupt)
    before = snapshot(block)
    with pytest.raises(KeyboardInterrupt):
        fp.assess(block, data=images, faults=fp.BitErrorRate(0.3), trials=50, cache_bytes=0)
    assert calls == 5
    assert_same(before, snapshot(block))
    handle.remove()


def test_an_integer_buffer_and_a_gradient_stay(block, images):
    block.norm.num_batches_tracked.fill_(7)
    block(images[0][0]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    fp.assess(block, data=images, faults=fp.RandomBits(9), trials=3)
    assert int(block.norm.num_batches_tracked) == 8  # one by the forward above, none by the campaign
    assert all(torch.equal(p.grad, gradients[name]) for name, p in block.named_parameters())


class Scaling(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(36, 3)
        self.in_place = in_place

    def forward(self, x):
        x = x.mul_(self.scale) if self.in_place else x * self.scale
        return self.head(x.flatten(1))


def test_a_model_that_works_in_place_spoils_neither_the_data_nor_the_next_trial(images):
    kept = images[0][0].clone()
    setup = {"data": images, "faults": fp.RandomBits(3), "trials": 40}
    expected = fp.assess(Scaling(in_place=False), **setup).trials.drop(columns="seconds")
    for cache_bytes in (None, 0):
        result = fp.assess(Scaling(in_place=True), **setup, cache_bytes=cache_bytes)
        assert torch.equal(images[0][0], kept)
        assert result.trials.drop(columns="seconds").equals(expected)


def test_inside_inference_mode_and_with_inference_tensors(mlp):
    with torch.inference_mode():
        data = [(torch.randn(6, 4), torch.arange(6) % 3)]
        inside = fp.assess(mlp, data=data, faults=fp.RandomBits(1), trials=8)
    outside = fp.assess(mlp, data=data, faults=fp.RandomBits(1), trials=8)
    assert list(inside.trials["digest"]) == list(outside.trials["digest"])
    assert list(inside.trials["masked"]) == list(outside.trials["masked"])
