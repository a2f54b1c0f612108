"""`utils` of torchsparsegradutils 0.2.7: iterative solvers, and sparse matrices taken apart and put together."""

from .bicgstab import BICGSTABSettings, bicgstab
from .linear_cg import CGInfo, LinearCGSettings, linear_cg
from .lsmr import lsmr
from .minres import MINRESSettings, minres
from .utils import (
    convert_coo_to_csr,
    convert_coo_to_csr_indices_values,
    sparse_block_diag,
    sparse_block_diag_split,
    sparse_eye,
    stack_csr,
)

__all__ = [
    "BICGSTABSettings",
    "CGInfo",
    "LinearCGSettings",
    "MINRESSettings",
    "bicgstab",
    "convert_coo_to_csr",
    "convert_coo_to_csr_indices_values",
    "linear_cg",
    "lsmr",
    "minres",
    "sparse_block_diag",
    "sparse_block_diag_split",
    "sparse_eye",
    "stack_csr",
]
