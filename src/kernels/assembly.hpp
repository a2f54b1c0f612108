// Assembly: summing the caller's COO values into factor storage, through positions computed once.
//
// Every stored value contributes to one or two places. What it contributes depends on its role:
//   DIRECT    weight * v              the entry where it stands
//   MIRRORED  weight * v  (or conj)   the entry's partner across the diagonal
//   DIAGONAL  v           (or Re v)   an entry on the diagonal of a symmetric (Hermitian) matrix
// Contributions are sorted by group (a supernode of the engine, or one group for a whole CSC array),
// inside a group by role, so that a group is assembled by three loops without a branch in them.
#pragma once
#include <stdint.h>

#include "numbers.hpp"

namespace spcache {

enum Role : uint8_t { DIRECT = 0, MIRRORED = 1, DIAGONAL = 2 };

constexpr int64_t AHEAD = 24;  // contributions between prefetching a value and adding it

struct Assembly {
  int64_t nnz;             // length of the values it reads
  int64_t groups;          // how many groups it writes
  double weight;           // of an off-diagonal contribution: 1, or 1/2 where both triangles are averaged
  bool hermitian;          // conjugate what is mirrored, keep the real part of the diagonal
  const int64_t* begin;    // [3 * groups + 1] first contribution of (group, role)
  const int32_t* source;   // [contributions + AHEAD] index into the values; what lies behind the last is only prefetched
  const uint32_t* target;  // [contributions] index into the group's storage
};

// out[target] += role(values[source]) for one group; T is the precision computed in, S the values' own.
template <class T, class S>
inline void assemble(const Assembly& a, int64_t group, const S* values, T* out) {
  const int64_t* begin = a.begin + 3 * group;
  const Real<T> weight = Real<T>(a.weight);
  auto each = [&](Role role, auto contribution) {
    for (int64_t e = begin[role]; e < begin[role + 1]; e++) {
      __builtin_prefetch(values + a.source[e + AHEAD]);
      out[a.target[e]] += contribution(T(values[a.source[e]]));
    }
  };
  each(DIRECT, [=](T v) { return weight * v; });
  if (a.hermitian) {
    each(MIRRORED, [=](T v) { return weight * conj(v); });
    each(DIAGONAL, [](T v) { return T(real(v)); });
  } else {
    each(MIRRORED, [=](T v) { return weight * v; });
    each(DIAGONAL, [](T v) { return v; });
  }
}

}  // namespace spcache
