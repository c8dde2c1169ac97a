"""What each tensor is stored in, so that a model survives a bit error rate within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil, inf, isfinite, prod
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof._fields import Fields, wrong
from flipproof.engine.journal import Key
from flipproof.errors import ConfigError, FormatError
from flipproof.formats import Affine, Float16, Float32, Format, Integer, Rounded
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.running.data import answered, call
from flipproof.running.device import device_of, release_memory
from flipproof.running.evaluation import eval_mode, one_thread, unlike
from flipproof.running.judge import WORST
from flipproof.running.resume import Suffixes
from flipproof.running.snapshots import Snapshot
from flipproof.running.straight import refers_to_tensors
from flipproof.running.values import same
from flipproof.spaces.tensors import Candidate, own_format
from flipproof.storage.codes import LINE, cheapest, lost_share, strongest, untouched
from flipproof.storage.mixed import least_cost

INNERS: tuple[Format, ...] = (
    *(Affine(bits=bits, axis=0) for bits in (3, 4, 5, 6, 8)),
    Rounded(Float16(), bits=11),
    Rounded(Float32(), bits=16),
)
"""What the values of a weight may be stored in, before its code."""

REST: tuple[tuple[Format, float], ...] = (
    (Rounded(Float32(), bits=20), 0.0),
    (Rounded(Float32(), bits=16), 1e-5),
    (Rounded(Float16(), bits=12), 1e-4),
)
"""The same for biases, norms and whatever else has fewer than two dimensions, with nominal costs: the more precise one
is taken unless faults say otherwise. What it comes to is seen when the whole model is verified."""

SHARES = (1e-2, 1e-3, 1e-4, 1e-6, 1e-9)
"""Shares of code words that may be beyond repair: the strengths that are tried of each code."""

_UNSURE = 0.1
"""Nats for a tensor in which a code word is sure to be lost: what is never lost makes the accuracy certain."""

_LONGEST = 2048
"""Stored bits of the longest code words of biases and norms."""

_LOST = 0.02
"""Share of a tensor's blocks that reads as 0 where it is measured what a lost block costs."""

_BLOCK = 64
_DRAWS = 2

_KEPT_BYTES = 2**29
"""Of values at cuts."""


@dataclass(frozen=True)
class Drift:
    """What storing one tensor in one way costs: one line of the journal.

    Attributes:
        tensor: number of the tensor.
        option: number of the format of its values; −1 for blocks that are lost.
        drift: nats, see `drift`; a lost share of 1 costs so much. None where the format cannot hold the values.
    """

    tensor: int
    option: int
    drift: float | None

    @property
    def key(self) -> tuple[int, int]:
        """Which job it was."""
        return self.tensor, self.option

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Drift:
        """The inverse of `to_json`."""
        about = Fields(record, "the record")
        value = None if about.take("drift") is None else about.number("drift")
        found = cls(about.whole("tensor"), about.whole("option", -1), value)
        about.end()
        if value is not None and not 0 <= value < inf:
            raise wrong(about.at("drift"), "a number from 0", value)
        return found


class Measuring:
    """Measures `Drift`: one tensor at a time is changed, the others stay whole.

    What lies before the first use of a tensor is computed once, where that is proved to give the same bits: without
    faults at every cut, and with lost blocks in the first, the middle and the last tensor.

    Args:
        model: a copy that may be changed.
        names: of the tensors.
        inners: what their values may be stored in.
        data: to judge on, with the fault-free answers.
        seed: of the blocks that are lost.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], inners: Sequence[Format], data: Calibration, seed: int
    ) -> None:
        self.model, self.names, self.inners, self.data, self.seed = model, names, inners, data, seed
        self._state = Snapshot(model)
        self._suffixes = self._cuts()
        self._expected: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """With what the model answers here."""
        return {**self.__dict__, "_expected": self.data.answers_of(self.model)}

    def _cuts(self) -> Suffixes | None:
        """Values at cuts of the model, if it is one that can be cut and whose forward writes nothing."""
        batches, output = self.data.batches, self.data.output
        if not self.names or (callable(output) and refers_to_tensors(output)):
            return None
        with eval_mode(self.model), one_thread(device_of(self.model)):
            call(self.model, batches.inputs[0])
            if self._state.changed():
                self._state.restore()
                return None
            suffixes = Suffixes.trace(self.model, batches.inputs)
            if suffixes is None:
                return None
            suffixes.prepare(self.model, batches.inputs, batches.sizes, output, _KEPT_BYTES)
            return (
                suffixes
                if all(self._faithful(suffixes, i) for i in {0, len(self.names) // 2, len(self.names) - 1})
                else None
            )

    def _faithful(self, suffixes: Suffixes, tensor: int) -> bool:
        """Whether the model answers the same from the last cut before a tensor and as a whole, with blocks lost."""
        name = self.names[tensor]
        parameter = self.model.get_parameter(name)
        try:
            with torch.no_grad():
                parameter.copy_(self._with_losses(parameter.detach().clone(), tensor)[0][0])
            return same(self._outputs(name, suffixes), self.data.outputs(self.model))
        finally:
            self._state.restore()

    def __call__(self, tensor: int, option: int) -> Drift:
        """Measure one."""
        name = self.names[tensor]
        parameter = self.model.get_parameter(name)
        original = parameter.detach().clone()
        with eval_mode(self.model), one_thread(parameter.device), torch.no_grad():
            if option >= 0:
                rounded = held_by(self.inners[option], original)
                return Drift(tensor, option, None if rounded is None else self._judge(name, [rounded]))
            changed, share = self._with_losses(original, tensor)
            return Drift(tensor, option, self._judge(name, changed) / share)

    def _with_losses(self, original: Tensor, tensor: int) -> tuple[list[Tensor], float]:
        """The tensor with a few of its blocks lost, several times; and which share of its values that is."""
        size = max(1, min(_BLOCK, original.numel() // 50))
        blocks = -(-original.numel() // size)
        lost = max(1, round(_LOST * blocks))
        found = []
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + tensor) % 2**63)
        for _ in range(_DRAWS):
            values = original.clone().reshape(-1)
            for block in torch.randperm(blocks, generator=generator)[:lost].tolist():
                values[block * size : (block + 1) * size] = 0
            found.append(values.reshape(original.shape))
        return found, lost / blocks

    def _judge(self, name: str, changed: Sequence[Tensor]) -> float:
        judge, targets, found = self.data.judge, self.data.batches.targets, 0.0
        for values in changed:
            try:
                self.model.get_parameter(name).copy_(values)
                found += judge.drift(self._outputs(name, self._suffixes), self.data.teacher, targets)
            finally:
                self._state.restore()
        return found / len(changed)

    def _outputs(self, name: str, suffixes: Suffixes | None) -> Tensor:
        """What the model answers, computed from the last cut before the tensor if there is one."""
        cut = 0 if suffixes is None else suffixes.cut_of([name])
        if suffixes is None or cut == 0:
            return self.data.outputs(self.model)
        answers = [suffixes.resume(cut, batch) for batch in range(len(self.data.batches.inputs))]
        return torch.cat([answered(answer, self.data.output) for answer in answers])

    @property
    def serial_only(self) -> str:
        """Why it cannot be given to worker processes."""
        device = device_of(self.model)
        return "" if device.type == "cpu" else f"one process already fills {device}"

    def describe(self, key: Key) -> str:
        """A job in words."""
        tensor, option = map(int, key)
        return f"{self.names[tensor]}: {'lost blocks' if option < 0 else repr(self.inners[option])}"

    def wake(self) -> None:
        """Nothing to prepare in a worker."""

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        assert self._expected is not None  # it came from elsewhere
        return unlike(self.model, self.data.batches, self.data.output, self._expected, self._state)

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        release_memory()


def keys_of(weights: int, inners: int) -> list[Key]:
    """All that has to be measured: each weight in each format, and with lost blocks."""
    return [(i, k) for i in range(weights) for k in (-1, *range(inners))]


@dataclass(frozen=True)
class Plan:
    """What each tensor is stored in.

    Attributes:
        ber: the bit error rate that it is made for.
        formats: {qualified name: format}.
        table: one row a tensor: `name`, `kind`, `values`, `format`, `data` (bits of a value), `bits` (stored in all,
            constants included), `lost` (expected share of its values), `drift` (expected, nats).
        bits: stored bits in all, constants included, and those of tensors that stay as they are.
        drift: expected in all, nats.
    """

    ber: float
    formats: dict[str, Format]
    table: pd.DataFrame
    apart: int = 0

    @property
    def bits(self) -> int:
        return int(self.table["bits"].sum()) + self.apart

    @property
    def drift(self) -> float:
        return float(self.table["drift"].sum())


@dataclass(frozen=True)
class Planner:
    """Plans within a memory budget.

    The cost of storing a weight is what its rounding costs, what the expected share of lost blocks costs, and a little
    for the chance that any is lost at all; costs of tensors are added, which holds as long as they are small. The
    choice of least total cost within the budget is a multiple-choice knapsack, see `least_cost`.

    Attributes:
        weights: tensors that have several options.
        rest: tensors that are stored in one of `REST`.
        words: what a library reads by itself: quantised words, scales, zero points. They keep their bits, under a code.
        found: measurements, by (number of the weight, option).
        inners: what weights may be stored in.
        line: stored bits of the longest code word.
        apart: bits of parameters that stay as they are, since they cannot be packed.
    """

    weights: Sequence[Candidate]
    rest: Sequence[Candidate]
    found: dict[Key, Drift]
    inners: Sequence[Format]
    line: int = LINE
    apart: int = 0
    words: Sequence[Candidate] = ()
    _plans: dict[tuple[float, float], Plan | None] = field(default_factory=dict, init=False, compare=False, repr=False)
    _known: dict[float, list[list[dict[str, Any]]]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _reckoned: dict[Any, tuple[list[tuple[Format, float]], bool]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @cached_property
    def now(self) -> int:
        """Stored bits of the parameters in their own types."""
        return sum(candidate.bits for candidate in self.all) + self.apart

    @property
    def all(self) -> tuple[Candidate, ...]:
        """The tensors that are planned for."""
        return (*self.weights, *self.words, *self.rest)

    def plan(self, ber: float, bits: float) -> Plan | None:
        """The plan of least expected drift for a rate within so many bits; None if nothing fits. Made once."""
        if (ber, bits) not in self._plans:
            self._plans[ber, bits] = self._planned(ber, bits)
        return self._plans[ber, bits]

    def _planned(self, ber: float, bits: float) -> Plan | None:
        options = self._options(ber)
        if not all(options):
            return None
        table = pd.DataFrame([row for rows in options for row in rows])
        costs = table.rename(columns={"name": "layer", "drift": "cost"})[["layer", "bits", "cost"]]
        try:
            chosen = table[least_cost(costs, int(bits + 1e-6) - self.apart)].reset_index(drop=True)
        except ConfigError:
            return None
        formats = dict(zip(chosen["name"].tolist(), chosen["stored"].tolist(), strict=True))
        return Plan(ber, formats, chosen.drop(columns=["stored", "enough"]), self.apart)

    def least(self, ber: float, *, enough: bool = True) -> float:
        """The fewest bits in which all codes are strong enough for this rate, or as strong as there are; else ∞."""
        options = self._options(ber)
        each = (min((row["bits"] for row in rows if row["enough"] or not enough), default=inf) for rows in options)
        return sum(each) + self.apart

    def _options(self, ber: float) -> list[list[dict[str, Any]]]:
        """How each tensor may be stored; reckoned once a rate, since memory has no say in it."""
        if ber not in self._known:
            self._known[ber] = self._every(ber)
        return self._known[ber]

    def _every(self, ber: float) -> list[list[dict[str, Any]]]:
        weights = [
            self._coded(candidate, ber, self._rounded(i), self.found[i, -1].drift or 0.0)
            for i, candidate in enumerate(self.weights)
        ]
        words = [self._coded(candidate, ber, _that_keep(candidate), WORST) for candidate in self.words]
        rest = replace(self, line=max(self.line, _LONGEST))  # so few values that longer code words cost no time
        return weights + words + [rest._coded(one, ber, _that_hold(one), WORST) for one in self.rest]

    def _rounded(self, number: int) -> list[tuple[Format, float]]:
        """What a weight may be stored in, and what rounding costs."""
        measured = [(inner, self.found[number, k].drift) for k, inner in enumerate(self.inners)]
        return [(inner, cost) for inner, cost in measured if cost is not None]

    def _coded(
        self, candidate: Candidate, ber: float, inners: Sequence[tuple[Format, float]], each_lost: float
    ) -> list[dict[str, Any]]:
        """Each of these under a code of each strength; at least under the strongest one that there is."""
        count, rows = candidate.tensor.numel(), {}
        for inner, rounding in inners:
            codes, enough = self._codes(inner, ber, count)
            for code, lost in codes:
                unsure = 1 - untouched(code, tuple(candidate.tensor.shape), ber)
                cost = rounding + min(lost * each_lost, WORST) + _UNSURE * unsure
                rows[repr(code)] = _row(candidate, code, inner, lost, cost) | {"enough": enough}
        return list(rows.values())

    def _codes(self, inner: Format, ber: float, words: int) -> tuple[list[tuple[Format, float]], bool]:
        """Codes for a tensor of so many words with their lost shares, and whether they are enough; reckoned once."""
        key = (repr(inner), ber, words, self.line)
        if key not in self._reckoned:
            codes = [cheapest(inner, ber, share, words=words, line=self.line) for share in SHARES]
            enough = any(codes)
            if not enough:
                codes = [strongest(inner, 64, words=words, line=max(self.line, 64))]
            found = {repr(code): (code, lost_share(code, words, ber)) for code in codes if code is not None}
            self._reckoned[key] = list(found.values()), enough
        return self._reckoned[key]


def _that_hold(candidate: Candidate) -> list[tuple[Format, float]]:
    """Those of `REST` that can hold the values, with their costs."""
    return [(inner, cost) for inner, cost in REST if held_by(inner, candidate.tensor) is not None]


def _that_keep(candidate: Candidate) -> list[tuple[Format, float]]:
    found = kept_by(candidate.tensor)
    return [] if found is None else [(found, 0.0)]


def kept_by(tensor: Tensor) -> Format | None:
    """The format that gives back every bit of a tensor and leaves room for a code; None if there is none.

    Its own, or where that is 64 bits wide a narrower one that happens to hold all values.

    >>> kept_by(torch.tensor([3], dtype=torch.int64)), kept_by(torch.tensor([0.1], dtype=torch.float64))
    (Integer(bits=8, signed=True), None)
    """
    own = own_format(tensor.dtype)
    if own.width < 64:
        return own
    signed = tensor.dtype.is_signed
    narrower = [Float32()] if tensor.is_floating_point() else [Integer(bits, signed) for bits in (8, 16, 32)]
    for format in narrower:
        try:
            if same(format.encode(tensor.detach()).decode(), tensor.detach()):
                return format
        except FormatError:
            continue
    return None


def held_by(format: Format, tensor: Tensor) -> Tensor | None:
    """The values as a format stores them; None where it has no finite word for one of them."""
    try:
        decoded = format.encode(tensor.detach()).decode()
    except FormatError:
        return None
    return decoded if bool(torch.isfinite(decoded).all()) else None


def _row(candidate: Candidate, code: Format, inner: Format, lost: float, cost: float) -> dict[str, Any]:
    shape = tuple(candidate.tensor.shape)
    stored = 8 * ceil(code.stored_bits(shape) / 8)  # packed words take whole bytes
    # constants are taken to lie in protected memory: they are charged as if the same code protected them
    charged = round(constant_bits(code, candidate.tensor) * stored / (inner.width * max(prod(shape), 1)))
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "values": prod(shape),
        "format": repr(code),
        "data": inner.width,
        "bits": stored + charged,
        "lost": lost,
        "drift": cost if isfinite(cost) else WORST,
        "stored": code,
    }


def constant_bits(format: Format, tensor: Tensor) -> int:
    """Bits of the constants that a format keeps of a tensor in protected memory, 32 each.

    >>> constant_bits(Affine(bits=5, axis=0), torch.rand(8, 4)), constant_bits(Float16(), torch.rand(8, 4))
    (512, 0)
    """
    coding = format.fit(tensor.detach()) if tensor.is_floating_point() else ()
    return 32 * sum(constant.numel() for constant in coding[format.stored_constants :])


def copy_in_eval_mode(model: nn.Module) -> nn.Module:
    """A copy that may be changed.

    Raises:
        ConfigError: if the model cannot be copied.
    """
    try:
        return deepcopy(model).eval()
    except Exception as error:  # a model's own code may raise anything here
        raise ConfigError(
            f"this {type(model).__name__} cannot be copied, and what is stored otherwise is tried on a copy: "
            f"{type(error).__name__}: {error}"
        ) from error
