// What the eliminations with pivoting share: sizes of numbers, products of two panels.
#pragma once
#include "dense.hpp"

namespace spcache {
namespace {

template <class R> inline R imaginary(R) { return R(0); }
template <class R> inline R imaginary(Complex<R> a) { return a.im; }
template <class R> inline R magnitude(R a) { return a < 0 ? -a : a; }

// A norm that is cheap: the largest part.
template <class T>
inline Real<T> size_of(T a) {
  const Real<T> x = magnitude(real(a)), y = magnitude(imaginary(a));
  return x > y ? x : y;
}
template <class R> inline R inverse(R a) { return R(1) / a; }
template <class R>
inline Complex<R> inverse(Complex<R> a) {
  const R scale = R(1) / size_of(a);
  const Complex<R> z = scale * a;
  return (scale / (z.re * z.re + z.im * z.im)) * conj(z);
}

template <class T>
inline Real<T> largest(const T* x, int64_t count) {
  if constexpr (COMPLEX<T>) return largest(&x->re, 2 * count);
  Real<T> most = 0;
  int64_t i = 0;
  if constexpr (W<T> > 1 && !COMPLEX<T>) {
    V<T> top = broadcast(T(0));
    for (; i + W<T> <= count; i += W<T>) {
      V<T> v = load(x + i);
      v = v < -v ? -v : v;
      top = v > top ? v : top;
    }
    for (int l = 0; l < W<T>; l++) most = top[l] > most ? top[l] : most;
  }
  for (; i < count; i++) {
    const Real<T> a = size_of(x[i]);
    most = a > most ? a : most;
  }
  return most;
}

// C[rows, columns] -= A * conj(B)^T on and below the diagonal, straight from both.
template <class T>
void update_from(const T* A, const T* B, int64_t ld, int64_t rows, int64_t columns, int64_t depth, T* C, int64_t ldc,
                 bool fresh) {
  for (int64_t j = 0; j < columns; j += NB<T>) {
    const int nr = int(columns - j < NB<T> ? columns - j : NB<T>);
    for (int64_t i = j; i < rows; i += TILE_ROWS<T>) {
      const int64_t r = rows - i < TILE_ROWS<T> ? rows - i : TILE_ROWS<T>;
      tile_any<T, false>(nr, A + i, ld, B + j, ld, depth, C + i + j * ldc, ldc, r, fresh, nullptr);
    }
  }
}

// The same, packed where that pays.
template <class T>
void update(const T* A, const T* B, int64_t ld, int64_t rows, int64_t columns, int64_t depth, T* C, int64_t ldc, bool fresh,
            T* memory) {
  if (rows <= 0 || columns <= 0) return;
  if (ld < PACK_FROM || W<T> == 1 || depth < 8) return update_from(A, B, ld, rows, columns, depth, C, ldc, fresh);
  const Packed<T> packed = packed_in(memory, rows, depth);
  pack(A, ld, rows, depth, TILE_ROWS<T>, const_cast<T*>(packed.rows));
  pack(B, ld, columns, depth, NB<T>, const_cast<T*>(packed.columns));
  update_packed(packed, 0, columns, C, ldc, fresh);
}

}  // namespace
}  // namespace spcache
