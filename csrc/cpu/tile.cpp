// Compiled once for each instruction set, with SPECDIFF_ISA naming it. Plain loops: the compiler
// vectorises them, and the law is the same because it contracts and reorders nothing.
#include "tile.h"

#include "specdiff/accept.h"

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)
#define SPECDIFF_STRING_(a) #a
#define SPECDIFF_STRING(a) SPECDIFF_STRING_(a)

namespace specdiff::cpu {
namespace {

void widen(const uint16_t* x, int dtype, int n, float* out) {
  if (dtype == kBFloat16) {
    for (int i = 0; i < n; ++i) out[i] = widen_bf16(x[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = widen_f16(x[i]);
  }
}

void extremes(const float* l, int n, int32_t* low, int32_t* high) {
  int32_t lowest = *low, highest = *high;
  for (int i = 0; i < n; ++i) {
    const int32_t key = order_key(l[i]);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  *low = lowest;
  *high = highest;
}

int64_t sum(const float* l, int n, RowLaw law) {
  int64_t total = 0;
  if (law.threshold == 0) {
    for (int i = 0; i < n; ++i) total += exp2_weight((l[i] - law.max) * law.scale);
  } else {
    for (int i = 0; i < n; ++i) {
      const int64_t e = exp2_weight((l[i] - law.max) * law.scale);
      total += e < law.threshold ? 0 : e;
    }
  }
  return total;
}

void weights(const float* l, int n, RowLaw law, int64_t* e) {
  for (int i = 0; i < n; ++i) {
    const int64_t weight = exp2_weight((l[i] - law.max) * law.scale);
    e[i] = weight < law.threshold ? 0 : weight;
  }
}

int64_t residual(const int64_t* e_p, const int64_t* e_q, int n, double inverse_p, double inverse_q,
                 int64_t* w) {
  int64_t total = 0;
  for (int i = 0; i < n; ++i) {
    w[i] = residual_weight(probability(e_p[i], inverse_p), probability(e_q[i], inverse_q));
    total += w[i];
  }
  return total;
}

}  // namespace

extern const TileKernels SPECDIFF_CONCAT(kernels_, SPECDIFF_ISA);
const TileKernels SPECDIFF_CONCAT(kernels_, SPECDIFF_ISA) = {
    SPECDIFF_STRING(SPECDIFF_ISA), widen, extremes, sum, weights, residual};

}  // namespace specdiff::cpu
