"""SECDED: the extended Hamming code that protects most real memories, per word or over a block of words."""

from __future__ import annotations

from dataclasses import dataclass

from flipproof.formats._block_codes import BlockCode, hamming_checks, hamming_code
from flipproof.formats.blocks import Blocks


@dataclass(frozen=True)
class SECDED(Blocks):
    """Extended Hamming code: corrects one fault a code word, detects two (single error correct, double error detect).

    D data bits get r check bits with 2^r ≥ D + r + 1, and one bit of overall parity: (39, 32) for Float32, (13, 8) for
    8-bit words. A code word with two faults reads as 0.0. Three faults and more may be taken for one and miscorrected,
    as in any SECDED memory. Around a rounded word it takes no more memory than the word had: 26 bits of a float32 and 6
    check bits are 32 again, ``SECDED(Rounded(Float32(), 26))``.

    With `block`, as many consecutive words as fit into that many data bits share one code word: server memory's
    (72, 64) is ``SECDED(Affine(bits=8), block=64)``, 9 bits a weight, not 13. A detected double fault then reads as 0.0
    in all words of the block. Words left over at the end of a tensor belong to its last block, which is longer. The
    check bits lie above the inner words, ⌈check bits / words⌉ in each of the first ones, and none in those behind: (39,
    32) over four 8-bit words stores words of 10, 10, 10 and 9 bits, 9.75 a value, and `width` is 10.

    Source: Hamming 1950.

    Args:
        inner: the format that is protected.
        block: data bits that share a code word; None codes each word by itself.

    Raises:
        FormatError: for words beyond 64 bits, a block that is smaller than a word, or a tensor smaller than a block.

    Example:
        >>> import flipproof as fp, torch
        >>> code = fp.SECDED(fp.Float32())
        >>> stored = code.encode(torch.tensor([0.5]))
        >>> code.width, stored.decode_at(torch.tensor([0]), stored.words ^ (1 << 30))
        (39, tensor([0.5000]))
        >>> stored.decode_at(torch.tensor([0]), stored.words ^ (1 << 30) ^ 1)  # two faults
        tensor([0.])
        >>> server = fp.SECDED(fp.Affine(bits=8), block=64)
        >>> server.width, server.layout(values=800).bits / 800
        (9, 9.0)
        >>> fp.SECDED(fp.Affine(bits=4), block=64).layout(values=800).bits / 800
        4.5
        >>> fp.SECDED(fp.Rounded(fp.Float32(), bits=26)).width
        32
    """

    block: int | None = None

    @property
    def data_bits(self) -> int | None:
        return self.block

    def corrected(self, words: int) -> int:
        return 1

    def check_bits(self, words: int) -> int:
        return hamming_checks(self.inner.width * words)

    def code(self, words: int) -> BlockCode:
        return hamming_code(self.inner.width, words, self.checks)
