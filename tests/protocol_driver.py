"""An engine called as `spcache/engines/protocol.py` says, with NumPy arrays; for the engines' own tests."""

from __future__ import annotations

import numpy as np
import torch
from cases import DTYPES, Problem, scaled_residual

from spcache.engines import DTYPE_CODES, engine_for
from spcache.pattern import Pattern

NUMPY = dict(zip(DTYPES, (np.float32, np.float64, np.complex64, np.complex128), strict=True))


class Driver:
    """The plan of one problem and its assembly.

    Args:
        engine: that of the table, unless another one is given.

    Attributes:
        matrices: dense, [batch, n, n]; the problem has one batch dimension.
        values: the same as the caller stores them, [batch, nnz].
    """

    def __init__(self, problem: Problem, ordering: str = "auto", kind: str | None = None, engine=None):
        kind = kind or problem.case.kind
        self.problem, self.n = problem, problem.n
        self.dtype = problem.case.dtype
        self.engine = engine or engine_for("cpu", kind)
        pattern = Pattern(problem.indices, problem.n, problem.n)
        parts = {"general": "stored"}
        self.contributions = getattr(pattern, parts.get(kind, "lower"))
        self.plan = self.engine.analyze(self.contributions.structure, ordering)
        self.values = np.ascontiguousarray(problem.values.numpy())
        self.nnz = self.values.shape[-1]
        self.weight = 1.0 if kind == "general" or problem.case.triangle else 0.5
        self.hermitian = kind in ("spd", "hermitian")
        self.assembly = self.assemble()
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        self.matrices = problem.matrix(problem.values.to(wide))

    def assemble(self):
        c = self.contributions
        return self.plan.assembly(self.nnz, c.slots, c.sources, c.roles, self.weight, self.hermitian)

    def storage(self, batch=None):
        return self.plan.storage(DTYPE_CODES[self.dtype], len(self.values) if batch is None else batch)

    def factorize(self, values=None, storage=None, check=True, template=None, threads=1):
        values = np.ascontiguousarray(self.values if values is None else values).reshape(-1, self.nnz)
        storage = storage or self.storage(len(values))
        storage.factorize(self.assembly, values.ctypes.data, self.nnz, check, template, threads)
        return storage

    def rhs(self, *shape, seed=0):
        return self.problem.rhs(*shape, seed=seed).numpy()

    def solve(self, storage, b, factors=None, adjoint=False, threads=1):
        """b: [count, n, width]"""
        b = np.ascontiguousarray(b)
        x = np.full_like(b, 7)
        select = None if factors is None else np.array(factors, np.int64)
        address = 0 if select is None else select.ctypes.data
        storage.solve(b.ctypes.data, x.ctypes.data, len(b), b.shape[2], address, adjoint, threads)
        return x

    def residual(self, x, b, factors=None, adjoint=False):
        """Scaled residual in units of eps."""
        A = self.matrices if factors is None else self.matrices[factors]
        A = A.mH if adjoint else A
        return scaled_residual(A, torch.from_numpy(x), torch.from_numpy(b)) / self.problem.case.eps
