// Multifrontal L D L^H (L D L^T for complex symmetric matrices) over the tree and the schedules of the Cholesky engine.
//
// Pivots of order 1 and 2 are chosen among the pivots of a front, each tested against its whole column of the front
// (J. R. Bunch, L. Kaufman 1977, doi:10.1090/S0025-5718-1977-0428694-0; tests as in I. S. Duff, J. K. Reid 1996,
// "Exploiting zeros on the diagonal in the direct solution of indefinite sparse symmetric linear systems",
// doi:10.1145/229473.229480). None is delayed to a parent: where no pivot of the front is stable, the best of them is
// taken, and replaced where that would be hopeless (O. Schenk, K. Gaertner 2006, "On fast factorization pivoting methods
// for sparse symmetric indefinite systems", http://eudml.org/doc/127439). The report says so, and the solve is refined.
#pragma once
#include <stdint.h>

#include "multifrontal.hpp"
#include "pivots.hpp"

namespace spcache {

// The factor of one matrix A, scaled: S A S = P L D L^H P^T.
struct Indefinite {
  const void* A;   // [nnz] the scaled lower triangle
  void* panels;    // [Tree::panel[supernodes]] L below the diagonal of 1; on it D^-1, its second entry above
  int32_t* order;  // [n] per front its rows in the order of elimination, counted from 0; ~row where one of two
};

// Scratch memory of a solve, in units of `lanes` elements, aligned to 64 bytes.
struct SolveScratch {
  void* x;       // [n] the right-hand sides, then the solutions, by pivots
  void* passed;  // [Tree::row[supernodes]] what fronts pass to their parents
  void* front;   // [2 * largest front] of one thread
};

// Right-hand sides of S A S: b and x are [n, width], row-major, of which `count` from `offset` on are meant.
struct IndefiniteKernels {
  // Factors supernodes begin .. end, their children being factored.
  void (*factorize)(const Tree&, const Scatter&, const Indefinite&, int32_t begin, int32_t end, const Scratch&, Report&);
  // One phase of a solve, as in Kernels.
  void (*solve)(const Tree&, const Indefinite&, const Rhs&, bool downwards, int32_t begin, int32_t end,
                const SolveScratch&);
  int32_t lanes;                                // right-hand sides that `solve` takes at once
  int64_t (*work_size)(int64_t largest_front);  // elements of Scratch::pack
};

const IndefiniteKernels* indefinite_baseline(Dtype, bool hermitian);
const IndefiniteKernels* indefinite_avx2(Dtype, bool hermitian);
const IndefiniteKernels* indefinite_avx512(Dtype, bool hermitian);

}  // namespace spcache
