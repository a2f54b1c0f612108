// Schedules of the assembly tree, and the threads that follow them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <queue>

#include "analysis.hpp"
#include "threads.hpp"

namespace spcache {
namespace {

// Less work than this is done before a second thread has started.
constexpr double PARALLEL_FROM = 4e6;          // units of `work_of`
constexpr int64_t PARALLEL_SOLVE_FROM = 1 << 19;  // numbers in the factor

constexpr int64_t SHARE_FROM = 480;  // rows of a front that threads share

// Time of one front, in units of a multiply-add at full speed: elimination, assembly of the update matrix, overhead.
double work_of(const Plan& p, int32_t s) {
  const double k = p.first[s + 1] - p.first[s], u = double(p.row[s + 1] - p.row[s]), m = k + u;
  return k * (m * m + m * u + u * u) / 3 + 16 * u * u + 2000;
}

int64_t rows_of(const Plan& p, int32_t s) { return p.first[s + 1] - p.first[s] + p.row[s + 1] - p.row[s]; }

// Offsets on two stacks by parity of depth, for supernodes visited in postorder; see Schedule.
class TwoStacks {
 public:
  explicit TwoStacks(const Plan& plan) : plan_(plan) {}

  // `pops(c)`: whether child c lies on these stacks.
  template <class Pops>
  int64_t push(int32_t s, Pops pops) {
    const int parity = plan_.depth[s] & 1;
    for (int32_t c = plan_.child[s]; c < plan_.child[s + 1]; c++)
      if (pops(plan_.children[c])) top_[!parity] -= size(plan_.children[c]);
    const int64_t at = top_[parity];
    top_[parity] += size(s);
    peak_[parity] = std::max(peak_[parity], top_[parity]);
    return at;
  }
  int64_t size(int32_t s) const {
    const int64_t u = plan_.row[s + 1] - plan_.row[s];
    return u * u;
  }
  int64_t peak(int parity) const { return peak_[parity]; }

 private:
  const Plan& plan_;
  int64_t top_[2] = {0, 0}, peak_[2] = {0, 0};
};

}  // namespace

int Schedule::sharing(int64_t matrices, int threads) const {
  return matrices >= threads && double(matrices) * total >= PARALLEL_FROM ? threads : 1;
}

int Schedule::sharing_solves(int64_t solves, int64_t numbers, int threads) {
  return solves >= threads && numbers >= PARALLEL_SOLVE_FROM ? threads : 1;
}

Schedule::Schedule(const Plan& plan, int threads) {
  const int32_t count = plan.supernodes;
  std::vector<double> work(count);     // of the whole subtree
  std::vector<int32_t> lowest(count);  // first supernode of the subtree
  for (int32_t s = 0; s < count; s++) {
    work[s] = work_of(plan, s);
    lowest[s] = s;
    for (int32_t c = plan.child[s]; c < plan.child[s + 1]; c++) {
      work[s] += work[plan.children[c]];
      lowest[s] = std::min(lowest[s], lowest[plan.children[c]]);
    }
  }

  // Split the largest subtree again and again, and keep the cut with the shortest predicted time.
  using Entry = std::pair<double, int32_t>;
  std::priority_queue<Entry> largest;
  for (int32_t s = 0; s < count; s++)
    if (plan.parent[s] == -1) { largest.emplace(work[s], s); total += work[s]; }
  std::vector<Entry> roots;
  auto snapshot = [&]() {
    auto copy = largest;
    roots.clear();
    for (; !copy.empty(); copy.pop()) roots.push_back(copy.top());
  };
  snapshot();
  if (threads > 1 && total >= PARALLEL_FROM) {
    double above = 0, best = total;
    for (int split = 0; split < 64 * threads; split++) {
      std::vector<double> load(threads, 0);
      for (auto copy = largest; !copy.empty(); copy.pop())  // by decreasing work to whoever is free first
        *std::min_element(load.begin(), load.end()) += copy.top().first;
      const double time = above + *std::max_element(load.begin(), load.end());
      if (time < 0.98 * best) { best = time; snapshot(); }
      if (above > best || largest.empty() || largest.top().first < 0.01 * total / threads) break;
      const int32_t s = largest.top().second;
      largest.pop();
      above += work_of(plan, s) / (rows_of(plan, s) >= SHARE_FROM ? 0.8 * threads : 1);
      for (int32_t c = plan.child[s]; c < plan.child[s + 1]; c++)
        largest.emplace(work[plan.children[c]], plan.children[c]);
    }
  }

  useful = std::max(1, std::min(threads, int(roots.size())));

  // Memory: each subtree on stacks of its thread, its root and what is above in memory that all threads see.
  std::vector<bool> below(count, false);
  update.assign(count, 0);
  for (auto [_, root] : roots) {
    const int32_t begin = lowest[root], end = root + 1;
    subtrees.push_back({begin, end});
    for (int32_t s = begin; s < end; s++) below[s] = true;
    TwoStacks stacks(plan);
    for (int32_t s = begin; s < root; s++) update[s] = stacks.push(s, [](int32_t) { return true; });
    for (int32_t s = begin; s < root; s++)
      if (plan.depth[s] & 1) update[s] += stacks.peak(0);
    own_size = std::max(own_size, stacks.peak(0) + stacks.peak(1));
    update[root] = ~shared_size;
    shared_size += stacks.size(root);
  }
  TwoStacks stacks(plan);
  for (int32_t s = 0; s < count; s++)
    if (!below[s]) {
      top.push_back(s);
      useful = std::max(useful, rows_of(plan, s) >= SHARE_FROM ? threads : 1);
      update[s] = stacks.push(s, [&](int32_t c) { return !below[c]; });
    }
  for (int32_t s : top) update[s] = ~(shared_size + update[s] + (plan.depth[s] & 1 ? stacks.peak(0) : 0));
  shared_size += stacks.peak(0) + stacks.peak(1);
}

namespace {

// One front, by all threads; returns as Kernels::factorize.
int64_t factorize_together(const Kernels& kernels, const Tree& tree, const Assembly& assembly, const void* values,
                           void* factor, int32_t s, const Scratch& scratch, int threads) {
  const int64_t k = tree.first[s + 1] - tree.first[s], m = k + tree.row[s + 1] - tree.row[s], piece = kernels.share;
  if (threads == 1 || !piece || m < SHARE_FROM) return kernels.factorize(tree, assembly, values, factor, s, s + 1, scratch);
  kernels.assemble(tree, assembly, values, factor, s, scratch);
  for (int64_t J = 0; J < k; J += kernels.block) {
    const int64_t next = std::min(J + kernels.block, k);
    auto together = [&](Part what, int64_t begin, int64_t end, int64_t size) {
      share((end - begin + size - 1) / size, threads, [&](int64_t i, int) {
        kernels.part(what, tree, factor, s, J, begin + i * size, std::min(begin + (i + 1) * size, end), scratch);
      });
    };
    if (int64_t bad = kernels.part(PIVOTS, tree, factor, s, J, 0, 0, scratch)) return tree.first[s] + J + bad;
    together(ROWS, next - J, m - J, piece);
    if (next < k) {
      together(PACK_PANEL, 0, m - next, piece);
      together(UPDATE_PANEL, 0, k - next, piece / 5);
    }
    if (k < m) {
      together(PACK_REST, 0, m - k, piece);
      together(UPDATE_REST, 0, m - k, piece / 5);
    }
  }
  return 0;
}

}  // namespace

int64_t factorize(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Assembly& assembly,
                  const void* values, void* factor, const Scratch* scratch, int threads) {
  std::atomic<int64_t> first_failure{INT64_MAX};
  share(int(schedule.subtrees.size()), threads, [&](int i, int thread) {
    const auto [begin, end] = schedule.subtrees[i];
    const int64_t bad = kernels.factorize(tree, assembly, values, factor, begin, end, scratch[thread]);
    if (!bad) return;
    int64_t seen = first_failure.load();
    while (bad < seen && !first_failure.compare_exchange_weak(seen, bad)) {}
  });
  // Fronts above, up to the first failure: whatever is below them has a factor, and one thread would have met a failure
  // among them first.
  const int64_t failure = first_failure;
  for (int32_t s : schedule.top) {
    if (tree.first[s] >= failure) break;
    if (int64_t bad = factorize_together(kernels, tree, assembly, values, factor, s, scratch[0], threads)) return bad;
  }
  return failure == INT64_MAX ? 0 : failure;
}

void factorize_batch(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Assembly& assembly,
                     const Batch& batch, int64_t* status, const Scratch* scratch, int threads) {
  share(batch.count, threads, [&](int64_t e, int thread) {
    status[e] = factorize(kernels, tree, schedule, assembly, static_cast<const char*>(batch.from) + e * batch.from_stride,
                          static_cast<char*>(batch.to) + e * batch.to_stride, scratch + thread, 1);
  });
}

void solve_batch(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Factors& factors,
                 const Batch& batch, int64_t width, const SolveScratch* scratch, int threads) {
  share(batch.count, threads, [&](int64_t p, int thread) {
    const int64_t f = factors.select ? factors.select[p] : factors.count == 1 ? 0 : p;
    char* x = static_cast<char*>(batch.to) + p * batch.to_stride;
    if (factors.status[f])
      memset(x, 0xff, size_t(batch.to_stride));  // a NaN in every scalar type
    else
      solve(kernels, tree, schedule, static_cast<const char*>(factors.data) + f * factors.stride,
            static_cast<const char*>(batch.from) + p * batch.from_stride, x, width, scratch + thread, 1);
  });
}

void solve(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const void* factor, const void* b, void* x,
           int64_t width, const SolveScratch* scratch, int threads) {
  const int count = int(schedule.subtrees.size());
  if (tree.panel[tree.supernodes] < PARALLEL_SOLVE_FROM) threads = 1;
  Rhs rhs{b, x, width, 0, 0};
  for (; rhs.offset < width; rhs.offset += rhs.count) {
    rhs.count = std::min<int64_t>(width - rhs.offset, kernels.lanes);
    auto subtrees = [&](bool downwards) {
      share(count, threads, [&](int i, int thread) {
        const auto [begin, end] = schedule.subtrees[i];
        kernels.solve(tree, factor, rhs, downwards, begin, end, scratch[thread]);
      });
    };
    subtrees(false);
    for (int32_t s : schedule.top) kernels.solve(tree, factor, rhs, false, s, s + 1, scratch[0]);
    for (auto s = schedule.top.rbegin(); s != schedule.top.rend(); ++s)
      kernels.solve(tree, factor, rhs, true, *s, *s + 1, scratch[0]);
    subtrees(true);
  }
}

}  // namespace spcache
