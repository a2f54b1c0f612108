// The LDL engine: the plan of a symmetric structure, and the factors of batches of values.
//
// A matrix is scaled to S A S, S powers of two, so that the largest entry of each row is about 1 (D. Ruiz 2001, "A scaling
// algorithm to equilibrate both rows and columns norms in matrices"), and kept: solves that need it are refined with it.
#pragma once
#include <stdint.h>

#include <memory>
#include <vector>

#include "analysis.hpp"
#include "assembly.hpp"
#include "indefinite.hpp"

namespace spcache {

// The plan of a lower triangle. The tree may be that of a larger structure, in which paired columns look alike.
struct LdlPlan {
  // indptr [n + 1], indices: the lower triangle. tree_indptr, tree_indices: a lower triangle that has it inside, slots
  // [nnz] saying where; perm [n].
  LdlPlan(int32_t n, const int64_t* indptr, const int32_t* indices, const int64_t* tree_indptr,
          const int32_t* tree_indices, const int32_t* slots, const int32_t* perm);
  int64_t nbytes() const;
  // An order of elimination, order [n]: that of the plan, but rows that left_out marks come last among the pivots of a
  // front `steps` above their own, or of the root. Returns how many were moved.
  int64_t lift(const char* left_out, int steps, int32_t* order) const;

  Plan plan;
  std::vector<int64_t> indptr, begin;  // [n + 1], [supernodes + 1]
  std::vector<int32_t> indices, slot;  // [nnz]
  std::vector<uint32_t> target;        // [nnz]
};

// Why a matrix has no factor.
enum Verdict : int32_t { SOUND = 0, SINGULAR = 1, UNTRUSTED = 2 };

// Memory that factorizations and solves use meanwhile, for `threads` threads.
struct LdlWorkspace {
  LdlWorkspace(const LdlPlan&, const Schedule&, const IndefiniteKernels&, int64_t itemsize, int threads);
  void reserve(int64_t lanes);  // `solves`, for so many right-hand sides at once
  int64_t nbytes = 0, itemsize, rows, largest_front, lanes = 0;
  std::vector<Scratch> scratch;      // [threads]
  std::vector<SolveScratch> solves;  // [threads] for `lanes`
  int32_t* queue;                    // [Schedule::queue_size()]
  struct Free { void operator()(void* p) const; };
  std::vector<std::unique_ptr<void, Free>> memory;
  void* allocate(int64_t bytes);
};

// The factors of one batch. Types are erased.
class LdlFactors {
 public:
  std::vector<int64_t> failed;   // [batch] column at which the matrix failed, -1: it has a factor
  std::vector<int32_t> verdict;  // [batch]
  std::vector<Report> reports;   // [batch]
  std::vector<char> refined;     // [batch] whether solves are refined

  virtual ~LdlFactors() = default;
  // Factors values [batch, nnz of the assembly]. check: a factor that cannot be trusted fails.
  virtual void factorize(const Assembly&, const void* values, bool check, const Schedule&, LdlWorkspace* const* work,
                         int workspaces, int threads) = 0;
  // Marks in left_out [n] the rows of the first of `values` that find no tolerable pivot in their fronts. False where
  // values are not finite. The factor of the first matrix is lost.
  virtual bool trial(const Assembly&, const void* values, const Schedule&, LdlWorkspace&, char* left_out) = 0;
  // x = A[f]^-1 b, or A[f]^-H, for right-hand sides [n, width]. Returns the steps of refinement, or ~steps where they
  // did not lead to a small residual.
  virtual int64_t solve(int64_t f, const void* b, void* x, int64_t width, bool adjoint, const Schedule&, LdlWorkspace&,
                        int threads) const = 0;
  virtual const IndefiniteKernels& kernels() const = 0;  // for workspaces: any of them
  virtual int64_t nbytes() const = 0;
};

LdlFactors* ldl_factors(const LdlPlan&, Dtype, int64_t batch, const IndefiniteKernels* symmetric,
                        const IndefiniteKernels* hermitian);

// Solves of a batch on threads: p-th right-hand side with factor select[p] (null: p, or the only one). Returns the
// largest number of steps, or ~that where one of them did not end well.
int64_t ldl_solve(const LdlFactors&, const void* b, void* x, int64_t count, int64_t stride, int64_t width,
                  const int64_t* select, bool adjoint, const Schedule&, LdlWorkspace* const* work, int workspaces,
                  int threads);

// Magnitudes [slots] of the entries of the lower triangle that values add up to.
void ldl_magnitudes(const Assembly&, Dtype, const void* values, int64_t slots, double* out);

}  // namespace spcache
