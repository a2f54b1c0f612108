# distutils: language = c++
"""The LDL engine's native objects: the plan of a symmetric structure, and the storage of factors.

Tensors come as addresses, their sizes beside them. The GIL is released around analysis, factorization and solves.
"""
include "pivoted.pxi"


cdef extern from "kernels/ldl.hpp" namespace "spcache" nogil:
    cdef cppclass IndefiniteKernels:
        pass
    const IndefiniteKernels* indefinite_baseline(Dtype, bool)
    const IndefiniteKernels* indefinite_avx2(Dtype, bool)
    const IndefiniteKernels* indefinite_avx512(Dtype, bool)
    cdef cppclass LdlPlan(PivotedPlan):
        LdlPlan(int32_t, const int64_t*, const int32_t*, const int64_t*, const int32_t*, const int32_t*,
                const int32_t*) except +
        int64_t lift(const char*, int, int32_t*) except +
    cdef cppclass LdlFactors(PivotedFactors):
        bool trial(const CAssembly&, const void*, const Schedule&, PivotedWorkspace&, char*) except +
    LdlFactors* ldl_factors(const LdlPlan&, Dtype, int64_t, const IndefiniteKernels*,
                            const IndefiniteKernels*) except +

cdef extern from "kernels/matching.hpp" namespace "spcache" nogil:
    bool c_pair "spcache::pair"(int32_t, const int64_t*, const int32_t*, const double*, int32_t*) except +

cdef extern from *:
    """
    #if !defined(__x86_64__)
    namespace spcache {
    static const IndefiniteKernels* indefinite_avx2(Dtype d, bool h) { return indefinite_baseline(d, h); }
    static const IndefiniteKernels* indefinite_avx512(Dtype d, bool h) { return indefinite_baseline(d, h); }
    }
    #endif
    """


def pair(int64_t[::1] indptr, int32_t[::1] indices, double[::1] sizes):
    """[n; int32] the partner of each row of a lower triangle with entries of these sizes, itself where it has none; None
    where the structure of what is not zero is singular."""
    cdef int64_t n = indptr.shape[0] - 1
    cdef bool regular
    check_lower(indptr, indices, n)
    if sizes.shape[0] != indices.shape[0]:
        raise ValueError("sizes differ from the entries in number")
    cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
    cdef const double* S = &sizes[0] if indices.shape[0] else NULL
    partner = numpy.empty(n, numpy.int32)
    cdef int32_t[::1] p = partner
    with nogil:
        regular = c_pair(<int32_t> n, &indptr[0], Ai, S, &p[0])
    return partner if regular else None


cdef class Symbolic(Pivoted):
    """The plan. Immutable but for idle scratch memory.

    Args:
        indptr, indices: canonical CSC of the lower triangle.
        tree_indptr, tree_indices: a lower triangle that has it inside, of which the tree is made.
        slots: [nnz; int32] where in the latter each entry of the former is.
        perm: [n; int32] original index of each pivot. Is refined by a postorder.
        simd: 0 baseline, 1 AVX2, 2 AVX-512; the processor must have it.
    """
    def __init__(self, int64_t[::1] indptr, int32_t[::1] indices, int64_t[::1] tree_indptr, int32_t[::1] tree_indices,
                 int32_t[::1] slots, int32_t[::1] perm, int simd):
        cdef int64_t n = indptr.shape[0] - 1, k, j
        cdef bool sound = slots.shape[0] == indices.shape[0]
        check_lower(indptr, indices, n)
        check_lower(tree_indptr, tree_indices, n)
        check_permutation(perm, n)
        if sound:
            for j in range(n):
                for k in range(indptr[j], indptr[j + 1]):
                    sound = sound and tree_indptr[j] <= slots[k] < tree_indptr[j + 1] and \
                        tree_indices[slots[k]] == indices[k]
        if not sound:
            raise ValueError("slots do not lead to the same entries of the tree's structure")
        cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
        cdef const int32_t* Ti = &tree_indices[0] if tree_indices.shape[0] else NULL
        cdef const int32_t* S = &slots[0] if slots.shape[0] else NULL
        self.simd, self.entries, self.teams = simd, indices.shape[0], {}
        with nogil:
            self.plan.reset(new LdlPlan(<int32_t> n, &indptr[0], Ai, &tree_indptr[0], Ti, S, &perm[0]))

    cdef const IndefiniteKernels* kernels(self, int dtype, bool hermitian) noexcept:
        if self.simd == 2:
            return indefinite_avx512(<Dtype> dtype, hermitian)
        return indefinite_avx2(<Dtype> dtype, hermitian) if self.simd == 1 else \
            indefinite_baseline(<Dtype> dtype, hermitian)

    def lift(self, left_out, int steps):
        """The order of elimination [n; int32] with the marked rows in fronts so many steps above their own; None where
        all of them are in roots."""
        cdef const char[::1] marks = left_out.astype(numpy.int8)
        cdef int64_t moved
        if marks.shape[0] != self.plan.get().plan.n or steps < 1:
            raise ValueError(f"left_out must have {self.plan.get().plan.n} entries, and steps be positive")
        order = numpy.empty(marks.shape[0], numpy.int32)
        cdef int32_t[::1] o = order
        with nogil:
            moved = (<LdlPlan*> self.plan.get()).lift(&marks[0], steps, &o[0])
        return order if moved else None


cdef class Storage(PivotedStorage):
    """The factors of one batch of values; one status and one report per matrix."""

    def __init__(self, Symbolic symbolic, int dtype, int64_t batch):
        self.begin(symbolic, dtype, batch)
        self.factors.reset(ldl_factors((<const LdlPlan*> symbolic.plan.get())[0], <Dtype> dtype, batch,
                                       symbolic.kernels(dtype, False), symbolic.kernels(dtype, True)))

    def trial(self, assembly, uintptr_t values, int64_t nnz):
        """[n; bool] rows of the first of values [batch, nnz] that find no tolerable pivot in their fronts; None where
        it is not finite. The factor of the first matrix is lost."""
        cdef uintptr_t address = assembly.address
        cdef const CAssembly* a = <const CAssembly*> address
        cdef bool finite
        if a.groups != 1 or a.nnz != nnz or (values == 0 and nnz):
            raise ValueError("the assembly belongs to another plan, or the values have another length or no memory")
        cdef Team team = self.symbolic.team(1)
        cdef vector[PivotedWorkspace*] work
        cdef list lent = self.borrow(team, 1, work)
        left_out = numpy.empty(self.symbolic.plan.get().plan.n, numpy.int8)
        cdef char[::1] marks = left_out
        with nogil:
            finite = (<LdlFactors*> self.factors.get()).trial(a[0], <const void*> values, team.schedule.get()[0],
                                                              work[0][0], &marks[0])
        team.idle[self.dtype] += lent
        return left_out != 0 if finite else None

    def inertia(self):
        """[batch, 3; int64] positive and negative eigenvalues, and those whose sign replaced pivots leave open."""
        cdef int64_t e
        cdef Report r
        out = numpy.empty((self.batch, 3), numpy.int64)
        cdef int64_t[:, ::1] o = out
        for e in range(self.batch):
            r = self.factors.get().reports[e]
            o[e, 0], o[e, 1], o[e, 2] = r.positive, r.negative, r.replaced
        return out
