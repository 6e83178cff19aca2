// Kernels that count_instructions.py counts: around the loops of csrc/cuda, unrolled over few
// logits and over twice as many.
#include "../csrc/cuda/residual.h"

namespace specdiff::cuda {

constexpr Dtype kDtype = SPECDIFF_COUNTED;
constexpr int kVectors = kDtype == kFloat32 ? 2 : 1;  // of eight logits

__device__ int64_t place() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// Load, maximum and weights of a judged row.
template <int held>
__device__ void judge(const Logits& logits, const Split& split, const DistributionArrays& arrays,
                      int64_t* out) {
  const Row row(logits, 0, blockIdx.x);
  Slice<kDtype, held> slice(row, split, 0);
  const uint32_t key = slice.hold();
  __syncthreads();
  out[place()] = key + slice.sum(weigher_of(load(arrays, blockIdx.x)));
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    judged(Logits logits, Split split, DistributionArrays arrays, int64_t* out) {
  judge<kHeld>(logits, split, arrays, out);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    judged_half(Logits logits, Split split, DistributionArrays arrays, int64_t* out) {
  judge<kHeld / 2>(logits, split, arrays, out);
}

// Load and residual weights of a row and its record.
template <int held>
__device__ void reject(const uint4* target, const uint4* draft, const DistributionArrays& arrays,
                       double a, int64_t* out) {
  const Plain p(load(arrays, 0)), q(load(arrays, 1));
  int64_t sum = 0;
  target += place() * kVectors;
  draft += place() * kVectors;
#pragma unroll
  for (int k = 0; k < held / kVectors; ++k) {
    const uint4 *x = target + k * kThreads * kVectors, *y = draft + k * kThreads * kVectors;
    sum += plain_residual<kDtype>({x[0], x[kVectors - 1]}, {y[0], y[kVectors - 1]}, p, q, a);
  }
  out[place()] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    residual(const uint4* target, const uint4* draft, DistributionArrays arrays, double a,
             int64_t* out) {
  reject<kHeld>(target, draft, arrays, a, out);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    residual_half(const uint4* target, const uint4* draft, DistributionArrays arrays, double a,
                  int64_t* out) {
  reject<kHeld / 2>(target, draft, arrays, a, out);
}

}  // namespace specdiff::cuda
