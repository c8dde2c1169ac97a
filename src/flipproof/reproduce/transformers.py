"""Three transformers under faults: in their weights, in every kind of value that they compute, in the KV cache.

    python -m flipproof.reproduce.transformers --data-root DATA --out docs/results/transformers

trains what the cache does not have (a BERT on SST-2 and a vision transformer on CIFAR-10, each some minutes of one
core; the GPT on tinyshakespeare is that of `protection_networks`), then writes four tables. All is drawn from seed 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.campaigns.assess import assess
from flipproof.campaigns.statistics import wilson_interval
from flipproof.datasets import cifar10
from flipproof.datasets.text import PADDING, sst2
from flipproof.errors import ConfigError, FaultSpaceError
from flipproof.faults import BitErrorRate, RandomBits
from flipproof.models import Greedy, small_vit
from flipproof.models.gpt import GPT
from flipproof.models.training import cached, seeded, shifted_and_flipped, train_onecycle
from flipproof.reproduce import protection_networks
from flipproof.reproduce.published import write_table
from flipproof.running.tasks import Generation, Task, Tokens
from flipproof.spaces import Cache, Neurons
from flipproof.spaces.cache import PHASES
from flipproof.spaces.sites import NEURON_KINDS, NeuronKind

Batches = list[tuple[Any, Tensor]]

SAMPLES, BATCH = 2000, 250
TEXTS = 500
"""Prompts that a cache is hit for: the first so many windows."""
WORDS, LENGTH = 5000, 32
PROMPT, WRITTEN = 32, 16
"""Characters of a prompt, and characters that are written behind it."""

TRIALS = 10
RATES = (1e-7, 1e-6, 1e-5, 1e-4)
CACHE_RATES = (1e-5, 1e-4, 1e-3)


NOTES = """
```sh
python -m flipproof.reproduce.transformers --data-root DATA --out docs/results/transformers
```

Made on {date} with torch {torch}, seed 0, float32, on {samples:,} held-out samples. {about}
"""


@dataclass(frozen=True)
class Network:
    """A trained transformer and what it is judged on.

    Attributes:
        model: in eval mode.
        test: held-out batches.
        output: what is judged of what it gives.
        data: their name.
        recipe: how it was trained, in words.
        task: what it is for; a classification by default.
    """

    model: nn.Module
    test: Batches
    output: Callable[[Any], Tensor] | str | None
    data: str
    recipe: str
    task: Task | None = None


def gpt(root: Path) -> Network:
    """The small GPT on tinyshakespeare; a sample is a window of characters and the one that follows."""
    found = protection_networks.trained("gpt", root, samples=SAMPLES)
    return Network(found.model, found.test, None, "tinyshakespeare", protection_networks.NETWORKS["gpt"].recipe)


class Reading(nn.Module):
    """A GPT that reads: at each character, the logits of the one that follows."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 tokens (N, T) to logits (N, T, vocabulary)."""
        return self.model.all_positions(tokens)


def reading(network: Network) -> Network:
    """The same GPT, judged at every character of its windows: what perplexity is of."""
    assert isinstance(network.model, GPT)
    test: Batches = [(tokens, torch.cat([tokens[:, 1:], targets[:, None]], dim=1)) for tokens, targets in network.test]
    return replace(network, model=Reading(network.model).eval(), test=test, task=Tokens())


def bert(root: Path) -> Network:
    """A small BERT of Hugging Face's library on SST-2.

    Its held-out samples are the sentences of the development set and, for there are only 872, parts of sentences from
    the end of the training set, which may be parts of sentences that it has seen.
    """
    train, dev = sst2(root, words=WORDS, length=LENGTH)
    ids, labels = (torch.cat(part) for part in zip(*train, strict=True))
    held, answers = (torch.cat(part) for part in zip(*dev, strict=True))
    more = SAMPLES - len(held)
    model = cached("transformers-bert-1", seeded(_small_bert), partial(_train_bert, ids[:-more], labels[:-more]))
    inputs = torch.cat([held, ids[-more:]])
    batches: Batches = [
        (_masked(part), answer)
        for part, answer in zip(
            torch.split(inputs, BATCH), torch.split(torch.cat([answers, labels[-more:]]), BATCH), strict=True
        )
    ]
    return Network(model, batches, "logits", "SST-2", "AdamW, one cycle up to 0.001, decay 0.05, 4 epochs of 66,221")


def vit(root: Path) -> Network:
    """The small vision transformer on CIFAR-10."""

    def train(model: nn.Module) -> nn.Module:
        images, classes = (torch.cat(part) for part in zip(*cifar10(root, "train"), strict=True))
        return train_onecycle(
            model, images, classes, epochs=3, batch_size=64, lr=2e-3, weight_decay=0.05, augment=shifted_and_flipped
        )

    model = cached("transformers-vit-1", seeded(partial(small_vit, image=32, channels=3)), train)
    test: Batches = list(cifar10(root, batch_size=BATCH, limit=SAMPLES))
    recipe = "AdamW, one cycle up to 0.002, decay 0.05, 3 epochs of 50,000, moved by up to 4 pixels and mirrored"
    return Network(model, test, None, "CIFAR-10", recipe)


NETWORKS: dict[str, Callable[[Path], Network]] = {"gpt": gpt, "bert": bert, "vit": vit}


def _small_bert() -> nn.Module:
    try:
        library = import_module("transformers")
    except ImportError as error:
        raise ConfigError("the BERT is one of Hugging Face's: pip install flipproof[hf]") from error
    config = library.BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    model: nn.Module = library.BertForSequenceClassification(config)
    return model


def _masked(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


def _train_bert(ids: Tensor, labels: Tensor, model: nn.Module) -> nn.Module:
    def logits(batch: Tensor) -> Tensor:
        found: Tensor = model(**_masked(batch)).logits
        return found

    return train_onecycle(model, ids, labels, epochs=4, batch_size=64, lr=1e-3, weight_decay=0.05, outputs=logits)


def clean(name: str, network: Network) -> dict[str, object]:
    """A row: the network without faults."""
    found = assess(network.model, network.test, faults=RandomBits(0), output=network.output)
    right = round(found.golden["accuracy"] * SAMPLES)
    low, high = wilson_interval(right, SAMPLES)
    return {
        "network": name,
        "data": network.data,
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
        "accuracy": right / SAMPLES,
        "low": low,
        "high": high,
        "trained_by": network.recipe,
    }


def weights(name: str, network: Network, trials: int, journals: Path | None = None) -> pd.DataFrame:
    """Faults in the stored weights: a row a bit error rate, and one without."""
    judged = reading(network) if name == "gpt" else network
    found = assess(
        judged.model, judged.test, faults=BitErrorRate(RATES), trials=trials, output=judged.output, task=judged.task,
        journal=_journal(journals, name, "weights"),
    )  # fmt: skip
    metrics = [column for metric in found.metrics for column in _with_bounds(metric)]
    table = found.summary[["ber", "flips", *metrics, "due"]]
    golden = pd.DataFrame([{"ber": 0.0, "flips": 0.0, "due": 0.0} | found.golden])
    table = pd.concat([golden, table], ignore_index=True)[table.columns]
    return table.assign(network=name)[["network", *table.columns]]


def values(
    name: str,
    network: Network,
    trials: int,
    journals: Path | None = None,
    kinds: Sequence[NeuronKind] = NEURON_KINDS,
) -> pd.DataFrame:
    """Single upsets in what is computed: a row a kind of values that the network has."""
    rows = []
    for kind in kinds:
        try:
            found = assess(
                network.model, network.test, faults=RandomBits(1), where=Neurons(kinds=kind),
                trials=trials, output=network.output, journal=_journal(journals, name, kind),
            )  # fmt: skip
        except FaultSpaceError:  # the network has no such values
            continue
        row = found.summary.iloc[0]
        sites = len(found.header.stored)
        rows.append(
            {"network": name, "kind": kind, "sites": sites, "bits": found.bits}
            | {column: row[column] for column in (*_with_bounds("critical_total"), "critical_sdc", "due", "masked")}
        )
    return pd.DataFrame(rows)


def cache(network: Network, trials: int, journals: Path | None = None) -> pd.DataFrame:
    """Faults in the KV cache of the GPT while it writes: a row a phase and bit error rate."""
    assert isinstance(network.model, GPT)
    writer = Greedy(network.model, WRITTEN)
    prompts: list[Any] = [(tokens[:, :PROMPT], None) for tokens, _ in network.test[: TEXTS // BATCH]]
    tables = []
    for phase in PHASES:
        found = assess(
            writer, prompts, faults=BitErrorRate(CACHE_RATES), where=Cache(phase), trials=trials, output=written,
            task=Generation(longest=WRITTEN), journal=_journal(journals, "gpt", phase),
        )  # fmt: skip
        columns = ["ber", "flips", *_with_bounds("unchanged")]
        tables.append(found.summary[columns].assign(phase=phase, bits=found.bits))
    table = pd.concat(tables, ignore_index=True)
    return table[["phase", "bits", *[name for name in table.columns if name not in ("phase", "bits")]]]


def _journal(folder: Path | None, network: str, what: str) -> Path | None:
    """Where a campaign's trials are written, to be gone on with."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{network}-{what}.jsonl"


def written(logits: Tensor) -> Tensor:
    """The characters that are written, of their logits (samples, characters, vocabulary)."""
    return logits.argmax(dim=2)


def _with_bounds(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def write_page(tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Write each table as CSV and Markdown, with the command and what it says.

    Args:
        tables: "networks", "weights", "values" and "cache", as far as they were measured.
        out: the folder.
    """
    for name, table in tables.items():
        path = out / name
        write_table(table, path, title=ABOUT[name][0])
        page = path.with_suffix(".md")
        samples = TEXTS if name == "cache" else SAMPLES
        notes = NOTES.format(
            date=date.today().isoformat(), torch=torch.__version__, samples=samples, about=ABOUT[name][1]
        )
        page.write_text(page.read_text(encoding="utf-8") + notes, encoding="utf-8")


ABOUT = {
    "networks": (
        "Three small transformers, without faults",
        "`low` and `high` are 95 % Wilson intervals. The GPT is asked for the character that follows 64.",
    ),
    "weights": (
        "Three small transformers with faults in their weights",
        "`_low` and `_high` are 95 % intervals over trials. The GPT reads windows of 64 characters and is judged at "
        "each of them (`fp.Tokens()`). `due`: samples that answered NaN.",
    ),
    "values": (
        "Single upsets in what transformers compute, kind by kind",
        "One bit of one value of this kind is flipped in each sample; a trial's samples share a site, drawn in "
        "proportion to its bits. `bits` are those of the kind for one sample; `_low` and `_high` are 95 % intervals "
        "over trials.",
    ),
    "cache": (
        "Faults in the KV cache of a GPT that writes",
        f"It reads {PROMPT} characters and writes {WRITTEN}, each the most likely one. `unchanged`: texts that are as "
        "without faults (`fp.Generation()`). `bits` are those of one sequence; `_low` and `_high` are 95 % intervals "
        "over trials.",
    ),
}


def main() -> None:
    """Train what is missing, measure, write the tables."""
    parser = argparse.ArgumentParser(description="Transformers under faults.")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("results/transformers"))
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each point")
    parser.add_argument("--journals", type=Path, help="a folder for the trials, which are then not done again")
    parser.add_argument("--network", choices=sorted(NETWORKS), action="append", help="only this one; may be repeated")
    chosen = parser.parse_args()
    rows: list[dict[str, object]] = []
    found: dict[str, list[pd.DataFrame]] = {"weights": [], "values": [], "cache": []}
    for name in chosen.network or NETWORKS:
        network = NETWORKS[name](chosen.data_root)
        rows.append(clean(name, network))
        found["weights"].append(weights(name, network, chosen.trials, chosen.journals))
        found["values"].append(values(name, network, chosen.trials, chosen.journals))
        if name == "gpt":
            found["cache"].append(cache(network, chosen.trials, chosen.journals))
        tables = {"networks": pd.DataFrame(rows)} | {
            table: pd.concat(parts, ignore_index=True) for table, parts in found.items() if parts
        }
        write_page(tables, chosen.out)
        print(tables["values"].to_string(index=False))


if __name__ == "__main__":
    main()
