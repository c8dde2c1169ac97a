"""Formats with check bits over a block of words: where the bits of a code of `_block_codes` are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._block_codes import LOST, BlockCode
from flipproof.formats._compiled import by_table, in_reach, table_of, unsigned_array
from flipproof.formats.base import Coding, Format, unsigned, word_dtype
from flipproof.formats.layout import Layout
from flipproof.formats.protected import Protected


@dataclass(frozen=True)
class Blocks(Protected):
    """A format around a format whose check bits are shared by a block of words.

    Words left over at the end of a tensor belong to its last block, which is longer. The check bits lie above the inner
    words, `checks` in each of the first ones, and none in those behind: no bit is stored that is not read.

    A subclass has a field `block`, and gives `code` and `check_bits`.
    """

    def __post_init__(self) -> None:
        name, given = type(self).__name__, self.data_bits
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise FormatError(f"{name}: block is a number of data bits or None, got {given!r}")
        if given is not None and isinstance(self.inner, Format) and given < self.inner.width:
            raise FormatError(
                f"{name}: a block of {given} bits holds no word of {self.inner!r} ({self.inner.width} bits)"
            )
        super().__post_init__()

    @property
    def data_bits(self) -> int | None:
        """The field `block`: data bits that share a code word; None codes each word by itself."""
        raise NotImplementedError

    def check_bits(self, words: int) -> int:
        """Check bits of a block of so many words."""
        raise NotImplementedError

    def corrected(self, words: int) -> int:
        """How many faults in a block of so many words are corrected."""
        raise NotImplementedError

    def code(self, words: int) -> BlockCode:
        """The code of such a block."""
        raise NotImplementedError

    @property
    def together(self) -> int:
        return 1 if self.data_bits is None else self.data_bits // self.inner.width

    @cached_property
    def checks(self) -> int:
        # the last block of a tensor may be almost twice as long, and its code may have more check bits
        lengths = range(self.together, 2 * self.together)
        return max(-(-self.check_bits(words) // words) for words in lengths)

    def layout(self, values: int) -> Layout:
        """The words with exactly the check bits that there are: none is rounded up to a bit a word."""
        if self.together == 1:
            return super().layout(values)
        whole, over = divmod(values, self.together)
        if over:  # the last block takes them; a tensor smaller than a block, which is refused later, is one by itself
            whole = max(whole - 1, 0)
        return Layout(self._widths(self.together), whole, self._widths(values - whole * self.together))

    def _widths(self, words: int) -> tuple[int, ...]:
        """Stored bits of each word of a block of so many."""
        if not words:
            return ()
        alone, each = self.inner.width, self.checks
        full, over = divmod(self.check_bits(words), each)  # the first words carry the check bits, as many as fit
        return ((alone + each,) * full + (alone + over,) + (alone,) * words)[:words]

    def protect_words(self, data: Tensor) -> Tensor:
        flat = data.reshape(-1)
        if in_reach(data):
            return unsigned(self._wide(data), self.width).to(data.dtype)
        wide = unsigned(flat, self.inner.width)
        rows = [code.protect_torch(wide[part].reshape(-1, code.words)) for part, code in self._parts(flat.numel())]
        return torch.cat([row.reshape(-1) for row in rows] or [flat]).to(data.dtype).reshape(data.shape)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        data, lost = self._repair(words)
        return unsigned(data, self.inner.width).to(words.dtype), lost

    def _repair(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Whole words to (inner words in the integer type that they take, which of them are beyond repair)."""
        flat = words.reshape(-1)
        if in_reach(words):
            out = torch.empty(flat.shape, dtype=word_dtype(self.inner.width))
            lost = torch.zeros(flat.shape, dtype=torch.bool)
            stored, inner = unsigned_array(flat), unsigned_array(out)
            for part, code in self._parts(flat.numel()):
                beyond = torch.from_numpy(code.repair(stored[part], inner[part]) == LOST)
                if bool(beyond.any()):
                    lost[part].view(-1, code.words)[beyond] = True
            return out.reshape(words.shape), lost.reshape(words.shape)
        wide = unsigned(flat, self.width)
        repaired, beyond_repair = [flat], [torch.zeros_like(flat, dtype=torch.bool)]
        if flat.numel():
            repaired, beyond_repair = [], []
            for part, code in self._parts(flat.numel()):
                rows, bad = code.mend_torch(wide[part].reshape(-1, code.words))
                repaired.append(rows.reshape(-1))
                beyond_repair.append(bad[:, None].expand(-1, code.words).reshape(-1))
        data = torch.cat(repaired).to(word_dtype(self.inner.width))
        return data.reshape(words.shape), torch.cat(beyond_repair).reshape(words.shape)

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        """The code word that was read, check bits included. It is what was written: the inner format has no say."""
        data, lost = self._repair(words)
        if in_reach(data):
            healed = self._wide(data)
        else:
            healed = self.protect_words(unsigned(data, self.inner.width)).to(words.dtype)
        return torch.where(lost, words, healed), lost

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        data = self.inner.encode_values(x, coding)
        if in_reach(data):
            return self._wide(data)
        return super().encode_values(x, coding)

    def _wide(self, data: Tensor) -> Tensor:
        """Inner words to whole ones, on the CPU, without a detour over int64."""
        flat = data.reshape(-1)
        out = torch.empty(flat.shape, dtype=word_dtype(self.width))
        words, whole = unsigned_array(flat), unsigned_array(out)
        for part, code in self._parts(flat.numel()):
            code.protect(words[part], whole[part])
        return out.reshape(data.shape)

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.together == 1 and dtype == torch.float32 and in_reach(words) and words.is_contiguous():
            found = self._read_at_once(words, coding)
            if found is not None:
                return found
        data, lost = self._repair(words)
        values, inside = by_table(self.inner, data, coding, dtype)
        if not in_reach(words) or bool(lost.any()):
            values = torch.where(lost, torch.zeros_like(values), values)
        return values, lost if inside is None else lost | inside

    def _read_at_once(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor] | None:
        """float32 values of words that stand alone, in one pass; None where it does not know the inner format."""
        code, flat = self.code(1), unsigned_array(words.reshape(-1))
        out = torch.empty(words.shape, dtype=torch.float32)
        shift = self.inner.left_shift(torch.float32)
        table = table_of(self.inner, flat.size, coding, torch.float32) if shift is None else None
        if shift is not None and code.pieces <= 3 and code.limbs == 1:
            status, lost = code.read_shifted(flat, shift, unsigned_array(out.view(torch.int32).view(-1)))
        elif table is not None and code.pieces == 1 and code.limbs == 1:
            status, lost = code.read_looked_up(flat, table, out.view(-1).numpy())
        else:
            return None
        beyond = torch.from_numpy(status == LOST) if lost else torch.zeros(flat.size, dtype=torch.bool)
        return out, beyond.reshape(words.shape)

    def _parts(self, count: int) -> Iterator[tuple[slice, BlockCode]]:
        """The words of the whole blocks and those of a longer last one, with the code of each."""
        over = count % self.together
        if 0 < count < self.together:
            raise FormatError(
                f"a tensor of {count} values is smaller than a block of {self.together} words of "
                f"{self!r}; store it with block=None (format= takes a mapping {{pattern: Format}}) or leave it out"
            )
        whole = count if not over else count - over - self.together
        if whole:
            yield slice(0, whole), self.code(self.together)
        if over:
            yield slice(whole, count), self.code(self.together + over)
