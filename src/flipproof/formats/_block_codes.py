"""Binary linear codes over a block of words: check bits, their repair, compiled for the CPU and in torch elsewhere.

A code word is all data bits of a block, word by word from the lowest bit, and its check bits. It is systematic: the
data bits are stored as they are. Each data bit has a *column*, the check bits that it takes part in; the check bits of
a block are the exclusive or of the columns of its set data bits. Stored check bits ⊕ those of the stored data are the
*syndrome*: 0 for a clean block, and otherwise what the errors alone decide, whatever the data.

Position i < r of an error is check bit i, position r + d is data bit d. An overall parity, where there is one, is the
last check bit and has no position: an error in it is told from the parity of the number of errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof._kernels import kernel
from flipproof.errors import FormatError

TABLE_CHECKS = 20
"""Up to so many check bits the errors are looked up by their syndrome: 2²⁰ entries at most."""

_PIECE = 12
"""Data bits whose check bits are looked up at once: tables stay in the cache nearest to the core."""

_PRIMITIVE = {
    2: 0x7,
    3: 0xB,
    4: 0x13,
    5: 0x25,
    6: 0x43,
    7: 0x89,
    8: 0x11D,
    9: 0x211,
    10: 0x409,
    11: 0x805,
    12: 0x1053,
    13: 0x201B,
}
"""A primitive polynomial of each degree, bit i for xⁱ (Lin and Costello 2004, Table 2.7)."""

CLEAN, CORRECTED, LOST = 0, 1, 2

CHUNK_BYTES = 1 << 28
"""What torch may take at once where blocks are decoded by tensor operations."""


@dataclass(frozen=True, eq=False)
class Field:
    """GF(2^m): powers of a primitive element α, and their logarithms."""

    m: int

    @property
    def order(self) -> int:
        """How many elements are not 0: α^order = 1."""
        return (1 << self.m) - 1

    @cached_property
    def exp(self) -> NDArray[np.int64]:
        """α^i for i from 0 to twice the order, so that sums of two logarithms need no remainder."""
        powers = [1]
        for _ in range(2 * self.order):
            following = powers[-1] << 1
            powers.append(following ^ _PRIMITIVE[self.m] if following >> self.m else following)
        return np.array(powers, np.int64)

    @cached_property
    def log(self) -> NDArray[np.int64]:
        """The i of α^i; that of 0 is never meant and stands at 0."""
        found = np.zeros(self.order + 1, np.int64)
        found[self.exp[: self.order]] = np.arange(self.order)
        return found


def generator(m: int, t: int) -> int:
    """The generator polynomial of the narrow-sense binary BCH code of length 2^m − 1 that corrects t errors.

    g(x) = lcm of the minimal polynomials of α, α³, …, α^(2t−1) (Hocquenghem 1959; Bose and Ray-Chaudhuri 1960)

    >>> bin(generator(4, 2)), generator(5, 5).bit_length() - 1  # (15, 7) and (31, 11)
    ('0b111010001', 20)
    """
    field = Field(m)
    roots: set[int] = set()
    product = 1
    for odd in range(1, 2 * t, 2):
        if odd % field.order in roots:
            continue
        conjugates = {odd * 2**i % field.order for i in range(m)}
        roots |= conjugates
        minimal = [1]  # coefficients in the field, lowest first; the product of x − α^c over the conjugates
        for c in conjugates:
            shifted, scaled = [0, *minimal], [*(_times(field, a, int(field.exp[c])) for a in minimal), 0]
            minimal = [a ^ b for a, b in zip(shifted, scaled, strict=True)]
        product = _multiply(product, sum(bit << i for i, bit in enumerate(minimal)))
    return product


def _times(field: Field, a: int, b: int) -> int:
    return int(field.exp[field.log[a] + field.log[b]]) if a and b else 0


def _multiply(a: int, b: int) -> int:
    """Of polynomials over GF(2)."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = a << 1, b >> 1
    return product


@lru_cache(maxsize=65536)
def bch_checks(data: int, t: int) -> tuple[int, int]:
    """(m, check bits) of the shortest BCH code that corrects t errors in so many data bits, without a parity.

    Raises:
        FormatError: if no code of length 2^13 − 1 or less does.
    """
    for m in _PRIMITIVE:
        order = (1 << m) - 1
        if 2 * t <= order and data + (checks := int(degrees(m)[t])) <= order:
            return m, checks
    raise FormatError(f"no BCH code of at most 8191 bits corrects t={t} errors in {data} data bits")


@lru_cache
def degrees(m: int) -> NDArray[np.int64]:
    """Of the generator polynomial for each t from 0 to 2^(m−1) − 1: how many powers of α are among its roots."""
    order = (1 << m) - 1
    roots = np.zeros(order, np.bool_)
    found = [0]
    for odd in range(1, order, 2):
        added = 0
        if not roots[odd]:
            conjugates = np.unique(odd * 2 ** np.arange(m, dtype=np.int64) % order)
            roots[conjugates], added = True, conjugates.size
        found.append(found[-1] + added)
    return np.array(found, np.int64)


@dataclass(frozen=True, eq=False)
class BlockCode:
    """The code of one block of words.

    Attributes:
        width: data bits a word.
        words: words a block.
        per_word: check bits above the data bits of each word, the first words first; the last may have fewer or none.
        t: errors that are corrected.
        parity: whether the last check bit is the parity of all others and the data.
        columns: of each data bit, the check bits that it takes part in, bit i for check bit i, the parity included.
        field: in which errors are found where there are too many syndromes for a table; None with a table.
    """

    width: int
    words: int
    per_word: int
    t: int
    parity: bool
    columns: tuple[int, ...]
    checks: int
    field: Field | None = None

    @property
    def inside(self) -> int:
        """Check bits without the parity."""
        return self.checks - self.parity

    @property
    def limbs(self) -> int:
        """64-bit numbers that hold the check bits."""
        return -(-self.checks // 64)

    @cached_property
    def tables(self) -> NDArray[np.uint64]:
        """Check bits of each piece of a word, of shape (words, pieces, 2^bits of a piece, limbs)."""
        pieces, bits = self.pieces, self.piece
        tables = np.zeros((self.words, pieces, 1 << bits, self.limbs), np.uint64)
        columns = _limbs(self.columns, self.limbs)
        for word in range(self.words):
            for piece in range(pieces):
                table = tables[word, piece]
                for bit in range(min(bits, self.width - piece * bits)):
                    low = 1 << bit
                    table[low : 2 * low] = table[:low] ^ columns[word * self.width + piece * bits + bit]
        return tables

    @property
    def piece(self) -> int:
        """Data bits of a piece."""
        return -(-self.width // self.pieces)

    @cached_property
    def patterns(self) -> tuple[NDArray[np.int8], NDArray[np.int16]]:
        """By syndrome without parity: how many errors (−1 for more than t), and their positions, −1 for none."""
        inside = self.inside
        columns = [1 << i for i in range(inside)] + [c & ((1 << inside) - 1) for c in self.columns]
        column = np.array(columns, np.int64)
        count = np.full(1 << inside, -1, np.int8)
        positions = np.full((1 << inside, self.t), -1, np.int16)
        count[0] = 0
        keys, last = np.zeros(1, np.int64), np.full(1, -1, np.int64)
        where = np.zeros((1, 0), np.int16)
        for errors in range(1, self.t + 1):
            before, added = np.nonzero(np.arange(column.size)[None, :] > last[:, None])
            keys, last = keys[before] ^ column[added], added
            where = np.concatenate([where[before], added[:, None].astype(np.int16)], axis=1)
            count[keys] = errors
            positions[keys, :errors] = where
        return count, positions

    # ---------------------------------------------------------------- on the CPU, compiled

    def protect(self, words: NDArray[Any], out: NDArray[Any]) -> None:
        """Unsigned inner words of whole blocks to whole words."""
        _protect(words, self.tables, self.piece, self.width, self.per_word, self.checks, out)

    def repair(self, words: NDArray[Any], out: NDArray[Any]) -> NDArray[np.uint8]:
        """Unsigned whole words of whole blocks to inner words; CLEAN, CORRECTED or LOST for each block.

        The inner words of a lost block are those that are stored.
        """
        status = np.zeros(words.size // self.words, np.uint8)
        rest = (*self._searched, out, status)
        tables = self.tables
        if self.words == 1 and self.pieces == 1 and self.limbs == 1:
            _repair_short(words, self._whole.astype(words.dtype), tables[0, 0, :, 0], *rest)
        elif self.words == 1 and self.pieces <= 3 and self.limbs == 1:
            _repair_long(words, *self._three, *rest)
        elif self.limbs <= 2:
            _repair_narrow(words, tables[..., 0].copy(), tables[..., -1].copy(), self.limbs, *rest)
        else:
            _repair(words, tables, *rest)
        return status

    def read_shifted(self, words: NDArray[Any], shift: int, out: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
        """Single words straight to bit patterns, inner word · 2^shift, 0 for lost ones: (status, how many are lost)."""
        status = np.zeros(words.size, np.uint8)
        return status, _read_shifted(words, *self._three, shift, *self._searched, out, status)

    def read_looked_up(
        self, words: NDArray[Any], values: NDArray[Any], out: NDArray[Any]
    ) -> tuple[NDArray[np.uint8], int]:
        """Single words straight to values of a table, a row a slice, 0 for a lost one: (status, how many are lost)."""
        status = np.zeros(words.size, np.uint8)
        whole = self._whole.astype(words.dtype)
        return status, _read_looked_up(words, whole, values, self.tables[0, 0, :, 0], *self._searched, out, status)

    @property
    def pieces(self) -> int:
        """Of a word, whose check bits are looked up at once."""
        return -(-self.width // _PIECE)

    @cached_property
    def _whole(self) -> NDArray[np.uint64]:
        """The clean word of each inner word."""
        table: NDArray[np.uint64] = self.tables[0, 0, :, 0]
        return table << np.uint64(self.width) | np.arange(table.size, dtype=np.uint64)

    @cached_property
    def _three(self) -> NDArray[np.uint64]:
        """The tables of up to three pieces of a word; those of pieces that it has not are 0."""
        three = np.zeros((3, self.tables.shape[2]), np.uint64)
        three[: self.pieces] = self.tables[0, :, :, 0]
        return three

    @property
    def _searched(self) -> tuple[Any, ...]:
        """What the search for errors takes: the shape of the code, and its table or its field."""
        if self.field is None:
            count, positions = self.patterns
            exp = log = np.zeros(1, np.int64)
        else:
            count, positions = np.zeros(1, np.int8), np.zeros((1, 1), np.int16)
            exp, log = self.field.exp, self.field.log
        shape = (self.width, self.words, self.per_word, self.t, int(self.parity), self.checks, self.piece)
        return shape, count, positions, exp, log

    # ---------------------------------------------------------------- anywhere, in torch

    def protect_torch(self, rows: Tensor) -> Tensor:
        """Inner words as int64 of shape (blocks, words) to whole words."""
        return torch.cat([self._protect_torch(part) for part in self._chunks(rows)])

    def _protect_torch(self, rows: Tensor) -> Tensor:
        checks = self._of_data(_bits(rows, self.width).flatten(1))
        padded = torch.nn.functional.pad(checks, (0, self.words * self.per_word - self.checks))
        return rows + (_number(padded.reshape(-1, self.words, self.per_word)) << self.width)

    def mend_torch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`repair_torch` of the blocks that are not clean, in chunks; of all of them while somebody traces."""
        if torch.compiler.is_compiling():
            return self.repair_torch(rows)
        data = rows & ((1 << self.width) - 1)
        lost = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        first = 0
        for part in self._chunks(rows):
            dirty = first + self._syndrome(part)[0].any(dim=1).nonzero()[:, 0]
            if dirty.numel():
                data[dirty], lost[dirty] = self.repair_torch(rows[dirty])
            first += len(part)
        return data, lost

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Blocks by as many as `CHUNK_BYTES` hold: some eight 64-bit numbers a bit, where all of them are searched."""
        if torch.compiler.is_compiling():
            return (rows,)
        bits = self.words * (self.width + self.per_word)
        return torch.split(rows, max(CHUNK_BYTES // (64 * bits), 1))

    def repair_torch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Whole words as int64 of shape (blocks, words) to (inner words, whether each block is beyond repair)."""
        syndrome, data = self._syndrome(rows)
        inside = self.inside
        if self.field is None:
            count, positions = self._there(rows.device, "patterns", lambda: self.patterns)
            key = _number(syndrome[:, :inside])
            errors, where = count[key].long(), positions[key].long()
        else:
            errors, where = self._search_torch(syndrome[:, :inside])
        known = errors >= 0
        if self.parity:
            odd = syndrome.sum(dim=1) % 2
            known &= (errors + (errors % 2 != odd).long()) <= self.t
        total = inside + data.shape[1]
        places = torch.where((where >= 0) & known[:, None], where, total)
        flips = torch.zeros(rows.shape[0], total + 1, dtype=torch.int64, device=rows.device)
        flips = flips.scatter_add(1, places, torch.ones_like(places))
        repaired = (data + flips[:, inside:total]) % 2
        return _number(repaired.reshape(rows.shape[0], self.words, self.width)), ~known

    def _syndrome(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(stored check bits ⊕ those of the stored data, the data bits), both of shape (blocks, ·)."""
        bits = _bits(rows, self.width + self.per_word)
        data = bits[..., : self.width].flatten(1)
        stored = bits[..., self.width :].flatten(1)[:, : self.checks]
        return (self._of_data(data) + stored) % 2, data

    def _there(self, device: torch.device, name: str, make: Callable[[], Sequence[NDArray[Any]]]) -> list[Tensor]:
        """Tables as tensors of a device, copied there once; while somebody traces they are constants of the graph."""
        if torch.compiler.is_compiling():
            return [torch.from_numpy(table).to(device) for table in make()]
        key = (name, str(device))
        if key not in self._copies:
            self._copies[key] = [torch.from_numpy(table).to(device) for table in make()]
        return self._copies[key]

    @cached_property
    def _copies(self) -> dict[tuple[str, str], list[Tensor]]:
        return {}

    def _of_data(self, bits: Tensor) -> Tensor:
        """Check bits of data bits, both 0 or 1: (blocks, data bits) to (blocks, check bits)."""
        (matrix,) = self._there(bits.device, "matrix", lambda: [_matrix(self.columns, self.checks)])
        return torch.matmul(bits.to(torch.float32), matrix).to(torch.int64) % 2

    def _search_torch(self, syndrome: Tensor) -> tuple[Tensor, Tensor]:
        """Berlekamp and Massey's shift register and Chien's search, all blocks at once, without a branch.

        Returns:
            How many errors, −1 for more than t, and their positions, −1 for none, of shape (blocks, ·).
        """
        assert self.field is not None
        field, t = self.field, self.t
        device = syndrome.device
        exp, log = self._there(device, "field", lambda: (field.exp, field.log))
        order = field.order

        def times(a: Tensor, b: Tensor) -> Tensor:
            return torch.where((a != 0) & (b != 0), exp[log[a] + log[b]], torch.zeros_like(a))

        def power_sums() -> list[NDArray[Any]]:
            """Bits of α^ij: what check bit i adds to the j-th sum of powers."""
            exponents = np.outer(np.arange(self.inside), np.arange(1, 2 * t + 1)) % order
            as_bits = (field.exp[exponents][:, :, None] >> np.arange(field.m)) & 1
            return [as_bits.reshape(self.inside, -1).astype(np.float32)]

        (to_sums,) = self._there(device, "power sums", power_sums)
        sums = (torch.matmul(syndrome.to(torch.float32), to_sums).to(torch.int64) % 2).reshape(-1, 2 * t, field.m)
        s = _number(sums)
        blocks = s.shape[0]
        one = torch.ones(blocks, 1, dtype=torch.int64, device=device)
        sigma = torch.cat([one, torch.zeros(blocks, 2 * t, dtype=torch.int64, device=device)], dim=1)
        shifted = torch.roll(sigma, 1, dims=1)  # x · B(x)
        length = torch.zeros(blocks, dtype=torch.int64, device=device)
        divisor = torch.ones(blocks, dtype=torch.int64, device=device)
        for step in range(0, 2 * t, 2):  # of a binary code every other discrepancy is 0
            discrepancy = s[:, step]
            for i in range(1, min(step, 2 * t) + 1):
                discrepancy = torch.bitwise_xor(discrepancy, times(sigma[:, i], s[:, step - i]))
            ratio = times(discrepancy, exp[order - log[divisor]])
            following = torch.bitwise_xor(sigma, times(ratio[:, None].expand_as(shifted), shifted))
            longer = (discrepancy != 0) & (2 * length <= step)
            kept = torch.where(longer[:, None], sigma, shifted)
            divisor = torch.where(longer, discrepancy, divisor)
            length = torch.where(longer, step + 1 - length, length)
            sigma = following
            # B is multiplied by x for this step and the one that is left out
            shifted = torch.cat([torch.zeros_like(kept[:, :2]), kept[:, :-2]], dim=1)
        total = self.inside + len(self.columns)
        places = torch.arange(total, device=device)
        value = torch.ones(blocks, total, dtype=torch.int64, device=device)
        for i in range(1, t + 1):
            turn = (log[sigma[:, i]][:, None] + (order - places * i % order)[None, :]) % order
            value = torch.bitwise_xor(value, torch.where(sigma[:, i : i + 1] != 0, exp[turn], torch.zeros_like(turn)))
        roots = value == 0
        number = roots.sum(dim=1)
        good = (length <= t) & (number == length)
        where = torch.where(roots, places[None, :], torch.full_like(value, -1))
        return torch.where(good, length, torch.full_like(length, -1)), where


def _limbs(numbers: tuple[int, ...], limbs: int) -> NDArray[np.uint64]:
    return np.array([[number >> 64 * k & (2**64 - 1) for k in range(limbs)] for number in numbers], np.uint64)


def _matrix(columns: tuple[int, ...], checks: int) -> NDArray[np.float32]:
    return np.array([[column >> i & 1 for i in range(checks)] for column in columns], np.float32)


def _bits(words: Tensor, width: int) -> Tensor:
    """Bits of int64 words, lowest first, in a new last dimension."""
    # no shifts, which ONNX has of unsigned types alone, and no torch.div, which its exporter computes in float32
    return torch.bitwise_and(words.unsqueeze(-1), _powers(width, words.device)).ne(0).to(torch.int64)


def _number(bits: Tensor) -> Tensor:
    """Bits in the last dimension, lowest first, as int64."""
    return (bits * _powers(bits.shape[-1], bits.device)).sum(dim=-1)


def _powers(count: int, device: torch.device) -> Tensor:
    """2⁰, 2¹, … as int64, whose last bit is its sign."""
    return torch.tensor([1 << place if place < 63 else -(1 << 63) for place in range(count)], device=device)


@lru_cache(maxsize=64)
def bch_code(width: int, words: int, per_word: int, t: int, parity: bool) -> BlockCode:
    """The BCH code of a block: check bits are the remainder of data(x) · x^r divided by the generator polynomial."""
    data = width * words
    m, inside = bch_checks(data, t)
    polynomial = generator(m, t)
    columns = []
    remainder = polynomial ^ (1 << inside)  # x^r modulo the generator
    for _ in range(data):
        odd = 1 + remainder.bit_count() & 1
        columns.append(remainder | odd << inside if parity else remainder)
        remainder <<= 1
        if remainder >> inside:
            remainder ^= polynomial
    field = None if inside <= TABLE_CHECKS else Field(m)
    return BlockCode(width, words, per_word, t, parity, tuple(columns), inside + parity, field)


@lru_cache(maxsize=64)
def hamming_code(width: int, words: int, per_word: int) -> BlockCode:
    """The extended Hamming code of a block: check bit i covers the places whose number has bit i (Hamming 1950)."""
    data = width * words
    inside = hamming_checks(data) - 1
    places = [place for place in range(1, 2**inside) if place & (place - 1)][:data]  # powers of two are check bits
    columns = tuple(place | (1 + place.bit_count() & 1) << inside for place in places)
    return BlockCode(width, words, per_word, 1, True, columns, inside + 1)


def hamming_checks(data: int) -> int:
    """Check bits of the extended Hamming code over so many data bits, the overall parity included.

    >>> hamming_checks(32), hamming_checks(64)
    (7, 8)
    """
    r = 1
    while 2**r < data + r + 1:
        r += 1
    return r + 1


# -------------------------------------------------------------------- kernels


@kernel()
def _protect(words, tables, piece, width, per_word, checks, out):  # type: ignore[no-untyped-def]
    together, pieces, _, limbs = tables.shape
    mask = np.uint64((1 << piece) - 1)
    found = np.zeros(limbs, np.uint64)
    for block in range(words.size // together):
        found[:] = 0
        for j in range(together):
            word = np.uint64(words[block * together + j])
            for p in range(pieces):
                row = tables[j, p, (word >> np.uint64(p * piece)) & mask]
                for k in range(limbs):
                    found[k] ^= row[k]
        for j in range(together):
            word = np.uint64(words[block * together + j])
            first = j * per_word
            taken = min(per_word, checks - first)
            if taken > 0:
                word |= _part(found, first, taken) << np.uint64(width)
            out[block * together + j] = word


@kernel()
def _part(limbs, first, count):  # type: ignore[no-untyped-def]
    """Bits `first` to `first + count` of a long number; at most 63 of them."""
    k, shift = first >> 6, first & 63
    value = limbs[k] >> np.uint64(shift)
    if shift + count > 64:
        value |= limbs[k + 1] << np.uint64(64 - shift)
    return value & np.uint64((1 << count) - 1)


@kernel()
def _repair_short(words, whole, table, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    """Single words whose check bits are looked up at once: a clean word equals the one that its data would make."""
    width = shape[0]
    mask = words.dtype.type((1 << width) - 1)
    syndrome = np.zeros(1, np.uint64)
    found = np.zeros(shape[3], np.int64)
    for i in range(words.size):
        word = words[i]
        data = word & mask
        out[i] = data
        if whole[data] != word:
            syndrome[0] = (np.uint64(word) >> np.uint64(width)) ^ table[data]
            status[i] = _mend(syndrome, shape, count, positions, exp, log, found, out[i : i + 1])


@kernel()
def _repair_long(words, low, middle, high, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    """Single words of two or three pieces."""
    width, piece = shape[0], np.uint64(shape[6])
    keep, mask, above = np.uint64((1 << width) - 1), np.uint64((1 << shape[6]) - 1), np.uint64(width)
    two = np.uint64(2 * shape[6])
    syndrome = np.zeros(1, np.uint64)
    found = np.zeros(shape[3], np.int64)
    for i in range(words.size):
        word = np.uint64(words[i])
        data = word & keep
        out[i] = data
        sum_ = low[data & mask] ^ middle[(data >> piece) & mask] ^ high[(data >> two) & mask] ^ (word >> above)
        if sum_ != 0:
            syndrome[0] = sum_
            status[i] = _mend(syndrome, shape, count, positions, exp, log, found, out[i : i + 1])


@kernel()
def _read_shifted(words, low, middle, high, shift, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    """`_repair_long`, with each inner word shifted, and 0 for lost ones."""
    width, piece = shape[0], np.uint64(shape[6])
    keep, mask, above = np.uint64((1 << width) - 1), np.uint64((1 << shape[6]) - 1), np.uint64(width)
    two, up = np.uint64(2 * shape[6]), np.uint64(shift)
    syndrome, data_ = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    found = np.zeros(shape[3], np.int64)
    lost = 0
    for i in range(words.size):
        word = np.uint64(words[i])
        data = word & keep
        sum_ = low[data & mask] ^ middle[(data >> piece) & mask] ^ high[(data >> two) & mask] ^ (word >> above)
        if sum_ != 0:
            syndrome[0], data_[0] = sum_, data
            status[i] = _mend(syndrome, shape, count, positions, exp, log, found, data_)
            data = data_[0]
            if status[i] == LOST:
                data = np.uint64(0)
                lost += 1
        out[i] = data << up
    return lost


@kernel()
def _read_looked_up(words, whole, values, table, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    """`_repair_short`, with the value of each inner word, and 0 for lost ones."""
    width = shape[0]
    mask = words.dtype.type((1 << width) - 1)
    syndrome, data_ = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    found = np.zeros(shape[3], np.int64)
    slice_size, lost = words.size // values.shape[0], 0
    for row in range(values.shape[0]):
        own = values[row]
        for i in range(row * slice_size, (row + 1) * slice_size):
            word = words[i]
            data = word & mask
            if whole[data] == word:
                out[i] = own[data]
                continue
            syndrome[0], data_[0] = (np.uint64(word) >> np.uint64(width)) ^ table[data], np.uint64(data)
            status[i] = _mend(syndrome, shape, count, positions, exp, log, found, data_)
            out[i] = own[data_[0]]
            if status[i] == LOST:
                out[i] = 0.0
                lost += 1
    return lost


@kernel()
def _repair_narrow(words, first, second, limbs, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    """Blocks of at most 128 check bits."""
    width, together, per_word, t, _, checks, piece = shape
    pieces = first.shape[1]
    low, mask, above = np.uint64((1 << width) - 1), np.uint64((1 << piece) - 1), np.uint64(width)
    holding = min(together, -(-checks // per_word))
    syndrome = np.zeros(limbs, np.uint64)
    found = np.zeros(t, np.int64)
    for block in range(status.size):
        one, two = np.uint64(0), np.uint64(0)
        start = block * together
        for j in range(together):
            data = np.uint64(words[start + j]) & low
            out[start + j] = data
            if pieces == 1:
                one ^= first[j, 0, data]
                two ^= second[j, 0, data]
            else:
                for p in range(pieces):
                    part = (data >> np.uint64(p * piece)) & mask
                    one ^= first[j, p, part]
                    two ^= second[j, p, part]
        for j in range(holding):
            stored, place = np.uint64(words[start + j]) >> above, j * per_word
            if place < 64:
                one ^= stored << np.uint64(place)
                if limbs > 1 and place + per_word > 64:
                    two ^= stored >> np.uint64(64 - place)
            else:
                two ^= stored << np.uint64(place - 64)
        if one != 0 or (limbs > 1 and two != 0):
            syndrome[0] = one
            if limbs > 1:
                syndrome[1] = two
            part_ = out[start : start + together]
            status[block] = _mend(syndrome, shape, count, positions, exp, log, found, part_)


@kernel()
def _repair(words, tables, shape, count, positions, exp, log, out, status):  # type: ignore[no-untyped-def]
    width, together, per_word, t, _, checks, piece = shape
    pieces, limbs = tables.shape[1], tables.shape[3]
    low, mask = np.uint64((1 << width) - 1), np.uint64((1 << piece) - 1)
    syndrome = np.zeros(limbs, np.uint64)
    found = np.zeros(t, np.int64)
    for block in range(status.size):
        syndrome[:] = 0
        first = block * together
        for j in range(together):
            word = np.uint64(words[first + j])
            data = word & low
            out[first + j] = data
            for p in range(pieces):
                row = tables[j, p, (data >> np.uint64(p * piece)) & mask]
                for k in range(limbs):
                    syndrome[k] ^= row[k]
            place = j * per_word
            if place < checks:
                stored = word >> np.uint64(width)
                k, shift = place >> 6, place & 63
                syndrome[k] ^= stored << np.uint64(shift)
                if shift + per_word > 64 and k + 1 < limbs:
                    syndrome[k + 1] ^= stored >> np.uint64(64 - shift)
        dirty = False
        for k in range(limbs):
            dirty |= syndrome[k] != 0
        if dirty:
            part = out[first : first + together]
            status[block] = _mend(syndrome, shape, count, positions, exp, log, found, part)


@kernel()
def _mend(syndrome, shape, count, positions, exp, log, found, data):  # type: ignore[no-untyped-def]
    """Correct the inner words of a block in place, if that can be done: CORRECTED or LOST."""
    width, _, _, t, parity, checks, _ = shape
    inside = checks - parity
    if count.size > 1:
        key = syndrome[0] & np.uint64((1 << inside) - 1)
        errors = np.int64(count[key])
        for i in range(errors):
            found[i] = positions[key, i]
    else:
        errors = _locate(syndrome, inside, inside + width * shape[1], t, exp, log, found)
    if errors < 0:
        return LOST
    if parity:
        odd = 0
        for k in range(syndrome.size):
            limb = syndrome[k]
            while limb:
                limb &= limb - np.uint64(1)
                odd ^= 1
        if errors & 1 != odd and errors + 1 > t:
            return LOST
    for i in range(errors):
        bit = found[i] - inside
        if bit >= 0:
            data[bit // width] ^= data.dtype.type(1) << data.dtype.type(bit % width)
    return CORRECTED


@kernel()
def _locate(syndrome, inside, total, t, exp, log, found):  # type: ignore[no-untyped-def]
    """Positions of at most t errors, by Berlekamp and Massey and Chien's search; −1 if there are more."""
    order = exp.size // 2
    s = np.zeros(2 * t + 1, np.int64)
    for k in range(syndrome.size):
        limb = syndrome[k]
        place = 64 * k
        while limb and place < inside:
            if limb & np.uint64(1):
                for j in range(1, 2 * t, 2):
                    s[j] ^= exp[place * j % order]
            limb >>= np.uint64(1)
            place += 1
    for j in range(1, t + 1):
        if s[j]:
            s[2 * j] = exp[2 * log[s[j]] % order]
    sigma, before, kept = np.zeros(2 * t + 2, np.int64), np.zeros(2 * t + 2, np.int64), np.zeros(2 * t + 2, np.int64)
    sigma[0] = before[0] = 1
    length, shift, divisor = 0, 1, 1
    for step in range(0, 2 * t, 2):
        discrepancy = s[step + 1]
        for i in range(1, length + 1):
            if sigma[i] and s[step + 1 - i]:
                discrepancy ^= exp[log[sigma[i]] + log[s[step + 1 - i]]]
        if discrepancy:
            ratio = (log[discrepancy] + order - log[divisor]) % order
            longer = 2 * length <= step
            if longer:
                kept[:] = sigma
            for i in range(2 * t + 2 - shift):
                if before[i]:
                    sigma[i + shift] ^= exp[log[before[i]] + ratio]
            if longer:
                length = step + 1 - length
                before[:] = kept
                divisor = discrepancy
                shift = 0
        shift += 2
        if length > t:
            return -1
    if length == 0:
        return 0
    turn = np.zeros(t + 1, np.int64)
    for i in range(1, length + 1):
        turn[i] = log[sigma[i]] if sigma[i] else -1
    errors = 0
    for place in range(total):  # an error at α^place is a root of sigma at α^−place
        value = 1
        for i in range(1, length + 1):
            if turn[i] >= 0:
                value ^= exp[turn[i]]
                turn[i] -= i
                if turn[i] < 0:
                    turn[i] += order
        if value == 0:
            if errors == length:
                return -1
            found[errors] = place
            errors += 1
            if errors == length:
                return errors
    return -1
