"""`flipproof protect`."""

from __future__ import annotations

from flipproof.cli._command import Call, command_of
from flipproof.reports.figures import save
from flipproof.reports.front import front_figure
from flipproof.storage.protect import protect as verb


def show(call: Call) -> None:
    """The verdict, the evidence, the front, and the protected model."""
    found = call.result
    found.save(call.folder)
    written = "words.safetensors (for fp.load_packed), table.csv, evidence.csv, verdict.txt"
    if len(found.front):
        save(front_figure(found.front, kept=found.kept), call.folder / "front.png")
        written += ", front.csv, front.png"
    call.say(str(found))
    call.say(f"Written to {call.folder}/: {written}")


command = command_of(
    verb,
    show,
    folder="flipproof-protected",
    journal="journals",
    example="Interrupt it and run it again: it resumes.\n\nExample: "
    "`flipproof protect flipproof.demo:trained_digits_cnn "
    "--data \"flipproof.datasets:digits('test')\" --ber 1e-2 --memory -0.5`",
)
