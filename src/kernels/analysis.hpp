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

struct Plan {
  Plan(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm);
  Tree tree() const;
  int64_t nbytes() const;

  Prediction prediction;
  int32_t n, supernodes = 0;
  int32_t largest_front = 0;         // rows
  int64_t update_size = 0;           // elements of both stacks together
  std::vector<int32_t> perm, first, rows, relative, child, children;
  std::vector<int64_t> row, panel, update, run;
  std::vector<Run> runs;
  std::vector<int32_t> supernode_of; // [nnz(structure)] canonical slot -> supernode
  std::vector<int64_t> position_of;  // [nnz(structure)] canonical slot -> place in that supernode's panel
};

// Both take the lower triangle of the structure (the diagonal may be missing); perm[k] is the original index of pivot k.
Prediction predict(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm);

// The whole symmetric adjacency without the diagonal, as METIS wants it.
void adjacency(int32_t n, const int64_t* indptr, const int32_t* indices, std::vector<int32_t>& xadj,
               std::vector<int32_t>& adjncy);

}  // namespace spcache
