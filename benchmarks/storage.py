"""What real packed storage costs: protected 5-bit words ÷ plain 8-bit ones, forwards that decode at each use."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, seconds
from flipproof.models import digits_cnn, resnet18
from flipproof.running.evaluation import one_thread

FORTUNE = fp.TripleMSB(fp.Affine(bits=3))


def run(size: Size) -> list[Row]:
    """ResNet-18, 11.2 million weights, one thread."""
    torch.manual_seed(0)
    smoke = size is Size.SMOKE
    net = (digits_cnn() if smoke else resnet18()).eval()
    name = "digits CNN" if smoke else "ResNet-18"
    x = torch.rand(4, 1, 8, 8) if smoke else torch.randn(16, 3, 32, 32)
    plain, protected = (fp.pack_(copy.deepcopy(net), format) for format in (fp.Affine(bits=8), FORTUNE))
    rounds = size.choose(31, 9, 1)
    with one_thread(torch.device("cpu")), torch.no_grad():
        decode = interleaved(
            {
                "plain": lambda turn: seconds(lambda: _decode(plain)),
                "protected": lambda turn: seconds(lambda: _decode(protected)),
                "torch": lambda turn: seconds(lambda: _dequantise(net)),
            },
            rounds,
        )
        forward = interleaved(
            {
                "plain": lambda turn: seconds(lambda: plain(x)),
                "protected": lambda turn: seconds(lambda: protected(x)),
                "float": lambda turn: seconds(lambda: net(x)),
                "cached": lambda turn: _cached(protected, x),
            },
            rounds,
        )
    memory = fp.packed_bytes(protected) / fp.packed_bytes(plain)
    weights = _packed_bytes(protected) / _packed_bytes(plain)
    batch = f"{name}, batch {len(x)}"
    return [
        Row(f"{name}: decoding 3 + 2 bits, packed and voted ÷ packed 8 bits", decode["protected"] / decode["plain"]),
        Row(f"{name}: decoding 3 + 2 bits ÷ torch dequantising uint8", decode["protected"] / decode["torch"]),
        Row(f"{batch}: forward, 3 + 2 bits ÷ 8 bits", forward["protected"] / forward["plain"], at_most=1.01),
        Row(f"{batch}: forward, 3 + 2 bits decoded at use ÷ float32", forward["protected"] / forward["float"]),
        Row(f"{batch}: forward, 3 + 2 bits decoded once ÷ float32", forward["cached"] / forward["float"]),
        Row(f"{name}: bytes of packed weights, 3 + 2 bits ÷ 8 bits", weights, at_most=0.625),
        Row(f"{name}: bytes of the whole model, 3 + 2 bits ÷ 8 bits", memory),
    ]


def _decode(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            module()


def _dequantise(model: nn.Module) -> None:
    for name, values in _words(model).items():
        (values.to(torch.float32) - 127.0) * 0.01
        assert name


_kept: dict[int, dict[str, torch.Tensor]] = {}


def _words(model: nn.Module) -> dict[str, torch.Tensor]:
    if id(model) not in _kept:
        _kept[id(model)] = {
            name: torch.randint(0, 256, p.shape, dtype=torch.uint8)
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
    return _kept[id(model)]


def _cached(model: nn.Module, x: torch.Tensor) -> float:
    with parametrize.cached():
        model(x)
        return seconds(lambda: model(x))


def _packed_bytes(model: nn.Module) -> int:
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("original0"))
