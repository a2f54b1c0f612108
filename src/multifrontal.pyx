# distutils: language = c++
"""The multifrontal engine's native objects: orderings, the plan, and the storage of factors.

Tensors come as addresses, their sizes beside them. The GIL is released around orderings, analysis, factorization and
solves. Scratch memory is lent from lists that are touched only while the GIL is held, so no lock is needed and a fork
finds them whole.
"""
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from libcpp cimport bool
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

from amd cimport (
    AMD_MAIN_VERSION, AMD_OK, AMD_OK_BUT_JUMBLED, AMD_OUT_OF_MEMORY, AMD_SUB_VERSION, AMD_SUBSUB_VERSION, amd_order,
)
from camd cimport (
    CAMD_MAIN_VERSION, CAMD_OK, CAMD_OK_BUT_JUMBLED, CAMD_OUT_OF_MEMORY, CAMD_SUB_VERSION, CAMD_SUBSUB_VERSION, camd_order,
)
from metis cimport IDXTYPEWIDTH, METIS_OK, METIS_VER_MAJOR, METIS_VER_MINOR, METIS_VER_SUBMINOR

import numpy

from threads cimport Workers


cdef extern from *:
    """
    #include <stdlib.h>
    #if defined(__linux__)
    #include <sys/mman.h>
    #endif
    // Large blocks in huge pages, where the system has them for who asks: a solve reads all of a factor once, and finds
    // a page's address more slowly than what is in it.
    static const int64_t HUGE_PAGE = int64_t(1) << 21;
    static void* allocate(int64_t* size) {
      const int64_t page = *size < 4 * HUGE_PAGE ? 64 : HUGE_PAGE;
      *size = (*size + page - 1) / page * page;
      void* memory = aligned_alloc(size_t(page), size_t(*size));
    #if defined(MADV_HUGEPAGE)
      if (memory && page == HUGE_PAGE) madvise(memory, size_t(*size), MADV_HUGEPAGE);
    #endif
      return memory;
    }
    """
    void* allocate(int64_t* size) nogil

cdef extern from "kernels/multifrontal.hpp" namespace "spcache" nogil:
    ctypedef int Dtype
    cdef struct CAssembly "spcache::Assembly":
        int64_t nnz, groups
    cdef struct Tree:
        pass
    cdef struct Scratch:
        void* own
        void* shared
        void* pack
        const int64_t* update
        int32_t* queue
    cdef struct Kernels:
        int32_t lanes
        int64_t (*pack_size)(int64_t) noexcept nogil
    cdef struct ColumnsView:
        const int32_t* entry
    cdef struct Interleaving:
        int32_t width
        void (*separate)(const void*, int64_t, void**, int) noexcept nogil
    const Interleaving* interleaving_baseline(Dtype)
    const Interleaving* interleaving_avx2(Dtype)
    const Interleaving* interleaving_avx512(Dtype)
    const Kernels* kernels_baseline(Dtype)
    const Kernels* kernels_avx2(Dtype)
    const Kernels* kernels_avx512(Dtype)

cdef extern from "kernels/definite.hpp" namespace "spcache" nogil:
    double diagonal_spread[R](const Tree&, const R*, int64_t)

cdef extern from "kernels/analysis.hpp" namespace "spcache" nogil:
    cdef struct Prediction:
        int64_t nnz
        double flops
    cdef cppclass CElimination "spcache::Elimination":
        CElimination(int32_t, const int64_t*, const int32_t*, const int32_t*) except +
        int64_t nbytes()
        Prediction prediction
        vector[int32_t] perm
    cdef cppclass Plan:
        Plan(const CElimination&) except +
        Tree tree()
        int64_t nbytes()
        Prediction prediction
        int32_t n, supernodes, largest_front
        vector[int32_t] perm, supernode_of
        vector[int64_t] position_of, panel, row
    cdef cppclass Schedule:
        Schedule(const Plan&, int) except +
        vector[int64_t] update
        int64_t own_size, shared_size
        int useful
        int64_t queue_size()
        int sharing(int64_t, int)
        @staticmethod
        int sharing_solves(int64_t, int64_t, int)
    cdef struct Batch:
        int64_t count
        const void* begin "from"
        int64_t begin_stride "from_stride"
        void* to
        int64_t to_stride
    cdef struct Factors:
        int64_t count, stride
        const void* data
        const int64_t* status
        const int64_t* select
    void factorize_batch(const Kernels&, const Tree&, const Schedule&, const CAssembly&, const Batch&, int64_t*,
                         const Scratch*, int)
    void factorize_interleaved(const Interleaving&, const ColumnsView&, const CAssembly&, const Batch&, int64_t*, double*,
                               void**, int)
    void solve_interleaved(const Interleaving&, const ColumnsView&, const Factors&, const Batch&, int64_t, void**, int)
    void solve_batch(const Kernels&, const Tree&, const Schedule&, const Factors&, const Batch&, int64_t, void**, int)
    int64_t c_factorize "spcache::factorize"(const Kernels&, const Tree&, const Schedule&, const CAssembly&, const void*,
                                             void*, const Scratch*, int)
    void c_solve "spcache::solve"(const Kernels&, const Tree&, const Schedule&, const void*, const void*, void*, int64_t,
                                  void*, int32_t*, int)

cdef extern from "kernels/columns.hpp" namespace "spcache" nogil:
    cdef cppclass Columns:
        Columns(const Plan&) except +
        ColumnsView view(const Plan&)
        int64_t entries()
        int64_t nbytes()

cdef extern from "kernels/dissection.hpp" namespace "spcache" nogil:
    int dissect(int32_t, const int64_t*, const int32_t*, int32_t*) except +

cdef extern from *:
    """
    static int best_instruction_set() {
    #if defined(__x86_64__)
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) return 2;
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
    #endif
      return 0;
    }
    #if defined(__x86_64__)
    #define SPCACHE_BASELINE "SSE2"
    #elif defined(__ARM_NEON)
    #define SPCACHE_BASELINE "NEON"
    #else
    #define SPCACHE_BASELINE "scalar or what the compiler makes of 16-byte vectors"
    #endif
    #if !defined(__x86_64__)
    namespace spcache {
    static const Kernels* kernels_avx2(Dtype dtype) { return kernels_baseline(dtype); }
    static const Kernels* kernels_avx512(Dtype dtype) { return kernels_baseline(dtype); }
    static const Interleaving* interleaving_avx2(Dtype dtype) { return interleaving_baseline(dtype); }
    static const Interleaving* interleaving_avx512(Dtype dtype) { return interleaving_baseline(dtype); }
    }
    #endif
    """
    int best_instruction_set()
    const char* SPCACHE_BASELINE


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
BASELINE = SPCACHE_BASELINE.decode()  # what "baseline" is on this kind of processor
LIBRARIES = {  # what this was built with
    "AMD": f"{AMD_MAIN_VERSION}.{AMD_SUB_VERSION}.{AMD_SUBSUB_VERSION}, 32-bit indices",
    "CAMD": f"{CAMD_MAIN_VERSION}.{CAMD_SUB_VERSION}.{CAMD_SUBSUB_VERSION}, 32-bit indices",
    "METIS": f"{METIS_VER_MAJOR}.{METIS_VER_MINOR}.{METIS_VER_SUBMINOR}, {IDXTYPEWIDTH}-bit indices",
}
cdef int ITEMSIZE[4]
ITEMSIZE[:] = [4, 8, 8, 16]


def use_workers(uintptr_t address):
    """Takes threads from there (_pattern.workers) from now on."""
    Workers.adopt(<Workers*> address)


def best_simd():
    """Name of the widest instruction set that this processor has kernels for."""
    return INSTRUCTION_SETS[best_instruction_set()]


cdef int check_structure(int64_t[::1] indptr, int32_t[::1] indices) except -1:
    """Raises unless these are the columns of a lower triangle."""
    cdef int64_t n = indptr.shape[0] - 1, j, e
    cdef bool sound = n > 0 and indptr[0] == 0 and indptr[n] == indices.shape[0]
    for j in range(n):
        sound = sound and indptr[j] <= indptr[j + 1]
    if sound:
        for j in range(n):
            for e in range(indptr[j], indptr[j + 1]):
                sound = sound and j <= indices[e] < n
    if not sound:
        raise ValueError("indptr and indices are not the columns of a lower triangle")
    return 0


cdef int check_permutation(int32_t[::1] perm, int64_t n) except -1:
    cdef vector[bool] seen
    cdef int64_t k
    cdef bool sound = perm.shape[0] == n
    seen.assign(n, False)
    if sound:
        for k in range(n):
            sound = sound and 0 <= perm[k] < n and not seen[perm[k]]
            if not sound:
                break
            seen[perm[k]] = True
    if not sound:
        raise ValueError(f"perm is not a permutation of 0..{n - 1}")
    return 0


def amd(int64_t[::1] indptr, int32_t[::1] indices):
    """AMD ordering of a symmetric structure given by its lower triangle: perm[k] = original index of pivot k."""
    check_structure(indptr, indices)
    cdef int32_t n = <int32_t> (indptr.shape[0] - 1)
    cdef int32_t[::1] Ap = numpy.asarray(indptr, numpy.int32)
    perm = numpy.empty(n, numpy.int32)
    cdef int32_t[::1] P = perm
    cdef const int32_t* Ai = &indices[0] if indices.shape[0] else &P[0]
    cdef int status
    with nogil:
        status = amd_order(n, &Ap[0], Ai, &P[0], NULL, NULL)
    if status == AMD_OUT_OF_MEMORY:
        raise MemoryError("AMD ordering")
    if status != AMD_OK and status != AMD_OK_BUT_JUMBLED:
        raise ValueError("the structure is not valid CSC")
    return perm


def separate(int64_t[::1] indptr, int32_t[::1] indices):
    """[n; int32] the parts and separators of a nested dissection, numbered in the order of elimination. Not to be called
    by two threads at once: METIS calls rand()."""
    check_structure(indptr, indices)
    cdef int32_t n = <int32_t> (indptr.shape[0] - 1)
    cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
    sets = numpy.empty(n, numpy.int32)
    cdef int32_t[::1] S = sets
    cdef int status
    with nogil:
        status = dissect(n, &indptr[0], Ai, &S[0])
    if status != METIS_OK:
        raise MemoryError(f"METIS_ComputeVertexSeparator returned {status}")
    return sets


def camd(int64_t[::1] indptr, int32_t[::1] indices, int32_t[::1] sets):
    """As `amd`, but set by set: vertices with sets[i] = 0 come first, then those with 1, ..."""
    check_structure(indptr, indices)
    cdef int32_t n = <int32_t> (indptr.shape[0] - 1)
    cdef int32_t[::1] Ap = numpy.asarray(indptr, numpy.int32)
    perm = numpy.empty(n, numpy.int32)
    cdef int32_t[::1] P = perm
    cdef const int32_t* Ai = &indices[0] if indices.shape[0] else &P[0]
    cdef int status
    if sets.shape[0] != n or numpy.min(sets) < 0 or numpy.max(sets) >= n:
        raise ValueError(f"sets must be [{n}] numbers from 0 to {n - 1}")
    with nogil:
        status = camd_order(n, &Ap[0], Ai, &P[0], NULL, NULL, &sets[0])
    if status == CAMD_OUT_OF_MEMORY:
        raise MemoryError("CAMD ordering")
    if status != CAMD_OK and status != CAMD_OK_BUT_JUMBLED:
        raise ValueError("the structure is not valid CSC")
    return perm


cdef class Elimination:
    """A structure under an ordering: what a Cholesky factorization of it will take.

    Args:
        indptr, indices: canonical CSC of the lower triangle.
        perm: [n; int32] original index of each pivot.
    """
    cdef unique_ptr[CElimination] elimination

    def __init__(self, int64_t[::1] indptr, int32_t[::1] indices, int32_t[::1] perm):
        check_structure(indptr, indices)
        cdef int32_t n = <int32_t> (indptr.shape[0] - 1)
        cdef const int32_t* Ai = &indices[0] if indices.shape[0] else NULL
        check_permutation(perm, n)
        with nogil:
            self.elimination.reset(new CElimination(n, &indptr[0], Ai, &perm[0]))

    @property
    def nnz(self):
        """Entries of L by the column counts, before amalgamation adds explicit zeros."""
        return self.elimination.get().prediction.nnz

    @property
    def flops(self):
        return self.elimination.get().prediction.flops

    @property
    def perm(self):
        """[n; int32] original index of each pivot."""
        return numpy.asarray(self.elimination.get().perm, numpy.int32)


cdef class Memory:
    """One aligned block. Freed with the object."""
    cdef void* data
    cdef readonly int64_t nbytes

    def __cinit__(self, int64_t nbytes):
        self.nbytes = nbytes + 64
        self.data = allocate(&self.nbytes)
        if self.data == NULL:
            raise MemoryError(f"cannot allocate {nbytes} bytes for a factor")

    def __dealloc__(self):
        free(self.data)


cdef class Workspace:
    """Scratch memory of one factorization: update matrices and packed blocks, for each thread its own."""
    cdef list memories
    cdef vector[Scratch] scratch  # [threads]

    @property
    def nbytes(self):
        return sum([(<Memory> memory).nbytes for memory in self.memories])

    @staticmethod
    cdef Workspace make(const Schedule* schedule, int64_t pack_size, int64_t itemsize, int threads):
        cdef Workspace new = Workspace()
        cdef Memory shared = Memory(schedule.shared_size * itemsize), own, pack
        cdef Memory queue = Memory(schedule.queue_size() * sizeof(int32_t))
        cdef Scratch scratch
        new.memories = [shared, queue]
        for _ in range(threads):
            own, pack = Memory(schedule.own_size * itemsize), Memory(pack_size * itemsize)
            new.memories += [own, pack]
            scratch.own, scratch.shared, scratch.pack = own.data, shared.data, pack.data
            scratch.update = schedule.update.data()
            scratch.queue = <int32_t*> queue.data
            new.scratch.push_back(scratch)
        return new


cdef class SolveWorkspace:
    """Scratch memory of one solve; see Kernels::solve and Schedule."""
    cdef Memory local, queue

    @property
    def nbytes(self):
        return self.local.nbytes + self.queue.nbytes


cdef class Team:
    """A schedule for a number of threads, and idle workspaces for it: a list for each of the four scalar types."""
    cdef unique_ptr[Schedule] schedule
    cdef int threads      # that find work
    cdef list idle        # of Workspace
    cdef list idle_solve  # of SolveWorkspace

    cdef Workspace workspace(self, Storage storage):
        """An idle one, or a new one."""
        cdef list idle = self.idle[storage.dtype]
        if idle:
            return idle.pop()
        return Workspace.make(
            self.schedule.get(), storage.kernels.pack_size(storage.symbolic.plan.get().largest_front),
            ITEMSIZE[storage.dtype], self.threads)

    cdef SolveWorkspace solve_workspace(self, Storage storage, int64_t row):
        """An idle one with so many bytes for each row of a front, or a new one."""
        cdef list idle = self.idle_solve[storage.dtype]
        cdef const Plan* plan = storage.symbolic.plan.get()
        cdef int64_t size = (plan.n + plan.row.back()) * row
        cdef SolveWorkspace found = idle.pop() if idle else None
        if found is None:
            found = SolveWorkspace()
            found.local = Memory(0)
            found.queue = Memory(self.schedule.get().queue_size() * sizeof(int32_t))
        if found.local.nbytes < size:
            found.local = Memory(size)
        return found


cdef class Symbolic:
    """The plan: assembly tree, schedules, positions of the canonical entries. Immutable but for idle scratch memory.

    Args:
        elimination: structure and ordering; the latter is refined by a postorder.
        simd: one of INSTRUCTION_SETS, at most what the processor has.
    """
    cdef unique_ptr[Plan] plan
    cdef Tree tree
    cdef int simd_level
    cdef dict teams                   # number of threads -> Team
    cdef unique_ptr[Columns] columns  # for matrices side by side, once there are some
    cdef list idle                    # Memory for them that no call uses at the moment

    def __init__(self, Elimination elimination not None, str simd):
        available = INSTRUCTION_SETS[:best_instruction_set() + 1]
        if simd not in available:
            raise ValueError(f"SPCACHE_SIMD must be one of {', '.join(available)} on this processor, got {simd!r}")
        self.simd_level = INSTRUCTION_SETS.index(simd)
        with nogil:
            self.plan.reset(new Plan(elimination.elimination.get()[0]))
            self.tree = self.plan.get().tree()
        self.teams, self.idle = {}, []

    cdef int find_columns(self) except -1:
        """Makes `columns`; two threads may meet here, the first one's stay."""
        cdef unique_ptr[Columns] columns
        if self.columns.get() == NULL:
            with nogil:
                columns.reset(new Columns(self.plan.get()[0]))
            if self.columns.get() == NULL:
                self.columns.swap(columns)
        return 0

    cdef Memory side(self, int64_t nbytes):
        """Idle memory for matrices side by side, or new."""
        cdef Memory memory = self.idle.pop() if self.idle else None
        return Memory(nbytes) if memory is None or memory.nbytes < nbytes else memory

    cdef Team team(self, int threads):
        """The team of that size; two threads that make it at once make the same."""
        cdef Team team = self.teams.get(threads)
        if team is None:
            team = Team()
            team.idle, team.idle_solve = [[] for _ in range(4)], [[] for _ in range(4)]
            with nogil:
                team.schedule.reset(new Schedule(self.plan.get()[0], threads))
            team.threads = team.schedule.get().useful
            team = self.teams.setdefault(threads, team)
        return team

    cdef const Kernels* kernels(self, int dtype) noexcept:
        if self.simd_level == 2:
            return kernels_avx512(<Dtype> dtype)
        return kernels_avx2(<Dtype> dtype) if self.simd_level == 1 else kernels_baseline(<Dtype> dtype)

    @property
    def nnz(self):
        """Entries of L by the column counts, before amalgamation adds explicit zeros."""
        return self.plan.get().prediction.nnz

    @property
    def stored(self):
        """Numbers stored for one factor."""
        return self.plan.get().panel.back()

    @property
    def flops(self):
        return self.plan.get().prediction.flops

    @property
    def nbytes(self):
        """Memory of the plan and of idle scratch."""
        cdef int64_t total = self.plan.get().nbytes() + sum([(<Memory> memory).nbytes for memory in list(self.idle)])
        cdef Team team
        if self.columns.get() != NULL:
            total += self.columns.get().nbytes()
        for team in list(self.teams.values()):
            total += 8 * self.plan.get().supernodes
            for idle in team.idle + team.idle_solve:
                total += sum([workspace.nbytes for workspace in list(idle)])
        return total

    @property
    def simd(self):
        """The instruction set of the kernels."""
        return INSTRUCTION_SETS[self.simd_level]

    cdef const Interleaving* interleaving(self, int dtype) noexcept:
        if self.simd_level == 2:
            return interleaving_avx512(<Dtype> dtype)
        return interleaving_avx2(<Dtype> dtype) if self.simd_level == 1 else interleaving_baseline(<Dtype> dtype)

    @property
    def supernodes(self):
        return self.plan.get().supernodes

    @property
    def largest_front(self):
        return self.plan.get().largest_front

    def scratch_size(self, int threads):
        """Numbers of scratch memory that a factorization on `threads` threads needs, packed blocks not counted."""
        cdef Team team = self.team(threads)
        return team.schedule.get().shared_size + threads * team.schedule.get().own_size

    @property
    def perm(self):
        """[n; int32] original index of pivot k."""
        return numpy.asarray(self.plan.get().perm, numpy.int32)

    def positions(self):
        """Per canonical slot: its supernode [int32] and its place p in that supernode's panel [int64], ~p where the
        mirror image is stored."""
        cdef int64_t count = self.plan.get().supernode_of.size()
        supernode, position = numpy.empty(count, numpy.int32), numpy.empty(count, numpy.int64)
        cdef int32_t[::1] s = supernode
        cdef int64_t[::1] p = position
        if count:
            memcpy(&s[0], self.plan.get().supernode_of.data(), 4 * count)
            memcpy(&p[0], self.plan.get().position_of.data(), 8 * count)
        return supernode, position

    def trim(self):
        """Lets go of idle scratch memory."""
        cdef Team team
        self.idle.clear()
        for team in list(self.teams.values()):
            for idle in team.idle + team.idle_solve:
                idle.clear()


# The matrices of a batch lie side by side where fronts are too small to fill vectors by themselves: up to so many
# operations for each on average, and rows of the largest; to more rows if the factors of a group have at most so many bytes.
cdef int64_t SIDE_BY_SIDE_FLOPS = 1 << 12, SIDE_BY_SIDE_ROWS = 32, SIDE_BY_SIDE_MOST_ROWS = 64, SIDE_BY_SIDE_BYTES = 1 << 21


cdef class Storage:
    """The factors of one batch of values: panels of all supernodes, and one status per matrix."""
    cdef readonly Symbolic symbolic
    cdef readonly int64_t batch
    cdef readonly int dtype
    cdef readonly Memory factor  # [batch, stored]; of matrices side by side [groups, entries of L, width]
    cdef Memory plain            # these as [batch, stored], once a solve has asked for that
    cdef vector[int64_t] status  # [batch] 0, or 1 + the pivot that is not positive
    cdef vector[double] spreads  # [batch] of matrices side by side: see `spread`
    cdef readonly bool failed
    cdef const Interleaving* by  # of matrices side by side, else NULL
    cdef const Kernels* kernels

    def __init__(self, Symbolic symbolic, int dtype, int64_t batch):
        if not 0 <= dtype < 4 or batch < 1:
            raise ValueError("unknown scalar type, or empty batch")
        self.symbolic, self.dtype, self.batch = symbolic, dtype, batch
        self.by = symbolic.interleaving(dtype)
        cdef const Plan* plan = symbolic.plan.get()
        cdef int64_t entries = plan.prediction.nnz
        if self.by != NULL and (
                batch < self.by.width or entries > 0x7fffffff or plan.largest_front > SIDE_BY_SIDE_MOST_ROWS
                or plan.prediction.flops > SIDE_BY_SIDE_FLOPS * plan.supernodes
                or (plan.largest_front > SIDE_BY_SIDE_ROWS
                    and entries * self.by.width * ITEMSIZE[dtype] > SIDE_BY_SIDE_BYTES)):
            self.by = NULL
        self.kernels = symbolic.kernels(dtype)
        cdef int64_t numbers = batch * plan.panel.back()
        if self.by != NULL:
            symbolic.find_columns()
            numbers = (batch + self.by.width - 1) // self.by.width * self.by.width * entries
            self.spreads.assign(batch, 1)
        self.factor = Memory(numbers * ITEMSIZE[dtype])
        self.status.assign(batch, 1)
        self.failed = True

    @property
    def nbytes(self):
        return self.factor.nbytes + (0 if self.plain is None else self.plain.nbytes)

    cdef Memory separated(self):
        """The factors as panels, one after the other."""
        if self.by == NULL:
            return self.factor
        if self.plain is None:
            self.plain = self._separated(self.symbolic.plan.get().panel.back(), self.symbolic.columns.get().entries())
        return self.plain

    cdef Memory _separated(self, int64_t stored, int64_t entries):
        cdef int64_t size = ITEMSIZE[self.dtype], group, first, place
        cdef Memory plain = Memory(self.batch * stored * size), rows = Memory(self.by.width * entries * size)
        cdef const int32_t* entry = self.symbolic.columns.get().view(self.symbolic.plan.get()[0]).entry
        cdef vector[void*] to
        cdef int lanes, lane
        for lane in range(self.by.width):
            to.push_back(<char*> rows.data + lane * entries * size)
        with nogil:
            memset(plain.data, 0, self.batch * stored * size)
            for group in range((self.batch + self.by.width - 1) // self.by.width):
                first = group * self.by.width
                lanes = <int> min(self.by.width, self.batch - first)
                self.by.separate(<char*> self.factor.data + first * entries * size, entries, to.data(), lanes)
                for lane in range(lanes):
                    for place in range(stored):
                        if entry[place] >= 0:
                            memcpy(<char*> plain.data + ((first + lane) * stored + place) * size,
                                   <char*> to[lane] + entry[place] * size, size)
        return plain

    @property
    def nnz(self):
        return self.symbolic.nnz

    def factorize(self, assembly, uintptr_t values, int64_t nnz, bool check, Storage template=None, int threads=1):
        """Factors values [batch, nnz]. See spcache/engines/protocol.py; there are no pivots to check or to copy, and the
        factor does not depend on the number of threads."""
        cdef uintptr_t address = assembly.address
        cdef const CAssembly* a = <const CAssembly*> address
        cdef Plan* plan = self.symbolic.plan.get()
        cdef int64_t itemsize = ITEMSIZE[self.dtype], size = plan.panel.back() * itemsize, e
        cdef bool failed = False
        if a.nnz != nnz or a.groups != plan.supernodes or threads < 1 or (values == 0 and nnz):
            raise ValueError("the assembly belongs to another plan, or the values have another length or no memory")
        cdef int sharing = 1  # threads that share the batch; with one, `threads` share each matrix
        if self.batch > 1 and threads > 1:
            sharing = self.symbolic.team(1).schedule.get().sharing(self.batch, threads)
        cdef vector[void*] sides
        cdef ColumnsView columns
        cdef Batch batch
        batch.count, batch.begin, batch.begin_stride = self.batch, <const void*> values, nnz * itemsize
        if self.by != NULL:
            columns = self.symbolic.columns.get().view(plan[0])
            batch.to, batch.to_stride = self.factor.data, self.symbolic.columns.get().entries() * itemsize
            memories = [self.symbolic.side(nnz * self.by.width * itemsize) for _ in range(sharing)]
            for memory in memories:
                sides.push_back((<Memory> memory).data)
            self.plain = None
            with nogil:
                factorize_interleaved(self.by[0], columns, a[0], batch, self.status.data(), self.spreads.data(),
                                      sides.data(), sharing)
                for e in range(self.batch):
                    failed |= self.status[e] != 0
            self.failed = failed
            self.symbolic.idle += memories
            return
        cdef bool alone = sharing == 1
        cdef Team team = self.symbolic.team(threads if alone else 1)
        cdef const Schedule* schedule = team.schedule.get()
        cdef list workspaces = [team.workspace(self) for _ in range(sharing)]
        cdef vector[Scratch] scratch
        for workspace in workspaces:
            if not alone:
                scratch.push_back((<Workspace> workspace).scratch[0])
        if alone:
            scratch = (<Workspace> workspaces[0]).scratch
        batch.to, batch.to_stride = self.factor.data, size
        with nogil:
            if sharing > 1:
                factorize_batch(self.kernels[0], self.symbolic.tree, schedule[0], a[0], batch, self.status.data(),
                                scratch.data(), sharing)
            else:
                for e in range(self.batch):
                    self.status[e] = c_factorize(
                        self.kernels[0], self.symbolic.tree, schedule[0], a[0],
                        <const char*> values + e * nnz * itemsize, <char*> self.factor.data + e * size,
                        scratch.data(), team.threads)
            for e in range(self.batch):
                failed |= self.status[e] != 0
        self.failed = failed
        team.idle[self.dtype] += workspaces

    def spread(self):
        """The square of the smallest over the largest number on the diagonal of a factor, the least of the batch: no less than
        the reciprocal condition number of that matrix."""
        cdef const Tree* tree = &self.symbolic.tree
        cdef int64_t step = 2 if self.dtype >= 2 else 1, stored = self.symbolic.plan.get().panel.back() * step, e
        cdef double spread = 1
        with nogil:
            for e in range(self.batch):
                if self.by != NULL:
                    spread = min(spread, self.spreads[e])
                elif self.dtype % 2 == 0:
                    spread = min(spread, diagonal_spread[float](tree[0], <float*> self.factor.data + e * stored, step))
                else:
                    spread = min(spread, diagonal_spread[double](tree[0], <double*> self.factor.data + e * stored, step))
        return spread

    def failed_columns(self):
        """Per matrix -1, or the original index of the pivot that is not positive."""
        cdef int64_t e
        return [-1 if self.status[e] == 0 else self.symbolic.plan.get().perm[self.status[e] - 1]
                for e in range(self.batch)]

    def solve(self, uintptr_t b, uintptr_t x, int64_t count, int64_t width, uintptr_t factors, bool adjoint,
              int threads=1):
        """x[p] = A[f(p)]^-1 b[p]; b and x are [count, n, width]. See spcache/engines/protocol.py; A is Hermitian, so that
        adjoint changes nothing, and neither does the number of threads."""
        cdef Plan* plan = self.symbolic.plan.get()
        cdef int64_t itemsize = ITEMSIZE[self.dtype], size = plan.panel.back() * itemsize
        cdef int64_t stride = plan.n * width * itemsize, p, f
        cdef const int64_t* select = <const int64_t*> factors
        if threads < 1 or (select == NULL and self.batch != 1 and count != self.batch):
            raise ValueError("threads must be positive, and count the batch where no factors are named")
        if (b == 0 or x == 0) and count and width:
            raise ValueError("b or x has no memory")
        if select != NULL:
            for p in range(count):
                if not 0 <= select[p] < self.batch:
                    raise ValueError("factors names a matrix beyond the batch")
        cdef int sharing = Schedule.sharing_solves(count, count * width * plan.panel.back(), threads)
        # Matrices side by side are solved for side by side where right-hand sides and factors go together.
        cdef bool together = self.by != NULL and count == self.batch
        if select != NULL:
            for p in range(count):
                together = together and select[p] == p
        cdef vector[void*] sides
        cdef ColumnsView columns
        cdef Batch batch
        cdef Factors chosen
        batch.count, batch.begin, batch.begin_stride = count, <const void*> b, stride
        batch.to, batch.to_stride = <void*> x, stride
        chosen.count, chosen.status, chosen.select = self.batch, self.status.data(), select
        if together:
            columns = self.symbolic.columns.get().view(plan[0])
            chosen.stride, chosen.data = self.symbolic.columns.get().entries() * itemsize, self.factor.data
            memories = [self.symbolic.side(2 * self.by.width * stride) for _ in range(sharing)]
            for memory in memories:
                sides.push_back((<Memory> memory).data)
            with nogil:
                solve_interleaved(self.by[0], columns, chosen, batch, width, sides.data(), sharing)
            self.symbolic.idle += memories
            return
        cdef bool alone = sharing == 1
        cdef Team team = self.symbolic.team(threads if alone else 1)
        cdef const Kernels* kernels = self.kernels
        cdef list workspaces = [team.solve_workspace(self, (1 if width == 1 else kernels.lanes) * itemsize)
                                for _ in range(sharing)]
        cdef vector[void*] locals
        cdef int32_t* queue = <int32_t*> (<SolveWorkspace> workspaces[0]).queue.data
        cdef Memory data = self.separated()
        for workspace in workspaces:
            locals.push_back((<SolveWorkspace> workspace).local.data)
        chosen.stride, chosen.data = size, data.data
        with nogil:
            if sharing > 1:
                solve_batch(kernels[0], self.symbolic.tree, team.schedule.get()[0], chosen, batch, width,
                            locals.data(), sharing)
            else:
                for p in range(count):
                    f = select[p] if select != NULL else (p if self.batch != 1 else 0)
                    if self.status[f]:
                        memset(<char*> x + p * stride, 0xff, stride)  # a NaN in every scalar type
                    else:
                        c_solve(kernels[0], self.symbolic.tree, team.schedule.get()[0],
                                <const char*> chosen.data + f * size, <const char*> b + p * stride,
                                <char*> x + p * stride, width, locals[0], queue, team.threads)
        team.idle_solve[self.dtype] += workspaces
