// The LDL engine: the plan of a symmetric structure, and the factors of batches of values.
//
// A matrix is scaled to S A S, S powers of two, so that the largest entry of each row is about 1 (D. Ruiz 2001, "A scaling
// algorithm to equilibrate both rows and columns norms in matrices"), and kept: solves that need it are refined with it.
#pragma once
#include <stdint.h>

#include <vector>

#include "indefinite.hpp"
#include "pivoted.hpp"

namespace spcache {

// The plan of a lower triangle. The tree may be that of a larger structure, in which paired columns look alike.
struct LdlPlan final : PivotedPlan {
  // indptr [n + 1], indices: the lower triangle. tree_indptr, tree_indices: a lower triangle that has it inside, slots
  // [nnz] saying where; perm [n].
  LdlPlan(int32_t n, const int64_t* indptr, const int32_t* indices, const int64_t* tree_indptr,
          const int32_t* tree_indices, const int32_t* slots, const int32_t* perm);
  int64_t nbytes() const override;
  // An order of elimination, order [n]: that of the plan, but rows that left_out marks come last among the pivots of a
  // front `steps` above their own, or of the root. Returns how many were moved.
  int64_t lift(const char* left_out, int steps, int32_t* order) const;

  std::vector<int64_t> indptr, begin;  // [n + 1], [supernodes + 1]
  std::vector<int32_t> indices, slot;  // [nnz]
  std::vector<uint32_t> target;        // [nnz]
};

// For `threads` threads.
struct LdlWorkspace final : PivotedWorkspace {
  LdlWorkspace(const LdlPlan&, const Schedule&, const IndefiniteKernels&, int64_t itemsize, int threads);
  void reserve(int64_t lanes);  // `solves`, for so many right-hand sides at once
  int64_t itemsize, rows, largest_front, lanes = 0;
  std::vector<Scratch> scratch;      // [threads]
  std::vector<SolveScratch> solves;  // [threads] for `lanes`
  int32_t* queue;                    // [Schedule::queue_size()]
};

// The factors of one batch.
class LdlFactors : public PivotedFactors {
 public:
  // Marks in left_out [n] the rows of the first of `values` that find no tolerable pivot in their fronts. False where
  // values are not finite. The factor of the first matrix is lost.
  virtual bool trial(const Assembly&, const void* values, const Schedule&, PivotedWorkspace&, char* left_out) = 0;
};

LdlFactors* ldl_factors(const LdlPlan&, Dtype, int64_t batch, const IndefiniteKernels* symmetric,
                        const IndefiniteKernels* hermitian);

}  // namespace spcache
