# METIS 5 (Apache-2.0): nested dissection.
from libc.stdint cimport int32_t

cdef extern from "metis.h" nogil:
    ctypedef int32_t idx_t
    enum:
        METIS_NOPTIONS
        METIS_OPTION_SEED
        METIS_OPTION_NUMBERING
        METIS_OK
        IDXTYPEWIDTH
    int METIS_SetDefaultOptions(idx_t* options)
    int METIS_NodeND(idx_t* nvtxs, idx_t* xadj, idx_t* adjncy, idx_t* vwgt, idx_t* options, idx_t* perm, idx_t* iperm)
