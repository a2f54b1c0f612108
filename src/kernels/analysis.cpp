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

// Strictly triangular structure of the permuted matrix: for each column j the rows i > j, unsorted,
// and the same by rows: for each row i the columns j < i.
struct Permuted {
  Longs column_ptr, row_ptr;
  Ints rows, columns;
};

Permuted permute(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm) {
  Ints inverse(n);
  for (int32_t k = 0; k < n; k++) inverse[perm[k]] = k;
  Permuted p;
  p.column_ptr.assign(n + 1, 0);
  p.row_ptr.assign(n + 1, 0);
  auto each = [&](auto&& visit) {
    for (int32_t j = 0; j < n; j++)
      for (int64_t e = indptr[j]; e < indptr[j + 1]; e++)
        if (indices[e] != j) {
          int32_t a = inverse[indices[e]], b = inverse[j];
          visit(std::max(a, b), std::min(a, b));
        }
  };
  each([&](int32_t i, int32_t j) { p.column_ptr[j + 1]++; p.row_ptr[i + 1]++; });
  std::partial_sum(p.column_ptr.begin(), p.column_ptr.end(), p.column_ptr.begin());
  std::partial_sum(p.row_ptr.begin(), p.row_ptr.end(), p.row_ptr.begin());
  p.rows.resize(p.column_ptr[n]);
  p.columns.resize(p.row_ptr[n]);
  Longs next_column(p.column_ptr), next_row(p.row_ptr);
  each([&](int32_t i, int32_t j) { p.rows[next_column[j]++] = i; p.columns[next_row[i]++] = j; });
  return p;
}

// parent[j] = first i > j with L(i, j) != 0, or -1.
Ints elimination_tree(int32_t n, const Permuted& p) {
  Ints parent(n, -1), ancestor(n, -1);
  for (int32_t i = 0; i < n; i++)
    for (int64_t e = p.row_ptr[i]; e < p.row_ptr[i + 1]; e++)
      for (int32_t j = p.columns[e]; j != -1 && j < i;) {
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
Ints column_counts(int32_t n, const Permuted& p, const Ints& parent, const Ints& order) {
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
    for (int64_t e = p.column_ptr[j]; e < p.column_ptr[j + 1]; e++) {
      int32_t i = p.rows[e];
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

Prediction predict(const Ints& counts) {
  Prediction prediction;
  for (int32_t c : counts) {
    prediction.nnz += c;
    prediction.flops += double(c) * c;
  }
  return prediction;
}

// Entries of a panel with k columns whose first has m rows, its upper triangle not counted.
double trapezoid(double k, double m) { return k * m - k * (k - 1) / 2; }

// Whether a supernode of k columns with this share of explicit zeros is worth having. Small fronts cost more by their
// number than by their size; the shares were measured on meshes and elasticity (benchmarks/).
bool worthwhile(double k, double zeros, double total) {
  double share = zeros / total;
  return (k <= 6 && share < 0.5) || (k <= 12 && share < 0.3) || (k <= 32 && share < 0.1) || share < 0.03;
}

// Mean length from which stretches of rows are added as vectors; shorter ones go one number at a time, because a vector
// that overlaps the one just stored has to wait for it.
constexpr int64_t LONG_RUN = 8;

// A supernode while it grows by amalgamation.
struct Group {
  int32_t parent = -1, columns = 0, height = 0;  // height: rows of the first column's structure
  double zeros = 0;                              // explicit zeros accepted so far
  Ints members, children;                        // fundamental supernodes merged into this one; child groups
};

// Merges children into parents, bottom up, as long as it is worthwhile. `groups` comes in postorder.
void amalgamate(std::vector<Group>& groups) {
  for (int32_t g = 0; g < int32_t(groups.size()); g++) {
    Group& p = groups[g];
    auto added = [&](int32_t c) {
      const Group& child = groups[c];
      return trapezoid(child.columns + p.columns, child.columns + p.height) - trapezoid(child.columns, child.height) -
             trapezoid(p.columns, p.height);
    };
    // The cheapest child first; what it brings in changes the price of the others, so each is asked again.
    std::vector<std::pair<double, int32_t>> candidates;
    for (int32_t c : p.children) candidates.emplace_back(added(c), c);
    std::sort(candidates.begin(), candidates.end());
    Ints kept;
    for (auto [price, c] : candidates) {
      Group& child = groups[c];
      double zeros = p.zeros + child.zeros + added(c);
      if (!worthwhile(child.columns + p.columns, zeros, trapezoid(child.columns + p.columns, child.columns + p.height))) {
        kept.push_back(c);
        continue;
      }
      p.columns += child.columns;
      p.height += child.columns;
      p.zeros = zeros;
      p.members.insert(p.members.end(), child.members.begin(), child.members.end());
      for (int32_t grandchild : child.children) { groups[grandchild].parent = g; kept.push_back(grandchild); }
      child.columns = 0;
      child.members.clear();
      child.children.clear();
    }
    p.children = kept;
  }
}

double update_entries(const Group& g) { return double(g.height - g.columns) * (g.height - g.columns); }

}  // namespace

Prediction predict(int32_t n, const int64_t* indptr, const int32_t* indices, const int32_t* perm) {
  Permuted p = permute(n, indptr, indices, perm);
  Ints parent = elimination_tree(n, p);
  return predict(column_counts(n, p, parent, postorder(parent)));
}

Plan::Plan(int32_t n_, const int64_t* indptr, const int32_t* indices, const int32_t* fill_reducing) : n(n_) {
  // Elimination tree and column counts of the fill-reducing order, renumbered by a postorder of that tree.
  perm.assign(fill_reducing, fill_reducing + n);
  Permuted p = permute(n, indptr, indices, perm.data());
  Ints tree = elimination_tree(n, p), order = postorder(tree), counts = column_counts(n, p, tree, order);
  prediction = predict(counts);
  {
    Ints inverse(n), new_perm(n), new_tree(n), new_counts(n);
    for (int32_t k = 0; k < n; k++) inverse[order[k]] = k;
    for (int32_t k = 0; k < n; k++) {
      new_perm[k] = perm[order[k]];
      new_counts[k] = counts[order[k]];
      new_tree[k] = tree[order[k]] == -1 ? -1 : inverse[tree[order[k]]];
    }
    perm.swap(new_perm);
    tree.swap(new_tree);
    counts.swap(new_counts);
  }

  // Fundamental supernodes: consecutive columns with one structure.
  std::vector<Group> groups;
  Ints start, group_of(n);
  for (int32_t j = 0; j < n; j++) {
    bool same = j > 0 && tree[j - 1] == j && counts[j - 1] == counts[j] + 1;
    if (!same) {
      groups.emplace_back();
      groups.back().height = counts[j];
      groups.back().members.push_back(int32_t(start.size()));
      start.push_back(j);
    }
    group_of[j] = int32_t(groups.size()) - 1;
    groups.back().columns++;
  }
  start.push_back(n);
  for (int32_t g = 0; g < int32_t(groups.size()); g++) {
    int32_t up = tree[start[g + 1] - 1];
    if (up == -1) continue;
    groups[g].parent = group_of[up];
    groups[group_of[up]].children.push_back(g);
  }
  amalgamate(groups);

  // The order of the tree: among siblings first the one whose peak of update memory exceeds what it leaves the most.
  std::vector<double> peak(groups.size(), 0);
  Ints roots, sequence, stack;
  for (int32_t g = 0; g < int32_t(groups.size()); g++) {
    Group& node = groups[g];
    if (!node.columns) continue;
    if (node.parent == -1) roots.push_back(g);
    std::sort(node.children.begin(), node.children.end(), [&](int32_t a, int32_t b) {
      double left = peak[a] - update_entries(groups[a]), right = peak[b] - update_entries(groups[b]);
      return left != right ? left > right : a < b;
    });
    double waiting = 0;
    for (int32_t c : node.children) {
      peak[g] = std::max(peak[g], waiting + peak[c]);
      waiting += update_entries(groups[c]);
    }
    peak[g] = std::max(peak[g], waiting + update_entries(node));
  }
  Ints visited(groups.size(), 0);
  for (int32_t root : roots) {
    stack.push_back(root);
    while (!stack.empty()) {
      int32_t g = stack.back();
      if (visited[g] < int32_t(groups[g].children.size())) {
        int32_t c = groups[g].children[visited[g]++];
        stack.push_back(c);
      } else {
        sequence.push_back(g);
        stack.pop_back();
      }
    }
  }

  // Final column order: the members of each supernode in postorder of the elimination tree.
  supernodes = int32_t(sequence.size());
  Ints final_order, number(groups.size(), -1);
  final_order.reserve(n);
  first.push_back(0);
  for (int32_t s = 0; s < supernodes; s++) {
    Group& g = groups[sequence[s]];
    number[sequence[s]] = s;
    std::sort(g.members.begin(), g.members.end());
    for (int32_t f : g.members)
      for (int32_t j = start[f]; j < start[f + 1]; j++) final_order.push_back(j);
    first.push_back(int32_t(final_order.size()));
  }
  {
    Ints new_perm(n);
    for (int32_t k = 0; k < n; k++) new_perm[k] = perm[final_order[k]];
    perm.swap(new_perm);
  }
  p = permute(n, indptr, indices, perm.data());

  // Rows of each supernode: those of its own columns of A and those of its children's update matrices.
  Ints mark(n, -1), position(n, -1);
  child.assign(1, 0);
  row.assign(1, 0);
  panel.assign(1, 0);
  run.assign(1, 0);
  for (int32_t s = 0; s < supernodes; s++) {
    const Group& g = groups[sequence[s]];
    int64_t begin = int64_t(rows.size());
    int32_t end = first[s + 1];
    auto add = [&](int32_t i) {
      if (i >= end && mark[i] != s) { mark[i] = s; rows.push_back(i); }
    };
    for (int32_t j = first[s]; j < end; j++)
      for (int64_t e = p.column_ptr[j]; e < p.column_ptr[j + 1]; e++) add(p.rows[e]);
    for (int32_t c : g.children) {
      children.push_back(number[c]);
      for (int64_t e = row[number[c]]; e < row[number[c] + 1]; e++) add(rows[e]);
    }
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

  // The rows of each update matrix in the parent's front.
  relative.resize(rows.size());
  Longs run_begin(supernodes, 0), run_end(supernodes, 0);
  std::vector<Run> unordered;
  for (int32_t s = 0; s < supernodes; s++) {
    int32_t k = first[s + 1] - first[s];
    for (int32_t j = first[s]; j < first[s + 1]; j++) position[j] = j - first[s];
    for (int64_t e = row[s]; e < row[s + 1]; e++) position[rows[e]] = k + int32_t(e - row[s]);
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
  for (int32_t s = 0; s < supernodes; s++) {
    runs.insert(runs.end(), unordered.begin() + run_begin[s], unordered.begin() + run_end[s]);
    run.push_back(int64_t(runs.size()));
  }

  // Where each canonical entry lies in its panel.
  Ints inverse(n), supernode_of_column(n);
  for (int32_t k = 0; k < n; k++) inverse[perm[k]] = k;
  for (int32_t s = 0; s < supernodes; s++)
    for (int32_t j = first[s]; j < first[s + 1]; j++) supernode_of_column[j] = s;
  supernode_of.resize(indptr[n]);
  position_of.resize(indptr[n]);
  for (int32_t j = 0; j < n; j++)
    for (int64_t e = indptr[j]; e < indptr[j + 1]; e++) {
      int32_t a = inverse[indices[e]], b = inverse[j], i = std::max(a, b), c = std::min(a, b);
      int32_t s = supernode_of_column[c];
      int64_t k = first[s + 1] - first[s], m = k + row[s + 1] - row[s], local;
      if (i < first[s + 1]) {
        local = i - first[s];
      } else {
        auto found = std::lower_bound(rows.begin() + row[s], rows.begin() + row[s + 1], i);
        local = k + (found - (rows.begin() + row[s]));
      }
      supernode_of[e] = s;
      position_of[e] = local + (c - first[s]) * m;
    }
}

Tree Plan::tree() const {
  return {n,           supernodes,    perm.data(),  first.data(),    row.data(), rows.data(),
          panel.data(), child.data(), children.data(), relative.data(), run.data(), runs.data()};
}

int64_t Plan::nbytes() const {
  auto bytes = [](const auto&... v) { return (int64_t(v.size() * sizeof(v[0])) + ...); };
  return bytes(perm, first, rows, relative, child, children, parent, depth, row, panel, run, runs, supernode_of, position_of);
}

}  // namespace spcache
