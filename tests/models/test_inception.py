import pytest
import torch
from torch import nn

from flipproof.models import inception_v3


def test_weights_are_those_behind_table_2():
    net = inception_v3()
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert weights == 21_604_928
    assert 7 * weights == 151_234_496  # P-5-bit: 5 + 2 stored bits


def test_blocks_equal_torchvisions_with_the_same_weights():
    theirs = pytest.importorskip("torchvision").models.inception_v3(aux_logits=False, init_weights=False).eval()
    ours = inception_v3(1000).eval()
    blocks = [theirs.Mixed_5b, theirs.Mixed_5c, theirs.Mixed_5d, theirs.Mixed_6a, theirs.Mixed_6b, theirs.Mixed_6c]
    blocks += [theirs.Mixed_6d, theirs.Mixed_6e, theirs.Mixed_7a, theirs.Mixed_7b, theirs.Mixed_7c]
    mine = list(ours.children())[1 : 1 + len(blocks)]
    channels = [192, 256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048]
    for block, own, inputs in zip(blocks, mine, channels, strict=True):
        own.load_state_dict(dict(zip(own.state_dict(), _in_our_order(block).values(), strict=True)))
        x = torch.rand(1, inputs, 9, 9)
        with torch.no_grad():
            assert torch.allclose(own(x), block(x), atol=1e-5)


def _in_our_order(block):
    """Torchvision's parameters of a block, its branches in the order of their outputs."""
    order = [
        "branch1x1",
        "branch3x3",
        "branch5x5",
        "branch7x7_",
        "branch7x7x3",
        "branch3x3dbl",
        "branch7x7dbl",
        "branch_pool",
    ]
    state = block.state_dict()
    names = [name for prefix in order for name in state if _prefix(name, order) == prefix]
    return {name: state[name] for name in names}


def _prefix(name, order):
    return max((prefix for prefix in order if name.startswith(prefix)), key=len)


def test_forward():
    with torch.no_grad():
        assert inception_v3(7).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
