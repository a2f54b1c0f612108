// What every factorization does with the fronts of the assembly tree: where they lie, and the extend-add.
#pragma once
#include "dense.hpp"
#include "multifrontal.hpp"

namespace spcache {
namespace {

// dst[0:count] += src[0:count]
template <class T>
inline void add(T* dst, const T* src, int64_t count) {
  int64_t i = 0;
  for (; i + W<T> <= count; i += W<T>) store(dst + i, load(dst + i) + load(src + i));
  if (i < count) {
    int rest = int(count - i);
    store_part(dst + i, load_part(dst + i, rest) + load_part(src + i, rest), rest);
  }
}

// Adds the update matrix C [u, u] of child c into its parent's front: panel P [m, k], update matrix U [m-k, m-k].
template <class T>
void extend_add(const Tree& t, int32_t c, const T* C, T* P, int64_t m, int64_t k, T* U) {
  const int64_t u = t.row[c + 1] - t.row[c], count = t.run[c + 1] - t.run[c];
  const Run* runs = t.runs + t.run[c];
  const int32_t* to = t.relative + t.row[c];
  auto target = [=](int64_t j) { return j < k ? P + j * m : U + (j - k) * (m - k) - k; };  // [i]: row i of the front
  if (count) {
    for (int64_t a = 0; a < count; a++)
      for (int32_t j = 0; j < runs[a].length; j++) {
        T* column = target(runs[a].to + j);
        const T* source = C + (runs[a].from + j) * u;
        add(column + runs[a].to + j, source + runs[a].from + j, runs[a].length - j);
        for (int64_t b = a + 1; b < count; b++) add(column + runs[b].to, source + runs[b].from, runs[b].length);
      }
  } else {
    for (int64_t j = 0; j < u; j++) {
      T* column = target(to[j]);
      const T* source = C + j * u;
      for (int64_t i = j; i < u; i++) column[to[i]] += source[i];
    }
  }
}

template <class T>
T* update_of(const Scratch& scratch, int32_t s) {
  const int64_t at = scratch.update[s];
  return at < 0 ? static_cast<T*>(scratch.shared) + ~at : static_cast<T*>(scratch.own) + at;
}

// The front of one supernode.
template <class T>
struct Front {
  int64_t k, u, m;
  T *P, *U;
  bool leaf;
  Front(const Tree& t, void* factor, int32_t s, const Scratch& scratch)
      : k(t.first[s + 1] - t.first[s]), u(t.row[s + 1] - t.row[s]), m(k + u), P(static_cast<T*>(factor) + t.panel[s]),
        U(update_of<T>(scratch, s)), leaf(t.child[s] == t.child[s + 1]) {}
};

}  // namespace
}  // namespace spcache
