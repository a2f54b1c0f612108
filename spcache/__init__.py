"""Sparse linear systems inside PyTorch, solved again and again: one analysis, cached factors, exact gradients."""

from . import iterative
from ._lstsq import lstsq
from ._operators import solve_operator
from .config import show_config
from .errors import (
    EngineUnavailableError,
    IllConditionedWarning,
    NotConvergedError,
    NotPositiveDefiniteError,
    SingularMatrixError,
    SpcacheError,
)
from .factor import Factor
from .functional import matmul, solve, solve_triangular
from .plans import plan_cache
from .stats import Stats
from .system import SparseSystem
from .version import __version__ as __version__

__all__ = [
    "EngineUnavailableError",
    "Factor",
    "IllConditionedWarning",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "SingularMatrixError",
    "SparseSystem",
    "SpcacheError",
    "Stats",
    "iterative",
    "lstsq",
    "matmul",
    "plan_cache",
    "show_config",
    "solve",
    "solve_operator",
    "solve_triangular",
]
