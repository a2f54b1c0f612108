"""One peer in a process of its own, commanded over pipes: one JSON object a line in, one out.

`run.py` starts one worker per peer, because thread settings and the libraries they reach differ, and speaks
to one at a time. Commands: {"do": "load"}, {"do": "prepare", "case": FILE, "tune": true or false},
{"do": "round", "gradient": FILE or ""}.
"""

import gc
import importlib
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cases import LARGE, RESIDUAL, Case
from peers import PEERS, Configuration, Peer, make

Times = dict[str, list[float]]
STEPS = 4  # different sets of values, used in turn
CONTESTED = ("refactorize", "solve", "solve16", "step")  # phases in which configurations compete
HOPELESS = 1.5  # a configuration this many times slower in its first trial gets no second
TIE = 1.1  # one that is within this factor of the fastest is measured as well


def repeat(run: Callable[[], Times], seconds: float, least: int, most: int = 10_000) -> Times:
    """Runs for a fifth of `seconds` to warm up, then for about `seconds`; returns all times of each phase.

    After the collection of garbage come the warm-up and the runs that count, without a pause: caches, page tables and
    threads that wait for work are as they are in a loop.
    """
    times: Times = {}
    gc.collect()
    gc.disable()
    try:
        warm = time.perf_counter() + seconds / 5
        run()
        while time.perf_counter() < warm:
            run()
        end = time.perf_counter() + seconds
        for done in count():
            if done >= most or (done >= least and time.perf_counter() > end):
                break
            for phase, taken in run().items():
                times.setdefault(phase, []).extend(taken)
    finally:
        gc.enable()
    return times


class Session:
    """A peer, the case it is prepared for, and its contenders: configurations, and the phases each is fastest in."""

    def __init__(self, name: str, seconds: float) -> None:
        self.kind = PEERS[name]
        if self.kind.torch_threads:
            torch.set_num_threads(self.kind.torch_threads)
        self.seconds = seconds
        self.contenders: list[tuple[Configuration, list[str]]] = []
        self.peer: Peer | None = None

    def load(self) -> dict[str, Any]:
        """Imports the peer; where it is not installed, this is the answer."""
        try:
            self.kind.load()
        except ImportError as error:
            return {"absent": f"{type(error).__name__}: {error}"}
        gc.freeze()  # else every collection goes through all that was imported: 0.1 s
        return {"versions": versions(self.kind), "environment": self.kind.environment}

    # ---- the case in memory ----

    def open(self) -> Peer:
        """Returns the peer of the case, made anew where it was let go."""
        if self.peer is None:
            self.case: Case = pickle.loads(self.file.read_bytes())
            self.peer = make(self.kind, self.case)
            convert = lambda array: torch.from_numpy(array).to(self.kind.dtype)  # noqa: E731
            self.values = [convert(self.case.values(step)) for step in range(STEPS)]
            self.b, self.w, self.many = map(convert, (self.case.b, self.case.w, self.case.columns()))
            if self.kind.columns:
                self.many = self.many.T.contiguous().T
            self.turn = count()
        return self.peer

    def close(self) -> None:
        """Lets go of the memory of a case."""
        self.peer = None
        for name in ("case", "values", "b", "w", "many"):
            self.__dict__.pop(name, None)
        gc.collect()

    # ---- commands ----

    def prepare(self, case: str, tune: bool) -> dict[str, Any]:
        """Opens the case, tries every configuration and keeps the fastest for each phase; or takes the first."""
        self.close()
        self.file = Path(case)
        peer = self.open()
        configurations = list(peer.configurations())
        self.contenders = self.choose(configurations if tune else configurations[:1])
        self.rest()
        return {"contenders": [{"configuration": each} for each, _ in self.contenders], "pools": pools()}

    def round(self, gradient: str) -> dict[str, Any]:
        """Measures every contender in its phases; the parent asks for several rounds, the peers in turn.

        If there is a file to save the gradients in [contenders, nnz], returns also the largest scaled residual, and
        what each contender knows of its factor.
        """
        peer = self.open()
        rounds, residuals, gradients, facts = [], [], [], []
        for configuration, phases in self.contenders:
            rounds.append(summary(self.measure(configuration, phases)))
            if gradient:
                found, slope = self.check(peer)
                residuals += found
                gradients.append(slope)
                facts.append(peer.facts(configuration))
        if gradient:
            np.save(gradient, np.stack(gradients))
        self.rest()
        residual = float(np.max(residuals)) if residuals else None  # NaN where one is NaN
        return {"contenders": rounds, "residual": residual, "facts": facts}

    def rest(self) -> None:
        """Where many processes with large factors might not fit, only the one that works has any."""
        if self.case.name in LARGE:
            self.close()

    # ---- configurations ----

    def phases(self) -> list[str]:
        """The contested phases that this peer has in this case."""
        if not self.kind.factors:
            return ["step"]
        return [phase for phase in CONTESTED if phase != "solve16" or not self.case.batch]

    def choose(self, configurations: list[Configuration]) -> list[tuple[Configuration, list[str]]]:
        """Returns, after two trials, the configurations that are fastest in some phase, or as good as that. One whose
        residual is too large is out, unless all are.

        spcache is not tuned: every phase of each of its configurations is measured.
        """
        phases = self.phases()
        if len(configurations) == 1 or self.kind.name.startswith("spcache"):
            return [(configuration, phases) for configuration in configurations]
        taken: dict[int, dict[str, float]] = {}
        accurate: dict[int, bool] = {}
        for index in range(len(configurations)):
            taken[index] = self.attempt(configurations[index], phases)
            accurate[index] = self.accurate()
        if any(accurate.values()):
            taken = {index: times for index, times in taken.items() if accurate[index]}
        best = {phase: min(times[phase] for times in taken.values()) for phase in phases}
        if self.case.name not in LARGE:
            for index, times in taken.items():
                if any(times[phase] < HOPELESS * best[phase] for phase in phases):
                    again = self.attempt(configurations[index], phases)
                    taken[index] = {phase: min(times[phase], again[phase]) for phase in phases}
        contenders: dict[int, list[str]] = {}
        for phase in phases:
            order = sorted(taken, key=lambda index: taken[index][phase])
            for place, index in enumerate(order[:2]):
                if place == 0 or taken[index][phase] < TIE * taken[order[0]][phase]:
                    contenders.setdefault(index, []).append(phase)
        return [(configurations[index], chosen) for index, chosen in sorted(contenders.items())]

    def attempt(self, configuration: Configuration, phases: list[str]) -> dict[str, float]:
        """Returns the least time of each phase in a short trial."""
        self.start(configuration)
        return {phase: min(repeat(self.runs()[phase], self.seconds / 6, least=1)[phase]) for phase in phases}

    def configure(self, configuration: Configuration) -> Times:
        if "threads" in configuration and not self.kind.name.startswith("spcache"):
            from threadpoolctl import threadpool_limits

            threadpool_limits(configuration["threads"], user_api="blas")
        return clock("analyze", lambda: self.open().analyze(configuration))

    # ---- phases ----

    def measure(self, configuration: Configuration, phases: list[str]) -> Times:
        """Measures the phases, each warm; analysis and first factorization as well, unless this is a batch."""
        least = 1 if self.case.name in LARGE else 3
        if self.case.batch or not self.kind.factors:
            self.start(configuration)
            times: Times = {}
        else:
            times = repeat(lambda: self.start(configuration), self.seconds / 4, least=1, most=10)
        for phase in phases:
            times |= repeat(self.runs()[phase], self.seconds, least)
        return times

    def runs(self) -> dict[str, Callable[[], Times]]:
        peer = self.open()
        return {
            "refactorize": self.refactorize,
            "solve": lambda: clock("solve", lambda: peer.solve(self.b)),
            "solve16": lambda: clock("solve16", lambda: peer.solve(self.many)),
            "step": self.step,
        }

    def next_values(self) -> torch.Tensor:
        return self.values[next(self.turn) % STEPS]

    def start(self, configuration: Configuration) -> Times:
        """Analysis and the first factorization."""
        peer, values = self.open(), self.next_values()
        times = self.configure(configuration)
        if not self.kind.analyzes:
            times = {}
        if self.kind.factors:
            times |= clock("factorize", lambda: peer.refactorize(values))
            if late := peer.late_analysis():
                times["analyze"][0] += late
                times["factorize"][0] -= late
        return times

    def refactorize(self) -> Times:
        peer, values = self.open(), self.next_values()
        return clock("refactorize", lambda: peer.refactorize(values))

    def step(self) -> Times:
        """The whole optimizer step: new values, forward, backward to the values."""
        peer, values = self.open(), self.next_values().requires_grad_()
        begin = time.perf_counter()
        x = peer.apply(values, self.b)
        middle = time.perf_counter()
        torch.autograd.grad(x, values, self.w)
        end = time.perf_counter()
        values.requires_grad_(False)
        return {"backward": [end - middle], "step": [end - begin]}

    # ---- correctness ----

    def accurate(self) -> bool:
        """Whether the peer, configured as it is, solves well. Not asked where matrices are definite, or a batch."""
        peer = self.open()
        if self.case.kind != "symmetric" or not self.kind.factors:
            return True
        from scipy.sparse import csr_array

        peer.refactorize(self.values[1])
        A = csr_array((self.values[1].double().numpy(), self.case.indices), shape=(self.case.n, self.case.n))
        return scaled_residual(A, peer.solve(self.b), self.b) <= RESIDUAL[str(self.kind.dtype).removeprefix("torch.")]

    def check(self, peer: Peer) -> tuple[list[float], np.ndarray]:
        """Returns the scaled residuals of all solves and the gradient, symmetrized where A is."""
        from scipy.sparse import csr_array

        values = self.values[1].clone().requires_grad_()
        x = peer.apply(values, self.b)
        (slope,) = torch.autograd.grad(x, values, self.w)
        indices, size = self.case.indices, self.case.n * (self.case.batch or 1)
        if self.case.batch:  # one block-diagonal matrix
            offsets = self.case.n * np.arange(self.case.batch)
            indices = (indices[:, None, :] + offsets[:, None]).reshape(2, -1)
        A, slopes = (
            csr_array((entries.detach().double().numpy().ravel(), indices), shape=(size, size))
            for entries in (values, slope)
        )
        if self.case.kind != "general":
            slopes = (slopes + slopes.T) / 2
        solutions = [(x, self.b)]
        if self.kind.factors:
            peer.refactorize(self.values[1])
            right = [self.b] if self.case.batch else [self.b, self.many]
            solutions += [(peer.solve(b), b) for b in right]
        return [scaled_residual(A, *pair) for pair in solutions], slopes[indices[0], indices[1]]


def summary(times: Times) -> dict[str, dict[str, float]]:
    return {phase: {"median": median(t), "min": min(t), "samples": len(t)} for phase, t in times.items()}


def clock(phase: str, run: Callable[[], Any]) -> Times:
    begin = time.perf_counter()
    run()
    return {phase: [time.perf_counter() - begin]}


def scaled_residual(A: Any, x: torch.Tensor, b: torch.Tensor) -> float:
    """Returns |Ax - b|_inf / (|A|_1 |x|_inf + |b|_inf), the largest of all columns."""
    X, B = (t.detach().double().numpy().reshape(A.shape[0], -1) for t in (x, b))
    norm = abs(A).sum(axis=0).max()
    return float((abs(A @ X - B).max(axis=0) / (norm * abs(X).max(axis=0) + abs(B).max(axis=0))).max())


def versions(kind: type[Peer]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("torch", "numpy", *kind.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = getattr(importlib.import_module(package), "__version__", "unknown")
    return found


def pools() -> list[dict[str, Any]]:
    """Returns the BLAS and OpenMP libraries in this process."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    keys = ("internal_api", "version", "num_threads", "architecture", "filepath")
    return [{key: pool.get(key) for key in keys} for pool in threadpool_info()]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native libraries print goes to stderr, not between the answers
    session = Session(sys.argv[1], float(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            do = getattr(session, command.pop("do"))
            answer = do(**command)
        except Exception as error:  # the parent shows it and goes on without this peer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, default=str), file=answers)


if __name__ == "__main__":
    main()
