// The KLU engine: one analysis per plan, one klu_numeric per matrix.
//
// KLU (SuiteSparse, LGPL, linked as a shared library) factors R^-1 P A Q = L U + F: R scales the rows to a largest
// entry of 1, Q and the blocks come from the analysis, P from partial pivoting, F is what lies above the blocks. Where
// says singular, and entries are far apart in size, rows and columns of A are scaled by powers of two before.
// `klu_factor` chooses pivots; `refactor` below, not KLU's, uses them again for new values; KLU cannot copy a factor.
// All numbers are double or complex double here: float32 and complex64 are converted at the door.
#pragma once
#include <float.h>
#include <klu.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "assembly.hpp"
#include "pattern.hpp"
#include "refinement.hpp"
#include "threads.hpp"

namespace spcache {

// The diagonal is preferred as pivot down to this part of the largest entry of its column: KLU's own 0.001 as long as the
// reciprocal pivot growth of fresh pivots is at least GROWTH_LOOSE, which it is for circuits and meshes, else 0.3: the
// interior-point matrices under tests/data have scaled residuals of up to 2e8 eps with 0.001, 40 eps with 0.3. Where that
// adds WORTH_REFINING entries to the factor (power grids get 1.6 times as many, indefinite ones up to 2.6), and a probe shows that
// refinement makes up for the growth, it is 0.001 with refined solves.
constexpr double LOOSE_TOLERANCE = 0.001, STRICT_TOLERANCE = 0.3, GROWTH_LOOSE = 0.05;
constexpr int64_t WORTH_REFINING = 1 << 14;

// What a look at the pivots says (`check`). Reciprocal pivot growth of GROWTH_GOOD (fresh pivots) or GROWTH_KEPT (old
// ones; fresh ones reach 0.02 at worst on the real matrices): solves are left as they are, with scaled residuals up to
// about 300 eps. Less than that, or a smallest pivot that has fallen much further than the largest: a doubtful factor,
// whose solves ask for refinement. Pivots may be doubtful only if a probe shows that refinement works, else others are
// chosen; below GROWTH_HOPELESS without a probe. Old ones are not probed again as long as growth and smallest pivot are
// not much worse than they were.
constexpr double GROWTH_GOOD = 1e-2, GROWTH_KEPT = 0.02, GROWTH_HOPELESS = 1e-8, GROWTH_LOSS = 0.1, RCOND_LOSS = 1e-3;

// Refinement as the probe has it: to so many eps of |A| |x| + |b|, in so many steps, each of which has to halve it.
constexpr double REFINED = 32;
constexpr int PROBE_STEPS = 5;

// A pivot so far below its own column of A asks for the condition number (LOW_PIVOT). Singular to working precision: one
// of which only rounding is left (WEAK_PIVOT), and a condition number beyond 1/eps. Ratios found: at least 1e-8 in real
// matrices with condition numbers up to 1e16, at most 1e-11 in singular ones.
constexpr double LOW_PIVOT = 1e-7, WEAK_PIVOT = 1e-10;

// The functions of KLU by index type (32-bit, or wide) ...
template <bool wide> struct KluIndex;
#define SPCACHE_KLU_INDEX(WIDE, PREFIX, MAXTRANS) \
  template <> struct KluIndex<WIDE> { \
    using Common = PREFIX##common; \
    using Symbolic = PREFIX##symbolic; \
    using Numeric = PREFIX##numeric; \
    using Int = decltype(Symbolic::n); /* SuiteSparse_long or int64_t, as the version has it */ \
    static constexpr auto* defaults = PREFIX##defaults; \
    static constexpr auto* analyze = PREFIX##analyze; \
    static constexpr auto* analyze_given = PREFIX##analyze_given; \
    static constexpr auto* free_symbolic = PREFIX##free_symbolic; \
    static constexpr auto* maxtrans = MAXTRANS; \
    static constexpr auto* allocate = PREFIX##malloc; \
  };
SPCACHE_KLU_INDEX(false, klu_, btf_maxtrans)
SPCACHE_KLU_INDEX(true, klu_l_, btf_l_maxtrans)
#undef SPCACHE_KLU_INDEX

// ... and by number type too.
template <bool wide, class T> struct Klu;
#define SPCACHE_KLU(WIDE, NUMBER, PREFIX) \
  template <> struct Klu<WIDE, NUMBER> : KluIndex<WIDE> { \
    static constexpr auto* factor = PREFIX##factor; \
    static constexpr auto* solve = PREFIX##solve; \
    static constexpr auto* tsolve = PREFIX##tsolve; \
    static constexpr auto* free_numeric = PREFIX##free_numeric; \
  };
SPCACHE_KLU(false, double, klu_)
SPCACHE_KLU(false, Complex<double>, klu_z_)
SPCACHE_KLU(true, double, klu_l_)
SPCACHE_KLU(true, Complex<double>, klu_zl_)
#undef SPCACHE_KLU

// What a look at the pivots of one matrix said; see GROWTH_GOOD.
struct Look {
  double growth = NAN;    // reciprocal pivot growth; NaN: nobody looked
  double rcond = NAN;     // estimated reciprocal condition number, rows and columns scaled; NaN: there was no reason to
  bool doubtful = false;  // solves are to be refined
};

// The factors of one batch of values. Types are erased: what remains is batch, sizes and addresses.
class Factors {
 public:
  std::vector<int64_t> failed;  // [batch] column at which the matrix failed, -1: it has a factor
  std::vector<Look> looks;      // [batch]
  int64_t failures = 0;         // how many have none
  int64_t kept = 0;             // how many kept pivots chosen for earlier values, in the last factorize
  int64_t repivots = 0;         // how many were factorized anew because those failed

  virtual ~Factors() = default;
  // Factors values [batch, nnz of the assembly]; `donor`, if any, lends pivots to matrices that have none. Returns
  // KLU_OK, or KLU's negative status: then some matrices have failed without a reason. work is work_bytes() of scratch
  // for each thread. Threads share the batch: the result does not depend on their number.
  virtual int factorize(const Assembly&, const void* values, bool check, const Factors* donor, void* work,
                        int threads) = 0;
  // x[p] = A[select[p]]^-1 b[p], adjoint: A^-H, for p < count, row-major [count, n, width]; select null: p, or 0 if
  // the batch is 1. Writes nothing but x and work: any number of callers may solve at once. Threads share the p.
  virtual void solve(const void* b, void* x, int64_t count, int64_t width, const int64_t* select, bool adjoint,
                     void* work, int threads) const = 0;
  // How many of `threads` find work: for a factorization of the batch, or for `columns` right-hand sides of `count`.
  virtual int factorizing(int threads) const = 0;
  virtual int solving(int64_t count, int64_t columns, int threads) const = 0;
  virtual int64_t work_bytes() const = 0;
  virtual int64_t nbytes() const = 0;
  virtual int64_t nnz() const = 0;  // of the largest factor, 0 where there is none
};

// The analysis of one canonical structure, immutable once built.
class Analysis {
 public:
  int64_t n, rank;    // order, and structural rank: below n the matrix is singular whatever its values
  int64_t unmatched;  // a column that no row is left for, -1 where rank = n
  int64_t nnz;        // entries of the factor; those of A where the ordering predicts none
  double flops;       // of one factorization, -1 where the ordering predicts none
  int64_t largest_block;  // rows of the largest block of the block triangular form

  virtual ~Analysis() = default;
  virtual Factors* factors(Dtype, int64_t batch, bool strict) const = 0;  // strict: STRICT_TOLERANCE, from the start
  virtual Analysis* widened(int* status) const = 0;  // the same with 64-bit indices
  virtual int64_t nbytes() const = 0;
};

template <bool wide>
class AnalysisOf final : public Analysis {
 public:
  using K = KluIndex<wide>;
  using Int = typename K::Int;
  std::vector<Int> indptr;                   // [n + 1]
  std::vector<Int> indices;                  // [nnz(A)]
  std::vector<Int> given;                    // [n] order of rows and columns, or empty: KLU's own
  typename K::Common common;                 // options; every call works on a copy
  typename K::Symbolic* symbolic = nullptr;  // owned

  // permutation: [order] or null.
  template <class P, class R, class G>
  AnalysisOf(int64_t order, const P* Ap, const R* Ai, int ordering, const G* permutation) : AnalysisOf(order, Ap, Ai) {
    K::defaults(&common);
    common.ordering = ordering;
    if (permutation) given.assign(permutation, permutation + n);
    // Rows go the way of columns: the blocks are then those of the matrix whatever its diagonal.
    symbolic = permutation ? K::analyze_given(Int(n), indptr.data(), indices.data(), given.data(), given.data(), &common)
                           : K::analyze(Int(n), indptr.data(), indices.data(), &common);
    if (!symbolic) return;
    bool predicted = ordering == 0 && !permutation;
    flops = predicted ? symbolic->est_flops : -1;
    largest_block = symbolic->maxblock;
    nnz = predicted ? int64_t(symbolic->lnz + symbolic->unz) - n + symbolic->nzoff : int64_t(indices.size());
    if (ordering == 2 || permutation || symbolic->structural_rank < n) match();
    estimate_blocks();
  }
  ~AnalysisOf() override { K::free_symbolic(&symbolic, &common); }
  AnalysisOf(const AnalysisOf&) = delete;

  Factors* factors(Dtype dtype, int64_t batch, bool strict) const override;
  Analysis* widened(int* status) const override;
  int64_t nbytes() const override {
    size_t numbers = indptr.size() + indices.size() + given.size() + 3 * size_t(n) + 1;  // and P, Q, R of KLU
    return int64_t(sizeof *this + sizeof *symbolic + sizeof(Int) * numbers + sizeof(double) * size_t(n));
  }

 private:
  // Complete before anything can throw, so that the destructor runs.
  template <class P, class R>
  AnalysisOf(int64_t order, const P* Ap, const R* Ai) : indptr(Ap, Ap + order + 1), indices(Ai, Ai + Ap[order]) {
    n = rank = order;
    unmatched = -1;
  }
  // A maximum matching of columns to rows, for the structural rank and a column that is left over.
  void match() {
    std::vector<Int> column_of(n), work(5 * n);
    double effort;
    rank = K::maxtrans(Int(n), Int(n), indptr.data(), indices.data(), 0, &effort, column_of.data(), work.data());
    if (rank == n) return;
    std::vector<bool> matched(n, false);
    for (Int j : column_of)
      if (j >= 0) matched[j] = true;
    unmatched = std::find(matched.begin(), matched.end(), false) - matched.begin();
  }
  // klu_factor writes its own fill into Lnz where the ordering predicted none. Threads share Lnz: give it the size
  // that klu_factor would have begun with.
  void estimate_blocks() {
    for (Int b = 0; b < symbolic->nblocks; b++) {
      if (symbolic->Lnz[b] >= 0) continue;
      double entries = 0;
      for (Int k = symbolic->R[b]; k < symbolic->R[b + 1]; k++)
        entries += double(indptr[symbolic->Q[k] + 1] - indptr[symbolic->Q[k]]);
      symbolic->Lnz[b] = common.initmem / common.initmem_amd * entries;
    }
  }
};

// Analyzes a CSC structure (indptr [n + 1], indices [indptr[n]]; n > 0). ordering: 0 AMD, 1 COLAMD, 2 natural, each
// inside the blocks of the block triangular form; or where `given` is not null, that permutation [n] of rows and columns.
// Null, and KLU's status, where that fails.
inline Analysis* analyze(int64_t n, const int64_t* indptr, const int32_t* indices, int ordering, const int32_t* given,
                         bool wide, int* status) {
  constexpr int64_t LIMIT = int64_t(1) << 28;  // entries of A and of L below which 32-bit indices suffice
  if (!wide && indptr[n] + n < LIMIT) {
    auto narrow = std::make_unique<AnalysisOf<false>>(n, indptr, indices, ordering, given);
    *status = narrow->common.status;
    if (*status == KLU_INVALID) return nullptr;
    if (narrow->symbolic && (ordering != 0 || given || (narrow->symbolic->lnz >= 0 && narrow->symbolic->lnz < LIMIT)))
      return narrow.release();
  }
  auto large = std::make_unique<AnalysisOf<true>>(n, indptr, indices, ordering, given);
  *status = int(large->common.status);
  return large->symbolic ? large.release() : nullptr;
}

template <bool wide>
Analysis* AnalysisOf<wide>::widened(int* status) const {
  auto large = std::make_unique<AnalysisOf<true>>(n, indptr.data(), indices.data(), int(common.ordering),
                                                  given.empty() ? nullptr : given.data());
  *status = int(large->common.status);
  return large->symbolic ? large.release() : nullptr;
}

template <class S> struct Working { using type = double; };
template <class R> struct Working<Complex<R>> { using type = Complex<double>; };

// S: the caller's scalar type.
template <bool wide, class S>
class FactorsOf final : public Factors {
  using T = typename Working<S>::type;
  using K = Klu<wide, T>;
  using Int = typename K::Int;
  using Numeric = typename K::Numeric;
  using Common = typename K::Common;

  struct Factor {
    Numeric* numeric = nullptr;     // owned; null: no pivots yet
    double growth = 0, rcond = 0;   // of the pivots, in the last factorization with fresh ones
    bool strict = false;            // pivots are chosen with STRICT_TOLERANCE
    std::vector<double> scale;      // [2 n] powers of two for rows and columns of A; empty: ones
  };
  struct Pivots {
    double smallest = 0, rcond = 0;  // min |u_kk|, min |u_kk| / max |u_kk| (0 where one is not finite)
    double growth = 0;               // see `growth`
  };
  struct Outcome {
    int status;            // of KLU
    bool kept, repivoted;  // earlier pivots
  };
  static constexpr int64_t PARALLEL_FROM = 1 << 15;  // entries of all matrices from which a second thread pays
  const AnalysisOf<wide>& plan;  // outlives this
  std::vector<Factor> matrices;  // [batch]

 public:
  FactorsOf(const AnalysisOf<wide>& analysis, int64_t batch, bool strict) : plan(analysis), matrices(batch) {
    for (Factor& f : matrices) f.strict = strict;
    failed.assign(batch, 0);
    looks.resize(batch);
    failures = batch;
  }
  ~FactorsOf() override {
    for (Factor& f : matrices) release(f);
  }
  FactorsOf(const FactorsOf&) = delete;

  int64_t work_bytes() const override {  // the values of A and scale factors; or for 4 columns, X of KLU and b
    const int64_t bytes = int64_t(sizeof(T)) * std::max(int64_t(plan.indices.size()) + plan.n, 8 * plan.n);
    return (bytes + 63) / 64 * 64;  // threads do not share a cache line
  }
  int factorizing(int threads) const override {
    return int64_t(matrices.size() * plan.indices.size()) < PARALLEL_FROM ? 1 : at_most(threads, matrices.size());
  }
  int solving(int64_t count, int64_t columns, int threads) const override {
    return columns * plan.nnz < 8 * PARALLEL_FROM ? 1 : at_most(threads, size_t(count));
  }
  int64_t nnz() const override {
    int64_t most = 0;
    for (const Factor& f : matrices)
      if (f.numeric) most = std::max(most, entries(*f.numeric));
    return most;
  }
  int64_t nbytes() const override {
    size_t total = sizeof *this + matrices.size() * (sizeof(Factor) + sizeof(Look) + sizeof(int64_t));
    for (const Factor& f : matrices) total += f.scale.size() * sizeof(double);
    for (const Factor& f : matrices)
      if (f.numeric) each_array(*f.numeric, [&](const auto&, size_t count, size_t size) { total += count * size; });
    return int64_t(total);
  }

  int factorize(const Assembly& assembly, const void* values, bool check, const Factors* donor, void* work,
                int threads) override {
    const auto* lender = dynamic_cast<const FactorsOf*>(donor);  // null too where its indices have another size
    kept = repivots = 0;
    failures = int64_t(matrices.size());
    failed.assign(matrices.size(), std::max<int64_t>(plan.unmatched, 0));
    looks.assign(matrices.size(), Look());
    if (plan.unmatched >= 0) return KLU_OK;
    std::atomic<int> status{KLU_OK};
    std::atomic<int64_t> factorized{0}, trusted{0}, renewed{0};
    share(int64_t(matrices.size()), threads, [&](int64_t e, int thread) {
      if (status.load() < KLU_OK) return;
      T* A = reinterpret_cast<T*>(static_cast<char*>(work) + thread * work_bytes());
      memset(static_cast<void*>(A), 0, sizeof(T) * plan.indices.size());
      assemble(assembly, 0, static_cast<const S*>(values) + e * assembly.nnz, A);
      failed[e] = not_finite(A);
      if (failed[e] >= 0) return;  // older pivots stay
      const Factor* other = lender ? &lender->matrices[e % lender->matrices.size()] : nullptr;
      const Outcome outcome = factorize(matrices[e], other, A, check, &failed[e], looks[e]);
      if (outcome.status < KLU_OK) status = outcome.status;
      trusted += outcome.kept;
      renewed += outcome.repivoted;
      factorized += failed[e] < 0;
    });
    kept = trusted, repivots = renewed;
    failures -= factorized;
    return status;
  }

  void solve(const void* b, void* x, int64_t count, int64_t width, const int64_t* select, bool adjoint, void* work,
             int threads) const override {
    // Consecutive right-hand sides of one matrix go together.
    auto factor_of = [&](int64_t p) { return select ? select[p] : matrices.size() == 1 ? 0 : p; };
    const int64_t share_of_one = (count + threads - 1) / std::max(threads, 1);
    share(threads, threads, [&](int64_t part, int thread) {
      const int64_t end = std::min(count, (part + 1) * share_of_one);
      for (int64_t p = part * share_of_one, next; p < end; p = next) {
        int64_t f = factor_of(p);
        for (next = p + 1; next < end && factor_of(next) == f;) next++;
        const S* from = static_cast<const S*>(b) + p * plan.n * width;
        S* to = static_cast<S*>(x) + p * plan.n * width;
        if (failed[f] >= 0)
          memset(static_cast<void*>(to), 0xff, sizeof(S) * size_t((next - p) * plan.n * width));  // NaN in every type
        else
          solve(matrices[f], from, to, next - p, width, adjoint,
                reinterpret_cast<T*>(static_cast<char*>(work) + thread * work_bytes()));
      }
    });
  }

 private:
  static int at_most(int threads, size_t pieces) { return int(std::clamp<size_t>(pieces, 1, size_t(std::max(threads, 1)))); }
  static int64_t entries(const Numeric& N) { return int64_t(N.lnz) + N.unz + N.nzoff - N.n; }
  static double* numbers(const T* a) { return reinterpret_cast<double*>(const_cast<T*>(a)); }  // KLU only reads A
  Int* Ap() const { return const_cast<Int*>(plan.indptr.data()); }
  Int* Ai() const { return const_cast<Int*>(plan.indices.data()); }
  const T* diagonal(const Numeric& N) const { return static_cast<const T*>(N.Udiag); }

  void release(Factor& f) {
    Common common = plan.common;
    K::free_numeric(&f.numeric, &common);
  }

  // The first column with an entry that is not finite, -1 where there is none.
  int64_t not_finite(const T* A) const {
    constexpr int64_t reals = sizeof(T) / sizeof(double);
    if (all_finite(numbers(A), reals * int64_t(plan.indices.size()))) return -1;
    const Int* p = plan.indptr.data();
    while (all_finite(numbers(A + p[0]), reals * int64_t(p[1] - p[0]))) p++;
    return p - plan.indptr.data();
  }

  // Factors one matrix; *column becomes -1, or the column at which it failed.
  Outcome factorize(Factor& f, const Factor* donor, T* A, bool check, int64_t* column, Look& look) {
    Common common = plan.common;
    *column = 0;  // until it has a factor
    if (!f.numeric && donor && donor->numeric) {
      f = {copy(*donor->numeric, common), donor->growth, donor->rcond, donor->strict, donor->scale};
      if (!f.numeric) return {KLU_OUT_OF_MEMORY, false, false};
    }
    const bool old = f.numeric;
    if (!old) f.scale.clear();  // of values that had no factor
    if (old) {
      if (!f.scale.empty()) scale_matrix(A, f.scale);
      const Pivots pivots = refactor(*f.numeric, A, reinterpret_cast<double*>(A + plan.indices.size()));
      if (old_pivots_hold(f, A, pivots, check, look)) {
        *column = -1;
        return {KLU_OK, true, false};
      }
      f.strict |= f.growth < GROWTH_LOOSE;  // those that need refinement have not lasted
      release(f);
    }
    for (bool again = false;; again = true) {
      const Outcome outcome = factorize_freshly(f, A, check, column, look);
      if (!check || again || outcome.status < KLU_OK || *column < 0 || !equilibrated(f, A))
        return {outcome.status, false, old};
      release(f);
    }
  }

  // Chooses pivots for A; where there are none, `common` says why.
  void choose(Factor& f, const T* A, double tolerance, Common& common) const {
    common.tol = tolerance;
    f.numeric = K::factor(Ap(), Ai(), numbers(A), plan.symbolic, &common);
    f.growth = f.numeric ? growth(*f.numeric, A) : 0;
  }

  Outcome factorize_freshly(Factor& f, const T* A, bool check, int64_t* column, Look& look) {
    Common common = plan.common;
    look = Look();
    *column = 0;
    choose(f, A, f.strict ? STRICT_TOLERANCE : LOOSE_TOLERANCE, common);
    if (!f.strict && common.status >= KLU_OK && !(f.growth >= GROWTH_LOOSE)) {
      Factor strict;
      choose(strict, A, STRICT_TOLERANCE, common);
      if (check && f.numeric && strict.numeric && entries(*strict.numeric) >= entries(*f.numeric) + WORTH_REFINING &&
          refinable(f.growth, *f.numeric, A)) {
        release(strict);
      } else {
        release(f);
        f.numeric = strict.numeric, f.growth = strict.growth, f.strict = true;
      }
    }
    if (!f.numeric && common.status < KLU_OK) return {int(common.status), false, false};
    if (!f.numeric) {
      if (common.status == KLU_SINGULAR) *column = common.singular_col;  // numbered as the caller does
      return {int(common.status), false, false};
    }
    Pivots pivots = look_at(*f.numeric);
    f.rcond = pivots.rcond;
    *column = -1;
    if (check) {
      look.growth = f.growth;
      look.doubtful = !(look.growth >= GROWTH_GOOD);
      *column = singular_column(*f.numeric, pivots, A, look);
    }
    if (*column >= 0) release(f);
    return {KLU_OK, false, false};
  }

  // Factors A with the pivots of N, as klu_refactor does (T. A. Davis, E. Palamadai Natarajan 2010, "Algorithm 907: KLU",
  // doi:10.1145/1824801.1824814), column by column, left-looking, into the arrays of N; and looks at the pivots meanwhile.
  // reciprocal: scratch [n].
  Pivots refactor(const Numeric& N, const T* A, double* reciprocal) const {
    const auto& s = *plan.symbolic;
    const Int *const Ap = plan.indptr.data(), *const Ai = plan.indices.data(), *const Pinv = N.Pinv, *const Q = s.Q;
    double* const Rs = static_cast<double*>(N.Rs);
    T *const X = static_cast<T*>(N.Xwork), *const diagonal = static_cast<T*>(N.Udiag), *off = static_cast<T*>(N.Offx);
    memset(Rs, 0, sizeof(double) * size_t(plan.n));
    for (size_t p = 0; p < plan.indices.size(); p++) {
      double& most = Rs[Pinv[Ai[p]]];
      most = std::max(most, double(abs(A[p])));
    }
    bool tiny = false;
    for (int64_t i = 0; i < plan.n; i++) {
      if (Rs[i] == 0) Rs[i] = 1;
      tiny |= Rs[i] < DBL_MIN;
      reciprocal[i] = 1 / Rs[i];
    }
    memset(static_cast<void*>(X), 0, sizeof(T) * size_t(s.maxblock));
    double smallest = INFINITY, largest = 0, least = 1, poison = 0;  // 0 * u: NaN where an entry of U is not finite
    for (Int block = 0; block < s.nblocks; block++) {
      const Int begin = s.R[block], end = s.R[block + 1];
      T* const LU = static_cast<T*>(N.LUbx[block]);
      for (Int k = begin; k < end; k++) {
        double before = 0, after = 0;
        for (Int p = Ap[Q[k]]; p < Ap[Q[k] + 1]; p++) {
          const Int row = Pinv[Ai[p]];
          const T a = tiny ? over(A[p], Rs[row]) : reciprocal[row] * A[p];
          if (row < begin) {
            *off++ = a;
          } else {
            X[row - begin] = a;
            before = std::max(before, part(a));
          }
        }
        T* U = nullptr;
        const int64_t count = end - begin == 1 ? 0 : N.Ulen[k];
        if (count) {
          const Int* const Ui = reinterpret_cast<const Int*>(LU + N.Uip[k]);
          U = LU + N.Uip[k] + units(count);
          for (int64_t q = 0; q < count; q++) {
            const Int j = Ui[q];
            const T u = X[j];
            X[j] = T(0.0);
            U[q] = u;
            after = std::max(after, part(u));
            poison += 0 * part(u);
            const T* const L = LU + N.Lip[begin + j];
            const int64_t rows = N.Llen[begin + j];
            const Int* const Li = reinterpret_cast<const Int*>(L);
            const T* const Lx = L + units(rows);
            for (int64_t p = 0; p < rows; p++) X[Li[p]] -= Lx[p] * u;
          }
        }
        const T pivot = X[k - begin];
        X[k - begin] = T(0.0);
        diagonal[k] = pivot;
        const double size = abs(pivot);
        poison += 0 * size;
        smallest = std::min(smallest, size);
        largest = std::max(largest, size);
        if (end - begin == 1) continue;
        if (size < 8 * DBL_MIN) return {};  // its inverse might overflow
        const T inverse = inverse_of(pivot);
        T* const L = LU + N.Lip[k];
        const int64_t rows = N.Llen[k];
        const Int* const Li = reinterpret_cast<const Int*>(L);
        T* const Lx = L + units(rows);
        for (int64_t p = 0; p < rows; p++) {
          Lx[p] = inverse * X[Li[p]];
          X[Li[p]] = T(0.0);
        }
        after = std::max(after, part(pivot));
        if (after > 0 && before < least * after) least = before / after;
      }
    }
    if (poison != 0) return {smallest, 0, 0};
    return {smallest, smallest / largest, least};
  }
  static double over(double a, double b) { return a / b; }
  static Complex<double> over(Complex<double> a, double b) { return {a.re / b, a.im / b}; }
  static double inverse_of(double a) { return 1 / a; }
  static Complex<double> inverse_of(Complex<double> a) {
    const double scale = 1 / part(a);
    const Complex<double> z = scale * a;
    return (scale / (z.re * z.re + z.im * z.im)) * conj(z);
  }
  // Numbers of the factor that so many row numbers take.
  static int64_t units(int64_t count) { return (count * int64_t(sizeof(Int)) + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T)); }

  // [2 n] powers of two by which rows and columns of A are of about the same size; all ones where they are already.
  std::vector<double> equilibrating(const T* A) const {
    const int64_t n = plan.n;
    std::vector<int32_t> row(plan.indices.begin(), plan.indices.end()), column(row.size());
    for (int64_t j = 0; j < n; j++) std::fill(column.begin() + plan.indptr[j], column.begin() + plan.indptr[j + 1], int32_t(j));
    std::vector<double> scale(2 * n);
    equilibrate(int64_t(row.size()), row.data(), column.data(), n, n, false, A, scale.data(), scale.data() + n);
    return scale;
  }

  // Scales A, and notes how; false where it needs no scaling.
  bool equilibrated(Factor& f, T* A) const {
    const int64_t n = plan.n;
    std::vector<double> scale = equilibrating(A);
    if (std::all_of(scale.begin(), scale.end(), [](double s) { return s == 1; })) return false;
    scale_matrix(A, scale);
    if (f.scale.empty())
      f.scale = std::move(scale);
    else
      for (int64_t i = 0; i < 2 * n; i++) f.scale[i] *= scale[i];
    return true;
  }
  void scale_matrix(T* A, const std::vector<double>& scale) const {
    for (int64_t j = 0; j < plan.n; j++)
      for (Int p = plan.indptr[j]; p < plan.indptr[j + 1]; p++)
        A[p] = scale[plan.n + j] * (scale[plan.indices[p]] * A[p]);
  }

  // check = false: only a zero pivot counts.
  bool old_pivots_hold(const Factor& f, const T* A, const Pivots& pivots, bool check, Look& look) const {
    if (!check) return pivots.smallest != 0;
    if (!(f.rcond > 0 && pivots.rcond > 0)) return false;
    look.growth = pivots.growth;
    const bool fell = pivots.rcond < RCOND_LOSS * f.rcond;
    look.doubtful = look.growth < GROWTH_KEPT || fell;
    if (look.doubtful && (fell || look.growth < GROWTH_LOSS * f.growth) && !refinable(look.growth, *f.numeric, A)) return false;
    return singular_column(*f.numeric, pivots, A, look) < 0;
  }

  Pivots look_at(const Numeric& N) const {
    double smallest = INFINITY, largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < plan.n; k++) {
      double u = abs(diagonal(N)[k]);
      finite &= u <= DBL_MAX;
      if (u < smallest) smallest = u;
      if (u > largest) largest = u;
    }
    return {smallest, finite ? smallest / largest : 0, 0};
  }

  // Reciprocal pivot growth, min over columns of max |R^-1 A| / max |U| inside the blocks, as klu_rgrowth defines it
  // (which takes several times as long), by the larger part of complex numbers; 0 where U is not finite.
  double growth(const Numeric& N, const T* A) const {
    constexpr int64_t reals = sizeof(T) / sizeof(double);
    const auto& s = *plan.symbolic;
    double least = 1;
    for (Int block = 0; block < s.nblocks; block++) {
      const Int begin = s.R[block], end = s.R[block + 1];
      if (end - begin == 1) continue;
      const T* LU = static_cast<const T*>(N.LUbx[block]);
      for (Int k = begin; k < end; k++) {
        double before = 0;
        for (Int p = plan.indptr[s.Q[k]]; p < plan.indptr[s.Q[k] + 1]; p++) {
          const Int row = N.Pinv[plan.indices[p]];
          const double* a = numbers(A + p);
          const double size = reals == 1 ? fabs(a[0]) : std::max(fabs(a[0]), fabs(a[reals - 1]));
          if (row >= begin) before = std::max(before, size / N.Rs[row]);
        }
        // A column of U: its row numbers, filled up to whole numbers of the factor, then its entries.
        const int64_t count = N.Ulen[k];
        const double after = std::max(largest_of(numbers(LU + N.Uip[k] + units(count)), reals * count),
                                      largest_of(numbers(&diagonal(N)[k]), reals));
        if (after > 0 && before < least * after) least = before / after;
      }
    }
    return least;
  }

  // The column with the weakest pivot where A is singular to working precision, else -1. Pivots: see WEAK_PIVOT.
  int64_t singular_column(const Numeric& N, const Pivots& pivots, const T* A, Look& look) const {
    if (pivots.rcond > 0 && pivots.smallest >= LOW_PIVOT) return -1;  // no entry of R^-1 A exceeds 1
    const std::vector<double> top = column_sizes(N, A);
    double weakest = INFINITY;
    int64_t column = -1;
    for (int64_t k = 0; k < plan.n; k++) {
      double ratio = abs(diagonal(N)[k]) / top[plan.symbolic->Q[k]];
      if (!(ratio <= DBL_MAX)) ratio = 0;
      if (ratio < weakest) weakest = ratio, column = plan.symbolic->Q[k];
    }
    if (pivots.rcond == 0) return column;  // overflow
    if (weakest >= LOW_PIVOT) return -1;
    look.rcond = reciprocal_condition(N, A);
    return weakest >= WEAK_PIVOT || look.rcond >= DBL_EPSILON ? -1 : column;
  }

  // [n] the largest entry of each column of R^-1 A inside of its diagonal block.
  std::vector<double> column_sizes(const Numeric& N, const T* A) const {
    const auto& s = *plan.symbolic;
    std::vector<double> top(plan.n, 0);
    for (Int block = 0; block < s.nblocks; block++)
      for (Int k = s.R[block]; k < s.R[block + 1]; k++)
        for (Int p = plan.indptr[s.Q[k]]; p < plan.indptr[s.Q[k] + 1]; p++) {
          const Int row = N.Pinv[plan.indices[p]];
          if (row >= s.R[block]) top[s.Q[k]] = std::max(top[s.Q[k]], abs(A[p]) / N.Rs[row]);
        }
    return top;
  }

  // x = A^-1 x, or A^-H x, for columns one after the other; work: 4 n.
  void solve_in_place(const Numeric& N, T* x, int64_t columns, bool adjoint, T* work) const {
    Common common = plan.common;
    Numeric own = N;  // shares every array but the one that klu_solve writes
    own.Xwork = work;
    if (!adjoint)
      K::solve(plan.symbolic, &own, Int(plan.n), Int(columns), numbers(x), &common);
    else if constexpr (std::is_same_v<T, double>)
      K::tsolve(plan.symbolic, &own, Int(plan.n), Int(columns), x, &common);
    else
      K::tsolve(plan.symbolic, &own, Int(plan.n), Int(columns), numbers(x), 1, &common);
  }

  // Estimates the reciprocal condition number of C = E^-1 A D^-1, all of whose rows and columns have largest entries near
  // 1, in the 1-norm: how near A is to a singular matrix whatever the units of equations and unknowns (W. W. Hager 1984,
  // doi:10.1137/0905023, with the alternating vector of N. J. Higham 1988, doi:10.1145/50063.214386).
  // The better of two scalings counts: by largest entries alone, and after equilibration.
  double reciprocal_condition(const Numeric& N, const T* A) const {
    const double plain = reciprocal_condition(N, A, std::vector<double>(2 * plan.n, 1.0));
    if (plain > DBL_EPSILON / WEAK_PIVOT) return plain;
    const std::vector<double> scale = equilibrating(A);
    if (std::all_of(scale.begin(), scale.end(), [](double s) { return s == 1; })) return plain;
    return std::max(plain, reciprocal_condition(N, A, scale));
  }

  double reciprocal_condition(const Numeric& N, const T* A, const std::vector<double>& scale) const {
    const int64_t n = plan.n;
    std::vector<double> E(n, 0.0), D(n, 0.0), sums(n, 0.0);
    auto each = [&](auto visit) {
      for (int64_t j = 0; j < n; j++)
        for (Int p = plan.indptr[j]; p < plan.indptr[j + 1]; p++) {
          const Int i = plan.indices[p];
          visit(i, j, abs(scale[n + j] * (scale[i] * A[p])));
        }
    };
    each([&](Int i, int64_t, double a) { E[i] = std::max(E[i], a); });
    each([&](Int i, int64_t j, double a) { D[j] = std::max(D[j], a / E[i]); });
    each([&](Int i, int64_t j, double a) { sums[j] += a / E[i] / D[j]; });
    const double norm = *std::max_element(sums.begin(), sums.end());
    for (int64_t i = 0; i < n; i++) E[i] /= scale[i], D[i] /= scale[n + i];
    std::vector<T> x(n), work(4 * n);
    auto inverse = [&](bool adjoint) {  // x = C^-1 x = D A^-1 E x, or C^-H x; returns its 1-norm
      auto multiply = [&](const std::vector<double>& by) {
        for (int64_t i = 0; i < n; i++) x[i] = by[i] * x[i];
      };
      multiply(adjoint ? D : E);
      solve_in_place(N, x.data(), 1, adjoint, work.data());
      multiply(adjoint ? E : D);
      double total = 0;
      for (const T& v : x) total += abs(v);
      return total;
    };
    for (T& v : x) v = T(1.0 / double(n));
    double estimate = 0;
    int64_t last = -1;
    for (int round = 0; round < 5; round++) {
      const double now = inverse(false);
      if (!(now <= DBL_MAX)) return 0;
      if (round && now <= estimate) break;
      estimate = now;
      for (T& v : x) v = abs(v) > 0 ? (1 / abs(v)) * v : T(1.0);
      inverse(true);
      int64_t at = 0;
      for (int64_t i = 1; i < n; i++)
        if (abs(x[i]) > abs(x[at])) at = i;
      if (at == last) break;
      last = at;
      std::fill(x.begin(), x.end(), T(0.0));
      x[at] = T(1.0);
    }
    for (int64_t i = 0; i < n; i++) x[i] = T((i % 2 ? -1.0 : 1.0) * (1 + double(i) / double(std::max<int64_t>(n - 1, 1))));
    const double other = 2 * inverse(false) / (3 * double(n));
    return other <= DBL_MAX ? 1 / (norm * std::max(estimate, other)) : 0;
  }

  // Whether refinement leads to a small residual of a right-hand side of random signs. Errors as `residual`
  // (refinement.hpp) finds them.
  bool refinable(double growth, const Numeric& N, const T* A) const {
    if (!(growth >= GROWTH_HOPELESS)) return false;
    const int64_t n = plan.n;
    std::vector<T> b(n), x(n, T(0.0)), r, work(4 * n);
    std::vector<double> size(n);
    uint32_t state = 12345;
    for (T& v : b) {
      state = state * 1664525u + 1013904223u;
      v = T(state >> 31 ? 1.0 : -1.0);
    }
    for (int64_t i = 0; i < n; i++) b[i] = N.Rs[N.Pinv[i]] * b[i];  // each equation in its own units
    r = b;
    double error = INFINITY;
    for (int step = 0; step < PROBE_STEPS; step++) {
      solve_in_place(N, r.data(), 1, false, work.data());
      for (int64_t i = 0; i < n; i++) x[i] += r[i];
      for (int64_t i = 0; i < n; i++) r[i] = b[i], size[i] = abs(b[i]);
      for (int64_t j = 0; j < n; j++)
        for (Int p = plan.indptr[j]; p < plan.indptr[j + 1]; p++) {
          r[plan.indices[p]] -= A[p] * x[j];
          size[plan.indices[p]] += abs(A[p]) * abs(x[j]);
        }
      double worst = 0;
      for (int64_t i = 0; i < n; i++) {
        const double ratio = abs(r[i]) / size[i];
        if (!(ratio <= worst)) worst = size[i] <= DBL_MAX && ratio <= DBL_MAX ? ratio : INFINITY;
      }
      if (worst <= REFINED * DBL_EPSILON) return true;
      if (!(worst <= error / 2)) return false;
      error = worst;
    }
    return false;
  }

  // Solves for `count` blocks of right-hand sides [n, width] with one factor.
  void solve(const Factor& f, const S* b, S* x, int64_t count, int64_t width, bool adjoint, T* work) const {
    const int64_t n = plan.n, columns = count * width;
    auto scaled = [&](T* X, int64_t nrhs, bool rows) {
      if (f.scale.empty()) return;
      const double* s = f.scale.data() + (rows ? 0 : n);
      for (int64_t r = 0; r < nrhs; r++)
        for (int64_t i = 0; i < n; i++) X[r * n + i] = s[i] * X[r * n + i];
    };
    auto run = [&](T* X, int64_t nrhs) {
      scaled(X, nrhs, !adjoint);
      solve_in_place(*f.numeric, X, nrhs, adjoint, work);
      scaled(X, nrhs, adjoint);
    };
    if constexpr (std::is_same_v<S, T>) {
      if (width == 1) {  // columns lie one after the other already
        memcpy(x, b, sizeof(T) * size_t(n * count));
        for (int64_t c = 0; c < columns; c += 4096) run(x + c * n, std::min<int64_t>(4096, columns - c));
        return;
      }
    }
    T* rhs = work + 4 * n;  // [4, n], column-major
    for (int64_t c = 0; c < columns; c += 4) {  // KLU takes four columns at once
      const int64_t nrhs = std::min<int64_t>(4, columns - c);
      int64_t at[4];  // where each column begins in b and x
      for (int64_t r = 0; r < nrhs; r++) at[r] = (c + r) / width * n * width + (c + r) % width;
      for (int64_t r = 0; r < nrhs; r++)
        for (int64_t i = 0; i < n; i++) rhs[r * n + i] = T(b[at[r] + i * width]);
      run(rhs, nrhs);
      for (int64_t r = 0; r < nrhs; r++)
        for (int64_t i = 0; i < n; i++) x[at[r] + i * width] = S(rhs[r * n + i]);
    }
  }

  // Calls visit(pointer, count, size of one) for every array of a klu_numeric, as klu_free_numeric frees them.
  template <class N, class F>
  static void each_array(N& numeric, F visit) {
    const size_t n = size_t(numeric.n), off = size_t(numeric.nzoff) + 1, blocks = size_t(numeric.nblocks);
    visit(numeric.Pnum, n, sizeof(Int));
    visit(numeric.Pinv, n, sizeof(Int));
    visit(numeric.Lip, n, sizeof(Int));
    visit(numeric.Uip, n, sizeof(Int));
    visit(numeric.Llen, n, sizeof(Int));
    visit(numeric.Ulen, n, sizeof(Int));
    visit(numeric.Offp, n + 1, sizeof(Int));
    visit(numeric.Offi, off, sizeof(Int));
    visit(numeric.Offx, off, sizeof(T));
    visit(numeric.Udiag, n, sizeof(T));
    visit(numeric.Rs, n, sizeof(double));
    visit(numeric.Work, numeric.worksize, size_t(1));
    visit(numeric.LUsize, blocks, sizeof(size_t));
    visit(numeric.LUbx, blocks, sizeof(void*));
    for (size_t b = 0; b < blocks; b++)  // blocks of one row have none
      if (numeric.LUbx && numeric.LUbx[b]) visit(numeric.LUbx[b], numeric.LUsize[b], sizeof(T));
  }

  // A klu_numeric that owns copies of every array of `from`; null where memory runs out.
  static Numeric* copy(const Numeric& from, Common& common) {
    auto* to = static_cast<Numeric*>(K::allocate(1, sizeof(Numeric), &common));
    if (!to) return nullptr;
    *to = from;
    bool complete = true;
    each_array(*to, [&](auto& array, size_t count, size_t size) {
      const void* source = array;
      void* target = complete ? K::allocate(count, size, &common) : nullptr;
      array = static_cast<std::remove_reference_t<decltype(array)>>(target);
      complete &= target != nullptr;
      if (target && source != from.Work) memcpy(target, source, count * size);
    });
    if (!complete) {  // arrays not reached are null
      K::free_numeric(&to, &common);
      return nullptr;
    }
    to->Xwork = to->Work;
    to->Iwork = reinterpret_cast<Int*>(static_cast<T*>(to->Work) + to->n);
    return to;
  }
};

template <bool wide>
Factors* AnalysisOf<wide>::factors(Dtype dtype, int64_t batch, bool strict) const {
  switch (dtype) {
    case FLOAT32: return new FactorsOf<wide, float>(*this, batch, strict);
    case FLOAT64: return new FactorsOf<wide, double>(*this, batch, strict);
    case COMPLEX64: return new FactorsOf<wide, Complex<float>>(*this, batch, strict);
    default: return new FactorsOf<wide, Complex<double>>(*this, batch, strict);
  }
}

}  // namespace spcache
