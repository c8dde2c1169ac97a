"""`flipproof assess`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flipproof._fields import read_json
from flipproof.campaigns.assessment import Assessment
from flipproof.cli.console import out
from flipproof.config import CampaignConfig, read_toml
from flipproof.errors import ConfigError
from flipproof.reports.figures import metric_figure, outcome_figure, save
from flipproof.reports.tables import findings
from flipproof.reports.terminal import summary_table
from flipproof.running.scales import METRIC_NAMES


def assess(
    model: Annotated[
        str | None,
        typer.Argument(help="MODULE:FACTORY or FILE.py:FACTORY of the model, e.g. `torchvision.models:resnet18`."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="MODULE:FACTORY or FILE.py:FACTORY that gives batches (inputs, targets), e.g. a DataLoader."),
    ] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            help="`BitErrorRate([1e-6, 1e-5])`, `BitPosition(range(32))`, `RandomBits(1)`, `StuckAt(1e-5, value=1)`."
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="How parameters are stored: `Float16`, `Affine(bits=4)`; or PATTERN=FORMAT, repeated, first match "
            "wins; or the formats.json that `analyze` writes. Default: each parameter's own float type."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="State dict to load: .safetensors, or .pt/.pth (never unpickled).")
    ] = None,
    hardened: Annotated[
        str | None, typer.Option(help="What `flipproof harden` wrote for this model: its bounds and weights.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Parameters that can be hit: glob or module name. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Parameters that cannot; wins over --include. Repeatable.")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option(help="Only weight, bias, norm, buffer or other. Repeatable.")
    ] = None,
    buffers: Annotated[bool | None, typer.Option(help="Also hit buffers such as BatchNorm statistics.")] = None,
    neurons: Annotated[
        bool | None,
        typer.Option(help="Hit outputs of layers, one upset a sample; --include and --exclude name layers then."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials a point (the ceiling, with --margin). [100]")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METRIC_NAMES)}, or MODULE:FUNCTION. Repeatable. [accuracy]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws. [0]")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes, one torch thread each. [1]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: where the model is.")] = None,
    margin: Annotated[
        float | None, typer.Option(help="Stop a point once its interval is within ± this fraction.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of all intervals. [0.95]")] = None,
    output: Annotated[
        str | None,
        typer.Option(help="What to judge if the model returns more: tuple index, dict key, MODULE:FUNCTION."),
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(help="How outputs become classes: logits, probabilities, argmax, or a threshold such as 0.3."),
    ] = None,
    cache_bytes: Annotated[
        int | None,
        typer.Option(help="Memory for golden activations; 0 runs every trial whole. Default: the model's size."),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option("--out", help="Folder for journal, tables, figures, campaign.toml. [flipproof-results]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="campaign.toml with the same options; the command line wins.")
    ] = None,
) -> None:
    """Run a fault-injection campaign on any model, without changing it.

    The journal is OUT/journal.jsonl: interrupt with Ctrl-C and run the same command again to resume. OUT/campaign.toml
    holds the effective options: `flipproof assess --config OUT/campaign.toml` repeats the run.

    Example: `flipproof assess flipproof.demo:trained_digits_cnn --data flipproof.datasets:digits
    --faults "BitErrorRate([1e-5, 1e-4])" --format Float16`
    """
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "faults": faults,
        "format": _formats(format),
        "weights": weights,
        "hardened": hardened,
        "include": include,
        "exclude": exclude,
        "kinds": kinds,
        "buffers": buffers,
        "neurons": neurons,
        "trials": trials,
        "metrics": metrics,
        "seed": seed,
        "workers": workers,
        "device": device,
        "margin": margin,
        "confidence": confidence,
        "output": output,
        "decision": decision,
        "cache_bytes": cache_bytes,
        "out": folder,
    }
    from_file = read_toml(config) if config else {}
    effective = from_file | {name: value for name, value in given.items() if value is not None and value != []}
    source = "command line" if config is None else f"{config} and command line"
    campaign = CampaignConfig.from_mapping(effective, source=source)
    result = campaign.run()
    results = Path(campaign.out)
    _print(result)
    if len(result.header.points) > 1:
        save(metric_figure({campaign.model: result}), results / "metric.png")
        save(outcome_figure(result), results / "outcomes.png")
    written = f"Written to {results}/: journal.jsonl, trials.csv, summary.csv, campaign.toml"
    out.print(written + _figures(results), markup=False)


def _formats(given: list[str] | None) -> str | dict[str, str] | None:
    if not given:
        return None
    if len(given) == 1 and given[0].endswith(".json"):
        return _formats_of(Path(given[0]))
    pairs = [_pattern_of(text) for text in given]
    if len(pairs) == 1 and pairs[0][0] is None:
        return pairs[0][1]
    if any(pattern is None for pattern, _ in pairs):
        raise ConfigError(f"--format is either one format or PATTERN=FORMAT each time, got {given}")
    return {str(pattern): text for pattern, text in pairs}


def _formats_of(path: Path) -> dict[str, str]:
    """What `analyze` writes: {pattern: format}."""
    try:
        found = read_json(path.read_text(encoding="utf-8"), f"--format {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--format {path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f'--format {path}: expected {{"pattern": "format", …}}')
    return found


def _pattern_of(text: str) -> tuple[str | None, str]:
    """`fc*=Affine(bits=4)` has a pattern; the `=` inside `Affine(bits=4)` is none."""
    head, equals, tail = text.partition("=")
    return (head, tail) if equals and "(" not in head else (None, text)


def _print(result: Assessment) -> None:
    header = result.header
    stored = header.stored
    formats = ", ".join(sorted({site.format for site in stored}))
    out.print(
        f"{len(stored)} tensors stored as {formats}: {result.bits:,} bits can be hit", markup=False, highlight=False
    )
    if header.left_out:
        left_out = header.left_out
        shown = ", ".join(list(left_out)[:6]) + (" …" if len(left_out) > 6 else "")
        out.print(f"{len(left_out)} tensors outside the fault space: {shown}", markup=False, highlight=False)
    out.print(summary_table(result))
    for sentence in findings(result):
        out.print(f"  • {sentence}", markup=False, highlight=False)


def _figures(folder: Path) -> str:
    return "".join(f", {name}" for name in ("metric.png", "outcomes.png") if (folder / name).exists())
