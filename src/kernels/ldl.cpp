#include "ldl.hpp"

#include <float.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pivoted_impl.hpp"
#include "tasks.hpp"

namespace spcache {
LdlPlan::LdlPlan(int32_t n, const int64_t* Ap, const int32_t* Ai, const int64_t* tree_indptr, const int32_t* tree_indices,
                 const int32_t* slots, const int32_t* perm)
    : PivotedPlan(Plan(n, tree_indptr, tree_indices, perm)), indptr(Ap, Ap + n + 1), begin(plan.supernodes + 1, 0),
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

LdlWorkspace::LdlWorkspace(const LdlPlan& p, const Schedule& schedule, const IndefiniteKernels& kernels, int64_t itemsize,
                           int threads) {
  const int64_t lanes = kernels.lanes * itemsize;
  void *shared = allocate(schedule.shared_size * itemsize), *x = allocate(p.plan.n * lanes),
       *passed = allocate(p.plan.row.back() * lanes);
  queue = static_cast<int32_t*>(allocate(schedule.queue_size() * int64_t(sizeof(int32_t))));
  for (int t = 0; t < threads; t++) {
    void *own = allocate(schedule.own_size * itemsize), *pack = allocate(kernels.work_size(p.plan.largest_front) * itemsize);
    scratch.push_back({own, shared, pack, schedule.update.data(), queue});
    solves.push_back({x, passed, allocate(2 * p.plan.largest_front * lanes)});
  }
}

namespace {

template <class T>
class LdlFactorsOf final : public PivotedOf<T> {
  using Base = PivotedOf<T>;
  using typename Base::R;
  using Base::A, Base::n, Base::nnz, Base::stored, Base::refined;
  static constexpr bool complex = sizeof(T) != sizeof(R);

  const LdlPlan& plan;
  const Tree tree;
  const IndefiniteKernels* const both[2];  // [hermitian]
  bool hermitian = false;
  std::unique_ptr<T[]> panels;  // [batch, stored]
  std::vector<int32_t> order;   // [batch, n]
  std::vector<R> scale;         // [batch, n]

  T mirrored(T a) const { return hermitian ? conj(a) : a; }
  Indefinite matrix(int64_t e) const {
    return {A.get() + e * nnz(), panels.get() + e * stored(), const_cast<int32_t*>(order.data()) + e * n()};
  }

 public:
  LdlFactorsOf(const LdlPlan& p, int64_t batch, const IndefiniteKernels* symmetric, const IndefiniteKernels* herm)
      : Base(p, p.indptr, batch), plan(p), tree(p.plan.tree()), both{symmetric, herm}, panels(new T[batch * stored()]),
        order(batch * n()), scale(batch * n()) {}

  PivotedWorkspace* workspace(const Schedule& schedule, int threads) const override {
    return new LdlWorkspace(plan, schedule, *both[0], sizeof(T), threads);
  }
  int64_t nbytes() const override {
    return this->batch() * ((nnz() + stored()) * int64_t(sizeof(T)) + n() * int64_t(4 + sizeof(R)));
  }

  void factorize(const Assembly& assembly, const void* values, bool check, const Schedule& schedule,
                 PivotedWorkspace* const* work, int workspaces, int threads) override {
    hermitian = complex && assembly.hermitian;
    this->factorize_all(assembly, values, check, schedule, work, workspaces, threads);
  }

  int64_t solve(int64_t f, const void* b, void* x, int64_t width, bool adjoint, const Schedule& schedule,
                PivotedWorkspace& work, int threads) const override {
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
    direct(f, rhs.data(), to, width, false, schedule, work, threads);
    const int64_t steps = refined[f] ? this->refine(f, rhs.data(), to, width, false, schedule, work, threads) : 0;
    for (int64_t i = 0; i < n(); i++)
      for (int64_t r = 0; r < width; r++) {
        const T v = s[i] * to[i * width + r];
        to[i * width + r] = conjugate ? conj(v) : v;
      }
    return steps;
  }

 private:
  // S, and S A S for A. Exponents are found in double, whose range holds all products.
  void equilibrate(T* a, R* s) const {
    const int64_t* p = plan.indptr.data();
    const int32_t* row = plan.indices.data();
    constexpr int LIMIT = sizeof(R) == 4 ? 60 : 500;
    std::vector<double> factor(n(), 1), top(n());
    for (int round = 0; round < SCALINGS; round++) {
      std::fill(top.begin(), top.end(), 0.0);
      for (int64_t j = 0; j < n(); j++) {
        double most = 0;
        const double own = factor[j];
        for (int64_t e = p[j]; e < p[j + 1]; e++) {
          const int32_t i = row[e];
          const double v = double(part(a[e])) * own * factor[i];
          most = v > most ? v : most;
          top[i] = v > top[i] ? v : top[i];
        }
        top[j] = most > top[j] ? most : top[j];
      }
      bool done = true;
      for (int64_t i = 0; i < n(); i++) done &= !balance(factor[i], top[i], LIMIT);
      if (done) break;
    }
    for (int64_t i = 0; i < n(); i++) s[i] = R(factor[i]);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t e = p[j]; e < p[j + 1]; e++) a[e] = s[row[e]] * (s[j] * a[e]);
  }

  Report factor(int64_t e, const Schedule& schedule, PivotedWorkspace& memory, int threads) override {
    equilibrate(A.get() + e * nnz(), scale.data() + e * n());
    auto& work = static_cast<LdlWorkspace&>(memory);
    const Indefinite f = matrix(e);
    const Scatter scatter{plan.begin.data(), plan.slot.data(), plan.target.data()};
    const IndefiniteKernels& k = *both[hermitian];
    std::vector<Report> reports(threads);
    run_tasks(schedule, false, work.queue, Crew(threads), [&](int32_t i, int thread) {
      const Schedule::Task& task = schedule.tasks[i];
      k.factorize(tree, scatter, f, task.begin, task.end, work.scratch[thread], reports[thread]);
    });
    for (int32_t s : schedule.top) k.factorize(tree, scatter, f, s, s + 1, work.scratch[0], reports[0]);
    for (int t = 1; t < threads; t++) reports[0].merge(reports[t]);
    return reports[0];
  }

  void direct(int64_t f, const T* b, T* x, int64_t width, bool adjoint, const Schedule& schedule, PivotedWorkspace& memory,
              int threads) const override {
    if (complex && adjoint && !hermitian) {
      std::vector<T> conjugate(b, b + n() * width);
      for (T& v : conjugate) v = conj(v);
      direct(f, conjugate.data(), x, width, false, schedule, memory, threads);
      for (int64_t i = 0; i < n() * width; i++) x[i] = conj(x[i]);
      return;
    }
    auto& work = static_cast<LdlWorkspace&>(memory);
    if (stored() < PARALLEL_SOLVE_FROM) threads = 1;
    const Indefinite m = matrix(f);
    const IndefiniteKernels& k = *both[hermitian];
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

  double residual(int64_t f, const T* b, const T* x, int64_t width, int64_t c, bool, T* r, R* size,
                  R* row) const override {
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
    return worst_error(n(), r, size, row, top);
  }

  double norm(int64_t e) const override {
    const T* a = A.get() + e * nnz();
    std::vector<double> sums(n(), 0);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t q = plan.indptr[j]; q < plan.indptr[j + 1]; q++) {
        const double v = double(abs(a[q]));
        sums[j] += v;
        if (plan.indices[q] != j) sums[plan.indices[q]] += v;
      }
    return *std::max_element(sums.begin(), sums.end());
  }
};

}  // namespace

PivotedFactors* ldl_factors(const LdlPlan& plan, Dtype dtype, int64_t batch, const IndefiniteKernels* symmetric,
                            const IndefiniteKernels* hermitian) {
  switch (dtype) {
    case FLOAT32: return new LdlFactorsOf<float>(plan, batch, symmetric, hermitian);
    case FLOAT64: return new LdlFactorsOf<double>(plan, batch, symmetric, hermitian);
    case COMPLEX64: return new LdlFactorsOf<Complex<float>>(plan, batch, symmetric, hermitian);
    default: return new LdlFactorsOf<Complex<double>>(plan, batch, symmetric, hermitian);
  }
}

}  // namespace spcache
