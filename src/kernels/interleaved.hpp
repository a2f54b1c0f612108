// The matrices of a batch side by side: one number holds an element of each of WIDTH matrices, and every kernel that
// works on one number works on all of them. For matrices whose fronts are too small to fill a vector with rows.
#pragma once
#include "vector.hpp"

namespace spcache {
namespace {

template <class R>
struct Interleaved {
  static constexpr int WIDTH = Vector<R>::width;
  typename Vector<R>::type v;
  Interleaved() = default;
  Interleaved(typename Vector<R>::type v_) : v(v_) {}
  Interleaved(R a) : v(broadcast(a)) {}
  Interleaved& operator+=(const Interleaved& b) { v += b.v; return *this; }
  Interleaved& operator-=(const Interleaved& b) { v -= b.v; return *this; }
  friend Interleaved operator+(const Interleaved& a, const Interleaved& b) { return a.v + b.v; }
  friend Interleaved operator-(const Interleaved& a, const Interleaved& b) { return a.v - b.v; }
  friend Interleaved operator*(const Interleaved& a, const Interleaved& b) { return a.v * b.v; }
  friend Interleaved operator/(const Interleaved& a, const Interleaved& b) { return a.v / b.v; }
};
template <class R>
struct Vector<Interleaved<R>> {
  using type = Interleaved<R>;
  static constexpr int width = 1;
};
template <class R> inline Interleaved<R> load_part(const Interleaved<R>* p, int) { return *p; }
template <class R> inline void store_part(Interleaved<R>* p, Interleaved<R> v, int) { *p = v; }

template <class T> constexpr bool INTERLEAVED = false;
template <class R> constexpr bool INTERLEAVED<Interleaved<R>> = true;

// Whether a pivot will do: a positive number.
template <class R>
inline bool positive(R a) {
  return a > 0 && a <= (sizeof(R) == 4 ? R(__FLT_MAX__) : R(__DBL_MAX__));
}

template <class R> inline R reciprocal_root(R a) { return R(1) / square_root(a); }
// NaN in the lanes whose pivot will not do.
template <class R>
inline Interleaved<R> reciprocal_root(const Interleaved<R>& a) {
  constexpr R largest = sizeof(R) == 4 ? R(__FLT_MAX__) : R(__DBL_MAX__), none = R(__builtin_nan(""));
  return ((a.v > 0) & (a.v <= largest)) ? R(1) / square_roots(a.v) : broadcast(none);
}

// to[i] lane l = from[l][i], and back; back for the first `lanes` only.
template <class R>
void interleave(const void* const* from, int64_t count, void* to) {
  constexpr int width = Interleaved<R>::WIDTH;
  R* out = static_cast<R*>(to);
  for (int64_t i = 0; i < count; i++)
    for (int l = 0; l < width; l++) out[i * width + l] = static_cast<const R*>(from[l])[i];
}
template <class R>
void separate(const void* from, int64_t count, void* const* to, int lanes) {
  constexpr int width = Interleaved<R>::WIDTH;
  const R* in = static_cast<const R*>(from);
  for (int l = 0; l < lanes; l++)
    for (int64_t i = 0; i < count; i++) static_cast<R*>(to[l])[i] = in[i * width + l];
}

}  // namespace
}  // namespace spcache
