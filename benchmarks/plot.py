"""Draws what run.py measured: `python benchmarks/plot.py FILE.json... PICTURE.png`. Needs matplotlib."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from table import OURS, Results
from targets import ANYBODY, PHASES, TARGETS


def draw_times(axis: Any, results: Results, phase: str) -> None:
    """Every peer's times; several variants of one library are one line, the fastest."""
    names = dict.fromkeys(r["peer"] for r in results.records if r["peer"] != "spcache-float32")
    for peer in [name for name in names if not name.endswith("-avx512")]:
        times = []
        for case in results.cases:
            variants = [results.time(case, phase, name) for name in names if name in (peer, f"{peer}-avx512")]
            times.append(min((time for time in variants if time == time), default=float("nan")))
        style = {"marker": "o", "linewidth": 2.5} if peer == OURS else {"marker": ".", "linewidth": 1}
        axis.plot([1e3 * time for time in times], label=peer, **style)
    axis.set(title=f"{phase}, milliseconds", yscale="log")


def draw_ratios(axis: Any, results: Results) -> None:
    """spcache against the best peer, with what is wanted as a line above each bar."""
    width = 0.8 / len(PHASES)
    for place, phase in enumerate(PHASES):
        centres = [index + (place - 1.5) * width for index in range(len(results.cases))]
        heights = [results.ratio(case, phase) for case in results.cases]
        axis.bar(centres, heights, width, label=phase)
        wanted = [TARGETS.get(case, ANYBODY).ratios.get(phase, float("nan")) for case in results.cases]
        axis.hlines(wanted, [x - width / 2 for x in centres], [x + width / 2 for x in centres], color="black")
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(title="best peer / spcache (black: wanted)", yscale="log")


def draw_shares(axis: Any, results: Results) -> None:
    """Which share of the machine's limits spcache reaches on all threads."""
    for place, (phase, limit) in enumerate((("refactorize", "dgemm"), ("solve", "reading memory"))):
        records = [results.record(case, OURS) for case in results.cases]
        found = [r["contenders"][0]["phases"].get(phase, {}) if r else {} for r in records]
        heights = [100 * entry.get("share", float("nan")) for entry in found]
        axis.bar([i + 0.4 * place - 0.2 for i in range(len(records))], heights, 0.4, label=f"{phase} of {limit}")
    axis.set(title="share of the limit, %")


def main(*names: str) -> None:
    *sources, picture = names
    results = Results([json.loads(Path(source).read_text()) for source in sources])
    figure, axes = plt.subplots(3, 2, figsize=(15, 16), layout="constrained")
    for axis, phase in zip(axes.flat, PHASES, strict=False):
        draw_times(axis, results, phase)
    draw_ratios(axes[2, 0], results)
    draw_shares(axes[2, 1], results)
    for axis in axes.flat:
        axis.set_xticks(range(len(results.cases)), results.cases, rotation=60, ha="right")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
