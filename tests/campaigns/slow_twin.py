"""A campaign as one would write it without any library: a deep copy a trial, bits through `struct`, plain loops.

Nothing here is shared with flipproof but the list of bits that a trial draws.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

Codec = tuple[Callable[[float], int], Callable[[int], float], int]
"""Value to word, word to value, and the width of a word."""


def to_float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def float32(_: list[float]) -> Codec:
    def encode(value: float) -> int:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])

    def decode(word: int) -> float:
        return float(struct.unpack("<f", struct.pack("<I", word))[0])

    return encode, decode, 32


def float16(_: list[float]) -> Codec:
    def encode(value: float) -> int:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])

    def decode(word: int) -> float:
        return float(struct.unpack("<e", struct.pack("<H", word))[0])

    return encode, decode, 16


def bfloat16(values: list[float]) -> Codec:
    encode32, decode32, _ = float32(values)

    def encode(value: float) -> int:
        word = encode32(value)
        upper, rest = word >> 16, word & 0xFFFF
        return upper + (rest > 0x8000 or (rest == 0x8000 and upper % 2 == 1))

    return encode, lambda word: decode32(word << 16), 16


def fixed_point(integer_bits: int, fraction_bits: int) -> Callable[[list[float]], Codec]:
    width = 1 + integer_bits + fraction_bits
    top = 2 ** (width - 1)

    def encode(value: float) -> int:
        return max(-top, min(top - 1, round(value * 2**fraction_bits))) % 2**width

    def decode(word: int) -> float:
        return to_float32((word - 2**width if word >= top else word) / 2**fraction_bits)

    return lambda _: (encode, decode, width)


def affine(bits: int) -> Callable[[list[float]], Codec]:
    def fitted(values: list[float]) -> Codec:
        scale = (max(values) - min(values)) / (2**bits - 1)
        zero = -min(values) / scale

        def encode(value: float) -> int:
            return max(0, min(2**bits - 1, round(value / scale + zero)))

        return encode, lambda word: to_float32(scale * (word - zero)), bits

    return fitted


class SlowTwin:
    """A model whose parameters are words of bits.

    `codecs` says how each named parameter is stored; parameters without one stay what they are and are never hit.
    """

    def __init__(self, model: nn.Module, codecs: dict[str, Callable[[list[float]], Codec]]) -> None:
        self.model = deepcopy(model).eval()
        self.sites: list[tuple[str, int, Codec]] = []
        self.words: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            if name in codecs:
                values = parameter.detach().reshape(-1).tolist()
                codec = codecs[name](values)
                self.words[name] = [codec[0](value) for value in values]
                self.sites.append((name, len(values), codec))

    @property
    def bits(self) -> int:
        return sum(count * codec[2] for _, count, codec in self.sites)

    def place(self, position: int) -> tuple[str, int, int]:
        for name, count, (_, _, width) in self.sites:
            if position < count * width:
                return name, position // width, position % width
            position -= count * width
        raise IndexError(position)

    def run(
        self, inputs: list[Tensor], faults: list[tuple[str, int, int]], stuck: int | None = None
    ) -> tuple[list, int]:
        """Outputs of all samples as lists, and how many bits changed."""
        words = {name: list(of_site) for name, of_site in self.words.items()}
        changed = 0
        for name, value, bit in faults:
            before = words[name][value]
            after = before ^ (1 << bit) if stuck is None else (before & ~(1 << bit)) | (stuck << bit)
            changed += before != after
            words[name][value] = after
        model = deepcopy(self.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, _, (_, decode, _) in self.sites:
                parameter = parameters[name]
                parameter.copy_(torch.tensor([decode(word) for word in words[name]]).reshape(parameter.shape))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return [row for batch in inputs for row in model(batch.clone()).tolist()], changed
            finally:
                torch.set_num_threads(threads)


def accuracy(outputs: list[list[float]], targets: list[int]) -> float:
    right = 0
    for row, target in zip(outputs, targets, strict=True):
        if not any(math.isnan(value) for value in row):
            right += max(range(len(row)), key=lambda i: (row[i], -i)) == target
    return right / len(targets)


def outcomes(golden: list[list[float]], faulty: list[list[float]]) -> dict[str, int]:
    counts = {"masked": 0, "non_critical_sdc": 0, "critical_sdc": 0, "due": 0}
    for before, after in zip(golden, faulty, strict=True):
        if any(math.isnan(value) for value in after):
            counts["due"] += 1
        elif struct.pack(f"<{len(before)}d", *before) == struct.pack(f"<{len(after)}d", *after):
            counts["masked"] += 1
        elif before.index(max(before)) == after.index(max(after)):
            counts["non_critical_sdc"] += 1
        else:
            counts["critical_sdc"] += 1
    return counts
