"""The interface of all peers, and the derivative of a solve wrapped by hand.

A peer analyzes one pattern, then factorizes new values as often as asked and solves. Each is used as a
careful user would: the analysis once wherever the library allows it, values gathered into its own order
through positions computed once, the factor of the forward pass reused in the backward pass, many right-hand
sides in the memory layout that the library wants. `configurations` lists what is tried; for each phase the
fastest counts.
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from cases import DENSE, HEAVY, Array, Case
from torch import Tensor

Configuration = dict[str, Any]
SMALL = 1000  # entries below which NumPy's indexing is faster than torch's
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({1, CORES})  # numbers of threads that are tried


class Peer:
    """Base of all peers, with the derivative of the solve wrapped by hand."""

    name: ClassVar[str]
    packages: ClassVar[list[str]]  # whose versions are reported
    modules: ClassVar[list[str]]  # that must be there
    kinds: ClassVar[set[str]] = {"spd"}
    analyzes: ClassVar[bool] = True  # whether it has an analysis of its own
    factors: ClassVar[bool] = True  # whether it can be asked for a factor and for solves with it
    batches: ClassVar[bool] = False  # whether it takes a batch in one call; else the batch is a loop
    heavy: ClassVar[bool] = True  # whether it gets through the cases of HEAVY within minutes
    columns: ClassVar[bool] = True  # whether it wants many right-hand sides column by column
    dtype: ClassVar[torch.dtype] = torch.float64
    torch_threads: ClassVar[int] = 1  # more did not speed up `gradient`, and suffer where cores are shared
    environment: ClassVar[dict[str, str]] = {}  # of the process it runs in
    flag: ClassVar[str] = ""  # of the processor, for a variant of another peer with the kernels for it

    @classmethod
    def load(cls) -> None:
        """Imports what the peer needs.

        Raises:
            ImportError: it is not installed.
        """
        for module in cls.modules:
            importlib.import_module(module)

    @classmethod
    def takes(cls, case: Case) -> bool:
        """Whether the peer solves such systems, within minutes."""
        within = (cls.heavy or case.name not in HEAVY) and (not cls.flag or case.name in DENSE)
        return within and case.kind in cls.kinds and (cls.factors or not case.batch)

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows, self.cols = torch.from_numpy(case.indices)

    def configurations(self) -> Iterator[Configuration]:
        """Yields what is tried. "threads" is the number that BLAS is told."""
        yield {}

    def analyze(self, configuration: Configuration) -> None:
        """Prepares everything that depends on the pattern only."""

    def refactorize(self, values: Tensor) -> None:
        """Factorizes new values [nnz], given in the order of the case; [batch, nnz] for a batch."""
        raise NotImplementedError

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        """Returns A^-1 b or A^-T b, [n] or [n, k], with the latest factor; [batch, n] for a batch."""
        raise NotImplementedError

    def refactorize_and_solve(self, values: Tensor, b: Tensor) -> Tensor:
        self.refactorize(values)
        return self.solve(b)

    def apply(self, values: Tensor, b: Tensor) -> Tensor:
        """Returns x = A^-1 b, differentiable in values and b."""
        return _Solve.apply(values, b, self)

    def gradient(self, adjoint: Tensor, x: Tensor) -> Tensor:
        """Returns dl/dvalues[k] = -adjoint[i_k] x[j_k]."""
        if len(self.rows) < SMALL and not self.case.batch:
            rows, cols = self.case.indices
            return torch.from_numpy(-(adjoint.numpy()[rows] * x.numpy()[cols]))
        return adjoint.index_select(-1, self.rows).mul_(x.index_select(-1, self.cols)).neg_()

    def late_analysis(self) -> float:
        """Returns the seconds of the first factorization that were analysis."""
        return 0.0

    def facts(self, configuration: Configuration) -> dict[str, Any]:
        """Returns what the peer knows of its latest factor, made so: nnz (of L), flops. May spoil the factor."""
        return {}


class Loop(Peer):
    """A batch by a peer that takes one matrix at a time: one peer for each, so that every factor is kept."""

    def __init__(self, kind: type[Peer], case: Case) -> None:
        super().__init__(case)
        single = replace(case, batch=0, b=case.b[0], w=case.w[0])
        self.peers = [kind(single) for _ in range(case.batch)]

    def configurations(self) -> Iterator[Configuration]:
        for configuration in self.peers[0].configurations():
            if configuration.get("threads", 1) == 1:  # small systems
                yield configuration

    def analyze(self, configuration: Configuration) -> None:
        for peer in self.peers:
            peer.analyze(configuration)

    def refactorize(self, values: Tensor) -> None:
        for peer, each in zip(self.peers, values.unbind(), strict=True):
            peer.refactorize(each)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        return torch.stack([peer.solve(each, adjoint) for peer, each in zip(self.peers, b.unbind(), strict=True)])


class _Solve(torch.autograd.Function):
    """x = A^-1 b;  dl/db = A^-T g,  dl/dA_ij = -(A^-T g)_i x_j.

    The peer holds one factor: one graph at a time.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, b: Tensor, peer: Peer) -> Tensor:
        x = peer.refactorize_and_solve(values.detach(), b.detach())
        ctx.peer = peer
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        adjoint = ctx.peer.solve(g, adjoint=True)
        return ctx.peer.gradient(adjoint, x), adjoint, None


def compressed(major: Array, minor: Array, n: int, keep: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns indptr, indices and the positions of their values, sorted by `major`, of the entries kept."""
    kept = np.arange(len(major)) if keep is None else np.flatnonzero(keep)
    positions = kept[np.lexsort((minor[kept], major[kept]))]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(major[positions], minlength=n))])
    return indptr.astype(np.int32), minor[positions].astype(np.int32), positions
