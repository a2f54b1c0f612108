# distutils: language = c++
"""The LDL engine's native objects: the plan of a symmetric structure, and the storage of factors.

Tensors come as addresses, their sizes beside them. The GIL is released around analysis, factorization and solves.
Scratch memory is lent from lists that are touched only while the GIL is held, so no lock is needed and a fork finds
them whole.
"""
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libcpp cimport bool
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

import numpy


cdef extern from "kernels/multifrontal.hpp" namespace "spcache" nogil:
    ctypedef int Dtype
    cdef struct CAssembly "spcache::Assembly":
        int64_t nnz, groups

cdef extern from "kernels/analysis.hpp" namespace "spcache" nogil:
    cdef struct Prediction:
        int64_t nnz
        double flops
    cdef cppclass Plan:
        Prediction prediction
        int32_t n, supernodes, largest_front
        vector[int32_t] perm
        vector[int64_t] panel
    cdef cppclass Schedule:
        Schedule(const Plan&, int) except +
        int useful
        int sharing(int64_t, int)
        @staticmethod
        int sharing_solves(int64_t, int64_t, int)

cdef extern from "kernels/ldl.hpp" namespace "spcache" nogil:
    cdef cppclass IndefiniteKernels:
        pass
    const IndefiniteKernels* indefinite_baseline(Dtype, bool)
    const IndefiniteKernels* indefinite_avx2(Dtype, bool)
    const IndefiniteKernels* indefinite_avx512(Dtype, bool)
    cdef struct Report:
        int64_t positive, negative, replaced
        double growth, multiplier, weakest
    cdef cppclass LdlPlan:
        LdlPlan(int32_t, const int64_t*, const int32_t*, const int64_t*, const int32_t*, const int32_t*,
                const int32_t*) except +
        Plan plan
        int64_t nbytes()
        int64_t lift(const char*, int, int32_t*) except +
    cdef cppclass LdlWorkspace:
        LdlWorkspace(const LdlPlan&, const Schedule&, const IndefiniteKernels&, int64_t, int) except +
        int64_t nbytes
    cdef cppclass LdlFactors:
        vector[int64_t] failed
        vector[int32_t] verdict
        vector[Report] reports
        vector[char] refined
        void factorize(const CAssembly&, const void*, bool, const Schedule&, LdlWorkspace**, int, int) except +
        bool trial(const CAssembly&, const void*, const Schedule&, LdlWorkspace&, char*) except +
        const IndefiniteKernels& kernels()
        int64_t nbytes()
    LdlFactors* ldl_factors(const LdlPlan&, Dtype, int64_t, const IndefiniteKernels*,
                            const IndefiniteKernels*) except +
    int64_t ldl_solve(const LdlFactors&, const void*, void*, int64_t, int64_t, int64_t, const int64_t*, bool,
                      const Schedule&, LdlWorkspace**, int, int) except +
    void ldl_magnitudes(const CAssembly&, Dtype, const void*, int64_t, double*) except +

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


cdef int ITEMSIZE[4]
ITEMSIZE[:] = [4, 8, 8, 16]


cdef int check_lower(int64_t[::1] indptr, int32_t[::1] indices, int64_t n) except -1:
    """Raises unless these are the columns of a lower triangle of order n."""
    cdef int64_t j, e
    cdef bool sound = n > 0 and indptr.shape[0] == n + 1 and indptr[0] == 0 and indptr[n] == indices.shape[0]
    if sound:
        for j in range(n):
            sound = sound and indptr[j] <= indptr[j + 1]
    if sound:
        for j in range(n):
            for e in range(indptr[j], indptr[j + 1]):
                sound = sound and j <= indices[e] < n
    if not sound:
        raise ValueError("indptr and indices are not the columns of a lower triangle")
    return 0


def magnitudes(assembly, uintptr_t values, int64_t nnz, int dtype, int64_t slots):
    """[slots; float64] sizes of the entries that values [nnz] add up to; the assembly has one group."""
    cdef uintptr_t address = assembly.address
    cdef const CAssembly* a = <const CAssembly*> address
    if a.groups != 1 or a.nnz != nnz or not 0 <= dtype < 4:
        raise ValueError("the assembly belongs to another plan, or the values have another length")
    out = numpy.empty(slots)
    cdef double[::1] o = out
    if slots:
        with nogil:
            ldl_magnitudes(a[0], <Dtype> dtype, <const void*> values, slots, &o[0])
    return out


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


cdef class Workspace:
    """Scratch memory of one call."""
    cdef unique_ptr[LdlWorkspace] own


cdef class Team:
    """A schedule for a number of threads, and idle workspaces for it, a list per scalar type."""
    cdef unique_ptr[Schedule] schedule
    cdef int threads  # that find work
    cdef list idle    # of Workspace


cdef class Symbolic:
    """The plan. Immutable but for idle scratch memory.

    Args:
        indptr, indices: canonical CSC of the lower triangle.
        tree_indptr, tree_indices: a lower triangle that has it inside, of which the tree is made.
        slots: [nnz; int32] where in the latter each entry of the former is.
        perm: [n; int32] original index of each pivot. Is refined by a postorder.
        simd: 0 baseline, 1 AVX2, 2 AVX-512; the processor must have it.
    """
    cdef unique_ptr[LdlPlan] plan
    cdef int simd
    cdef readonly int64_t entries
    cdef dict teams  # number of threads -> Team

    def __init__(self, int64_t[::1] indptr, int32_t[::1] indices, int64_t[::1] tree_indptr, int32_t[::1] tree_indices,
                 int32_t[::1] slots, int32_t[::1] perm, int simd):
        cdef int64_t n = indptr.shape[0] - 1, k, j
        cdef vector[char] seen
        cdef bool sound
        check_lower(indptr, indices, n)
        check_lower(tree_indptr, tree_indices, n)
        seen.assign(n, 0)
        sound = perm.shape[0] == n and slots.shape[0] == indices.shape[0]
        if sound:
            for k in range(n):
                sound = sound and 0 <= perm[k] < n and not seen[perm[k]]
                if not sound:
                    break
                seen[perm[k]] = 1
        if sound:
            for j in range(n):
                for k in range(indptr[j], indptr[j + 1]):
                    sound = sound and tree_indptr[j] <= slots[k] < tree_indptr[j + 1] and \
                        tree_indices[slots[k]] == indices[k]
        if not sound:
            raise ValueError(f"perm is not a permutation of 0..{n - 1}, or slots do not lead to the same entries")
        cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
        cdef const int32_t* Ti = &tree_indices[0] if tree_indices.shape[0] else NULL
        cdef const int32_t* S = &slots[0] if slots.shape[0] else NULL
        self.simd, self.entries, self.teams = simd, indices.shape[0], {}
        with nogil:
            self.plan.reset(new LdlPlan(<int32_t> n, &indptr[0], Ai, &tree_indptr[0], Ti, S, &perm[0]))

    cdef Team team(self, int threads):
        """The team of that size; two threads that make it at once make the same."""
        cdef Team team = self.teams.get(threads)
        if team is None:
            team = Team()
            team.idle = [[], [], [], []]
            with nogil:
                team.schedule.reset(new Schedule(self.plan.get().plan, threads))
            team.threads = team.schedule.get().useful
            team = self.teams.setdefault(threads, team)
        return team

    cdef const IndefiniteKernels* kernels(self, int dtype, bool hermitian) noexcept:
        if self.simd == 2:
            return indefinite_avx512(<Dtype> dtype, hermitian)
        return indefinite_avx2(<Dtype> dtype, hermitian) if self.simd == 1 else \
            indefinite_baseline(<Dtype> dtype, hermitian)

    @property
    def nnz(self):
        """Entries of L by the column counts, before amalgamation adds explicit zeros."""
        return self.plan.get().plan.prediction.nnz

    @property
    def stored(self):
        """Numbers stored for one factor."""
        return self.plan.get().plan.panel.back()

    @property
    def flops(self):
        return self.plan.get().plan.prediction.flops

    @property
    def supernodes(self):
        return self.plan.get().plan.supernodes

    @property
    def largest_front(self):
        return self.plan.get().plan.largest_front

    @property
    def perm(self):
        """[n; int32] original index of pivot k."""
        return numpy.asarray(self.plan.get().plan.perm, numpy.int32)

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
            moved = self.plan.get().lift(&marks[0], steps, &o[0])
        return order if moved else None

    @property
    def nbytes(self):
        """Memory of the plan and of idle scratch."""
        cdef int64_t total = self.plan.get().nbytes()
        cdef Team team
        for team in list(self.teams.values()):
            total += 8 * self.plan.get().plan.supernodes
            for idle in team.idle:
                total += sum([(<Workspace> workspace).own.get().nbytes for workspace in list(idle)])
        return total

    def trim(self):
        """Lets go of idle scratch memory."""
        cdef Team team
        for team in list(self.teams.values()):
            for idle in team.idle:
                idle.clear()


cdef class Storage:
    """The factors of one batch of values; one status and one report per matrix."""
    cdef readonly Symbolic symbolic
    cdef readonly int64_t batch
    cdef readonly int dtype
    cdef unique_ptr[LdlFactors] factors

    def __init__(self, Symbolic symbolic, int dtype, int64_t batch):
        if not 0 <= dtype < 4 or batch < 1:
            raise ValueError("unknown scalar type, or empty batch")
        self.symbolic, self.dtype, self.batch = symbolic, dtype, batch
        self.factors.reset(ldl_factors(symbolic.plan.get()[0], <Dtype> dtype, batch, symbolic.kernels(dtype, False),
                                       symbolic.kernels(dtype, True)))

    @property
    def nbytes(self):
        return self.factors.get().nbytes()

    @property
    def nnz(self):
        return self.symbolic.nnz

    cdef list borrow(self, Team team, int count, vector[LdlWorkspace*]& work):
        """So many workspaces, idle ones or new ones."""
        cdef list idle = team.idle[self.dtype], lent = []
        cdef Workspace workspace
        for _ in range(count):
            if idle:
                workspace = idle.pop()
            else:
                workspace = Workspace()
                workspace.own.reset(new LdlWorkspace(
                    self.symbolic.plan.get()[0], team.schedule.get()[0], self.factors.get().kernels(),
                    ITEMSIZE[self.dtype], team.threads))
            lent.append(workspace)
            work.push_back(workspace.own.get())
        return lent

    def factorize(self, assembly, uintptr_t values, int64_t nnz, bool check, template=None, int threads=1):
        """Factors values [batch, nnz]. See spcache/engines/protocol.py; pivots are chosen anew each time, and the factor
        does not depend on the number of threads."""
        cdef uintptr_t address = assembly.address
        cdef const CAssembly* a = <const CAssembly*> address
        if a.groups != 1 or a.nnz != nnz or threads < 1 or (values == 0 and nnz):
            raise ValueError("the assembly belongs to another plan, or the values have another length or no memory")
        cdef int sharing = 1  # threads that share the batch; with one, `threads` share each matrix
        if self.batch > 1 and threads > 1:
            sharing = self.symbolic.team(1).schedule.get().sharing(self.batch, threads)
        cdef Team team = self.symbolic.team(1 if sharing > 1 else threads)
        cdef vector[LdlWorkspace*] work
        cdef list lent = self.borrow(team, sharing, work)
        with nogil:
            self.factors.get().factorize(a[0], <const void*> values, check, team.schedule.get()[0], work.data(), sharing,
                                         team.threads)
        team.idle[self.dtype] += lent

    def trial(self, assembly, uintptr_t values, int64_t nnz):
        """[n; bool] rows of the first of values [batch, nnz] that find no tolerable pivot in their fronts; None where
        it is not finite. The factor of the first matrix is lost."""
        cdef uintptr_t address = assembly.address
        cdef const CAssembly* a = <const CAssembly*> address
        cdef bool finite
        if a.groups != 1 or a.nnz != nnz or (values == 0 and nnz):
            raise ValueError("the assembly belongs to another plan, or the values have another length or no memory")
        cdef Team team = self.symbolic.team(1)
        cdef vector[LdlWorkspace*] work
        cdef list lent = self.borrow(team, 1, work)
        left_out = numpy.empty(self.symbolic.plan.get().plan.n, numpy.int8)
        cdef char[::1] marks = left_out
        with nogil:
            finite = self.factors.get().trial(a[0], <const void*> values, team.schedule.get()[0], work[0][0], &marks[0])
        team.idle[self.dtype] += lent
        return left_out != 0 if finite else None

    def failed_columns(self):
        """Per matrix -1, or the column at which it failed; None where all of them have a factor."""
        cdef int64_t e
        columns = [self.factors.get().failed[e] for e in range(self.batch)]
        return columns if max(columns) >= 0 else None

    def verdicts(self):
        """Per matrix 0, 1 for singular, 2 for a factor that cannot be trusted."""
        cdef int64_t e
        return [self.factors.get().verdict[e] if self.factors.get().failed[e] >= 0 else 0 for e in range(self.batch)]

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

    def report(self, int64_t e):
        """What the pivots of one matrix were like."""
        if not 0 <= e < self.batch:
            raise ValueError(f"the batch has {self.batch} matrices, got {e}")
        cdef Report r = self.factors.get().reports[e]
        return {"replaced": r.replaced, "growth": r.growth, "multiplier": r.multiplier, "weakest": r.weakest,
                "refined": self.factors.get().refined[e] != 0}

    def solve(self, uintptr_t b, uintptr_t x, int64_t count, int64_t width, uintptr_t factors, bool adjoint,
              int threads=1):
        """x[p] = A[f(p)]^-1 b[p], or A^-H; b and x are [count, n, width]. See spcache/engines/protocol.py."""
        cdef int64_t n = self.symbolic.plan.get().plan.n, p, steps
        cdef const int64_t* select = <const int64_t*> factors
        if threads < 1 or (select == NULL and self.batch != 1 and count != self.batch):
            raise ValueError("threads must be positive, and count the batch where no factors are named")
        if (b == 0 or x == 0) and count and width:
            raise ValueError("b or x has no memory")
        if select != NULL:
            for p in range(count):
                if not 0 <= select[p] < self.batch:
                    raise ValueError("factors names a matrix beyond the batch")
        cdef int sharing = Schedule.sharing_solves(count, count * width * self.symbolic.stored, threads)
        cdef Team team = self.symbolic.team(1 if sharing > 1 else threads)
        cdef vector[LdlWorkspace*] work
        cdef list lent = self.borrow(team, sharing, work)
        with nogil:
            steps = ldl_solve(self.factors.get()[0], <const void*> b, <void*> x, count, n * width * ITEMSIZE[self.dtype],
                              width, select, adjoint, team.schedule.get()[0], work.data(), sharing, team.threads)
        team.idle[self.dtype] += lent
        return steps
