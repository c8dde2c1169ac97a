"""In-place zero-space ECC: SEC-DED whose check bits lie in bits of the weights that say nothing (Guan et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Format
from flipproof.formats.fixed import FixedPoint
from flipproof.formats.protected import Protected
from flipproof.formats.symmetric import Symmetric

WORDS = 8
"""Words of a block: 64 bits, seven of them check bits."""

SPARE = 6
"""The bit of a small 8-bit number that repeats its sign."""


@dataclass(frozen=True)
class InPlaceECC(Protected):
    """SEC-DED (64, 57) over blocks of eight 8-bit weights: corrects one fault a block, detects two, costs no memory.

    An 8-bit two's complement number from −64 to 63 has the same bit 6 and bit 7. The check bits of a block lie in bit 6
    of its first seven words; the eighth word is free. At use the block is repaired, and bit 6 of these seven becomes
    bit 7 again. A block with two faults reads as 0.0 in all its words, as with `SECDED`; three and more may be taken
    for one.

    The paper trains the network until the first seven weights of every block are small. **Without that training they
    are clamped to [−64, 63] here, which changes weights without any fault**; the golden run shows what it does. With
    `Symmetric(8)` that is every weight of the seven that is beyond half of the largest, 1 % of a ResNet-20's, which
    costs it 14 points of accuracy (on 300 images). ``Symmetric(8, largest=63)`` clamps nothing and is what an untrained
    network wants; that is ours.

    Of the paper we could read abstract and introduction. Blocks, range and place of the check bits are the method as it
    is known; what reads after two faults, and which SEC-DED code it is, are ours: the extended Hamming code. Every
    stored bit has a place, a number of six bits, and the syndrome is the exclusive or of the places of the ones, beside
    their parity. The check bit in word i (0 to 5) has place 2^i, the one in word 6 has place 0 and makes the whole
    block even; the other 57 bits, from bit 0 of word 0 up, have the other places in ascending order. An odd block is
    repaired at its syndrome; an even one with a syndrome has two faults.

    Words left over at the end of a tensor belong to its last block, which then has 9 to 15 words: eight check bits, in
    bit 6 of the first eight, with places of seven bits. It too corrects one fault and detects two, of more bits.
    (Nothing is published on that.)

    Args:
        inner: ``Symmetric(bits=8)`` or a `FixedPoint` of width 8.

    Raises:
        FormatError: for another inner format, or a tensor smaller than a block.

    Example:
        >>> import flipproof as fp, torch
        >>> code = fp.InPlaceECC(fp.FixedPoint(integer_bits=1, fraction_bits=6))
        >>> stored = code.encode(torch.tensor([0.5, -0.25, 1.5, 0.0, 0.0, 0.0, 0.0, 1.5]))
        >>> code.width, stored.decode()  # the third is clamped, the last one is not
        (8, tensor([ 0.5000, -0.2500,  0.9844,  0.0000,  0.0000,  0.0000,  0.0000,  1.5000]))
        >>> hit = stored.words.clone()
        >>> hit[7] ^= 1 << 7
        >>> bool((code.decode_words(hit, (), torch.float32) == stored.decode()).all())
        True
        >>> hit[0] ^= 1
        >>> code.decode_words(hit, (), torch.float32)
        tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """

    def __post_init__(self) -> None:
        eight = isinstance(self.inner, (Symmetric, FixedPoint)) and self.inner.width == 8
        if isinstance(self.inner, Format) and not eight:
            raise FormatError(
                f"InPlaceECC takes 8-bit two's complement words, Symmetric(bits=8) or a FixedPoint of width 8, "
                f"got {self.inner!r}"
            )
        super().__post_init__()

    @property
    def checks(self) -> int:
        return 0

    @property
    def together(self) -> int:
        return WORDS

    def protect_words(self, data: Tensor) -> Tensor:
        return self._by_block(data, _protect)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        repaired = self._by_block(words, _repair)
        return repaired & 0xFF, repaired < 0

    def _by_block(self, words: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of eight words through `work`; what is left over at the end makes the last row longer."""
        flat, over = words.reshape(-1), words.numel() % WORDS
        if 0 < flat.numel() < WORDS:
            raise FormatError(
                f"a tensor of {flat.numel()} values is smaller than a block of {WORDS} words of {self!r}; store it "
                f"in another format (format= takes a mapping {{pattern: Format}}) or leave it out"
            )
        whole = flat.numel() if not over else flat.numel() - over - WORDS
        rows = [work(flat[:whole].reshape(-1, WORDS)).reshape(-1)]
        if over:
            rows.append(work(flat[whole:].reshape(1, -1)).reshape(-1))
        return torch.cat(rows).reshape(words.shape)


def _protect(data: Tensor) -> Tensor:
    """Rows of 8-bit words, unsigned, to rows with their check bits."""
    code = _code(data.shape[1])
    words = data.clone()
    signed = ((words[:, : code.checks] << 56) >> 56).clamp(-64, 63)
    words[:, : code.checks] = signed & (0xFF ^ 1 << SPARE)
    syndrome = _syndrome(words, code)
    odd, places = syndrome >> (code.checks - 1), syndrome & ((1 << (code.checks - 1)) - 1)
    for i in range(code.checks - 1):
        check = (places >> i) & 1
        words[:, i] |= check << SPARE
        odd = odd ^ check
    words[:, code.checks - 1] |= odd << SPARE
    return words


def _repair(words: Tensor) -> Tensor:
    """Rows of stored words to inner words; -1 in all of a row that is beyond repair."""
    code = _code(words.shape[1])
    syndrome = _syndrome(words, code)
    lost, word, flip = (torch.tensor(column, device=words.device)[syndrome] for column in code[2:])
    here = torch.arange(words.shape[1], device=words.device) == word[:, None]
    data = torch.where(here, words ^ flip[:, None], words)
    small = data[:, : code.checks]
    data[:, : code.checks] = (small & (0xFF ^ 1 << SPARE)) | (((small >> 7) & 1) << SPARE)
    return torch.where(lost[:, None], -1, data)


def _syndrome(words: Tensor, code: _Code) -> Tensor:
    """Of each row: the exclusive or of the places of its ones, and above it their parity."""
    table = torch.tensor(code.syndromes, device=words.device)
    found = torch.zeros_like(words[:, 0])
    for j in range(words.shape[1]):
        found = found ^ table[j][words[:, j]]
    return found


class _Code(NamedTuple):
    """The code word of a block.

    Attributes:
        checks: check bits, in bit 6 of so many first words.
        syndromes: what a word adds to the syndrome, by its position in the block and its value.
        lost: by syndrome, whether it tells of faults beyond repair.
        word: by syndrome, the word to repair; −1 for none.
        flip: by syndrome, the bit to repair, as a mask.
    """

    checks: int
    syndromes: list[list[int]]
    lost: list[bool]
    word: list[int]
    flip: list[int]


@lru_cache
def _code(words: int) -> _Code:
    checks = 1
    while 1 << (checks - 1) < 8 * words:
        checks += 1
    odd = 1 << (checks - 1)  # counts ones: every bit has it in its column
    free = (place for place in range(1, odd) if place & (place - 1))
    columns = {(i, SPARE): odd | 1 << i for i in range(checks - 1)} | {(checks - 1, SPARE): odd}
    for word in range(words):
        for bit in range(8):
            if (word, bit) not in columns:
                columns[word, bit] = odd | next(free)
    syndromes = [[0] * 256 for _ in range(words)]
    lost, where, flip = [True] * (2 * odd), [-1] * (2 * odd), [0] * (2 * odd)
    lost[0] = False
    for (word, bit), column in columns.items():
        lost[column], where[column], flip[column] = False, word, 1 << bit
        for value in range(256):
            if value >> bit & 1:
                syndromes[word][value] ^= column
    return _Code(checks, syndromes, lost, where, flip)
