"""What real packed storage costs: protected 5-bit words ÷ plain 8-bit ones, forwards that decode at each use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, seconds
from flipproof.models import digits_cnn, resnet18
from flipproof.running.evaluation import one_thread

FORTUNE = fp.TripleMSB(fp.Affine(bits=3))
CODES = {
    "SECDED(Rounded(Float32(), 26))": fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    "BCH(Rounded(Float16(), 11), t=5)": fp.BCH(fp.Rounded(fp.Float16(), 11), t=5),
    "BCH(Affine(6, axis=0), t=7)": fp.BCH(fp.Affine(6, axis=0), t=7),
    "BCH(Affine(5, axis=0), t=14, block=385)": fp.BCH(fp.Affine(5, axis=0), t=14, block=385),
}
GOALS = {"SECDED(Rounded(Float32(), 26))": 0.03, "BCH(Rounded(Float16(), 11), t=5)": 0.03}


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
    codes = _codes(size, net, name)
    return [
        Row(f"{name}: decoding 3 + 2 bits, packed and voted ÷ packed 8 bits", decode["protected"] / decode["plain"]),
        Row(f"{name}: decoding 3 + 2 bits ÷ torch dequantising uint8", decode["protected"] / decode["torch"]),
        Row(f"{batch}: forward, 3 + 2 bits ÷ 8 bits", forward["protected"] / forward["plain"], at_most=1.01),
        Row(f"{batch}: forward, 3 + 2 bits decoded at use ÷ float32", forward["protected"] / forward["float"]),
        Row(f"{batch}: forward, 3 + 2 bits decoded once ÷ float32", forward["cached"] / forward["float"]),
        Row(f"{name}: bytes of packed weights, 3 + 2 bits ÷ 8 bits", weights, at_most=0.625),
        Row(f"{name}: bytes of the whole model, 3 + 2 bits ÷ 8 bits", memory),
        *codes,
    ]


def _codes(size: Size, net: nn.Module, name: str) -> list[Row]:
    """Correcting codes: decoding all weights against a batch of 64, against memcpy, and with faults in the words."""
    x = torch.rand(4, 1, 8, 8) if size is Size.SMOKE else torch.randn(64, 3, 32, 32)
    where = fp.Parameters(kinds=("weight",))
    models = {code: fp.pack_(copy.deepcopy(net), format, where=where) for code, format in CODES.items()}
    plain = fp.unpack_(copy.deepcopy(models["SECDED(Rounded(Float32(), 26))"]))
    weights = [p.detach() for p in net.parameters() if p.dim() > 1]
    copies = [torch.empty_like(w) for w in weights]
    actions = {code: partial(_timed, _decode, model) for code, model in models.items()}
    actions |= {"float": partial(_timed, net, x), "once": partial(_timed, plain, x)}
    actions["memcpy"] = lambda turn: seconds(lambda: [c.copy_(w) for c, w in zip(copies, weights, strict=True)])
    rates = (1e-3, 1e-2)
    with one_thread(torch.device("cpu")), torch.no_grad():
        found = interleaved(actions, size.choose(15, 7, 1))
        faulty = {}
        for rate in rates:  # the clean words and those with faults in turn, in memory of their own
            others = {code: copy.deepcopy(model) for code, model in models.items()}
            for model in others.values():
                _hit(model, rate)
            turns = {
                (code, kind): partial(_timed, _decode, model)
                for kind, group in (("clean", models), ("hit", others))
                for code, model in group.items()
            }
            faulty[rate] = interleaved(
                {f"{kind} {code}": action for (code, kind), action in turns.items()}, size.choose(9, 3, 1)
            )
    rows = []
    for code in CODES:
        share = found[code] / found["float"]
        rows.append(
            Row(f"{name}, batch {len(x)}: decoding {code} ÷ a float32 forward", share, GOALS.get(code), percent=True)
        )
        rows.append(Row(f"{name}: decoding {code} ÷ memcpy of the floats", found[code] / found["memcpy"]))
        for rate in rates:
            ratio = faulty[rate][f"hit {code}"] / faulty[rate][f"clean {code}"]
            rows.append(Row(f"{name}: decoding {code}, faults at {rate:g} ÷ clean words", ratio))
    once = found["once"] / found["float"]
    rows.append(Row(f"{name}, batch {len(x)}: forward after unpack_ ÷ float32", once, at_most=1.01))
    return rows


def _timed(action: Callable[[Any], object], given: object, turn: int) -> float:
    return seconds(lambda: action(given))


def _hit(model: nn.Module, rate: float) -> None:
    """Faults that stay in packed words."""
    generator = torch.Generator().manual_seed(0)
    for packed in (buffer for name, buffer in model.named_buffers() if name.endswith("original0")):
        for bit in range(8):
            packed ^= (torch.rand(packed.shape, generator=generator) < rate).to(torch.uint8) << bit


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
