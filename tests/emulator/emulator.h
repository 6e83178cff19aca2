// Enough of CUDA to run the kernels of csrc/cuda on a CPU: each thread of a block is a fiber, and
// fibers take turns in a random order, at barriers, warp operations and atomics.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

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

void launch(int64_t blocks, int threads, bool together, const std::function<void()>& kernel);
void sync_block();
void* shared_memory(size_t size);
void may_switch();

// What the warp's lanes hand in, by lane; valid until the next call.
const uint64_t* exchange(uint64_t x);

template <class Word, class Change>
Word update(Word* word, Change change) {
  may_switch();
  const Word before = *word;
  *word = change(before);
  return before;
}

template <class T>
T of_lane(T x, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(x));
  bits = exchange(bits)[lane];
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace emulator

#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define SPECDIFF_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(emulator::shared_memory(sizeof(Type)))

inline void __syncthreads() { emulator::sync_block(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return emulator::of_lane(x, int(threadIdx.x % 32) ^ distance);
}

template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = int(threadIdx.x % 32);
  return emulator::of_lane(x, lane < distance ? lane : lane - distance);
}

inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  const uint64_t* all = emulator::exchange(x);
  for (int lane = 0; lane < 32; ++lane) x = all[lane] > x ? unsigned(all[lane]) : x;
  return x;
}

inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  const uint64_t* all = emulator::exchange(x);
  x = 0;
  for (int lane = 0; lane < 32; ++lane) x += unsigned(all[lane]);
  return x;
}

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
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
