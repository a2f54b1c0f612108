"""The interface of all peers, and the derivative of a solve wrapped by hand.

A peer analyzes one pattern, then factorizes new values as often as asked and solves. Each is used as a
careful user would: the analysis once wherever the library allows it, values gathered into its own order
through positions computed once, the factor of the forward pass reused in the backward pass.
`configurations` lists what is tried; the fastest counts.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from cases import Array, Case
from torch import Tensor

Configuration = dict[str, Any]
SMALL = 1000  # entries below which NumPy's indexing is faster than torch's


class Peer:
    """Base of all peers, with the derivative of the solve wrapped by hand."""

    name: ClassVar[str]
    packages: ClassVar[list[str]]  # whose versions are reported
    kinds: ClassVar[set[str]] = {"spd"}
    analyzes: ClassVar[bool] = True  # whether it has an analysis of its own
    torch_threads: ClassVar[int] = 1  # more did not speed up `gradient`, and suffer where cores are shared
    environment: ClassVar[dict[str, str]] = {}  # of the process it runs in, where not set

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows, self.cols = torch.from_numpy(case.indices)

    def configurations(self) -> Iterator[Configuration]:
        yield {}

    def analyze(self, configuration: Configuration) -> None:
        """Prepares everything that depends on the pattern only."""

    def refactorize(self, values: Tensor) -> None:
        """Factorizes new values [nnz; float64], given in the order of the case."""
        raise NotImplementedError

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        """Returns A^-1 b or A^-T b [n; float64] with the latest factor."""
        raise NotImplementedError

    def apply(self, values: Tensor, b: Tensor) -> Tensor:
        """Returns x = A^-1 b, differentiable in values and b."""
        return _Solve.apply(values, b, self)

    def gradient(self, adjoint: Tensor, x: Tensor) -> Tensor:
        """Returns dl/dvalues[k] = -adjoint[i_k] x[j_k]."""
        if len(self.rows) < SMALL:
            rows, cols = self.case.indices
            return torch.from_numpy(-(adjoint.numpy()[rows] * x.numpy()[cols]))
        return adjoint.index_select(0, self.rows).mul_(x.index_select(0, self.cols)).neg_()

    def late_analysis(self) -> float:
        """Returns the seconds of the first factorization that were analysis."""
        return 0.0

    def facts(self) -> dict[str, float]:
        """Returns what the peer reports of its factor: nnz(L), flops."""
        return {}


class _Solve(torch.autograd.Function):
    """x = A^-1 b;  dl/db = A^-T g,  dl/dA_ij = -(A^-T g)_i x_j.

    The peer holds one factor: one graph at a time.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, b: Tensor, peer: Peer) -> Tensor:
        peer.refactorize(values.detach())
        x = peer.solve(b.detach())
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
