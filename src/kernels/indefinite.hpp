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

// In a trial a pivot is left out whose multipliers are beyond 1 / TOLERABLE.
constexpr double TOLERABLE = 0.01;

// The factor of one matrix A, scaled: S A S = P L D L^H P^T.
struct Indefinite {
  const void* A;   // [nnz] the scaled lower triangle
  void* panels;    // [Tree::panel[supernodes]] L below the diagonal of 1; on it D^-1, its second entry above
  int32_t* order;  // [n] per front its rows in the order of elimination, counted from 0; ~row where one of two
  bool trial;      // rows whose pivots are not tolerable are left out: D^-1 = 0 says which
};

// Some of the pivots of a front: J .. j of it have just been found, none among j .. end; at first nothing.
struct Window {
  int64_t J = 0, j = 0, end = 0;
  int64_t without = 0;  // columns looked at since the last pivot
  bool fresh = true;    // the update matrix has not been written to
};

// Scratch memory of a solve, in units of `lanes` elements, aligned to 64 bytes.
struct SolveScratch {
  void* local;   // [n + Tree::row[supernodes]] the rows of all fronts
  void* pivots;  // [largest front] of one thread
};

// Right-hand sides of S A S: b and x are [n, width], row-major, of which `count` from `offset` on are meant.
struct IndefiniteKernels {
  // Factors supernodes begin .. end, their children being factored.
  void (*factorize)(const Tree&, const Scatter&, const Indefinite&, int32_t begin, int32_t end, const Scratch&, Report&);
  // The same for one front, in parts, as in Kernels: while w.j is less than its pivots, from PIVOTS to UPDATE_REST. A
  // window without pivots needs no updates. The bits are those of `factorize`.
  void (*assemble)(const Tree&, const Scatter&, const Indefinite&, int32_t s);
  void (*part)(Part, const Tree&, const Indefinite&, int32_t s, Window& w, int64_t begin, int64_t end, const Scratch&,
               Report&);
  int64_t share;  // rows or columns of which begin is a multiple; 0: fronts are not shared
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
