// A look at the diagonal of a Cholesky factor.
#pragma once
#include "multifrontal.hpp"

namespace spcache {

// The square of the smallest over the largest number on the diagonal; numbers lie `step` apart.
template <class R>
inline double diagonal_spread(const Tree& tree, const R* factor, int64_t step) {
  constexpr int64_t CHAINS = 4;  // that do not wait for each other
  R least[CHAINS], most[CHAINS] = {};
  for (R& a : least) a = *factor;
  for (int32_t s = 0; s < tree.supernodes; s++) {
    const int64_t k = tree.first[s + 1] - tree.first[s], m = k + tree.row[s + 1] - tree.row[s];
    const R* diagonal = factor + tree.panel[s] * step;
    __builtin_prefetch(factor + tree.panel[s + 8 < tree.supernodes ? s + 8 : s] * step);
    for (int64_t j = 0; j < k; j++, diagonal += (m + 1) * step) {
      const R a = *diagonal;
      R &low = least[j % CHAINS], &high = most[j % CHAINS];
      low = a < low ? a : low;
      high = a > high ? a : high;
    }
  }
  for (int64_t c = 1; c < CHAINS; c++) {
    least[0] = least[c] < least[0] ? least[c] : least[0];
    most[0] = most[c] > most[0] ? most[c] : most[0];
  }
  const double ratio = double(least[0]) / double(most[0]);
  return ratio * ratio;
}

}  // namespace spcache
