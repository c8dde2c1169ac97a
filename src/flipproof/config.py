"""A campaign as a file: the options of `assess` in TOML, run from the command line and written beside its results."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.errors import ConfigError, FlipproofError
from flipproof.hardening.files import load_hardened
from flipproof.models.weights import load_weights
from flipproof.running.scales import METRIC_NAMES
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice
from flipproof.specs import load_object, parse_decision, parse_faults, parse_format, parse_output


@dataclass(frozen=True, kw_only=True)
class CampaignConfig:
    """Everything `flipproof assess` takes, in the words of `assess`.

    `model`, `data`, `metrics` and `output` name importable objects; `faults` and `format` are written as in Python.
    `weights` is a safetensors or PyTorch state dict to load, `hardened` what `flipproof harden` wrote, `out` the folder
    that gets journal, tables and figures. With `neurons`, outputs of layers are hit instead of parameters, one upset a
    sample, and `include` and `exclude` name layers.
    """

    model: str
    data: str
    faults: str
    format: str | dict[str, str] | None = None
    weights: str | None = None
    hardened: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    buffers: bool = False
    kinds: tuple[str, ...] = ()
    neurons: bool = False
    trials: int = 100
    metrics: tuple[str, ...] = ("accuracy",)
    seed: int = 0
    workers: int = 1
    device: str | None = None
    margin: float | None = None
    confidence: float = 0.95
    output: str | int | None = None
    decision: str | float | None = None
    cache_bytes: int | None = None
    out: str = "flipproof-results"

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], *, source: str) -> CampaignConfig:
        """Check names and kinds of values.

        Raises:
            ConfigError: naming the field, where it comes from and what it takes.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(given.keys() - known.keys()):
            raise ConfigError(f"{source}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        if missing := [name for name in ("model", "data", "faults") if given.get(name) is None]:
            raise ConfigError(f"{source}: {', '.join(missing)} must be given")
        return cls(**{name: _fitting(known[name], value, source) for name, value in given.items() if value is not None})

    def to_toml(self) -> str:
        """The effective configuration; `flipproof assess --config` on it repeats the run."""
        written = {name: value for name, value in asdict(self).items() if value is not None}
        return "# flipproof assess --config THIS_FILE repeats or resumes this campaign\n" + tomli_w.dumps(written)

    def run(self, *, progress: bool | None = None) -> Assessment:
        """Load what is named, assess it, and write results and configuration to `out`.

        The journal is `out`/journal.jsonl: run again and it resumes.
        """
        folder = Path(self.out)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # a factory may initialise at random: the same file gives the same model
            model = self._model()
            data = load_data(self.data)
        result = assess(
            model,
            data=data,
            faults=parse_faults(self.faults),
            format=self._format(),
            where=self._where(),
            trials=self.trials,
            metrics=[_metric(name) for name in self.metrics],
            seed=self.seed,
            journal=folder / "journal.jsonl",
            workers=self.workers,
            device=self.device,
            margin=self.margin,
            confidence=self.confidence,
            output=parse_output(self.output),
            decision=parse_decision(self.decision),
            cache_bytes=self.cache_bytes,
            progress=progress,
        )
        (folder / "campaign.toml").write_text(self.to_toml(), encoding="utf-8")
        result.to_csv(folder / "trials.csv")
        result.to_csv(folder / "summary.csv", table="summary")
        return result

    def _where(self) -> Parameters | Neurons:
        if not self.neurons:
            return Parameters(self.include, self.exclude, self.buffers, self.kinds)  # type: ignore[arg-type]
        if self.buffers or self.kinds:
            raise ConfigError("neurons are outputs of layers: buffers and kinds choose parameters; leave them out")
        return Neurons(include=self.include, exclude=self.exclude)

    def _model(self) -> nn.Module:
        model = load_model(self.model, self.weights)
        return model if self.hardened is None else load_hardened(model, self.hardened)

    def _format(self) -> FormatChoice:
        if isinstance(self.format, dict):
            return {pattern: parse_format(text) for pattern, text in self.format.items()}
        return None if self.format is None else parse_format(self.format)


def _fitting(field: Field[Any], value: Any, source: str) -> Any:
    """The value if it has the field's type; a string or list may stand for a tuple, a whole number for a float."""
    kind = str(field.type)
    if kind.startswith("tuple") and isinstance(value, (str, list, tuple)):
        value = (value,) if isinstance(value, str) else tuple(value)
        fits = all(isinstance(part, str) for part in value)
    elif kind.startswith("float") and type(value) in (int, float):
        fits = type(value) is float or abs(value) < 2**53  # a TOML file can hold whole numbers that no float can
        value = float(value) if fits else value
    elif kind.startswith("str | dict") and isinstance(value, dict):
        fits = all(isinstance(part, str) for part in (*value.keys(), *value.values()))
    else:
        allowed = {"int": int, "bool": bool, "str": str, "dict": dict, "float": float}
        fits = type(value) in [
            allowed[part.split("[")[0]] for part in kind.split(" | ") if part.split("[")[0] in allowed
        ]
    if not fits:
        raise ConfigError(f"{source}: {field.name} takes {kind}, got {value!r}")
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a campaign file.

    Raises:
        ConfigError: if it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def load_model(text: str, weights: str | Path | None = None) -> nn.Module:
    """The network that MODULE:FACTORY gives, with weights from a file if there is one.

    Raises:
        ConfigError: if it is no network, or the weights do not fit it.
    """
    model = called(load_object(text))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {text!r} gives a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model


def load_data(text: str) -> list[Any]:
    """The batches that MODULE:FACTORY gives.

    Raises:
        ConfigError: if they cannot be gone through.
    """
    batches = called(load_object(text))
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"data {text!r} gives a {type(batches).__name__}, expected batches (inputs, targets), e.g. a list or a "
            f"DataLoader"
        )
    return list(batches)


def _metric(name: str) -> Any:
    if name in METRIC_NAMES:
        return name
    if ":" not in name:
        raise ConfigError(f"unknown metric {name!r}: choose among {', '.join(METRIC_NAMES)}, or name a MODULE:FUNCTION")
    return load_object(name)


def called(found: Any) -> Any:
    """A factory's product; a ready model or list of batches is one already."""
    is_factory = isinstance(found, type) or (callable(found) and not isinstance(found, nn.Module))
    if not is_factory:
        return found
    factory: Callable[[], Any] = found
    try:
        return factory()
    except FlipproofError:
        raise
    except TypeError as error:
        raise ConfigError(
            f"{getattr(found, '__name__', found)} cannot be called without arguments ({error}); "
            f"write them out, e.g. module:factory(num_classes=10)"
        ) from error
