// One row of logits, and how blocks and threads divide it.
#pragma once

#include "block.h"

namespace specdiff::cuda {

// Eight logits as they lie in memory; 16-bit ones fill `low` alone.
struct Eight {
  uint4 low, high;
};

// Logits v to v + 7 one at a time, -inf outside of the row: rare, so in little code. They are
// shifted in from above.
__device__ inline Eight gather(const char* data, int64_t columns, int32_t dtype, int64_t v) {
  const uint32_t nothing = dtype == kFloat32 ? 0xff800000u : dtype == kBFloat16 ? 0xff80u : 0xfc00u;
  uint32_t words[8] = {};
#pragma unroll 1
  for (int j = 0; j < 8; ++j, ++v) {
    uint32_t x = nothing;
    if (0 <= v && v < columns) {
      x = dtype == kFloat32 ? reinterpret_cast<const uint32_t*>(data)[v]
                            : reinterpret_cast<const uint16_t*>(data)[v];
    }
    if (dtype == kFloat32) {
      for (int i = 0; i < 7; ++i) words[i] = words[i + 1];
      words[7] = x;
    } else {
      for (int i = 0; i < 3; ++i) words[i] = words[i] >> 16 | words[i + 1] << 16;
      words[3] = words[3] >> 16 | x << 16;
    }
  }
  return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

class Row {
 public:
  __device__ Row(const Logits& logits, int64_t batch, int64_t row)
      : columns(logits.columns), dtype(logits.dtype) {
    const int64_t first = batch * logits.batch_stride + row * logits.row_stride;
    data_ = static_cast<const char*>(logits.data) + size() * first;
  }

  __device__ float at(int64_t v) const {
    if (dtype == kFloat32) return reinterpret_cast<const float*>(data_)[v];
    return widen(reinterpret_cast<const uint16_t*>(data_)[v]);
  }

  // Columns between the row's first one and the last address before it that is aligned.
  __device__ int shift() const { return int(reinterpret_cast<uintptr_t>(data_) % 16) / size(); }

  // Where logits v to v + 7 lie as one or two vectors, or null: not aligned, or not all in the row.
  __device__ const uint4* vectors(int64_t v) const {
    const char* at = data_ + v * size();
    const bool fit = v >= 0 && v + 8 <= columns && reinterpret_cast<uintptr_t>(at) % 16 == 0;
    return fit ? reinterpret_cast<const uint4*>(at) : nullptr;
  }

  // Logits v to v + 7, -inf outside of the row.
  __device__ Eight load(int64_t v) const {
    const uint4* at = vectors(v);
    if (!at) return gather(data_, columns, dtype, v);
    return {at[0], dtype == kFloat32 ? at[1] : uint4{0, 0, 0, 0}};
  }

  __device__ void widen(const Eight& x, float (&l)[8]) const {
    const uint32_t words[8] = {x.low.x,  x.low.y,  x.low.z,  x.low.w,
                               x.high.x, x.high.y, x.high.z, x.high.w};
    if (dtype == kFloat32) {
      for (int j = 0; j < 8; ++j) l[j] = bit_cast<float>(words[j]);
    } else {
      for (int j = 0; j < 8; ++j) l[j] = widen(uint16_t(words[j / 2] >> (j % 2 * 16)));
    }
  }

  __device__ bool is_wide() const { return dtype == kFloat32; }

  int64_t columns;
  int32_t dtype;

 private:
  __device__ int size() const { return dtype == kFloat32 ? 4 : 2; }

  __device__ float widen(uint16_t x) const {
#ifdef __CUDA_ARCH__
    if (dtype == kFloat16) {
      float l;
      asm("cvt.f32.f16 %0, %1;" : "=f"(l) : "h"(x));
      return l;
    }
#endif
    return dtype == kBFloat16 ? widen_bf16(x) : widen_f16(x);
  }

  const char* data_;
};

// As sampled_weight, of a distribution that cuts nothing off.
__device__ inline int64_t whole_weight(float l, const RowDistribution& distribution) {
  const float shifted = l - distribution.max;
  return exp2_weight(shifted * distribution.scale);
}

// Rows of `columns` are divided among `parts` blocks, and what a block has into groups of eight
// columns, `groups` for each thread.
struct Split {
  int32_t parts;
  int32_t groups;

  __host__ __device__ int64_t part_columns() const { return int64_t(groups) * kThreads * 8; }
};

// The first column of this thread's k-th group in a part; outside of the row at its ends.
__device__ inline int64_t column_of(const Row& row, const Split& split, int64_t part, int k) {
  return part * split.part_columns() + (int64_t(k) * kThreads + threadIdx.x) * 8 - row.shift();
}

// As many blocks as fill the device, and enough to hold their parts on chip, but at most so many
// for a row.
inline Split split_of(const Logits& logits, int64_t rows, int64_t capacity, int64_t most) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t all = logits.columns + 7;  // a row may begin anywhere between aligned addresses
  const int64_t held = int64_t(kThreads) * kHeld * (logits.dtype == kFloat32 ? 4 : 8);
  const int64_t filling = rows > 0 ? capacity / rows : 1;
  const int64_t useful = ceil(all, kThreads * 8);
  int64_t parts = ceil(all, held);
  if (parts < filling) parts = filling;
  if (parts > useful) parts = useful;
  if (parts > most) parts = most;
  if (parts < 1) parts = 1;
  return {int32_t(parts), int32_t(ceil(all, parts * kThreads * 8))};
}

// Keys sort like floats and are larger than 0; NaN is the largest.
constexpr uint32_t kNanKey = 0xffffffffu;

__device__ inline float from_key(uint32_t key) {
  return from_order_key(int32_t(key ^ 0x80000000u));
}

__device__ inline float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return a != a || a > b ? a : b;
#endif
}

// The part of a row that one block has. It is read once and then held on chip, but for what does
// not fit there.
class Slice {
 public:
  __device__ Slice(const Row& row, const Split& split, int64_t part, Shared& shared)
      : row_(row), split_(split), part_(part), shared_(shared) {}

  // Holds what fits, and finds the key of the largest logit that this thread has.
  __device__ uint32_t hold() {
#pragma unroll 1
    for (int k = 0; k < split_.groups && k < held(); ++k) {
      uint4* to = place(k);
      if (const uint4* from = row_.vectors(column(k))) {
        begin_copy(to, from, row_.is_wide());
        if (row_.is_wide()) begin_copy(to + kThreads, from + 1, true);
      } else {
        const Eight x = row_.load(column(k));
        to[0] = x.low;
        if (row_.is_wide()) to[kThreads] = x.high;
      }
    }
    end_copies();
    float largest = from_order_key(0x807fffff);  // -inf
    visit([&](int64_t, const float (&l)[8]) {
      for (int j = 0; j < 8; ++j) largest = max_or_nan(largest, l[j]);
    });
    return largest == largest ? uint32_t(order_key(largest)) ^ 0x80000000u : kNanKey;
  }

  // visit(column of the first, logits) for each group of eight of this thread
  template <class Visit>
  __device__ void visit(Visit visit) const {
#pragma unroll 1
    for (int k = 0; k < split_.groups; ++k) {
      float l[8];
      row_.widen(get(k), l);
      visit(column(k), l);
    }
  }

 private:
  __device__ int64_t column(int k) const { return column_of(row_, split_, part_, k); }
  __device__ int held() const { return row_.is_wide() ? kHeld / 2 : kHeld; }
  __device__ uint4* place(int k) const {
    return shared_.held + (row_.is_wide() ? 2 * k : k) * kThreads + threadIdx.x;
  }

  __device__ Eight get(int k) const {
    if (k >= held()) return row_.load(column(k));
    return {place(k)[0], row_.is_wide() ? place(k)[kThreads] : uint4{0, 0, 0, 0}};
  }

  const Row& row_;
  const Split& split_;
  const int64_t part_;
  Shared& shared_;
};

}  // namespace specdiff::cuda
