"""Memory that heals: accuracy while faults add up from inference to inference, with and without scrubbing.

``python -m benchmarks.scrubbing --data-root DATA`` (CIFAR-10, a public `resnet20-*.th`); writes docs/results/scrubbing.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import machine, one_thread
from flipproof.datasets import cifar10
from flipproof.models import load_weights, resnet20
from flipproof.spaces.contract import Faults

BCH, SECDED = fp.BCH(fp.Rounded(fp.Float16(), 11), t=5), fp.SECDED(fp.Rounded(fp.Float32(), 26))
CASES = {
    ("BCH(Rounded(Float16(), 11), t=5)", 1e-3): BCH,
    ("SECDED(Rounded(Float32(), 26))", 1e-3): SECDED,
    ("SECDED(Rounded(Float32(), 26))", 1e-4): SECDED,
}
"""How parameters are stored, and the bit error rate of one step; 32 bits a parameter in all of them."""
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "scrubbing"


def main() -> None:
    """Write one row a step, the table over sequences and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="accuracy after every so many steps")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    where, began = machine(), time.perf_counter()
    batches = cifar10(given.data_root, "test", batch_size=given.images, limit=given.images)
    rows = []
    with one_thread():
        for (name, rate), format in CASES.items():
            model = resnet20()
            load_weights(model, next(given.data_root.glob("**/resnet20-*.th")))
            fp.pack_(model.eval(), {"*": format})
            known: dict[bytes, float] = {}
            for sequence, scrubbed in product(range(given.sequences), (False, True)):
                for found in steps(model, rate, given.steps, sequence, scrubbed=scrubbed):
                    if found["step"] % given.every == 0:
                        found["accuracy"] = accuracy(model, batches[0], known)
                    rows.append({"format": name, "rate": rate, "sequence": sequence, **found})
                print(rows[-1], flush=True)
    table_of_steps = pd.DataFrame(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    table_of_steps.to_csv(given.out / "steps.csv", index=False, float_format="%.6g")
    table = summary(table_of_steps)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in table.itertuples(index=False)]
    minutes = (time.perf_counter() - began) / 60
    (given.out / "table.md").write_text("\n".join([*lines, "", f"*{where}; {minutes:.0f} minutes.*", ""]))
    draw(table_of_steps).savefig(given.out / "accuracy.png", dpi=130, bbox_inches="tight")


def steps(model: nn.Module, rate: float, count: int, sequence: int, *, scrubbed: bool) -> Iterator[dict[str, Any]]:
    """Faults, an inference, and again; with scrubbing, memory is healed after each inference, before the next faults.

    Scrubbed or not, step k of a sequence hits the same bits. Afterwards memory is as it was before.
    """
    space = fp.FaultSpace(model)
    kept = {name: values.clone() for name, values in model.state_dict().items()}
    with ExitStack() as memory:
        # the space puts back the bytes that it hit; where a word was taken for another, scrubbing wrote others too
        memory.callback(model.load_state_dict, kept)
        for step in range(count + 1):
            if step:
                generator = np.random.default_rng((sequence, step))
                positions = np.unique(generator.integers(0, space.bits, generator.binomial(space.bits, rate)))
                memory.enter_context(space.corrupted(Faults(positions)))
            damage = fp.damaged_words(model)
            found = {name: int(damage[name].sum()) for name in ("repairable", "beyond_repair")}
            yield {"scrubbed": scrubbed, "step": step, **found}
            if scrubbed:
                fp.scrub_(model)


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor], known: dict[bytes, float]) -> float:
    """Of the decoded weights; weights that were seen before need no second inference."""
    decoded = fp.unpack_(copy.deepcopy(model))
    digest = hashlib.sha256()
    for parameter in decoded.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    key = digest.digest()
    if key not in known:
        x, y = batch
        known[key] = float((decoded(x).argmax(dim=1) == y).double().mean())
    return known[key]


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and worst accuracy over sequences at some steps, in per cent."""
    last = int(found["step"].max())
    rows = []
    for (name, rate, scrubbed), group in found.groupby(["format", "rate", "scrubbed"], sort=False):
        row: dict[str, object] = {"stored as": f"`{name}`", "faults a bit and step": f"{rate:g}"}
        row["scrubbed"] = "after every inference" if scrubbed else "never"
        for step in sorted(set(group.loc[group["accuracy"].notna(), "step"])):
            accuracy = 100 * group.loc[group["step"] == step, "accuracy"]
            row[f"step {step}"] = f"{accuracy.mean():.1f} ({accuracy.min():.1f})"
        beyond = group.loc[group["step"] == last, "beyond_repair"]
        rows.append({**row, f"words beyond repair at step {last}": f"{beyond.mean():.0f}"})
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame) -> Figure:
    """Accuracy over steps: the mean over sequences, and between the worst and the best."""
    cases = list(found.groupby(["format", "rate"], sort=False))
    figure = Figure(figsize=(4.2 * len(cases), 3.4))
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for ax, ((name, rate), group) in zip(axes, cases, strict=True):
        for scrubbed, colour in ((False, "#b2182b"), (True, "#2166ac")):
            over = 100 * group[(group["scrubbed"] == scrubbed) & group["accuracy"].notna()].groupby("step")[
                "accuracy"
            ].agg(["mean", "min", "max"])
            label = "scrubbed after every inference" if scrubbed else "never scrubbed"
            ax.plot(over.index, over["mean"], color=colour, label=label)
            ax.fill_between(over.index, over["min"], over["max"], color=colour, alpha=0.2, linewidth=0)
        ax.set_title(f"{name}, {rate:g} a bit and step", fontsize=9)
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.3)
        ax.set_xlabel("inferences, each after new faults")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
