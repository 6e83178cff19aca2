// What kernels use of the machine: launches, memory that thread blocks share, and the words by
// which they wait for each other.
#pragma once

#ifdef SPECDIFF_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
// Memory that the threads of a block share; one such line in a kernel.
#define SPECDIFF_SHARED(Type, name) __shared__ Type name
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace specdiff::cuda {

#ifdef SPECDIFF_EMULATED
constexpr int kThreads = 64, kHeld = 2;
#else
constexpr int kThreads = 256;  // of a block
constexpr int kHeld = 8;       // vectors of 16 bytes that a thread holds in registers
#endif
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// --- words in global memory ---

// One more arrival. Who counts it sees what the other block wrote before; who is counted last sees
// what all did. To be called by one thread, between barriers of its block.
__device__ inline uint64_t arrive(uint64_t* counter) {
#ifdef SPECDIFF_EMULATED
  return emulator::fetch_add(counter, uint64_t(1), __ATOMIC_ACQ_REL);
#else
  uint64_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#endif
}

__device__ inline uint64_t load_relaxed(uint64_t* word) {
#ifdef SPECDIFF_EMULATED
  return emulator::load(word, __ATOMIC_RELAXED);
#else
  uint64_t x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
               : "=l"(x)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return x;
#endif
}

__device__ inline uint64_t load_acquire(uint64_t* word) {
#ifdef SPECDIFF_EMULATED
  return emulator::load(word, __ATOMIC_ACQUIRE);
#else
  uint64_t x;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(x)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return x;
#endif
}

// Waits for a counter; then this thread sees what the others wrote before they arrived.
__device__ inline uint64_t wait_for(uint64_t* counter, uint64_t least) {
  while (load_relaxed(counter) < least) {
#ifndef SPECDIFF_EMULATED
    __nanosleep(20);
#endif
  }
  return load_acquire(counter);
}

// One more, in any order with other accesses.
__device__ inline uint64_t take(uint64_t* counter) {
#ifdef SPECDIFF_EMULATED
  return emulator::fetch_add(counter, uint64_t(1), __ATOMIC_RELAXED);
#else
  return atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
#endif
}

// word = max(word, x), without order
__device__ inline void raise(uint64_t* word, uint64_t x) {
#ifdef SPECDIFF_EMULATED
  emulator::raise(word, x);
#else
  atomicMax(reinterpret_cast<unsigned long long*>(word), x);
#endif
}

// word = min(word, x), without order
__device__ inline void lower(int32_t* word, int32_t x) {
#ifdef SPECDIFF_EMULATED
  emulator::lower(word, x);
#else
  atomicMin(word, x);
#endif
}

// word += x, without order
__device__ inline void add(int32_t* word, int32_t x) {
#ifdef SPECDIFF_EMULATED
  emulator::fetch_add(word, x, __ATOMIC_RELAXED);
#else
  atomicAdd(word, x);
#endif
}

__device__ inline void add(int64_t* word, int64_t x) {
#ifdef SPECDIFF_EMULATED
  emulator::fetch_add(word, x, __ATOMIC_RELAXED);
#else
  atomicAdd(reinterpret_cast<unsigned long long*>(word), uint64_t(x));
#endif
}

// The same in shared memory, x >= 0, half by half: adding 64 bits there is a loop that tries again.
__device__ inline void add_shared(int64_t* word, int64_t x) {
#ifdef SPECDIFF_EMULATED
  emulator::fetch_add(word, x, __ATOMIC_RELAXED);
#else
  unsigned* halves = reinterpret_cast<unsigned*>(word);
  const unsigned low = unsigned(x), before = atomicAdd(halves, low);
  const unsigned high = unsigned(x >> 32) + (before + low < before ? 1 : 0);
  if (high) atomicAdd(halves + 1, high);
#endif
}

// --- launches ---

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that nobody else takes it for theirs
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

// Makes a stream's device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_;
};

inline unsigned grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument("CUDA: too many rows for one launch");
  return unsigned(blocks);
}

template <class... Params>
void launch(void (*kernel)(Params...), int64_t blocks, const Queue& queue, Params... params) {
  if (blocks == 0) return;
  const unsigned grid = grid_of(blocks);
#ifdef SPECDIFF_EMULATED
  emulator::launch(grid, kThreads, [&] { kernel(params...); });
#else
  void* arguments[] = {&params...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads),
                         arguments, 0, cudaStream_t(queue.stream)));
#endif
}

// All blocks run at once. False if the device cannot do that now.
template <class... Params>
bool launch_together(void (*kernel)(Params...), int64_t blocks, const Queue& queue,
                     Params... params) {
  const unsigned grid = grid_of(blocks);
#ifdef SPECDIFF_EMULATED
  return emulator::launch_together(grid, kThreads, [&] { kernel(params...); });
#else
  void* arguments[] = {&params...};
  const cudaError_t error =
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads),
                                  arguments, 0, cudaStream_t(queue.stream));
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();
    return false;
  }
  check(error);
  return true;
#endif
}

// Blocks of a kernel that the device runs at once.
template <auto kernel>
int64_t capacity(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];
  const bool keeps = 0 <= device && device < kDevices;
  if (keeps && known[device]) return known[device];
  int multiprocessors, blocks;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  const int64_t found = int64_t(multiprocessors) * blocks;
  if (keeps) known[device] = found;
  return found;
}

}  // namespace specdiff::cuda
