# distutils: language = c++
"""Native parts of `spcache.pattern`: canonical order, assembly maps, symmetry, products with the matrix and the gradient's gather.

Every tensor comes as an address, its sizes beside it; the caller keeps it alive during the call.
Scalar types are the codes 0 float32, 1 float64, 2 complex64, 3 complex128.
"""
cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libcpp cimport bool
from libcpp.vector cimport vector

import numpy

from threads cimport Workers


cdef extern from "kernels/pattern.hpp" namespace "spcache" nogil:
    cdef cppclass c64 "spcache::Complex<float>":
        pass
    cdef cppclass c128 "spcache::Complex<double>":
        pass
    ctypedef int Mirror
    ctypedef int Dtype
    const int64_t AHEAD
    cdef struct CAssembly "spcache::Assembly":
        int64_t nnz, groups
        double weight
        bool hermitian
        const int64_t* begin
        const int32_t* source
        const uint32_t* target
    cdef struct CPairs "spcache::Pairs":
        int64_t nnz, slots, n
        const int64_t* begin
        const int32_t* source
        const int32_t* row
        const int32_t* column
        const int32_t* diagonal
        const int32_t* lower
        const int32_t* upper
    int64_t c_compress "spcache::compress"(int64_t, const int32_t*, const int32_t*, int64_t, int64_t,
                                           int64_t*, int32_t*, int32_t*) except +
    void sort_contributions(int64_t, const int32_t*, const int32_t*, const uint8_t*, const int32_t*,
                            const int64_t*, int64_t, int64_t*, int32_t*, uint32_t*) except +
    cdef struct CAsymmetry "spcache::Asymmetry":
        double difference, largest
    bool c_all_finite "spcache::all_finite"(Dtype, const void*, int64_t, int)
    void c_copy "spcache::copy"(const char*, int64_t, char*, int)
    bool c_equal "spcache::equal"(const char*, const char*, int64_t, int)
    CAsymmetry c_asymmetry "spcache::asymmetry"(Dtype, const CPairs&, bool, const void*, int)
    int64_t first_asymmetric(Dtype, const CPairs&, bool, const void*, int64_t, double, int)
    bool c_positive_hermitian "spcache::positive_hermitian"[T](const CPairs&, double, const T*)
    void gather_outer(Dtype, const CPairs*, int64_t, const int32_t*, const int32_t*, Mirror, bool, int64_t, int64_t, int64_t,
                      int64_t, const void*, const void*, void*, int)
    void apply_entries[T](int64_t, const int32_t*, const int32_t*, Mirror, bool, bool, int64_t, const T*, const T*, T*)

cdef extern from "kernels/refinement.hpp" namespace "spcache" nogil:
    void equilibrate[T](int64_t, const int32_t*, const int32_t*, int64_t, int64_t, bool, const T*, double*, double*)
    void narrow_matrix[T, N](int64_t, const int32_t*, const int32_t*, const T*, const double*, const double*, N*)
    void narrow_rhs[T, N](int64_t, int64_t, const T*, const double*, N*, double*)
    void add_widened[T, N](int64_t, int64_t, const N*, const double*, const double*, const T*, T*)
    void c_residual "spcache::residual"[T](int64_t, const int32_t*, const int32_t*, Mirror, bool, bool, int64_t, int64_t,
                                           const T*, const double*, const T*, const T*, T*, double*, double*) except +


cdef int32_t* data32(int32_t[::1] a) noexcept:
    return &a[0] if a.shape[0] else NULL


cdef int64_t* data64(int64_t[::1] a) noexcept:
    return &a[0] if a.shape[0] else NULL


def compress(int32_t[::1] rows, int32_t[::1] columns, int64_t m, int64_t n):
    """Canonical CSC (indptr, indices) of COO entries, and each entry's slot in it; O(nnz + m + n)."""
    cdef int64_t nnz = rows.shape[0], count
    if columns.shape[0] != nnz or nnz > 2**31 - 1:
        raise ValueError("rows and columns differ in length, or have more than 2^31 - 1 entries together with mirror images")
    indptr_array = numpy.empty(n + 1, numpy.int64)
    indices_array = numpy.empty(nnz, numpy.int32)
    slot_array = numpy.empty(nnz, numpy.int32)
    cdef int64_t* indptr = data64(indptr_array)
    cdef int32_t* indices = data32(indices_array)
    cdef int32_t* slot = data32(slot_array)
    cdef const int32_t* row = data32(rows)
    cdef const int32_t* column = data32(columns)
    with nogil:
        count = c_compress(nnz, row, column, m, n, indptr, indices, slot)
    return indptr_array, indices_array[:count].copy(), slot_array


def all_finite(uintptr_t address, int64_t count, int dtype, int threads=1):
    """Whether `count` numbers of the given scalar type are all finite."""
    cdef bool result
    with nogil:
        result = c_all_finite(<Dtype> dtype, <const void*> address, count, threads)
    return result


def workers():
    """Address of the threads that wait for work; other native modules use them too."""
    return <uintptr_t> &Workers.all()


cdef int check_columns(int64_t count, int64_t n, int64_t width, int dtype, int64_t[::1] select, int64_t batch) except -1:
    """Raises unless [count, n, width] in double precision belong to matrices of a batch."""
    cdef int64_t p
    if count < 1 or n < 1 or width < 1 or dtype not in (1, 3) or select.shape[0] != count:
        raise ValueError("count, n or width is not positive, dtype not double, or select does not name a matrix for each")
    for p in range(count):
        if not 0 <= select[p] < batch:
            raise ValueError("select names a matrix beyond the batch")
    return 0


def narrow(uintptr_t b, int64_t count, int64_t n, int64_t width, int dtype, double[:, ::1] scale, int64_t[::1] select,
           uintptr_t out, double[:, ::1] size):
    """out[p] = scale[select[p]] b[p], rounded to single precision; [count, n, width] in float64 or complex128. Each column is
    divided by a power of two, which goes to size [count, width]."""
    cdef int64_t p, step = n * width
    check_columns(count, n, width, dtype, select, scale.shape[0])
    if scale.shape[1] != n or size.shape[0] != count or size.shape[1] != width:
        raise ValueError("scale or size do not fit the right-hand sides")
    with nogil:
        for p in range(count):
            if dtype == 1:
                narrow_rhs[double, float](n, width, <double*> b + p * step, &scale[select[p], 0], <float*> out + p * step,
                                          &size[p, 0])
            else:
                narrow_rhs[c128, c64](n, width, <c128*> b + p * step, &scale[select[p], 0], <c64*> out + p * step,
                                      &size[p, 0])


def widen(uintptr_t x, uintptr_t y, int64_t count, int64_t n, int64_t width, int dtype, double[:, ::1] scale,
          int64_t[::1] select, uintptr_t d, double[:, ::1] size):
    """y[p] = x[p] + scale[select[p]] d[p], times the powers of two of `narrow`; d is in single precision, x (0: nothing)
    and y are in double."""
    cdef int64_t p, step = n * width
    check_columns(count, n, width, dtype, select, scale.shape[0])
    if scale.shape[1] != n or size.shape[0] != count or size.shape[1] != width:
        raise ValueError("scale or size do not fit the right-hand sides")
    with nogil:
        for p in range(count):
            if dtype == 1:
                add_widened[double, float](n, width, <float*> d + p * step, &scale[select[p], 0], &size[p, 0],
                                           <double*> x + p * step if x else NULL, <double*> y + p * step)
            else:
                add_widened[c128, c64](n, width, <c64*> d + p * step, &scale[select[p], 0], &size[p, 0],
                                       <c128*> x + p * step if x else NULL, <c128*> y + p * step)


cdef class ValuesCopy:
    """A private copy of values, by which equal values are recognized exactly."""
    cdef void* buffer
    cdef readonly int64_t nbytes

    def __dealloc__(self):
        free(self.buffer)

    @property
    def address(self):
        return <uintptr_t> self.buffer

    def keep(self, uintptr_t address, int64_t nbytes, int threads=1):
        if nbytes != self.nbytes or self.buffer == NULL:
            free(self.buffer)
            self.nbytes = 0
            self.buffer = malloc(nbytes if nbytes else 1)
            if self.buffer == NULL:
                raise MemoryError
            self.nbytes = nbytes
        with nogil:
            c_copy(<const char*> address, nbytes, <char*> self.buffer, threads)

    def finite(self, int64_t part, int64_t parts, int dtype):
        """Whether the numbers of one of `parts` equal parts are all finite."""
        cdef int64_t size = self.nbytes // parts
        return all_finite(<uintptr_t> self.buffer + part * size, size // (4, 8, 8, 16)[dtype], dtype)

    def equals(self, uintptr_t address, int64_t nbytes, int threads=1):
        """Bitwise equality; stops at the first difference."""
        cdef bool result = False
        if self.buffer != NULL and nbytes == self.nbytes:
            with nogil:
                result = nbytes == 0 or c_equal(<const char*> self.buffer, <const char*> address, nbytes, threads)
        return result


@cython.no_gc_clear
cdef class Loan:
    """Storage and values copy lent to one holder; when the last reference goes, they go back to the idle list, if that
    is not full. Weak references to the holder are dead by then: nobody can be handed what is idle already."""
    cdef readonly object storage
    cdef readonly ValuesCopy copy
    cdef list idle
    cdef int limit

    def __init__(self, storage, ValuesCopy copy, list idle, int limit):
        self.storage, self.copy, self.idle, self.limit = storage, copy, idle, limit

    def __dealloc__(self):
        if self.idle is not None and len(self.idle) < self.limit:
            self.idle.append((self.storage, self.copy))


cdef class Assembly:
    """The positions at which COO values are added into factor storage (kernels/assembly.hpp).

    Args:
        nnz: length of the values.
        slots, sources, roles: one contribution each: canonical slot, index into the values, role
            (0 direct, 1 mirrored, 2 diagonal).
        groups: number of groups; group_of, position_of: per canonical slot, its group and the position in that
            group's storage (None: one group, position = slot).
        target_size: number of storage places a position may name, for the range check.
        weight, hermitian: of off-diagonal contributions; whether mirroring conjugates.
    """
    cdef CAssembly c
    cdef vector[int64_t] begin
    cdef vector[int32_t] source
    cdef vector[uint32_t] target

    def __init__(self, int64_t nnz, int32_t[::1] slots, int32_t[::1] sources, uint8_t[::1] roles, int64_t groups,
                 int32_t[::1] group_of, int64_t[::1] position_of, double weight, bool hermitian):
        cdef int64_t count = slots.shape[0]
        cdef const int32_t* slot = data32(slots)
        cdef const int32_t* group = NULL
        cdef const int64_t* position = NULL
        cdef const int32_t* source = data32(sources)
        cdef const uint8_t* role = &roles[0] if count else NULL
        if sources.shape[0] != count or roles.shape[0] != count:
            raise ValueError("contributions differ in length")
        if group_of is not None:
            group = data32(group_of)
        if position_of is not None:
            position = data64(position_of)
        self.begin.resize(3 * groups + 1)
        self.source.assign(count + AHEAD, 0)
        self.target.resize(count)
        with nogil:
            sort_contributions(count, slot, source, role, group, position, groups,
                               self.begin.data(), self.source.data(), self.target.data())
        self.c.nnz, self.c.groups, self.c.weight, self.c.hermitian = nnz, groups, weight, hermitian
        self.c.begin, self.c.source, self.c.target = self.begin.data(), self.source.data(), self.target.data()

    @property
    def address(self):
        """Address of the C++ struct; valid while this object lives."""
        return <uintptr_t> &self.c

    @property
    def nbytes(self):
        return 8 * self.begin.capacity() + 4 * self.source.capacity() + 4 * self.target.capacity()


cdef class Entries:
    """The caller's COO entries: products, the gradient's gather and the symmetry tests run over them.

    Args:
        rows, columns: the COO indices, in the caller's order. Kept, not copied.
    """
    cdef int32_t[::1] rows
    cdef int32_t[::1] columns
    cdef CPairs pairs
    cdef bool paired
    cdef vector[int64_t] begin
    cdef vector[int32_t] source
    cdef vector[int32_t] row
    cdef vector[int32_t] column
    cdef vector[int32_t] diagonal
    cdef vector[int32_t] lower
    cdef vector[int32_t] upper

    def __init__(self, int32_t[::1] rows, int32_t[::1] columns):
        if rows.shape[0] != columns.shape[0]:
            raise ValueError("rows and columns differ in length")
        self.rows, self.columns = rows, columns

    def pair(self, int64_t n, int64_t[::1] indptr, int32_t[::1] indices, int32_t[::1] slots):
        """Prepares the symmetry tests: slots[k] is entry k's place in the canonical lower triangle (indptr, indices)."""
        cdef int64_t nnz = self.rows.shape[0], count = indices.shape[0], k, s, j
        cdef bool single = True
        cdef vector[int64_t] following
        if slots.shape[0] != nnz or indptr.shape[0] != n + 1:
            raise ValueError("slots or indptr do not fit the entries")
        self.begin.assign(2 * count + 1, 0)
        self.source.resize(nnz)
        self.row.resize(count)
        self.column.resize(count)
        self.diagonal.assign(n, -1)
        for k in range(nnz):
            self.begin[2 * slots[k] + (self.rows[k] < self.columns[k]) + 1] += 1
        for s in range(2 * count):
            self.begin[s + 1] += self.begin[s]
        following = self.begin
        for k in range(nnz):
            s = 2 * slots[k] + (self.rows[k] < self.columns[k])
            self.source[following[s]] = <int32_t> k
            following[s] += 1
        for j in range(n):
            for s in range(indptr[j], indptr[j + 1]):
                self.row[s], self.column[s] = indices[s], <int32_t> j
                if indices[s] == j and self.begin[2 * s + 1] > self.begin[2 * s]:
                    self.diagonal[j] = <int32_t> s
        self.pairs.nnz, self.pairs.slots, self.pairs.n = nnz, count, n
        for s in range(count):
            single = (single and self.begin[2 * s + 1] - self.begin[2 * s] == 1
                      and self.begin[2 * s + 2] - self.begin[2 * s + 1] == (self.row[s] != self.column[s]))
        if single:
            self.lower.resize(count)
            self.upper.resize(count)
            for s in range(count):
                self.lower[s] = self.source[self.begin[2 * s]]
                self.upper[s] = self.source[self.begin[2 * s + 2] - 1]
        self.pairs.lower = self.lower.data() if single else NULL
        self.pairs.upper = self.upper.data() if single else NULL
        self.pairs.begin, self.pairs.source = self.begin.data(), self.source.data()
        self.pairs.row, self.pairs.column = self.row.data(), self.column.data()
        self.pairs.diagonal = self.diagonal.data()
        self.paired = True

    @property
    def nbytes(self):
        """Memory of what `pair` prepared; rows and columns belong to the caller."""
        return 8 * self.begin.capacity() + 4 * (
            self.source.capacity() + self.row.capacity() + self.column.capacity() + self.diagonal.capacity()
            + self.lower.capacity() + self.upper.capacity())

    cdef int check(self, int64_t nnz) except -1:
        if not self.paired or nnz != self.pairs.nnz:
            raise ValueError("entries are not paired, or the values have another length")
        return 0

    def asymmetry(self, uintptr_t values, int64_t nnz, int dtype, bool hermitian, int threads=1):
        """(largest |a_ij - a_ji|, largest |a_ij|) on summed entries; conjugated where hermitian."""
        cdef CAsymmetry found
        self.check(nnz)
        with nogil:
            found = c_asymmetry(<Dtype> dtype, self.pairs, hermitian, <const void*> values, threads)
        return found.difference, found.largest

    def asymmetric(self, uintptr_t values, int64_t batch, int64_t nnz, int dtype, bool hermitian, double allowed,
                   int threads=1):
        """(e, *asymmetry) of the first matrix e of values [batch, nnz] whose difference exceeds allowed times its largest
        entry; None where there is none."""
        cdef int64_t e
        self.check(nnz)
        with nogil:
            e = first_asymmetric(<Dtype> dtype, self.pairs, hermitian, <const void*> values, batch, allowed, threads)
        if e < 0:
            return None
        return e, *self.asymmetry(values + e * nnz * (4, 8, 8, 16)[dtype], nnz, dtype, hermitian)

    def positive_hermitian(self, uintptr_t values, int64_t nnz, int dtype, double tolerance):
        """Whether a_ii > 0 and |a_ij - conj(a_ji)| <= tolerance * sqrt(a_ii a_jj), on summed entries."""
        cdef bool result
        self.check(nnz)
        with nogil:
            if dtype == 0:
                result = c_positive_hermitian[float](self.pairs, tolerance, <const float*> values)
            elif dtype == 1:
                result = c_positive_hermitian[double](self.pairs, tolerance, <const double*> values)
            elif dtype == 2:
                result = c_positive_hermitian[c64](self.pairs, tolerance, <const c64*> values)
            else:
                result = c_positive_hermitian[c128](self.pairs, tolerance, <const c128*> values)
        return result

    def outer(self, uintptr_t u, uintptr_t w, uintptr_t out, int64_t batch, int64_t m, int64_t n, int64_t width,
              int dtype, int mirror, bool one_triangle, int threads=1):
        """out[b, k] = -u[b, row_k] . conj(w[b, column_k]) in the convention of `mirror` (0 none, 1 transposed,
        2 conjugated); u is [batch, m, width], w is [batch, n, width], out is [batch, nnz]."""
        cdef const CPairs* pairs = &self.pairs if self.paired and mirror and not one_triangle else NULL
        cdef const int32_t* row = data32(self.rows)
        cdef const int32_t* column = data32(self.columns)
        with nogil:
            gather_outer(<Dtype> dtype, pairs, self.rows.shape[0], row, column, <Mirror> mirror, one_triangle, batch, m, n,
                         width, <void*> u, <void*> w, <void*> out, threads)

    def matvec(self, uintptr_t values, int64_t stride, uintptr_t x, int64_t n, uintptr_t y, int64_t m, int64_t batch,
               int64_t width, int dtype, int mirror, bool one_triangle, bool adjoint):
        """y[b] += S(values[b]) x[b], adjoint: S^H, in the convention of `mirror`; x is [batch, n, width], y is
        [batch, m, width], and values[b] lies `stride` numbers after values[b - 1]."""
        cdef int64_t nnz = self.rows.shape[0], e
        cdef const int32_t* row = data32(self.rows)
        cdef const int32_t* column = data32(self.columns)
        with nogil:
            for e in range(batch):
                if dtype == 0:
                    apply_entries[float](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, width,
                                         <float*> values + e * stride, <float*> x + e * n * width,
                                         <float*> y + e * m * width)
                elif dtype == 1:
                    apply_entries[double](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, width,
                                          <double*> values + e * stride, <double*> x + e * n * width,
                                          <double*> y + e * m * width)
                elif dtype == 2:
                    apply_entries[c64](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, width,
                                       <c64*> values + e * stride, <c64*> x + e * n * width, <c64*> y + e * m * width)
                else:
                    apply_entries[c128](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, width,
                                        <c128*> values + e * stride, <c128*> x + e * n * width,
                                        <c128*> y + e * m * width)

    def equilibrate(self, uintptr_t values, int64_t batch, int64_t n, int dtype, bool symmetric, double[:, ::1] left,
                    double[:, ::1] right):
        """Powers of two by which the largest entries of the rows and columns of square matrices come near 1, left and right
        [batch, n]; values [batch, nnz] in float64 or complex128. symmetric: left = right."""
        cdef int64_t nnz = self.rows.shape[0], e
        cdef const int32_t* row = data32(self.rows)
        cdef const int32_t* column = data32(self.columns)
        self.check_scales(batch, n, dtype, left, right)
        with nogil:
            for e in range(batch):
                if dtype == 1:
                    equilibrate[double](nnz, row, column, n, n, symmetric, <double*> values + e * nnz, &left[e, 0],
                                        &right[e, 0])
                else:
                    equilibrate[c128](nnz, row, column, n, n, symmetric, <c128*> values + e * nnz, &left[e, 0],
                                      &right[e, 0])

    def narrow(self, uintptr_t values, int64_t batch, int64_t n, int dtype, double[:, ::1] left, double[:, ::1] right,
               uintptr_t out):
        """out = L A R, rounded to single precision; values [batch, nnz] in float64 or complex128."""
        cdef int64_t nnz = self.rows.shape[0], e
        cdef const int32_t* row = data32(self.rows)
        cdef const int32_t* column = data32(self.columns)
        self.check_scales(batch, n, dtype, left, right)
        with nogil:
            for e in range(batch):
                if dtype == 1:
                    narrow_matrix[double, float](nnz, row, column, <double*> values + e * nnz, &left[e, 0], &right[e, 0],
                                                 <float*> out + e * nnz)
                else:
                    narrow_matrix[c128, c64](nnz, row, column, <c128*> values + e * nnz, &left[e, 0], &right[e, 0],
                                             <c64*> out + e * nnz)

    cdef int check_scales(self, int64_t batch, int64_t n, int dtype, double[:, ::1] left, double[:, ::1] right) except -1:
        if dtype not in (1, 3) or n < 1 or (left.shape[0], left.shape[1]) != (batch, n) or \
                (right.shape[0], right.shape[1]) != (batch, n):
            raise ValueError("dtype is not double, or left and right are not [batch, n]")
        return 0

    def residual(self, uintptr_t values, double[:, ::1] units, int64_t[::1] select, uintptr_t b, uintptr_t x, uintptr_t r, int64_t count,
                 int64_t n, int64_t width, int dtype, int mirror, bool one_triangle, bool adjoint):
        """r[p] = b[p] - S(values[select[p]]) x[p], adjoint: S^H; [count, n, width] in float64 or complex128. units
        [batch, n]: of the unknowns.

        Returns [2, count, width] componentwise backward errors and scaled residuals (kernels/refinement.hpp)."""
        cdef int64_t nnz = self.rows.shape[0], p, step = n * width
        check_columns(count, n, width, dtype, select, units.shape[0])
        if units.shape[1] != n:
            raise ValueError("units do not fit the unknowns")
        cdef const int32_t* row = data32(self.rows)
        cdef const int32_t* column = data32(self.columns)
        errors = numpy.empty((2, count, width))
        cdef double[:, :, ::1] w = errors
        with nogil:
            for p in range(count):
                if dtype == 1:
                    c_residual[double](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, n, width,
                                       <double*> values + select[p] * nnz, &units[select[p], 0], <double*> b + p * step,
                                       <double*> x + p * step, <double*> r + p * step, &w[0, p, 0], &w[1, p, 0])
                else:
                    c_residual[c128](nnz, row, column, <Mirror> mirror, one_triangle, adjoint, n, width,
                                     <c128*> values + select[p] * nnz, &units[select[p], 0], <c128*> b + p * step,
                                     <c128*> x + p * step, <c128*> r + p * step, &w[0, p, 0], &w[1, p, 0])
        return errors
