// Solves with the factor of a tree: x = A^-1 b, for a vector of right-hand sides or for one.
//
// Every front keeps its own rows of the right-hand side, pivots first, one after the other in the order of the fronts.
// Forward, a front adds what its children left for its rows; backward, it reads the solution of the rows below its pivots
// from its parent. So fronts of different subtrees share nothing, and no order of them changes the result.
//
// On the diagonal of L lie reciprocals; or L is UNIT, has ones there, and nothing is read. Backward L^H is meant, L^T
// unless CONJUGATED.
#pragma once
#include "dense.hpp"
#include "multifrontal.hpp"

namespace spcache {
namespace {

// --- one right-hand side: vectors run along the rows ---

// w[i] -= P[i, 0 .. C] y, for rows begin .. end.
template <class T, int C>
inline __attribute__((always_inline)) void subtract(const T* P, int64_t ld, const T* y, int64_t begin, int64_t end, T* w) {
  Constant<T> v[C];
  UNROLL for (int c = 0; c < C; c++) v[c] = broadcast(y[c]);
  auto update = [&](auto load, int64_t i) __attribute__((always_inline)) {
    V<T> x = load(w + i);
    UNROLL for (int c = 0; c < C; c++) subtract_product(x, load(P + i + c * ld), v[c]);
    return x;
  };
  int64_t i = begin;
  for (; i + W<T> <= end; i += W<T>) store(w + i, update([](const T* p) { return load(p); }, i));
  if (i < end) {
    const int rest = int(end - i);
    store_part(w + i, update([=](const T* p) { return load_part(p, rest); }, i), rest);
  }
}

template <bool CONJUGATED, class X>
inline __attribute__((always_inline)) X turned(X a) {
  if constexpr (CONJUGATED) return conj(a);
  else return a;
}

// y = P[begin .. end, 0 .. C]^H w[begin .. end], ^T unless CONJUGATED
template <class T, int C, bool CONJUGATED>
inline __attribute__((always_inline)) void multiply(const T* P, int64_t ld, int64_t begin, int64_t end, const T* w, T* y) {
  V<T> total[C];
  UNROLL for (int c = 0; c < C; c++) total[c] = broadcast(T(0));
  auto add = [&](auto load, int64_t i) __attribute__((always_inline)) {
    const V<T> x = load(w + i);
    UNROLL for (int c = 0; c < C; c++) add_product(total[c], x, turned<CONJUGATED>(load(P + i + c * ld)));
  };
  int64_t i = begin;
  for (; i + W<T> <= end; i += W<T>) add([](const T* p) { return load(p); }, i);
  if (i < end) {
    const int rest = int(end - i);
    add([=](const T* p) { return load_part(p, rest); }, i);
  }
  sums<T>(total, y);
}

// Columns P[0 .. m, 0 .. C], the first C rows being the pivots: y = L11^-1 y, then w[below] -= L21 y.
template <class T, int C, bool UNIT>
inline void forward_columns(const T* P, int64_t m, int64_t ld, T* w) {
  T y[C];
  UNROLL for (int c = 0; c < C; c++) {
    y[c] = w[c];
    UNROLL for (int p = 0; p < c; p++) y[c] -= P[c + p * ld] * y[p];
    if (!UNIT) y[c] = P[c + c * ld] * y[c];
    w[c] = y[c];
  }
  subtract<T, C>(P, ld, y, C, m, w);
}

// The same columns backward: y = L11^-H (y - L21^H w[below]), ^T unless CONJUGATED.
template <class T, int C, bool UNIT, bool CONJUGATED>
inline void backward_columns(const T* P, int64_t m, int64_t ld, T* w) {
  T y[C];
  multiply<T, C, CONJUGATED>(P, ld, C, m, w, y);
  UNROLL for (int c = C - 1; c >= 0; c--) {
    y[c] = w[c] - y[c];
    UNROLL for (int p = C - 1; p > c; p--) y[c] -= turned<CONJUGATED>(P[p + c * ld]) * y[p];
    if (!UNIT) y[c] = turned<CONJUGATED>(P[c + c * ld]) * y[c];
    w[c] = y[c];
  }
}

template <class T, bool UNIT = false>
inline __attribute__((always_inline)) void forward_one(const T* P, int64_t m, int64_t k, int64_t ld, T* w) {
  for (; k > 4; k -= 4, m -= 4, P += 4 + 4 * ld, w += 4) forward_columns<T, 4, UNIT>(P, m, ld, w);
  switch (k) {
    case 1: return forward_columns<T, 1, UNIT>(P, m, ld, w);
    case 2: return forward_columns<T, 2, UNIT>(P, m, ld, w);
    case 3: return forward_columns<T, 3, UNIT>(P, m, ld, w);
    default: return forward_columns<T, 4, UNIT>(P, m, ld, w);
  }
}

template <class T, bool UNIT = false, bool CONJUGATED = true>
inline __attribute__((always_inline)) void backward_one(const T* P, int64_t m, int64_t k, int64_t ld, T* w) {
  int64_t j = (k - 1) / 4 * 4;
  auto at = [=](int64_t j) { return P + j + j * ld; };
  switch (k - j) {
    case 1: backward_columns<T, 1, UNIT, CONJUGATED>(at(j), m - j, ld, w + j); break;
    case 2: backward_columns<T, 2, UNIT, CONJUGATED>(at(j), m - j, ld, w + j); break;
    case 3: backward_columns<T, 3, UNIT, CONJUGATED>(at(j), m - j, ld, w + j); break;
    default: backward_columns<T, 4, UNIT, CONJUGATED>(at(j), m - j, ld, w + j);
  }
  for (j -= 4; j >= 0; j -= 4) backward_columns<T, 4, UNIT, CONJUGATED>(at(j), m - j, ld, w + j);
}

// Large fronts go block by block of pivots, so that threads can share what is outside of the diagonal blocks. Whoever does
// a part of that calls the same function: the compiler may round complex products in another way where it inlines them.
constexpr int64_t LARGE_PANEL = 1 << 17;  // numbers of a panel
constexpr int64_t SOLVE_BLOCK = 128;      // pivots

template <class T, bool UNIT>
__attribute__((noinline)) void forward_block(const T* P, int64_t k, int64_t ld, T* w) {
  forward_one<T, UNIT>(P, k, k, ld, w);
}
template <class T, bool UNIT, bool CONJUGATED>
__attribute__((noinline)) void backward_block(const T* P, int64_t k, int64_t ld, T* w) {
  backward_one<T, UNIT, CONJUGATED>(P, k, k, ld, w);
}

// w[i] -= L[i, 0 .. columns] y, for rows begin .. end of the columns P.
template <class T>
__attribute__((noinline)) void forward_rows(const T* P, int64_t ld, int64_t columns, const T* y, int64_t begin, int64_t end, T* w) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) subtract<T, 4>(P + c * ld, ld, y + c, begin, end, w);
  for (; c < columns; c++) subtract<T, 1>(P + c * ld, ld, y + c, begin, end, w);
}

// w[c] -= L[first .. m, c]^H w[first .. m], for columns begin .. end of P.
template <class T, bool CONJUGATED>
__attribute__((noinline)) void backward_rows(const T* P, int64_t m, int64_t ld, int64_t first, int64_t begin, int64_t end, T* w) {
  T y[4];
  int64_t c = begin;
  for (; c + 4 <= end; c += 4) {
    multiply<T, 4, CONJUGATED>(P + c * ld, ld, first, m, w, y);
    for (int q = 0; q < 4; q++) w[c + q] -= y[q];
  }
  for (; c < end; c++) {
    multiply<T, 1, CONJUGATED>(P + c * ld, ld, first, m, w, y);
    w[c] -= y[0];
  }
}

template <class T, bool UNIT>
void forward_front(const T* P, int64_t m, int64_t k, T* w) {
  if (m * k < LARGE_PANEL) return forward_one<T, UNIT>(P, m, k, m, w);
  for (int64_t J = 0; J < k; J += SOLVE_BLOCK) {
    const int64_t kb = k - J < SOLVE_BLOCK ? k - J : SOLVE_BLOCK;
    forward_block<T, UNIT>(P + J + J * m, kb, m, w + J);
    forward_rows(P + J * m, m, kb, w + J, J + kb, m, w);
  }
}

template <class T, bool UNIT, bool CONJUGATED>
void backward_front(const T* P, int64_t m, int64_t k, T* w) {
  if (m * k < LARGE_PANEL) return backward_one<T, UNIT, CONJUGATED>(P, m, k, m, w);
  for (int64_t J = (k - 1) / SOLVE_BLOCK * SOLVE_BLOCK; J >= 0; J -= SOLVE_BLOCK) {
    const int64_t kb = k - J < SOLVE_BLOCK ? k - J : SOLVE_BLOCK;
    backward_rows<T, CONJUGATED>(P, m, m, J + kb, J, J + kb, w);
    backward_block<T, UNIT, CONJUGATED>(P + J + J * m, kb, m, w + J);
  }
}

// --- N vectors of right-hand sides: vectors run along the right-hand sides ---

// w[0 .. R] -= L[0 .. R, 0 .. depth] y
template <class T, int N, int R>
inline void subtract_rows(const T* L, int64_t ld, int64_t depth, const V<T>* y, V<T>* w) {
  V<T> total[R][N];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < N; v++) total[r][v] = w[r * N + v];
  for (int64_t p = 0; p < depth; p++, L += ld, y += N)
    UNROLL for (int r = 0; r < R; r++) {
      const Constant<T> l = broadcast(L[r]);
      UNROLL for (int v = 0; v < N; v++) subtract_product(total[r][v], y[v], l);
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < N; v++) w[r * N + v] = total[r][v];
}

// w[0 .. C] = L11^-1 (w - L10 y), for the pivots of C columns that lie `depth` columns to the right.
template <class T, int N, int C, bool UNIT>
inline void forward_pivots(const T* L, int64_t ld, int64_t depth, const V<T>* y, V<T>* w) {
  V<T> x[C][N];
  UNROLL for (int c = 0; c < C; c++)
    UNROLL for (int v = 0; v < N; v++) x[c][v] = w[c * N + v];
  for (int64_t p = 0; p < depth; p++, L += ld, y += N)
    UNROLL for (int c = 0; c < C; c++) {
      const Constant<T> l = broadcast(L[c]);
      UNROLL for (int v = 0; v < N; v++) subtract_product(x[c][v], y[v], l);
    }
  UNROLL for (int c = 0; c < C; c++) {
    UNROLL for (int p = 0; p < c; p++) {
      const Constant<T> l = broadcast(L[c + p * ld]);
      UNROLL for (int v = 0; v < N; v++) subtract_product(x[c][v], x[p][v], l);
    }
    if constexpr (!UNIT) {
      const Constant<T> d = broadcast(L[c + c * ld]);
      UNROLL for (int v = 0; v < N; v++) x[c][v] = d * x[c][v];
    }
    UNROLL for (int v = 0; v < N; v++) w[c * N + v] = x[c][v];
  }
}

// The C pivots at w[0], with P their diagonal block: y = L11^-H (y - L21^H w[below]).
template <class T, int N, int C, bool UNIT, bool CONJUGATED>
inline void backward_pivots(const T* P, int64_t m, int64_t ld, V<T>* w) {
  V<T> x[C][N];
  UNROLL for (int c = 0; c < C; c++)
    UNROLL for (int v = 0; v < N; v++) x[c][v] = w[c * N + v];
  for (int64_t i = C; i < m; i++)
    UNROLL for (int c = 0; c < C; c++) {
      const Constant<T> l = broadcast(turned<CONJUGATED>(P[i + c * ld]));
      UNROLL for (int v = 0; v < N; v++) subtract_product(x[c][v], w[i * N + v], l);
    }
  UNROLL for (int c = C - 1; c >= 0; c--) {
    UNROLL for (int p = C - 1; p > c; p--) {
      const Constant<T> l = broadcast(turned<CONJUGATED>(P[p + c * ld]));
      UNROLL for (int v = 0; v < N; v++) subtract_product(x[c][v], x[p][v], l);
    }
    if constexpr (!UNIT) {
      const Constant<T> d = broadcast(turned<CONJUGATED>(P[c + c * ld]));
      UNROLL for (int v = 0; v < N; v++) x[c][v] = d * x[c][v];
    }
    UNROLL for (int v = 0; v < N; v++) w[c * N + v] = x[c][v];
  }
}

template <class T, int N, bool UNIT>
void forward(const T* P, int64_t m, int64_t k, V<T>* w) {
  int64_t j = 0;
  for (; j + 4 < k; j += 4) forward_pivots<T, N, 4, UNIT>(P + j, m, j, w, w + j * N);
  switch (k - j) {
    case 1: forward_pivots<T, N, 1, UNIT>(P + j, m, j, w, w + j * N); break;
    case 2: forward_pivots<T, N, 2, UNIT>(P + j, m, j, w, w + j * N); break;
    case 3: forward_pivots<T, N, 3, UNIT>(P + j, m, j, w, w + j * N); break;
    default: forward_pivots<T, N, 4, UNIT>(P + j, m, j, w, w + j * N);
  }
  int64_t i = k;
  for (; i + 8 <= m; i += 8) subtract_rows<T, N, 8>(P + i, m, k, w, w + i * N);
  if (i + 4 <= m) subtract_rows<T, N, 4>(P + i, m, k, w, w + i * N), i += 4;
  if (i + 2 <= m) subtract_rows<T, N, 2>(P + i, m, k, w, w + i * N), i += 2;
  if (i < m) subtract_rows<T, N, 1>(P + i, m, k, w, w + i * N);
}

template <class T, int N, bool UNIT, bool CONJUGATED>
void backward(const T* P, int64_t m, int64_t k, V<T>* w) {
  int64_t j = (k - 1) / 4 * 4;
  auto at = [=](int64_t j) { return P + j + j * m; };
  switch (k - j) {
    case 1: backward_pivots<T, N, 1, UNIT, CONJUGATED>(at(j), m - j, m, w + j * N); break;
    case 2: backward_pivots<T, N, 2, UNIT, CONJUGATED>(at(j), m - j, m, w + j * N); break;
    case 3: backward_pivots<T, N, 3, UNIT, CONJUGATED>(at(j), m - j, m, w + j * N); break;
    default: backward_pivots<T, N, 4, UNIT, CONJUGATED>(at(j), m - j, m, w + j * N);
  }
  for (j -= 4; j >= 0; j -= 4) backward_pivots<T, N, 4, UNIT, CONJUGATED>(at(j), m - j, m, w + j * N);
}

// --- the tree ---

// Row [width] of right-hand sides as N vectors; `count` of them are there.
template <class T, int N>
inline void load_row(const T* row, int64_t count, V<T>* w) {
  constexpr int width = W<T>;
  UNROLL for (int v = 0; v < N; v++) {
    const int64_t there = count - v * width;
    w[v] = there >= width ? load(row + v * width) : there > 0 ? load_part(row + v * width, int(there)) : broadcast(T(0));
  }
}
template <class T, int N>
inline void store_row(const V<T>* w, int64_t count, T* row) {
  constexpr int width = W<T>;
  UNROLL for (int v = 0; v < N; v++) {
    const int64_t there = count - v * width;
    if (there >= width) store(row + v * width, w[v]);
    else if (there > 0) store_part(row + v * width, w[v], int(there));
  }
}

constexpr int MANY = 2;  // vectors of right-hand sides that are solved for at once

// What a local row of a front is: one number, or N vectors.
template <class T, bool UNIT = false, bool CONJUGATED = true>
struct One {
  using Row = T;
  static constexpr int size = 1;
  static void load(const T* row, int64_t, Row* w) { *w = *row; }
  static void store(const Row* w, int64_t, T* row) { *row = *w; }
  static void forward(const T* P, int64_t m, int64_t k, Row* w) { forward_front<T, UNIT>(P, m, k, w); }
  static void backward(const T* P, int64_t m, int64_t k, Row* w) { backward_front<T, UNIT, CONJUGATED>(P, m, k, w); }
};
template <class T, int N, bool UNIT = false, bool CONJUGATED = true>
struct Many {
  using Row = V<T>;
  static constexpr int size = N;
  static void load(const T* row, int64_t count, Row* w) { load_row<T, N>(row, count, w); }
  static void store(const Row* w, int64_t count, T* row) { store_row<T, N>(w, count, row); }
  static void forward(const T* P, int64_t m, int64_t k, Row* w) { spcache::forward<T, N, UNIT>(P, m, k, w); }
  static void backward(const T* P, int64_t m, int64_t k, Row* w) {
    spcache::backward<T, N, UNIT, CONJUGATED>(P, m, k, w);
  }
};

constexpr int64_t FETCH_FROM = 8 << 20;  // bytes of a factor that does not stay in a cache near the processor
constexpr int64_t FETCH = 8192;           // bytes of the factor between prefetching them and their use

template <class T>
inline void prefetch(const T* begin, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(begin + i);
}

// The rows of front s before its forward elimination, and before its backward substitution; and what comes of that.
template <class How, class T>
struct Local {
  using Row = typename How::Row;
  static constexpr int N = How::size;
  const Tree& t;
  const Rhs& rhs;
  Row* const local;

  Row* rows_of(int32_t s) const { return local + (t.row[s] + t.first[s]) * N; }
  void exchange(Row* a, Row* b) const {
    for (int v = 0; v < N; v++) {
      const Row z = a[v];
      a[v] = b[v], b[v] = z;
    }
  }
  void gather(int32_t s) const {
    const int64_t f = t.first[s], k = t.first[s + 1] - f, m = k + t.row[s + 1] - t.row[s];
    const T* b = static_cast<const T*>(rhs.b) + rhs.offset;
    Row* w = rows_of(s);
    for (int64_t i = 0; i < k; i++) How::load(b + int64_t(t.perm[f + i]) * rhs.width, rhs.count, w + i * N);
    for (int64_t i = k * N; i < m * N; i++) w[i] = Row{};
    for (int32_t e = t.child[s]; e < t.child[s + 1]; e++) {
      const int32_t c = t.children[e];
      const int32_t* to = t.relative + t.row[c];
      const int64_t count = t.row[c + 1] - t.row[c];
      const Row* passed = rows_of(c) + (t.first[c + 1] - t.first[c]) * N;
      for (int64_t i = 0; i < count; i++)
        for (int v = 0; v < N; v++) w[to[i] * N + v] += passed[i * N + v];
    }
    if (t.exchange)
      for (int64_t j = 0; j < k; j++)
        if (t.exchange[f + j] != j) exchange(w + j * N, w + t.exchange[f + j] * N);
  }
  void inherit(int32_t s) const {
    const int64_t k = t.first[s + 1] - t.first[s], u = t.row[s + 1] - t.row[s];
    if (!u) return;
    Row* w = rows_of(s) + k * N;
    const Row* parent = rows_of(t.parent[s]);
    const int32_t* from = t.relative + t.row[s];
    for (int64_t i = 0; i < u; i++)
      for (int v = 0; v < N; v++) w[i * N + v] = parent[from[i] * N + v];
  }
  void scatter(int32_t s) const {
    const int64_t f = t.first[s], k = t.first[s + 1] - f;
    T* x = static_cast<T*>(rhs.x) + rhs.offset;
    Row* w = rows_of(s);
    if (t.exchange)
      for (int64_t j = k - 1; j >= 0; j--)
        if (t.exchange[f + j] != j) exchange(w + j * N, w + t.exchange[f + j] * N);
    for (int64_t i = 0; i < k; i++) How::store(w + i * N, rhs.count, x + int64_t(t.perm[f + i]) * rhs.width);
  }
};

// `before(s, w)`: what happens to the rows w of front s before its elimination, `after`: when that is done, or its
// substitution.
template <class How, class T, class Before, class After>
void solve_fronts(const Tree& t, const T* L, const Rhs& rhs, bool downwards, int32_t begin, int32_t end,
                  typename How::Row* memory, Before before, After after) {
  const Local<How, T> local{t, rhs, memory};
  const int64_t ahead = FETCH / int64_t(sizeof(T));
  const bool far = t.panel[t.supernodes] * int64_t(sizeof(T)) > FETCH_FROM;
  auto rows = [&](int32_t s) { return t.first[s + 1] - t.first[s] + t.row[s + 1] - t.row[s]; };
  if (downwards)
    for (int32_t s = end - 1; s >= begin; s--) {
      const int64_t k = t.first[s + 1] - t.first[s], m = rows(s);
      const T* P = L + t.panel[s];
      if (far) prefetch(P - ahead, m * k);
      local.inherit(s);
      How::backward(P, m, k, local.rows_of(s));
      after(s, local.rows_of(s));
      local.scatter(s);
    }
  else
    for (int32_t s = begin; s < end; s++) {
      const int64_t k = t.first[s + 1] - t.first[s], m = rows(s);
      const T* P = L + t.panel[s];
      if (far) prefetch(P + ahead, m * k);
      local.gather(s);
      before(s, local.rows_of(s));
      How::forward(P, m, k, local.rows_of(s));
      after(s, local.rows_of(s));
    }
}

// Part of the solve with one large front for one right-hand side.
template <class T>
void solve_part(SolvePart what, const Tree& t, const void* factor, const Rhs& rhs, int32_t s, int64_t J, int64_t begin,
                int64_t end, void* memory) {
  if constexpr (W<T> > 1) {
    const Local<One<T>, T> local{t, rhs, static_cast<T*>(memory)};
    const int64_t k = t.first[s + 1] - t.first[s], m = k + t.row[s + 1] - t.row[s];
    const int64_t kb = k - J < SOLVE_BLOCK ? k - J : SOLVE_BLOCK;
    const T* P = static_cast<const T*>(factor) + t.panel[s];
    T* w = local.rows_of(s);
    switch (what) {
      case GATHER: return local.gather(s);
      case FORWARD_PIVOTS: return forward_block<T, false>(P + J + J * m, kb, m, w + J);
      case FORWARD_ROWS: return forward_rows(P + J * m, m, kb, w + J, begin, end, w);
      case INHERIT: return local.inherit(s);
      case BACKWARD_ROWS: return backward_rows<T, true>(P, m, m, J + kb, begin, end, w);
      case BACKWARD_PIVOTS: return backward_block<T, false, true>(P + J + J * m, kb, m, w + J);
      case SCATTER: return local.scatter(s);
    }
  }
}

// One phase of a solve, for as many right-hand sides from `offset` on as go at once.
template <class T>
void solve(const Tree& t, const void* factor, const Rhs& rhs, bool downwards, int32_t begin, int32_t end, void* local) {
  auto run = [&](auto how) {
    using How = decltype(how);
    auto nothing = [](int32_t, typename How::Row*) {};
    solve_fronts<How>(t, static_cast<const T*>(factor), rhs, downwards, begin, end,
                      static_cast<typename How::Row*>(local), nothing, nothing);
  };
  if (rhs.count > W<T>) run(Many<T, MANY>());
  else if (rhs.count > 1 || W<T> == 1) run(Many<T, 1>());
  else if constexpr (W<T> > 1) run(One<T>());
}

}  // namespace
}  // namespace spcache
