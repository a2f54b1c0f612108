"""Counters: how every reuse is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Stats"]


@dataclass
class Stats:
    """What one `SparseSystem` has done so far, and the size of its latest plan and factor.

    Counters are plain attributes: an increment that calls nothing cannot be interrupted under the GIL.

    Attributes:
        analyses: symbolic analyses made for this system (0 where every plan was found in the plan cache).
        factorizations: numeric factorizations called, one a batch.
        refactorizations: of those, the ones that reused the pivots of an earlier one.
        matrices: matrices factorized, each element of a batch counted.
        reuses: solves and factorizations that found a factor of equal values.
        solves: triangular solves called, one a batch; forward, backward and tangents alike.
        repivots: matrices factorized anew because old pivots, rows that were paired or a factor in single precision
            could not be trusted.
        refinements: steps of iterative refinement.
        rcond: estimated reciprocal condition number, rows and columns scaled, of the latest factorization, the smallest
            of a batch; NaN where no small pivots gave reason to estimate it.
        nnz: entries of A as the caller stores them.
        nnz_factor: entries of the factor by the analysis.
        flops: floating-point operations of one factorization, predicted by the analysis.
        bytes: memory of the pattern, the plans and the factors this system holds or keeps idle.
        engine: name of the engine that served last ("" before the first factorization).
        ordering: the fill-reducing ordering it used; "given" where it came as a permutation, "auto" where trials with
            values of an indefinite matrix changed it.
        lstsq_path: what the last factorization for least squares ended in: "normal" (semi-normal equations by Cholesky)
            or "augmented" (the augmented system, with pivoting); "" before.
        lstsq_condition: its estimate of the condition number of A, columns (of a wide A, rows) scaled; the largest of a
            batch; NaN where nothing is checked.
        seconds: time spent per phase: "analyze", "factorize", "solve".
    """

    analyses: int = 0
    factorizations: int = 0
    refactorizations: int = 0
    matrices: int = 0
    reuses: int = 0
    solves: int = 0
    repivots: int = 0
    refinements: int = 0
    rcond: float = math.nan
    nnz: int = 0
    nnz_factor: int = 0
    flops: float = 0.0
    bytes: int = 0
    engine: str = ""
    ordering: str = ""
    lstsq_path: str = ""
    lstsq_condition: float = math.nan
    seconds: dict[str, float] = field(default_factory=lambda: {"analyze": 0.0, "factorize": 0.0, "solve": 0.0})
