#include "columns.hpp"

#include <algorithm>

namespace spcache {

Columns::Columns(const Plan& plan) : begin(1, 0), entry(size_t(plan.panel.back()), -1) {
  const int32_t n = plan.n;
  auto rows_of = [&](int32_t s) { return plan.first[s + 1] - plan.first[s] + plan.row[s + 1] - plan.row[s]; };
  auto global = [&](int32_t s, int64_t i) {  // row i of front s
    const int64_t k = plan.first[s + 1] - plan.first[s];
    return i < k ? plan.first[s] + int32_t(i) : plan.rows[plan.row[s] + i - k];
  };

  // Each column has the rows of A's, and those of its children but for their own pivots.
  std::vector<std::vector<int32_t>> rows(n);
  for (size_t e = 0; e < plan.supernode_of.size(); e++) {
    const int32_t s = plan.supernode_of[e];
    const int64_t p = plan.position_of[e] < 0 ? ~plan.position_of[e] : plan.position_of[e];
    rows[plan.first[s] + p / rows_of(s)].push_back(global(s, p % rows_of(s)));
  }
  for (int32_t j = 0; j < n; j++) {
    auto& own = rows[j];
    own.push_back(j);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    if (own.size() > 1) rows[own[1]].insert(rows[own[1]].end(), own.begin() + 1, own.end());
    row.insert(row.end(), own.begin(), own.end());
    begin.push_back(int32_t(row.size()));
  }

  std::vector<int32_t> at(n, -1);  // entry of the column at hand
  auto enter = [&](int32_t j) {
    for (int32_t t = begin[j]; t < begin[j + 1]; t++) at[row[t]] = t;
  };
  for (int32_t s = 0; s < plan.supernodes; s++)
    for (int32_t j = plan.first[s]; j < plan.first[s + 1]; j++) {
      enter(j);
      const int64_t m = rows_of(s), column = plan.panel[s] + (j - plan.first[s]) * m;
      for (int64_t i = j - plan.first[s]; i < m; i++)
        if (at[global(s, i)] >= begin[j]) entry[column + i] = at[global(s, i)];
    }

  for (int32_t j = 0; j < n; j++)
    for (int32_t b = begin[j] + 1; b < begin[j + 1]; b++) {
      enter(row[b]);
      for (int32_t a = b; a < begin[j + 1]; a++) target.push_back(at[row[a]]);
    }
}

ColumnsView Columns::view(const Plan& plan) const {
  return {plan.n, plan.perm.data(), begin.data(), row.data(), target.data(), plan.panel.data(), entry.data()};
}

int64_t Columns::nbytes() const {
  return int64_t((begin.capacity() + row.capacity() + entry.capacity() + target.capacity()) * sizeof(int32_t));
}

}  // namespace spcache
