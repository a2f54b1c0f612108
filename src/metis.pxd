# METIS 5 (Apache-2.0): nested dissection. It is called in kernels/dissection.cpp.
cdef extern from "metis.h" nogil:
    enum:
        IDXTYPEWIDTH
        METIS_OK
        METIS_VER_MAJOR
        METIS_VER_MINOR
        METIS_VER_SUBMINOR
