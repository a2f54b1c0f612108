// Nested dissection: which vertices are ordered together, and in which sequence.
#pragma once
#include <stdint.h>

namespace spcache {

// Splits the graph of a lower-triangular structure by vertex separators (METIS) into parts of some hundred vertices.
//   set  [n] out: parts and separators, numbered from 0 so that each comes after all that it separates
// Returns METIS_OK, or METIS's status. Not to be called by two threads at once: METIS calls rand().
int dissect(int32_t n, const int64_t* indptr, const int32_t* indices, int32_t* set);

}  // namespace spcache
