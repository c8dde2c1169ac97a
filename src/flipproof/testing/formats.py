"""What every format has to do, as a pytest class to inherit."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flipproof
from flipproof.errors import FormatError
from flipproof.formats.base import Format, Stored, bit_pattern, blocks, dense, sparse, word_dtype
from flipproof.spaces.parameters import FaultSpace

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (3, 4), (2, 3, 5), (0,), (3, 0), (0, 3))


class FormatContract:
    """Inherit, set `format`, and pytest runs the contract on it.

    Attributes:
        format: the format under test.
        stores_nan: False if it has no word for NaN and must refuse it.
        stores_infinity: False if it has no word for ±inf and must refuse them.
        healing_keeps_values: False if a redundant bit is read as part of the value, so that mending it moves the value.
        words_round_trip: False if decoding and encoding again may give another word for the same value, as where a
            wrapper repairs bits on the way out.
        short_blocks: True if a tensor smaller than a block is a shorter block, and not refused.

    Example:
        In a test file, for a format of one's own::

            from flipproof.testing import FormatContract


            class TestMyFormat(FormatContract):
                format = MyFormat(bits=6)
                stores_nan = False
    """

    format: ClassVar[Format]
    stores_nan: ClassVar[bool] = True
    stores_infinity: ClassVar[bool] = True
    healing_keeps_values: ClassVar[bool] = True
    words_round_trip: ClassVar[bool] = True
    short_blocks: ClassVar[bool] = False

    def values(self, shape: tuple[int, ...] = (4, 6), dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Finite weights as networks have them, with both zeros among them where there is room."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
        if x.numel() >= 2:
            x.view(-1)[:2] = torch.tensor([0.0, -0.0])
        return x.to(dtype)

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """A shape like this that has room for a block."""
        return rows, max(columns, self.format.together)

    def random_words(self, like: Stored, seed: int = 1) -> Tensor:
        """Any word that memory can hold at every place: what the wildest corruption leaves behind."""
        generator = torch.Generator().manual_seed(seed)
        halves = [torch.randint(0, 2**32, like.words.shape, generator=generator) for _ in range(2)]
        count = like.words.numel()
        widths = self.format.layout(count).width(np.arange(count)).tolist()  # words of a block differ in width
        stored = torch.tensor([-1 if width == 64 else (1 << width) - 1 for width in widths], dtype=torch.int64)
        words = ((halves[0] << 32) | halves[1]) & stored.reshape(like.words.shape)
        return words.to(word_dtype(self.format.width))

    def test_repr_rebuilds_the_format(self) -> None:
        assert eval(repr(self.format), namespace(self.format)) == self.format

    def test_frozen_and_hashable(self) -> None:
        assert len({self.format, eval(repr(self.format), namespace(self.format))}) == 1
        with pytest.raises(FrozenInstanceError):
            self.format.anything = 1  # type: ignore[attr-defined]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_words_and_values_keep_shape_and_dtype(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x = self.values(shape, dtype)
        if 0 < x.numel() < self.format.together and not self.short_blocks:
            with pytest.raises(FormatError, match="smaller than a block"):
                self.format.encode(x)
            return
        stored = self.format.encode(x)
        assert stored.words.shape == torch.Size(shape)
        assert stored.words.dtype == word_dtype(self.format.width)
        decoded = stored.decode()
        assert (decoded.shape, decoded.dtype) == (torch.Size(shape), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bits_above_the_width_are_zero(self, dtype: torch.dtype) -> None:
        x = torch.cat(
            [self.values(self.shape(4, 6), dtype).view(-1), torch.tensor([1e4, -1e4, 1e-7, -1e-7], dtype=dtype)]
        )
        assert all(word >> self.format.width == 0 for word in unsigned(self.format.encode(x).words))

    def test_finite_values_stay_finite(self) -> None:
        assert bool(torch.isfinite(self.format.encode(self.values(self.shape(4, 6))).decode()).all())

    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-3])
    def test_constant_tensors_stay_constant(self, value: float) -> None:
        x = torch.full(self.shape(3, 4), value)
        decoded = self.format.encode(x).decode()
        assert len(set(unsigned(bit_pattern(decoded)))) == 1

    def test_encoding_and_decoding_leave_their_inputs_alone(self) -> None:
        x = self.values(self.shape(4, 6)).requires_grad_()
        before = x.detach().clone()
        stored = self.format.encode(x)
        words = stored.words.clone()
        decoded = stored.decode()
        decoded.add_(1)  # a decoded tensor that shared memory with the input or the words would change them
        assert same_bits(x.detach(), before)
        assert torch.equal(stored.words, words)
        assert not decoded.requires_grad

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_memory_layout_does_not_matter(self, dtype: torch.dtype) -> None:
        x = self.values(self.shape(4, 6), dtype)
        expected = self.format.encode(x)
        spread = torch.zeros(8, 3 * x.shape[1], dtype=dtype)[::2, ::3]
        spread.copy_(x)
        for other in (x.t().contiguous().t(), spread):
            assert not other.is_contiguous()
            stored = self.format.encode(other)
            assert torch.equal(stored.words, expected.words)
            assert same_bits(stored.decode(), expected.decode())

    def test_integers_are_refused(self) -> None:
        with pytest.raises(FormatError, match="int64"):
            self.format.encode(torch.arange(3))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_special_values_are_stored_or_refused(self, bad: float) -> None:
        count = max(5, self.format.together)
        x = self.values((count,))
        x[3] = bad
        is_nan = bad != bad
        if self.stores_nan if is_nan else self.stores_infinity:
            decoded = self.format.encode(x).decode()
            others = torch.arange(count) != 3
            assert same_bits(decoded[others], self.format.encode(self.values((count,))).decode()[others])
            assert not is_nan or bool(torch.isnan(decoded[3]))
        else:
            with pytest.raises(FormatError, match="NaN" if is_nan else "inf"):
                self.format.encode(x)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_decoding_a_few_corrupted_words_equals_decoding_all(self, dtype: torch.dtype) -> None:
        clean = self.format.encode(self.values((6, 50), dtype))
        for seed in range(5):
            words = self.random_words(clean, seed)
            dense = Stored(clean.format, words, clean.coding, clean.dtype).decode().reshape(-1)
            index = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:70]
            index = blocks(index, self.format.together, 300)
            few = clean.decode_at(index, words.reshape(-1)[index])
            assert few.dtype == dtype
            assert same_bits(few, dense[index])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_encoding_a_few_values_equals_encoding_all(self, dtype: torch.dtype) -> None:
        x = self.values((6, 50), dtype)
        stored = self.format.encode(x)
        index = torch.tensor([0, 1, 49, 50, 149, 299, 298])
        index = blocks(index, self.format.together, 300)
        few = self.format.encode_values(x.reshape(-1)[index], sparse(stored.coding, x.shape, index))
        assert torch.equal(few, stored.words.reshape(-1)[index])

    def test_decoded_values_are_stored_without_further_loss(self) -> None:
        stored = self.format.encode(self.values((6, 50)).to(torch.float64))
        index = torch.arange(300)
        coding = sparse(stored.coding, stored.words.shape, index)
        decoded = stored.decode().reshape(-1)
        words = self.format.encode_values(decoded, coding)
        assert same_bits(self.format.decode_words(words, coding, torch.float64), decoded)
        if self.words_round_trip:
            assert torch.equal(words, stored.words.reshape(-1))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self, dtype: torch.dtype) -> None:
        rows = max(2, self.format.together)  # the bias is one block, or two values
        model = nn.Linear(3, rows)
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(self.values(tuple(parameter.shape), seed=seed))
        model = model.to(dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        space = FaultSpace(model, format={"*": self.format})
        assert space.bits == self.format.stored_bits((rows, 3)) + self.format.stored_bits((rows,))
        with space.stored():
            golden = {name: p.detach().clone() for name, p in model.named_parameters()}
            for site in space.sites:
                stored = self.format.encode(before[site.name])
                assert same_bits(golden[site.name], stored.decode())
                widths = site.layout.width(np.arange(site.words)).tolist()
                assert site.words == site.values + self.format.constant_words(site.shape)
                assert sum(widths) == site.bits
                for value, width in enumerate(widths):
                    for bit in range(width):
                        expected = dict(golden)
                        expected[site.name] = flipped(stored, value, bit).decode()
                        with space.corrupted(space.faults([(site.name, value, bit)])) as changed:
                            assert changed == 1
                            assert all(same_bits(p.detach(), expected[n]) for n, p in model.named_parameters())
                        assert all(same_bits(p.detach(), golden[n]) for n, p in model.named_parameters())
        assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())

    def test_healed_words_read_as_before_and_are_clean(self) -> None:
        clean = self.format.encode(self.values((6, 50)))
        one = torch.ones_like(clean.words)
        for words in (clean.words, clean.words ^ one, *(self.random_words(clean, seed) for seed in range(3))):
            stored = Stored(self.format, words, clean.coding, clean.dtype)
            shaped = dense(clean.coding, words.shape)
            healed, lost = self.format.heal(words, shaped)
            assert (healed.dtype, healed.shape) == (words.dtype, words.shape)
            if self.healing_keeps_values:
                assert same_bits(Stored(self.format, healed, clean.coding, clean.dtype).decode(), stored.decode())
            again, still = self.format.heal(healed, shaped)
            assert torch.equal(again, healed)
            assert torch.equal(still, lost)
            assert torch.equal(healed[lost], words[lost])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cuda_agrees_with_the_cpu(self, dtype: torch.dtype) -> None:
        x = self.values((6, 50), dtype)
        here, there = self.format.encode(x), self.format.encode(x.cuda())
        assert there.words.is_cuda
        assert torch.equal(there.words.cpu(), here.words)
        words = self.random_words(here)
        corrupted = Stored(self.format, words.cuda(), there.coding, dtype).decode()
        assert corrupted.is_cuda
        assert same_bits(corrupted.cpu(), Stored(self.format, words, here.coding, dtype).decode())


def namespace(thing: object) -> dict[str, Any]:
    """Names with which a repr is evaluated: flipproof's, the class of `thing` and of what it wraps."""
    names: dict[str, Any] = {
        **{name: getattr(flipproof, name) for name in flipproof.__all__},
        type(thing).__name__: type(thing),
    }
    for field in fields(thing):  # type: ignore[arg-type]
        inner = getattr(thing, field.name)
        if isinstance(inner, Format):
            names |= namespace(inner)
    return names


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit by bit: −0.0 is not 0.0; NaN equals NaN of any payload, which no cast is bound to keep."""
    nan = torch.isnan(a)
    return (
        a.dtype == b.dtype
        and torch.equal(nan, torch.isnan(b))
        and torch.equal(bit_pattern(a)[~nan], bit_pattern(b)[~nan])
    )


def unsigned(words: Tensor) -> list[int]:
    """Words as Python integers, whatever the sign of their container."""
    return [word & ((1 << words.element_size() * 8) - 1) for word in words.reshape(-1).tolist()]


def flipped(stored: Stored, value: int, bit: int) -> Stored:
    """A whole tensor decoded again with one bit flipped: the slow way that sparse injection has to agree with.

    Behind the words of the values come those of stored constants: then every value is read with what they say now.
    """
    format, words, coding = stored.format, stored.words.clone(), stored.coding
    own = words.numel()
    hit = words if value < own else format.write_constants(coding)
    place = value if value < own else value - own
    container = hit.element_size() * 8
    word = unsigned(hit)[place] ^ (1 << bit)
    if hit.dtype != torch.uint8 and word >> (container - 1):
        word -= 1 << container
    hit.view(-1)[place] = word
    if value >= own:
        coding = format.read_constants(hit, coding[format.stored_constants :])
    return Stored(format, words, coding, stored.dtype)
