// Factorizes and solves on 1 to 4 threads, looks at the residual and compares bit by bit; `./dev sanitize` runs it under
// ThreadSanitizer. It also serves to see the kernels of another processor work, in an emulator (docs/architecture.md).
// No Python: ThreadSanitizer would report the interpreter.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "analysis.hpp"
#include "ldl.hpp"
#include "lu.hpp"
#include "pattern.hpp"

using namespace spcache;

namespace {

template <class T>
struct Solution {
  std::vector<T> factor, x, single;  // for three right-hand sides, and for one
  bool operator==(const Solution& other) const {
    return !memcmp(factor.data(), other.factor.data(), factor.size() * sizeof(T)) &&
           !memcmp(x.data(), other.x.data(), x.size() * sizeof(T)) &&
           !memcmp(single.data(), other.single.data(), single.size() * sizeof(T));
  }
};

template <class T>
T* aligned(size_t count) {
  void* memory = aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64);
  if (!memory) abort();
  return static_cast<T*>(memory);
}

template <class T>
Solution<T> run(const Plan& plan, const Assembly& assembly, const std::vector<T>& values, Dtype dtype, int threads) {
  const Kernels& kernels = *kernels_baseline(dtype);
  const Schedule schedule(plan, threads);
  const Tree tree = plan.tree();
  Solution<T> out{std::vector<T>(plan.panel.back()), std::vector<T>(3 * plan.n), std::vector<T>(plan.n)};
  std::vector<Scratch> scratch;
  int32_t* queue = aligned<int32_t>(schedule.queue_size());
  T *shared = aligned<T>(schedule.shared_size), *local = aligned<T>((plan.n + plan.row.back()) * kernels.lanes);
  for (int t = 0; t < threads; t++)
    scratch.push_back({aligned<T>(schedule.own_size), shared, aligned<T>(kernels.pack_size(plan.largest_front)),
                       schedule.update.data(), queue});
  if (factorize(kernels, tree, schedule, assembly, values.data(), out.factor.data(), scratch.data(), threads)) abort();
  const std::vector<T> b(3 * plan.n, T(1));
  solve(kernels, tree, schedule, out.factor.data(), b.data(), out.x.data(), 3, local, queue, threads);
  solve(kernels, tree, schedule, out.factor.data(), b.data(), out.single.data(), 1, local, queue, threads);
  for (int t = 0; t < threads; t++) free(scratch[t].own), free(scratch[t].pack);
  free(shared), free(local), free(queue);
  std::printf("%d threads: %zu tasks, %zu fronts above\n", threads, schedule.tasks.size(), schedule.top.size());
  return out;
}

// Twelve times the same matrix, by three threads.
template <class T>
bool share_a_batch(const Plan& plan, const Assembly& assembly, const std::vector<T>& values, Dtype dtype,
                   const Solution<T>& one) {
  constexpr int COUNT = 12, THREADS = 3;
  const Kernels& kernels = *kernels_baseline(dtype);
  const Schedule schedule(plan, 1);
  const Tree tree = plan.tree();
  const int64_t size = plan.panel.back(), width = int64_t(one.x.size()) / plan.n;
  std::vector<T> many, factors(COUNT * size), b(COUNT * one.x.size(), T(1)), x(b.size());
  for (int e = 0; e < COUNT; e++) many.insert(many.end(), values.begin(), values.end());
  std::vector<int64_t> status(COUNT, 1);
  std::vector<Scratch> scratch;
  std::vector<void*> local;
  for (int t = 0; t < THREADS; t++) {
    scratch.push_back({aligned<T>(schedule.own_size), aligned<T>(schedule.shared_size),
                       aligned<T>(kernels.pack_size(plan.largest_front)), schedule.update.data(), nullptr});
    local.push_back(aligned<T>((plan.n + plan.row.back()) * kernels.lanes));
  }
  const int64_t bytes = int64_t(sizeof(T));
  factorize_batch(kernels, tree, schedule, assembly,
                  {COUNT, many.data(), int64_t(values.size()) * bytes, factors.data(), size * bytes}, status.data(),
                  scratch.data(), THREADS);
  solve_batch(kernels, tree, schedule, {COUNT, size * bytes, factors.data(), status.data(), nullptr},
              {COUNT, b.data(), plan.n * width * bytes, x.data(), plan.n * width * bytes}, width, local.data(), THREADS);
  bool equal = true;
  for (int e = 0; e < COUNT; e++)
    equal &= !status[e] && Solution<T>{{factors.begin() + e * size, factors.begin() + (e + 1) * size},
                                       {x.begin() + e * plan.n * width, x.begin() + (e + 1) * plan.n * width}, one.single} == one;
  for (int t = 0; t < THREADS; t++) free(scratch[t].own), free(scratch[t].shared), free(scratch[t].pack), free(local[t]);
  return equal;
}

// Nested dissection of the rectangle [x0, x1) x [y0, y1) of a grid: both halves, then the line between them.
void dissect(int x0, int x1, int y0, int y1, int side, std::vector<int32_t>& perm) {
  if (x0 >= x1 || y0 >= y1) return;
  const bool wide = x1 - x0 >= y1 - y0;
  const int middle = wide ? (x0 + x1) / 2 : (y0 + y1) / 2;
  dissect(x0, wide ? middle : x1, y0, wide ? y1 : middle, side, perm);
  dissect(wide ? middle + 1 : x0, x1, wide ? y0 : middle + 1, y1, side, perm);
  for (int k = wide ? y0 : x0; k < (wide ? y1 : x1); k++) perm.push_back(wide ? k * side + middle : middle * side + k);
}

template <class T>
bool check(int side, Dtype dtype, bool dense = false) {
  // The 5-point Laplacian of a grid plus the identity, its lower triangle; or all of it filled, one large front.
  const int n = side * side;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices, source, slot, perm;
  std::vector<uint8_t> role;
  std::vector<T> values;
  for (int j = 0; j < n; j++) {
    for (int i = j; i < n; i++)
      if (dense || i == j || i == j + side || (i == j + 1 && i % side)) {
        role.push_back(i == j ? DIAGONAL : DIRECT);
        slot.push_back(int32_t(indices.size()));
        source.push_back(int32_t(indices.size()));
        indices.push_back(i);
        values.push_back(T(i == j ? 5 + (dense ? n : 0) : -1));
      }
    indptr.push_back(int64_t(indices.size()));
  }
  dissect(0, side, 0, side, side, perm);
  const Plan plan(n, indptr.data(), indices.data(), perm.data());
  std::vector<int64_t> begin(3 * plan.supernodes + 1);
  std::vector<int32_t> sorted(indices.size() + AHEAD, 0);
  std::vector<uint32_t> target(indices.size());
  sort_contributions(int64_t(indices.size()), slot.data(), source.data(), role.data(), plan.supernode_of.data(),
                     plan.position_of.data(), plan.supernodes, begin.data(), sorted.data(), target.data());
  const Assembly assembly{int64_t(indices.size()), plan.supernodes, 1.0, true, begin.data(), sorted.data(), target.data()};
  const Solution<T> one = run(plan, assembly, values, dtype, 1);
  // The residual of b = 1 for the first of three right-hand sides; |A| |x| is at most 9, or n / 3 in sums of n terms.
  std::vector<T> residual(n, T(-1));
  for (int j = 0; j < n; j++)
    for (int64_t e = indptr[j]; e < indptr[j + 1]; e++) {
      const int i = indices[e];
      residual[i] += values[e] * one.x[3 * j];
      if (i != j) residual[j] += values[e] * one.x[3 * i];
    }
  for (const T& r : residual)
    if (!(spcache::abs(r) < 100 * (dense ? n : 1) * std::numeric_limits<Real<T>>::epsilon())) return false;
  bool equal = share_a_batch(plan, assembly, values, dtype, one);
  for (int threads = 2; threads <= 4; threads++) equal &= run(plan, assembly, values, dtype, threads) == one;
  return equal;
}

// x of A x = 1 for three right-hand sides and for one, by an engine with pivoting, refined.
template <class T>
std::vector<T> run_pivoted(const PivotedPlan& plan, PivotedFactors& factors, const Assembly& assembly,
                           const std::vector<T>& values, int threads) {
  const int n = plan.plan.n;
  const Schedule schedule(plan.plan, threads);
  const std::unique_ptr<PivotedWorkspace> own(factors.workspace(schedule, threads));
  PivotedWorkspace* work = own.get();
  factors.factorize(assembly, values.data(), true, schedule, &work, 1, threads);
  if (factors.failed[0] >= 0) abort();
  factors.refined[0] = true;
  const std::vector<T> b(3 * n, T(1));
  std::vector<T> x(4 * n);
  if (factors.solve(0, b.data(), x.data(), 3, false, schedule, *work, threads) < 0) abort();
  if (factors.solve(0, b.data(), x.data() + 3 * n, 1, true, schedule, *work, threads) < 0) abort();
  std::printf("%d threads: %zu tasks, %zu fronts above\n", threads, schedule.tasks.size(), schedule.top.size());
  return x;
}

// The matrix of a grid with diagonal entries of both signs, or all of it filled, by L D L^T and by L U.
template <class T>
bool check_pivoted(int side, Dtype dtype, bool dense = false) {
  const int n = side * side;
  std::vector<int64_t> indptr{0}, full_indptr{0};
  std::vector<int32_t> indices, full_indices, slots, full_slots, perm, identity;
  std::vector<T> values, full_values;
  auto adjacent = [&](int i, int j) {  // i > j
    return dense || i == j + side || (i == j + 1 && i % side);
  };
  auto entry = [&](int i, int j) {
    return T(Real<T>(i == j ? (i % 3 ? 0.1 : -4.0) : dense ? std::sin(1.0 + i * 7.0 + j * 3.0) : -1.0));
  };
  // Where the entry (i, j) of the lower triangle is, i >= j.
  auto slot = [&](int i, int j) {
    int64_t e = indptr[j];
    while (indices[e] != i) e++;
    return int32_t(e);
  };
  for (int j = 0; j < n; j++) {
    for (int i = j; i < n; i++)
      if (i == j || adjacent(i, j)) {
        slots.push_back(int32_t(indices.size()));
        indices.push_back(i);
        values.push_back(entry(i, j));
      }
    indptr.push_back(int64_t(indices.size()));
    identity.push_back(j);
  }
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < n; i++)
      if (i == j || (i > j ? adjacent(i, j) : adjacent(j, i))) {
        full_slots.push_back(i >= j ? slot(i, j) : slot(j, i));
        full_indices.push_back(i);
        full_values.push_back(i > j ? entry(i, j) : i < j ? T(Real<T>(0.5)) * entry(j, i) : T(Real<T>(i % 3 ? 3 : -4)));
      }
    full_indptr.push_back(int64_t(full_indices.size()));
  }
  dissect(0, side, 0, side, side, perm);
  const LdlPlan symmetric(n, indptr.data(), indices.data(), indptr.data(), indices.data(), slots.data(), perm.data());
  const LuPlan general(n, full_indptr.data(), full_indices.data(), identity.data(), indptr.data(), indices.data(),
                       full_slots.data(), perm.data());
  const std::unique_ptr<PivotedFactors> ldl(
      ldl_factors(symmetric, dtype, 1, indefinite_baseline(dtype, false), indefinite_baseline(dtype, true)));
  const std::unique_ptr<PivotedFactors> lu(
      lu_factors(general, dtype, 1, unsymmetric_baseline(dtype), kernels_baseline(dtype)));
  bool equal = true;
  auto compare = [&](const PivotedPlan& plan, PivotedFactors& factors, const std::vector<T>& v) {
    const int64_t nnz = int64_t(v.size()), begin[] = {0, nnz, nnz, nnz};
    std::vector<int32_t> source(nnz + AHEAD, 0);
    std::vector<uint32_t> target(nnz);
    for (int64_t e = 0; e < nnz; e++) source[e] = int32_t(e), target[e] = uint32_t(e);
    const Assembly assembly{nnz, 1, 1.0, false, begin, source.data(), target.data()};
    const std::vector<T> one = run_pivoted(plan, factors, assembly, v, 1);
    for (int threads = 2; threads <= 4; threads++)
      equal &= !memcmp(one.data(), run_pivoted(plan, factors, assembly, v, threads).data(), one.size() * sizeof(T));
  };
  compare(symmetric, *ldl, values);
  compare(general, *lu, full_values);
  return equal;
}

// The passes over values: of a full matrix of order n, twice, the second with one entry that breaks symmetry.
bool check_passes(int n) {
  std::vector<int32_t> row, column, diagonal, lower, upper;
  for (int j = 0; j < n; j++)
    for (int i = j; i < n; i++) {
      if (i == j) diagonal.push_back(int32_t(row.size()));
      row.push_back(i), column.push_back(j), lower.push_back(i + j * n), upper.push_back(j + i * n);
    }
  const int64_t nnz = int64_t(n) * n;
  const Pairs pairs{nnz, int64_t(row.size()), n, nullptr, nullptr, row.data(), column.data(), diagonal.data(), lower.data(),
                    upper.data()};
  std::vector<double> values(2 * nnz, 1.0), kept(2 * nnz), u(n, 2.0), w(n, 3.0), out(nnz);
  values[2 * nnz - 2] = 7;
  bool good = true;
  for (int threads = 1; threads <= 3; threads++) {
    const int64_t bytes = 2 * nnz * int64_t(sizeof(double));
    const char* from = reinterpret_cast<const char*>(values.data());
    char* to = reinterpret_cast<char*>(kept.data());
    copy(from, bytes, to, threads);
    good &= equal(from, to, bytes, threads) && all_finite(FLOAT64, values.data(), 2 * nnz, threads);
    kept.back() = NAN;
    good &= !equal(from, to, bytes, threads) && !all_finite(FLOAT64, kept.data(), 2 * nnz, threads);
    good &= first_asymmetric(FLOAT64, pairs, true, values.data(), 2, 0.1, threads) == 1;
    good &= asymmetry(FLOAT64, pairs, true, values.data() + nnz, threads).difference == 6;
    gather_outer(FLOAT64, &pairs, nnz, nullptr, nullptr, CONJUGATED, false, 1, n, n, 1, u.data(), w.data(), out.data(), threads);
    for (double g : out) good &= g == -6;
  }
  return good;
}

}  // namespace

int main() {
  const bool equal = check<double>(120, FLOAT64) & check<float>(150, FLOAT32) & check<Complex<double>>(120, COMPLEX128) &
                     check<double>(25, FLOAT64, true) & check_pivoted<double>(120, FLOAT64) &
                     check_pivoted<Complex<float>>(80, COMPLEX64) & check_pivoted<double>(25, FLOAT64, true) &
                     check_passes(400);
  std::puts(equal ? "the same bits on any number of threads" : "results differ");
  return equal ? 0 : 1;
}
