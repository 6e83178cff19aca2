// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// A few rows of the weight meet a few rows of x in registers, so that the weight is read from
// memory once for all of x. Each output is one accumulator vector over k in order, summed by
// halves: the same operations whatever else is computed beside it.
#include "product.h"

#include <algorithm>

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)

namespace specdiff::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kRows[] = {0, 4, 4, 4, 4, 4, 4};  // rows of the weight beside so many rows of x
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kRows[] = {0, 4, 4, 4, 2, 2, 2};
#else
constexpr int kBytes = 16;
constexpr int kRows[] = {0, 4, 4, 4, 2, 2, 2};
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kMostX = 6;
constexpr int kBlock = 12;  // rows of the weight that stay in cache while all of x passes
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

// The first n <= kLanes values, then zeros.
template <class T>
inline Floats load_some(const T* x, int64_t n) {
  T padded[kLanes] = {};
  std::copy(x, x + n, padded);
  return load(padded);
}

inline float total(Floats x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  }
  return x[0];
}

// Keeps a vector in its register, where the compiler would rather load it again for each product.
#if defined(__x86_64__)
#define SPECDIFF_KEEP(vector) asm("" : "+x"(vector))
#else
#define SPECDIFF_KEEP(vector)
#endif
#define SPECDIFF_UNROLL _Pragma("GCC unroll 8")

// R rows of the weight by C rows of x. Asks for 1 / kShare as many bytes at `ahead` as it reads.
template <int R, int C, int kShare, class T>
inline void block(const SkinnyLinearParams& p, const T* w, const float* x, const char*& ahead,
                  int64_t n, int64_t m) {
  constexpr int kAsked = std::max<int>(1, R * 2 * kLanes * int(sizeof(T)) / kLine / kShare);
  Floats sums[R][C]{};
  const auto add = [&](const Floats* rows, int64_t k, auto&& read) {
    SPECDIFF_UNROLL for (int c = 0; c < C; ++c) {
      Floats column = read(x + c * p.x_stride + k);
      SPECDIFF_KEEP(column);
      SPECDIFF_UNROLL for (int r = 0; r < R; ++r) sums[r][c] = sums[r][c] + rows[r] * column;
    }
  };
  const auto whole = [](const float* from) { return load(from); };
  Floats rows[R];
  int64_t k = 0;
  for (; k + 2 * kLanes <= p.k; k += 2 * kLanes) {
    SPECDIFF_UNROLL for (int i = 0; i < kAsked; ++i, ahead += kLine) __builtin_prefetch(ahead);
    SPECDIFF_UNROLL for (int r = 0; r < R; ++r) rows[r] = load(w + r * p.weight_stride + k);
    add(rows, k, whole);
    SPECDIFF_UNROLL for (int r = 0; r < R; ++r) rows[r] =
        load(w + r * p.weight_stride + k + kLanes);
    add(rows, k + kLanes, whole);
  }
  for (; k < p.k; k += kLanes) {
    const int64_t left = std::min<int64_t>(p.k - k, kLanes);
    for (int r = 0; r < R; ++r) rows[r] = load_some(w + r * p.weight_stride + k, left);
    add(rows, k, [&](const float* from) { return load_some(from, left); });
  }
  for (int r = 0; r < R; ++r) {
    const float bias = p.bias ? p.bias[n + r] : 0.0f;
    for (int c = 0; c < C; ++c) p.out[(m + c) * p.n + n + r] = total(sums[r][c]) + bias;
  }
}

template <int C, int kShare, class T>
void columns(const SkinnyLinearParams& p, const char* ahead, int64_t first, int64_t last,
             int64_t m) {
  constexpr int R = kRows[C];
  const T* weight = static_cast<const T*>(p.weight);
  const float* x = p.x + m * p.x_stride;
  int64_t n = first;
  for (; n + R <= last; n += R) {
    block<R, C, kShare>(p, weight + n * p.weight_stride, x, ahead, n, m);
  }
  for (; n < last; ++n) block<1, C, kShare>(p, weight + n * p.weight_stride, x, ahead, n, m);
}

template <class T>
using Columns = void (*)(const SkinnyLinearParams&, const char*, int64_t, int64_t, int64_t);

template <int kShare, class T>
constexpr Columns<T> kColumns[] = {nullptr,
                                   columns<1, kShare, T>,
                                   columns<2, kShare, T>,
                                   columns<3, kShare, T>,
                                   columns<4, kShare, T>,
                                   columns<5, kShare, T>,
                                   columns<6, kShare, T>};

// While one block of the weight is multiplied, the next one is fetched.
template <class T>
void multiply(const SkinnyLinearParams& p, int64_t first, int64_t last) {
  const int64_t parts = (p.m + kMostX - 1) / kMostX;
  for (int64_t n = first; n < last; n += kBlock) {
    const int64_t end = std::min<int64_t>(n + kBlock, last);
    const T* next = static_cast<const T*>(p.weight) + end * p.weight_stride;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t m = p.m * part / parts;
      const int64_t count = p.m * (part + 1) / parts - m;
      const char* ahead = reinterpret_cast<const char*>(next) +
                          part * kBlock * p.weight_stride * int64_t(sizeof(T)) / parts;
      const auto& table = parts == 1 ? kColumns<1, T> : kColumns<2, T>;
      table[count](p, ahead, n, end, m);
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
