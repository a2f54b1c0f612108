// Symbolic analysis of a symmetric structure: elimination tree, column counts, supernodes, memory plan.
#pragma once
#include <stdint.h>

#include <vector>

#include "multifrontal.hpp"

namespace spcache {

// Predicted size and work of a Cholesky factorization under a permutation.
struct Prediction {
  int64_t nnz = 0;   // entries of L, diagonal included
  double flops = 0;  // sum over columns of count^2 (one multiply-add counts as two)
};

// A structure under a permutation, and what follows from the elimination tree.
struct Elimination {
  // Takes the lower triangle of the structure (the diagonal may be missing); perm[k] is the original index of pivot k.
  Elimination(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm);
  int64_t nbytes() const;

  int32_t n;
  int64_t entries;  // of the structure
  std::vector<int32_t> perm;
  // Off the diagonal, by columns and by rows: for each j the rows i > j, for each i the columns j < i, unsorted. With each
  // row its canonical slot, or ~slot where the permutation exchanges row and column.
  std::vector<int64_t> column_ptr, row_ptr;
  std::vector<int32_t> rows, slots, columns;
  std::vector<int32_t> diagonal;  // [n] canonical slot of each pivot's diagonal entry, -1 where there is none
  std::vector<int32_t> parent;    // [n] in the elimination tree: first i > j with L(i, j) != 0, or -1
  std::vector<int32_t> order;     // [n] a postorder of that tree
  std::vector<int32_t> counts;    // [n] entries of each column of L, the diagonal included
  Prediction prediction;
};

struct Plan {
  explicit Plan(const Elimination& elimination);
  Plan(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm)
      : Plan(Elimination(n, indptr, indices, perm)) {}
  Tree tree() const;
  int64_t nbytes() const;

  Prediction prediction;
  int32_t n, supernodes = 0;
  int32_t largest_front = 0;         // rows
  std::vector<int32_t> perm, first, rows, relative, child, children;
  std::vector<int32_t> parent, depth;  // [supernodes] in the assembly tree; roots have parent -1 and depth 0
  std::vector<int64_t> row, panel, run;
  std::vector<Run> runs;
  std::vector<int32_t> supernode_of; // [nnz(structure)] canonical slot -> supernode
  std::vector<int64_t> position_of;  // [nnz(structure)] canonical slot -> place p in that supernode's panel, or ~p
                                     // where the entry is stored through its mirror image
};

// Who factors which supernodes, and where update matrices lie meanwhile. Tasks are subtrees (small ones of one parent
// together) and single fronts above them, done by whoever is free as soon as their children are. What is left comes last,
// front by front: from the first large front upwards, which all threads factor together. Inside a subtree, and above the
// tasks, update matrices live on two stacks, those of even depth on one, of odd depth on the other, so that children never
// lie where their parent is built. A subtree's root leaves its update matrix in memory of its own, so does a front that is
// a task. The arithmetic does not depend on the schedule.
struct Schedule {
  Schedule(const Plan& plan, int threads);
  // How many of `threads` share the matrices of a batch, or solves with so many numbers of factors, one matrix each.
  int sharing(int64_t matrices, int threads) const;
  static int sharing_solves(int64_t solves, int64_t numbers, int threads);

  double total = 0;                   // work
  int useful = 1;                     // threads that find some
  struct Task {
    int32_t begin, end;  // supernodes
    int32_t parent;      // a task, or -1
    int32_t children;    // how many there are
  };
  std::vector<Task> tasks;            // subtrees by decreasing work, then single fronts in ascending order
  std::vector<int32_t> child;         // [tasks] the children of each, one after the other in the order of their parents
  std::vector<int32_t> first_child;   // [tasks + 1] into child
  std::vector<int32_t> top;           // supernodes above the tasks, ascending
  std::vector<int64_t> update;        // [supernodes] see Scratch
  int64_t own_size = 0, shared_size = 0;  // elements
  int64_t queue_size() const { return 2 * int64_t(tasks.size()); }
};

// Factors one matrix on up to `threads` threads; scratch is [threads]. Returns 0, or 1 + the first pivot that failed.
int64_t factorize(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Assembly& assembly,
                  const void* values, void* factor, const Scratch* scratch, int threads);

// One of the two triangular factors of a solve, a tree with its permutation and exchanges.
struct Triangle {
  const Tree& tree;
  const void* factor;
};

// x = down^-H up^-1 b for `width` right-hand sides on up to `threads` threads; for `local` see
// Kernels::solve; queue is [Schedule::queue_size()] scratch memory, or null for one thread.
void solve(const Kernels& kernels, const Triangle& up, const Triangle& down, const Schedule& schedule, const void* b, void* x,
           int64_t width, void* local, int32_t* queue, int threads);
// The same where both are one.
inline void solve(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const void* factor, const void* b,
                  void* x, int64_t width, void* local, int32_t* queue, int threads) {
  const Triangle both{tree, factor};
  solve(kernels, both, both, schedule, b, x, width, local, queue, threads);
}

// So many matrices, or right-hand sides, that lie one after the other.
struct Batch {
  int64_t count;
  const void* from;     // values, or b
  int64_t from_stride;  // bytes
  void* to;             // factors, or x
  int64_t to_stride;
};

// Factors of a batch: that of right-hand side p is select[p], or where select is null p, or the only one.
struct Factors {
  int64_t count, stride;
  const void* data;
  const int64_t* status;  // where not 0, x becomes NaN
  const int64_t* select;
};

// The same for a batch that threads share, each matrix being one thread's. The schedule is that of one thread, scratch and
// local are [threads] with nothing shared.
void factorize_batch(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Assembly& assembly,
                     const Batch& batch, int64_t* status, const Scratch* scratch, int threads);
// The same for groups of matrices side by side, the factor of one being [Columns::entries] numbers. `side` is [threads]
// memory for one group's values, or for its b and as much again.
void factorize_interleaved(const Interleaving& by, const ColumnsView& columns, const Assembly& assembly, const Batch& batch,
                           int64_t* status, double* spread, void* const* side, int threads);
void solve_interleaved(const Interleaving& by, const ColumnsView& columns, const Factors& factors, const Batch& batch,
                       int64_t width, void* const* side, int threads);
void solve_batch(const Kernels& kernels, const Tree& tree, const Schedule& schedule, const Factors& factors,
                 const Batch& batch, int64_t width, void* const* local, int threads);

}  // namespace spcache
