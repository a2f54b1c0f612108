// The tasks of a schedule, done by a crew.
#pragma once
#include "analysis.hpp"
#include "threads.hpp"

namespace spcache {

constexpr int64_t SHARE_FROM = 480;  // rows of a front that threads share

// Smaller factors are solved with before a second thread has begun.
constexpr int64_t PARALLEL_SOLVE_FROM = 1 << 17;  // numbers in the factor

// Calls run(task, thread) for every task: upwards when its children are done, downwards when its parent is.
template <class Run>
void run_tasks(const Schedule& schedule, bool downwards, int32_t* memory, const Crew& crew, Run run) {
  const int32_t count = int32_t(schedule.tasks.size());
  if (crew.size() == 1 || count <= 1) {
    for (int32_t t = 0; t < count; t++) run(downwards ? count - 1 - t : t, 0);
    return;
  }
  // The tasks in the order in which they become ready; a place that is not filled yet holds -1.
  int32_t *queue = memory, *pending = memory + count;
  std::atomic<int32_t> filled{0}, taken{0};
  auto push = [&](int32_t task) { __atomic_store_n(queue + filled++, task, __ATOMIC_RELEASE); };
  for (int32_t t = 0; t < count; t++) {
    queue[t] = -1;
    pending[t] = schedule.tasks[t].children;
  }
  for (int32_t t = 0; t < count; t++)
    if (downwards ? schedule.tasks[t].parent < 0 : !pending[t]) push(t);
  crew.share(crew.size(), [&](int64_t, int thread) {
    for (int32_t place; (place = taken++) < count;) {
      int32_t task;
      for (int tries = 0; (task = __atomic_load_n(queue + place, __ATOMIC_ACQUIRE)) < 0; tries++)
        if (tries > 1000) std::this_thread::yield();
      run(task, thread);
      const int32_t parent = schedule.tasks[task].parent;
      if (downwards)
        for (int32_t c = schedule.first_child[task]; c < schedule.first_child[task + 1]; c++) push(schedule.child[c]);
      else if (parent >= 0 && __atomic_sub_fetch(pending + parent, 1, __ATOMIC_ACQ_REL) == 0)
        push(parent);
    }
  });
}

}  // namespace spcache
