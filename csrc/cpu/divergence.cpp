// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// Sums are fp32 in the lanes of a vector over one tile, and fp64 over tiles. The last vector of a
// tile is filled up with logits of -inf, which weigh nothing.
#include "divergence.h"

#include <algorithm>
#include <limits>

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)

namespace specdiff::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float AnyFloats __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

inline Floats load(const float* x) { return *reinterpret_cast<const AnyFloats*>(x); }
inline void store(Floats x, float* to) { *reinterpret_cast<AnyFloats*>(to) = x; }

// The first n values, then -inf.
inline Floats load_some(const float* x, int n) {
  if (n >= kLanes) return load(x);
  float padded[kLanes];
  std::fill(std::copy(x, x + n, padded), padded + kLanes, -kInfinity);
  return load(padded);
}

inline Floats larger(Floats x, float y) { return x > y ? x : y - Floats{}; }

// x where the mask is on, else 0, whatever x is
inline Floats where(Ints mask, Floats x) { return Floats(Ints(x) & mask); }

inline double total(Floats x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += double(x[i]);
  return sum;
}

// A few vectors side by side, since one chain of 15 dependent operations cannot fill the units.
#define SPECDIFF_EACH(n) for (int u = 0; u < (n); ++u)

// Of lowest <= d = l - max <= 0. With n the nearest integer to d log2(e) / T, exp(d / T) is
// 2^n exp(y), y = d / T - n ln(2); the polynomial's relative error is 1.1e-8.
template <int U>
inline void weights(const Floats (&d)[U], const Weight& row, Floats (&w)[U]) {
  Floats shifted[U], n[U], y[U], p[U];
  SPECDIFF_EACH(U) shifted[u] = d[u] * row.log2_scale + 0x1.8p23f;  // its low bits are n
  SPECDIFF_EACH(U) n[u] = shifted[u] - 0x1.8p23f;
  SPECDIFF_EACH(U) y[u] = d[u] - n[u] * row.step_high;
  SPECDIFF_EACH(U) y[u] = y[u] - n[u] * row.step_low;
  SPECDIFF_EACH(U) y[u] = y[u] * row.inverse;
  SPECDIFF_EACH(U) p[u] = y[u] * 0.0013926184f + 0.008363179f;
  SPECDIFF_EACH(U) p[u] = p[u] * y[u] + 0.041666556f;
  SPECDIFF_EACH(U) p[u] = p[u] * y[u] + 0.16666576f;
  SPECDIFF_EACH(U) p[u] = p[u] * y[u] + 0.5f;
  SPECDIFF_EACH(U) p[u] = p[u] * y[u];
  SPECDIFF_EACH(U) p[u] = p[u] * y[u] + y[u];
  SPECDIFF_EACH(U) p[u] = p[u] + 1.0f;
  SPECDIFF_EACH(U) w[u] = Floats(Words(p[u]) + (Words(shifted[u]) << 23));
}

// d goes no lower than the lowest, since 0 times infinity is no number.
template <int U>
inline void add_moments(const Floats (&l)[U], const Weight& row, Floats* sum, Floats* distance) {
  Floats d[U], w[U];
  SPECDIFF_EACH(U) d[u] = larger(l[u] - row.max, row.lowest);
  weights(d, row, w);
  SPECDIFF_EACH(U) w[u] = where(d[u] > row.lowest, w[u]);
  SPECDIFF_EACH(U) sum[u] = sum[u] + w[u];
  SPECDIFF_EACH(U) distance[u] = distance[u] + w[u] * d[u];
}

void moments(const float* l, int n, const Weight& row, Moments* sums) {
  constexpr int U = 4;
  Floats sum[U]{}, distance[U]{};
  int i = 0;
  for (; i + U * kLanes <= n; i += U * kLanes) {
    Floats logits[U];
    SPECDIFF_EACH(U) logits[u] = load(l + i + u * kLanes);
    add_moments(logits, row, sum, distance);
  }
  for (; i < n; i += kLanes) {
    const Floats logits[1] = {load_some(l + i, n - i)};
    add_moments(logits, row, sum, distance);
  }
  SPECDIFF_EACH(U) sums->sum += total(sum[u]);
  SPECDIFF_EACH(U) sums->distance += total(distance[u]);
}

// U vectors of tokens of both rows.
template <int U>
struct Tokens {
  Floats d_p[U], d_q[U], w_p[U], w_q[U];
  Floats gap[U];  // positive where q > p
  Floats x[U];    // T ln(p / q): inf where only q is 0, -inf where only p is, NaN where both are

  Tokens(const float* l_p, const float* l_q, int n, const Pair& pair) {
    SPECDIFF_EACH(U) d_p[u] = load_some(l_p + u * kLanes, n - u * kLanes) - pair.p.max;
    SPECDIFF_EACH(U) d_q[u] = load_some(l_q + u * kLanes, n - u * kLanes) - pair.q.max;
    weights(d_p, pair.p, w_p);
    weights(d_q, pair.q, w_q);
    SPECDIFF_EACH(U) w_p[u] = where(d_p[u] > pair.p.lowest, w_p[u]);
    SPECDIFF_EACH(U) w_q[u] = where(d_q[u] > pair.q.lowest, w_q[u]);
    SPECDIFF_EACH(U) gap[u] = w_q[u] * pair.ratio - w_p[u];
    SPECDIFF_EACH(U) x[u] = (d_p[u] - d_q[u]) - pair.shift;
  }
};

struct OverlapLanes {
  Floats drafted{}, excess{}, difference{}, kl{}, reverse{};

  template <int U>
  void add(const Tokens<U>& at) {
    SPECDIFF_EACH(U) {
      const Floats w_p = at.w_p[u], w_q = at.w_q[u], gap = at.gap[u], x = at.x[u];
      drafted = drafted + w_p;
      excess = excess + where(gap > 0.0f, w_q);
      difference = difference + where(gap > 0.0f, gap);
      // a weight may have been rounded to 0, but not an infinite ratio to nothing
      kl = kl + where(w_p > 0.0f, w_p * x) + where(x == kInfinity, x);
      reverse = reverse + where(w_q > 0.0f, w_q * x) + where(x == -kInfinity, x);
    }
  }
};

void overlap(const float* l_p, const float* l_q, int n, const Pair& pair, Overlap* sums) {
  constexpr int U = 2;
  OverlapLanes lanes;
  int i = 0;
  for (; i + U * kLanes <= n; i += U * kLanes) lanes.add(Tokens<U>(l_p + i, l_q + i, n, pair));
  for (; i < n; i += kLanes) lanes.add(Tokens<1>(l_p + i, l_q + i, n - i, pair));
  sums->drafted += total(lanes.drafted);
  sums->excess += total(lanes.excess);
  sums->difference += total(lanes.difference);
  sums->kl += total(lanes.kl);
  sums->reverse += total(lanes.reverse);
}

// kLogs: reverse or entropy is not 0
template <bool kLogs, int U>
inline void gradients_of(const Tokens<U>& at, const Slope& slope, Floats (&out)[U]) {
  // 0 times an infinite ratio is 0
  const Ints reversed = Ints{} - int32_t(slope.reverse != 0);
  SPECDIFF_EACH(U) {
    const Floats p = at.w_p[u] * slope.inverse_p, q = at.w_q[u] * slope.inverse_q;
    Floats inner = where(at.gap[u] > 0.0f, slope.tv - Floats{}) + slope.constant;
    if (kLogs) {
      const float inverse = slope.pair.q.inverse;
      inner = inner - where(reversed, at.x[u]) * inverse * slope.reverse;
      inner = inner - (at.d_q[u] - slope.log_sum) * inverse * slope.entropy;
    }
    const Floats all = where(at.w_q[u] > 0.0f, q * inner) - p * slope.kl;
    out[u] = where(at.d_q[u] > -kInfinity, all);
  }
}

template <bool kLogs>
void gradients(const float* l_p, const float* l_q, int n, const Slope& slope, float* out) {
  constexpr int U = 2;
  int i = 0;
  for (; i + U * kLanes <= n; i += U * kLanes) {
    Floats g[U];
    gradients_of<kLogs>(Tokens<U>(l_p + i, l_q + i, n, slope.pair), slope, g);
    SPECDIFF_EACH(U) store(g[u], out + i + u * kLanes);
  }
  for (; i < n; i += kLanes) {
    Floats g[1];
    gradients_of<kLogs>(Tokens<1>(l_p + i, l_q + i, n - i, slope.pair), slope, g);
    for (int j = 0; j < std::min(kLanes, n - i); ++j) out[i + j] = g[0][j];
  }
}

void gradient(const float* l_p, const float* l_q, int n, const Slope& slope, float* out) {
  const bool logs = slope.reverse != 0 || slope.entropy != 0;
  (logs ? gradients<true> : gradients<false>)(l_p, l_q, n, slope, out);
}

inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t(x == x ? rounded : 0x7fc0);
}

inline uint16_t narrow_f16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // a float of ulp 2^-24, as the subnormals have, rounds for them
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(half | (bits >> 16 & 0x8000));
}

void narrow(const float* x, int dtype, int n, uint16_t* out) {
  if (dtype == kBFloat16) {
    for (int i = 0; i < n; ++i) out[i] = narrow_bf16(x[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = narrow_f16(x[i]);
  }
}

}  // namespace

extern const DivergenceKernels SPECDIFF_CONCAT(divergence_, SPECDIFF_ISA);
const DivergenceKernels SPECDIFF_CONCAT(divergence_, SPECDIFF_ISA) = {moments, overlap, gradient,
                                                                      narrow};

}  // namespace specdiff::cpu
