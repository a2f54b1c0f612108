// Multifrontal LU over the tree and the schedules of the Cholesky engine: structures of A + A^T.
//
// L and U^H are two lower triangles of the same shape: two panels and two update matrices for each front, eliminated by
// the kernels of one. Pivots are the diagonal where its multipliers allow that; else rows, and columns where rows do not
// suffice, are exchanged among the pivots of the front, none is delayed to a parent (X. S. Li, J. W. Demmel 1998, "Making
// sparse Gaussian elimination scalable by static pivoting", doi:10.1109/SC.1998.10030, for what becomes of those that
// are not stable there: they are replaced where that would be hopeless, and solves are refined).
#pragma once
#include <stdint.h>

#include "multifrontal.hpp"
#include "pivots.hpp"

namespace spcache {

// The factor of one matrix A, scaled and its rows permuted: by fronts, rows and columns exchanged, L U.
struct Unsymmetric {
  const void* A;  // [nnz]
  void *lower;    // [Tree::panel[supernodes]] L, its diagonal of 1 included
  void *upper;    // [the same] U^H, on the diagonal the reciprocals
  int32_t *rows, *columns;  // [n] see Tree::exchange
};

// How threads share a large front: calls work(context, i) for each i < count, in any order.
struct Sharing {
  void (*share)(const void* crew, int64_t count, void (*work)(void* context, int64_t i), void* context);
  const void* crew;
};

struct UnsymmetricKernels {
  // Factors supernodes begin .. end, their children being factored. Scratch is [2]: for L and for U^H. Sharing: null for
  // one thread; the bits are the same.
  void (*factorize)(const Tree&, const Scatter&, const Unsymmetric&, int32_t begin, int32_t end, const Scratch*, Report&,
                    const Sharing*);
  int64_t (*work_size)(int64_t largest_front);  // elements of Scratch::pack
};

const UnsymmetricKernels* unsymmetric_baseline(Dtype);
const UnsymmetricKernels* unsymmetric_avx2(Dtype);
const UnsymmetricKernels* unsymmetric_avx512(Dtype);

}  // namespace spcache
