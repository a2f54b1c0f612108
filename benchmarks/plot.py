"""Draws what run.py measured: `python benchmarks/plot.py FILE.json PICTURE.png`. Needs matplotlib."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(source: str, picture: str) -> None:
    records = [r for r in json.loads(Path(source).read_text())["results"] if "error" not in r]
    cases = list(dict.fromkeys(record["case"] for record in records))
    peers = list(dict.fromkeys(record["peer"] for record in records))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, phase in zip(axes, ("refactorize", "step"), strict=True):
        for peer in peers:
            own = [record for record in records if record["peer"] == peer]
            times = [1e3 * record["phases"][phase]["median"] for record in own]
            style = {"marker": "o", "linewidth": 2.5} if peer == "spcache" else {"marker": ".", "linewidth": 1}
            axis.plot([cases.index(record["case"]) for record in own], times, label=peer, **style)
        axis.set(title=f"{phase}, milliseconds", yscale="log")
        axis.set_xticks(range(len(cases)), cases, rotation=60, ha="right")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
