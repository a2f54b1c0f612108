"""What the solvers here accept for a matrix: a tensor, or a function that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Closure", "closure"]

Closure = Callable[[Tensor], Tensor]


def closure(A: Any, name: str = "matmul_closure") -> Closure:
    if isinstance(A, Tensor):
        return (A.to_sparse_csr() if A.layout is torch.sparse_coo and A.dim() == 2 else A).matmul
    if callable(A):
        return A
    raise RuntimeError(f"{name} must be a tensor, or a callable object!")
