// Least squares: the rows of B, scaled, and the map of products from them to the normal matrix N = B^H B.
//
// B [p, q] is the caller's A, or A^H. Its entries are kept by rows, columns ascending, duplicates summed. Columns are
// scaled by powers of two, which rounds nothing, to norms between 1/sqrt(2) and sqrt(2) (van der Sluis 1969: nearly the
// best condition number that scaling can give), so that N has a diagonal of about one and nothing in it overflows.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "numbers.hpp"
#include "pattern.hpp"

namespace spcache {

struct Rows {
  int64_t nnz = 0, p = 0, q = 0;  // the caller's entries; rows and columns of B
  std::vector<int32_t> slot;      // [nnz] place of the caller's entry
  std::vector<int64_t> indptr;    // [p + 1]
  std::vector<int32_t> indices;   // [count] columns
  int64_t count() const { return int64_t(indices.size()); }
};

inline void make_rows(Rows& B, int64_t nnz, const int32_t* row, const int32_t* column, int64_t p, int64_t q) {
  B.nnz = nnz, B.p = p, B.q = q;
  B.slot.resize(nnz);
  B.indptr.resize(p + 1);
  B.indices.resize(nnz);
  B.indices.resize(compress(nnz, column, row, q, p, B.indptr.data(), B.indices.data(), B.slot.data()));
}

// 2^-e, within the numbers that have an exponent of their own.
inline double power_of_two(int e) { return ldexp(1.0, e < -1000 ? 1000 : e > 1000 ? -1000 : -e); }

// Scaled numbers of B and the scales. Returns the first column of zeros (damping counts), or -1.
//   values [nnz], w [count] out, scale [q] out
template <class T>
inline int64_t scale_rows(const Rows& B, bool conjugate, double damping, const T* values, T* w, double* scale) {
  const int64_t count = B.count();
  const int32_t* column = B.indices.data();
  for (int64_t e = 0; e < count; e++) w[e] = T(0);
  for (int64_t k = 0; k < B.nnz; k++) w[B.slot[k]] += conjugate ? conj(values[k]) : values[k];
  for (int64_t j = 0; j < B.q; j++) scale[j] = damping;
  for (int64_t e = 0; e < count; e++) {
    const double a = abs(w[e]);
    if (a > scale[column[e]]) scale[column[e]] = a;
  }
  int64_t zero = -1;
  for (int64_t j = B.q; j-- > 0;) {
    if (scale[j] == 0) zero = j;
    scale[j] = scale[j] > 0 && scale[j] < HUGE_VAL ? power_of_two(ilogb(scale[j])) : 1.0;
  }
  std::vector<double> square(B.q);
  for (int64_t j = 0; j < B.q; j++) square[j] = (damping * scale[j]) * (damping * scale[j]);
  for (int64_t e = 0; e < count; e++) {
    const double a = abs(scale[column[e]] * w[e]);
    square[column[e]] += a * a;
  }
  for (int64_t j = 0; j < B.q; j++)
    if (square[j] > 0 && square[j] < HUGE_VAL) scale[j] *= power_of_two(int(rint(0.5 * log2(square[j]))));
  for (int64_t e = 0; e < count; e++) w[e] = scale[column[e]] * w[e];
  return zero;
}

// y = B x or B^H x; x and y have `width` columns. y is overwritten.
template <class T>
inline void apply_rows(const Rows& B, bool adjoint, int64_t width, const T* w, const T* x, T* y) {
  const int32_t* column = B.indices.data();
  const int64_t* begin = B.indptr.data();
  for (int64_t t = 0; t < (adjoint ? B.q : B.p) * width; t++) y[t] = T(0);
  for (int64_t i = 0; i < B.p; i++) {
    if (width == 1) {
      if (adjoint) {
        const T from = x[i];
        for (int64_t e = begin[i]; e < begin[i + 1]; e++) y[column[e]] += conj(w[e]) * from;
      } else {
        T sum = T(0);
        for (int64_t e = begin[i]; e < begin[i + 1]; e++) sum += w[e] * x[column[e]];
        y[i] = sum;
      }
      continue;
    }
    for (int64_t e = begin[i]; e < begin[i + 1]; e++) {
      const int64_t j = column[e];
      const T a = adjoint ? conj(w[e]) : w[e];
      const T* from = x + (adjoint ? i : j) * width;
      T* to = y + (adjoint ? j : i) * width;
      for (int64_t r = 0; r < width; r++) to[r] += a * from[r];
    }
  }
}

// How many products N takes, summed over runs of neighbouring rows that have the same columns.
struct Runs {
  std::vector<int64_t> begin;  // [runs + 1] first row
  std::vector<int64_t> first;  // [runs + 1] first product
  int64_t widest = 0;
  int64_t count() const { return int64_t(begin.size()) - 1; }
  int64_t products() const { return first.back(); }
};

inline Runs find_runs(const Rows& B) {
  Runs runs;
  const int32_t* columns = B.indices.data();
  runs.begin.push_back(0), runs.first.push_back(0);
  for (int64_t i = 0; i < B.p;) {
    const int64_t from = B.indptr[i], width = B.indptr[i + 1] - from;
    int64_t next = i + 1;
    while (next < B.p && B.indptr[next + 1] - B.indptr[next] == width &&
           std::equal(columns + from, columns + from + width, columns + B.indptr[next]))
      next++;
    runs.begin.push_back(i = next);
    runs.first.push_back(runs.first.back() + width * (width + 1) / 2);
    runs.widest = std::max(runs.widest, width);
  }
  return runs;
}

// The lower triangle of N by columns, and where each product of a run goes in it. The diagonal is always there, and
// first in its column. Products of a run of width c: those of its columns (a, b), a <= b, in the order of a, then b.
struct Products {
  Runs runs;
  std::vector<int64_t> indptr;   // [q + 1]
  std::vector<int32_t> indices;  // [entries]
  std::vector<int32_t> target;   // [products]
};

// Returns false where N has more than 2^31 - 1 entries.
inline bool make_products(Products& N, const Rows& B) {
  const Runs& runs = N.runs;
  const int64_t count = runs.count();
  std::vector<int64_t> begin(B.q + 1, 0);  // runs by column
  auto each = [&](int64_t k, auto visit) {
    const int64_t from = B.indptr[runs.begin[k]], width = B.indptr[runs.begin[k] + 1] - from;
    for (int64_t a = 0; a < width; a++) visit(from, width, a);
  };
  for (int64_t k = 0; k < count; k++) each(k, [&](int64_t from, int64_t, int64_t a) { begin[B.indices[from + a] + 1]++; });
  for (int64_t j = 0; j < B.q; j++) begin[j + 1] += begin[j];
  std::vector<int32_t> run(begin[B.q]), place(begin[B.q]);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t k = 0; k < count; k++)
    each(k, [&](int64_t from, int64_t, int64_t a) {
      const int64_t t = next[B.indices[from + a]]++;
      run[t] = int32_t(k), place[t] = int32_t(a);
    });

  N.target.resize(runs.products());
  N.indptr.assign(B.q + 1, 0);
  std::vector<int32_t> mark(B.q, -1), where(B.q);
  auto row_of = [&](int64_t t, const int32_t*& columns, int64_t& width, int64_t& offset) {
    const int64_t i = runs.begin[run[t]], a = place[t];
    width = B.indptr[i + 1] - B.indptr[i];
    columns = B.indices.data() + B.indptr[i];
    offset = runs.first[run[t]] + a * width - a * (a - 1) / 2;
  };
  const int32_t* columns;
  int64_t width, offset;
  for (int64_t l = 0; l < B.q; l++) {
    const int64_t from = int64_t(N.indices.size());
    N.indices.push_back(int32_t(l));
    mark[l] = int32_t(l);
    for (int64_t t = begin[l]; t < begin[l + 1]; t++) {
      row_of(t, columns, width, offset);
      for (int64_t b = place[t] + 1; b < width; b++)
        if (mark[columns[b]] != l) mark[columns[b]] = int32_t(l), N.indices.push_back(columns[b]);
    }
    if (N.indices.size() > size_t(INT32_MAX)) return false;
    std::sort(N.indices.begin() + from, N.indices.end());
    for (int64_t s = from; s < int64_t(N.indices.size()); s++) where[N.indices[s]] = int32_t(s);
    for (int64_t t = begin[l]; t < begin[l + 1]; t++) {
      row_of(t, columns, width, offset);
      for (int64_t b = place[t]; b < width; b++) N.target[offset + b - place[t]] = where[columns[b]];
    }
    N.indptr[l + 1] = int64_t(N.indices.size());
  }
  return true;
}

// out [entries] = lower triangle of B^H B + (damping scale)^2. Returns the largest sum of magnitudes of a row of N,
// which bounds its norm.
template <class T>
inline double multiply_rows(const Products& N, const Rows& B, double damping, const T* w, const double* scale, T* out) {
  const int64_t entries = int64_t(N.indices.size());
  std::vector<T> sum(N.runs.widest);
  for (int64_t s = 0; s < entries; s++) out[s] = T(0);
  const int32_t* target = N.target.data();
  for (int64_t k = 0; k < N.runs.count(); k++) {
    const int64_t i = N.runs.begin[k], rows = N.runs.begin[k + 1] - i, width = B.indptr[i + 1] - B.indptr[i];
    const T* block = w + B.indptr[i];  // [rows, width]
    for (int64_t a = 0; a < width; a++) {
      T* to = sum.data();
      for (int64_t b = a; b < width; b++) to[b] = conj(block[b]) * block[a];
      for (int64_t r = 1; r < rows; r++) {
        const T *row = block + r * width, factor = row[a];
        for (int64_t b = a; b < width; b++) to[b] += conj(row[b]) * factor;
      }
      for (int64_t b = a; b < width; b++) out[*target++] += to[b];
    }
  }
  std::vector<double> size(B.q, 0.0);
  for (int64_t l = 0; l < B.q; l++) {
    T& diagonal = out[N.indptr[l]];
    diagonal = T(real(diagonal) + (damping * scale[l]) * (damping * scale[l]));
    size[l] += abs(diagonal);
    for (int64_t s = N.indptr[l] + 1; s < N.indptr[l + 1]; s++) {
      const double a = abs(out[s]);
      size[l] += a;
      size[N.indices[s]] += a;
    }
  }
  double largest = 0;
  for (int64_t j = 0; j < B.q; j++) largest = size[j] > largest ? size[j] : largest;
  return largest;
}

}  // namespace spcache
