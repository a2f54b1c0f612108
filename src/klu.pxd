# The KLU engine's C++ (kernels/klu.hpp); KLU itself is called only there.
from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool
from libcpp.vector cimport vector

cdef extern from "klu.h" nogil:
    enum:
        KLU_OK
        KLU_INVALID
        KLU_MAIN_VERSION
        KLU_SUB_VERSION
        KLU_SUBSUB_VERSION
        BTF_MAIN_VERSION
        BTF_SUB_VERSION
        BTF_SUBSUB_VERSION
    int SuiteSparse_version(int* version)

cdef extern from "colamd.h" nogil:
    enum:
        COLAMD_MAIN_VERSION
        COLAMD_SUB_VERSION
        COLAMD_SUBSUB_VERSION

cdef extern from "kernels/klu.hpp" namespace "spcache" nogil:
    ctypedef int Dtype
    cdef struct CAssembly "spcache::Assembly":
        int64_t nnz, groups
    cdef struct Look:
        double growth, rcond
        bool doubtful
    cdef cppclass Factors:
        vector[int64_t] failed
        vector[Look] looks
        int64_t failures, kept, repivots
        int factorize(const CAssembly&, const void* values, bool check, const Factors* donor, void* work,
                      int threads) except +
        void solve(const void* b, void* x, int64_t count, int64_t width, const int64_t* select, bool adjoint,
                   void* work, int threads)
        int factorizing(int threads)
        int solving(int64_t count, int64_t columns, int threads)
        int64_t work_bytes()
        int64_t nbytes()
        int64_t nnz()
    cdef cppclass Analysis:
        int64_t n, rank, nnz
        double flops
        int64_t largest_block
        Factors* factors(Dtype, int64_t batch, bool strict) except +
        Analysis* widened(int* status) except +
        int64_t nbytes()
    Analysis* analyze(int64_t n, const int64_t* indptr, const int32_t* indices, int ordering,
                      const int32_t* given, bool wide, int* status) except +
