"""Sparse linear systems inside PyTorch, solved again and again: one analysis, cached factors, exact gradients."""

from .errors import EngineUnavailableError, NotPositiveDefiniteError, SingularMatrixError, SpcacheError
from .factor import Factor
from .functional import solve
from .plans import plan_cache
from .stats import Stats
from .system import SparseSystem

__all__ = [
    "EngineUnavailableError",
    "Factor",
    "NotPositiveDefiniteError",
    "SingularMatrixError",
    "SparseSystem",
    "SpcacheError",
    "Stats",
    "plan_cache",
    "solve",
]
__version__ = "0.1.0"
