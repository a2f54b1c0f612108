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
class LdlFactorsOf final : public PivotedOf<T, LdlFactors> {
  using Base = PivotedOf<T, LdlFactors>;
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

  typename Base::Sides sides(bool) const override { return {true, true, hermitian}; }
  Indefinite matrix(int64_t e) const {
    return {A.get() + e * nnz(), panels.get() + e * stored(), const_cast<int32_t*>(order.data()) + e * n(), false};
  }

 public:
  LdlFactorsOf(const LdlPlan& p, int64_t batch, const IndefiniteKernels* symmetric, const IndefiniteKernels* herm)
      : Base(p, p.indptr, p.indices, batch), plan(p), tree(p.plan.tree()), both{symmetric, herm}, panels(new T[batch * stored()]),
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

  bool trial(const Assembly& assembly, const void* values, const Schedule& schedule, PivotedWorkspace& work,
             char* left_out) override {
    hermitian = complex && assembly.hermitian;
    this->failed[0] = 0;
    memset(static_cast<void*>(A.get()), 0, sizeof(T) * size_t(nnz()));
    assemble(assembly, 0, static_cast<const T*>(values), A.get());
    if (this->not_finite(A.get()) >= 0) return false;
    equilibrate(A.get(), scale.data());
    Indefinite f = matrix(0);
    f.trial = true;
    eliminate(f, schedule, work, 1);
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
                PivotedWorkspace& work, int threads) const override {
    const R* s = scale.data() + f * n();
    const T* from = static_cast<const T*>(b);
    T* to = static_cast<T*>(x);
    const bool conjugate = complex && adjoint && !hermitian;  // A^-H b is the conjugate of A^-1 conj(b)
    T* const rhs = static_cast<T*>(work.buffer(PivotedWorkspace::RHS, n() * width * int64_t(sizeof(T))));
    for (int64_t i = 0; i < n(); i++)
      for (int64_t r = 0; r < width; r++) {
        const T v = s[i] * from[i * width + r];
        rhs[i * width + r] = conjugate ? conj(v) : v;
      }
    direct(f, rhs, to, width, false, schedule, work, threads);
    const int64_t steps = refined[f] ? this->refine(f, rhs, to, width, false, schedule, work, threads) : 0;
    for (int64_t i = 0; i < n(); i++)
      for (int64_t r = 0; r < width; r++) {
        const T v = s[i] * to[i * width + r];
        to[i * width + r] = conjugate ? conj(v) : v;
      }
    return steps;
  }

 private:
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

  Report factor(int64_t e, const Schedule& schedule, PivotedWorkspace& memory, int threads) override {
    equilibrate(A.get() + e * nnz(), scale.data() + e * n());
    return eliminate(matrix(e), schedule, memory, threads);
  }

  Report eliminate(const Indefinite& f, const Schedule& schedule, PivotedWorkspace& memory, int threads) const {
    auto& work = static_cast<LdlWorkspace&>(memory);
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

}  // namespace spcache
