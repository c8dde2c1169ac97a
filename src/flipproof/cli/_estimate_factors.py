"""`flipproof estimate-factors`."""

from __future__ import annotations

from flipproof.analysis.factors import estimate_factors as verb
from flipproof.cli._command import Call, command_of


def show(call: Call) -> None:
    """The table, and what it does not speak of."""
    table = call.result
    table.to_csv(call.folder / "factors.csv", index=False)
    call.say(table.to_string(index=False, float_format="{:.4g}".format))
    call.say(f"These factors speak of {100 * table.attrs['coverage']:.4g} % of what there is.")
    for name, why in table.attrs["left_out"].items():
        call.say(f"Left out: {name}: {why}")
    call.say(f"Written to {call.folder}/factors.csv")


# analyze may have a journal of its own in the same folder
command = command_of(verb, show, folder="flipproof-factors", journal="factors.jsonl")
