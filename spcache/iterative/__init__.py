"""Iterative methods of torch operations alone, for many right-hand sides at once, on any device.

`cg` and `minres` for Hermitian matrices, `bicgstab` and `gmres` for general ones, `lsmr` for least squares. What none
of them does is to say "converged" of an x whose residual, computed anew from b - A x, is too large.
"""

from .bicgstab import bicgstab
from .cg import cg
from .gmres import gmres
from .lsmr import LeastSquaresStatus, lsmr
from .minres import minres
from .operators import Operator, as_operator
from .preconditioners import block_diagonal, diagonal, incomplete
from .stopping import Solution, Status

__all__ = [
    "LeastSquaresStatus",
    "Operator",
    "Solution",
    "Status",
    "as_operator",
    "bicgstab",
    "block_diagonal",
    "cg",
    "diagonal",
    "gmres",
    "incomplete",
    "lsmr",
    "minres",
]
