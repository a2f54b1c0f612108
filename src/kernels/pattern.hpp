// What is done on the caller's own COO entries: canonical order, finiteness, symmetry, the gradient's gather.
#pragma once
#include <stdint.h>

#include <vector>

#include "assembly.hpp"
#include "threads.hpp"

namespace spcache {

// Canonical CSC order of COO entries by two stable counting sorts, O(nnz + m + n).
//   indptr  [n + 1] out, indices [<= nnz] out: columns in order, rows ascending, no duplicates
//   slot    [nnz]   out: where entry k of the caller is found in indices
// Returns the number of distinct entries. Every index must be in range already.
inline int64_t compress(int64_t nnz, const int32_t* row, const int32_t* column, int64_t m, int64_t n,
                        int64_t* indptr, int32_t* indices, int32_t* slot) {
  std::vector<int64_t> next((m > n ? m : n) + 1, 0);
  std::vector<int32_t> by_row(nnz), order(nnz);
  for (int64_t k = 0; k < nnz; k++) next[row[k] + 1]++;
  for (int64_t i = 0; i < m; i++) next[i + 1] += next[i];
  for (int64_t k = 0; k < nnz; k++) by_row[next[row[k]]++] = int32_t(k);
  next.assign(n + 1, 0);
  for (int64_t k = 0; k < nnz; k++) next[column[k] + 1]++;
  for (int64_t j = 0; j < n; j++) next[j + 1] += next[j];
  for (int64_t e = 0; e < nnz; e++) order[next[column[by_row[e]]]++] = by_row[e];

  int64_t count = 0, e = 0;
  for (int64_t j = 0; j < n; j++) {
    indptr[j] = count;
    for (; e < nnz && column[order[e]] == j; e++) {
      int32_t k = order[e];
      if (count == indptr[j] || indices[count - 1] != row[k]) indices[count++] = row[k];
      slot[k] = int32_t(count - 1);
    }
  }
  indptr[n] = count;
  return count;
}

// Sorts contributions by (group, role); see assembly.hpp. Arrays begin, source and target are outputs. A position ~p is
// place p, where the mirror image of the slot is stored: direct contributions become mirrored ones and vice versa.
inline void sort_contributions(int64_t count, const int32_t* slot, const int32_t* source, const uint8_t* role,
                               const int32_t* group_of, const int64_t* position_of, int64_t groups,
                               int64_t* begin, int32_t* sorted_source, uint32_t* target) {
  for (int64_t g = 0; g <= 3 * groups; g++) begin[g] = 0;
  auto position = [&](int64_t e) { return position_of ? position_of[slot[e]] : slot[e]; };
  auto bucket = [&](int64_t e) {
    const int as_stored = role[e] == DIAGONAL || position(e) >= 0 ? role[e] : DIRECT + MIRRORED - role[e];
    return 3 * int64_t(group_of ? group_of[slot[e]] : 0) + as_stored;
  };
  for (int64_t e = 0; e < count; e++) begin[bucket(e) + 1]++;
  for (int64_t g = 0; g < 3 * groups; g++) begin[g + 1] += begin[g];
  std::vector<int64_t> next(begin, begin + 3 * groups);
  for (int64_t e = 0; e < count; e++) {
    int64_t p = next[bucket(e)]++;
    sorted_source[p] = source[e];
    target[p] = uint32_t(position(e) < 0 ? ~position(e) : position(e));
  }
}

// True where every number is finite: x * 0 is 0 for finite x and NaN otherwise, so one sum tells.
template <class R>
inline bool all_finite(const R* x, int64_t count) {
  R sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int l = 0; l < 8; l++) sum[l] += x[i + l] * R(0);
  for (; i < count; i++) sum[0] += x[i] * R(0);
  R total = 0;
  for (int l = 0; l < 8; l++) total += sum[l];
  return total == R(0);
}

// The largest magnitude, infinite where a number is not finite.
inline double largest_of(const double* x, int64_t count) {
  double most[8] = {0, 0, 0, 0, 0, 0, 0, 0}, zero[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int l = 0; l < 8; l++) {
      const double a = fabs(x[i + l]);
      most[l] = most[l] > a ? most[l] : a;
      zero[l] += x[i + l] * 0.0;
    }
  for (; i < count; i++) {
    const double a = fabs(x[i]);
    most[0] = most[0] > a ? most[0] : a;
    zero[0] += x[i] * 0.0;
  }
  for (int l = 1; l < 8; l++) {
    most[0] = most[l] > most[0] ? most[l] : most[0];
    zero[0] += zero[l];
  }
  return zero[0] == 0 ? most[0] : HUGE_VAL;
}

// The caller's entries grouped by canonical lower-triangle slot: begin[2 s] .. begin[2 s + 1] stand at (i, j),
// i >= j, and begin[2 s + 1] .. begin[2 s + 2] at (j, i).
struct Pairs {
  int64_t nnz, slots, n;
  const int64_t* begin;    // [2 * slots + 1]
  const int32_t* source;   // [nnz]
  const int32_t* row;      // [slots]
  const int32_t* column;   // [slots]
  const int32_t* diagonal; // [n] slot of (i, i), or -1
  // [slots] where each slot has one entry on each side, those two (on the diagonal the same twice); otherwise null.
  const int32_t *lower, *upper;
};

template <class T>
inline T sum_entries(const int32_t* source, int64_t from, int64_t to, const T* values) {
  T sum = values[source[from]];
  for (int64_t e = from + 1; e < to; e++) sum += values[source[e]];
  return sum;
}

// How far values are from symmetric.
struct Asymmetry {
  double difference = 0, largest = 0;  // largest |a_ij - a_ji| (conjugated where Hermitian) and |a_ij|, on summed entries
  void merge(double d, double l) {
    difference = d > difference ? d : difference;
    largest = l > largest ? l : largest;
  }
};

// Those of slots begin .. end.
template <class T>
inline Asymmetry asymmetry(const Pairs& p, bool hermitian, const T* values, int64_t begin, int64_t end) {
  constexpr int64_t CHAINS = 4, FAR = 32;  // maxima that do not wait for each other; slots to prefetch ahead
  Real<T> worst[CHAINS] = {}, top[CHAINS] = {}, other[CHAINS] = {};
  auto raise = [](Real<T>& bound, T z) { Real<T> size = abs(z); bound = size > bound ? size : bound; };
  auto compare = [&](int64_t chain, T lower, T upper) {
    raise(top[chain], lower);
    raise(other[chain], upper);
    raise(worst[chain], lower - (hermitian ? conj(upper) : upper));
  };
  if (p.lower) {
    int64_t s = begin;
    for (; s + FAR < end; s += CHAINS)
      for (int64_t c = 0; c < CHAINS; c++) {
        __builtin_prefetch(values + p.upper[s + c + FAR - CHAINS]);
        compare(c, values[p.lower[s + c]], values[p.upper[s + c]]);
      }
    for (; s < end; s++) compare(0, values[p.lower[s]], values[p.upper[s]]);
  } else {
    for (int64_t s = begin; s < end; s++) {
      const int64_t b = p.begin[2 * s], m = p.begin[2 * s + 1], e = p.begin[2 * s + 2];
      const T lower = m > b ? sum_entries(p.source, b, m, values) : T(0);
      if (p.row[s] == p.column[s]) compare(0, lower, lower);
      else compare(0, lower, e > m ? sum_entries(p.source, m, e, values) : T(0));
    }
  }
  Asymmetry found;
  for (int64_t c = 0; c < CHAINS; c++) found.merge(worst[c], top[c] > other[c] ? top[c] : other[c]);
  return found;
}

// --- the same and other passes over values of any type, shared by threads where they are many ---

constexpr int64_t FEW = 1 << 13;         // entries that are gathered before another thread has begun
constexpr int64_t FEW_BYTES = 1 << 19;   // bytes that are only read or copied

// Calls pass(T()) for the type that `dtype` names.
template <class Pass>
auto with_type(Dtype dtype, Pass pass) {
  switch (dtype) {
    case FLOAT32: return pass(float());
    case FLOAT64: return pass(double());
    case COMPLEX64: return pass(Complex<float>());
    default: return pass(Complex<double>());
  }
}

inline bool all_finite(Dtype dtype, const void* values, int64_t count, int threads) {
  std::atomic<bool> finite{true};
  with_type(dtype, [&](auto zero) {
    using R = Real<decltype(zero)>;
    const int64_t reals = sizeof(zero) / sizeof(R), size = FEW_BYTES / int64_t(sizeof(R));
    share_ranges(count * reals, size, threads, [&](int64_t begin, int64_t end) {
      if (!all_finite(static_cast<const R*>(values) + begin, end - begin)) finite = false;
    });
  });
  return finite;
}

inline void copy(const char* from, int64_t count, char* to, int threads) {
  share_ranges(count, FEW_BYTES, threads, [&](int64_t begin, int64_t end) { memcpy(to + begin, from + begin, end - begin); });
}

// Stops soon after the first difference, which is where other values are compared almost always near the beginning.
inline bool equal(const char* a, const char* b, int64_t count, int threads) {
  const int64_t first = count < 4096 ? count : 4096;
  if (memcmp(a, b, first)) return false;
  std::atomic<bool> same{true};
  share_ranges(count - first, FEW_BYTES, threads, [&](int64_t begin, int64_t end) {
    if (same && memcmp(a + first + begin, b + first + begin, end - begin)) same = false;
  });
  return same;
}

inline Asymmetry asymmetry(Dtype dtype, const Pairs& p, bool hermitian, const void* values, int threads) {
  Asymmetry found;
  std::mutex mutex;
  with_type(dtype, [&](auto zero) {
    share_ranges(p.slots, FEW, threads, [&](int64_t begin, int64_t end) {
      const Asymmetry part = asymmetry(p, hermitian, static_cast<const decltype(zero)*>(values), begin, end);
      std::lock_guard<std::mutex> lock(mutex);
      found.merge(part.difference, part.largest);
    });
  });
  return found;
}

// The first matrix of values [batch, nnz] whose difference exceeds `allowed` times its largest entry, or -1.
inline int64_t first_asymmetric(Dtype dtype, const Pairs& p, bool hermitian, const void* values, int64_t batch,
                                double allowed, int threads) {
  std::atomic<int64_t> first{INT64_MAX};
  with_type(dtype, [&](auto zero) {
    share_ranges(batch, 1 + FEW / (p.slots + 1), batch > 1 ? threads : 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e++) {
        const auto* matrix = static_cast<const decltype(zero)*>(values) + e * p.nnz;
        const Asymmetry found = batch > 1 ? asymmetry(p, hermitian, matrix, 0, p.slots)
                                          : asymmetry(dtype, p, hermitian, matrix, threads);
        if (!(found.difference > allowed * found.largest)) continue;
        int64_t seen = first;
        while (e < seen && !first.compare_exchange_weak(seen, e)) {}
      }
    });
  });
  return first == INT64_MAX ? -1 : first.load();
}

// Whether the values are Hermitian to rounding with a positive diagonal:
// a_ii > 0 and |a_ij - conj(a_ji)| <= tolerance * sqrt(a_ii a_jj). Stops at the first entry that is not.
template <class T>
inline bool positive_hermitian(const Pairs& p, double tolerance, const T* values) {
  auto diagonal = [&](int32_t i) -> double {
    int64_t s = p.diagonal[i];
    return s < 0 ? 0.0 : double(real(sum_entries(p.source, p.begin[2 * s], p.begin[2 * s + 1], values)));
  };
  for (int64_t i = 0; i < p.n; i++)
    if (!(diagonal(int32_t(i)) > 0)) return false;
  for (int64_t s = 0; s < p.slots; s++) {
    int64_t b = p.begin[2 * s], m = p.begin[2 * s + 1], e = p.begin[2 * s + 2];
    T lower = m > b ? sum_entries(p.source, b, m, values) : T(0);
    T upper = p.row[s] == p.column[s] ? lower : e > m ? sum_entries(p.source, m, e, values) : T(0);
    double d = abs(lower - conj(upper));
    if (d == 0) continue;
    double scale = sqrt(diagonal(p.row[s])) * sqrt(diagonal(p.column[s]));
    if (!(d <= tolerance * scale)) return false;
  }
  return true;
}

enum Mirror : int32_t { NONE = 0, TRANSPOSED = 1, CONJUGATED = 2 };

// a . conj(b)
template <class T>
inline T row_product(const T* a, const T* b, int64_t width) {
  T sum = a[0] * conj(b[0]);
  for (int64_t r = 1; r < width; r++) sum += a[r] * conj(b[r]);
  return sum;
}

// The gradient at the caller's entries, in the convention of the kind (the table in docs/architecture.md):
//   G(i, j) = -sum_r u[i, r] conj(w[j, r]);  out[k] = G(i, j), or weight * (G(i, j) + G(j, i) mirrored)
// with weight 1/2, and 1 off the diagonal where only one triangle is stored. For entries begin .. end.
template <class T>
inline void gather_outer(int64_t begin, int64_t end, const int32_t* row, const int32_t* column, Mirror mirror,
                         bool one_triangle, int64_t width, const T* u, const T* w, T* out) {
  auto gather = [=](auto product) {
    auto mirrored = [=](auto reflect) {
      for (int64_t k = begin; k < end; k++) {
        const int64_t i = row[k], j = column[k];
        const T sum = product(i, j) + reflect(product(j, i));
        out[k] = one_triangle && i != j ? -sum : Real<T>(-0.5) * sum;
      }
    };
    if (mirror == NONE)
      for (int64_t k = begin; k < end; k++) out[k] = -product(row[k], column[k]);
    else if (mirror == CONJUGATED)
      mirrored([](T other) { return conj(other); });
    else
      mirrored([](T other) { return other; });
  };
  if (width == 1)
    gather([=](int64_t i, int64_t j) { return u[i] * conj(w[j]); });
  else
    gather([=](int64_t i, int64_t j) { return row_product(u + i * width, w + j * width, width); });
}

// The same where both triangles are stored, pair by pair: down each column, and every product once for all its entries.
template <class T>
inline void gather_outer(const Pairs& p, int64_t begin, int64_t end, Mirror mirror, int64_t width, const T* u, const T* w,
                         T* out) {
  auto gather = [&](auto product, auto reflect) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t i = p.row[s], j = p.column[s];
      const T g = Real<T>(-0.5) * (product(i, j) + reflect(product(j, i))), mirrored = reflect(g);
      if (p.lower) {
        out[p.upper[s]] = mirrored;
        out[p.lower[s]] = g;
      } else {
        int64_t e = p.begin[2 * s];
        for (; e < p.begin[2 * s + 1]; e++) out[p.source[e]] = g;
        for (; e < p.begin[2 * s + 2]; e++) out[p.source[e]] = mirrored;
      }
    }
  };
  auto products = [&](auto reflect) {
    if (width == 1) gather([=](int64_t i, int64_t j) { return u[i] * conj(w[j]); }, reflect);
    else gather([=](int64_t i, int64_t j) { return row_product(u + i * width, w + j * width, width); }, reflect);
  };
  if (mirror == CONJUGATED) products([](T other) { return conj(other); });
  else products([](T other) { return other; });
}

// Either, for a batch of u [batch, m, width], w [batch, n, width] and out [batch, nnz].
inline void gather_outer(Dtype dtype, const Pairs* pairs, int64_t nnz, const int32_t* row, const int32_t* column,
                         Mirror mirror, bool one_triangle, int64_t batch, int64_t m, int64_t n, int64_t width, const void* u,
                         const void* w, void* out, int threads) {
  const int64_t items = pairs ? pairs->slots : nnz, size = std::max<int64_t>(1, FEW / width);
  const int64_t ranges = (items + size - 1) / size, together = std::max<int64_t>(1, size / std::max<int64_t>(1, items));
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    share_ranges(batch * ranges, together, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t e = i / ranges, begin = i % ranges * size, end = std::min(items, begin + size);
        const T *a = static_cast<const T*>(u) + e * m * width, *b = static_cast<const T*>(w) + e * n * width;
        T* to = static_cast<T*>(out) + e * nnz;
        if (pairs) gather_outer(*pairs, begin, end, mirror, width, a, b, to);
        else gather_outer(begin, end, row, column, mirror, one_triangle, width, a, b, to);
      }
    });
  });
}

// y += S x, or S^H x where adjoint, in the convention of the kind; x and y have `width` columns.
template <class T>
inline void apply_entries(int64_t nnz, const int32_t* row, const int32_t* column, Mirror mirror, bool one_triangle,
                          bool adjoint, int64_t width, const T* values, const T* x, T* y) {
  auto add = [=](int64_t i, int64_t j, T a) {
    T* to = y + i * width;
    const T* from = x + j * width;
    for (int64_t r = 0; r < width; r++) to[r] += a * from[r];
  };
  if (mirror == NONE) {
    for (int64_t k = 0; k < nnz; k++)
      if (adjoint)
        add(column[k], row[k], conj(values[k]));
      else
        add(row[k], column[k], values[k]);
    return;
  }
  for (int64_t k = 0; k < nnz; k++) {  // S^H is S where mirroring conjugates, else conj(S)
    int64_t i = row[k], j = column[k];
    T a = adjoint && mirror == TRANSPOSED ? conj(values[k]) : values[k];
    if (!one_triangle || i == j) a = Real<T>(0.5) * a;
    add(i, j, a);
    add(j, i, mirror == CONJUGATED ? conj(a) : a);
  }
}

}  // namespace spcache
