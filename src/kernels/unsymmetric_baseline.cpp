#include "unsymmetric_impl.hpp"

const spcache::UnsymmetricKernels* spcache::unsymmetric_baseline(Dtype dtype) { return choose(dtype); }
