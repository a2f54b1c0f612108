// Threads that share a number of pieces of work.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace spcache {

// Calls work(i, thread) for each i < count, thread < min(threads, count), whoever is free taking the next. Threads live
// for one call: nothing has to survive a fork, and a start costs less than a small front. `work` must not throw.
template <class Work>
void share(int64_t count, int threads, Work work) {
  std::atomic<int64_t> next{0};
  auto take = [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, thread);
  };
  const int used = int(std::min<int64_t>(threads, count));
  if (used <= 1) return take(0);
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(used);
    for (int thread = 1; thread < used; thread++) helpers.emplace_back(take, thread);
  } catch (const std::exception&) {
    // no thread, or no memory for one, to be had: the others do its work
  }
  take(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace spcache
