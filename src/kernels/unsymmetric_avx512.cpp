#include "unsymmetric_impl.hpp"

const spcache::UnsymmetricKernels* spcache::unsymmetric_avx512(Dtype dtype) { return choose(dtype); }
