"""`flipproof analyze`."""

from __future__ import annotations

import json

import pandas as pd

from flipproof.analysis.deepvigor import analyze as verb
from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.cli._command import Call, command_of
from flipproof.cli._options import FACTORY, Option, Reading
from flipproof.config import load_data
from flipproof.reports.figures import save
from flipproof.reports.vulnerability import (
    bit_layer_figure,
    coverage_lines,
    layer_table,
    validation_table,
    vulnerability_page,
)
from flipproof.storage.choose import select_bits


def show(call: Call) -> None:
    """The map, its tables and page, what to protect, and the ranges held against injection."""
    found: VulnerabilityMap = call.result
    folder = call.folder
    found.save(folder / "map.safetensors")
    for name in ("layers", "neurons", "bits", "ranges"):
        getattr(found, name).to_csv(folder / f"{name}.csv", index=False)
    save(bit_layer_figure(found), folder / "bits.png")
    outside = pd.DataFrame([*found.left_out.items()], columns=["name", "why"])
    outside.to_csv(folder / "left_out.csv", index=False)
    call.say(layer_table(found).to_string(index=False))
    for line in coverage_lines(found):
        call.say(line)
    chosen = select_bits(found, budget=call.extras["budget"])
    chosen.table.to_csv(folder / "selected.csv", index=False)
    formats = {name: repr(format) for name, format in chosen.formats().items()}
    (folder / "formats.json").write_text(json.dumps(formats, indent=2) + "\n", encoding="utf-8")
    if len(chosen.table):
        share = chosen.table["bits"].sum() / sum(x.total * x.width for x in found.layers_found)
        last = chosen.table.iloc[-1]
        whose = "critical flips" if found.coverage == 1 else "the critical flips of the analysed layers"
        call.say(
            f"{100 * share:.2g} % of the bits of {found.of} hold {100 * last['covered']:.1f} % of {whose}; to protect "
            f"them takes {100 * last['memory']:.2g} % more memory"
        )
    held = [found.validate(call.arguments["data"])] if call.extras["validate"] else []
    if call.extras["unseen"] is not None:
        held.append(found.validate(call.extras["unseen"]))
    checked = pd.concat(held, ignore_index=True) if held else None
    if checked is not None:
        checked.to_csv(folder / "validation.csv", index=False)
        call.say(validation_table(checked).to_string(index=False))
    vulnerability_page(folder / "map.html", found, validation=checked)
    call.say(f"Written to {folder}/")


command = command_of(
    verb,
    show,
    folder="flipproof-analysis",
    extras=(
        Option("validate", Reading((bool,), bool), "Hold the ranges against injection on the same data"),
        Option("unseen", Reading((str,), load_data, FACTORY), "Batches not analysed, to hold the ranges against too"),
        Option("budget", Reading((float,), float), "Memory that protection may add, as a share", 0.05),
    ),
    example="Example: `flipproof analyze mynet.py:build --data mydata.py:batches "
    '--where "Parameters(include=\'conv*\')" --method "DeepVigor(neurons=200)" --validate`',
)
