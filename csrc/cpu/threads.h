// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace specdiff::cpu {

// Elements that keep a thread busy for longer than it takes to wake it.
constexpr int64_t kElementsPerThread = 1 << 17;

// Calls body(item, thread) for every item < items; elements: the work, to decide on threads.
// OpenMP's threads are those that PyTorch works with; a team of our own would compete with them for
// the cores.
template <class Body>
void parallel_for(int64_t items, int64_t elements, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t item = next++; item < items; item = next++) body(item, thread);
  };
  if (threads <= 1 || items <= 1 || elements <= kElementsPerThread) return work(0);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  const int used = int(std::min<int64_t>({threads, items, elements / kElementsPerThread + 1}));
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < used; ++thread) helpers.emplace_back(work, thread);
  work(0);
  for (std::thread& helper : helpers) helper.join();
#endif
}

// Threads that go through stages together: each shares out its items, and ends when all are done.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Calls body(item) for every item < items.
  template <class Body>
  void each(int64_t items, const Body& body) {
    if (threads_ == 1) {
      for (int64_t item = 0; item < items; ++item) body(item);
      return;
    }
    std::atomic<int64_t>& next = next_[stage() % kStages];
    for (int64_t item = next++; item < items; item = next++) body(item);
    wait();
    // all have left the stage before the last, so its counter can serve again
    next_[(stage() + kStages - 1) % kStages].store(0, std::memory_order_relaxed);
    ++stage();
  }

  // Runs body() on all threads.
  template <class Body>
  void run(const Body& body) {
    if (threads_ == 1) return body();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads_)
    {
#pragma omp single
      threads_ = omp_get_num_threads();
      stage() = 0;
      body();
    }
#else
    std::vector<std::thread> helpers;
    const auto work = [&] {
      stage() = 0;
      body();
    };
    for (int thread = 1; thread < threads_; ++thread) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
#endif
  }

 private:
  static constexpr int kStages = 4;

  static int& stage() {  // that this thread is in
    static thread_local int number;
    return number;
  }

  // Until all threads have come here: awake for a while, as most stages are short, then asleep.
  void wait() {
    const int64_t round = round_.load();
    if (waiting_.fetch_add(1) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      if (asleep_.load() == 0) return;
      const std::lock_guard<std::mutex> lock(mutex_);
      return wake_.notify_all();
    }
    for (int tries = 0; tries < kTries; ++tries) {
      if (round_.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return round_.load() != round; });
    --asleep_;
  }

  static constexpr int kTries = 4000;  // some 50 to 150 us

  int threads_;
  std::atomic<int64_t> next_[kStages]{};
  std::atomic<int> waiting_{0};
  std::atomic<int64_t> round_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace specdiff::cpu
