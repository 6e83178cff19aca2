// The inner loops, over tiles of a row that stay in the first-level cache. tile.cpp is compiled
// once for each instruction set; which one runs is chosen at run time.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

constexpr int kTile = 1024;
constexpr int kMaxTiles = (1 << 19) / kTile;

// What a residual a p - q multiplies with: 1 / Z_p, 1 / Z_q and a.
struct Scales {
  double inverse_p, inverse_q, a;
};

struct TileKernels {
  const char* isa;
  // n half-precision logits -> f32
  void (*widen)(const uint16_t* x, int dtype, int n, float* out);
  // the largest of n logits, NaN if one is that
  float (*largest)(const float* l, int n);
  // sum of the weights of a row that is not greedy; own: the weigher is of that very row
  int64_t (*sum)(const float* l, int n, Weigher weigher, bool own);
  void (*weights)(const float* l, int n, Weigher weigher, int64_t* e);
  // w[v] = residual weight of (a p - q)+; returns the sum
  int64_t (*residual)(const int64_t* e_p, const int64_t* e_q, int n, Scales scales, int64_t* w);
  // the same sum from the logits of two rows over the same tokens, neither of them greedy; p is the
  // first row's own
  int64_t (*excess)(const float* l_p, const float* l_q, int n, Weigher p, Weigher q, Scales scales);
  // the sum of bias weights of the same two rows; the scales' a is not used
  int64_t (*bias)(const float* l_p, const float* l_q, int n, Weigher p, Weigher q, Scales scales,
                  Raise raise);
  // sum of the spreads of a row that is neither greedy nor truncated
  int64_t (*spread)(const float* l, int n, Weigher weigher);
  // race_word of the token ids 2 pair .. 2 (pair + pairs) - 1
  void (*noise)(uint64_t seed, int64_t position, int64_t pair, int pairs, uint64_t* words);
  // the first of those that reach the least E / e below `best`, which it becomes; -1 if none does
  int (*race)(const int64_t* e, const int64_t* words, int n, double* best);
};

// The kernels in use: the best that the processor has, or what use_isa chose.
const TileKernels& kernels();

int isa_count();
const char* isa_name(int index);
bool isa_supported(int index);
// false if there is no such instruction set or the processor lacks it
bool use_isa(const char* name);

}  // namespace specdiff::cpu
