// Weights, residual_weight and bias_weight on vectors: the very operations of weights.h and
// accept.h, on kUnroll vectors side by side, since one chain of 20 dependent operations cannot fill
// the units. Weights are doubles here, which hold them and the sums of a tile exactly.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#define SPECDIFF_LANES
#include <immintrin.h>

#include <limits>

#include "specdiff/accept.h"
#include "specdiff/philox.h"
#include "specdiff/weights.h"
#include "tile.h"

namespace specdiff::cpu {
namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kUnroll = 4;
constexpr int kGroup = kLanes * kUnroll;  // logits that one step takes

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint64_t Longs __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));

#ifdef __AVX512F__
// masked forms with all lanes on: GCC warns of the plain ones' own definition
inline Floats fused(Floats x, Floats y, Floats z) {
  return Floats(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(z)));
}
inline Floats fused_less(Floats x, Floats y, Floats z) {
  return Floats(_mm512_fmsub_ps(__m512(x), __m512(y), __m512(z)));
}
// the second if one is no number
inline Floats larger(Floats x, Floats y) {
  return Floats(_mm512_maskz_max_ps(0xffff, __m512(x), __m512(y)));
}
inline Floats smaller(Floats x, Floats y) {
  return Floats(_mm512_maskz_min_ps(0xffff, __m512(x), __m512(y)));
}
inline Doubles larger(Doubles x, Doubles y) {
  return Doubles(_mm512_maskz_max_pd(0xff, __m512d(x), __m512d(y)));
}
inline Doubles smaller(Doubles x, Doubles y) {
  return Doubles(_mm512_maskz_min_pd(0xff, __m512d(x), __m512d(y)));
}
inline Floats whole(Floats x) {
  return Floats(_mm512_maskz_roundscale_ps(0xffff, __m512(x), _MM_FROUND_TO_ZERO));
}
// of lanes where one of the two is no number
typedef __mmask16 Lanes;
inline Lanes unordered(Floats x, Floats y) {
  return _mm512_cmp_ps_mask(__m512(x), __m512(y), _CMP_UNORD_Q);
}
inline bool any(Lanes x) { return x != 0; }
inline Doubles low_half(Floats x) {
  __m256 low;
  std::memcpy(&low, &x, sizeof(low));
  return Doubles(_mm512_maskz_cvtps_pd(0xff, low));
}
inline Doubles high_half(Floats x) {
  const __m256 high = _mm512_maskz_extractf32x8_ps(0xff, __m512(x), 1);
  return Doubles(_mm512_maskz_cvtps_pd(0xff, high));
}
inline Longs low_times(Longs x, Longs y) {
  return Longs(_mm512_maskz_mul_epu32(0xff, __m512i(x), __m512i(y)));
}
#else
inline Floats fused(Floats x, Floats y, Floats z) {
  return Floats(_mm256_fmadd_ps(__m256(x), __m256(y), __m256(z)));
}
inline Floats fused_less(Floats x, Floats y, Floats z) {
  return Floats(_mm256_fmsub_ps(__m256(x), __m256(y), __m256(z)));
}
// the second if one is no number
inline Floats larger(Floats x, Floats y) { return Floats(_mm256_max_ps(__m256(x), __m256(y))); }
inline Floats smaller(Floats x, Floats y) { return Floats(_mm256_min_ps(__m256(x), __m256(y))); }
inline Doubles larger(Doubles x, Doubles y) {
  return Doubles(_mm256_max_pd(__m256d(x), __m256d(y)));
}
inline Doubles smaller(Doubles x, Doubles y) {
  return Doubles(_mm256_min_pd(__m256d(x), __m256d(y)));
}
inline Floats whole(Floats x) {
  return Floats(_mm256_round_ps(__m256(x), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
}
// of lanes where one of the two is no number
typedef Ints Lanes;
inline Lanes unordered(Floats x, Floats y) {
  return Lanes(_mm256_cmp_ps(__m256(x), __m256(y), _CMP_UNORD_Q));
}
inline bool any(Lanes x) { return _mm256_movemask_ps(__m256(x)) != 0; }
inline Doubles low_half(Floats x) {
  return Doubles(_mm256_cvtps_pd(_mm256_castps256_ps128(__m256(x))));
}
inline Doubles high_half(Floats x) {
  return Doubles(_mm256_cvtps_pd(_mm256_extractf128_ps(__m256(x), 1)));
}
// product of the low halves of two lanes
inline Longs low_times(Longs x, Longs y) { return Longs(_mm256_mul_epu32(__m256i(x), __m256i(y))); }
#endif

// The weights of kGroup logits: of the lower and the upper half of each vector.
struct Group {
  Doubles low[kUnroll], high[kUnroll];
};

#define SPECDIFF_EACH for (int u = 0; u < kUnroll; ++u)

inline Floats all(float x) { return x - Floats{}; }

// The steps that a row needs beside the bare formula.
enum Needs {
  kNothing,  // it is the weigher's own row, nothing is cut off, and the offset is 0
  kLimit,    // logits above the weigher's own maximum count as that
  kAll       // that, the offset and the threshold
};

inline Needs needs_of(const Weigher& weigher, bool own) {
  if (weigher.threshold != 0 || weigher.offset != 0) return kAll;
  return own ? kNothing : kLimit;
}

// The powers of kGroup logits, before they are integers.
template <Needs needs>
inline void group_powers(const float* l, const Weigher& weigher, Floats (&p)[kUnroll]) {
  const Floats scale = all(weigher.scale), integers = all(weigher.magic);
  Floats x[kUnroll], z[kUnroll], f[kUnroll];
  SPECDIFF_EACH x[u] = reinterpret_cast<const Unaligned*>(l)[u];
  if (needs == kAll) {
    SPECDIFF_EACH x[u] = x[u] - weigher.offset;
  }
  SPECDIFF_EACH x[u] = larger(x[u], all(weigher.least));
  if (needs != kNothing) {
    SPECDIFF_EACH x[u] = smaller(x[u], all(weigher.most));
  }
  SPECDIFF_EACH z[u] = fused(x[u], scale, integers);
  SPECDIFF_EACH f[u] = z[u] - integers;
  SPECDIFF_EACH f[u] = fused_less(x[u], scale, f[u]);
  SPECDIFF_EACH p[u] = fused(f[u], all(kFifth), all(kFourth));
  SPECDIFF_EACH p[u] = fused(p[u], f[u], all(kCube));
  SPECDIFF_EACH p[u] = fused(p[u], f[u], all(kSquare));
  SPECDIFF_EACH p[u] = fused(p[u], f[u], all(kLinear));
  SPECDIFF_EACH p[u] = fused(p[u], f[u], all(1.0f));
  SPECDIFF_EACH p[u] = Floats(Ints(p[u]) + (Ints(z[u]) << 23));
}

// The weights of kGroup logits.
template <Needs needs>
inline Group group_weights(const float* l, const Weigher& weigher) {
  Floats p[kUnroll];
  group_powers<needs>(l, weigher, p);
  Group e;
  SPECDIFF_EACH p[u] = whole(p[u]);
  SPECDIFF_EACH e.low[u] = low_half(p[u]);
  SPECDIFF_EACH e.high[u] = high_half(p[u]);
  if (needs == kAll) {
    const double threshold = double(weigher.threshold);
    SPECDIFF_EACH e.low[u] = Doubles(Longs(e.low[u]) & Longs(e.low[u] >= threshold));
    SPECDIFF_EACH e.high[u] = Doubles(Longs(e.high[u]) & Longs(e.high[u] >= threshold));
  }
  return e;
}

// Adds weights to the sums of each lane.
#ifdef __AVX512F__
typedef int64_t Sums __attribute__((vector_size(kBytes)));

inline Sums sums_of(Doubles e) { return Sums(_mm512_maskz_cvttpd_epi64(0xff, __m512d(e))); }

inline void add(const Floats (&p)[kUnroll], Sums& low, Sums& high) {
  SPECDIFF_EACH {
    __m256 half;
    std::memcpy(&half, &p[u], sizeof(half));
    low += Sums(_mm512_maskz_cvttps_epi64(0xff, half));
    half = _mm512_maskz_extractf32x8_ps(0xff, __m512(p[u]), 1);
    high += Sums(_mm512_maskz_cvttps_epi64(0xff, half));
  }
}
#else
typedef Doubles Sums;

inline Sums sums_of(Doubles e) { return e; }

inline void add(const Floats (&p)[kUnroll], Sums& low, Sums& high) {
  SPECDIFF_EACH {
    const Floats e = whole(p[u]);
    low += low_half(e);
    high += high_half(e);
  }
}
#endif

// The largest of the logits in whole groups, NaN if one is that; i becomes the first logit left.
inline float largest_of_groups(const float* l, int n, int& i) {
  Floats x[kUnroll], high[kUnroll];
  SPECDIFF_EACH high[u] = all(-std::numeric_limits<float>::infinity());
  Lanes nan{};
  for (; i + kGroup <= n; i += kGroup) {
    SPECDIFF_EACH x[u] = reinterpret_cast<const Unaligned*>(l + i)[u];
    SPECDIFF_EACH high[u] = larger(x[u], high[u]);
    for (int u = 0; u < kUnroll; u += 2) nan |= unordered(x[u], x[u + 1]);
  }
  if (any(nan)) return std::numeric_limits<float>::quiet_NaN();
  for (int u = 1; u < kUnroll; ++u) high[0] = larger(high[u], high[0]);
  float largest = high[0][0];
  for (int j = 1; j < kLanes; ++j) largest = high[0][j] > largest ? high[0][j] : largest;
  return largest;
}

// int64(max(difference, 0) 2^60)
inline Longs positive_part(Doubles difference) {
  const Longs bits = Longs(larger(difference, 0x1p-62 - Doubles{}));
  return ((bits & 0xfffffffffffff) | uint64_t(1) << 52) << 8 >> (1023 - (bits >> 52));
}

inline Longs residual_weights(Doubles e_p, Doubles e_q, const Scales& by) {
  return positive_part(by.a * (e_p * by.inverse_p) - e_q * by.inverse_q);
}

inline Longs bias_weights(Doubles e_p, Doubles e_q, const Scales& by, const Raise& raise) {
  const Doubles p = e_p * by.inverse_p, q = e_q * by.inverse_q;
  const Doubles more = (raise.q_share * q + raise.p_share * p + raise.more) / raise.divisor;
  const Doubles chance = Doubles(Longs(larger(more, p)) & Longs(p > 0.0));
  return positive_part(smaller(q, chance) - p);
}

inline int64_t total_of(const Longs& x) {
  uint64_t total = 0;
  for (int i = 0; i < kBytes / 8; ++i) total += x[i];
  return int64_t(total);
}

// The whole groups among n <= kTile logits: their summed weights; i becomes the first logit left.
// Doubles are exact: a lane adds up at most 2^7 weights of at most 2^44.
template <Needs needs>
inline int64_t sum_groups(const float* l, int n, const Weigher& weigher, int& i) {
  static_assert(kTile / kLanes <= 1 << 7, "a lane of `low` takes one weight of each vector");
  Sums low{}, high{};
  for (; i + kGroup <= n; i += kGroup) {
    if constexpr (needs == kAll) {
      const Group e = group_weights<needs>(l + i, weigher);
      SPECDIFF_EACH low += sums_of(e.low[u]);
      SPECDIFF_EACH high += sums_of(e.high[u]);
    } else {
      Floats p[kUnroll];
      group_powers<needs>(l + i, weigher, p);
      add(p, low, high);
    }
  }
  int64_t total = 0;
  for (int j = 0; j < kBytes / 8; ++j) total += int64_t(low[j]) + int64_t(high[j]);
  return total;
}

// The same for the residual weights of two rows.
template <Needs of_p, Needs of_q>
inline int64_t excess_groups(const float* l_p, const float* l_q, int n, const Weigher& p,
                             const Weigher& q, const Scales& by, int& i) {
  Longs total[kUnroll]{};
  for (; i + kGroup <= n; i += kGroup) {
    const Group e_p = group_weights<of_p>(l_p + i, p), e_q = group_weights<of_q>(l_q + i, q);
    SPECDIFF_EACH total[u] += residual_weights(e_p.low[u], e_q.low[u], by);
    SPECDIFF_EACH total[u] += residual_weights(e_p.high[u], e_q.high[u], by);
  }
  for (int u = 1; u < kUnroll; ++u) total[0] += total[u];
  return total_of(total[0]);
}

// The same for the bias weights.
template <Needs of_p, Needs of_q>
inline int64_t bias_groups(const float* l_p, const float* l_q, int n, const Weigher& p,
                           const Weigher& q, const Scales& by, const Raise& raise, int& i) {
  Longs total[kUnroll]{};
  for (; i + kGroup <= n; i += kGroup) {
    const Group e_p = group_weights<of_p>(l_p + i, p), e_q = group_weights<of_q>(l_q + i, q);
    SPECDIFF_EACH total[u] += bias_weights(e_p.low[u], e_q.low[u], by, raise);
    SPECDIFF_EACH total[u] += bias_weights(e_p.high[u], e_q.high[u], by, raise);
  }
  for (int u = 1; u < kUnroll; ++u) total[0] += total[u];
  return total_of(total[0]);
}

constexpr int kNoise = kBytes / 8 * kUnroll;  // counters that one step of Philox takes

// race_word of the token ids 2 pair .. 2 (pair + kNoise) - 1. High halves of the lanes may hold
// anything until the end: products read the low ones.
inline void noise_group(uint64_t seed, uint32_t position, uint32_t pair, uint64_t* words) {
  Longs c0[kUnroll], c1[kUnroll], c2[kUnroll], c3[kUnroll]{};
  SPECDIFF_EACH {
    for (int i = 0; i < kBytes / 8; ++i) c0[u][i] = pair + u * (kBytes / 8) + i;
    c1[u] = uint64_t(position) - Longs{};
    c2[u] = uint64_t(kCoupled) - Longs{};
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    SPECDIFF_EACH {
      const Longs low = low_times(c0[u], uint64_t(0xD2511F53u) - Longs{});
      const Longs high = low_times(c2[u], uint64_t(0xCD9E8D57u) - Longs{});
      c0[u] = high >> 32 ^ c1[u] ^ uint64_t(k0);
      c1[u] = high;
      c2[u] = low >> 32 ^ c3[u] ^ uint64_t(k1);
      c3[u] = low;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  SPECDIFF_EACH {
    const Longs even = (c0[u] & 0xffffffffu) | c1[u] << 32;
    const Longs odd = (c2[u] & 0xffffffffu) | c3[u] << 32;
    for (int i = 0; i < kBytes / 8; ++i) {
      words[2 * (u * (kBytes / 8) + i)] = even[i];
      words[2 * (u * (kBytes / 8) + i) + 1] = odd[i];
    }
  }
}

// As integers, in the order of the logits.
inline void store(const Group& e, int64_t* out) {
  const auto put = [](Doubles x, int64_t* to) {  // exact below 2^52
    const Longs integers = Longs(x + 0x1p52) - 0x4330000000000000;
    std::memcpy(to, &integers, sizeof(integers));
  };
  SPECDIFF_EACH {
    put(e.low[u], out + u * kLanes);
    put(e.high[u], out + u * kLanes + kLanes / 2);
  }
}

}  // namespace
}  // namespace specdiff::cpu
#endif
