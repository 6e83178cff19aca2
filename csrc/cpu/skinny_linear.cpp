#include <algorithm>

#include "forward.h"
#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

constexpr int64_t kRowsPerItem = 6 * kPack;  // neighbouring rows of the weight, read by one thread

// x [m, k] in panels.
Rows lay_out(const SkinnyLinearParams& p) {
  if (p.m == 1) return plain_rows(const_cast<float*>(p.x), 0);  // as it is
  const Rows rows = in_panels(p.scratch, p.m, p.k);
  for (int64_t m = 0; m < p.m; ++m) lay_out(p.x + m * p.x_stride, p.k, rows, m);
  return rows;
}

}  // namespace

void lay_out(const float* x, int64_t k, const Rows& rows, int64_t row) {
  for (int64_t first = 0; first < k; first += rows.length) {
    std::copy_n(x + first, std::min(k - first, rows.length), at(rows, row, first));
  }
}

void skinny_linear(const SkinnyLinearParams& p) {
  Product product = {};
  product.x = lay_out(p);
  product.m = p.m;
  product.k = p.k;
  product.weight = p.weight;
  product.out = plain_rows(p.out, p.weight.n);
  multiply(product, p.threads);
}

void multiply(const Product& product, int threads) {
  const int64_t n = product.weight.n, items = (n + kRowsPerItem - 1) / kRowsPerItem;
  parallel_for(items, n * product.k, threads, [&](int64_t item, int) {
    const int64_t first = item * kRowsPerItem;
    forward().multiply(product, first, std::min(first + kRowsPerItem, n));
  });
}

}  // namespace specdiff::cpu
