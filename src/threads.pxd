cdef extern from "kernels/threads.hpp" namespace "spcache" nogil:
    cdef cppclass Workers:
        @staticmethod
        Workers& all() except +
        @staticmethod
        void adopt(Workers*)
