"""The fault space of a KV cache: every bit of the keys and values that a generation keeps between two tokens.

A language model that writes token by token keeps keys and values of all tokens before (Pope et al. 2023, section 2.1).
They stay in memory for as long as the generation lasts, so a fault in one is read again at every later token. What is
hit here is that memory: faults come right behind the step that wrote a word, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flipproof._hooks import hooked
from flipproof._interrupts import whole
from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats import Format
from flipproof.formats.base import Coding, word_dtype
from flipproof.models.key_values import KeyValues, Pairs
from flipproof.spaces.contract import Draw, Faults, Forwards, Sized, Space, Where
from flipproof.spaces.sites import choose_neuron_format
from flipproof.spaces.tensors import FormatChoice, check_format, check_model, matches

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Part = Literal["key", "value"]
PARTS: tuple[Part, ...] = ("key", "value")


@dataclass(frozen=True)
class Cache(Where):
    """Fault space over a KV cache: every bit of the keys and values that a generation keeps between two tokens.

    The model is one that generates, such as `flipproof.models.Greedy(net, length)`. A trial's faults are the same for
    every sample, as faults in memory are: bits of the words that hold one sequence. Each is there from right behind the
    step that wrote its word to the end. What the last step writes is not in the space: nothing reads it any more.
    A `format` stores the words that are in the space.

    Args:
        phase: "prefill", words that are written while the prompt is read; "decode", words that are written at each
            later token; by default both.
        kinds: "key", "value"; by default both.
        include: glob patterns over names such as ``memory.0.key.prefill``. "*" is everything.
        exclude: the same; it wins over `include`.

    Example:
        >>> import flipproof as fp, torch
        >>> from flipproof.models import Greedy, small_gpt
        >>> writer = Greedy(small_gpt(vocabulary=11), length=4)
        >>> data = [(torch.randint(0, 11, (5, 8)), torch.arange(5))]
        >>> setup = dict(faults=fp.BitErrorRate(1e-3), output=lambda logits: logits[:, -1], trials=2)
        >>> found = fp.assess(writer, data, where=fp.Cache("prefill"), **setup)
        >>> found.bits == 3 * 2 * 8 * 96 * 32  # blocks × (key, value) × tokens × width × bits
        True
    """

    phase: Phase | Sequence[Phase] = PHASES
    kinds: Part | Sequence[Part] = PARTS
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("phase", "kinds", "include", "exclude"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        for field, known in (("phase", PHASES), ("kinds", PARTS)):
            given = getattr(self, field)
            if not given or set(given) - set(known):
                raise FaultSpaceError(f"Cache: {field} must be among {list(known)}, got {list(given)}")

    def space(self, model: nn.Module, format: Format | Mapping[str, Format] | None, forwards: Forwards) -> CacheSpace:
        """The space of a model that generates."""
        return CacheSpace(model, self, format, forwards)


@dataclass(frozen=True)
class CacheSite(Sized):
    """The keys, or the values, that one layer writes in one phase, for one sequence.

    Attributes:
        name: of the memory, then layer, part and phase: ``memory.0.key.prefill``.
        layer: qualified name of the memory.
        number: of the layer.
        part: 0 for keys, 1 for values.
        first: token at which the phase begins.
        shape: (heads, tokens, width).
        coding: constants of the format.
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`.
    """

    name: str
    layer: str
    number: int
    part: int
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    coding: Coding
    offset: int
    kind: str = "cache"


@dataclass(frozen=True)
class _Hits:
    """Faults of one site that come at one moment: indices of words and which of their bits flip."""

    head: Tensor
    token: Tensor
    column: Tensor
    mask: Tensor


class CacheSpace(Space):
    """Every bit of a KV cache, for one sequence.

    Args:
        model: one that generates and keeps its keys and values in `KeyValues`.
        where: which of them.
        format: how they are stored: None for their own type, one Format, or {pattern: Format}.
        forwards: one function a batch that runs the model.

    Raises:
        FaultSpaceError: if there is no such memory, it holds something else, or nothing is selected.
        FormatError: naming the memory whose values the format cannot hold.
    """

    def __init__(self, model: nn.Module, where: Cache, format: FormatChoice, forwards: Forwards) -> None:
        check_format(format)
        check_model(model)
        self.model, self.where = model, where
        self._memories = [name for name, module in model.named_modules() if isinstance(module, KeyValues)]
        if not self._memories:
            raise FaultSpaceError(
                f"{where!r} hits the KV cache of a model that generates, and {type(model).__name__} has none that can "
                f"be seen: wrap the language model, flipproof.models.Greedy(model, length), or keep keys and values in "
                f"a flipproof.models.KeyValues"
            )
        self.left_out: dict[str, str] = {}
        self.left_out_bits = 0
        sites: list[CacheSite] = []
        offset = 0
        seen = _Seen()
        with hooked(self._hooked(model), seen.note):
            for forward, _ in forwards:
                seen.begin()
                forward()
                seen.end()
        self._prompts = {name: lengths[0] for name, lengths in seen.lengths.items()}
        for (memory, number, part), found in seen.found.items():
            lengths = seen.lengths[memory]
            phases: dict[Phase, tuple[int, int]] = {"prefill": (0, lengths[0]), "decode": (lengths[0], lengths[-1])}
            for phase, (first, last) in phases.items():
                name = f"{memory}.{number}.{PARTS[part]}.{phase}"
                shape = (found.heads, last - first, found.width)
                if last == first:
                    continue
                chosen = choose_neuron_format(name, found.dtype, format)
                if not self._selects(name, phase, PARTS[part]):
                    self.left_out[name] = "not selected by where="
                    self.left_out_bits += int(np.prod(shape)) * chosen.width
                    continue
                try:
                    coding = chosen.fit(torch.stack([found.low, found.high]))
                except FormatError as error:
                    raise FormatError(f"{name}: {error}") from None
                if any(one.dim() for one in coding):
                    raise FormatError(f"{name}: {chosen!r} has a scale a channel; a cache takes one scale (axis=None)")
                site = CacheSite(name, memory, number, part, first, shape, found.dtype, chosen, coding, offset)
                offset += site.bits
                sites.append(site)
        if not sites:
            raise FaultSpaceError(f"{where!r} selects nothing of the KV cache; left out: {self.left_out or 'nothing'}")
        self.sites: tuple[CacheSite, ...] = tuple(sites)
        self.bits = offset
        self._hits: dict[tuple[str, int], list[tuple[CacheSite, _Hits]]] = {}

    def _selects(self, name: str, phase: Phase, part: Part) -> bool:
        where = self.where
        named = matches([name], where.include) and not matches([name], where.exclude)
        return named and phase in where.phase and part in where.kinds

    def _hooked(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in self._memories}

    def again(self, model: nn.Module) -> CacheSpace:
        """The same space of a copy of the model."""
        space = copy(self)
        space.model, space._hits = model, {}
        return space

    @contextmanager
    def stored(self) -> Iterator[None]:
        """While active, words are what their format can represent from the moment they are written, and are hit."""
        with hooked(self._hooked(self.model), self._keep):
            yield

    @whole
    def corrupted(self, draw: Draw) -> Iterator[int]:
        """While active (and `stored`), every generation has these faults in its cache.

        Yields:
            How many bits of a sequence's cache flip.
        """
        if not isinstance(draw, Faults) or draw.stuck is not None:
            kind = "stuck bits" if isinstance(draw, Faults) else type(draw).__name__
            raise FaultSpaceError(
                f"a KV cache takes Faults that flip, got {kind}: how many bits are stuck at another value differs from "
                f"sample to sample"
            )
        if len(draw) and int(draw.positions[-1]) >= self.bits:
            raise FaultSpaceError(f"bit {draw.positions[-1]} is outside the space of {self.bits:,} bits")
        self._hits = self._placed(draw)
        try:
            yield len(draw)
        finally:
            self._hits = {}

    def _placed(self, draw: Faults) -> dict[tuple[str, int], list[tuple[CacheSite, _Hits]]]:
        """(memory, tokens in it) → what is hit then."""
        found: dict[tuple[str, int], list[tuple[CacheSite, _Hits]]] = {}
        which, value, bit = self.located(draw.positions)
        for i in np.unique(which).tolist():
            site = self.sites[i]
            words, group = np.unique(value[which == i], return_inverse=True)
            mask = np.zeros(words.size, np.int64)
            np.bitwise_or.at(mask, group, np.int64(1) << bit[which == i])
            head, token, column = np.unravel_index(words, site.shape)
            written = self._prompts[site.layer] + (token + 1 if site.first else 0 * token)
            for length in np.unique(written).tolist():
                here = written == length
                arrays: list[NDArray[np.int64]] = [head[here], site.first + token[here], column[here], mask[here]]
                hits = _Hits(*(torch.from_numpy(np.ascontiguousarray(one)) for one in arrays))
                found.setdefault((site.layer, length), []).append((site, hits))
        return found

    def _keep(self, name: str, module: nn.Module, pairs: Pairs) -> None:
        """Keys and values were written: store them in their format, and hit what is to be hit."""
        length = pairs[0][0].shape[2]
        prompt = self._prompts[name]
        for site in self.sites:
            inside = (0, prompt) if not site.first else (length - 1, length)
            now = site.layer == name and (length == prompt) == (not site.first)
            if now and not site.format.is_native(site.dtype):
                written = pairs[site.number][site.part][:, :, inside[0] : inside[1]]
                words = site.format.encode_values(written, site.coding)
                written.copy_(site.format.decode_words(words, site.coding, site.dtype))
        for site, hits in self._hits.get((name, length), ()):
            held = pairs[site.number][site.part]
            place = (slice(None), hits.head.to(held.device), hits.token.to(held.device), hits.column.to(held.device))
            words = site.format.encode_values(held[place], site.coding)
            flipped = words ^ hits.mask.to(held.device).to(word_dtype(site.width))
            held[place] = site.format.decode_words(flipped, site.coding, site.dtype)


@dataclass
class _Kept:
    """What is known of the keys or values of one layer."""

    heads: int
    width: int
    dtype: torch.dtype
    low: Tensor
    high: Tensor


class _Seen:
    """A first look at what memories hold behind each token.

    Attributes:
        found: by memory, layer, and 0 for keys or 1 for values.
        lengths: tokens in each memory behind each token, the same for every batch.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, int, int], _Kept] = {}
        self.lengths: dict[str, list[int]] = {}
        self._now: dict[str, list[int]] = {}

    def begin(self) -> None:
        """A batch begins."""
        self._now = {}

    def end(self) -> None:
        """It ended."""
        for name, lengths in self._now.items():
            if lengths != list(range(lengths[0], lengths[0] + len(lengths))):
                raise FaultSpaceError(
                    f"{name} holds {lengths} tokens behind one token after the other, where each should add one: a "
                    f"cache of fixed size, or of a sliding window, moves its words. Use one that grows"
                )
            before = self.lengths.setdefault(name, lengths)
            if before != lengths:
                raise FaultSpaceError(
                    f"{name} holds {lengths[0]} to {lengths[-1]} tokens in one batch and {before[0]} to {before[-1]} "
                    f"in another: prompts have to be of one length, since a fault lies in the same word of every one"
                )

    def note(self, name: str, module: nn.Module, pairs: Any) -> None:
        """Keys and values of all layers, behind a token."""
        shapes = [tuple(one.shape) for pair in pairs for one in pair]
        if not shapes or any(len(shape) != 4 for shape in shapes) or len({shape[2] for shape in shapes}) != 1:
            raise FaultSpaceError(
                f"{name} takes keys and values of each layer, (samples, heads, tokens, width) each and as many tokens "
                f"in all, got {shapes}"
            )
        self._now.setdefault(name, []).append(shapes[0][2])
        for number, pair in enumerate(pairs):
            for part, one in enumerate(pair):
                low, high = one.min(), one.max()
                before = self.found.get((name, number, part))
                if before is not None:
                    low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
                self.found[name, number, part] = _Kept(one.shape[1], one.shape[3], one.dtype, low, high)
