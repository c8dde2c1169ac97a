"""`flipproof estimate-rates`."""

from __future__ import annotations

from flipproof.campaigns.rates import estimate_rates as verb
from flipproof.cli._command import Call, command_of


def show(call: Call) -> None:
    """The rates, where trials were spent, and what they do not speak of."""
    found = call.result
    found.table.to_csv(call.folder / "rates.csv", index=False)
    found.strata.to_csv(call.folder / "strata.csv", index=False)
    shown = [name for name in found.table.columns if name in COUNTS or name.startswith((*POINTS, found.of))]
    call.say(found.table[shown].to_string(index=False, float_format="{:.4g}".format))
    call.say(f"Over faults, for the {found.samples} samples given; of {100 * found.coverage:.4g} % of what there is.")
    for name, why in found.left_out.items():
        call.say(f"Left out: {name}: {why}")
    call.say(f"Written to {call.folder}/rates.csv and strata.csv")


POINTS, COUNTS = ("ber", "bit", "count"), ("trials", "images", "met")
"""Columns that name a point, and those that say what it took."""

command = command_of(verb, show, folder="flipproof-rates", journal="rates.jsonl")
