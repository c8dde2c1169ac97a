"""Tables of records: for a terminal (100 columns), for comparing campaigns, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.estimates import gain
from flipproof.campaigns.record import WORD_OUTCOMES
from flipproof.errors import ConfigError
from flipproof.running.scales import Scale

NEGLIGIBLE = 0.005
"""A drop below half a percentage point is not worth a sentence; of other metrics half a percent of the golden value."""


def basis(assessment: Assessment) -> str:
    """What a campaign rests on: how much of the model could be hit, and how many trials were audited.

    Example:
        >>> import flipproof as fp, torch
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> basis(fp.assess(torch.nn.Linear(2, 2), data=data, faults=fp.RandomBits(1), trials=4))
        'Fault space: 192 bits, 100 % of what the model stores. Audited: 4 of 4 trials.'
    """
    of = "what its layers compute for a sample" if of_neurons(assessment) else "what the model stores"
    audited = assessment.audited
    itself = assessment.header.audit.on == "the model itself"
    on = ", on the model itself" if itself else ""
    return (
        f"Fault space: {assessment.bits:,} bits, {coverage_text(assessment)} of {of}. "
        f"Audited: {audited} of {len(assessment.records)} trials{on if audited else ''}."
    )


def coverage_text(assessment: Assessment) -> str:
    """Coverage in percent, rounded down, so that 100 % is all.

    Example:
        >>> from types import SimpleNamespace
        >>> [coverage_text(SimpleNamespace(coverage=share)) for share in (1.0, 0.99997, 0.5)]
        ['100 %', '99.9 %', '50 %']
    """
    share = assessment.coverage
    return "an unknown share" if np.isnan(share) else f"{np.floor(1000 * share + 1e-9) / 10:g} %"


def of_neurons(assessment: Assessment) -> bool:
    """Whether computed values were hit, not stored ones."""
    return any(site.kind == "neuron" for site in assessment.header.stored)


def interval_note(assessment: Assessment) -> str:
    """What the intervals of a table are of, and what its tail is."""
    samples = f"{assessment.header.fingerprint.samples:,} {assessment.header.task.samples}"
    name = assessment.metrics[0]
    return (
        f"Intervals: over trials, for these {samples}; over trials and samples: {name}_both_low, "
        f"{name}_both_high in the summary. Tail: what a rare fatal flip that was not drawn could still do."
    )


def between(scale: Scale, low: float, high: float) -> str:
    """An interval in brackets, or "(unknown)".

    Example:
        >>> between(Scale("%"), 0.1, 0.25), between(Scale(), float("nan"), 1.0)
        ('[10.0, 25.0]', '(unknown)')
    """
    if np.isnan(low) or np.isnan(high):
        return "(unknown)"
    return f"[{scale.text(low)}, {scale.text(high)}]"


def change_word(scale: Scale) -> str:
    """A loss is a drop or a rise by what is worse; where nobody said, the signed difference is shown as such."""
    if scale.higher_is_better is None:
        return "golden\n− mean"
    return "drop" if scale.higher_is_better else "rise"


def change_of(row: pd.Series[Any], name: str, scale: Scale, of: str = "") -> tuple[float, float, float]:
    """What got worse, with its interval over trials or of another kind: the drop, or its negative if less is better."""
    value, low, high = (float(row[f"{name}_drop{end}"]) for end in ("", f"{of}_low", f"{of}_high"))
    return (-value, -high, -low) if scale.higher_is_better is False else (value, low, high)


def percent(share: float) -> str:
    """A fraction in percent with one decimal, and never −0.0.

    Example:
        >>> percent(0.123456), percent(-1e-9)
        ('12.3', '0.0')
    """
    text = f"{100 * share:.1f}"
    return "0.0" if text == "-0.0" else text


def number(value: float) -> str:
    """A rate or count as people write it.

    Example:
        >>> number(1e-4), number(3e-05), number(0.25), number(12)
        ('1e-4', '3e-5', '0.25', '12')
    """
    if value == 0 or 0.1 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def findings(assessment: Assessment) -> list[str]:
    """What a campaign found, in sentences: where it stays harmless, where it breaks, and how it breaks.

    Every sentence is about the first metric and says its interval and of what it is.
    """
    metric = assessment.metrics[0]
    scale, golden, summary = assessment.scale(metric), assessment.golden[metric], assessment.summary
    if summary.empty:
        return ["No trial has been run yet."]
    samples = assessment.records.samples
    interval = between(scale, *assessment.golden_interval(metric))
    known = "" if interval == "(unknown)" else f" {interval}"
    job = assessment.header.task
    said = [f"Without faults {metric} is {scale.with_unit(golden)}{known} over {samples:,} {job.samples}."]
    if job.task != "classification":
        said.insert(0, f"The task is {job.task}: {job.rule}.")
    if assessment.coverage < 0.99:
        what = "bits that layers compute" if of_neurons(assessment) else "stored bits"
        said.append(f"Only {coverage_text(assessment)} of the {what} could be hit; nothing is said about the others.")
    if (shard := assessment.header.plan.shard) is not None:
        said.append(f"This is shard {shard} of a campaign: flipproof merge puts the journals of all shards together.")
    negligible, words = _negligible(scale, golden)
    if "bit" in summary:
        return said + _about_bits(summary, metric, scale, negligible, words)
    coordinate = next(iter(assessment.header.points[0].coordinates))
    name = coordinate.upper() if coordinate == "ber" else coordinate
    points = [assessment.point(int(index)) for index in summary["point"]]
    idle = np.array([point is not None and point.fault_free for point in points])
    for _, row in summary[idle].iterrows():
        said.append(
            f"At {name} {number(row[coordinate])} no bit is flipped: the rate rounds to none. It is not measured."
        )
    summary = summary[~idle]
    if summary.empty:
        return said
    finite = np.isfinite(summary[metric].to_numpy(float))
    for _, row in summary[~finite].iterrows():
        values = assessment.trials.loc[assessment.trials["point"] == row["point"], metric].to_numpy(float)
        said.append(
            f"At {name} {number(row[coordinate])} {metric} is not finite in {int((~np.isfinite(values)).sum())} of "
            f"{len(values)} trials; its mean is {scale.text(row[metric])} and no difference can be given."
        )
    summary = summary[finite]
    changes = [change_of(row, metric, scale) for _, row in summary.iterrows()]
    low, high = (np.array([change[end] for change in changes], float) for end in (1, 2))
    still = (high < negligible) & ((scale.higher_is_better is not None) | (low > -negligible))
    harmless = summary[still & (summary["critical_total"].to_numpy() < NEGLIGIBLE)]
    if len(harmless):
        last = harmless.iloc[-1]
        said.append(
            f"Up to {name} {number(last[coordinate])} (flips a trial: {last['flips']:,.0f}) the mean {metric} "
            f"stays within {words} of that."
        )
    moved = (low > negligible) | ((scale.higher_is_better is None) & (high < -negligible))
    broken = summary[moved]
    unclear = summary[~moved & ~summary.index.isin(harmless.index)]
    for _, row in unclear.iterrows():
        value, lower, upper = change_of(row, metric, scale)
        what = "drop" if scale.higher_is_better else "rise" if scale.higher_is_better is False else "difference"
        said.append(
            f"At {name} {number(row[coordinate])} {_trials(row)} cannot tell: the {what} is {scale.text(value)}"
            f"{scale.step} {between(scale, lower, upper)}. More trials narrow that."
        )
    if len(broken):
        first = broken.iloc[0]
        lowest = broken.iloc[int(np.argmax([abs(change_of(row, metric, scale)[0]) for _, row in broken.iterrows()]))]
        verb = {True: "falls", False: "rises", None: "changes"}[scale.higher_is_better]
        said.append(f"From {name} {number(first[coordinate])} it measurably {verb}: {_moved(first, metric, scale)}.")
        if lowest["point"] != first["point"]:
            said.append(f"At {name} {number(lowest[coordinate])} it {verb} most: {_moved(lowest, metric, scale)}.")
    elif len(summary):
        verb = {True: "lowers", False: "raises", None: "changes"}[scale.higher_is_better]
        said.append(f"No point of this sweep {verb} {metric} measurably.")
    worst = assessment.summary.iloc[int(np.argmax(assessment.summary["critical_total"]))]
    if worst["critical_total"] > 0:
        kind = "NaN outputs (DUE)" if worst["due"] > worst["critical_sdc"] else "silently wrong answers (critical SDC)"
        said.append(
            f"At {name} {number(worst[coordinate])} {worst['critical_total']:.1%} of answers are lost, "
            f"mostly to {kind}: {worst['critical_sdc']:.1%} critical SDC, {worst['due']:.1%} DUE."
        )
    repaired = assessment.summary[(assessment.summary[["corrected", "detected"]] > 0).any(axis=1)]
    if len(repaired):
        last = repaired.iloc[-1]
        said.append(
            f"At {name} {number(last[coordinate])} a trial hits {last[list(WORD_OUTCOMES)].sum():,.1f} stored words: "
            f"{last['corrected']:,.1f} read as without faults, {last['detected']:,.1f} are known to be lost, "
            f"{last['miscorrected']:,.1f} read as another value, and nothing notices."
        )
    return said


def _trials(row: pd.Series[Any]) -> str:
    return "1 trial" if int(row["trials"]) == 1 else f"{int(row['trials'])} trials"


def _negligible(scale: Scale, golden: float) -> tuple[float, str]:
    """The change that is not worth a sentence, and in words."""
    if scale.unit == "%":
        return NEGLIGIBLE, f"{percent(NEGLIGIBLE)} points"
    return NEGLIGIBLE * abs(golden), f"{NEGLIGIBLE:.1%}"


def _about_bits(summary: pd.DataFrame, metric: str, scale: Scale, negligible: float, words: str) -> list[str]:
    changes = np.array([change_of(row, metric, scale)[0] for _, row in summary.iterrows()])
    size = changes if scale.higher_is_better is not None else np.abs(changes)
    size = np.where(np.isnan(size), np.inf, size)
    # several bits can ruin everything; NaN outputs break the tie
    worst = summary.iloc[int(np.argmax(size.round(6) + summary["due"].to_numpy() * 1e-3))]
    said = [
        f"The critical bit is {int(worst['bit'])}: flipped in every value it leaves {metric} at "
        f"{scale.with_unit(worst[metric])}, with {worst['critical_sdc']:.1%} critical SDC and {worst['due']:.1%} DUE."
    ]
    quiet = [int(bit) for bit in summary["bit"][size < negligible]]
    if quiet:
        verb = "change it by" if scale.higher_is_better is None else "cost"
        said.append(f"Bits {ranges(quiet)} {verb} less than {words} each, even flipped in every value.")
    return said


def _moved(row: pd.Series[Any], metric: str, scale: Scale) -> str:
    value, low, high = change_of(row, metric, scale)
    text = f"by {scale.text(value)}{scale.step} {between(scale, low, high)} over trials"
    both = between(scale, *change_of(row, metric, scale, "_both")[1:])
    text += "" if both == "(unknown)" else f", {both} over trials and samples,"
    return f"{text} to {scale.with_unit(row[metric])}"


def ranges(numbers: list[int]) -> str:
    """Whole numbers as ranges.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def compare(**assessments: Assessment) -> pd.DataFrame:
    """Campaigns side by side: one row a campaign and point.

    Besides the columns of `Assessment.summary`, each row says what the campaign gained over the first one at the same
    point, ours − theirs: `accuracy_gain` with `_low` and `_high` over trials, `_samples_…` over samples and `_both_…`
    over trials and samples. `draws` says how: "identical", the first one is the same campaign, so that the gain is
    exactly 0; "paired", both drew the very same bits trial by trial, so that the interval is of the paired difference;
    "independent", of two means (MOVER); "exact", nothing is drawn at random on either side; "none", the first one has
    no such point. Samples are always paired. `gain_trials` is the number of trials of this campaign that a gain rests
    on. `fault_free` names the side of which the rate rounds to no flip at all: the first campaign, this one, or
    "both"; it is no measurement of that rate. `memory` is the bits of its fault space relative to the first
    campaign's; what was left outside the space is not counted.

    Args:
        assessments: at least one, by name; the first is the baseline.

    Raises:
        ConfigError: if there is none, or they were measured on different data or by different metrics.

    Example:
        >>> import flipproof as fp, torch
        >>> net, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
        >>> setup = dict(data=data, faults=fp.BitErrorRate(0.05), trials=5)
        >>> table = fp.compare(full=fp.assess(net, **setup), half=fp.assess(net, format=fp.Float16(), **setup))
        >>> table[["campaign", "memory"]].values.tolist()
        [['full', 1.0], ['half', 0.5]]
    """
    if not assessments:
        raise ConfigError("compare takes at least one assessment by name: fp.compare(base=…, hardened=…)")
    for name, given in assessments.items():
        if not isinstance(given, Assessment):
            raise ConfigError(
                f"compare takes assessments, got {given!r} for {name}; of a journal, fp.Assessment.load(path)"
            )
    base_name, base = next(iter(assessments.items()))
    rows: list[dict[str, Any]] = []
    for name, assessment in assessments.items():
        for what in ("data", "samples", "metrics"):
            ours, theirs = (getattr(one.header.fingerprint, what) for one in (assessment, base))
            if ours != theirs:
                raise ConfigError(f"{name} and {base_name} cannot be compared: {what} differ ({ours!r} and {theirs!r})")
        for _, row in assessment.summary.iterrows():
            values = {str(key): value for key, value in row.items() if key != "point"}
            gains = _gains(assessment, base, int(row["point"]), name, base_name)
            rows.append({"campaign": name, **values, **gains, "memory": assessment.bits / base.bits})
    return pd.DataFrame(rows)


def _gains(assessment: Assessment, base: Assessment, point: int, name: str, base_name: str) -> dict[str, Any]:
    coordinates = assessment.header.points[point].coordinates
    match = [i for i, other in enumerate(base.header.points) if other.coordinates == coordinates]
    ours, theirs = assessment.point(point), base.point(match[0]) if match else None
    assert ours is not None  # every row of a summary has trials
    gains: dict[str, Any] = {}
    for column in (*assessment.metrics, "critical_total"):
        found = gain(ours, theirs, column)
        gains |= found.estimate.columns(f"{column}_gain")
    sides = [side for side, of in ((base_name, theirs), (name, ours)) if of is not None and of.fault_free]
    return {
        **gains,
        "draws": found.draws,
        "paired": found.draws in ("paired", "identical"),
        "gain_trials": found.trials,
        "fault_free": "both" if len(sides) == 2 else "".join(sides),
    }


def gain_text(row: Mapping[str, Any], name: str, scale: Scale) -> str:
    """The gain of one row of `compare`, in words.

    Example:
        >>> row = {"draws": "paired", "fault_free": "", "a_gain": 0.021, "a_gain_low": 0.01, "a_gain_high": 0.03,
        ...        "a_gain_both_low": -0.01, "a_gain_both_high": 0.05}
        >>> gain_text(row, "a", Scale("%", higher_is_better=True))
        'a gains +2.1 points [1.0, 3.0] over trials, [-1.0, 5.0] over trials and samples (paired)'
    """
    if row["draws"] == "none":
        return "the first campaign has no such point"
    if row["draws"] == "identical":
        return f"{name}: no difference, it is the same campaign"
    value = float(row[f"{name}_gain"])
    how = {"paired": "paired", "independent": "independent draws", "exact": "exact for these samples"}[row["draws"]]
    if row["fault_free"]:
        how += f"; no bit is flipped in {row['fault_free']}"
    if not np.isfinite(value):
        return f"{name}: one of the two means is not finite, there is no difference ({how})"
    text = scale.text(value)
    text = f"{name} {'gains' if scale.higher_is_better else 'changes by'} {'' if text[0] in '-–' else '+'}{text}"
    text += scale.step
    if row["draws"] != "exact":
        text += f" {between(scale, row[f'{name}_gain_low'], row[f'{name}_gain_high'])} over trials"
    both = between(scale, row[f"{name}_gain_both_low"], row[f"{name}_gain_both_high"])
    return f"{text}{'' if both == '(unknown)' else f', {both} over trials and samples'} ({how})"
