#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// silu(code of the token before position i + inner) -> row b of `to`.
void code_of(const DrawInOrderParams& p, const Rows& to, int64_t b, int64_t i) {
  const DenoiseStepParams& step = p.step;
  const int64_t* tokens = step.new_tokens + b * step.k;
  const int64_t token = i == 0 ? p.anchor[b] : std::max<int64_t>(tokens[i - 1], 0);
  if (token < 0 || token >= p.vocabulary) {
    throw std::out_of_range("the token before position " + std::to_string(i) + " is " +
                            std::to_string(token) + ", but correction.codes has " +
                            std::to_string(p.vocabulary) + " rows");
  }
  const float* code = p.codes + token * p.rank;
  const int64_t positions = p.hi - step.lo;
  const float* inner = p.inner ? p.inner + (b * positions + i - step.lo) * p.rank : nullptr;
  for (int64_t r = 0; r < p.rank; ++r) {
    const float x = inner ? code[r] + inner[r] : code[r];
    *at(to, b, r) = x / (1 + std::exp(-x));
  }
}

}  // namespace

void draw_in_order(const DrawInOrderParams& p) {
  DenoiseStepParams step = p.step;
  const int64_t B = step.batch, K = step.k, n = p.weight.n;
  std::copy_n(step.tokens, B * K, step.new_tokens);  // those drawn before are read
  Product product = {};
  product.x = B == 1 ? plain_rows(p.drawn, 0) : in_panels(p.drawn, B, p.rank);
  product.m = B;
  product.k = p.rank;
  product.weight = p.weight;
  for (int64_t i = p.step.lo; i < p.hi; ++i) {
    for (int64_t b = 0; b < B; ++b) code_of(p, product.x, b, i);
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
