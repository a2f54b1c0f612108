"""GMRES, restarted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stopping import Callback, Solution, System, count_of

__all__ = ["gmres"]


def gmres(
    A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float = 1e-5, atol: float = 0.0, restart: int | None = None,
    maxiter: int | None = None, M: Any = None, callback: Callback | None = None, check: bool = True,
) -> Solution:  # fmt: skip
    """Solves A x = b for a general A by restarted generalized minimal residuals, preconditioned from the right.

    Cost: an iteration is one product with A, one with M, and four passes over up to `restart` vectors (Gram-Schmidt,
    twice); memory is restart + 4 times x.

    Args:
        restart: iterations from one restart to the next; None: min(20, n).
        maxiter: most restarts, as in SciPy, each of up to `restart` iterations; None: 10 n. `status.iterations` counts
            the inner iterations.
        callback: called with x once a restart.
        A, b, x0, rtol, atol, M, check: as in `cg`; M may be general: also `incomplete`, or a `Factor` of any kind.

    Returns, Raises: as `cg`.

    References:
        Saad & Schultz (1986), doi:10.1137/0907058.

    Example:
        >>> import torch
        >>> from spcache.iterative import gmres
        >>> gmres(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([3.0, 2.0])).x.round(decimals=4)
        tensor([1., 3.])
    """
    run = System(A, b, x0, rtol, atol, maxiter, M, callback)
    n = run.b.shape[run.dim]
    length = min(20 if restart is None else count_of(restart, "restart"), max(n, 1))
    run.maxiter *= length
    # Rounding aside, a cycle that does not reduce the residual is followed by the same again.
    progress = 1 - torch.finfo(run.b.dtype).eps ** 0.5
    return run.solve("gmres", lambda run, x, r: _cycle(run, x, r, length), check, progress, monotone=True)


def _cycle(run: System, x: Tensor, r: Tensor, length: int) -> Tensor:
    """Arnoldi: A M V_j = V_{j+1} H_j. A column of b is a row here, [*B, k, n], so that products with V are products of
    matrices. H = Q R grows by a column h at a time: R gets Q^H h, Q what is left of h, normalized. The residual is
    V_{j+1} g, where g = beta e_1 - Q t, t = Q^H beta e_1; then x moves by M V_j y, R y = t."""
    v = _flip(run, r)
    beta = _norm(v)
    v = v * _divide(run, 1.0, beta)
    zeros = r.new_zeros(*beta.shape[:-1], length + 1)
    g = torch.cat([beta.to(r.dtype), zeros[..., 1:]], -1)
    V, Q = _Basis(v, length), _Basis(zeros, length)
    V.append(v)
    R: list[Tensor] = []
    t: list[Tensor] = []
    while True:
        w = _flip(run, run.A(run.precondition(_flip(run, v))))
        w, h = V.project_out(w)
        eta = _norm(w)
        h = torch.cat([h, eta.to(h.dtype), zeros[..., V.size + 1 :]], -1)
        q, c = Q.project_out(h)
        rho = _norm(q)
        rho = torch.where(rho > 10 * torch.finfo(rho.dtype).eps * _norm(h), rho, 0)  # H is singular: breakdown
        q = q * _divide(run, 1.0, rho)
        tau = torch.linalg.vecdot(q, g).unsqueeze(-1)
        g = g - tau * q
        column = torch.cat([c, rho.to(c.dtype), zeros[..., Q.size + 1 : length]], -1)
        left = _norm(g)
        run.judge_norm(_flip(run, left) if run.b.dim() > 1 else left.squeeze(-1))
        if run.fault:
            sound = left.isfinite()
            column, tau = torch.where(sound, column, 0), torch.where(sound, tau, 0)
        R.append(column)
        t.append(tau)
        if not run.going or len(t) == length:
            break
        v = w * _divide(run, 1.0, eta)
        V.append(v)
        Q.append(q)
    upper = torch.stack(R, -1)[..., : len(t), :]
    upper = upper + torch.diag_embed((torch.diagonal(upper, dim1=-2, dim2=-1) == 0).to(upper.dtype))  # t is zero there
    y = torch.linalg.solve_triangular(upper, torch.cat(t, -1).unsqueeze(-1), upper=True).squeeze(-1)
    x = x + run.precondition(_flip(run, V.combine(y)))
    run.report(x)
    return x


def _flip(run: System, u: Tensor) -> Tensor:
    """[*B, n, k] to [*B, k, n] and back."""
    return u if run.vector else u.mT


def _norm(u: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def _divide(run: System, a: float, b: Tensor) -> Tensor:
    """`run.divide` for scalars of flipped columns."""
    return run.divide(a, b) if run.single else _flip(run, run.divide(a, _flip(run, b)))


class _Basis:
    """Orthonormal vectors, rows of [*B, k, size, n]."""

    def __init__(self, like: Tensor, length: int):
        self.size = 0
        self._rows = like.new_empty(*like.shape[:-1], length, like.shape[-1])

    def append(self, v: Tensor) -> None:
        self._rows[..., self.size, :] = v
        self.size += 1

    def project_out(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(w - V h, h) with h = V^H w, by Gram-Schmidt, twice."""
        if not self.size:
            return w, w[..., :0]
        V = self._matrix()
        h = (V @ w.conj().unsqueeze(-1)).squeeze(-1).conj()
        w = w - (h.unsqueeze(-2) @ V).squeeze(-2)
        more = (V @ w.conj().unsqueeze(-1)).squeeze(-1).conj()
        return w - (more.unsqueeze(-2) @ V).squeeze(-2), h + more

    def combine(self, y: Tensor) -> Tensor:
        return (y.unsqueeze(-2) @ self._matrix()).squeeze(-2)

    def _matrix(self) -> Tensor:
        return self._rows[..., : self.size, :]
