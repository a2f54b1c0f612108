#include "lu.hpp"

#include <float.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pivoted_impl.hpp"
#include "tasks.hpp"

namespace spcache {
namespace {

// A matrix is scaled where rows and columns differ by more than this, or its entries from 1 by more than FAR.
constexpr double UNEVEN = 256, FAR_FROM_ONE = 1e6;

// For `threads` threads.
struct LuWorkspace final : PivotedWorkspace {
  LuWorkspace(const LuPlan& p, const Schedule& schedule, const UnsymmetricKernels& kernels, int64_t itemsize, int threads) {
    void* shared[2];
    for (void*& each : shared) each = allocate(schedule.shared_size * itemsize);
    queue = static_cast<int32_t*>(allocate(schedule.queue_size() * int64_t(sizeof(int32_t))));
    for (int t = 0; t < threads; t++) {
      void* pack = allocate(kernels.work_size(p.plan.largest_front) * itemsize);
      for (void* each : shared)
        scratch.push_back({allocate(schedule.own_size * itemsize), each, pack, schedule.update.data(), queue});
    }
  }
  std::vector<Scratch> scratch;  // [threads, 2]
  int32_t* queue;                // [Schedule::queue_size()]
};

template <class T>
class LuFactorsOf final : public PivotedOf<T> {
  using Base = PivotedOf<T>;
  using typename Base::R;
  using Base::A, Base::n, Base::nnz, Base::stored, Base::refined, Base::reports;

  const LuPlan& plan;
  const UnsymmetricKernels& kernels;
  const Kernels& solving;
  std::unique_ptr<T[]> lower, upper;   // [batch, stored]
  std::vector<int32_t> rows, columns;  // [batch, n]
  std::vector<R> scale;                // [batch, 2, n] of rows, of columns
  std::vector<char> scaled;            // [batch] 0: these are all 1

 public:
  LuFactorsOf(const LuPlan& p, int64_t batch, const UnsymmetricKernels& k, const Kernels& s)
      : Base(p, p.indptr, p.indices, batch), plan(p), kernels(k), solving(s), lower(new T[batch * stored()]),
        upper(new T[batch * stored()]), rows(batch * n()), columns(batch * n()), scale(2 * batch * n()), scaled(batch, 0) {}

  PivotedWorkspace* workspace(const Schedule& schedule, int threads) const override {
    return new LuWorkspace(plan, schedule, kernels, sizeof(T), threads);
  }
  int64_t nbytes() const override {
    return this->batch() * ((nnz() + 2 * stored()) * int64_t(sizeof(T)) + n() * int64_t(8 + 2 * sizeof(R)));
  }

  void factorize(const Assembly& assembly, const void* values, bool check, const Schedule& schedule,
                 PivotedWorkspace* const* work, int workspaces, int threads) override {
    this->factorize_all(assembly, values, check, schedule, work, workspaces, threads);
  }

  int64_t solve(int64_t f, const void* b, void* x, int64_t width, bool adjoint, const Schedule& schedule,
                PivotedWorkspace& work, int threads) const override {
    const T* from = static_cast<const T*>(b);
    T* to = static_cast<T*>(x);
    if (scaled[f]) {
      const R* r = scales(f, adjoint);
      T* rhs = static_cast<T*>(work.buffer(PivotedWorkspace::RHS, n() * width * int64_t(sizeof(T))));
      for (int64_t i = 0; i < n(); i++)
        for (int64_t c = 0; c < width; c++) rhs[i * width + c] = r[i] * from[i * width + c];
      from = rhs;
    }
    direct(f, from, to, width, adjoint, schedule, work, threads);
    const int64_t steps = refined[f] ? this->refine(f, from, to, width, adjoint, schedule, work, threads) : 0;
    if (scaled[f]) {
      const R* r = scales(f, !adjoint);
      for (int64_t i = 0; i < n(); i++)
        for (int64_t c = 0; c < width; c++) to[i * width + c] = r[i] * to[i * width + c];
    }
    return steps;
  }

 private:
  typename Base::Sides sides(bool adjoint) const override { return {!adjoint, adjoint, true}; }
  const R* scales(int64_t e, bool of_columns) const { return scale.data() + (2 * e + of_columns) * n(); }

  Report factor(int64_t e, const Schedule& schedule, PivotedWorkspace& memory, int threads) override {
    auto& work = static_cast<LuWorkspace&>(memory);
    const double top = equilibrate(e, work);
    const Unsymmetric f{A.get() + e * nnz(), lower.get() + e * stored(), upper.get() + e * stored(), rows.data() + e * n(),
                        columns.data() + e * n()};
    const Scatter scatter{plan.begin.data(), plan.slot.data(), plan.target.data()};
    const Tree tree = plan.plan.tree();
    std::vector<Report> found(threads);
    const Crew crew(threads);
    run_tasks(schedule, false, work.queue, crew, [&](int32_t i, int thread) {
      const Schedule::Task& task = schedule.tasks[i];
      kernels.factorize(tree, scatter, f, task.begin, task.end, &work.scratch[2 * thread], found[thread], nullptr);
    });
    const Sharing all{[](const void* who, int64_t count, void (*piece)(void*, int64_t), void* context) {
                        static_cast<const Crew*>(who)->share(count, [&](int64_t i, int) { piece(context, i); });
                      }, &crew};
    for (int32_t s : schedule.top)
      kernels.factorize(tree, scatter, f, s, s + 1, work.scratch.data(), found[0], crew.size() > 1 ? &all : nullptr);
    for (int t = 1; t < threads; t++) found[0].merge(found[t]);
    found[0].growth /= top;
    found[0].weakest /= top;
    return found[0];
  }

  // Scales A where that is needed; returns its largest entry. Exponents are found in double, whose range holds all products.
  double equilibrate(int64_t e, PivotedWorkspace& work) {
    T* a = A.get() + e * nnz();
    const int64_t* p = plan.indptr.data();
    const int32_t* row = plan.indices.data();
    constexpr int LIMIT = sizeof(R) == 4 ? 60 : 500;
    double* const factor = static_cast<double*>(work.buffer(PivotedWorkspace::SCALING, 4 * n() * int64_t(sizeof(double))));
    double *const top = factor + 2 * n(), *const r = factor, *const c = r + n(), *const row_top = top,
           *const column_top = row_top + n();
    std::fill(factor, top, 1.0);
    double largest = 0;
    scaled[e] = 0;
    for (int round = 0; round < SCALINGS; round++) {
      std::fill(top, top + 2 * n(), 0.0);
      for (int64_t j = 0; j < n(); j++) {
        double most = 0;
        for (int64_t q = p[j]; q < p[j + 1]; q++) {
          const int32_t i = row[q];
          const double v = double(part(a[q])) * c[j] * r[i];
          most = v > most ? v : most;
          row_top[i] = v > row_top[i] ? v : row_top[i];
        }
        column_top[j] = most;
      }
      double least = DBL_MAX;
      largest = 0;
      for (int64_t i = 0; i < 2 * n(); i++) {
        if (top[i] > 0 && top[i] < least) least = top[i];
        largest = top[i] > largest ? top[i] : largest;
      }
      if (!round && largest <= UNEVEN * least && largest < FAR_FROM_ONE && largest * FAR_FROM_ONE > 1) return largest;
      bool done = true;
      for (int64_t i = 0; i < 2 * n(); i++) done &= !balance(factor[i], top[i], LIMIT);
      if (done) break;
    }
    scaled[e] = 1;
    R* s = scale.data() + 2 * e * n();
    for (int64_t i = 0; i < 2 * n(); i++) s[i] = R(factor[i]);
    for (int64_t j = 0; j < n(); j++)
      for (int64_t q = p[j]; q < p[j + 1]; q++) a[q] = s[row[q]] * (s[n() + j] * a[q]);
    return largest;
  }

  // x = C^-1 A^-1 R^-1 b of the scaled matrix, with L U, or (U^H, L^H) for the adjoint.
  void direct(int64_t f, const T* b, T* x, int64_t width, bool adjoint, const Schedule& schedule, PivotedWorkspace& memory,
              int threads) const override {
    auto& work = static_cast<LuWorkspace&>(memory);
    Tree of_rows = plan.plan.tree(), of_columns = of_rows;
    of_rows.perm = plan.rows.data();
    if (reports[f].exchanged) of_rows.exchange = rows.data() + f * n(), of_columns.exchange = columns.data() + f * n();
    const Triangle l{of_rows, lower.get() + f * stored()}, u{of_columns, upper.get() + f * stored()};
    const int64_t lanes = width == 1 ? 1 : solving.lanes;
    void* local = work.buffer(PivotedWorkspace::LOCAL, lanes * (n() + plan.plan.row.back()) * int64_t(sizeof(T)));
    if (adjoint) spcache::solve(solving, u, l, schedule, b, x, width, local, work.queue, threads);
    else spcache::solve(solving, l, u, schedule, b, x, width, local, work.queue, threads);
  }
};

}  // namespace

LuPlan::LuPlan(int32_t n, const int64_t* Ap, const int32_t* Ai, const int32_t* row_of, const int64_t* tree_indptr,
               const int32_t* tree_indices, const int32_t* slots, const int32_t* perm)
    : PivotedPlan(Plan(n, tree_indptr, tree_indices, perm)), indptr(Ap, Ap + n + 1), begin(plan.supernodes + 1, 0),
      indices(Ai, Ai + Ap[n]), slot(Ap[n]), rows(n), target(Ap[n]) {
  std::vector<int32_t> column_of(n);
  for (int32_t j = 0; j < n; j++) column_of[row_of[j]] = j;
  for (int32_t k = 0; k < n; k++) rows[k] = row_of[plan.perm[k]];
  for (int64_t e = 0; e < Ap[n]; e++) begin[plan.supernode_of[slots[e]] + 1]++;
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin);
  for (int32_t j = 0; j < n; j++)
    for (int64_t e = Ap[j]; e < Ap[j + 1]; e++) {
      const int64_t to = next[plan.supernode_of[slots[e]]]++, at = plan.position_of[slots[e]];
      const bool below = column_of[Ai[e]] >= j, exchanged = at < 0;
      slot[to] = below != exchanged ? int32_t(e) : ~int32_t(e);
      target[to] = uint32_t(exchanged ? ~at : at);
    }
}

int64_t LuPlan::nbytes() const {
  return plan.nbytes() + 8 * int64_t(indptr.size() + begin.size()) + 12 * int64_t(slot.size()) + 4 * int64_t(rows.size());
}

PivotedFactors* lu_factors(const LuPlan& plan, Dtype dtype, int64_t batch, const UnsymmetricKernels* k, const Kernels* s) {
  switch (dtype) {
    case FLOAT32: return new LuFactorsOf<float>(plan, batch, *k, *s);
    case FLOAT64: return new LuFactorsOf<double>(plan, batch, *k, *s);
    case COMPLEX64: return new LuFactorsOf<Complex<float>>(plan, batch, *k, *s);
    default: return new LuFactorsOf<Complex<double>>(plan, batch, *k, *s);
  }
}

}  // namespace spcache
