// Numeric Cholesky factorization and solves over the assembly tree. Included by one file per instruction set.
//
// J. W. H. Liu, "The multifrontal method for sparse matrix solution: theory and practice" (1992),
// doi:10.1137/1034004.
#include <type_traits>

#include "front.hpp"

namespace spcache {
namespace {

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

// --- solves: R right-hand sides at a time, as vectors of X = V<T> (R = width) or one by one (X = T) ---

template <class T, class X>
inline void subtract_product(X& x, T l, X y) {
  if constexpr (sizeof(X) == sizeof(T)) x -= l * y;
  else x -= broadcast(l) * y;
}

// Local right-hand sides of one front: the pivots' part first. Forward: y = L11^-1 y, then w[below] -= L21 y.
template <class T, class X>
void forward(const T* P, int64_t m, int64_t k, X* w) {
  for (int64_t j = 0; j < k; j++) {
    const T* column = P + j * m;
    X y = w[j];
    if constexpr (sizeof(X) == sizeof(T)) y = real(column[j]) * y;
    else y = broadcast(T(column[j])) * y;
    w[j] = y;
    for (int64_t i = j + 1; i < m; i++) subtract_product(w[i], column[i], y);
  }
}

// Backward: y = L11^-H (y - L21^H w[below]).
template <class T, class X>
void backward(const T* P, int64_t m, int64_t k, X* w) {
  for (int64_t j = k - 1; j >= 0; j--) {
    const T* column = P + j * m;
    X y = w[j];
    for (int64_t i = j + 1; i < m; i++) subtract_product(y, conj(column[i]), w[i]);
    if constexpr (sizeof(X) == sizeof(T)) w[j] = real(column[j]) * y;
    else w[j] = broadcast(T(column[j])) * y;
  }
}

// One right-hand side, real: vectors run along the rows instead, four columns at a time.
template <class T>
void forward_one(const T* P, int64_t m, int64_t k, T* w) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    const T *a = P + j * m, *b = a + m, *c = b + m, *d = c + m;
    T y0 = w[j] * a[j];
    T y1 = (w[j + 1] - a[j + 1] * y0) * b[j + 1];
    T y2 = (w[j + 2] - a[j + 2] * y0 - b[j + 2] * y1) * c[j + 2];
    T y3 = (w[j + 3] - a[j + 3] * y0 - b[j + 3] * y1 - c[j + 3] * y2) * d[j + 3];
    w[j] = y0, w[j + 1] = y1, w[j + 2] = y2, w[j + 3] = y3;
    V<T> v0 = broadcast(y0), v1 = broadcast(y1), v2 = broadcast(y2), v3 = broadcast(y3);
    int64_t i = j + 4;
    for (; i + W<T> <= m; i += W<T>)
      store(w + i, load(w + i) - (load(a + i) * v0 + load(b + i) * v1) - (load(c + i) * v2 + load(d + i) * v3));
    if (i < m) {
      int r = int(m - i);
      store_part(w + i, load_part(w + i, r) - (load_part(a + i, r) * v0 + load_part(b + i, r) * v1) -
                            (load_part(c + i, r) * v2 + load_part(d + i, r) * v3), r);
    }
  }
  for (; j < k; j++) {
    const T* a = P + j * m;
    T y = w[j] * a[j];
    w[j] = y;
    V<T> v = broadcast(y);
    int64_t i = j + 1;
    for (; i + W<T> <= m; i += W<T>) store(w + i, load(w + i) - load(a + i) * v);
    if (i < m) { int r = int(m - i); store_part(w + i, load_part(w + i, r) - load_part(a + i, r) * v, r); }
  }
}

template <class T>
void backward_one(const T* P, int64_t m, int64_t k, T* w) {
  int64_t j = k;
  for (; j >= 4; j -= 4) {
    const T *a = P + (j - 4) * m, *b = a + m, *c = b + m, *d = c + m;
    V<T> s0 = broadcast(T(0)), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = j;
    for (; i + W<T> <= m; i += W<T>) {
      V<T> x = load(w + i);
      s0 += load(a + i) * x, s1 += load(b + i) * x, s2 += load(c + i) * x, s3 += load(d + i) * x;
    }
    if (i < m) {
      int r = int(m - i);
      V<T> x = load_part(w + i, r);
      s0 += load_part(a + i, r) * x, s1 += load_part(b + i, r) * x, s2 += load_part(c + i, r) * x,
          s3 += load_part(d + i, r) * x;
    }
    const int64_t q = j - 4;
    T y3 = (w[q + 3] - sum<T>(s3)) * d[q + 3];
    T y2 = (w[q + 2] - sum<T>(s2) - c[q + 3] * y3) * c[q + 2];
    T y1 = (w[q + 1] - sum<T>(s1) - b[q + 3] * y3 - b[q + 2] * y2) * b[q + 1];
    T y0 = (w[q] - sum<T>(s0) - a[q + 3] * y3 - a[q + 2] * y2 - a[q + 1] * y1) * a[q];
    w[q] = y0, w[q + 1] = y1, w[q + 2] = y2, w[q + 3] = y3;
  }
  for (; j > 0; j--) {
    const T* a = P + (j - 1) * m;
    V<T> s = broadcast(T(0));
    int64_t i = j;
    for (; i + W<T> <= m; i += W<T>) s += load(a + i) * load(w + i);
    if (i < m) { int r = int(m - i); s += load_part(a + i, r) * load_part(w + i, r); }
    w[j - 1] = (w[j - 1] - sum<T>(s)) * a[j - 1];
  }
}

// Lanes `offset` .. `offset + count` of `width` right-hand sides as one X.
template <class T, class X>
inline X load_lanes(const T* row, int64_t offset, int64_t count) {
  if constexpr (sizeof(X) == sizeof(T)) return row[offset];
  else return count == W<T> ? load(row + offset) : load_part(row + offset, int(count));
}
template <class T, class X>
inline void store_lanes(T* row, int64_t offset, int64_t count, X value) {
  if constexpr (sizeof(X) == sizeof(T)) row[offset] = value;
  else if (count == W<T>) store(row + offset, value);
  else store_part(row + offset, value, int(count));
}

// Forward elimination of supernodes begin .. end: x = L^-1 b for their pivots. What a front subtracts from the rows
// below goes to its parent as a vector at passed + row[s], as update matrices do; so no order of subtrees changes x.
template <class T, class X>
void forward_lanes(const Tree& t, const T* L, const T* b, int64_t width, int64_t offset, int64_t count, int32_t begin,
                   int32_t end, X* x, X* passed, X* w) {
  for (int32_t s = begin; s < end; s++) {
    const int64_t f = t.first[s], k = t.first[s + 1] - f, u = t.row[s + 1] - t.row[s], m = k + u;
    for (int64_t i = 0; i < k; i++) w[i] = load_lanes<T, X>(b + int64_t(t.perm[f + i]) * width, offset, count);
    memset(static_cast<void*>(w + k), 0, size_t(u) * sizeof(X));
    for (int32_t e = t.child[s]; e < t.child[s + 1]; e++) {
      const int32_t c = t.children[e];
      for (int64_t i = t.row[c]; i < t.row[c + 1]; i++) w[t.relative[i]] += passed[i];
    }
    if constexpr (sizeof(X) == sizeof(T) && W<T> > 1) forward_one(L + t.panel[s], m, k, w);
    else forward(L + t.panel[s], m, k, w);
    memcpy(static_cast<void*>(x + f), w, size_t(k) * sizeof(X));
    memcpy(static_cast<void*>(passed + t.row[s]), w + k, size_t(u) * sizeof(X));
  }
}

// Backward substitution of supernodes end .. begin, those above being done; the solution also goes to `result`.
template <class T, class X>
void backward_lanes(const Tree& t, const T* L, T* result, int64_t width, int64_t offset, int64_t count, int32_t begin,
                    int32_t end, X* x, X* w) {
  for (int32_t s = end - 1; s >= begin; s--) {
    const int64_t f = t.first[s], k = t.first[s + 1] - f, u = t.row[s + 1] - t.row[s], m = k + u;
    const int32_t* rows = t.rows + t.row[s];
    memcpy(static_cast<void*>(w), x + f, size_t(k) * sizeof(X));
    for (int64_t i = 0; i < u; i++) w[k + i] = x[rows[i]];
    if constexpr (sizeof(X) == sizeof(T) && W<T> > 1) backward_one(L + t.panel[s], m, k, w);
    else backward(L + t.panel[s], m, k, w);
    for (int64_t i = 0; i < k; i++) {
      x[f + i] = w[i];
      store_lanes<T, X>(result + int64_t(t.perm[f + i]) * width, offset, count, w[i]);
    }
  }
}

// One phase of a solve, for as many right-hand sides from `offset` on as go at once.
template <class T>
void solve(const Tree& t, const void* factor, const Rhs& rhs, bool downwards, int32_t begin, int32_t end,
           const SolveScratch& scratch) {
  const T* L = static_cast<const T*>(factor);
  auto phase = [&](auto* x, int64_t count) {
    using X = std::remove_pointer_t<decltype(x)>;
    X *passed = static_cast<X*>(scratch.passed), *w = static_cast<X*>(scratch.front);
    if (downwards)
      backward_lanes<T, X>(t, L, static_cast<T*>(rhs.x), rhs.width, rhs.offset, count, begin, end, x, w);
    else
      forward_lanes<T, X>(t, L, static_cast<const T*>(rhs.b), rhs.width, rhs.offset, count, begin, end, x, passed, w);
  };
  if (rhs.count == 1) phase(static_cast<T*>(scratch.x), 1);
  else phase(static_cast<V<T>*>(scratch.x), rhs.count);
}

template <class T>
int64_t pack_size(int64_t rows) {
  if (rows < PACK_FROM || W<T> == 1) return 0;
  return ((rows + TILE_ROWS<T> - 1) / TILE_ROWS<T> * TILE_ROWS<T> + (rows + NB<T> - 1) / NB<T> * NB<T>) * BLOCK;
}

template <class T>
constexpr Kernels kernels_of = {factorize<T>, assemble<T>, part<T>, BLOCK, W<T> == 1 ? 0 : SHARE, solve<T>, W<T>,
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
