#include "multifrontal_impl.hpp"

const spcache::Kernels* spcache::kernels_avx2(Dtype dtype) { return choose(dtype); }
const spcache::Interleaving* spcache::interleaving_avx2(Dtype dtype) { return choose_interleaving(dtype); }
