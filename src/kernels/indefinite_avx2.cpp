#include "indefinite_impl.hpp"

const spcache::IndefiniteKernels* spcache::indefinite_avx2(Dtype dtype, bool hermitian) { return choose(dtype, hermitian); }
