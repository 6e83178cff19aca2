// Compiled once for each instruction set, with SPECDIFF_ISA naming it: what is done to the values
// of one token.
#include <cmath>

#include "forward.h"
#include "vectors.h"

namespace specdiff::cpu {
namespace {

// Sum of f(i, vector) over x, by four sums that take turns.
template <class F>
inline float sum_of(const float* x, int64_t k, const F& f) {
  Floats sums[4]{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    each<4>([&](auto u)
                SPECDIFF_INLINE { sums[u] = sums[u] + f(load(x + i + u * kLanes), kLanes); });
  }
  for (int u = 0; i < k; i += kLanes, ++u) {
    const int64_t left = std::min<int64_t>(k - i, kLanes);
    sums[u] = sums[u] + f(load_some(x + i, left), left);
  }
  return total_of((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

void normalise(const Norm& norm, const float* x, int64_t k, const Rows& out, int64_t row) {
  float mean = 0;
  if (norm.kind == NormKind::kLayer) {
    mean = sum_of(x, k, [](Floats v, int64_t) SPECDIFF_INLINE { return v; }) / float(k);
  }
  const auto squared = [&](Floats v, int64_t left) SPECDIFF_INLINE {
    v = v - mean;
    for (int64_t i = left; i < kLanes; ++i) v[i] = 0;
    return v * v;
  };
  const float inverse = 1.0f / std::sqrt(sum_of(x, k, squared) / float(k) + norm.epsilon);
  for (int64_t start = 0; start < k; start += out.length) {
    float* to = at(out, row, start);
    const int64_t end = std::min(k - start, out.length);
    for (int64_t i = 0; i < end; i += kLanes) {
      const int64_t left = std::min<int64_t>(end - i, kLanes), c = start + i;
      Floats y = (load_some(x + c, left) - mean) * inverse;
      y = y * (load_some(norm.weight + c, left) + norm.offset);
      if (norm.bias) y = y + load_some(norm.bias + c, left);
      store_some(to + i, y, left);
    }
  }
}

void rotate(const float* x, int64_t size, const float* cos, const float* sin, int64_t h,
            float scale, float* out) {
  for (int64_t i = 0; i < h; i += kLanes) {
    const int64_t left = std::min<int64_t>(h - i, kLanes);
    const Floats a = load_some(x + i, left), b = load_some(x + h + i, left);
    const Floats low = a * load_some(cos + i, left) - b * load_some(sin + i, left);
    const Floats high = b * load_some(cos + h + i, left) + a * load_some(sin + h + i, left);
    store_some(out + i, low * scale, left);
    store_some(out + h + i, high * scale, left);
  }
  for (int64_t i = 2 * h; i < size; ++i) out[i] = x[i] * scale;
}

}  // namespace

using Normalise = decltype(Forward::normalise);
using Rotate = decltype(Forward::rotate);
extern const Normalise SPECDIFF_CONCAT(normalise_, SPECDIFF_ISA);
extern const Rotate SPECDIFF_CONCAT(rotate_, SPECDIFF_ISA);
const Normalise SPECDIFF_CONCAT(normalise_, SPECDIFF_ISA) = normalise;
const Rotate SPECDIFF_CONCAT(rotate_, SPECDIFF_ISA) = rotate;

}  // namespace specdiff::cpu
