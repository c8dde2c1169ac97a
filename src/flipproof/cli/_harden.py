"""`flipproof harden`."""

from __future__ import annotations

from flipproof.cli._command import Call, command_of
from flipproof.cli._console import out
from flipproof.hardening.files import save_hardened
from flipproof.hardening.harden import harden as verb
from flipproof.hardening.overhead import overhead
from flipproof.hardening.report import hardening_report
from flipproof.reports.bounds import history_figure
from flipproof.reports.figures import save


def show(call: Call) -> None:
    """The hardened model, and what was bounded and what was not."""
    report = hardening_report(call.result)
    save_hardened(call.result, call.folder / "hardened.safetensors")
    report.table().to_csv(call.folder / "activations.csv", index=False)
    if not report.history.empty:
        report.history.to_csv(call.folder / "history.csv", index=False)
        save(history_figure(report), call.folder / "history.png")
    costs = overhead(call.arguments["model"], call.result)
    out.print(str(report), markup=False, highlight=False, soft_wrap=True)
    call.say(
        f"Memory: {report.thresholds:,} thresholds beside {report.parameters:,} parameters, "
        f"{costs.memory_percent:.3g} % more. "
        + ("" if costs.time_ratio is None else f"Time: {costs.time_ratio:.2f} × a plain forward. ")
        + f"Search: {report.forwards:,.0f} forward-equivalents of the calibration data."
    )
    call.say(f"Accuracy lost without faults, on held-out data: {100 * report.clean_drop:.2f} points")
    call.say(f"Written to {call.folder}/: hardened.safetensors, activations.csv")


command = command_of(
    verb,
    show,
    folder="flipproof-hardened",
    example="Run the same command again to resume. Then: "
    "`flipproof assess MODEL --hardened OUT/hardened.safetensors …`, "
    "or `fp.load_hardened(model, file)` in Python.\n\nExample: `flipproof harden flipproof.demo:trained_digits_cnn "
    '--data "flipproof.datasets:digits(\'train\')" --method "Guard()"`',
)
