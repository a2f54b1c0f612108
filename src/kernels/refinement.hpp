// Refinement of solutions in double precision, by a factor of the same matrix or of one rounded to single precision.
//
// A matrix is rounded as L A R, L and R powers of two (held as powers, not exponents): first the largest entry of each
// row and column is brought near 1, so that neither overflows what single precision can hold, nor vanishes in it
// (N. J. Higham, S. Pranesh, M. Zounon 2019, "Squeezing a matrix into half precision, with an application to solving
// linear systems", doi:10.1137/18M1229511). Right-hand sides are scaled too, column by column.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "pattern.hpp"

namespace spcache {

// The largest of its parts: a norm that is cheap.
template <class R> inline R part(R a) { return abs(a); }
template <class R> inline R part(Complex<R> a) { return std::max(abs(a.re), abs(a.im)); }

// The exponent of a number that is not negative; -1023 where it is below all normal ones, 1024 where it is not finite.
inline int32_t exponent(double a) {
  uint64_t bits;
  memcpy(&bits, &a, sizeof bits);
  return int32_t(bits >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int32_t e) {
  const uint64_t bits = uint64_t(std::clamp(e, -1022, 1023) + 1023) << 52;
  double a;
  memcpy(&a, &bits, sizeof a);
  return a;
}

// Powers l [m], r [n] by which the entries of each row, and of each column, have a geometric mean of about 1, nearly: a
// number of sweeps towards the least sum of squares of exponents (A. R. Curtis, J. K. Reid 1972, "On the automatic scaling of
// matrices for Gaussian elimination", doi:10.1093/imamat/10.1.118). Undoes rows and columns that are far apart by
// themselves, where largest entries mislead.
template <class T>
inline void balance(int64_t nnz, const int32_t* row, const int32_t* column, const T* values, std::vector<int32_t>& l,
                    std::vector<int32_t>& r) {
  constexpr int SWEEPS = 200;
  std::vector<double> own(l.size(), 0.0), other(r.size(), 0.0);
  std::vector<int64_t> count(std::max(l.size(), r.size()));
  auto sweep = [&](std::vector<double>& power, const int32_t* at, const std::vector<double>& given, const int32_t* from) {
    std::fill(power.begin(), power.end(), 0.0);
    std::fill(count.begin(), count.end(), 0);
    for (int64_t k = 0; k < nnz; k++) {
      const int32_t e = exponent(part(values[k]));
      if (e == -1023 || e == 1024) continue;
      power[at[k]] -= e + given[from[k]];
      count[at[k]]++;
    }
    for (size_t i = 0; i < power.size(); i++) power[i] /= double(std::max<int64_t>(count[i], 1));
  };
  for (int round = 0; round < SWEEPS; round++) {
    sweep(own, row, other, column);
    const std::vector<double> before = other;
    sweep(other, column, own, row);
    double change = 0;
    for (size_t j = 0; j < other.size(); j++) change = std::max(change, fabs(other[j] - before[j]));
    if (change < 0.1) break;
  }
  for (size_t i = 0; i < l.size(); i++) l[i] = int32_t(lrint(own[i]));
  for (size_t j = 0; j < r.size(); j++) r[j] = int32_t(lrint(other[j]));
}

// left [m], right [n]: what brings the largest entries of rows and columns near 1; nothing is scaled where all of them
// are within 2^+-MODERATE. symmetric: left = right, for entries that have a mirror image (D. Ruiz 2001, "A scaling
// algorithm to equilibrate both rows and columns norms in matrices").
template <class T>
inline void equilibrate(int64_t nnz, const int32_t* row, const int32_t* column, int64_t m, int64_t n, bool symmetric,
                        const T* values, double* left, double* right) {
  constexpr int32_t MODERATE = 16, NONE_YET = -100000, FAR = 1000;
  constexpr int ROUNDS = 40;
  std::vector<int32_t> l(m, 0), r(n, 0), top(m), other(n);
  for (int round = 0; round < ROUNDS; round++) {
    std::fill(top.begin(), top.end(), NONE_YET);
    std::fill(other.begin(), other.end(), NONE_YET);
    for (int64_t k = 0; k < nnz; k++) {
      const int32_t i = row[k], j = column[k], e = exponent(part(values[k]));
      if (e == -1023 || e == 1024) continue;
      const int32_t now = e + l[i] + r[j];
      top[i] = std::max(top[i], now);
      other[j] = std::max(other[j], now);
    }
    if (symmetric)
      for (int64_t i = 0; i < n; i++) top[i] = other[i] = std::max(top[i], other[i]);
    bool done = true;
    auto adjust = [&](std::vector<int32_t>& power, const std::vector<int32_t>& size, int32_t enough) {
      for (size_t i = 0; i < power.size(); i++) {
        if (size[i] == NONE_YET || (size[i] <= enough && size[i] >= -enough)) continue;
        const int32_t old = power[i];
        power[i] = std::clamp(old - (size[i] / 2 ? size[i] / 2 : size[i]), -FAR, FAR);
        done &= power[i] == old;
      }
    };
    if (round == 0 && !symmetric) {
      auto moderate = [](int32_t e) { return e == NONE_YET || (e <= MODERATE && e >= -MODERATE); };
      if (std::all_of(top.begin(), top.end(), moderate) && std::all_of(other.begin(), other.end(), moderate)) break;
      balance(nnz, row, column, values, l, r);
      continue;
    }
    const int32_t enough = round ? 1 : MODERATE;
    adjust(l, top, enough);
    adjust(r, other, enough);
    if (done) break;
  }
  for (int64_t i = 0; i < m; i++) left[i] = power_of_two(l[i]);
  for (int64_t j = 0; j < n; j++) right[j] = power_of_two(r[j]);
}

// out = L A R, rounded. Here and below T is double or Complex<double>, N what has half of its size.
template <class T, class N>
inline void narrow_matrix(int64_t nnz, const int32_t* row, const int32_t* column, const T* values, const double* left,
                          const double* right, N* out) {
  for (int64_t k = 0; k < nnz; k++) out[k] = N(right[column[k]] * (left[row[k]] * values[k]));
}

// out = scale b / 2^e, rounded, for each column of b [n, width]; its 2^e, near the largest entry, goes to size [width].
template <class T, class N>
inline void narrow_rhs(int64_t n, int64_t width, const T* b, const double* scale, N* out, double* size) {
  std::fill(size, size + width, 0.0);
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < width; c++) {
      const double a = part(scale[i] * b[i * width + c]);
      size[c] = a > size[c] ? a : size[c];
    }
  for (int64_t c = 0; c < width; c++) size[c] = power_of_two(size[c] > 0 ? exponent(size[c]) : 0);
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < width; c++) out[i * width + c] = N(1 / size[c] * (scale[i] * b[i * width + c]));
}

// y = x + 2^e scale d, x null: without it; all [n, width].
template <class T, class N>
inline void add_widened(int64_t n, int64_t width, const N* d, const double* scale, const double* size, const T* x, T* y) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < width; c++) {
      const int64_t at = i * width + c;
      const T more = size[c] * (scale[i] * T(d[at]));
      y[at] = x ? x[at] + more : more;
    }
}

// r = b - S x, or b - S^H x, for the matrix S of the convention; all [n, width]. worst [width]: for each column the
// largest |r_i| / (|S| |x| + |b|)_i; where that divisor is nothing but rounding, |S_i| |x| takes its place, by norms of S
// and x in units [n] of the unknowns (M. Arioli, J. W. Demmel, I. S. Duff 1989, "Solving sparse linear systems with sparse
// backward error", doi:10.1137/0610013).
// scaled [width]: |r| / (|S| |x| + |b|), by the largest entries and the largest row sum. Infinite where something is not
// finite.
template <class T>
inline void residual(int64_t nnz, const int32_t* row, const int32_t* column, Mirror mirror, bool one_triangle,
                     bool adjoint, int64_t n, int64_t width, const T* values, const double* units, const T* b,
                     const T* x, T* r, double* worst, double* scaled) {
  constexpr double ROUNDING = 1000 * 2.220446049250313e-16;
  std::vector<double> size(n * width), weight(n, 0.0), top(width, 0.0);
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < width; c++) {
      const int64_t at = i * width + c;
      r[at] = b[at];
      size[at] = part(b[at]);
      const double a = part(x[at]) / units[i];
      top[c] = a > top[c] ? a : top[c];
    }
  auto subtract = [&](int64_t i, int64_t j, T a) {
    const double w = part(a);
    const T* from = x + j * width;
    T* to = r + i * width;
    double* grown = size.data() + i * width;
    weight[i] += w * units[j];
    for (int64_t c = 0; c < width; c++) {
      to[c] -= a * from[c];
      grown[c] += w * part(from[c]);
    }
  };
  if (mirror == NONE) {
    for (int64_t k = 0; k < nnz; k++)
      if (adjoint)
        subtract(column[k], row[k], conj(values[k]));
      else
        subtract(row[k], column[k], values[k]);
  } else {
    for (int64_t k = 0; k < nnz; k++) {  // as apply_entries
      const int64_t i = row[k], j = column[k];
      T a = adjoint && mirror == TRANSPOSED ? conj(values[k]) : values[k];
      if (i == j && mirror == CONJUGATED) a = T(real(a));
      if (!one_triangle && i != j) a = 0.5 * a;
      subtract(i, j, a);
      if (i != j) subtract(j, i, mirror == CONJUGATED ? conj(a) : a);
    }
  }
  std::fill(worst, worst + width, 0.0);
  std::vector<double> rest(width, 0.0), given(width, 0.0);
  const double norm = *std::max_element(weight.begin(), weight.end());
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < width; c++) {
      const double error = part(r[i * width + c]), other = weight[i] * top[c], from = part(b[i * width + c]);
      given[c] = from > given[c] ? from : given[c];
      if (error == 0) continue;
      if (!(error <= rest[c])) rest[c] = error <= DBL_MAX ? error : HUGE_VAL;
      double divisor = size[i * width + c];
      if (divisor < ROUNDING * other) divisor += other;
      const double ratio = error / divisor;
      if (!(ratio <= worst[c])) worst[c] = divisor <= DBL_MAX && ratio <= DBL_MAX ? ratio : HUGE_VAL;
    }
  for (int64_t c = 0; c < width; c++) {
    const double divisor = norm * top[c] + given[c];
    scaled[c] = rest[c] == 0 ? 0 : divisor <= DBL_MAX ? rest[c] / divisor : HUGE_VAL;
  }
}

}  // namespace spcache
