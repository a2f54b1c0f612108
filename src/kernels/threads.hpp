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

// One call's work, for its workers.
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
  void start(Job* job, int thread, int processor) {
    avoid(processor);
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = job, index_ = thread;
    wake_.notify_one();
  }

 private:
  void loop() {
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return job_ != nullptr; });
        job = job_, job_ = nullptr;
      }
      job->run(job->context, index_);
      std::lock_guard<std::mutex> lock(job->mutex);
      if (--job->left == 0) job->done.notify_one();
    }
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

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* job_ = nullptr;
  int index_ = 0, avoided_ = -1;
  pthread_t native_;
  std::thread thread_;  // last: it uses the rest
};

// Idle workers. Lives as long as the process; a forked child, which has none of them, begins anew.
class Workers {
 public:
  static Workers& all() {
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
  static Workers*& instance() {
    static Workers* instance = nullptr;
    return instance;
  }
  std::mutex mutex_;
  std::vector<Worker*> idle_;
};

// Calls work(i, thread) for each i < count, thread < min(threads, count), whoever is free taking the next. `work` must
// not throw.
template <class Work>
void share(int64_t count, int threads, Work work) {
  std::atomic<int64_t> next{0};
  auto take = [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i, thread);
  };
  const int used = int(std::min<int64_t>(threads, count));
  if (used <= 1) return take(0);
  const std::vector<Worker*> workers = Workers::all().lend(used - 1);
  Job job{[](void* context, int thread) { (*static_cast<decltype(take)*>(context))(thread); }, &take,
          {int(workers.size())}, {}, {}};
#if defined(__linux__)
  const int processor = sched_getcpu();
#else
  const int processor = -1;
#endif
  for (size_t w = 0; w < workers.size(); w++) workers[w]->start(&job, int(w) + 1, processor);
  take(0);
  for (int spin = 0; spin < 2000 && job.left.load() > 0; spin++) {}
  {
    std::unique_lock<std::mutex> lock(job.mutex);
    job.done.wait(lock, [&] { return job.left.load() == 0; });
  }
  Workers::all().take_back(workers);
}

}  // namespace spcache
