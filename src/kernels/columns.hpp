// The factor of a plan entry by entry, without the zeros of its supernodes: for matrices so small that their fronts do
// not fill vectors, many of which are factorized side by side (interleaved.hpp).
#pragma once
#include <vector>

#include "analysis.hpp"

namespace spcache {

struct Columns {
  explicit Columns(const Plan& plan);
  ColumnsView view(const Plan& plan) const;
  int64_t entries() const { return int64_t(row.size()); }
  int64_t nbytes() const;

  std::vector<int32_t> begin, row, entry, target;
};

}  // namespace spcache
