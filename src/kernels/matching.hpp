// Permutations that bring large entries to the diagonal, and the pairs of rows that follow for symmetric matrices.
#pragma once
#include <stdint.h>

namespace spcache {

// The row of each column, row_of [n], so that the product of the matched entries is largest. Entries of column j are
// begin[j] .. begin[j + 1] of row and log, their logarithms. False where no permutation has entries in all places.
bool match(int32_t n, const int64_t* begin, const int32_t* row, const double* log, int32_t* row_of);

// Pairs of rows of a symmetric matrix that are pivots of order 2 rather than 1, partner [n], i itself where it is alone.
// Takes the lower triangle and sizes of its entries. False where there is no such permutation as `match` finds.
bool pair(int32_t n, const int64_t* indptr, const int32_t* indices, const double* size, int32_t* partner);

}  // namespace spcache
