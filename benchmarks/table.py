"""The results of run.py as text: `python benchmarks/table.py FILE.json...`; several files are one."""

import json
import sys
from pathlib import Path
from typing import Any

from targets import ANYBODY, PHASES, SINGLE, SINGLE_FROM, TARGETS, Target

Record = dict[str, Any]
ALL_PHASES = ("analyze", "factorize", "refactorize", "solve", "solve16", "backward", "step")
OURS, OURS_SINGLE = "spcache", "spcache-float32"
NOTHING = "-"


def describe(configuration: Record) -> str:
    return " ".join(f"{key}={value}" for key, value in configuration.items())


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class Results:
    """The records of one file or of several, by case."""

    def __init__(self, files: list[Record]) -> None:
        self.machine = files[0]["machine"]
        self.records = [record for file in files for record in file["results"]]
        self.cases = list(dict.fromkeys(record["case"] for record in self.records))
        self.absent = {name: reason for file in files for name, reason in file["absent"].items()}
        self.limits = {case: limit for file in files for case, limit in file["limits"].items()}

    def record(self, case: str, peer: str) -> Record | None:
        """Returns the record of a peer that solved the case, and solved it well."""
        for record in self.records:
            if (record["case"], record["peer"]) == (case, peer) and "error" not in record:
                return record
        return None

    def time(self, case: str, phase: str, peer: str = OURS, figure: str = "median") -> float:
        record = self.record(case, peer)
        return record["phases"][phase][figure] if record and phase in record["phases"] else float("nan")

    def best(self, case: str, phase: str, figure: str = "median", target: Target = ANYBODY) -> tuple[float, str]:
        """Returns the smallest time of the peers that count, and whose it is."""
        names = {r["peer"] for r in self.records if r["case"] == case} - {OURS, OURS_SINGLE, target.apart}
        found = [(self.time(case, phase, name, figure), name) for name in names if name.startswith(target.rival)]
        return min(((time, name) for time, name in found if time == time), default=(float("nan"), "nobody"))

    def ratio(self, case: str, phase: str, figure: str = "median") -> float:
        """Returns how many times faster spcache is than the best peer that counts for what is wanted."""
        target = TARGETS.get(case, ANYBODY)
        return self.best(case, phase, figure, target)[0] / self.time(case, phase, figure=figure)


def verdict(value: float, wanted: float | None, unit: str = "×") -> str:
    """Returns the value, and what was wanted of it."""
    if value != value:
        return NOTHING
    scale, digits = (100, ".0f") if unit == "%" else (1, ".2f")
    text = f"{scale * value:{digits}}{unit}"
    if wanted is None:
        return text
    return f"{text} of {scale * wanted:g}: {'yes' if value >= wanted else 'NO'}"


def every_time(results: Results) -> str:
    """Every peer's median of every phase, in its best configuration for it."""
    rows = [["case", "peer", *ALL_PHASES, "residual", "configurations, or what went wrong"]]
    for record in results.records:
        found = record["phases"]
        used: dict[int, list[str]] = {}
        for phase in PHASES:
            if phase in found:
                used.setdefault(found[phase]["contender"], []).append(phase)
        contenders = record.get("contenders", [])
        note = "; ".join(f"{', '.join(p)}: {describe(contenders[i]['configuration'])}" for i, p in used.items())
        if len(used) == 1:
            note = describe(contenders[next(iter(used))]["configuration"])
        times = [milliseconds(found[phase]["median"]) if phase in found else NOTHING for phase in ALL_PHASES]
        residual = f"{record['residual']:.0e}" if record.get("residual") is not None else NOTHING
        rows.append([record["case"], record["peer"], *times, residual, record.get("error", note)])
    return align(rows)


def ratios(results: Results) -> str:
    """How many times faster than the best peer spcache is on all threads, of how many wanted; of minima in brackets."""
    rows = [["case", "n", *PHASES]]
    for case in results.cases:
        target = TARGETS.get(case, ANYBODY)
        record = results.record(case, OURS)
        row = [case, f"{record['n']}" if record else NOTHING]
        for phase in PHASES:
            text = verdict(results.ratio(case, phase), target.ratios.get(phase))
            minima = results.ratio(case, phase, "min")
            name = results.best(case, phase, target=target)[1]
            row.append(text if text == NOTHING else f"{text} ({minima:.2f}), {name}")
        rows.append(row)
    return align(rows)


def own_times(results: Results) -> str:
    """spcache beside the best peer: milliseconds on all threads, on one thread, of the best peer."""
    rows = [["case", *PHASES]]
    for case in results.cases:
        record = results.record(case, OURS)
        row = [case]
        for phase in PHASES:
            times = (
                [c["phases"][phase]["median"] for c in record["contenders"] if phase in c["phases"]] if record else []
            )
            best, name = results.best(case, phase)
            row.append(f"{', '.join(map(milliseconds, times))} | {milliseconds(best)} {name}" if times else NOTHING)
        rows.append(row)
    return align(rows)


def shares(results: Results) -> str:
    """The machine's limits, and which share of them spcache reaches, on all threads and on one."""
    rows = [["case", "threads", "dgemm GF/s", "read GB/s", "refactorize GF/s", "of dgemm", "solve GB/s", "of reading"]]
    for case in results.cases:
        record, target = results.record(case, OURS), TARGETS.get(case, ANYBODY)
        for place, contender in enumerate(record["contenders"] if record else []):
            threads = str(contender["configuration"]["threads"])
            limit = results.limits[case][threads]
            row = [case, threads, f"{limit['dgemm']:.0f}", f"{limit['read']:.0f}"]
            for phase in ("refactorize", "solve"):
                found = contender["phases"].get(phase, {})
                wanted = target.shares.get(phase) if place == 0 else None
                row += [f"{found['rate']:.3g}", verdict(found["share"], wanted, "%")] if "rate" in found else ["-", "-"]
            rows.append(row)
    return align(rows)


def single(results: Results) -> str:
    """Double precision's time / single precision's, of spcache on all threads."""
    rows = [["case", *PHASES]]
    for case in results.cases:
        record = results.record(case, OURS_SINGLE)
        if record and results.record(case, OURS):
            wanted = SINGLE if record["n"] >= SINGLE_FROM else None
            times = [(results.time(case, phase), results.time(case, phase, OURS_SINGLE)) for phase in PHASES]
            rows.append([case, *(verdict(double / half, wanted) for double, half in times)])
    return align(rows) if len(rows) > 1 else "not measured"


def show(*files: Record) -> str:
    results = Results(list(files))
    machine = results.machine
    head = [
        f"{machine['cpu']}, {machine['cores']} cores. Times are medians in milliseconds. The load was "
        f"{machine['load'][0]:.1f} when it began: peers with OpenMP suffer most where something else runs.",
        describe(machine["settings"]),
        *(f"left out: {name}, {reason}" for name, reason in results.absent.items()),
    ]
    parts = ["\n".join(head)]
    for table in (every_time, own_times, shares, single, ratios):
        title = " ".join((table.__doc__ or "").split())
        parts.append(f"== {title}\n{table(results)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(show(*(json.loads(Path(name).read_text()) for name in sys.argv[1:])))
