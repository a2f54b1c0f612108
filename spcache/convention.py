"""`Convention`: how stored values make up the matrix, in the two products that this takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.protocol import DTYPE_CODES
from .memory import plain
from .pattern import Pattern

__all__ = ["CONJUGATED", "NONE", "TRANSPOSED", "Convention"]

NONE, TRANSPOSED, CONJUGATED = 0, 1, 2  # how an entry is mirrored across the diagonal; as in kernels/pattern.hpp


@dataclass(frozen=True)
class Convention:
    """S is linear in the stored values v: entry k at (i, j) adds

        general                 v_k E_ij
        symmetric, hermitian    w_k (v_k E_ij + v~_k E_ji),   v~ = v or conj(v),

    with w_k = 1/2, except 1 off the diagonal where only one triangle is stored.

    Both products run native code on the CPU and torch operations elsewhere, on tensors that have memory, and know
    nothing of derivatives; cost O(nnz k).

    Attributes:
        pattern: where the values stand.
        mirror: NONE, TRANSPOSED or CONJUGATED.
        one_triangle: only one triangle is stored, and mirrored.
        threads: the most threads that `outer` uses; None: as many as torch.
    """

    pattern: Pattern
    mirror: int
    one_triangle: bool
    threads: int | None = None

    def outer(self, u: Tensor, w: Tensor, vector: bool = False) -> Tensor:
        """Gradient at the stored values of the gradient G = -u w^H at S: G_ij, or w_k (G_ij + G~_ji).

        u is [*P, m, k] and w [*P, n, k], without k if vector; the result is [*P, nnz]."""
        if not u.is_cpu:
            return self.outer_by_torch(u, w, vector)
        u, w = plain(u), plain(w)
        batch = u.shape[:-1] if vector else u.shape[:-2]
        out = u.new_empty((*batch, self.pattern.nnz))
        width = 1 if vector else u.shape[-1]
        if width == 0:
            return out.zero_()
        if out.numel():
            pairs = self.mirror != NONE and not self.one_triangle
            (self.pattern.paired if pairs else self.pattern.entries).outer(
                u.data_ptr(), w.data_ptr(), out.data_ptr(), math.prod(batch), self.pattern.m, self.pattern.n, width,
                DTYPE_CODES[u.dtype], self.mirror, self.one_triangle, self.threads or torch.get_num_threads(),
            )  # fmt: skip
        return out

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool) -> Tensor:
        """S x, or S^H x; values [*B, nnz] and x [*P, n, k] broadcast."""
        if not x.is_cpu:
            return self.matvec_by_torch(values, x, adjoint)
        size = self.pattern.n if adjoint else self.pattern.m
        batch = torch.broadcast_shapes(values.shape[:-1], x.shape[:-2])
        stride = 0
        if values.dim() > 1:
            values, stride = values.expand(*batch, values.shape[-1]), values.shape[-1]
        values, x = plain(values), plain(x.expand(*batch, *x.shape[-2:]))
        y = torch.zeros((*batch, size, x.shape[-1]), dtype=x.dtype, device=x.device)
        if y.numel() and values.numel():
            self.pattern.entries.matvec(
                values.data_ptr(), stride, x.data_ptr(), x.shape[-2], y.data_ptr(), size, math.prod(batch),
                x.shape[-1], DTYPE_CODES[x.dtype], self.mirror, self.one_triangle, adjoint,
            )  # fmt: skip
        return y

    def outer_by_torch(self, u: Tensor, w: Tensor, vector: bool = False) -> Tensor:
        """`outer` on any device."""
        u, w = (u.unsqueeze(-1), w.unsqueeze(-1)) if vector else (u, w)
        rows, columns = self.pattern.on(u.device)

        def product(i: Tensor, j: Tensor) -> Tensor:
            return (u.index_select(-2, i) * w.index_select(-2, j).conj()).sum(-1)

        G = product(rows, columns)
        if self.mirror == NONE:
            return -G
        other = product(columns, rows)
        return -self._weights(rows, columns, u.dtype) * (G + (other.conj() if self.mirror == CONJUGATED else other))

    def matvec_by_torch(self, values: Tensor, x: Tensor, adjoint: bool) -> Tensor:
        """`matvec` on any device. torch.use_deterministic_algorithms makes the order of the sums certain."""
        rows, columns = self.pattern.on(x.device)
        size = self.pattern.n if adjoint else self.pattern.m
        batch = torch.broadcast_shapes(values.shape[:-1], x.shape[:-2])
        y = torch.zeros((*batch, size, x.shape[-1]), dtype=x.dtype, device=x.device)

        def add(i: Tensor, j: Tensor, v: Tensor) -> None:
            terms = v.unsqueeze(-1) * x.index_select(-2, j)
            y.index_add_(-2, i, terms.expand(*batch, *terms.shape[-2:]))

        v = values.conj() if adjoint else values
        if self.mirror == NONE:
            add(*((columns, rows) if adjoint else (rows, columns)), v)
            return y
        if self.mirror == CONJUGATED:  # S^H = S
            v = values
        v = self._weights(rows, columns, v.dtype) * v
        add(rows, columns, v)
        add(columns, rows, v.conj() if self.mirror == CONJUGATED else v)
        return y

    def _weights(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor | float:
        """w_k, real."""
        return 0.5 * (1 + (rows != columns).to(dtype.to_real())) if self.one_triangle else 0.5
