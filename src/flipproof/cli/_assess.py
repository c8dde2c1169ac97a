"""`flipproof assess`."""

from __future__ import annotations

from flipproof.campaigns.assess import assess as verb
from flipproof.campaigns.assessment import Assessment
from flipproof.cli._command import Call, command_of
from flipproof.cli._console import out
from flipproof.reports.figures import metric_figure, outcome_figure, save
from flipproof.reports.tables import findings
from flipproof.reports.terminal import summary_table


def show(call: Call) -> None:
    """Tables, what they say, and figures."""
    result: Assessment = call.result
    result.to_csv(call.folder / "trials.csv")
    result.to_csv(call.folder / "summary.csv", table="summary")
    stored, left_out = result.header.stored, result.header.left_out
    formats = ", ".join(sorted({site.format for site in stored}))
    call.say(f"{len(stored)} tensors stored as {formats}: {result.bits:,} bits can be hit")
    if left_out:
        shown = ", ".join(list(left_out)[:6]) + (" …" if len(left_out) > 6 else "")
        call.say(f"{len(left_out)} tensors outside the fault space: {shown}")
    out.print(summary_table(result))
    for sentence in findings(result):
        call.say(f"  • {sentence}")
    figures = ""
    if len(result.header.points) > 1:
        save(metric_figure({result.header.fingerprint.model: result}), call.folder / "metric.png")
        save(outcome_figure(result), call.folder / "outcomes.png")
        figures = ", metric.png, outcomes.png"
    out.print(
        f"Written to {call.folder}/: journal.jsonl, trials.csv, summary.csv, campaign.toml{figures}", markup=False
    )


command = command_of(
    verb,
    show,
    folder="flipproof-results",
    config="campaign.toml",
    example="The journal is OUT/journal.jsonl: interrupt with Ctrl-C and run the same command again to resume. "
    "OUT/campaign.toml holds the effective options: `flipproof assess --config OUT/campaign.toml` repeats the run.\n\n"
    "Example: `flipproof assess flipproof.demo:trained_digits_cnn --data flipproof.datasets:digits "
    '--faults "BitErrorRate([1e-6, 1e-5])" --format Float16`',
)
