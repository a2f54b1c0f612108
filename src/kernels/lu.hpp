// The LU engine: the plan of a general structure, and the factors of batches of values.
//
// The matrix is B = R P A C: P a row matching that belongs to the plan, R and C powers of two after which the largest entry
// of each row and column is about 1 (D. Ruiz 2001, "A scaling algorithm to equilibrate both rows and columns norms in
// matrices"), or nothing where rows and columns are alike in size already. A, scaled, is kept for residuals.
#pragma once
#include <stdint.h>

#include <vector>

#include "pivoted.hpp"
#include "unsymmetric.hpp"

namespace spcache {

struct LuPlan final : PivotedPlan {
  // indptr [n + 1], indices: all of A by columns; row_of [n]: the row that the matching moves to the diagonal of each column.
  // tree_indptr, tree_indices: the lower triangle of P A + (P A)^T, slots [nnz] saying where there entries or their mirror
  // images are; perm [n].
  LuPlan(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* row_of, const int64_t* tree_indptr,
         const int32_t* tree_indices, const int32_t* slots, const int32_t* perm);
  int64_t nbytes() const override;

  std::vector<int64_t> indptr, begin;         // [n + 1], [supernodes + 1]
  std::vector<int32_t> indices, slot, rows;   // [nnz], [nnz]; [n] original row of each pivot
  std::vector<uint32_t> target;               // [nnz]
};

PivotedFactors* lu_factors(const LuPlan&, Dtype, int64_t batch, const UnsymmetricKernels*, const Kernels*);

}  // namespace spcache
