"""What the ranges of a vulnerability map promise, on the inputs they were made from and on others: `make ranges`.

The perceptrons and LeNet-5 of `flipproof reproduce deepvigor`, with few and with more analysed images. Each flip is
judged by the range of its image's class, and by the range over all classes; intervals are over images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.reproduce.deepvigor import _trained, studies
from flipproof.reproduce.published import write_table

NETWORKS = ("MLP-relu-mnist", "MLP-sigmoid-mnist", "LeNet-mnist")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranges", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("docs/results/deepvigor"))
    parser.add_argument("--images", type=int, nargs="+", default=[32, 256], help="images analysed; also unseen ones")
    parser.add_argument("--neurons", type=int, default=40, help="random neurons a layer")
    parser.add_argument("--injections", type=int, default=4000, help="a layer")
    given = parser.parse_args()
    tables = []
    for study in (s for s in studies("smoke") if s.name in NETWORKS):
        net = _trained(study, given.data_root)
        unseen = study.images(given.data_root, "test", limit=max(given.images), batch_size=64)
        for images in given.images:
            seen = study.images(given.data_root, "train", limit=images, batch_size=64)
            found = analyze(net, seen, DeepVigor(neurons=given.neurons, holes=0))
            for data in (seen, unseen):
                held = found.validate(data, injections=given.injections)
                tables.append(held.assign(network=study.name, images=images))
                print(tables[-1].to_string(), flush=True)
    every = pd.concat(tables, ignore_index=True)
    every.to_csv(given.out / "by-class.csv", index=False)
    rows = []
    for (network, images, data), part in every.groupby(["network", "images", "data"], sort=False):
        for prefix, judged in (("", "by class"), ("overall_", "by the range over all classes")):
            row = {"network": network, "analysed images": images, "held against": data, "judged": judged}
            for name, verdict in (("true_non_critical", "non_vulnerable"), ("true_critical", "vulnerable")):
                lowest = part.loc[part[f"{prefix}{name}_low"].idxmin()]
                value, low, high = (100 * lowest[f"{prefix}{name}{end}"] for end in ("", "_low", "_high"))
                row[f"{name}, lowest layer, %"] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
                row[f"called {verdict}, %"] = (
                    f"{100 * part[f'{prefix}called_{verdict}'].sum() / part['injections'].sum():.2f}"
                )
            critical = part["critical"].sum() / part["injections"].sum()
            rows.append({**row, "critical, %": f"{100 * critical:.2f}"})
    title = f"Ranges held against injection: {given.neurons} neurons a layer, {given.injections:,} flips a layer"
    write_table(pd.DataFrame(rows), given.out / "by-class", title=title)
    every.to_csv(given.out / "by-class.csv", index=False)


if __name__ == "__main__":
    main()
