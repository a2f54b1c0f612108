// The steps of a sparse Cholesky analysis, each O(nnz(A)) or O(size of the supernodal structure).
//
// Elimination tree: J. W. H. Liu, "The role of elimination trees in sparse factorization" (1990),
// doi:10.1137/0611010. Column counts: J. R. Gilbert, E. G. Ng, B. W. Peyton, "An efficient algorithm to compute row
// and column counts for sparse Cholesky factorization" (1994), doi:10.1137/S089547989223692. Order of children: J. W. H.
// Liu, "On the storage requirement in the out-of-core multifrontal method" (1986), doi:10.1145/7921.11325.
#include "analysis.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace spcache {
namespace {

using Ints = std::vector<int32_t>;
using Longs = std::vector<int64_t>;

Ints elimination_tree(const Elimination& a) {
  const int32_t n = a.n;
  Ints parent(n, -1), ancestor(n, -1);
  for (int32_t i = 0; i < n; i++)
    for (int64_t e = a.row_ptr[i]; e < a.row_ptr[i + 1]; e++)
      for (int32_t j = a.columns[e]; j != -1 && j < i;) {
        int32_t next = ancestor[j];
        ancestor[j] = i;  // path compression
        if (next == -1) parent[j] = i;
        j = next;
      }
  return parent;
}

// Depth-first postorder of a forest; order[k] is the k-th node. Children are visited in the order of their numbers.
Ints postorder(const Ints& parent) {
  int32_t n = int32_t(parent.size());
  Ints head(n, -1), sibling(n, -1), order, stack;
  order.reserve(n);
  for (int32_t j = n - 1; j >= 0; j--)
    if (parent[j] != -1) { sibling[j] = head[parent[j]]; head[parent[j]] = j; }
  for (int32_t root = 0; root < n; root++) {
    if (parent[root] != -1) continue;
    stack.push_back(root);
    while (!stack.empty()) {
      int32_t j = stack.back();
      if (head[j] != -1) { stack.push_back(head[j]); head[j] = sibling[head[j]]; }
      else { order.push_back(j); stack.pop_back(); }
    }
  }
  return order;
}

int32_t find_root(Ints& ancestor, int32_t j) {
  int32_t root = j;
  while (ancestor[root] != root) root = ancestor[root];
  while (ancestor[j] != root) { int32_t next = ancestor[j]; ancestor[j] = root; j = next; }
  return root;
}

// Entries in each column of L, the diagonal included. A row i's subtree of the elimination tree has column j in it
// exactly if L(i, j) != 0; count its leaves, and take away each leaf's overlap with the one before (their common
// ancestor), then sum over descendants.
Ints column_counts(const Elimination& a) {
  const int32_t n = a.n;
  const Ints &parent = a.parent, &order = a.order;
  Ints first_descendant(n, -1), previous_leaf(n, -1), ancestor(n), maximum(n, -1), delta(n);
  for (int32_t k = 0; k < n; k++) {
    int32_t j = order[k];
    delta[j] = first_descendant[j] == -1 ? 1 : 0;  // a leaf of the tree counts itself
    for (; j != -1 && first_descendant[j] == -1; j = parent[j]) first_descendant[j] = k;
  }
  std::iota(ancestor.begin(), ancestor.end(), 0);
  for (int32_t k = 0; k < n; k++) {
    int32_t j = order[k];
    if (parent[j] != -1) delta[parent[j]]--;
    for (int64_t e = a.column_ptr[j]; e < a.column_ptr[j + 1]; e++) {
      int32_t i = a.rows[e];
      if (first_descendant[j] <= maximum[i]) continue;  // j is not a leaf of row i's subtree
      maximum[i] = first_descendant[j];
      delta[j]++;
      if (previous_leaf[i] != -1) delta[find_root(ancestor, previous_leaf[i])]--;
      previous_leaf[i] = j;
    }
    if (parent[j] != -1) ancestor[j] = parent[j];
  }
  for (int32_t k = 0; k < n; k++)
    if (parent[order[k]] != -1) delta[parent[order[k]]] += delta[order[k]];
  return delta;
}

template <class... V>
int64_t bytes_of(const V&... v) {
  return (int64_t(v.capacity() * sizeof(v[0])) + ...);
}

// Entries of a panel with k columns whose first has m rows, its upper triangle not counted.
double trapezoid(double k, double m) { return k * m - k * (k - 1) / 2; }

// Whether a supernode of k columns with this share of explicit zeros is worth having. Small fronts cost more by their
// number than by their size; the shares were measured on meshes and elasticity (benchmarks/).
bool worthwhile(double k, double zeros, double total) {
  double share = zeros / total;
  return (k <= 8 && share < 0.7) || (k <= 16 && share < 0.4) || (k <= 32 && share < 0.2) || share < 0.03;
}

// Mean length from which stretches of rows are added as vectors; shorter ones go one number at a time, because a vector
// that overlaps the one just stored has to wait for it.
constexpr int64_t LONG_RUN = 8;

// The supernodes while they grow by amalgamation: groups of fundamental supernodes, each named after its last. Lists are
// chains of indices, -1 at the end.
struct Groups {
  Ints columns, height;                     // height: rows of the first column's structure; columns 0: merged into another
  std::vector<double> zeros;                // explicit zeros accepted so far
  Ints first_member, last_member, next;     // fundamental supernodes
  Ints first_child, last_child, sibling;    // groups

  explicit Groups(size_t most) {
    for (Ints* each : {&columns, &height, &next, &first_child, &last_child, &sibling}) each->reserve(most);
  }
  int32_t size() const { return int32_t(columns.size()); }
  void add(int32_t rows) {
    columns.push_back(0);
    height.push_back(rows);
  }
  void begin_lists() {
    const size_t count = columns.size();
    zeros.assign(count, 0);
    next.assign(count, -1);
    first_child.assign(count, -1);
    last_child.assign(count, -1);
    sibling.assign(count, -1);
    first_member.resize(count);
    std::iota(first_member.begin(), first_member.end(), 0);
    last_member = first_member;
  }
  void add_child(int32_t g, int32_t c) { append(g, c, c); }
  void take_children(int32_t g, int32_t c) {
    if (first_child[c] != -1) append(g, first_child[c], last_child[c]);
    first_child[c] = last_child[c] = -1;
  }
  template <class Visit>
  void each_child(int32_t g, Visit visit) const {
    for (int32_t c = first_child[g]; c != -1; c = sibling[c]) visit(c);
  }
  double update_entries(int32_t g) const { return double(height[g] - columns[g]) * (height[g] - columns[g]); }

 private:
  void append(int32_t g, int32_t first, int32_t last) {
    (first_child[g] == -1 ? first_child[g] : sibling[last_child[g]]) = first;
    last_child[g] = last;
    sibling[last] = -1;
  }
};

// Merges children into parents, bottom up, as long as it is worthwhile. Groups come in postorder.
void amalgamate(Groups& groups) {
  std::vector<std::pair<double, int32_t>> candidates;
  for (int32_t g = 0; g < groups.size(); g++) {
    auto added = [&](int32_t c) {
      return trapezoid(groups.columns[c] + groups.columns[g], groups.columns[c] + groups.height[g]) -
             trapezoid(groups.columns[c], groups.height[c]) - trapezoid(groups.columns[g], groups.height[g]);
    };
    // The cheapest child first; what it brings in changes the price of the others, so each is asked again.
    candidates.clear();
    groups.each_child(g, [&](int32_t c) { candidates.emplace_back(added(c), c); });
    std::sort(candidates.begin(), candidates.end());
    groups.first_child[g] = groups.last_child[g] = -1;
    for (auto [price, c] : candidates) {
      const double zeros = groups.zeros[g] + groups.zeros[c] + added(c);
      const int32_t columns = groups.columns[c] + groups.columns[g], height = groups.columns[c] + groups.height[g];
      if (!worthwhile(columns, zeros, trapezoid(columns, height))) {
        groups.add_child(g, c);
        continue;
      }
      groups.columns[g] = columns;
      groups.height[g] = height;
      groups.zeros[g] = zeros;
      groups.columns[c] = 0;
      groups.next[groups.last_member[g]] = groups.first_member[c];
      groups.last_member[g] = groups.last_member[c];
      groups.take_children(g, c);
    }
  }
}

// The groups in a postorder that keeps the update matrices waiting for their parents small: among siblings first the one
// whose peak of update memory exceeds what it leaves the most.
Ints sequence_of(Groups& groups, const std::vector<int32_t>& roots) {
  std::vector<double> peak(groups.size(), 0);
  Ints children;
  for (int32_t g = 0; g < groups.size(); g++) {
    if (!groups.columns[g]) continue;
    children.clear();
    groups.each_child(g, [&](int32_t c) { children.push_back(c); });
    std::sort(children.begin(), children.end(), [&](int32_t a, int32_t b) {
      double left = peak[a] - groups.update_entries(a), right = peak[b] - groups.update_entries(b);
      return left != right ? left > right : a < b;
    });
    groups.first_child[g] = groups.last_child[g] = -1;
    double waiting = 0;
    for (int32_t c : children) {
      groups.add_child(g, c);
      peak[g] = std::max(peak[g], waiting + peak[c]);
      waiting += groups.update_entries(c);
    }
    peak[g] = std::max(peak[g], waiting + groups.update_entries(g));
  }
  Ints sequence, stack, following = groups.first_child;
  sequence.reserve(groups.size());
  for (int32_t root : roots) {
    stack.push_back(root);
    while (!stack.empty()) {
      int32_t& c = following[stack.back()];
      if (c != -1) {
        stack.push_back(c);
        c = groups.sibling[c];
      } else {
        sequence.push_back(stack.back());
        stack.pop_back();
      }
    }
  }
  return sequence;
}

}  // namespace

Elimination::Elimination(int32_t n_, const int64_t* indptr, const int32_t* indices, const int32_t* perm_)
    : n(n_), entries(indptr[n_]), perm(perm_, perm_ + n_), column_ptr(size_t(n_) + 1, 0), row_ptr(size_t(n_) + 1, 0), diagonal(n_, -1) {
  Ints inverse(n);
  for (int32_t k = 0; k < n; k++) inverse[perm[k]] = k;
  auto each = [&](auto&& visit) {
    for (int32_t j = 0; j < n; j++)
      for (int64_t e = indptr[j]; e < indptr[j + 1]; e++) visit(inverse[indices[e]], inverse[j], int32_t(e));
  };
  each([&](int32_t a, int32_t b, int32_t) {
    if (a != b) { column_ptr[std::min(a, b) + 1]++; row_ptr[std::max(a, b) + 1]++; }
  });
  std::partial_sum(column_ptr.begin(), column_ptr.end(), column_ptr.begin());
  std::partial_sum(row_ptr.begin(), row_ptr.end(), row_ptr.begin());
  rows.resize(column_ptr[n]);
  slots.resize(column_ptr[n]);
  columns.resize(row_ptr[n]);
  Longs next_column(column_ptr), next_row(row_ptr);
  each([&](int32_t a, int32_t b, int32_t slot) {
    const int32_t i = std::max(a, b), j = std::min(a, b);
    if (i == j) {
      diagonal[i] = slot;
      return;
    }
    const int64_t e = next_column[j]++;
    rows[e] = i;
    slots[e] = a < b ? ~slot : slot;
    columns[next_row[i]++] = j;
  });
  parent = elimination_tree(*this);
  order = postorder(parent);
  counts = column_counts(*this);
  for (int32_t c : counts) {
    prediction.nnz += c;
    prediction.flops += double(c) * c;
  }
}

int64_t Elimination::nbytes() const {
  return bytes_of(perm, column_ptr, row_ptr, rows, slots, columns, diagonal, parent, order, counts);
}

Plan::Plan(const Elimination& a) : prediction(a.prediction), n(a.n) {
  // Fundamental supernodes: consecutive columns, in postorder, with one structure.
  Ints inverse(n), group_of(n), start;
  for (int32_t k = 0; k < n; k++) inverse[a.order[k]] = k;
  auto above = [&](int32_t k) { return a.parent[a.order[k]] == -1 ? -1 : inverse[a.parent[a.order[k]]]; };
  Groups groups(n);
  for (int32_t k = 0; k < n; k++) {
    const int32_t count = a.counts[a.order[k]];
    if (k == 0 || above(k - 1) != k || a.counts[a.order[k - 1]] != count + 1) {
      groups.add(count);
      start.push_back(k);
    }
    group_of[k] = groups.size() - 1;
    groups.columns.back()++;
  }
  start.push_back(n);
  groups.begin_lists();
  Ints roots;
  for (int32_t g = 0; g < groups.size(); g++) {
    const int32_t up = above(start[g + 1] - 1);
    if (up == -1) roots.push_back(g);
    else groups.add_child(group_of[up], g);
  }
  amalgamate(groups);
  const Ints sequence = sequence_of(groups, roots);

  // Final column order: the members of each supernode in postorder of the elimination tree. `column` is the column of A
  // under the given permutation, `inverse` from now on its inverse.
  supernodes = int32_t(sequence.size());
  Ints column, number(groups.size(), -1), members;
  column.reserve(n);
  int64_t all_rows = 0;
  for (auto* each : {&first, &child}) each->reserve(size_t(supernodes) + 1);
  for (auto* each : {&row, &panel, &run}) each->reserve(size_t(supernodes) + 1);
  first.push_back(0);
  for (int32_t s = 0; s < supernodes; s++) {
    const int32_t g = sequence[s];
    number[g] = s;
    members.clear();
    for (int32_t f = groups.first_member[g]; f != -1; f = groups.next[f]) members.push_back(f);
    std::sort(members.begin(), members.end());
    for (int32_t f : members)
      for (int32_t k = start[f]; k < start[f + 1]; k++) column.push_back(a.order[k]);
    first.push_back(int32_t(column.size()));
    all_rows += groups.height[g] - groups.columns[g];
  }
  perm.resize(n);
  for (int32_t k = 0; k < n; k++) {
    perm[k] = a.perm[column[k]];
    inverse[column[k]] = k;
  }

  // Rows of each supernode: those of its own columns of A and those of its children's update matrices. What lies below the
  // diagonal of A lies there in the final order too, because descendants come before ancestors in both.
  Ints mark(n, -1), position(n, -1);
  rows.reserve(size_t(all_rows));
  children.reserve(supernodes);
  child.assign(1, 0);
  row.assign(1, 0);
  panel.assign(1, 0);
  run.assign(1, 0);
  for (int32_t s = 0; s < supernodes; s++) {
    int64_t begin = int64_t(rows.size());
    int32_t end = first[s + 1];
    auto add = [&](int32_t i) {
      if (i >= end && mark[i] != s) { mark[i] = s; rows.push_back(i); }
    };
    for (int32_t j = first[s]; j < end; j++)
      for (int64_t e = a.column_ptr[column[j]]; e < a.column_ptr[column[j] + 1]; e++) add(inverse[a.rows[e]]);
    groups.each_child(sequence[s], [&](int32_t g) {
      const int32_t c = number[g];
      children.push_back(c);
      for (int64_t e = row[c]; e < row[c + 1]; e++) add(rows[e]);
    });
    std::sort(rows.begin() + begin, rows.end());
    child.push_back(int32_t(children.size()));
    row.push_back(int64_t(rows.size()));
    int64_t k = end - first[s], m = k + row[s + 1] - row[s];
    if (m * k > int64_t(UINT32_MAX)) throw std::overflow_error("one panel of the factor exceeds 32-bit positions");
    panel.push_back(panel[s] + m * k);
    largest_front = std::max(largest_front, int32_t(m));
  }

  parent.assign(supernodes, -1);
  depth.assign(supernodes, 0);
  for (int32_t s = supernodes - 1; s >= 0; s--)
    for (int32_t c = child[s]; c < child[s + 1]; c++) {
      parent[children[c]] = s;
      depth[children[c]] = depth[s] + 1;
    }

  // The rows of each update matrix in the parent's front, and where each canonical entry lies in its panel.
  supernode_of.resize(size_t(a.entries));
  position_of.resize(size_t(a.entries));
  relative.resize(rows.size());
  Longs run_begin(supernodes, 0), run_end(supernodes, 0);
  std::vector<Run> unordered;
  for (int32_t s = 0; s < supernodes; s++) {
    int32_t k = first[s + 1] - first[s];
    for (int32_t j = first[s]; j < first[s + 1]; j++) position[j] = j - first[s];
    for (int64_t e = row[s]; e < row[s + 1]; e++) position[rows[e]] = k + int32_t(e - row[s]);
    const int64_t m = k + row[s + 1] - row[s];
    for (int32_t j = 0; j < k; j++) {
      const int32_t c = column[first[s] + j];
      auto place = [&](int32_t slot, int64_t i) {
        const bool exchanged = slot < 0;
        if (exchanged) slot = ~slot;
        supernode_of[slot] = s;
        position_of[slot] = exchanged ? ~(i + j * m) : i + j * m;
      };
      if (a.diagonal[c] != -1) place(a.diagonal[c], j);
      for (int64_t e = a.column_ptr[c]; e < a.column_ptr[c + 1]; e++) place(a.slots[e], position[inverse[a.rows[e]]]);
    }
    for (int32_t c = child[s]; c < child[s + 1]; c++) {
      int32_t t = children[c];
      run_begin[t] = int64_t(unordered.size());
      for (int64_t e = row[t]; e < row[t + 1]; e++) {
        int32_t from = int32_t(e - row[t]), to = relative[e] = position[rows[e]];
        // A run ends where the parent's pivots end, so that each lies in the panel or in the update matrix.
        if (from && to != k && unordered.back().to + unordered.back().length == to) unordered.back().length++;
        else unordered.push_back({from, to, 1});
      }
      if ((int64_t(unordered.size()) - run_begin[t]) * LONG_RUN > row[t + 1] - row[t]) unordered.resize(run_begin[t]);
      run_end[t] = int64_t(unordered.size());
    }
  }
  runs.reserve(unordered.size());
  for (int32_t s = 0; s < supernodes; s++) {
    runs.insert(runs.end(), unordered.begin() + run_begin[s], unordered.begin() + run_end[s]);
    run.push_back(int64_t(runs.size()));
  }
}

Tree Plan::tree() const {
  return {n,           supernodes,    perm.data(),  first.data(),    row.data(), rows.data(),
          panel.data(), child.data(), children.data(), parent.data(), relative.data(), run.data(), runs.data(), nullptr};
}

int64_t Plan::nbytes() const {
  return bytes_of(perm, first, rows, relative, child, children, parent, depth, row, panel, run, runs, supernode_of,
                  position_of);
}

}  // namespace spcache
