"""`flipproof inject-all`."""

from __future__ import annotations

from flipproof.analysis.bit_table import BitTable
from flipproof.analysis.exhaustive import inject_all as verb
from flipproof.cli._command import Call, command_of
from flipproof.reports.bits import bit_table_figure
from flipproof.reports.figures import save
from flipproof.reports.tables import percent
from flipproof.running.scales import OUTCOMES


def show(call: Call) -> None:
    """The table by tensor and bit, by tensor, by bit and in all; what is done of it, and what is left out."""
    found: BitTable = call.result
    for name in ("table", "sites", "bits"):
        getattr(found, name).to_csv(call.folder / f"{name}.csv", index=False)
    save(bit_table_figure(found), call.folder / "table.png")
    shown = found.bits[["bit", "flips", "tried", *OUTCOMES]].copy()
    for name in OUTCOMES:
        shown[name] = found.bits[f"{name}_rate"].map(percent)
    call.say(shown.rename(columns={name: f"{name} %" for name in OUTCOMES}).to_string(index=False))
    call.say(
        f"{found.tried:,} of {found.of:,} single flips ({percent(found.done)} %) on {found.samples:,} samples each; "
        f"{found.audited:,} ran again whole, on a fresh copy of the model, with the same answers"
    )
    if found.missing:
        call.say(f"No total yet: nothing was tried of {', '.join(found.missing[:5])}; run more shards")
    else:
        total = found.total
        for name in OUTCOMES:
            low, high = (percent(total[f"{name}_{end}"]) for end in ("low", "high"))
            call.say(f"{name}: {percent(total[f'{name}_rate'])} % of all answers [{low}, {high}]")
    for name, why in found.left_out.items():
        call.say(f"Left out: {name}: {why}")
    call.say(f"Written to {call.folder}/")


command = command_of(
    verb,
    show,
    folder="flipproof-bits",
    example="The journal is OUT/journal.jsonl: interrupt with Ctrl-C and run the same command again to resume. Run "
    "other shards with the same OUT, or each elsewhere; `fp.BitTable.load` puts their journals together.\n\n"
    "Example: `flipproof inject-all mynet.py:build --data mydata.py:batches --shard 1/100 --workers 2`",
)
