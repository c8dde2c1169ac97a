"""Jobs of an analysis: one a module, with all of its sites, so that it can be spread, killed and resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flipproof.analysis.probes import ProbedSite, Prober
from flipproof.campaigns.fingerprint import attributes_digest, code_digest, digest_of, rule_of
from flipproof.campaigns.plan import Identity
from flipproof.engine.journal import Journal, Key
from flipproof.errors import ConfigError, JournalError
from flipproof.running.device import release_memory
from flipproof.running.evaluation import unlike

R = TypeVar("R")


class AnalysisHeader(Identity):
    """What is analysed and how: the first line of an analysis' journal."""

    @classmethod
    def of(cls, prober: Prober, **settings: Any) -> AnalysisHeader:
        """The header of an analysis with these settings.

        Args:
            prober: the opened model.
            settings: of the verb, as plain values.
        """
        model, batches, output = prober.model, prober.batches, prober.output
        named = (*model.named_parameters(), *model.named_buffers())
        given = [(name, prober.originals().get(name, tensor)) for name, tensor in named]
        return cls(
            {
                **settings,
                "model": f"{type(model).__module__}.{type(model).__qualname__}",
                "weights": digest_of(given),
                "attributes": attributes_digest(model),
                "code": code_digest(model),
                "data": batches.digest(),
                "batches": list(batches.sizes),
                "formats": ", ".join(sorted({repr(site.format) for site in prober.sites})),
                "sites": digest_of([(site.name, site.values, repr(site.format)) for site in prober.sites]),
                "output": digest_of(output) if callable(output) else output,
                "decision": rule_of(prober.judge),
                "golden_outputs": digest_of(prober.golden),
                "device": prober.device.type,
            }
        )


class ModuleJobs(Generic[R]):
    """One job a module: what is found about all of its sites, in their order.

    A job starts with nothing prepared for other modules and ends with a check that the model is as it was, so that what
    it finds and costs depends on its key alone.

    Args:
        prober: the opened model.
        analyse: finds one record about a module's sites.
        about: what all keys begin with.
    """

    def __init__(
        self, prober: Prober, analyse: Callable[[Key, Sequence[ProbedSite]], R], about: tuple[int | str, ...] = ()
    ) -> None:
        self._prober, self._analyse = prober, analyse
        self.keys: list[Key] = [(*about, name) for name in dict.fromkeys(site.layer for site in prober.sites)]
        """Of all jobs, in the order of the sites."""

    def __call__(self, *key: Any) -> R:
        """Analyse one module."""
        self._prober.forget()
        found = self._analyse(key, [site for site in self._prober.sites if site.layer == key[-1]])
        self._prober.check_untouched()
        return found

    @property
    def serial_only(self) -> str:
        """Why modules cannot be given to worker processes."""
        device = self._prober.device
        return "" if device.type == "cpu" else f"on {device} one process already fills the device"

    def describe(self, key: Key) -> str:
        """A module in words."""
        return str(key[-1]) or "the model"

    def wake(self) -> None:
        """Nothing to prepare in a worker."""

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        prober = self._prober
        return unlike(prober.model, prober.batches, prober.output, prober.golden)

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        release_memory()


def check_run(verb: str, workers: object, journal: object) -> None:
    """Refuse numbers of workers and journals that are none.

    Raises:
        ConfigError: saying what was expected and what came.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"{verb} takes a whole number ≥ 1 for workers=, got {workers!r}")
    if journal is not None and not isinstance(journal, (str, os.PathLike)):
        raise ConfigError(f"{verb} takes the path of a journal for journal=, got {journal!r}")


def in_order(found: Mapping[str, R], prober: Prober, journal: Journal[Any, Any] | None) -> list[R]:
    """What was found of each site, in the order of the sites.

    Raises:
        JournalError: if the journal's records do not hold them all: a line was edited.
    """
    for site in prober.sites:
        if site.name not in found:
            place = "the records" if journal is None else str(journal.path)
            raise JournalError(
                f"{place}: the line of the module of {site.name} does not hold it; the file was edited. Nothing was "
                f"changed: remove that line to do its job again"
            )
    return [found[site.name] for site in prober.sites]
