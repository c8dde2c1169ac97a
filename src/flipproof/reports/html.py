"""One self-contained HTML page of campaigns: figures to hover over, every table, and how to read them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from flipproof._files import replacing
from flipproof.campaigns.assessment import Assessment
from flipproof.errors import ConfigError
from flipproof.reports.style import OUTCOME_STYLE, SERIES, SWEEPS, sweep_of
from flipproof.reports.tables import between, compare, coverage_text, findings, number
from flipproof.running.deployment import Deployment
from flipproof.running.scales import OUTCOMES, Scale

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; display: block }
table { overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th { border-bottom: 1px solid #888 } td.text, th.text { text-align: left; white-space: normal }
summary { cursor: pointer; color: #0072B2 } .small { color: #555; font-size: .85rem }
"""

_READING = """
<p><b>Trial</b>: faults are drawn, injected, all samples are run, the model is restored. <b>Drop</b>: the fault-free
value minus the mean over trials. <b>Outcomes</b>, for each sample: <i>masked</i>, outputs bit-identical to the
fault-free run; <i>non-critical SDC</i>, other outputs and an answer that the task takes for the same (the same class);
<i>critical SDC</i>, another answer (another class) and no sign of it; <i>DUE</i>, NaN in the output. A DUE stays in the
denominator and is never a correct answer.</p>
<p><b>Intervals</b> say of what they are. <i>Over trials</i>: other faults, these samples (bars and bands of the
figures). <i>Over trials and samples</i>: other faults and other inputs of the same kind, which is what a statement
about the network needs; it is made for accuracy and outcomes. Fault-free values have theirs over samples. Points at
which nothing is drawn at random are exact for these samples; <i>no flips</i> marks those whose rate rounds to no flip
at all, which is no measurement of that rate. <b>Tail</b>: what the mean would be if a share
q = 1 − ((1 − confidence)/2)<sup>1/n</sup> of trials, of a kind of which none was drawn, had the worst value: what a
rare fatal flip could still do. <b>Gains</b> are over the first campaign, ours − theirs: of the paired differences where
both drew the very same bits, otherwise of two independent means; <i>identical</i> is the same campaign.
<b>Memory</b> counts the bits of the fault space.</p>
<p><b>Coverage</b> is the bits that could be hit ÷ all bits that the model stores (for neurons: that its layers
compute for a sample). <b>Audited</b> trials ran again, whole, on a fresh copy of the model, and gave the same answers
bit by bit.</p>
"""


def report(path: str | os.PathLike[str], /, **found: Assessment | Deployment) -> Path:
    """Write one HTML page that needs nothing else: no network, no other file.

    Args:
        path: of the page; its folder is made.
        found: assessments, at least one, by name; the first is the baseline, as in `compare`. What `check_deployment`
            found of a model (``fp.hardening_report(safe).deployment``, ``fp.protect(…).deployment``) is shown beside
            them.

    Returns:
        The path.

    Raises:
        ConfigError: if there is none, one has no trial, or they were measured on different data or metrics.

    Example:
        >>> import flipproof as fp, tempfile, torch
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> base = fp.assess(torch.nn.Linear(2, 2), data=data, faults=fp.RandomBits([1, 4]), trials=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fp.report(f"{folder}/report.html", base=base).read_text(encoding="utf-8")[:15]
        '<!doctype html>'
    """
    assessments = {name: each for name, each in found.items() if not isinstance(each, Deployment)}
    deployments = {name: each for name, each in found.items() if isinstance(each, Deployment)}
    if not assessments:
        raise ConfigError("report takes at least one assessment by name: fp.report('report.html', base=…)")
    table = compare(**assessments)
    if empty := [name for name, assessment in assessments.items() if assessment.summary.empty]:
        raise ConfigError(f"{', '.join(empty)} has no trial yet; there is nothing to report")
    first = next(iter(assessments.values()))
    body = ["<h1>Behaviour under memory faults</h1>", _campaigns(assessments)]
    body += [f"<h2>{escape(_title(metric))}</h2>" + _metric_plot(assessments, metric) for metric in first.metrics]
    if len(assessments) > 1:
        body.append("<h2>Gains over the first campaign</h2>" + _gains(table, first))
    for name, assessment in assessments.items():
        body.append(f"<h2>{escape(name)}</h2>" + _one(assessment))
    body += [f"<h2>{escape(name)}: where it is deployed</h2>" + _deployment(each) for name, each in deployments.items()]
    body.append("<h2>How to read this</h2>" + _READING)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>flipproof report</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body>{''.join(body)}</body></html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _deployment(found: Deployment) -> str:
    rows = [
        {
            "way": way.name,
            "answers": way.result,
            "largest difference": "–" if way.difference is None else f"{way.difference:.3g}",
            "put down to rounding": "–" if way.room is None else f"up to {way.room:.3g}",
            "decisions that change": "–" if way.changed is None else str(way.changed),
            "why": way.reason,
        }
        for way in found.ways
    ]
    said = f"Without faults, {found.samples} samples, each way held against the model as it is."
    return f"<p>{said}</p>{html_table(pd.DataFrame(rows), text=('way', 'answers', 'why'))}"


def _campaigns(assessments: Mapping[str, Assessment]) -> str:
    rows = []
    for name, assessment in assessments.items():
        fingerprint = assessment.header.fingerprint
        formats = sorted({site.format for site in assessment.header.stored})
        golden = ", ".join(_golden(assessment, metric) for metric in assessment.metrics)
        rows.append(
            {
                "campaign": name,
                "model": fingerprint.model.rsplit(".", 1)[-1],
                "stored as": ", ".join(formats),
                "bits": f"{assessment.bits:,}",
                "coverage": coverage_text(assessment),
                "task": _task(assessment),
                "samples": f"{fingerprint.samples:,} {assessment.header.task.samples}",
                "without faults [over samples]": golden,
                "faults": fingerprint.faults,
                "trials": f"{len(assessment.records):,}",
                "audited": f"{assessment.audited:,}",
                "seed": str(fingerprint.seed),
            }
        )
    return html_table(
        pd.DataFrame(rows), text=("campaign", "model", "stored as", "task", "without faults [over samples]", "faults")
    )


def _task(assessment: Assessment) -> str:
    job = assessment.header.task
    return f"{job.task}: {job.rule}" if job.rule else job.task


def _golden(assessment: Assessment, metric: str) -> str:
    scale, interval = assessment.scale(metric), assessment.golden_interval(metric)
    return f"{metric} {scale.with_unit(assessment.golden[metric])} {between(scale, *interval)}"


def _metric_plot(assessments: Mapping[str, Assessment], metric: str) -> str:
    figure = go.Figure()
    for i, (name, assessment) in enumerate(assessments.items()):
        summary, x, colour = assessment.summary, sweep_of(assessment), SERIES[i % len(SERIES)]
        low, high = summary[metric] - summary[f"{metric}_low"], summary[f"{metric}_high"] - summary[metric]
        bars = {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1.2}
        figure.add_scatter(
            x=summary[x],
            y=summary[metric].where(np.isfinite(summary[metric])),
            name=escape(name),
            error_y=bars,
            line={"color": colour},
        )
        figure.add_hline(y=assessment.golden[metric], line={"color": colour, "dash": "dash", "width": 1})
    x = sweep_of(next(iter(assessments.values())))
    scale = next(iter(assessments.values())).scale(metric)
    unit = f", {escape(scale.unit)}" if scale.unit not in ("", "%") else ""
    figure.update_yaxes(title=f"{_title(metric)}{unit} (bars: over trials)")
    if scale.unit == "%":
        figure.update_yaxes(tickformat=".0%")
    return _plot(figure, x, logarithmic=all(_logarithmic(assessment) for assessment in assessments.values()))


def _outcome_plot(assessment: Assessment) -> str:
    summary, x = assessment.summary, sweep_of(assessment)
    figure = go.Figure()
    for outcome in OUTCOMES:
        label, colour, _ = OUTCOME_STYLE[outcome]
        figure.add_bar(x=[number(value) for value in summary[x]], y=summary[outcome], name=label, marker_color=colour)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=f"share of {assessment.header.task.samples}", tickformat=".0%", range=[0, 1])
    return _plot(figure, x, logarithmic=False)


def _plot(figure: go.Figure, x: str, *, logarithmic: bool) -> str:
    figure.update_layout(
        template="plotly_white", height=380, margin={"t": 20, "r": 10}, legend={"orientation": "h", "y": 1.12}
    )
    figure.update_xaxes(title=SWEEPS.get(x, x))
    if logarithmic:
        figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _logarithmic(assessment: Assessment) -> bool:
    x = sweep_of(assessment)
    return x in ("ber", "count") and len(assessment.summary) > 1 and float(assessment.summary[x].min()) > 0


def _gains(table: pd.DataFrame, first: Assessment) -> str:
    coordinate = sweep_of(first)
    rows = []
    for _, row in table[table["campaign"] != table["campaign"].iloc[0]].iterrows():
        shown = {"campaign": row["campaign"], coordinate: number(row[coordinate])}
        for name in (*first.metrics, "critical_total"):
            scale = first.scale(name)
            heading = f"{_title(name)}{',' * bool(scale.step)}{scale.step}"
            shown[f"{heading} [over trials]"] = _signed(row, f"{name}_gain", scale)
            both = between(scale, row[f"{name}_gain_both_low"], row[f"{name}_gain_both_high"])
            shown[f"{_title(name)} [over trials and samples]"] = "–" if row["draws"] == "none" else both
        draws = f"{row['draws']}{'; no flips in ' + row['fault_free'] if row['fault_free'] else ''}"
        rows.append({**shown, "draws": draws, "memory": f"{row['memory']:.3f} ×"})
    return html_table(pd.DataFrame(rows), text=("campaign", "draws"))


def _signed(row: pd.Series[Any], name: str, scale: Scale) -> str:
    value = float(row[name])
    if row["draws"] == "none" or not np.isfinite(value):
        return "–"
    text = scale.text(value)
    return f"{'' if text[0] in '-–' else '+'}{text} {between(scale, row[f'{name}_low'], row[f'{name}_high'])}"


def _one(assessment: Assessment) -> str:
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(assessment))
    header = assessment.header
    stored = html_table(pd.DataFrame([asdict(site) for site in header.stored]), text=("name", "kind", "format"))
    left_out = [{"name": name, "why": str(why)} for name, why in dict(header.left_out).items()]
    outside = html_table(pd.DataFrame(left_out), text=("name", "why")) if left_out else "<p>none</p>"
    facts = {**asdict(header.fingerprint), **header.plan.to_json(), **header.versions, "started": header.created}
    facts |= {} if header.together == 1 else {"trials a forward": header.together}
    identity = html_table(
        pd.DataFrame([{"field": name, "value": str(value)} for name, value in facts.items()]), text=("field", "value")
    )
    return (
        f"<ul>{said}</ul>{_outcome_plot(assessment)}{html_table(_summary(assessment))}"
        f"<details><summary>Tensors in the fault space: {len(header.stored)}</summary>{stored}</details>"
        f"<details><summary>Tensors outside it: {len(left_out)}</summary>{outside}</details>"
        f"<details><summary>What identifies this campaign</summary>{identity}</details>"
    )


def _summary(assessment: Assessment) -> pd.DataFrame:
    coordinate, rows = sweep_of(assessment), []
    for _, row in assessment.summary.iterrows():
        shown = {coordinate: number(row[coordinate]), "flips": f"{row['flips']:,.1f}"}
        for name in (*assessment.metrics, *OUTCOMES):
            scale = assessment.scale(name)
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            shown[f"{_title(name)} {scale.unit} [over trials]"] = f"{scale.text(row[name])} {between(scale, low, high)}"
            both = between(scale, row[f"{name}_both_low"], row[f"{name}_both_high"])
            if name in assessment.metrics:
                shown[f"{_title(name)} [over trials and samples]"] = both
                shown[f"{_title(name)} tail"] = scale.text(row[f"{name}_tail"])
        rows.append({**shown, "trials": str(int(row["trials"]))})
    return pd.DataFrame(rows)


def html_table(table: pd.DataFrame, *, text: tuple[str, ...] = ()) -> str:
    """A table as HTML, every cell escaped; columns of `text` to the left, numbers to the right."""

    def cell(tag: str, column: Any, value: Any) -> str:
        kind = ' class="text"' if column in text else ""
        return f"<{tag}{kind}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", column, column) for column in table.columns)
    rows = ("".join(cell("td", c, v) for c, v in zip(table.columns, row, strict=True)) for row in table.to_numpy())
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _title(name: str) -> str:
    words = {"auroc": "AUROC", "due": "DUE", "critical_sdc": "critical SDC", "non_critical_sdc": "non-critical SDC"}
    return words.get(name, name.replace("_", " "))
