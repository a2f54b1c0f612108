// One SIMD register of T, whatever the instruction set this file is compiled for. Complex numbers lie in it as in memory;
// without AVX they go one at a time.
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
template <class R> using Register = typename Vector<R>::type;
template <class R> constexpr R LARGEST = sizeof(R) == 4 ? R(__FLT_MAX__) : R(__DBL_MAX__);  // finite number

#if defined(__AVX2__)
#if defined(__AVX512F__)
inline Register<double> swapped(Register<double> v) { return (Register<double>)_mm512_permute_pd((__m512d)v, 0x55); }
inline Register<float> swapped(Register<float> v) { return (Register<float>)_mm512_permute_ps((__m512)v, 0xb1); }
inline Register<double> evens(Register<double> v) { return (Register<double>)_mm512_movedup_pd((__m512d)v); }
inline Register<float> evens(Register<float> v) { return (Register<float>)_mm512_moveldup_ps((__m512)v); }
inline Register<double> odds(Register<double> v) { return (Register<double>)_mm512_permute_pd((__m512d)v, 0xff); }
inline Register<float> odds(Register<float> v) { return (Register<float>)_mm512_movehdup_ps((__m512)v); }
#else
inline Register<double> swapped(Register<double> v) { return (Register<double>)_mm256_permute_pd((__m256d)v, 0x5); }
inline Register<float> swapped(Register<float> v) { return (Register<float>)_mm256_permute_ps((__m256)v, 0xb1); }
inline Register<double> evens(Register<double> v) { return (Register<double>)_mm256_movedup_pd((__m256d)v); }
inline Register<float> evens(Register<float> v) { return (Register<float>)_mm256_moveldup_ps((__m256)v); }
inline Register<double> odds(Register<double> v) { return (Register<double>)_mm256_permute_pd((__m256d)v, 0xf); }
inline Register<float> odds(Register<float> v) { return (Register<float>)_mm256_movehdup_ps((__m256)v); }
#endif

// Its even lanes, the real parts, or its odd ones, with another sign.
template <class R, bool odd>
inline Register<R> negated(Register<R> v) {
  Register<R> sign;
  for (int i = 0; i < Vector<R>::width; i++) sign[i] = (i & 1) == odd ? R(-0.0) : R(0);
  using Bits = decltype(v < v);
  return (Register<R>)((Bits)v ^ (Bits)sign);
}

template <class R> struct ComplexConstant;

// Neighbouring lanes are real and imaginary part.
template <class R>
struct ComplexVector {
  Register<R> v;
  Complex<R> operator[](int i) const { return {v[2 * i], v[2 * i + 1]}; }
  ComplexVector& operator+=(ComplexVector b) { v += b.v; return *this; }
  ComplexVector& operator-=(ComplexVector b) { v -= b.v; return *this; }
  friend ComplexVector operator+(ComplexVector a, ComplexVector b) { return {a.v + b.v}; }
  friend ComplexVector operator-(ComplexVector a, ComplexVector b) { return {a.v - b.v}; }
  friend ComplexVector operator*(ComplexVector a, ComplexConstant<R> b) {
    return {a.v * b.re + negated<R, false>(swapped(a.v)) * b.im};
  }
  friend ComplexVector operator*(ComplexConstant<R> a, ComplexVector b) { return b * a; }
  friend ComplexVector operator*(ComplexVector a, ComplexVector b) { return a * ComplexConstant<R>{evens(b.v), odds(b.v)}; }
  friend ComplexVector conj(ComplexVector a) { return {negated<R, true>(a.v)}; }
};

// The same number in each place, its parts apart.
template <class R>
struct ComplexConstant {
  Register<R> re, im;
  operator ComplexVector<R>() const {
    Register<R> v;
    for (int i = 0; i < Vector<R>::width; i++) v[i] = i & 1 ? im[i] : re[i];
    return {v};
  }
};

template <class R>
struct Vector<Complex<R>> {
  using type = ComplexVector<R>;
  static constexpr int width = Vector<R>::width / 2;
};
#else
template <class R>
struct Vector<Complex<R>> {
  using type = Complex<R>;
  static constexpr int width = 1;
};
#endif
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
#if defined(__AVX2__)
template <class R> inline __attribute__((always_inline)) ComplexConstant<R> broadcast(Complex<R> a) {
  return {broadcast(a.re), broadcast(a.im)};
}
#endif
template <class T> using Constant = decltype(broadcast(T()));  // what a vector is multiplied with

// sum += a * b and sum -= a * b; of complex numbers each two fused operations on all lanes.
template <class X, class A, class B> inline __attribute__((always_inline)) void add_product(X& sum, A a, B b) {
  sum += a * b;
}
template <class X, class A, class B> inline __attribute__((always_inline)) void subtract_product(X& sum, A a, B b) {
  sum -= a * b;
}
#if defined(__AVX2__)
template <class R>
inline __attribute__((always_inline)) void add_product(ComplexVector<R>& sum, ComplexVector<R> a, ComplexConstant<R> b) {
  sum.v += a.v * b.re;
  sum.v += negated<R, false>(swapped(a.v)) * b.im;
}
template <class R>
inline __attribute__((always_inline)) void subtract_product(ComplexVector<R>& sum, ComplexVector<R> a, ComplexConstant<R> b) {
  sum.v -= a.v * b.re;
  sum.v -= negated<R, false>(swapped(a.v)) * b.im;
}
template <class R>
inline __attribute__((always_inline)) void add_product(ComplexVector<R>& sum, ComplexVector<R> a, ComplexVector<R> b) {
  add_product(sum, a, ComplexConstant<R>{evens(b.v), odds(b.v)});
}
#endif

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
#elif defined(__AVX2__)
alignas(64) constexpr int32_t LANES[16] = {-1, -1, -1, -1, -1, -1, -1, -1};  // and zeros
inline __attribute__((always_inline)) __m256i first_lanes(int words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(LANES + 8 - words));
}
inline __attribute__((always_inline)) V<double> load_part(const double* p, int count) {
  return (V<double>)_mm256_maskload_pd(p, first_lanes(2 * count));
}
inline __attribute__((always_inline)) V<float> load_part(const float* p, int count) {
  return (V<float>)_mm256_maskload_ps(p, first_lanes(count));
}
// Bit by bit of count: masked stores are slow on some processors.
inline __attribute__((always_inline)) void store_part(double* p, V<double> v, int count) {
  __m128d half = _mm256_castpd256_pd128((__m256d)v);
  if (count & 2) {
    _mm_storeu_pd(p, half);
    half = _mm256_extractf128_pd((__m256d)v, 1);
    p += 2;
  }
  if (count & 1) _mm_store_sd(p, half);
}
inline __attribute__((always_inline)) void store_part(float* p, V<float> v, int count) {
  __m128 half = _mm256_castps256_ps128((__m256)v);
  if (count & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, half);
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
#if defined(__AVX2__)
template <class R> inline __attribute__((always_inline)) ComplexVector<R> load_part(const Complex<R>* p, int count) {
  return {load_part(&p->re, 2 * count)};
}
template <class R> inline __attribute__((always_inline)) void store_part(Complex<R>* p, ComplexVector<R> v, int count) {
  store_part(&p->re, v.v, 2 * count);
}
#else
template <class R> inline Complex<R> load_part(const Complex<R>* p, int) { return *p; }
template <class R> inline void store_part(Complex<R>* p, Complex<R> v, int) { *p = v; }
#endif

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
