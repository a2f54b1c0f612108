# distutils: language = c++
"""The LU engine's native objects: the plan of a general structure, and the storage of factors.

Tensors come as addresses, their sizes beside them. The GIL is released around analysis, factorization and solves.
"""
include "pivoted.pxi"


cdef extern from "kernels/lu.hpp" namespace "spcache" nogil:
    cdef cppclass UnsymmetricKernels:
        pass
    const UnsymmetricKernels* unsymmetric_baseline(Dtype)
    const UnsymmetricKernels* unsymmetric_avx2(Dtype)
    const UnsymmetricKernels* unsymmetric_avx512(Dtype)
    cdef cppclass Kernels:
        pass
    const Kernels* kernels_baseline(Dtype)
    const Kernels* kernels_avx2(Dtype)
    const Kernels* kernels_avx512(Dtype)
    cdef cppclass LuPlan(PivotedPlan):
        LuPlan(int32_t, const int64_t*, const int32_t*, const int32_t*, const int64_t*, const int32_t*, const int32_t*,
               const int32_t*) except +
    PivotedFactors* lu_factors(const LuPlan&, Dtype, int64_t, const UnsymmetricKernels*, const Kernels*) except +

cdef extern from "kernels/matching.hpp" namespace "spcache" nogil:
    bool c_match "spcache::match"(int32_t, const int64_t*, const int32_t*, const double*, int32_t*) except +

cdef extern from *:
    """
    #if !defined(__x86_64__)
    namespace spcache {
    static const UnsymmetricKernels* unsymmetric_avx2(Dtype d) { return unsymmetric_baseline(d); }
    static const UnsymmetricKernels* unsymmetric_avx512(Dtype d) { return unsymmetric_baseline(d); }
    static const Kernels* kernels_avx2(Dtype d) { return kernels_baseline(d); }
    static const Kernels* kernels_avx512(Dtype d) { return kernels_baseline(d); }
    }
    #endif
    """


def match(int64_t[::1] indptr, int32_t[::1] indices, double[::1] logarithms):
    """[n; int32] the row of each column, so that the sum of the entries' logarithms is largest; None where no permutation
    has entries in all places."""
    cdef int64_t n = indptr.shape[0] - 1
    cdef bool regular
    check_columns(indptr, indices, n)
    if logarithms.shape[0] != indices.shape[0]:
        raise ValueError("logarithms differ from the entries in number")
    cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
    cdef const double* S = &logarithms[0] if indices.shape[0] else NULL
    rows = numpy.empty(n, numpy.int32)
    cdef int32_t[::1] r = rows
    with nogil:
        regular = c_match(<int32_t> n, &indptr[0], Ai, S, &r[0])
    return rows if regular else None


cdef class Symbolic(Pivoted):
    """The plan. Immutable but for idle scratch memory.

    Args:
        indptr, indices: canonical CSC.
        row_of: [n; int32] the row that stands on the diagonal of each column.
        tree_indptr, tree_indices: the lower triangle of the structure and its mirror image, its rows so permuted.
        slots: [nnz; int32] where in the latter each entry, or its mirror image, is.
        perm: [n; int32] original column of each pivot. Is refined by a postorder.
        simd: 0 baseline, 1 AVX2, 2 AVX-512; the processor must have it.
    """

    def __init__(self, int64_t[::1] indptr, int32_t[::1] indices, int32_t[::1] row_of, int64_t[::1] tree_indptr,
                 int32_t[::1] tree_indices, int32_t[::1] slots, int32_t[::1] perm, int simd):
        cdef int64_t n = indptr.shape[0] - 1, e, j, i
        cdef bool sound = slots.shape[0] == indices.shape[0]
        cdef vector[int32_t] column_of
        check_columns(indptr, indices, n)
        check_lower(tree_indptr, tree_indices, n)
        check_permutation(row_of, n)
        check_permutation(perm, n)
        column_of.resize(n)
        for j in range(n):
            column_of[row_of[j]] = <int32_t> j
        if sound:
            for j in range(n):
                for e in range(indptr[j], indptr[j + 1]):
                    i = column_of[indices[e]]
                    sound = sound and tree_indptr[min(i, j)] <= slots[e] < tree_indptr[min(i, j) + 1] and \
                        tree_indices[slots[e]] == max(i, j)
        if not sound:
            raise ValueError("slots do not lead to the same entries of the tree's structure")
        cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
        cdef const int32_t* Ti = &tree_indices[0] if tree_indices.shape[0] else NULL
        cdef const int32_t* S = &slots[0] if slots.shape[0] else NULL
        self.simd, self.entries, self.teams = simd, indices.shape[0], {}
        with nogil:
            self.plan.reset(new LuPlan(<int32_t> n, &indptr[0], Ai, &row_of[0], &tree_indptr[0], Ti, S, &perm[0]))

    cdef const UnsymmetricKernels* kernels(self, int dtype) noexcept:
        if self.simd == 2:
            return unsymmetric_avx512(<Dtype> dtype)
        return unsymmetric_avx2(<Dtype> dtype) if self.simd == 1 else unsymmetric_baseline(<Dtype> dtype)

    cdef const Kernels* solving(self, int dtype) noexcept:
        if self.simd == 2:
            return kernels_avx512(<Dtype> dtype)
        return kernels_avx2(<Dtype> dtype) if self.simd == 1 else kernels_baseline(<Dtype> dtype)


cdef class Storage(PivotedStorage):
    """The factors of one batch of values; one status and one report per matrix."""

    def __init__(self, Symbolic symbolic, int dtype, int64_t batch):
        self.begin(symbolic, dtype, batch)
        self.factors.reset(lu_factors((<const LuPlan*> symbolic.plan.get())[0], <Dtype> dtype, batch,
                                      symbolic.kernels(dtype), symbolic.solving(dtype)))
