"""The arguments of torchsparsegradutils' MINRES, over `spcache.iterative.minres`."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ....iterative import recorded
from .closure import Closure, closure

__all__ = ["MINRESSettings", "minres"]

_EPS = 1e-25


class MINRESSettings(NamedTuple):
    """
    Attributes:
        max_cg_iterations: most iterations.
        minres_tolerance: done when ||b - A x|| <= minres_tolerance ||b||.
        verbose_linalg: print a line at the start.
    """

    max_cg_iterations: int = 1000
    minres_tolerance: float = 1e-4
    verbose_linalg: bool = False


def minres(
    matmul_closure: Tensor | Closure,
    rhs: Tensor,
    eps: float = _EPS,
    shifts: Tensor | float | None = None,
    value: float | None = None,
    max_iter: int | None = None,
    preconditioner: Closure | None = None,
    settings: MINRESSettings = MINRESSettings(),  # noqa: B008
) -> Tensor:
    """X with (value A + shift) X = rhs for a symmetric A. Warns where a column does not get to the tolerance.

    Autograd records the derivative of the iterations, not of the solution: wrong where they end early. For that of the
    solution take `sparse_generic_solve`.

    Args:
        matmul_closure: A, [n, n] or [*B, n, n], or a function of [*B, n, k].
        rhs: [n] or [*B, n, k].
        eps: only the default; nothing here needs it.
        shifts: one number, or [s, ...]: s systems, solved one after the other; further dimensions go with those of B.
        value: None: 1.
        max_iter: instead of the settings'.
        preconditioner: r [*B, n, k] -> M r, a new tensor; positive definite.

    Returns:
        X of the shape of rhs, broadcast with B; with s > 1 shifts [s, ...].

    Raises:
        RuntimeError: A is neither a tensor nor callable.
        NotImplementedError: eps is not the default.
        As `spcache.iterative.minres`.
    """
    if eps != _EPS:
        raise NotImplementedError("eps has no meaning here; leave it out")
    multiply = closure(matmul_closure)
    b = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
    if isinstance(matmul_closure, Tensor):
        b = b.expand(*torch.broadcast_shapes(matmul_closure.shape[:-2], b.shape[:-2]), *b.shape[-2:])
    else:
        b = b.expand(multiply(b).shape)
    many = torch.zeros(()) if shifts is None else torch.as_tensor(shifts, dtype=b.dtype, device=b.device)
    maxiter = settings.max_cg_iterations if max_iter is None else max_iter
    if settings.verbose_linalg:
        print(f"minres: {tuple(b.shape)}, at most {maxiter} iterations, tolerance {settings.minres_tolerance}")

    def solve(shift: Tensor) -> Tensor:
        shift = shift.reshape(*shift.shape, *[1] * (b.dim() - shift.dim()))

        def apply(x: Tensor) -> Tensor:
            y = multiply(x) if value is None else value * multiply(x)
            return y if shifts is None else y + shift * x

        x, status = recorded.minres(
            SimpleNamespace(matmul=apply, shape=(*b.shape[:-2], b.shape[-2], b.shape[-2])),
            b, rtol=settings.minres_tolerance, maxiter=maxiter, M=preconditioner,
        )  # fmt: skip
        if not bool(status.converged.all()):
            warnings.warn(
                f"minres: {int((~status.converged).sum())} of {status.converged.numel()} right-hand sides did not get "
                f"to the tolerance {settings.minres_tolerance:.3g} in {int(status.iterations.max())} iterations",
                UserWarning,
                stacklevel=3,
            )
        return x.squeeze(-1) if rhs.dim() == 1 else x

    if many.numel() == 1:
        return solve(many.reshape(()))
    return torch.stack([solve(shift) for shift in many])
