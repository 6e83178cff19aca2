#include <algorithm>

#include "ops.h"
#include "product.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr int64_t kRowsPerItem = 6 * kPack;  // neighbouring rows of the weight, read by one thread

// x [m, k] -> columns [k, m], four rows at a time.
void turn(const SkinnyLinearParams& p) {
  int64_t m = 0;
  for (; m + 4 <= p.m; m += 4) {
    const float* x = p.x + m * p.x_stride;
    float* to = p.x_columns + m;
    for (int64_t k = 0; k < p.k; ++k, ++x, to += p.m) {
      to[0] = x[0];
      to[1] = x[p.x_stride];
      to[2] = x[2 * p.x_stride];
      to[3] = x[3 * p.x_stride];
    }
  }
  for (; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) p.x_columns[k * p.m + m] = p.x[m * p.x_stride + k];
  }
}

}  // namespace

void skinny_linear(SkinnyLinearParams p) {
  const Product multiply = product();
  if (p.m == 1) {
    p.x_columns = const_cast<float*>(p.x);  // as it is
  } else {
    turn(p);
  }
  const int64_t items = (p.n + kRowsPerItem - 1) / kRowsPerItem;
  parallel_for(items, p.n * p.k, p.threads, [&](int64_t item, int) {
    const int64_t first = item * kRowsPerItem;
    multiply(p, first, std::min(first + kRowsPerItem, p.n));
  });
}

}  // namespace specdiff::cpu
