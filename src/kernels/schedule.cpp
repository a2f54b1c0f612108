// Schedules of the assembly tree, and the threads that follow them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <queue>

#include "analysis.hpp"
#include "tasks.hpp"

namespace spcache {
namespace {

// Less work than this is done before a second thread has started.
constexpr double PARALLEL_FROM = 4e6;  // units of `work_of`

constexpr int PIECES = 8;            // pieces of work for each thread, at least
constexpr int MOST_LANES = 64;       // matrices side by side
constexpr int MOST_SPLITS = 64;      // for each thread

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

  // Split the largest subtree until none is much work.
  using Entry = std::pair<double, int32_t>;
  std::priority_queue<Entry> largest;
  for (int32_t s = 0; s < count; s++)
    if (plan.parent[s] == -1) { largest.emplace(work[s], s); total += work[s]; }
  std::vector<bool> split(count, false);
  if (threads > 1 && total >= PARALLEL_FROM)
    for (int k = 0; k < MOST_SPLITS * threads && !largest.empty() && largest.top().first * PIECES * threads > total; k++) {
      const int32_t s = largest.top().second;
      largest.pop();
      split[s] = true;
      for (int32_t c = plan.child[s]; c < plan.child[s + 1]; c++)
        largest.emplace(work[plan.children[c]], plan.children[c]);
    }

  // Memory: a subtree on stacks of its thread, the roots of tasks and what is above in memory that all threads see.
  std::vector<int32_t> task_of(count, -1);  // of a task's root
  update.assign(count, 0);
  auto own_memory = [&](int32_t root) {
    const int64_t u = plan.row[root + 1] - plan.row[root];
    task_of[root] = int32_t(tasks.size()) - 1;
    update[root] = ~shared_size;
    shared_size += u * u;
  };
  struct Piece {
    double work;
    std::vector<int32_t> roots;  // of small subtrees side by side
  };
  std::vector<int32_t> roots;
  for (; !largest.empty(); largest.pop()) roots.push_back(largest.top().second);
  std::sort(roots.begin(), roots.end());
  std::vector<Piece> pieces;
  const double small = threads > 1 ? total / (4 * PIECES * threads) : HUGE_VAL;
  for (int32_t root : roots) {
    const int32_t before = pieces.empty() ? -1 : pieces.back().roots.back();
    if (before >= 0 && before + 1 == lowest[root] && plan.parent[before] == plan.parent[root] &&
        pieces.back().work + work[root] <= small) {
      pieces.back().work += work[root];
      pieces.back().roots.push_back(root);
    } else {
      pieces.push_back({work[root], {root}});
    }
  }
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return a.work != b.work ? a.work > b.work : a.roots[0] < b.roots[0];
  });
  for (const Piece& piece : pieces) {
    tasks.push_back({lowest[piece.roots[0]], piece.roots.back() + 1, -1, 0});
    for (int32_t root : piece.roots) {
      TwoStacks stacks(plan);
      for (int32_t s = lowest[root]; s < root; s++) update[s] = stacks.push(s, [](int32_t) { return true; });
      for (int32_t s = lowest[root]; s < root; s++)
        if (plan.depth[s] & 1) update[s] += stacks.peak(0);
      own_size = std::max(own_size, stacks.peak(0) + stacks.peak(1));
      own_memory(root);
    }
  }
  useful = std::max(1, std::min(threads, int(pieces.size())));
  std::vector<bool> last(count, false);
  TwoStacks stacks(plan);
  for (int32_t s = 0; s < count; s++) {
    if (!split[s]) continue;
    bool large = rows_of(plan, s) >= SHARE_FROM;
    if (large) useful = threads;
    for (int32_t c = plan.child[s]; c < plan.child[s + 1]; c++) large = large || last[plan.children[c]];
    if (large) {
      last[s] = true;
      top.push_back(s);
      update[s] = stacks.push(s, [&](int32_t c) { return last[c]; });
      continue;
    }
    tasks.push_back({s, s + 1, -1, 0});
    own_memory(s);
    for (int32_t c = plan.child[s]; c < plan.child[s + 1]; c++) {
      Task& below = tasks[task_of[plan.children[c]]];
      if (below.parent == task_of[s]) continue;  // a piece of several subtrees
      below.parent = task_of[s];
      tasks.back().children++;
    }
  }
  for (int32_t s : top) update[s] = ~(shared_size + update[s] + (plan.depth[s] & 1 ? stacks.peak(0) : 0));
  shared_size += stacks.peak(0) + stacks.peak(1);

  first_child.assign(1, 0);
  for (const Task& task : tasks) first_child.push_back(first_child.back() + task.children);
  child.resize(first_child.back());
  std::vector<int32_t> next(first_child);
  for (size_t t = 0; t < tasks.size(); t++)
    if (tasks[t].parent >= 0) child[next[tasks[t].parent]++] = int32_t(t);
}

namespace {

// One front, by all threads; returns as Kernels::factorize.
int64_t factorize_together(const Kernels& kernels, const Tree& tree, const Assembly& assembly, const void* values,
                           void* factor, int32_t s, const Scratch& scratch, const Crew& crew) {
  const int64_t k = tree.first[s + 1] - tree.first[s], m = k + tree.row[s + 1] - tree.row[s], piece = kernels.share;
  if (crew.size() == 1 || !piece || m < SHARE_FROM) return kernels.factorize(tree, assembly, values, factor, s, s + 1, scratch);
  int64_t J = 0;
  auto together = [&](Part what, int64_t begin, int64_t end, int64_t size) {
    crew.share((end - begin + size - 1) / size, [&](int64_t i, int) {
      kernels.part(what, tree, factor, s, J, begin + i * size, std::min(begin + (i + 1) * size, end), scratch);
    });
  };
  together(BEGIN_PANEL, 0, k, piece / 5);
  kernels.assemble(tree, assembly, values, factor, s);
  for (; J < k; J += kernels.block) {
    const int64_t next = std::min(J + kernels.block, k);
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
  together(FINISH_REST, 0, m - k, piece / 5);
  return 0;
}

// One phase of the solve for one front, by all threads.
void solve_together(const Kernels& kernels, const Tree& tree, const void* factor, const Rhs& rhs, bool downwards, int32_t s,
                    void* local, const Crew& crew) {
  const int64_t k = tree.first[s + 1] - tree.first[s], m = k + tree.row[s + 1] - tree.row[s], block = kernels.solve_block;
  if (crew.size() == 1 || rhs.count > 1 || !kernels.large_panel || m * k < kernels.large_panel)
    return kernels.solve(tree, factor, rhs, downwards, s, s + 1, local);
  auto part = [&](SolvePart what, int64_t J, int64_t begin, int64_t end) {
    kernels.solve_part(what, tree, factor, rhs, s, J, begin, end, local);
  };
  auto together = [&](SolvePart what, int64_t J, int64_t begin, int64_t end) {
    const int64_t size = ((end - begin) / crew.size() + 16) / 16 * 16;
    crew.share((end - begin + size - 1) / size, [&](int64_t i, int) {
      part(what, J, begin + i * size, std::min(begin + (i + 1) * size, end));
    });
  };
  if (!downwards) {
    part(GATHER, 0, 0, 0);
    for (int64_t J = 0; J < k; J += block) {
      part(FORWARD_PIVOTS, J, 0, 0);
      together(FORWARD_ROWS, J, std::min(J + block, k), m);
    }
  } else {
    part(INHERIT, 0, 0, 0);
    for (int64_t J = (k - 1) / block * block; J >= 0; J -= block) {
      if (std::min(J + block, k) < m) together(BACKWARD_ROWS, J, J, std::min(J + block, k));
      part(BACKWARD_PIVOTS, J, 0, 0);
    }
    part(SCATTER, 0, 0, 0);
  }
}

}  // namespace

int64_t factorize(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Assembly& assembly,
                  const void* values, void* factor, const Scratch* scratch, int threads) {
  const Crew crew(threads);
  std::atomic<int64_t> first_failure{INT64_MAX};
  run_tasks(schedule, false, scratch[0].queue, crew, [&](int32_t task, int thread) {
    const int32_t begin = schedule.tasks[task].begin, end = schedule.tasks[task].end;
    if (tree.first[begin] >= first_failure) return;
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
    if (int64_t bad = factorize_together(kernels, tree, assembly, values, factor, s, scratch[0], crew)) return bad;
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

namespace {

// Calls work(first, lanes, from, to, thread) for groups of `width` matrices; `from` and `to` have the addresses of each,
// the last again for lanes beyond the batch.
template <class Work>
void share_groups(const Batch& batch, int64_t width, int threads, Work work) {
  share((batch.count + width - 1) / width, threads, [&](int64_t g, int thread) {
    const void* from[MOST_LANES];
    void* to[MOST_LANES];
    const int64_t first = g * width;
    for (int64_t l = 0; l < width; l++) {
      const int64_t e = std::min(first + l, batch.count - 1);
      from[l] = static_cast<const char*>(batch.from) + e * batch.from_stride;
      to[l] = static_cast<char*>(batch.to) + e * batch.to_stride;
    }
    work(first, int(std::min(width, batch.count - first)), from, to, thread);
  });
}

}  // namespace

void factorize_interleaved(const Interleaving& by, const ColumnsView& columns, const Assembly& assembly, const Batch& batch,
                           int64_t* status, double* spread, void* const* side, int threads) {
  share_groups(batch, by.width, threads, [&](int64_t first, int lanes, const void** from, void** to, int thread) {
    int64_t found[MOST_LANES];
    double spreads[MOST_LANES];
    by.interleave(from, assembly.nnz, side[thread]);
    by.factorize(columns, assembly, side[thread], to[0], found, spreads);
    std::copy(found, found + lanes, status + first);
    std::copy(spreads, spreads + lanes, spread + first);
  });
}

void solve_interleaved(const Interleaving& by, const ColumnsView& columns, const Factors& factors, const Batch& batch,
                       int64_t width, void* const* side, int threads) {
  const int64_t count = columns.n * width, bytes = batch.from_stride;
  share_groups(batch, by.width, threads, [&](int64_t first, int lanes, const void** from, void** to, int thread) {
    char *b = static_cast<char*>(side[thread]), *work = b + bytes * by.width;
    by.interleave(from, count, b);
    by.solve(columns, static_cast<const char*>(factors.data) + first * factors.stride, width, b, work);
    by.separate(b, count, to, lanes);
    for (int l = 0; l < lanes; l++)
      if (factors.status[first + l]) memset(to[l], 0xff, size_t(bytes));
  });
}

void solve_batch(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Factors& factors,
                 const Batch& batch, int64_t width, void* const* local, int threads) {
  share(batch.count, threads, [&](int64_t p, int thread) {
    const int64_t f = factors.select ? factors.select[p] : factors.count == 1 ? 0 : p;
    char* x = static_cast<char*>(batch.to) + p * batch.to_stride;
    if (factors.status[f])
      memset(x, 0xff, size_t(batch.to_stride));  // a NaN in every scalar type
    else
      solve(kernels, tree, schedule, static_cast<const char*>(factors.data) + f * factors.stride,
            static_cast<const char*>(batch.from) + p * batch.from_stride, x, width, local[thread], nullptr, 1);
  });
}

void solve(const Kernels& kernels, const Triangle& up, const Triangle& down, const Schedule& schedule, const void* b, void* x,
           int64_t width, void* local, int32_t* queue, int threads) {
  if (up.tree.panel[up.tree.supernodes] < PARALLEL_SOLVE_FROM) threads = 1;
  const Crew crew(threads);
  Rhs rhs{b, x, width, 0, 0};
  for (; rhs.offset < width; rhs.offset += rhs.count) {
    rhs.count = std::min<int64_t>(width - rhs.offset, kernels.lanes);
    auto tasks = [&](const Triangle& side, bool downwards) {
      run_tasks(schedule, downwards, queue, crew, [&](int32_t task, int) {
        kernels.solve(side.tree, side.factor, rhs, downwards, schedule.tasks[task].begin, schedule.tasks[task].end, local);
      });
    };
    tasks(up, false);
    for (int32_t s : schedule.top) solve_together(kernels, up.tree, up.factor, rhs, false, s, local, crew);
    for (auto s = schedule.top.rbegin(); s != schedule.top.rend(); ++s)
      solve_together(kernels, down.tree, down.factor, rhs, true, *s, local, crew);
    tasks(down, true);
  }
}

}  // namespace spcache
