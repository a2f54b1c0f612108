# What the engines with pivots chosen inside of fronts share; `ldl.pyx` and `lu.pyx` include it. Scratch memory is lent from
# lists that are touched only while the GIL is held, so no lock is needed and a fork finds them whole.
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libcpp cimport bool
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

import numpy

from threads cimport Workers


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

cdef extern from "kernels/pivoted.hpp" namespace "spcache" nogil:
    cdef struct Report:
        int64_t positive, negative, replaced
        double growth, multiplier, weakest, rcond
    cdef cppclass PivotedPlan:
        Plan plan
        int64_t nbytes()
    cdef cppclass PivotedWorkspace:
        int64_t nbytes
    cdef cppclass PivotedFactors:
        vector[int64_t] failed
        vector[int32_t] verdict
        vector[Report] reports
        vector[char] refined
        void factorize(const CAssembly&, const void*, bool, const Schedule&, PivotedWorkspace**, int, int) except +
        PivotedWorkspace* workspace(const Schedule&, int) except +
        int64_t nbytes()
    int64_t pivoted_solve(const PivotedFactors&, const void*, void*, int64_t, int64_t, int64_t, const int64_t*, bool,
                          const Schedule&, PivotedWorkspace**, int, int) except +
    void c_magnitudes "spcache::magnitudes"(const CAssembly&, Dtype, const void*, int64_t, double*) except +


cdef int ITEMSIZE[4]
ITEMSIZE[:] = [4, 8, 8, 16]


cdef int check_columns(int64_t[::1] indptr, int32_t[::1] indices, int64_t n, bool lower=False) except -1:
    """Raises unless these are the columns of a matrix of order n, of a lower triangle."""
    cdef int64_t j, e
    cdef bool sound = n > 0 and indptr.shape[0] == n + 1 and indptr[0] == 0 and indptr[n] == indices.shape[0]
    if sound:
        for j in range(n):
            sound = sound and indptr[j] <= indptr[j + 1]
    if sound:
        for j in range(n):
            for e in range(indptr[j], indptr[j + 1]):
                sound = sound and (j if lower else 0) <= indices[e] < n
    if not sound:
        raise ValueError("indptr and indices are not the columns of a " + ("lower triangle" if lower else "square matrix"))
    return 0


cdef int check_lower(int64_t[::1] indptr, int32_t[::1] indices, int64_t n) except -1:
    """Raises unless these are the columns of a lower triangle of order n."""
    return check_columns(indptr, indices, n, True)


cdef int check_permutation(int32_t[::1] perm, int64_t n) except -1:
    """Raises unless these are the numbers 0 .. n - 1 in some order."""
    cdef int64_t k
    cdef vector[char] seen
    cdef bool sound = perm.shape[0] == n
    seen.assign(n, 0)
    if sound:
        for k in range(n):
            sound = sound and 0 <= perm[k] < n and not seen[perm[k]]
            if not sound:
                break
            seen[perm[k]] = 1
    if not sound:
        raise ValueError(f"a permutation of 0..{n - 1} does not list each of them once")
    return 0


def use_workers(uintptr_t address):
    """Takes threads from there (_pattern.workers) from now on."""
    Workers.adopt(<Workers*> address)


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
            c_magnitudes(a[0], <Dtype> dtype, <const void*> values, slots, &o[0])
    return out


cdef class Workspace:
    """Scratch memory of one call."""
    cdef unique_ptr[PivotedWorkspace] own


cdef class Team:
    """A schedule for a number of threads, and idle workspaces for it, a list per scalar type."""
    cdef unique_ptr[Schedule] schedule
    cdef int threads  # that find work
    cdef list idle    # of Workspace


cdef class Pivoted:
    """The plan. Immutable but for idle scratch memory."""
    cdef unique_ptr[PivotedPlan] plan
    cdef int simd
    cdef readonly int64_t entries
    cdef dict teams  # number of threads -> Team

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


cdef class PivotedStorage:
    """The factors of one batch of values; one status and one report per matrix."""
    cdef readonly Pivoted symbolic
    cdef readonly int64_t batch
    cdef readonly int dtype
    cdef unique_ptr[PivotedFactors] factors

    cdef int begin(self, Pivoted symbolic, int dtype, int64_t batch) except -1:
        if not 0 <= dtype < 4 or batch < 1:
            raise ValueError("unknown scalar type, or empty batch")
        self.symbolic, self.dtype, self.batch = symbolic, dtype, batch
        return 0

    @property
    def nbytes(self):
        return self.factors.get().nbytes()

    @property
    def nnz(self):
        return self.symbolic.nnz

    cdef list borrow(self, Team team, int count, vector[PivotedWorkspace*]& work):
        """So many workspaces, idle ones or new ones."""
        cdef list idle = team.idle[self.dtype], lent = []
        cdef Workspace workspace
        for _ in range(count):
            if idle:
                workspace = idle.pop()
            else:
                workspace = Workspace()
                workspace.own.reset(self.factors.get().workspace(team.schedule.get()[0], team.threads))
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
        cdef vector[PivotedWorkspace*] work
        cdef list lent = self.borrow(team, sharing, work)
        with nogil:
            self.factors.get().factorize(a[0], <const void*> values, check, team.schedule.get()[0], work.data(), sharing,
                                         team.threads)
        team.idle[self.dtype] += lent

    def failed_columns(self):
        """Per matrix -1, or the column at which it failed; None where all of them have a factor."""
        cdef int64_t e
        columns = [self.factors.get().failed[e] for e in range(self.batch)]
        return columns if max(columns) >= 0 else None

    def verdicts(self):
        """Per matrix 0, 1 for singular, 2 for a factor that cannot be trusted."""
        cdef int64_t e
        return [self.factors.get().verdict[e] if self.factors.get().failed[e] >= 0 else 0 for e in range(self.batch)]

    @property
    def weak(self):
        """Whether small pivots of some matrix gave reason to estimate its condition number."""
        cdef int64_t e
        cdef bool weak = False
        for e in range(self.batch):
            weak |= self.factors.get().reports[e].rcond == self.factors.get().reports[e].rcond  # not NaN
        return weak

    @property
    def rcond(self):
        """[batch; float64] estimated reciprocal condition numbers; NaN where no pivot gave reason to estimate."""
        cdef int64_t e
        return numpy.array([self.factors.get().reports[e].rcond for e in range(self.batch)])

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
        cdef vector[PivotedWorkspace*] work
        cdef list lent = self.borrow(team, sharing, work)
        with nogil:
            steps = pivoted_solve(self.factors.get()[0], <const void*> b, <void*> x, count, n * width * ITEMSIZE[self.dtype],
                              width, select, adjoint, team.schedule.get()[0], work.data(), sharing, team.threads)
        team.idle[self.dtype] += lent
        return steps
