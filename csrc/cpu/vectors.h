// Vectors of fp32 for the files of a model's forward, which are compiled once for each instruction
// set with fused multiply-adds: they are no part of the sampling distribution.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "specdiff/weights.h"

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)
#define SPECDIFF_INLINE __attribute__((always_inline))
// For what is called from several places and has to give each the same bits: in a sum of two
// products a compiler fuses the one or the other, and copies need not agree in which.
#ifdef __clang__
#define SPECDIFF_ONE_COPY __attribute__((noinline))
#else
#define SPECDIFF_ONE_COPY __attribute__((noipa))
#endif

namespace specdiff::cpu {
namespace {

#if defined(SPECDIFF_BYTES)  // a width that the machine lacks, put together by the compiler: tests
constexpr int kBytes = SPECDIFF_BYTES;
#elif defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int64_t kLine = 64;  // bytes of a line of cache

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float AnyFloats __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef uint16_t AnyHalves __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats load(const float* x) { return *reinterpret_cast<const AnyFloats*>(x); }
inline Floats load(const BFloat16* x) {
  // by name, as GCC widens a vector in halves
#if defined(__AVX512F__) && !defined(SPECDIFF_BYTES)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return Floats(Words(_mm512_maskz_cvtepu16_epi32(0xffff, halves)) << 16);
#elif defined(__AVX2__) && !defined(SPECDIFF_BYTES)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return Floats(Words(_mm256_cvtepu16_epi32(halves)) << 16);
#else
  const Halves halves = *reinterpret_cast<const AnyHalves*>(x);
  return Floats(__builtin_convertvector(halves, Words) << 16);
#endif
}
inline Floats load(const Float16* x) {
  Floats wide;
#if defined(__F16C__) && !defined(SPECDIFF_BYTES)
  for (int i = 0; i < kLanes; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    std::memcpy(reinterpret_cast<float*>(&wide) + i, &part, sizeof(part));
  }
#else
  for (int i = 0; i < kLanes; ++i) wide[i] = widen_f16(x[i].bits);
#endif
  return wide;
}
inline void store(float* to, Floats x) { *reinterpret_cast<AnyFloats*>(to) = x; }

// The first n <= kLanes values, then zeros.
template <class T>
inline Floats load_some(const T* x, int64_t n) {
  if (n >= kLanes) return load(x);
  T padded[kLanes] = {};
  std::copy(x, x + n, padded);
  return load(padded);
}

inline void store_some(float* to, Floats x, int64_t n) {
  if (n >= kLanes) return store(to, x);
  for (int i = 0; i < n; ++i) to[i] = x[i];
}

inline Floats all(float x) { return x - Floats{}; }

// f(0), ..., f(N - 1) with constants, so that arrays indexed by them live in registers.
template <class F, int... I>
inline SPECDIFF_INLINE void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline SPECDIFF_INLINE void each(const F& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}

// Lanes of a and b: group after group of G lanes, the G / 2 first (kUpper: last) of a, then of b.
template <int G, bool kUpper, int... L>
inline SPECDIFF_INLINE Floats halves_of(Floats a, Floats b, std::integer_sequence<int, L...>) {
  constexpr int h = G / 2, skip = kUpper ? h : 0;
#define SPECDIFF_LANE (L % G < h ? L + skip : L - h + skip + kLanes)
#ifdef __clang__
  return __builtin_shufflevector(a, b, SPECDIFF_LANE...);
#else
  return __builtin_shuffle(a, b, Words{SPECDIFF_LANE...});
#endif
#undef SPECDIFF_LANE
}

// Transposes kLanes vectors: halves change places, then halves of halves.
template <int G = kLanes>
inline SPECDIFF_INLINE void transpose(Floats (&rows)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  each<kLanes>([&](auto i) SPECDIFF_INLINE {
    constexpr int h = G / 2;
    if constexpr ((i & h) == 0) {
      const Floats a = rows[i], b = rows[i + h];
      rows[i] = halves_of<G, false>(a, b, lanes);
      rows[i + h] = halves_of<G, true>(a, b, lanes);
    }
  });
  if constexpr (G > 2) transpose<G / 2>(rows);
}

// Adds up a vector, halves first.
inline float total_of(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int h = kLanes / 2; h > 0; h /= 2) {
    for (int i = 0; i < h; ++i) lanes[i] += lanes[i + h];
  }
  return lanes[0];
}

// exp(x) = (1 + rest) scale, from -87 to 88.
struct Power {
  Floats rest, scale;
};
inline Power power_of(Floats x) {
  const Floats magic = all(0x1.8p23f);  // makes the low bits the nearest integer
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  Floats f = x - n * 0x1.62e4p-1f;
  f = f - n * 1.42860677e-6f;
  Floats p = f * 1.9875691e-4f + 1.3981999e-3f;
  p = p * f + 8.3334519e-3f;
  p = p * f + 4.1665796e-2f;
  p = p * f + 1.6666666e-1f;
  p = p * f + 0.5f;
  p = p * f;
  return {p * f + f, Floats((Words(shifted) << 23) + (uint32_t(127) << 23))};
}

// exp(x) with a relative error of 2e-7; 0 below -87, exp(88) above 88; NaN of NaN.
inline Floats exponential(Floats x) {
  const Power power = power_of(x > 88.0f ? all(88.0f) : x);
  return x < -87.0f ? Floats{} : (power.rest + 1.0f) * power.scale;
}

// tanh(x), relative to itself; NaN of NaN.
inline Floats tanh_of(Floats x) {
  const Floats twice = x * 2.0f;
  const Power power = power_of(twice > 40.0f ? all(40.0f) : twice < -40.0f ? all(-40.0f) : twice);
  const Floats less_one = power.rest * power.scale + (power.scale - 1.0f);  // exp(2 x) - 1
  return less_one / (less_one + 2.0f);
}

}  // namespace
}  // namespace specdiff::cpu
