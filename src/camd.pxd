# CAMD (SuiteSparse, BSD-3-Clause): approximate minimum degree ordering under constraints.
from libc.stdint cimport int32_t

cdef extern from "camd.h" nogil:
    enum:
        CAMD_MAIN_VERSION
        CAMD_SUB_VERSION
        CAMD_SUBSUB_VERSION
        CAMD_OK
        CAMD_OK_BUT_JUMBLED
        CAMD_OUT_OF_MEMORY
    int camd_order(int32_t n, const int32_t* Ap, const int32_t* Ai, int32_t* P, double* Control, double* Info,
                   const int32_t* C)
