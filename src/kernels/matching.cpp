// I. S. Duff, J. Koster 2001, "On algorithms for permuting large entries to the diagonal of a sparse matrix",
// doi:10.1137/S0895479899358443: shortest augmenting paths. I. S. Duff, S. Pralet 2005, "Strategies for scaling and
// pivoting for sparse symmetric indefinite problems", doi:10.1137/04061043X: the cycles cut into pairs.
#include "matching.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <vector>

namespace spcache {

bool match(int32_t n, const int64_t* begin, const int32_t* row, const double* log, int32_t* row_of) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  // Costs: how far an entry is below the largest of its column. Duals u, v: cost - u_i - v_j >= 0, = 0 where matched.
  std::vector<double> top(n, -infinity), u(n, infinity), v(n, 0), distance(n, infinity);
  for (int32_t j = 0; j < n; j++) {
    for (int64_t e = begin[j]; e < begin[j + 1]; e++) top[j] = std::max(top[j], log[e]);
    for (int64_t e = begin[j]; e < begin[j + 1]; e++) u[row[e]] = std::min(u[row[e]], top[j] - log[e]);
  }
  std::vector<int32_t> column_of(n, -1), previous(n, -1), final;
  std::vector<int64_t> edge(n, -1);  // of each column's match
  std::fill(row_of, row_of + n, -1);
  auto reduced = [&](int32_t j, int64_t e) { return std::max(0.0, top[j] - log[e] - u[row[e]] - v[j]); };
  auto set = [&](int32_t j, int64_t e) { edge[j] = e, row_of[j] = row[e], column_of[row[e]] = j; };

  // As many as cost nothing; or do once another column makes way.
  for (int32_t j = 0; j < n; j++) {
    double least = infinity;
    for (int64_t e = begin[j]; e < begin[j + 1]; e++) least = std::min(least, top[j] - log[e] - u[row[e]]);
    if (least == infinity) return false;
    v[j] = least;
    auto free_of_cost = [&](int32_t c, int32_t other) {  // an entry of column c, in a row that is free
      for (int64_t e = begin[c]; e < begin[c + 1]; e++)
        if (row[e] != other && column_of[row[e]] < 0 && reduced(c, e) == 0) return e;
      return int64_t(-1);
    };
    int64_t found = -1;
    for (int64_t e = begin[j]; e < begin[j + 1] && found < 0; e++)  // the diagonal first
      if (row[e] == j && column_of[j] < 0 && reduced(j, e) == 0) found = e;
    if (found < 0) found = free_of_cost(j, -1);
    for (int64_t e = begin[j]; e < begin[j + 1] && found < 0; e++) {
      if (reduced(j, e) > 0) continue;
      const int32_t c = column_of[row[e]];
      const int64_t way = free_of_cost(c, row[e]);
      if (way < 0) continue;
      set(c, way);
      found = e;
    }
    if (found >= 0) set(j, found);
  }

  using Entry = std::pair<double, int32_t>;
  std::vector<int32_t> touched;
  std::vector<char> done(n, 0);
  for (int32_t start = 0; start < n; start++) {
    if (row_of[start] >= 0) continue;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> nearest;
    double shortest = infinity, here = 0;
    int32_t end = -1;
    touched.clear(), final.clear();
    for (int32_t j = start;;) {
      for (int64_t e = begin[j]; e < begin[j + 1]; e++) {
        const int32_t i = row[e];
        if (done[i]) continue;
        const double d = here + reduced(j, e);
        if (d >= shortest || d >= distance[i]) continue;
        if (distance[i] == infinity) touched.push_back(i);
        distance[i] = d;
        previous[i] = j;
        if (column_of[i] < 0) shortest = d, end = i;
        else nearest.emplace(d, i);
      }
      while (!nearest.empty() && (done[nearest.top().second] || nearest.top().first > distance[nearest.top().second]))
        nearest.pop();
      if (nearest.empty() || nearest.top().first >= shortest) break;
      const int32_t i = nearest.top().second;
      nearest.pop();
      done[i] = 1;
      final.push_back(i);
      here = distance[i];
      j = column_of[i];
    }
    if (end >= 0) {
      for (int32_t i : final) {
        u[i] += distance[i] - shortest;
        v[column_of[i]] -= distance[i] - shortest;
      }
      v[start] += shortest;
      for (int32_t i = end;;) {
        const int32_t j = previous[i], next = row_of[j];
        int64_t e = begin[j];
        while (row[e] != i) e++;
        set(j, e);
        if (j == start) break;
        i = next;
      }
    }
    for (int32_t i : touched) distance[i] = infinity, done[i] = 0;
    if (end < 0) return false;
  }
  return true;
}

bool pair(int32_t n, const int64_t* indptr, const int32_t* indices, const double* size, int32_t* partner) {
  // Both triangles, without zeros.
  std::vector<int64_t> begin(n + 1, 0);
  auto each = [&](auto&& visit) {
    for (int32_t j = 0; j < n; j++)
      for (int64_t e = indptr[j]; e < indptr[j + 1]; e++)
        if (size[e] > 0 && std::isfinite(size[e])) {
          visit(indices[e], j, e);
          if (indices[e] != j) visit(j, indices[e], e);
        }
  };
  each([&](int32_t, int32_t j, int64_t) { begin[j + 1]++; });
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  std::vector<int32_t> row(begin[n]), to(n);
  std::vector<double> log(begin[n]), diagonal(n, -std::numeric_limits<double>::infinity());
  each([&](int32_t i, int32_t j, int64_t e) {
    row[next[j]] = i;
    log[next[j]++] = std::log(size[e]);
    if (i == j) diagonal[j] = std::log(size[e]);
  });
  if (!match(n, begin.data(), row.data(), log.data(), to.data())) return false;

  std::iota(partner, partner + n, 0);
  auto entry = [&](int32_t i, int32_t j) {
    int64_t e = begin[j];
    while (row[e] != i) e++;
    return log[e];
  };
  std::vector<char> seen(n, 0);
  std::vector<int32_t> cycle;
  for (int32_t start = 0; start < n; start++) {
    cycle.clear();
    for (int32_t i = start; !seen[i]; i = to[i]) seen[i] = 1, cycle.push_back(i);
    const size_t length = cycle.size();
    if (length < 2) continue;
    if (length % 2) {  // the one with the largest diagonal stays alone
      const auto alone = std::max_element(cycle.begin(), cycle.end(), [&](int32_t a, int32_t b) { return diagonal[a] < diagonal[b]; });
      std::rotate(cycle.begin(), alone, cycle.end());
      cycle.erase(cycle.begin());
    } else {  // cut at every other entry, whichever leaves the larger product
      double one = 0, two = 0;
      for (size_t k = 0; k < length; k += 2) {
        one += entry(cycle[k + 1], cycle[k]);
        two += entry(cycle[(k + 2) % length], cycle[k + 1]);
      }
      if (two > one) std::rotate(cycle.begin(), cycle.begin() + 1, cycle.end());
    }
    for (size_t k = 0; k + 1 < cycle.size(); k += 2) partner[cycle[k]] = cycle[k + 1], partner[cycle[k + 1]] = cycle[k];
  }
  return true;
}

}  // namespace spcache
