// Enough of CUDA to run the kernels of csrc/cuda on a CPU: each thread of a block is a fiber, and
// fibers take turns in a random order, at barriers, warp operations and atomics.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define SPECDIFF_CUDA  // what runs here is device code
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Index {
  unsigned x;
};

struct Position {
  Index thread, block;
};

extern Position here;

void launch(int64_t blocks, int threads, const std::function<void()>& kernel);
bool launch_together(int64_t blocks, int threads, const std::function<void()>& kernel);
void sync_block(const char* file, int line);
void* shared_memory(size_t size);
void may_switch();

// What a lane of the warp hands in, or the sum, the maximum or the votes of what all do.
uint64_t from_lane(uint64_t x, int lane);
uint32_t votes_of_lanes(bool x);
uint32_t sum_of_lanes(uint32_t x);
uint32_t max_of_lanes(uint32_t x);

template <class Word>
Word load(Word* word, int order) {
  may_switch();
  return __atomic_load_n(word, order);
}

extern bool orders;  // false makes counters order nothing, which is a fault

template <class Word>
Word fetch_add(Word* word, Word x, int order) {
  may_switch();
  return __atomic_fetch_add(word, x, orders ? order : __ATOMIC_RELAXED);
}

template <class Word>
void raise(Word* word, Word x) {
  may_switch();  // and then nobody comes between
  if (__atomic_load_n(word, __ATOMIC_RELAXED) < x) __atomic_exchange_n(word, x, __ATOMIC_RELAXED);
}

template <class Word>
void lower(Word* word, Word x) {
  may_switch();
  if (__atomic_load_n(word, __ATOMIC_RELAXED) > x) __atomic_exchange_n(word, x, __ATOMIC_RELAXED);
}

}  // namespace emulator

#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define SPECDIFF_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(emulator::shared_memory(sizeof(Type)))

#define __syncthreads() emulator::sync_block(__FILE__, __LINE__)

inline int64_t __shfl_xor_sync(unsigned, int64_t x, int distance) {
  return int64_t(emulator::from_lane(uint64_t(x), int(threadIdx.x % 32) ^ distance));
}

inline int64_t __shfl_sync(unsigned, int64_t x, int lane) {
  return int64_t(emulator::from_lane(uint64_t(x), lane));
}

inline int64_t __shfl_up_sync(unsigned, int64_t x, int distance) {
  const int lane = int(threadIdx.x % 32);
  return int64_t(emulator::from_lane(uint64_t(x), lane < distance ? lane : lane - distance));
}

inline unsigned __ballot_sync(unsigned, int x) { return emulator::votes_of_lanes(x != 0); }
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == 0xffffffffu; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __reduce_add_sync(unsigned, unsigned x) { return emulator::sum_of_lanes(x); }
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return emulator::max_of_lanes(x); }

// The sum rounded towards -inf.
float __fadd_rd(float a, float b);

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 0;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t stream);
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
