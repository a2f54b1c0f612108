# distutils: language = c++
"""Native parts of `spcache.least_squares`: scaled rows, products with them, and the normal matrix.

Numbers are double or complex double (scalar types 1 and 3), passed as addresses, their sizes beside them.
"""
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memcpy
from libcpp cimport bool
from libcpp.vector cimport vector

import numpy


cdef extern from "kernels/normal.hpp" namespace "spcache" nogil:
    cdef cppclass c128 "spcache::Complex<double>":
        pass
    cdef cppclass CRows "spcache::Rows":
        int64_t nnz, p, q
        vector[int64_t] indptr
        vector[int32_t] indices
        vector[int32_t] slot
        int64_t count()
    cdef cppclass CRuns "spcache::Runs":
        int64_t products()
        int64_t count()
    cdef cppclass CProducts "spcache::Products":
        CRuns runs
        vector[int64_t] indptr
        vector[int32_t] indices
        vector[int32_t] target
    void make_rows(CRows&, int64_t, const int32_t*, const int32_t*, int64_t, int64_t) except +
    CRuns find_runs(const CRows&) except +
    bool make_products(CProducts&, const CRows&) except +
    int64_t scale_rows[T](const CRows&, bool, double, const T*, T*, double*) except +
    void apply_rows[T](const CRows&, bool, int64_t, const T*, const T*, T*)
    double multiply_rows[T](const CProducts&, const CRows&, double, const T*, const double*, T*) except +


cdef array64(const vector[int64_t]& v):
    out = numpy.empty(v.size(), numpy.int64)
    cdef int64_t[::1] view = out
    if v.size():
        memcpy(&view[0], v.data(), v.size() * 8)
    return out


cdef array32(const vector[int32_t]& v):
    out = numpy.empty(v.size(), numpy.int32)
    cdef int32_t[::1] view = out
    if v.size():
        memcpy(&view[0], v.data(), v.size() * 4)
    return out


cdef int check_dtype(int dtype) except -1:
    if dtype != 1 and dtype != 3:
        raise ValueError("the scalar type must be float64 or complex128")
    return 0


cdef class Rows:
    """The entries of B [p, q] by rows; immutable.

    Args:
        rows, columns: of the caller's entries, every index in range.
    """
    cdef CRows c

    def __init__(self, int32_t[::1] rows, int32_t[::1] columns, int64_t p, int64_t q):
        cdef int64_t nnz = rows.shape[0]
        cdef const int32_t* row = &rows[0] if nnz else NULL
        cdef const int32_t* column = &columns[0] if nnz else NULL
        if columns.shape[0] != nnz or nnz > 2**31 - 1:
            raise ValueError("rows and columns differ in length, or have more than 2^31 - 1 entries")
        with nogil:
            make_rows(self.c, nnz, row, column, p, q)

    @property
    def count(self):
        """Entries of B, duplicates summed."""
        return self.c.count()

    @property
    def nbytes(self):
        return 8 * self.c.indptr.size() + 4 * (self.c.indices.size() + self.c.slot.size())

    def structure(self):
        """(indptr [p + 1], indices [count]) of B by rows."""
        return array64(self.c.indptr), array32(self.c.indices)

    def scale(self, uintptr_t values, int64_t batch, int64_t nnz, int dtype, bool conjugate, double damping,
              uintptr_t w, uintptr_t scale):
        """w [batch, count] = B diag(scale), scale [batch, q; float64] powers of two.

        Returns:
            [batch; int64] the first column of zeros of each matrix (damping counts), or -1.
        """
        cdef int64_t e, count = self.c.count()
        check_dtype(dtype)
        if nnz != self.c.nnz:
            raise ValueError("the values have another length than the indices")
        zero = numpy.empty(batch, numpy.int64)
        cdef int64_t[::1] to = zero
        with nogil:
            for e in range(batch):
                if dtype == 1:
                    to[e] = scale_rows[double](self.c, conjugate, damping, <double*> values + e * nnz,
                                               <double*> w + e * count, <double*> scale + e * self.c.q)
                else:
                    to[e] = scale_rows[c128](self.c, conjugate, damping, <c128*> values + e * nnz,
                                             <c128*> w + e * count, <double*> scale + e * self.c.q)
        return zero

    def apply(self, uintptr_t w, int64_t batch, uintptr_t x, uintptr_t y, int64_t count, int64_t width,
              uintptr_t factors, int dtype, bool adjoint):
        """y[f] = B[g(f)] x[f], adjoint: B^H, for f < count; x is [count, q, width] and y [count, p, width].

        Args:
            factors: address of int64 [count] giving g(f); 0: g(f) = f if count == batch, and 0 if batch == 1.
        """
        cdef int64_t f, g, nnz = self.c.count()
        cdef int64_t n = (self.c.p if adjoint else self.c.q) * width, m = (self.c.q if adjoint else self.c.p) * width
        cdef const int64_t* index = <const int64_t*> factors
        check_dtype(dtype)
        if index == NULL and batch != 1 and count != batch:
            raise ValueError("which matrix belongs to which vector is not said")
        with nogil:
            for f in range(count):
                g = index[f] if index != NULL else 0 if batch == 1 else f
                if dtype == 1:
                    apply_rows[double](self.c, adjoint, width, <double*> w + g * nnz, <double*> x + f * n,
                                       <double*> y + f * m)
                else:
                    apply_rows[c128](self.c, adjoint, width, <c128*> w + g * nnz, <c128*> x + f * n,
                                     <c128*> y + f * m)

    def products(self):
        """How many products N = B^H B takes, rows with the same columns taken together."""
        cdef CRuns runs
        with nogil:
            runs = find_runs(self.c)
        return runs.products()


cdef class Products:
    """The lower triangle of N = B^H B and the map of products into it; immutable."""
    cdef Rows rows
    cdef CProducts c

    def __init__(self, Rows rows):
        cdef bool fits
        self.rows = rows
        with nogil:
            self.c.runs = find_runs(rows.c)
            fits = make_products(self.c, rows.c)
        if not fits:
            raise OverflowError("the normal matrix has more than 2^31 - 1 entries")

    @property
    def count(self):
        """Entries of the lower triangle of N."""
        return <int64_t> self.c.indices.size()

    @property
    def nbytes(self):
        return 8 * self.c.indptr.size() + 4 * (self.c.indices.size() + self.c.target.size()) + 16 * self.c.runs.count()

    def structure(self):
        """(indptr [q + 1], indices [count]) of the lower triangle by columns, rows ascending, the diagonal stored."""
        return array64(self.c.indptr), array32(self.c.indices)

    def multiply(self, uintptr_t w, uintptr_t scale, int64_t batch, int dtype, double damping, uintptr_t out):
        """out [batch, count] = N of the scaled rows w, damping on its diagonal.

        Returns:
            [batch; float64] the largest sum of magnitudes in a row of N.
        """
        cdef int64_t e, count = self.c.indices.size(), nnz = self.rows.c.count(), q = self.rows.c.q
        check_dtype(dtype)
        norm = numpy.empty(batch, numpy.float64)
        cdef double[::1] to = norm
        with nogil:
            for e in range(batch):
                if dtype == 1:
                    to[e] = multiply_rows[double](self.c, self.rows.c, damping, <double*> w + e * nnz,
                                                  <double*> scale + e * q, <double*> out + e * count)
                else:
                    to[e] = multiply_rows[c128](self.c, self.rows.c, damping, <c128*> w + e * nnz,
                                                <double*> scale + e * q, <c128*> out + e * count)
        return norm
