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

// Adds columns of the update matrix C [u, u] of child c, those that lie between columns begin and end of its parent's
// front, to that front; row i of its column j is at target(j)[i].
template <class T, class Target>
void extend_add(const Tree& t, int32_t c, const T* C, int64_t begin, int64_t end, Target target) {
  const int64_t u = t.row[c + 1] - t.row[c], count = t.run[c + 1] - t.run[c];
  const int32_t* to = t.relative + t.row[c];
  if (count) {
    const Run* runs = t.runs + t.run[c];
    for (int64_t a = 0; a < count && runs[a].to < end; a++) {
      const int64_t first = begin > runs[a].to ? begin - runs[a].to : 0;
      for (int64_t j = first; j < runs[a].length && runs[a].to + j < end; j++) {
        T* column = target(runs[a].to + j);
        const T* source = C + (runs[a].from + j) * u;
        add(column + runs[a].to + j, source + runs[a].from + j, runs[a].length - j);
        for (int64_t b = a + 1; b < count; b++) add(column + runs[b].to, source + runs[b].from, runs[b].length);
      }
    }
  } else {
    int64_t j = 0;
    if (begin) {
      int64_t high = u;  // the first row from `begin` on
      while (j < high) {
        const int64_t middle = (j + high) / 2;
        if (to[middle] < begin) j = middle + 1;
        else high = middle;
      }
    }
    for (; j < u && to[j] < end; j++) {
      T* column = target(to[j]);
      const T* source = C + j * u;
#pragma GCC unroll 4
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
  const Tree& t;
  const Scratch& scratch;
  int32_t s;
  int64_t k, u, m;
  T *P, *U;
  Front(const Tree& t, void* factor, int32_t s, const Scratch& scratch)
      : t(t), scratch(scratch), s(s), k(t.first[s + 1] - t.first[s]), u(t.row[s + 1] - t.row[s]), m(k + u),
        P(static_cast<T*>(factor) + t.panel[s]), U(update_of<T>(scratch, s)) {}

  // Columns begin .. end of the panel, from the children.
  void begin_panel(int64_t begin, int64_t end) const {
    memset(static_cast<void*>(P + begin * m), 0, size_t((end - begin) * m) * sizeof(T));
    each_child(begin, end, [this](int64_t j) { return P + j * m; });
  }
  // The children's part of columns begin .. end of the update matrix.
  void finish_rest(int64_t begin, int64_t end) const {
    each_child(k + begin, k + end, [this](int64_t j) { return U + (j - k) * u - k; });
  }

 private:
  template <class Target>
  void each_child(int64_t begin, int64_t end, Target target) const {
    for (int32_t e = t.child[s]; e < t.child[s + 1]; e++)
      extend_add(t, t.children[e], update_of<T>(scratch, t.children[e]), begin, end, target);
  }
};

}  // namespace
}  // namespace spcache
