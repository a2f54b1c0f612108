"""Measures spcache against its peers: `./dev bench --help`.

Phases apart (analyze, first factorization, refactorize, solve, backward, whole step), warm, in rounds in
which the peers take turns; scaled residuals and gradients are compared in the same run. A table to the
terminal, JSON to --out. Peers: pip install -r benchmarks/requirements.txt.
"""

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cases import CASES, GENERAL, QUICK
from peers import PEERS
from table import show
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LOCK = Path(tempfile.gettempdir()) / "spcache-benchmark.lock"
SETTINGS = (
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "MKL_NUM_THREADS",
    "LD_LIBRARY_PATH",
)
SETTLE = 0.3  # seconds until the idle threads of the previous worker's OpenMP and BLAS have stopped spinning
RESIDUAL = 1e-13  # scaled, allowed
GRADIENT = 1e-8  # largest difference between peers, relative to the largest gradient

Record = dict[str, Any]


@contextmanager
def alone() -> Iterator[None]:
    """Keeps other benchmarks on this machine waiting."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Worker:
    """A process that measures one peer whenever it is asked, and otherwise waits."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        command = [sys.executable, str(HERE / "worker.py"), name, str(seconds)]
        environment = PEERS[name].environment | os.environ
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.commands, self.answers = self.process.stdin, self.process.stdout

    def ask(self, do: str, **arguments: str) -> Record:
        """Returns the worker's answer, or {"error": ...}; never raises for what happens over there."""
        try:
            with alone():
                print(json.dumps({"do": do, **arguments}), file=self.commands, flush=True)
                line = self.answers.readline()
                time.sleep(SETTLE)
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"the worker ended with status {self.process.wait()}"}

    def close(self) -> None:
        self.commands.close()
        self.process.wait()


def machine() -> Record:
    """Returns what the numbers depend on besides the code."""
    try:
        info = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        info = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": [flag for flag in flags if flag.startswith(("avx", "fma", "sse4"))],
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "settings": {name: os.environ.get(name, "default") for name in SETTINGS},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def able(case: str, workers: list[Worker]) -> list[Worker]:
    """Returns the workers whose peer solves systems of this kind."""
    kind = "general" if case in GENERAL else "spd"
    return [worker for worker in workers if kind in PEERS[worker.name].kinds]


def measure(case: str, workers: list[Worker], rounds: int, bar: tqdm) -> list[Record]:
    """Prepares the case in every worker, measures in interleaved rounds, then checks the results."""
    records = []
    for worker in workers:
        bar.set_description(f"{case}: {worker.name}, trying configurations")
        records.append({"case": case, "peer": worker.name, "rounds": [], **worker.ask("prepare", case=case)})
        bar.update()
    pairs = list(zip(workers, records, strict=True))
    for turn in range(rounds):
        for worker, record in pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]:
            bar.set_description(f"{case}: {worker.name}, round {turn + 1} of {rounds}")
            if "error" not in record:
                answer = worker.ask("round")
                if "error" in answer:
                    record["error"] = answer["error"]
                else:
                    record["rounds"].append(answer | {"load": os.getloadavg()[0]})
            bar.update()
    with tempfile.TemporaryDirectory() as folder:
        check(pairs, Path(folder))
    for record in records:
        record["phases"] = phases(record)
    return records


def phases(record: Record) -> Record:
    """Returns median over rounds and minimum of each phase, of the contender with the smallest median."""
    best: Record = {}
    for index, configuration in enumerate(record.get("configurations", [])):
        rounds = [answer["contenders"][index] for answer in record["rounds"]]
        for phase in rounds[0] if rounds else []:
            found = {
                "median": median(r[phase]["median"] for r in rounds),
                "min": min(r[phase]["min"] for r in rounds),
                "configuration": configuration,
            }
            best[phase] = min(best.get(phase, found), found, key=lambda entry: entry["median"])
    return best


def check(pairs: list[tuple[Worker, Record]], folder: Path) -> None:
    """Adds each residual, and how far each gradient is from the median of all; marks the wrong ones."""
    gradients = {}
    for worker, record in pairs:
        if "error" in record:
            continue
        path = folder / f"{worker.name}.npy"
        record |= worker.ask("check", gradient=str(path))
        if path.exists():
            gradients[worker.name] = np.load(path)
    if not gradients:
        return
    middle = np.median(list(gradients.values()), axis=0)
    for worker, record in pairs:
        if "error" in record or worker.name not in gradients:
            continue
        difference = abs(gradients[worker.name] - middle).max() / abs(middle).max()
        record["gradient_difference"] = float(difference)
        if not (record["residual"] <= RESIDUAL and difference <= GRADIENT):
            record["error"] = f"wrong: residual {record['residual']:.1e}, gradient off by {difference:.1e}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=None, choices=list(CASES), help="default: all")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=0.6, help="per phase, peer and round (default: 0.6)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="small cases, one short round: does it run?")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.seconds = 1, 0.05
    chosen.cases = chosen.cases or (QUICK if chosen.quick else list(CASES))
    return chosen


def main() -> int:
    chosen = arguments()
    workers = [Worker(name, chosen.seconds) for name in chosen.peers]
    results: Record = {"machine": machine(), "command": sys.argv[1:], "results": []}
    try:
        runs = sum(len(able(case, workers)) for case in chosen.cases) * (chosen.rounds + 1)
        with tqdm(total=runs, unit="run") as bar:
            for case in chosen.cases:
                results["results"] += measure(case, able(case, workers), chosen.rounds, bar)
                if chosen.out:
                    chosen.out.write_text(json.dumps(results, indent=1))
    finally:
        for worker in workers:
            worker.close()
    print(show(results))
    return any(str(record.get("error", "")).startswith("wrong") for record in results["results"])


if __name__ == "__main__":
    sys.exit(main())
