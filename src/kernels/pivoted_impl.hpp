// Trust in factors with pivots chosen inside of fronts: refinement, a probe of it, an estimate of the condition number.
#pragma once
#include <float.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "pivoted.hpp"
#include "refinement.hpp"
#include "tasks.hpp"
#include "threads.hpp"

namespace spcache {
namespace {

// Solves are refined unless pivots were stable and what was left of the matrix did not grow beyond this.
constexpr double GROWTH_GOOD = 8;
// Refinement ends at an error of so many eps: at GOOD at once, at ENOUGH where a step gains less than GAIN.
constexpr double GAIN = 0.3, GOOD = 2, ENOUGH = 32;
// Whether refinement succeeds is tried at once beyond this, times 1 / sqrt(eps); else solves will see.
constexpr double GROWTH_DOUBTFUL = 1e-3;
constexpr int MOST_STEPS = 12;
constexpr int64_t REFINED_TOGETHER = 16;  // right-hand sides, 8 of them in one pass over the matrix
constexpr int SCALINGS = 40;  // rounds at most
// A smallest pivot below this (double, entries being about 1) asks for an estimate of the condition number.
constexpr double WEAK_PIVOT = 1e-10, WEAK_PIVOT_SINGLE = 1e-5;

// As `share`, for work that may run out of memory.
template <class Work>
void share_or_throw(int64_t count, int threads, Work work) {
  std::atomic<bool> failed{false};
  share(count, threads, [&](int64_t i, int thread) {
    try {
      work(i, thread);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// Moves a scale factor, a power of two, half the way to where its row's or column's largest entry is 1. False where that
// is near enough, or nothing can be done.
inline bool balance(double& factor, double top, int limit) {
  if (!(top > 0 && top <= DBL_MAX) || (top >= 0.25 && top < 4)) return false;
  const int old = std::ilogb(factor), change = -std::ilogb(top) / 2;
  const int now = std::clamp(old + (change ? change : top < 1 ? 1 : -1), -limit, limit);
  factor = std::ldexp(1.0, now);
  return now != old;
}

// The size of residuals r [n], `ld` apart, of rows with sums of magnitudes `size` = |A| |x| + |b| and `row` = |A_i|; `top`
// is the largest |x|. Where that divisor is nothing but rounding, |A_i| |x| takes its place (M. Arioli, J. W. Demmel,
// I. S. Duff 1989, "Solving sparse linear systems with sparse backward error", doi:10.1137/0610013).
template <class T>
double worst_error(int64_t n, const T* r, const Real<T>* size, int64_t ld, const Real<T>* row, Real<T> top) {
  using R = Real<T>;
  constexpr R EPS = std::numeric_limits<R>::epsilon();
  double worst = 0;
  for (int64_t i = 0; i < n; i++) {
    const R error = part(r[i * ld]);
    if (error == 0) continue;
    const R other = row[i] * top;
    R divisor = size[i * ld];
    if (divisor < R(1000) * EPS * other) divisor += other;
    if (error <= std::numeric_limits<R>::max() && double(error) <= worst * double(divisor)) continue;
    const double ratio = double(error) / double(divisor);
    if (!(ratio <= DBL_MAX)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, ratio);
  }
  return worst;
}

// Factors of scaled matrices, which are kept as columns of a structure.
template <class T, class Base = PivotedFactors>
class PivotedOf : public Base {
 protected:
  using R = Real<T>;
  static constexpr double EPS = std::numeric_limits<R>::epsilon();
  using Base::failed, Base::refined, Base::reports, Base::verdict;

  const PivotedPlan& base;
  const std::vector<int64_t>& indptr;   // [n + 1]
  const std::vector<int32_t>& indices;  // [nnz]
  std::unique_ptr<T[]> A;               // [batch, nnz]

  PivotedOf(const PivotedPlan& plan, const std::vector<int64_t>& columns, const std::vector<int32_t>& rows, int64_t batch)
      : base(plan), indptr(columns), indices(rows), A(new T[batch * columns.back()]) {
    failed.assign(batch, 0);
    verdict.assign(batch, SINGULAR);
    reports.resize(batch);
    refined.assign(batch, 0);
  }
  int64_t n() const { return base.plan.n; }
  int64_t nnz() const { return indptr.back(); }
  int64_t stored() const { return base.plan.panel.back(); }
  int64_t batch() const { return int64_t(failed.size()); }

  // Scales the e-th matrix and factors it.
  virtual Report factor(int64_t e, const Schedule&, PivotedWorkspace&, int threads) = 0;
  // x = A^-1 b for the f-th scaled matrix as its factor has it, or A^-H b.
  virtual void direct(int64_t f, const T* b, T* x, int64_t width, bool adjoint, const Schedule&, PivotedWorkspace&,
                      int threads) const = 0;
  // What a stored entry (i, j) does in products with A or A^H: it stands at (i, j), it or its conjugate stands at (j, i).
  struct Sides { bool here, mirrored, conjugated; };
  virtual Sides sides(bool adjoint) const = 0;

  // The first column with an entry that is not finite, -1 where there is none.
  int64_t not_finite(const T* a) const {
    constexpr int64_t parts = sizeof(T) / sizeof(R);
    const R* x = reinterpret_cast<const R*>(a);
    if (all_finite(x, parts * nnz())) return -1;
    int64_t j = 0;
    while (all_finite(x + parts * indptr[j], parts * (indptr[j + 1] - indptr[j]))) j++;
    return j;
  }

  void factorize_all(const Assembly& assembly, const void* values, bool check, const Schedule& schedule,
                     PivotedWorkspace* const* work, int workspaces, int threads) {
    share_or_throw(batch(), workspaces, [&](int64_t e, int thread) {
      factorize(assembly, static_cast<const T*>(values) + e * assembly.nnz, check, e, schedule, *work[thread],
                workspaces > 1 ? 1 : threads);
    });
  }

  // Improves x, the solutions of A x = b with the scaled matrix. Returns the largest number of steps, ~ that where one of
  // the columns is not as good as it should be.
  int64_t refine(int64_t f, const T* b, T* x, int64_t width, bool adjoint, const Schedule& schedule,
                 PivotedWorkspace& work, int threads) const {
    const int lanes = width == 1 ? 1 : width <= 4 ? 4 : 8;
    const auto residual = lanes == 1 ? &PivotedOf::residual_of<1>
                          : lanes == 4 ? &PivotedOf::residual_of<4> : &PivotedOf::residual_of<8>;
    const int64_t most = std::min((width + lanes - 1) / lanes * lanes, REFINED_TOGETHER);
    T* const y = static_cast<T*>(
        work.buffer(PivotedWorkspace::REFINEMENT, n() * int64_t(most * (3 * sizeof(T) + sizeof(R)) + most / lanes * sizeof(R))));
    T *const d = y + n() * most, *const r = d + n() * most;
    R *const size = reinterpret_cast<R*>(r + n() * most), *const row = size + n() * most;
    double error[REFINED_TOGETHER], now[REFINED_TOGETHER];
    bool active[REFINED_TOGETHER], better[REFINED_TOGETHER], good = true;
    int64_t steps = 0;
    for (int64_t c = 0; c < width; c += most) {
      const int64_t count = std::min(width - c, most), ld = (count + lanes - 1) / lanes * lanes;
      auto residuals = [&](const T* of, double* errors) {
        share(ld / lanes, stored() < PARALLEL_SOLVE_FROM ? 1 : threads, [&](int64_t i, int) {
          const int64_t l = i * lanes, columns = std::min<int64_t>(count - l, lanes);
          (this->*residual)(f, b + c + l, width, columns, of + l, ld, adjoint, r + l, size + l, row + i * n(), errors + l);
        });
      };
      for (int64_t i = 0; i < n(); i++)
        for (int64_t l = 0; l < ld; l++) y[i * ld + l] = l < count ? x[i * width + c + l] : T(0);
      residuals(y, error);
      for (int64_t l = 0; l < ld; l++) active[l] = l < count && !(error[l] <= GOOD * EPS);
      for (int step = 1; step <= MOST_STEPS && std::find(active, active + ld, true) != active + ld; step++) {
        direct(f, r, d, ld, adjoint, schedule, work, threads);
        for (int64_t i = 0; i < n() * ld; i++) d[i] += y[i];
        residuals(d, now);
        for (int64_t l = 0; l < ld; l++) {
          better[l] = active[l] = active[l] && now[l] < error[l];
          if (!better[l]) continue;
          const bool slow = now[l] > GAIN * error[l], stalled = now[l] > 0.9 * error[l];
          active[l] = !(now[l] <= GOOD * EPS || stalled || (slow && now[l] <= ENOUGH * EPS));
          error[l] = now[l];
        }
        for (int64_t i = 0; i < n(); i++)
          for (int64_t l = 0; l < ld; l++)
            if (better[l]) y[i * ld + l] = d[i * ld + l];
        steps = std::max<int64_t>(steps, step);
      }
      for (int64_t i = 0; i < n(); i++)
        for (int64_t l = 0; l < count; l++) x[i * width + c + l] = y[i * ld + l];
      for (int64_t l = 0; l < count; l++) good &= error[l] <= ENOUGH * EPS;
    }
    return good ? steps : ~steps;
  }

 private:
  void factorize(const Assembly& assembly, const T* values, bool check, int64_t e, const Schedule& schedule,
                 PivotedWorkspace& work, int threads) {
    T* a = A.get() + e * nnz();
    memset(static_cast<void*>(a), 0, sizeof(T) * size_t(nnz()));
    assemble(assembly, 0, values, a);
    failed[e] = not_finite(a);
    verdict[e] = SINGULAR;
    refined[e] = 0;
    reports[e] = Report();
    if (failed[e] >= 0) return;
    Report& report = reports[e] = factor(e, schedule, work, threads);
    auto caller = [&](int32_t number) { return number < 0 ? 0 : int64_t(base.plan.perm[number]); };
    if (report.empty >= 0) {
      failed[e] = caller(report.empty);
      return;
    }
    if (!report.finite || !(report.growth <= std::numeric_limits<R>::max())) {
      failed[e] = caller(report.weak);
      verdict[e] = UNTRUSTED;
      return;
    }
    refined[e] = report.replaced || report.multiplier > 1.01 / STABLE || report.growth > GROWTH_GOOD;
    if (!check) return;
    const bool doubtful = report.replaced || report.growth > GROWTH_DOUBTFUL / std::sqrt(EPS);
    if (doubtful && probe(e, schedule, work, threads) < 0) {
      failed[e] = caller(report.weak);
      verdict[e] = UNTRUSTED;
    } else if (report.weakest < (sizeof(R) == 4 ? WEAK_PIVOT_SINGLE : WEAK_PIVOT)) {
      report.rcond = 1 / condition(e, schedule, work, threads);
      if (!(report.rcond >= EPS)) failed[e] = caller(report.weak);
    }
  }

  // r = b - A x of columns x [n, columns], A scaled, all arrays but b (`width`) and row [n] with rows `ld` apart and room
  // for LANES columns in each; their `worst_error`s.
  template <int LANES>
  void residual_of(int64_t f, const T* b, int64_t width, int64_t columns, const T* x, int64_t ld, bool adjoint, T* r, R* size,
                R* row, double* error) const {
    const T* const a = A.get() + f * nnz();
    const Sides side = sides(adjoint);
    R top[LANES] = {};
    for (int64_t i = 0; i < n(); i++) {
      row[i] = 0;
      for (int l = 0; l < LANES; l++) {
        const T v = l < columns ? b[i * width + l] : T(0);
        r[i * ld + l] = v;
        size[i * ld + l] = part(v);
        const R z = part(x[i * ld + l]);
        if (!(z <= top[l])) top[l] = z;
      }
    }
    for (int64_t j = 0; j < n(); j++) {
      T y[LANES], sum[LANES];
      R v[LANES], sizes[LANES], rows = 0;
      for (int l = 0; l < LANES; l++) {
        y[l] = x[j * ld + l];
        v[l] = part(y[l]);
        sum[l] = T(0);
        sizes[l] = 0;
      }
      for (int64_t e = indptr[j]; e < indptr[j + 1]; e++) {
        const int64_t i = indices[e];
        const R w = part(a[e]);
        if (side.here) {
          for (int l = 0; l < LANES; l++) {
            r[i * ld + l] -= a[e] * y[l];
            size[i * ld + l] += w * v[l];
          }
          row[i] += w;
          if (i == j) continue;
        }
        if (side.mirrored) {
          const T mirrored = side.conjugated ? conj(a[e]) : a[e];
          for (int l = 0; l < LANES; l++) {
            sum[l] += mirrored * x[i * ld + l];
            sizes[l] += w * part(x[i * ld + l]);
          }
          rows += w;
        }
      }
      for (int l = 0; l < LANES; l++) {
        r[j * ld + l] -= sum[l];
        size[j * ld + l] += sizes[l];
      }
      row[j] += rows;
    }
    for (int l = 0; l < columns; l++) error[l] = worst_error(n(), r + l, size + l, ld, row, top[l]);
  }

  // The 1-norm of the scaled matrix.
  double norm(int64_t e) const {
    const T* const a = A.get() + e * nnz();
    std::vector<double> sums(n(), 0);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t q = indptr[j]; q < indptr[j + 1]; q++) {
        const double v = double(abs(a[q]));
        sums[j] += v;
        if (sides(false).mirrored && indices[q] != j) sums[indices[q]] += v;
      }
    return *std::max_element(sums.begin(), sums.end());
  }

  T* probes(PivotedWorkspace& work) const {  // three vectors
    return static_cast<T*>(work.buffer(PivotedWorkspace::PROBE, 3 * n() * int64_t(sizeof(T))));
  }

  // Whether refinement leads to a small residual for a right-hand side that means nothing.
  int64_t probe(int64_t e, const Schedule& schedule, PivotedWorkspace& work, int threads) const {
    T *const b = probes(work), *const x = b + n();
    uint32_t state = 12345;
    for (int64_t i = 0; i < n(); i++) {
      state = state * 1664525u + 1013904223u;
      b[i] = T((state >> 31 ? R(1) : R(-1)) * (R(0.5) + R((state >> 8) & 0xffff) / R(65536)));
    }
    direct(e, b, x, 1, false, schedule, work, threads);
    return refine(e, b, x, 1, false, schedule, work, threads);
  }

  // Estimate of the condition number of the scaled matrix in the 1-norm (W. W. Hager 1984, doi:10.1137/0905023).
  double condition(int64_t e, const Schedule& schedule, PivotedWorkspace& work, int threads) const {
    auto sum = [&](const T* v) {
      double total = 0;
      for (int64_t i = 0; i < n(); i++) total += double(abs(v[i]));
      return total;
    };
    T *const x = probes(work), *const y = x + n(), *const z = y + n();
    std::fill(x, x + n(), T(R(1) / R(n())));
    double estimate = 0;
    int64_t last = -1;
    for (int round = 0; round < 5; round++) {
      direct(e, x, y, 1, false, schedule, work, threads);
      const double now = sum(y);
      if (!(now <= DBL_MAX)) return std::numeric_limits<double>::infinity();
      if (round && now <= estimate) break;
      estimate = now;
      for (int64_t i = 0; i < n(); i++) {
        const R v = abs(y[i]);
        x[i] = v > 0 ? (R(1) / v) * y[i] : T(R(1));
      }
      direct(e, x, z, 1, true, schedule, work, threads);
      int64_t at = 0;
      for (int64_t i = 1; i < n(); i++)
        if (abs(z[i]) > abs(z[at])) at = i;
      if (at == last) break;
      last = at;
      std::fill(x, x + n(), T(0));
      x[at] = T(R(1));
    }
    // A vector whose entries alternate in sign and grow, for matrices that deceive the above (N. J. Higham 1988).
    for (int64_t i = 0; i < n(); i++)
      x[i] = T(R((i % 2 ? -1.0 : 1.0) * (1 + double(i) / double(std::max<int64_t>(n() - 1, 1)))));
    direct(e, x, y, 1, false, schedule, work, threads);
    const double other = 2 * sum(y) / (3 * double(n()));
    return norm(e) * std::max(estimate, other);
  }
};

}  // namespace
}  // namespace spcache
