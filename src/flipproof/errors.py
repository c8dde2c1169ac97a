"""Every error flipproof raises on purpose.

::

    FlipproofError
    ├── FormatError          a value or tensor that a format cannot store
    ├── FaultSpaceError      parameters that cannot be hit, or patterns that match none
    ├── FaultModelError      a rate, bit or count that makes no sense for the space
    ├── ModelError           a model that cannot be judged: NaN without faults, not repeatable, …
    ├── DataError            batches that cannot be used: empty, mislabelled, rejected by the model
    ├── MetricError          a metric that is undefined on these targets
    ├── ConfigError          a command line or campaign file that does not say what it should
    ├── AuditError           a trial that came out otherwise when it ran again, whole, on a fresh copy of the model
    ├── InfrastructureError  memory ran out or a worker died, more often than a retry could mend
    └── JournalError         a journal that cannot be read or written
        ├── JournalMismatch  … because it belongs to another campaign
        └── JournalLocked    … because another process writes it

Bad arguments are also `ValueError`, so that code which knows nothing of flipproof catches them as usual.
"""

from __future__ import annotations


class FlipproofError(Exception):
    """Root of the tree: `except fp.FlipproofError` catches whatever flipproof refuses."""


class FormatError(FlipproofError, ValueError):
    """A value or tensor that a format cannot store."""


class FaultSpaceError(FlipproofError, ValueError):
    """Parameters that cannot be hit, or patterns that match none."""


class FaultModelError(FlipproofError, ValueError):
    """A rate, bit or count that makes no sense for the fault space."""


class ModelError(FlipproofError, RuntimeError):
    """A model that cannot be judged: NaN without faults, not repeatable."""


class DataError(FlipproofError, ValueError):
    """Batches that cannot be used: empty, mislabelled, rejected by the model."""


class MetricError(FlipproofError, ValueError):
    """A metric that is undefined on these targets."""


class ConfigError(FlipproofError, ValueError):
    """A command line or campaign file that does not say what it should."""


class AuditError(FlipproofError, RuntimeError):
    """A trial came out otherwise when it ran again, whole and uncached, on a fresh copy of the model.

    Attributes:
        shortcut: what changed the record: "suffix", "shared batch", "repaired words", or "state" for none of the
            shortcuts.
        point: index of the fault point.
        trial: index of the trial there.
    """

    def __init__(self, message: str, shortcut: str, point: int, trial: int) -> None:
        super().__init__(message, shortcut, point, trial)
        self.shortcut, self.point, self.trial = shortcut, point, trial

    def __str__(self) -> str:
        return str(self.args[0])


class InfrastructureError(FlipproofError, RuntimeError):
    """Memory ran out or a worker died, more often than a retry could mend. Never an outcome of a trial."""


class JournalError(FlipproofError, RuntimeError):
    """A journal that cannot be read or written."""


class JournalMismatch(JournalError):
    """The journal belongs to another campaign; the message lists what differs, field by field."""


class JournalLocked(JournalError):
    """Another process is writing this journal."""


class FlipproofWarning(UserWarning):
    """Something is legal but probably not meant, for example a rate that flips no bit."""
