// Numeric L D L^H factorization and solves over the assembly tree. Included by one file per instruction set.
//
// Storage is the lower triangle. H: Hermitian, a_ij = conj(a_ji); else a_ij = a_ji, the same for real numbers.
#include <type_traits>

#include "front.hpp"
#include "indefinite.hpp"
#include "products.hpp"
#include "solve.hpp"

namespace spcache {
namespace {

constexpr int64_t INNER = 16;      // pivots found by products of vectors before the window's other columns are updated
constexpr int64_t TRIES = 16;      // columns looked at for one pivot

template <class T, bool H>
inline T mirrored(T a) {
  if constexpr (H) return conj(a);
  else return a;
}

// The real numbers of a vector, and the larger ones of two such by magnitude.
template <class X> inline X lanes(X v) { return v; }
#if defined(__AVX2__)
template <class R> inline Register<R> lanes(ComplexVector<R> v) { return v.v; }
#endif
template <class X>
inline __attribute__((always_inline)) X larger(X top, X v) {
  v = v < -v ? -v : v;
  return v > top ? v : top;
}

// Pivots of order 1 that are taken as they come, a diagonal block of them.
template <class T>
struct Unpivoted {
  T w[8][8], l[8][8];  // below the diagonal L D and L
  T inverse[8];        // of D
  Real<T> size[8];     // of D
  Real<T> most[8];     // largest entry of L D below, in the front
};

// Rows below these pivots: X = C L^-H (C L^-T unless H) = L D goes to W (conjugated unless H).
template <class T, bool H, int NR>
void rows_below(const T* C, int64_t ld, int64_t begin, int64_t end, Unpivoted<T>& pivots, T* w) {
  constexpr bool conjugated = COMPLEX<T> && !H;
  T b[NR][NR];
  UNROLL for (int c = 0; c < NR; c++)
    UNROLL for (int p = 0; p < c; p++) b[c][p] = mirrored<T, H>(pivots.l[c][p]);
  auto strip = [&](int64_t i, auto load, auto store, auto keep) __attribute__((always_inline)) {
    V<T> x[NR];
    UNROLL for (int c = 0; c < NR; c++) {
      x[c] = load(C + i + c * ld);
      UNROLL for (int p = 0; p < c; p++) subtract_product(x[c], x[p], broadcast(b[c][p]));
      if constexpr (conjugated) store(w + i + c * ld, conj(x[c]));
      else store(w + i + c * ld, x[c]);
      keep(c, x[c]);
    }
  };
  if constexpr (W<T> == 1) {
    for (int64_t i = begin; i < end; i++)
      strip(i, [](const T* p) { return *p; }, [](T* p, T x) { *p = x; }, [&](int c, T x) {
        const Real<T> a = size_of(x);
        if (a > pivots.most[c]) pivots.most[c] = a;
      });
  } else {
    Register<Real<T>> top[NR] = {};
    auto keep = [&](int c, V<T> x) __attribute__((always_inline)) { top[c] = larger(top[c], lanes(x)); };
    int64_t i = begin;
    for (; i + W<T> <= end; i += W<T>)
      strip(i, [](const T* p) { return load(p); }, [](T* p, V<T> x) { store(p, x); }, keep);
    if (i < end) {
      const int r = int(end - i);
      strip(i, [=](const T* p) { return load_part(p, r); }, [=](T* p, V<T> x) { store_part(p, x, r); }, keep);
    }
    for (int c = 0; c < NR; c++)
      for (int l = 0; l < W<Real<T>>; l++)
        if (top[c][l] > pivots.most[c]) pivots.most[c] = top[c][l];
  }
}

// y[0:count] = a * x, x conjugated if asked for
template <class T, bool CONJUGATED>
void scaled(T a, const T* x, int64_t count, T* y) {
  const Constant<T> v = broadcast(a);
  auto times = [=](auto b) {
    if constexpr (CONJUGATED) return conj(b) * v;
    else return b * v;
  };
  int64_t i = 0;
  for (; i + W<T> <= count; i += W<T>) store(y + i, times(load(x + i)));
  if (i < count) store_part(y + i, times(load_part(x + i, int(count - i))), int(count - i));
}

// y[0:count] -= A[count, depth] * conj(b), b with stride ldb.
template <class T>
void subtract_columns(const T* A, int64_t lda, int64_t depth, const T* b, int64_t ldb, T* y, int64_t count) {
  int64_t p = 0;
  for (; p + 4 <= depth; p += 4) {
    const T *a0 = A + p * lda, *a1 = a0 + lda, *a2 = a1 + lda, *a3 = a2 + lda;
    const Constant<T> b0 = broadcast(conj(b[p * ldb])), b1 = broadcast(conj(b[(p + 1) * ldb])),
                      b2 = broadcast(conj(b[(p + 2) * ldb])), b3 = broadcast(conj(b[(p + 3) * ldb]));
    int64_t i = 0;
    for (; i + W<T> <= count; i += W<T>)
      store(y + i, load(y + i) - (load(a0 + i) * b0 + load(a1 + i) * b1) - (load(a2 + i) * b2 + load(a3 + i) * b3));
    if (i < count) {
      const int r = int(count - i);
      store_part(y + i, load_part(y + i, r) - (load_part(a0 + i, r) * b0 + load_part(a1 + i, r) * b1) -
                            (load_part(a2 + i, r) * b2 + load_part(a3 + i, r) * b3), r);
    }
  }
  for (; p < depth; p++) {
    const T* a = A + p * lda;
    const Constant<T> v = broadcast(conj(b[p * ldb]));
    int64_t i = 0;
    for (; i + W<T> <= count; i += W<T>) store(y + i, load(y + i) - load(a + i) * v);
    if (i < count) {
      const int r = int(count - i);
      store_part(y + i, load_part(y + i, r) - load_part(a + i, r) * v, r);
    }
  }
}

// Partial L D L^H of one front, window of at most BLOCK pivots by window. Columns are exchanged inside of a window, so
// that those behind it wait for one large update; columns for which no pivot is found go to the end of the panel.
template <class T, bool H>
class Pivoting {
  using R = Real<T>;
  static constexpr R EPS = sizeof(R) == 4 ? R(__FLT_EPSILON__) : R(__DBL_EPSILON__);
  static constexpr R MOST = sizeof(R) == 4 ? R(__FLT_MAX__) : R(__DBL_MAX__);
  static constexpr R LEAST = sizeof(R) == 4 ? R(3e-4) : R(HOPELESS);

  // A candidate: column c alone, or with column r.
  struct Pivot {
    R quality = -1;  // 1 / largest multiplier
    int64_t c = -1, r = -1;
  };

  T* const P;
  const int64_t m, k;
  int32_t* const order;
  T *const Wc, *const memory;  // L D of the window, conjugated unless H; packed blocks
  T* const Z;                  // columns as they are now
  T *X, *Y;                    // columns c and r as they are now, from row j on
  Report& report;
  const int32_t first;         // pivot number of the front's first row
  const bool trial;
  int64_t J = 0, I = 0, j = 0, end = 0;  // window, inner block, next pivot, end of the window
  int64_t next = 0;            // column to look at first

 public:
  Pivoting(T* panel, int64_t rows, int64_t columns, int32_t* order_, T* work, int32_t first_, bool trial_,
           Report& report_)
      : P(panel), m(rows), k(columns), order(order_), Wc(work), memory(work + (BLOCK + 2 + NB<T>) * rows),
        Z(work + (BLOCK + 2) * rows), X(work + BLOCK * rows), Y(X + rows), report(report_), first(first_),
        trial(trial_) {}

  static int64_t work_size(int64_t rows) {
    const int64_t packed = W<T> == 1 ? 0 : (rows + TILE_ROWS<T> + rows + NB<T>) * BLOCK;
    return (BLOCK + 2 + NB<T>) * rows + packed;
  }

  // U becomes -L21 D L21^H.
  void factor(T* U) {
    const int64_t u = m - k;
    for (Window w; w.j < k;) {
      pivots(w);
      const int64_t found = w.j - w.J, end = w.end;
      if (!found) continue;
      update(P + end + w.J * m, Wc + end, m, m - end, k - end, found, P + end + end * m, m, false, memory);
      update(P + k + w.J * m, Wc + k, m, u, u, found, U, u, w.fresh, memory);
    }
  }

  // The pivots of the window after w; what is behind that has been updated. Other columns do not change.
  void pivots(Window& w) {
    if (!w.end)
      for (int64_t i = 0; i < k; i++) order[i] = int32_t(i);
    j = w.j;
    for (int64_t a = w.end - 1, b = k - 1; w.end < k && a >= j && b >= w.end; a--, b--) exchange(a, b, false);
    w.fresh = j == 0;
    w.J = J = I = next = j;
    w.end = end = k - j < BLOCK ? k : j + BLOCK;
    const bool forced = w.without >= k - j;
    // As they come, as long as that is stable; others wait at the end of the window. If none is: one after the other.
    int64_t waiting = end;
    for (bool any = false; j < end;) {
      if (j < waiting) {
        const int nb = int(waiting - j < NB<T> ? waiting - j : NB<T>), taken = unpivoted(nb);
        any |= taken > 0;
        if (taken < nb && j < --waiting) exchange(j, waiting, true);
      } else {
        if (!any && !search(forced && j == J)) break;
        any = false;
        waiting = end;
      }
    }
    update_window();
    w.j = j;
    w.without = j > J ? 0 : w.without + end - j;
  }

  // The updates of `factor` in parts, for threads that share them.
  Packed<T> packed(const Window& w, int64_t row) const { return packed_in(memory, m - row, w.j - w.J); }
  void pack_rows(const Window& w, int64_t row, int64_t begin, int64_t stop) const {
    const Packed<T> to = packed(w, row);
    const int64_t count = stop - begin, at = begin * to.depth;
    pack(P + row + begin + w.J * m, m, count, to.depth, TILE_ROWS<T>, const_cast<T*>(to.rows) + at);
    pack(Wc + row + begin, m, count, to.depth, NB<T>, const_cast<T*>(to.columns) + at);
  }

 private:
  T& at(int64_t row, int64_t column) { return P[row + column * m]; }

  void update_window() {
    if (j > I && j < end)
      update_from(P + j + I * m, Wc + j + (I - J) * m, m, m - j, end - j, j - I, P + j + j * m, m, false);
    I = j;
  }

  // Eliminates the next nb columns as they come, up to the first that is not stable alone; returns how many these are.
  int unpivoted(int nb) {
    const int64_t at = j, depth = at - I, rows = m - at;
    const T* C = P + at + at * m;
    auto columns = [&](int count, int64_t begin, int64_t end) {  // rows of columns as they are now
      if (!depth) return;
      for (int c = 0; c < count; c++)
        memcpy(static_cast<void*>(Z + begin + c * m), C + begin + c * m, size_t(end - begin) * sizeof(T));
      for (int64_t i = begin; i < end; i += TILE_ROWS<T>)
        tile_any<T, false>(count, P + at + i + I * m, m, Wc + at + (I - J) * m, m, depth, Z + i, m,
                           end - i < TILE_ROWS<T> ? end - i : TILE_ROWS<T>, false, nullptr);
    };
    Unpivoted<T> pivots;
    T* const w = Wc + at + (at - J) * m;
    columns(nb, 0, nb);
    int found = diagonal_block(depth ? Z : C, m, nb, pivots);
    if (!found) return 0;
    columns(found, nb, rows);
    found = eliminate_below(found, nb, depth ? Z : C, rows, w, pivots);
    for (int c = 0; c < found; c++) {
      T* L = P + at + (at + c) * m;
      const R most = pivots.most[c], size = pivots.size[c];
      const double multiplier = double(most) / double(size);
      if (multiplier > report.multiplier) report.multiplier = multiplier;
      note(most > size ? most : size);
      (real(pivots.inverse[c]) < 0 ? report.negative : report.positive)++;
      report.weaker(double(size), first + order[at + c]);
      report.finite &= size_of(pivots.inverse[c]) <= MOST && size <= MOST;
      L[c] = pivots.inverse[c];
      for (int i = c + 1; i < nb; i++) L[i] = pivots.l[i][c], w[i + c * m] = H ? pivots.w[i][c] : conj(pivots.w[i][c]);
      scaled<T, COMPLEX<T> && !H>(pivots.inverse[c], w + nb + c * m, rows - nb, L + nb);
    }
    j += found;
    return found;
  }

  // L and D of a diagonal block of order nb, as far as pivots are stable inside of it; how far that is.
  static int diagonal_block(const T* C, int64_t m, int nb, Unpivoted<T>& pivots) {
    T(&a)[8][8] = pivots.w;
    for (int c = 0; c < nb; c++)
      for (int i = c; i < nb; i++) a[i][c] = C[i + c * m];
    for (int c = 0; c < nb; c++) {
      const T d = H ? T(real(a[c][c])) : a[c][c];
      const R size = size_of(d);
      R most = 0;
      for (int i = c + 1; i < nb; i++) {
        const R s = size_of(a[i][c]);
        if (!(s <= most)) most = s;
      }
      if (!(size > 0 && size >= R(STABLE) * most)) return c;
      pivots.inverse[c] = inverse(d);
      pivots.size[c] = size, pivots.most[c] = most;
      for (int i = c + 1; i < nb; i++) {
        const T l = a[i][c] * pivots.inverse[c];
        pivots.l[i][c] = l;
        for (int q = c + 1; q <= i; q++) a[i][q] -= l * mirrored<T, H>(a[q][c]);
      }
    }
    return nb;
  }

  // L D of the rows below `found` of these pivots; how many of them are stable there too.
  int eliminate_below(int found, int nb, const T* C, int64_t rows, T* w, Unpivoted<T>& pivots) const {
    switch (found) {
      case 0: return 0;
      case 1: rows_below<T, H, 1>(C, m, nb, rows, pivots, w); break;
      case 2: rows_below<T, H, 2>(C, m, nb, rows, pivots, w); break;
      case 3: rows_below<T, H, 3>(C, m, nb, rows, pivots, w); break;
      case 4: rows_below<T, H, 4>(C, m, nb, rows, pivots, w); break;
      case 5: rows_below<T, H, 5>(C, m, nb, rows, pivots, w); break;
      case 6: rows_below<T, H, 6>(C, m, nb, rows, pivots, w); break;
      case 7: rows_below<T, H, 7>(C, m, nb, rows, pivots, w); break;
      default: rows_below<T, H, 8>(C, m, nb, rows, pivots, w);
    }
    for (int c = 0; c < found; c++)
      if (!(pivots.size[c] >= R(STABLE) * pivots.most[c])) return c;
    return found;
  }

  // Column c of what remains, rows j .. m.
  void compute(int64_t c, T* to) {
    for (int64_t i = j; i < c; i++) to[i] = mirrored<T, H>(at(c, i));
    memcpy(static_cast<void*>(to + c), P + c + c * m, size_t(m - c) * sizeof(T));
    subtract_columns(P + j + I * m, m, j - I, Wc + c + (I - J) * m, m, to + j, m - j);
    if (H) to[c] = T(real(to[c]));
  }

  // Its largest entry off the diagonal, row `r` not counted either.
  R largest_off(const T* x, int64_t c, int64_t r = -1) {
    const int64_t a = r < 0 || c < r ? c : r, b = r < 0 || c > r ? c : r;
    R most = largest(x + j, a - j);
    auto raise = [&](R value) { most = value > most ? value : most; };
    if (b > a) raise(largest(x + a + 1, b - a - 1));
    raise(largest(x + b + 1, m - b - 1));
    return most;
  }
  void note(R size) {
    if (size > report.growth) report.growth = size;
  }

  // The row of its largest entry off the diagonal that is in the window, -1 where there is none.
  int64_t partner(const T* x, int64_t c) const {
    R most = 0;
    int64_t at = -1;
    for (int64_t i = j; i < end; i++) {
      const R a = size_of(x[i]);
      if (a > most && i != c) most = a, at = i;
    }
    return at;
  }

  static R quality_of(T a, R off) {
    const R size = size_of(a);
    return size > 0 ? (off > 0 ? size / off : MOST) : R(0);
  }

  // D = [a, b~; b, e], whose columns have `p` and `q` as largest entries elsewhere. 0 where D is nearly singular.
  static R quality_of(T a, T b, T e, R p, R q) {
    const T square = b * mirrored<T, H>(b), product = a * e;
    const R det = size_of(product - square), x = size_of(square), y = size_of(product);
    if (!(det >= R(0.05) * (x > y ? x : y)) || det == 0) return 0;
    const R s = size_of(a), t = size_of(b), v = size_of(e);
    const R one = v * p + t * q, two = t * p + s * q, most = one > two ? one : two;
    return most > 0 ? det / most : MOST;
  }

  // Eliminates some pivots, each looked for. False: there is none that is stable.
  bool search(bool forced) {
    const int64_t start = j;
    update_window();
    while (j < end && j - start < INNER && eliminate(forced && j == J)) {}
    return j > start;
  }

  // Finds a pivot and eliminates it. False: none of those that were looked at is stable. Forced: the best of them.
  bool eliminate(bool forced) {
    Pivot best;
    const int64_t count = end - j < TRIES ? end - j : TRIES;
    for (int64_t tried = 0; tried < count; tried++) {
      if (next < j || next >= end) next = j;
      const int64_t c = next++;
      if (consider(c, best)) return take(best), true;
    }
    if (!forced) return false;
    if (best.c < 0) best = {0, j, -1};  // infinite numbers have no quality
    // Again, since columns of other candidates have been computed meanwhile.
    compute(best.c, X);
    if (best.r >= 0) compute(best.r, Y);
    take(best);
    return true;
  }

  // Looks at column c, and at that of its largest entry. True: `best` is stable, its columns are in X and Y.
  bool consider(int64_t c, Pivot& best) {
    constexpr R stable = R(STABLE);
    auto better = [&](R quality, int64_t a, int64_t b) {
      if (quality > best.quality) best = {quality, a, b};
      return quality >= stable;
    };
    auto alone = [&](const T* x, int64_t a) {
      const R off = largest_off(x, a), size = size_of(x[a]);
      note(off > size ? off : size);
      return better(quality_of(x[a], off), a, -1);
    };
    compute(c, X);
    if (alone(X, c)) return true;
    const int64_t r = partner(X, c);
    if (r < 0) return false;
    compute(r, Y);
    if (alone(Y, r)) {
      T* swap = X;
      X = Y, Y = swap;
      return true;
    }
    return better(quality_of(X[c], X[r], Y[r], largest_off(X, c, r), largest_off(Y, r, c)), c, r);
  }

  void take(const Pivot& pivot) {
    if (trial && pivot.quality < R(TOLERABLE)) return leave_out(pivot.c);
    const double multiplier = pivot.quality > 0 ? 1 / double(pivot.quality) : double(MOST);
    if (multiplier > report.multiplier) report.multiplier = multiplier;
    if (pivot.r < 0) {
      to_front(pivot.c, j);
      single(pivot.quality);
    } else {
      int64_t r = pivot.r == j ? pivot.c : pivot.r;
      to_front(pivot.c, j);
      to_front(r, j + 1);
      pair();
    }
  }

  void leave_out(int64_t c) {
    to_front(c, j);
    memset(static_cast<void*>(P + j + j * m), 0, size_t(m - j) * sizeof(T));
    memset(static_cast<void*>(Wc + j + (j - J) * m), 0, size_t(m - j) * sizeof(T));
    j++;
  }

  void to_front(int64_t from, int64_t to) {
    if (from == to) return;
    exchange(to, from, true);
    T a = X[from];
    X[from] = X[to], X[to] = a;
    a = Y[from];
    Y[from] = Y[to], Y[to] = a;
  }

  // Exchanges rows and columns a < b of what remains, and rows of what is done.
  void exchange(int64_t a, int64_t b, bool window) {
    auto swap = [](T& x, T& y) {
      const T z = x;
      x = y, y = z;
    };
    const int32_t o = order[a];
    order[a] = order[b], order[b] = o;
    for (int64_t p = 0; p < a; p++) swap(at(a, p), at(b, p));
    if (window)
      for (int64_t p = 0; p < j - J; p++) swap(Wc[a + p * m], Wc[b + p * m]);
    swap(at(a, a), at(b, b));
    for (int64_t i = a + 1; i < b; i++) {
      const T z = at(i, a);
      at(i, a) = mirrored<T, H>(at(b, i));
      at(b, i) = mirrored<T, H>(z);
    }
    at(b, a) = mirrored<T, H>(at(b, a));
    for (int64_t i = b + 1; i < m; i++) swap(at(i, a), at(i, b));
  }

  // Pivot j, its column in X.
  void single(R quality) {
    T d = X[j];
    const int32_t number = first + order[j];
    if (quality < LEAST) {  // the sign is kept, where there is one
      const R all = largest(X + j + 1, m - j - 1), size = all > 0 ? LEAST * all : R(1);
      if (all == 0 && (report.empty < 0 || number < report.empty)) report.empty = number;
      d = real(d) < 0 ? T(-size) : T(size);
      report.replaced++;
      report.weaker(0, number);
    } else {
      (real(d) < 0 ? report.negative : report.positive)++;
      report.weaker(double(size_of(d)), number);
    }
    const T inv = inverse(d);
    report.finite &= size_of(inv) <= MOST && size_of(d) <= MOST;
    T *L = P + j * m, *w = Wc + (j - J) * m;
    L[j] = inv;
    for (int64_t i = j + 1; i < m; i++) {
      w[i] = H ? X[i] : conj(X[i]);
      L[i] = inv * X[i];
    }
    j++;
  }

  // Pivots j and j + 1, their columns in X and Y.
  void pair() {
    const T a = X[j], b = X[j + 1], e = Y[j + 1];
    const T det = a * e - b * mirrored<T, H>(b), inv = inverse(det);
    const T d11 = inv * e, d21 = -(inv * b), d22 = inv * a, d12 = mirrored<T, H>(d21);
    const R most = size_of(a) > size_of(b) ? size_of(a) : size_of(b), top = most > size_of(e) ? most : size_of(e);
    const int32_t one = first + order[j], two = first + order[j + 1];
    report.weaker(double(size_of(det) / top), one < two ? one : two);
    report.finite &= size_of(det) <= MOST && size_of(inv) <= MOST;
    const R sign = real(det);
    if (sign < 0) report.positive++, report.negative++;
    else (real(a) < 0 ? report.negative : report.positive) += 2;
    T *L = P + j * m, *M = L + m, *v = Wc + (j - J) * m, *w = v + m;
    L[j] = d11, M[j] = d21, M[j + 1] = d22, L[j + 1] = T(0);
    for (int64_t i = j + 2; i < m; i++) {
      const T x = X[i], y = Y[i];
      v[i] = H ? x : conj(x), w[i] = H ? y : conj(y);
      L[i] = x * d11 + y * d21;
      M[i] = x * d12 + y * d22;
    }
    order[j] = ~order[j], order[j + 1] = ~order[j + 1];
    j += 2;
  }
};

template <class T, bool H>
void assemble_indefinite(const Tree& t, const Scatter& entries, const Indefinite& f, int32_t s) {
  const T* A = static_cast<const T*>(f.A);
  T* P = static_cast<T*>(f.panels) + t.panel[s];
  for (int64_t e = entries.begin[s]; e < entries.begin[s + 1]; e++) {
    const int32_t slot = entries.slot[e];
    P[entries.target[e]] += slot >= 0 ? A[slot] : mirrored<T, H>(A[~slot]);
  }
}

template <class T, bool H>
Pivoting<T, H> pivoting(const Front<T>& front, const Indefinite& f, Report& report) {
  const int32_t first = front.t.first[front.s];
  return {front.P, front.m, front.k, f.order + first, static_cast<T*>(front.scratch.pack), first, f.trial, report};
}

template <class T, bool H>
void factorize_indefinite(const Tree& t, const Scatter& entries, const Indefinite& f, int32_t begin, int32_t end,
                          const Scratch& scratch, Report& report) {
  for (int32_t s = begin; s < end; s++) {
    const Front<T> front(t, f.panels, s, scratch);
    front.begin_panel(0, front.k);
    assemble_indefinite<T, H>(t, entries, f, s);
    pivoting<T, H>(front, f, report).factor(front.U);
    front.finish_rest(0, front.u);
  }
}

template <class T, bool H>
void part_indefinite(Part what, const Tree& t, const Indefinite& f, int32_t s, Window& w, int64_t begin, int64_t end,
                     const Scratch& scratch, Report& report) {
  const Front<T> front(t, f.panels, s, scratch);
  Pivoting<T, H> p = pivoting<T, H>(front, f, report);
  switch (what) {
    case BEGIN_PANEL: front.begin_panel(begin, end); break;
    case PIVOTS: p.pivots(w); break;
    case PACK_PANEL: p.pack_rows(w, w.end, begin, end); break;
    case PACK_REST: p.pack_rows(w, front.k, begin, end); break;
    case UPDATE_PANEL:
      update_packed(p.packed(w, w.end), begin, end, front.P + w.end + w.end * front.m, front.m, false);
      break;
    case UPDATE_REST: update_packed(p.packed(w, front.k), begin, end, front.U, front.u, w.fresh); break;
    case FINISH_REST: front.finish_rest(begin, end); break;
    case ROWS: break;  // PIVOTS has done them
  }
}

// --- solves -----------------------------------------------------------------------------------------------------------

template <class T, class X>
inline X times(T a, X x) {
  if constexpr (sizeof(X) == sizeof(T)) return a * x;
  else return broadcast(a) * x;
}

// w = D^-1 w, rows of N numbers or vectors.
template <class T, bool H, int N, class X>
void divide(const T* P, int64_t m, int64_t k, const int32_t* order, X* w) {
  for (int64_t j = 0; j < k; j++, P += m + 1, w += N) {
    if (order[j] >= 0) {
      for (int v = 0; v < N; v++) w[v] = times(P[0], w[v]);
      continue;
    }
    const T a = P[0], b = P[m], c = mirrored<T, H>(b), e = P[m + 1];
    for (int v = 0; v < N; v++) {
      const X x = w[v], y = w[N + v];
      w[v] = times(a, x) + times(c, y);
      w[N + v] = times(b, x) + times(e, y);
    }
    j++, P += m + 1, w += N;
  }
}

// Inside of a front pivots are in the order in which they were eliminated, elsewhere in the plan's.
template <class T, bool H>
void solve_indefinite(const Tree& t, const Indefinite& f, const Rhs& rhs, bool downwards, int32_t begin, int32_t end,
                      const SolveScratch& scratch) {
  const T* L = static_cast<const T*>(f.panels);
  auto run = [&](auto how) {
    using How = decltype(how);
    using Row = typename How::Row;
    constexpr int N = How::size;
    Row* other = static_cast<Row*>(scratch.pivots);
    auto pivots = [&](int32_t s, Row* w, auto move) {
      const int32_t *order = f.order + t.first[s], k = t.first[s + 1] - t.first[s];
      memcpy(static_cast<void*>(other), w, size_t(k) * N * sizeof(Row));
      for (int32_t i = 0; i < k; i++)
        for (int v = 0; v < N; v++) move(w, i * N + v, (order[i] < 0 ? ~order[i] : order[i]) * N + v);
    };
    auto before = [&](int32_t s, Row* w) {
      pivots(s, w, [other](Row* w, int32_t i, int32_t place) { w[i] = other[place]; });
    };
    auto after = [&](int32_t s, Row* w) {
      if (downwards) return pivots(s, w, [other](Row* w, int32_t i, int32_t place) { w[place] = other[i]; });
      const int64_t k = t.first[s + 1] - t.first[s], m = k + t.row[s + 1] - t.row[s];
      divide<T, H, N>(L + t.panel[s], m, k, f.order + t.first[s], w);
    };
    solve_fronts<How>(t, L, rhs, downwards, begin, end, static_cast<Row*>(scratch.local), before, after);
  };
  if (rhs.count > W<T>) run(Many<T, MANY, true, H>());
  else if (rhs.count > 1 || W<T> == 1) run(Many<T, 1, true, H>());
  else if constexpr (W<T> > 1) run(One<T, true, H>());
}

template <class T, bool H>
constexpr IndefiniteKernels indefinite_of = {factorize_indefinite<T, H>, assemble_indefinite<T, H>,
                                             part_indefinite<T, H>, W<T> == 1 ? 0 : SHARE,
                                             solve_indefinite<T, H>, MANY * W<T>,
                                             Pivoting<T, H>::work_size};

const IndefiniteKernels* choose(Dtype dtype, bool hermitian) {
  switch (dtype) {
    case FLOAT32: return &indefinite_of<float, false>;
    case FLOAT64: return &indefinite_of<double, false>;
    case COMPLEX64: return hermitian ? &indefinite_of<Complex<float>, true> : &indefinite_of<Complex<float>, false>;
    default: return hermitian ? &indefinite_of<Complex<double>, true> : &indefinite_of<Complex<double>, false>;
  }
}

}  // namespace
}  // namespace spcache
