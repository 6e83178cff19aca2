// Sums of products in registers: vectors of one operand by single values of rows of the other.
#pragma once

#include "forward.h"
#include "vectors.h"

namespace specdiff::cpu {
namespace {

constexpr int kVectors = kPack / kLanes;                          // of one column of a pack
constexpr int kMostX = kBytes == 64 ? 12 : kBytes == 32 ? 6 : 3;  // rows of x in registers

// Adds to totals [P][C][kPack] the products of `count` columns of P packs with C rows of x, which
// are kPanel floats apart. Sums begin at 0. Lines from `ahead` on, `pace` bytes for each column,
// are on their way to the second level of cache: the first has no room for them beside what is in
// use.
template <int C, int P, class T>
void tile(const T* const (&packs)[P], const char* const (&ahead)[P], int64_t pace, const float* x,
          int64_t count, float* (&totals)[P]) {
  Floats sums[P][C][kVectors]{};
  const auto add = [&](int64_t k) SPECDIFF_INLINE {
    each<P>([&](auto p) SPECDIFF_INLINE {
      Floats weights[kVectors];
      each<kVectors>([&](auto v)
                         SPECDIFF_INLINE { weights[v] = load(packs[p] + k * kPack + v * kLanes); });
      each<C>([&](auto c) SPECDIFF_INLINE {
        const float value = x[c * kPanel + k];
        each<kVectors>([&](auto v)
                           SPECDIFF_INLINE { sums[p][c][v] = sums[p][c][v] + weights[v] * value; });
      });
    });
  };
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    each<P>([&](auto p) SPECDIFF_INLINE {
      __builtin_prefetch(ahead[p] + k * pace, 0, 2);
      if (pace == kLine) __builtin_prefetch(ahead[p] + k * pace + kLine, 0, 2);
    });
    add(k);
    add(k + 1);
  }
  if (k < count) add(k);
  each<P>([&](auto p) {
    each<C>([&](auto c) {
      each<kVectors>([&](auto v) {
        float* to = totals[p] + c * kPack + v * kLanes;
        store(to, load(to) + sums[p][c][v]);
      });
    });
  });
}

template <class T, int P>
using Tile = void (*)(const T* const (&)[P], const char* const (&)[P], int64_t, const float*,
                      int64_t, float* (&)[P]);

template <class T, int P, int... C>
constexpr Tile<T, P> tile_of(int rows, std::integer_sequence<int, C...>) {
  constexpr Tile<T, P> tiles[] = {tile<C + 1, P, T>...};
  return tiles[rows - 1];
}

// A panel of P packs by `group` rows of x, of which kMostX at once are the most for one pack:
// totals [P][step], rows of kPack, grow. As many packs go together as leave registers for all rows:
// few rows alone would wait for each other's sums.
template <int P, class T>
void multiply_panel(const T* const* packs, const char* const* ahead, const float* x, int64_t group,
                    int64_t count, float* totals, int64_t step) {
  constexpr int64_t kColumn = kPack * sizeof(T);  // bytes
  constexpr int kTogether = std::max(1, kMostX / P);
  if constexpr (!std::is_same_v<T, float>) {
    if (group > kMostX) {  // or each part of the rows would widen the weight anew
      alignas(64) float wide[kPanel * kPack];
      for (int i = 0; i < P; ++i) {
        for (int64_t k = 0; k < count * kPack; k += kLanes) store(wide + k, load(packs[i] + k));
        const float* const pack[] = {wide};
        multiply_panel<1>(pack, ahead + i, x, group, count, totals + i * step, step);
      }
      return;
    }
  }
  if constexpr (P > 1) {
    if (group > kTogether) {
      constexpr int kHalf = P / 2;
      multiply_panel<kHalf>(packs, ahead, x, group, count, totals, step);
      return multiply_panel<kHalf>(packs + kHalf, ahead + kHalf, x, group, count,
                                   totals + kHalf * step, step);
    }
  }
  const int64_t parts = (group + kTogether - 1) / kTogether;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = group * part / parts, size = group * (part + 1) / parts - first;
    const T* of[P];
    const char* next[P];
    float* to[P];
    for (int i = 0; i < P; ++i) {
      of[i] = packs[i];
      next[i] = ahead[i] + count * kColumn / parts * part;
      to[i] = totals + i * step + first * kPack;
    }
    const auto multiply = tile_of<T, P>(size, std::make_integer_sequence<int, kTogether>{});
    multiply(of, next, kColumn / parts, x + first * kPanel, count, to);
  }
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

}  // namespace
}  // namespace specdiff::cpu
