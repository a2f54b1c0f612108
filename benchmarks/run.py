"""Measures spcache against its peers: `./dev bench --help`.

Phases apart (analysis, first factorization, refactorization, solve with 1 and with 16 right-hand sides, backward,
whole step), warm, in rounds in which the peers take turns; scaled residuals and gradients are compared in the same
run. Beside them the machine's limits: dgemm and reading memory. Every peer tries its settings (orderings, methods, 1
thread and all) and counts with the best one for each phase; spcache is not tuned, and counts with all threads.
Tables to the terminal, everything to a JSON file, figures of it by plot.py. Peers that are not installed are
reported and left out: pip install -r benchmarks/requirements.txt.
"""

import argparse
import fcntl
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cases import CASES, LARGE, LIKE_ANOTHER, QUICK, RESIDUAL, Case
from limits import limits
from peers import CORES, PEERS
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
GRADIENT = {"float64": 1e-8, "float32": 0.2}  # largest difference from the peers' median, relative to the largest

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
        self.name, self.seconds = name, seconds
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(HERE / "worker.py"), self.name, str(self.seconds)]
        environment = os.environ | PEERS[self.name].environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.commands, self.answers = self.process.stdin, self.process.stdout

    def ask(self, do: str, **arguments: str | bool) -> Record:
        """Returns the worker's answer, or {"error": ...}; never raises for what happens over there. A worker that
        ended is started again, for the next case."""
        try:
            with alone():
                print(json.dumps({"do": do, **arguments}), file=self.commands, flush=True)
                line = self.answers.readline()
                time.sleep(min(SETTLE, self.seconds))
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.start()
        return {"error": f"the worker ended with status {status}"}

    def close(self) -> None:
        with suppress(BrokenPipeError):
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


def measure(case: Case, workers: list[Worker], rounds: int, tune: bool, folder: Path, bar: tqdm) -> list[Record]:
    """Prepares the case in every worker, measures in interleaved rounds, and checks the results of the last."""
    file = folder / "case.pickle"
    file.write_bytes(pickle.dumps(case))
    records = []
    for worker in workers:
        bar.set_description(f"{case.name}: {worker.name}, trying configurations")
        record = {"case": case.name, "peer": worker.name, "kind": case.kind, "n": case.n}
        record |= {"nnz": case.indices.shape[1], "batch": case.batch, "rounds": []}
        records.append(record | worker.ask("prepare", case=str(file), tune=tune))
        bar.update()
    pairs = list(zip(workers, records, strict=True))
    gradients = {}
    for turn in range(rounds):
        for worker, record in pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]:
            bar.set_description(f"{case.name}: {worker.name}, round {turn + 1} of {rounds}")
            if "error" not in record:
                gradient = folder / f"{worker.name}.npy"
                answer = worker.ask("round", gradient=str(gradient) if turn == rounds - 1 else "")
                if "error" in answer:
                    record["error"] = answer["error"]
                else:
                    record["rounds"].append({"contenders": answer["contenders"], "load": os.getloadavg()[0]})
                    record["residual"] = answer["residual"]
                    for contender, facts in zip(record["contenders"], answer["facts"], strict=False):
                        contender["facts"] = facts
                if gradient.exists():
                    gradients[worker.name] = np.load(gradient)
                    gradient.unlink()
            bar.update()
    check(records, gradients)
    for record in records:
        add_phases(record)
    return records


def check(records: list[Record], gradients: dict[str, np.ndarray]) -> None:
    """Adds how far the gradients [contenders, nnz] of each peer are from the median of all peers' in double precision;
    marks the wrong ones."""
    dtypes = {name: str(PEERS[name].dtype).removeprefix("torch.") for name in gradients}
    first = {name: gradient[0] for name, gradient in gradients.items()}
    double = [gradient for name, gradient in first.items() if dtypes[name] == "float64"]
    middle = np.median(double or list(first.values()), axis=0) if first else 0.0
    for record in records:
        name = record["peer"]
        if "error" in record or name not in gradients:
            continue
        difference = float(abs(gradients[name] - middle).max() / abs(middle).max())
        record["gradient_difference"] = difference
        if not (record["residual"] <= RESIDUAL[dtypes[name]] and difference <= GRADIENT[dtypes[name]]):
            record["error"] = f"wrong: residual {record['residual']:.1e}, gradient off by {difference:.1e}"


def add_phases(record: Record) -> None:
    """Adds to each contender the median over rounds and the minimum of each of its phases, and to the record those of
    the fastest contender; of spcache, of its first one: all threads."""
    fastest: Record = {}
    for index, contender in enumerate(record.get("contenders", [])):
        rounds = [answer["contenders"][index] for answer in record["rounds"]]
        contender["phases"] = {
            phase: {
                "median": median(r[phase]["median"] for r in rounds),
                "min": min(r[phase]["min"] for r in rounds),
            }
            for phase in (rounds[0] if rounds else [])
        }
        for phase, found in contender["phases"].items():
            entry = found | {"contender": index}
            tuned = not record["peer"].startswith("spcache")
            if phase not in fastest or (tuned and entry["median"] < fastest[phase]["median"]):
                fastest[phase] = entry
    record["phases"] = fastest


def add_shares(record: Record, limit: dict[str, dict[str, float]]) -> None:
    """Adds to each contender that knows its factor: GF/s of the refactorization, GB/s of the solve (the factor is read
    twice), and which share of the machine's limit on as many threads that is. A factor that stays in the cache may
    exceed the limit of memory; single precision counts with its own bytes, and with twice the dgemm."""
    single = "float32" in record["peer"]
    systems = record.get("batch") or 1
    for contender in record.get("contenders", []):
        facts, phases = contender.get("facts"), contender.get("phases", {})
        peak = limit.get(str(contender["configuration"].get("threads", 1)))
        if not facts or not peak:
            continue
        work = {
            "refactorize": (systems * facts["flops"], peak["dgemm"] * (2 if single else 1)),
            "solve": (systems * 2 * (4 if single else 8) * facts["nnz"], peak["read"]),
        }
        for phase, (amount, most) in work.items():
            if phase in phases:
                rate = amount / phases[phase]["median"] / 1e9
                phases[phase] |= {"rate": rate, "share": rate / most}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CASES if name not in LARGE | LIKE_ANOTHER]
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help=f"default: {', '.join(usual)}")
    parser.add_argument("--large", action="store_true", help=f"also {', '.join(sorted(LARGE))}: many minutes")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=0.25, help="per phase, peer and round (default: 0.25)")
    parser.add_argument("--out", type=Path, help="JSON file for the results (default: build/bench/results.json)")
    parser.add_argument("--figures", type=Path, help="PNG file (default: beside the JSON file; needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="does it run? small cases, no tuning, no file")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.seconds = 1, 0.02
    elif chosen.out is None:
        chosen.out = HERE.parent / "build" / "bench" / "results.json"
    if chosen.out and not chosen.figures:
        chosen.figures = chosen.out.with_suffix(".png")
    chosen.cases = (chosen.cases or (QUICK if chosen.quick else usual)) + [
        name for name in sorted(LARGE) if chosen.large and name not in (chosen.cases or [])
    ]
    return chosen


def present(workers: list[Worker], flags: list[str], results: Record) -> list[Worker]:
    """Returns the workers whose peer is there; the others end, and the results say why."""
    found = []
    for worker in workers:
        needed = PEERS[worker.name].flag
        answer = worker.ask("load") if needed in ("", *flags) else {"absent": f"the processor has no {needed}"}
        if "versions" in answer:
            results["peers"][worker.name] = answer
            found.append(worker)
        else:
            results["absent"][worker.name] = answer.get("absent") or answer["error"]
            worker.close()
    return found


def main() -> int:
    chosen = arguments()
    results: Record = {"machine": machine(), "command": sys.argv[1:], "seconds": chosen.seconds}
    results |= {"peers": {}, "absent": {}, "limits": {}, "results": []}
    flags = results["machine"]["flags"]
    workers = [Worker(name, chosen.seconds) for name in chosen.peers]
    try:
        ready = present(workers, flags, results)
        with tqdm(unit="run") as bar, tempfile.TemporaryDirectory() as folder:
            for name in chosen.cases:
                bar.set_description(f"{name}: limits of the machine")
                with alone():
                    limit = results["limits"][name] = limits(flags, sorted({1, CORES}))
                case = CASES[name]()
                able = [worker for worker in ready if PEERS[worker.name].takes(case)]
                bar.total = bar.n + len(able) * (chosen.rounds + 1)
                records = measure(case, able, chosen.rounds, not chosen.quick, Path(folder), bar)
                for record in records:
                    add_shares(record, limit)
                results["results"] += records
                if chosen.out:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    chosen.out.write_text(json.dumps(results, indent=1))
    finally:
        for worker in workers:
            worker.close()
    print(show(results))
    if chosen.out:
        draw(chosen.out, chosen.figures)
    return any(str(record.get("error", "")).startswith("wrong") for record in results["results"])


def draw(source: Path, picture: Path) -> None:
    """Figures of the results, by plot.py, where matplotlib is there."""
    print(f"\n{source}")
    if find_spec("matplotlib"):
        subprocess.run([sys.executable, str(HERE / "plot.py"), str(source), str(picture)], check=True)
        print(picture)
    else:
        print("no figures: matplotlib is not installed")


if __name__ == "__main__":
    sys.exit(main())
