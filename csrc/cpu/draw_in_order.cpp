#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {
void sequential_code(const Correction& c, int64_t token, const float* inner, const Rows& to,
                     int64_t row) {
  if (token < 0 || token >= c.vocabulary) {
    throw std::out_of_range("a token before a position is " + std::to_string(token) +
                            ", but correction.codes has " + std::to_string(c.vocabulary) + " rows");
  }
  const float* code = c.codes + token * c.rank;
  for (int64_t r = 0; r < c.rank; ++r) {
    const float x = inner ? code[r] + inner[r] : code[r];
    *at(to, row, r) = x / (1 + std::exp(-x));
  }
}

void draw_in_order(const DrawInOrderParams& p) {
  const Correction& c = p.correction;
  DenoiseStepParams step = p.step;
  const int64_t B = step.batch, K = step.k, n = c.weight.n;
  std::copy_n(step.tokens, B * K, step.new_tokens);  // those drawn before are read
  Product product = {};
  product.x = B == 1 ? plain_rows(p.drawn, 0) : in_panels(p.drawn, B, c.rank);
  product.m = B;
  product.k = c.rank;
  product.weight = c.weight;
  for (int64_t i = p.step.lo; i < p.hi; ++i) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t before =
          i == 0 ? c.anchor[b] : std::max<int64_t>(step.new_tokens[b * K + i - 1], 0);
      const int64_t place = b * (p.hi - p.step.lo) + i - p.step.lo;
      sequential_code(c, before, c.inner ? c.inner + place * c.rank : nullptr, product.x, b);
    }
    float* logits = static_cast<float*>(const_cast<void*>(step.logits.data)) + i * n;
    product.residual = logits;
    product.residual_stride = K * n;
    product.out = plain_rows(logits, K * n);
    multiply(product, step.threads);
    step.lo = i;
    step.hi = i + 1;
    denoise_step(step);
    step.step += 1;
    step.entropies = false;  // of the first position alone
    step.entropy = p.ignored;
    step.tokens = step.new_tokens;
    step.tau = step.new_tau;
    step.rows = step.new_rows;
    step.distribution = step.new_distribution;
  }
}

}  // namespace specdiff::cpu
