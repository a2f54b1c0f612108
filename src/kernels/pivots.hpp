// When a pivot is stable, and what the pivots of a matrix were like.
#pragma once
#include <stdint.h>

namespace spcache {

// A pivot is stable where its multipliers are at most 1 / STABLE.
constexpr double STABLE = 0.1;
// Least pivot, as a part of its column, that is taken as it is (double).
constexpr double HOPELESS = 1e-8;

// What the pivots of one matrix were like. Merging is order-independent: no schedule changes it.
struct Report {
  int64_t positive = 0, negative = 0;  // eigenvalues of D by sign; of complex symmetric matrices nothing of the kind
  int64_t replaced = 0;     // pivots that were replaced: signs of so many eigenvalues are not known
  double growth = 0;        // largest entry met in a column that was looked at; entries of A are at most 1
  double multiplier = 0;    // largest entry of L
  double weakest = 1e300;   // smallest pivot
  double rcond = __builtin_nan("");  // estimated reciprocal condition number of the scaled matrix; NaN: there was no reason to
  int32_t weak = -1;        // its pivot number (before the front chose its order)
  int32_t empty = -1;       // the first pivot whose whole column had become zero
  bool finite = true;
  bool exchanged = false;   // whether a row or column of a general matrix was

  void merge(const Report& r) {
    positive += r.positive, negative += r.negative, replaced += r.replaced;
    growth = growth > r.growth ? growth : r.growth;
    multiplier = multiplier > r.multiplier ? multiplier : r.multiplier;
    weaker(r.weakest, r.weak);
    if (r.empty >= 0 && (empty < 0 || r.empty < empty)) empty = r.empty;
    finite &= r.finite;
    exchanged |= r.exchanged;
  }
  void weaker(double size, int32_t number) {
    if (size > weakest || (size == weakest && weak >= 0 && number >= weak)) return;
    weakest = size, weak = number;
  }
};

// The entries of a matrix, by the supernode that they are added to.
struct Scatter {
  const int64_t* begin;    // [supernodes + 1]
  const int32_t* slot;     // [nnz] entry of A, or ~entry: of a lower triangle where the ordering exchanges row and column,
                           // of a full matrix where the entry is above the diagonal
  const uint32_t* target;  // [nnz] place in the panel
};

}  // namespace spcache
