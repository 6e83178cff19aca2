// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
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

}  // namespace specdiff::cpu
