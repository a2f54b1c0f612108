// Numeric Cholesky factorization and solves over the assembly tree. Included by one file per instruction set.
//
// J. W. H. Liu, "The multifrontal method for sparse matrix solution: theory and practice" (1992),
// doi:10.1137/1034004.
#include <type_traits>

#include "front.hpp"
#include "interleaved.hpp"
#include "solve.hpp"

namespace spcache {
namespace {

template <class T>
int64_t factorize(const Tree& t, const Assembly& a, const void* values, void* factor, int32_t begin, int32_t end,
                  const Scratch& scratch) {
  for (int32_t s = begin; s < end; s++) {
    const Front<T> f(t, factor, s, scratch);
    f.begin_panel(0, f.k);
    assemble(a, s, static_cast<const T*>(values), f.P);
    if (int64_t bad = factor_front(f.P, f.m, f.k, f.U, static_cast<T*>(scratch.pack))) return t.first[s] + bad;
    f.finish_rest(0, f.u);
  }
  return 0;
}

template <class T>
void assemble_values(const Tree& t, const Assembly& a, const void* values, void* factor, int32_t s) {
  assemble(a, s, static_cast<const T*>(values), static_cast<T*>(factor) + t.panel[s]);
}

template <class T>
int64_t part(Part what, const Tree& t, void* factor, int32_t s, int64_t J, int64_t begin, int64_t end,
             const Scratch& scratch) {
  const Front<T> f(t, factor, s, scratch);
  const int64_t m = f.m, kb = f.k - J < BLOCK ? f.k - J : BLOCK, next = J + kb;
  T* const block = f.P + J + J * m;
  const bool panel = what == PACK_PANEL || what == UPDATE_PANEL;
  const Packed<T> A = packed_in(static_cast<T*>(scratch.pack), panel ? m - next : f.u, kb);
  switch (what) {
    case BEGIN_PANEL: f.begin_panel(begin, end); break;
    case PIVOTS: return factor_panel(block, kb, kb, m);
    case ROWS: solve_rows(block, block, kb, m, begin, end); break;
    case PACK_PANEL: pack_both(block + kb, m, begin, end, A); break;
    case PACK_REST: pack_both(f.P + f.k + J * m, m, begin, end, A); break;
    case UPDATE_PANEL: update_packed(A, begin, end, f.P + next + next * m, m, false); break;
    case UPDATE_REST: update_packed(A, begin, end, f.U, f.u, J == 0); break;
    case FINISH_REST: f.finish_rest(begin, end); break;
  }
  return 0;
}

template <class T>
int64_t pack_size(int64_t rows) {
  if (rows < PACK_FROM || W<T> == 1) return 0;
  return ((rows + TILE_ROWS<T> - 1) / TILE_ROWS<T> * TILE_ROWS<T> + (rows + NB<T> - 1) / NB<T> * NB<T>) * BLOCK;
}

template <class T>
constexpr Kernels kernels_of = {factorize<T>, assemble_values<T>, part<T>, BLOCK, W<T> == 1 ? 0 : SHARE, solve<T>,
                                solve_part<T>, SOLVE_BLOCK, W<T> == 1 ? 0 : LARGE_PANEL, MANY * W<T>,
                                pack_size<T>};

const Kernels* choose(Dtype dtype) {
  switch (dtype) {
    case FLOAT32: return &kernels_of<float>;
    case FLOAT64: return &kernels_of<double>;
    case COMPLEX64: return &kernels_of<Complex<float>>;
    default: return &kernels_of<Complex<double>>;
  }
}

}  // namespace
}  // namespace spcache
