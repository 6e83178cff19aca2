// Logits -> integer weights. Every float operation is one IEEE operation: compile without
// contraction into fused multiply-adds.
#pragma once

#include "specdiff/platform.h"

namespace specdiff {

constexpr int64_t kOne = int64_t(1) << 44;  // the weight of a row's largest logit
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

// floor(2^(t + 44)) for t <= 0, by a polynomial of relative error 1.7e-7; 0 below t = -45.
SPECDIFF_HD int64_t exp2_weight(float t) {
  t = t > -0x1p-30f ? 0.0f : t;  // flush-to-zero modes cannot matter
  t = t < -46.0f ? -46.0f : t;   // all weights there are 0
#ifdef SPECDIFF_CUDA
  // An addition that rounds down, to where floats are integers; conversions take four times as
  // long.
  const float integer = __fadd_rd(t, 0x1.8p23f);
  const float f = t - (integer - 0x1.8p23f);
  const int32_t n = bit_cast<int32_t>(integer) - 0x4b400000;
#else
  int32_t n = int32_t(t);     // towards zero,
  n -= float(n) > t ? 1 : 0;  // so floor
  const float f = t - float(n);
#endif
  float p = 0.0018671302f;
  p = p * f;
  p = p + 0.00901703f;
  p = p * f;
  p = p + 0.055799913f;
  p = p * f;
  p = p + 0.24016444f;
  p = p * f;
  p = p + 0.6931513f;
  p = p * f;
  p = p + 1.0f;
#ifdef SPECDIFF_CUDA
  const uint32_t mantissa = bit_cast<uint32_t>(p) - 0x3f000000u;  // p 2^23, as 1 <= p < 2
#else
  const uint32_t mantissa = uint32_t(int32_t(p * 0x1p23f));
#endif
  return int64_t((uint64_t(mantissa) << 21) >> uint32_t(-n));
}

// Weight of a token with logit l under a distribution that is not greedy.
SPECDIFF_HD int64_t sampled_weight(float l, const RowDistribution& distribution) {
  const float shifted = l - distribution.max;
  const int64_t e = exp2_weight(shifted * distribution.scale);
  return e < distribution.threshold ? 0 : e;
}

// Weight of token v with logit l under a distribution that has no fault.
SPECDIFF_HD int64_t weight(float l, int64_t v, const RowDistribution& distribution) {
  if (distribution.scale == 0) return v == distribution.threshold ? kOne : 0;
  return sampled_weight(l, distribution);
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
