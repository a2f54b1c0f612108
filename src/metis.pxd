# METIS 5 (Apache-2.0): nested dissection. It is called in kernels/dissection.cpp.
cdef extern from "metis.h" nogil:
    enum:
        METIS_OK
