// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// A few rows of the weight meet a few rows of x in registers, so that the weight is read from
// memory once for all of x. Each output is one accumulator vector over k in order, summed by
// halves: the same operations whatever else is computed beside it.
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
constexpr int kMany = kBytes == 64 ? 4 : 2;                 // there are 32 registers, or 16
constexpr int kRows[] = {0, 4, 4, 4, kMany, kMany, kMany};  // of the weight, by rows of x
constexpr int kLanes = kBytes / 4;
constexpr int kStep = 2 * kLanes;  // columns between two looks at what to ask for
constexpr int kMostX = 6;          // rows of x in registers
constexpr int kGroup = 32;         // rows of x that a weight is read once for
constexpr int kBlock = 16;         // rows of the weight that all of x passes, so many columns at a
constexpr int kChunk = 288;        // time: they and kMostX rows of x stay in the first level
constexpr int kLine = 64;

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

// Keeps a vector in its register, where the compiler would rather load it again for each product.
#if defined(__x86_64__) && !defined(SPECDIFF_BYTES)
#define SPECDIFF_KEEP(vector) asm("" : "+x"(vector))
#else
#define SPECDIFF_KEEP(vector)
#endif

// Reads that are due later, in the order of the addresses.
struct Ahead {
  const char* at;
  const char* end;

  template <int kLines>
  SPECDIFF_INLINE void ask() {
    if (at >= end) return;
    each<kLines>([&](auto i) SPECDIFF_INLINE { __builtin_prefetch(at + i * kLine); });
    at += kLines * kLine;
    asm volatile("" ::: "memory");  // before the loads that follow
  }
};

// R rows of the weight by C rows of x, kLanes columns. read(from) gives a vector.
template <int R, int C, class T, class Read>
inline SPECDIFF_INLINE void add(Floats (&sums)[R][C], const T* w, int64_t w_stride, const float* x,
                                int64_t x_stride, const Read& read) {
  Floats rows[R];
  each<R>([&](auto r) SPECDIFF_INLINE {
    rows[r] = read(w + r * w_stride);
    SPECDIFF_KEEP(rows[r]);
  });
  each<C>([&](auto c) SPECDIFF_INLINE {
    Floats column = read(x + c * x_stride);
    SPECDIFF_KEEP(column);
    each<R>([&](auto r) SPECDIFF_INLINE { sums[r][c] = sums[r][c] + rows[r] * column; });
  });
}

// The same over `count` columns, begun at zero or taken up from `kept` [C][kBlock] and left there.
// Asks for 1 / kShare as many bytes as it reads of the weight.
template <int R, int C, int kShare, class T>
void tile(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count, bool begin,
          Floats* kept, Ahead& ahead) {
  constexpr int kLines = std::max(1, R * kStep * int(sizeof(T)) / kLine / kShare);
  const auto whole = [](const auto* from) SPECDIFF_INLINE { return load(from); };
  Floats sums[R][C]{};
  if (!begin) {
    each<R>([&](auto r) { each<C>([&](auto c) { sums[r][c] = kept[c * kBlock + r]; }); });
  }
  Ahead asked = ahead;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    asked.ask<kLines>();
    add(sums, w + k, w_stride, x + k, x_stride, whole);
    add(sums, w + k + kLanes, w_stride, x + k + kLanes, x_stride, whole);
  }
  for (; k < count; k += kLanes) {
    const int64_t left = std::min<int64_t>(count - k, kLanes);
    add(sums, w + k, w_stride, x + k, x_stride,
        [&](const auto* from) SPECDIFF_INLINE { return load_some(from, left); });
  }
  each<R>([&](auto r) { each<C>([&](auto c) { kept[c * kBlock + r] = sums[r][c]; }); });
  ahead = asked;
}

template <int C, int kShare, class T>
void columns(const T* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
             int64_t count, bool begin, Floats* kept, Ahead& ahead) {
  constexpr int R = kRows[C];
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    tile<R, C, kShare>(w + r * w_stride, w_stride, x, x_stride, count, begin, kept + r, ahead);
  }
  for (; r < rows; ++r) {
    tile<1, C, kShare>(w + r * w_stride, w_stride, x, x_stride, count, begin, kept + r, ahead);
  }
}

template <class T>
using Columns = void (*)(const T*, int64_t, int64_t, const float*, int64_t, int64_t, bool, Floats*,
                         Ahead&);

template <int kShare, class T>
constexpr Columns<T> kColumns[] = {nullptr,
                                   columns<1, kShare, T>,
                                   columns<2, kShare, T>,
                                   columns<3, kShare, T>,
                                   columns<4, kShare, T>,
                                   columns<5, kShare, T>,
                                   columns<6, kShare, T>};

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

// The sum of each of kLanes vectors, by halves: lane i is that of vector i.
template <int G = kLanes>
inline Floats totals(const Floats* vectors) {
  if constexpr (G == 1) {
    return vectors[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    Floats sums[G / 2];
    for (int i = 0; i < G / 2; ++i) {
      const Floats a = vectors[i], b = vectors[i + G / 2];
      sums[i] = halves_of<G, false>(a, b, lanes) + halves_of<G, true>(a, b, lanes);
    }
    return totals<G / 2>(sums);
  }
}

// out[m][n], ... of `rows` rows of the weight from their accumulators [kBlock]
inline void finish(const SkinnyLinearParams& p, int64_t m, int64_t n, int64_t rows,
                   const Floats* kept) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t left = std::min<int64_t>(rows - r, kLanes);
    Floats result = totals(kept + r);
    if (p.bias) result = result + load_some(p.bias + n + r, left);
    float* out = p.out + m * p.n + n + r;
    if (left == kLanes) {
      store(out, result);
    } else {
      for (int i = 0; i < left; ++i) out[i] = result[i];
    }
  }
}

// Rows of the weight as f32 [rows, kChunk], since all of x would widen them again.
inline void widen(const uint16_t* w, int64_t w_stride, int64_t rows, int64_t count, float* to) {
  for (int64_t r = 0; r < rows; ++r, w += w_stride, to += kChunk) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(to + k, load(w + k));
    for (; k < count; ++k) to[k] = load_some(w + k, 1)[0];
  }
}

// One block of the weight by rows m, ..., m + group - 1 of x, while the block at `next` is fetched.
template <class T>
void block(const SkinnyLinearParams& p, int64_t m, int64_t group, int64_t n, int64_t rows,
           const char* next) {
  alignas(64) Floats kept[kGroup * kBlock];
  alignas(64) float widened[std::is_same_v<T, float> ? 1 : kBlock * kChunk];
  if (rows < kBlock) std::fill(kept, kept + kGroup * kBlock, Floats{});
  const int64_t parts = (group + kMostX - 1) / kMostX;
  const int64_t chunks = std::max<int64_t>(1, (p.k + kChunk - 1) / kChunk);
  const int64_t chunk =
      std::max<int64_t>(kStep, (p.k + chunks * kStep - 1) / (chunks * kStep) * kStep);
  const int64_t bytes = m > 0 ? 0 : rows * p.weight_stride * int64_t(sizeof(T));
  Ahead ahead{next, next};
  for (int64_t k = 0; k == 0 || k < p.k; k += chunk) {
    const int64_t count = std::min(p.k - k, chunk);
    const T* w = static_cast<const T*>(p.weight) + n * p.weight_stride + k;
    const bool wide = parts > 1 && !std::is_same_v<T, float>;
    if constexpr (!std::is_same_v<T, float>) {
      if (wide) widen(w, p.weight_stride, rows, count, widened);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = group * part / parts, size = group * (part + 1) / parts - first;
      const float* x = p.x + (m + first) * p.x_stride + k;
      Floats* sums = kept + first * kBlock;
      ahead.end =
          next + bytes * (k * parts + count * (part + 1)) / std::max<int64_t>(1, p.k * parts);
      if (wide) {
        kColumns<4, float>[size](widened, kChunk, rows, x, p.x_stride, count, k == 0, sums, ahead);
      } else {
        const auto& table = parts == 1 ? kColumns<1, T> : kColumns<2, T>;
        table[size](w, p.weight_stride, rows, x, p.x_stride, count, k == 0, sums, ahead);
      }
    }
  }
  for (int64_t i = 0; i < group; ++i) finish(p, m + i, n, rows, kept + i * kBlock);
}

template <class T>
void multiply(const SkinnyLinearParams& p, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n += kBlock) {
    const int64_t rows = std::min<int64_t>(last - n, kBlock);
    const T* next = static_cast<const T*>(p.weight) + (n + rows) * p.weight_stride;
    for (int64_t m = 0; m < p.m; m += kGroup) {
      const int64_t group = std::min<int64_t>(p.m - m, kGroup);
      block<T>(p, m, group, n, rows, reinterpret_cast<const char*>(next));
    }
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
