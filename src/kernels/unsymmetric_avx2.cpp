#include "unsymmetric_impl.hpp"

const spcache::UnsymmetricKernels* spcache::unsymmetric_avx2(Dtype dtype) { return choose(dtype); }
