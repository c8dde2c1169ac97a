"""`flipproof analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from flipproof.analysis.deepvigor import DeepVigor
from flipproof.analysis.deepvigor import analyze as analyze_model
from flipproof.analysis.factors import estimate_factors
from flipproof.cli.console import out
from flipproof.config import called, load_model
from flipproof.errors import ConfigError
from flipproof.reports.figures import save
from flipproof.reports.vulnerability import (
    bit_layer_figure,
    coverage_lines,
    layer_table,
    validation_table,
    vulnerability_page,
)
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.specs import load_object, parse_decision, parse_format
from flipproof.storage.choose import select_bits


def analyze(
    model: Annotated[str, typer.Argument(help="MODULE:FACTORY or FILE.py:FACTORY of the model.")],
    data: Annotated[str, typer.Option(help="MODULE:FACTORY or FILE.py:FACTORY that gives batches (inputs, targets).")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load: .safetensors, or .pt/.pth (never unpickled).")
    ] = None,
    of: Annotated[str, typer.Option(help="neurons (layer outputs), or parameters (weights and biases).")] = "neurons",
    format: Annotated[str | None, typer.Option(help="How they are stored, e.g. `Float16`.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Layers or parameters: glob or name. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="What is left out; wins. Repeatable.")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Use only the first so many batches.")] = None,
    neurons: Annotated[int | None, typer.Option(min=1, help="Analyse at most so many values a layer.")] = None,
    exhaustive: Annotated[bool, typer.Option(help="Exact factors: try every bit.")] = False,
    estimate: Annotated[
        bool, typer.Option(help="Only the factors, to --margin, from as few forwards as that takes.")
    ] = False,
    margin: Annotated[float, typer.Option(help="Half-width of the intervals of --estimate.")] = 0.01,
    validate: Annotated[bool, typer.Option(help="Hold the ranges against injection on the same data.")] = False,
    unseen: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY of batches not analysed: hold the ranges against these too.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="What to judge of what the model returns: a dict key, or a tuple index.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Memory that protection may add, as a share.")] = 0.05,
    decision: Annotated[
        str | None,
        typer.Option(help="How outputs become classes: logits, probabilities, argmax, or a threshold such as 0.3."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the map, tables and figures.")] = Path(
        "flipproof-analysis"
    ),
) -> None:
    """Which errors in which neurons or weights change the class: DeepVigor's ranges and vulnerability factors."""
    net = load_model(model, weights)
    given = list(called(load_object(data)))[:batches]
    if not given:
        raise ConfigError(f"{data} gives no batches")
    method = DeepVigor(factors="exhaustive" if exhaustive else "search", neurons=neurons)
    if of not in ("neurons", "parameters"):
        raise ConfigError(f"--of is neurons or parameters, got {of!r}")
    where = (Neurons if of == "neurons" else Parameters)(include=include or "*", exclude=exclude or ())
    stored = parse_format(format) if format else None
    picked = int(output) if output is not None and output.lstrip("-").isdigit() else output
    rule = parse_decision(decision)
    folder.mkdir(parents=True, exist_ok=True)
    if estimate:
        table = estimate_factors(net, given, where=where, format=stored, output=picked, margin=margin, decision=rule)
        table.to_csv(folder / "factors.csv", index=False)
        _show(table.to_string(index=False, float_format="{:.4g}".format))
        _show(f"These factors speak of {100 * table.attrs['coverage']:.4g} % of the {_WHOLE[of]}.")
        for name, why in table.attrs["left_out"].items():
            _show(f"Left out: {name}: {why}")
        _show(f"Written to {folder}/")
        return
    found = analyze_model(net, given, method, format=stored, where=where, output=picked, decision=rule)
    found.save(folder / "map.safetensors")
    for name in ("layers", "neurons", "bits", "ranges"):
        getattr(found, name).to_csv(folder / f"{name}.csv", index=False)
    save(bit_layer_figure(found), folder / "bits.png")
    outside = pd.DataFrame([*found.left_out.items()], columns=["name", "why"])
    outside.to_csv(folder / "left_out.csv", index=False)
    _show(layer_table(found).to_string(index=False))
    for line in coverage_lines(found):
        _show(line)
    chosen = select_bits(found, budget=budget)
    chosen.table.to_csv(folder / "selected.csv", index=False)
    formats = {name: repr(format) for name, format in chosen.formats().items()}
    (folder / "formats.json").write_text(json.dumps(formats, indent=2) + "\n")
    if len(chosen.table):
        share = chosen.table["bits"].sum() / sum(x.total * x.width for x in found.layers_found)
        last = chosen.table.iloc[-1]
        whose = "critical flips" if found.coverage == 1 else "the critical flips of the analysed layers"
        _show(
            f"{100 * share:.2g} % of the bits of {of} hold {100 * last['covered']:.1f} % of {whose}; to protect them "
            f"takes {100 * last['memory']:.2g} % more memory"
        )
    held = [found.validate(given)] if validate else []
    if unseen is not None:
        held.append(found.validate(list(called(load_object(unseen)))))
    checked = pd.concat(held, ignore_index=True) if held else None
    if checked is not None:
        checked.to_csv(folder / "validation.csv", index=False)
        _show(validation_table(checked).to_string(index=False))
    vulnerability_page(folder / "map.html", found, validation=checked)
    _show(f"Written to {folder}/")


_WHOLE = {"neurons": "multiplications of a forward", "parameters": "bits of the parameters"}


def _show(text: str) -> None:
    out.print(text, markup=False, highlight=False)
