"""The table that drives the tests: every kind x triangle x dtype with the engine that serves it and its tolerance.

Errors are measured by the scaled residual ||Ax - b||_inf / (||A||_1 ||x||_inf + ||b||_inf), in units of the rounding
error of the values' type: `case.tolerance` is c * eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spcache import SparseSystem

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        engine: the engine that serves it; for kind "auto" it also says which values the case has: Hermitian positive
            definite ones for the multifrontal engine, general ones for KLU.
        c: tolerated scaled residual, in units of eps.
    """

    kind: str
    triangle: str | None
    dtype: torch.dtype
    engine: str
    c: float

    def __str__(self) -> str:
        words = [self.kind, self.triangle, str(self.dtype).removeprefix("torch.")]
        if self.kind == "auto":
            words.append(self.engine)
        return "-".join(w for w in words if w)

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def tolerance(self) -> float:
        """For scaled residuals."""
        return self.c * self.eps

    @property
    def options(self) -> dict[str, Any]:
        return {"kind": self.kind, "triangle": self.triangle}

    @property
    def positive(self) -> bool:
        """Whether the matrices of this case are Hermitian positive definite."""
        return self.engine == "multifrontal"

    @property
    def symmetric_pattern(self) -> bool:
        return self.positive or self.kind in ("symmetric", "hermitian")

    def with_dtype(self, dtype: torch.dtype) -> Case:
        return Case(self.kind, self.triangle, dtype, self.engine, self.c)


_ROWS = [  # kind, triangle, engine, c
    ("spd", None, "multifrontal", 5),
    ("spd", "lower", "multifrontal", 5),
    ("spd", "upper", "multifrontal", 5),
    ("symmetric", None, "ldl", 5),
    ("symmetric", "lower", "ldl", 5),
    ("symmetric", "upper", "ldl", 5),
    ("hermitian", None, "ldl", 5),
    ("hermitian", "lower", "ldl", 5),
    ("hermitian", "upper", "ldl", 5),
    ("general", None, "klu", 5),
    ("auto", None, "multifrontal", 5),
    ("auto", None, "klu", 5),
]
CASES = [Case(kind, triangle, dtype, engine, c) for kind, triangle, engine, c in _ROWS for dtype in DTYPES]
DOUBLE = [case for case in CASES if case.dtype in (torch.float64, torch.complex128)]
SINGLE = [case for case in CASES if case not in DOUBLE]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_double_case = pytest.mark.parametrize("case", DOUBLE, ids=str)
every_single_case = pytest.mark.parametrize("case", SINGLE, ids=str)


def find_case(kind: str, dtype: torch.dtype = torch.float64, triangle: str | None = None, engine: str = "") -> Case:
    """The first row that fits."""
    return next(
        c for c in CASES if (c.kind, c.dtype, c.triangle) == (kind, dtype, triangle) and engine in ("", c.engine)
    )


SPD, GENERAL = find_case("spd"), find_case("general")


@dataclass(frozen=True)
class Problem:
    """Indices [2, nnz], values [*batch, nnz] and right-hand sides of a well-conditioned system of a case."""

    case: Case
    n: int
    indices: Tensor
    values: Tensor

    def system(self, **options: Any) -> SparseSystem:
        return SparseSystem(self.indices, self.n, **{**self.case.options, **options})

    def matrix(self, values: Tensor | None = None) -> Tensor:
        """The dense matrix that `solve` inverts, [*batch, n, n], made of differentiable torch operations."""
        return dense(self.case, self.indices, self.n, self.values if values is None else values)

    def reference(self, values: Tensor, b: Tensor, adjoint: bool = False) -> Tensor:
        """What `solve` returns. By the inverse: torch.linalg.solve itself is wrong in some nested transforms."""
        inverse = torch.linalg.inv(self.matrix(values))
        inverse = inverse.mH if adjoint else inverse
        if b.dim() == 1 or b.dim() == values.dim():
            return (inverse @ b.unsqueeze(-1)).squeeze(-1)
        return inverse @ b

    def rhs(self, *shape: int, seed: int = 1) -> Tensor:
        """Random numbers of the case's dtype."""
        return numbers(shape, self.case.dtype, seed)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normally distributed; drawn in double, so that both precisions get the same numbers."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=_generator(seed)).to(dtype)


def make(case: Case, n: int = 12, batch: tuple[int, ...] = (), seed: int = 0, density: float = 0.25) -> Problem:
    """A random problem. Entries in no order, a part of them split into duplicates; where both triangles are averaged
    they differ by about 1e-5, where one is mirrored a Hermitian diagonal has an imaginary part that must not count.
    Matrices that need no symmetry have their large entries off the diagonal, so that pivoting is necessary."""
    g = _generator(seed)
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    mask = torch.rand(n, n, generator=g) < density
    if case.symmetric_pattern:
        mask = mask | mask.T
    mask.fill_diagonal_(True)
    A = torch.randn(*batch, n, n, dtype=wide, generator=g) * mask
    if case.symmetric_pattern:
        A = (A + (A.mT if case.kind == "symmetric" else A.mH)) / 2
        sign = 1.0 if case.positive else (-1.0) ** torch.arange(n)
        A = A + torch.diag_embed(sign * (A.abs().sum(-1) + 1))  # dominant: well conditioned
    else:
        A = A - torch.diag_embed(A.abs().sum(-1) + 1)
        order = torch.randperm(n, generator=g)
        A, mask = A[..., order, :], mask[order]
    if case.kind not in ("auto", "general"):
        if case.triangle is None:
            A = A * (1 + 1e-5 * torch.rand(*batch, n, n, generator=g, dtype=torch.float64))
        elif case.kind != "symmetric" and case.dtype.is_complex:
            A = A + 0.5j * torch.eye(n)
    if case.triangle is not None:
        mask = mask.tril() if case.triangle == "lower" else mask.triu()
    indices = mask.nonzero().T
    values = A[..., indices[0], indices[1]]
    indices, values = _split(indices, values, g)
    order = torch.randperm(indices.shape[1], generator=g)
    return Problem(case, n, indices[:, order].contiguous(), values[..., order].to(case.dtype).contiguous())


def grid_problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> Problem:
    """A positive definite matrix on a grid of two or three dimensions, its lower triangle; random weights."""
    i = torch.arange(math.prod(shape)).view(shape)
    pairs = [torch.stack([i.narrow(a, 1, s - 1), i.narrow(a, 0, s - 1)]).flatten(1) for a, s in enumerate(shape)]
    edges = torch.cat(pairs, 1)
    off = -torch.rand(*batch, edges.shape[1], generator=_generator(0), dtype=torch.float64)
    diagonal = torch.full((*batch, i.numel()), 2.0 * len(shape) + 0.1, dtype=torch.float64)
    indices, values = torch.cat([edges, i.flatten().expand(2, -1)], 1), torch.cat([off, diagonal], -1)
    return Problem(find_case("spd", dtype, "lower"), i.numel(), indices, values.to(dtype))


def _split(indices: Tensor, values: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Makes duplicates: a fifth of the entries become two that add up to the same."""
    nnz = indices.shape[1]
    again = torch.randperm(nnz, generator=g)[: nnz // 5]
    share = torch.rand(len(again), generator=g, dtype=torch.float64)
    rest = values.clone()
    rest[..., again] *= 1 - share
    return torch.cat([indices, indices[:, again]], 1), torch.cat([rest, values[..., again] * share], -1)


def dense(case: Case, indices: Tensor, n: int, values: Tensor) -> Tensor:
    """The matrix that `solve` inverts (the table in docs of SparseSystem), [*batch, n, n]."""
    flat = values.new_zeros(*values.shape[:-1], n * n).index_add(-1, indices[0].long() * n + indices[1], values)
    A = flat.unflatten(-1, (n, n))
    if case.kind in ("auto", "general"):
        return A
    mirror = A.mT if case.kind == "symmetric" else A.mH
    if case.triangle is None:
        return (A + mirror) / 2
    diagonal = torch.diag_embed(torch.diagonal(A, dim1=-2, dim2=-1))
    return A + mirror - (diagonal + (diagonal if case.kind == "symmetric" else diagonal.conj())) / 2


def scaled_residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    """The largest over all matrices and right-hand sides; A is [*P, n, n], x and b are [*P, n, k], all broadcast.
    Not finite where x is not: a comparison with a tolerance then fails."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    A, x, b = A.to(wide), x.to(wide), b.to(wide)
    scale = A.abs().sum(-2).amax(-1)[..., None] * x.abs().amax(-2) + b.abs().amax(-2)
    return float(((A @ x - b).abs().amax(-2) / scale).max())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number, infinite where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    difference = (actual.detach().to(wide) - expected.detach().to(wide)).abs().max()
    return float(difference / expected.detach().to(wide).abs().max())
