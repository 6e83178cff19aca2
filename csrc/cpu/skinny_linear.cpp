#include <algorithm>

#include "ops.h"
#include "product.h"
#include "threads.h"

namespace specdiff::cpu {

constexpr int64_t kRowsPerItem = 96;  // neighbouring rows of the weight, read by one thread

void skinny_linear(const SkinnyLinearParams& p) {
  const Product multiply = product();
  const int64_t items = (p.n + kRowsPerItem - 1) / kRowsPerItem;
  parallel_for(items, p.n * p.k, p.threads, [&](int64_t item, int) {
    const int64_t first = item * kRowsPerItem;
    multiply(p, first, std::min(first + kRowsPerItem, p.n));
  });
}

}  // namespace specdiff::cpu
