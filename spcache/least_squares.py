"""`Fitter`: what stands behind `SparseSystem.lstsq`. Finds the factor of given values or makes it, and solves with it.

B [p, q] is A where it has at least as many rows as columns, and A^H where not; wanted is (r, x) with

    r + B x = f,    B^H r - mu^2 x = g.                                                         (augmented)

Inside, the columns of B (and with them g, x and mu, which then differs from column to column) are scaled by powers of
two to norms of about one; sigma is the smallest singular value of [B; mu I] after that.

normal      N = B^H B + mu^2 I by Cholesky, the map of its products made once for a pattern. By itself that loses what
            lies below sigma^2; the corrected semi-normal equations get it back:

                r = f - B x,    N dx = B^H r - g - mu^2 x,    x := x + dx.

            Every step reduces the error by about eps / sigma^2, down to what a QR factorization leaves (Björck 1987).
            The smallest eigenvalue of N is estimated for each factor; where it is below `_TRUSTED` of the largest, or
            steps do not become smaller, the factor is not used.
augmented   K = [[alpha I, B], [B^H, -mu^2/alpha I]] for (r/alpha, x), with pivoting. With alpha near sigma / sqrt(2)
            its condition number is that of B and not its square (Björck 1967, 1996 section 2.5.3). Refined as well.
            sigma is found by inverse iteration with N + delta I; a B that has a combination v, |v| = 1, of columns
            with |B v| next to nothing is refused, v being the proof.

References: Å. Björck, Iterative refinement of linear least squares solutions I, BIT 7 (1967),
doi:10.1007/BF01939321; Stability analysis of the method of seminormal equations for linear least squares problems,
Linear Algebra Appl. 88/89 (1987), doi:10.1016/0024-3795(87)90101-7; Numerical Methods for Least Squares Problems
(1996), doi:10.1137/1.9781611971484.
A. van der Sluis, Condition numbers and equilibration of matrices, Numer. Math. 14 (1969), doi:10.1007/BF02165096.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import autograd
from ._normal import Products, Rows
from ._pattern import ValuesCopy
from .autograd import Memo
from .device import to_host
from .engines import DTYPE_CODES, engine_for
from .errors import SingularMatrixError
from .factor import NumericFactor
from .factorizer import Factorizer
from .iterative import lsmr
from .memory import plain
from .pattern import Pattern, lazy

__all__ = ["METHODS", "Fitter", "Problem"]

METHODS = ("auto", "direct", "normal", "augmented", "lsmr")

_EPS = torch.finfo(torch.float64).eps
_TRUSTED = 1e-14  # reciprocal condition number of N from which its factor is used: about two digits a step
_DEFICIENT = 1e-13  # that of B below which its rank counts as deficient
_STEPS = 20  # of refinement, at most
_VECTORS = 4  # of the inverse iteration
_UNEVEN = 32, 2**20  # more products than that many times the fewest that so many entries can have, and than that


class Augmented(NamedTuple):
    """The factor of K, and its alpha [*B, 1]."""

    numeric: NumericFactor
    alpha: Tensor


@dataclass(eq=False)
class Fit:
    """The factor of one batch of values, for one damping and method.

    Attributes:
        key: shape and type of the values, damping and method.
        copy: the values.
        w: [*B, entries] B by rows, scaled. scale: [*B, q; float64].
        condition: [*B; float64] estimated condition number of the scaled [B; mu I]; NaN where nobody checks.
        normal: the factor of N, or None where it cannot be trusted.
        augmented: that of K, once it was needed: from then on it is used.
    """

    key: tuple[Any, ...]
    copy: ValuesCopy
    w: Tensor
    scale: Tensor
    condition: Tensor
    normal: NumericFactor | None = None
    augmented: Augmented | None = None

    @property
    def batch_shape(self) -> torch.Size:
        return self.scale.shape[:-1]

    @property
    def damping(self) -> Tensor:
        """[*B, q; float64] mu of each scaled column."""
        return self.key[2] * self.scale

    @property
    def nbytes(self) -> int:
        factors = [self.normal, self.augmented.numeric if self.augmented is not None else None]
        return self.copy.nbytes + self.w.nbytes + self.scale.nbytes + sum(f.nbytes for f in factors if f is not None)


class Fitter:
    """Least squares with the matrices of one pattern: its plans, and the factor of the latest values.

    Args:
        factorizer: that of the system, whose pattern, options and counters count.
    """

    def __init__(self, factorizer: Factorizer):
        self.factorizer = factorizer
        pattern = factorizer.pattern
        self.wide = pattern.m < pattern.n
        self.shape = (pattern.n, pattern.m) if self.wide else (pattern.m, pattern.n)
        self._held: Fit | None = None
        # What operators ask for (library.py).
        self.outer, self.matvec, self.check_product = factorizer.outer, factorizer.matvec, factorizer.check_product

    def copy(self, factorizer: Factorizer) -> Fitter:
        """Shares the plans, for a copy of the factorizer."""
        new = Fitter(factorizer)
        for name in ("rows", "even", "products"):
            if name in self.__dict__:
                new.__dict__[name] = self.__dict__[name]
        for name in ("normal", "symmetric", "hermitian"):
            if name in self.__dict__:
                new.__dict__[name] = new._inner(self.__dict__[name])
        return new

    # --- what depends on the pattern alone -----------------------------------------------------------------------

    @lazy
    def rows(self) -> Rows:
        """B by rows."""
        pattern = self.factorizer.pattern
        indices = (pattern.columns, pattern.rows) if self.wide else (pattern.rows, pattern.columns)
        return Rows(*indices, *self.shape)

    @lazy
    def even(self) -> bool:
        """Whether N is worth making: a few long rows of B would fill it."""
        rows, (p, _) = self.rows, self.shape
        times, least = _UNEVEN
        products = rows.products()
        return products <= least or products <= times * 0.5 * rows.count * (rows.count / p + 1)

    @lazy
    def products(self) -> Products:
        """The map of products from B to N."""
        return Products(self.rows)

    @lazy
    def normal(self) -> Factorizer:
        """Of N, by its lower triangle."""
        indptr, indices = self.products.structure()
        columns = np.repeat(np.arange(self.shape[1]), np.diff(indptr))
        return self._inner(Pattern(np.stack([indices, columns]), self.shape[1], self.shape[1]), "spd")

    @lazy
    def symmetric(self) -> Factorizer:
        """Of K, by its lower triangle, for real values."""
        (p, q), (indptr, indices) = self.shape, self.rows.structure()
        ones, zeros = np.arange(p), p + np.arange(q)
        row = np.concatenate([ones, p + indices, zeros])
        column = np.concatenate([ones, np.repeat(ones, np.diff(indptr)), zeros])
        return self._inner(Pattern(np.stack([row, column]), p + q, p + q), "symmetric")

    @lazy
    def hermitian(self) -> Factorizer:
        """Of K for complex values."""
        return self._inner(self.symmetric.pattern, "hermitian")

    def _inner(self, like: Pattern | Factorizer, kind: str = "") -> Factorizer:
        """A factorizer whose work this system counts as its own."""
        stats, ordering = self.factorizer.stats, self.factorizer.options["ordering"]
        if isinstance(like, Factorizer):
            return like.copy(stats)
        options = {
            **self.factorizer.options, "kind": kind, "triangle": "lower", "keep_factor": False, "precision": "working",
            "ordering": ordering if ordering in engine_for("cpu", kind).ORDERINGS else "auto",
        }  # fmt: skip
        return Factorizer(like, options, stats=stats)

    def _made(self) -> list[Any]:
        names = ("rows", "products", "normal", "symmetric", "hermitian")
        return [self.__dict__[name] for name in names if name in self.__dict__]

    @property
    def nbytes(self) -> int:
        held = self._held
        return sum(part.nbytes for part in self._made()) + (held.nbytes if held is not None else 0)

    def clear(self) -> None:
        self._held = None
        self.trim()

    def trim(self) -> None:
        for part in self._made():
            if isinstance(part, Factorizer):
                part.trim()

    # --- what the user asks for, arguments checked ---------------------------------------------------------------

    def solve(
        self,
        values: Tensor,
        b: Tensor,
        damping: float,
        method: str,
        options: dict[str, Any],
        vector: bool | None = None,
    ) -> Tensor:
        """`SparseSystem.lstsq`; vector: whether b holds vectors, where the caller knows."""
        m, n = self.factorizer.pattern.m, self.factorizer.pattern.n
        vector = self.factorizer.check_arguments(values, b, "b", m, vector)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if options and method != "lsmr":
            raise TypeError(f"options are for method='lsmr'; method={method!r} has none, got {', '.join(options)}")
        damping = _number(damping)
        own = 1 if vector else 2
        lead, k = torch.broadcast_shapes(b.shape[:-own], values.shape[:-1]), b.shape[-1:] if own == 2 else ()
        if not (m and n and math.prod(lead) and math.prod(k)):
            return b.new_zeros(*lead, n, *k) + 0 * (b.sum() + values.sum())
        return autograd.least_squares(Problem(self, damping, method, options), values, b, vector)

    def run_recorded(
        self, values: Tensor, f: Tensor, g: Tensor, damping: float, method: str, check: bool
    ) -> tuple[Tensor, Tensor]:
        """What the operator of recorded code does: (r, x) of f and g, arguments checked."""
        self.factorizer.check_values(values)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        lead = torch.broadcast_shapes(f.shape[:-2], values.shape[:-1])
        expected = [(*lead, size, f.shape[-1]) for size in self.shape]
        if [f.shape, g.shape] != expected or f.dtype != values.dtype or g.dtype != values.dtype:
            raise ValueError(
                f"expected right-hand sides of shapes {expected} in {values.dtype}, got {f.shape}, {g.shape}"
            )
        if f.numel() == 0 or g.numel() == 0:
            return f.clone(), g.clone()
        problem = Problem(self, _number(damping), method, {})
        return problem.run(problem.recall(Memo(()), values), values, f, g, check)

    # --- factors -------------------------------------------------------------------------------------------------

    def find(self, values: Tensor, damping: float, method: str) -> Fit:
        """The factor of values that can be read: the one held, if they are equal bit by bit, or a new one."""
        values, key = self._host(values), (values.shape, values.dtype, damping, method)
        checks, stats = self.factorizer.checks, self.factorizer.stats
        held = self._held
        if held is not None and held.key == key and held.copy.equals(values.data_ptr(), values.nbytes):
            stats.reuses += 1
            return held
        if checks:
            self.factorizer.require_finite("values", values)
        self._held = held = None  # its storage goes back to the pool before new storage is lent
        held = self._factorize(values, key)
        if self.factorizer.keep_factor:
            self._held = held
        return held

    def recall(self, memo: Memo, values: Tensor, damping: float, method: str) -> Fit:
        """The factor of values from memo, by exact comparison, or found and put there."""
        host, key = self._host(values), (values.shape, values.dtype, damping, method)
        for fit in memo:
            if fit.key == key and fit.copy.equals(host.data_ptr(), host.nbytes):
                return fit
        fit = self.find(values, damping, method)
        if self.factorizer.keep_factor:
            memo.append(fit)
        return fit

    def _host(self, values: Tensor) -> Tensor:
        values = values.detach()
        return plain(values if values.is_cpu else to_host(values))

    def _factorize(self, values: Tensor, key: tuple[Any, ...]) -> Fit:
        copy, (_, q) = ValuesCopy(), self.shape
        copy.keep(values.data_ptr(), values.nbytes)
        damping, method, batch = key[2], key[3], values.shape[:-1]
        values = plain(values.to(torch.promote_types(values.dtype, torch.float64)))
        w = values.new_empty(*batch, self.rows.count)
        fit = Fit(key, copy, w, torch.empty(*batch, q, dtype=torch.float64), torch.full(batch, math.nan).double())
        zero = self.rows.scale(
            values.data_ptr(), math.prod(batch), values.shape[-1], DTYPE_CODES[values.dtype], self.wide, damping,
            w.data_ptr(), fit.scale.data_ptr(),
        )  # fmt: skip
        checks = self.factorizer.checks
        if checks and (zero >= 0).any():
            e = int(np.argmax(zero >= 0))
            self._refuse(fit, e, math.inf, int(zero[e]))
        if method != "augmented" and (self.even or method == "normal"):
            self._factorize_normal(fit)
            if fit.normal is None and method == "normal":
                worst = float(fit.condition.max())
                raise SingularMatrixError(
                    f"method='normal' cannot be trusted here: the condition number of A, {self._what()}s scaled, is "
                    f"about {worst:.1e}, and the normal equations have its square; use method='auto', or damping="
                )
        if fit.normal is None:
            self._factorize_augmented(fit)
        self._report(fit)
        return fit

    def _report(self, fit: Fit) -> None:
        stats = self.factorizer.stats
        stats.lstsq_path = "augmented" if fit.augmented is not None else "normal"
        stats.lstsq_condition = float(fit.condition.max()) if fit.condition.numel() else math.nan

    def _normal_values(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """Lower triangle of N [*B, entries], and a bound of its norm [*B]."""
        out = fit.w.new_empty(*fit.batch_shape, self.products.count)
        norm = self.products.multiply(
            fit.w.data_ptr(), fit.scale.data_ptr(), math.prod(fit.batch_shape), DTYPE_CODES[fit.w.dtype], fit.key[2],
            out.data_ptr(),
        )  # fmt: skip
        return out, torch.from_numpy(norm).view(fit.batch_shape)

    def _factorize_normal(self, fit: Fit) -> None:
        """`fit.normal`, where it can be trusted."""
        values, norm = self._normal_values(fit)
        numeric = self.normal.find(values, raising=False)
        if not self.factorizer.checks:
            fit.normal = numeric
            return
        if numeric.failures is not None:
            fit.condition = torch.full(fit.batch_shape, math.inf, dtype=torch.float64)
            return
        # z of random signs has a part in every direction, which N^-1 blows up where N is nearly singular: the Rayleigh
        # quotient of y = N^-1 z then is next to the smallest eigenvalue, and never below it. By B itself it is right
        # even where the smallest pivots of N are rounding errors.
        y = numeric.solve(self._signs(1).to(fit.w.dtype).expand(*fit.batch_shape, -1, -1), False, False)
        y = y / y.abs().amax((-2, -1), keepdim=True)
        parts = self._apply(fit, y, False), fit.damping.unsqueeze(-1) * y
        squares = [part.abs().square().sum((-2, -1)) for part in (*parts, y)]
        smallest = (squares[0] + squares[1]) / squares[2]
        fit.condition = (norm / smallest).sqrt()
        if bool((smallest >= _TRUSTED * norm).all()):
            fit.normal = numeric

    def _signs(self, k: int) -> Tensor:
        """[q, k] random signs, the same ones every time."""
        signs = np.random.default_rng(0).integers(0, 2, (self.shape[1], k))
        return torch.from_numpy(2.0 * signs - 1)

    def _factorize_augmented(self, fit: Fit) -> None:
        """`fit.augmented`; raises where the rank is deficient."""
        largest = self._largest(fit)
        limit = max(_DEFICIENT, 8 * _EPS * math.sqrt(self.shape[0])) * largest
        if not self.factorizer.checks:
            fit.augmented = self._factor_of(fit, 1e-3 * largest)
            return
        found = self._smallest_by_normal(fit, limit) if self.even else None
        sigma = 1e-3 * largest if found is None else found
        for sure in False, True:  # alpha of a sigma that was far off: once more, with what K itself says
            augmented = self._factor_of(fit, sigma)
            failures = augmented.numeric.failures
            if failures is not None:
                self._refuse(fit, next(e for e, f in enumerate(failures) if f is not None), math.inf, None)
            sigma = self._smallest(fit, lambda v, K=augmented: self._solve_augmented(K, None, v)[1], limit)
            if sure or bool((30 * sigma > augmented.alpha.squeeze(-1)).all()):
                break
        fit.condition = largest / sigma
        fit.augmented = augmented

    def _factor_of(self, fit: Fit, sigma: Tensor) -> Augmented:
        """The factor of K."""
        (p, _), alpha, damping = self.shape, sigma.unsqueeze(-1) / math.sqrt(2), fit.damping
        parts = [alpha.expand(*fit.batch_shape, p), fit.w.conj(), -damping * (damping / alpha)]
        values = torch.cat([part.to(fit.w.dtype) for part in parts], -1)
        inner = self.hermitian if values.is_complex() else self.symmetric
        return Augmented(inner.find(values, raising=False), alpha)

    def _solve_augmented(self, K: Augmented, f: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
        """(r, x) by the factor of K alone; without f, zero."""
        (p, _), alpha = self.shape, K.alpha.unsqueeze(-1)
        f = g.new_zeros(*g.shape[:-2], p, g.shape[-1]) if f is None else f
        both = K.numeric.solve(torch.cat([f, g / alpha], -2), False, False)
        return alpha * both[..., :p, :], both[..., p:, :]

    def _smallest_by_normal(self, fit: Fit, limit: Tensor) -> Tensor | None:
        """`_smallest` by N, shifted as little as it takes to be definite; None where that is too much."""
        values, norm = self._normal_values(fit)
        diagonal = torch.from_numpy(self.products.structure()[0][:-1])
        for shift in 1e-14, 1e-12, 1e-10:
            more = (shift * norm).unsqueeze(-1).expand(*fit.batch_shape, len(diagonal)).to(values.dtype)
            numeric = self.normal.find(values.index_add(-1, diagonal, more), raising=False)
            if numeric.failures is None:
                return self._smallest(fit, lambda v, N=numeric: N.solve(v, False, False), limit)
        return None

    def _largest(self, fit: Fit) -> Tensor:
        """[*B; float64] the largest singular value of B, from below: by the power method."""
        v = self._signs(1).to(fit.w.dtype).expand(*fit.batch_shape, -1, -1)
        for _ in range(6):
            v = self._apply(fit, self._apply(fit, v, False), True) + fit.damping.unsqueeze(-1).square() * v
            size = torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)
            v = v / size
        return torch.sqrt(size[..., 0, 0])

    def _smallest(self, fit: Fit, inverse: Any, limit: Tensor) -> Tensor:
        """[*B; float64] the smallest singular value sigma of [B; mu I], from above, by inverse iteration with N or what
        is near it. Raises where it is at most `limit`."""
        V = self._signs(min(_VECTORS, self.shape[1])).to(fit.w.dtype).expand(*fit.batch_shape, -1, -1)
        for _ in range(3):
            V = inverse(V)
            V, _ = torch.linalg.qr(V / V.abs().amax((-2, -1), keepdim=True))
        both = [self._apply(fit, V, False), fit.damping.unsqueeze(-1) * V]
        _, sigma, Wh = torch.linalg.svd(torch.cat(both, -2), False)
        smallest = torch.nan_to_num(sigma[..., -1], nan=0.0)
        if self.factorizer.checks and bool((smallest <= limit).any()):
            e = int((smallest <= limit).reshape(-1).int().argmax())
            v = (V @ Wh.mH[..., -1:]).reshape(-1, self.shape[1])[e].abs()
            self._refuse(fit, e, float(smallest.reshape(-1)[e]), int(v.argmax()) if bool(v.isfinite().all()) else None)
        return smallest

    def _what(self) -> str:
        return "row" if self.wide else "column"

    def _refuse(self, fit: Fit, e: int, sigma: float, column: int | None) -> NoReturn:
        """Raises for matrix e of the batch."""
        batch = tuple(int(i) for i in np.unravel_index(e, fit.batch_shape)) if fit.batch_shape else ()
        what, which = self._what(), f", {self._what()} {column} (counted from 0) in it" if column is not None else ""
        proof = f": a combination of {what}s, scaled to length 1, has length {sigma:.1e}{which}" * math.isfinite(sigma)
        where = f" (batch element {batch})" if batch else ""
        raise SingularMatrixError(
            f"A has no full {what} rank, or is too near to that{proof or which}{where};"
            f" damping= (least |A x - b|^2 + damping^2 |x|^2) is defined for every A; or remove {what}s, or use "
            "method='lsmr'",
            column,
            batch,
        )

    # --- solutions -----------------------------------------------------------------------------------------------

    def run(self, fit: Fit, f: Tensor, g: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        """(r, x) of f [*P, p, k] and g [*P, q, k]."""
        dtype, device = f.dtype, f.device
        if check and self.factorizer.checks:
            self.factorizer.require_finite("b", g if self.wide else f)
        f, g = (self._host(t).to(fit.w.dtype) for t in (f, g))
        scale = fit.scale.unsqueeze(-1)
        g = scale * g
        size = torch.maximum(_largest_of(f), _largest_of(g))
        size = torch.ldexp(torch.ones_like(size), -torch.frexp(size).exponent.clamp(-1000, 1000))
        f, g = size * f, size * g
        if fit.augmented is None:
            r, x, converged = self._by_normal(fit, f, g)
            if self.factorizer.checks and not converged:
                if fit.key[3] == "normal":
                    raise SingularMatrixError(
                        "method='normal': the refinement of the solution does not converge, A is too ill-conditioned "
                        "for it; use method='auto', or damping="
                    )
                self._factorize_augmented(fit)
                self._report(fit)
        if fit.augmented is not None:
            r, x, converged = self._by_augmented(fit, f, g)
            if self.factorizer.checks and not converged:
                worst = float(fit.condition.max())
                raise SingularMatrixError(
                    f"A is too near to a deficient {self._what()} rank: its condition number, {self._what()}s scaled, "
                    f"is about {worst:.1e}, and the refinement of the solution does not converge; damping= (least "
                    "|A x - b|^2 + damping^2 |x|^2) helps, or method='lsmr'"
                )
        return (r / size).to(device, dtype), (scale * x / size).to(device, dtype)

    def _by_normal(self, fit: Fit, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, bool]:
        """(r, x) by the corrected semi-normal equations, and whether the steps became as small as they must."""
        factor = fit.normal
        assert factor is not None
        square = fit.damping.unsqueeze(-1).square()
        x = factor.solve(self._apply(fit, f, True) - g, False, False)
        state = _Steps(x)
        while True:
            r = f - self._apply(fit, x, False)
            step = factor.solve(self._apply(fit, r, True) - g - square * x, False, False)
            x = x + step
            self.factorizer.stats.refinements += 1
            if state.done(step) or not self.factorizer.checks:
                break
        r = f - self._apply(fit, x, False)
        return r, x, state.converged(fit, f, g, r, x)

    def _by_augmented(self, fit: Fit, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The same by the augmented system."""
        square = fit.damping.unsqueeze(-1).square()
        K = fit.augmented
        assert K is not None
        r, x = self._solve_augmented(K, f, g)
        state = _Steps(x)
        while True:
            first = f - r - self._apply(fit, x, False)
            second = g - self._apply(fit, r, True) + square * x
            r_step, x_step = self._solve_augmented(K, first, second)
            r, x = r + r_step, x + x_step
            self.factorizer.stats.refinements += 1
            if state.done(x_step) or not self.factorizer.checks:
                break
        return r, x, state.converged(fit, f, g, r, x)

    def _apply(self, fit: Fit, x: Tensor, adjoint: bool) -> Tensor:
        """B x or B^H x."""
        x, lead = plain(x), x.shape[:-2]
        y = x.new_empty(*lead, self.shape[1 if adjoint else 0], x.shape[-1])
        factors, index = 0, None
        batch = math.prod(fit.batch_shape)
        if fit.batch_shape and lead != fit.batch_shape:
            index = torch.arange(batch).view(fit.batch_shape).expand(lead).contiguous()
            factors = index.data_ptr()
        self.rows.apply(
            fit.w.data_ptr(), batch, x.data_ptr(), y.data_ptr(), math.prod(lead), x.shape[-1], factors,
            DTYPE_CODES[x.dtype], adjoint,
        )  # fmt: skip
        return y


def _largest_of(t: Tensor) -> Tensor:
    """[*P, 1, k; real] the largest magnitude of each column."""
    return t.abs().amax(-2, keepdim=True) if t.shape[-2] else t.new_zeros(*t.shape[:-2], 1, t.shape[-1]).abs()


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-2)


class _Steps:
    """The sizes of refinement's steps, each column by itself: ends where the next step cannot change x any more, or
    where steps stop to shrink."""

    def __init__(self, x: Tensor):
        self.size = self.last = _norm(x)
        self.count = 0

    def done(self, step: Tensor) -> bool:
        self.count += 1
        step = _norm(step)
        rate = step / self.last
        self.stalled = ~(2 * step <= self.last)  # also where something is not finite
        fine = step * rate <= 0.5 * _EPS * self.size
        self.step = self.last = step
        return self.count == _STEPS or bool((fine | self.stalled | (step == 0)).all())

    def converged(self, fit: Fit, f: Tensor, g: Tensor, r: Tensor, x: Tensor) -> bool:
        """Whether the last step is no larger than what rounding errors in B leave of x, a hundredfold: QR would do no
        better (Björck 1996, section 1.4.3)."""
        condition = fit.condition.unsqueeze(-1)
        rounding = condition * (self.size + _norm(f)) + condition.square() * (_norm(r) + _norm(g) / condition)
        shrinking = ~self.stalled & (self.step <= 1e-6 * self.size)
        return bool((shrinking | (self.step <= 100 * _EPS * rounding)).all())


class Problem:
    """Least squares of one pattern with one damping and method: a `LeastSquaresSource` of autograd.py."""

    def __init__(self, fitter: Fitter, damping: float, method: str, options: dict[str, Any]):
        self.fitter, self.damping, self.method, self.options = fitter, damping, method, options
        self.convention = fitter.factorizer.convention
        self.wide, self.shape = fitter.wide, fitter.shape
        self.outer, self.matvec = fitter.outer, fitter.matvec

    def recall(self, memo: Memo, values: Tensor) -> Any:
        return None if self.method == "lsmr" else self.fitter.recall(memo, values, self.damping, self.method)

    def run(self, factor: Any, values: Tensor, f: Tensor, g: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        if self.method != "lsmr":
            return self.fitter.run(factor, f, g, check)
        if check and self.fitter.factorizer.checks:
            self.fitter.factorizer.require_finite("values", values)
            self.fitter.factorizer.require_finite("b", g if self.wide else f)
        p, _ = self.shape
        precision = 10 * torch.finfo(f.dtype).eps
        options = {"atol": precision, "btol": precision, **self.options}
        values = values.detach()

        def apply(x: Tensor) -> Tensor:
            y = self.convention.matvec(values, x, self.wide)
            return torch.cat([y, self.damping * x], -2) if self.damping else y

        def adjoint(u: Tensor) -> Tensor:
            y = self.convention.matvec(values, u[..., :p, :], not self.wide)
            return y + self.damping * u[..., p:, :] if self.damping else y

        rhs = torch.cat([f, torch.zeros_like(g)], -2) if self.damping else f
        if g.any():
            rhs = rhs - lsmr((adjoint, apply), g, **options).x
        x = lsmr((apply, adjoint), rhs, **options).x
        return f - apply(x)[..., :p, :], x


def _number(damping: Any) -> float:
    if isinstance(damping, Tensor) and damping.requires_grad:
        raise ValueError(
            "damping must be a number: there is no derivative in it; for one, append damping * I to A and zeros to b"
        )
    try:
        damping = float(damping)
    except (TypeError, ValueError):
        raise TypeError(f"damping must be a number, got {damping!r}") from None
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    return damping
