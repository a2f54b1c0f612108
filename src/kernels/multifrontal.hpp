// What the numeric kernels share with the analysis: one plain struct of pointers, one table of functions.
// The kernels are compiled once per instruction set and therefore see no standard library header.
#pragma once
#include <stdint.h>

#include "assembly.hpp"

namespace spcache {

// A stretch of rows of an update matrix that is contiguous in the parent's front too.
struct Run {
  int32_t from;    // first row in the update matrix
  int32_t to;      // first row in the parent's front
  int32_t length;
};

// The assembly tree of one canonical structure. Supernode s owns columns first[s] .. first[s+1] of the factor.
// Its front has m = k + (row[s+1] - row[s]) rows: the k pivots and the rows listed. The panel, m x k and column-major,
// is the factor itself; the update matrix, (m-k) x (m-k), lives in scratch memory until the parent has added it.
// Supernodes are numbered in postorder: a subtree is a range.
struct Tree {
  int32_t n;                // order of the matrix
  int32_t supernodes;
  const int32_t* perm;      // [n]              original index of pivot k
  const int32_t* first;     // [supernodes + 1] first column
  const int64_t* row;       // [supernodes + 1] into rows
  const int32_t* rows;      // [row[supernodes]] rows below the pivots, ascending, as pivot numbers
  const int64_t* panel;     // [supernodes + 1] offset of the panel in factor storage
  const int32_t* child;     // [supernodes + 1] into children
  const int32_t* children;  // [child[supernodes]]
  const int32_t* parent;    // [supernodes]     roots have -1
  const int32_t* relative;  // [row[supernodes]] the same rows as rows of the parent's front
  const int64_t* run;       // [supernodes + 1] into runs
  const Run* runs;          // [run[supernodes]] the same as stretches, listed where these are long
  // [n] for solves: with which row of its front each pivot was exchanged, one after the other, counted from the front's
  // first; null where none was.
  const int32_t* exchange;
};

// Scratch memory of one thread: update matrices of its own subtrees, those that all threads see, packed blocks.
// Supernode s has its update matrix at own + update[s], or, where update[s] < 0, at shared + ~update[s].
struct Scratch {
  void* own;      // [Schedule::own_size] elements
  void* shared;   // [Schedule::shared_size] elements
  void* pack;     // [Kernels::pack_size(largest front)] elements
  const int64_t* update;  // [supernodes]
  int32_t* queue;         // [Schedule::queue_size()] one for all threads
};

// Right-hand sides and solutions, [n, width] row-major, of which `count` from `offset` on are meant.
struct Rhs {
  const void* b;
  void* x;
  int64_t width, offset, count;
};

// What threads that share a large front do, one part after the other: begin the panel; then, when the values have been
// added, block of pivots by block of pivots all from PIVOTS to UPDATE_REST; finish the update matrix.
enum Part : int32_t {
  BEGIN_PANEL,   // sets columns begin .. end of the panel to what the children leave for them
  PIVOTS,        // factors the diagonal block
  ROWS,          // solves for rows begin .. end of the front, counted from the first pivot of the block
  PACK_PANEL,    // packs rows begin .. end after the block
  UPDATE_PANEL,  // updates the panel's columns begin .. end after the block
  PACK_REST,     // the same for the update matrix
  UPDATE_REST,
  FINISH_REST,   // adds what the children leave for columns begin .. end of the update matrix
};

// The same for the solve with one large front and one right-hand side: upwards gather; each block of pivots forward, the
// pivots, then their part of rows begin .. end below the block. Downwards inherit; from the last block backward, first the part of
// the rows below the block, for pivots begin .. end of it; scatter.
enum SolvePart : int32_t { GATHER, FORWARD_PIVOTS, FORWARD_ROWS, INHERIT, BACKWARD_ROWS, BACKWARD_PIVOTS, SCATTER };

struct Kernels {
  // Factors the supernodes begin .. end of one matrix into `factor` [Tree::panel[supernodes]], their children being
  // factored. Returns 0, or 1 + the pivot number that is not positive.
  int64_t (*factorize)(const Tree&, const Assembly&, const void* values, void* factor, int32_t begin, int32_t end,
                       const Scratch&);
  // The same for one front, in parts; see Part. The bits are those of `factorize`. `part` returns 0, or for PIVOTS 1 + the
  // column of the front whose pivot is not positive; J is the first pivot of the block.
  void (*assemble)(const Tree&, const Assembly&, const void* values, void* factor, int32_t s);
  int64_t (*part)(Part, const Tree&, void* factor, int32_t s, int64_t J, int64_t begin, int64_t end, const Scratch&);
  int64_t block, share;  // pivots of a block; rows or columns of which begin is a multiple; 0: fronts are not shared
  // One phase of x = A^-1 b for supernodes begin .. end: forward (upwards in the tree, children first) or, when all
  // of the forward phase is done, backward (downwards, parents first). At most `lanes` right-hand sides; `local` is
  // scratch memory, lanes * (n + Tree::row[supernodes]) elements aligned to 64 bytes, that threads share.
  void (*solve)(const Tree&, const void* factor, const Rhs&, bool downwards, int32_t begin, int32_t end, void* local);
  void (*solve_part)(SolvePart, const Tree&, const void* factor, const Rhs&, int32_t s, int64_t J, int64_t begin,
                     int64_t end, void* local);
  int64_t solve_block, large_panel;          // pivots of a block; numbers of a panel that is large, 0: none is
  int32_t lanes;                             // right-hand sides that `solve` takes at once
  int64_t (*pack_size)(int64_t largest_front);  // elements of Scratch::pack
};

// L entry by entry, columns one after the other: see Columns.
struct ColumnsView {
  int32_t n;
  const int32_t* perm;      // [n]           original index of pivot k
  const int32_t* begin;     // [n + 1]       first entry of each column, its pivot; the others ascend
  const int32_t* row;       // [begin[n]]
  const int32_t* target;    // for each column, the entries that the products of its rows below the pivot are subtracted from:
                            // those of the first with itself and all that follow, those of the second, ...
  const int64_t* panel;     // [supernodes + 1] of the tree
  const int32_t* entry;     // [panel[supernodes]] the entry at each place of the panels, -1 where there is none
};

// The matrices of a batch side by side, `width` to a group: number i of matrix l of a group is i * width + l. All that is
// computed here is interleaved like that: values, L (reciprocals on its diagonal), b and x.
struct Interleaving {
  int32_t width;
  void (*interleave)(const void* const* from, int64_t count, void* to);            // from [width], each [count]
  void (*separate)(const void* from, int64_t count, void* const* to, int lanes);  // to [lanes], each [count]
  // L of a group. For each matrix status as `Kernels::factorize` returns it, and spread: the square of the least over
  // the largest number on the diagonal, where it has a factor.
  void (*factorize)(const ColumnsView&, const Assembly&, const void* values, void* factor, int64_t* status, double* spread);
  // A^-1 b in place of b [n, columns]; work is as large.
  void (*solve)(const ColumnsView&, const void* factor, int64_t columns, void* b, void* work);
};

const Interleaving* interleaving_baseline(Dtype);  // null where there is none: complex numbers
const Interleaving* interleaving_avx2(Dtype);
const Interleaving* interleaving_avx512(Dtype);

const Kernels* kernels_baseline(Dtype);
const Kernels* kernels_avx2(Dtype);
const Kernels* kernels_avx512(Dtype);

}  // namespace spcache
