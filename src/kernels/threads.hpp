// Threads that share a number of pieces of work.
//
// Workers stay for the next call: a new thread begins on the processor of its parent, where it may wait milliseconds for
// its turn; a sleeping one wakes up where it was. A worker that is lent to a call keeps away from the caller's processor.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace spcache {

// Waits a moment for what another processor is about to do, some 30 microseconds, before it is worth going to sleep.
template <class Done>
bool soon(Done done) {
  for (int tries = 0; tries < 2000; tries++) {
    if (done()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

// One piece of work for all workers of a crew.
struct Job {
  void (*run)(void* context, int thread);
  void* context;
  std::atomic<int> left;  // workers that are not done
  std::mutex mutex;
  std::condition_variable done;
};

class Worker {
 public:
  Worker() : thread_([this] { loop(); }) {
    native_ = thread_.native_handle();
    thread_.detach();
  }
  void start(Job* job, int thread) {
    index_ = thread;
    job_ = job;
    if (!asleep_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_one();
  }
  void avoid(int processor) {
#if defined(__linux__)
    if (processor == avoided_) return;
    cpu_set_t allowed;
    if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed)) return;  // the caller's
    if (processor >= 0 && CPU_COUNT(&allowed) > 1) CPU_CLR(processor, &allowed);
    if (!pthread_setaffinity_np(native_, sizeof allowed, &allowed)) avoided_ = processor;
#endif
  }

 private:
  void loop() {
    auto called = [this] { return job_.load() != nullptr; };
    for (;;) {
      if (!soon(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_ = true;
        wake_.wait(lock, called);
        asleep_ = false;
      }
      Job* const job = job_.exchange(nullptr);
      job->run(job->context, index_);
      std::lock_guard<std::mutex> lock(job->mutex);
      if (--job->left == 0) job->done.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<Job*> job_{nullptr};
  std::atomic<bool> asleep_{false};
  int index_ = 0, avoided_ = -1;
  pthread_t native_;
  std::thread thread_;  // last: it uses the rest
};

// Idle workers. Lives as long as the process; a forked child, which has none of them, begins anew.
class Workers {
 public:
  // Those of another native module, for the calls of this one: each has its own until it is told.
  static void adopt(Workers* workers) { adopted() = workers; }
  static Workers& all() {
    if (adopted()) return *adopted();
    alignas(Workers) static unsigned char memory[sizeof(Workers)];
    static Workers* const first = [] {
      pthread_atfork([] { instance()->mutex_.lock(); }, [] { instance()->mutex_.unlock(); },
                     [] { new (instance()) Workers; });
      return instance() = new (memory) Workers;
    }();
    return *first;
  }
  // As many as can be had, up to count.
  std::vector<Worker*> lend(int count) {
    std::vector<Worker*> lent;
    lent.reserve(count);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(lent.size()) < count && !idle_.empty()) lent.push_back(idle_.back()), idle_.pop_back();
    }
    try {
      while (int(lent.size()) < count) lent.push_back(new Worker);
    } catch (const std::exception&) {
      // no thread, or no memory for one, to be had: the others do its work
    }
    return lent;
  }
  void take_back(const std::vector<Worker*>& workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.insert(idle_.end(), workers.begin(), workers.end());
  }

 private:
  static Workers*& adopted() {
    static Workers* adopted = nullptr;
    return adopted;
  }
  static Workers*& instance() {
    static Workers* instance = nullptr;
    return instance;
  }
  std::mutex mutex_;
  std::vector<Worker*> idle_;
};

// The calling thread and the workers that it has been lent.
class Crew {
 public:
  explicit Crew(int threads) {
    if (threads <= 1) return;
    workers_ = Workers::all().lend(threads - 1);
#if defined(__linux__)
    const int processor = sched_getcpu();
    for (Worker* worker : workers_) worker->avoid(processor);
#endif
  }
  Crew(const Crew&) = delete;
  ~Crew() {
    if (!workers_.empty()) Workers::all().take_back(workers_);
  }
  int size() const { return 1 + int(workers_.size()); }

  // Calls work(i, thread) for each i < count, thread < size(), whoever is free taking the next. `work` must not throw.
  template <class Work>
  void share(int64_t count, Work work) const {
    std::atomic<int64_t> next{0};
    auto take = [&](int thread) {
      for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, thread);
    };
    const int helpers = int(std::min<int64_t>(int64_t(workers_.size()), count - 1));
    if (helpers <= 0) return take(0);
    Job job{[](void* context, int thread) { (*static_cast<decltype(take)*>(context))(thread); }, &take, {helpers}, {}, {}};
    for (int w = 0; w < helpers; w++) workers_[w]->start(&job, w + 1);
    take(0);
    soon([&] { return job.left == 0; });
    std::unique_lock<std::mutex> lock(job.mutex);
    job.done.wait(lock, [&] { return job.left == 0; });
  }

 private:
  std::vector<Worker*> workers_;
};

// The same for work of its own.
template <class Work>
void share(int64_t count, int threads, Work work) {
  Crew(int(std::min<int64_t>(threads, count))).share(count, work);
}

// Calls work(begin, end) for the ranges that `count` items are cut into, each of `size` items.
template <class Work>
void share_ranges(int64_t count, int64_t size, int threads, Work work) {
  share((count + size - 1) / size, threads, [&](int64_t i, int) { work(i * size, std::min(count, (i + 1) * size)); });
}

}  // namespace spcache
