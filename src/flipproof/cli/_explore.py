"""`flipproof explore`."""

from __future__ import annotations

from flipproof.cli._command import Call, command_of
from flipproof.reports.figures import save
from flipproof.reports.tradeoff import tradeoff_figure
from flipproof.storage.explore import explore as verb


def show(call: Call) -> None:
    """The forms that were tried, and the figure."""
    found = call.result
    found.candidates.to_csv(call.folder / "candidates.csv", index=False)
    found.rates.to_csv(call.folder / "rates.csv", index=False)
    save(tradeoff_figure(found), call.folder / "tradeoff.png")
    call.say(str(found))
    call.say(f"Memory and time are relative to Affine(bits=8). Written to {call.folder}/")


command = command_of(
    verb,
    show,
    folder="flipproof-exploration",
    journal="journals",
    example="Interrupt it and run it again: it resumes.\n\nExample: "
    "`flipproof explore flipproof.demo:trained_digits_cnn "
    '--data "flipproof.datasets:digits(\'test\')" --accuracy 0.9 --drop 0.1 --faults "BitErrorRate([1e-4, 1e-3])"`',
)
