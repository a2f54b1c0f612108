// Factors whose pivots are chosen inside of fronts: what L D L^H and LU have in common. Each comes with a report, which
// decides whether it is trusted, and whether solves are refined with the matrix, which is kept.
#pragma once
#include <stdint.h>

#include <memory>
#include <vector>

#include "analysis.hpp"
#include "assembly.hpp"
#include "pivots.hpp"

namespace spcache {

// The plan of a structure.
struct PivotedPlan {
  explicit PivotedPlan(Plan&& p) : plan(std::move(p)) {}
  virtual ~PivotedPlan() = default;
  virtual int64_t nbytes() const = 0;

  Plan plan;
};

// Why a matrix has no factor.
enum Verdict : int32_t { SOUND = 0, SINGULAR = 1, UNTRUSTED = 2 };

// Memory that factorizations and solves use meanwhile.
struct PivotedWorkspace {
  enum Use { SCALING, PROBE, REFINEMENT, RHS, LOCAL, USES };
  virtual ~PivotedWorkspace() = default;
  // Memory for one use at a time, the same as long as no more is asked for.
  void* buffer(Use use, int64_t bytes);
  int64_t nbytes = 0;

 protected:
  struct Free { void operator()(void* p) const; };
  std::vector<std::unique_ptr<void, Free>> memory;
  void* allocate(int64_t bytes);

 private:
  std::unique_ptr<void, Free> buffers[USES];
  int64_t sizes[USES] = {};
};

// The factors of one batch. Types are erased.
class PivotedFactors {
 public:
  std::vector<int64_t> failed;   // [batch] column at which the matrix failed, -1: it has a factor
  std::vector<int32_t> verdict;  // [batch]
  std::vector<Report> reports;   // [batch]
  std::vector<char> refined;     // [batch] whether solves are refined

  virtual ~PivotedFactors() = default;
  // Factors values [batch, nnz of the assembly]. check: a factor that cannot be trusted fails.
  virtual void factorize(const Assembly&, const void* values, bool check, const Schedule&, PivotedWorkspace* const* work,
                         int workspaces, int threads) = 0;
  // x = A[f]^-1 b, or A[f]^-H, for right-hand sides [n, width]. Returns the steps of refinement, or ~steps where they
  // did not lead to a small residual.
  virtual int64_t solve(int64_t f, const void* b, void* x, int64_t width, bool adjoint, const Schedule&, PivotedWorkspace&,
                        int threads) const = 0;
  virtual PivotedWorkspace* workspace(const Schedule&, int threads) const = 0;
  virtual int64_t nbytes() const = 0;
};

// Solves of a batch on threads: p-th right-hand side with factor select[p] (null: p, or the only one). Returns the
// largest number of steps, or ~that where one of them did not end well.
int64_t pivoted_solve(const PivotedFactors&, const void* b, void* x, int64_t count, int64_t stride, int64_t width,
                      const int64_t* select, bool adjoint, const Schedule&, PivotedWorkspace* const* work, int workspaces,
                      int threads);

// Magnitudes [slots] of the entries that values add up to; the assembly has one group.
void magnitudes(const Assembly&, Dtype, const void* values, int64_t slots, double* out);

}  // namespace spcache
