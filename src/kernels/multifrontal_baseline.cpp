#include "multifrontal_impl.hpp"

const spcache::Kernels* spcache::kernels_baseline(Dtype dtype) { return choose(dtype); }
const spcache::Interleaving* spcache::interleaving_baseline(Dtype dtype) { return choose_interleaving(dtype); }
