// The four scalar types of spcache: float, double and their complex pairs.
// A pair of our own, because std::complex multiplies through a slow NaN-recovering library call
// and its inline functions must not be shared between translation units built for different CPUs.
#pragma once
#include <math.h>
#include <stdint.h>

namespace spcache {

template <class R>
struct Complex {
  R re, im;
  Complex() = default;
  Complex(R re_, R im_ = 0) : re(re_), im(im_) {}
  template <class Q>
  explicit Complex(const Complex<Q>& z) : re(R(z.re)), im(R(z.im)) {}
  Complex& operator+=(Complex z) { re += z.re; im += z.im; return *this; }
  Complex& operator-=(Complex z) { re -= z.re; im -= z.im; return *this; }
};
template <class R> inline Complex<R> operator+(Complex<R> a, Complex<R> b) { return {a.re + b.re, a.im + b.im}; }
template <class R> inline Complex<R> operator-(Complex<R> a, Complex<R> b) { return {a.re - b.re, a.im - b.im}; }
template <class R> inline Complex<R> operator-(Complex<R> a) { return {-a.re, -a.im}; }
template <class R> inline Complex<R> operator*(R a, Complex<R> b) { return {a * b.re, a * b.im}; }
template <class R> inline Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <class T> struct RealOf { using type = T; };
template <class R> struct RealOf<Complex<R>> { using type = R; };
template <class T> using Real = typename RealOf<T>::type;
template <class T> constexpr bool COMPLEX = false;
template <class R> constexpr bool COMPLEX<Complex<R>> = true;

template <class R> inline R conj(R a) { return a; }
template <class R> inline Complex<R> conj(Complex<R> a) { return {a.re, -a.im}; }
template <class R> inline R real(R a) { return a; }
template <class R> inline R real(Complex<R> a) { return a.re; }
inline float abs(float a) { return fabsf(a); }
inline double abs(double a) { return fabs(a); }
inline float abs(Complex<float> a) { return hypotf(a.re, a.im); }
inline double abs(Complex<double> a) { return hypot(a.re, a.im); }
inline float square_root(float a) { return sqrtf(a); }
inline double square_root(double a) { return sqrt(a); }

// The codes by which Python names the scalar types; the order is that of the kernel tables.
enum Dtype : int32_t { FLOAT32 = 0, FLOAT64 = 1, COMPLEX64 = 2, COMPLEX128 = 3 };

}  // namespace spcache
