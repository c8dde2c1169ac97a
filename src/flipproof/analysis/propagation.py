"""How far errors travel: activations with faults beside those without (Mousavi et al. 2024, Eq. 9, Figs. 3 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flipproof._hooks import check_hooks_run, hooked
from flipproof._interrupts import given_back
from flipproof.analysis.opened_model import check_subject
from flipproof.errors import ConfigError, DataError, InfrastructureError, ModelError
from flipproof.faults import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, call, read_batches
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode, is_infrastructure
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import unlabelled
from flipproof.spaces.contract import Draw
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.spaces.tensors import FormatChoice, matches

Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Propagation:
    """What `propagation` found.

    Attributes:
        distances: one row a layer and trial: `layer`, `kind`, the point's coordinates, `trial`, `l2` (Eq. 9's term of
            that layer), `largest` (largest absolute difference), `not_finite` (share of faulty values that are NaN or
            infinite, which `l2` leaves out).
        distributions: one row a layer and bin: `low`, `high`, and how many values fell there, as shares: `golden`
            without faults, `faulty` over all trials.
    """

    distances: pd.DataFrame = field(repr=False)
    distributions: pd.DataFrame = field(repr=False)

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer and point: means over trials, and how many trials touched the layer at all."""
        keys = [c for c in self.distances if c not in ("trial", "l2", "largest", "not_finite")]
        grouped = self.distances.groupby(keys, sort=False)
        table = grouped[["l2", "largest", "not_finite"]].mean()
        return table.assign(touched=grouped["largest"].agg(lambda column: float((column > 0).mean()))).reset_index()

    def l2(self) -> float:
        """Eq. 9: the mean over trials, layers and neurons of the squared difference."""
        return float(self.distances["l2"].mean())


@dataclass
class _Seen:
    squares: float = 0.0
    largest: float = 0.0
    broken: int = 0
    values: int = 0


def propagation(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    trials: int = 10,
    format: FormatChoice = None,
    where: Parameters | None = None,
    include: str | Sequence[str] = "*",
    bins: int = 60,
    seed: int = 0,
) -> Propagation:
    """Run a model with and without faults and compare what every layer gives.

    L2 of a layer = (1/N) Σ |z − f|² over its N values (neurons × samples), z with faults and f without: Eq. 9 averages
    it over the layers. The same seed draws the same faults as `assess` does.

    Args:
        model: any module; it is run in eval mode and given back as it was. Layers are its modules without children
            that give one tensor; a hardened model's bounded activations are among them.
        data: batches `(inputs, targets)`; targets are not looked at.
        faults: what goes wrong.
        trials: draws a point.
        format: how parameters are stored, as in `assess`.
        where: which parameters can be hit.
        include: glob patterns over qualified names; a module's name takes all layers that it holds.
        bins: of the distributions; equal widths over the range of the fault-free values, and one more on each side for
            what lies beyond.
        seed: of the draws.

    Raises:
        ConfigError: if no layer fits `include`, or the numbers make no sense.
        DataError: if the model rejects a batch.
        ModelError: if no layer gives floating-point tensors, or the model cannot be watched.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> found = fp.propagation(net, [(torch.eye(2), torch.tensor([0, 1]))], faults=fp.RandomBits(1), trials=3)
        >>> found.distances["layer"].unique().tolist(), len(found.distances)
        (['0', '1', '2'], 9)
    """
    if trials < 1 or bins < 1:
        raise ConfigError(f"propagation needs trials ≥ 1 and bins ≥ 1, got trials={trials}, bins={bins}")
    where = Parameters() if where is None else where
    check_subject("propagation", model, where, (Parameters,), format)
    if not hasattr(faults, "points"):
        raise ConfigError(f"propagation takes faults= a fault model such as fp.RandomBits(1), got {faults!r}")
    check_hooks_run(model)
    layers = _layers(model, (include,) if isinstance(include, str) else tuple(include))
    batches = read_batches(data, device_of(model), unlabelled)
    space = FaultSpace(model, where=where, format=format)
    jobs: list[tuple[FaultModel, int, Draw]] = []
    for point in faults.points():
        point.check(space)
        count = 1 if point.repeats(space) else trials
        jobs += [(point, trial, point.draw(space, TrialGenerator(seed, point.stream, trial))) for trial in range(count)]
    seen: dict[tuple[int, str], _Seen] = {}
    with given_back(model), eval_mode(model), torch.no_grad(), space.stored():
        state = Snapshot(model)
        golden = []
        for i, inputs in enumerate(batches.inputs):
            golden.append(_golden(model, layers, inputs, i))
            state.verify()
        order = dict.fromkeys(name for outputs in golden for name in outputs)  # as they are executed
        edges = {name: _edges([g[name] for g in golden if name in g], bins) for name in order}
        edges = {name: found for name, found in edges.items() if found is not None}
        if not edges:
            raise ModelError(
                f"none of the layers {list(layers)[:20]} gives a floating-point tensor when the model runs: quantised "
                f"layers, and layers whose weights are used by functions alone, cannot be compared"
            )
        before = {name: _count([g[name] for g in golden if name in g], edges[name]) for name in edges}
        after = {name: np.zeros(bins + 2, np.int64) for name in edges}
        for number, (_, _, drawn) in enumerate(jobs):
            for inputs, clean in zip(batches.inputs, golden, strict=True):
                with space.corrupted(drawn):
                    faulty = _outputs(model, layers, inputs)
                if state.changed():
                    state.restore()
                for name in edges:
                    if name in clean and name in faulty and clean[name].shape == faulty[name].shape:
                        _compare(clean[name], faulty[name], seen.setdefault((number, name), _Seen()))
                        after[name] += _count([faulty[name]], edges[name])
    rows = [
        {
            "layer": name,
            "kind": type(layers[name]).__name__,
            **jobs[number][0].coordinates(),
            "trial": jobs[number][1],
            "l2": found.squares / max(found.values - found.broken, 1),
            "largest": found.largest,
            "not_finite": found.broken / max(found.values, 1),
        }
        for (number, name), found in seen.items()
    ]
    return Propagation(pd.DataFrame(rows), _distributions(edges, before, after))


def _layers(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    found = {n: m for n, m in leaves.items() if matches([n], patterns)}
    if not found:
        raise ConfigError(f"no layer fits include={list(patterns)}; the model's layers are {list(leaves)[:20]}")
    return found


def _golden(model: nn.Module, layers: dict[str, nn.Module], inputs: Any, batch: int) -> dict[str, Tensor]:
    try:
        return _outputs(model, layers, inputs)
    except Exception as error:
        if is_infrastructure(error):
            raise InfrastructureError(f"golden run, batch {batch}: {type(error).__name__}: {error}") from error
        raise DataError(f"the model rejects batch {batch}: {type(error).__name__}: {error}") from error


def _outputs(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> dict[str, Tensor]:
    """What every layer gave, in the order of execution; the calls of a shared layer one after the other."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, result: Any) -> None:
        if isinstance(result, Tensor) and result.is_floating_point():
            found.setdefault(name, []).append(result.detach().reshape(-1).to(torch.float64, copy=True))

    with hooked(layers, note):
        call(model, inputs)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _compare(clean: Tensor, faulty: Tensor, seen: _Seen) -> None:
    finite = torch.isfinite(faulty)
    difference = (faulty - clean)[finite]
    seen.values += faulty.numel()
    seen.broken += int((~finite).sum())
    if difference.numel():
        seen.squares += float(difference.square().sum())
        seen.largest = max(seen.largest, float(difference.abs().max()))
    if seen.broken:
        seen.largest = float("inf")


def _edges(golden: list[Tensor], bins: int) -> Any:
    """Equal bins over the fault-free range, −∞ and +∞ outside; None for a layer that was never reached."""
    values = [part for part in golden if part.numel()]
    if not values:
        return None
    low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
    high = high if high > low else low + 1.0
    return np.concatenate([[-np.inf], np.linspace(low, high, bins + 1), [np.inf]])


def _count(parts: list[Tensor], edges: Any) -> Counts:
    """Values in each bin; NaN belongs to none. The last inner bin is closed, as the largest golden value lies on it."""
    values = np.concatenate([part.cpu().numpy() for part in parts])
    values = values[~np.isnan(values)]
    places = np.searchsorted(edges, values, side="right") - 1
    places = np.where(values == edges[-2], len(edges) - 3, np.minimum(places, len(edges) - 2))
    return np.bincount(places, minlength=len(edges) - 1).astype(np.int64)


def _distributions(edges: dict[str, Any], before: dict[str, Counts], after: dict[str, Counts]) -> pd.DataFrame:
    tables = [
        pd.DataFrame(
            {
                "layer": name,
                "low": found[:-1],
                "high": found[1:],
                "golden": before[name] / before[name].sum(),
                "faulty": after[name] / max(int(after[name].sum()), 1),
            }
        )
        for name, found in edges.items()
    ]
    return pd.concat(tables, ignore_index=True)
