// Numeric Cholesky factorization and solves over the assembly tree. Included by one file per instruction set.
//
// J. W. H. Liu, "The multifrontal method for sparse matrix solution: theory and practice" (1992),
// doi:10.1137/1034004.
#include <type_traits>

#include "solve.hpp"

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

template <class T>
void assemble(const Tree& t, const Assembly& a, const void* values, void* factor, int32_t s, const Scratch& scratch) {
  const Front<T> f(t, factor, s, scratch);
  memset(static_cast<void*>(f.P), 0, size_t(f.m * f.k) * sizeof(T));
  if (!f.leaf) memset(static_cast<void*>(f.U), 0, size_t(f.u * f.u) * sizeof(T));
  assemble(a, s, static_cast<const T*>(values), f.P);
  for (int32_t e = t.child[s]; e < t.child[s + 1]; e++)
    extend_add(t, t.children[e], update_of<T>(scratch, t.children[e]), f.P, f.m, f.k, f.U);
}

template <class T>
int64_t factorize(const Tree& t, const Assembly& a, const void* values, void* factor, int32_t begin, int32_t end,
                  const Scratch& scratch) {
  for (int32_t s = begin; s < end; s++) {
    assemble<T>(t, a, values, factor, s, scratch);
    const Front<T> f(t, factor, s, scratch);
    if (int64_t bad = factor_front(f.P, f.m, f.k, f.U, f.leaf, static_cast<T*>(scratch.pack))) return t.first[s] + bad;
  }
  return 0;
}

template <class T>
int64_t part(Part what, const Tree& t, void* factor, int32_t s, int64_t J, int64_t begin, int64_t end,
             const Scratch& scratch) {
  const Front<T> f(t, factor, s, scratch);
  const int64_t m = f.m, kb = f.k - J < BLOCK ? f.k - J : BLOCK, next = J + kb;
  T* const block = f.P + J + J * m;
  const bool panel = what == PACK_PANEL || what == UPDATE_PANEL;
  const Packed<T> A = packed_in(static_cast<T*>(scratch.pack), panel ? m - next : f.u, kb);
  switch (what) {
    case PIVOTS: return factor_panel(block, kb, kb, m);
    case ROWS: solve_rows(block, kb, m, begin, end); break;
    case PACK_PANEL: pack_both(block + kb, m, begin, end, A); break;
    case PACK_REST: pack_both(f.P + f.k + J * m, m, begin, end, A); break;
    case UPDATE_PANEL: update_packed(A, begin, end, f.P + next + next * m, m, false); break;
    case UPDATE_REST: update_packed(A, begin, end, f.U, f.u, f.leaf && J == 0); break;
  }
  return 0;
}

template <class T>
int64_t pack_size(int64_t rows) {
  if (rows < PACK_FROM || W<T> == 1) return 0;
  return ((rows + TILE_ROWS<T> - 1) / TILE_ROWS<T> * TILE_ROWS<T> + (rows + NB<T> - 1) / NB<T> * NB<T>) * BLOCK;
}

template <class T>
constexpr Kernels kernels_of = {factorize<T>, assemble<T>, part<T>, BLOCK, W<T> == 1 ? 0 : SHARE, solve<T>, MANY * W<T>,
                                pack_size<T>};

const Kernels* choose(Dtype dtype) {
  switch (dtype) {
    case FLOAT32: return &kernels_of<float>;
    case FLOAT64: return &kernels_of<double>;
    case COMPLEX64: return &kernels_of<Complex<float>>;
    default: return &kernels_of<Complex<double>>;
  }
}

}  // namespace
}  // namespace spcache
