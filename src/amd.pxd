# AMD (SuiteSparse, BSD-3-Clause): approximate minimum degree ordering.
from libc.stdint cimport int32_t

cdef extern from "amd.h" nogil:
    enum:
        AMD_MAIN_VERSION
        AMD_SUB_VERSION
        AMD_SUBSUB_VERSION
        AMD_OK
        AMD_OK_BUT_JUMBLED
        AMD_OUT_OF_MEMORY
    int amd_order(int32_t n, const int32_t* Ap, const int32_t* Ai, int32_t* P, double* Control, double* Info)
