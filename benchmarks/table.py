"""The results of run.py as text: `python benchmarks/table.py FILE.json`."""

import json
import sys
from pathlib import Path
from typing import Any

from peers import CHOLMOD

PHASES = ("analyze", "factorize", "refactorize", "solve", "backward", "step")


def describe(configuration: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in configuration.items())


def milliseconds(record: dict[str, Any], phase: str) -> str:
    return f"{1e3 * record['phases'][phase]['median']:.4g}" if phase in record["phases"] else "-"


def fastest(records: list[dict[str, Any]], phase: str, figure: str) -> tuple[float, str]:
    """Returns the smallest figure, "median" or "min", and whose it is."""
    sound = [record for record in records if phase in record["phases"] and "error" not in record]
    times = [(record["phases"][phase][figure], record["peer"]) for record in sound]
    return min(times, default=(float("nan"), "none"))


def ratios(case: str, records: list[dict[str, Any]]) -> list[str]:
    """Returns one row: the best CHOLMOD's refactorization, the best peer's step, against spcache's."""
    ours = [record for record in records if record["peer"] == "spcache"]
    peers = [record for record in records if record["peer"] != "spcache"]
    row = [case]
    contests = (("refactorize", [record for record in peers if record["peer"] in CHOLMOD]), ("step", peers))
    for phase, rivals in contests:
        (best, name), (mine, _) = fastest(rivals, phase, "median"), fastest(ours, phase, "median")
        quickest = fastest(rivals, phase, "min")[0] / fastest(ours, phase, "min")[0]
        row += [f"{1e3 * best:.4g}", name, f"{1e3 * mine:.4g}", f"{best / mine:.2f}", f"{quickest:.2f}"]
    return row


def align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def show(results: dict[str, Any]) -> str:
    """Returns the table of medians in milliseconds and, below it, the ratios against spcache."""
    records = results["results"]
    rows = [["case", "peer", *PHASES, "residual", "configuration, or what went wrong"]]
    for record in records:
        found = [record["phases"][phase]["configuration"] for phase in ("refactorize", "step") if record["phases"]]
        note = "; step: ".join(dict.fromkeys(map(describe, found)))
        times = [milliseconds(record, phase) for phase in PHASES]
        residual = f"{record['residual']:.0e}" if "residual" in record else "-"
        rows.append([record["case"], record["peer"], *times, residual, record.get("error", note)])
    cases = list(dict.fromkeys(record["case"] for record in records))
    ours = ["by", "spcache's", "ratio", "of minima"]
    heads = ["CHOLMOD's refactorization", *ours, "best peer's step", *ours]
    contests = [["case", *heads]]
    contests += [ratios(case, [record for record in records if record["case"] == case]) for case in cases]
    machine = results["machine"]
    title = f"Medians in milliseconds. {machine['cpu']}, {machine['cores']} cores.\n"
    return "\n\n".join([title + describe(machine["settings"]), align(rows), align(contests)])


if __name__ == "__main__":
    print(show(json.loads(Path(sys.argv[1]).read_text())))
