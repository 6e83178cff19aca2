// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// The weight goes by in packs: 16 of its rows side by side, [k][16], as it was packed before or as
// `pack_columns` turns them. A vector of a pack meets one value of x for each row of x, all sums in
// registers, so that the weight is read from memory once for all of x. An output is a sum over k in
// order, kChunk terms at a time: the same operations whatever else is computed beside it.
#include "product.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)
#define SPECDIFF_INLINE __attribute__((always_inline))

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
constexpr int kVectors = kPack / kLanes;                          // of one column of a pack
constexpr int kMostX = kBytes == 64 ? 12 : kBytes == 32 ? 6 : 3;  // rows of x in registers
constexpr int kGroup = 32;   // rows of x that a weight is read once for
constexpr int kChunk = 256;  // columns: a pack's stay in the first level of cache
constexpr int kLine = 64;
constexpr int kAhead = 6144;  // bytes from what is read of packs to what is asked for

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float AnyFloats __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef uint16_t AnyHalves __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

inline Floats load(const float* x) { return *reinterpret_cast<const AnyFloats*>(x); }
inline Floats load(const uint16_t* x) {  // bf16
  const Halves halves = *reinterpret_cast<const AnyHalves*>(x);
  return Floats(__builtin_convertvector(halves, Words) << 16);
}
inline void store(float* to, Floats x) { *reinterpret_cast<AnyFloats*>(to) = x; }

// The first n <= kLanes values, then zeros.
template <class T>
inline Floats load_some(const T* x, int64_t n) {
  T padded[kLanes] = {};
  std::copy(x, x + n, padded);
  return load(padded);
}

// f(0), ..., f(N - 1) with constants, so that arrays indexed by them live in registers.
template <class F, int... I>
inline SPECDIFF_INLINE void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline SPECDIFF_INLINE void each(const F& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}

// Adds to totals [C][kPack] the products of `count` columns of a pack with C values of x each.
// The lines at `ahead` are on their way to the second level of cache, one for each that is read:
// the first level has no room for them beside what is in use.
template <int C, class T>
void tile(const T* pack, const float* x, int64_t x_step, int64_t count, float* totals,
          const char* ahead) {
  constexpr int kColumns = std::max<int>(1, kLine / (kPack * sizeof(T)));  // of a line
  Floats sums[C][kVectors]{};
  const auto add = [&](int64_t k) SPECDIFF_INLINE {
    Floats weights[kVectors];
    each<kVectors>([&](auto v)
                       SPECDIFF_INLINE { weights[v] = load(pack + k * kPack + v * kLanes); });
    each<C>([&](auto c) SPECDIFF_INLINE {
      const float value = x[k * x_step + c];
      each<kVectors>([&](auto v) SPECDIFF_INLINE { sums[c][v] = sums[c][v] + weights[v] * value; });
    });
  };
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    each<2 / kColumns>([&](auto i) SPECDIFF_INLINE {
      __builtin_prefetch(ahead + k * kPack * int64_t(sizeof(T)) + i * kLine, 0, 2);
    });
    add(k);
    add(k + 1);
  }
  if (k < count) add(k);
  each<C>([&](auto c) {
    each<kVectors>([&](auto v) {
      float* to = totals + c * kPack + v * kLanes;
      store(to, load(to) + sums[c][v]);
    });
  });
}

template <class T>
using Tile = void (*)(const T*, const float*, int64_t, int64_t, float*, const char*);

template <class T, int... C>
constexpr Tile<T> tile_of(int rows, std::integer_sequence<int, C...>) {
  constexpr Tile<T> tiles[] = {tile<C + 1, T>...};
  return tiles[rows - 1];
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

// `count` columns of rows of the weight -> [count][kPack] f32, zeros for rows that there are not.
template <class T>
void pack_columns(const T* w, int64_t w_stride, int64_t rows, int64_t count, float* to) {
  for (int64_t v = 0; v < kPack; v += kLanes) {
    int64_t k = 0;
    Floats square[kLanes];
    for (; v + kLanes <= rows && k + kLanes <= count; k += kLanes) {
      const T* from = w + v * w_stride + k;
      each<kLanes>([&](auto i) SPECDIFF_INLINE { square[i] = load(from + i * w_stride); });
      transpose(square);
      each<kLanes>([&](auto i) SPECDIFF_INLINE { store(to + (k + i) * kPack + v, square[i]); });
    }
    for (; k < count; ++k) {
      for (int64_t i = v; i < v + kLanes; ++i) {
        to[k * kPack + i] = i < rows ? load_some(w + i * w_stride + k, 1)[0] : 0.0f;
      }
    }
  }
}

// out[m][n], ... of `rows` rows of the weight from their totals [kPack]
inline void finish(const SkinnyLinearParams& p, int64_t m, int64_t n, int64_t rows,
                   const float* totals) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t left = std::min<int64_t>(rows - r, kLanes);
    Floats result = load(totals + r);
    if (p.bias) result = result + load_some(p.bias + n + r, left);
    float* out = p.out + m * p.n + n + r;
    if (left == kLanes) {
      store(out, result);
    } else {
      for (int i = 0; i < left; ++i) out[i] = result[i];
    }
  }
}

// A chunk of a pack by rows m, ..., m + group - 1 of x.
template <class T>
void chunk(const SkinnyLinearParams& p, const T* pack, int64_t k, int64_t count, int64_t m,
           int64_t group, float* totals, const char* ahead) {
  const int64_t parts = (group + kMostX - 1) / kMostX;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = group * part / parts, size = group * (part + 1) / parts - first;
    const float* x = p.x_columns + k * p.m + m + first;
    const auto multiply = tile_of<T>(size, std::make_integer_sequence<int, kMostX>{});
    multiply(pack, x, p.m, count, totals + first * kPack, ahead);
  }
}

// Rows n, ..., n + rows - 1 of the weight, at most a pack, by all of x.
template <class T>
void block(const SkinnyLinearParams& p, int64_t n, int64_t rows) {
  alignas(64) float totals[kGroup * kPack];
  alignas(64) float packed[kChunk * kPack];
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t chunks = std::max<int64_t>(1, (p.k + kChunk - 1) / kChunk);
  for (int64_t m = 0; m < p.m; m += kGroup) {
    const int64_t group = std::min<int64_t>(p.m - m, kGroup);
    std::fill(totals, totals + group * kPack, 0.0f);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t k = p.k * i / chunks, count = p.k * (i + 1) / chunks - k;
      if (p.packed) {
        const T* pack = weight + n * p.k + k * kPack;
        chunk(p, pack, k, count, m, group, totals, reinterpret_cast<const char*>(pack) + kAhead);
      } else {
        const T* next = weight + (n + kPack) * p.weight_stride + k * kPack;
        pack_columns(weight + n * p.weight_stride + k, p.weight_stride, rows, count, packed);
        chunk<float>(p, packed, k, count, m, group, totals, reinterpret_cast<const char*>(next));
      }
    }
    for (int64_t i = 0; i < group; ++i) finish(p, m + i, n, rows, totals + i * kPack);
  }
}

template <class T>
void multiply(const SkinnyLinearParams& p, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n += kPack) {
    block<T>(p, n, std::min<int64_t>(last - n, kPack));
  }
}

void product_of(const SkinnyLinearParams& p, int64_t first, int64_t last) {
  if (p.weight_dtype == kBFloat16) return multiply<uint16_t>(p, first, last);
  multiply<float>(p, first, last);
}

}  // namespace

extern const Product SPECDIFF_CONCAT(product_, SPECDIFF_ISA);
const Product SPECDIFF_CONCAT(product_, SPECDIFF_ISA) = product_of;

}  // namespace specdiff::cpu
