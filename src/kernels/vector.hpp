// One SIMD register of T, whatever the instruction set this file is compiled for. Complex numbers go one at a time.
#pragma once
#include <string.h>

#include "numbers.hpp"
#if defined(__AVX512F__) || defined(__AVX2__)
// GCC takes what its own headers leave undefined on purpose for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace spcache {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE_COLUMNS = 8;  // 3 x 8 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE_COLUMNS = 4;  // 3 x 4 accumulators of 16 registers
#else
constexpr int VECTOR_BYTES = 16;
constexpr int TILE_COLUMNS = 4;
#endif

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int width = VECTOR_BYTES / int(sizeof(T));
};
template <class R>
struct Vector<Complex<R>> {
  using type = Complex<R>;
  static constexpr int width = 1;
};
template <class T> using V = typename Vector<T>::type;
template <class T> constexpr int W = Vector<T>::width;

template <class T> inline __attribute__((always_inline)) V<T> load(const T* p) {
  V<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T> inline __attribute__((always_inline)) void store(T* p, V<T> v) { memcpy(p, &v, sizeof v); }
template <class T> inline __attribute__((always_inline)) V<T> broadcast(T a) {
  if constexpr (W<T> == 1) return a;
  else return a - V<T>{};
}

// The first `count` lanes only, 0 < count < width; the others read as zero.
#if defined(__AVX512F__)
inline __attribute__((always_inline)) V<double> load_part(const double* p, int count) {
  return (V<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
inline __attribute__((always_inline)) V<float> load_part(const float* p, int count) {
  return (V<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
inline __attribute__((always_inline)) void store_part(double* p, V<double> v, int count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
}
inline __attribute__((always_inline)) void store_part(float* p, V<float> v, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
#else
template <class T> inline V<T> load_part(const T* p, int count) {
  V<T> v{};
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
}
template <class T> inline void store_part(T* p, V<T> v, int count) {
  for (int i = 0; i < count; i++) p[i] = v[i];
}
#endif
template <class R> inline Complex<R> load_part(const Complex<R>* p, int) { return *p; }
template <class R> inline void store_part(Complex<R>* p, Complex<R> v, int) { *p = v; }

template <class T> inline __attribute__((always_inline)) T sum(V<T> v) {
  if constexpr (W<T> == 1) {
    return v;
  } else {
    T total = v[0];
    for (int i = 1; i < W<T>; i++) total += v[i];
    return total;
  }
}
// The square root of each lane.
template <class X>
inline X square_roots(X v) {
  for (size_t l = 0; l < sizeof v / sizeof v[0]; l++) v[l] = square_root(v[l]);
  return v;
}
#if defined(__AVX512F__)
template <> inline V<double> square_roots(V<double> v) { return (V<double>)_mm512_sqrt_pd((__m512d)v); }
template <> inline V<float> square_roots(V<float> v) { return (V<float>)_mm512_sqrt_ps((__m512)v); }
#elif defined(__AVX2__)
template <> inline V<double> square_roots(V<double> v) { return (V<double>)_mm256_sqrt_pd((__m256d)v); }
template <> inline V<float> square_roots(V<float> v) { return (V<float>)_mm256_sqrt_ps((__m256)v); }
#endif

// The sums of C vectors.
template <class T, int C> inline __attribute__((always_inline)) void sums(const V<T> (&v)[C], T* out) {
  for (int c = 0; c < C; c++) out[c] = sum<T>(v[c]);
}
#if defined(__AVX512F__)
template <> inline __attribute__((always_inline)) double sum<double>(V<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
template <> inline __attribute__((always_inline)) float sum<float>(V<float> v) { return _mm512_reduce_add_ps((__m512)v); }
inline __attribute__((always_inline)) __m256d halves(V<double> v) {
  return _mm512_castpd512_pd256((__m512d)v) + _mm512_extractf64x4_pd((__m512d)v, 1);
}
template <> inline __attribute__((always_inline)) void sums<double, 4>(const V<double> (&v)[4], double* out) {
  const __m256d a = _mm256_hadd_pd(halves(v[0]), halves(v[1])), b = _mm256_hadd_pd(halves(v[2]), halves(v[3]));
  const __m256d s = _mm256_permute2f128_pd(a, b, 0x20) + _mm256_permute2f128_pd(a, b, 0x31);
  memcpy(out, &s, sizeof s);
}
template <> inline __attribute__((always_inline)) void sums<double, 2>(const V<double> (&v)[2], double* out) {
  const __m256d a = _mm256_hadd_pd(halves(v[0]), halves(v[1]));
  const __m128d s = _mm256_castpd256_pd128(a) + _mm256_extractf128_pd(a, 1);
  memcpy(out, &s, sizeof s);
}
#endif

}  // namespace
}  // namespace spcache
