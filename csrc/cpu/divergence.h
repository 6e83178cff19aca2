// The inner loops of row_divergence, over tiles of two rows. divergence.cpp is compiled once for
// each instruction set, with fused multiply-adds: this is no part of the sampling distribution.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

// exp((l - max) / temperature), 1 at the largest logit; below 2^-125 it is 0.
struct Weight {
  float max;
  float lowest;               // l - max of weight 2^-125
  float log2_scale;           // log2(e) / temperature
  float step_high, step_low;  // temperature ln(2); a step of at most 126 times high is exact
  float inverse;              // 1 / temperature
};

// Over a row: of its weights w and distances d = l - max.
struct Moments {
  double sum = 0;       // of w
  double distance = 0;  // of w d
};

// A token's weights in target and draft become comparable.
struct Pair {
  Weight p, q;
  float ratio;  // Z_p / Z_q
  float shift;  // temperature ln(Z_p / Z_q)
};

// Over the drafted tokens; x = d_p - d_q - shift, about temperature ln(p / q).
struct Overlap {
  double drafted = 0;     // sum of w_p
  double excess = 0;      // sum of w_q where q > p
  double difference = 0;  // sum of (ratio w_q - w_p)+
  double kl = 0;          // sum of w_p x
  double reverse = 0;     // sum of w_q x
};

// gradient = q (tv [q > p] + constant - reverse x / T - entropy (d_q - log_sum) / T) - kl p, where
// T is the temperature. All five factors have one 1 / T; two would leave what fp32 can hold.
struct Slope {
  Pair pair;
  float inverse_p, inverse_q;  // 1 / Z
  float log_sum;               // temperature ln(Z_q)
  float tv, kl, reverse, entropy, constant;
};

struct DivergenceKernels {
  // merged into those given
  void (*moments)(const float* l, int n, const Weight& row, Moments* sums);
  void (*overlap)(const float* l_p, const float* l_q, int n, const Pair& pair, Overlap* sums);
  void (*gradient)(const float* l_p, const float* l_q, int n, const Slope& slope, float* out);
  // f32 -> n bf16 or f16, to nearest even
  void (*narrow)(const float* x, int dtype, int n, uint16_t* out);
};

// Those for the instruction set in use.
const DivergenceKernels& divergence();

}  // namespace specdiff::cpu
