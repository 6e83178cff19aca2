// Logits -> integer weights. Every float operation is one IEEE operation, and what is fused is
// written as that: compile without contraction.
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

// The weight of a greedy row's token, and the most that any token has.
constexpr int64_t kOne = int64_t(1) << 44;
constexpr float kLog2E = 1.4426950408889634f;

enum Status : int32_t { kOk, kNan, kPosInf, kEmpty, kParameter, kToken, kDraft };
enum Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

// The distribution of one row. scale == 0 marks a greedy row, whose one token is `threshold`.
struct RowDistribution {
  float max = 0;
  float scale = 0;
  int64_t threshold = 0;
  int64_t total = 0;
  int32_t status = kOk;
};

SPECDIFF_HD float widen_bf16(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }

// Exact also for subnormals, and independent of flush-to-zero modes.
SPECDIFF_HD float widen_f16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t infinite = exponent == 0x0f800000u ? 0x38000000u : 0u;
  const uint32_t normal = magnitude + 0x38000000u + infinite;
  const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - 0x1p-14f;
  const uint32_t bits = exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal;
  return bit_cast<float>(bits | (uint32_t(x & 0x8000) << 16));
}

// An int that sorts like the float; NaNs lie outside [order_key(-inf), order_key(+inf)].
SPECDIFF_HD int32_t order_key(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
SPECDIFF_HD float from_order_key(int32_t key) {
  return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

// 2^f on [-1/2, 1/2] = 1 + f (kLinear + f (...)), relative error at most 1.72e-7.
constexpr float kLinear = 0.6931470036506653f;
constexpr float kSquare = 0.24022242426872253f;
constexpr float kCube = 0.05550733581185341f;
constexpr float kFourth = 0.009671512991189957f;
constexpr float kFifth = 0.001326472731307149f;

// Floats from 2^23 to 2^24 are integers. The lowest nine bits of this one are 0, so those of its
// sum with an integer are the integer's.
constexpr float kIntegers = 0x1.8p23f;

#if defined(SPECDIFF_CUDA) || defined(__FMA__) || defined(__FP_FAST_FMAF)
#define SPECDIFF_FUSED
// a b + c, rounded once
SPECDIFF_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
#endif

// The terms by which the logits of a row are weighed, unless it is greedy: the weight is
// floor(2^(44 + (l - offset) scale - shift)), up to a relative error of 2e-7.
struct Weigher {
  float scale, offset, shift;
  float magic;        // added to an exponent: integer + 44 - shift are the sum's lowest bits
  float least, most;  // a logit less the offset is cut to that; the weight at `least` is 0
  int64_t threshold;
};

SPECDIFF_HD Weigher weigher_of(const RowDistribution& distribution) {
  const float scale = distribution.scale;
  const double highest = double(distribution.max) * double(scale);
  const bool near = highest <= 0x1p20 && highest >= -0x1p20;
  const double half = near ? highest / 2 - 0x1p-31 : 0;
  const int32_t down = int32_t(half);  // towards zero
  const float shift = float(2 * (down + (double(down) < half ? 1 : 0)));
  const float offset = near ? 0.0f : distribution.max;
  const float magic = kIntegers + 44.0f - shift, most = distribution.max - offset;
  // 1 / the largest power of two that is at most the scale
  const float coarse = bit_cast<float>(0x7f000000u - (bit_cast<uint32_t>(scale) & 0x7f800000u));
  return {scale, offset, shift, magic, most - 64.0f * coarse, most, distribution.threshold};
}

// x, or the bound if x lies beyond it or is NaN.
SPECDIFF_HD float at_least(float x, float bound) {
#ifdef __CUDA_ARCH__
  return fmaxf(x, bound);
#else
  return x > bound ? x : bound;
#endif
}
SPECDIFF_HD float at_most(float x, float bound) {
#ifdef __CUDA_ARCH__
  return fminf(x, bound);
#else
  return x < bound ? x : bound;
#endif
}

// The logit as it is weighed; NaN counts as the lowest.
SPECDIFF_HD float cut(float l, const Weigher& by) {
  return at_most(at_least(l - by.offset, by.least), by.most);
}

#ifdef SPECDIFF_FUSED
// 2^(44 + exponent) of a cut logit, not yet an integer.
SPECDIFF_HD float power(float x, const Weigher& by) {
  const float z = fused(x, by.scale, by.magic);
  const float k = z - by.magic;
  const float f = fused(x, by.scale, -k);
  float p = fused(f, kFifth, kFourth);
  p = fused(p, f, kCube);
  p = fused(p, f, kSquare);
  p = fused(p, f, kLinear);
  p = fused(p, f, 1.0f);
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(z) << 23));
}
#else
// The same in fp64, where a product is exact. Rounding a sum once more to fp32 can change a step,
// but never the last one (docs/numerics.md).
SPECDIFF_HD float power(float x, const Weigher& by) {
  const double t = double(x) * double(by.scale);
  const double k = (t + 0x1.8p52) - 0x1.8p52;
  const double f = float(t - k);
  float p = float(f * double(kFifth) + double(kFourth));
  p = float(double(p) * f + double(kCube));
  p = float(double(p) * f + double(kSquare));
  p = float(double(p) * f + double(kLinear));
  p = float(double(p) * f + 1.0);
  const int32_t n = int32_t(k - double(by.shift)) + 44;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (uint32_t(n) << 23));
}
#endif

// floor of a power
SPECDIFF_HD int64_t integer_of(float power) {
#if defined(SPECDIFF_CUDA) && !defined(SPECDIFF_FAST_DOUBLES)
  const uint32_t bits = bit_cast<uint32_t>(power), shift = 171 - (bits >> 23);
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  return int64_t(mantissa << 21 >> (shift < 63 ? shift : 63));
#else
  return int64_t(power);
#endif
}

// Weight of a logit before the threshold cuts it off.
SPECDIFF_HD int64_t whole_weight(float l, const Weigher& by) {
  return integer_of(power(cut(l, by), by));
}

SPECDIFF_HD int64_t sampled_weight(float l, const Weigher& by) {
  const int64_t e = whole_weight(l, by);
  return e < by.threshold ? 0 : e;
}

// Weight of token v with logit l under a distribution that has no fault.
SPECDIFF_HD int64_t weight(float l, int64_t v, const RowDistribution& distribution) {
  if (distribution.scale == 0) return v == distribution.threshold ? kOne : 0;
  return sampled_weight(l, weigher_of(distribution));
}

// The smallest weight that survives min-p; the largest logit weighs `highest`.
SPECDIFF_HD int64_t min_p_threshold(float min_p, int64_t highest) {
  return int64_t(double(min_p) * double(highest));
}

SPECDIFF_HD bool valid_temperature(float x) { return x == 0 || (x >= 0x1p-95f && x <= 0x1p95f); }

// ceil(share * total), share in (0, 1] read as a multiple of 2^-31, at least 1.
SPECDIFF_HD int64_t ceil_share(float share, int64_t total) {
  const int64_t numerator = int64_t(double(share) * 0x1p31);
  const int64_t low = numerator * (total & 0x7fffffff);
  const int64_t need = numerator * (total >> 31) + ((low + 0x7fffffff) >> 31);
  return need < 1 ? 1 : need;
}

}  // namespace specdiff
