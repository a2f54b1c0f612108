"""The arguments of torchsparsegradutils' LSMR, over `spcache.iterative.lsmr`."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from torch import Tensor

from ....iterative import as_operator
from ....iterative import lsmr as engine
from .closure import Closure, closure

__all__ = ["lsmr"]


@torch.no_grad()
def lsmr(
    A: Tensor | Closure,
    b: Tensor,
    Armat: Tensor | Closure | None = None,
    n: int | None = None,
    damp: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    maxiter: int | None = None,
    x0: Tensor | None = None,
    check_nonzero: bool = True,
) -> tuple[Tensor, int]:
    """(x [n], iterations): x minimizes ||A x - b||^2 + damp^2 ||x - x0||^2. Warns where it does not get there.

    Args:
        A: [m, n], or a function of [n].
        b: [m]; [m, k] with k > 1, which gives x [n, k].
        Armat: A^H, or a function of [m]; None: that of the tensor A.
        n: needed where A is a function.
        atol, btol, conlim, maxiter: as in `spcache.iterative.lsmr`.
        check_nonzero: of no effect; a division by zero is always noticed.

    Raises:
        RuntimeError: A or Armat is neither a tensor nor callable, or n is missing.
    """
    if b.dim() > 1 and (b.shape[-1] == 1 or (isinstance(A, Tensor) and b.shape[0] != A.shape[0])):
        b = b.squeeze()
    if isinstance(A, Tensor):
        n = A.shape[1] if n is None else n
        operator = as_operator(A)
        matvec, rmatvec = operator.apply, operator.adjoint
        if Armat is not None:
            rmatvec = closure(Armat)
    else:
        matvec = closure(A)
        if n is None:
            raise RuntimeError("n needs to be provided or computed from A given as a tensor")
        rmatvec = closure(Armat)
    x, status = engine(
        SimpleNamespace(matvec=matvec, rmatvec=rmatvec, shape=(len(b), n)), b, x0,
        damp=damp, atol=atol, btol=btol, conlim=conlim, maxiter=maxiter, check=False,
    )  # fmt: skip
    iterations = int(status.iterations.max()) if status.iterations.numel() else 0
    if not bool(status.converged.all()):
        warnings.warn(f"lsmr: no minimum in {iterations} iterations", UserWarning, stacklevel=2)
    return x, iterations
