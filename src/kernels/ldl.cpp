#include "ldl.hpp"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

#include "pattern.hpp"
#include "tasks.hpp"

namespace spcache {
namespace {


// Solves are refined unless pivots were stable and what was left of the matrix did not grow beyond this.
constexpr double GROWTH_GOOD = 8;
// Whether refinement succeeds is tried at once beyond this, times 1 / sqrt(eps); else solves will see.
constexpr double GROWTH_DOUBTFUL = 1e-3;
// Refinement ends at an error of so many eps: at GOOD at once, at ENOUGH where a step gains less than GAIN.
constexpr double GAIN = 0.3, GOOD = 2, ENOUGH = 32;
constexpr int MOST_STEPS = 12;
// A smallest pivot below this (double, entries being about 1) asks for an estimate of the condition number.
constexpr double WEAK_PIVOT = 1e-10, WEAK_PIVOT_SINGLE = 1e-5;
constexpr int SCALINGS = 40;

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

template <class R> R part(R a) { return std::abs(a); }
// Of a positive finite number: it is at least 2 to this power, and less than twice that.
inline int32_t exponent(double a) {
  int64_t bits;
  memcpy(&bits, &a, sizeof bits);
  return int32_t(bits >> 52) - 1023;  // of subnormal numbers a little more than it should be
}
inline int32_t exponent(float a) { return exponent(double(a)); }

template <class R> R part(Complex<R> a) { return std::max(std::abs(a.re), std::abs(a.im)); }

}  // namespace

LdlPlan::LdlPlan(int32_t n, const int64_t* Ap, const int32_t* Ai, const int64_t* tree_indptr, const int32_t* tree_indices,
                 const int32_t* slots, const int32_t* perm)
    : plan(n, tree_indptr, tree_indices, perm), indptr(Ap, Ap + n + 1), begin(plan.supernodes + 1, 0),
      indices(Ai, Ai + Ap[n]), slot(Ap[n]), target(Ap[n]) {
  for (int64_t e = 0; e < Ap[n]; e++) begin[plan.supernode_of[slots[e]] + 1]++;
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin);
  for (int32_t e = 0; e < int32_t(Ap[n]); e++) {
    const int64_t to = next[plan.supernode_of[slots[e]]]++, at = plan.position_of[slots[e]];
    slot[to] = at < 0 ? ~e : e;
    target[to] = uint32_t(at < 0 ? ~at : at);
  }
}

int64_t LdlPlan::nbytes() const {
  return plan.nbytes() + 8 * int64_t(indptr.size() + begin.size()) + 12 * int64_t(slot.size());
}

int64_t LdlPlan::lift(const char* left_out, int steps, int32_t* order) const {
  std::vector<std::vector<int32_t>> more(plan.supernodes);
  int64_t moved = 0;
  int32_t count = 0;
  for (int32_t s = 0; s < plan.supernodes; s++) {
    int32_t to = s;
    for (int step = 0; step < steps && plan.parent[to] >= 0; step++) to = plan.parent[to];
    for (int32_t j = plan.first[s]; j < plan.first[s + 1]; j++) {
      const bool lifted = left_out[plan.perm[j]] && to != s;
      if (lifted) more[to].push_back(plan.perm[j]);
      else order[count++] = plan.perm[j];
      moved += lifted;
    }
    for (int32_t i : more[s]) order[count++] = i;
  }
  return moved;
}

void LdlWorkspace::Free::operator()(void* p) const { free(p); }

void* LdlWorkspace::allocate(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64 + 64;
  void* p = aligned_alloc(64, size_t(bytes));
  if (!p) throw std::bad_alloc();
  memory.emplace_back(p);
  nbytes += bytes;
  return p;
}

LdlWorkspace::LdlWorkspace(const LdlPlan& p, const Schedule& schedule, const IndefiniteKernels& kernels, int64_t itemsize,
                           int threads)
    : itemsize(itemsize), rows(p.plan.n + p.plan.row.back()), largest_front(p.plan.largest_front), solves(threads) {
  void* shared = allocate(schedule.shared_size * itemsize);
  queue = static_cast<int32_t*>(allocate(schedule.queue_size() * int64_t(sizeof(int32_t))));
  for (int t = 0; t < threads; t++) {
    void *own = allocate(schedule.own_size * itemsize), *pack = allocate(kernels.work_size(p.plan.largest_front) * itemsize);
    scratch.push_back({own, shared, pack, schedule.update.data(), queue});
  }
}

void LdlWorkspace::reserve(int64_t more) {
  if (more <= lanes) return;
  void* local = allocate(rows * more * itemsize);
  for (SolveScratch& solve : solves) solve = {local, allocate(largest_front * more * itemsize)};
  lanes = more;
}

namespace {

template <class T>
class LdlFactorsOf final : public LdlFactors {
  using R = Real<T>;
  static constexpr double EPS = std::numeric_limits<R>::epsilon();
  static constexpr bool complex = sizeof(T) != sizeof(R);

  const LdlPlan& plan;
  const Tree tree;
  const IndefiniteKernels* const both[2];  // [hermitian]
  bool hermitian = false;
  std::unique_ptr<T[]> A, panels;  // [batch, nnz], [batch, stored]
  std::vector<int32_t> order;      // [batch, n]
  std::vector<R> scale;            // [batch, n]

  int64_t n() const { return plan.plan.n; }
  int64_t nnz() const { return int64_t(plan.indices.size()); }
  int64_t stored() const { return plan.plan.panel.back(); }
  T mirrored(T a) const { return hermitian ? conj(a) : a; }
  Indefinite matrix(int64_t e) const {
    return {A.get() + e * nnz(), panels.get() + e * stored(), const_cast<int32_t*>(order.data()) + e * n(), false};
  }

 public:
  LdlFactorsOf(const LdlPlan& p, int64_t batch, const IndefiniteKernels* symmetric, const IndefiniteKernels* herm)
      : plan(p), tree(p.plan.tree()), both{symmetric, herm}, A(new T[batch * nnz()]), panels(new T[batch * stored()]),
        order(batch * n()), scale(batch * n()) {
    failed.assign(batch, 0);
    verdict.assign(batch, SINGULAR);
    reports.resize(batch);
    refined.assign(batch, 0);
  }

  const IndefiniteKernels& kernels() const override { return *both[0]; }
  int64_t nbytes() const override {
    return int64_t(failed.size()) * ((nnz() + stored()) * int64_t(sizeof(T)) + n() * int64_t(4 + sizeof(R)));
  }

  void factorize(const Assembly& assembly, const void* values, bool check, const Schedule& schedule,
                 LdlWorkspace* const* work, int workspaces, int threads) override {
    hermitian = complex && assembly.hermitian;
    share_or_throw(int64_t(failed.size()), workspaces, [&](int64_t e, int thread) {
      factorize(assembly, static_cast<const T*>(values) + e * assembly.nnz, check, e, schedule, *work[thread],
                workspaces > 1 ? 1 : threads);
    });
  }

  bool trial(const Assembly& assembly, const void* values, const Schedule& schedule, LdlWorkspace& work,
             char* left_out) override {
    hermitian = complex && assembly.hermitian;
    failed[0] = 0;
    memset(static_cast<void*>(A.get()), 0, sizeof(T) * size_t(nnz()));
    assemble(assembly, 0, static_cast<const T*>(values), A.get());
    if (not_finite(A.get()) >= 0) return false;
    equilibrate(A.get(), scale.data());
    Indefinite f = matrix(0);
    f.trial = true;
    factor(f, schedule, work, 1);
    for (int32_t s = 0; s < tree.supernodes; s++) {
      const int64_t first = tree.first[s], k = tree.first[s + 1] - first, m = k + tree.row[s + 1] - tree.row[s];
      for (int64_t j = 0; j < k; j++) {
        const int32_t o = order[first + j];
        const T d = panels[tree.panel[s] + j + j * m];
        left_out[tree.perm[first + (o < 0 ? ~o : o)]] = o >= 0 && part(d) == 0;
      }
    }
    return true;
  }

  int64_t solve(int64_t f, const void* b, void* x, int64_t width, bool adjoint, const Schedule& schedule,
                LdlWorkspace& work, int threads) const override {
    const R* s = scale.data() + f * n();
    const T* from = static_cast<const T*>(b);
    T* to = static_cast<T*>(x);
    const bool conjugate = complex && adjoint && !hermitian;  // A^-H b is the conjugate of A^-1 conj(b)
    std::vector<T> rhs(n() * width);
    for (int64_t i = 0; i < n(); i++)
      for (int64_t r = 0; r < width; r++) {
        const T v = s[i] * from[i * width + r];
        rhs[i * width + r] = conjugate ? conj(v) : v;
      }
    direct(f, rhs.data(), to, width, schedule, work, threads);
    const int64_t steps = refined[f] ? refine(f, rhs.data(), to, width, schedule, work, threads) : 0;
    for (int64_t i = 0; i < n(); i++)
      for (int64_t r = 0; r < width; r++) {
        const T v = s[i] * to[i * width + r];
        to[i * width + r] = conjugate ? conj(v) : v;
      }
    return steps;
  }

 private:
  void factorize(const Assembly& assembly, const T* values, bool check, int64_t e, const Schedule& schedule,
                 LdlWorkspace& work, int threads) {
    T* a = A.get() + e * nnz();
    memset(static_cast<void*>(a), 0, sizeof(T) * size_t(nnz()));
    assemble(assembly, 0, values, a);
    failed[e] = not_finite(a);
    verdict[e] = SINGULAR;
    refined[e] = 0;
    reports[e] = Report();
    if (failed[e] >= 0) return;
    equilibrate(a, scale.data() + e * n());
    Report& report = reports[e] = factor(matrix(e), schedule, work, threads);
    auto caller = [&](int32_t number) { return number < 0 ? 0 : int64_t(plan.plan.perm[number]); };
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
    } else if (report.weakest < (sizeof(R) == 4 ? WEAK_PIVOT_SINGLE : WEAK_PIVOT) &&
               !(condition(e, schedule, work, threads) <= 1 / EPS)) {
      failed[e] = caller(report.weak);
    }
  }

  // The first column with an entry that is not finite, -1 where there is none.
  int64_t not_finite(const T* a) const {
    constexpr int64_t parts = sizeof(T) / sizeof(R);
    const R* x = reinterpret_cast<const R*>(a);
    if (all_finite(x, parts * nnz())) return -1;
    int64_t j = 0;
    while (all_finite(x + parts * plan.indptr[j], parts * (plan.indptr[j + 1] - plan.indptr[j]))) j++;
    return j;
  }

  // S, and S A S for A. Powers of two need the exponents of the entries only.
  void equilibrate(T* a, R* s) const {
    const int64_t* p = plan.indptr.data();
    const int32_t* row = plan.indices.data();
    constexpr int32_t LIMIT = sizeof(R) == 4 ? 60 : 500, NONE = -100000;
    std::vector<int32_t> entry(nnz()), factor(n(), 0), top(n());
    for (int64_t e = 0; e < nnz(); e++) {
      const R v = part(a[e]);
      entry[e] = v > 0 ? exponent(v) : NONE;
    }
    for (int round = 0; round < SCALINGS; round++) {
      std::fill(top.begin(), top.end(), NONE);
      for (int64_t j = 0; j < n(); j++) {
        int32_t most = NONE;
        const int32_t own = factor[j];
        for (int64_t e = p[j]; e < p[j + 1]; e++) {
          const int32_t i = row[e], v = entry[e] + own + factor[i];
          most = std::max(most, v);
          top[i] = std::max(top[i], v);
        }
        top[j] = std::max(top[j], most);
      }
      bool done = true;
      for (int64_t i = 0; i < n(); i++) {
        if (top[i] < NONE / 2 || (top[i] >= -2 && top[i] <= 1)) continue;  // empty, or from 1/4 on and below 4
        const int32_t half = -top[i] / 2, change = half ? half : top[i] < 0 ? 1 : -1;
        const int32_t now = std::clamp(factor[i] + change, -LIMIT, LIMIT);
        done &= now == factor[i];
        factor[i] = now;
      }
      if (done) break;
    }
    for (int64_t i = 0; i < n(); i++) s[i] = std::ldexp(R(1), factor[i]);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t e = p[j]; e < p[j + 1]; e++) a[e] = s[row[e]] * (s[j] * a[e]);
  }

  Report factor(const Indefinite& f, const Schedule& schedule, LdlWorkspace& work, int threads) const {
    const Scatter scatter{plan.begin.data(), plan.slot.data(), plan.target.data()};
    const IndefiniteKernels& k = *both[hermitian];
    std::vector<Report> reports(threads);
    const Crew crew(threads);
    run_tasks(schedule, false, work.queue, crew, [&](int32_t i, int thread) {
      const Schedule::Task& task = schedule.tasks[i];
      k.factorize(tree, scatter, f, task.begin, task.end, work.scratch[thread], reports[thread]);
    });
    for (int32_t s : schedule.top) together(k, scatter, f, s, work.scratch[0], reports[0], crew);
    for (int t = 1; t < threads; t++) reports[0].merge(reports[t]);
    return reports[0];
  }

  // One front, by all threads.
  void together(const IndefiniteKernels& kernels, const Scatter& scatter, const Indefinite& f, int32_t s,
                const Scratch& scratch, Report& report, const Crew& crew) const {
    const int64_t k = tree.first[s + 1] - tree.first[s], u = tree.row[s + 1] - tree.row[s], m = k + u;
    const int64_t piece = kernels.share;
    if (crew.size() == 1 || !piece || m < SHARE_FROM)
      return kernels.factorize(tree, scatter, f, s, s + 1, scratch, report);
    Window w;
    auto share = [&](Part what, int64_t count, int64_t size) {
      crew.share((count + size - 1) / size, [&](int64_t i, int) {
        kernels.part(what, tree, f, s, w, i * size, std::min((i + 1) * size, count), scratch, report);
      });
    };
    share(BEGIN_PANEL, k, piece / 5);
    kernels.assemble(tree, scatter, f, s);
    while (w.j < k) {
      kernels.part(PIVOTS, tree, f, s, w, 0, 0, scratch, report);
      if (w.j == w.J) continue;
      share(PACK_PANEL, w.end < k ? m - w.end : 0, piece);
      share(UPDATE_PANEL, k - w.end, piece / 5);
      share(PACK_REST, u, piece);
      share(UPDATE_REST, u, piece / 5);
    }
    share(FINISH_REST, u, piece / 5);
  }

  // x = (S A S)^-1 b as the factor has it.
  void direct(int64_t f, const T* b, T* x, int64_t width, const Schedule& schedule, LdlWorkspace& work, int threads) const {
    if (stored() < PARALLEL_SOLVE_FROM) threads = 1;
    const Indefinite m = matrix(f);
    const IndefiniteKernels& k = *both[hermitian];
    work.reserve(width == 1 ? 1 : k.lanes);
    const Crew crew(threads);
    Rhs rhs{b, x, width, 0, 0};
    for (; rhs.offset < width; rhs.offset += rhs.count) {
      rhs.count = std::min<int64_t>(width - rhs.offset, k.lanes);
      auto tasks = [&](bool downwards) {
        run_tasks(schedule, downwards, work.queue, crew, [&](int32_t i, int thread) {
          const Schedule::Task& task = schedule.tasks[i];
          k.solve(tree, m, rhs, downwards, task.begin, task.end, work.solves[thread]);
        });
      };
      tasks(false);
      for (int32_t s : schedule.top) k.solve(tree, m, rhs, false, s, s + 1, work.solves[0]);
      for (auto s = schedule.top.rbegin(); s != schedule.top.rend(); ++s)
        k.solve(tree, m, rhs, true, *s, *s + 1, work.solves[0]);
      tasks(true);
    }
  }

  // r = b - S A S x for column c of [n, width]. Returns the largest |r_i| / (|A| |x| + |b|)_i; where that divisor is
  // nothing but rounding, |A_i| |x| takes its place (M. Arioli, J. W. Demmel, I. S. Duff 1989, "Solving sparse linear
  // systems with sparse backward error", doi:10.1137/0610013).
  double residual(int64_t f, const T* b, const T* x, int64_t width, int64_t c, T* r, R* size, R* row) const {
    const T* a = A.get() + f * nnz();
    const int64_t* p = plan.indptr.data();
    R top = 0;
    for (int64_t i = 0; i < n(); i++) {
      r[i] = b[i * width + c];
      size[i] = part(r[i]);
      row[i] = 0;
      const R v = part(x[i * width + c]);
      if (!(v <= top)) top = v;
    }
    for (int64_t j = 0; j < n(); j++) {
      const T y = x[j * width + c];
      const R v = part(y);
      T sum = T(0);
      R sizes = 0, rows = 0;
      for (int64_t e = p[j]; e < p[j + 1]; e++) {
        const int64_t i = plan.indices[e];
        const R w = part(a[e]);
        r[i] -= a[e] * y;
        size[i] += w * v;
        row[i] += w;
        if (i == j) continue;
        const T z = x[i * width + c];
        sum += mirrored(a[e]) * z;
        sizes += w * part(z);
        rows += w;
      }
      r[j] -= sum;
      size[j] += sizes;
      row[j] += rows;
    }
    double worst = 0;
    for (int64_t i = 0; i < n(); i++) {
      const R error = part(r[i]);
      if (error == 0) continue;
      const R other = row[i] * top;
      R divisor = size[i];
      if (divisor < R(1000) * R(EPS) * other) divisor += other;
      const double ratio = double(error) / double(divisor);
      worst = ratio <= worst ? worst : ratio;
    }
    return worst;
  }

  // Improves x, the solutions of S A S x = b. Returns the largest number of steps, ~ that where one of the columns is
  // not as good as it should be.
  int64_t refine(int64_t f, const T* b, T* x, int64_t width, const Schedule& schedule, LdlWorkspace& work,
                 int threads) const {
    std::vector<T> r(n()), d(n()), best(n());
    std::vector<R> size(n()), row(n());
    int64_t most = 0;
    bool good = true;
    for (int64_t c = 0; c < width; c++) {
      double error = residual(f, b, x, width, c, r.data(), size.data(), row.data());
      int64_t steps = 0;
      while (!(error <= GOOD * EPS) && steps < MOST_STEPS) {
        for (int64_t i = 0; i < n(); i++) best[i] = x[i * width + c];
        direct(f, r.data(), d.data(), 1, schedule, work, threads);
        for (int64_t i = 0; i < n(); i++) x[i * width + c] += d[i];
        steps++;
        const double now = residual(f, b, x, width, c, r.data(), size.data(), row.data());
        if (!(now < error)) {
          for (int64_t i = 0; i < n(); i++) x[i * width + c] = best[i];
          break;
        }
        const bool slow = now > GAIN * error, stalled = now > 0.9 * error;
        error = now;
        if (stalled || (slow && error <= ENOUGH * EPS)) break;
      }
      good &= error <= ENOUGH * EPS;
      most = std::max(most, steps);
    }
    return good ? most : ~most;
  }

  // Whether refinement leads to a small residual for a right-hand side that means nothing.
  int64_t probe(int64_t e, const Schedule& schedule, LdlWorkspace& work, int threads) const {
    std::vector<T> b(n()), x(n());
    uint32_t state = 12345;
    for (T& v : b) {
      state = state * 1664525u + 1013904223u;
      v = T((state >> 31 ? R(1) : R(-1)) * (R(0.5) + R((state >> 8) & 0xffff) / R(65536)));
    }
    direct(e, b.data(), x.data(), 1, schedule, work, threads);
    return refine(e, b.data(), x.data(), 1, schedule, work, threads);
  }

  // Estimate of the condition number of S A S in the 1-norm (W. W. Hager 1984, doi:10.1137/0905023).
  double condition(int64_t e, const Schedule& schedule, LdlWorkspace& work, int threads) const {
    const T* a = A.get() + e * nnz();
    std::vector<double> sums(n(), 0);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t q = plan.indptr[j]; q < plan.indptr[j + 1]; q++) {
        const double v = double(abs(a[q]));
        sums[j] += v;
        if (plan.indices[q] != j) sums[plan.indices[q]] += v;
      }
    auto norm = [](const std::vector<T>& v) {
      double total = 0;
      for (const T& z : v) total += double(abs(z));
      return total;
    };
    std::vector<T> x(n(), T(R(1) / R(n()))), y(n()), z(n());
    double estimate = 0;
    int64_t last = -1;
    for (int round = 0; round < 5; round++) {
      direct(e, x.data(), y.data(), 1, schedule, work, threads);
      const double now = norm(y);
      if (!(now <= DBL_MAX)) return std::numeric_limits<double>::infinity();
      if (round && now <= estimate) break;
      estimate = now;
      for (int64_t i = 0; i < n(); i++) {
        const R v = abs(y[i]);
        x[i] = v > 0 ? (R(1) / v) * y[i] : T(R(1));
        if (!hermitian) x[i] = conj(x[i]);  // A^-H x by A^-1 conj(x)
      }
      direct(e, x.data(), z.data(), 1, schedule, work, threads);
      int64_t at = 0;
      for (int64_t i = 1; i < n(); i++)
        if (abs(z[i]) > abs(z[at])) at = i;
      if (at == last) break;
      last = at;
      std::fill(x.begin(), x.end(), T(0));
      x[at] = T(R(1));
    }
    // A vector whose entries alternate in sign and grow, for matrices that deceive the above (N. J. Higham 1988).
    for (int64_t i = 0; i < n(); i++)
      x[i] = T(R((i % 2 ? -1.0 : 1.0) * (1 + double(i) / double(std::max<int64_t>(n() - 1, 1)))));
    direct(e, x.data(), y.data(), 1, schedule, work, threads);
    const double other = 2 * norm(y) / (3 * double(n()));
    return *std::max_element(sums.begin(), sums.end()) * std::max(estimate, other);
  }
};

}  // namespace

LdlFactors* ldl_factors(const LdlPlan& plan, Dtype dtype, int64_t batch, const IndefiniteKernels* symmetric,
                        const IndefiniteKernels* hermitian) {
  switch (dtype) {
    case FLOAT32: return new LdlFactorsOf<float>(plan, batch, symmetric, hermitian);
    case FLOAT64: return new LdlFactorsOf<double>(plan, batch, symmetric, hermitian);
    case COMPLEX64: return new LdlFactorsOf<Complex<float>>(plan, batch, symmetric, hermitian);
    default: return new LdlFactorsOf<Complex<double>>(plan, batch, symmetric, hermitian);
  }
}

int64_t ldl_solve(const LdlFactors& factors, const void* b, void* x, int64_t count, int64_t stride, int64_t width,
                  const int64_t* select, bool adjoint, const Schedule& schedule, LdlWorkspace* const* work, int workspaces,
                  int threads) {
  std::atomic<int64_t> most{0};
  std::atomic<bool> good{true};
  share_or_throw(count, workspaces, [&](int64_t p, int thread) {
    const int64_t f = select ? select[p] : factors.failed.size() == 1 ? 0 : p;
    char* to = static_cast<char*>(x) + p * stride;
    if (factors.failed[f] >= 0) {
      memset(to, 0xff, size_t(stride));  // a NaN in every scalar type
      return;
    }
    int64_t steps = factors.solve(f, static_cast<const char*>(b) + p * stride, to, width, adjoint, schedule, *work[thread],
                                  workspaces > 1 ? 1 : threads);
    if (steps < 0) good = false, steps = ~steps;
    for (int64_t seen = most; seen < steps && !most.compare_exchange_weak(seen, steps);) {}
  });
  return good ? int64_t(most) : ~int64_t(most);
}

void ldl_magnitudes(const Assembly& assembly, Dtype dtype, const void* values, int64_t slots, double* out) {
  auto run = [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    std::vector<T> a(slots, T(0));
    assemble(assembly, 0, typed, a.data());
    for (int64_t e = 0; e < slots; e++) out[e] = double(part(a[e]));
  };
  switch (dtype) {
    case FLOAT32: return run(static_cast<const float*>(values));
    case FLOAT64: return run(static_cast<const double*>(values));
    case COMPLEX64: return run(static_cast<const Complex<float>*>(values));
    default: return run(static_cast<const Complex<double>*>(values));
  }
}

}  // namespace spcache
