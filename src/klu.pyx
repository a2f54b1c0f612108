# distutils: language = c++
"""The KLU engine's native objects: the analysis of a structure, and the storage of factors.

Tensors come as addresses, their sizes beside them. The GIL is released around analysis, factorization and solves.
Scratch memory is lent from a list that is touched only while the GIL is held, so no lock is needed and a fork finds
it whole.
"""
from libc.math cimport NAN
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libcpp cimport bool
from libcpp.memory cimport unique_ptr

import numpy

from klu cimport (
    BTF_MAIN_VERSION, BTF_SUB_VERSION, BTF_SUBSUB_VERSION, COLAMD_MAIN_VERSION, COLAMD_SUB_VERSION, COLAMD_SUBSUB_VERSION,
    KLU_INVALID, KLU_MAIN_VERSION, KLU_OK, KLU_SUB_VERSION, KLU_SUBSUB_VERSION, Analysis, CAssembly, Dtype, Factors,
    Look, SuiteSparse_version, analyze,
)
from threads cimport Workers


def use_workers(uintptr_t address):
    """Takes threads from there (_pattern.workers) from now on."""
    Workers.adopt(<Workers*> address)


def suitesparse():
    """The version of SuiteSparse that is loaded."""
    cdef int version[3]
    SuiteSparse_version(version)
    return ".".join(map(str, version))


ORDERINGS = ("amd", "colamd", "natural")  # as KLU numbers them
LIBRARIES = {  # what this was built with, but for the first
    "SuiteSparse": f"{suitesparse()} loaded",
    "KLU": f"{KLU_MAIN_VERSION}.{KLU_SUB_VERSION}.{KLU_SUBSUB_VERSION}, 32-bit indices, 64-bit ones for factors that need them",
    "BTF": f"{BTF_MAIN_VERSION}.{BTF_SUB_VERSION}.{BTF_SUBSUB_VERSION}, as KLU",
    "COLAMD": f"{COLAMD_MAIN_VERSION}.{COLAMD_SUB_VERSION}.{COLAMD_SUBSUB_VERSION}, as KLU",
}


cdef class Memory:
    """One block. Freed with the object."""
    cdef void* data
    cdef size_t nbytes

    def __cinit__(self, size_t nbytes):
        self.data = malloc(nbytes)
        if self.data == NULL:
            raise MemoryError(f"cannot allocate {nbytes} bytes of scratch memory")
        self.nbytes = nbytes

    def __dealloc__(self):
        free(self.data)


cdef class Symbolic:
    """The plan: block triangular form and ordering. Immutable, but for idle scratch memory and the 64-bit twin that
    is made when a factor first outgrows 32-bit indices.

    Args:
        indptr, indices: canonical CSC.
        ordering: one of ORDERINGS, inside the blocks of the block triangular form.
        wide: 64-bit indices from the start.
        permutation: [n; int32] used instead of an ordering of KLU's, which `ordering` then only names.
    """
    cdef unique_ptr[Analysis] first  # as analyzed; Storages that began with it keep using it
    cdef unique_ptr[Analysis] wide   # 64-bit indices, once needed
    cdef readonly str ordering
    cdef list idle                   # Memory that no call uses at the moment

    def __init__(self, int64_t[::1] indptr, int32_t[::1] indices, str ordering, bool wide=False,
                 int32_t[::1] permutation=None):
        cdef int64_t n = indptr.shape[0] - 1
        cdef int code = ORDERINGS.index(ordering) if permutation is None else 0, status = KLU_OK
        cdef const int32_t* given = NULL
        if permutation is not None:
            if permutation.shape[0] != n or n < 1:
                raise ValueError(f"the permutation must have {n} numbers, got {permutation.shape[0]}")
            if not numpy.array_equal(numpy.sort(permutation), numpy.arange(n)):
                raise ValueError(f"the permutation does not list each of 0..{n - 1} once")
            given = &permutation[0]
        if n < 1 or indices.shape[0] < 1 or indptr[n] != indices.shape[0]:
            raise ValueError("indptr and indices do not fit each other, or are empty")
        self.ordering, self.idle = ordering, []
        with nogil:
            self.first.reset(analyze(n, &indptr[0], &indices[0], code, given, wide, &status))
        if self.first.get() == NULL:
            if status == KLU_INVALID:
                raise ValueError("the structure is not valid CSC")
            raise MemoryError(f"KLU analysis (status {status})")

    @property
    def n(self):
        return self.first.get().n

    @property
    def structural_rank(self):
        """Below n the matrix is singular whatever its values."""
        return self.first.get().rank

    @property
    def nnz(self):
        """Entries of the factor as AMD predicts them without pivoting; of A alone where another ordering was chosen."""
        return self.first.get().nnz

    @property
    def flops(self):
        return self.first.get().flops if self.first.get().flops >= 0 else NAN

    @property
    def largest_block(self):
        """Rows of the largest block of the block triangular form."""
        return self.first.get().largest_block

    @property
    def nbytes(self):
        """Memory of the plan and of idle scratch."""
        cdef int64_t total = self.first.get().nbytes() + (self.wide.get().nbytes() if self.wide.get() != NULL else 0)
        return total + sum([(<Memory> memory).nbytes for memory in list(self.idle)])

    def trim(self):
        """Lets go of idle scratch memory."""
        self.idle.clear()

    cdef int widen(self) except -1:
        """Analyzes with 64-bit indices; two threads may meet here, the first one's result stays."""
        cdef int status = KLU_OK
        cdef unique_ptr[Analysis] wide
        if self.wide.get() == NULL:
            with nogil:
                wide.reset(self.first.get().widened(&status))
            if wide.get() == NULL:
                raise MemoryError(f"KLU analysis (status {status})")
            if self.wide.get() == NULL:
                self.wide.swap(wide)
        return 0

    cdef Memory borrow(self, size_t nbytes):
        cdef Memory memory
        if self.idle:
            memory = self.idle.pop()
            if memory.nbytes >= nbytes:
                return memory
        return Memory(nbytes)


cdef class Storage:
    """The factors of one batch of values: one klu_numeric per matrix, made by the first factorize. strict: pivots are
    chosen for accuracy, whatever fill they make."""
    cdef readonly Symbolic symbolic
    cdef readonly int64_t batch
    cdef readonly int dtype
    cdef unique_ptr[Factors] factors  # refers to an Analysis of `symbolic`
    cdef bool wide, strict

    def __init__(self, Symbolic symbolic, int dtype, int64_t batch, bool strict=False):
        if not 0 <= dtype < 4 or batch < 1:
            raise ValueError("unknown scalar type, or empty batch")
        self.symbolic, self.dtype, self.batch, self.strict = symbolic, dtype, batch, strict
        self.begin(symbolic.wide.get() != NULL)

    cdef int begin(self, bool wide) except -1:
        """Empty storage, with the 64-bit analysis or the first one."""
        cdef Analysis* analysis = self.symbolic.wide.get() if wide else self.symbolic.first.get()
        self.factors.reset(analysis.factors(<Dtype> self.dtype, self.batch, self.strict))
        self.wide = wide
        return 0

    @property
    def nbytes(self):
        return self.factors.get().nbytes()

    @property
    def nnz(self):
        """Stored entries of the largest factor, 0 before there is one."""
        return self.factors.get().nnz()

    @property
    def refactorized(self):
        """Some matrix of the last factorize kept pivots chosen for earlier values."""
        return self.factors.get().kept > 0

    @property
    def repivots(self):
        return self.factors.get().repivots

    def factorize(self, assembly, uintptr_t values, int64_t nnz, bool check, Storage template=None, int threads=1):
        """Factors values [batch, nnz]. See spcache/engines/protocol.py; threads share the batch."""
        cdef uintptr_t address = assembly.address
        cdef const CAssembly* a = <const CAssembly*> address
        cdef const Factors* donor = NULL
        cdef Memory work
        cdef int status, used = self.factors.get().factorizing(threads)
        if a.groups != 1 or a.nnz != nnz:
            raise ValueError("the assembly belongs to another plan, or the values have another length")
        if template is not None:
            if template.symbolic is not self.symbolic or template.dtype != self.dtype:
                raise ValueError("the template belongs to another plan or scalar type")
            donor = template.factors.get()
        work = self.symbolic.borrow(used * self.factors.get().work_bytes())
        with nogil:
            status = self.factors.get().factorize(a[0], <const void*> values, check, donor, work.data, used)
        self.symbolic.idle.append(work)
        if status < KLU_OK:  # KLU reports indices that overflow as lack of memory too
            if self.wide:
                raise MemoryError(f"KLU factorization (status {status})")
            self.symbolic.widen()
            self.begin(True)
            self.factorize(assembly, values, nnz, check, template, threads)

    @property
    def doubtful(self):
        """Whether solves with some factor of the last factorize are to be refined. Never with float32 and complex64, which
        are computed in double."""
        cdef int64_t e
        cdef bool doubtful = False
        if self.dtype % 2:
            for e in range(self.batch):
                doubtful |= self.factors.get().looks[e].doubtful and self.factors.get().failed[e] < 0
        return doubtful

    @property
    def weak(self):
        """Whether some condition number was estimated."""
        cdef int64_t e
        cdef bool weak = False
        for e in range(self.batch):
            weak |= self.factors.get().looks[e].rcond == self.factors.get().looks[e].rcond  # not NaN
        return weak

    @property
    def rcond(self):
        """[batch; float64] estimated reciprocal condition numbers; NaN where no pivot gave reason to estimate."""
        cdef int64_t e
        return numpy.array([self.factors.get().looks[e].rcond for e in range(self.batch)])

    def report(self, int64_t e):
        """What a look at the pivots of one matrix said."""
        if not 0 <= e < self.batch:
            raise ValueError(f"the batch has {self.batch} matrices, got {e}")
        cdef Look look = self.factors.get().looks[e]
        return {"growth": look.growth, "rcond": look.rcond, "doubtful": look.doubtful}

    def failed_columns(self):
        """Per matrix -1, or the column at which it failed; None where all of them have a factor."""
        return list(self.factors.get().failed) if self.factors.get().failures else None

    def solve(self, uintptr_t b, uintptr_t x, int64_t count, int64_t width, uintptr_t factors, bool adjoint,
              int threads=1):
        """x[p] = A[f(p)]^-1 b[p], or A^-H. See spcache/engines/protocol.py; threads share the batch."""
        cdef const int64_t* select = <const int64_t*> factors
        cdef int64_t p
        cdef int used = self.factors.get().solving(count, count * width, threads)
        cdef Memory work
        if select == NULL and self.batch != 1 and count != self.batch:
            raise ValueError("count must be the batch where no factors are named")
        if select != NULL:
            for p in range(count):
                if not 0 <= select[p] < self.batch:
                    raise ValueError("factors names a matrix beyond the batch")
        work = self.symbolic.borrow(used * self.factors.get().work_bytes())
        with nogil:
            self.factors.get().solve(<const void*> b, <void*> x, count, width, select, adjoint, work.data, used)
        self.symbolic.idle.append(work)
