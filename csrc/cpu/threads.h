// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace specdiff::cpu {

// Logits that keep a thread busy for longer than it takes to start one.
constexpr int64_t kLogitsPerThread = 1 << 17;

// Calls body(item, thread) for every item < items; logits: the work, to decide on threads.
template <class Body>
void parallel_for(int64_t items, int64_t logits, int threads, const Body& body) {
  const int64_t useful = std::min(items, logits / kLogitsPerThread + 1);
  const int used = int(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t item = next++; item < items; item = next++) body(item, thread);
  };
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < used; ++thread) helpers.emplace_back(work, thread);
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace specdiff::cpu
