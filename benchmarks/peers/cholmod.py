"""CHOLMOD, as CVXOPT bundles it and as scikit-sparse finds it on the system."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from cases import LARGE, Array, Case
from torch import Tensor

from peers.base import THREADS, Configuration, Peer, compressed

SMALL = 20_000  # unknowns, beyond which a simplicial factorization does not win
COUNTED = 20_000  # unknowns, up to which column counts are taken from a simplicial factor


def orderings(case: Case, *known: str) -> list[str]:
    return [name for name in known if name != "amd" or case.name not in LARGE]


class Cvxopt(Peer):
    """CVXOPT's own CHOLMOD, without OpenMP, with an OpenBLAS 0.3.15 on one thread that mistakes a Zen 5.

    CVXOPT's permutation for METIS comes from scikit-sparse, where that is there.
    """

    name = "cvxopt"
    packages: ClassVar[list[str]] = ["cvxopt"]
    modules: ClassVar[list[str]] = ["cvxopt.cholmod"]
    environment: ClassVar[dict[str, str]] = {"OPENBLAS_CORETYPE": "Haswell"}

    def configurations(self) -> Iterator[Configuration]:
        known = ("amd", "metis") if find_spec("sksparse") else ("amd",)
        for ordering in orderings(self.case, *known) or known:
            yield {"ordering": ordering, "supernodal": 2}
            if self.case.n <= SMALL:
                yield {"ordering": ordering, "supernodal": 0}

    def __init__(self, case: Case) -> None:
        import cvxopt.cholmod

        super().__init__(case)
        self.cvxopt, self.cholmod = cvxopt, cvxopt.cholmod
        rows, cols = case.indices
        indptr, indices, self.positions = compressed(cols, rows, case.n, rows >= cols)
        self.storage = cvxopt.matrix(1.0, (len(indices), 1))  # the values, column by column, ...
        self.view = np.asarray(self.storage)[:, 0]  # ... and NumPy's view of the same memory
        columns = np.repeat(np.arange(case.n), np.diff(indptr)).tolist()
        self.A = cvxopt.spmatrix(self.storage, indices.tolist(), columns, (case.n, case.n))

    def analyze(self, configuration: Configuration) -> None:
        self.cholmod.options["supernodal"] = configuration["supernodal"]
        if configuration["ordering"] == "metis":  # this CHOLMOD is built without METIS: take the other's
            permutation = self.cvxopt.matrix(metis_permutation(self.case).tolist(), tc="i")
            self.F = self.cholmod.symbolic(self.A, p=permutation)
        else:
            self.F = self.cholmod.symbolic(self.A)

    def refactorize(self, values: Tensor) -> None:
        np.take(values.numpy(), self.positions, out=self.view, mode="clip")
        self.A.V = self.storage
        self.cholmod.numeric(self.A, self.F)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        x = self.cvxopt.matrix(b.numpy())
        self.cholmod.solve(self.F, x)
        return torch.from_numpy(np.asarray(x)[:, 0] if b.ndim == 1 else np.asarray(x))


class CvxoptAvx512(Cvxopt):
    name = "cvxopt-avx512"
    environment: ClassVar[dict[str, str]] = {"OPENBLAS_CORETYPE": "SkylakeX"}
    flag = "avx512f"


def metis_permutation(case: Case) -> Array:
    from sksparse.cholmod import analyze

    return analyze(lower_triangle(case)[0], mode="simplicial", ordering_method="metis").P()


def lower_triangle(case: Case) -> tuple[Any, Array]:
    """Returns the lower triangle as a SciPy CSC matrix of ones, and the positions of its values."""
    from scipy.sparse import csc_matrix

    rows, cols = case.indices
    indptr, indices, positions = compressed(cols, rows, case.n, rows >= cols)
    return csc_matrix((np.ones(len(indices)), indices, indptr), shape=(case.n, case.n)), positions


class ScikitSparse(Peer):
    """scikit-sparse: the system's CHOLMOD, which starts 4 OpenMP threads unless limited."""

    name = "scikit-sparse"
    packages: ClassVar[list[str]] = ["scikit-sparse"]
    modules: ClassVar[list[str]] = ["sksparse.cholmod", "threadpoolctl"]
    environment: ClassVar[dict[str, str]] = {"OMP_THREAD_LIMIT": "1"}

    def configurations(self) -> Iterator[Configuration]:
        for ordering in orderings(self.case, "amd", "metis", "nesdis"):
            if self.case.n <= SMALL:
                yield {"ordering": ordering, "mode": "simplicial", "threads": 1}
            for threads in THREADS[-1:] if self.case.name in LARGE else THREADS:
                yield {"ordering": ordering, "mode": "supernodal", "threads": threads}

    def __init__(self, case: Case) -> None:
        from sksparse import cholmod

        super().__init__(case)
        self.cholmod = cholmod
        self.A, self.positions = lower_triangle(case)

    def analyze(self, configuration: Configuration) -> None:
        self.F = self.cholmod.analyze(
            self.A, mode=configuration["mode"], ordering_method=configuration["ordering"], use_long=False
        )

    def refactorize(self, values: Tensor) -> None:
        np.take(values.numpy(), self.positions, out=self.A.data, mode="clip")
        self.F.cholesky_inplace(self.A)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        return torch.from_numpy(self.F.solve_A(b.numpy()))

    def facts(self, configuration: Configuration) -> dict[str, Any]:
        """Exact column counts, from a simplicial factor."""
        if self.case.n > COUNTED:
            return {}
        self.analyze(configuration | {"mode": "simplicial"})
        self.refactorize(torch.from_numpy(self.case.values(0)))
        counts = np.diff(self.F.L().indptr).astype(float)
        return {"nnz": counts.sum(), "flops": (counts**2).sum()}


class ScikitSparseAvx512(ScikitSparse):
    name = "scikit-sparse-avx512"
    environment: ClassVar[dict[str, str]] = ScikitSparse.environment | {"OPENBLAS_CORETYPE": "SkylakeX"}
    flag = "avx512f"
