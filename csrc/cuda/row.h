// One row of logits, and how blocks and threads divide it.
#pragma once

#include "block.h"
#include "specdiff/accept.h"

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

template <Dtype dtype>
__device__ inline void widen(const Eight& x, float (&l)[8]) {
  const uint32_t words[8] = {x.low.x,  x.low.y,  x.low.z,  x.low.w,
                             x.high.x, x.high.y, x.high.z, x.high.w};
  for (int j = 0; j < 8; ++j) {
    if constexpr (dtype == kFloat32) {
      l[j] = bit_cast<float>(words[j]);
    } else if constexpr (dtype == kBFloat16) {
      l[j] = bit_cast<float>(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
    } else {
      const uint16_t half = uint16_t(words[j / 2] >> (j % 2 * 16));
#ifdef __CUDA_ARCH__
      asm("cvt.f32.f16 %0, %1;" : "=f"(l[j]) : "h"(half));
#else
      l[j] = widen_f16(half);
#endif
    }
  }
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
    const uint16_t x = reinterpret_cast<const uint16_t*>(data_)[v];
    return dtype == kBFloat16 ? widen_bf16(x) : widen_f16(x);
  }

  // Columns between the row's first one and the last address before it that is aligned.
  __device__ int shift() const { return int(reinterpret_cast<uintptr_t>(data_) % 16) / size(); }

  // The address of logit v. Logits v to v + 7 can be read from it as one or two vectors where it is
  // aligned and all of them lie in the row.
  __device__ const uint4* vectors(int64_t v) const {
    return reinterpret_cast<const uint4*>(data_ + v * size());
  }

  // Logits v to v + 7, -inf outside of the row.
  __device__ Eight load(int64_t v) const {
    const uint4* at = vectors(v);
    if (v < 0 || v + 8 > columns || reinterpret_cast<uintptr_t>(at) % 16 != 0) return piecewise(v);
    return {at[0], dtype == kFloat32 ? at[1] : uint4{0, 0, 0, 0}};
  }

  __device__ Eight piecewise(int64_t v) const { return gather(data_, columns, dtype, v); }

  __device__ void widen(const Eight& x, float (&l)[8]) const {
    if (dtype == kFloat32) {
      cuda::widen<kFloat32>(x, l);
    } else if (dtype == kBFloat16) {
      cuda::widen<kBFloat16>(x, l);
    } else {
      cuda::widen<kFloat16>(x, l);
    }
  }

  int64_t columns;
  int32_t dtype;

 private:
  __device__ int size() const { return dtype == kFloat32 ? 4 : 2; }

  const char* data_;
};

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

// The larger of two logits, or of each half of two words that hold two; NaN if one is that.
template <Dtype dtype>
__device__ inline uint32_t larger(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  if constexpr (dtype == kFloat32) {
    return bit_cast<uint32_t>(max_or_nan(bit_cast<float>(a), bit_cast<float>(b)));
  } else if constexpr (dtype == kBFloat16) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  }
  return a;
#else
  if constexpr (dtype == kFloat32) {
    return bit_cast<uint32_t>(max_or_nan(bit_cast<float>(a), bit_cast<float>(b)));
  } else {
    const auto half = [](uint32_t x, uint32_t y) {
      const auto wide = dtype == kBFloat16 ? widen_bf16 : widen_f16;
      const float l = wide(uint16_t(x));
      return l != l || l > wide(uint16_t(y)) ? x & 0xffffu : y & 0xffffu;
    };
    return half(a, b) | half(a >> 16, b >> 16) << 16;
  }
#endif
}

#ifdef SPECDIFF_FAST_DOUBLES
// A float's bits become a double's by moving them and raising the exponent: one multiply-add of
// integers. x is positive and normal.
__device__ inline double widen_power(float x) {
  return bit_cast<double>(uint64_t(bit_cast<uint32_t>(x)) * 0x20000000u + (uint64_t(896) << 52));
}
#endif

// floor of a power. Adding 2^52 and rounding to zero drops the fraction.
__device__ inline double floor_of(float power) {
#ifdef SPECDIFF_FAST_DOUBLES
  return __dadd_rz(widen_power(power), 0x1p52) - 0x1p52;
#else
  return exact_double(integer_of(power));
#endif
}

// Adds up weights, before they are integers: at most 2^8 of them.
class WeightSum {
 public:
#ifdef SPECDIFF_FAST_DOUBLES
  __device__ void add(float power) { sum_ = __dadd_rz(sum_, widen_power(power)); }
  __device__ int64_t total() const { return bit_cast<int64_t>(sum_) - 0x4330000000000000; }

 private:
  double sum_ = 0x1p52;
#else
  __device__ void add(float power) { sum_ += integer_of(power); }
  __device__ int64_t total() const { return sum_; }

 private:
  int64_t sum_ = 0;
#endif
};

// The part of a row that one block has. What fits stays in `held` vectors of registers.
template <Dtype dtype, int held = kHeld>
class Slice {
 public:
  __device__ Slice(const Row& row, const Split& split, int64_t part)
      : row_(row), first_(int(column_of(row, split, part, 0))) {
    const int64_t behind = (part + 1) * split.part_columns() - row.shift();
    end_ = int(behind < row.columns ? behind : row.columns);
    groups_ = first_ < end_ ? (end_ - 1 - first_) / kStride + 1 : 0;
  }

  // Reads what fits, and finds the key of the largest logit that this thread has.
  __device__ uint32_t hold() {
    load();
    complete();
    return largest();
  }

  __device__ uint32_t largest() const {
    uint32_t most = kLowest;
    const auto compare = [&](const Eight& x) {
      const uint32_t words[8] = {x.low.x,  x.low.y,  x.low.z,  x.low.w,
                                 x.high.x, x.high.y, x.high.z, x.high.w};
      for (int j = 0; j < 4 * kVectors; ++j) most = cuda::larger<dtype>(most, words[j]);
    };
    visit_held(compare);
    visit_rest(compare);
    float l[8];
    cuda::widen<dtype>({{most, 0, 0, 0}, {0, 0, 0, 0}}, l);
    const float x = dtype == kFloat32 ? l[0] : max_or_nan(l[0], l[1]);
    return x == x ? uint32_t(order_key(x)) ^ 0x80000000u : kNanKey;
  }

  // The sum of this thread's weights under the row's own distribution, with nothing cut off.
  __device__ int64_t sum(const Weigher& by) const {
    if (by.offset != 0) return any_sum(by);
    const auto add = [&](const Eight& x, WeightSum& sum) {
      float l[8];
      cuda::widen<dtype>(x, l);
      for (int j = 0; j < 8; ++j) sum.add(power(at_least(l[j], by.least), by));
    };
    WeightSum sums;
    visit_held([&](const Eight& x) { add(x, sums); });
    int64_t total = sums.total();
    visit_rest([&](const Eight& x) {
      WeightSum sum;
      add(x, sum);
      total += sum.total();
    });
    return total;
  }

  // The same under any distribution. The row is read again.
  __device__ int64_t any_sum(const Weigher& by) const {
    int64_t total = 0;
    revisit([&](int64_t, const float (&l)[8]) {
      for (int j = 0; j < 8; ++j) total += sampled_weight(l[j], by);
    });
    return total;
  }

  // This thread's first column with a logit of this size, or 0xffffffff.
  __device__ uint32_t first(float size) const {
    uint32_t found = 0xffffffffu;
    revisit([&](int64_t v, const float (&l)[8]) {
      for (int j = 7; j >= 0; --j) {
        if (l[j] == size && v + j < found) found = uint32_t(v + j);
      }
    });
    return found;
  }

  // visit(column of the first, logits) for each group of eight of this thread, read again: for long
  // bodies, which stand in the code but once.
  template <class Visit>
  __device__ void revisit(Visit visit) const {
#pragma unroll 1
    for (int k = 0; k < groups_; ++k) {
      float l[8];
      cuda::widen<dtype>(row_.load(column(k)), l);
      visit(column(k), l);
    }
  }

 private:
  static constexpr int kStride = kThreads * 8;                // columns between two groups
  static constexpr int kVectors = dtype == kFloat32 ? 2 : 1;  // of a group
  static constexpr int kGroups = held / kVectors;
  static constexpr uint32_t kLowest = dtype == kFloat32    ? 0xff800000u
                                      : dtype == kBFloat16 ? 0xff80ff80u
                                                           : 0xfc00fc00u;

  __device__ int column(int k) const { return first_ + k * kStride; }

  template <class Visit>
  __device__ void visit_held(Visit visit) const {
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (k < groups_) visit(held_[k]);
    }
  }

  template <class Visit>
  __device__ void visit_rest(Visit visit) const {
#pragma unroll 1
    for (int k = kGroups; k < groups_; ++k) visit(row_.load(column(k)));
  }

  // Reads the groups that lie in the row as a whole.
  __device__ void load() {
    const uint4* from = row_.vectors(first_);
    const int whole = end_ - 8 >= first_ ? (end_ - 8 - first_) / kStride + 1 : 0;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (k >= whole || (k == 0 && first_ < 0)) continue;
      held_[k].low = from[k * kThreads * kVectors];
      if (kVectors == 2) held_[k].high = from[k * kThreads * kVectors + 1];
    }
  }

  // Reads those at the row's ends that lie in it in part.
  __device__ void complete() {
    const int shift = row_.shift(), columns = int(row_.columns);
#pragma unroll 1
    for (int end = 0; end < 2; ++end) {
      const int v = end ? columns - (columns + shift) % 8 : -shift;
      const int distance = v - first_, k = distance / kStride;
      const bool whole = v >= 0 && v + 8 <= columns;
      if (whole || distance < 0 || distance % kStride != 0 || k >= groups_) continue;
      const Eight x = row_.piecewise(v);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (i == k) held_[i] = x;
      }
    }
  }

  const Row& row_;
  const int first_;  // column of this thread's first group
  int end_;          // behind the last column of the part
  int groups_;       // that this thread has
  Eight held_[kGroups];
};

}  // namespace specdiff::cuda
