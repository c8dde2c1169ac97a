"""BCH: corrects as many faults a code word as it is given check bits for, per word or over a block of words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flipproof.errors import FormatError
from flipproof.formats._block_codes import BlockCode, bch_checks, bch_code, degrees
from flipproof.formats.base import Format
from flipproof.formats.blocks import Blocks


def check_bits(data: int, longest: int) -> NDArray[np.int64]:
    """Check bits of the shortest BCH code over so many data bits, without a parity, for each t from 0 up.

    Args:
        data: bits.
        longest: code words are no longer; where that ends the list ends.

    Example:
        >>> check_bits(11, 31).tolist()
        [0, 4, 10, 15, 20, 20]
    """
    found = np.zeros(1, np.int64)
    for m in range(2, 14):
        order = (1 << m) - 1
        checks = degrees(m)[found.size :]
        checks = checks[data + checks <= min(order, longest)]
        found = np.concatenate([found, checks])
        if order >= longest:
            break
    return found


@dataclass(frozen=True)
class BCH(Blocks):
    """Binary BCH code: corrects up to t faults a code word, in data and check bits alike.

    D data bits get the check bits of the shortest primitive narrow-sense code of length 2^m − 1 that holds them, at
    most m · t, shortened to D; `parity` adds one bit, with which t + 1 faults are always detected. Eleven data bits
    under t = 5 are (31, 11), 32 bits with the parity; five under t = 3 are (15, 5), 16 bits.

    Decoding is of bounded distance: a pattern of at most t faults is corrected, whatever is farther from every code
    word is detected, and then reads as 0.0, in all words of the block. The rest lies within t of a wrong code word and
    is miscorrected, as with any code: more often the fewer check bits a code has left over.

    With `block`, as many consecutive words as fit into that many data bits share one code word. Long code words come
    nearer to what memory can carry: at a bit error rate of 1 % no code gets by with fewer than 1.09 stored bits a data
    bit, (32, 11) takes 2.9, and ``BCH(Affine(bits=5, axis=0), t=14, block=385)`` 1.33. Blocks and what is left over at
    the end of a tensor are stored as in `SECDED`; the last block, which is longer, corrects as many more faults:
    ⌈t · words / words of a block⌉.

    Up to 20 check bits errors are looked up by their syndrome, beyond that found with the algorithm of Berlekamp and
    Massey and the search of Chien. Source: Hocquenghem 1959; Bose and Ray-Chaudhuri 1960; Massey 1969.

    Args:
        inner: the format that is protected.
        t: faults a code word that are corrected, at least 1.
        block: data bits that share a code word; None codes each word by itself.
        parity: whether an overall parity bit is added.

    Raises:
        FormatError: for words beyond 64 bits, code words beyond 8191, a block that is smaller than a word, or a tensor
            smaller than a block.

    Example:
        >>> import flipproof as fp, torch
        >>> code = fp.BCH(fp.Rounded(fp.Float16(), bits=11), t=5)
        >>> stored = code.encode(torch.tensor([0.5]))
        >>> five, six, seven = 0b11111 << 20, 0b111111 << 20, 0b1111111 << 20
        >>> code.width, [stored.decode_at(torch.tensor([0]), stored.words ^ e).item() for e in (five, six)]
        (32, [0.5, 0.0])
        >>> block = fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385)
        >>> block.layout(values=7700).bits / 7700  # 77 words, 126 check bits and a parity
        6.64935064935065
    """

    t: int
    block: int | None = None
    parity: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.t, int) or isinstance(self.t, bool) or self.t < 1:
            raise FormatError(f"BCH corrects t faults, a whole number from 1, got t={self.t!r}")
        if not isinstance(self.parity, bool):
            raise FormatError(f"BCH: parity is True or False, got {self.parity!r}")
        if isinstance(self.inner, Format) and isinstance(self.block, int) and self.block > 4096:
            raise FormatError(f"BCH: a block has at most 4096 data bits, got block={self.block}")
        super().__post_init__()

    @property
    def data_bits(self) -> int | None:
        return self.block

    def corrected(self, words: int) -> int:
        return -(-self.t * words // self.together)

    def check_bits(self, words: int) -> int:
        return bch_checks(self.inner.width * words, self.corrected(words))[1] + self.parity

    def code(self, words: int) -> BlockCode:
        return bch_code(self.inner.width, words, self.checks, self.corrected(words), self.parity)
