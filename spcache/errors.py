"""Exception types.

Wrong arguments are plain `ValueError` and `TypeError`. Everything here says that arguments were fine and the
mathematics or the machine was not.
"""

from typing import Any

import torch

__all__ = [
    "EngineUnavailableError",
    "IllConditionedWarning",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "SingularMatrixError",
    "SpcacheError",
]


class SpcacheError(Exception):
    """Root of the errors that spcache raises for reasons other than a wrong argument."""


class EngineUnavailableError(SpcacheError, RuntimeError):
    """No engine can serve this device, kind and dtype here; the message says what would."""


class _FactorizationError(SpcacheError, torch.linalg.LinAlgError):
    """A matrix could not be factorized.

    Attributes:
        column: row and column of the matrix, in the caller's numbering from 0, at which it failed; None where
            no single one is to blame.
        batch: index of the matrix in the batch, a tuple as long as the batch has dimensions (empty: no batch).
    """

    def __init__(self, message: str, column: int | None = None, batch: tuple[int, ...] = ()):
        super().__init__(message)
        self.column = column
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.column, self.batch)


# of a `Factor`
MODIFIED = (
    "values were modified after factorize(): this factor belongs to the old ones. Factorize again, or factorize a clone"
)


class NotPositiveDefiniteError(_FactorizationError):
    """A Cholesky factorization met a pivot that is not positive."""


class SingularMatrixError(_FactorizationError):
    """The matrix is singular, structurally or to working precision."""


class IllConditionedWarning(UserWarning):
    """A matrix has a factor and solutions with small residuals, but is singular for all that its precision can tell:
    with rows and columns scaled to largest entries of about 1, its estimated reciprocal condition number (1-norm) is
    below the eps it is computed in, 2.2e-16 (1.2e-7 where float32 or complex64 is factorized as such); below 32 eps for
    the engines "ldl" and "lu", whose estimates of singular matrices may be as large as that.

    Given once per factorization, with check=True, on the CPU. The condition number is estimated where pivots are small;
    no warning is therefore no proof. `Factor.rcond` and `stats.rcond` have it.
    """


class NotConvergedError(SpcacheError, RuntimeError):
    """An iterative method did not reach its tolerance.

    Attributes:
        x: what it reached.
        status: what became of each right-hand side, a `spcache.iterative.Status`.
    """

    def __init__(self, message: str, x: torch.Tensor | None = None, status: Any = None):
        super().__init__(message)
        self.x = x
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.x, self.status)
