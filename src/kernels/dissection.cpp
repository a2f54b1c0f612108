// Nested dissection down to parts that a minimum degree ordering does as well: that of METIS_NodeND goes on to some
// hundred vertices and then ignores what surrounds them, takes longer, and fills more.
//
// A. George, "Nested dissection of a regular finite element mesh" (1973), doi:10.1137/0710032. Parts ordered by
// minimum degree under constraints: C. Ashcraft, J. W. H. Liu, "Robust ordering of sparse matrices using multisection"
// (1998), doi:10.1137/S0895479896299081.
#include "dissection.hpp"

#include <metis.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

namespace spcache {
namespace {

// Parts of so many unknowns are not split: smaller ones cost time and save no work.
constexpr int64_t PART = 500;

// How uneven the two sides of a separator may be, in thousandths: METIS's own 200 leaves up to a quarter more work on
// grids of two dimensions, and half as much more again on some seeds in three (benchmarks/cases.py).
constexpr idx_t UNEVEN = 400;

// An undirected graph without loops, as METIS takes it. Every vertex stands for unknowns of one closed neighbourhood.
struct Graph {
  std::vector<idx_t> begin, neighbours, weight;  // [vertices + 1], [begin.back()], [vertices] number of unknowns
  std::vector<int32_t> vertex;                   // [vertices] number in the whole graph
  idx_t size() const { return idx_t(vertex.size()); }
};

Graph whole(int32_t n, const int64_t* indptr, const int32_t* indices) {
  Graph g;
  g.begin.assign(size_t(n) + 1, 0);
  auto each = [&](auto&& visit) {
    for (int32_t j = 0; j < n; j++)
      for (int64_t e = indptr[j]; e < indptr[j + 1]; e++)
        if (indices[e] != j) visit(indices[e], j);
  };
  int64_t count = 0;
  each([&](int32_t i, int32_t j) { g.begin[i + 1]++; g.begin[j + 1]++; count += 2; });
  if (count > IDX_MAX) throw std::overflow_error("the graph of the matrix exceeds METIS's indices");
  for (int32_t j = 0; j < n; j++) g.begin[j + 1] += g.begin[j];
  g.neighbours.resize(size_t(count));
  std::vector<idx_t> next(g.begin.begin(), g.begin.end() - 1);
  each([&](int32_t i, int32_t j) { g.neighbours[next[i]++] = j; g.neighbours[next[j]++] = i; });
  g.weight.assign(n, 1);
  g.vertex.resize(n);
  for (int32_t j = 0; j < n; j++) g.vertex[j] = j;
  return g;
}

// The subgraph of the vertices v with part[v] = p; `local` is scratch, [g.size()].
Graph induced(const Graph& g, const std::vector<idx_t>& part, idx_t p, std::vector<idx_t>& local) {
  Graph sub;
  idx_t count = 0;
  int64_t most = 0;
  for (idx_t v = 0; v < g.size(); v++)
    if (part[v] == p) local[v] = count++, most += g.begin[v + 1] - g.begin[v];
  sub.begin.reserve(size_t(count) + 1);
  sub.weight.reserve(count);
  sub.vertex.reserve(count);
  sub.neighbours.reserve(size_t(most));
  sub.begin.push_back(0);
  for (idx_t v = 0; v < g.size(); v++) {
    if (part[v] != p) continue;
    for (idx_t e = g.begin[v]; e < g.begin[v + 1]; e++)
      if (part[g.neighbours[e]] == p) sub.neighbours.push_back(local[g.neighbours[e]]);
    sub.begin.push_back(idx_t(sub.neighbours.size()));
    sub.weight.push_back(g.weight[v]);
    sub.vertex.push_back(g.vertex[v]);
  }
  return sub;
}

// leader[v]: the first vertex that has the neighbours of v and is one of them (or v itself), as the unknowns of one
// node of a mesh have.
std::vector<idx_t> leaders(const Graph& g) {
  const idx_t n = g.size();
  uint64_t buckets = 1;
  while (buckets < uint64_t(n)) buckets *= 2;
  std::vector<idx_t> leader(n), mark(n, -1), head(buckets, -1), next(n);
  std::vector<uint64_t> sum(n);  // of the closed neighbourhood, scattered: equal ones have equal sums
  auto scattered = [](idx_t i) { uint64_t h = (uint64_t(i) + 1) * 0x9e3779b97f4a7c15u; return h ^ h >> 29; };
  for (idx_t v = 0; v < n; v++) {
    sum[v] = scattered(v);
    for (idx_t e = g.begin[v]; e < g.begin[v + 1]; e++) sum[v] += scattered(g.neighbours[e]);
    const idx_t degree = g.begin[v + 1] - g.begin[v];
    idx_t& bucket = head[sum[v] & (buckets - 1)];
    leader[v] = v;
    for (idx_t u = bucket; u != -1; u = next[u]) {
      if (sum[u] != sum[v] || g.begin[u + 1] - g.begin[u] != degree) continue;
      mark[u] = v;
      for (idx_t e = g.begin[u]; e < g.begin[u + 1]; e++) mark[g.neighbours[e]] = v;
      bool same = mark[v] == v;
      for (idx_t e = g.begin[v]; same && e < g.begin[v + 1]; e++) same = mark[g.neighbours[e]] == v;
      if (!same) continue;
      leader[v] = u;
      break;
    }
    if (leader[v] == v) next[v] = bucket, bucket = v;
  }
  return leader;
}

// Puts a graph into parts and separators, numbered downwards from the end.
class Dissection {
 public:
  Dissection(int32_t n, int32_t* set) : set_(set), next_(n) {
    METIS_SetDefaultOptions(options_);
    options_[METIS_OPTION_SEED] = 1;  // the same ordering every time
    options_[METIS_OPTION_NUMBERING] = 0;
    options_[METIS_OPTION_UFACTOR] = UNEVEN;
  }
  int run(Graph graph) {
    waiting_.push_back(std::move(graph));
    while (!waiting_.empty()) {
      graph = std::move(waiting_.back());
      waiting_.pop_back();
      if (const int status = split(graph); status != METIS_OK) return status;
    }
    return METIS_OK;
  }
  // One more set, before all there are: vertices v of g with part[v] = p.
  void number(const Graph& g, const std::vector<idx_t>& part, idx_t p) {
    bool any = false;
    for (idx_t v = 0; v < g.size(); v++)
      if (part[v] == p) {
        if (!any) next_--;
        any = true;
        set_[g.vertex[v]] = next_;
      }
  }
  int32_t first() const { return next_; }

 private:
  int split(Graph& g) {
    int64_t total = 0, side[3] = {0, 0, 0};
    for (idx_t w : g.weight) total += w;
    std::vector<idx_t> part(g.size(), 0);
    if (total > PART && !g.neighbours.empty()) {
      idx_t vertices = g.size(), separator;
      const int status = METIS_ComputeVertexSeparator(&vertices, g.begin.data(), g.neighbours.data(), g.weight.data(),
                                                      options_, &separator, part.data());
      if (status != METIS_OK) return status;
      for (idx_t v = 0; v < g.size(); v++) side[part[v]] += g.weight[v];
    }
    // What cannot be cut into two sides of some size stays whole; so the depth is bounded by the logarithm.
    if (10 * std::min(side[0], side[1]) <= total) {
      std::fill(part.begin(), part.end(), 0);
      number(g, part, 0);
      return METIS_OK;
    }
    number(g, part, 2);
    std::vector<idx_t> local(g.size());
    waiting_.push_back(induced(g, part, 0, local));
    waiting_.push_back(induced(g, part, 1, local));
    return METIS_OK;
  }

  int32_t* set_;
  int32_t next_;
  idx_t options_[METIS_NOPTIONS];
  std::vector<Graph> waiting_;
};

}  // namespace

int dissect(int32_t n, const int64_t* indptr, const int32_t* indices, int32_t* set) {
  Graph g = whole(n, indptr, indices);
  std::vector<idx_t> part(n, 0), local(n), leader = leaders(g);
  // Vertices with so many neighbours come last: no separator is without them, and METIS would take long to see it.
  const double dense = std::max(16.0, 10 * std::sqrt(double(n)));
  for (idx_t v = 0; v < g.size(); v++) {
    if (double(g.begin[v + 1] - g.begin[v]) > dense) part[v] = 2;
    else if (leader[v] != v) part[v] = 1, g.weight[leader[v]]++;
  }
  Dissection dissection(n, set);
  dissection.number(g, part, 2);
  if (const int status = dissection.run(induced(g, part, 0, local)); status != METIS_OK) return status;
  for (int32_t v = 0; v < n; v++) set[v] = part[v] == 1 ? set[leader[v]] : set[v];
  for (int32_t v = 0; v < n; v++) set[v] -= dissection.first();
  return METIS_OK;
}

}  // namespace spcache
