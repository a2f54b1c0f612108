// Dense kernels of one front. Everything is column-major; only the lower triangle is meaningful.
//
// One register tile does all the work: C -= A * conj(B)^T for a few vectors of rows of A and a few rows of B. Both
// operands are columns of the panel itself, or packed copies that differ only in their strides.
#pragma once
#include "vector.hpp"

// The compiler does not see that a tile reads only the part of `Diagonal` that its block has filled.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// Loops over a register tile must vanish, or the tile lives on the stack.
#define UNROLL _Pragma("GCC unroll 8")

namespace spcache {
namespace {

constexpr int TILE_VECTORS = 3;                  // vectors of rows in a full tile
constexpr int64_t SHARE = 240;                   // rows of which a thread takes a multiple
constexpr int64_t BLOCK = 128;                   // pivots eliminated before the rest of a large front is updated
constexpr int64_t PACK_FROM = 160;               // rows of a front from which packing pays
constexpr int64_t STRIP = 10;                    // packed tiles of rows that stay in the second-level cache
template <class T> constexpr int64_t TILE_ROWS = TILE_VECTORS * W<T>;
template <class T> constexpr int NB = COMPLEX<T> && TILE_COLUMNS < 8 ? 2 : W<T> == 1 ? 2 : TILE_COLUMNS;

// A factorized diagonal block, for the rows below it: L(c, p) for p < c, and the reciprocals of the diagonal.
template <class T>
struct Diagonal {
  T lower[8][8];
  T reciprocal[8];
};

// C[rows, NR] -= A[rows, depth] * conj(B[NR, depth])^T; `rows` fills MV vectors but for the lanes missing in the last.
// Where C is `fresh`, its old contents count as zero.
// With a diagonal block the result is multiplied by its inverse conjugate transpose from the right: X = C L^-H.
template <class T, int MV, int NR, bool SOLVE>
inline __attribute__((always_inline)) void tile(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t depth, T* C,
                                                int64_t ldc, int rows, bool fresh, const Diagonal<T>* diagonal) {
  constexpr int w = W<T>;
  V<T> sum[MV][NR];
  UNROLL for (int v = 0; v < MV; v++)
    UNROLL for (int c = 0; c < NR; c++) sum[v][c] = broadcast(T(0));
  const int last = rows - (MV - 1) * w;  // lanes of the last vector
  const bool partial = last < w;
  auto multiply = [&](auto load_last) __attribute__((always_inline)) {
    for (int64_t p = 0; p < depth; p++, A += lda, B += ldb) {
      V<T> a[MV];
      UNROLL for (int v = 0; v < MV - 1; v++) a[v] = load(A + v * w);
      a[MV - 1] = load_last(A + (MV - 1) * w);
      UNROLL for (int c = 0; c < NR; c++) {
        const Constant<T> b = broadcast(conj(B[c]));
        UNROLL for (int v = 0; v < MV; v++) add_product(sum[v][c], a[v], b);
      }
    }
  };
  if (partial) multiply([=](const T* p) { return load_part(p, last); });
  else multiply([](const T* p) { return load(p); });
  UNROLL for (int v = 0; v < MV; v++) {
    const bool part = partial && v == MV - 1;
    UNROLL for (int c = 0; c < NR; c++) {
      V<T> x = broadcast(T(0));
      if (!fresh) x = part ? load_part(C + c * ldc + v * w, last) : load(C + c * ldc + v * w);
      sum[v][c] = x - sum[v][c];
    }
    if constexpr (SOLVE)
      UNROLL for (int c = 0; c < NR; c++) {
        UNROLL for (int p = 0; p < c; p++) subtract_product(sum[v][c], sum[v][p], broadcast(conj(diagonal->lower[c][p])));
        sum[v][c] = broadcast(diagonal->reciprocal[c]) * sum[v][c];
      }
    UNROLL for (int c = 0; c < NR; c++) {
      if (part) store_part(C + c * ldc + v * w, sum[v][c], last);
      else store(C + c * ldc + v * w, sum[v][c]);
    }
  }
}

// The tile for `rows` <= TILE_ROWS rows.
template <class T, int NR, bool SOLVE>
void tile_rows(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t depth, T* C, int64_t ldc, int64_t rows,
               bool fresh, const Diagonal<T>* diagonal) {
  if (rows > 2 * W<T>) tile<T, 3, NR, SOLVE>(A, lda, B, ldb, depth, C, ldc, int(rows), fresh, diagonal);
  else if (rows > W<T>) tile<T, 2, NR, SOLVE>(A, lda, B, ldb, depth, C, ldc, int(rows), fresh, diagonal);
  else tile<T, 1, NR, SOLVE>(A, lda, B, ldb, depth, C, ldc, int(rows), fresh, diagonal);
}

// The same for `columns` <= NB<T> rows of B.
template <class T, bool SOLVE>
void tile_any(int columns, const T* A, int64_t lda, const T* B, int64_t ldb, int64_t depth, T* C, int64_t ldc,
              int64_t rows, bool fresh, const Diagonal<T>* diagonal) {
  static_assert(TILE_COLUMNS <= 8 && TILE_ROWS<T> >= NB<T>);
  switch (columns) {
    case 1: return tile_rows<T, 1, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 2: return tile_rows<T, 2, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 3: return tile_rows<T, 3, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 4: return tile_rows<T, 4, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
#if defined(__AVX512F__)
    case 5: return tile_rows<T, 5, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 6: return tile_rows<T, 6, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 7: return tile_rows<T, 7, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
    case 8: return tile_rows<T, 8, SOLVE>(A, lda, B, ldb, depth, C, ldc, rows, fresh, diagonal);
#endif
  }
}

// C[rows, columns] -= A * conj(A[0:columns])^T on and below the diagonal, straight from the panel.
template <class T>
void update_small(const T* A, int64_t lda, int64_t rows, int64_t columns, int64_t depth, T* C, int64_t ldc, bool fresh) {
  for (int64_t j = 0; j < columns; j += NB<T>) {
    int nr = int(columns - j < NB<T> ? columns - j : NB<T>);
    for (int64_t i = j; i < rows; i += TILE_ROWS<T>) {
      int64_t r = rows - i < TILE_ROWS<T> ? rows - i : TILE_ROWS<T>;
      tile_any<T, false>(nr, A + i, lda, A + j, lda, depth, C + i + j * ldc, ldc, r, fresh, nullptr);
    }
  }
}

// Rows begin .. end of A become A L^-H, with L in L[0 .. k, 0 .. k] and the reciprocals of its diagonal on it.
template <class T>
void solve_rows(T* A, const T* L, int64_t k, int64_t ld, int64_t begin, int64_t end) {
  Diagonal<T> diagonal;
  for (int64_t j = 0; j < k; j += NB<T>) {
    int nb = int(k - j < NB<T> ? k - j : NB<T>);
    const T* D = L + j + j * ld;
    for (int c = 0; c < nb; c++) {
      diagonal.reciprocal[c] = conj(D[c + c * ld]);
      for (int i = c + 1; i < nb; i++) diagonal.lower[i][c] = D[i + c * ld];
    }
    for (int64_t i = begin; i < end; i += TILE_ROWS<T>) {
      int64_t r = end - i < TILE_ROWS<T> ? end - i : TILE_ROWS<T>;
      tile_any<T, true>(nb, A + i, ld, L + j, ld, j, A + i + j * ld, ld, r, false, &diagonal);
    }
  }
}

// Copies A[rows, depth] into tiles of `height` rows, contiguous over the depth, zero below the last row.
template <class T>
void pack(const T* A, int64_t lda, int64_t rows, int64_t depth, int64_t height, T* packed) {
  for (int64_t i = 0; i < rows; i += height) {
    int64_t r = rows - i < height ? rows - i : height;
    for (int64_t p = 0; p < depth; p++, packed += height) {
      memcpy(packed, A + i + p * lda, size_t(r) * sizeof(T));
      for (int64_t t = r; t < height; t++) packed[t] = T(0);
    }
  }
}

// Rows packed once for the updates of a large front: by tiles of rows, and by tiles of columns.
template <class T>
struct Packed {
  const T *rows, *columns;
  int64_t count, depth;  // rows packed, depth of the product
};

template <class T>
Packed<T> packed_in(T* memory, int64_t rows, int64_t depth) {
  return {memory, memory + (rows + TILE_ROWS<T> - 1) / TILE_ROWS<T> * TILE_ROWS<T> * depth, rows, depth};
}

// Rows begin .. end; begin is a multiple of SHARE.
template <class T>
void pack_both(const T* A, int64_t lda, int64_t begin, int64_t end, const Packed<T>& to) {
  static_assert(SHARE % TILE_ROWS<T> == 0 && SHARE % NB<T> == 0);
  pack(A + begin, lda, end - begin, to.depth, TILE_ROWS<T>, const_cast<T*>(to.rows) + begin * to.depth);
  pack(A + begin, lda, end - begin, to.depth, NB<T>, const_cast<T*>(to.columns) + begin * to.depth);
}

// C[rows, begin .. end] -= A * conj(A[begin .. end])^T on and below the diagonal (and a little above, to keep tiles
// whole); begin is a multiple of NB.
template <class T>
void update_packed(const Packed<T>& A, int64_t begin, int64_t end, T* C, int64_t ldc, bool fresh) {
  const int64_t height = TILE_ROWS<T>, strip = STRIP * height;
  for (int64_t top = begin / strip * strip; top < A.count; top += strip) {
    int64_t bottom = top + strip < A.count ? top + strip : A.count;
    for (int64_t j = begin; j < end && j < bottom; j += NB<T>) {
      int nr = int(end - j < NB<T> ? end - j : NB<T>);
      int64_t i = j / height * height;
      for (i = i > top ? i : top; i < bottom; i += height) {
        int64_t r = A.count - i < height ? A.count - i : height;
        tile_any<T, false>(nr, A.rows + i * A.depth, height, A.columns + j * A.depth, NB<T>, A.depth, C + i + j * ldc, ldc,
                           r, fresh, nullptr);
      }
    }
  }
}

// Cholesky of one diagonal block of NR <= NB columns. Stores L below the diagonal and the reciprocals of L's diagonal on
// it. Eliminates as D M D^H, D the pivots, so that the square roots stay off the chain from pivot to pivot.
// Returns 0, or 1 + the column whose pivot is not positive (a NaN is not).
template <class T, int NR>
int factor_diagonal(T* P, int64_t ld, Diagonal<T>& diagonal) {
  T a[NR][NR];  // a[i][j], i >= j: column j of the remaining matrix
  UNROLL for (int j = 0; j < NR; j++)
    UNROLL for (int i = j; i < NR; i++) a[i][j] = P[i + j * ld];
  Real<T> pivot[NR];
  int bad = 0;
  UNROLL for (int c = 0; c < NR; c++) {
    pivot[c] = real(a[c][c]);
    if (!(pivot[c] > 0 && pivot[c] <= LARGEST<Real<T>>) && !bad) bad = c + 1;
    const Real<T> reciprocal = Real<T>(1) / pivot[c];
    UNROLL for (int j = c + 1; j < NR; j++) {
      const T l = reciprocal * conj(a[j][c]);
      UNROLL for (int i = j; i < NR; i++) a[i][j] -= a[i][c] * l;
    }
  }
  if (bad) return bad;
  UNROLL for (int c = 0; c < NR; c++) {
    const Real<T> scale = Real<T>(1) / square_root(pivot[c]);
    diagonal.reciprocal[c] = T(scale);
    P[c + c * ld] = T(scale);
    UNROLL for (int i = c + 1; i < NR; i++) {
      const T l = scale * a[i][c];
      diagonal.lower[i][c] = l;
      P[i + c * ld] = l;
    }
  }
  return 0;
}

template <class T>
int factor_diagonal(int columns, T* P, int64_t ld, Diagonal<T>& diagonal) {
  switch (columns) {
    case 1: return factor_diagonal<T, 1>(P, ld, diagonal);
    case 2: return factor_diagonal<T, 2>(P, ld, diagonal);
    case 3: return factor_diagonal<T, 3>(P, ld, diagonal);
    case 4: return factor_diagonal<T, 4>(P, ld, diagonal);
    case 5: return factor_diagonal<T, 5>(P, ld, diagonal);
    case 6: return factor_diagonal<T, 6>(P, ld, diagonal);
    case 7: return factor_diagonal<T, 7>(P, ld, diagonal);
    default: return factor_diagonal<T, 8>(P, ld, diagonal);
  }
}

// Cholesky of the k leading columns of P [m, k], left-looking by blocks of NB columns. One function for all callers: the
// compiler may round complex products in another way where it inlines them.
template <class T>
__attribute__((noinline)) int64_t factor_panel(T* P, int64_t m, int64_t k, int64_t ld) {
  Diagonal<T> diagonal;
  for (int64_t j = 0; j < k; j += NB<T>) {
    int nb = int(k - j < NB<T> ? k - j : NB<T>);
    T* D = P + j + j * ld;
    if (j) update_small(P + j, ld, nb, nb, j, D, ld, false);
    if (int bad = factor_diagonal(nb, D, ld, diagonal)) return j + bad;
    for (int64_t i = j + nb; i < m; i += TILE_ROWS<T>) {
      int64_t r = m - i < TILE_ROWS<T> ? m - i : TILE_ROWS<T>;
      tile_any<T, true>(nb, P + i, ld, P + j, ld, j, P + i + j * ld, ld, r, false, &diagonal);
    }
  }
  return 0;
}

// Partial Cholesky of a front: the panel P [m, k] becomes the factor, the update matrix U [m-k, m-k] -L21 L21^H.
// Returns 0, or 1 + the column whose pivot is not positive.
template <class T>
int64_t factor_front(T* P, int64_t m, int64_t k, T* U, T* memory) {
  const int64_t u = m - k;
  if (m < PACK_FROM || W<T> == 1) {
    if (int64_t bad = factor_panel(P, m, k, m)) return bad;
    update_small(P + k, m, u, u, k, U, u, true);
    return 0;
  }
  for (int64_t J = 0; J < k; J += BLOCK) {
    const int64_t kb = k - J < BLOCK ? k - J : BLOCK, next = J + kb, rest = m - next;
    if (int64_t bad = factor_panel(P + J + J * m, m - J, kb, m)) return J + bad;
    if (!rest) break;
    if (next < k) {  // later columns of the panel
      const Packed<T> A = packed_in(memory, rest, kb);
      pack_both(P + next + J * m, m, 0, rest, A);
      update_packed(A, 0, k - next, P + next + next * m, m, false);
    }
    const Packed<T> A = packed_in(memory, u, kb);
    pack_both(P + k + J * m, m, 0, u, A);
    update_packed(A, 0, u, U, u, J == 0);
  }
  return 0;
}

}  // namespace
}  // namespace spcache
