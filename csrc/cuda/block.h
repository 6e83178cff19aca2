// What the threads of a block find together. All of them call, and all of them get the answer.
#pragma once

#include "device.h"

namespace specdiff::cuda {

constexpr int kBins = 512;

struct Shared {
  int64_t of_warp[kWarps];
  int64_t beside[kWarps];
  int64_t found, left, column;
  int64_t bins[kBins];
};

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// What thread 0 has.
__device__ inline int64_t from_first(int64_t x, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.found = x;
  __syncthreads();
  return shared.found;
}

// Of numbers >= 0, in three pieces whose sums over a warp fit 32 bits.
__device__ inline int64_t warp_sum(int64_t x) {
  constexpr int64_t kPiece = (1 << 26) - 1;
  const int64_t low = __reduce_add_sync(kAll, unsigned(x & kPiece));
  const int64_t middle = __reduce_add_sync(kAll, unsigned(x >> 26 & kPiece));
  const int64_t high = __reduce_add_sync(kAll, unsigned(x >> 52));
  return low + (middle << 26) + (high << 52);
}

__device__ inline int64_t block_sum(int64_t x, Shared& shared) {
  x = warp_sum(x);
  __syncthreads();
  if (lane() == 0) shared.of_warp[warp()] = x;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.of_warp[w];
  return total;
}

__device__ inline uint32_t block_max(uint32_t x, Shared& shared) {
  x = __reduce_max_sync(kAll, x);
  __syncthreads();
  if (lane() == 0) shared.of_warp[warp()] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    x = uint32_t(shared.of_warp[w]) > x ? uint32_t(shared.of_warp[w]) : x;
  }
  return x;
}

__device__ inline uint32_t block_min(uint32_t x, Shared& shared) { return ~block_max(~x, shared); }

// A time of a race, as the bits of a double >= 0, and the column that reached it.
struct Finish {
  int64_t time, column;

  __device__ bool before(const Finish& other) const {
    return time < other.time || (time == other.time && column < other.column);
  }
};

__device__ inline Finish block_first(Finish x, Shared& shared) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Finish other{__shfl_xor_sync(kAll, x.time, distance),
                       __shfl_xor_sync(kAll, x.column, distance)};
    if (other.before(x)) x = other;
  }
  __syncthreads();
  if (lane() == 0) {
    shared.of_warp[warp()] = x.time;
    shared.beside[warp()] = x.column;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const Finish other{shared.of_warp[w], shared.beside[w]};
    if (other.before(x)) x = other;
  }
  return x;
}

// The first thread at which the running sum of x exceeds r, and r less the sum before it. kThreads
// if none does, and r less the sum of all.
__device__ inline int find_thread(int64_t x, int64_t& r, Shared& shared) {
  int64_t sum = x;  // of this warp up to here
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAll, sum, distance);
    if (lane() >= distance) sum += other;
  }
  __syncthreads();
  if (lane() == 31) shared.of_warp[warp()] = sum;
  if (threadIdx.x == 0) shared.found = kThreads;
  __syncthreads();
  int64_t all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) sum += shared.of_warp[w];
    all += shared.of_warp[w];
  }
  if (sum - x <= r && r < sum) {
    shared.found = threadIdx.x;
    shared.left = r - (sum - x);
  }
  __syncthreads();
  const int thread = int(shared.found);
  r = thread < kThreads ? shared.left : r - all;
  return thread;
}

// The first of n values in global memory at which their running sum exceeds r, or n; r as above.
template <class Value>
__device__ int64_t find_first(int64_t n, Value value, int64_t& r, Shared& shared) {
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t at = first + threadIdx.x;
    const int thread = find_thread(at < n ? value(at) : 0, r, shared);
    if (thread < kThreads) return first + thread;
  }
  return n;
}

}  // namespace specdiff::cuda
