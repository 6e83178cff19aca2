// exp2_weight, residual_weight and bias_weight on vectors: the very operations of weights.h and
// accept.h, on kUnroll vectors side by side, since one chain of 40 dependent operations cannot fill
// the units.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#define SPECDIFF_LANES
#include <immintrin.h>

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
inline Floats ceiling(Floats x) {
  return Floats(_mm512_maskz_roundscale_ps(0xffff, __m512(x), _MM_FROUND_TO_POS_INF));
}
inline Doubles larger(Doubles x, Doubles y) {
  return Doubles(_mm512_maskz_max_pd(0xff, __m512d(x), __m512d(y)));
}
inline Doubles smaller(Doubles x, Doubles y) {
  return Doubles(_mm512_maskz_min_pd(0xff, __m512d(x), __m512d(y)));
}
inline Longs shifted(Longs x, Longs count) {
  return Longs(_mm512_maskz_srlv_epi64(0xff, __m512i(x), __m512i(count)));
}
inline Ints whole(Floats x) { return Ints(_mm512_maskz_cvttps_epi32(0xffff, __m512(x))); }
inline Longs low_times(Longs x, Longs y) {
  return Longs(_mm512_maskz_mul_epu32(0xff, __m512i(x), __m512i(y)));
}
#else
inline Floats ceiling(Floats x) { return Floats(_mm256_ceil_ps(__m256(x))); }
inline Doubles larger(Doubles x, Doubles y) {
  return Doubles(_mm256_max_pd(__m256d(x), __m256d(y)));
}
inline Doubles smaller(Doubles x, Doubles y) {
  return Doubles(_mm256_min_pd(__m256d(x), __m256d(y)));
}
// 0 for a count of 64 or more
inline Longs shifted(Longs x, Longs count) {
  return Longs(_mm256_srlv_epi64(__m256i(x), __m256i(count)));
}
// 2^31 for anything that does not fit
inline Ints whole(Floats x) { return Ints(_mm256_cvttps_epi32(__m256(x))); }
// product of the low halves of two lanes
inline Longs low_times(Longs x, Longs y) { return Longs(_mm256_mul_epu32(__m256i(x), __m256i(y))); }
#endif

// The weights of kGroup logits: of those at even and at odd places of each vector.
struct Group {
  Longs even[kUnroll], odd[kUnroll];
};

#define SPECDIFF_EACH for (int u = 0; u < kUnroll; ++u)

// Works on -t, so that shifts are by ceil(-t) = -floor(t); one that is too long, or no number, is
// cut off by `whole` and `shifted`. kFine: some -t may lie in (0, 2^-30), where the distribution
// has -t = 0.
template <bool kFine>
inline Group group_weights(const float* l, const RowDistribution& distribution) {
  Floats t[kUnroll], up[kUnroll], p[kUnroll];
  SPECDIFF_EACH t[u] = reinterpret_cast<const Unaligned*>(l)[u] - distribution.max;
  SPECDIFF_EACH t[u] = t[u] * -distribution.scale;
  if (kFine) {
    SPECDIFF_EACH t[u] = Floats(Ints(t[u]) & (t[u] >= 0x1p-30f));
  }
  SPECDIFF_EACH up[u] = ceiling(t[u]);
  SPECDIFF_EACH t[u] = up[u] - t[u];  // f
  SPECDIFF_EACH p[u] = t[u] * 0.0018671302f;
  SPECDIFF_EACH p[u] = p[u] + 0.00901703f;
  SPECDIFF_EACH p[u] = p[u] * t[u];
  SPECDIFF_EACH p[u] = p[u] + 0.055799913f;
  SPECDIFF_EACH p[u] = p[u] * t[u];
  SPECDIFF_EACH p[u] = p[u] + 0.24016444f;
  SPECDIFF_EACH p[u] = p[u] * t[u];
  SPECDIFF_EACH p[u] = p[u] + 0.6931513f;
  SPECDIFF_EACH p[u] = p[u] * t[u];
  SPECDIFF_EACH p[u] = p[u] + 1.0f;
  Group e;
  SPECDIFF_EACH {
    const Longs mantissa = Longs(Ints(p[u]) - 0x3f000000);  // p 2^23, since p is in [1, 2)
    const Longs shift = Longs(whole(up[u]));
    e.even[u] = shifted(low_times(mantissa, (uint64_t(1) << 21) - Longs{}), shift & 0xffffffffu);
    e.odd[u] = shifted(mantissa >> 32 << 21, shift >> 32);
  }
  return e;
}

// No threshold, and no logit below the row's largest gives a -t in (0, 2^-30).
inline bool plain(const RowDistribution& distribution) {
  const float below = from_order_key(order_key(distribution.max) - 1);
  return distribution.threshold == 0 && (distribution.max - below) * distribution.scale >= 0x1p-30f;
}

inline Longs at_least(Longs e, int64_t threshold) {
  typedef int64_t Signed __attribute__((vector_size(kBytes)));
  return Longs(Signed(e) & (Signed(e) >= threshold));
}

// The weights of kGroup logits under a distribution that is not greedy. kPlain: it is plain.
template <bool kPlain>
inline Group distribution_weights(const float* l, const RowDistribution& distribution) {
  Group e = group_weights<!kPlain>(l, distribution);
  if (!kPlain) {
    SPECDIFF_EACH e.even[u] = at_least(e.even[u], distribution.threshold);
    SPECDIFF_EACH e.odd[u] = at_least(e.odd[u], distribution.threshold);
  }
  return e;
}

inline Doubles probabilities(Longs e, double inverse_total) {
  return (Doubles(e | 0x4330000000000000) - 0x1p52) * inverse_total;
}

// int64(max(difference, 0) 2^60)
inline Longs positive_part(Doubles difference) {
  const Longs bits = Longs(larger(difference, 0x1p-62 - Doubles{}));
  return ((bits & 0xfffffffffffff) | uint64_t(1) << 52) << 8 >> (1023 - (bits >> 52));
}

inline Longs residual_weights(Longs e_p, Longs e_q, const Scales& by) {
  return positive_part(by.a * probabilities(e_p, by.inverse_p) - probabilities(e_q, by.inverse_q));
}

inline Longs bias_weights(Longs e_p, Longs e_q, const Scales& by, const Raise& raise) {
  const Doubles p = probabilities(e_p, by.inverse_p), q = probabilities(e_q, by.inverse_q);
  const Doubles more = (raise.q_share * q + raise.p_share * p + raise.more) / raise.divisor;
  const Doubles chance = Doubles(Longs(larger(more, p)) & Longs(p > 0.0));
  return positive_part(smaller(q, chance) - p);
}

inline int64_t total_of(const Longs& x) {
  uint64_t total = 0;
  for (int i = 0; i < kBytes / 8; ++i) total += x[i];
  return int64_t(total);
}

// The whole groups among n logits: their summed weights; i becomes the first logit left.
template <bool kPlain>
inline int64_t sum_groups(const float* l, int n, const RowDistribution& distribution, int& i) {
  Longs even[kUnroll]{}, odd[kUnroll]{}, total{};
  for (; i + kGroup <= n; i += kGroup) {
    const Group e = distribution_weights<kPlain>(l + i, distribution);
    SPECDIFF_EACH even[u] += e.even[u];
    SPECDIFF_EACH odd[u] += e.odd[u];
  }
  SPECDIFF_EACH total += even[u] + odd[u];
  return total_of(total);
}

// The same for the residual weights of two rows.
template <bool kPlain>
inline int64_t excess_groups(const float* l_p, const float* l_q, int n, const RowDistribution& p,
                             const RowDistribution& q, const Scales& by, int& i) {
  Longs total[kUnroll]{};
  for (; i + kGroup <= n; i += kGroup) {
    const Group e_p = distribution_weights<kPlain>(l_p + i, p),
                e_q = distribution_weights<kPlain>(l_q + i, q);
    SPECDIFF_EACH total[u] += residual_weights(e_p.even[u], e_q.even[u], by);
    SPECDIFF_EACH total[u] += residual_weights(e_p.odd[u], e_q.odd[u], by);
  }
  for (int u = 1; u < kUnroll; ++u) total[0] += total[u];
  return total_of(total[0]);
}

// The same for the bias weights.
template <bool kPlain>
inline int64_t bias_groups(const float* l_p, const float* l_q, int n, const RowDistribution& p,
                           const RowDistribution& q, const Scales& by, const Raise& raise, int& i) {
  Longs total[kUnroll]{};
  for (; i + kGroup <= n; i += kGroup) {
    const Group e_p = distribution_weights<kPlain>(l_p + i, p),
                e_q = distribution_weights<kPlain>(l_q + i, q);
    SPECDIFF_EACH total[u] += bias_weights(e_p.even[u], e_q.even[u], by, raise);
    SPECDIFF_EACH total[u] += bias_weights(e_p.odd[u], e_q.odd[u], by, raise);
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

// Even and odd places back into their order.
inline void store(const Group& e, int64_t* out) {
  SPECDIFF_EACH {
    for (int i = 0; i < kBytes / 8; ++i) {
      out[u * kLanes + 2 * i] = int64_t(e.even[u][i]);
      out[u * kLanes + 2 * i + 1] = int64_t(e.odd[u][i]);
    }
  }
}

}  // namespace
}  // namespace specdiff::cpu
#endif
