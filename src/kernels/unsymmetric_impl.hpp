// Numeric LU factorization over the assembly tree. Included by one file per instruction set.
#include <type_traits>

#include "front.hpp"
#include "products.hpp"
#include "unsymmetric.hpp"

namespace spcache {
namespace {

constexpr int64_t SEARCHED = 32;  // columns of a window in which pivots are looked for
constexpr double ACCEPTED = 0.25;  // pivots whose multipliers are at most 1 / ACCEPTED are taken at once

constexpr int64_t SHARED_FROM = 480;  // rows of a front that threads share

// Calls work(first, last) for pieces of begin .. end.
template <class Work>
void in_pieces(const Sharing* sharing, int64_t begin, int64_t end, int64_t size, Work work) {
  if (!sharing) return work(begin, end);
  auto piece = [&](int64_t i) {
    const int64_t first = begin + i * size;
    work(first, end - first < size ? end : first + size);
  };
  sharing->share(sharing->crew, (end - begin + size - 1) / size,
                 [](void* context, int64_t i) { (*static_cast<decltype(piece)*>(context))(i); }, &piece);
}

// LU of one diagonal block of NR <= NB columns without exchanges: the lower triangle in P, the upper one in Q, conjugated
// and transposed. False where a multiplier is too large; the block is as it was then. The diagonals are what tiles take to
// solve for the rows below.
template <class T, int NR>
bool factor_diagonal(T* P, T* Q, int64_t ld, Diagonal<T>& lower, Diagonal<T>& upper) {
  using R = Real<T>;
  T a[NR][NR], inverses[NR];
  UNROLL for (int j = 0; j < NR; j++) {
    UNROLL for (int i = j; i < NR; i++) a[i][j] = P[i + j * ld];
    UNROLL for (int i = j + 1; i < NR; i++) a[j][i] = conj(Q[i + j * ld]);
  }
  R most = 0;
  UNROLL for (int c = 0; c < NR; c++) {
    inverses[c] = inverse(a[c][c]);
    UNROLL for (int i = c + 1; i < NR; i++) {
      const T l = a[i][c] * inverses[c];
      const R size = size_of(l);
      most = size <= most ? most : size;
      a[i][c] = l;
      UNROLL for (int j = c + 1; j < NR; j++) a[i][j] -= l * a[c][j];
    }
    const R size = size_of(inverses[c]);  // neither infinite nor a NaN
    most = size - size == 0 ? most : R(2 / ACCEPTED);
  }
  if (!(most <= R(1 / ACCEPTED))) return false;
  UNROLL for (int j = 0; j < NR; j++) {
    lower.reciprocal[j] = P[j + j * ld] = T(R(1));
    upper.reciprocal[j] = inverses[j];
    Q[j + j * ld] = conj(inverses[j]);
    UNROLL for (int i = j + 1; i < NR; i++) {
      lower.lower[i][j] = P[i + j * ld] = a[i][j];
      upper.lower[i][j] = Q[i + j * ld] = conj(a[j][i]);
    }
  }
  return true;
}

template <class T>
bool factor_diagonal(int columns, T* P, T* Q, int64_t ld, Diagonal<T>& lower, Diagonal<T>& upper) {
  switch (columns) {
    case 1: return factor_diagonal<T, 1>(P, Q, ld, lower, upper);
    case 2: return factor_diagonal<T, 2>(P, Q, ld, lower, upper);
    case 3: return factor_diagonal<T, 3>(P, Q, ld, lower, upper);
    case 4: return factor_diagonal<T, 4>(P, Q, ld, lower, upper);
    case 5: return factor_diagonal<T, 5>(P, Q, ld, lower, upper);
    case 6: return factor_diagonal<T, 6>(P, Q, ld, lower, upper);
    case 7: return factor_diagonal<T, 7>(P, Q, ld, lower, upper);
    default: return factor_diagonal<T, 8>(P, Q, ld, lower, upper);
  }
}

// The same for a block of any size. Where it fails, the block is spoiled.
template <class T>
bool factor_block(T* P, T* Q, int64_t k, int64_t ld) {
  Diagonal<T> lower, upper;
  for (int64_t j = 0; j < k; j += NB<T>) {
    const int nb = int(k - j < NB<T> ? k - j : NB<T>);
    T *p = P + j + j * ld, *q = Q + j + j * ld;
    if (j) {
      update_from(P + j, Q + j, ld, nb, nb, j, p, ld, false);
      update_from(Q + j, P + j, ld, nb, nb, j, q, ld, false);
    }
    if (!factor_diagonal(nb, p, q, ld, lower, upper)) return false;
    for (int64_t i = j + nb; i < k; i += TILE_ROWS<T>) {
      const int64_t r = k - i < TILE_ROWS<T> ? k - i : TILE_ROWS<T>;
      tile_any<T, true>(nb, P + i, ld, Q + j, ld, j, P + i + j * ld, ld, r, false, &upper);
      tile_any<T, true>(nb, Q + i, ld, P + j, ld, j, Q + i + j * ld, ld, r, false, &lower);
    }
  }
  return true;
}

// Partial LU of one front, window of pivots by window: without exchanges, where these turn out not to be needed.
template <class T>
class GeneralFront {
  using R = Real<T>;
  static constexpr R MOST = sizeof(R) == 4 ? R(__FLT_MAX__) : R(__DBL_MAX__);
  static constexpr R LEAST = sizeof(R) == 4 ? R(3e-4) : R(HOPELESS);

  T *const P, *const Q;
  const int64_t m, k;
  int32_t *const rows, *const columns;
  T* const memory;       // packed blocks, or what a window was like
  int32_t* const names;  // [k] the columns as they came, once one was exchanged
  const int32_t first;   // pivot number of the front's first row
  Report& report;
  const Sharing* const sharing;
  bool named = false;

 public:
  GeneralFront(T* lower, T* upper, int64_t m_, int64_t k_, int32_t* rows_, int32_t* columns_, T* work, int32_t first_,
               Report& report_, const Sharing* sharing_)
      : P(lower), Q(upper), m(m_), k(k_), rows(rows_), columns(columns_), memory(work + m_),
        names(reinterpret_cast<int32_t*>(work)), first(first_), report(report_), sharing(sharing_) {}

  static int64_t work_size(int64_t rows) {
    return rows + (rows + TILE_ROWS<T> + rows + NB<T>) * (rows < BLOCK ? rows : BLOCK);
  }

  // C becomes the lower triangle of -L21 U12, D that of its conjugate transpose. `assemble` fills the panels anew.
  template <class Assemble>
  void factor(T* C, T* D, Assemble assemble) {
    const int64_t u = m - k;
    for (int64_t i = 0; i < k; i++) rows[i] = columns[i] = int32_t(i);
    for (int64_t J = 0, next; J < k; J = next) {
      next = J + BLOCK < k ? J + BLOCK : k;
      if (J) keep(J, next - J);
      if (!natural(J, next - J)) {
        if (J) put_back(J, next - J);
        else assemble();
        next = J + SEARCHED < k ? J + SEARCHED : k;
        search(J, next);
      }
      const int64_t found = next - J;
      if (next < k) {
        subtract(P + next + J * m, Q + next + J * m, m - next, k - next, found, P + next + next * m, m, false);
        subtract(Q + next + J * m, P + next + J * m, m - next, k - next, found, Q + next + next * m, m, false);
      }
      subtract(P + k + J * m, Q + k + J * m, u, u, found, C, u, J == 0);
      subtract(Q + k + J * m, P + k + J * m, u, u, found, D, u, J == 0);
    }
  }

 private:
  static void swap(T& a, T& b) {
    const T c = a;
    a = b, b = c;
  }
  void note(R size) {
    if (!(size <= report.growth)) report.growth = size;
  }

  // C[rows, columns] -= A * conj(B)^T on and below the diagonal.
  void subtract(const T* A, const T* B, int64_t height, int64_t width, int64_t depth, T* C, int64_t ldc, bool fresh) {
    if (!sharing || depth < 8 || !height || !width) return update(A, B, m, height, width, depth, C, ldc, fresh, memory);
    const Packed<T> packed = packed_in(memory, height, depth);
    in_pieces(sharing, 0, height, SHARE, [&](int64_t i, int64_t end) {
      pack(A + i, m, end - i, depth, TILE_ROWS<T>, const_cast<T*>(packed.rows) + i * depth);
      if (i < width)
        pack(B + i, m, (end < width ? end : width) - i, depth, NB<T>, const_cast<T*>(packed.columns) + i * depth);
    });
    in_pieces(sharing, 0, width, SHARE / 5,
              [&](int64_t j, int64_t end) { update_packed(packed, j, end, C, ldc, fresh); });
  }

  // Rows count .. below, counted from the first of the block, become A L^-H.
  void solve_below(T* A, const T* L, int64_t count, int64_t below) {
    in_pieces(sharing, count, below, SHARE, [&](int64_t i, int64_t end) { solve_rows(A, L, count, m, i, end); });
  }

  // What `natural` changes before it may fail: columns J .. J + count of P, their diagonal block in Q.
  void keep(int64_t J, int64_t count) {
    memcpy(static_cast<void*>(memory), P + J * m, size_t(count * m) * sizeof(T));
    for (int64_t j = 0; j < count; j++)
      memcpy(static_cast<void*>(memory + count * m + j * count), Q + J + (J + j) * m, size_t(count) * sizeof(T));
  }
  void put_back(int64_t J, int64_t count) {
    memcpy(static_cast<void*>(P + J * m), memory, size_t(count * m) * sizeof(T));
    for (int64_t j = 0; j < count; j++)
      memcpy(static_cast<void*>(Q + J + (J + j) * m), memory + count * m + j * count, size_t(count) * sizeof(T));
  }

  // Takes the diagonal for pivots. False where a multiplier is too large.
  bool natural(int64_t J, int64_t count) {
    T *p = P + J + J * m, *q = Q + J + J * m;
    const int64_t below = m - J;
    if (!factor_block(p, q, count, m)) return false;
    solve_below(p, q, count, below);
    R most = 0;
    for (int64_t j = 0; j < count; j++) {
      const R size = largest(p + j + 1 + j * m, below - j - 1);
      most = size <= most ? most : size;
    }
    if (!(most <= R(1 / ACCEPTED))) return false;
    if (!(double(most) <= report.multiplier)) report.multiplier = most;
    solve_below(q, p, count, below);
    finish(J, count);
    return true;
  }

  // Notes what pivots J .. J + count and their rows of U are like.
  void finish(int64_t J, int64_t count) {
    for (int64_t j = J; j < J + count; j++) {
      const R size = R(1) / size_of(Q[j + j * m]);
      report.weaker(double(size), name(j));
      note(size);
      note(largest(Q + j + 1 + j * m, m - j - 1));
    }
  }
  int32_t name(int64_t j) const { return first + (named ? names[j] : int32_t(j)); }

  // Columns J .. end, pivots looked for among all rows of pivots that are left.
  void search(int64_t J, int64_t end) {
    if (!named)
      for (int64_t j = 0; j < k; j++) names[j] = int32_t(j);
    named = report.exchanged = true;
    for (int64_t c = J; c < end; c++)
      for (int64_t r = J; r < c; r++) P[r + c * m] = conj(Q[c + r * m]);
    for (int64_t j = J; j < end; j++) eliminate(J, j, end);
    for (int64_t r = J; r < end; r++) {
      for (int64_t c = r + 1; c < end; c++) Q[c + r * m] = conj(P[r + c * m]);
      P[r + r * m] = T(R(1));
    }
    solve_below(Q + J + J * m, P + J + J * m, end - J, m - J);
    finish(J, end - J);
  }

  // The row of the largest entry of column c among the pivots that are left.
  int64_t row_of_largest(int64_t c, int64_t j) const {
    const T* x = P + c * m;
    const R most = largest(x + j, k - j);
    int64_t r = j;
    while (r + 1 < k && !(size_of(x[r]) >= most)) r++;
    return r;
  }

  // Pivot j, of the best column from j on.
  void eliminate(int64_t J, int64_t j, int64_t end) {
    R quality = -1, all = 0;
    int64_t column = j, row = j;
    for (int64_t c = j; c < end && quality < R(ACCEPTED); c++) {
      const int64_t r = row_of_largest(c, j);
      const R size = size_of(P[r + c * m]), below = largest(P + k + c * m, m - k);
      const R found = size > 0 ? (below > size ? size / below : R(1)) : R(0);
      note(below > size ? below : size);
      if (found > quality) quality = found, column = c, row = r, all = below > size ? below : size;
    }
    if (column != j) exchange_columns(J, j, column);
    if (row != j) exchange_rows(j, row, end);
    T d = P[j + j * m];
    const bool hopeless = quality < LEAST;
    if (hopeless) {  // the sign is kept, where there is one
      if (!(all > 0) && (report.empty < 0 || name(j) < report.empty)) report.empty = name(j);
      const R size = all > 0 ? LEAST * all : R(1);
      d = real(d) < 0 ? T(-size) : T(size);
      report.replaced++;
      report.weaker(0, name(j));
    }
    const T inv = inverse(d);
    report.finite &= size_of(inv) <= MOST && size_of(d) <= MOST;
    const double multiplier = hopeless ? 1 / double(LEAST) : 1 / double(quality);
    if (multiplier > report.multiplier) report.multiplier = multiplier;
    Q[j + j * m] = conj(inv);
    T* l = P + j * m;
    for (int64_t i = j + 1; i < m; i++) l[i] = inv * l[i];
    for (int64_t c = j + 1; c < end; c++) subtract_column(l + j + 1, P[j + c * m], P + j + 1 + c * m, m - j - 1);
  }

  // y -= a x
  static void subtract_column(const T* x, T a, T* y, int64_t count) {
    const Constant<T> v = broadcast(a);
    int64_t i = 0;
    for (; i + W<T> <= count; i += W<T>) store(y + i, load(y + i) - load(x + i) * v);
    if (i < count) {
      const int r = int(count - i);
      store_part(y + i, load_part(y + i, r) - load_part(x + i, r) * v, r);
    }
  }

  // Columns j < c of a window that begins at J.
  void exchange_columns(int64_t J, int64_t j, int64_t c) {
    for (int64_t i = J; i < m; i++) swap(P[i + j * m], P[i + c * m]);
    for (int64_t r = 0; r < J; r++) swap(Q[j + r * m], Q[c + r * m]);
    const int32_t name = names[j];
    names[j] = names[c], names[c] = name;
    columns[j] = int32_t(c);
  }

  // Rows j < r of pivots; columns before `end` are in P, of later ones P has the lower triangle.
  void exchange_rows(int64_t j, int64_t r, int64_t end) {
    for (int64_t c = 0; c < end; c++) swap(P[j + c * m], P[r + c * m]);
    int64_t c = end;
    for (; c <= r; c++) {
      const T a = Q[c + j * m];
      Q[c + j * m] = conj(P[r + c * m]);
      P[r + c * m] = conj(a);
    }
    for (; c < m; c++) swap(Q[c + j * m], Q[c + r * m]);
    rows[j] = int32_t(r);
  }
};

template <class T>
void factorize_unsymmetric(const Tree& t, const Scatter& entries, const Unsymmetric& f, int32_t begin, int32_t end,
                           const Scratch* scratch, Report& report, const Sharing* threads) {
  const T* A = static_cast<const T*>(f.A);
  for (int32_t s = begin; s < end; s++) {
    const Front<T> lower(t, f.lower, s, scratch[0]), upper(t, f.upper, s, scratch[1]);
    const Sharing* const sharing = W<T> > 1 && lower.m >= SHARED_FROM ? threads : nullptr;
    auto assemble = [&] {
      in_pieces(sharing, 0, lower.k, SHARE / 5, [&](int64_t j, int64_t last) {
        lower.begin_panel(j, last);
        upper.begin_panel(j, last);
      });
      for (int64_t e = entries.begin[s]; e < entries.begin[s + 1]; e++) {
        const int32_t slot = entries.slot[e];
        if (slot >= 0) lower.P[entries.target[e]] += A[slot];
        else upper.P[entries.target[e]] += conj(A[~slot]);
      }
    };
    assemble();
    GeneralFront<T>(lower.P, upper.P, lower.m, lower.k, f.rows + t.first[s], f.columns + t.first[s],
                    static_cast<T*>(scratch[0].pack), t.first[s], report, sharing)
        .factor(lower.U, upper.U, assemble);
    in_pieces(sharing, 0, lower.u, SHARE / 5, [&](int64_t j, int64_t last) {
      lower.finish_rest(j, last);
      upper.finish_rest(j, last);
    });
  }
}

template <class T>
constexpr UnsymmetricKernels unsymmetric_of = {factorize_unsymmetric<T>, GeneralFront<T>::work_size};

const UnsymmetricKernels* choose(Dtype dtype) {
  switch (dtype) {
    case FLOAT32: return &unsymmetric_of<float>;
    case FLOAT64: return &unsymmetric_of<double>;
    case COMPLEX64: return &unsymmetric_of<Complex<float>>;
    default: return &unsymmetric_of<Complex<double>>;
  }
}

}  // namespace
}  // namespace spcache
