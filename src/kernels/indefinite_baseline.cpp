#include "indefinite_impl.hpp"

const spcache::IndefiniteKernels* spcache::indefinite_baseline(Dtype dtype, bool hermitian) { return choose(dtype, hermitian); }
