// The matrices of a batch side by side: one vector holds an element of each of WIDTH matrices, and what is done to one
// number is done to all of them. For real matrices whose fronts are too small to fill a vector with rows: L is computed
// entry by entry, with a list of where the products of its columns go (`Columns`).
#pragma once
#include "multifrontal.hpp"
#include "vector.hpp"

#define UNROLL_16 _Pragma("GCC unroll 16")

namespace spcache {
namespace {

// 1 / sqrt(a), NaN in the lanes whose pivot will not do.
template <class R>
inline V<R> reciprocal_roots(V<R> a) {
  return ((a > 0) & (a <= LARGEST<R>)) ? R(1) / square_roots(a) : broadcast(R(__builtin_nan("")));
}

// One step of a transposition: exchanges the lanes of a that have bit D with those of b that do not.
template <int D, class X>
inline __attribute__((always_inline)) void exchange_lanes(X& a, X& b) {
  constexpr int width = int(sizeof(X) / sizeof(a[0]));
#if defined(__clang__)
  for (int i = 0; i < width; i++)
    if (i & D) {
      const auto z = a[i];
      a[i] = b[i - D], b[i - D] = z;
    }
#else
  decltype(a < b) low, high;
  for (int i = 0; i < width; i++) low[i] = i & D ? width + i - D : i, high[i] = i & D ? width + i : i + D;
  const X c = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = c;
#endif
}

// v[i] lane l = v[l] lane i
template <class R, int D = 1>
inline __attribute__((always_inline)) void transpose(V<R> (&v)[W<R>]) {
  if constexpr (D < W<R>) {
    UNROLL_16 for (int i = 0; i < W<R>; i++)
      if (!(i & D)) exchange_lanes<D>(v[i], v[i + D]);
    transpose<R, 2 * D>(v);
  }
}

// to[i] lane l = from[l][i], and back; back for the first `lanes` only.
template <class R>
void interleave(const void* const* from, int64_t count, void* to) {
  constexpr int width = W<R>;
  R* out = static_cast<R*>(to);
  auto row = [=](int l) { return static_cast<const R*>(from[l]); };
  int64_t i = 0;
  for (; i + width <= count; i += width, out += width * width) {
    V<R> v[width];
    UNROLL_16 for (int l = 0; l < width; l++) v[l] = load(row(l) + i);
    transpose<R>(v);
    UNROLL_16 for (int l = 0; l < width; l++) store(out + l * width, v[l]);
  }
  for (; i < count; i++, out += width)
    for (int l = 0; l < width; l++) out[l] = row(l)[i];
}
template <class R>
void separate(const void* from, int64_t count, void* const* to, int lanes) {
  constexpr int width = W<R>;
  const R* in = static_cast<const R*>(from);
  auto row = [=](int l) { return static_cast<R*>(to[l]); };
  int64_t i = 0;
  for (; i + width <= count; i += width, in += width * width) {
    V<R> v[width];
    UNROLL_16 for (int l = 0; l < width; l++) v[l] = load(in + l * width);
    transpose<R>(v);
    for (int l = 0; l < lanes; l++) store(row(l) + i, v[l]);
  }
  for (; i < count; i++, in += width)
    for (int l = 0; l < lanes; l++) row(l)[i] = in[l];
}

template <class R>
void factorize_columns(const ColumnsView& c, const Assembly& a, const void* values, void* factor, int64_t* status,
                       double* spread) {
  constexpr int width = W<R>;
  R* const L = static_cast<R*>(factor);
  const R* const A = static_cast<const R*>(values);
  const int32_t *const begin = c.begin, n = c.n;
  memset(factor, 0, size_t(begin[n]) * width * sizeof(R));
  for (int64_t s = 0; s < a.groups; s++) {
    const int32_t *const panel = c.entry + c.panel[s], *const source = a.source;
    const uint32_t* const target = a.target;
    for (int role = DIRECT; role <= DIAGONAL; role++) {
      const V<R> weight = broadcast(role == DIAGONAL ? R(1) : R(a.weight));
      for (int64_t e = a.begin[3 * s + role], end = a.begin[3 * s + role + 1]; e < end; e++) {
        R* const sum = L + width * int64_t(panel[target[e]]);
        store(sum, load(sum) + weight * load(A + width * int64_t(source[e])));
      }
    }
  }
  V<R> least = broadcast(LARGEST<R>), most{}, all{};
  const int32_t* to = c.target;
  for (int32_t k = 0; k < n; k++) {
    // As L D L^H, so that the square roots stay off the chain from pivot to pivot.
    R* const pivot = L + width * int64_t(begin[k]);
    R* const last = L + width * int64_t(begin[k + 1]);
    const V<R> d = load(pivot), inverse = R(1) / d;
    for (const R* column = pivot + width; column < last; column += width) {
      const V<R> y = inverse * load(column);
      for (const R* x = column; x < last; x += width, to++) {
        R* const entry = L + width * int64_t(*to);
        store(entry, load(entry) - load(x) * y);
      }
    }
    const V<R> scale = reciprocal_roots<R>(d);
    least = scale < least ? scale : least;
    most = scale > most ? scale : most;
    all += scale;  // NaN where one is
    store(pivot, scale);
    for (R* x = pivot + width; x < last; x += width) store(x, load(x) * scale);
  }
  for (int l = 0; l < width; l++) {
    const double ratio = double(least[l]) / double(most[l]);
    spread[l] = ratio * ratio;
    status[l] = 0;
    if (all[l] == all[l]) continue;
    auto failed = [&](int32_t k) { return !(L[width * int64_t(begin[k]) + l] > 0); };
    while (!failed(int32_t(status[l]++))) {}
  }
}

// Forward column by column, backward row by row of L^T, for C right-hand sides from x on, `step` numbers from row to row.
template <class R, int C>
void solve_some(const ColumnsView& c, const R* L, int64_t step, R* x, R* y) {
  constexpr int width = W<R>;
  for (int32_t k = 0; k < c.n; k++)
    UNROLL_16 for (int r = 0; r < C; r++) store(y + (k * C + r) * width, load(x + c.perm[k] * step + r * width));
  for (int32_t k = 0; k < c.n; k++) {
    R* const own = y + int64_t(k) * C * width;
    const V<R> d = load(L + width * int64_t(c.begin[k]));
    V<R> z[C];
    UNROLL_16 for (int r = 0; r < C; r++) store(own + r * width, z[r] = d * load(own + r * width));
    for (int32_t t = c.begin[k] + 1; t < c.begin[k + 1]; t++) {
      const V<R> l = load(L + width * int64_t(t));
      R* const below = y + int64_t(c.row[t]) * C * width;
      UNROLL_16 for (int r = 0; r < C; r++) store(below + r * width, load(below + r * width) - l * z[r]);
    }
  }
  for (int32_t k = c.n - 1; k >= 0; k--) {
    R* const own = y + int64_t(k) * C * width;
    const V<R> d = load(L + width * int64_t(c.begin[k]));
    V<R> z[C];
    UNROLL_16 for (int r = 0; r < C; r++) z[r] = load(own + r * width);
    for (int32_t t = c.begin[k] + 1; t < c.begin[k + 1]; t++) {
      const V<R> l = load(L + width * int64_t(t));
      const R* const below = y + int64_t(c.row[t]) * C * width;
      UNROLL_16 for (int r = 0; r < C; r++) subtract_product(z[r], l, load(below + r * width));
    }
    UNROLL_16 for (int r = 0; r < C; r++) {
      z[r] *= d;
      store(own + r * width, z[r]);
      store(x + c.perm[k] * step + r * width, z[r]);
    }
  }
}

template <class R>
void solve_columns(const ColumnsView& c, const void* factor, int64_t columns, void* b, void* work) {
  const R* const L = static_cast<const R*>(factor);
  R *x = static_cast<R*>(b), *const y = static_cast<R*>(work);
  const int64_t step = columns * W<R>;
  int64_t left = columns;
  for (; left >= 8; left -= 8, x += 8 * W<R>) solve_some<R, 8>(c, L, step, x, y);
  for (; left >= 4; left -= 4, x += 4 * W<R>) solve_some<R, 4>(c, L, step, x, y);
  for (; left > 0; left--, x += W<R>) solve_some<R, 1>(c, L, step, x, y);
}

template <class R>
constexpr Interleaving interleaving_of = {W<R>, interleave<R>, separate<R>, factorize_columns<R>, solve_columns<R>};

const Interleaving* choose_interleaving(Dtype dtype) {
  return dtype == FLOAT32 ? &interleaving_of<float> : dtype == FLOAT64 ? &interleaving_of<double> : nullptr;
}

}  // namespace
}  // namespace spcache
