// Numeric L D L^H factorization and solves over the assembly tree. Included by one file per instruction set.
//
// Storage is the lower triangle. H: Hermitian, a_ij = conj(a_ji); else a_ij = a_ji, the same for real numbers.
#include <type_traits>

#include "front.hpp"
#include "indefinite.hpp"
#include "products.hpp"

namespace spcache {
namespace {

constexpr int64_t INNER = 16;      // pivots found by products of vectors before the window's other columns are updated
constexpr int64_t TRIES = 16;      // columns looked at for one pivot

template <class T, bool H>
inline T mirrored(T a) {
  if constexpr (H) return conj(a);
  else return a;
}

// y[0:count] -= A[count, depth] * conj(b), b with stride ldb.
template <class T>
void subtract_columns(const T* A, int64_t lda, int64_t depth, const T* b, int64_t ldb, T* y, int64_t count) {
  int64_t p = 0;
  for (; p + 4 <= depth; p += 4) {
    const T *a0 = A + p * lda, *a1 = a0 + lda, *a2 = a1 + lda, *a3 = a2 + lda;
    const V<T> b0 = broadcast(conj(b[p * ldb])), b1 = broadcast(conj(b[(p + 1) * ldb])),
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
    const V<T> v = broadcast(conj(b[p * ldb]));
    int64_t i = 0;
    for (; i + W<T> <= count; i += W<T>) store(y + i, load(y + i) - load(a + i) * v);
    if (i < count) {
      const int r = int(count - i);
      store_part(y + i, load_part(y + i, r) - load_part(a + i, r) * v, r);
    }
  }
}

// Partial L D L^H of one front, window of at most BLOCK pivots by window. Columns are exchanged inside of a window, so
// that those behind it wait for one large update; a window in which no pivot is found goes to the end of the panel.
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
  T *X, *Y;                    // columns c and r as they are now, from row j on
  Report& report;
  const int32_t first;         // pivot number of the front's first row
  int64_t J = 0, I = 0, j = 0, end = 0;  // window, inner block, next pivot, end of the window
  int64_t next = 0;            // column to look at first

 public:
  Pivoting(T* panel, int64_t rows, int64_t columns, int32_t* order_, T* work, int32_t first_, Report& report_)
      : P(panel), m(rows), k(columns), order(order_), Wc(work), memory(work + (BLOCK + 2) * rows), X(work + BLOCK * rows),
        Y(X + rows), report(report_), first(first_) {}

  static int64_t work_size(int64_t rows) {
    const int64_t packed = W<T> == 1 ? 0 : (rows + TILE_ROWS<T> + rows + NB<T>) * BLOCK;
    return (BLOCK + 2) * rows + packed;
  }

  // U becomes -L21 D L21^H.
  void factor(T* U) {
    bool fresh = true;
    for (int64_t i = 0; i < k; i++) order[i] = int32_t(i);
    const int64_t u = m - k;
    int64_t without = 0;  // columns that have failed since the last pivot
    while (j < k) {
      J = I = next = j;
      end = k - j < BLOCK ? k : j + BLOCK;
      const bool forced = without >= k - j;
      while (j < end) {
        if (!eliminate(forced && j == J)) break;
        if (j - I >= INNER) update_window();
      }
      update_window();
      const int64_t found = j - J;
      without = found ? 0 : without + end - j;
      if (found) {
        update(P + end + J * m, Wc + end, m, m - end, k - end, found, P + end + end * m, m, false, memory);
        update(P + k + J * m, Wc + k, m, u, u, found, U, u, fresh, memory);
        fresh = false;
      }
      for (int64_t a = end - 1, b = k - 1; end < k && a >= j && b >= end; a--, b--) exchange(a, b, false);
    }
  }

 private:
  T& at(int64_t row, int64_t column) { return P[row + column * m]; }

  void update_window() {
    if (j > I && j < end)
      update_from(P + j + I * m, Wc + j + (I - J) * m, m, m - j, end - j, j - I, P + j + j * m, m, false);
    I = j;
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
void factorize_indefinite(const Tree& t, const Scatter& entries, const Indefinite& f, int32_t begin, int32_t end,
                          const Scratch& scratch, Report& report) {
  const T* A = static_cast<const T*>(f.A);
  for (int32_t s = begin; s < end; s++) {
    const Front<T> front(t, f.panels, s, scratch);
    front.begin_panel(0, front.k);
    for (int64_t e = entries.begin[s]; e < entries.begin[s + 1]; e++) {
      const int32_t slot = entries.slot[e];
      front.P[entries.target[e]] += slot >= 0 ? A[slot] : mirrored<T, H>(A[~slot]);
    }
    Pivoting<T, H>(front.P, front.m, front.k, f.order + t.first[s], static_cast<T*>(scratch.pack), t.first[s], report)
        .factor(front.U);
    front.finish_rest(0, front.u);
  }
}

// --- solves -----------------------------------------------------------------------------------------------------------

template <class T, class X>
inline X times(T a, X x) {
  if constexpr (sizeof(X) == sizeof(T)) return a * x;
  else return broadcast(a) * x;
}

// w = L^-1 w, L [m, k] with a diagonal of 1.
template <class T, class X>
void forward_unit(const T* P, int64_t m, int64_t k, X* w) {
  int64_t j = 0;
  if constexpr (sizeof(X) == sizeof(T) && W<T> > 1) {  // vectors run along the rows, four columns at a time
    for (; j + 4 <= k; j += 4) {
      const T *a = P + j * m, *b = a + m, *c = b + m, *d = c + m;
      const T y0 = w[j], y1 = w[j + 1] - a[j + 1] * y0, y2 = w[j + 2] - a[j + 2] * y0 - b[j + 2] * y1;
      const T y3 = w[j + 3] - a[j + 3] * y0 - b[j + 3] * y1 - c[j + 3] * y2;
      w[j + 1] = y1, w[j + 2] = y2, w[j + 3] = y3;
      const V<T> v0 = broadcast(y0), v1 = broadcast(y1), v2 = broadcast(y2), v3 = broadcast(y3);
      int64_t i = j + 4;
      for (; i + W<T> <= m; i += W<T>)
        store(w + i, load(w + i) - (load(a + i) * v0 + load(b + i) * v1) - (load(c + i) * v2 + load(d + i) * v3));
      if (i < m) {
        const int r = int(m - i);
        store_part(w + i, load_part(w + i, r) - (load_part(a + i, r) * v0 + load_part(b + i, r) * v1) -
                              (load_part(c + i, r) * v2 + load_part(d + i, r) * v3), r);
      }
    }
  }
  for (; j < k; j++) {
    const T* a = P + j * m;
    const X y = w[j];
    for (int64_t i = j + 1; i < m; i++) w[i] -= times(a[i], y);
  }
}

// w[0:k] = L^-H w (L^-T unless H).
template <class T, bool H, class X>
void backward_unit(const T* P, int64_t m, int64_t k, X* w) {
  int64_t j = k;
  if constexpr (sizeof(X) == sizeof(T) && W<T> > 1) {
    for (; j >= 4; j -= 4) {
      const int64_t q = j - 4;
      const T *a = P + q * m, *b = a + m, *c = b + m, *d = c + m;
      V<T> s0 = broadcast(T(0)), s1 = s0, s2 = s0, s3 = s0;
      int64_t i = j;
      for (; i + W<T> <= m; i += W<T>) {
        const V<T> x = load(w + i);
        s0 += load(a + i) * x, s1 += load(b + i) * x, s2 += load(c + i) * x, s3 += load(d + i) * x;
      }
      if (i < m) {
        const int r = int(m - i);
        const V<T> x = load_part(w + i, r);
        s0 += load_part(a + i, r) * x, s1 += load_part(b + i, r) * x, s2 += load_part(c + i, r) * x,
            s3 += load_part(d + i, r) * x;
      }
      const T y3 = w[q + 3] - sum<T>(s3), y2 = w[q + 2] - sum<T>(s2) - c[q + 3] * y3;
      const T y1 = w[q + 1] - sum<T>(s1) - b[q + 3] * y3 - b[q + 2] * y2;
      w[q] = w[q] - sum<T>(s0) - a[q + 3] * y3 - a[q + 2] * y2 - a[q + 1] * y1;
      w[q + 1] = y1, w[q + 2] = y2, w[q + 3] = y3;
    }
  }
  for (; j > 0; j--) {
    const T* a = P + (j - 1) * m;
    X y = w[j - 1];
    for (int64_t i = j; i < m; i++) y -= times(mirrored<T, H>(a[i]), w[i]);
    w[j - 1] = y;
  }
}

// w = D^-1 w
template <class T, bool H, class X>
void divide(const T* P, int64_t m, int64_t k, const int32_t* order, X* w) {
  for (int64_t j = 0; j < k; j++) {
    const T* a = P + j * m;
    if (order[j] >= 0) {
      w[j] = times(a[j], w[j]);
      continue;
    }
    const T* b = a + m;
    const X x = w[j], y = w[j + 1];
    w[j] = times(a[j], x) + times(mirrored<T, H>(b[j]), y);
    w[j + 1] = times(b[j], x) + times(b[j + 1], y);
    j++;
  }
}

template <class T, class X>
inline X get_lanes(const T* row, int64_t offset, int64_t count) {
  if constexpr (sizeof(X) == sizeof(T)) return row[offset];
  else return count == W<T> ? load(row + offset) : load_part(row + offset, int(count));
}
template <class T, class X>
inline void put_lanes(T* row, int64_t offset, int64_t count, X value) {
  if constexpr (sizeof(X) == sizeof(T)) row[offset] = value;
  else if (count == W<T>) store(row + offset, value);
  else store_part(row + offset, value, int(count));
}

// x holds D^-1 L^-1 b after the upward phase, the solution after the downward one, both by pivot number; inside a front
// rows are in the order in which they were eliminated.
template <class T, bool H>
void solve_indefinite(const Tree& t, const Indefinite& f, const Rhs& rhs, bool downwards, int32_t begin, int32_t end,
                      const SolveScratch& scratch) {
  const T* L = static_cast<const T*>(f.panels);
  auto phase = [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    X *passed = static_cast<X*>(scratch.passed), *w = static_cast<X*>(scratch.front);
    auto front = [&](int32_t s, auto&& work) {
      const int64_t first = t.first[s], k = t.first[s + 1] - first, u = t.row[s + 1] - t.row[s];
      work(first, k, u, L + t.panel[s], f.order + first, [=](int64_t j) {
        const int32_t o = f.order[first + j];
        return o < 0 ? ~o : o;
      });
    };
    if (!downwards)
      for (int32_t s = begin; s < end; s++)
        front(s, [&](int64_t first, int64_t k, int64_t u, const T* P, const int32_t* order, auto place) {
          X* own = w + k + u;  // the pivots' part before it is put in order
          const T* b = static_cast<const T*>(rhs.b);
          for (int64_t i = 0; i < k; i++)
            own[i] = get_lanes<T, X>(b + int64_t(t.perm[first + i]) * rhs.width, rhs.offset, rhs.count);
          memset(static_cast<void*>(w + k), 0, size_t(u) * sizeof(X));
          for (int32_t e = t.child[s]; e < t.child[s + 1]; e++) {
            const int32_t c = t.children[e];
            for (int64_t i = t.row[c]; i < t.row[c + 1]; i++) {
              const int32_t to = t.relative[i];
              (to < k ? own : w)[to] += passed[i];
            }
          }
          for (int64_t i = 0; i < k; i++) w[i] = own[place(i)];
          forward_unit(P, k + u, k, w);
          divide<T, H>(P, k + u, k, order, w);
          for (int64_t i = 0; i < k; i++) x[first + place(i)] = w[i];
          memcpy(static_cast<void*>(passed + t.row[s]), w + k, size_t(u) * sizeof(X));
        });
    else
      for (int32_t s = end - 1; s >= begin; s--)
        front(s, [&](int64_t first, int64_t k, int64_t u, const T* P, const int32_t*, auto place) {
          const int32_t* rows = t.rows + t.row[s];
          for (int64_t i = 0; i < k; i++) w[i] = x[first + place(i)];
          for (int64_t i = 0; i < u; i++) w[k + i] = x[rows[i]];
          backward_unit<T, H>(P, k + u, k, w);
          for (int64_t i = 0; i < k; i++) {
            const int64_t number = first + place(i);
            x[number] = w[i];
            put_lanes<T, X>(static_cast<T*>(rhs.x) + int64_t(t.perm[number]) * rhs.width, rhs.offset, rhs.count, w[i]);
          }
        });
  };
  if (rhs.count == 1) phase(static_cast<T*>(scratch.x));
  else phase(static_cast<V<T>*>(scratch.x));
}

template <class T, bool H>
constexpr IndefiniteKernels indefinite_of = {factorize_indefinite<T, H>, solve_indefinite<T, H>, W<T>,
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
